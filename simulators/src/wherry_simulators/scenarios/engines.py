"""Engines that are replaced on disk while models serve with the one before."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared import reasons
from wherry_simulators.faults import MODERATE, Faults
from wherry_simulators.models import ENGINE_VERSION, NEWER_ENGINE_VERSION, NO_ENGINE, Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

_BREAKS = Behaviour(variants=[VariantBehaviour(canary_newer=reasons.GOLDEN_MISS)])
_ONE_OF_TWO = Behaviour(
    variants=[VariantBehaviour(id="int8", canary_newer=reasons.GOLDEN_MISS), VariantBehaviour(id="float")]
)
_FELLS = Behaviour(variants=[VariantBehaviour(canary_newer_down=True)])
_NEEDS_NEWER = Behaviour(variants=[VariantBehaviour(engine_newer=True)])
_GONE_MS, _BACK_MS = 2 * HOUR_MS, 3 * HOUR_MS
_MISSED = frozenset({f"returned {reasons.ENGINE_MISSING}", f"safe {reasons.ENGINE_MISSING}"})
_RESTARTS = Faults(until_ms=6 * HOUR_MS, crash_between_events=0.05, crash_between_effects=0.02)

TABLE = (
    Scenario(
        "an engine that is replaced serves what passes with it, and goes on with what does not",
        (
            Release("1.0.0"),
            Release("2.0.0", _BREAKS, model="other"),
            Release("1.1.0", at_ms=HOUR_MS),
        ),
        engines=((2 * HOUR_MS, NEWER_ENGINE_VERSION),),
        ends_on=frozenset({"1.1.0"}),
    ),
    Scenario(
        "what misses its golden vectors with a new engine gives way when a worker starts with it",
        (Release("1.0.0"), Release("1.1.0", _BREAKS, at_ms=HOUR_MS)),
        _RESTARTS,
        engines=((2 * HOUR_MS, NEWER_ENGINE_VERSION),),
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "another variant takes the place of one that a new engine breaks",
        (Release("1.0.0"), Release("1.1.0", _ONE_OF_TWO, at_ms=HOUR_MS)),
        _RESTARTS,
        engines=((2 * HOUR_MS, NEWER_ENGINE_VERSION),),
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
    ),
    Scenario(
        "engines are replaced in the middle of a release, in bad weather",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        replace(MODERATE, until_ms=3 * HOUR_MS),
        engines=((HOUR_MS + 60_000, NEWER_ENGINE_VERSION),),
    ),
    Scenario(
        "an engine that is gone costs a version its place, and no version its name",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        engines=((_GONE_MS, NO_ENGINE), (_BACK_MS, ENGINE_VERSION)),
        worker_ends=(_GONE_MS + 60_000,),
        ends_on=frozenset({"1.1.0"}),
        said=_MISSED,
        unsaid=frozenset({f"refused {reasons.KNOWN_BAD}"}),
        devices=4,
    ),
    Scenario(
        "a newer engine in the place of one that is gone serves what was there",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        engines=((_GONE_MS, NO_ENGINE), (_BACK_MS, NEWER_ENGINE_VERSION)),
        worker_ends=(_GONE_MS + 60_000,),
        ends_on=frozenset({"1.1.0"}),
        said=_MISSED,
        devices=4,
    ),
    Scenario(
        "an engine that is gone for a while is missed by nobody whose worker lives",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)),
        engines=((_GONE_MS, NO_ENGINE), (_BACK_MS, ENGINE_VERSION)),
        ends_on=frozenset({"1.1.0"}),
        unsaid=_MISSED,
        devices=4,
    ),
    Scenario(
        "a bundle that needs a newer engine comes once that is there",
        (Release("1.0.0"), Release("1.1.0", _NEEDS_NEWER, at_ms=HOUR_MS)),
        engines=((2 * HOUR_MS, NEWER_ENGINE_VERSION),),
        ends_on=frozenset({"1.1.0"}),
        said=frozenset({f"refused {reasons.NO_VARIANT}"}),
        devices=4,
    ),
    Scenario(
        "what takes the machine down in the canary with a new engine gives way, and is not judged for ever",
        (Release("1.0.0"), Release("1.1.0", _FELLS, at_ms=HOUR_MS)),
        engines=((2 * HOUR_MS, NEWER_ENGINE_VERSION),),
        ends_on=frozenset({"1.0.0"}),
        said=frozenset({f"returned {reasons.ENGINE_CHANGED}"}),
        devices=4,
    ),
)
REPLACED, MISSING = TABLE[:4], TABLE[4:]
