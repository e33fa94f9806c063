"""The run gate: as many engine calls at once as there are cores, whatever the number of connections.

Without it eight connections on two cores are slower and need twice the memory. Time spent waiting here is recorded
apart, since it says how busy the device is, not how fast the model is.
"""

from __future__ import annotations

import os
import threading
import time
from queue import Empty, SimpleQueue
from types import TracebackType


def cores() -> int:
    """Return the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


class RunGate:
    """A semaphore of cores, as a queue of permits: `threading.Semaphore` takes 3 µs a turn, half a small model."""

    def __init__(self, permits: int | None = None) -> None:
        self.permits = permits or cores()
        self._permits: SimpleQueue[None] = SimpleQueue()
        for _ in range(self.permits):
            self._permits.put(None)
        self._lock = threading.Lock()
        self._waiting = 0
        self.left = 0
        """Changes with every run that ends; no exact count."""

    @property
    def waiting(self) -> int:
        """How many callers wait for a permit now."""
        return self._waiting

    @property
    def free(self) -> bool:
        """Whether a caller would not have to wait."""
        return not self._permits.empty()

    def enter(self) -> int:
        """Wait for a permit; return the nanoseconds waited."""
        try:
            self._permits.get(block=False)
            return 0
        except Empty:
            started = time.perf_counter_ns()
        with self._lock:
            self._waiting += 1
        self._permits.get()
        with self._lock:
            self._waiting -= 1
        return time.perf_counter_ns() - started

    def leave(self) -> None:
        """Give the permit back."""
        self.left += 1
        self._permits.put(None)

    def __enter__(self) -> int:
        return self.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
