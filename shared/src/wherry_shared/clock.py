"""One fixed instant per decision: deciding code takes `Now` as an argument and never reads a clock.

Elapsed time is measured by the monotonic clock of one boot; dates (expiry) by wall time; the two are never mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Now:
    """An instant: which boot, milliseconds since that boot, seconds of wall time (UTC, since 1970)."""

    boot: str
    monotonic_ms: int
    wall_s: float

    @property
    def wall_us(self) -> int:
        """Wall time in whole microseconds UTC, as every table and message has it."""
        return round(self.wall_s * MICROSECONDS)


@dataclass(frozen=True, slots=True)
class Since:
    """The start of a wait. After a reboot the wait starts again, since monotonic time does not survive one."""

    boot: str
    monotonic_ms: int

    @classmethod
    def at(cls, now: Now) -> Since:
        """Start a wait at `now`."""
        return cls(now.boot, now.monotonic_ms)

    def elapsed_ms(self, now: Now) -> int:
        """Return milliseconds waited; 0 in another boot (the owner restarts and counts the wait)."""
        return max(0, now.monotonic_ms - self.monotonic_ms) if now.boot == self.boot else 0
