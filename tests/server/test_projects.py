"""Two projects on one database and one machine: whatever one of them asks, it neither sees nor changes anything of the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel

from tests.server.harness import NO_TLS, Running, enrol, in_database, release, running
from tests.server.test_access import OPERATIONS, VALUES
from wherry_server import sessions
from wherry_server.api.description import BODIES
from wherry_server.db.tables import Assignment, KnownBad
from wherry_server.ingest import Ingest
from wherry_server.outcomes import FAILURES
from wherry_server.secrets_kept import hash_secret
from wherry_server.services import open_services
from wherry_server.times import now_us
from wherry_shared import wire
from wherry_shared.frames import device_key, seal

MARK = "bravo-secret"
"""In everything of the other project, and in no question."""
LIMITS = {"api_reads_per_s": 0, "api_changes_per_s": 0, "device_requests_per_s": 0, "public_per_s": 0}
PEOPLE = {"issuer": "http://127.0.0.1:9", "client_id": "w", "groups": {"all": [{"role": "admin"}]}}


@dataclass
class Two:
    """The one who asks, and the other, which has something."""

    asking: Running
    other: Running
    device: wire.EnrolAnswer
    own: wire.EnrolAnswer
    manifest: str
    session: str
    enrolment: str
    values: dict[str, Any]


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.soak)])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("projects")
    shared = f"sqlite+aiosqlite:///{folder / 'shared.sqlite'}"
    if request.param == "postgres":
        shared = request.getfixturevalue("postgres").database()
    with ExitStack() as stack:
        asking, other = (
            stack.enter_context(running(folder / name, project=name, database=shared, oidc=PEOPLE, **LIMITS))
            for name in ("alpha", "bravo")
        )
        yield stocked(asking, other, folder)


def stocked(asking: Running, other: Running, folder: Path) -> Two:
    """Give the other project one of everything, with the mark in it."""
    _, manifest = release(other, folder, "file-type", "1.1.0")
    device, own = other.device("bench-1", site=MARK), asking.device("its-own")
    with other.http() as http:
        made = [
            http.post("/api/v1/cohorts", json={"name": "berlin", "selector": f"label.site = {MARK}"}),
            http.post("/api/v1/flags", json={"name": "new-threshold", **BODIES["preview_flag"], "description": MARK}),
            http.post("/api/v1/rollouts", json={**BODIES["create_rollout"], "cohort": "berlin"}),
            http.post("/api/v1/webhooks", json={"name": "berlin", "url": f"https://{MARK}.example/hook"}),
            http.post("/api/v1/tokens", json={"name": f"{MARK}-token", "role": "viewer"}),
        ]
        assert [answer.status_code for answer in made] == [201] * len(made), [answer.text for answer in made]
        (token,) = [one["id"] for one in http.get("/api/v1/tokens").json() if one["name"].startswith(MARK)]

    async def log_in(connection: AsyncConnection) -> str:
        return await sessions.create(connection, "bravo", "cli", "s", MARK, ["all"], now_us() + sessions.HOUR_US)

    async def fail(connection: AsyncConnection) -> None:
        """The bundle failed on the device, by which it is in quarantine, and is known to be bad on its hardware."""
        bad = {"manifest": manifest, "hardware_class": "x86_64/onnxruntime", "reason": MARK}
        await connection.execute(insert(KnownBad).values(project_id="bravo", updated_at=1, **bad))
        made = await connection.scalar(text("SELECT id FROM rollout WHERE project_id = 'bravo'"))
        row = {"rollout_id": made, "device_id": device.device, "model": "file-type", "project_id": "bravo", "stage": 0}
        row |= {"share_key": 0, "to_manifest": manifest, "to_target": "file-type/1.1.0", "exposed_at": 1}
        await connection.execute(insert(Assignment).values(outcome=FAILURES[0], reason=MARK, **row))

    in_database(other.settings, fail)
    with other.http() as http:
        for path in ("quarantine", "quarantine/hardware"):
            assert MARK in http.get(f"/api/v1/{path}").text, "there is something to see"
    session = in_database(other.settings, log_in)
    values = {
        **VALUES,
        "device": device.device,
        "digest": manifest,
        "number": 1,
        "project": "bravo",
        "name": "berlin",
        "session": hash_secret(session)[:12],
        "token_id": token,
        "role": "file-type",
    }
    return Two(asking, other, device, own, manifest, session, other.enrolment_token(), values)


def rows_of(server: Running, project: str) -> dict[str, list[Any]]:
    """Return all that the database holds of a project, but what a server writes about itself."""

    async def read(connection: AsyncConnection) -> dict[str, list[Any]]:
        found = {}
        for table in SQLModel.metadata.sorted_tables:
            if table.name not in ("lease", "idempotency"):
                wanted = select(table).where(table.c.project_id == project).order_by(*table.primary_key.columns)
                found[table.name] = [tuple(row) for row in await connection.execute(wanted)]
        return found

    return in_database(server.settings, read)


def bodies(two: Two) -> dict[str, Any]:
    """What is sent: all that the other project has, by its names and ids."""
    return {
        **BODIES,
        "create_rollout": {**BODIES["create_rollout"], "cohort": "berlin"},
        "roll_back": {"model": "file-type", "device": two.device.device},
        "release_device": {"device": two.device.device, "model": "file-type"},
        "clear_hardware": {"manifest": two.manifest, "hardware_class": "x86_64/onnxruntime"},
        "publish_bundle": {"model": "file-type", "version": "1.1.0", "manifest": two.manifest},
        "simulate_rollout": {**BODIES["simulate_rollout"], "devices": 10, "runs": 1},
    }


def test_no_route_leads_into_another_project(two: Two) -> None:
    sent, before, asked = bodies(two), rows_of(two.other, "bravo"), 0
    assert len(before["device"]) == len(before["rollout"]) == len(before["bundle"]) == 1
    credentials = {"device": f"{two.own.device}:{two.own.bearer}", "public": ""}
    with httpx.Client(base_url=two.asking.url, trust_env=False, timeout=20, verify=NO_TLS) as http:
        for operation in sorted(
            OPERATIONS, key=lambda one: "{" not in one.path
        ):  # what makes something of its own comes last
            token = credentials.get(operation.need, two.asking.admin)
            path = operation.path.format(**two.values)
            plain = operation.method in ("GET", "HEAD", "DELETE")
            body = {} if plain else {"json": sent.get(operation.name, {})}
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            answer = http.request(operation.method, path, headers=headers, **body)
            asked += 1
            assert MARK not in answer.text + repr(answer.headers), operation
            assert answer.status_code != 500, (operation, answer.text)
            if "{" in operation.path and operation.name != "list_wheels":
                assert answer.status_code >= 400, (operation, answer.text)
    assert asked > 80
    assert rows_of(two.other, "bravo") == before, "nothing of the other project was changed"


def test_no_credential_of_another_project_opens_a_route(two: Two) -> None:
    given = {
        "token": two.other.admin,
        "session": two.session,
        "device": f"{two.device.device}:{two.device.bearer}",
        "session of a browser": "",
    }
    for name, credential in given.items():
        headers = (
            {"Authorization": f"Bearer {credential}"} if credential else {"Cookie": f"{sessions.COOKIE}={two.session}"}
        )
        with httpx.Client(base_url=two.asking.url, headers=headers, trust_env=False, timeout=20, verify=NO_TLS) as http:
            for operation in OPERATIONS:
                if operation.need == "public":
                    continue
                path = operation.path.format(**two.values)
                body = {} if operation.method in ("GET", "HEAD", "DELETE") else {"json": {}}
                try:
                    status = http.request(operation.method, path, **body).status_code
                except httpx.TransportError:  # it hung up after an answer to an upload
                    status = http.request(operation.method, path, **body).status_code
                assert status == 401, (name, operation)
    with two.other.http(two.session) as http:
        assert http.get("/api/v1/me").json()["project"] == "bravo", "at home it is somebody"


def test_an_enrolment_token_of_another_project_enrols_nobody(two: Two) -> None:
    refused = enrol(two.asking, two.enrolment, "stranger")
    assert (refused.status_code, refused.json()["code"]) == (403, "enrolment_refused")
    assert enrol(two.other, two.enrolment, "at-home").status_code == 200


def test_keys_and_trust_are_of_one_project(two: Two) -> None:
    one, other = open_services(two.asking.settings), open_services(two.other.settings)
    try:
        assert one.master_key != other.master_key
        assert one.trust.root_digest != other.trust.root_digest
        assert one.authority.ca_pem != other.authority.ca_pem
        with two.asking.http() as http:
            assert http.get("/tuf/bravo/timestamp.json").status_code == 404
            assert http.head(f"/api/v1/blobs/{two.manifest}").status_code == 404
        with two.other.http() as http:
            assert http.head(f"/api/v1/blobs/{two.manifest}").status_code == 200
    finally:
        asyncio.run(_close(one, other))


async def _close(*services: Any) -> None:
    for one in services:
        await one.close()


def test_what_a_device_of_another_project_says_is_not_stored(two: Two) -> None:
    services = open_services(two.asking.settings)
    hello = wire.Hello(format=1, device=two.device.device, at=now_us(), boot="b", agent="1")
    key = device_key(services.master_key, two.device.device)  # even if the servers had one key
    frame = seal(key, "hello", two.device.device, wire.encode(hello))

    async def store() -> Any:
        try:
            return await Ingest(services.database, services.master_key, "alpha").store_batch(
                {"hello": [(two.device.device, frame)]}
            )
        finally:
            await services.close()

    result = asyncio.run(store())
    assert not result.hellos


def test_each_has_an_audit_log_of_its_own(two: Two) -> None:
    for server in (two.asking, two.other):
        with server.http() as http:
            verdict = http.get("/api/v1/audit/verify").json()
            assert verdict["whole"], verdict
            assert (MARK in http.get("/api/v1/audit").text) is (server is two.other)
