"""A token bucket: how long to pause so that bytes come no faster than allowed. Pure; time comes in."""

from __future__ import annotations

BURST_S = 1.0
"""What may come at once: as much as is allowed in this time."""

PIECES_PER_S = 4


class Bucket:
    """Holds what may be taken now; taking more makes a debt, and the pause that pays it."""

    def __init__(self, bytes_per_s: int, now_s: float) -> None:
        self._rate = bytes_per_s
        self._held = self._rate * BURST_S
        self._filled_s = now_s

    def piece(self, bytes_max: int) -> int:
        """Return how much to ask for at a time, so that pauses are short."""
        return bytes_max if self._rate <= 0 else max(1, min(bytes_max, self._rate // PIECES_PER_S))

    def take(self, count: int, now_s: float) -> float:
        """Take `count` bytes; return how long to pause before the next."""
        if self._rate <= 0:
            return 0.0
        earned = max(0.0, now_s - self._filled_s) * self._rate
        self._held = min(self._rate * BURST_S, self._held + earned) - count
        self._filled_s = now_s
        return max(0.0, -self._held / self._rate)
