"""Scenarios of the update machine: what a device does, in sentences, with the exact effects and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from tests.agent.builders import (
    DAY_US,
    DEVICE,
    MODEL,
    T0_S,
    arm,
    blank,
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
    trust,
)
from wherry_agent import journal, machine, turn
from wherry_agent import state as s
from wherry_agent.children import Candidate
from wherry_shared import reasons
from wherry_shared.clock import MICROSECONDS
from wherry_shared.wire import Trial


def kinds(effects: list[s.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def told(state: s.State, since: int = 1) -> list[tuple[str, str]]:
    """Reports from number `since` on: (state, reason)."""
    return [(report.state, report.reason) for report in state.owed if report.seq >= since]


def phase(state: s.State, model: str = MODEL) -> s.Phase:
    return state.models[model].phase


def failed(task: s.Task, reason: str, *, after: float | None = 0.0, version: str = "1.0.0") -> s.TaskFailed:
    return s.TaskFailed(MODEL, digest_of(f"{MODEL}/{version}"), 1, task, reason, "detail", after)


def updating() -> s.State:
    """1.0.0 confirmed, 1.1.0 on trial."""
    return on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)


def downloading() -> s.State:
    state, _ = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}), resolved("1.1.0"))
    return state


def in_canary(*variants: str) -> s.State:
    first = variants[0] if variants else "float"
    state, _ = run(
        confirmed("1.0.0"),
        offer(2, {MODEL: offered("1.1.0")}),
        resolved("1.1.0", *variants),
        fetched("1.1.0", first),
    )
    return state


def swapping() -> s.State:
    state, _ = run(in_canary(), judged("1.1.0"))
    return state


# --- the way of an update ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One step: from a state, an event, at a time, to a phase, with these effects and reports."""

    sentence: str
    start: Callable[[], s.State]
    event: Callable[[s.State], s.Event]
    then: type
    effects: list[str]
    reports: list[tuple[str, str]]
    ms: int = 0


ROWS = [
    Row(
        "an offer of something new is resolved",
        fresh,
        lambda _: offer(1, {MODEL: offered("1.0.0")}),
        s.Resolving,
        ["Resolve", "SendReports"],
        [("fetching", "")],
    ),
    Row(
        "a resolved bundle's best variant is fetched",
        lambda: run(fresh(), offer(1, {MODEL: offered("1.0.0")}))[0],
        lambda _: resolved("1.0.0"),
        s.Fetching,
        ["Fetch"],
        [],
    ),
    Row(
        "a fetched variant goes to the canary",
        downloading,
        lambda _: fetched("1.1.0"),
        s.Judging,
        ["Judge", "SendReports"],
        [("judging", "")],
    ),
    Row(
        "a variant that the canary passed is swapped in",
        in_canary,
        lambda _: judged("1.1.0"),
        s.Swapping,
        ["Serve"],
        [],
    ),
    Row(
        "a trial begins when the worker says that it serves",
        swapping,
        lambda state: served(state, "1.1.0"),
        s.OnTrial,
        ["SendReports"],
        [("trial", "")],
    ),
    Row(
        "too few requests leave the trial open",
        updating,
        lambda state: measured(state, "1.1.0", requests=4),
        s.OnTrial,
        [],
        [],
    ),
    Row(
        "enough requests with nothing to compare latency with are proved by golden vectors",
        updating,
        lambda state: measured(state, "1.1.0", requests=5),
        s.Proving,
        ["RunGolden"],
        [],
    ),
    Row(
        "enough good requests as fast as before confirm",
        updating,
        lambda state: measured(
            state,
            "1.1.0",
            requests=60,
            latency_us=latencies(4, 1000, 60),
            baseline=arm("1.0.0", arm="incumbent", requests=60, latency_us=latencies(4, 1000, 60)),
        ),
        s.Idle,
        ["Collect", "Serve", "SendReports"],
        [("confirmed", "")],
    ),
    Row(
        "failing requests send it back",
        updating,
        lambda state: measured(state, "1.1.0", requests=10, errors=3),
        s.Returning,
        ["Serve"],
        [],
    ),
    Row(
        "a median twice the incumbent's sends it back",
        updating,
        lambda state: measured(
            state,
            "1.1.0",
            requests=60,
            latency_us=latencies(4, 2500, 60),
            baseline=arm("1.0.0", arm="incumbent", requests=60, latency_us=latencies(4, 1000, 60)),
        ),
        s.Returning,
        ["Serve"],
        [],
    ),
    Row(
        "a crash of the worker sends it back",
        updating,
        lambda _: s.WorkerDied("signal 11"),
        s.Returning,
        ["Serve"],
        [],
    ),
    Row(
        "a crash of the application that ran it sends it back",
        updating,
        lambda state: s.Condemned(MODEL, loadable("1.1.0").digest, trial_of(state), reasons.CRASH, "process 7"),
        s.Returning,
        ["Serve"],
        [],
    ),
    Row(
        "a restart of the worker that the supervisor ordered is no crash",
        updating,
        lambda _: s.WorkerDied("signal 9", ordered=True),
        s.Swapping,
        [],
        [],
    ),
    Row(
        "a trial without requests is proved by golden vectors when its time is over",
        updating,
        lambda _: s.Tick(),
        s.Proving,
        ["RunGolden"],
        [],
        ms=60_000,
    ),
    Row(
        "the halted rollout's offer of the incumbent is an immediate return",
        updating,
        lambda _: offer(3, {MODEL: offered("1.0.0")}),
        s.Returning,
        ["Serve"],
        [],
    ),
    Row(
        "an offer of a third version waits for the verdict",
        updating,
        lambda _: offer(3, {MODEL: offered("1.2.0")}),
        s.OnTrial,
        [],
        [],
    ),
    Row(
        "an offer of a third version replaces a download",
        downloading,
        lambda _: offer(3, {MODEL: offered("1.2.0")}),
        s.Resolving,
        ["Cancel", "Resolve", "SendReports"],
        [("fetching", "")],
    ),
    Row(
        "the halted rollout's offer of the incumbent ends a download",
        downloading,
        lambda _: offer(3, {MODEL: offered("1.0.0")}),
        s.Idle,
        ["Cancel", "SendReports"],
        [("confirmed", reasons.WITHDRAWN)],
    ),
    Row(
        "the same attempt under a newer offer goes on downloading",
        downloading,
        lambda _: offer(3, {MODEL: offered("1.1.0")}),
        s.Fetching,
        [],
        [],
    ),
    Row(
        "a model that the offer does not name is left alone",
        lambda: confirmed("1.0.0"),
        lambda _: offer(2, {}),
        s.Idle,
        [],
        [],
    ),
    Row(
        "an offer of what runs here already is only acknowledged",
        lambda: confirmed("1.0.0"),
        lambda _: offer(2, {MODEL: offered("1.0.0", rollout="r2")}),
        s.Idle,
        ["SendReports"],
        [("confirmed", "")],
    ),
    Row(
        "removal frees the model",
        lambda: confirmed("1.0.0"),
        lambda _: offer(2, {MODEL: offered(mode="none")}),
        s.Idle,
        ["Collect", "Serve", "SendReports"],
        [("removed", "")],
    ),
    Row(
        "a network that is gone is waited for",
        downloading,
        lambda _: failed("fetch", reasons.NETWORK, version="1.1.0"),
        s.Waiting,
        ["SendReports"],
        [("waiting", reasons.NETWORK)],
    ),
    Row(
        "a full disk is waited for",
        downloading,
        lambda _: failed("fetch", reasons.DISK_FULL, version="1.1.0"),
        s.Waiting,
        ["SendReports"],
        [("waiting", reasons.DISK_FULL)],
    ),
    Row(
        "a bundle that nobody signed is waited for, and not held against it",
        lambda: run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}))[0],
        lambda _: failed("resolve", reasons.TRUST_UNSIGNED, version="1.1.0"),
        s.Waiting,
        ["SendReports"],
        [("waiting", reasons.TRUST_UNSIGNED)],
    ),
    Row(
        "a broken contract is refused before download",
        lambda: run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}))[0],
        lambda _: failed("resolve", reasons.CONTRACT_BROKEN, after=None, version="1.1.0"),
        s.Idle,
        ["SendReports"],
        [("refused", reasons.CONTRACT_BROKEN)],
    ),
    Row(
        "a courier that does not end is ended",
        downloading,
        lambda _: s.Tick(),
        s.Waiting,
        ["Cancel", "SendReports"],
        [("waiting", reasons.CHILD_FAILED)],
        ms=turn.FETCH_MS,
    ),
    Row(
        "a canary of which nothing is heard is no verdict",
        in_canary,
        lambda _: s.Tick(),
        s.Waiting,
        ["Cancel", "SendReports"],
        [("waiting", reasons.CHILD_FAILED)],
        ms=120_000 + turn.JUDGE_GRACE_MS,
    ),
    Row(
        "a canary's miss with no other variant fails the bundle here",
        in_canary,
        lambda _: judged("1.1.0", passed=False, reason=reasons.GOLDEN_MISS),
        s.Idle,
        ["Collect", "SendReports"],
        [("failed", reasons.GOLDEN_MISS)],
    ),
    Row(
        "a canary's miss leads to the next variant",
        lambda: in_canary("int8", "float"),
        lambda _: judged("1.1.0", "int8", passed=False, reason=reasons.GOLDEN_MISS),
        s.Fetching,
        ["Fetch"],
        [],
    ),
    Row(
        "a canary that could not be started is trouble, not a verdict",
        in_canary,
        lambda _: judged("1.1.0", passed=False, reason=reasons.CHILD_FAILED),
        s.Waiting,
        ["SendReports"],
        [("waiting", reasons.CHILD_FAILED)],
    ),
    Row(
        "a worker that cannot load what the canary passed sends it back",
        swapping,
        lambda state: served(state, "1.1.0", ok=False, reason=reasons.OVER_MEMORY),
        s.Returning,
        ["Serve"],
        [],
    ),
    Row(
        "a worker that stays silent is restarted, and nothing is held against the variant",
        swapping,
        lambda _: s.Tick(),
        s.Returning,
        ["RestartWorker", "Serve"],
        [],
        ms=turn.SWAP_MS,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.sentence.replace(" ", "_"))
def test_step(row: Row) -> None:
    before = row.start()
    after, effects = run(before, row.event(before), ms=row.ms)
    assert isinstance(phase(after), row.then)
    assert kinds(effects) == row.effects
    assert told(after, before.seq) == row.reports


LATE: list[tuple[str, Callable[[], s.State], Callable[[s.State], s.Event]]] = [
    ("resolved for another version", downloading, lambda _: resolved("0.9.0")),
    ("resolved for another attempt", downloading, lambda _: resolved("1.1.0", attempt=7)),
    ("fetched for another variant", downloading, lambda _: fetched("1.1.0", "int8")),
    ("fetched for another attempt", downloading, lambda _: fetched("1.1.0", attempt=2)),
    ("fetched before it was resolved", lambda: run(fresh(), offer(1, {MODEL: offered()}))[0], lambda _: fetched()),
    ("a verdict on another variant", in_canary, lambda _: judged("1.1.0", "int8")),
    ("a verdict on the version before", in_canary, lambda _: judged("1.0.0")),
    ("served in answer to an older set", swapping, lambda state: served(state, "1.1.0", revision=state.revision - 1)),
    ("the incumbent still served while swapping", swapping, lambda state: served(state, "1.0.0")),
    (
        "counts of another trial",
        updating,
        lambda state: replace(measured(state, "1.1.0", requests=9, errors=9), trial="another"),
    ),
    ("counts of the incumbent", updating, lambda state: measured(state, "1.0.0", requests=9, errors=9)),
    ("golden vectors checked in a trial that is over", confirmed, lambda _: golden(updating(), "1.0.0")),
    (
        "golden vectors checked before they were asked for",
        updating,
        lambda state: golden(state, "1.1.0", passed=False),
    ),
    ("an older offer", updating, lambda _: offer(1, {MODEL: offered("1.0.0")})),
    ("the same offer again", updating, lambda _: offer(2, {MODEL: offered("1.1.0")})),
    ("an offer for another device", confirmed, lambda _: offer(9, {MODEL: offered("2.0.0")}, device="e" * 22)),
    ("news of a model that is not here", confirmed, lambda _: fetched("1.0.0", model="other")),
    ("an acknowledgement of another stream", confirmed, lambda _: s.Acked("another", 2)),
    ("an acknowledgement of what was never sent", confirmed, lambda state: s.Acked(state.stream, state.seq)),
    ("a worker's answer after the download began", downloading, lambda state: served(state, "1.1.0", ok=False)),
]


@pytest.mark.parametrize(("sentence", "start", "event"), LATE, ids=[row[0].replace(" ", "_") for row in LATE])
def test_late_and_foreign_events_change_nothing(
    sentence: str, start: Callable[[], s.State], event: Callable[[s.State], s.Event]
) -> None:
    before = start()
    after, effects = run(before, event(before))
    assert (after, effects) == (before, [])


# --- longer stories ------------------------------------------------------------------------------


def test_a_first_installation_goes_through_a_trial_too() -> None:
    state = on_trial("1.0.0")
    assert state.models[MODEL].incumbent is None
    state, effects = run(state, measured(state, "1.0.0", requests=5))
    slot = state.models[MODEL]
    assert slot.incumbent is not None
    assert slot.incumbent.manifest == loadable("1.0.0").manifest
    assert slot.contract == loadable("1.0.0").interface
    assert last_serve(effects).models[0].trial == ""
    assert told(state) == [("fetching", ""), ("judging", ""), ("trial", ""), ("confirmed", "")]


@pytest.mark.parametrize(
    ("counts", "end"),
    [
        ({"requests": 4}, "confirmed_idle"),
        ({"requests": 40}, "confirmed"),
        ({"requests": 60, "errors": 1}, "confirmed"),
    ],
)
def test_when_its_time_is_over_golden_vectors_stand_for_what_traffic_did_not_show(
    counts: dict[str, int], end: str
) -> None:
    """The traffic's shapes changed with the swap, so that latency could not be compared."""
    state = updating()
    baseline = arm("1.0.0", arm="incumbent", requests=60, latency_us=latencies(4, 1000, 60))
    seen = measured(state, "1.1.0", latency_us=latencies(9, 1000, 40), baseline=baseline, **counts)
    state, _ = run(state, seen)
    assert isinstance(phase(state), s.OnTrial)
    state, _ = run(state, s.Tick(), ms=60_000)
    state, _ = run(state, golden(state, "1.1.0"))
    assert state.owed[-1].state == end


def test_a_first_installation_that_fails_leaves_nothing_serving() -> None:
    before = on_trial("1.0.0")
    state, effects = run(before, measured(before, requests=10, errors=10))
    assert isinstance(phase(state), s.Idle)
    assert last_serve(effects).models == ()
    assert told(state, before.seq) == [("returned", reasons.HEALTH_ERRORS)]
    assert state.owed[-1].running == ""


def test_a_halted_first_installation_is_withdrawn_by_mode_none() -> None:
    before = on_trial("1.0.0")
    state, effects = run(before, offer(2, {MODEL: offered(mode="none")}), s.Tick())
    assert told(state, before.seq) == [("returned", reasons.WITHDRAWN), ("removed", "")]
    assert last_serve(effects).models == ()
    assert state.known_bad == ()


def test_a_return_is_reported_when_the_incumbent_answers_again() -> None:
    before = updating()
    state, _ = run(before, measured(before, "1.1.0", requests=10, errors=4, fallbacks=4))
    assert told(state, before.seq) == []
    state, effects = run(state, served(state, "1.0.0"))
    report = state.owed[-1]
    assert (report.state, report.reason, report.trial_end) == ("returned", "health_errors", "returned:health_errors")
    assert (report.requests, report.errors, report.fallbacks) == (10, 4, 4)
    assert report.running == loadable("1.0.0").manifest
    assert report.variants[-1].outcome == "failed"
    assert kinds(effects) == ["Collect", "SendReports"]


@pytest.mark.parametrize(
    ("reason", "next_one"),
    [(reason, "Fetch" if reason in reasons.OF_THE_BUNDLE else "refused") for reason in sorted(reasons.VERDICTS)],
)
def test_a_release_of_the_same_file_is_tried_where_what_was_wrong_may_have_been_around_the_file(
    reason: str, next_one: str
) -> None:
    state, _ = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}), resolved("1.1.0"), fetched("1.1.0"))
    state, _ = run(state, judged("1.1.0", passed=False, reason=reason))
    assert state.owed[-1].state == "failed"

    same_file = msgspec.structs.replace(loadable("1.2.0"), digest=loadable("1.1.0").digest)
    corrected = replace(resolved("1.2.0"), candidates=(Candidate(loadable=same_file, bytes=1, why="fastest here"),))
    state, effects = run(state, offer(3, {MODEL: offered("1.2.0")}), corrected)
    assert next_one in (*kinds(effects), state.owed[-1].state)
    assert (state.owed[-1].reason == reasons.KNOWN_BAD) == (next_one == "refused")


def test_what_failed_here_is_not_tried_again_unless_the_attempt_is_new() -> None:
    state = updating()
    state, _ = run(state, s.WorkerDied("signal 11"))
    state, _ = run(state, served(state, "1.0.0"))
    before = state
    state, effects = run(state, offer(3, {MODEL: offered("1.1.0")}))
    assert (kinds(effects), told(state, before.seq)) == ([], [])

    state, effects = run(state, offer(4, {MODEL: offered("1.1.0", rollout="another")}), resolved("1.1.0"))
    assert told(state, before.seq) == [("fetching", ""), ("refused", reasons.KNOWN_BAD)]
    assert "Fetch" not in kinds(effects)

    state, effects = run(state, offer(5, {MODEL: offered("1.1.0", attempt=2)}), resolved("1.1.0", attempt=2))
    assert isinstance(phase(state), s.Fetching)


def test_a_variant_known_to_fail_is_passed_over_for_the_next() -> None:
    state = in_canary("int8", "float")
    state, _ = run(state, judged("1.1.0", "int8", passed=False, reason=reasons.CRASH))
    state, _ = run(state, offer(3, {MODEL: offered("1.1.0", rollout="another")}), resolved("1.1.0", "int8", "float"))
    current = phase(state)
    assert isinstance(current, s.Fetching)
    assert current.job.loadable.variant == "float"
    assert [(one.id, one.outcome, one.reason) for one in current.job.tried] == [("int8", "failed", "crash")]


def test_no_more_variants_are_tried_than_the_trial_allows() -> None:
    state = in_canary("a", "b", "c")
    for name in ("a", "b"):
        state, _ = run(state, judged("1.1.0", name, passed=False, reason=reasons.OVER_MEMORY), fetched("1.1.0", "b"))
    assert isinstance(phase(state), s.Idle)
    assert told(state)[-1] == ("failed", reasons.OVER_MEMORY)
    assert len(state.known_bad) == 2


def test_a_withdrawn_candidate_may_come_back_under_the_same_attempt() -> None:
    state = updating()
    state, _ = run(state, offer(3, {MODEL: offered("1.0.0")}))
    state, _ = run(state, served(state, "1.0.0"))
    assert told(state)[-2:] == [("returned", reasons.WITHDRAWN), ("confirmed", "")]
    assert [(one.id, one.outcome) for one in state.owed[-1].variants] == [
        ("float", "serving")
    ]  # why it runs is still known
    assert state.known_bad == ()
    state, _ = run(state, offer(4, {MODEL: offered("1.1.0")}))
    assert isinstance(phase(state), s.Resolving)


def test_an_offer_that_waited_for_the_verdict_is_acted_on_afterwards() -> None:
    state = updating()
    state, _ = run(state, offer(3, {MODEL: offered("1.2.0")}))
    state, effects = run(state, measured(state, "1.1.0", requests=10), golden(state, "1.1.0"))
    assert isinstance(phase(state), s.Resolving)
    assert state.models[MODEL].incumbent is not None
    assert state.models[MODEL].incumbent.manifest == loadable("1.1.0").manifest
    assert "Resolve" in kinds(effects)


def test_trouble_backs_off_and_is_reported_once_per_reason() -> None:
    state = downloading()
    before, ms, waits = state, 0, []
    for _ in range(12):
        state, _ = run(state, failed("fetch", reasons.NETWORK, version="1.1.0"), ms=ms)
        current = phase(state)
        assert isinstance(current, s.Waiting)
        waits.append(current.wait_ms)
        ms += current.wait_ms
        state, effects = run(state, s.Tick(), ms=ms)
        assert "Fetch" in kinds(effects)
    assert waits == sorted(waits)
    assert waits[0] == turn.RETRY_MIN_MS
    assert waits[-1] == turn.RETRY_MAX_MS
    assert told(state, before.seq) == [("waiting", reasons.NETWORK)]


def test_the_network_coming_back_ends_the_wait_for_it() -> None:
    state, _ = run(downloading(), failed("fetch", reasons.NETWORK, after=900, version="1.1.0"))
    again, effects = run(state, s.Connected(), ms=turn.RETRY_MIN_MS)
    assert isinstance(phase(again), s.Fetching)
    assert "Fetch" in kinds(effects)


def test_an_expired_offer_starts_nothing_and_undoes_nothing() -> None:
    at = round(T0_S * MICROSECONDS)
    state = confirmed("1.0.0")
    expired = offer(2, {MODEL: offered("1.1.0")}, expires_at=at)
    after, effects = run(state, expired)
    assert effects == []
    assert isinstance(phase(after), s.Idle)

    state, _ = run(state, offer(2, {MODEL: offered("1.1.0")}, expires_at=at + 10 * MICROSECONDS), resolved("1.1.0"))
    state, _ = run(state, failed("fetch", reasons.NETWORK, after=20, version="1.1.0"))
    state, effects = run(state, s.Tick(), ms=20_000)
    assert isinstance(phase(state), s.Idle)
    assert told(state)[-1] == ("waiting", reasons.OFFER_EXPIRED)
    state, _ = run(state, offer(3, {MODEL: offered("1.1.0")}), ms=20_000)
    assert isinstance(phase(state), s.Resolving)


def test_a_device_with_a_slow_clock_knows_that_an_offer_expired() -> None:
    at = round(T0_S * MICROSECONDS)
    event = offer(1, {MODEL: offered()}, expires_at=at + DAY_US)
    event = replace(event, trust=trust(time_floor_us=at + 2 * DAY_US))
    state, effects = run(fresh(), event)
    assert effects == []
    assert machine.trust_state(state, now()) == reasons.CLOCK_UNSET


@pytest.mark.parametrize(
    "event",
    [
        offer(1, {MODEL: offered()}, groups={"pair": [MODEL, "other"]}),
        offer(1, {MODEL: offered()}, critical=["teleport"]),
        offer(1, {MODEL: offered()}, flags={"fast": None}),
    ],
    ids=["groups", "critical", "flags"],
)
def test_what_this_release_does_not_do_is_refused_once_with_a_reason(event: s.Offered) -> None:
    state, effects = run(fresh(), event, event, s.Tick())
    assert told(state) == [("refused", reasons.UNSUPPORTED)]
    assert "Resolve" not in kinds(effects)


def test_an_offer_of_too_many_models_is_refused_as_a_whole() -> None:
    models = {f"m{number}": offered(model=f"m{number}") for number in range(turn.MODELS_MAX + 1)}
    state, effects = run(fresh(), offer(1, models), s.Tick())
    assert set(told(state)) == {("refused", reasons.UNSUPPORTED)}
    assert len(state.models) == turn.MODELS_MAX
    assert "Resolve" not in kinds(effects)


def test_a_full_device_begins_nothing_new_but_serves_what_it_has() -> None:
    state = confirmed("1.0.0")
    first = {f"a{number}": offered(model=f"a{number}") for number in range(turn.MODELS_MAX)}
    second = {f"b{number}": offered(model=f"b{number}") for number in range(turn.MODELS_MAX)}
    state, _ = run(state, offer(2, first))
    state, effects = run(state, offer(3, second))
    assert kinds(effects).count("Resolve") == 0
    assert len(state.models) <= 2 * turn.MODELS_MAX + 1
    assert [model.name for model in machine.serving(state)] == [MODEL]


def test_only_one_model_is_tried_at_a_time() -> None:
    models = {MODEL: offered(), "pitch": offered(model="pitch")}
    state, _ = run(fresh(), offer(1, models))
    for name in (MODEL, "pitch"):
        state, _ = run(state, resolved(model=name), fetched(model=name), judged(model=name))
    assert isinstance(phase(state), s.Swapping)
    assert isinstance(phase(state, "pitch"), s.Queued)
    state, _ = run(state, served(state))
    state, _ = run(state, measured(state, requests=9))
    assert isinstance(phase(state), s.Idle)
    assert isinstance(phase(state, "pitch"), s.Swapping)


def test_a_crash_of_a_worker_with_several_models_ends_the_trial_and_is_held_against_none() -> None:
    state = confirmed("1.0.0")
    state, _ = run(state, offer(2, {MODEL: offered(), "pitch": offered(model="pitch")}))
    state, _ = run(state, resolved(model="pitch"), fetched(model="pitch"), judged(model="pitch"))
    state, _ = run(state, served(state, model="pitch"), s.WorkerDied("signal 6"))
    assert state.known_bad == (), "nobody knows whose crash it was"
    state, _ = run(state, served(state))
    assert told(state)[-1] == ("returned", reasons.CRASH)
    assert isinstance(phase(state, "pitch"), s.Idle), "the attempt is over all the same"
    assert state.crashes is None
    assert [model.name for model in machine.serving(state)] == [MODEL]


def test_a_crash_in_the_trial_of_the_only_model_is_held_against_the_candidate() -> None:
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    state, _ = run(state, s.WorkerDied("signal 6"))
    assert [bad.digest for bad in state.known_bad] == [loadable("1.1.0").digest]


def test_a_crash_loop_of_a_confirmed_version_leads_to_the_last_known_good_then_to_the_safe_state() -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    seen = []
    for _ in range(2 * (turn.CRASHES_MAX + 1)):
        before = state.seq
        state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady())
        seen += told(state, before)
    assert seen == [("returned", reasons.CRASH), ("safe", reasons.CRASH)]
    assert isinstance(phase(state), s.Safe)
    assert machine.serving(state) == ()
    state, _ = run(state, offer(3, {MODEL: offered("1.1.0", attempt=2)}))
    assert isinstance(phase(state), s.Resolving)


def test_crashes_far_apart_are_no_loop() -> None:
    state, ms = confirmed("1.0.0"), 0
    for _ in range(10):
        ms += turn.CRASH_WINDOW_MS + 1
        state, _ = run(state, s.WorkerDied("signal 11"), ms=ms)
    assert isinstance(phase(state), s.Idle)
    assert len(machine.serving(state)) == 1


def test_a_confirmed_version_that_does_not_load_any_more_gives_way_after_a_few_workers() -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    restarts = 0
    for _ in range(turn.FAULTS_MAX):
        state, effects = run(state, served(state, "1.1.0", ok=False, reason=reasons.LOAD_FAILED))
        restarts += kinds(effects).count("RestartWorker")
    assert restarts == turn.FAULTS_MAX - 1
    assert [model.active.target for model in machine.serving(state)] == [f"{MODEL}/1.0.0"]
    assert told(state)[-1] == ("returned", reasons.LOAD_FAILED)


UNREADABLE = pytest.mark.parametrize("reason", [reasons.DIGEST_MISMATCH, reasons.KEY_MISSING])
"""What keeps a process from a version's bytes and says nothing about them."""


@UNREADABLE
def test_a_confirmed_version_whose_file_was_altered_gives_way_at_once_and_is_brought_again(reason: str) -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    before = state.seq
    state, effects = run(state, served(state, "1.1.0", ok=False, reason=reason))
    assert "RestartWorker" not in kinds(effects), "a new worker would read the same bytes"
    assert [model.active.target for model in machine.serving(state)] == [f"{MODEL}/1.0.0"]
    assert told(state, before) == [("returned", reason), ("fetching", "")]
    assert state.known_bad == (), "the disk says nothing about the variant"
    assert isinstance(phase(state), s.Resolving)


@UNREADABLE
def test_an_only_version_whose_file_was_altered_is_reported_and_brought_again(reason: str) -> None:
    state = confirmed("1.0.0")
    before = state.seq
    state, _ = run(state, served(state, ok=False, reason=reason))
    assert machine.serving(state) == ()
    assert told(state, before) == [("safe", reason), ("fetching", "")]


@UNREADABLE
def test_a_candidate_whose_file_the_canary_finds_altered_is_fetched_again_later(reason: str) -> None:
    state, _ = run(fresh(), offer(1, {MODEL: offered()}), resolved(), fetched())
    state, _ = run(state, judged(passed=False, reason=reason))
    waiting = phase(state)
    assert isinstance(waiting, s.Waiting)
    assert (waiting.then, waiting.wait_ms) == ("fetch", turn.ALTERED_RETRY_S * 1000)
    assert state.known_bad == ()


@pytest.mark.parametrize("requests", [1, 2], ids=["one", "two"])
def test_a_candidate_that_failed_its_few_requests_goes_back_when_its_time_is_over(requests: int) -> None:
    state = updating()
    state, _ = run(state, measured(state, "1.1.0", requests=requests, errors=requests))
    assert isinstance(phase(state), s.OnTrial), "too few to condemn it before its time"
    state, effects = run(state, s.Tick(), ms=60_000)
    assert "RunGolden" not in kinds(effects)
    state, _ = run(state, served(state, "1.0.0"))
    assert told(state)[-1] == ("returned", reasons.HEALTH_ERRORS)
    assert [bad.reason for bad in state.known_bad] == [reasons.HEALTH_ERRORS]


def test_requests_that_failed_before_a_crash_count_at_the_end_too() -> None:
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2, trial=Trial(crashes_max=1, max_s=60))
    state, _ = run(state, measured(state, "1.1.0", requests=2, errors=2), s.WorkerDied("signal 11"), s.WorkerReady())
    state, _ = run(state, served(state, "1.1.0"), s.Tick(), ms=60_000)
    assert (phase(state).reason, phase(state).detail[:23]) == (reasons.HEALTH_ERRORS, "2 of 2 requests failed,")


def test_a_candidate_that_fails_requests_while_it_is_proved_is_not_confirmed() -> None:
    state, _ = run(updating(), s.Tick(), ms=60_000)
    assert isinstance(phase(state), s.Proving)
    state, _ = run(state, measured(state, "1.1.0", requests=1, errors=1), golden(state, "1.1.0"), ms=60_001)
    assert isinstance(phase(state), s.Returning)
    assert phase(state).reason == reasons.HEALTH_ERRORS


def test_figures_that_come_late_while_it_is_proved_take_nothing_from_those_before() -> None:
    state, _ = run(updating(), measured(updating(), "1.1.0", requests=60), s.Tick(), ms=60_000)
    state, _ = run(state, measured(state, "1.1.0", requests=3), golden(state, "1.1.0"), ms=60_001)
    assert (state.owed[-1].state, state.owed[-1].requests) == ("confirmed", 60)


@pytest.mark.parametrize("fails", ["crash", "errors", "load"])
def test_a_trial_that_fails_on_a_safe_device_leaves_it_safe(fails: str) -> None:
    state = confirmed("1.0.0")
    for _ in range(turn.CRASHES_MAX + 1):
        state, _ = run(state, s.WorkerDied("signal 11"))
    assert isinstance(phase(state), s.Safe)
    if fails == "load":
        state, _ = run(state, offer(2, {MODEL: offered("1.1.0")}), resolved("1.1.0"), fetched("1.1.0"), judged("1.1.0"))
        state, _ = run(state, served(state, "1.1.0", ok=False, reason=reasons.LOAD_FAILED))
    else:
        state = on_trial("1.1.0", state=state, serial=2)
        bad = measured(state, "1.1.0", requests=9, errors=9) if fails == "errors" else s.WorkerDied("signal 11")
        state, _ = run(state, bad)
    assert isinstance(phase(state), s.Safe)
    assert [state for state, _ in told(state)[-2:]] == ["returned", "safe"]
    assert machine.serving(state) == ()


def test_golden_vectors_that_cannot_be_used_in_a_trial_are_no_verdict() -> None:
    state = on_trial()
    state, _ = run(state, s.Tick(), ms=61_000)
    trial = phase(state)
    assert isinstance(trial, s.Proving)
    state, _ = run(
        state,
        s.GoldenChecked(MODEL, trial.job.loadable.digest, trial.trial, False, "altered", reasons.DIGEST_MISMATCH),
        ms=61_000,
    )
    assert told(state)[-1] == ("returned", reasons.DIGEST_MISMATCH)
    assert state.known_bad == ()


def test_a_share_of_the_requests_is_refused_and_not_taken_for_all_of_them() -> None:
    state, effects = run(fresh(), offer(1, {MODEL: offered(share=0.5)}))
    assert told(state) == [("refused", reasons.UNSUPPORTED)]
    assert kinds(effects) == ["SendReports"]


def test_an_incumbent_that_loads_again_is_forgiven() -> None:
    state = confirmed("1.0.0")
    for _ in range(10):
        state, _ = run(state, served(state, ok=False), served(state))
    assert state.models[MODEL].incumbent is not None


def test_a_return_waits_for_an_incumbent_that_loads_as_slowly_as_a_swap_may() -> None:
    state, _ = run(updating(), s.WorkerDied("signal 11"), s.WorkerReady())
    for ms in range(10_000, turn.SWAP_MS + 1, 10_000):
        state, effects = run(state, s.Tick(), ms=ms)
        assert "RestartWorker" not in kinds(effects), f"the load under way was killed at {ms} ms"
    state, _ = run(state, served(state, "1.0.0"), ms=turn.SWAP_MS)
    assert told(state)[-1] == ("returned", reasons.CRASH)
    assert isinstance(phase(state), s.Idle)


def test_each_new_worker_gets_twice_as_long_for_an_incumbent_that_is_slower_than_that() -> None:
    state, _ = run(updating(), s.WorkerDied("signal 11"), s.WorkerReady())
    state, effects = run(state, s.Tick(), ms=turn.RETURN_MS)
    assert kinds(effects) == ["RestartWorker"]
    state, _ = run(state, s.WorkerDied("ended", ordered=True), s.WorkerReady(), ms=turn.RETURN_MS)
    state, effects = run(state, s.Tick(), ms=3 * turn.RETURN_MS - 1)
    assert effects == []
    state, effects = run(state, s.Tick(), ms=3 * turn.RETURN_MS)
    assert kinds(effects) == ["RestartWorker"]


def silent_for_ever(state: s.State, hours: int) -> tuple[s.State, int]:
    """No worker ever answers: return the state, and how many workers were tried."""
    ms, restarts, end_ms = 0, 0, hours * 3600_000
    while ms < end_ms:
        ms += max(1000, machine.next_deadline_ms(replace(state, watch=fresh().watch), now(ms)))
        state, effects = run(state, s.Tick(), ms=ms)
        if "RestartWorker" in kinds(effects):
            restarts += 1
            state, _ = run(state, s.WorkerDied("ended", ordered=True), s.WorkerReady(), ms=ms)
    return state, restarts


def test_an_only_version_that_no_worker_answers_for_stays_and_is_tried_ever_more_rarely() -> None:
    state, _ = run(updating(), s.WorkerDied("signal 11"), s.WorkerReady())
    state, restarts = silent_for_ever(state, 24)
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}
    assert isinstance(phase(state), s.Idle), "an offer of something else is taken up"
    assert state.models[MODEL].faults == restarts, "tries are counted"
    assert 24 <= restarts < 36
    state, _ = run(state, served(state, "1.0.0"), ms=25 * 3600_000)
    assert state.models[MODEL].faults == 0


def test_an_only_version_that_fails_without_a_reason_of_its_own_is_not_tried_in_a_tight_loop() -> None:
    state, _ = run(confirmed("1.0.0"), s.WorkerDied("ended", ordered=True), s.WorkerReady())
    restarts = 0
    for _ in range(20):
        state, effects = run(state, served(state, "1.0.0", ok=False, reason=reasons.CHILD_FAILED))
        restarts += kinds(effects).count("RestartWorker")
    assert restarts == turn.FAULTS_MAX - 1
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}
    _, effects = run(state, s.Tick(), ms=turn.RETRY_MAX_MS)
    assert "RestartWorker" in kinds(effects), "the watch on the worker tries again"


def test_workers_that_die_while_the_incumbent_is_to_come_back_are_counted() -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    state = on_trial("1.2.0", state=state, serial=3)
    before = state.seq
    for _ in range(1 + turn.RETURN_TRIES_MAX + turn.CRASHES_MAX + 1):
        assert machine.running(state) != {MODEL: digest_of(f"{MODEL}/1.0.0")}
        state, _ = run(state, s.WorkerDied("signal 11"), s.WorkerReady())
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}
    assert told(state, before) == [("returned", reasons.CRASH), ("returned", reasons.CRASH)]


def test_a_return_to_an_incumbent_that_is_broken_too_ends_in_the_safe_state() -> None:
    state = updating()
    state, _ = run(state, s.WorkerDied("signal 11"))
    for _ in range(turn.RETURN_TRIES_MAX):
        state, _ = run(state, served(state, "1.0.0", ok=False, reason=reasons.LOAD_FAILED))
    assert isinstance(phase(state), s.Safe)
    assert told(state)[-2:] == [("returned", reasons.CRASH), ("safe", reasons.LOAD_FAILED)]
    assert [(report.incumbent, report.running) for report in state.owed[-2:]] == [("", "")] * 2, "nothing is served"


def test_a_return_that_ends_at_the_version_before_names_that_one_and_tidies_up() -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    state, _ = run(on_trial("1.2.0", state=state, serial=3), s.WorkerDied("signal 11"))
    before = state.seq
    for _ in range(turn.RETURN_TRIES_MAX):
        state, effects = run(state, served(state, "1.1.0", ok=False, reason=reasons.LOAD_FAILED))
    assert told(state, before) == [("returned", reasons.CRASH), ("returned", reasons.LOAD_FAILED)]
    assert {report.running for report in state.owed[-2:]} == {digest_of(f"{MODEL}/1.0.0")}
    assert [report.target for report in state.owed[-2:]] == [f"{MODEL}/1.2.0", f"{MODEL}/1.1.0"]
    kept: Any = next(effect for effect in effects if isinstance(effect, s.Collect))
    assert {item.target for item in kept.keep} == {f"{MODEL}/1.0.0"}


def test_crashes_that_a_trial_allows_are_counted_with_the_requests_before_them() -> None:
    terms = Trial(min_requests=50, crashes_max=1, max_s=600)
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2, trial=terms)
    state, _ = run(state, measured(state, "1.1.0", requests=10, errors=1), s.WorkerDied("signal 11"))
    assert isinstance(phase(state), s.Swapping)
    state, effects = run(state, s.WorkerReady())
    assert last_serve(effects).models[0].active.target == f"{MODEL}/1.1.0"
    state, _ = run(state, served(state, "1.1.0"), ms=5)
    state, _ = run(state, measured(state, "1.1.0", requests=7), s.WorkerDied("signal 11"))
    state, _ = run(state, served(state, "1.0.0"))
    assert (state.owed[-1].reason, state.owed[-1].requests, state.owed[-1].errors) == (reasons.CRASH, 17, 1)


# --- reports -------------------------------------------------------------------------------------


def test_reports_are_numbered_without_gaps_and_kept_until_acknowledged() -> None:
    state = confirmed("1.0.0")
    assert [report.seq for report in state.owed] == [1, 2, 3, 4]
    state, _ = run(state, s.Acked(state.stream, 2))
    assert [report.seq for report in machine.outgoing(state)] == [3, 4]
    assert {report.first for report in machine.outgoing(state)} == {3}
    state, _ = run(state, s.Acked(state.stream, 1), s.Acked(state.stream, 4))
    assert state.owed == ()
    state, _ = run(state, offer(2, {MODEL: offered("1.1.0")}))
    assert [report.seq for report in state.owed] == [5]


def test_a_home_that_was_put_back_is_found_by_what_the_server_knows_and_told() -> None:
    """Its numbers were given to other reports in the life that was taken away: the server would take new ones for known."""
    old = confirmed("1.0.0")
    ahead = s.Acked(old.stream, old.seq + 5, fresh="next life")
    assert run(old, s.Acked(old.stream, old.seq - 1, fresh="next life"))[0].stream == old.stream, "an honest one"
    state, effects = run(old, ahead)
    assert state.stream == "next life"
    reports = machine.outgoing(state)
    assert [report.seq for report in reports] == list(range(1, len(old.owed) + 2)), (
        "what was owed, and one that says so"
    )
    assert {report.epoch for report in reports} == {"next life"}
    assert (reports[-1].state, reports[-1].reason) == ("confirmed", reasons.PUT_BACK)
    assert reports[-1].running == digest_of(f"{MODEL}/1.0.0")
    assert str(old.seq + 5) in reports[-1].detail
    assert s.SendReports() in effects
    assert run(state, ahead)[0] == state, "once: the stream has another name now"
    waiting, _ = run(fresh(), offer(1, {MODEL: offered()}))
    state, _ = run(waiting, s.Acked(waiting.stream, 9, fresh="next life"))
    assert told(state)[-1] == ("fetching", reasons.PUT_BACK)
    assert machine.outgoing(state)[-1].rollout == "", "no word about a rollout"


def test_reports_beyond_the_bound_are_dropped_and_show_as_lost() -> None:
    state = confirmed("1.0.0")
    for serial in range(2, turn.OWED_MAX + 20):
        state, _ = run(state, offer(serial, {MODEL: offered("1.0.0", rollout=f"r{serial}")}))
    assert len(state.owed) == turn.OWED_MAX
    sent = machine.outgoing(state)
    assert sent[0].first == sent[0].seq == state.seq - turn.OWED_MAX


# --- restarts ------------------------------------------------------------------------------------


def restart(state: s.State, *, boot: str = "boot-1", ms: int = 0) -> tuple[s.State, list[s.Effect]]:
    after, effects = machine.resume(state, now(ms, boot))
    return after, list(effects)


RESUMES: list[tuple[str, Callable[[], s.State], type, str]] = [
    ("resolving is begun again", lambda: run(fresh(), offer(1, {MODEL: offered()}))[0], s.Resolving, "Resolve"),
    ("a download is resumed", downloading, s.Fetching, "Fetch"),
    ("the canary is run again", in_canary, s.Judging, "Judge"),
    ("a swap is made again when the worker is ready", swapping, s.Swapping, "Collect"),
    ("a trial goes on when the worker is ready", updating, s.Swapping, "Collect"),
    (
        "golden vectors are run again after the swap",
        lambda: run(updating(), s.Tick(), ms=60_000)[0],
        s.Swapping,
        "Collect",
    ),
    ("a return is made again", lambda: run(updating(), s.WorkerDied("x"))[0], s.Returning, "Collect"),
    ("what is confirmed stays", lambda: confirmed("1.0.0"), s.Idle, "Collect"),
]


@pytest.mark.parametrize(
    ("sentence", "start", "then", "effect"), RESUMES, ids=[r[0].replace(" ", "_") for r in RESUMES]
)
@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
def test_resume(sentence: str, start: Callable[[], s.State], then: type, effect: str, boot: str) -> None:
    state, effects = restart(start(), boot=boot)
    assert isinstance(phase(state), then)
    assert effect in kinds(effects)
    assert "SendReports" in kinds(effects)


def test_a_trial_keeps_its_time_over_a_restart_and_begins_it_anew_after_a_reboot() -> None:
    same, _ = restart(updating(), ms=50_000)
    same, _ = run(same, served(same, "1.1.0"), ms=50_000)
    assert machine.next_deadline_ms(replace(same, watch=fresh().watch), now(50_000)) == 10_000
    other, _ = machine.resume(updating(), now(50_000, "boot-2"))
    other, _ = machine.step(other, served(other, "1.1.0"), now(50_000, "boot-2"))
    other, _effects = machine.step(other, s.Tick(), now(60_000, "boot-2"))
    assert isinstance(phase(other), s.OnTrial)


def test_a_wait_that_a_reboot_cut_short_is_over_however_often_the_device_reboots() -> None:
    state, _ = run(downloading(), failed("fetch", reasons.NETWORK, after=3000, version="1.1.0"))
    state, _ = restart(state, boot="boot-2")
    current = phase(state)
    assert isinstance(current, s.Waiting)
    assert machine.next_deadline_ms(state, now(0, "boot-2")) == 0
    state, effects = machine.step(state, s.Tick(), now(1, "boot-2"))
    assert "Fetch" in kinds(effects)


def test_a_restart_of_the_agent_alone_goes_on_with_a_wait() -> None:
    state, _ = run(downloading(), failed("fetch", reasons.DISK_FULL, after=60, version="1.1.0"))
    for ms in range(10_000, 60_000, 10_000):
        state, _ = machine.resume(journal.decode(journal.encode(state)), now(ms))
        assert "Fetch" not in kinds(machine.step(state, s.Tick(), now(ms))[1])
    assert "Fetch" in kinds(machine.step(state, s.Tick(), now(60_001))[1])


def test_owed_reports_survive_a_restart_unchanged() -> None:
    state = confirmed("1.0.0")
    again, _ = restart(state)
    assert again.owed == state.owed


# --- trust ---------------------------------------------------------------------------------------


def test_trust_is_refreshed_at_the_first_tick_and_then_at_half_of_its_life() -> None:
    state, effects = run(blank(), s.Tick())
    assert kinds(effects) == ["Refresh"]
    life_us = 20 * 60 * MICROSECONDS
    state, _ = run(state, s.Refreshed(trust(2, expires_at=round(T0_S * MICROSECONDS) + life_us)))
    _, effects = run(state, s.Tick(), ms=9 * 60_000)
    assert effects == []
    _, effects = run(state, s.Tick(), ms=10 * 60_000)
    assert kinds(effects) == ["Refresh"]


def test_a_refresh_that_fails_backs_off_and_one_that_never_ends_is_made_again() -> None:
    state, _ = run(blank(), s.Tick(), s.RefreshFailed(reasons.NETWORK, "down"))
    _, effects = run(state, s.Tick(), ms=turn.RETRY_MIN_MS - 1)
    assert effects == []
    state, effects = run(state, s.Tick(), ms=turn.RETRY_MIN_MS)
    assert kinds(effects) == ["Refresh"]
    late = turn.RETRY_MIN_MS + turn.REFRESH_MS
    state, _ = run(state, s.Tick(), ms=late)
    _, effects = run(state, s.Tick(), ms=late + 2 * turn.RETRY_MIN_MS)
    assert kinds(effects) == ["Refresh"]


def test_a_late_older_answer_lowers_no_floor() -> None:
    state, _ = run(blank(), s.Refreshed(trust(5, floors={"root": 2, "timestamp": 9}, time_floor_us=100)))
    state, _ = run(state, s.Refreshed(trust(3, floors={"root": 1, "timestamp": 1}, time_floor_us=50)))
    assert state.trust is not None
    assert (state.trust.current, state.trust.floors["timestamp"], state.trust.time_floor_us) == (5, 9, 100)


def test_an_expired_trust_is_said_in_the_hello() -> None:
    state, _ = run(blank(), s.Refreshed(trust(1, expires_at=round(T0_S * MICROSECONDS) - 1)))
    assert machine.trust_state(state, now()) == reasons.TRUST_STALE


# --- what is journaled ---------------------------------------------------------------------------


def test_running_counts_of_a_trial_need_no_journal_but_everything_else_does() -> None:
    state = updating()
    counted, _ = run(state, measured(state, "1.1.0", requests=3))
    assert counted != state
    assert machine.may_wait(state, counted)
    ended, _ = run(state, s.WorkerDied("x"))
    assert not machine.may_wait(state, ended)


def test_a_device_that_was_never_offered_anything_owes_nothing() -> None:
    state, effects = run(fresh(), s.WorkerReady(), s.Connected())
    assert state.owed == ()
    assert last_serve(effects).models == ()
    assert state.device == DEVICE


def test_what_a_model_relies_on_is_asked_of_the_next_bundle() -> None:
    _state, effects = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}))
    asked: Any = next(effect for effect in effects if isinstance(effect, s.Resolve))
    assert asked.contract == loadable("1.0.0").interface


def test_files_of_everything_that_may_serve_again_are_kept() -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    state = on_trial("1.2.0", state=state, serial=3)
    state, effects = run(state, offer(4, {MODEL: offered("1.1.0")}))
    state, effects = run(state, served(state, "1.1.0"))
    kept = next(effect for effect in effects if isinstance(effect, s.Collect))
    assert {item.target for item in kept.keep} == {f"{MODEL}/1.1.0", f"{MODEL}/1.0.0"}


# --- a worker that hangs where no trial waits for it ----------------------------------------------


def test_a_worker_that_does_not_say_that_the_incumbent_serves_is_ended() -> None:
    state, _ = run(confirmed("1.0.0"), s.WorkerDied("killed"), s.WorkerReady())
    assert machine.next_deadline_ms(state, now(0)) <= turn.SERVE_MS
    waiting, effects = run(state, s.Tick(), ms=turn.SERVE_MS - 1)
    assert "RestartWorker" not in kinds(effects)
    _, effects = run(waiting, s.Tick(), ms=turn.SERVE_MS)
    assert kinds(effects) == ["RestartWorker"]


def test_a_worker_that_said_so_is_left_alone() -> None:
    state, _ = run(confirmed("1.0.0"), s.WorkerDied("killed"), s.WorkerReady())
    state, _ = run(state, served(state, "1.0.0"))
    _, effects = run(state, s.Tick(), ms=turn.SERVE_MS)
    assert "RestartWorker" not in kinds(effects)


def test_a_version_at_which_every_worker_hangs_gives_way_to_the_one_before() -> None:
    state = confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)
    before, ms = state.seq, 0
    for tries in range(turn.FAULTS_MAX):
        state, _ = run(state, s.WorkerDied("ended", ordered=True), s.WorkerReady(), ms=ms)
        ms += turn.SERVE_MS << tries
        state, effects = run(state, s.Tick(), ms=ms)
        assert "RestartWorker" in kinds(effects)
    assert told(state, before) == [("returned", reasons.CHILD_FAILED)]
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}
    assert state.known_bad == (), "a hanging process is no verdict on the variant"


def test_a_report_of_a_candidate_that_went_back_says_why_what_serves_runs() -> None:
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    state, _ = run(state, s.Condemned(MODEL, loadable("1.1.0").digest, trial_of(state), "application", "it says so"))
    state, _ = run(state, served(state, "1.0.0"))
    last = state.owed[-1]
    assert last.state == "returned"
    assert last.serving is not None
    assert (last.serving.digest, last.serving.outcome) == (loadable("1.0.0").digest, "serving")
    assert state.owed[0].serving is None, "the first version says it of itself"
