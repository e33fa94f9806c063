"""Shared memory that clients registered: large tensors are named in a request instead of being sent.

A region is a file under /dev/shm, made by the client (the system shared memory extension). Three things a client could
do to others are taken from it. It cannot borrow this process's rights: it registers only files of its own user (or such
as everybody may read and write), and nobody else may use its region. It cannot crash the worker: reading a mapping
beyond the end of a file that was shortened kills the process, so a region is mapped only if its owner could kill this
process anyway, and is copied by `pread` otherwise; sizes are looked up again before each use. And it cannot fill the
table: regions are bounded in number and bytes, of each user and of all. docs/adr/0009 has the figures.

A region ends with its file: a descriptor that is kept would hold the memory of one that its client has removed.

With a ledger regions outlive the worker: one that is not known here is looked up there when a request names it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass

from wherry_agent.serving.buffers import Buffer
from wherry_agent.serving.ledger import Entry, Ledger
from wherry_agent.serving.peers import may_use
from wherry_shared.engines.errors import BadInput

log = logging.getLogger(__name__)

FOLDER = "/dev/shm"  # noqa: S108 - where POSIX shared memory lives, by name
REGIONS_MAX = 128
USER_REGIONS_MAX = 64
REGION_BYTES_MAX = 1 << 30
USER_REGIONS_BYTES_MAX = 2 << 30
ALL_REGIONS_BYTES_MAX = 4 << 30
"""Of address space and of the files' own memory; nothing is allocated here."""
NAME_CHARS_MAX = 255
OPENED_FIRST = (
    "; clients make their files for their own user alone: run client and agent as one user, or let the agent's user read"
    " and write this one first (setfacl -m u:wherry:rw FILE, or chmod)"
)
"""In the message, since clients are told nothing else."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One registered region; its descriptor is closed when the last request that uses it is over."""

    name: str
    key: str
    offset: int
    byte_size: int
    user: int
    file: _File
    mapping: mmap.mmap | None
    """The file from its start to the region's end; None where its tensors are copied."""

    @property
    def end(self) -> int:
        """How much of its file it keeps in memory."""
        return self.offset + self.byte_size

    @property
    def entry(self) -> Entry:
        """The region as the ledger has it."""
        return Entry(self.name, self.key, self.offset, self.byte_size, self.user)

    def is_removed(self) -> bool:
        """Tell whether its client removed the file, which lives on only by this descriptor."""
        return os.fstat(self.file.descriptor).st_nlink == 0

    def read(self, offset: int, byte_size: int, take: Callable[[int], Buffer]) -> tuple[memoryview, bool]:
        """Return bytes of the region, and whether the client can still change them.

        Args:
            offset: within the region.
            byte_size: of the tensor.
            take: gives a buffer for what has to be copied.

        Raises:
            BadInput: they lie outside of the region, or of its file.
        """
        start = self._start(offset, byte_size)
        if self.mapping is not None:
            return memoryview(self.mapping)[start : start + byte_size], True
        data = take(byte_size).data[:byte_size]
        filled = 0
        while filled < byte_size:
            count = os.preadv(self.file.descriptor, [data[filled:]], start + filled)
            if not count:
                raise BadInput(f"shared memory region {self.name!r} became shorter while it was read")
            filled += count
        return data, False

    def write(self, offset: int, room: int, data: bytes | memoryview) -> None:
        """Write an output into the region.

        Raises:
            BadInput: it does not fit.
        """
        if len(data) > room:
            raise BadInput(f"an output of {len(data)} bytes does not fit into {room} of region {self.name!r}")
        start = self._start(offset, len(data))
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self.file.descriptor, view, start)
                view, start = view[count:], start + count
        except OSError as error:
            raise BadInput(f"shared memory region {self.name!r} cannot be written: {error.strerror}") from error

    def _start(self, offset: int, byte_size: int) -> int:
        if offset < 0 or byte_size < 0 or offset + byte_size > self.byte_size:
            raise BadInput(
                f"{byte_size} bytes at {offset} are not within shared memory region {self.name!r} "
                f"of {self.byte_size} bytes"
            )
        if os.fstat(self.file.descriptor).st_size < self.offset + self.byte_size:
            raise BadInput(f"the file of shared memory region {self.name!r} is shorter than it was registered")
        return self.offset + offset


class _File:
    """A descriptor that is closed with the last reference."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class Regions:
    """Registered regions by name, safe from threads."""

    def __init__(self, ledger: Ledger | None = None, folder: str = FOLDER) -> None:
        self._ledger = ledger
        self._folder = folder
        self._lock = threading.Lock()
        """Of the table."""
        self._changes = threading.RLock()
        """Held while table and ledger change together."""
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int, user: int | None) -> None:
        """Register a region for a client that runs as `user`.

        Raises:
            BadInput: with the reason.
        """
        with self._changes:
            self.reclaim()
            self._restore()
            entry = self._add(name, key, offset, byte_size, user).entry
            if self._ledger is not None:
                self._ledger.change(lambda entries: [*(one for one in entries if one.name != name), entry])

    def reclaim(self) -> None:
        """Forget regions whose files their clients removed; requests in flight keep what they use."""
        with self._changes:
            removed = [one for one in self._all() if one.is_removed()]
            with self._lock:
                for one in removed:
                    del self._regions[one.name]
            if removed:
                log.info("shared memory regions end with their files: %s", ", ".join(one.name for one in removed))
                self._strike({one.entry for one in removed})

    def _strike(self, gone: set[Entry]) -> None:
        if gone and self._ledger is not None:
            self._ledger.change(lambda entries: [one for one in entries if one not in gone])

    def _add(self, name: str, key: str, offset: int, byte_size: int, user: int | None) -> Region:
        if not name or len(name) > NAME_CHARS_MAX:
            raise BadInput(f"a region's name has 1 to {NAME_CHARS_MAX} characters")
        if offset < 0 or not 0 < byte_size <= REGION_BYTES_MAX or offset > REGION_BYTES_MAX:
            raise BadInput(f"a region has 1 to {REGION_BYTES_MAX} bytes at an offset of at most as many")
        if user is None:
            raise _unknown()
        file = _File(self._open(key))
        found = os.fstat(file.descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BadInput(f"{key[:80]!r} is no shared memory object")
        if not may_use(user, found.st_uid) and found.st_mode & 0o006 != 0o006:
            raise BadInput(f"{key[:80]!r} belongs to another user than the client's")
        if found.st_size < offset + byte_size:
            raise BadInput(f"{key[:80]!r} has {found.st_size} bytes, the region ends at {offset + byte_size}")
        mapping = None
        if found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022:
            mapping = _mapped(file.descriptor, offset + byte_size, key)
        region = Region(name, key, offset, byte_size, user, file, mapping)
        with self._lock:
            if name in self._regions:
                raise BadInput(f"shared memory region {name!r} is registered already: unregister it first")
            others = list(self._regions.values())
            own = [one for one in others if one.user == user]
            _check_room(region, own, "of one user", USER_REGIONS_MAX, USER_REGIONS_BYTES_MAX)
            _check_room(region, others, "of all users", REGIONS_MAX, ALL_REGIONS_BYTES_MAX)
            self._regions[name] = region
        return region

    def unregister(self, name: str, user: int | None) -> None:
        """Forget a region of the client (empty: all of its regions); one that is not there is no error.

        Raises:
            BadInput: who asks is not known.
        """
        if user is None:
            raise _unknown()
        with self._changes:
            self._restore()
            with self._lock:
                chosen = [
                    region
                    for region in self._regions.values()
                    if name in ("", region.name) and may_use(user, region.user)
                ]
                for one in chosen:
                    del self._regions[one.name]
            self._strike({one.entry for one in chosen})

    def status(self, name: str, user: int | None) -> list[dict[str, str | int]]:
        """Describe a region of the client (empty: all of its regions).

        Raises:
            BadInput: there is no such region.
        """
        if user is None:
            raise _unknown()
        self.reclaim()
        self._restore()
        chosen = [self.get(name, user)] if name else [one for one in self._all() if may_use(user, one.user)]
        return [{"name": one.name, "key": one.key, "offset": one.offset, "byte_size": one.byte_size} for one in chosen]

    def get(self, name: str, user: int | None) -> Region:
        """Return a region that the client may use.

        Raises:
            BadInput: there is no such region, or it is another user's.
        """
        if user is None:
            raise _unknown()
        region = self._regions.get(name)
        if region is not None and region.is_removed():
            self.reclaim()
            region = None
        if region is None and self._ledger is not None:
            self._restore()
            region = self._regions.get(name)
        if region is None or not may_use(user, region.user):
            raise BadInput(
                f"shared memory region {name[:80]!r} is not registered",
                next_step="register it again: regions end with the agent's process, and with their files (shm_unlink)",
            )
        return region

    def _restore(self) -> None:
        """Take over what other workers registered; what is no longer as it was is left out."""
        with self._changes:
            gone = set()
            for entry in self._ledger.read() if self._ledger is not None else []:
                if entry.name not in self._regions:
                    try:
                        self._add(entry.name, entry.key, entry.offset, entry.byte_size, entry.user)
                    except BadInput as error:
                        log.info("shared memory region %r is not taken over: %s", entry.name, error.message)
                        if not os.path.lexists(self._path(entry.key)):
                            gone.add(entry)
            self._strike(gone)

    def _all(self) -> list[Region]:
        with self._lock:
            return list(self._regions.values())

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key.removeprefix('/')}"

    def _open(self, key: str) -> int:
        name = key.removeprefix("/")
        if (
            not name
            or "/" in name
            or "\0" in name
            or name in (".", "..")
            or len(name.encode(errors="replace")) > NAME_CHARS_MAX
        ):
            raise BadInput(f"shared memory key {key[:80]!r} is not a name as shm_open takes it")
        path = self._path(key)
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            try:
                return os.open(path, os.O_RDWR | flags)
            except PermissionError:
                return os.open(path, os.O_RDONLY | flags)  # good enough for inputs
        except (OSError, UnicodeEncodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no such name"
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                why = "it is a link"
            if isinstance(error, PermissionError):
                why = f"{why}{OPENED_FIRST}"
            raise BadInput(f"shared memory key {key[:80]!r} cannot be opened by the agent: {why}") from error


def _mapped(descriptor: int, length: int, key: str) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ)
    except ValueError as error:
        raise BadInput(f"{key[:80]!r} became shorter than {length} bytes while it was registered") from error
    except OSError as error:
        raise BadInput(
            f"{length} bytes of {key[:80]!r} cannot be mapped: {error.strerror}",
            next_step="unregister regions that are not needed, or send the tensor in the request",
        ) from error


def _unknown() -> BadInput:
    return BadInput(
        "shared memory belongs to users of this device, and the system does not say whose client this is",
        next_step="ask over gRPC's port or HTTP, which tell; gRPC's unix socket does not",
    )


def _check_room(region: Region, others: list[Region], whose: str, count_max: int, bytes_max: int) -> None:
    if len(others) >= count_max or sum(one.end for one in others) + region.end > bytes_max:
        raise BadInput(f"no more than {count_max} regions, {bytes_max} bytes {whose}: unregister some")
