"""Virtual time: an agenda of things that happen later, in one order that only the seed decides.

Two things due at the same instant come in the order in which they were put down, so a run is a function of its seed:
no thread, no wall clock, no hash order takes part.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """A heap of (virtual millisecond, order of entry, item). Time only moves by taking the next item."""

    __slots__ = ("_entered", "_heap", "now_ms")

    def __init__(self) -> None:
        self.now_ms = 0
        self._entered = 0
        self._heap: list[tuple[int, int, T]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, due_ms: int, item: T) -> None:
        """Put `item` down for `due_ms`; what lies in the past is due now."""
        self._entered += 1
        heapq.heappush(self._heap, (max(due_ms, self.now_ms), self._entered, item))

    def after(self, wait_ms: int, item: T) -> None:
        """Put `item` down for `wait_ms` from now."""
        self.at(self.now_ms + wait_ms, item)

    @property
    def due_ms(self) -> int | None:
        """When the next item is due; None when nothing is left."""
        return self._heap[0][0] if self._heap else None

    def take(self) -> T:
        """Move time to the next item and return it.

        Raises:
            IndexError: nothing is left.
        """
        self.now_ms, _, item = heapq.heappop(self._heap)
        return item
