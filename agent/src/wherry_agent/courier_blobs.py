"""Downloading blobs: from mirrors first, then the server, resuming, bounded, trusting nobody's bytes.

What ends up in the store has the right digest or is not there. A source whose bytes are wrong is not asked again for
that blob; a source that breaks off is asked again from where it stopped, a bounded number of times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wherry_agent.courier_http import Http, Response, origin
from wherry_agent.disk import Disk
from wherry_agent.rate import Bucket
from wherry_agent.space import short_words
from wherry_agent.store import Partial, Store, is_whole
from wherry_shared import limits, reasons, wire, zstd
from wherry_shared.digest import CHUNK_BYTES
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError, WherryError

PATH = "/device/v1/blobs/"
"""Below a source's address; a mirror has the same paths as the server."""
DISK_RESERVE_BYTES = 16 * limits.MIB
"""Left free for journal and trust, whatever is downloaded."""
BACKOFF_S = 0.5
BACKOFF_MAX_S = 10.0
PROGRESS_BYTES_MIN = 64 * limits.KIB
"""A try that brought this much is not counted: a bad line gets there in the end, bounded by the blob's length."""
ENCODED_BYTES_MIN = 16 * limits.KIB
"""Below this an encoding saves less than asking for it costs."""
ENCODINGS = frozenset({"zstd"})
"""Those that are decoded here; what a newer server offers besides is passed over."""
INFO_BYTES_MAX = 64 * limits.KIB

Sleep = Callable[[float], None]
Report = Callable[[int], None]
"""Called with the bytes that just came over the wire."""


class _GoneError(Exception):
    """This source does not have the blob, or does not let us have it."""


class _NobodyHasError(UnreachableError):
    """No source has the object."""


@dataclass
class Source:
    """Where to ask, and how it went for one object."""

    base: str
    tries: int = 0
    trouble: str = ""
    lied: bool = False
    gone: bool = False
    alone: bool = False
    """Bytes of several sources were wrong together; this one goes on by itself."""

    @property
    def usable(self) -> bool:
        """Whether to ask it (again)."""
        return not (self.lied or self.gone)


@dataclass
class Blobs:
    """Brings blobs into the store."""

    store: Store
    disk: Disk
    http: Http
    server: str
    mirrors: list[str]
    tries_max: int
    report: Report = field(default=lambda _count: None)
    sleep: Sleep = time.sleep
    bucket: Bucket = field(default_factory=lambda: Bucket(0, 0.0))
    """Bounds how fast bytes come; by default it does not."""
    reserve_bytes: int = 0
    """What stays free on the disk, at least `DISK_RESERVE_BYTES`."""
    on_lie: Callable[[str], None] = field(default=lambda _base: None)
    """Called with the address of a source whose bytes were wrong."""
    clock: Callable[[], float] = time.monotonic
    wire_bytes: int = 0
    """Bytes that came over the wire so far."""

    def small(self, digest: str, length: int) -> bytes:
        """Return a manifest or config, from the store or fetched into it.

        Raises:
            WherryError: as `bring`.
        """
        data = self.store.read(digest, length)
        if data is None:
            self.bring(digest, length, encoded=False)
            data = self.store.read(digest, length)
        if data is None:
            raise DeviceError(
                reasons.DISK, f"{digest} changed on disk after it was verified", next_step="check the disk"
            )
        return data

    def bring(self, digest: str, length: int, *, encoded: bool = True) -> None:
        """Have a blob in the store; with `encoded` in the encoding that is fewer bytes on the wire.

        Raises:
            RefusedError: `digest_mismatch` (every source that answered sent something else).
            UnreachableError: `network`.
            DeviceError: `disk_full` or `disk`.
        """
        if self.store.intact(digest, length):
            return
        if self.store.has(digest, length):
            self.store.forget(self.store.path_of(digest))  # it was right once; the disk changed it
        choice = self._encoding(digest, length) if encoded and length >= ENCODED_BYTES_MIN else None
        self._check_space(length + (choice.bytes if choice else 0))
        if choice is not None and self._bring_encoded(choice, digest, length):
            return
        self._bring_object(digest, length, self.store.path_of(digest))

    def _bring_encoded(self, choice: wire.Encoding, digest: str, length: int) -> bool:
        """Have a blob in the store by way of an encoding; False if that object is not there or not what it should be."""
        source = self.store.encoded_path(digest, choice.digest)
        try:
            self._bring_object(choice.digest, choice.bytes, source)
            self._decode(source, digest, length)
        except _NobodyHasError:
            pass  # the raw blob decides
        except RefusedError as error:
            if error.code != reasons.DIGEST_MISMATCH:
                raise
        else:
            self.store.forget(source)
            return True
        self.store.forget(source)
        return False

    def _decode(self, source: Path, digest: str, length: int) -> None:
        with self.store.part(digest, length) as part:
            part.reset()
            try:
                with source.open("rb") as file:
                    for piece in zstd.pieces(file):
                        part.write(piece, "zstd")
                part.commit()
            except zstd.ZstdInvalidError as error:
                part.discard()
                raise RefusedError(reasons.DIGEST_MISMATCH, f"{digest} is not in its zstd object: {error}") from error
            except RefusedError:
                part.discard()
                raise

    def _encoding(self, digest: str, length: int) -> wire.Encoding | None:
        """Return a smaller encoding if the server offers one; no answer means none."""
        try:
            with self.http.request("GET", f"{self.server}{PATH}{digest}/info") as answer:
                if answer.status != 200:
                    return None
                info = wire.parse(wire.BlobInfo, answer.read(INFO_BYTES_MAX), bytes_max=INFO_BYTES_MAX)
        except WherryError:  # the raw blob is as good, and its sources report their own trouble
            return None
        known = [item for item in info.encodings if item.encoding in ENCODINGS]
        smaller = [item for item in known if 0 < item.bytes < length and item.digest != digest]
        return min(smaller, key=lambda item: item.bytes, default=None)

    def _check_space(self, needed: int) -> None:
        free = self.disk.free_bytes(self.store.path_of("sha256:" + "0" * 64).parent)
        reserve = max(self.reserve_bytes, DISK_RESERVE_BYTES)
        short = short_words(needed, free, reserve)
        if short:
            raise DeviceError(
                reasons.DISK_FULL,
                short,
                consequence="nothing was fetched; what serves goes on",
                next_step="free space on the device",
            )

    def _bring_object(self, digest: str, length: int, final: Path) -> None:
        if is_whole(final, length):
            return
        sources = [Source(base.rstrip("/")) for base in (*self.mirrors, self.server)]
        with self.store.part(digest, length, final=final) as part:
            for _ in range(self.tries_max * len(sources) + length // PROGRESS_BYTES_MIN + 1):
                open_sources = [item for item in sources if item.usable and item.tries < self.tries_max]
                if not open_sources:
                    break
                source = min(open_sources, key=lambda item: (not item.alone, item.tries))
                if source.tries:
                    pause = min(BACKOFF_S * 2 ** (source.tries - 1), BACKOFF_MAX_S)
                    self.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - jitter, not a secret
                if any(item.alone for item in sources) and set(part.sources) - {source.base}:
                    part.reset()  # after a mixture was wrong, bytes of two sources are not mixed again
                if self._try(part, source):
                    return
        self._give_up(digest, sources)

    def _try(self, part: Partial, source: Source) -> bool:
        """Ask one source once; True if the blob is in the store."""
        before = part.size
        try:
            if part.size < part.length:
                self._stream(part, source)
            if part.size == part.length:
                part.commit()
                return True
            source.trouble = f"stopped after {part.size} of {part.length} bytes"
        except _GoneError as error:
            source.gone, source.trouble = True, str(error)
        except UnreachableError as error:
            source.trouble = error.message
        except RefusedError as error:
            if error.code not in (reasons.DIGEST_MISMATCH, "bad_url"):
                raise
            source.trouble = error.message
            if set(part.sources) <= {source.base} and not part.resumed:
                source.lied = True
                self.mirrors = [base for base in self.mirrors if base.rstrip("/") != source.base]
                self.on_lie(source.base)
            else:
                source.alone = True  # several sent these bytes, or a power cut tore them: the next ones are all of one
            part.reset()
        part.sync()
        if part.size - before < PROGRESS_BYTES_MIN:
            source.tries += 1
        return False

    def _stream(self, part: Partial, source: Source) -> None:
        headers = {"Range": f"bytes={part.size}-"} if part.size else {}
        if part.size and source.base == self.server:
            headers["If-Range"] = f'"{part.digest}"'  # a mirror may have entity tags of its own; the digest decides
        with self.http.request("GET", f"{source.base}{PATH}{part.digest}", headers=headers) as answer:
            if answer.status == 416:
                part.reset()
                raise UnreachableError(reasons.NETWORK, f"{origin(source.base)} has fewer bytes than were fetched")
            if answer.status not in (200, 206):
                self._refused(answer, source)
            if answer.status == 200 and part.size:
                part.reset()  # it does not do ranges, or its copy has another name
            if answer.status == 206 and not _continues(answer, part):
                raise UnreachableError(reasons.NETWORK, f"{origin(source.base)} sent another range than was asked for")
            expected = part.length - part.size
            if answer.length is not None and answer.length > expected:
                raise RefusedError(reasons.DIGEST_MISMATCH, f"{origin(source.base)} has {answer.length} bytes for it")
            for chunk in answer.chunks(self.bucket.piece(CHUNK_BYTES)):
                part.write(chunk, source.base)
                self.wire_bytes += len(chunk)
                self.report(len(chunk))
                pause = self.bucket.take(len(chunk), self.clock())
                if pause:
                    self.sleep(pause)

    @staticmethod
    def _refused(answer: Response, source: Source) -> None:
        where = f"{origin(answer.url)} answered {answer.status}"
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise UnreachableError(reasons.NETWORK, where)
        if answer.status in (400, 401, 403) and origin(answer.url) != origin(source.base):
            # the address to which the source sent us has expired: the next try is sent to a new one
            raise UnreachableError(reasons.NETWORK, where)
        raise _GoneError(where)

    @staticmethod
    def _give_up(digest: str, sources: list[Source]) -> None:
        story = "; ".join(f"{origin(item.base)}: {item.trouble}" for item in sources)
        if any(item.lied for item in sources) and all(item.lied or item.gone for item in sources):
            raise RefusedError(
                reasons.DIGEST_MISMATCH,
                f"nobody has the bytes of {digest}: {story}",
                consequence="nothing was installed",
                next_step="see who altered them; the server's copy can be uploaded again",
            )
        kind = _NobodyHasError if all(item.gone for item in sources) else UnreachableError
        raise kind(reasons.NETWORK, f"{digest} could not be fetched: {story}")


def _continues(answer: Response, part: Partial) -> bool:
    """Tell whether a 206 begins where the partial file ends and belongs to a blob of its length."""
    return answer.header("Content-Range").replace(" ", "").startswith(f"bytes{part.size}-") and answer.header(
        "Content-Range"
    ).endswith(f"/{part.length}")
