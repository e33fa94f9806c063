"""The frame of the API: who may, how it refuses, what it limits, what it says about itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from schemathesis import openapi
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel

from tests.server.harness import Running, in_database, running
from wherry_server import api_tokens, problems
from wherry_server.app import BODY_BYTES_MAX
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError

pytestmark = pytest.mark.backends

READS = ("/models", "/bundles", "/devices", "/fleet", "/audit", "/audit/verify")


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wherryapi_wrong", "Basic YTpi", "wherryapi_wrong", "Bearer \xff"]
)
def test_without_a_good_token_nothing_is_told(server: Running, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.get(f"{server.url}/api/v1{path}", headers=headers, trust_env=False)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    problem = answer.json()
    assert problem["code"] == "unauthenticated"
    assert problem["next_step"]


def test_an_expired_token_opens_nothing(server: Running) -> None:
    token = in_database(server.settings, lambda c: api_tokens.create(c, "default", "old", "admin", 0))
    with server.http(token) as http:
        answer = http.get("/api/v1/fleet")
    assert (answer.status_code, answer.json()["code"]) == (401, "token_expired")


def test_a_revoked_token_opens_nothing(server: Running) -> None:
    with server.http() as admin:
        made = admin.post("/api/v1/tokens", json={"name": "short-lived", "role": "viewer"}).json()["token"]
        with server.http(made) as http:
            assert http.get("/api/v1/fleet").status_code == 200
            listed = {token["name"]: token for token in admin.get("/api/v1/tokens").json()}
            assert made not in json.dumps(listed)
            assert admin.delete(f"/api/v1/tokens/{listed['short-lived']['id']}").status_code == 204
            assert admin.delete(f"/api/v1/tokens/{listed['short-lived']['id']}").status_code == 404
            assert http.get("/api/v1/fleet").status_code == 401


def test_the_database_holds_no_secret_in_clear(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server:
        device = server.device("quiet")
        enrolment = server.enrolment_token()
        secrets = [server.admin, device.bearer, device.mac_key, enrolment.split(".")[1]]

        async def everything(connection: AsyncConnection) -> str:
            tables = SQLModel.metadata.sorted_tables
            return repr([list((await connection.execute(select(table))).all()) for table in tables])

        rows = in_database(server.settings, everything)
        assert device.device in rows
    files = [file.read_bytes() for file in (tmp_path / "data").glob("wherry.sqlite*")]  # deleted pages, too
    for content in (rows.encode(), *files):
        for secret in secrets:
            assert secret.encode() not in content


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_is_refused_at_its_first_byte_too_many(server: Running, declared: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(BODY_BYTES_MAX // 100_000 + 2):
            yield b" " * 100_000

    content = b" " * (BODY_BYTES_MAX + 1) if declared else pieces()
    with server.http() as http:
        for path in ("/api/v1/tokens", "/device/v1/enrol"):
            answer = http.post(path, content=content if declared else pieces())
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokens", {"name": "x", "role": "king"}),
        ("/tokens", {"name": "x", "role": "viewer", "days": 0}),
        ("/tokens", {"name": "x", "role": "viewer", "extra": 1}),
        ("/tokens", {"name": "a b", "role": "viewer"}),
        ("/enrolment-tokens", {"uses": 0}),
        ("/bundles", {"model": "m"}),
        ("/bundles", []),
    ],
)
def test_a_body_of_the_wrong_shape_is_a_problem_that_names_the_place(server: Running, path: str, body: object) -> None:
    with server.http() as http:
        answer = http.post(f"/api/v1{path}", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
    assert answer.headers["content-type"] == problems.MEDIA_TYPE
    assert "body" in answer.json()["detail"]


def test_what_is_not_there_is_a_problem_too(server: Running) -> None:
    with server.http() as http:
        assert http.get("/nowhere").json()["code"] == "not_found"
        assert http.delete("/api/v1/fleet").json()["code"] == "method_not_allowed"
        for path, code in (("devices/x", "device_unknown"), ("bundles/m/1.0.0", "bundle_unknown")):
            answer = http.get(f"/api/v1/{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, code)


def test_every_error_has_a_status_by_whose_fault_it_is() -> None:
    assert problems.status_of(RefusedError("something_new", "x")) == 422
    assert problems.status_of(UnreachableError("something_new", "x")) == 503
    assert problems.status_of(DeviceError("something_new", "x")) == 507
    assert problems.status_of(RefusedError("bin_changed", "x")) == 412


def test_the_description_of_the_api_is_valid_and_names_every_operation_once(server: Running) -> None:
    description = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    schema = openapi.from_dict(description)
    schema.validate()
    found = [operation.ok() for operation in schema.get_all_operations()]
    assert len(found) > 15
    operations = [
        (operation["operationId"], path, method)
        for path, item in description["paths"].items()
        for method, operation in item.items()
    ]
    names = [name for name, _, _ in operations]
    assert len(set(names)) == len(names)
    for _, path, method in operations:
        operation = description["paths"][path][method]
        assert operation.get("description"), f"{method} {path} says nothing"
        assert problems.MEDIA_TYPE in operation["responses"]["4XX"]["content"]


def test_the_audit_log_is_listed_and_verified(server: Running) -> None:
    with server.http() as http:
        for number in range(4):
            server.device(f"audited-{number}")
        entries = http.get("/api/v1/audit").json()
        assert [entry["action"] for entry in entries[:2]] == ["device.enrol", "enrolment_token.create"]
        assert entries[1]["actor"] == "token:admin"
        assert entries[0]["previous_hash"] == entries[1]["hash"]
        assert http.get("/api/v1/audit", params={"before": entries[3]["id"], "limit": 1}).json() == [entries[4]]
        verdict = http.get("/api/v1/audit/verify").json()
        assert (verdict["whole"], verdict["broken_at"], verdict["head"]) == (True, None, entries[0]["hash"])
