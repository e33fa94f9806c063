"""The one seam for durable steps: journal, store and trust write through it, so that tests can cut the power anywhere.

A step is one operation whose effect may or may not have reached the disk when power goes. `Disk` calls its hook before
every step with the step's name and path; a test counts the steps of a run, then repeats the run once for each and
raises at that step. Every `OSError` becomes a `DeviceError`: `disk_full` or `disk`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

from wherry_shared.errors import DeviceError
from wherry_shared.reasons import DISK, DISK_FULL

Step = Literal["write", "fsync", "rename", "link", "fsync_folder", "unlink", "mkdir", "truncate"]
Hook = Callable[[Step, Path], None]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def _border(path: Path) -> Iterator[None]:
    """Turn what the system says into our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DeviceError(
                DISK_FULL,
                f"no space left for {path.name}",
                consequence="nothing was replaced; what is on disk stays valid",
                next_step="free space or raise the disk budget",
            ) from error
        raise DeviceError(DISK, f"{path.name}: {error.strerror or error}", next_step="check the disk") from error


class Part:
    """A file that grows at its end; what was synced survives, the rest may be missing or torn after a power cut."""

    def __init__(self, path: Path, file: BinaryIO, hook: Hook | None) -> None:
        self.path = path
        self._file = file
        self._hook = hook

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
            DeviceError: `disk_full` or `disk`.
        """
        if self._hook is not None:
            self._hook("write", self.path)
        with _border(self.path):
            self._file.write(data)

    def sync(self) -> None:
        """Make everything written so far durable.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        if self._hook is not None:
            self._hook("fsync", self.path)
        with _border(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


class Disk:
    """Durable operations on files; stateless but for the hook."""

    def __init__(self, hook: Hook | None = None) -> None:
        self._hook = hook

    def _step(self, step: Step, path: Path) -> None:
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
            DeviceError: `disk_full` or `disk`; then the old file is untouched.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with _border(path):
                self._step("write", temporary)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    self._step("fsync", temporary)
                    os.fsync(file.fileno())
                self._step("rename", path)
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
            DeviceError: `disk_full` or `disk`.
        """
        temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
        with _border(copy):
            if not path.exists():
                return
            self._step("link", copy)
            temporary.unlink(missing_ok=True)
            os.link(path, temporary)
            temporary.replace(copy)

    def open_part(self, path: Path, *, keep_bytes: int | None = None, mode: int = 0o600) -> Part:
        """Open a file to append to it, made if absent; with `keep_bytes` everything after them is cut off first.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        with _border(path):
            made = not path.exists()
            if made or keep_bytes is not None:
                self._step("truncate", path)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
            file = os.fdopen(descriptor, "r+b")
            if keep_bytes is not None:
                file.truncate(keep_bytes)
            file.seek(0, os.SEEK_END)
        if made:
            self.sync_folder(path.parent)
        return Part(path, file, self._hook)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or folder that is durable itself, and make the move durable.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        with _border(target):
            self._step("rename", target)
            source.replace(target)
        self.sync_folder(target.parent)
        if source.parent != target.parent:
            self.sync_folder(source.parent)

    def unlink(self, path: Path) -> None:
        """Remove a file; absent is fine. Not synced: a file that comes back after a power cut is removed again.

        Raises:
            DeviceError: `disk`.
        """
        with _border(path):
            self._step("unlink", path)
            path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it; absent is fine.

        Raises:
            DeviceError: `disk`.
        """
        with _border(path):
            self._step("unlink", path)
            if path.exists():
                shutil.rmtree(path)

    def mkdir(self, path: Path, *, mode: int = 0o700) -> None:
        """Make a folder and its parents durable; there already is fine.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            with _border(folder):
                self._step("mkdir", folder)
                folder.mkdir(mode=mode, exist_ok=True)
            self.sync_folder(folder.parent)

    def sync_file(self, path: Path) -> None:
        """Make the bytes of a file durable that something else wrote (python-tuf, tarfile).

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        with _border(path):
            self._step("fsync", path)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        with _border(path):
            self._step("fsync_folder", path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sweep(self, folder: Path) -> None:
        """Remove what interrupted `write_atomic` calls left in a folder; call at start, before anything writes there.

        Raises:
            DeviceError: `disk`.
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
            return shutil.disk_usage(path).free
