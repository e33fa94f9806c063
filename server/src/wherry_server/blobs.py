"""Immutable blobs, named by the digest of their bytes: a blob is there whole and right, or it is not there.

An upload is hashed as it streams and appears under its digest's name only when the hash fits, so a cut or altered
upload leaves nothing behind. What holds the bytes is a folder (`blob_folder`) or a bucket (`blob_bucket`); everybody
else sees this one class.
"""

from __future__ import annotations

import abc
import asyncio
import atexit
import functools
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple

from wherry_shared.digest import check_digest, hex_of
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.limits import KIB, MIB

READ_CHUNK_BYTES = 256 * KIB
"""What a download holds in memory at a time."""
WRITE_CHUNK_BYTES = 1 * MIB
"""What is read at a time from a file that this process made."""
REFRESHED_S = 86_400.0
"""A blob that was uploaded at least so long ago is as new when somebody uploads it again."""
LET_GO_S = 0.1
STATS_AT_ONCE = 16
"""So many blobs are asked about at the same time."""


class Stored(NamedTuple):
    """A blob that is there."""

    digest: str
    bytes: int
    modified_s: float
    """When it was last uploaded, wall time of who keeps it."""


class Blobs(abc.ABC):
    """Where blobs are, under names of the form `sha256/AB/ABCDEF…`."""

    where: str
    """What a person calls it, without secrets."""

    @abc.abstractmethod
    async def stat(self, digest: str) -> Stored | None:
        """Return what is known of a blob, None if it is not here."""

    @abc.abstractmethod
    async def put(self, digest: str, chunks: AsyncIterable[bytes], *, length: int | None = None) -> bool:
        """Store a blob from a stream; True if it is new, or newer. The stream is not read where nothing has to be stored.

        Raises:
            RefusedError: `bad_digest`, `digest_mismatch` or `length_mismatch`; then nothing was kept.
            DeviceError: `disk_full` or `disk`.
            UnreachableError: `blobs_unreachable` or `blobs_forbidden`.
        """

    @abc.abstractmethod
    def read(self, digest: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Yield the bytes [start, stop) of a blob that is here, a bounded piece at a time."""

    @abc.abstractmethod
    async def delete(self, digest: str) -> None:
        """Have a blob here no more; it need not be here."""

    @abc.abstractmethod
    def listed(self) -> AsyncIterator[Stored]:
        """Yield everything that is here, in no order."""

    @abc.abstractmethod
    def local(self, digest: str, size: int) -> AbstractAsyncContextManager[Path]:
        """Give a blob as a file of this machine, for as long as the block lasts; it is not to be written."""

    @abc.abstractmethod
    def scratch(self, bytes_max: int) -> AbstractAsyncContextManager[Path]:
        """Give the name of a file that is not there yet and may become so long; it goes with the block."""

    @abc.abstractmethod
    async def check(self) -> None:
        """See that blobs can be found here.

        Raises:
            WherryError: as `put`.
        """

    async def address(self, digest: str, life_s: int) -> str | None:  # noqa: ARG002  # where there are addresses
        """Return where anybody can fetch a blob for so many seconds, None if only this process can give it."""
        return None

    async def size(self, digest: str) -> int | None:
        """Return the length of a blob in bytes, None if it is not here."""
        found = await self.stat(digest)
        return found.bytes if found is not None else None

    async def stats(self, digests: Collection[str]) -> dict[str, Stored]:
        """Return what is known of those of many blobs that are here."""
        turn = asyncio.Semaphore(STATS_AT_ONCE)

        async def one(digest: str) -> Stored | None:
            async with turn:
                return await self.stat(digest)

        found = await asyncio.gather(*(one(digest) for digest in set(digests)))
        return {blob.digest: blob for blob in found if blob is not None}

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
        """Return a small blob whole, hashed once more.

        Raises:
            RefusedError: `blob_unknown` or `blob_too_large`.
            DeviceError: `blob_damaged`.
        """
        size = await self.size(digest)
        if size is None:
            raise unknown(digest)
        if size > bytes_max:
            raise RefusedError("blob_too_large", f"{digest} has {size} bytes, at most {bytes_max} are read here")
        data = b"".join([piece async for piece in self.read(digest, 0, size)])
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise damaged(digest, "was altered where it is kept")
        return data


@functools.cache
def end_softly() -> None:
    """Have this process wait a moment at its end, for whoever makes calls of obstore.

    Its threads give back Python objects shortly after the call has returned, and one that does so while the interpreter
    ends aborts the process (PyO3/pyo3-async-runtimes issue 40): every twentieth run of a command that ended with a call.
    """
    atexit.register(time.sleep, LET_GO_S)


def key_of(digest: str) -> str:
    """Return the name under which a blob is kept.

    Raises:
        RefusedError: `bad_digest`.
    """
    name = hex_of(digest)
    return f"sha256/{name[:2]}/{name}"


def digest_of(key: str) -> str | None:
    """Return which blob a name is that of, None if of none."""
    try:
        digest = check_digest("sha256:" + key.rpartition("/")[2])
    except RefusedError:
        return None
    return digest if key == key_of(digest) else None


async def checked(digest: str, chunks: AsyncIterable[bytes], length: int | None) -> AsyncGenerator[bytes, None]:
    """Pass a stream on, and fail after its last byte if it is not the blob that it should be.

    Raises:
        RefusedError: `digest_mismatch` or `length_mismatch`.
    """
    sha = hashlib.sha256()
    seen = 0
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


def unknown(digest: str) -> RefusedError:
    """Return the refusal for a blob that is not here, or not for the one who asks."""
    return RefusedError("blob_unknown", f"there is no blob {digest[:80]} here")


def damaged(digest: str, how: str) -> DeviceError:
    """Return the error for a blob whose bytes are not what they were."""
    return DeviceError(
        "blob_damaged",
        f"{digest} {how}",
        consequence="it was not used",
        next_step="find out what changed it, remove what is left of it, then push its bundle again",
    )
