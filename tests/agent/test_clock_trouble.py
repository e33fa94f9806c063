"""A clock that is wrong stops installs, never serving, and what it did is undone when it is right again."""

from __future__ import annotations

from tests.agent.builders import DAY_US, MODEL, T0_S, confirmed, digest_of, offer, offered, resolved, run, trust
from wherry_agent import machine
from wherry_agent import state as s
from wherry_shared.clock import MICROSECONDS, Now

YEAR_S = 365 * 86_400


def at(wall_s: float, ms: int = 0, boot: str = "boot-1") -> Now:
    return Now(boot, 1_000_000 + ms, wall_s)


def downloading() -> s.State:
    state, _ = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}), resolved("1.1.0"))
    assert isinstance(state.models[MODEL].phase, s.Fetching)
    return state


def test_a_clock_that_jumps_beyond_every_expiry_starts_nothing_and_serves_on() -> None:
    floor = confirmed("1.0.0").trust
    assert floor is not None
    ahead = T0_S + 10 * YEAR_S
    state, effects = machine.step(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}), at(ahead))
    assert not [effect for effect in effects if isinstance(effect, s.Resolve | s.Fetch)]
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}
    assert machine.trust_state(state, at(ahead)) == "trust_stale"
    assert state.trust is not None
    assert state.trust.time_floor_us == floor.time_floor_us  # a clock raises no floor, only what was signed does

    # and when it is right again, the same offer is acted on
    state, effects = machine.step(state, s.Connected(), at(T0_S + 60, 60_000))
    assert [effect for effect in effects if isinstance(effect, s.Resolve)]
    assert machine.trust_state(state, at(T0_S + 60)) == ""


def test_a_wait_does_not_end_early_or_late_because_the_clock_jumped() -> None:
    state, _ = run(
        downloading(), s.TaskFailed(MODEL, digest_of(f"{MODEL}/1.1.0"), 1, "fetch", "disk_full", "no room", 60.0)
    )
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.Waiting)
    for wall_s in (0.0, T0_S + 3600):
        early, _ = machine.step(state, s.Tick(), at(wall_s, phase.wait_ms - 1))
        assert isinstance(early.models[MODEL].phase, s.Waiting)
    later, _ = machine.step(state, s.Tick(), at(0.0, phase.wait_ms))
    assert isinstance(later.models[MODEL].phase, s.Fetching)


def test_in_1970_expiry_is_judged_by_the_time_that_was_verified() -> None:
    floor_us = round(T0_S * MICROSECONDS)
    state, _ = run(confirmed("1.0.0"), s.Refreshed(trust(2, time_floor_us=floor_us)))
    state, _ = machine.resume(state, at(0.0, 0, "boot-2"))
    assert machine.trust_state(state, at(0.0, 0, "boot-2")) == "clock_unset"
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}

    # an offer that expired before the floor is dead, however early the clock says it is
    expired = offer(2, {MODEL: offered("1.1.0")}, expires_at=floor_us - DAY_US)
    state, effects = machine.step(state, expired, at(0.0, 0, "boot-2"))
    assert not [effect for effect in effects if isinstance(effect, s.Resolve)]
    fresh = offer(3, {MODEL: offered("1.1.0")}, expires_at=floor_us + DAY_US)
    state, effects = machine.step(state, fresh, at(0.0, 0, "boot-2"))
    assert [effect for effect in effects if isinstance(effect, s.Resolve)]
