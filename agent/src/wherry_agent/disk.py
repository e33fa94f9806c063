"""The one seam for durable steps: journal, store and trust write through it, so that tests can cut the power anywhere.

A step is one operation whose effect may or may not have reached the disk when power goes. `Disk.step` is called before
every one of them with what it is about to do; a test counts the steps of a run, then repeats the run once for each and
ends the process there, or lets a model of a disk keep only what was synced (`wherry_simulators.disk`). Every `OSError`
becomes a `DeviceError`: `disk_full`, `read_only` or `disk`.

What does not go through here holds no state that a power cut may not take: the telemetry buffer (SQLite, loses whole
windows), sockets and locks below `run/` and `trust/.lock`, permissions for the handle group (set again at every start),
and the scratch folder that python-tuf works in until it is synced and renamed. `tests/agent/test_strace.py` holds it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

from wherry_agent.sealing import Seal
from wherry_shared.errors import DeviceError
from wherry_shared.reasons import DISK, DISK_FULL, READ_ONLY

Step = Literal["create", "write", "fsync", "rename", "link", "fsync_folder", "unlink", "mkdir", "rmdir", "truncate"]
Hook = Callable[[Step, Path], None]

STEPS = "WHERRY_DISK_STEPS"
"""Environment variable for fault injection, read by `disk_of` once per process and set by tests only:
`record:FILE` appends a line per step to FILE, `kill:ROLE:N` ends a process of that role with SIGKILL before its step N."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})


def device_error(error: OSError, what: str) -> DeviceError:
    """Return what trouble with the disk is called here: `disk_full`, `read_only` or `disk`."""
    if error.errno in _FULL:
        return DeviceError(
            DISK_FULL,
            f"no space left for {what}",
            consequence="nothing was replaced; what is on disk stays valid",
            next_step="free space or raise the disk budget",
        )
    if error.errno == errno.EROFS:
        return DeviceError(
            READ_ONLY,
            f"{what}: the disk takes no writes",
            consequence="what is installed serves on; nothing is installed, and nothing new is remembered",
            next_step="see why it was mounted read-only: most often the disk is failing",
        )
    if error.errno in _FORBIDDEN:
        return DeviceError(
            DISK,
            f"{error.filename or what}: {error.strerror}",
            next_step="let the agent's user write there, or name another --home",
        )
    return DeviceError(DISK, f"{what}: {error.strerror or error}", next_step="check the disk")


@contextlib.contextmanager
def _border(path: Path) -> Iterator[None]:
    """Turn what the system says into our errors."""
    try:
        yield
    except OSError as error:
        raise device_error(error, path.name) from error


class Part:
    """A file that grows at its end; what was synced survives, the rest may be missing or torn after a power cut."""

    def __init__(self, path: Path, file: BinaryIO, disk: Disk) -> None:
        self.path = path
        self._file = file
        self._disk = disk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # closing after an error: the error itself is on its way already
            self._file.close()

    @property
    def size(self) -> int:
        """Bytes in the file now."""
        return self._file.tell()

    def write(self, data: bytes) -> None:
        """Append `data`.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        with _border(self.path):
            self._disk.step("write", self.path, data=data)
            self._file.write(data)

    def sync(self) -> None:
        """Make everything written so far durable.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        with _border(self.path):
            self._disk.step("fsync", self.path)
            self._file.flush()
            os.fsync(self._file.fileno())


class Disk:
    """Durable operations on files; stateless but for the hook and the seal."""

    def __init__(self, hook: Hook | None = None, seal: Seal | None = None) -> None:
        self._hook = hook
        self.seal = seal
        """What seals the records that are worth it (`wherry_agent.sealing`); None: no key is set."""

    def step(
        self, step: Step, path: Path, *, source: Path | None = None, data: bytes | None = None, size: int = 0
    ) -> None:
        """Say what is about to be done; called before every step, and the place where tests end a run.

        Args:
            step: what it is.
            path: on which file or folder; for `rename` and `link` the new name.
            source: the old name, for `rename` and `link`.
            data: what `write` appends.
            size: what `truncate` leaves.
        """
        del source, data, size  # for those who take it down
        if self._hook is not None:
            self._hook(step, path)

    def read(self, path: Path) -> bytes | None:
        """Return the bytes of a file, None if there is none.

        Raises:
            DeviceError: `disk`.
        """
        try:
            with _border(path):
                return path.read_bytes()
        except DeviceError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def write_atomic(self, path: Path, data: bytes, *, mode: int = 0o600) -> None:
        """Replace a file: after a power cut it holds either the old bytes or all of the new ones.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`; then the old file is untouched.
        """
        temporary = _temporary(path)
        try:
            with _border(path):
                self.step("create", temporary)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
                with os.fdopen(descriptor, "wb") as file:
                    self.step("write", temporary, data=data)
                    file.write(data)
                    file.flush()
                    self.step("fsync", temporary)
                    os.fsync(file.fileno())
                self.step("rename", path, source=temporary)
                temporary.replace(path)
        except DeviceError:
            with contextlib.suppress(OSError):  # a leftover is swept at the next start; the first error counts
                temporary.unlink(missing_ok=True)
            raise
        self.sync_folder(path.parent)

    def keep(self, path: Path, copy: Path) -> None:
        """Let `copy` name what `path` holds now, so that it outlives the next `write_atomic`; absent is fine.

        Not synced: whoever reads the copy must be able to tell a torn one.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        temporary = _temporary(copy)
        with _border(copy):
            if not path.exists():
                return
            if temporary.exists():
                self.step("unlink", temporary)
                temporary.unlink(missing_ok=True)
            self.step("link", temporary, source=path)
            os.link(path, temporary)
            self.step("rename", copy, source=temporary)
            temporary.replace(copy)

    def open_part(self, path: Path, *, keep_bytes: int | None = None, mode: int = 0o600) -> Part:
        """Open a file to append to it, made if absent; with `keep_bytes` everything after them is cut off first.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        with _border(path):
            made = not path.exists()
            if made:
                self.step("create", path)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
            file = os.fdopen(descriptor, "r+b")
            if keep_bytes is not None and not made:
                self.step("truncate", path, size=keep_bytes)
                file.truncate(keep_bytes)
            file.seek(0, os.SEEK_END)
        if made:
            self.sync_folder(path.parent)
        return Part(path, file, self)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or folder that is durable itself, and make the move durable.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        with _border(target):
            self.step("rename", target, source=source)
            source.replace(target)
        self.sync_folder(target.parent)
        if source.parent != target.parent:
            self.sync_folder(source.parent)

    def unlink(self, path: Path) -> None:
        """Remove a file; absent is fine. Not synced: a file that comes back after a power cut is removed again.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        with _border(path):
            if path.exists() or path.is_symlink():
                self.step("unlink", path)
                path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it; absent is fine. Not synced, and a cut leaves some of it.

        Whoever believes a folder because of a file in it removes that file first, and syncs.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        with _border(path):
            if not path.is_dir() or path.is_symlink():
                self.unlink(path)
                return
            for item in sorted(path.iterdir()):
                self.remove_tree(item)
            self.step("rmdir", path)
            path.rmdir()

    def mkdir(self, path: Path, *, mode: int = 0o700) -> None:
        """Make a folder and its parents durable; there already is fine.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            with _border(folder):
                self.step("mkdir", folder)
                folder.mkdir(mode=mode, exist_ok=True)
            self.sync_folder(folder.parent)

    def sync_file(self, path: Path) -> None:
        """Make the bytes of a file durable that something else wrote (python-tuf).

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        with _border(path):
            self.step("fsync", path)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        with _border(path):
            self.step("fsync_folder", path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sweep(self, folder: Path) -> None:
        """Remove what interrupted `write_atomic` calls left in a folder; call at start, before anything writes there.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        with _border(folder):
            leftovers = list(folder.glob(".*.tmp"))
        for path in leftovers:
            self.unlink(path)

    def free_bytes(self, path: Path) -> int:
        """Return how much an unprivileged process may still write on the disk that holds `path`.

        Raises:
            DeviceError: `disk`.
        """
        with _border(path):
            found = os.statvfs(path)  # shutil.disk_usage says the same and brings three compressors with it
            return found.f_bavail * found.f_frsize


def _temporary(path: Path) -> Path:
    pid = os.getpid()
    return path.with_name(f".{path.name}.{pid}-{_began(pid)}.tmp")


def is_being_written(path: Path) -> bool:
    """Tell whether a file is what another living process is about to give its name (`write_atomic`).

    Its name holds the process number and when that process began, since numbers are given again, after a restart of the
    machine above all.
    """
    process, _, suffix = path.name.rpartition(".")
    pid, _, began = process.rpartition(".")[2].partition("-")
    if suffix != "tmp" or not path.name.startswith(".") or not pid.isdigit():
        return False
    return int(pid) != os.getpid() and began != "" and _began(int(pid)) == began


def _began(pid: int) -> str:
    """Return when a process began, in ticks since the machine did; nothing of one that has ended, awaited or not."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = said.rpartition(")")[2].split()  # from the third on: proc_pid_stat(5)
    return "" if fields[0] in ("Z", "X") else fields[19]


def disk_of(role: str, seal: Seal | None = None) -> Disk:
    """Return the disk of a process of the agent (`supervisor`, `courier`); with `STEPS` set its steps are injected."""
    wish = os.environ.get(STEPS, "")
    return Disk(_injected(role, wish) if wish else None, seal)


def _injected(role: str, wish: str) -> Hook:
    """Return what the environment asks to happen at steps."""
    how, _, rest = wish.partition(":")
    if how == "record" and rest:
        lines = os.open(rest, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return lambda step, path: _record(lines, f"{role} {step} {path}\n")
    target, _, number = rest.partition(":")
    if how != "kill" or not target or not number.isdigit():
        raise RuntimeError(f"{STEPS} says record:FILE or kill:ROLE:N, not {wish[:80]!r}")
    left = int(number) if target == role else -1

    def count(_step: Step, _path: Path) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    return count


def _record(lines: int, line: str) -> None:
    os.write(lines, line.encode())
