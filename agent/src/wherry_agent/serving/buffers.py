"""Receive buffers that are used again: a fresh one of a large tensor costs more in page faults than its transfer.

A buffer comes back only if nobody else holds any part of it: a candidate that overran its deadline, or a shadow that
runs after the answer, may still read the tensors of a request that is over.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
KEPT_BYTES_MAX = 16 * 1024 * 1024
"""All buffers that wait for their next use, together."""
SLACK = 4
"""A buffer serves requests down to this fraction of its size, so that small ones do not hold large ones."""
_SOLE = 2
"""References to a buffer that nobody else holds: the argument of `give`, and the count's own."""

Buffer = npt.NDArray[np.uint8]


def fresh(length: int) -> Buffer:
    """Return a buffer that is used once."""
    return np.empty(length, np.uint8)


class Buffers:
    """A bounded stock of buffers, safe from threads."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._lock = threading.Lock()
        self._stock: list[Buffer] = []
        self.kept_bytes = 0

    def take(self, length: int) -> Buffer:
        """Return a buffer of at least `length` bytes, with anything in it."""
        with self._lock:
            for index in range(len(self._stock) - 1, -1, -1):
                if length <= self._stock[index].size <= length * SLACK:
                    buffer = self._stock.pop(index)
                    self.kept_bytes -= buffer.size
                    return buffer
        return fresh(length)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back, unless something else still holds it, a variable of the caller included."""
        if sys.getrefcount(buffer) > _SOLE:
            return
        with self._lock:
            if self.kept_bytes + buffer.size <= self._kept_bytes_max:
                self._stock.append(buffer)
                self.kept_bytes += buffer.size

    def clear(self) -> None:
        """Let go of what waits for its next use."""
        with self._lock:
            self._stock.clear()
            self.kept_bytes = 0


def aligned_start(buffer: Buffer, before: int) -> int:
    """Return where to begin in a buffer so that what comes `before` bytes later is aligned; less than `ALIGNMENT`."""
    return -(buffer.ctypes.data + before) % ALIGNMENT
