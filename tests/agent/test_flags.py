"""Feature flags from a signed offer to applications: the machine, the worker's endpoint, the OpenFeature provider."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.event import ProviderEvent
from openfeature.exception import ErrorCode, ProviderNotReadyError
from openfeature.flag_evaluation import Reason

from tests.agent.builders import MODEL, confirmed, fresh, offer, offered, run
from tests.agent.serving_kit import WorkerProcess, until, worker
from wherry_agent import journal, machine
from wherry_agent import state as s
from wherry_agent.children import Serve
from wherry_agent.flag_source import FlagSource
from wherry_agent.handle_server import HandleServer
from wherry_agent.openfeature import WherryProvider
from wherry_agent.status import describe, render
from wherry_agent.turn import flags_of
from wherry_shared.errors import UnreachableError

FLAGS: dict[str, Any] = {
    "night-mode": True,
    "retries": 3,
    "threshold": 0.5,
    "site": "berlin",
    "camera": {"size": [640, 480]},
}


# --- the machine ---------------------------------------------------------------------------------


def test_flags_of_an_offer_are_told_and_kept() -> None:
    state, effects = run(fresh(), offer(1, {}, flags=FLAGS))
    assert flags_of(state) == FLAGS
    assert s.Serve(1, (), FLAGS) in effects
    again = journal.decode(journal.encode(state))
    assert again == state
    _, effects = run(again, s.WorkerReady())
    assert s.Serve(1, (), FLAGS) in effects, "a new worker is told the same"


def test_only_another_set_of_flags_is_told_again() -> None:
    state = confirmed()
    revision = state.revision
    state, _ = run(state, offer(2, {MODEL: offered()}, flags={"a": 1}))
    assert state.revision == revision + 1
    state, _ = run(state, offer(3, {MODEL: offered()}, flags={"a": 1}))
    assert state.revision == revision + 1
    state, effects = run(state, offer(4, {MODEL: offered()}, flags={"a": True}))
    assert state.revision == revision + 2
    assert next(e for e in effects if isinstance(e, s.Serve)).flags["a"] is True
    state, _ = run(state, offer(5, {MODEL: offered()}))
    assert flags_of(state) == {}


@pytest.mark.parametrize(
    "bad",
    [{"flags": {"a": None}}, {"flags": {f"f{n}": n for n in range(300)}}, {"flags": {"b": 1}, "critical": ["magic"]}],
    ids=["no_type", "too_many", "critical"],
)
def test_an_offer_that_cannot_be_acted_on_changes_no_flag(bad: dict[str, Any]) -> None:
    state, _ = run(confirmed(), offer(2, {MODEL: offered()}, flags={"a": 1}))
    revision = state.revision
    state, effects = run(state, offer(3, {MODEL: offered("1.1.0")}, **bad))
    assert (flags_of(state), state.revision) == ({"a": 1}, revision)
    assert not [effect for effect in effects if isinstance(effect, s.Serve | s.Resolve)]
    told = machine.outgoing(state)[-1]
    assert (told.state, told.reason) == ("refused", "unsupported")
    shown = render({"running": False, **describe(state, machine_now())})
    assert "not acted on" in shown
    assert "flag     a = 1" in shown


def machine_now() -> Any:
    from tests.agent.builders import now

    return now()


# --- the worker's endpoint -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with worker(tmp_path_factory.mktemp("worker")) as process:
        process.send(Serve(revision=1, models=[], flags=FLAGS))
        yield process


def ask(process: WorkerProcess, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
    return process.call(method, path, body if body is not None else {})


def test_one_flag_is_evaluated_remotely(served: WorkerProcess) -> None:
    for key, value in FLAGS.items():
        code, body = ask(served, f"/ofrep/v1/evaluate/flags/{key}", {"context": {"targetingKey": "u1"}})
        assert (code, body["key"], body["value"], body["reason"]) == (200, key, value, "STATIC")
        assert type(body["value"]) is type(value)
    code, body = ask(served, "/ofrep/v1/evaluate/flags/nope")
    assert (code, body["errorCode"], body["key"]) == (404, "FLAG_NOT_FOUND", "nope")


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "PARSE_ERROR"), (b"[]", "PARSE_ERROR"), (b'{"context": 7}', "INVALID_CONTEXT")],
)
def test_a_bad_evaluation_request_is_refused_by_its_code(served: WorkerProcess, body: bytes, code: str) -> None:
    for path in ("/ofrep/v1/evaluate/flags/retries", "/ofrep/v1/evaluate/flags"):
        status, answer = ask(served, path, body)
        assert (status, answer["errorCode"]) == (400, code)
        assert answer["errorDetails"]


def test_all_flags_come_with_a_tag_that_changes_with_them(served: WorkerProcess) -> None:
    import http.client

    def bulk(tag: str = "") -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("POST", "/ofrep/v1/evaluate/flags", b"{}", {"If-None-Match": tag} if tag else {})
        answer = connection.getresponse()
        data = answer.read()
        connection.request("GET", "/v2")  # the connection is still good after a 304
        assert connection.getresponse().read()
        connection.close()
        return answer.status, answer.headers["ETag"], data

    code, tag, data = bulk()
    assert code == 200
    assert {item["key"]: item["value"] for item in json.loads(data)["flags"]} == FLAGS
    assert bulk(tag) == (304, tag, b"")
    assert bulk(f'"other", W/{tag}')[0] == 304
    assert bulk('"other"')[0] == 200
    served.send(Serve(revision=2, models=[], flags={**FLAGS, "retries": 4}))
    until(lambda: bulk(tag)[0] == 200, "another tag")
    served.send(Serve(revision=3, models=[], flags=FLAGS))
    until(lambda: bulk()[1] == tag, "the same flags have the same tag")


def test_what_the_protocol_does_not_know_is_told(served: WorkerProcess) -> None:
    code, body = served.call("GET", "/ofrep/v1/configuration")
    assert (code, body["name"]) == (200, "wherry")
    assert ask(served, "/ofrep/v1/configuration")[0] == 405
    assert ask(served, "/ofrep/v1/evaluate/flags/retries", method="GET")[0] == 405
    assert ask(served, "/ofrep/v2/evaluate/flags")[0] == 404


def test_a_provider_of_others_reads_them(served: WorkerProcess) -> None:
    api.set_provider_and_wait(OFREPProvider(f"http://127.0.0.1:{served.port}"), "remote")
    client = api.get_client("remote")
    assert client.get_boolean_value("night-mode", False) is True
    assert client.get_integer_value("retries", 0) == 3
    assert client.get_float_value("threshold", 0.0) == 0.5
    assert client.get_string_value("site", "") == "berlin"
    assert client.get_object_value("camera", {}) == {"size": [640, 480]}
    missing = client.get_boolean_details("nope", True)
    assert (missing.value, missing.error_code) == (True, ErrorCode.FLAG_NOT_FOUND)
    wrong = client.get_integer_details("site", 7)
    assert (wrong.value, wrong.error_code) == (7, ErrorCode.TYPE_MISMATCH)


# --- the OpenFeature provider --------------------------------------------------------------------


class Events:
    """Events of a client, in order."""

    def __init__(self, client: Any) -> None:
        self.seen: list[tuple[str, list[str]]] = []
        self._lock = threading.Lock()
        for event in ProviderEvent:
            client.add_handler(event, lambda details, name=event.name: self._note(name, details))

    def _note(self, name: str, details: Any) -> None:
        with self._lock:
            self.seen.append((name.removeprefix("PROVIDER_"), details.flags_changed or []))


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    api.clear_providers()


@pytest.mark.usefixtures("clean")
def test_the_provider_answers_by_type_with_the_devices_flags(tmp_path: Path) -> None:
    server = HandleServer(tmp_path / "handle.sock")
    server.publish_flags(FLAGS)
    api.set_provider_and_wait(WherryProvider(tmp_path / "handle.sock", timeout_s=20), "device")
    client = api.get_client("device")
    details = client.get_boolean_details("night-mode", False)
    assert (details.value, details.reason, details.error_code) == (True, Reason.STATIC, None)
    assert client.get_integer_value("retries", 0) == 3
    assert client.get_float_value("threshold", 0.0) == 0.5
    assert client.get_float_value("retries", 0.0) == 3.0
    assert client.get_string_value("site", "") == "berlin"
    camera = client.get_object_value("camera", {})
    camera["size"].append(3)
    assert client.get_object_value("camera", {}) == {"size": [640, 480]}, "what was handed out is the caller's"
    missing = client.get_string_details("nope", "default")
    assert (missing.value, missing.error_code, missing.reason) == ("default", ErrorCode.FLAG_NOT_FOUND, Reason.ERROR)
    for method, key, default in (
        ("get_boolean_details", "retries", False),
        ("get_integer_details", "night-mode", 7),
        ("get_integer_details", "threshold", 7),
        ("get_float_details", "night-mode", 7.0),
        ("get_string_details", "retries", "x"),
        ("get_object_details", "site", {}),
    ):
        wrong = getattr(client, method)(key, default)
        assert (wrong.value, wrong.error_code) == (default, ErrorCode.TYPE_MISMATCH), key
    server.close()


@pytest.mark.usefixtures("clean")
def test_changes_are_pushed_and_the_last_values_outlive_the_agent(tmp_path: Path) -> None:
    path = tmp_path / "handle.sock"
    server = HandleServer(path)
    server.publish_flags(FLAGS)
    api.set_provider_and_wait(WherryProvider(path, timeout_s=20), "device")
    client = api.get_client("device")
    events = Events(client)
    server.publish_flags({**FLAGS, "retries": 5, "new": 1})
    until(lambda: client.get_integer_value("retries", 0) == 5, "the change arrives")
    until(lambda: ("CONFIGURATION_CHANGED", ["new", "retries"]) in events.seen, "the change is told")
    server.close()
    until(lambda: ("STALE", []) in events.seen, "the agent is gone")
    details = client.get_integer_details("retries", 0)
    assert (details.value, details.reason) == (5, Reason.CACHED)
    before = len(events.seen)
    again = HandleServer(path)
    again.publish_flags(FLAGS)
    until(lambda: ("READY", []) in events.seen[before:], "the agent is back")
    until(lambda: client.get_integer_details("retries", 0).value == 3, "its flags are newer")
    assert client.get_integer_details("retries", 0).reason == Reason.STATIC
    again.close()


@pytest.mark.usefixtures("clean")
def test_a_provider_without_an_agent_is_not_ready_until_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "handle.sock"
    with pytest.raises(ProviderNotReadyError, match="no supervisor answers"):
        api.set_provider_and_wait(WherryProvider(path, timeout_s=0.2), "device")
    client = api.get_client("device")
    events = Events(client)
    assert client.get_integer_details("retries", 7).value == 7
    server = HandleServer(path)
    server.publish_flags(FLAGS)
    until(lambda: ("READY", []) in events.seen, "the agent came")
    until(lambda: client.get_integer_value("retries", 0) == 3, "its flags are known")
    server.close()


def test_flags_need_neither_numpy_nor_an_engine(tmp_path: Path) -> None:
    code = (
        "import sys, wherry_agent.openfeature;"
        "print([m for m in ('numpy', 'onnxruntime', 'cryptography', 'paho', 'wherry_shared.engines') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    source = FlagSource(tmp_path / "nobody.sock")
    source.start()
    with pytest.raises(UnreachableError, match="supervisor_unreachable"):
        source.wait(0.1)
    source.close()
