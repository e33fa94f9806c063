"""Two models that belong together: a device runs the new ones of both, or of neither."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared import reasons
from wherry_shared.wire import Trial
from wherry_simulators.faults import MODERATE, Faults
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, TRIAL, Release, Scenario

OLD, NEW = frozenset({"1.0.0"}), frozenset({"1.1.0"})
NOTHING = frozenset({""})
MINUTE_MS = 60_000
_GOOD = Behaviour()
_IDLE = Trial(min_requests=20_000, max_s=300, canary_s=60)


def _one(**how: object) -> Behaviour:
    return Behaviour(variants=[VariantBehaviour(**how)])  # type: ignore[arg-type]


def _pair(
    one: Behaviour,
    other: Behaviour,
    at_ms: int = HOUR_MS,
    attempt: int = 1,
    trials: tuple[Trial, Trial] = (TRIAL, TRIAL),
) -> tuple[Release, Release]:
    """Offer 1.1.0 of both models as one group."""
    how = {"at_ms": at_ms, "attempt": attempt, "group": "sight", "rollout": "pair"}
    return (
        Release("1.1.0", one, trial=trials[0], **how),  # type: ignore[arg-type]
        Release("1.1.0", other, model="pitch", trial=trials[1], **how),  # type: ignore[arg-type]
    )


_BEFORE = (Release("1.0.0"), Release("1.0.0", model="pitch"))


def _row(
    name: str,
    ends_on: frozenset[str],
    *releases: Release,
    said: tuple[str, ...] = (),
    before: tuple[Release, ...] = _BEFORE,
    faults: Faults | None = None,
) -> Scenario:
    row = Scenario(name, (*before, *releases), ends_on=ends_on, said=frozenset(said), devices=6, settle_ms=3 * HOUR_MS)
    return row if faults is None else replace(row, faults=faults, settle_ms=30 * HOUR_MS)


TABLE = (
    _row("a group of two good models is confirmed together", NEW, *_pair(_GOOD, _GOOD)),
    _row(
        "a group of which one takes long waits for it",
        NEW,
        *_pair(_GOOD, Behaviour(fetch_ms=20 * MINUTE_MS)),
        said=("confirmed",),
    ),
    _row(
        "a group of which one has too little traffic is confirmed together, that one idle",
        NEW,
        *_pair(_GOOD, _GOOD, trials=(TRIAL, _IDLE)),
        said=("confirmed", "confirmed_idle"),
    ),
    _row(
        "a group of which one misses its golden vectors leaves both as they were",
        OLD,
        *_pair(_GOOD, _one(canary=reasons.GOLDEN_MISS)),
        said=("failed golden_miss", "failed group"),
    ),
    _row(
        "a group of which one is refused leaves both as they were",
        OLD,
        *_pair(_GOOD, Behaviour(resolve=reasons.NO_VARIANT)),
        said=("refused no_variant", "failed group"),
    ),
    _row(
        "a group of which one fails its requests goes back together",
        OLD,
        *_pair(_GOOD, _one(error_rate=0.8)),
        said=("returned health_errors", "returned group"),
    ),
    _row(
        "a group of which one does not load goes back together",
        OLD,
        *_pair(_GOOD, _one(load=reasons.LOAD_FAILED)),
        said=("returned load_failed", "returned group"),
    ),
    _row(
        "a group of which one crashes goes back together, and it is known which it was",
        OLD,
        *_pair(_GOOD, _one(crash_per_request=0.3)),
        said=("returned crash", "returned group"),
    ),
    _row(
        "a group of which one fails in place when it is idle goes back together",
        OLD,
        *_pair(_GOOD, _one(golden=False), trials=(TRIAL, _IDLE)),
        said=("returned health_golden", "returned group"),
    ),
    _row(
        "a group of which one never comes is given up",
        OLD,
        *_pair(_GOOD, Behaviour(fetch=reasons.NETWORK, retry_after_s=60.0)),
        said=("waiting network", "failed group"),
        faults=Faults(),
    ),
    _row(
        "a group of which one is withdrawn goes back together",
        OLD,
        *_pair(_GOOD, _GOOD, trials=(_IDLE, _IDLE)),
        Release("1.0.0", at_ms=HOUR_MS + 2 * MINUTE_MS, rollout="pair"),
        Release("1.0.0", model="pitch", at_ms=HOUR_MS + 2 * MINUTE_MS, rollout="pair"),
        said=("returned withdrawn",),
    ),
    _row(
        "a group of which one runs already needs only the other",
        NEW,
        *_pair(_GOOD, _GOOD),
        before=(*_BEFORE, Release("1.1.0", model="pitch", at_ms=HOUR_MS // 2)),
    ),
    _row("a first installation of a group comes whole", NEW, *_pair(_GOOD, _GOOD), before=()),
    _row(
        "a first installation of a group of which one fails leaves nothing",
        frozenset({""}),
        *_pair(_GOOD, _one(error_rate=0.8)),
        before=(),
        said=("returned health_errors", "returned group"),
    ),
    _row(
        "a group that failed is tried again as a whole under a new attempt",
        OLD,
        *_pair(_GOOD, _one(error_rate=0.8)),
        *_pair(_GOOD, _one(error_rate=0.8), at_ms=2 * HOUR_MS, attempt=2),
        said=("returned health_errors", "returned group"),
    ),
    _row(
        "a good group stays whole through crashes and a rough network",
        NEW | OLD | NOTHING,
        *_pair(_GOOD, _GOOD),
        said=("confirmed",),
        faults=MODERATE,
    ),
    _row(
        "a bad group stays whole through crashes and a rough network",
        OLD | NOTHING,
        *_pair(_GOOD, _one(error_rate=0.8)),
        faults=MODERATE,
    ),
)
