"""Rollouts, cohorts and device messages over HTTP and the command line, with the director as a process and no broker.

Devices speak the HTTP fall-back: hello, offer with ETag, reports with acknowledgements.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import typer
from rich.console import Console

from tests.server.fleet_kit import MODEL, FakeDevice
from tests.server.harness import Running, free_port, release, running, until
from tests.server.test_cli import said, wherry
from tests.server.test_director_process import role
from wherry_server.cli.rollout import EXIT_HELD, _line, follow, progress_view
from wherry_server.client import Client, Event
from wherry_shared import frames, wire

PLAN = {"selector": "all", "stages": [{"share": 1.0}]}


@dataclass
class Online:
    """A fake device with its own HTTP connection."""

    name: str
    device: FakeDevice
    http: httpx.Client
    etag: str = ""

    def turn(self) -> None:
        """Fetch the offer, obey, report, forget what is acknowledged."""
        answer = self.http.get("/device/v1/offer", headers={"If-None-Match": self.etag} if self.etag else {})
        if answer.status_code == 200:
            self.etag = answer.headers["etag"]
            self.device.take_offer(answer.content)
        if self.device.owed:
            stored = self.http.post("/device/v1/reports", content=b"\n".join(self.device.owed_frames()))
            assert stored.status_code == 200, stored.text
            for frame in stored.content.split(b"\n"):
                self.device.take_ack(frame)


@dataclass
class World:
    """A server with two released bundles and three devices that live in a thread."""

    server: Running
    devices: list[Online]

    def rollout(self, number: int) -> dict[str, Any]:
        with self.server.http() as http:
            found: dict[str, Any] = http.get(f"/api/v1/rollouts/{number}").json()
        return found

    def until(self, number: int, state: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = self.rollout(number)
            return found if found["state"] == state and not found["wanted"] else None

        return until(look, 30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("rollouts")
    with running(folder / "data", broker_port=free_port()) as server:
        server.settings.save()
        release(server, folder, MODEL, "1.0.0", weights=b"one" * 1000)
        release(server, folder, MODEL, "1.1.0", weights=b"two" * 1000)
        release(server, folder, MODEL, "1.2.0", weights=b"bad" * 1000)
        devices = []
        for name in ("line-1", "line-2", "lab-1"):
            answer = server.device(name, site=name.split("-")[0])
            key = frames.device_key(server.settings.master_key_file.read_bytes(), answer.device)
            fake = FakeDevice(answer.device, key, {"1.2.0": "bad"})
            devices.append(Online(name, fake, server.as_device(answer)))
        stop = threading.Event()

        def live() -> None:
            for online in devices:
                assert online.http.post("/device/v1/hello", content=online.device.hello()).status_code == 204
            while not stop.is_set():
                for online in devices:
                    online.turn()
                time.sleep(0.05)

        thread = threading.Thread(target=live, daemon=True)
        with role("director", server.settings):
            thread.start()
            try:
                yield World(server, devices)
            finally:
                stop.set()
                thread.join(20)
                assert not thread.is_alive()
                for online in devices:
                    online.http.close()


@pytest.mark.slow
def test_the_first_day_deploy_watch_deploy_again_and_roll_back(world: World):
    done = wherry(world.server, "deploy", f"{MODEL}:1.0.0", "--selector", "all", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done (" in done.stdout or " done stage 1/1: exposed 3, confirmed 3" in done.stdout, done.stdout
    assert wherry(world.server, "deploy", f"{MODEL}:1.1.0", "--device", "line-1", "--watch").returncode == 0
    versions = {online.name: online.device.running for online in world.devices}
    assert versions["line-1"] != versions["line-2"] == versions["lab-1"] != ""
    back = wherry(world.server, "rollback", MODEL, "--device", "line-1", "--watch")
    assert back.returncode == 0, back.stdout + back.stderr
    assert world.devices[0].device.running == versions["line-2"]
    again = wherry(world.server, "rollback", MODEL, "--device", "line-1", "--watch")
    assert "[nothing_to_roll_back]" in again.stderr, "there was nothing before, and it does not go forward again"
    assert world.devices[0].device.running == versions["line-2"]

    # a bundle that fails goes back by itself, and `watch` says so by its status
    failed = wherry(world.server, "deploy", f"{MODEL}:1.2.0", "--selector", "label.site = line", "--watch")
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert "halted (failure_bound)" in failed.stdout
    assert world.devices[0].device.running == versions["line-2"]
    rows = said(world.server, "rollout", "list", "--model", MODEL)
    assert [row["state"] for row in rows] == ["halted", "done", "done", "done"]  # type: ignore[attr-defined]
    number = rows[0]["number"]  # type: ignore[index]
    text = wherry(world.server, "rollout", "show", str(number)).stdout
    assert "health_errors" in text
    assert "exposed; the cohort has 2 now" in text
    assert "confirmed_min = 0" in text
    decided = wherry(world.server, "rollout", "decisions", str(number)).stdout
    assert "expose stage 1 (100 %)" in decided
    assert "withdraw (all)" in decided

    # where it is known to be bad it is not offered again, and who watches is told so instead of waiting for nothing
    held = wherry(world.server, "deploy", f"{MODEL}:1.2.0", "--device", "line-1", "--watch")
    assert held.returncode == EXIT_HELD, held.stdout + held.stderr
    assert "none of its devices may have" in held.stderr


def test_cohorts_are_saved_previewed_changed_and_forgotten(world: World):
    assert wherry(world.server, "cohort", "create", "lines", "label.site = line").returncode == 0
    shown = said(world.server, "cohort", "show", "lines")
    assert (shown["devices"], shown["names"]) == (2, ["line-1", "line-2"])  # type: ignore[index,call-overload]
    again = wherry(world.server, "cohort", "create", "lines", "all")
    assert (again.returncode, "[name_taken]" in again.stderr) == (1, True)
    assert wherry(world.server, "cohort", "change", "lines", "name = lab-*").returncode == 0
    assert said(world.server, "cohort", "preview", "not name = lab-*")["devices"] == 2  # type: ignore[index,call-overload]
    assert "lines" in wherry(world.server, "cohort", "list").stdout
    bad = wherry(world.server, "cohort", "change", "lines", "colour = red")
    assert "[bad_selector]" in bad.stderr
    assert wherry(world.server, "cohort", "delete", "lines").returncode == 0
    assert "[cohort_unknown]" in wherry(world.server, "cohort", "show", "lines").stderr


def test_a_rollout_waits_for_its_start_and_obeys_pause_resume_and_abort(world: World):
    server = world.server
    made = said(
        server,
        "rollout",
        "create",
        f"{MODEL}:1.1.0",
        "--selector",
        "name = lab-1",
        "--stages",
        "50,100",
        "--soak",
        "900",
        "--trial",
        "45",
    )
    number = made["number"]  # type: ignore[index,call-overload]
    assert [why["code"] for why in world.rollout(number)["why_not_yet"]] == ["not_started"]
    assert made["plan"]["trial"]["max_s"] == 45  # type: ignore[index,call-overload]
    assert "[rollout_state]" in wherry(server, "rollout", "resume", str(number)).stderr
    assert wherry(server, "rollout", "start", str(number)).returncode == 0
    until(lambda: [why["code"] for why in world.rollout(number)["why_not_yet"]] == ["soak"], 30)
    assert wherry(server, "rollout", "pause", str(number)).returncode == 0
    world.until(number, "paused")
    assert wherry(server, "rollout", "resume", str(number)).returncode == 0
    world.until(number, "running")
    assert wherry(server, "rollout", "abort", str(number)).returncode == 0
    aborted = world.until(number, "aborted")
    assert aborted["counts"]["real"]["confirmed"] == 1  # what is confirmed stays
    assert wherry(server, "rollout", "revert", str(number)).returncode == 0
    assert world.until(number, "reverted")["counts"]["real"]["reverted"] == 1


REFUSALS = [
    ({**PLAN, "models": [{"model": MODEL, "version": "9.9.9"}]}, 404, "bundle_unknown"),
    ({**PLAN, "models": [{"model": MODEL}]}, 404, "bundle_unknown"),
    ({**PLAN, "models": "all"}, 422, "plan_invalid"),
    ({**PLAN}, 422, "plan_invalid"),
    ({**PLAN, "models": [{"model": MODEL, "version": "1.0.0", "manifest": "sha256:x"}]}, 422, "plan_invalid"),
    ({"models": [{"model": MODEL, "version": "1.0.0"}], "stages": PLAN["stages"]}, 422, "plan_target"),
    ({**PLAN, "device": "line-1", "models": [{"model": MODEL, "version": "1.0.0"}]}, 422, "plan_target"),
    ({"stages": [], "device": "nobody", "models": [{"model": MODEL, "version": "1.0.0"}]}, 404, "device_unknown"),
    ({"stages": [], "cohort": "nobody", "models": [{"model": MODEL, "version": "1.0.0"}]}, 404, "cohort_unknown"),
    ({**PLAN, "strategy": "shadow", "models": [{"model": MODEL, "version": "1.0.0"}]}, 422, "plan_strategy"),
    ({**PLAN, "models": [{"model": "\ud800", "version": "1.0.0"}]}, 422, "plan_invalid"),
    ({**PLAN, "priority": 10**30, "models": [{"model": MODEL, "version": "1.0.0"}]}, 422, "plan_range"),
    ({**PLAN, "start": "yes", "models": [{"model": MODEL, "version": "1.0.0"}]}, 422, "plan_invalid"),
]


@pytest.mark.parametrize(("wish", "status", "code"), REFUSALS)
def test_a_wish_that_cannot_be_is_refused_and_not_stored(world: World, wish: dict[str, Any], status: int, code: str):
    with world.server.http() as http:
        before = len(http.get("/api/v1/rollouts").json())
        json_type = {"Content-Type": "application/json"}
        answer = http.post("/api/v1/rollouts", content=json.dumps(wish), headers=json_type)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert len(http.get("/api/v1/rollouts").json()) == before


def test_only_operators_command_and_viewers_see(world: World):
    viewer = world.server.token("viewer")
    with world.server.http(viewer) as http:
        assert http.get("/api/v1/rollouts").status_code == 200
        for path, body in (
            ("rollouts", PLAN),
            ("cohorts", {"name": "x", "selector": "all"}),
            ("rollbacks", {"model": "m"}),
        ):
            assert http.post(f"/api/v1/{path}", json=body).json()["code"] == "role_missing"
        assert http.post("/api/v1/rollouts/1/abort").json()["code"] == "role_missing"
    with world.server.http() as http:
        assert http.get("/api/v1/rollouts/12345").json()["code"] == "rollout_unknown"
        assert http.post("/api/v1/rollouts/12345/start").json()["code"] == "rollout_unknown"


def test_a_device_without_offer_gets_204_and_one_that_has_it_304(world: World):
    fresh = world.server.device("fresh", site="attic")
    with world.server.as_device(fresh) as http:
        key = frames.device_key(world.server.settings.master_key_file.read_bytes(), fresh.device)
        device = FakeDevice(fresh.device, key)
        assert http.get("/device/v1/offer").status_code in (200, 204)  # a release that is done may reach it any moment
        assert http.post("/device/v1/hello", content=device.hello()).status_code == 204
        for content in (b"", b"\n" * 50, b"rubbish", world.devices[0].device.hello()):
            answer = http.post("/device/v1/hello", content=content)
            assert answer.status_code == 422
            assert answer.json()["code"] in ("too_many_frames", "frames_refused")
        many = b"\n".join([device.hello()] * 21)
        assert http.post("/device/v1/reports", content=many).json()["code"] == "too_many_frames"
    with httpx.Client(base_url=world.server.url, trust_env=False) as nobody:
        assert nobody.get("/device/v1/offer").status_code == 401
        assert nobody.post("/device/v1/reports", content=b"x").status_code == 401
    online = world.devices[1]
    if not online.etag:  # nothing was released in this process yet
        wherry(world.server, "deploy", f"{MODEL}:1.0.0", "--device", online.name)
    until(lambda: online.etag, 30)
    assert online.http.get("/device/v1/offer", headers={"If-None-Match": online.etag}).status_code == 304
    assert online.http.get("/device/v1/offer", headers={"If-None-Match": '"0-0"'}).status_code == 200


def test_telemetry_over_http_is_stored_and_acknowledged(world: World):
    device = world.devices[0].device
    message = wire.Telemetry(format=1, device=device.id, epoch="t", seq=1, first=1, at=1)
    answer = world.devices[0].http.post("/device/v1/telemetry", content=device.frame("telemetry", message))
    ack = wire.parse(wire.Ack, frames.unseal(device.key, "ack", device.id, answer.content))
    assert (ack.stream, ack.seq) == ("telemetry", 1)


def test_a_plan_file_fills_in_what_options_do_not_say(world: World, tmp_path: Path):
    file = tmp_path / "plan.toml"
    file.write_text(
        'on_halt = "hold"\n[trial]\nmin_requests = 5\nmax_s = 9\n[[stages]]\nshare = 0.5\n[[stages]]\nshare = 1.0\nsoak_s = 7\n'
    )
    given = ("rollout", "create", f"{MODEL}:1.1.0", "--device", "lab-1", "--plan", str(file))
    made = said(world.server, *given, "--trial", "30")
    plan = made["plan"]  # type: ignore[index,call-overload]
    assert (plan["trial"]["min_requests"], plan["trial"]["max_s"]) == (5, 30)
    assert (plan["on_halt"], [stage["soak_s"] for stage in plan["stages"]]) == ("hold", [0, 7])
    gates = tmp_path / "gates.toml"
    gates.write_text('[[gates]]\nmetric = "errors"\nharm = 0.01\n')
    wide = said(
        world.server,
        "rollout",
        "create",
        f"{MODEL}:1.1.0",
        "--device",
        "lab-1",
        "--strategy",
        "adaptive",
        "--plan",
        str(gates),
    )
    assert [stage["share"] for stage in wide["plan"]["stages"]] == [1.0]  # type: ignore[index,call-overload]
    assert [gate["gate"] for gate in wide["gates"] if gate["numbers"]] == ["errors"]  # type: ignore[index,call-overload]
    both = wherry(world.server, *given, "--stages", "5,100", "--soak", "0", "--json")
    assert json.loads(both.stderr)["code"] == "plan_conflict"
    assert "--stages, --soak" in both.stderr
    file.write_text("on_halt =")
    broken = wherry(
        world.server, "rollout", "create", f"{MODEL}:1.1.0", "--device", "lab-1", "--plan", str(file), "--json"
    )
    assert json.loads(broken.stderr)["code"] == "plan_file"
    assert "[bad_target]" in wherry(world.server, "rollout", "create", "nonsense", "--device", "lab-1").stderr
    stages = wherry(world.server, "rollout", "create", f"{MODEL}:1.1.0", "--device", "lab-1", "--stages", "five")
    assert "[plan_stages]" in stages.stderr
    for wrong in ("nan", "0,100", "5,101", "5,,100"):
        refused = wherry(world.server, "rollout", "create", f"{MODEL}:1.1.0", "--device", "lab-1", "--stages", wrong)
        assert "[plan_stages]" in refused.stderr, wrong
    file.write_text("start_at = 2099-12-01T22:00:00+01:00\n")
    dated: Any = said(world.server, *given)
    assert dated["plan"]["start_at"] == "2099-12-01T22:00:00+01:00"
    forecast: Any = said(world.server, "rollout", "simulate", str(file), "--devices", "10", "--runs", "1")
    assert len(forecast["stages_s"]) == 3, "as create has it, where a plan names no stages"
    none = wherry(world.server, "rollout", "simulate", str(file), "--failed", "nan")
    assert "[request_invalid]" in none.stderr
    for noun in ("rollout", "device"):
        typo = wherry(world.server, noun, "list", "--state", "runing")
        assert typo.returncode == 1
        assert "'running'" in typo.stderr or "'trial'" in typo.stderr, "it says which there are"


def stage(**changes: int) -> dict[str, Any]:
    names = (
        "pending",
        "confirmed",
        "proved",
        "confirmed_idle",
        "failed",
        "silent",
        "late",
        "withdrawn",
        "reverted",
        "revert_pending",
    )
    return {"share": 1.0, "state": "under_way", "counts": dict.fromkeys(names, 0) | changes}


def shown(*stages: dict[str, Any]) -> dict[str, Any]:
    return {
        "number": 7,
        "model": "m",
        "version": "1.0.0",
        "cohort": "pilot",
        "state": "running",
        "reason": "",
        "stage": 0,
        "stages_total": len(stages),
        "round": 1,
        "rounds_total": 1,
        "members": 12,
        "stages": list(stages),
        "counts": {"real": {"exposed": 4}, "simulated": {"exposed": 8}},
        "gates": [{"gate": "failure", "outcome": "pass", "bad": 0, "judged": 3, "needed": 3}],
        "why_not_yet": [{"code": "sample", "have": 3, "need": 5}],
    }


@pytest.mark.parametrize(("columns", "bar"), [(80, True), (160, True), (60, False)])
def test_the_view_of_a_rollout_fits_the_window(columns: int, bar: bool):
    console = Console(width=columns, file=io.StringIO())
    with console.capture() as capture:
        console.print(progress_view(shown(stage(confirmed=6, pending=6), stage()), columns))
    lines = capture.get().splitlines()
    assert [line[0] for line in lines[:5]] == ["r", " ", "1", "2", "d"], "head, columns and stages have a line each"
    assert ("█" in lines[2]) is bar
    assert "BACK" not in lines[1]
    wide = Console(width=160, file=io.StringIO())
    with wide.capture() as capture:
        wide.print(progress_view(shown(stage(confirmed=6, reverted=2, revert_pending=4)), 160))
    assert "GOING BACK" in capture.get()


def test_the_view_of_a_rollout_says_its_gates_in_numbers():
    numbers = {
        "outcome": "unknown",
        "estimate": 0.1,
        "low": 0.0123,
        "high": 0.4,
        "e_halt": 3.21,
        "e_pass": 0.5,
        "sample": 20,
        "needed": 63,
    }
    found = shown(stage(pending=1))
    found["gates"] += [
        {"gate": "failed", "outcome": "unknown", "bad": 2, "judged": 20, "needed": 63, "numbers": numbers}
    ]
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(progress_view(found, 200))
    assert (
        "gate failed: unknown; 10.00%, between 1.23% and 40.00%; evidence 3.21 for harm, 0.5 against;"
        " 20 devices, about 63 decide" in capture.get()
    )


def test_without_a_terminal_a_line_says_in_words_what_a_rollout_waits_for():
    assert _line(shown(stage())).endswith("; waits: 3 of 5 devices that have settled, of the minimum sample [sample]")


class Told:
    """A server that tells a watcher these states of a rollout and then stays silent for ever."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self._states = states
        self.told = 0

    def follow(self, _: int) -> Iterator[Event]:
        for state in self._states:
            self.told += 1
            yield Event("progress", str(self.told), state)
        raise AssertionError("it would wait for ever")


def waiting(*codes: str, state: str = "running") -> dict[str, Any]:
    nobody = {"exposed": 0}
    why = [{"code": code, "have": 0, "need": 1} for code in codes]
    counts = {"real": nobody, "simulated": nobody}
    return shown(stage()) | {"revision": 1, "state": state, "counts": counts, "why_not_yet": why}


@pytest.mark.parametrize("codes", [("held",), ("held", "soak")])
def test_who_watches_a_rollout_that_reaches_nobody_is_told_why_and_let_go(
    codes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    server = Told(waiting("exposing", "no_devices"), waiting("exposing", "held"), waiting(*codes))
    with pytest.raises(typer.Exit) as ended:
        follow(cast("Client", server), 7, as_json=False)
    assert ended.value.exit_code == EXIT_HELD
    assert server.told == 3, "as long as somebody may still be exposed, it goes on"
    assert "none of its devices may have m:1.0.0" in capsys.readouterr().err


def test_who_watches_a_stage_of_one_that_failed_is_told_what_can_follow(capsys: pytest.CaptureFixture[str]) -> None:
    server = Told(waiting("in_flight", "gate_failure"), waiting("too_few", "gate_failure"))
    with pytest.raises(typer.Exit) as ended:
        follow(cast("Client", server), 7, as_json=False)
    assert ended.value.exit_code == EXIT_HELD
    assert "go on with retry-failed" in capsys.readouterr().err


def test_a_device_that_is_held_beside_others_keeps_nobody_from_watching_to_the_end() -> None:
    server = Told(waiting("sample"), waiting("held", "in_flight"), waiting("held", state="paused"))
    with pytest.raises(AssertionError, match="for ever"):
        follow(cast("Client", server), 7, as_json=False)
