"""Blobs in a folder of this machine, or of a disk that all roles share.

Writing goes through obstore, under a name of its own in `incoming/` until the hash fits; reading by `pread` in large
pieces, which costs a fifteenth of the CPU of streaming through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from wherry_server.blobs import (
    READ_CHUNK_BYTES,
    REFRESHED_S,
    WRITE_CHUNK_BYTES,
    Blobs,
    Stored,
    checked,
    damaged,
    digest_of,
    end_softly,
    key_of,
)
from wherry_shared.digest import check_digest
from wherry_shared.errors import DeviceError

WRITES_AT_ONCE = 2
"""An upload holds at most this many chunks in memory, and one."""
INCOMING = "incoming"


class FolderBlobs(Blobs):
    """A folder of blobs: `sha256/AB/ABCDEF…` by digest, `incoming/` while they arrive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)
        end_softly()
        self._store = LocalStore(folder, mkdir=True)

    def path(self, digest: str) -> Path:
        """Return where a blob is, or would be."""
        return self.folder / key_of(digest)

    async def stat(self, digest: str) -> Stored | None:
        """Return what is known of a blob, None if it is not here."""
        try:
            found = self.path(digest).stat()
        except FileNotFoundError:
            return None
        return Stored(digest, found.st_size, found.st_mtime)

    async def put(self, digest: str, chunks: AsyncIterable[bytes], *, length: int | None = None) -> bool:
        """Store a blob from a stream; what is here already is as new again."""
        check_digest(digest)
        found = await self.stat(digest)
        if found is not None:
            try:
                if time.time() - found.modified_s >= REFRESHED_S:
                    os.utime(self.path(digest))
            except OSError as error:
                raise _disk(error) from error
            return False
        incoming = f"{INCOMING}/{secrets.token_hex(16)}"
        try:
            await obstore.put_async(
                self._store,
                incoming,
                checked(digest, chunks, length),
                chunk_size=WRITE_CHUNK_BYTES,
                max_concurrency=WRITES_AT_ONCE,
            )
            return await self._adopt(incoming, digest)
        except (OSError, BaseError) as error:
            raise _disk(error) from error

    async def _adopt(self, incoming: str, digest: str) -> bool:
        await asyncio.to_thread(_sync, self.folder / incoming)
        try:
            await obstore.rename_async(self._store, incoming, key_of(digest), overwrite=False)
        except AlreadyExistsError:  # somebody else stored the same bytes meanwhile
            await obstore.delete_async(self._store, incoming)
            return False
        await asyncio.to_thread(_sync, self.path(digest).parent)
        return True

    async def read(self, digest: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Yield the bytes [start, stop) of a blob that is here, a bounded piece at a time."""
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise damaged(digest, f"is not in {self.where} any more") from error
        try:
            while start < stop:
                piece = await asyncio.to_thread(os.pread, descriptor, min(READ_CHUNK_BYTES, stop - start), start)
                if not piece:  # cannot be: blobs never shrink
                    raise damaged(digest, "ends before its length")
                start += len(piece)
                yield piece
        finally:
            os.close(descriptor)

    async def delete(self, digest: str) -> None:
        """Have a blob here no more."""
        try:
            self.path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise _disk(error) from error

    async def listed(self) -> AsyncIterator[Stored]:
        """Yield everything that is here."""
        for path in self.folder.glob("sha256/??/*"):
            digest = digest_of(path.relative_to(self.folder).as_posix())
            found = await self.stat(digest) if digest is not None else None
            if found is not None:
                yield found

    @contextlib.asynccontextmanager
    async def local(self, digest: str, size: int) -> AsyncIterator[Path]:  # noqa: ARG002  # it takes no room
        """Give the blob's own file."""
        yield self.path(digest)

    @contextlib.asynccontextmanager
    async def scratch(self, bytes_max: int) -> AsyncIterator[Path]:  # noqa: ARG002  # the disk is the bound
        """Give a name among what arrives."""
        path = self.folder / INCOMING / f"scratch-{secrets.token_hex(16)}"
        path.parent.mkdir(exist_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def check(self) -> None:
        """See that this process may write here."""
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise _disk(OSError(errno.EACCES, "this user may not write", str(self.folder)))

    def sweep(self, *, older_than_s: float = 0.0) -> int:
        """Remove what a killed process left half written, all of it only while no upload runs. Returns how many files."""
        removed = 0
        for left in (self.folder / INCOMING).glob("*"):
            with contextlib.suppress(FileNotFoundError):  # it arrived just now
                if not older_than_s or left.stat().st_mtime < time.time() - older_than_s:
                    left.unlink()
                    removed += 1
        return removed


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk(error: OSError | BaseError) -> DeviceError:
    numbers = (errno.ENOSPC, errno.EDQUOT)  # obstore tells the number in its text only
    full = any(getattr(error, "errno", None) == number or f"os error {number})" in str(error) for number in numbers)
    code = "disk_full" if full else "disk"
    return DeviceError(
        code,
        f"the blob store cannot write: {error}",
        consequence="the upload was not kept",
        next_step="make room on the server's disk, then upload again",
    )
