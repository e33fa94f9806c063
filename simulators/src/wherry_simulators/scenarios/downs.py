"""Machines that go down while something is tried: by its doing, by an order, or because the power comes and goes."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared import reasons
from wherry_shared.wire import Trial
from wherry_simulators.faults import Faults
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

OLD, NEW = frozenset({"1.0.0"}), frozenset({"1.1.0"})
BLAMED, RESTARTED = f"returned {reasons.DEVICE_DOWN}", f"returned {reasons.RESTARTS}"
MINUTE_MS = 60_000
_DOWN = Behaviour(variants=[VariantBehaviour(down_per_request=0.9)])
_TRUSTED = Behaviour(variants=[VariantBehaviour(down_ms=5 * MINUTE_MS)])
_AFTER = tuple(HOUR_MS + (20 + 3 * number) * MINUTE_MS for number in range(6))
_LONG = Trial(min_requests=1_000, max_s=1_200, canary_s=60)
_CUTS = (HOUR_MS + 2 * MINUTE_MS, HOUR_MS + 4 * MINUTE_MS, HOUR_MS + 6 * MINUTE_MS)


def _row(
    name: str,
    ends_on: frozenset[str],
    *releases: Release,
    said: tuple[str, ...] = (),
    unsaid: tuple[str, ...] = (),
    cuts: tuple[int, ...] = (),
    faults: Faults | None = None,
) -> Scenario:
    row = Scenario(
        name,
        (Release("1.0.0"), *releases),
        ends_on=ends_on,
        said=frozenset(said),
        unsaid=frozenset(unsaid),
        power_cuts=cuts,
        devices=4,
        settle_ms=HOUR_MS,
    )
    return row if faults is None else replace(row, faults=faults)


TABLE = (
    _row(
        "a candidate that takes the whole machine down is bad, and not tried again by another rollout",
        OLD,
        Release("1.1.0", _DOWN, at_ms=HOUR_MS),
        Release("1.1.0", _DOWN, at_ms=2 * HOUR_MS, rollout="again"),
        said=(BLAMED, f"refused {reasons.KNOWN_BAD}"),
        faults=Faults(from_ms=HOUR_MS // 2, until_ms=HOUR_MS - 5 * MINUTE_MS, stopped=0.5),
    ),
    _row(
        "a shadow that takes the whole machine down is bad",
        OLD,
        Release("1.1.0", _DOWN, at_ms=HOUR_MS, mode="shadow"),
        said=(BLAMED,),
    ),
    _row(
        "a variant whose canary takes the whole machine down makes way for the next one",
        NEW,
        Release(
            "1.1.0",
            Behaviour(variants=[VariantBehaviour(id="int8", canary_down=True), VariantBehaviour(id="float")]),
            at_ms=HOUR_MS,
        ),
    ),
    _row(
        "a bundle whose only canary takes the whole machine down leaves the old one",
        OLD,
        Release("1.1.0", Behaviour(variants=[VariantBehaviour(canary_down=True)]), at_ms=HOUR_MS),
        said=(f"failed {reasons.DEVICE_DOWN}",),
    ),
    _row(
        "an agent that is stopped in order again and again in a trial confirms it in the end",
        NEW,
        Release("1.1.0", at_ms=HOUR_MS, trial=_LONG),
        unsaid=(BLAMED, RESTARTED),
        faults=Faults(from_ms=HOUR_MS, until_ms=HOUR_MS + 20 * MINUTE_MS, stopped=0.1),
    ),
    _row(
        "a single power cut in a trial is held against nobody, whatever the terms are",
        OLD,
        Release("1.1.0", at_ms=HOUR_MS, trial=Trial(min_requests=1_000, max_s=1_200, canary_s=60, restarts_max=1)),
        said=(RESTARTED,),
        unsaid=(BLAMED,),
        cuts=_CUTS[:1],
    ),
    _row(
        "a power cut in a trial delays it and no more",
        NEW,
        Release("1.1.0", at_ms=HOUR_MS, trial=_LONG),
        unsaid=(BLAMED, RESTARTED),
        cuts=_CUTS[:1],
    ),
    _row(
        "a device that loses its power all day blames nobody for it",
        OLD,
        Release("1.1.0", at_ms=HOUR_MS, trial=_LONG),
        said=(RESTARTED,),
        unsaid=(BLAMED,),
        cuts=(HOUR_MS // 2, HOUR_MS // 2 + 10 * MINUTE_MS, *_CUTS),
    ),
    _row(
        "a version that takes the whole machine down only when it is trusted gives way to the one before",
        OLD,
        Release("1.1.0", _TRUSTED, at_ms=HOUR_MS),
        Release("1.1.0", _TRUSTED, at_ms=2 * HOUR_MS, rollout="again"),
        said=(BLAMED, f"refused {reasons.KNOWN_BAD}"),
    ),
    _row(
        "a few power cuts take no version's place that was confirmed just before",
        NEW,
        Release("1.1.0", at_ms=HOUR_MS),
        unsaid=(BLAMED,),
        cuts=_AFTER[:3],
    ),
    _row(
        "power cuts take no version's place if they come between lives that last",
        NEW,
        Release("1.1.0", at_ms=HOUR_MS),
        unsaid=(BLAMED,),
        cuts=(*_AFTER[:3], *(at_ms + 2 * HOUR_MS for at_ms in _AFTER[:4])),
    ),
    _row(
        "an agent that is stopped in order again and again keeps what it trusts",
        NEW,
        Release("1.1.0", at_ms=HOUR_MS),
        unsaid=(BLAMED,),
        faults=Faults(from_ms=HOUR_MS + 20 * MINUTE_MS, until_ms=HOUR_MS + 50 * MINUTE_MS, stopped=0.3),
    ),
    _row(
        "a version that a device went down without keeps its place",
        NEW,
        Release("1.1.0", at_ms=HOUR_MS),
        unsaid=(BLAMED,),
        cuts=(HOUR_MS // 2, HOUR_MS // 2 + 10 * MINUTE_MS, *_AFTER),
    ),
)
