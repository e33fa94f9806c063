"""How much somebody may ask: a bucket for each token, session, device or address, with a steady rate and a burst.

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
KNOWN = "known"
"""In the state of a request: that its credential was good."""

WHO = {
    "api_reads_per_s": "this token",
    "api_changes_per_s": "this token",
    "device_requests_per_s": "this device",
    "public_per_s": "this address",
    "refused_per_s": "this address was refused: it",
}


class TooManyError(UnreachableError):
    """Somebody asked too much; the same again succeeds after `retry_after_s`."""

    def __init__(self, name: str, per_s: float, retry_after_s: int) -> None:
        super().__init__(
            "rate_limited",
            f"{WHO[name]} asked more than {per_s:g} times a second ({name})",
            consequence="nothing was done",
            next_step=f"try again in {retry_after_s} s; the limit is {name} in settings.json",
        )
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Rates:
    """The buckets of one process. A limit that is 0, or not given, is none."""

    def __init__(
        self,
        reads_per_s: float,
        changes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        **others: float,
    ) -> None:
        self._limits = {"api_reads_per_s": reads_per_s, "api_changes_per_s": changes_per_s, **others}
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()

    def take(self, token: str, method: str) -> None:
        """Count one request of somebody who is known.

        Raises:
            TooManyError: `rate_limited`.
        """
        self.count("api_reads_per_s" if method in READING else "api_changes_per_s", token)

    def count(self, name: str, who: str) -> None:
        """Count one request under a limit.

        Raises:
            TooManyError: `rate_limited`.
        """
        self.look(name, who)
        self.spend(name, who)

    def look(self, name: str, who: str) -> None:
        """Let pass who has something left under a limit, without counting.

        Raises:
            TooManyError: `rate_limited`.
        """
        per_s = self._limits.get(name, 0)
        if not per_s:
            return
        left = self._bucket(name, who, per_s).left
        if left < 1:
            raise TooManyError(name, per_s, max(1, round((1 - left) / per_s + 0.5)))

    def spend(self, name: str, who: str) -> None:
        """Count what was let pass."""
        per_s = self._limits.get(name, 0)
        if per_s:
            self._bucket(name, who, per_s).left -= 1

    def _bucket(self, name: str, who: str, per_s: float) -> _Bucket:
        now, most = self._clock(), max(1.0, per_s * BURST_S)
        bucket = self._buckets.setdefault((who, name), _Bucket(most, now))
        self._buckets.move_to_end((who, name))
        while len(self._buckets) > TOKENS_MAX:
            self._buckets.popitem(last=False)
        bucket.left, bucket.at = min(most, bucket.left + (now - bucket.at) * per_s), now
        return bucket
