"""A mergeable quantile sketch with a stated relative error: DDSketch.

Masson, Rim, Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019.
Values fall into logarithmic bins of ratio gamma = (1 + a) / (1 - a); any quantile is returned within a relative error
a = `RELATIVE_ERROR`. When more than `BINS_MAX` bins are in use the lowest ones are merged, so that upper quantiles keep
the guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RELATIVE_ERROR = 0.01
BINS_MAX = 512
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
LOG_GAMMA = math.log(_GAMMA)
"""A value v is in bin ⌈ln v / LOG_GAMMA⌉."""
VALUE_MIN = 1e-9
"""Below this a value counts as zero."""


class Sketch:
    """Counts of non-negative values (latencies in microseconds, sizes) in logarithmic bins."""

    __slots__ = ("bins", "count", "total", "zeros")

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}
        self.zeros = 0
        self.count = 0
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value` (≥ 0, finite)."""
        if value < VALUE_MIN:
            self.zeros += times
        else:
            index = math.ceil(math.log(value) / LOG_GAMMA)
            self.bins[index] = self.bins.get(index, 0) + times
            if len(self.bins) > BINS_MAX:
                self._collapse()
        self.count += times
        self.total += value * times

    def merge(self, other: Sketch) -> None:
        """Take over the counts of `other`."""
        for index, times in other.bins.items():
            self.bins[index] = self.bins.get(index, 0) + times
        while len(self.bins) > BINS_MAX:
            self._collapse()
        self.zeros += other.zeros
        self.count += other.count
        self.total += other.total

    def quantile(self, q: float) -> float | None:
        """Return the value at rank `q` in [0, 1] within `RELATIVE_ERROR`; None without data."""
        if self.count == 0:
            return None
        rank = q * (self.count - 1)
        seen = self.zeros
        if rank < seen:
            return 0.0
        last = 0.0
        for index in sorted(self.bins):
            seen += self.bins[index]
            last = 2 * _GAMMA**index / (_GAMMA + 1)
            if rank < seen:
                return last
        return last

    @property
    def mean(self) -> float | None:
        """Return the exact mean, None without data."""
        return self.total / self.count if self.count else None

    def to_wire(self) -> dict[str, int]:
        """Return the bins keyed by decimal index, zeros under `z`."""
        wire = {str(index): times for index, times in sorted(self.bins.items())}
        if self.zeros:
            wire["z"] = self.zeros
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, int]) -> Sketch:
        """Rebuild a sketch; the total is estimated from the bins.

        Raises:
            ValueError: a key is not an integer, or a count is negative.
        """
        sketch = cls()
        for key, times in wire.items():
            if times < 0:
                raise ValueError(f"negative count in bin {key!r}")
            if key == "z":
                sketch.zeros += times
            else:
                index = int(key)
                if abs(index) > 1_000_000:
                    raise ValueError(f"bin {key!r} is out of range")
                sketch.bins[index] = sketch.bins.get(index, 0) + times
                sketch.total += times * 2 * _GAMMA**index / (_GAMMA + 1) if index < 30_000 else 0.0
            sketch.count += times
        while len(sketch.bins) > BINS_MAX:
            sketch._collapse()
        return sketch

    def _collapse(self) -> None:
        first, second = sorted(self.bins)[:2]
        self.bins[second] += self.bins.pop(first)


def since(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """Return, on the wire, what a sketch counted between two looks at it.

    Bins that are gone were merged into the lowest that is left (`BINS_MAX`): what they held then is not new now.
    """
    merged = sum(times for key, times in before.items() if key not in now)
    lowest = str(min((int(key) for key in now if key != "z"), default=""))
    found = {}
    for key, times in now.items():
        left = times - before.get(key, 0) - (merged if key == lowest else 0)
        if left < 0:  # of another sketch: all of it is new
            left = times
        if left:
            found[key] = left
    return found
