"""Which messages of a numbered stream to send now: at most 20 on the way, each sent again until it is acknowledged.

Sending again backs off per message and starts anew at each connection, since what was on the way may be lost with the
old one. Pure but for the jitter, which the owner passes in.
"""

from __future__ import annotations

from collections.abc import Iterable

from wherry_shared.limits import STREAM_IN_FLIGHT_MAX

RESEND_MIN_S = 5.0
RESEND_MAX_S = 120.0


class Outbox:
    """When which number was sent, and how often."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[float, int]] = {}
        """Number → (when it may be sent again, times sent)."""

    def forget(self) -> None:
        """A new connection: everything may be sent again."""
        self._sent.clear()

    def due(self, held: Iterable[int], now_s: float, jitter: float) -> list[int]:
        """Return the numbers to send now, oldest first, and note them as sent.

        Args:
            held: numbers that are not acknowledged, ascending.
            now_s: monotonic seconds.
            jitter: in [0, 1), spreads the next attempt over half of its wait.
        """
        window = [number for _, number in zip(range(STREAM_IN_FLIGHT_MAX), held, strict=False)]
        self._sent = {number: self._sent[number] for number in window if number in self._sent}
        found = []
        for number in window:
            again_s, times = self._sent.get(number, (0.0, 0))
            if times and now_s < again_s:
                continue
            wait_s = min(RESEND_MAX_S, RESEND_MIN_S * 2**times)
            self._sent[number] = (now_s + wait_s * (1 + jitter / 2), times + 1)
            found.append(number)
        return found

    def next_s(self, now_s: float) -> float | None:
        """Return in how many seconds something is due again; None if nothing is on the way."""
        return max(0.0, min(again_s for again_s, _ in self._sent.values()) - now_s) if self._sent else None
