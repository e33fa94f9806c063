"""Whether a variant may be packed: its accuracy budget. Pure.

`hold` is the word on what a recipe or a search made, `confirm` on what is kept. Both guard against luck: they look at
the drop and at its interval (paired bootstrap: Efron and Tibshirani, "An introduction
to the bootstrap", 1993), at a floor of the metric itself, and at how far the outputs moved, since a metric on few samples
may stay where it was while the network has become another (seen: a sentence encoder at half its weights scored higher).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import Any

import numpy as np

from wherry_shared.errors import RefusedError

CONFIDENCE = 0.95
RESAMPLES = 1000
RESAMPLES_SLOW = 200
"""Resamples where the value is not a mean and each costs a whole evaluation."""
UPPER_FACTOR = 2.0
"""The upper end of the interval of a drop may be so many times the budget; the drop itself, once."""
CONFIRMATION_RISKS = (0.1, 0.05, 0.05)
"""Of each confirmation in turn, how probable it may be to let one through whose drop is at the limit. Their number is how
many a search has, and their sum is the risk of all of them together (Bonferroni; an order and shares that are fixed
beforehand: Wiens, "A fixed sequence Bonferroni procedure for testing multiple endpoints", 2003)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The word of the gate, and why."""

    passed: bool
    why: str
    by: str = ""
    """What kept it out: `no_number`, `drop`, `interval`, `floor` or `error`."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a candidate may cost."""

    drop_max: float
    floor: float | None = None
    error_max: float = 0.5
    """Largest distance of all outputs from those of the source (L2, as a share of theirs)."""
    upper_factor: float = UPPER_FACTOR

    def __post_init__(self) -> None:
        """Refuse a limit that nothing can exceed, since no comparison with NaN holds: such a gate would let all through.

        Raises:
            RefusedError: `budget_invalid`.
        """
        limits = {"what the metric may lose": self.drop_max, "how far outputs may move": self.error_max}
        wrong = [f"{name} is {value}" for name, value in limits.items() if not (isfinite(value) and value >= 0)]
        if self.floor is not None and not isfinite(self.floor):
            wrong.append(f"what the metric may not fall below is {self.floor}")
        if not self.upper_factor >= 0:
            wrong.append(f"the factor of the interval's upper end is {self.upper_factor}")
        if wrong:
            raise RefusedError(
                "budget_invalid",
                "; ".join(wrong),
                consequence="nothing could be judged by it, so nothing was tried",
                next_step="give finite numbers, the loss and the distance from zero on",
            )


@dataclass(frozen=True, slots=True)
class Drop:
    """How much lower a metric is than the source's on the same samples, with its interval (two-sided, `CONFIDENCE`)."""

    value: float
    source: float
    drop: float
    low: float
    high: float
    samples: int
    error: float = nan
    """Standard error of the drop."""
    value_error: float = nan
    """Standard error of the value."""


def compare(
    value: Callable[[Sequence[Any]], float],
    own: Sequence[Any],
    source: Sequence[Any],
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Drop:
    """Return the drop of a metric with its interval by resampling pairs.

    Args:
        value: of evidence, see `metrics.Metric`.
        own: evidence of the candidate, one entry per sample.
        source: that of the source on the same samples.
        seed: of the resampling.
        confidence: of the interval, two-sided.
    """
    before, after = value(source), value(own)
    rng = np.random.default_rng(seed)
    count = len(source)
    if all(isinstance(one, float) for one in (*own, *source)):
        gaps = np.asarray(source, dtype=np.float64) - np.asarray(own, dtype=np.float64)
        chosen = rng.integers(0, count, (RESAMPLES, count))
        drops = gaps[chosen].mean(axis=1)
        values = np.asarray(own, dtype=np.float64)[chosen].mean(axis=1)
    else:
        found = []
        for _ in range(RESAMPLES_SLOW):
            chosen = rng.integers(0, count, count)
            found.append((value([source[index] for index in chosen]), value([own[index] for index in chosen])))
        pairs = np.asarray(found)
        drops, values = pairs[:, 0] - pairs[:, 1], pairs[:, 1]
        known = np.isfinite(drops)  # a resample may hold one class only
        drops, values = drops[known], values[known]
    tail = (1 - confidence) / 2
    if not len(drops) or not isfinite(before) or not isfinite(after):
        return Drop(after, before, float("nan"), float("nan"), float("nan"), count)
    low, high = np.quantile(drops, [tail, 1 - tail])
    drop, stretch = before - after, _stretch(count, confidence)
    return Drop(
        after,
        before,
        drop,
        drop - (drop - float(low)) * stretch,
        drop + (float(high) - drop) * stretch,
        count,
        float(drops.std()),
        float(values.std()),
    )


def _stretch(count: int, confidence: float) -> float:
    """Return by how much an interval of percentiles is too narrow where samples are few.

    It is that of the normal distribution and of the uncorrected variance: Student's, and n − 1, make up for it (Hesterberg,
    "What teachers should know about the bootstrap", 2015).
    """
    from scipy.special import ndtri, stdtrit

    if count < 2:
        return inf
    tail = (1 + confidence) / 2
    return float(stdtrit(count - 1, tail) / ndtri(tail)) * sqrt(count / (count - 1))


def hold(drop: Drop, error: float, budget: Budget, metric: str) -> Verdict:
    """Judge a candidate; what is no number never passes."""
    measured = (
        f"{metric} {drop.value:.4f}, drop {drop.drop:.4f} [{drop.low:.4f}, {drop.high:.4f}] on {drop.samples} samples, "
        f"outputs moved by {error:.3f}"
    )
    if not all(isfinite(number) for number in (drop.drop, drop.high, error)):
        return Verdict(False, f"{measured}: no numbers to judge by", "no_number")
    if drop.drop > budget.drop_max:
        over = drop.drop - budget.drop_max
        return Verdict(False, f"{measured}: over its budget of {budget.drop_max:.4f} by {over:.4f}", "drop")
    limit = budget.drop_max * budget.upper_factor if isfinite(budget.upper_factor) else inf
    if drop.high > limit:
        why = f"{measured}: the drop may be as large as {drop.high:.4f}, beyond {limit:.4f} by {drop.high - limit:.4f}"
        return Verdict(False, why, "interval")
    if budget.floor is not None and drop.value < budget.floor:
        return Verdict(
            False, f"{measured}: below its floor of {budget.floor:.4f} by {budget.floor - drop.value:.4f}", "floor"
        )
    if error > budget.error_max:
        over = error - budget.error_max
        return Verdict(False, f"{measured}: outputs moved beyond {budget.error_max:.3f} by {over:.3f}", "error")
    return Verdict(True, f"{measured}, budget {budget.drop_max:.4f}")


def confirm(drop: Drop, error: float, budget: Budget, metric: str) -> Verdict:
    """Judge a candidate on samples that it was not chosen by, by the same rules as where it was.

    What is asked of it here is paid by the interval: `drop` has to be compared with `confidence_of` its confirmation, so
    that trying another where one is contradicted makes luck no more probable.
    """
    return hold(drop, error, budget, metric)


def confidence_of(number: int) -> float:
    """Return the confidence of the interval of a search's confirmation, counted from zero: its upper end errs as `CONFIRMATION_RISKS`."""
    return 1 - 2 * CONFIRMATION_RISKS[number]


def odds(drop: Drop, budget: Budget, samples: int) -> float:
    """Return how probable it is that a first confirmation on so many fresh samples passes, by the normal distribution.

    A drop below zero counts as none, since compressing seldom improves a network and what looks like it is mostly luck,
    unless the whole interval lies below.
    """
    from scipy.special import ndtr, ndtri

    width = (drop.high - drop.low) / (2 * float(ndtri((1 + CONFIDENCE) / 2)))
    if not isfinite(width):
        return 0.0
    fresh = width * sqrt(drop.samples / samples)
    room = min(budget.drop_max, budget.drop_max * budget.upper_factor - fresh * float(ndtri(1 - CONFIRMATION_RISKS[0])))
    gap = room - max(drop.drop, min(drop.high, 0.0))
    spread = sqrt(width**2 + fresh**2)
    return float(ndtr(gap / spread)) if spread else float(gap >= 0)
