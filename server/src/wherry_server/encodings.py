"""Makes zstd encodings of accepted weights: smaller objects of their own, trusted only through the raw digest.

One thread at a time compresses, outside the event loop; what a stopped server left undone is taken up at the next
start. A blob that does not get smaller is noted as tried, by a row that names the blob itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
from collections.abc import Collection
from pathlib import Path

import zstandard
from sqlalchemy import and_, insert, select
from sqlalchemy.exc import DBAPIError

from wherry_server.blobs import Blobs
from wherry_server.db.database import DATABASE_ERRORS, Database
from wherry_server.db.tables import BlobEncoding, BlobOwner, table
from wherry_server.times import now_us
from wherry_shared.errors import UnreachableError, WherryError
from wherry_shared.limits import KIB, MIB, ZSTD_WINDOW_BYTES_MAX

AGAIN_S = 600.0
"""A blob that nobody answered for is taken up again after so long; what this machine cannot encode, at the next start."""

log = logging.getLogger(__name__)

ENCODE_BYTES_MIN = 4 * KIB
"""Smaller blobs are not worth a second object."""
LEVELS = ((16 * MIB, 19), (128 * MIB, 15))
"""zstd level for blobs up to so many bytes: time is spent where it is short."""
LEVEL_LARGE = 10
READ_BYTES = 1 * MIB

_encodings = table(BlobEncoding)
_owners = table(BlobOwner)


def level_for(size: int) -> int:
    """Return the zstd level for a blob of `size` bytes."""
    return next((level for limit, level in LEVELS if size <= limit), LEVEL_LARGE)


class StoppedError(Exception):
    """The server ends: the work is given up and taken up at the next start."""


def compress(source: Path, target: Path, size: int, stop: threading.Event) -> tuple[str, int]:
    """Compress a file and return digest and length of the result; the window fits every device.

    Raises:
        StoppedError: `stop` was set.
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level_for(size), source_size=size, write_content_size=True, write_checksum=False
    )
    if parameters.window_log > ZSTD_WINDOW_BYTES_MAX.bit_length() - 1:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level_for(size),
            source_size=size,
            write_content_size=True,
            write_checksum=False,
            window_log=ZSTD_WINDOW_BYTES_MAX.bit_length() - 1,
        )
    sha = hashlib.sha256()
    written = 0
    with source.open("rb") as raw, target.open("xb") as encoded:
        for piece in zstandard.ZstdCompressor(compression_params=parameters).read_to_iter(
            raw, size=size, read_size=READ_BYTES
        ):
            if stop.is_set():
                raise StoppedError
            sha.update(piece)
            written += encoded.write(piece)
    return "sha256:" + sha.hexdigest(), written


class Encoder:
    """The queue of blobs to encode and the task that works it off."""

    def __init__(self, database: Database, blobs: Blobs, project: str) -> None:
        self._database = database
        self._blobs = blobs
        self._project = project
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._again: dict[str, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Take up what is not encoded yet and begin to work."""
        async with self._database.read() as connection:
            left = await connection.scalars(
                select(_owners.c.digest)
                .outerjoin(
                    _encodings,
                    and_(_encodings.c.digest == _owners.c.digest, _encodings.c.project_id == _owners.c.project_id),
                )
                .where(
                    _owners.c.project_id == self._project, _owners.c.kind == "weights", _encodings.c.digest.is_(None)
                )
            )
            self.add(left.all())
        self._task = asyncio.create_task(self._work(), name="encodings")

    def add(self, digests: Collection[str]) -> None:
        """Queue raw blobs."""
        for digest in digests:
            self._queue.put_nowait(digest)

    async def close(self) -> None:
        """Give up the blob under way and end."""
        self._stop.set()
        for again in self._again.values():
            again.cancel()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def join(self) -> None:
        """Wait until everything that was queued is done."""
        await self._queue.join()

    async def _work(self) -> None:
        while True:
            digest = await self._queue.get()
            try:
                await self._encode(digest)
            except (
                WherryError,
                zstandard.ZstdError,
                *DATABASE_ERRORS,
            ) as error:  # another process may have been quicker
                log.warning("blob %s was not encoded: %s", digest, error)  # devices fetch it raw
                if isinstance(error, UnreachableError | DBAPIError):
                    again = asyncio.get_running_loop().call_later(AGAIN_S, self._queue.put_nowait, digest)
                    self._again[digest] = again
            finally:
                self._queue.task_done()

    async def _encode(self, digest: str) -> None:
        async with self._database.read() as connection:
            done = await connection.scalar(
                select(_encodings.c.digest).where(
                    _encodings.c.digest == digest, _encodings.c.project_id == self._project
                )
            )
        size = await self._blobs.size(digest)
        if done is not None or size is None:
            return
        encoded_digest, encoded_bytes = digest, size
        if size >= ENCODE_BYTES_MIN:
            async with self._blobs.local(digest, size) as raw, self._blobs.scratch(size + size // 128) as part:
                found = await asyncio.to_thread(compress, raw, part, size, self._stop)
                if found[1] < size:
                    encoded_digest, encoded_bytes = found
                    await self._blobs.put_file(part, encoded_digest, encoded_bytes)
        await self._record(digest, encoded_digest, encoded_bytes)

    async def _record(self, digest: str, encoded_digest: str, encoded_bytes: int) -> None:
        async with self._database.write() as connection:
            await connection.execute(
                insert(BlobEncoding).values(
                    digest=digest,
                    encoding="zstd",
                    project_id=self._project,
                    encoded_digest=encoded_digest,
                    bytes=encoded_bytes,
                )
            )
            known = await connection.scalar(
                select(_owners.c.digest).where(
                    _owners.c.project_id == self._project, _owners.c.digest == encoded_digest
                )
            )
            if known is None:
                await connection.execute(
                    insert(BlobOwner).values(
                        project_id=self._project,
                        digest=encoded_digest,
                        bytes=encoded_bytes,
                        created_at=now_us(),
                        kind="encoding",
                    )
                )
