"""A machine that goes down while a candidate is tried: counted over boots, held against it only where that is evidence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent.builders import (
    MODEL,
    candidates,
    confirmed,
    fetched,
    fresh,
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
from wherry_agent import journal, machine, turn
from wherry_agent import state as s
from wherry_shared import reasons
from wherry_shared.wire import Trial

BEFORE = "1.0.0"
TRIED = "1.1.0"
HOUR_MS = 3600_000


def updating(**terms: Any) -> s.State:
    return on_trial(TRIED, state=confirmed(BEFORE), serial=2, **terms)


def boots(state: s.State, number: int, *, ordered: bool = False) -> s.State:
    """End the machine, in order or not, and start it on what the journal holds; its worker serves again."""
    if ordered:
        state, effects = machine.step(state, s.Stopping(), now(HOUR_MS))
        assert effects == ()
    at = now(0, f"boot-{number}")
    state, _ = machine.resume(journal.decode(journal.encode(state)), at)
    for event in (s.WorkerReady(), *(served(state, version) for version in (BEFORE, TRIED))):
        state, _ = machine.step(state, event, at)
    return state


def last(state: s.State) -> tuple[str, str, str]:
    return state.owed[-1].state, state.owed[-1].reason, state.owed[-1].running


def running(state: s.State) -> str:
    return machine.running(state).get(MODEL, "")


def kind(state: s.State) -> type:
    return type(state.models[MODEL].phase)


def blamed(state: s.State) -> list[tuple[str, str]]:
    return [(bad.digest, bad.reason) for bad in state.known_bad]


def test_as_often_as_the_terms_allow_the_candidate_is_bad_and_the_incumbent_serves() -> None:
    state = updating()
    for number in (2, 3):
        state = boots(state, number)
        assert kind(state) is s.OnTrial
    state = boots(state, 4)
    assert running(state) == loadable(BEFORE).manifest
    assert last(state) == ("returned", reasons.DEVICE_DOWN, loadable(BEFORE).manifest)
    assert "went down 3 times" in state.owed[-1].detail
    assert blamed(state) == [(loadable(TRIED).digest, reasons.DEVICE_DOWN)]


def test_what_took_the_machine_down_is_not_tried_again_under_another_rollout() -> None:
    state = updating()
    for number in (2, 3, 4):
        state = boots(state, number)
    state, _ = run(state, offer(3, {MODEL: offered(TRIED, rollout="again")}), resolved(TRIED))
    assert last(state)[:2] == ("refused", reasons.KNOWN_BAD)


def test_the_first_version_of_a_device_leaves_it_without_any() -> None:
    state = on_trial(BEFORE)
    for number in (2, 3, 4):
        state = boots(state, number)
    assert running(state) == ""
    assert last(state) == ("returned", reasons.DEVICE_DOWN, "")


def test_the_agent_alone_counts_as_well_as_the_machine() -> None:
    state = updating()
    for _ in range(3):
        state, _ = machine.resume(state, now(1000))
    state, _ = run(state, s.WorkerReady(), served(state, BEFORE))
    assert last(state)[:2] == ("returned", reasons.DEVICE_DOWN)


def test_ends_in_order_count_for_nothing() -> None:
    state = updating()
    for number in range(2, 40):
        state = boots(state, number, ordered=True)
        assert kind(state) is s.OnTrial
    state = boots(boots(state, 40), 41)
    assert kind(state) is s.OnTrial
    assert blamed(state) == []


def test_a_trial_ends_all_the_same_when_each_boot_begins_its_time_anew() -> None:
    state = updating()
    for number in range(2, 2 + turn.RESTARTS_MAX):
        state = boots(state, number, ordered=True)
    assert last(state)[:2] == ("returned", reasons.RESTARTS)
    assert blamed(state) == []


def test_an_order_to_end_is_good_for_one_life() -> None:
    state = boots(updating(), 2, ordered=True)
    assert not state.stopped
    for number in (3, 4, 5):
        state = boots(state, number)
    assert last(state)[:2] == ("returned", reasons.DEVICE_DOWN)


def test_a_single_power_cut_is_held_against_nobody_whatever_the_terms_are() -> None:
    assert kind(boots(updating(), 2)) is s.OnTrial
    state = boots(updating(trial=Trial(min_requests=5, max_s=60, restarts_max=1)), 2)
    assert last(state)[:2] == ("returned", reasons.RESTARTS)
    assert blamed(state) == []


def test_power_cuts_while_nothing_is_tried_count_against_nobody() -> None:
    state = confirmed(BEFORE)
    for number in range(2, 9):
        state = boots(state, number)
    assert running(state) == loadable(BEFORE).manifest
    assert kind(on_trial(TRIED, state=state, serial=2)) is s.OnTrial


def test_a_device_that_goes_down_anyway_blames_nobody() -> None:
    state = confirmed(BEFORE)
    for number in range(2, 2 + turn.DOWNS_ORDINARY):
        state = boots(state, number)
    state = on_trial(TRIED, state=state, serial=2)
    for number in (12, 13, 14):
        state = boots(state, number)
    assert last(state)[:2] == ("returned", reasons.RESTARTS)
    assert "before without anything being tried" in state.owed[-1].detail
    assert blamed(state) == []


def test_a_day_without_a_power_cut_makes_a_device_steady() -> None:
    state = confirmed(BEFORE)
    for number in range(2, 2 + turn.DOWNS_ORDINARY):
        state = boots(state, number)
    at = now(turn.STEADY_MS, f"boot-{1 + turn.DOWNS_ORDINARY}")
    assert machine.next_deadline_ms(state, at) == 0
    steady, _ = machine.step(state, s.Tick(), at)
    assert steady.downs is None
    assert not machine.may_wait(state, steady)


def test_a_canary_that_takes_the_machine_down_makes_way_for_the_next_variant() -> None:
    state, _ = run(confirmed(BEFORE), offer(2, {MODEL: offered(TRIED)}))
    state, _ = run(state, resolved(TRIED, "int8", "float"), fetched(TRIED, "int8"))
    assert kind(state) is s.Judging
    for number in (2, 3):
        state, effects = machine.resume(state, now(0, f"boot-{number}"))
        assert any(isinstance(effect, s.Judge) for effect in effects)
    state, effects = machine.resume(state, now(0, "boot-4"))
    (fetch,) = [effect for effect in effects if isinstance(effect, s.Fetch)]
    assert fetch.variant == "float"
    (int8, _) = candidates(TRIED, "int8", "float")
    assert blamed(state) == [(int8.loadable.digest, reasons.DEVICE_DOWN)]
    state, _ = run(state, fetched(TRIED, "float"))
    state, effects = machine.resume(state, now(0, "boot-5"))
    assert any(isinstance(effect, s.Judge) for effect in effects), "the next one begins without a count"


def test_a_canary_that_takes_the_machine_down_is_not_tried_for_ever() -> None:
    state, _ = run(fresh(), offer(1, {MODEL: offered()}), resolved(), fetched())
    for number in range(2, 7):
        state, _ = machine.resume(state, now(0, f"boot-{number}"))
    assert kind(state) is s.Idle
    assert last(state)[:2] == ("failed", reasons.DEVICE_DOWN)


def test_where_two_were_tried_nobody_knows_which_it_was() -> None:
    state = updating()
    both = {MODEL: offered(TRIED), "other": offered(model="other")}
    state, _ = run(state, offer(3, both), resolved(model="other"), fetched(model="other"))
    assert type(state.models["other"].phase) is s.Judging
    for number in (2, 3, 4):
        state, _ = machine.resume(state, now(0, f"boot-{number}"))
    assert blamed(state) == []
    said = {one.model: (one.state, one.reason) for one in state.owed}
    assert said["other"] == ("failed", reasons.RESTARTS)
    state, _ = machine.step(state, s.WorkerReady(), now(0, "boot-4"))
    state, _ = machine.step(state, served(state, BEFORE), now(0, "boot-4"))
    assert last(state)[:2] == ("returned", reasons.RESTARTS)


@pytest.mark.parametrize("mode", ["shadow", "split", "blue_green"])
def test_what_runs_beside_the_incumbent_counts_too(mode: str) -> None:
    state = confirmed(BEFORE)
    state, _ = run(state, offer(2, {MODEL: offered(TRIED, mode=mode)}))  # type: ignore[arg-type]
    state, _ = run(state, resolved(TRIED), fetched(TRIED), judged(TRIED))
    state, _ = run(state, served(state, TRIED))
    for number in (2, 3, 4):
        state, _ = machine.resume(state, now(0, f"boot-{number}"))
    state, _ = machine.step(state, s.WorkerReady(), now(0, "boot-4"))
    state, _ = machine.step(state, served(state, BEFORE), now(0, "boot-4"))
    assert last(state) == ("returned", reasons.DEVICE_DOWN, loadable(BEFORE).manifest)


# --- what is trusted ---


def renewed(state: s.State | None = None) -> s.State:
    """The newer of two versions was confirmed just now."""
    return confirmed(TRIED, state=state if state is not None else confirmed(BEFORE), serial=2)


def test_a_confirmed_version_under_which_the_machine_goes_down_again_and_again_gives_way() -> None:
    state = renewed()
    for number in range(turn.FALLS_MAX - 1):
        state = boots(state, 2 + number)
        assert running(state) == loadable(TRIED).manifest
    state = boots(state, 9)
    assert last(state) == ("returned", reasons.DEVICE_DOWN, loadable(BEFORE).manifest)
    assert blamed(state) == [(loadable(TRIED).digest, reasons.DEVICE_DOWN)]
    for number in range(10, 40):
        state = boots(state, number)
        assert running(state) == loadable(BEFORE).manifest, "it was not that one, or nothing is left to go back to"


def test_ends_in_order_take_no_versions_place() -> None:
    state = renewed()
    for number in range(2, 40):
        state = boots(state, number, ordered=True)
    assert running(state) == loadable(TRIED).manifest


def test_a_life_that_lasts_ends_the_row_and_a_day_of_it_acquits() -> None:
    state = renewed()
    for number in range(2, 1 + turn.FALLS_MAX):
        state = boots(state, number)
    at = f"boot-{turn.FALLS_MAX}"
    assert machine.next_deadline_ms(state, now(0, at)) <= turn.FALL_MS
    state, _ = machine.step(state, s.Tick(), now(turn.FALL_MS, at))
    for number in range(20, 20 + turn.FALLS_MAX):
        state = boots(state, number)
        assert running(state) == loadable(TRIED).manifest
    state, _ = machine.step(state, s.Tick(), now(turn.STEADY_MS, f"boot-{19 + turn.FALLS_MAX}"))
    assert state.falls is None
    for number in range(40, 60):
        state = boots(state, number)
    assert running(state) == loadable(TRIED).manifest


def test_a_device_that_went_down_before_blames_nothing_that_it_trusts() -> None:
    state = confirmed(BEFORE)
    for number in range(2, 2 + turn.DOWNS_ORDINARY):
        state = boots(state, number)
    state = renewed(state)
    for number in range(10, 40):
        state = boots(state, number)
    assert running(state) == loadable(TRIED).manifest
    assert blamed(state) == []


def test_the_only_version_of_a_device_stays_whatever_happens() -> None:
    state = confirmed(BEFORE)
    for number in range(2, 30):
        state = boots(state, number)
    assert running(state) == loadable(BEFORE).manifest
