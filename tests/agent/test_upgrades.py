"""An engine is replaced on disk while models serve with the one before: who is judged, who takes over, who gives way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest

from tests.agent.builders import (
    MODEL,
    confirmed,
    fetched,
    judged,
    loadable,
    now,
    offer,
    offered,
    on_trial,
    resolved,
    run,
    served,
)
from wherry_agent import journal, machine, upgrades
from wherry_agent import state as s
from wherry_agent.children import Judged
from wherry_agent.turn import DOWNS_ORDINARY, REJUDGE_DOWNS_MAX, STEADY_MS
from wherry_shared import reasons

OLD, NEW = "1.32.0", "1.33.0"
GOOD = Judged(passed=True, peak_memory_bytes=7)
MISS = Judged(passed=False, reason=reasons.GOLDEN_MISS, detail="off by 3")


def probed(version: str = NEW) -> s.EnginesProbed:
    return s.EnginesProbed({"onnxruntime": version})


def rejudged(result: Judged, version: str = "1.0.0", engine: str = NEW) -> s.Rejudged:
    return s.Rejudged(MODEL, loadable(version).digest, engine, result)


def working(version: str = "1.0.0", state: s.State | None = None) -> s.State:
    """Confirmed, served by a worker that has the old engine in memory."""
    state = confirmed(version, state=state, serial=2) if state is not None else confirmed(version)
    state, _ = run(state, probed(OLD), served(state, version, engine_version=OLD))
    return state


def of(kind: type, effects: list[s.Effect]) -> list:
    return [effect for effect in effects if isinstance(effect, kind)]


def engine_of(state: s.State) -> str:
    incumbent = state.models[MODEL].incumbent
    assert incumbent is not None
    return incumbent.loadable.engine_version


def said(state: s.State) -> list[tuple[str, str]]:
    return [(report.state, report.reason) for report in state.owed]


def test_the_same_engine_found_again_changes_nothing() -> None:
    state = working()
    after, effects = run(state, probed(OLD))
    assert after == state
    assert effects == []


def test_what_serves_is_judged_with_a_new_engine_and_another_worker_takes_over_if_it_passes() -> None:
    state, effects = run(working(), probed())
    (order,) = of(s.Rejudge, effects)
    assert (order.candidate.digest, order.candidate.engine_version) == (loadable().digest, NEW)
    assert not of(s.HandOver, effects)
    assert run(state, probed())[1] == [], "it is being judged already"

    state, effects = run(state, rejudged(GOOD))
    assert said(state)[-1] == ("confirmed", reasons.ENGINE_CHANGED)
    assert NEW in state.owed[-1].detail
    assert engine_of(state) == NEW
    (order,) = of(s.HandOver, effects)
    assert order.why == f"onnxruntime {NEW} instead of {OLD}"

    state, effects = run(state, served(state, engine_version=NEW), s.HandedOver())
    assert of(s.HandOver, effects) == []
    assert state.engines.loaded == {"onnxruntime": NEW}
    assert run(state, probed())[1] == []


def test_what_misses_its_golden_vectors_with_a_new_engine_goes_on_in_the_old_process() -> None:
    state, _ = run(working(), probed())
    state, effects = run(state, rejudged(MISS))
    assert said(state)[-1] == ("confirmed", reasons.ENGINE_CHANGED)
    assert "golden_miss" in state.owed[-1].detail
    assert [(bad.engine_version, bad.reason) for bad in state.known_bad] == [(NEW, reasons.GOLDEN_MISS)]
    assert machine.running(state) == {MODEL: loadable().manifest}
    assert of(s.HandOver, effects) == of(s.Serve, effects) == []
    assert run(state, probed())[1] == [], "it is not judged again with the same engine"


def after_a_miss(*variants: str) -> s.State:
    """1.1.0 confirmed after 1.0.0, and known to fail with the engine on disk."""
    state = working("1.1.0", state=confirmed("1.0.0"))
    state, _ = run(state, probed(), rejudged(MISS, "1.1.0"))
    return state


def test_a_worker_that_starts_all_the_same_serves_the_last_good_version() -> None:
    state = after_a_miss()
    state, _ = run(state, s.WorkerDied("signal 9"))
    assert machine.running(state) == {MODEL: loadable("1.1.0").manifest}, "nothing is decided before there is a worker"
    state, effects = run(state, s.WorkerReady())
    (order,) = of(s.Serve, effects)
    assert [one.active.target for one in order.models] == [loadable("1.0.0").target]
    assert ("returned", reasons.ENGINE_CHANGED) in said(state)
    (judge,) = of(s.Rejudge, effects)
    assert judge.candidate.target == loadable("1.0.0").target, "the other is proved with it too"


def test_the_offer_brings_another_variant_in_its_place() -> None:
    state, effects = run(after_a_miss(), s.WorkerReady())
    (order,) = of(s.Resolve, effects)
    assert order.offered.target == loadable("1.1.0").target
    found = tuple(
        msgspec.structs.replace(one, loadable=msgspec.structs.replace(one.loadable, engine_version=NEW))
        for one in resolved("1.1.0", "float", "int8").candidates
    )
    state, effects = run(state, replace(resolved("1.1.0"), candidates=found))
    (fetch,) = of(s.Fetch, effects)
    assert fetch.variant == "int8"


def test_without_another_version_or_variant_the_device_is_safe_and_says_so() -> None:
    state, _ = run(working(), probed(), rejudged(MISS), s.WorkerReady())
    assert ("safe", reasons.ENGINE_CHANGED) in said(state)
    found = tuple(
        msgspec.structs.replace(one, loadable=msgspec.structs.replace(one.loadable, engine_version=NEW))
        for one in resolved("1.0.0").candidates
    )
    state, _ = run(state, replace(resolved("1.0.0"), candidates=found))
    assert said(state)[-2:] == [("refused", reasons.KNOWN_BAD), ("safe", reasons.KNOWN_BAD)]
    assert isinstance(state.models[MODEL].phase, s.Safe)


def test_a_worker_that_has_the_new_engine_already_does_not_go_on_with_what_fails() -> None:
    """The library was replaced while the agent was off: the worker had it before anybody judged."""
    state, _ = machine.resume(working("1.1.0", state=confirmed("1.0.0")), now())
    state, effects = run(state, s.WorkerReady())
    state, effects = run(state, served(state, "1.1.0", engine_version=NEW))
    assert of(s.HandOver, effects) == [], "what is installed has to be looked at first"
    state, effects = run(state, probed())
    assert len(of(s.Rejudge, effects)) == 1
    state, _ = run(state, rejudged(MISS, "1.1.0"))
    assert machine.running(state) == {MODEL: loadable("1.0.0").manifest}


def test_one_version_that_fails_keeps_the_worker_as_it_is() -> None:
    other = "other"
    state = confirmed("1.0.0")
    state, _ = run(
        state,
        offer(7, {MODEL: offered("1.0.0"), other: offered("1.0.0", model=other)}),
        resolved("1.0.0", model=other),
        fetched("1.0.0", model=other),
        judged("1.0.0", model=other),
    )
    state, _ = run(state, served(state, "1.0.0", model=other))
    proving = state.models[other].phase
    assert isinstance(proving, s.OnTrial)
    state, _ = run(state, s.Tick(), ms=70_000)
    state, _ = run(state, s.GoldenChecked(other, loadable(model=other).digest, proving.trial, True), ms=70_000)
    state, _ = run(
        state,
        served(state, engine_version=OLD),
        served(state, model=other, engine_version=OLD),
        probed(),
        rejudged(MISS),
        ms=70_000,
    )
    state, effects = run(state, s.Rejudged(other, loadable(model=other).digest, NEW, GOOD), ms=70_000)
    state, more = run(
        state, served(state, engine_version=OLD), served(state, model=other, engine_version=OLD), ms=70_000
    )
    assert of(s.HandOver, [*effects, *more]) == []


def test_trouble_of_the_canary_is_no_verdict_and_the_next_probe_asks_again() -> None:
    state, _ = run(working(), probed(), rejudged(Judged(passed=False, reason=reasons.CHILD_FAILED)))
    assert state.known_bad == ()
    assert len(of(s.Rejudge, run(state, probed())[1])) == 1


TROUBLE = Judged(passed=False, reason=reasons.CHILD_FAILED, detail="no memory just now")


def test_trouble_of_the_canary_is_tried_again_after_longer_and_longer_waits_without_a_probe() -> None:
    state, _ = run(working(), probed())
    ms, waits = 0, []
    for _ in range(3):
        state, _ = run(state, rejudged(TROUBLE), ms=ms)
        waits.append(machine.next_deadline_ms(state, now(ms)))
        assert not of(s.Rejudge, run(state, s.Tick(), ms=ms + waits[-1] - 1)[1]), "not before its time"
        ms += waits[-1]
        state, effects = run(state, s.Tick(), ms=ms)
        assert len(of(s.Rejudge, effects)) == 1
        assert machine.next_deadline_ms(state, now(ms)) > 0
    assert waits == [5_000, 10_000, 20_000]
    state, effects = run(state, rejudged(GOOD), ms=ms)
    assert len(of(s.HandOver, effects)) == 1
    assert state.engines.again == {}


def test_a_canary_without_a_verdict_is_forgotten_when_there_is_nothing_to_ask_any_more() -> None:
    state, _ = run(working(), probed(), rejudged(TROUBLE), probed(OLD))
    state, effects = run(state, s.Tick(), ms=5_000)
    assert not of(s.Rejudge, effects)
    assert state.engines.again == {}


def test_a_version_that_was_confirmed_while_the_one_before_was_judged_is_judged_too() -> None:
    state, _ = run(working("1.1.0", state=confirmed("1.0.0")), probed())
    state, effects = run(state, rejudged(GOOD, "1.0.0"))
    assert [order.candidate.target for order in of(s.Rejudge, effects)] == [loadable("1.1.0").target]


def test_a_hand_over_that_fails_is_made_again_without_a_probe_and_never_in_a_trial() -> None:
    state, _ = run(working(), probed(), rejudged(GOOD))
    state, effects = run(state, served(state, engine_version=OLD), s.HandedOver("it ended with signal 11"))
    assert not of(s.HandOver, effects)
    wait = machine.next_deadline_ms(state, now())
    assert wait == 5_000
    later, effects = run(state, s.Tick(), ms=wait)
    assert len(of(s.HandOver, effects)) == 1
    later, _ = run(later, s.HandedOver("it ended with signal 11"), ms=wait)
    assert machine.next_deadline_ms(later, now(wait)) == 10_000
    done, _ = run(later, s.Tick(), s.HandedOver(), ms=wait + 10_000)
    assert done.engines.hand_over_again is None

    state, _ = run(state, offer(9, {MODEL: offered("1.1.0")}))
    found = tuple(
        msgspec.structs.replace(one, loadable=msgspec.structs.replace(one.loadable, engine_version=NEW))
        for one in resolved("1.1.0").candidates
    )
    state, _ = run(state, replace(resolved("1.1.0"), candidates=found), fetched("1.1.0"), judged("1.1.0"))
    state, effects = run(state, s.Tick(), ms=wait)
    assert isinstance(state.models[MODEL].phase, s.Swapping)
    assert not of(s.HandOver, effects)
    assert machine.next_deadline_ms(state, now(wait)) > 0, "the agent does not spin until the trial is over"


def test_a_canary_that_never_answers_is_not_waited_for() -> None:
    state, _ = run(working(), probed())
    late = (upgrades.REJUDGE_S + 60) * 1000
    assert machine.next_deadline_ms(state, now()) <= late
    state, _ = run(state, s.Tick(), ms=late)
    assert state.engines.judging == {}
    after, _ = run(state, rejudged(MISS), ms=late)
    assert after.known_bad == (), "too late"
    assert len(of(s.Rejudge, run(state, s.Tick(), ms=late + 5_000)[1])) == 1


@pytest.mark.parametrize("end", ["failed", "silent"])
def test_a_hand_over_that_comes_to_nothing_is_made_again_after_the_next_probe(end: str) -> None:
    state, effects = run(working(), probed(), rejudged(GOOD))
    assert len(of(s.HandOver, effects)) == 1
    if end == "failed":
        state, effects = run(state, served(state, engine_version=OLD), s.HandedOver("it ended with signal 11"))
        assert "signal 11" in state.owed[-1].detail
    else:
        state, effects = run(state, s.Tick(), ms=upgrades.HAND_OVER_MS)
    assert (state.owed[-1].state, state.owed[-1].reason) == ("confirmed", reasons.ENGINE_CHANGED)
    assert of(s.HandOver, effects) == []
    assert len(of(s.HandOver, run(state, probed(), ms=upgrades.HAND_OVER_MS)[1])) == 1


def test_nothing_is_tried_while_a_worker_takes_over_and_none_takes_over_in_a_trial() -> None:
    state = working()
    state, effects = run(state, s.HandOverAsked("the operator asked for it"))
    assert of(s.HandOver, effects) == [s.HandOver("the operator asked for it")]
    state, effects = run(
        state, offer(9, {MODEL: offered("1.1.0")}), resolved("1.1.0"), fetched("1.1.0"), judged("1.1.0")
    )
    assert isinstance(state.models[MODEL].phase, s.Queued)
    state, effects = run(state, s.HandedOver())
    assert isinstance(state.models[MODEL].phase, s.Swapping)

    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    state, effects = run(state, s.HandOverAsked("again"))
    assert of(s.HandOver, effects) == []
    assert state.engines.wanted == "again", "it is not forgotten"


def test_a_variant_that_was_chosen_for_the_engine_before_is_chosen_again() -> None:
    state, _ = run(working(), offer(9, {MODEL: offered("1.1.0")}), resolved("1.1.0"))
    state, effects = run(state, probed())
    assert [type(effect).__name__ for effect in effects][:2] == ["Cancel", "Resolve"]
    assert isinstance(state.models[MODEL].phase, s.Resolving)


def test_what_is_under_way_does_not_outlive_the_agent_and_what_is_installed_does() -> None:
    state, _ = run(working(), probed())
    state = journal.decode(journal.encode(state))
    assert state.engines.judging
    state, effects = machine.resume(state, now())
    assert state.engines == s.Engines(installed={"onnxruntime": NEW}, barred=True)
    assert not of(s.Rejudge, list(effects))


# --- a canary that the machine does not outlive ---


def reboots(state: s.State, number: int, *, ordered: bool = False) -> tuple[s.State, list[s.Effect]]:
    """The machine goes down and comes again, and the probe finds the new engine."""
    if ordered:
        state, _ = machine.step(state, s.Stopping(), now(1000))
    at = now(0, f"boot-{number}")
    state, _ = machine.resume(journal.decode(journal.encode(state)), at)
    state, first = machine.step(state, s.WorkerReady(), at)
    state, then = machine.step(state, probed(), at)
    return state, [*first, *then]


def test_a_version_that_takes_the_machine_down_in_the_canary_with_a_new_engine_gives_way() -> None:
    state, _ = run(working("1.1.0", state=confirmed("1.0.0")), s.Tick(), ms=2 * STEADY_MS)
    state, effects = run(state, probed(), ms=2 * STEADY_MS)
    assert len(of(s.Rejudge, effects)) == 1
    for number in range(2, 1 + REJUDGE_DOWNS_MAX):
        state, effects = reboots(state, number)
        assert [order.candidate.target for order in of(s.Rejudge, effects)] == [loadable("1.1.0").target]
    state, effects = reboots(state, 1 + REJUDGE_DOWNS_MAX)
    assert machine.running(state) == {MODEL: loadable("1.0.0").manifest}
    assert [bad.reason for bad in state.known_bad] == [reasons.DEVICE_DOWN]
    assert ("returned", reasons.ENGINE_CHANGED) in said(state)
    assert [order.candidate.target for order in of(s.Rejudge, effects)] == [loadable("1.0.0").target]


def test_on_a_device_that_goes_down_anyway_it_is_judged_no_more_and_keeps_its_place() -> None:
    state = working()
    for number in range(2, 2 + DOWNS_ORDINARY):
        state, _ = machine.resume(state, now(0, f"boot-{number}"))
    state, effects = run(state, s.WorkerReady(), probed())
    assert len(of(s.Rejudge, effects)) == 1
    for number in range(10, 10 + REJUDGE_DOWNS_MAX):
        state, effects = reboots(state, number)
    assert of(s.Rejudge, effects) == []
    assert state.known_bad == ()
    assert machine.running(state) == {MODEL: loadable("1.0.0").manifest}
    assert "judged no more" in state.owed[-1].detail
    assert len(of(s.Rejudge, run(state, probed("1.34.0"))[1])) == 1, "yet another engine is another question"


def test_ends_in_order_do_not_count_against_what_is_judged_again() -> None:
    state, _ = run(working(), probed())
    for number in range(2, 20):
        state, effects = reboots(state, number, ordered=True)
        assert len(of(s.Rejudge, effects)) == 1


# --- an engine that the worker misses and the probe finds ---


def test_a_worker_that_misses_what_the_probe_finds_is_believed_for_longer_and_longer() -> None:
    state, ms, waits = working(), 0, []
    for _ in range(5):
        state = replace(state, models={MODEL: replace(state.models[MODEL], faults=0)})  # as after another swap
        missing = served(state, "1.0.0", ok=False, reason=reasons.ENGINE_MISSING)
        state, _ = run(state, missing, ms=ms)
        assert "onnxruntime" not in state.engines.installed
        state, _ = run(state, probed(OLD), ms=ms)
        if "onnxruntime" in state.engines.installed:
            waits.append(0)
            continue
        waits.append(machine.next_deadline_ms(state, now(ms)))
        state, _ = run(state, probed(OLD), ms=ms + waits[-1] - 1)
        assert "onnxruntime" not in state.engines.installed
        ms += waits[-1]
        state, _ = run(state, s.Tick(), ms=ms)
        assert state.engines.installed == {"onnxruntime": OLD}
    assert waits == [0, 5_000, 10_000, 20_000, 40_000]


def test_another_version_of_a_missing_engine_is_tried_at_once_and_one_that_serves_is_forgiven() -> None:
    state = working()
    for _ in range(3):
        state, _ = run(state, served(state, "1.0.0", ok=False, reason=reasons.ENGINE_MISSING), probed(OLD))
    assert "onnxruntime" not in state.engines.installed
    state, _ = run(state, probed(NEW))
    assert state.engines.installed == {"onnxruntime": NEW}
    fine = working()
    fine, _ = run(fine, served(fine, "1.0.0", ok=False, reason=reasons.ENGINE_MISSING), probed(OLD))
    fine, _ = run(fine, served(fine, "1.0.0", engine_version=OLD))
    assert fine.engines.denied == {}


def test_a_candidate_whose_engine_the_worker_misses_is_tried_again_after_longer_and_longer_waits() -> None:
    state, ms, tried = working(), 0, []
    state, effects = run(state, offer(2, {MODEL: offered("1.1.0")}), ms=ms)
    while ms < 3_600_000:
        if of(s.Resolve, effects):
            tried.append(ms)
            state, _ = run(state, resolved("1.1.0"), fetched("1.1.0"), judged("1.1.0"), ms=ms)
            assert isinstance(state.models[MODEL].phase, s.Swapping)
            state, _ = run(state, served(state, "1.1.0", ok=False, reason=reasons.ENGINE_MISSING), ms=ms)
            state, _ = run(state, served(state, "1.0.0", engine_version=OLD), ms=ms)
            assert said(state)[-1] == ("returned", reasons.ENGINE_MISSING)
            state, effects = run(state, probed(OLD), ms=ms)
        else:
            ms += max(1, machine.next_deadline_ms(state, now(ms)))
            state, effects = run(state, s.Tick(), ms=ms)
    waits = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert waits[:5] == [0, 5_000, 10_000, 20_000, 40_000]
    assert machine.running(state) == {MODEL: loadable("1.0.0").manifest}
