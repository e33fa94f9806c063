"""A candidate beside the incumbent: shadows, splits and blue-green, in sentences, with the exact effects and reports."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent.builders import (
    MODEL,
    arm,
    confirmed,
    digest_of,
    fetched,
    fresh,
    golden,
    judged,
    last_serve,
    latencies,
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
from wherry_agent import journal, machine, status, turn
from wherry_agent import state as s
from wherry_shared import reasons
from wherry_shared.wire import Trial

NEW, OLD = "1.1.0", "1.0.0"
TERMS = Trial(min_requests=5, max_s=60, agreement_min=0.9)
SHADOW: dict[str, Any] = {"mode": "shadow", "share": 0.5}
SPLIT: dict[str, Any] = {"mode": "split", "share": 0.1}
STANDBY: dict[str, Any] = {"mode": "blue_green", "share": 0.0}
TAKE_OVER: dict[str, Any] = {"mode": "blue_green", "share": 1.0}
BESIDE = pytest.mark.parametrize("way", [SHADOW, SPLIT, STANDBY], ids=["shadow", "split", "standby"])


def kinds(effects: list[s.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def told(state: s.State, since: int = 1) -> list[tuple[str, str]]:
    return [(report.state, report.reason) for report in state.owed if report.seq >= since]


def phase(state: s.State) -> Any:
    return state.models[MODEL].phase


def trying(way: dict[str, Any], **terms: Any) -> s.State:
    """1.0.0 confirmed, 1.1.0 beside it."""
    return on_trial(NEW, state=confirmed(OLD), serial=2, trial=TERMS, **way, **terms)


def again(state: s.State, way: dict[str, Any], version: str = NEW, **terms: Any) -> tuple[s.State, list[s.Effect]]:
    assert state.offer is not None
    return run(state, offer(state.offer.serial + 1, {MODEL: offered(version, trial=TERMS, **way, **terms)}))


# --- how it begins -------------------------------------------------------------------------------


@BESIDE
def test_the_worker_is_told_how_the_candidate_is_tried(way: dict[str, Any]) -> None:
    state, effects = run(
        confirmed(OLD),
        offer(2, {MODEL: offered(NEW, trial=TERMS, rollout="r7", **way)}),
        resolved(NEW),
        fetched(NEW),
        judged(NEW),
    )
    (model,) = last_serve(effects).models
    assert (model.active.target, model.mode, model.share) == (f"{MODEL}/{NEW}", way["mode"], way["share"])
    assert model.incumbent == loadable(OLD)
    assert (model.salt, model.shadow_cpu_share_max) == ("r7", TERMS.shadow_cpu_share_max)
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/{OLD}")}


def test_without_a_rollout_the_trial_is_the_salt() -> None:
    state = trying(SPLIT, rollout="")
    assert machine.serving(state)[0].salt == trial_of(state)


@BESIDE
def test_a_device_with_nothing_to_answer_beside_it_says_so(way: dict[str, Any]) -> None:
    state, effects = again(run(fresh(), offer(1, {}))[0], way)
    assert kinds(effects) == ["SendReports"]
    assert told(state) == [("refused", reasons.UNSUPPORTED)]
    assert "there is none" in state.owed[-1].detail
    state, effects = again(state, {"mode": "replace"})
    assert "Resolve" in kinds(effects), "another way to bring the bundle is another attempt"


@pytest.mark.parametrize(
    "way",
    [{"mode": "replace", "share": 0.5}, {"mode": "blue_green", "share": 0.5}, {"mode": "shadow", "share": 1.5}],
    ids=lambda way: f"{way['mode']} {way['share']}",
)
def test_a_share_that_means_nothing_is_refused(way: dict[str, Any]) -> None:
    before = confirmed(OLD)
    state, _ = again(before, way)
    assert told(state, before.seq) == [("refused", reasons.UNSUPPORTED)]


@BESIDE
def test_a_worker_without_room_for_both_goes_back_without_blame(way: dict[str, Any]) -> None:
    state = trying(way)
    state, _ = run(state, s.WorkerDied("ordered", ordered=True), s.WorkerReady())
    state, _ = run(state, served(state, NEW, incumbent_loaded=False))
    state, _ = run(state, served(state, OLD))
    assert told(state)[-1] == ("returned", reasons.MEMORY_SHORT)
    assert state.known_bad == ()


def test_a_candidate_that_replaces_needs_no_room_for_both() -> None:
    state = trying({})
    state, _ = run(state, served(state, NEW, incumbent_loaded=False))
    assert isinstance(phase(state), s.OnTrial)


# --- evidence ------------------------------------------------------------------------------------


@BESIDE
def test_however_well_it_does_it_is_not_confirmed(way: dict[str, Any]) -> None:
    before = trying(way)
    same = arm(OLD, arm="incumbent", requests=60, latency_us=latencies(4, 1000, 60))
    counts = {"requests": 60, "compared": 60, "agreed": 60, "latency_us": latencies(4, 1000, 60)}
    state, effects = run(before, measured(before, NEW, baseline=same, **counts))
    assert (kinds(effects), told(state, before.seq)) == ([], [])
    assert phase(state).counts.requests == 60
    assert machine.may_wait(before, state)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"requests": 20, "errors": 5}, reasons.HEALTH_ERRORS),
        ({"requests": 20, "compared": 10, "agreed": 8}, reasons.HEALTH_AGREEMENT),
        ({"requests": 60, "latency_us": latencies(4, 2500, 60)}, reasons.HEALTH_LATENCY),
    ],
    ids=["failures", "disagreement", "latency"],
)
def test_a_shadow_that_does_badly_goes_back_and_is_remembered(counts: dict[str, Any], reason: str) -> None:
    state = trying(SHADOW)
    same = arm(OLD, arm="incumbent", requests=60, latency_us=latencies(4, 1000, 60))
    state, effects = run(state, measured(state, NEW, baseline=same, **counts))
    assert isinstance(phase(state), s.Returning)
    assert last_serve(effects).models[0].trial == ""
    state, _ = run(state, served(state, OLD))
    assert told(state)[-1] == ("returned", reason)
    assert [bad.reason for bad in state.known_bad] == [reason]


def test_few_comparisons_say_nothing_of_agreement() -> None:
    state = trying(SHADOW)
    state, _ = run(state, measured(state, NEW, requests=4, compared=4, agreed=0))
    assert isinstance(phase(state), s.OnTrial)


@BESIDE
def test_a_crash_of_the_worker_counts_against_it(way: dict[str, Any]) -> None:
    state, _ = run(trying(way), s.WorkerDied("signal 11"))
    state, _ = run(state, s.WorkerReady(), served(state, OLD))
    assert told(state)[-1] == ("returned", reasons.CRASH)
    assert [bad.digest for bad in state.known_bad] == [loadable(NEW).digest]


# --- how it ends ---------------------------------------------------------------------------------


@BESIDE
def test_when_its_time_is_over_the_incumbent_goes_on_alone_and_the_files_stay(way: dict[str, Any]) -> None:
    before = trying(way)
    before, _ = run(before, measured(before, NEW, requests=30, compared=20, agreed=19, skipped=7))
    state, effects = run(before, s.Tick(), ms=59_999)
    assert isinstance(phase(state), s.OnTrial)
    state, effects = run(before, s.Tick(), ms=60_000)
    assert isinstance(phase(state), s.Compared)
    assert kinds(effects) == ["Serve", "SendReports"]
    (model,) = last_serve(effects).models
    assert (model.active, model.trial, model.incumbent) == (loadable(OLD), "", None)
    assert loadable(NEW).digest in {item.digest for item in machine.kept(state)}
    report = state.owed[-1]
    assert (report.state, report.trial_end, report.mode, report.share) == (
        "compared",
        "time",
        way["mode"],
        way["share"],
    )
    assert (report.requests, report.compared, report.agreed, report.skipped) == (30, 20, 19, 7)
    assert report.running == report.incumbent == loadable(OLD).manifest
    assert journal.decode(journal.encode(state)) == state
    state, _ = run(state, served(state, OLD))
    later, effects = run(state, s.Tick(), s.Connected(), ms=10**9)
    assert later.models == state.models
    assert machine.resume(state, now(0, "boot-2"))[0].models == state.models


@BESIDE
def test_the_same_offer_again_does_not_compare_again(way: dict[str, Any]) -> None:
    compared, _ = run(trying(way), s.Tick(), ms=60_000)
    state, effects = again(compared, way)
    assert (kinds(effects), told(state, compared.seq)) == ([], [])


@BESIDE
def test_an_offer_that_names_the_incumbent_withdraws_it(way: dict[str, Any]) -> None:
    before = trying(way)
    state, _ = again(before, {}, OLD)
    state, _ = run(state, served(state, OLD))
    assert told(state, before.seq) == [("returned", reasons.WITHDRAWN), ("confirmed", "")]
    assert state.known_bad == ()


@BESIDE
def test_an_offer_of_something_else_does_not_wait_for_a_verdict_that_never_comes(way: dict[str, Any]) -> None:
    state, _ = again(trying(way), {}, "1.2.0")
    state, _ = run(state, served(state, OLD))
    assert told(state)[-2:] == [("returned", reasons.SUPERSEDED), ("fetching", "")]
    assert phase(state).job.offered.target == f"{MODEL}/1.2.0"


@BESIDE
def test_removal_ends_it_and_removes_the_model(way: dict[str, Any]) -> None:
    state, _ = run(trying(way), offer(3, {MODEL: offered(mode="none")}))
    state, _ = run(state, served(state, OLD))
    assert told(state)[-1] == ("removed", "")


# --- promotion -----------------------------------------------------------------------------------


@BESIDE
def test_a_promotion_is_a_fresh_trial_without_a_download_or_a_canary(way: dict[str, Any]) -> None:
    before = trying(way)
    before, _ = run(before, measured(before, NEW, requests=30, errors=1))
    state, effects = again(before, {"mode": "replace"})
    assert kinds(effects) == ["Serve"]
    (model,) = last_serve(effects).models
    assert (model.mode, model.active.target) == ("replace", f"{MODEL}/{NEW}")
    assert model.trial != trial_of(before)
    state, _ = run(state, served(state, NEW))
    assert phase(state).counts == s.Counts()
    late = s.Measured(MODEL, trial_of(before), arm(NEW, requests=90, errors=90))
    assert run(state, late) == (state, [])
    state, _ = run(state, measured(state, NEW, requests=10), golden(state, NEW))
    assert told(state, before.seq) == [("trial", ""), ("confirmed", "")]
    assert state.models[MODEL].incumbent is not None
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/{NEW}")}


def test_what_was_compared_is_promoted_after_a_look_at_its_signature_only() -> None:
    compared, _ = run(trying(SHADOW), s.Tick(), ms=60_000)
    state, effects = again(compared, {"mode": "replace"})
    assert kinds(effects) == ["Resolve", "SendReports"]
    assert loadable(NEW).digest in {item.digest for item in machine.kept(state)}, "while it is looked at"
    state, effects = run(state, resolved(NEW))
    assert kinds(effects) == ["Serve"]
    assert isinstance(phase(state), s.Swapping)
    assert [one.outcome for one in phase(state).job.tried] == ["candidate"]


def test_what_was_compared_under_another_engine_is_brought_anew() -> None:
    compared, _ = run(trying(SHADOW), s.Tick(), ms=60_000)
    state, _ = again(compared, {"mode": "replace"})
    found = resolved(NEW)
    newer = tuple(
        type(one)(
            loadable=type(one.loadable)(**{**_fields(one.loadable), "engine_version": "9.9.9"}), bytes=0, why=one.why
        )
        for one in found.candidates
    )
    state, effects = run(state, s.Resolved(MODEL, found.manifest, 1, newer))
    assert kinds(effects) == ["Fetch"]


def _fields(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__struct_fields__}


def test_what_was_compared_and_revoked_meanwhile_is_refused() -> None:
    compared, _ = run(trying(SHADOW), s.Tick(), ms=60_000)
    state, _ = again(compared, {"mode": "replace"})
    failed = s.TaskFailed(MODEL, loadable(NEW).manifest, 1, "resolve", reasons.REVOKED, "", None)
    state, _ = run(state, failed)
    assert told(state)[-1] == ("refused", reasons.REVOKED)
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/{OLD}")}


def test_what_was_compared_makes_room_when_another_version_is_offered() -> None:
    compared, _ = run(trying(SHADOW), s.Tick(), ms=60_000)
    state, effects = again(compared, {}, "1.2.0")
    (collect,) = [effect for effect in effects if isinstance(effect, s.Collect)]
    assert {item.target for item in collect.keep} == {f"{MODEL}/{OLD}"}
    assert isinstance(phase(state), s.Resolving)


def test_a_shadow_that_failed_is_not_promoted_under_the_same_attempt() -> None:
    state = trying(SHADOW)
    state, _ = run(state, measured(state, NEW, requests=20, errors=20))
    state, _ = run(state, served(state, OLD))
    state, _ = again(state, {"mode": "replace"})
    state, _ = run(state, resolved(NEW))
    assert told(state)[-1] == ("refused", reasons.KNOWN_BAD)


def test_a_mode_that_changes_before_the_trial_changes_only_the_terms() -> None:
    state, _ = run(confirmed(OLD), offer(2, {MODEL: offered(NEW, **SHADOW)}), resolved(NEW))
    state, effects = again(state, {"mode": "replace"})
    assert kinds(effects) == []
    state, effects = run(state, fetched(NEW), judged(NEW))
    assert last_serve(effects).models[0].mode == "replace"


# --- shares --------------------------------------------------------------------------------------


def test_another_share_is_taken_over_and_counts_go_on() -> None:
    before = trying(SPLIT)
    before, _ = run(before, measured(before, NEW, requests=3))
    state, effects = again(before, {"mode": "split", "share": 0.5})
    assert kinds(effects) == ["Serve", "SendReports"]
    (model,) = last_serve(effects).models
    assert (model.share, model.trial) == (0.5, trial_of(before))
    assert phase(state).counts.requests == 3
    assert phase(state).since == phase(before).since
    assert [(report.state, report.share) for report in state.owed[-1:]] == [("trial", 0.5)]


def test_a_standby_takes_over_at_once_without_loading_and_is_confirmed() -> None:
    before = trying(STANDBY)
    assert told(before)[-1] == ("standby", "")
    state, effects = again(before, TAKE_OVER)
    (model,) = last_serve(effects).models
    assert (model.share, model.incumbent) == (1.0, loadable(OLD))
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/{NEW}")}
    state, _ = run(state, served(state, NEW), ms=1000)
    assert phase(state).since.monotonic_ms == now(1000).monotonic_ms, "the trial begins when it takes over"
    state, _ = run(state, measured(state, NEW, requests=10), golden(state, NEW), ms=1000)
    assert told(state, before.seq) == [("trial", ""), ("confirmed", "")]


def test_a_candidate_that_took_over_stands_by_again_at_once() -> None:
    state, _ = again(trying(STANDBY), TAKE_OVER)
    state, _ = run(state, served(state, NEW))
    before = state
    state, effects = again(state, STANDBY)
    assert last_serve(effects).models[0].share == 0.0
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/{OLD}")}
    state, _ = run(state, served(state, NEW))
    assert told(state, before.seq) == [("standby", "")]
    state, _ = run(state, s.Tick(), ms=60_000)
    assert told(state)[-1] == ("compared", "")


def test_a_standby_whose_time_is_over_may_still_take_over() -> None:
    compared, _ = run(trying(STANDBY), s.Tick(), ms=60_000)
    state, _ = again(compared, TAKE_OVER)
    state, effects = run(state, resolved(NEW))
    assert last_serve(effects).models[0].share == 1.0


# --- restarts and handles ------------------------------------------------------------------------


def test_comparisons_before_a_power_cut_are_kept() -> None:
    state = trying(SHADOW)
    state, _ = run(state, measured(state, NEW, requests=10, compared=8, agreed=8, skipped=2))
    state, _ = machine.resume(state, now(0, "boot-2"))
    state, _ = machine.step(state, served(state, NEW), now(0, "boot-2"))
    state, _ = machine.step(state, measured(state, NEW, requests=1, compared=1, agreed=1), now(0, "boot-2"))
    state, _ = machine.step(state, s.Tick(), now(60_000, "boot-2"))
    report = state.owed[-1]
    assert (report.state, report.requests, report.compared, report.agreed, report.skipped) == ("compared", 11, 9, 9, 2)


@pytest.mark.parametrize(
    ("way", "version", "trial"),
    [(SHADOW, OLD, False), (STANDBY, OLD, False), (SPLIT, NEW, True), (TAKE_OVER, NEW, True), ({}, NEW, True)],
    ids=["shadow", "standby", "split", "blue-green", "replace"],
)
def test_applications_own_processes_hear_of_a_candidate_only_where_it_answers(
    way: dict[str, Any], version: str, *, trial: bool
) -> None:
    shown = turn.for_handles(machine.serving(trying(way))[0])
    assert (shown.active.target, bool(shown.trial)) == (f"{MODEL}/{version}", trial)


@BESIDE
def test_a_broken_incumbent_under_what_was_compared_leads_to_a_fresh_start(way: dict[str, Any]) -> None:
    state = confirmed(OLD, state=confirmed("0.9.0"), serial=2)
    state = on_trial(NEW, state=state, serial=3, trial=TERMS, **way)
    state, _ = run(state, s.Tick(), ms=60_000)
    for _ in range(turn.FAULTS_MAX):
        state, _ = run(state, served(state, OLD, ok=False, reason=reasons.LOAD_FAILED))
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/0.9.0")}
    assert isinstance(phase(state), s.Resolving), "the offer still wants it compared, now with the version before"


def test_the_status_says_how_a_candidate_is_tried_and_how_it_compares() -> None:
    state = trying(SHADOW)
    state, _ = run(state, measured(state, NEW, requests=10, compared=10, agreed=9, skipped=4))
    shown = status.describe(state, now())
    model: Any = shown["models"]
    assert model[MODEL]["trial"]["mode"] == "shadow"
    assert model[MODEL]["serves"]["target"] == f"{MODEL}/{OLD}"
    said = status.render({"running": False, **shown})
    assert f"{MODEL}: running as a shadow" in said
    assert "shadow of 50%, 10 requests, 0 errors" in said
    assert "9 of 10 answers agree with the incumbent's, 4 runs left out" in said
    over, _ = run(state, s.Tick(), ms=60_000)
    assert "the incumbent serves alone" in status.render({"running": False, **status.describe(over, now())})
    ready = trying(STANDBY)
    assert f"{MODEL}: standing by" in status.render({"running": False, **status.describe(ready, now())})
