"""Releases through crashes, lost and repeated messages, and children that never answer."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared import reasons
from wherry_shared.wire import Trial
from wherry_simulators.faults import HEAVY, MODERATE, Faults
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.network import STORM
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

_BAD = Behaviour(variants=[VariantBehaviour(error_rate=0.8)])
_MISS = Behaviour(variants=[VariantBehaviour(canary=reasons.GOLDEN_MISS)])
_LONG = Trial(min_requests=40, max_s=170, canary_s=60)
_TWO = Behaviour(variants=[VariantBehaviour(id="int8"), VariantBehaviour(id="float")])
_THREE = (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS), Release("1.2.0", _BAD, at_ms=2 * HOUR_MS))

THREE_RELEASES = Scenario(
    "three releases reach their ends through crashes and a rough network",
    _THREE,
    MODERATE,
    ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    devices=50,
)

TABLE = (
    THREE_RELEASES,
    Scenario(
        "three releases reach their ends through a storm",
        _THREE,
        HEAVY,
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "a device that loses power at every tenth seam still comes to an end",
        (Release("1.0.0"), Release("1.1.0", _MISS, at_ms=HOUR_MS), Release("1.2.0", at_ms=2 * HOUR_MS)),
        Faults(
            until_ms=3 * HOUR_MS,
            crash_before_journal=0.1,
            crash_after_journal=0.1,
            crash_between_effects=0.1,
            crash_between_events=0.1,
        ),
        ends_on=frozenset({"", "1.0.0", "1.2.0"}),
    ),
    Scenario(
        "an idle trial ends by its deadline although devices restart",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        replace(MODERATE, worker_crash_per_s=0.0),
        requests_per_s=0.0,
    ),
    Scenario(
        "children that never answer and answers that come late confuse nobody",
        _THREE,
        Faults(until_ms=3 * HOUR_MS, child_lost=0.4, answer_late=0.4, answer_repeated=0.5, fetch_trouble=0.3),
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "a canary of which nothing is heard is run again, and its candidate is confirmed",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        Faults(from_ms=HOUR_MS, until_ms=2 * HOUR_MS, child_lost=0.5),
        ends_on=frozenset({"1.1.0"}),
        devices=6,
    ),
    Scenario(
        "verdicts that come late or twice count for nothing else",
        tuple(
            Release(f"1.{number}.0", _TWO if number % 4 else _MISS, at_ms=number * 3 * 60_000, trial=_LONG)
            for number in range(16)
        ),
        Faults(until_ms=HOUR_MS, answer_late=0.5, answer_late_ms=240_000, answer_repeated=0.6),
        requests_per_s=0.5,
    ),
    Scenario(
        "a server that is silent most of the time gets every report in the end",
        _THREE,
        Faults(until_ms=4 * HOUR_MS, server_silent=0.7, weather=STORM),
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "a worker that hangs is ended, and what serves goes on",
        _THREE,
        Faults(until_ms=3 * HOUR_MS, worker_silent=0.15),
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "a worker that dies again and again is told again what to serve",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        Faults(until_ms=2 * HOUR_MS, worker_crash_per_s=1 / 60),
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "offers that expire start nothing, and are signed again",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        Faults(until_ms=4 * HOUR_MS, fetch_trouble=0.95, server_silent=0.8, weather=STORM),
        offer_life_s=1800,
        ends_on=frozenset({"1.1.0"}),
    ),
    Scenario(
        "a server restored from a backup goes on above what devices know",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS), Release("1.2.0", at_ms=2 * HOUR_MS)),
        replace(MODERATE, until_ms=2 * HOUR_MS),
        restore_at_ms=int(2.2 * HOUR_MS),
    ),
    Scenario(
        "a wall clock that is years wrong for a while ends nothing badly",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        Faults(until_ms=2 * HOUR_MS, crash_between_events=0.02, crash_after_journal=0.01, wall_clock_wrong=0.7),
    ),
    Scenario(
        "a candidate may crash as often as its terms allow",
        (
            Release("1.0.0"),
            Release(
                "1.1.0",
                Behaviour(variants=[VariantBehaviour(crash_per_request=0.002)]),
                at_ms=HOUR_MS,
                trial=Trial(min_requests=200, max_s=600, canary_s=60, crashes_max=2),
            ),
        ),
        devices=30,
    ),
)
CANARY_LOST = tuple(row for row in TABLE if row.name.startswith("a canary of which nothing is heard"))
