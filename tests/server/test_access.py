"""Every route and every command, tried by every role: whatever was not granted is refused."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import typer
from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.server import access_page
from tests.server.access_page import LOCAL, VERBS
from tests.server.harness import NO_TLS, Running, in_database, release, running, write_bundle
from tests.server.test_cli_tree import ALL
from wherry_server import access, api_tokens, rollouts
from wherry_server.access import Operation
from wherry_server.api.description import BODIES, PARAMETERS
from wherry_server.app import ROUTERS, create_app
from wherry_server.ceremony import Ceremony
from wherry_server.cli.everything import app
from wherry_server.db.database import Database
from wherry_server.grants import MAY, ROLES, Grant, Permission, Role, Subject
from wherry_server.services import open_services
from wherry_server.trust import Trust
from wherry_shared.errors import RefusedError, WherryError
from wherry_shared.publishing import PublisherKey

OPERATIONS = access.operations(module.router for module in ROUTERS)
INERT = {
    "upload_blob": "nothing is served before a signed bundle names it",
    "put_bin": "whose key signed it decides about models",
}
"""Operations that any grant with the role may do, whatever its scope."""
NEEDS_HTTPS = {"device invite"}
"""Commands that ask nothing of a server without https; the operation that they ask for is in the rows of routes."""
IDLE = {"trust repair", "trust adopt", "trust cosign"}
"""Commands that find nothing to do here, and so ask for nothing but a look."""
VALUES: dict[str, Any] = {
    **PARAMETERS,
    "command": "pause",
    "ending": "revoke",
    "event": 1,
    "verdict": "accept",
    "project": "default",
    "role": "none",
    "session": "0" * 12,
    "token_id": "0" * 12,
}
REFUSALS = ("unauthenticated", "token_expired", "role_missing", "scope_missing")
EXAMPLES = {**BODIES, "simulate_rollout": {**BODIES["simulate_rollout"], "devices": 10, "runs": 1}}
SWITCH = {"type": "string", "variants": {"old": "a", "new": "b"}, "default": "new"}


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("access")
    with running(folder / "data", api_reads_per_s=0, api_changes_per_s=0) as server:
        stock(server, folder)
        yield server


def stock(server: Running, folder: Path) -> None:
    """A bundle, a device in a cohort, a rollout for it: number 1."""
    release(server, folder, "file-type", "1.1.0")
    server.device("bench-1", site="berlin")
    with server.http() as http:
        assert http.post("/api/v1/cohorts", json=BODIES["create_cohort"]).status_code == 201
        wish = {**BODIES["create_rollout"], "start": False, "approval": {"stages": [1]}}
        made = http.post("/api/v1/rollouts", json=wish)
        assert made.status_code == 201, made.text
        assert http.post("/api/v1/flags", json={"name": "threshold", **SWITCH}).status_code == 201


def ask(server: Running, operation: Operation, token: str | None, **values: Any) -> tuple[int, str]:
    """Return status and code of the answer to an example of an operation."""
    path = operation.path.format(**{**VALUES, **values})
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    body = {} if operation.method in ("GET", "HEAD", "DELETE") else {"json": EXAMPLES.get(operation.name, {})}
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20, verify=NO_TLS) as http:
        answer = http.request(operation.method, path, headers=headers, **body)
    said = answer.json() if answer.headers.get("content-type") == "application/problem+json" and answer.content else {}
    return answer.status_code, said.get("code", "")


def token_of(server: Running, role: Role, **scope: Any) -> str:
    return in_database(
        server.settings, lambda c: api_tokens.create(c, server.settings.project, f"one-{role}", role, 1, **scope)
    )


@pytest.fixture(scope="module")
def tokens(stocked: Running) -> dict[Role, str]:
    return {role: token_of(stocked, role) for role in ROLES}


@pytest.fixture(scope="module")
def device(stocked: Running) -> str:
    enrolled = stocked.device("its-own")
    return f"{enrolled.device}:{enrolled.bearer}"


def test_the_page_is_what_the_routes_say() -> None:
    shown = access_page.PAGE.read_text(encoding="utf-8")
    assert shown == access_page.page(), "run python -m tests.server.access_page, and look at what it changes"


def test_every_command_has_a_row() -> None:
    assert sorted(VERBS) == sorted(ALL), "say in tests/server/access_page.py what the command needs"
    assert {need for need, _ in VERBS.values()} <= {LOCAL, "public", *get_args(Permission)}


def test_a_route_that_does_not_say_who_may_keeps_the_server_from_starting() -> None:
    router = APIRouter()

    @router.get("/open")
    async def open_to_all() -> None: ...

    with pytest.raises(RuntimeError, match="does not say who may"):
        access.operations([router])


def test_nothing_is_served_beside_the_operations_but_their_description(stocked: Running) -> None:
    """What is walked below is all there is: no mount, no socket, no route that was added behind."""
    app = create_app(open_services(stocked.settings))
    included = [route.original_router for route in app.routes if hasattr(route, "original_router")]
    assert [id(one) for one in included] == [id(module.router) for module in ROUTERS]
    rest = {getattr(route, "path", repr(route)) for route in app.routes if not hasattr(route, "original_router")}
    assert rest == {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_route_lets_in_whom_its_row_names_and_nobody_else(
    stocked: Running, operation: Operation, tokens: dict[Role, str], device: str
) -> None:
    number = 99 if operation.name == "follow_rollout" else 1  # a stream that lasts is not asked for
    strangers: list[str | None] = [None, "wherryapi_wrong", "a" * 22 + ":wrong"]
    if operation.need == "public":
        for stranger in strangers:
            assert ask(stocked, operation, stranger, number=number)[1] not in REFUSALS
        return
    for stranger in strangers:
        status, code = ask(stocked, operation, stranger, number=number)
        assert status == 401
        assert code == "unauthenticated" or operation.method == "HEAD"
    own = ask(stocked, operation, device, number=number)
    assert (own[0] == 401) is (operation.need != "device")
    for role in ROLES:
        status, code = ask(stocked, operation, tokens[role], number=number)
        if operation.need == "device":
            assert status == 401
        elif operation.need in MAY[role]:
            assert status < 500, (role, code)
            assert code not in REFUSALS, role
        else:
            assert (status, code) == (403, "role_missing"), role


def test_a_scope_holds_at_every_route_that_changes_something(tmp_path: Path) -> None:
    with running(tmp_path / "data", api_reads_per_s=0, api_changes_per_s=0) as server:
        stock(server, tmp_path)
        for role in ROLES:
            server.device(f"bench-{role}", site="berlin")
        scopes: dict[str, dict[str, list[str]]] = {
            "model": {"models": ["file-type"]},
            "cohort": {"cohorts": ["berlin"]},
            "both": {"models": ["file-type"], "cohorts": ["berlin"]},
            "other model": {"models": ["other"]},
            "other cohort": {"cohorts": ["munich"]},
            "one other": {"models": ["file-type"], "cohorts": ["munich"]},
        }

        async def make(connection: AsyncConnection) -> dict[tuple[Role, str], str]:
            return {
                (role, name): await api_tokens.create(connection, "default", role, role, 1, **scope)
                for role in ROLES
                for name, scope in scopes.items()
            }

        tokens, tried = in_database(server.settings, make), 0
        for operation in OPERATIONS:
            if operation.need in ("public", "device", "read"):
                continue
            about = {"publish_bundle": "model", "request_logs": "cohort", "end_device": "cohort"}
            near = about.get(operation.name, "both")
            for role in (role for role in ROLES if operation.need in MAY[role]):
                whose = {"device": f"bench-{role}"} if operation.name == "end_device" else {}
                tried += 1
                for scope in ("other model", "other cohort", "one other", near):
                    status, code = ask(server, operation, tokens[role, scope], **whose)
                    refused = not operation.scoped or (scope != near and operation.name not in INERT)
                    assert (code == "scope_missing") is refused, (operation.name, role, scope, status, code)
        assert tried > 30


def test_a_scope_reaches_no_further_by_another_way_of_saying_whom(tmp_path: Path) -> None:
    with running(tmp_path / "data", api_reads_per_s=0, api_changes_per_s=0) as server:
        stock(server, tmp_path)
        release(server, tmp_path, "other")
        server.device("elsewhere", site="munich")
        plan = {"stages": [{"share": 1.0}], "models": [{"model": "file-type", "version": "1.1.0"}]}
        both = [*plan["models"], {"model": "other", "version": "1.0.0"}]
        with server.http(token_of(server, "operator", models=["file-type"], cohorts=["berlin"])) as http:
            for wish, status in (
                ({"cohort": "berlin"}, 201),
                ({"device": "bench-1"}, 201),
                ({"device": "elsewhere"}, 403),
                ({"selector": "label.site = berlin"}, 403),
                ({"selector": "all"}, 403),
                ({"cohort": "berlin", "selector": "all"}, 422),
                ({"cohort": "berlin", "models": both}, 403),
                ({"cohort": "berlin", "models": "file-type"}, 403),
                ({"cohort": ["berlin"]}, 403),
                ({}, 403),
            ):
                answer = http.post("/api/v1/rollouts", json={**plan, **wish})
                assert answer.status_code == status, (wish, answer.text)
            rows = {one["selector"]: one["number"] for one in http.get("/api/v1/rollouts").json()}
            own = next(number for selector, number in rows.items() if selector.startswith("id = "))
            assert http.post(f"/api/v1/rollouts/{own}/abort").status_code == 202, "what it may make it may end"
            with server.http() as admin:
                far = admin.post("/api/v1/rollouts", json={**plan, "device": "elsewhere"}).json()["number"]
                wide = admin.post("/api/v1/rollouts", json={**plan, "selector": "all"}).json()["number"]
            for number in (far, wide):
                assert http.post(f"/api/v1/rollouts/{number}/abort").json()["code"] == "scope_missing"
            assert http.put("/api/v1/cohorts/berlin", json={"selector": "all"}).json()["code"] == "scope_missing"
            assert http.post("/api/v1/devices/elsewhere/revoke").json()["code"] == "scope_missing"
            assert http.post("/api/v1/rollbacks", json={"model": "other"}).json()["code"] == "scope_missing"
            assert http.get("/api/v1/devices/elsewhere").status_code == 200, "reading is not narrowed"


def test_who_made_a_rollout_is_not_who_approves_it(stocked: Running) -> None:
    with stocked.http(stocked.token("operator")) as http:
        wish = {
            **BODIES["create_rollout"],
            "start": False,
            "approval": {"stages": [1]},
            "cohort": "",
            "selector": "all",
        }
        number = http.post("/api/v1/rollouts", json=wish).json()["number"]
        own = http.post(f"/api/v1/rollouts/{number}/approvals", json={"stage": 1})
        assert (own.status_code, own.json()["code"]) == (403, "role_missing")
    with stocked.http(stocked.token("approver")) as http:
        assert http.post(f"/api/v1/rollouts/{number}/approvals", json={"stage": 1}).status_code == 202
        assert http.post("/api/v1/rollouts", json=wish).json()["code"] == "role_missing"


def test_who_has_a_token_and_a_login_of_one_name_is_one_person(stocked: Running) -> None:
    wish = {
        **BODIES["create_rollout"],
        "start": False,
        "approval": {"stages": [1], "approvers": 2},
        "cohort": "",
        "selector": "all",
    }
    token = in_database(stocked.settings, lambda c: api_tokens.create(c, "default", "ann", "operator", 1))
    with stocked.http(token) as http:
        made = http.post("/api/v1/rollouts", json=wish)
        assert made.status_code == 201, made.text
        number = made.json()["number"]

    async def approve(actor: str) -> None:
        database = Database.open(stocked.settings.database_url)
        try:
            await rollouts.approve(database, "default", actor, number, 1)
        finally:
            await database.close()

    with pytest.raises(RefusedError) as caught:
        asyncio.run(approve("person:ann"))
    assert caught.value.code == "approval_refused"
    with pytest.raises(RefusedError, match="who made a rollout"):
        asyncio.run(approve("person:Ann"))
    for actor in ("token:bob", "person:bob", "person:Bob"):
        asyncio.run(approve(actor))
    approvals = in_database(
        stocked.settings,
        lambda c: c.exec_driver_sql("SELECT count(*) FROM approval WHERE actor LIKE '%:_ob'"),
    )
    assert approvals.scalar() == 1


def test_a_grant_covers_what_lies_within_it_and_nothing_else() -> None:
    subject = Subject(models=frozenset({"a"}), cohorts=frozenset({"x"}))
    assert Grant("operator").covers(Subject.everything())
    for grant, covered in (
        (Grant("operator", ("a", "b")), True),
        (Grant("operator", ("b",)), False),
        (Grant("operator", ("a",), ("x",)), True),
        (Grant("operator", ("a",), ("y",)), False),
        (Grant("operator", (), ("x", "y")), True),
    ):
        assert grant.covers(subject) is covered
        assert not grant.covers(Subject.everything())
    assert not Grant("king").allows("read"), "a role that is none may nothing"  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(stocked: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, data = tmp_path_factory.mktemp("files"), stocked.settings.data
    write_bundle(folder / "bundle", "file-type", "1.1.0")
    key = PublisherKey.open(folder / "other.pem")
    (folder / "public.pem").write_bytes(key.public_pem.encode() if isinstance(key.public_pem, str) else key.public_pem)
    (folder / "fleet").mkdir()
    (folder / "plan.json").write_text(json.dumps({"selector": "all", "stages": [{"share": 1.0}]}))
    trust = Trust.open(stocked.settings.trust_folder)
    Ceremony(folder / "ceremony").load(*trust.offline(), trust.root_digest)
    names = {
        "CEREMONY": "ceremony",
        "EXPORT": "audit.jsonl",
        "BUNDLE": "bundle",
        "PUBLIC": "public.pem",
        "FLEET": "fleet",
        "PLAN": "plan.json",
    }
    found = {word: str(folder / name) for word, name in names.items()}
    return {**found, "KEY": str(data.parent / f"{data.name}-publisher.pem")}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["refused", "every"])
def test_a_command_does_for_a_role_what_its_row_says(
    stocked: Running, files: dict[str, str], tokens: dict[Role, str], every: bool, no_environment: None
) -> None:
    """Everybody who may not, and one who may; in the long form everybody."""
    tree = typer.main.get_command(app)
    for verb, (need, arguments) in sorted(VERBS.items()):
        if need == LOCAL or verb in NEEDS_HTTPS:
            continue
        given = [*verb.split(), *(files.get(word, word) for word in arguments)]
        everybody = {**tokens, "nobody": "wherryapi_wrong"}
        may = [role for role in ROLES if need in MAY[role]]
        for role in [*(set(everybody) - set(may)), *(may if every else may[:1])]:  # who may, once all others failed
            code, fresh = "", f"for-{role}-{'long' if every else 'short'}"  # there is something left to apply
            Path(files["FLEET"], "a.toml").write_text(f'[[cohorts]]\nname = "{fresh}"\nselector = "all"\n')
            with redirect_stdout(io.StringIO()):
                try:
                    tree.main(["--server", stocked.url, "--token", everybody[role], *given], standalone_mode=False)
                except WherryError as error:
                    code = error.code
            if need == "public" or role in may or (verb in IDLE and role != "nobody"):
                assert code not in REFUSALS, (verb, role, code)
            elif role == "nobody":
                assert code in ("unauthenticated", "http_401"), (verb, code)
            else:
                assert code == "role_missing", (verb, role, code)
