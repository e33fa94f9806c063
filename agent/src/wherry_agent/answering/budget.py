"""A bucket of CPU seconds, filled at a share of one core: what a shadow may use of the device it is a guest on.

Nobody knows what a run will take, so a run may begin while the bucket is not empty and pays afterwards, into debt if it
must. Over any stretch of time the runs that began in it took at most `share` of it, one full bucket, and one run more.
"""

from __future__ import annotations

BURST_SECONDS = 2.0
"""The bucket holds what `share` gives in so much time."""


class CpuBudget:
    """The bucket; times are seconds of one monotonic clock. Not safe from threads."""

    def __init__(self, share: float, now_s: float) -> None:
        self._share = share
        self._level_s = share * BURST_SECONDS
        self._at_s = now_s

    def retune(self, share: float, now_s: float) -> None:
        """Change the share; what was saved up to now beyond the new bucket is lost, debt stays."""
        self._fill(now_s)
        self._share = share
        self._fill(now_s)

    def allows(self, now_s: float) -> bool:
        """Tell whether a run may begin."""
        self._fill(now_s)
        return self._level_s > 0

    def pay(self, cpu_s: float, now_s: float) -> None:
        """Take out what a run used."""
        self._fill(now_s)
        self._level_s -= cpu_s

    def _fill(self, now_s: float) -> None:
        self._level_s = min(self._level_s + self._share * (now_s - self._at_s), self._share * BURST_SECONDS)
        self._at_s = now_s
