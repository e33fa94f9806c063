"""Registrations of shared memory that outlive the worker: the next one knows them, and clients notice nothing.

They are kept as JSON in a memfd of the supervisor, which every worker inherits; no disk is involved, and they end with
the agent. Each change is read, made and written under two locks: one of this process for its threads, and one of the
file for the two workers of a hand-over, since the kernel does not keep threads of one process apart. What a worker finds
here it checks again as if its client had just registered it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

log = logging.getLogger(__name__)

LEDGER_BYTES_MAX = 1 << 20
"""Beyond it nothing is read: no number of regions that is allowed needs as much."""


class Entry(msgspec.Struct, frozen=True):
    """What a client registered, and as whom."""

    name: str
    key: str
    offset: int
    byte_size: int
    user: int


_entries: msgspec.json.Decoder[list[Entry]] = msgspec.json.Decoder(list[Entry])


class Ledger:
    """Entries in a file that processes share."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def read(self) -> list[Entry]:
        """Return what is registered."""
        with self._locked():
            return self._read()

    def change(self, change: Callable[[list[Entry]], list[Entry]]) -> None:
        """Replace the entries by what `change` makes of them."""
        with self._locked():
            data = msgspec.json.encode(change(self._read()))
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))

    def _read(self) -> list[Entry]:
        data = os.pread(self._descriptor, LEDGER_BYTES_MAX, 0)
        try:
            return _entries.decode(data) if data else []
        except msgspec.DecodeError as error:
            log.warning("registrations of shared memory are lost: a worker died while it wrote them (%s)", error)
            return []

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
