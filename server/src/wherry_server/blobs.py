"""Immutable blobs, named by the digest of their bytes: a blob is there whole and right, or it is not there.

An upload streams under a name of its own while it is hashed and takes its digest's name only when the hash fits, so a
cut or altered upload leaves nothing behind. Blobs are never overwritten. Writing goes through obstore; a local store
is read by `pread` in large pieces, which costs a fifteenth of the CPU of streaming through it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from wherry_shared.digest import check_digest, hex_of
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.limits import KIB, MIB

READ_CHUNK_BYTES = 256 * KIB
"""What a download holds in memory at a time."""
WRITE_CHUNK_BYTES = 1 * MIB
WRITES_AT_ONCE = 2
"""An upload holds at most this many chunks in memory, and one."""
INCOMING = "incoming"


class Blobs:
    """A folder of blobs: `sha256/AB/ABCDEF…` by digest, `incoming/` while they arrive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._store = LocalStore(folder, mkdir=True)

    def path(self, digest: str) -> Path:
        """Return where a blob is, or would be."""
        return self.folder / self._key(digest)

    @staticmethod
    def _key(digest: str) -> str:
        name = hex_of(digest)
        return f"sha256/{name[:2]}/{name}"

    def size(self, digest: str) -> int | None:
        """Return the length of a blob in bytes, None if it is not here."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    async def put(self, digest: str, chunks: AsyncIterable[bytes], *, length: int | None = None) -> bool:
        """Store a blob from a stream; True if it is new.

        Raises:
            RefusedError: `bad_digest`, `digest_mismatch` or `length_mismatch`; then nothing was kept.
            DeviceError: `disk_full` or `disk`.
        """
        check_digest(digest)
        if self.size(digest) is not None:
            return False
        sha = hashlib.sha256()
        seen = 0

        async def checked() -> AsyncIterator[bytes]:
            nonlocal seen
            async for chunk in chunks:
                if not chunk:
                    continue
                seen += len(chunk)
                if length is not None and seen > length:
                    raise RefusedError("length_mismatch", f"{digest} is longer than its {length} declared bytes")
                sha.update(chunk)
                yield chunk
            if length is not None and seen != length:
                raise RefusedError(
                    "length_mismatch",
                    f"{digest} ended after {seen} of its {length} declared bytes",
                    consequence="nothing of it was kept",
                    next_step="upload it again",
                )
            found = "sha256:" + sha.hexdigest()
            if found != digest:
                raise RefusedError(
                    "digest_mismatch",
                    f"expected {digest}, found {found}",
                    consequence="nothing of it was kept",
                    next_step="the file was altered or damaged: build or fetch it again",
                )

        incoming = f"{INCOMING}/{secrets.token_hex(16)}"
        try:
            await obstore.put_async(
                self._store, incoming, checked(), chunk_size=WRITE_CHUNK_BYTES, max_concurrency=WRITES_AT_ONCE
            )
            return await self._adopt(incoming, digest)
        except (OSError, BaseError) as error:
            raise _disk(error) from error

    async def _adopt(self, incoming: str, digest: str) -> bool:
        await asyncio.to_thread(_sync, self.folder / incoming)
        try:
            await obstore.rename_async(self._store, incoming, self._key(digest), overwrite=False)
        except AlreadyExistsError:  # somebody else stored the same bytes meanwhile
            await obstore.delete_async(self._store, incoming)
            return False
        await asyncio.to_thread(_sync, self.path(digest).parent)
        return True

    async def put_bytes(self, data: bytes) -> str:
        """Store bytes at hand and return their digest."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()

        async def one() -> AsyncIterator[bytes]:
            yield data

        await self.put(digest, one(), length=len(data))
        return digest

    async def put_file(self, path: Path, digest: str, length: int) -> bool:
        """Store a file that this process made, checked like any upload; True if it is new."""

        async def pieces() -> AsyncIterator[bytes]:
            with path.open("rb") as file:
                while piece := await asyncio.to_thread(file.read, WRITE_CHUNK_BYTES):
                    yield piece

        return await self.put(digest, pieces(), length=length)

    async def get(self, digest: str, *, bytes_max: int) -> bytes:
        """Return a small blob whole.

        Raises:
            RefusedError: `blob_unknown` or `blob_too_large`.
        """
        size = self.size(digest)
        if size is None:
            raise unknown(digest)
        if size > bytes_max:
            raise RefusedError("blob_too_large", f"{digest} has {size} bytes, at most {bytes_max} are read here")
        return await asyncio.to_thread(self.path(digest).read_bytes)

    async def read(self, digest: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Yield the bytes [start, stop) of a blob that is here, a bounded piece at a time."""
        descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while start < stop:
                piece = await asyncio.to_thread(os.pread, descriptor, min(READ_CHUNK_BYTES, stop - start), start)
                if not piece:  # cannot be: blobs never shrink
                    raise DeviceError("blob_damaged", f"{digest} ends before its length")
                start += len(piece)
                yield piece
        finally:
            os.close(descriptor)

    def sweep(self) -> int:
        """Remove what a killed process left half written; only while no upload runs. Returns how many files."""
        removed = 0
        for left in (self.folder / INCOMING).glob("*"):
            left.unlink()
            removed += 1
        return removed


def unknown(digest: str) -> RefusedError:
    """Return the refusal for a blob that is not here, or not for the one who asks."""
    return RefusedError("blob_unknown", f"there is no blob {digest[:80]} here")


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
