"""Whose crash it was: what ran when the worker died has to answer for it, on trial or not, and nobody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import platform
import random
import signal
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.agent import serving_kit
from tests.agent.builders import (
    MODEL,
    confirmed,
    digest_of,
    fetched,
    fresh,
    judged,
    loadable,
    measured,
    now,
    offer,
    offered,
    on_trial,
    resolved,
    run,
    served,
    trial_of,
)
from tests.agent.daemon_kit import Agent, agent, site
from tests.agent.serving_kit import infer_body, until
from tests.agent.swap_kit import Supervised, supervised
from tests.agent.test_crash_loops import restarted
from tests.shared.engines import models
from wherry_agent import in_flight, machine, status
from wherry_agent import state as s
from wherry_agent.children import ArmStats, Candidate, Judged, Loadable, Ran, ServeModel, Serving
from wherry_agent.turn import CRASH_WINDOW_MS, CRASHES_MAX, RETURN_TRIES_MAX
from wherry_shared import reasons
from wherry_shared.wire import Trial

PITCH = "pitch"


def ran(*versions: tuple[str, str]) -> tuple[Ran, ...]:
    found = [loadable(version, model=model) for model, version in versions]
    return tuple(Ran(one.model, one.manifest, one.variant) for one in found)


def died(*versions: tuple[str, str]) -> s.WorkerDied:
    return s.WorkerDied("signal 11", ran=ran(*versions))


def two_models() -> s.State:
    """`MODEL` 1.0.0 and then `PITCH` 1.0.0 were confirmed."""
    state, _ = run(confirmed("1.0.0"), offer(2, {MODEL: offered(), PITCH: offered(model=PITCH)}))
    state, _ = run(state, resolved(model=PITCH), fetched(model=PITCH), judged(model=PITCH))
    state, _ = run(state, served(state, model=PITCH))
    state, _ = run(state, measured(state, model=PITCH, requests=9))
    return state


def trying(**terms: int) -> s.State:
    """`MODEL` 1.1.0 is on trial beside `PITCH` 1.0.0."""
    trial = Trial(min_requests=5, max_s=60, **terms)
    state, _ = run(two_models(), offer(3, {MODEL: offered("1.1.0", trial=trial), PITCH: offered(model=PITCH)}))
    state, _ = run(state, resolved("1.1.0"), fetched("1.1.0"), judged("1.1.0"))
    state, _ = run(state, served(state, "1.1.0"))
    assert isinstance(state.models[MODEL].phase, s.OnTrial)
    return state


def again(state: s.State, event: s.Event, times: int = 1) -> s.State:
    for _ in range(times):
        state, _ = run(state, event, s.WorkerReady())
    return state


def bad(state: s.State) -> list[str]:
    return [one.digest for one in state.known_bad]


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "goes_on", "held_against"),
    [
        pytest.param(died((PITCH, "1.0.0")), True, [], id="another model ran"),
        pytest.param(died((MODEL, "1.0.0")), True, [], id="its own incumbent ran"),
        pytest.param(s.WorkerDied("signal 11", ran=(Ran("", "", ""),)), True, [], id="something else ran"),
        pytest.param(died((MODEL, "1.1.0")), False, [loadable("1.1.0").digest], id="it ran alone"),
        pytest.param(died((MODEL, "1.1.0"), (PITCH, "1.0.0")), False, [], id="it ran beside another"),
        pytest.param(s.WorkerDied("signal 11"), False, [], id="nobody knows"),
        pytest.param(s.WorkerDied("signal 9", ordered=True, ran=ran((MODEL, "1.1.0"))), True, [], id="it was ordered"),
    ],
)
def test_a_candidate_is_blamed_if_it_ran_or_if_nobody_knows(
    event: s.WorkerDied, *, goes_on: bool, held_against: list[str]
) -> None:
    state = again(trying(), event)
    phase = state.models[MODEL].phase
    if goes_on:
        assert isinstance(phase, s.Swapping), "it is served again by the next worker"
        assert phase.crashes == 0
        state, _ = run(state, served(state, "1.1.0"))
        assert isinstance(state.models[MODEL].phase, s.OnTrial)
    else:
        assert isinstance(phase, s.Returning)
    assert bad(state) == held_against


def test_an_innocent_candidate_is_confirmed_and_the_guilty_model_gives_way() -> None:
    state = again(trying(), died((PITCH, "1.0.0")), CRASHES_MAX)
    assert state.crashes is not None
    assert (state.crashes.count, state.crashes.running) == (CRASHES_MAX, {PITCH: CRASHES_MAX})
    shown = status.render({"running": False, **status.describe(state, now())})
    assert "worker   died 3 times of late, while it ran pitch in 3 of them; 3 are allowed" in shown
    assert "worker   died" not in status.render(
        {"running": False, **status.describe(state, now(CRASH_WINDOW_MS + 1))}
    ), "that was long ago"
    state = again(state, died((PITCH, "1.0.0")))
    assert isinstance(state.models[PITCH].phase, s.Safe), "there is none before it"
    assert bad(state) == [loadable(model=PITCH).digest]
    state, _ = run(state, served(state, "1.1.0"))
    state, _ = run(state, measured(state, "1.1.0", requests=9), s.Tick(), ms=61_000)
    state, _ = run(state, s.GoldenChecked(MODEL, loadable("1.1.0").digest, state.models[MODEL].phase.trial, True))  # type: ignore[union-attr]
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.1.0")}


def test_a_crash_of_its_own_counts_and_one_of_another_does_not() -> None:
    state = again(trying(crashes_max=1), died((MODEL, "1.1.0")))
    assert state.crashes is None, "it is the trial's"
    state = again(state, died((PITCH, "1.0.0")), CRASHES_MAX)
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.Swapping)
    assert phase.crashes == 1
    state, _ = run(state, served(state, "1.1.0"))
    shown = status.render({"running": False, **status.describe(state, now())})
    assert "0 requests, 0 errors, the worker died once" in shown
    state = again(state, died((MODEL, "1.1.0")))
    assert isinstance(state.models[MODEL].phase, s.Returning)


def test_of_a_group_the_one_that_ran_is_the_culprit() -> None:
    state, _ = run(two_models(), offer(3, {n: offered("1.1.0", model=n, group="both") for n in (MODEL, PITCH)}))
    for name in (MODEL, PITCH):
        state, _ = run(state, resolved("1.1.0", model=name), fetched("1.1.0", model=name), judged("1.1.0", model=name))
    for name in (MODEL, PITCH):
        state, _ = run(state, served(state, "1.1.0", model=name))
    state = again(state, died((PITCH, "1.1.0")))
    for name in (MODEL, PITCH):
        state, _ = run(state, served(state, "1.0.0", model=name))
    said = {report.model: report.reason for report in state.owed if report.state == "returned"}
    assert said == {PITCH: reasons.CRASH, MODEL: reasons.GROUP}
    assert bad(state) == [loadable("1.1.0", model=PITCH).digest]


def test_a_loop_costs_what_ran_its_place_and_not_what_was_confirmed_last() -> None:
    state = again(two_models(), died((MODEL, "1.0.0")), CRASHES_MAX)
    state = restarted(state)  # the journal holds who it was
    state = again(state, died((MODEL, "1.0.0")))
    assert machine.running(state) == {PITCH: digest_of(f"{PITCH}/1.0.0")}
    assert bad(state) == [loadable().digest], "alone in all of them: it is held against it"


def test_of_a_mixed_loop_what_ran_most_gives_way_and_is_held_against_nobody() -> None:
    state = again(two_models(), died((MODEL, "1.0.0")), 2)
    state = again(state, died((PITCH, "1.0.0")))
    state = again(state, s.WorkerDied("signal 11"))
    assert machine.running(state) == {PITCH: digest_of(f"{PITCH}/1.0.0")}
    assert bad(state) == []


def test_a_confirmed_version_that_crashes_beside_its_own_candidate_ends_the_trial_before_it_gives_way() -> None:
    state = again(confirmed_twice(), died((MODEL, "1.1.0")), CRASHES_MAX)
    assert isinstance(state.models[MODEL].phase, s.Swapping)
    state = again(state, died((MODEL, "1.1.0")))
    assert isinstance(state.models[MODEL].phase, s.Returning)
    assert bad(state) == []
    for _ in range(RETURN_TRIES_MAX):
        state = again(state, died((MODEL, "1.1.0")))
    state = again(state, died((MODEL, "1.1.0")))
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}, "the last known good"


def confirmed_twice() -> s.State:
    """1.2.0 is a shadow of 1.1.0, before which 1.0.0 was confirmed."""
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    return on_trial("1.2.0", state=state, serial=3, mode="shadow", share=1.0)


def test_a_return_is_not_charged_with_what_another_model_does() -> None:
    state = again(trying(), died((MODEL, "1.1.0")))
    for _ in range(CRASHES_MAX):
        state = again(state, died((PITCH, "1.0.0")))
        phase = state.models[MODEL].phase
        assert isinstance(phase, s.Returning)
        assert phase.tries == 0
    state, _ = run(state, served(state, "1.0.0"))
    assert isinstance(state.models[MODEL].phase, s.Idle)


# --- the page ------------------------------------------------------------------------------------


@pytest.fixture
def page() -> int:
    descriptor = in_flight.make_page()
    yield descriptor
    os.close(descriptor)


def known(*items: Loadable) -> dict[int, Ran]:
    return {in_flight.mark_of(one): Ran(one.model, one.manifest, one.variant) for one in items}


def test_a_page_tells_the_runs_that_did_not_come_back(page: int) -> None:
    one, other = loadable(), loadable(model=PITCH)
    writer = in_flight.Page(page)
    assert in_flight.read_page(page, known(one)) == ()
    first, second = (writer.begin(in_flight.mark_of(item)) for item in (one, other))
    assert in_flight.read_page(page, known(one, other)) == ran((MODEL, "1.0.0"), (PITCH, "1.0.0"))
    writer.end(first)
    assert in_flight.read_page(page, known(one, other)) == ran((PITCH, "1.0.0"))
    assert in_flight.read_page(page, known(one)) == (Ran("", "", ""),), "somebody that this process does not know"
    writer.end(second)
    assert in_flight.read_page(page, known(one, other)) == ()


def test_a_page_that_is_full_excludes_nobody(page: int) -> None:
    writer = in_flight.Page(page)
    mark = in_flight.mark_of(loadable())
    held = [writer.begin(mark) for _ in range(in_flight.SLOTS - 1)]
    assert in_flight.read_page(page, known(loadable())) == ran((MODEL, "1.0.0"))
    held.append(writer.begin(in_flight.mark_of(loadable(model=PITCH))))
    assert in_flight.read_page(page, known(loadable())) == ()
    for slot in held:
        writer.end(slot)


def test_threads_share_a_page(page: int) -> None:
    writer = in_flight.Page(page)
    items = [loadable(model=f"model-{number}") for number in range(8)]

    def work(item: Loadable) -> None:
        mark, source = in_flight.mark_of(item), random.Random(item.model)
        for _ in range(2000):
            held = [writer.begin(mark) for _ in range(source.randrange(1, 4))]
            for slot in held:
                writer.end(slot)
        writer.begin(mark)

    threads = [threading.Thread(target=work, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.model for one in in_flight.read_page(page, known(*items))] == sorted(item.model for item in items)


# --- real processes ------------------------------------------------------------------------------


def real(path: Path, model: str, version: str = "1.0.0") -> Loadable:
    """Return a file as the version that the offers of this test name."""
    item = serving_kit.loadable(path, version, model=model, rows=np.ones((1, 1, 4), np.float32) * 0.5)
    return msgspec.structs.replace(item, manifest=digest_of(f"{model}/{version}"))


def ran_of(item: Loadable) -> tuple[Ran, ...]:
    return (Ran(item.model, item.manifest, item.variant),)


KILLS = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "i686"), reason="the division that ends the process does so on x86"
)


class Device:
    """The machine, and a real worker that does what it says and dies of what it is asked."""

    def __init__(self, site: Supervised) -> None:
        self.site = site
        self.state = fresh()
        self.serial = 0

    def turn(self, *events: s.Event, ms: int = 0) -> None:
        self.state, effects = run(self.state, *events, ms=ms)
        for effect in effects:
            if isinstance(effect, s.Serve):
                self.site.tell(*effect.models)
                self.site.wait_served()

    def serves(self) -> None:
        """Let the machine hear what the worker serves now."""
        answers = [event for event in self.site.events if isinstance(event, Serving)]
        newest = {one.model: one for one in answers if one.revision == self.site.said.revision}
        for one in newest.values():
            self.turn(
                s.Served(one.model, one.digest, self.state.revision, one.ok, incumbent_loaded=one.incumbent_loaded)
            )

    def try_out(self, candidate: Loadable) -> None:
        """Bring a version to its trial."""
        name, version = candidate.target.split("/")
        terms = offered(version, model=name)
        self.serial += 1
        self.turn(offer(self.serial, {name: terms}))
        self.turn(s.Resolved(name, terms.manifest, 1, (Candidate(loadable=candidate, bytes=1, why=""),)))
        self.turn(s.Fetched(name, terms.manifest, 1, candidate.variant))
        self.turn(s.CanaryDone(name, terms.manifest, 1, candidate.digest, Judged(passed=True)))
        self.serves()
        assert isinstance(self.state.models[name].phase, s.OnTrial)

    def install(self, candidate: Loadable) -> None:
        """Bring the first version of a model through its trial."""
        self.try_out(candidate)
        name = candidate.model
        stats = ArmStats(
            model=name,
            manifest=candidate.manifest,
            variant=candidate.variant,
            digest=candidate.digest,
            arm="candidate",
            requests=9,
        )
        self.turn(s.Measured(name, trial_of(self.state, name), stats))
        self.serves()
        assert self.state.models[name].incumbent is not None

    def is_killed_by(self, model: str) -> tuple[Ran, ...]:
        """Ask what the model dies of; return what the worker is found to have run."""
        before = len(self.site.deaths)
        asked = http.client.HTTPConnection("127.0.0.1", self.site.port, timeout=60)
        asked.request("POST", f"/v2/models/{model}/infer", json.dumps(infer_body([[models.DEADLY] * 4])))
        with pytest.raises((OSError, http.client.HTTPException)):
            asked.getresponse()
        asked.close()
        until(lambda: len(self.site.deaths) > before, "the worker died")
        self.site.wait_served()  # the next one has been told the same
        detail, ordered = self.site.deaths[-1]
        self.turn(s.WorkerDied(detail, ordered, self.site.ran[-1]), s.WorkerReady())
        self.serves()
        return self.site.ran[-1]


@KILLS
def test_a_request_that_kills_the_worker_is_held_against_the_model_that_ran(tmp_path: Path) -> None:
    old, new = (models.scale(tmp_path / f"{factor}.onnx", factor) for factor in (2.0, 3.0))
    weak, worse = (models.brittle(tmp_path / f"brittle-{factor}.onnx", factor) for factor in (2.0, 3.0))
    with supervised(tmp_path) as site:
        device = Device(site)
        device.install(real(old, MODEL))
        device.install(real(weak, PITCH))
        device.try_out(real(new, MODEL, "1.1.0"))
        for _ in range(2):
            assert [one.model for one in device.is_killed_by(PITCH)] == [PITCH]
        phase, crashes = device.state.models[MODEL].phase, device.state.crashes
        assert isinstance(phase, s.OnTrial), "it is innocent"
        assert phase.crashes == 0
        assert crashes is not None
        assert crashes.running == {PITCH: 2}, "whose they are"
        device.turn(s.Tick(), ms=61_000)
        device.turn(s.GoldenChecked(MODEL, phase.job.loadable.digest, phase.trial, True), ms=61_000)
        assert machine.running(device.state)[MODEL] == digest_of(f"{MODEL}/1.1.0"), "and confirmed"

        device.try_out(real(worse, PITCH, "1.1.0"))
        (culprit,) = device.is_killed_by(PITCH)
        assert culprit.manifest == digest_of(f"{PITCH}/1.1.0")
        assert machine.running(device.state)[PITCH] == digest_of(f"{PITCH}/1.0.0"), "this one is not"
        assert bad(device.state) == [real(worse, PITCH).digest]
        assert site.deaths[-1] == (f"signal {signal.SIGFPE:d} while it ran {PITCH} (float)", False)


@KILLS
def test_a_version_that_kills_the_worker_while_it_loads_is_named(tmp_path: Path) -> None:
    """Its first runs, before anybody's request, are a part of loading it."""
    harmless = models.scale(tmp_path / "harmless.onnx", 2.0)
    item = serving_kit.loadable(harmless, model=PITCH, rows=np.full((1, 1, 4), models.DEADLY, np.float32))
    deadly = serving_kit.instead(item, models.brittle(tmp_path / "brittle.onnx"))
    with supervised(tmp_path) as site:
        site.serve(ServeModel(name=MODEL, active=real(harmless, MODEL)))
        site.tell(ServeModel(name=MODEL, active=real(harmless, MODEL)), ServeModel(name=PITCH, active=deadly))
        until(lambda: len(site.ran) > 1, "two workers died of it")
        assert site.ran[:2] == [ran_of(deadly)] * 2
        site.serve(ServeModel(name=MODEL, active=real(harmless, MODEL)))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_kill_from_outside_says_nothing_of_what_ran(tmp_path: Path, number: int) -> None:
    """The kernel takes the largest process when memory is short: that may be whoever's doing."""
    endless = real(models.slow(tmp_path / "slow.onnx", turns=10**9), MODEL)
    with supervised(tmp_path) as site:
        site.serve(ServeModel(name=MODEL, active=endless))
        asked = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        asked.request("POST", f"/v2/models/{MODEL}/infer", json.dumps(infer_body([[1.0] * 4])))
        until(lambda: site.worker.running() == ran_of(endless), "it runs")
        os.kill(site.worker.pid, number)
        until(lambda: site.deaths, "the worker died")
        assert site.ran == [ran_of(endless) if number == signal.SIGSEGV else ()]
        asked.close()


def kill_by_request(device: Agent, model: str) -> None:
    """Ask what the model dies of, and wait until the next worker answers."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        code, body = device.infer(models.DEADLY, model)
        raise AssertionError(f"it answered: {code} {body}")


def is_back(device: Agent, model: str, version: str) -> None:
    code, body = device.infer(1.0, model)
    assert (code, body["model_version"]) == (200, version)


def settled(device: Agent, model: str, version: str) -> None:
    def check(shown: dict) -> bool:
        one = shown["models"].get(model, {})
        return one.get("doing") == "idle" and one.get("serves", {}).get("target") == f"{model}/{version}"

    device.until(f"{model} {version} is confirmed", check)


@KILLS
@pytest.mark.soak
@pytest.mark.services
@pytest.mark.timeout(300)
def test_a_whole_agent_holds_a_crash_against_the_model_that_ran(tmp_path: Path) -> None:
    with site(tmp_path) as server:
        server.release("1.0.0", models.scale(tmp_path / "old.onnx", 2.0))
        server.release("1.1.0", models.scale(tmp_path / "new.onnx", 3.0))
        server.release("1.0.0", models.brittle(tmp_path / "brittle.onnx", 2.0), model="brittle")
        server.release("1.1.0", models.brittle(tmp_path / "worse.onnx", 3.0), model="brittle")
        with agent(server, "lamp") as device:
            device.until("its engines are known", lambda shown: shown["engines"])
            server.deploy("1.0.0", "lamp", trial_s=1)
            settled(device, "scale", "1.0.0")
            server.deploy("1.0.0", "lamp", trial_s=1, model="brittle")
            settled(device, "brittle", "1.0.0")

            # a candidate that kills goes back, and the other model is not asked for a word
            server.deploy("1.1.0", "lamp", trial_s=600, model="brittle")
            device.until("brittle is on trial", lambda shown: shown["models"]["brittle"]["doing"] == "on trial")
            kill_by_request(device, "brittle")
            settled(device, "brittle", "1.0.0")
            (first,) = device.status()["known_bad"]
            assert first["reason"] == reasons.CRASH
            is_back(device, "scale", "1.0.0")

            # one that is on trial while the other kills is confirmed; the other's crashes are its own
            server.deploy("1.1.0", "lamp", trial_s=8)
            device.until_doing("on trial")
            for _ in range(2):
                kill_by_request(device, "brittle")
                is_back(device, "brittle", "1.0.0")
                is_back(device, "scale", "1.1.0")
            deaths = device.status()["worker_deaths"]
            assert (deaths["count"], deaths["while_running"]) == (2, {"brittle": 2})
            device.until_serves("1.1.0")

            for _ in range(CRASHES_MAX + 1 - 2):
                kill_by_request(device, "brittle")
                is_back(device, "scale", "1.1.0")
            shown = device.until(
                "brittle gave way", lambda shown: shown["models"]["brittle"]["doing"].startswith("safe")
            )
            assert [one["reason"] for one in shown["known_bad"]] == [reasons.CRASH] * 2
            assert shown["models"]["scale"]["doing"] == "idle"
            assert "while it ran brittle (float)" in device.log.read_text(errors="replace")
