"""What a real agent does for its applications: contracts are kept before anything is downloaded, flags outlive the server."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openfeature import api
from openfeature.flag_evaluation import Reason

from tests.agent.daemon_kit import MODEL, Agent, Site, agent, site
from tests.agent.serving_kit import until
from tests.offering import offer
from tests.shared.engines import models
from wherry_agent import handle_messages as messages
from wherry_agent import identity
from wherry_agent.handle import Model
from wherry_agent.openfeature import WherryProvider
from wherry_server.settings import Settings
from wherry_shared import wire
from wherry_shared.bundle import Contract, Interface, Operation, Processing
from wherry_shared.digest import hex_of, of_file
from wherry_shared.errors import RefusedError

pytestmark = pytest.mark.services

SAME = models.interface()


def changed(kind: str, **fields: Any) -> Interface:
    specs = [msgspec.structs.replace(getattr(SAME, kind)[0], **fields)]
    return msgspec.structs.replace(SAME, **{kind: specs})


BLUR = Processing(operations=[Operation(op="blur", version=1)])

BREAKING: dict[str, tuple[dict[str, Any], str]] = {
    "input-name": ({"interface": changed("inputs", name="image")}, "inputs.x: gone"),
    "output-name": ({"interface": changed("outputs", name="scores")}, "outputs.y: gone"),
    "datatype": ({"interface": changed("inputs", datatype="FP64")}, "inputs.x.datatype: was FP32, now FP64"),
    "shape": ({"interface": changed("outputs", shape=["n", 5])}, "outputs.y.shape[1]: was 4, now 5"),
    "labels": ({"interface": changed("outputs", labels=["d", "c", "b", "a"])}, "outputs.y.labels: changed"),
    "preprocess": ({"preprocess": Processing(id="bgr")}, "preprocess.id: was 'rgb', now 'bgr'"),
    "operation": ({"preprocess": BLUR}, "preprocess.operations[0] (blur): there is no such operation here"),
}
"""Model → how its bundle breaks what the settings of the device say (or what it can do), and what is said about it."""


THRESHOLD: dict[str, Any] = {
    "type": "number",
    "variants": {"low": 0.25, "middle": 0.75, "high": 0.9},
    "default": "low",
}
TO_HIGH: dict[str, Any] = {
    "flag": "threshold",
    "variant": "high",
    "selector": "all",
    "stages": [{"share": 1.0, "confirmed_min": 0}],
    "trial": {"min_requests": 0},
    "start": True,
}
"""A rollout that takes a device as soon as it says that it has the variant."""


def settings_toml() -> str:
    labelled = changed("outputs", labels=["a", "b", "c", "d"])
    lines = []
    for name in BREAKING:
        contract = labelled if name == "labels" else SAME
        lines += [f"[contracts.{name}]", 'preprocess = "rgb"'] if name == "preprocess" else [f"[contracts.{name}]"]
        for kind in ("inputs", "outputs"):
            (spec,) = getattr(contract, kind)
            lines += [f"[[contracts.{name}.{kind}]]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in msgspec.to_builtins(spec).items()]
        for dim, bounds in contract.dims.items():
            lines += [f"[contracts.{name}.dims.{dim}]", f"minimum = {bounds.minimum}", f"maximum = {bounds.maximum}"]
    return "\n".join(lines)


class Director:
    """Makes offers for one device of a running server."""

    def __init__(self, server: Site, device: Agent) -> None:
        known = identity.load(device.home)
        assert known is not None
        self._device = known.device
        self._settings = Settings(data=server.data)

    def offer(self, models: dict[str, wire.OfferedModel] | None = None, **flags: Any) -> None:
        offer(self._settings, self._device, models or {}, flags)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as made:
        yield made


@pytest.fixture
def device(server: Site) -> Iterator[Agent]:
    home = server.folder / "camera-1"
    home.mkdir()
    (home / "agent.toml").write_text(settings_toml())
    with agent(server, "camera-1") as made:
        made.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        yield made


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_contracts_are_kept_before_anything_is_downloaded_and_flags_outlive_the_server(
    server: Site, device: Agent
) -> None:
    director = Director(server, device)
    check_that_breaking_bundles_are_refused_before_their_weights_by_the_fields_name(server, device, director)
    check_that_what_an_application_declares_becomes_the_devices_contract(server, device, director)
    check_that_a_swap_waits_for_the_handles(server, device, director)
    check_that_the_window_of_a_rollout_is_kept(server, device, director)
    check_that_flags_are_served_offline_after_a_restart(server, device, director)


def check_that_breaking_bundles_are_refused_before_their_weights_by_the_fields_name(
    server: Site, device: Agent, director: Director
) -> None:
    offered, weights = {}, {}
    for number, (name, (changes, _)) in enumerate(BREAKING.items()):
        file = models.scale(server.folder / f"{name}.onnx", 2.0 + number)
        manifest = server.release("1.0.0", file, model=name, **changes)
        offered[name] = wire.OfferedModel(target=f"{name}/1.0.0", manifest=manifest, rollout="r")
        weights[name] = of_file(file)
    director.offer(offered)

    def told(shown: dict[str, Any]) -> bool:
        return all(shown["models"].get(name, {}).get("last_report", {}).get("state") == "refused" for name in BREAKING)

    shown = device.until("all are refused", told)
    store = device.home / "store" / "blobs" / "sha256"
    for name, (_, sentence) in BREAKING.items():
        report = shown["models"][name]["last_report"]
        assert (report["reason"], sentence in report["detail"]) == (
            "unsupported" if name == "operation" else "contract_broken",
            True,
        ), report
        assert shown["contracts"][name]["by"] == "settings"
        assert (store / hex_of(offered[name].manifest)).exists(), "manifest and config were read"
        assert not list(store.glob(f"{hex_of(weights[name])}*")), "the weights were not asked for"


def check_that_what_an_application_declares_becomes_the_devices_contract(
    server: Site, device: Agent, director: Director
) -> None:
    file = models.scale(server.folder / "declared.onnx", 2.0)
    manifest = server.release("1.0.0", file)
    path = device.home / "run" / "handle.sock"
    wanted = Contract(
        inputs=SAME.inputs, outputs=[*SAME.outputs, *changed("outputs", name="boxes").outputs], dims=SAME.dims
    )
    with pytest.raises(Exception, match="no version of 'scale'"):  # it is not here yet
        Model(MODEL, socket=path, contract=wanted, timeout_s=1)
    device.until("it is declared", lambda shown: shown["contracts"].get(MODEL, {}).get("by") == "application")
    terms = wire.Trial(max_s=1)
    model = wire.OfferedModel(target=f"{MODEL}/1.0.0", manifest=manifest, rollout="r", trial=terms)
    director.offer({MODEL: model})
    shown = device.until(
        "it is refused", lambda shown: shown["models"].get(MODEL, {}).get("last_report", {}).get("state") == "refused"
    )
    assert "outputs.boxes: gone" in shown["models"][MODEL]["last_report"]["detail"]
    with pytest.raises(Exception, match="no version of 'scale'"):
        Model(MODEL, socket=path, contract=SAME, timeout_s=1)  # a newer release of the application relies on less
    device.until("it is declared", lambda shown: "boxes" not in shown["contracts"][MODEL]["outputs"])
    director.offer({MODEL: msgspec.structs.replace(model, attempt=2)})
    device.until_serves("1.0.0")
    with Model(MODEL, socket=path, contract=SAME, timeout_s=20) as handle:
        assert handle.served.version == "1.0.0"
    with pytest.raises(RefusedError, match="contract_broken"):
        Model(MODEL, socket=path, contract=wanted, timeout_s=20)


def check_that_a_swap_waits_for_the_handles(server: Site, device: Agent, director: Director) -> None:
    """A handle that says nothing keeps a trial from beginning, until it acts or its time is over."""
    file = models.scale(server.folder / "next.onnx", 3.0)
    manifest = server.release("1.1.0", file)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.settimeout(60)
        slow.connect(str(device.home / "run" / "handle.sock"))
        lines = slow.makefile("rb")
        contract = Contract(inputs=SAME.inputs, outputs=SAME.outputs, dims=SAME.dims)
        slow.sendall(messages.encode(messages.Hi(format=messages.FORMAT, model=MODEL, pid=1, contract=contract)))
        assign = messages.parse_to_handle(lines.readline())
        assert isinstance(assign, messages.Assign)
        slow.sendall(messages.encode(messages.Engaged(revision=assign.revision)))
        terms = wire.Trial(max_s=1)
        model = wire.OfferedModel(target=f"{MODEL}/1.1.0", manifest=manifest, rollout="r", trial=terms)
        director.offer({MODEL: model})
        assign = messages.parse_to_handle(lines.readline())
        assert isinstance(assign, messages.Assign)
        until(lambda: device.ask(1) == ["1.1.0"], "the worker answers with it")
        shown = device.status()
        assert shown["models"][MODEL]["doing"] == "being swapped in"
        assert shown["contracts"][MODEL]["by"] == "application"
        assert [one["settled"] for one in shown["handles"]] == [False]
        slow.sendall(messages.encode(messages.Engaged(revision=assign.revision)))
        device.until("the trial begins", lambda shown: shown["models"][MODEL]["doing"] != "being swapped in")
        lines.close()
    device.until_serves("1.1.0")
    # the handle that went on without answering held nobody up for longer than its time
    assert device.log.read_text().count("the swap goes on without them") <= 1


def evaluate(device: Agent, key: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    try:
        connection.request("POST", f"/ofrep/v1/evaluate/flags/{key}", b"{}")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def called(server: Site, method: str, path: str, body: Any = None) -> Any:
    status, answer = server.call(method, f"/api/v1{path}", body)
    assert status < 300, answer
    return answer


def check_that_the_window_of_a_rollout_is_kept(server: Site, device: Agent, director: Director) -> None:
    """An offer that arrives outside of its hours brings no weights; within them it does."""
    file = models.scale(server.folder / "nightly.onnx", 4.0)
    manifest = server.release("1.2.0", file)
    hour = time.localtime().tm_hour
    shut, opened = (f"{(hour + begin) % 24:02}:00-{(hour + end) % 24:02}:00" for begin, end in ((4, 6), (-2, 3)))
    terms = wire.Trial(max_s=1)
    model = wire.OfferedModel(target=f"{MODEL}/1.2.0", manifest=manifest, rollout="w", trial=terms, windows=[shut])
    director.offer({MODEL: model})

    def waits(shown: dict[str, Any]) -> bool:
        return shown["models"][MODEL]["last_report"].get("reason") == "conditions"

    shown = device.until("it waits for the hour", waits)
    assert "the next opens" in shown["models"][MODEL]["last_report"]["detail"]
    assert device.ask(1) == ["1.1.0"]
    assert not (device.home / "store" / "blobs" / "sha256" / hex_of(of_file(file))).exists()
    director.offer({MODEL: msgspec.structs.replace(model, attempt=2, windows=[opened])})
    device.until_serves("1.2.0")


def check_that_flags_are_served_offline_after_a_restart(server: Site, device: Agent, director: Director) -> None:
    """Flags that operators set and roll out, from the API to an application; then alone with what is known."""
    switch = {"type": "boolean", "variants": {"on": True, "off": False}, "default": "on"}
    called(server, "POST", "/flags", {"name": "night-mode", **switch})
    called(server, "POST", "/flags", {"name": "threshold", **THRESHOLD})
    device.until("the flags are there", lambda shown: shown["flags"].get("threshold") == 0.25)
    until(lambda: evaluate(device, "night-mode")[0] == 200, "the worker has them too")
    api.set_provider_and_wait(WherryProvider(device.home / "run" / "handle.sock", timeout_s=20), "device")
    client = api.get_client("device")
    assert client.get_boolean_value("night-mode", False)

    def reads(value: float) -> None:
        until(lambda: client.get_float_value("threshold", 0.0) == value, f"{value} is pushed")
        until(lambda: evaluate(device, "threshold")[1].get("value") == value, f"{value} is served")

    number = called(server, "POST", "/rollouts", TO_HIGH)["number"]
    reads(0.9)
    until(lambda: called(server, "GET", f"/rollouts/{number}")["state"] == "done", "it is rolled out")
    rule = {"when": f"name = {device.name}", "variant": "middle"}
    called(server, "PUT", "/flags/threshold", {**THRESHOLD, "rules": [rule]})
    called(server, "POST", f"/rollouts/{number}/revert")
    reads(0.75)  # what rules give now, and not what it was before
    until(lambda: called(server, "GET", f"/rollouts/{number}")["state"] == "reverted", "it is back")
    explained = called(server, "GET", f"/rollouts/{number}/explain?device={device.name}")
    assert (explained["device"]["code"], explained["differing"]) == ("reverted", [])
    told = called(server, "GET", f"/flags/threshold/devices/{device.name}")
    assert (told["variant"], told["by"], told["number"], told["offered_value"]) == ("middle", "rule", 1, 0.75)
    director.offer(threshold=None)
    device.until("a bad offer is not acted on", lambda shown: "null" in shown["offer_refused"])
    server.stop()
    device.kill()
    until(lambda: client.get_float_details("threshold", 0.0).reason == Reason.CACHED, "the agent is gone")
    assert client.get_float_value("threshold", 0.0) == 0.75
    device.start()
    device.until("it runs again", lambda shown: shown["flags"] == {"night-mode": True, "threshold": 0.75})
    until(lambda: client.get_float_details("threshold", 0.0).reason == Reason.STATIC, "the provider found it")
    until(lambda: served_again(device), "the endpoint answers")
    assert evaluate(device, "threshold")[1]["value"] == 0.75
    assert evaluate(device, "absent")[0] == 404
    argv = [sys.executable, "-m", "wherry_agent.cli", "status", "--home", str(device.home)]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "flag     night-mode = true" in said
    assert "contract of scale (by application)" in said
    api.clear_providers()


def served_again(device: Agent) -> bool:
    try:
        return evaluate(device, "night-mode")[0] == 200
    except OSError:
        return False
