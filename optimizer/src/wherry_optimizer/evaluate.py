"""What a variant is worth on held-back data, and what it lost against its source: per sample, so paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_optimizer.data import Array, Dataset, Sample
from wherry_shared.bundle import Accuracy
from wherry_shared.errors import RefusedError

Run = Callable[[dict[str, Array]], dict[str, Array]]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    standard_error: float


def scores(run: Run, samples: Sequence[Sample], score: Callable[[Any, Any], float]) -> Scores:
    """Run every sample and score the answers, (samples,) float64; higher is better."""
    return np.array([score(run(sample.inputs), sample.label) for sample in samples], dtype=np.float64)


def estimate(values: Scores) -> Estimate:
    """Return mean and standard error of independent values.

    Raises:
        RefusedError: `data_short` with fewer than two.
    """
    if len(values) < 2:
        raise RefusedError(
            "data_short",
            f"{len(values)} evaluation samples: no standard error can be told",
            consequence="the gate cannot judge by them, so nothing was built",
            next_step="give more samples, or lower data.calibration of the recipe",
        )
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def compare(dataset: Dataset, own: Scores, source: Scores) -> Accuracy:
    """Return the accuracy of a variant, with its drop against the source model on the same samples."""
    mine, drop = estimate(own), estimate(source - own)
    return Accuracy(
        metric=dataset.metric,
        value=mine.value,
        standard_error=mine.standard_error,
        drop=drop.value,
        drop_standard_error=drop.standard_error,
        samples=len(own),
        data=dataset.description,
    )
