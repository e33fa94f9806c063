"""Crash loops are counted, over restarts of the agent too, and end: the incumbent, the last known good, the safe state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
from tests.agent.test_machine_properties import honest
from wherry_agent import journal, machine
from wherry_agent import state as s
from wherry_agent.turn import (
    CRASH_WINDOW_MS,
    CRASHES_MAX,
    FAULTS_MAX,
    HELD_RETRY_MAX_MS,
    HELD_RETRY_MIN_MS,
    STEADY_MS,
)
from wherry_shared import reasons
from wherry_shared.clock import Now

Resume = Callable[[s.State, Now], tuple[s.State, tuple[s.Effect, ...]]]


def restarted(state: s.State, ms: int = 0, boot: str = "boot-1", resume: Resume = machine.resume) -> s.State:
    """The agent was killed and starts again on what the journal holds; its worker is there."""
    state, _ = resume(journal.decode(journal.encode(state)), now(ms, boot))
    state, _ = machine.step(state, s.WorkerReady(), now(ms, boot))
    return state


def two_versions() -> s.State:
    """Both confirmed, the newer one for more than a day: how the machine ends says nothing of it."""
    state, _ = machine.step(
        confirmed("1.1.0", state=confirmed("1.0.0"), serial=2), s.Tick(), now(2 * STEADY_MS, "boot-1")
    )
    return state


def fails_to_serve(state: s.State, version: str, reason: str = "load_failed") -> s.State:
    digest = loadable(version).digest
    state, _ = run(state, s.Served(MODEL, digest, state.revision, False, reason, "it does not load"))
    return state


def serves(state: s.State) -> str:
    return machine.running(state).get(MODEL, "")


def of(version: str) -> str:
    return digest_of(f"{MODEL}/{version}")


def after_failed_starts(resume: Resume = machine.resume) -> s.State:
    state = two_versions()
    for _ in range(FAULTS_MAX):
        assert serves(state) == of("1.1.0")
        state = restarted(fails_to_serve(state, "1.1.0"), resume=resume)
    return state


def after_deaths(resume: Resume = machine.resume) -> s.State:
    state = two_versions()
    for number in range(CRASHES_MAX + 1):
        assert serves(state) == of("1.1.0")
        state, _ = machine.step(state, s.WorkerDied("signal 11"), now(number * 1000))
        state = restarted(state, number * 1000, resume=resume)
    return state


def test_failed_starts_are_counted_over_restarts_of_the_agent_and_lead_to_the_last_known_good() -> None:
    state = after_failed_starts()
    assert serves(state) == of("1.0.0")
    assert (state.owed[-1].state, state.owed[-1].reason, state.owed[-1].running) == (
        "returned",
        "load_failed",
        of("1.0.0"),
    )


def test_when_that_one_fails_too_the_device_is_safe_and_says_so() -> None:
    state = two_versions()
    for version in ("1.1.0", "1.0.0"):
        for _ in range(FAULTS_MAX):
            state = restarted(fails_to_serve(state, version))
    assert serves(state) == ""
    assert isinstance(state.models[MODEL].phase, s.Safe)
    assert [(one.state, one.running) for one in state.owed[-2:]] == [("returned", of("1.0.0")), ("safe", "")]
    assert machine.outgoing(state)  # it still has words, and a connection to say them


def test_deaths_of_the_worker_are_counted_over_restarts_of_the_agent() -> None:
    state = after_deaths()
    assert serves(state) == of("1.0.0")
    assert state.owed[-1].reason == reasons.CRASH
    assert [bad.digest for bad in state.known_bad] == [loadable("1.1.0").digest]


def test_a_crash_loop_with_several_models_costs_the_newest_its_place_and_not_its_name() -> None:
    state = two_versions()
    state, _ = run(state, offer(3, {MODEL: offered("1.1.0"), "other": offered(model="other")}))
    state, _ = run(state, resolved(model="other"), fetched(model="other"), judged(model="other"))
    state, _ = run(state, served(state, model="other"))
    state, _ = run(state, measured(state, model="other", requests=9))
    assert machine.running(state) == {MODEL: of("1.1.0"), "other": digest_of("other/1.0.0")}
    for _ in range(CRASHES_MAX + 1):
        state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady())
    assert machine.running(state) == {MODEL: of("1.1.0")}
    assert state.known_bad == (), "nobody knows whose crashes they were"
    for _ in range(CRASHES_MAX + 1):
        state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady())
    assert machine.running(state) == {MODEL: of("1.0.0")}
    assert [bad.digest for bad in state.known_bad] == [loadable("1.1.0").digest], "the only one left that can be it"


def safe_device() -> s.State:
    """The only version was killed four times, though it is as good as ever."""
    state = confirmed("1.0.0")
    for _ in range(CRASHES_MAX + 1):
        state, _ = run(state, s.WorkerDied("signal 9", ran=(RAN,)), s.WorkerReady())
    assert isinstance(state.models[MODEL].phase, s.Safe)
    assert [bad.reason for bad in state.known_bad] == [reasons.CRASH]
    return state


RAN = s.Ran(MODEL, of("1.0.0"), loadable("1.0.0").variant)


def test_a_device_without_another_version_keeps_the_file_and_tries_it_again_by_canary_and_trial() -> None:
    state = safe_device()
    assert [kept.digest for kept in machine.kept(state)] == [loadable("1.0.0").digest]
    early, _ = machine.step(state, s.Tick(), now(HELD_RETRY_MIN_MS - 1))
    assert isinstance(early.models[MODEL].phase, s.Safe)
    assert machine.next_deadline_ms(early, now(HELD_RETRY_MIN_MS - 1)) <= 1
    state, effects = machine.step(state, s.Tick(), now(HELD_RETRY_MIN_MS))
    assert asks_the_courier(effects) == [], "a device without a network gets there too"
    assert [effect.candidate.digest for effect in effects if isinstance(effect, s.Judge)] == [loadable("1.0.0").digest]
    state, _ = run(state, judged())
    state, _ = run(state, served(state))
    state, _ = run(state, measured(state, requests=9))
    assert serves(state) == of("1.0.0")
    assert (state.owed[-1].state, state.owed[-1].running) == ("confirmed", of("1.0.0"))
    assert state.models[MODEL].held is None


def asks_the_courier(effects: Iterable[s.Effect]) -> list[s.Effect]:
    return [effect for effect in effects if isinstance(effect, s.Resolve | s.Fetch)]


def unresolved(version: str, reason: str, attempt: int = 1) -> s.TaskFailed:
    return s.TaskFailed(MODEL, of(version), attempt, "resolve", reason, "said so")


def test_each_try_that_fails_makes_the_next_one_wait_twice_as_long_up_to_a_day() -> None:
    state, ms = safe_device(), 0
    waits = []
    for _ in range(10):
        held = state.models[MODEL].held
        assert held is not None
        waits.append(held.wait_ms)
        ms += held.wait_ms
        state, _ = machine.step(state, s.Tick(), now(ms))
        state, _ = machine.step(state, judged(passed=False, reason=reasons.CRASH), now(ms))
        assert isinstance(state.models[MODEL].phase, s.Safe)
        assert machine.step(state, s.Tick(), now(ms + 1_000))[0].models[MODEL].phase == state.models[MODEL].phase
    assert waits[:3] == [HELD_RETRY_MIN_MS, 2 * HELD_RETRY_MIN_MS, 4 * HELD_RETRY_MIN_MS]
    assert waits[-1] == HELD_RETRY_MAX_MS


def test_a_boot_begins_the_shortest_wait_and_no_offer_has_to_name_what_is_tried_again() -> None:
    state = restarted(safe_device(), boot="boot-2")
    held = state.models[MODEL].held
    assert held is not None
    assert (held.since.boot, held.wait_ms) == ("boot-2", HELD_RETRY_MIN_MS)
    state, _ = machine.step(state, offer(9, {}), now(0, "boot-2"))
    state, _ = machine.step(state, s.Tick(), now(HELD_RETRY_MIN_MS, "boot-2"))
    assert isinstance(state.models[MODEL].phase, s.Judging)
    restart = restarted(state, boot="boot-3")
    assert isinstance(restart.models[MODEL].phase, s.Judging), "a cut while it is judged ends nothing"


def test_an_offer_that_cannot_be_had_does_not_keep_a_device_dark() -> None:
    state, _ = run(safe_device(), offer(9, {MODEL: offered("1.1.0")}))
    state, _ = run(state, unresolved("1.1.0", reasons.NETWORK))
    assert isinstance(state.models[MODEL].phase, s.Waiting)
    state, _ = run(state, s.Tick(), unresolved("1.1.0", reasons.NETWORK), ms=HELD_RETRY_MIN_MS)
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.Judging)
    assert phase.job.loadable == loadable("1.0.0")
    state, _ = run(state, judged(), ms=HELD_RETRY_MIN_MS)
    state, _ = run(state, served(state), ms=HELD_RETRY_MIN_MS)
    state, effects = run(state, measured(state, requests=9), ms=HELD_RETRY_MIN_MS)
    assert serves(state) == of("1.0.0")
    assert asks_the_courier(effects), "and then what was offered is looked for again"


@pytest.mark.parametrize("reason", [reasons.REVOKED, reasons.BELOW_FLOOR])
def test_what_its_publisher_withdrew_is_not_tried_again(reason: str) -> None:
    state, _ = run(safe_device(), offer(9, {MODEL: offered("1.0.0", attempt=2)}))
    state, _ = run(state, unresolved("1.0.0", reason, attempt=2))
    state, effects = machine.step(state, s.Tick(), now(HELD_RETRY_MIN_MS))
    assert isinstance(state.models[MODEL].phase, s.Safe)
    assert not any(isinstance(effect, s.Judge) for effect in effects)
    assert machine.kept(state) == ()


def test_a_model_that_is_to_leave_takes_the_file_of_what_served_last_along() -> None:
    state, effects = run(safe_device(), offer(9, {MODEL: offered(mode="none")}))
    assert s.Collect(()) in effects
    assert state.models[MODEL].held is None


def boots(state: s.State, deaths: int, *, every: int = 1, after_ms: int = 5_000) -> s.State:
    """The machine is started again and again; in each `every`th boot the worker dies soon after."""
    for number in range(deaths * every):
        boot = f"boot-{number + 2}"
        state = restarted(state, boot=boot)
        if number % every == 0:
            state, _ = machine.step(state, s.WorkerDied("signal 11"), now(after_ms, boot))
            state, _ = machine.step(state, s.WorkerReady(), now(after_ms, boot))
    return state


def test_a_death_in_each_boot_leads_to_the_last_known_good_and_then_to_the_safe_state() -> None:
    state = two_versions()
    assert serves(boots(state, CRASHES_MAX)) == of("1.1.0")
    assert serves(boots(state, CRASHES_MAX + 1)) == of("1.0.0")
    state = boots(state, 30)
    assert serves(state) == ""
    assert isinstance(state.models[MODEL].phase, s.Safe)
    assert [(one.state, one.reason) for one in state.owed[-2:]] == [("returned", "crash"), ("safe", "crash")]


def test_a_death_now_and_then_costs_nothing_however_many_boots_there_are() -> None:
    assert serves(boots(two_versions(), 30, every=2)) == of("1.1.0"), "a boot without one ends the count"
    assert serves(boots(two_versions(), 30, after_ms=CRASH_WINDOW_MS + 1)) == of("1.1.0"), (
        "each was quiet for long enough"
    )


def test_a_restart_of_the_agent_is_no_boot_and_neither_ends_nor_prolongs_the_count() -> None:
    state, _ = machine.step(two_versions(), s.WorkerDied("signal 11"), now())
    crashes = state.crashes
    for number in range(5):
        state = restarted(state, number)
    assert state.crashes == crashes


def forgets_failures(state: s.State, at: Now) -> tuple[s.State, tuple[s.Effect, ...]]:
    models = {name: replace(slot, faults=0) for name, slot in state.models.items()}
    return machine.resume(replace(state, models=models), at)


def forgets_deaths(state: s.State, at: Now) -> tuple[s.State, tuple[s.Effect, ...]]:
    return machine.resume(replace(state, crashes=None), at)


def test_a_restart_that_forgot_a_count_would_be_noticed() -> None:
    assert serves(after_failed_starts(forgets_failures)) == of("1.1.0")
    assert serves(after_deaths(forgets_deaths)) == of("1.1.0")


def test_crashes_in_a_trial_are_counted_over_restarts_of_the_agent() -> None:
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    state = restarted(state)
    state, _ = run(state, s.WorkerDied("signal 11"))
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.Returning)
    assert phase.reason == reasons.CRASH
    assert serves(state) == of("1.0.0")


def test_what_failed_is_not_tried_again_after_any_number_of_restarts() -> None:
    state = two_versions()
    for _ in range(FAULTS_MAX):
        state = fails_to_serve(state, "1.1.0")
    for number in range(5):
        state = restarted(state, boot=f"boot-{number}")
        state, effects = machine.step(state, offer(10 + number, {MODEL: offered("1.1.0")}), now(boot=f"boot-{number}"))
        assert not [effect for effect in effects if isinstance(effect, s.Resolve | s.Fetch | s.Judge)]
        assert serves(state) == of("1.0.0")


def test_an_engine_that_is_gone_costs_the_version_and_its_offer_brings_another_variant() -> None:
    state = two_versions()
    for _ in range(FAULTS_MAX):
        state = fails_to_serve(state, "1.1.0", reasons.ENGINE_MISSING)
    assert serves(state) == of("1.0.0")
    assert (state.owed[-2].state, state.owed[-2].reason) == ("returned", "engine_missing")
    assert state.known_bad == ()  # no word about the model
    assert isinstance(state.models[MODEL].phase, s.Resolving)  # the standing offer is resolved with what is here now


def test_an_engine_that_is_gone_for_everything_leaves_a_safe_device_that_goes_on_looking() -> None:
    state = confirmed("1.0.0")
    for _ in range(FAULTS_MAX):
        state = fails_to_serve(state, "1.0.0", reasons.ENGINE_MISSING)
    assert serves(state) == ""
    assert ("safe", "engine_missing") in [(one.state, one.reason) for one in state.owed]
    failed = s.TaskFailed(MODEL, of("1.0.0"), 1, "resolve", reasons.NO_VARIANT, "no engine runs it")
    state, _ = run(state, failed)
    assert (state.owed[-1].state, state.owed[-1].reason) == ("safe", "no_variant")
    state, effects = run(state, s.EnginesProbed({}))
    assert not [effect for effect in effects if isinstance(effect, s.Resolve)]
    state, effects = run(restarted(state), offer(2, {MODEL: offered("1.0.0", attempt=2)}))
    assert [effect for effect in effects if isinstance(effect, s.Resolve)]


@pytest.mark.parametrize("seen", [True, False], ids=["a probe missed it", "no probe looked meanwhile"])
def test_an_engine_that_is_back_serves_again_without_a_new_attempt(seen: bool) -> None:
    there = s.EnginesProbed({"onnxruntime": loadable().engine_version})
    state, _ = run(confirmed("1.0.0"), there)
    for _ in range(FAULTS_MAX):
        state = fails_to_serve(state, "1.0.0", reasons.ENGINE_MISSING)
    gone = s.TaskFailed(MODEL, of("1.0.0"), 1, "resolve", reasons.NO_VARIANT, "no engine runs it")
    state, _ = run(state, *([s.EnginesProbed({})] if seen else []), gone)
    state = restarted(state)
    assert isinstance(state.models[MODEL].phase, s.Safe)

    state, effects = run(state, there)
    assert [effect for effect in effects if isinstance(effect, s.Resolve)]
    state, _ = run(state, resolved(), fetched(), judged())
    state, _ = run(state, served(state))
    assert serves(state) == of("1.0.0")
    assert run(state, there)[1] == [], "the same engines begin nothing again"


def test_an_offer_that_no_engine_runs_is_begun_when_one_is_installed_and_the_incumbent_serves_meanwhile() -> None:
    state, _ = run(confirmed("1.0.0"), s.EnginesProbed({"onnxruntime": "1.32.0"}), offer(2, {MODEL: offered("1.1.0")}))
    state, _ = run(state, s.TaskFailed(MODEL, of("1.1.0"), 1, "resolve", reasons.NO_VARIANT, "no engine runs it"))
    assert (state.owed[-1].state, serves(state)) == ("refused", of("1.0.0"))
    state, effects = run(state, s.EnginesProbed({"onnxruntime": "1.32.0", "litert": "2.1.0"}))
    assert [effect.offered.target for effect in effects if isinstance(effect, s.Resolve)] == [loadable("1.1.0").target]
    assert serves(state) == of("1.0.0")


def test_a_group_that_came_to_nothing_for_want_of_an_engine_is_begun_again_whole() -> None:
    models = {name: offered("1.0.0", model=name, group="pair") for name in (MODEL, "other")}
    state, _ = run(fresh(), offer(1, models))
    state, _ = run(state, s.TaskFailed(MODEL, of("1.0.0"), 1, "resolve", reasons.NO_VARIANT, "no engine runs it"))
    assert [(one.model, one.state, one.reason) for one in state.owed[-2:]] == [
        (MODEL, "refused", "no_variant"),
        ("other", "failed", "group"),
    ]
    state, effects = run(state, s.EnginesProbed({"onnxruntime": "1.32.0"}))
    assert [effect.model for effect in effects if isinstance(effect, s.Resolve)] == [MODEL, "other"]


def test_what_is_resolved_while_an_engine_comes_is_resolved_again_with_it() -> None:
    state, _ = run(fresh(), offer(1, {MODEL: offered()}))
    state, effects = run(state, s.EnginesProbed({"onnxruntime": "1.32.0"}))
    assert [type(effect) for effect in effects] == [s.Cancel, s.Resolve]


def test_a_candidate_that_misses_its_engine_goes_back_and_comes_again_with_the_engine() -> None:
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    state = fails_to_serve(state, "1.1.0", reasons.ENGINE_MISSING)
    state, _ = run(state, served(state, "1.0.0"))
    assert (state.owed[-1].state, state.owed[-1].reason) == ("returned", reasons.ENGINE_MISSING)
    state, effects = run(state, s.EnginesProbed({"onnxruntime": "1.32.0"}))
    assert [effect.offered.target for effect in effects if isinstance(effect, s.Resolve)] == [loadable("1.1.0").target]


def test_a_canary_that_finds_no_engine_waits_and_blames_nobody() -> None:
    state, effects = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}))
    queue = [answer for effect in effects for answer in honest(effect, state) if isinstance(effect, s.Resolve)]
    while queue and not isinstance(state.models[MODEL].phase, s.Judging):
        state, effects = run(state, queue.pop(0))
        queue += [answer for effect in effects if isinstance(effect, s.Fetch) for answer in honest(effect, state)]
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.Judging)
    variant = phase.job.loadable.variant
    state, _ = run(state, judged("1.1.0", variant, passed=False, reason=reasons.ENGINE_MISSING))
    assert isinstance(state.models[MODEL].phase, s.Waiting)
    assert state.known_bad == ()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_device_on_which_nothing_runs_comes_to_rest(seed: int) -> None:
    """Whatever fails, how, and with restarts anywhere: bounded tries, then the safe state, and no effect after it."""
    source = random.Random(seed)
    state = two_versions()
    judged_with: dict[tuple[str, int], int] = {}
    quiet = 0
    queue: list[s.Event] = [offer(3, {MODEL: offered("1.2.0")})]
    for turn in range(400):
        ms = turn * 1000
        if source.random() < 0.03:
            state, effects = machine.resume(journal.decode(journal.encode(state)), now(ms))
            queue = [answer for answer in queue if isinstance(answer, s.Offered)]
            queue.append(s.WorkerReady())
        else:
            event = queue.pop(0) if queue else s.Tick()
            state, effects = machine.step(state, event, now(ms))
            if isinstance(event, s.WorkerDied):
                queue.append(s.WorkerReady())
        for effect in effects:
            match effect:
                case s.Serve():
                    queue += [
                        source.choice(
                            [
                                s.Served(one.name, one.active.digest, effect.revision, False, "load_failed", "x"),
                                s.WorkerDied("signal 11"),
                            ]
                        )
                        for one in effect.models
                    ]
                case s.Judge():
                    key = (effect.candidate.digest, effect.attempt)
                    judged_with[key] = judged_with.get(key, 0) + 1
                    queue += honest(effect, state)
                case s.RunGolden() | s.HandOver():
                    pass
                case _:
                    queue += honest(effect, state)
        resting = isinstance(state.models[MODEL].phase, s.Safe | s.Idle) and not machine.serving(state)
        quiet = quiet + 1 if resting else 0
    assert quiet > 20, state.models[MODEL].phase
    assert not machine.serving(state)
    assert all(count <= 4 for count in judged_with.values())  # `restarts_max` and the first
    assert state.owed
