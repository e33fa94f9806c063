"""The client knows every operation of the API, and the command line reaches every one."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.harness import Running, in_database, release
from wherry_server import answers, calls
from wherry_server import cli as command_line
from wherry_server.calls import Call
from wherry_server.client import TRIES_MAX, AsyncClient, Client
from wherry_shared.access import Access
from wherry_shared.errors import RefusedError, UnreachableError

PREFIXES = ("/api/v1/",)
"""What operators call; devices have `/device/v1`, and TUF clients `/tuf`."""
NOT_BY_CALLS = {
    "publish_bundle": "wherry bundle push, by wherry_shared.publishing",
    "upload_blob": "wherry bundle push, by wherry_shared.publishing",
    "has_blob": "wherry bundle push, by wherry_shared.publishing",
    "put_bin": "wherry trust renew, policy and bundle push, by wherry_shared.publishing",
    "follow_rollout": "wherry rollout watch, by Client.follow",
}
PAGED = {"cursor", "limit"}
"""Of lists, which the client reads to their end."""
SAME = {"add_publisher": {"public_key_pem"}, "list_devices": {"after"}}
"""What another argument says as well: one of several keys, and a cursor."""
ARGUMENTS: dict[str, Any] = {
    "number": 7,
    "command": "pause",
    "ending": "revoke",
    "verdict": "accept",
    "content": b"",
    "replaces": 1,
    "wish": {},
    "event": 3,
    "types": [],
    "roots": [],
    "targets": None,
}


def operations(server: Running) -> dict[str, tuple[str, str]]:
    described = httpx.get(f"{server.url}/openapi.json", trust_env=False, timeout=60).json()
    return {
        operation["operationId"]: (method.upper(), path)
        for path, item in described["paths"].items()
        if path.startswith(PREFIXES)
        for method, operation in item.items()
    }


def of_calls() -> dict[str, Callable[..., Call[Any]]]:
    return {
        name: function
        for name, function in inspect.getmembers(calls, inspect.isfunction)
        if function.__module__ == calls.__name__ and not name.startswith("_")
    }


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    with Client(Access(server=server.url, token=server.admin)) as made:
        yield made


def test_every_operation_has_a_call_that_goes_where_it_is(server: Running) -> None:
    described, known = operations(server), of_calls()
    assert len(described) > 35
    assert set(known) == set(described)
    for name, (method, path) in described.items():
        wanted = [p for p in inspect.signature(known[name]).parameters.values() if p.default is p.empty]
        given = {parameter.name: ARGUMENTS.get(parameter.name, "x y") for parameter in wanted}
        call = known[name](**given)
        filled = path
        for key, value in given.items():
            filled = filled.replace(f"{{{key}}}", str(value).replace(" ", "%20"))
        assert (call.method, call.path) == (method, filled), name


def test_every_call_is_reached_by_a_command() -> None:
    folder = Path(command_line.__file__).parent
    used = {
        node.attr
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "calls"
    }
    assert set(of_calls()) - used == set(NOT_BY_CALLS)


def test_every_filter_and_field_of_the_description_is_an_argument_of_its_call(server: Running) -> None:
    described = httpx.get(f"{server.url}/openapi.json", trust_env=False, timeout=60).json()
    schemas, missing = described["components"]["schemas"], {}
    for path, item in described["paths"].items():
        for operation in item.values():
            name = operation["operationId"]
            if not path.startswith(PREFIXES) or name in NOT_BY_CALLS:
                continue
            wanted = {one["name"] for one in operation.get("parameters", []) if one["in"] == "query"} - PAGED
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in body and "wish" not in inspect.signature(of_calls()[name]).parameters:
                wanted |= set(schemas[body["$ref"].rsplit("/", 1)[-1]]["properties"])
            known = {parameter.rstrip("_") for parameter in inspect.signature(of_calls()[name]).parameters}
            left = wanted - known - SAME.get(name, set())
            if left:
                missing[name] = left
    assert missing == {}


def test_every_argument_of_a_call_is_given_by_a_command() -> None:
    known = {name: list(inspect.signature(function).parameters) for name, function in of_calls().items()}
    given: dict[str, set[str]] = {name: set() for name in known}
    for file in Path(command_line.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "calls":
                name = node.func.attr
                if name not in given:  # a type
                    continue
                given[name] |= {*known[name][: len(node.args)], *(one.arg for one in node.keywords if one.arg)}
    assert {
        name: left
        for name, arguments in known.items()
        if name not in NOT_BY_CALLS and (left := set(arguments) - given[name] - {"limit", "if_match"})
    } == {}


def test_answers_are_values_and_lists_are_read_to_their_end(client: Client) -> None:
    for number in range(3):
        made = client.send(calls.create_cohort(f"each-{number}", "all"))
        assert made == answers.CohortShown(
            name=f"each-{number}", selector="all", created_at=made.created_at, created_by="token:admin"
        )
    found = list(client.each(calls.list_cohorts("each-", limit=1)))
    assert [one.name for one in found] == ["each-0", "each-1", "each-2"]
    assert [len(page) for page in client.pages(calls.list_cohorts("each-", limit=2))] == [2, 1]
    assert [one["name"] for one in client.plain(calls.list_cohorts("each-", limit=2))] == [one.name for one in found]
    with pytest.raises(RefusedError) as caught:
        client.send(calls.create_cohort("each-0", "all"))
    assert caught.value.code == "name_taken"


class Flaky(httpx.BaseTransport):
    """A network that loses answers after the server has worked, or a server that is busy."""

    def __init__(self, lose: int, status: int = 0) -> None:
        self.lose, self.status, self.keys = lose, status, []
        self.real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("idempotency-key"))
        if self.status and self.lose:
            self.lose -= 1
            return httpx.Response(self.status, headers={"Retry-After": "0"}, json={"code": "busy"}, request=request)
        answer = self.real.handle_request(request)
        if self.lose:
            self.lose -= 1
            answer.read()
            raise httpx.ReadError("lost", request=request)
        return answer


def flaky(server: Running, transport: Flaky) -> Client:
    http = httpx.Client(base_url=server.url, transport=transport, trust_env=False)
    return Client(Access(server=server.url, token=server.admin), http=http)


def test_a_create_whose_answer_was_lost_is_done_once(server: Running, client: Client) -> None:
    network = Flaky(2)
    made = flaky(server, network).send(calls.create_token("lost-answer", "viewer"))
    assert made.token.startswith("wherryapi_")
    assert len(network.keys) == 3
    assert len(set(network.keys)) == 1
    assert len(list(client.each(calls.list_tokens("lost-answer")))) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_a_few_times_and_no_more(server: Running, status: int) -> None:
    network = Flaky(1, status)
    assert flaky(server, network).send(calls.health()).status == "ok"
    assert len(network.keys) == 2
    network = Flaky(99, status)
    with pytest.raises(UnreachableError) as caught:
        flaky(server, network).send(calls.health())
    assert caught.value.code == "busy"
    assert len(network.keys) == TRIES_MAX


def test_a_rollout_is_followed_over_a_cut_by_both_clients(server: Running, client: Client, tmp_path: Path) -> None:
    release(server, tmp_path, "followed")
    wish = {"models": [{"model": "followed", "version": "1.0.0"}], "selector": "all", "stages": [{"share": 1.0}]}
    made = client.send(calls.create_rollout(wish))

    def decide(revision: int) -> None:
        statement = (
            "INSERT INTO decision (rollout_id, revision, project_id, at, decisions, evidence, progress_before)"
            f" VALUES ('{made.id}', {revision}, 'default', 1, '[]', '{{}}', '{{}}')"
        )
        in_database(server.settings, lambda c: c.exec_driver_sql(statement))

    decide(2)
    lines = f"event: decision\nid: 1\ndata: {json.dumps({'cut': True})}\n\nevent: decision\nid: 2\nda"

    class Cut(httpx.BaseTransport):
        def __init__(self) -> None:
            self.real, self.asked = httpx.HTTPTransport(), []

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            self.asked.append(request.headers.get("last-event-id"))
            return httpx.Response(200, text=lines) if len(self.asked) == 1 else self.real.handle_request(request)

    in_database(
        server.settings, lambda c: c.exec_driver_sql(f"UPDATE rollout SET state = 'done' WHERE number = {made.number}")
    )
    network = Cut()
    http = httpx.Client(base_url=server.url, transport=network, trust_env=False)
    with Client(Access(server=server.url, token=server.admin), http=http) as follower:
        told = list(follower.follow(made.number))
    assert network.asked == [None, "1"]
    assert [(one.kind, one.id) for one in told] == [
        ("decision", "1"),
        ("decision", "2"),
        ("progress", "2"),
        ("end", "end"),
    ]

    async def same() -> list[Any]:
        async with AsyncClient(Access(server=server.url, token=server.admin)) as other:
            assert (await other.send(calls.show_rollout(made.number))).id == made.id
            assert made.number in [one.number async for one in other.each(calls.list_rollouts(limit=1))]
            with pytest.raises(RefusedError):
                await other.send(calls.show_rollout(99_999))
            return [event async for event in other.follow(made.number)]

    assert [one.kind for one in asyncio.run(same())] == ["decision", "progress", "end"]


def test_answers_have_the_fields_of_the_description(server: Running) -> None:
    described = httpx.get(f"{server.url}/openapi.json", trust_env=False, timeout=60).json()["components"]["schemas"]
    known = {name: one for name, one in vars(answers).items() if inspect.isclass(one) and is_dataclass(one)}
    shared = set(known) & set(described)
    assert len(shared) > 30
    for name in shared:
        assert {field.name for field in fields(known[name])} == set(described[name]["properties"]), name
