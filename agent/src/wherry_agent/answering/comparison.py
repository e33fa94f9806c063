"""Whether two versions gave the same answer to one request, and how far apart their answers are.

What an application reads off a classifier is its top class, so where outputs have labels, the top class of every row has to
be the same; numbers without labels have to be close, all of them, and text the same. A state is compared by what
it leads to. The distance is the largest difference over the range of the incumbent's values, so that it means the same
for probabilities and for pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.engines.session import Array

AGREEMENT_RTOL = 0.02
AGREEMENT_ATOL_OF_RANGE = 0.02
"""Values a (incumbent) and b are close where |a - b| <= AGREEMENT_ATOL_OF_RANGE * range + AGREEMENT_RTOL * |a|."""
DISTANCE_MAX = 1e6
"""Larger distances, and those to NaN or Inf, are counted as this."""


class Comparison(NamedTuple):
    """Of one request."""

    agreed: bool
    distance: float | None
    """None where no output could be compared in numbers."""


def compare(interface: Interface, incumbent: Mapping[str, Array], other: Mapping[str, Array]) -> Comparison:
    """Compare the outputs that both answers hold, by the interface of the incumbent."""
    state = {pair.output for pair in interface.state}
    specs = [
        spec for spec in interface.outputs if spec.name in incumbent and spec.name in other and spec.name not in state
    ]
    labelled = [spec for spec in specs if spec.labels]
    agreed = all(_same(spec, incumbent[spec.name], other[spec.name]) for spec in labelled or specs)
    distances = [
        distance for spec in specs if (distance := _distance(incumbent[spec.name], other[spec.name])) is not None
    ]
    return Comparison(agreed, max(distances, default=None))


def _same(spec: TensorSpec, a: Array, b: Array) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind not in "fiu":
        return bool(np.array_equal(a, b))
    if a.size and spec.labels:
        return bool((a.argmax(axis=-1) == b.argmax(axis=-1)).all())
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    return bool(np.allclose(b, a, rtol=AGREEMENT_RTOL, atol=AGREEMENT_ATOL_OF_RANGE * _range(a), equal_nan=True))


def _distance(a: Array, b: Array) -> float | None:
    if a.shape != b.shape or a.dtype.kind not in "fiu" or not a.size:
        return None
    with np.errstate(all="ignore"):
        largest = float(np.nanmax(np.abs(a.astype(np.float64) - b)) / _range(a))
    return min(largest, DISTANCE_MAX) if np.isfinite(largest) else DISTANCE_MAX


def _range(values: Array) -> float:
    """Return the range of the values; of equal ones their magnitude, of zeros 1."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 1.0
    low, high = float(finite.min()), float(finite.max())
    return (high - low) or abs(high) or 1.0
