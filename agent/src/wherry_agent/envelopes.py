"""Envelopes that claim to be offers, until the courier has said what they are. Pure but for the draws passed in.

Whoever can write to the broker can send any number of them, each with a higher serial than the last. So they wait side
by side, bounded: a newcomer takes the place of another newcomer at random, never of one that was looked at and waits to
be looked at again, and never of one that the server itself gave over HTTP. Couriers are started at a bounded rate; when
something has to be left out, the owner asks the server (`crowded`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

FROM_BROKER_MAX = 8
FROM_SERVER_MAX = 2
"""Envelopes that wait, by the way on which they came."""
STARTS_PER_MINUTE_MAX = 10
"""Couriers that are started for envelopes in a minute: each is a process of some 60 MB for a second."""
MINUTE_S = 60.0
WAIT_MIN_S = 5.0
WAIT_MAX_S = 3600.0

Number = tuple[int, int]
"""(epoch, serial), as the envelope claims."""


@dataclass(slots=True)
class _Waiting:
    """An envelope that was not looked at yet."""

    data: bytes
    number: Number
    from_server: bool
    tries: int = 0
    due_s: float = 0.0
    trouble: str = ""
    """Why it could not be verified when it was looked at last."""


class Envelopes:
    """What waits to be verified, and when the next one may be."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._starts: deque[float] = deque(maxlen=STARTS_PER_MINUTE_MAX)
        self._newcomer_next = True
        self._crowded = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, data: bytes, number: Number, draw: float, *, from_server: bool) -> None:
        """Let an envelope wait; the same bytes wait once.

        Args:
            data: its bytes.
            number: what it claims to be.
            draw: in [0, 1), decides which newcomer gives way where there is no room.
            from_server: it came over HTTP from the server, not from the broker.
        """
        known = next((item for item in self._waiting if item.data == data), None)
        if known is not None:
            known.from_server |= from_server
            return
        lane = [item for item in self._waiting if item.from_server == from_server]
        if len(lane) >= (FROM_SERVER_MAX if from_server else FROM_BROKER_MAX):
            self._crowded |= not from_server
            leaves = lane if from_server else [item for item in lane if not item.tries]
            if not leaves:
                return
            self._waiting.remove(leaves[0] if from_server else leaves[int(draw * len(leaves))])
        self._waiting.append(_Waiting(data, number, from_server))

    def take(self, now_s: float) -> bytes | None:
        """Return the envelope to verify now, and note the start; None if none is due or the rate is used up."""
        due = [item for item in self._waiting if item.due_s <= now_s]
        if not due:
            return None
        if self._rate_wait_s(now_s) > 0:
            self._crowded = True
            return None
        self._starts.append(now_s)
        newcomers = [item for item in due if not item.tries]
        again = [item for item in due if item.tries]
        # in turn: neither may a stream of new ones keep the others waiting, nor the other way round
        first = newcomers if (self._newcomer_next and newcomers) or not again else again
        self._newcomer_next = first is again
        # the longest here, whatever number it claims: who forges would claim the highest
        return next((item for item in first if item.from_server), first[0]).data

    def settle(self, data: bytes) -> None:
        """It is verified, or never will be: forget it."""
        self._waiting = [item for item in self._waiting if item.data != data]

    def again(self, data: bytes, now_s: float, after_s: float, trouble: str) -> None:
        """It could not be verified now, `trouble` says why: look again, ever more rarely, no sooner than in `after_s`."""
        for item in self._waiting:
            if item.data == data:
                wait_s = min(WAIT_MAX_S, max(after_s, WAIT_MIN_S * 2 ** min(item.tries, 16)))
                item.tries += 1
                item.due_s = now_s + wait_s
                item.trouble = trouble

    def accepted(self, number: Number) -> None:
        """An offer was accepted: what claims to be no newer is not worth a look."""
        self._waiting = [item for item in self._waiting if item.number > number]

    def troubles(self) -> list[str]:
        """Say which numbers could not be verified so far, and why."""
        return [f"{item.number[0]}.{item.number[1]}: {item.trouble}" for item in self._waiting if item.trouble]

    def crowded(self) -> bool:
        """Tell whether something was left out or held back since the last call."""
        was, self._crowded = self._crowded, False
        return was

    def next_s(self, now_s: float) -> float | None:
        """Return in how many seconds `take` may return something; None if nothing waits."""
        if not self._waiting:
            return None
        return max(0.0, self._rate_wait_s(now_s), min(item.due_s for item in self._waiting) - now_s)

    def _rate_wait_s(self, now_s: float) -> float:
        if len(self._starts) < STARTS_PER_MINUTE_MAX:
            return 0.0
        return self._starts[0] + MINUTE_S - now_s
