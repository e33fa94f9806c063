"""What a worker runs at this moment, written where its death does not reach: in a page that the supervisor made.

Whoever enters an engine takes a slot, puts the mark of what it runs there, and clears it when it is back. That is two
stores and no system call, so every run can afford it. A worker that dies leaves the marks of the runs in which it was,
and the supervisor reads from them whose run it may have been; nobody else has to be blamed. Behind the slots is the
worker's pulse, by which it is known to live although it says nothing.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Mapping

from wherry_agent.children import Loadable, Ran

SLOTS = 512
"""Runs that can be told at once: as many as the run gate lets in, those left behind, and loads are always fewer."""
BEYOND = 0
"""The slot that says that there were more; then nothing that the page says excludes anybody."""
BEATS, HELD_MS = SLOTS, SLOTS + 1
"""Where the pulse is: a count that grows about once a second, and for how long no run ended although others waited."""
PAGE_BYTES = (SLOTS + 2) * 8


def mark_of(loadable: Loadable) -> int:
    """Return what stands for a version in a slot; never 0."""
    name = f"{loadable.model}/{loadable.manifest}/{loadable.variant}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1


def make_page() -> int:
    """Return the descriptor of a page without marks."""
    descriptor = os.memfd_create("wherry-in-flight")
    os.ftruncate(descriptor, PAGE_BYTES)
    return descriptor


def read_page(descriptor: int, known: Mapping[int, Ran]) -> tuple[Ran, ...]:
    """Return what the worker was running when it died; empty if it ran nothing, or more than the page holds.

    A mark that is not `known` is told too, under empty names: somebody ran, and it was none of the others.
    """
    slots = struct.unpack(f"{SLOTS}Q", os.pread(descriptor, SLOTS * 8, 0))
    if slots[BEYOND]:
        return ()
    return tuple(sorted({known.get(mark, Ran("", "", "")) for mark in slots if mark}))


def read_pulse(descriptor: int) -> tuple[int, int]:
    """Return (beats so far, milliseconds for which no run ended although others waited); no beats: it has no pulse."""
    beats, held_ms = struct.unpack("2Q", os.pread(descriptor, 16, BEATS * 8))
    return beats, held_ms


class Page:
    """The worker's side; its threads share it without a lock."""

    __slots__ = ("_free", "_slots")

    def __init__(self, descriptor: int | None = None) -> None:
        """Write into the page of `descriptor`; without one (in tests, in an application) for nobody to read."""
        memory = mmap.mmap(descriptor, PAGE_BYTES) if descriptor is not None else bytearray(PAGE_BYTES)
        self._slots = memoryview(memory).cast("Q")
        self._free = [slot for slot in range(SLOTS) if slot != BEYOND]

    def begin(self, mark: int) -> int:
        """Note that a run begins; return what `end` needs."""
        try:
            slot = self._free.pop()  # like `append`, indivisible
        except IndexError:
            self._slots[BEYOND] = mark
            return BEYOND
        self._slots[slot] = mark
        return slot

    def end(self, slot: int) -> None:
        """Note that the run is back."""
        if slot != BEYOND:
            self._slots[slot] = 0
            self._free.append(slot)

    def beat(self, held_ms: int) -> None:
        """Show that this process lives; `held_ms`: for how long no run ended although others waited."""
        self._slots[HELD_MS] = held_ms
        self._slots[BEATS] += 1


UNREAD = Page()
"""For whoever runs an engine in a process that no supervisor watches."""
