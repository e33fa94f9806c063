"""One stream of one device: which messages are new, what is lost, up to where it is stored without a gap. Pure.

A message says its own number and `first`, the oldest that the device still holds. What is below `first` and not here will
never come: it is counted lost and the stream moves on. The acknowledgement is the highest number up to which everything
is stored or lost, so a device may drop what it covers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from wherry_shared.errors import RefusedError

SEQ_MAX = (1 << 62) - 1
AHEAD_MAX = 10_000
"""Messages that may be stored above a gap; devices keep far fewer on the way (`limits.STREAM_IN_FLIGHT_MAX`)."""


@dataclass(slots=True)
class Position:
    """How far a stream is."""

    contiguous: int = 0
    highest: int = 0
    lost: int = 0
    opened_at: int = 0
    ahead: set[int] = field(default_factory=set)
    """Numbers above `contiguous` that are stored."""
    changed: bool = False

    def accept(self, seq: int, first: int) -> Literal["new", "repeated"]:
        """Take a message.

        Raises:
            RefusedError: `stream_invalid` (numbers that cannot be) or `stream_ahead` (too far above a gap).
        """
        if not 1 <= first <= seq <= SEQ_MAX:
            raise RefusedError("stream_invalid", f"message {seq} of a stream held from {first} cannot be")
        if first - 1 > self.contiguous:
            held = {number for number in self.ahead if number < first}
            self.lost += first - 1 - self.contiguous - len(held)
            self.ahead -= held
            self.contiguous = first - 1
            self.highest = max(self.highest, self.contiguous)
            self.changed = True
            self._close_up()
        if seq <= self.contiguous or seq in self.ahead:
            return "repeated"
        if seq - self.contiguous > AHEAD_MAX:
            raise RefusedError("stream_ahead", f"message {seq} is {seq - self.contiguous} above the last one in order")
        self.ahead.add(seq)
        self.highest = max(self.highest, seq)
        self.changed = True
        self._close_up()
        return "new"

    def _close_up(self) -> None:
        while self.contiguous + 1 in self.ahead:
            self.contiguous += 1
            self.ahead.discard(self.contiguous)
