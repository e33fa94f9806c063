"""Models that belong together: all of a group come, or none, through everything that may happen to one of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent.builders import (
    MODEL,
    confirmed,
    digest_of,
    fetched,
    fresh,
    golden,
    judged,
    last_serve,
    loadable,
    measured,
    now,
    offer,
    offered,
    resolved,
    run,
    served,
)
from wherry_agent import journal, machine, status, turn
from wherry_agent import state as s
from wherry_shared import reasons
from wherry_shared.wire import Trial

OTHER = "pitch"
PAIR = (MODEL, OTHER)
NEW, OLD = "1.1.0", "1.0.0"
TERMS = Trial(min_requests=5, max_s=60)


def kinds(effects: list[s.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def told(state: s.State, since: int = 1) -> list[tuple[str, str, str]]:
    return [(report.model, report.state, report.reason) for report in state.owed if report.seq >= since]


def phases(state: s.State) -> list[str]:
    return [type(state.models[name].phase).__name__ for name in PAIR]


def pair(serial: int = 3, version: str = NEW, **more: Any) -> s.Offered:
    terms = {"trial": TERMS, "group": "sight", **more}
    return offer(serial, {name: offered(version, model=name, **terms) for name in PAIR})


def before() -> s.State:
    """1.0.0 of both, confirmed one by one."""
    state = confirmed(OLD)
    state, _ = run(state, offer(2, {name: offered(OLD, model=name, trial=TERMS) for name in PAIR}))
    state, _ = run(state, resolved(OLD, model=OTHER), fetched(OLD, model=OTHER), judged(OLD, model=OTHER))
    state, _ = run(state, served(state, OLD, model=OTHER))
    state, _ = run(state, measured(state, OLD, model=OTHER, requests=9))
    state, _ = run(state, served(state, OLD), served(state, OLD, model=OTHER))
    assert phases(state) == ["Idle", "Idle"]
    return state


def ready(state: s.State, name: str, **verdict: Any) -> tuple[s.State, list[s.Effect]]:
    return run(state, resolved(NEW, model=name), fetched(NEW, model=name), judged(NEW, model=name, **verdict))


def half() -> s.State:
    """One is ready and waits, the other is being resolved."""
    state, _ = run(before(), pair())
    state, _ = ready(state, MODEL)
    return state


def on_trial() -> s.State:
    state, _ = ready(half(), OTHER)
    for name in PAIR:
        state, _ = run(state, served(state, NEW, model=name))
    assert phases(state) == ["OnTrial", "OnTrial"]
    return state


def back(state: s.State) -> s.State:
    for name in PAIR:
        state, _ = run(state, served(state, OLD, model=name))
    return state


# --- before the trial ----------------------------------------------------------------------------


def test_who_is_ready_waits_for_the_others_and_all_are_swapped_by_one_command() -> None:
    state = half()
    assert phases(state) == ["Queued", "Resolving"]
    state, effects = ready(state, OTHER)
    assert phases(state) == ["Swapping", "Swapping"]
    (serve,) = [effect for effect in effects if isinstance(effect, s.Serve)]
    assert [(model.name, model.active.target, model.group) for model in serve.models] == [
        (name, f"{name}/{NEW}", "sight") for name in PAIR
    ]


def test_a_group_may_be_named_by_the_offer_alone() -> None:
    models = {name: offered(NEW, model=name, trial=TERMS) for name in PAIR}
    state, _ = run(before(), offer(3, models, groups={"sight": list(PAIR)}))
    state, _ = ready(state, MODEL)
    assert phases(state) == ["Queued", "Resolving"]


def test_a_model_outside_does_not_wait_for_a_group_that_is_not_complete() -> None:
    models = {name: offered(NEW, model=name, trial=TERMS, group="sight") for name in PAIR}
    state, _ = run(before(), offer(3, {**models, "sound": offered(model="sound")}))
    state, _ = ready(state, MODEL)
    state, _ = run(state, resolved(model="sound"), fetched(model="sound"), judged(model="sound"))
    assert isinstance(state.models["sound"].phase, s.Swapping)
    assert phases(state) == ["Queued", "Resolving"]


def test_one_that_runs_already_is_ready() -> None:
    mine, theirs = (offered(OLD, model=MODEL, group="sight"), offered(NEW, model=OTHER, group="sight"))
    state, _ = run(before(), offer(3, {MODEL: mine, OTHER: theirs}))
    state, effects = ready(state, OTHER)
    assert [(model.name, model.trial != "") for model in last_serve(effects).models] == [(MODEL, False), (OTHER, True)]
    state, _ = run(state, served(state, NEW, model=OTHER))
    state, _ = run(state, measured(state, NEW, model=OTHER, requests=9), golden(state, NEW, model=OTHER))
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/{OLD}"), OTHER: digest_of(f"{OTHER}/{NEW}")}


def test_a_group_with_a_removal_is_refused_whole_since_a_removal_cannot_be_taken_back() -> None:
    start = before()
    models = {
        MODEL: offered(NEW, model=MODEL, trial=TERMS, group="sight"),
        OTHER: offered(mode="none", group="sight"),
    }
    state, effects = run(start, offer(3, models))
    assert told(state, start.seq) == [(name, "refused", reasons.UNSUPPORTED) for name in PAIR]
    assert "is to be removed" in state.owed[-1].detail
    assert kinds(effects) == ["SendReports"]
    assert machine.serving(state) == machine.serving(start), "both serve on"
    again, effects = run(state, offer(4, models))
    assert (again.seq, effects) == (state.seq, []), "it is said once"
    alone, _ = run(state, offer(5, {MODEL: offered(OLD), OTHER: offered(mode="none", rollout="r2")}))
    assert set(machine.running(alone)) == {MODEL}, "without the group it is removed"


def test_a_removal_that_joins_a_group_on_its_way_ends_it_for_all() -> None:
    state = half()
    mine, gone = offered(NEW, model=MODEL, trial=TERMS, group="sight"), offered(mode="none", group="sight")
    state, _ = run(state, offer(4, {MODEL: mine, OTHER: gone}))
    assert phases(state) == ["Idle", "Idle"]
    assert machine.running(state) == {name: digest_of(f"{name}/{OLD}") for name in PAIR}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (judged(NEW, model=OTHER, passed=False, reason=reasons.GOLDEN_MISS), reasons.GOLDEN_MISS),
        (judged(NEW, model=OTHER, passed=False, reason=reasons.OVER_MEMORY), reasons.OVER_MEMORY),
    ],
    ids=["golden", "memory"],
)
def test_one_that_fails_its_canary_ends_it_for_all(event: s.Event, reason: str) -> None:
    state, _ = run(half(), resolved(NEW, model=OTHER), fetched(NEW, model=OTHER))
    since = state.seq
    state, effects = run(state, event)
    assert told(state, since) == [(OTHER, "failed", reason), (MODEL, "failed", reasons.GROUP)]
    assert OTHER in state.owed[-1].detail
    assert phases(state) == ["Idle", "Idle"]
    assert [bad.digest for bad in state.known_bad] == [loadable(NEW, model=OTHER).digest]
    assert "Serve" not in kinds(effects)
    again, effects = run(state, pair(4))
    assert told(again, state.seq) == []
    assert "Resolve" not in kinds(effects)


def test_one_that_is_refused_cancels_what_the_others_do() -> None:
    state, _ = run(before(), pair())
    state, _ = run(state, resolved(NEW, model=MODEL))
    failed = s.TaskFailed(OTHER, digest_of(f"{OTHER}/{NEW}"), 1, "resolve", reasons.CONTRACT_BROKEN, "", None)
    since = state.seq
    state, effects = run(state, failed)
    assert told(state, since) == [(OTHER, "refused", reasons.CONTRACT_BROKEN), (MODEL, "failed", reasons.GROUP)]
    assert s.Cancel(MODEL) in effects


def test_a_group_that_is_not_whole_in_the_offer_is_refused() -> None:
    state = before()
    since = state.seq
    alone = {MODEL: offered(NEW, group="sight")}
    state, _ = run(state, offer(3, alone, groups={"sight": list(PAIR)}), s.Tick())
    assert told(state, since) == [(MODEL, "refused", reasons.UNSUPPORTED)]
    assert OTHER in state.owed[-1].detail


def test_a_group_of_which_one_would_be_a_shadow_is_refused() -> None:
    state = before()
    since = state.seq
    models = {MODEL: offered(NEW, group="sight"), OTHER: offered(NEW, model=OTHER, group="sight", mode="shadow")}
    state, _ = run(state, offer(3, models))
    assert {(kind, reason) for _, kind, reason in told(state, since)} == {("refused", reasons.UNSUPPORTED)}


def test_a_model_in_two_groups_is_refused_with_both() -> None:
    state = before()
    since = state.seq
    models = {name: offered(NEW, model=name) for name in (*PAIR, "sound")}
    groups = {"sight": list(PAIR), "hearing": [OTHER, "sound"]}
    state, _ = run(state, offer(3, models, groups=groups))
    assert {(kind, reason) for _, kind, reason in told(state, since)} == {("refused", reasons.UNSUPPORTED)}


def test_who_waits_for_one_in_trouble_gives_up_after_a_day() -> None:
    state = half()
    failed = s.TaskFailed(OTHER, digest_of(f"{OTHER}/{NEW}"), 1, "resolve", reasons.NETWORK, "down", 3600.0)
    state, _ = run(state, failed)
    since = state.seq
    waiting, _ = run(state, s.Tick(), ms=turn.GROUP_WAIT_MS - 1)
    assert phases(waiting)[0] == "Queued"
    assert machine.limit_ms(state.models[MODEL].phase) == turn.GROUP_WAIT_MS
    state, _ = run(state, s.Tick(), ms=turn.GROUP_WAIT_MS)
    assert [(kind, reason) for name, kind, reason in told(state, since) if name == MODEL] == [("failed", reasons.GROUP)]
    assert [(kind, reason) for name, kind, reason in told(state, since) if name == OTHER] == [("failed", reasons.GROUP)]


def test_a_newer_offer_without_the_group_lets_the_one_that_waits_go_on_alone() -> None:
    state, effects = run(half(), offer(4, {MODEL: offered(NEW, trial=TERMS)}))
    assert isinstance(state.models[MODEL].phase, s.Swapping)
    assert last_serve(effects).models[0].group == ""


# --- the trial -----------------------------------------------------------------------------------


def test_who_is_done_first_waits_and_all_are_confirmed_in_one_step() -> None:
    state = on_trial()
    state, _ = run(state, measured(state, NEW, requests=9), golden(state, NEW))
    assert phases(state) == ["OnTrial", "OnTrial"]
    assert machine.limit_ms(state.models[MODEL].phase) is None
    assert journal.decode(journal.encode(state)) == state
    since = state.seq
    state, _ = run(state, s.Tick(), ms=60_000)
    assert phases(state) == ["OnTrial", "Proving"]
    state, effects = run(state, golden(state, NEW, model=OTHER), ms=60_000)
    assert set(told(state, since)) == {(MODEL, "confirmed", ""), (OTHER, "confirmed_idle", "")}
    assert {report.group for report in state.owed[-2:]} == {"sight"}
    assert kinds(effects).count("Serve") == 1
    assert machine.running(state) == {name: digest_of(f"{name}/{NEW}") for name in PAIR}


def test_who_is_done_first_is_still_watched() -> None:
    state = on_trial()
    state, _ = run(state, measured(state, NEW, requests=9), golden(state, NEW))
    state, effects = run(state, measured(state, NEW, requests=90, errors=60))
    assert phases(state) == ["Returning", "Returning"]
    assert kinds(effects).count("Serve") == 1


@pytest.mark.parametrize(
    "event",
    [
        lambda state: measured(state, NEW, model=OTHER, requests=9, errors=9),
        lambda state: s.Condemned(OTHER, loadable(NEW, model=OTHER).digest, _trial(state), reasons.APPLICATION, ""),
        lambda state: served(state, NEW, model=OTHER, ok=False, reason=reasons.LOAD_FAILED),
    ],
    ids=["failures", "application", "load"],
)
def test_one_that_fails_takes_the_others_back_in_the_same_command(event: Any) -> None:
    state = on_trial()
    since = state.seq
    state, effects = run(state, event(state))
    (serve,) = [effect for effect in effects if isinstance(effect, s.Serve)]
    assert [(model.active.target, model.trial, model.group) for model in serve.models] == [
        (f"{name}/{OLD}", "", "sight") for name in PAIR
    ]
    state = back(state)
    found = {name: (kind, reason) for name, kind, reason in told(state, since)}
    assert found[MODEL] == ("returned", reasons.GROUP)
    assert found[OTHER][0] == "returned"
    assert found[OTHER][1] in reasons.VERDICTS
    assert [bad.digest for bad in state.known_bad] == [loadable(NEW, model=OTHER).digest]


def _trial(state: s.State) -> str:
    phase = state.models[OTHER].phase
    assert isinstance(phase, s.OnTrial)
    return phase.trial


def test_who_could_not_be_served_because_of_another_waits_for_its_word() -> None:
    state, _ = ready(half(), OTHER)
    state, _ = run(state, served(state, NEW, ok=False, reason=reasons.GROUP))
    assert phases(state) == ["Swapping", "Swapping"]
    state, _ = run(state, served(state, NEW, model=OTHER, ok=False, reason=reasons.LOAD_FAILED))
    assert phases(state) == ["Returning", "Returning"]
    assert [bad.reason for bad in state.known_bad] == [reasons.LOAD_FAILED]


def test_a_crash_is_reported_by_all_and_held_against_none() -> None:
    state = on_trial()
    since = state.seq
    state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady())
    state = back(state)
    assert told(state, since) == [(name, "returned", reasons.CRASH) for name in PAIR]
    assert state.known_bad == (), "nobody knows whose crash it was"
    state, _ = run(state, pair(4))
    assert phases(state) == ["Idle", "Idle"], "the attempt is over all the same"


def test_an_offer_that_takes_all_back_is_a_withdrawal_of_each() -> None:
    state = on_trial()
    since = state.seq
    state, _ = run(state, pair(4, OLD))
    state = back(state)
    returned = [entry for entry in told(state, since) if entry[1] == "returned"]
    assert returned == [(name, "returned", reasons.WITHDRAWN) for name in PAIR]


def test_an_offer_that_takes_one_back_takes_all_back_and_tries_the_rest_anew() -> None:
    state = on_trial()
    models = {MODEL: offered(OLD, group="sight"), OTHER: offered(NEW, model=OTHER, trial=TERMS, group="sight")}
    since = state.seq
    state, _ = run(state, offer(4, models))
    assert phases(state) == ["Returning", "Returning"]
    state = back(state)
    assert (OTHER, "returned", reasons.GROUP) in told(state, since)
    assert phases(state) == ["Idle", "Resolving"]


def test_a_first_installation_that_fails_leaves_nothing_of_the_group() -> None:
    state, _ = run(fresh(), pair(1))
    for name in PAIR:
        state, _ = ready(state, name)
    for name in PAIR:
        state, _ = run(state, served(state, NEW, model=name))
    state, effects = run(state, measured(state, NEW, requests=9, errors=9))
    assert last_serve(effects).models == ()
    assert machine.running(state) == {}


# --- restarts and returns ------------------------------------------------------------------------


def test_a_power_cut_in_the_trial_keeps_the_group_whole() -> None:
    state = on_trial()
    state, _ = run(state, measured(state, NEW, requests=9), golden(state, NEW))
    for number in range(3):
        boot = now(0, f"boot-{number + 2}")
        state, _ = machine.resume(state, boot)
        assert phases(state) in (["Swapping", "Swapping"], ["Returning", "Returning"])
        for name in PAIR:
            state, _ = machine.step(state, served(state, NEW, model=name), boot)
    assert phases(state) == ["Returning", "Returning"]
    state = back(state)
    assert told(state)[-2:] == [(MODEL, "returned", reasons.RESTARTS), (OTHER, "returned", reasons.GROUP)]


def test_one_whose_incumbent_does_not_come_back_does_not_keep_the_others_from_it() -> None:
    state = on_trial()
    state, _ = run(state, measured(state, NEW, requests=9, errors=9))
    state, effects = run(state, served(state, OLD, ok=False, reason=reasons.GROUP))
    assert "RestartWorker" not in kinds(effects), "it is told again, alone"
    assert [model.group for model in machine.serving(state)] == ["", "sight"]
    state, _ = run(state, served(state, OLD))
    assert phases(state) == ["Idle", "Returning"]
    state, effects = run(state, served(state, OLD, model=OTHER, ok=False, reason=reasons.LOAD_FAILED))
    assert "RestartWorker" in kinds(effects)
    assert [model.group for model in machine.serving(state)] == ["", ""]


def whole() -> s.State:
    """1.1.0 of both, confirmed together."""
    state = on_trial()
    for name in PAIR:
        state, _ = run(state, measured(state, NEW, model=name, requests=9), golden(state, NEW, model=name))
    for name in PAIR:
        state, _ = run(state, served(state, NEW, model=name))
    assert machine.running(state) == {name: digest_of(f"{name}/{NEW}") for name in PAIR}
    return state


def test_a_confirmed_one_that_crashes_in_a_loop_takes_its_generation_back() -> None:
    state = whole()
    since = state.seq
    for _ in range(turn.CRASHES_MAX + 1):
        state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady())
    assert machine.running(state) == {name: digest_of(f"{name}/{OLD}") for name in PAIR}
    found = {name: (kind, reason) for name, kind, reason in told(state, since)}
    assert sorted(found.values()) == [("returned", reasons.CRASH), ("returned", reasons.GROUP)]
    assert state.known_bad == (), "nobody knows whose crash it was"
    assert phases(state) == ["Idle", "Idle"], "the attempt is over for both"


def test_a_confirmed_one_whose_file_was_altered_brings_the_group_again_as_a_whole() -> None:
    state, _ = run(whole(), served(whole(), NEW, ok=False, reason=reasons.DIGEST_MISMATCH))
    assert machine.running(state) == {name: digest_of(f"{name}/{OLD}") for name in PAIR}
    assert phases(state) == ["Resolving", "Resolving"]
    assert state.known_bad == ()


def test_one_that_was_there_before_its_group_does_not_step_back_with_it() -> None:
    mine, theirs = (offered(OLD, model=MODEL, group="sight"), offered(NEW, model=OTHER, group="sight", trial=TERMS))
    state, _ = run(before(), offer(3, {MODEL: mine, OTHER: theirs}))
    state, _ = ready(state, OTHER)
    state, _ = run(state, served(state, NEW, model=OTHER))
    state, _ = run(state, measured(state, NEW, model=OTHER, requests=9), golden(state, NEW, model=OTHER))
    state, _ = run(state, served(state, NEW, model=OTHER, ok=False, reason=reasons.DIGEST_MISMATCH))
    assert machine.running(state) == {name: digest_of(f"{name}/{OLD}") for name in PAIR}
    assert phases(state) == ["Idle", "Resolving"]


def test_the_status_says_of_which_group_a_model_waits() -> None:
    shown = status.describe(half(), now())
    said = status.render({"running": False, **shown})
    assert f"{MODEL}: waiting for its trial" in said
    assert "group     sight, all or none" in said


# --- how long a worker may take for them ---------------------------------------------------------


def test_a_group_gets_the_time_of_all_its_members_to_swap_and_to_go_back() -> None:
    state, _ = ready(half(), OTHER)
    state, effects = run(state, s.Tick(), ms=2 * turn.SWAP_MS - 1)
    assert phases(state) == ["Swapping", "Swapping"]
    assert "RestartWorker" not in kinds(effects)
    for name in PAIR:
        state, _ = run(state, served(state, NEW, model=name), ms=2 * turn.SWAP_MS - 1)
    assert phases(state) == ["OnTrial", "OnTrial"]
    ms = 3 * turn.SWAP_MS
    state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady(), ms=ms)
    assert phases(state) == ["Returning", "Returning"]
    state, effects = run(state, s.Tick(), ms=ms + 2 * turn.RETURN_MS - 1)
    assert "RestartWorker" not in kinds(effects)
    state, effects = run(state, s.Tick(), ms=ms + 2 * turn.RETURN_MS)
    assert "RestartWorker" in kinds(effects)


def test_each_answer_of_the_worker_begins_the_wait_for_the_next_model() -> None:
    state, _ = run(before(), s.WorkerDied("signal 11"), s.WorkerReady())
    late = turn.SERVE_MS - 1
    state, _ = run(state, served(state, OLD), ms=late)
    state, effects = run(state, s.Tick(), ms=late + turn.SERVE_MS - 1)
    assert "RestartWorker" not in kinds(effects)
    _, effects = run(state, s.Tick(), ms=late + turn.SERVE_MS)
    assert "RestartWorker" in kinds(effects)


def test_a_swap_waits_while_a_new_worker_loads_what_comes_before_it() -> None:
    state, _ = run(before(), offer(3, {MODEL: offered(OLD), OTHER: offered(NEW, model=OTHER, trial=TERMS)}))
    state, _ = ready(state, OTHER)
    state, _ = run(state, s.WorkerDied("ended", ordered=True), s.WorkerReady())
    state, _ = run(state, served(state, OLD), ms=turn.SWAP_MS - 1)
    state, _ = run(state, s.Tick(), ms=2 * turn.SWAP_MS - 2)
    assert phases(state) == ["Idle", "Swapping"]
    state, _ = run(state, s.Tick(), ms=2 * turn.SWAP_MS - 1)
    assert phases(state) == ["Idle", "Returning"]
