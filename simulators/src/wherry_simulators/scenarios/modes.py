"""Candidates that run beside the incumbent, answer a share, stand by or take over at once: what each must come to."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared.wire import Mode, Trial
from wherry_simulators.faults import MODERATE, Faults
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, TRIAL, Release, Scenario

OLD, NEW = frozenset({"1.0.0"}), frozenset({"1.1.0"})
MINUTE_MS = 60_000
_LONG = Trial(min_requests=20, max_s=3600, canary_s=60, agreement_min=0.9)
_PATIENT = Trial(min_requests=20, max_s=3600, canary_s=60, restarts_max=40, crashes_max=40)
_SHORT = Trial(min_requests=20, max_s=300, canary_s=60, restarts_max=40, crashes_max=40)
_BEGUN_MS = HOUR_MS - MINUTE_MS
"""By now 1.0.0 is confirmed: what only runs beside an incumbent needs one, and a storm may keep a first version away."""
_ROUGH = replace(MODERATE, from_ms=_BEGUN_MS, until_ms=2 * HOUR_MS)
_CRASHES = replace(MODERATE, from_ms=_BEGUN_MS, until_ms=4 * HOUR_MS, crash_between_events=0.03)


def _one(**how: object) -> Behaviour:
    return Behaviour(variants=[VariantBehaviour(**how)])  # type: ignore[arg-type]


def _try(
    mode: Mode, share: float = 1.0, at_ms: int = HOUR_MS, behaviour: Behaviour | None = None, trial: Trial = TRIAL
) -> Release:
    """Offer 1.1.0 in a mode, always under the same attempt of the same rollout."""
    return Release(
        "1.1.0", behaviour or Behaviour(), at_ms=at_ms, mode=mode, share=share, rollout="trying", trial=trial
    )


def _back(at_ms: int) -> Release:
    return Release("1.0.0", at_ms=at_ms, rollout="trying")


def _row(
    name: str, ends_on: frozenset[str], *releases: Release, said: tuple[str, ...] = (), faults: Faults | None = None
) -> Scenario:
    row = Scenario(
        name,
        (Release("1.0.0"), *releases),
        ends_on=ends_on,
        said=frozenset(said),
        devices=6,
        settle_ms=3 * HOUR_MS,
    )
    return row if faults is None else replace(row, faults=faults, settle_ms=12 * HOUR_MS)


_SOON, _LATER = HOUR_MS + 5 * MINUTE_MS, 3 * HOUR_MS
_BAD, _SLOW, _OTHER = _one(error_rate=0.8), _one(latency_us=5_400.0), _one(agreement=0.5)

TABLE = (
    _row("a shadow is compared until its time is over", OLD, _try("shadow"), said=("trial shadow", "compared shadow")),
    _row("a shadow that fails goes back", OLD, _try("shadow", behaviour=_BAD), said=("returned health_errors",)),
    _row("a shadow that is slow goes back", OLD, _try("shadow", behaviour=_SLOW), said=("returned health_latency",)),
    _row(
        "a shadow that disagrees goes back",
        OLD,
        _try("shadow", behaviour=_OTHER, trial=_LONG),
        said=("returned health_agreement",),
    ),
    _row(
        "a shadow that crashes goes back",
        OLD,
        _try("shadow", behaviour=_one(crash_per_request=0.3)),
        said=("returned crash",),
    ),
    _row(
        "a shadow that is promoted takes over without a download, and is confirmed",
        NEW,
        _try("shadow", 0.5, trial=_LONG),
        _try("replace", at_ms=_SOON),
        said=("trial shadow", "trial replace"),
    ),
    _row(
        "a shadow that was compared is promoted later without a download",
        NEW,
        _try("shadow"),
        _try("replace", at_ms=_LATER),
        said=("compared shadow", "trial replace"),
    ),
    _row(
        "a shadow that is withdrawn leaves the old one",
        OLD,
        _try("shadow", trial=_LONG),
        _back(_SOON),
        said=("trial shadow", "returned withdrawn"),
    ),
    _row(
        "a shadow gives way to a newer version",
        frozenset({"1.2.0"}),
        _try("shadow", trial=_LONG),
        Release("1.2.0", at_ms=_SOON),
        said=("trial shadow", "returned superseded"),
    ),
    _row("a split answers its share until its time is over", OLD, _try("split", 0.3), said=("compared split",)),
    _row("a split that fails goes back", OLD, _try("split", 0.3, behaviour=_BAD), said=("returned health_errors",)),
    _row(
        "a split whose share grows goes on, and is confirmed when it is promoted",
        NEW,
        _try("split", 0.1, trial=_LONG),
        _try("split", 0.5, at_ms=_SOON, trial=_LONG),
        _try("replace", at_ms=_SOON + 5 * MINUTE_MS),
        said=("trial split", "trial replace"),
    ),
    _row(
        "a standby answers nobody, and ends when its time is over",
        OLD,
        _try("blue_green", 0.0),
        said=("standby", "compared blue_green"),
    ),
    _row(
        "a standby that takes over is confirmed",
        NEW,
        _try("blue_green", 0.0, trial=_LONG),
        _try("blue_green", 1.0, at_ms=_SOON),
        said=("standby", "trial blue_green"),
    ),
    _row(
        "a standby that took over stands by again when it is told to",
        OLD,
        _try("blue_green", 0.0, trial=_LONG),
        _try("blue_green", 1.0, at_ms=_SOON, trial=Trial(min_requests=2_000, max_s=600, canary_s=60)),
        _try("blue_green", 0.0, at_ms=_SOON + MINUTE_MS),
        said=("standby", "trial blue_green", "compared blue_green"),
    ),
    _row(
        "a standby that took over and fails goes back",
        OLD,
        _try("blue_green", 1.0, behaviour=_BAD),
        said=("returned health_errors",),
    ),
    _row(
        "a standby that does not fit beside the incumbent goes back",
        OLD,
        _try("blue_green", 0.0, behaviour=_one(alone=True)),
        said=("returned memory_short",),
    ),
    _row(
        "what was compared is promoted without a download, through crashes and a rough network",
        NEW,
        _try("shadow", trial=_SHORT),
        _try("replace", at_ms=4 * HOUR_MS, trial=_PATIENT),
        said=("compared shadow", "trial replace"),
        faults=_CRASHES,
    ),
    _row(
        "a shadow becomes a split, stands by and takes over, through crashes and a rough network",
        NEW | OLD,
        _try("shadow", trial=_PATIENT),
        _try("split", 0.3, at_ms=HOUR_MS + 15 * MINUTE_MS, trial=_PATIENT),
        _try("blue_green", 0.0, at_ms=HOUR_MS + 30 * MINUTE_MS, trial=_PATIENT),
        _try("blue_green", 1.0, at_ms=HOUR_MS + 45 * MINUTE_MS, trial=_PATIENT),
        faults=_ROUGH,
        said=("trial shadow", "trial split", "standby", "trial blue_green"),
    ),
)
