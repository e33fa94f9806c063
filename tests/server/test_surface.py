"""What every operation of the API keeps to: pages, keys of creates, tags of changes, limits, streams; fuzzed as described."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import requests
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks, openapi
from schemathesis.core.failures import Failure, FailureGroup

from tests.server.harness import Running, in_database, release, running, until
from tests.server.test_access import VALUES
from wherry_server import access, idempotency, problems
from wherry_server.api import events as events_api
from wherry_server.api import examples, queries
from wherry_server.app import ROUTERS
from wherry_server.auth import Identity
from wherry_server.rates import BURST_S, Rates, TooManyError


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("surface")
    with running(folder / "data", api_reads_per_s=0, api_changes_per_s=0) as server:
        release(server, folder, "thing")
        for name in ("one", "two", "three"):
            server.device(name)
        yield server


SWITCH = {"type": "boolean", "variants": {"on": True, "off": False}, "default": "off"}


def rollout(server: Running, **fields: Any) -> dict[str, Any]:
    wish = {"models": [{"model": "thing", "version": "1.0.0"}], "selector": "all", "stages": [{"share": 1.0}], **fields}
    with server.http() as http:
        answer = http.post("/api/v1/rollouts", json=wish)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def listed(answer: httpx.Response) -> list[Any]:
    found = answer.json()
    return list(found["devices"] if isinstance(found, dict) else found)


@pytest.mark.parametrize("path", ["cohorts", "flags", "tokens", "devices", "rollouts", "audit", "bundles", "models"])
def test_a_list_read_in_pages_of_one_is_the_list(surface: Running, path: str) -> None:
    with surface.http() as http:
        for name in ("a", "b"):
            http.post("/api/v1/cohorts", json={"name": f"paged-{name}", "selector": "all"})
            http.post("/api/v1/flags", json={"name": f"paged-{name}", **SWITCH})
            http.post("/api/v1/tokens", json={"name": f"paged-{name}", "role": "viewer"})
        rollout(surface)
        rollout(surface)
        whole = listed(http.get(f"/api/v1/{path}"))
        found, following, pages = [], f"/api/v1/{path}?limit=1", 0
        while following:
            answer = http.get(following)
            assert answer.status_code == 200, answer.text
            assert len(listed(answer)) <= 1
            found += listed(answer)
            following = answer.links.get("next", {}).get("url", "")
            pages += 1
        assert [json.dumps(one) for one in found] == [json.dumps(one) for one in whole]
        assert pages == len(whole)
        for wrong in ("x", "!", "e30", "W10"):
            refused = http.get(f"/api/v1/{path}", params={"cursor": wrong})
            assert refused.status_code in (200, 422)
        assert http.get(f"/api/v1/{path}", params={"cursor": "!"}).json()["code"] == "cursor_invalid"


def test_a_create_that_is_sent_again_with_its_key_is_answered_and_not_done_again(surface: Running) -> None:
    with surface.http() as http, surface.http(surface.token("admin")) as other:
        key = {"Idempotency-Key": "k-1"}
        body = {"name": "keyed", "role": "viewer"}
        first = http.post("/api/v1/tokens", json=body, headers=key)
        again = http.post("/api/v1/tokens", json=body, headers=key)
        assert (first.status_code, again.status_code) == (201, 201)
        assert again.json() == first.json()
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        conflict = http.post("/api/v1/tokens", json={**body, "role": "admin"}, headers=key)
        assert (conflict.status_code, conflict.json()["code"]) == (409, "idempotency_conflict")
        assert other.post("/api/v1/tokens", json=body, headers=key).json() != first.json()
        refused = http.post("/api/v1/cohorts", json={"name": "K", "selector": "("}, headers={"Idempotency-Key": "k-2"})
        assert refused.status_code == 422
        better = http.post("/api/v1/cohorts", json={"name": "k", "selector": "all"}, headers={"Idempotency-Key": "k-2"})
        assert better.status_code == 201, "what was refused did not use the key up"
        odd = http.post("/api/v1/tokens", json=body, headers={"Idempotency-Key": "a b"})
        assert odd.json()["code"] == "idempotency_key_invalid"
        names = [token["name"] for token in http.get("/api/v1/tokens").json()]
        assert names.count("keyed") == 2  # one by each token
    rows = in_database(surface.settings, lambda c: c.exec_driver_sql("SELECT key_hash, answer FROM idempotency")).all()
    stored = b"".join(str(row.key_hash).encode() + bytes(row.answer) for row in rows)
    assert len(rows) == 3
    assert first.json()["token"].encode() not in stored


def test_a_create_whose_end_was_lost_is_not_done_again(surface: Running) -> None:
    with surface.http() as http:
        body, key = {"name": "lost", "role": "viewer"}, {"Idempotency-Key": "k-lost"}
        assert http.post("/api/v1/tokens", json=body, headers=key).status_code == 201
        in_database(
            surface.settings,
            lambda c: c.exec_driver_sql("UPDATE idempotency SET status = 0, answer = '' WHERE status > 0"),
        )
        pending = http.post("/api/v1/tokens", json=body, headers=key)
        assert (pending.status_code, pending.json()["code"]) == (409, "idempotency_pending")
        old = idempotency.now_us() - idempotency.KEPT_US - 1
        in_database(surface.settings, lambda c: c.exec_driver_sql(f"UPDATE idempotency SET created_at = {old}"))
        assert http.post("/api/v1/tokens", json=body, headers=key).status_code == 201


def test_a_change_of_a_cohort_holds_only_for_what_was_read(surface: Running) -> None:
    with surface.http() as http:
        made = http.post("/api/v1/cohorts", json={"name": "tagged", "selector": "all"})
        tag = http.get("/api/v1/cohorts/tagged").headers["etag"]
        assert made.headers["etag"] == tag
        good = http.put("/api/v1/cohorts/tagged", json={"selector": "arch = x"}, headers={"If-Match": tag})
        assert good.status_code == 200
        for method, body in (("PUT", {"selector": "all"}), ("DELETE", None)):
            late = http.request(method, "/api/v1/cohorts/tagged", json=body, headers={"If-Match": tag})
            assert (late.status_code, late.json()["code"]) == (412, "cohort_changed")
        now = http.get("/api/v1/cohorts/tagged")
        assert now.json()["selector"] == "arch = x"
        assert now.headers["etag"] == good.headers["etag"] != tag
        gone = http.delete("/api/v1/cohorts/tagged", headers={"If-Match": f'"x", {now.headers["etag"]}'})
        assert gone.status_code == 204


def test_a_change_of_a_flag_holds_only_for_what_was_read(surface: Running) -> None:
    with surface.http() as http:
        key = {"Idempotency-Key": "flag-1"}
        made = http.post("/api/v1/flags", json={"name": "tagged", **SWITCH}, headers=key)
        assert http.post("/api/v1/flags", json={"name": "tagged", **SWITCH}, headers=key).json() == made.json()
        assert http.post("/api/v1/flags", json={"name": "tagged", **SWITCH}).json()["code"] == "name_taken"
        tag = http.get("/api/v1/flags/tagged").headers["etag"]
        assert made.headers["etag"] == tag
        changed = {**SWITCH, "default": "on"}
        coming = http.post("/api/v1/flags/preview", json={"name": "tagged", **changed}).json()
        assert (coming["changed"], coming["devices"]) == (3, 3)
        assert http.post("/api/v1/flags/preview", json={"name": "tagged", **SWITCH}).json()["changed"] == 0
        good = http.put("/api/v1/flags/tagged", json=changed, headers={"If-Match": tag})
        assert good.status_code == 200
        same = http.put("/api/v1/flags/tagged", json={**changed, "description": ""})
        assert same.headers["etag"] == good.headers["etag"], "what changes nothing is no change"
        for method, body in (("PUT", SWITCH), ("DELETE", None)):
            late = http.request(method, "/api/v1/flags/tagged", json=body, headers={"If-Match": tag})
            assert (late.status_code, late.json()["code"]) == (412, "flag_changed")
        now = http.get("/api/v1/flags/tagged")
        assert (now.json()["default"], now.headers["etag"]) == ("on", good.headers["etag"])
        assert http.delete("/api/v1/flags/tagged", headers={"If-Match": now.headers["etag"]}).status_code == 204
        assert http.get("/api/v1/flags/tagged").json()["code"] == "flag_unknown"
        again = http.post("/api/v1/flags", json={"name": "tagged", **SWITCH})
        assert again.headers["etag"] != tag, "another flag of the same name is another"
        details = [one["detail"] for one in http.get("/api/v1/audit").json() if one["action"] == "flag.change"]
        assert (details[0]["before"]["default"], details[0]["after"]["default"]) == ("off", "on")


@pytest.mark.parametrize(
    ("path", "change", "code"),
    [
        ("devices/tagged", ("POST", "devices/tagged/revoke", None), "device_changed"),
        ("devices/tagged", ("POST", "devices/tagged/decommission", None), "device_changed"),
        ("tokens/TOKEN", ("DELETE", "tokens/TOKEN", None), "token_changed"),
        ("webhooks/tagged", ("PUT", "webhooks/tagged", {"url": "https://b.example/"}), "webhook_changed"),
        ("webhooks/tagged", ("DELETE", "webhooks/tagged", None), "webhook_changed"),
    ],
)
def test_a_change_of_a_device_a_token_or_a_webhook_holds_only_for_what_was_read(
    surface: Running, path: str, change: tuple[str, str, Any], code: str
) -> None:
    with surface.http() as http:
        http.delete("/api/v1/webhooks/tagged")
        http.post("/api/v1/devices/tagged/decommission")
        device = surface.device("tagged")
        http.post("/api/v1/tokens", json={"name": "tagged", "role": "viewer"})
        token = next(one["id"] for one in http.get("/api/v1/tokens", params={"name": "tagged"}).json())
        hook = http.post("/api/v1/webhooks", json={"name": "tagged", "url": "https://a.example/"})
        assert hook.headers["etag"] == http.get("/api/v1/webhooks/tagged").headers["etag"]
        path, (method, target, body) = path.replace("TOKEN", token), change
        target = target.replace("TOKEN", token)
        first = http.get(f"/api/v1/{path}")
        with surface.as_device(device) as itself:
            itself.get("/device/v1/offer")
        assert http.get(f"/api/v1/{path}").headers["etag"] == first.headers["etag"]
        late = http.request(method, f"/api/v1/{target}", json=body, headers={"If-Match": '"other"'})
        assert (late.status_code, late.json()["code"]) == (412, code)
        assert "If-Match" in late.json()["next_step"]
        assert http.get(f"/api/v1/{path}").json() == first.json(), "nothing was changed"
        good = http.request(method, f"/api/v1/{target}", json=body, headers={"If-Match": first.headers["etag"]})
        assert good.is_success, good.text
        again = http.request(method, f"/api/v1/{target}", json=body, headers={"If-Match": first.headers["etag"]})
        assert again.status_code in (404, 412), "it is something else by now"


def test_a_command_holds_only_for_the_revision_that_was_read(surface: Running) -> None:
    number = rollout(surface)["number"]
    with surface.http() as http:
        tag = http.get(f"/api/v1/rollouts/{number}").headers["etag"]
        assert http.post(f"/api/v1/rollouts/{number}/start", headers={"If-Match": tag}).status_code == 202
        late = http.post(f"/api/v1/rollouts/{number}/abort", headers={"If-Match": tag})
        assert (late.status_code, late.json()["code"]) == (412, "rollout_changed")
        assert http.post(f"/api/v1/rollouts/{number}/abort", headers={"If-Match": "*"}).status_code == 202


def test_a_bucket_gives_a_burst_and_then_its_rate() -> None:
    now = [0.0]
    rates = Rates(2, 0, lambda: now[0])
    for _ in range(int(2 * BURST_S)):
        rates.take("t", "GET")
    with pytest.raises(TooManyError) as caught:
        rates.take("t", "GET")
    assert caught.value.retry_after_s == 1
    rates.take("other", "GET")
    for _ in range(100):
        rates.take("t", "POST")
    now[0] = 0.5
    rates.take("t", "HEAD")
    with pytest.raises(TooManyError):
        rates.take("t", "GET")


def test_a_token_that_asks_too_much_is_told_when_to_come_back(tmp_path: Path) -> None:
    with running(tmp_path / "data", api_reads_per_s=0.2) as server, server.http() as http:
        assert http.get("/api/v1/fleet").status_code == 200
        told = http.get("/api/v1/fleet")
        assert (told.status_code, told.json()["code"]) == (429, "rate_limited")
        assert told.headers["content-type"] == problems.MEDIA_TYPE
        assert 1 <= int(told.headers["retry-after"]) <= 6
        assert http.post("/api/v1/tokens", json={"name": "x", "role": "viewer"}).status_code == 201


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


def test_a_stream_tells_decisions_once_and_goes_on_where_it_was_cut(surface: Running) -> None:
    made = rollout(surface)
    number = made["number"]

    def decide(revision: int) -> None:
        statement = (
            "INSERT INTO decision (rollout_id, revision, project_id, at, decisions, evidence, progress_before)"
            f" VALUES ('{made['id']}', {revision}, 'default', 1, '[]', '{{}}', '{{}}')"
        )
        in_database(surface.settings, lambda c: c.exec_driver_sql(statement))

    decide(2)
    decide(3)
    with surface.http() as http:
        path = f"/api/v1/rollouts/{number}/events"
        first = events(http.get(path, params={"seconds": 1}))
        assert [(one["event"], one["id"]) for one in first] == [("decision", "2"), ("decision", "3"), ("progress", "3")]
        assert first[-1]["data"]["number"] == number
        decide(4)
        second = events(http.get(path, params={"seconds": 1}, headers={"Last-Event-ID": "3"}))
        assert [(one["event"], one["id"]) for one in second] == [("decision", "4"), ("progress", "4")]
        in_database(
            surface.settings, lambda c: c.exec_driver_sql(f"UPDATE rollout SET state = 'done' WHERE number = {number}")
        )
        last = events(http.get(path, headers={"Last-Event-ID": "4"}))
        assert [one["event"] for one in last] == ["progress", "end"]
        assert http.get(path, headers={"Last-Event-ID": last[-1]["id"]}).status_code == 204
        assert http.get(path, headers={"Last-Event-ID": "x"}).json()["code"] == "event_id_invalid"
        assert http.get("/api/v1/rollouts/99999/events").status_code == 404


def test_a_stream_ends_with_the_token_that_opened_it(surface: Running) -> None:
    number = rollout(surface)["number"]
    with surface.http() as admin:
        made = admin.post("/api/v1/tokens", json={"name": "follower", "role": "viewer"}).json()["token"]
        (known,) = [one["id"] for one in admin.get("/api/v1/tokens", params={"name": "follower"}).json()]
        with surface.http(made) as http, http.stream("GET", f"/api/v1/rollouts/{number}/events") as answer:
            lines = answer.iter_lines()
            assert any(line == "event: progress" for line in lines)
            assert admin.delete(f"/api/v1/tokens/{known}").status_code == 204
            rest = list(itertools.takewhile(lambda line: "still here" not in line, lines))
            assert "event: end" not in rest, "the rollout goes on"
            assert next(lines, None) is None, "nothing comes any more, no sign of life either"


def test_who_follows_much_keeps_nobody_else_from_following(surface: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_api, "STREAMS_OF_ONE_MAX", 2)
    path = f"/api/v1/rollouts/{rollout(surface)['number']}/events"
    with surface.http() as http, surface.http(surface.token("viewer")) as other:
        with http.stream("GET", path), http.stream("GET", path):
            full = http.get(path)
            assert (full.status_code, full.json()["code"]) == (503, "streams_full")
            assert other.get(path, params={"seconds": 1}).status_code == 200
        until(lambda: http.get(path, params={"seconds": 1}).status_code == 200)


def test_who_is_gone_before_the_first_event_holds_no_stream_open() -> None:
    open_now: list[str] = []
    begun = []

    async def events() -> AsyncIterator[bytes]:
        begun.append(1)
        yield b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        await asyncio.sleep(0)

    viewer = Identity(name="x", grants=(), project="default", id="x")
    stream = events_api._Stream(events(), viewer, open_now)
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send))  # what uvicorn says
    assert begun == []
    assert open_now == []


def test_a_parameter_that_an_operation_does_not_have_is_refused(surface: Running) -> None:
    with surface.http() as http:
        for operation in access.operations(module.router for module in ROUTERS):
            path = operation.path.format(**VALUES)
            answer = http.request(operation.method, path, params={"limitt": "1"})
            if operation.name in queries.FOREIGN:
                assert answer.json()["code"] == "login_off", "it was looked at"
                continue
            assert answer.status_code == 422, operation
            if operation.method != "HEAD":
                assert answer.json()["code"] == "request_invalid"
                assert answer.json()["detail"].startswith("query.limitt: there is no such parameter"), operation
        filtered = http.get("/api/v1/rollouts", params={"modell": "thing"}).json()
        assert filtered["next_step"] == "perhaps model is meant; there are: cursor, limit, model, state"
        twice = http.get("/api/v1/rollouts?model=thing&model=other").json()
        assert twice["detail"] == "query.model: was said 2 times"


def test_every_body_answer_and_path_of_the_description_has_an_example(surface: Running) -> None:
    answers = 0
    described = httpx.get(f"{surface.url}/openapi.json", trust_env=False, timeout=60).json()
    for path, item in described["paths"].items():
        for method, operation in item.items():
            if not path.startswith("/api/v1/"):
                continue
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            assert body is None or "example" in body, operation["operationId"]
            if body is not None:
                root = {**body["schema"], "components": described["components"]}
                jsonschema_rs.validate(root, body["example"])
                unknown = set(body["example"]) - set(fields_of(body["schema"], described))
                assert not unknown or body["schema"].get("additionalProperties"), operation["operationId"]
            for status, answer in operation["responses"].items():
                told = answer.get("content", {}).get("application/json", {})
                if status.startswith("2") and told.get("schema"):
                    jsonschema_rs.validate({**told["schema"], "components": described["components"]}, told["example"])
                    answers += 1
            names = {parameter["name"] for parameter in operation.get("parameters", [])}
            if method == "post":
                assert "Idempotency-Key" in names
            shape = (
                operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            )
            if method == "get" and (shape.get("type") == "array" or path.rsplit("/", 1)[-1] == "devices"):
                assert {"cursor", "limit"} <= names, path
    assert answers > 55
    for field in examples.OWN:
        owner, _, name = field.partition(".")
        assert name in described["components"]["schemas"][owner]["properties"], f"{field} is no field any more"


def fields_of(schema: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a body has, by its schema."""
    named = described["components"]["schemas"].get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)
    return dict(named.get("properties", {}))


def test_every_route_is_described(surface: Running) -> None:
    described = {
        (method.upper(), path)
        for path, item in httpx.get(f"{surface.url}/openapi.json", trust_env=False, timeout=60).json()["paths"].items()
        for method in item
    }
    routes = {
        (method, route.path)
        for module in ROUTERS
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert len(routes) > 65
    assert described == routes


@schemathesis.serializer("application/vnd.wherry.frames")
def as_it_is(_context: Any, value: Any) -> bytes:
    """Frames are bytes already."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
FUZZED = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_nothing_that_the_description_allows_is_answered_otherwise_than_it_says(surface: Running) -> None:
    schema = openapi.from_dict(httpx.get(f"{surface.url}/openapi.json", trust_env=False, timeout=60).json())
    wrong, seen = [], set()
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {surface.admin}"
        for found in schema.get_all_operations():
            operation = found.ok()
            seen.add(operation.label)

            @FUZZED
            @given(case=operation.as_strategy())
            def fuzz(case: Any) -> None:
                if case.path.endswith("/events"):
                    case.query = {**(case.query or {}), "seconds": 1}  # a stream has no other end here
                answer = case.call(base_url=surface.url, session=session, timeout=20)
                case.validate_response(answer, checks=CHECKS)

            try:
                fuzz()
            except (FailureGroup, Failure) as failure:
                wrong.append(f"{operation.label}: {failure}")
    assert not wrong, "\n".join(wrong)
    assert seen == {f"{method.upper()} {path}" for path, item in schema.raw_schema["paths"].items() for method in item}
