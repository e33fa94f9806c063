"""Releases in stages, decided by the real rollout engine from what the devices say."""

from __future__ import annotations

from wherry_server.gates import Bound, Gate
from wherry_server.plan import Stage
from wherry_shared import reasons
from wherry_simulators.faults import MODERATE
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

STAGES = (Stage(share=0.1), Stage(share=0.5), Stage(share=1.0))
WHOLE = (Stage(share=1.0),)
_GATES = (Gate(metric="failed", tolerated=0.05, harm=0.3),)
_UNBOUNDED = Bound(share=0.99, sample_min=60)
"""Leaves the verdict to gates."""
HALVES = (Stage(share=0.5), Stage(share=1.0))
_AGREES = (Gate(metric="disagreed", tolerated=0.05, harm=0.15),)
DONE, HALTED = frozenset({"done"}), frozenset({"halted"})
_FAILING = Behaviour(variants=[VariantBehaviour(error_rate=0.8)])
_PARTLY = Behaviour(affected=0.5, variants=[VariantBehaviour(error_rate=0.8)])

TABLE = (
    Scenario(
        "a good release is done after its last stage",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS, stages=STAGES, ends=DONE)),
        ends_on=frozenset({"1.1.0"}),
        devices=60,
    ),
    Scenario(
        "a release that fails on devices halts, and everyone is on the old one again",
        (Release("1.0.0"), Release("1.1.0", _FAILING, at_ms=HOUR_MS, stages=STAGES, ends=HALTED)),
        ends_on=frozenset({"1.0.0"}),
        devices=60,
    ),
    Scenario(
        "a release that fails on half of the devices halts, and the other half comes back too",
        (Release("1.0.0"), Release("1.1.0", _PARTLY, at_ms=HOUR_MS, stages=STAGES, ends=HALTED)),
        ends_on=frozenset({"1.0.0"}),
        devices=60,
    ),
    Scenario(
        "a release that misses its golden vectors halts before its second stage",
        (
            Release("1.0.0"),
            Release(
                "1.1.0",
                Behaviour(variants=[VariantBehaviour(canary=reasons.GOLDEN_MISS)]),
                at_ms=HOUR_MS,
                stages=STAGES,
                ends=HALTED,
            ),
        ),
        ends_on=frozenset({"1.0.0"}),
        devices=60,
    ),
    Scenario(
        "a good release all at once is done",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS, stages=WHOLE, strategy="all_at_once", ends=DONE)),
        ends_on=frozenset({"1.1.0"}),
        devices=60,
    ),
    Scenario(
        "a release that fails on devices all at once halts, and everyone is on the old one again",
        (
            Release("1.0.0"),
            Release("1.1.0", _FAILING, at_ms=HOUR_MS, stages=WHOLE, strategy="all_at_once", ends=HALTED),
        ),
        ends_on=frozenset({"1.0.0"}),
        devices=60,
    ),
    Scenario(
        "a good release widens by itself until it is done",
        (
            Release("1.0.0"),
            Release("1.1.0", at_ms=HOUR_MS, stages=WHOLE, strategy="adaptive", gates=_GATES, ends=DONE),
        ),
        ends_on=frozenset({"1.1.0"}),
        devices=60,
    ),
    Scenario(
        "a release that fails on half of the devices is halted by a gate while it widens",
        (
            Release("1.0.0"),
            Release(
                "1.1.0",
                _PARTLY,
                at_ms=HOUR_MS,
                stages=WHOLE,
                strategy="adaptive",
                gates=_GATES,
                failure=_UNBOUNDED,
                ends=HALTED,
            ),
        ),
        ends_on=frozenset({"1.0.0"}),
        devices=60,
    ),
    Scenario(
        "a shadow that agrees is promoted stage by stage, and is done",
        (
            Release("1.0.0"),
            Release("1.1.0", at_ms=HOUR_MS, stages=HALVES, strategy="shadow", gates=_AGREES, ends=DONE),
        ),
        ends_on=frozenset({"1.1.0"}),
        said=frozenset({"compared shadow"}),
        devices=60,
    ),
    Scenario(
        "a shadow that disagrees halts, and nobody ever answered with it",
        (
            Release("1.0.0"),
            Release(
                "1.1.0",
                Behaviour(variants=[VariantBehaviour(agreement=0.5)]),
                at_ms=HOUR_MS,
                stages=HALVES,
                strategy="shadow",
                gates=_AGREES,
                ends=HALTED,
            ),
        ),
        ends_on=frozenset({"1.0.0"}),
        said=frozenset({"compared shadow"}),
        devices=60,
    ),
    Scenario(
        "a blue-green stands by everywhere, flips, and is done",
        (Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS, stages=STAGES, strategy="blue_green", ends=DONE)),
        ends_on=frozenset({"1.1.0"}),
        said=frozenset({"standby"}),
        devices=60,
    ),
    Scenario(
        "a blue-green that fails once it answers is flipped back everywhere",
        (
            Release("1.0.0"),
            Release("1.1.0", _PARTLY, at_ms=HOUR_MS, stages=STAGES, strategy="blue_green", ends=HALTED),
        ),
        ends_on=frozenset({"1.0.0"}),
        said=frozenset({"standby", "returned health_errors"}),
        devices=60,
    ),
    Scenario(
        "shadows and blue-greens end through crashes and a rough network",
        (
            Release("1.0.0"),
            Release("1.1.0", at_ms=HOUR_MS, stages=HALVES, strategy="shadow", gates=_AGREES),
            Release("1.2.0", _FAILING, at_ms=8 * HOUR_MS, stages=STAGES, strategy="blue_green"),
        ),
        MODERATE,
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
        devices=60,
        settle_ms=60 * HOUR_MS,
    ),
    Scenario(
        "staged releases end through crashes and a rough network",
        (
            Release("1.0.0"),
            Release("1.1.0", at_ms=HOUR_MS, stages=STAGES),
            Release("1.2.0", _FAILING, at_ms=2 * HOUR_MS, stages=STAGES, ends=HALTED),
        ),
        MODERATE,
        ends_on=frozenset({"", "1.0.0", "1.1.0"}),
        devices=60,
        settle_ms=36 * HOUR_MS,
    ),
)
