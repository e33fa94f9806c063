"""Engines that are replaced on disk while models serve with the one before."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared import reasons
from wherry_simulators.faults import MODERATE, Faults
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

_BREAKS = Behaviour(variants=[VariantBehaviour(canary_newer=reasons.GOLDEN_MISS)])
_ONE_OF_TWO = Behaviour(
    variants=[VariantBehaviour(id="int8", canary_newer=reasons.GOLDEN_MISS), VariantBehaviour(id="float")]
)
_RESTARTS = Faults(until_ms=6 * HOUR_MS, crash_between_events=0.05, crash_between_effects=0.02)

TABLE = (
    Scenario(
        "an engine that is replaced serves what passes with it, and goes on with what does not",
        (
            Release("1.0.0"),
            Release("2.0.0", _BREAKS, model="other"),
            Release("1.1.0", at_ms=HOUR_MS),
        ),
        engine_at_ms=2 * HOUR_MS,
        ends_on=frozenset({"1.1.0"}),
    ),
    Scenario(
        "what misses its golden vectors with a new engine gives way when a worker starts with it",
        (Release("1.0.0"), Release("1.1.0", _BREAKS, at_ms=HOUR_MS)),
        _RESTARTS,
        engine_at_ms=2 * HOUR_MS,
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "another variant takes the place of one that a new engine breaks",
        (Release("1.0.0"), Release("1.1.0", _ONE_OF_TWO, at_ms=HOUR_MS)),
        _RESTARTS,
        engine_at_ms=2 * HOUR_MS,
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "engines are replaced in the middle of a release, in bad weather",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        replace(MODERATE, until_ms=3 * HOUR_MS),
        engine_at_ms=HOUR_MS + 60_000,
    ),
)
