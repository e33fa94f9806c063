"""How much one token may ask: a bucket for reading and one for changing, each with a steady rate and a burst.

Buckets are of one process: n replicas let n times as much pass.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from wherry_shared.errors import UnreachableError

BURST_S = 5.0
"""A token that was quiet may ask at once what its rate gives in this time."""
TOKENS_MAX = 10_000
"""Tokens whose buckets are remembered; the longest quiet one goes first."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})


class TooManyError(UnreachableError):
    """A token asked too much; the same again succeeds after `retry_after_s`."""

    def __init__(self, name: str, per_s: float, retry_after_s: int) -> None:
        super().__init__(
            "rate_limited",
            f"this token asked more than {per_s:g} times a second ({name})",
            consequence="nothing was done",
            next_step=f"try again in {retry_after_s} s; the limit is {name} in settings.json",
        )
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Rates:
    """The buckets of one process."""

    def __init__(self, reads_per_s: float, changes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = {"api_reads_per_s": reads_per_s, "api_changes_per_s": changes_per_s}
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()

    def take(self, token: str, method: str) -> None:
        """Count one request.

        Raises:
            TooManyError: `rate_limited`.
        """
        name = "api_reads_per_s" if method in READING else "api_changes_per_s"
        per_s = self._limits[name]
        if not per_s:
            return
        now, most = self._clock(), max(1.0, per_s * BURST_S)
        bucket = self._buckets.setdefault((token, name), _Bucket(most, now))
        self._buckets.move_to_end((token, name))
        while len(self._buckets) > TOKENS_MAX:
            self._buckets.popitem(last=False)
        bucket.left, bucket.at = min(most, bucket.left + (now - bucket.at) * per_s), now
        if bucket.left < 1:
            raise TooManyError(name, per_s, max(1, round((1 - bucket.left) / per_s + 0.5)))
        bucket.left -= 1
