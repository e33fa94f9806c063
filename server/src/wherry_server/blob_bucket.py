"""Blobs in an S3 bucket, through obstore: the same rules as in a folder, without a disk that roles have to share.

A small blob is one PUT after its hash fitted. A larger one is a multipart upload, which appears under its name only when
it is completed: the hash is compared before that, and what does not fit is aborted. What a killed process left of one is
invisible and is the bucket's to remove (a lifecycle rule, see docs/scaling.md). Credentials are never in a message: of what
the bucket says against a request only the error's name is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from wherry_server.blobs import REFRESHED_S, Blobs, Stored, checked, damaged, digest_of, end_softly, key_of
from wherry_server.spool import Spool
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError, UnreachableError, WherryError
from wherry_shared.limits import MIB

if TYPE_CHECKING:
    from obstore.store import ClientConfig  # not there at run time

PART_BYTES = 8 * MIB
"""One part of a multipart upload, and the largest blob that is sent without one: 8 GiB are 1,024 of 10,000 parts."""
PARTS_AT_ONCE = 2
"""An upload holds at most this many parts in memory, and one."""
PIECE_BYTES = 2 * MIB
"""A download through this process is so many bytes per request: none is open for as long as a slow reader takes."""
UPLOADS_AT_ONCE = 8
"""More wait before their bytes are read, so that uploads hold 256 MiB of memory at most."""
CONNECT_S = 5.0
CALL_S = 60.0
"""One request with its body."""
RETRIES_MAX = 3
RETRY_S = 30.0
"""No request is begun again after so long."""
LISTED_AT_ONCE = 1_000
CA_BUNDLE = "AWS_CA_BUNDLE"
"""Environment: a file of authorities to believe beside those of this machine."""
KEYLESS = ("/latest/api/token", "/latest/meta-data")
"""What is asked for last, an instance's own credentials: whoever cannot get those has none at all."""
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key of the bucket, where the environment gives none."""

    access_key_id: str
    secret_access_key: str
    session_token: str = ""

    def __repr__(self) -> str:
        """Say nothing."""
        return "Credentials(…)"

    @classmethod
    def load(cls, path: Path) -> Credentials | None:
        """Read a key file, None if there is none.

        Raises:
            RefusedError: `settings_invalid`.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError):  # the error would quote what it read
            raise RefusedError(
                "settings_invalid",
                f"{path} is not of the form {{access_key_id, secret_access_key, session_token}}",
                consequence="the bucket was not opened",
                next_step="correct it, or remove it to use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            ) from None


class BucketBlobs(Blobs):
    """Blobs below a prefix of a bucket."""

    def __init__(
        self,
        url: str,
        spool: Spool,
        *,
        endpoint: str = "",
        region: str = "",
        public_endpoint: str = "",
        credentials: Credentials | None = None,
    ) -> None:
        """Open a bucket; nothing is asked of it yet.

        Args:
            url: `s3://BUCKET/PREFIX`.
            spool: where a blob is put that has to be a file.
            endpoint: address of the store; empty: what AWS_ENDPOINT_URL says, else AWS.
            region: empty: what AWS_REGION says.
            public_endpoint: address under which devices find the same store; empty: as this process does.
            credentials: None: those of the environment (keys, web identity, container, instance).
        """
        self.where = url
        self._spool = spool
        end_softly()
        self._turn = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._store = _open(url, endpoint, region, credentials)
        self._public = _open(url, public_endpoint, region, credentials) if public_endpoint else self._store

    async def stat(self, digest: str) -> Stored | None:
        """Return what is known of a blob, None if it is not here."""
        return await self._stat(digest, "the blob was not looked up", "then try again")

    async def _stat(self, digest: str, consequence: str, then: str) -> Stored | None:
        key = key_of(digest)
        with self._calls(consequence, then):
            try:
                found = await obstore.head_async(self._store, key)
            except FileNotFoundError:
                return None
        return Stored(digest, found["size"], found["last_modified"].timestamp())

    async def put(self, digest: str, chunks: AsyncIterable[bytes], *, length: int | None = None) -> bool:
        """Store a blob from a stream."""
        check_digest(digest)
        found = await self._stat(digest, "the upload was not kept", "then upload again")
        if found is not None and time.time() - found.modified_s < REFRESHED_S:
            return False
        async with self._turn:
            await self._write(digest, chunks, length)  # perhaps over the same bytes, which makes them newer
        return True

    async def _write(self, digest: str, chunks: AsyncIterable[bytes], length: int | None) -> None:
        stream = checked(digest, chunks, length)
        held: list[bytes] = []
        more = False

        async def whole() -> AsyncIterator[bytes]:
            while held:
                yield held.pop(0)
            async for chunk in stream:
                yield chunk

        async with contextlib.aclosing(stream):
            async for chunk in stream:
                held.append(chunk)
                more = sum(map(len, held)) > PART_BYTES
                if more:
                    break
            with self._calls("the upload was not kept", "then upload again"):
                if more:
                    await obstore.put_async(
                        self._store,
                        key_of(digest),
                        whole(),
                        use_multipart=True,
                        chunk_size=PART_BYTES,
                        max_concurrency=PARTS_AT_ONCE,
                    )
                else:
                    await obstore.put_async(self._store, key_of(digest), b"".join(held), use_multipart=False)

    async def read(self, digest: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Yield the bytes [start, stop) of a blob that is here, a bounded piece at a time."""
        key = key_of(digest)
        while start < stop:
            with self._calls("the blob was not sent to its end", "then go on from there"):
                try:
                    piece = await obstore.get_range_async(
                        self._store, key, start=start, end=min(start + PIECE_BYTES, stop)
                    )
                except FileNotFoundError as error:
                    raise damaged(digest, f"is not in {self.where} any more") from error
            data = piece.to_bytes()
            if not data:  # cannot be: blobs never shrink
                raise damaged(digest, "ends before its length")
            start += len(data)
            yield data

    async def delete(self, digest: str) -> None:
        """Have a blob here no more."""
        with self._calls("the blob is still there"), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._store, key_of(digest))

    async def listed(self) -> AsyncIterator[Stored]:
        """Yield everything that is here."""
        pages = aiter(obstore.list(self._store, prefix="sha256", chunk_size=LISTED_AT_ONCE))
        while True:
            with self._calls("not everything was looked at"):
                page = await anext(pages, None)
            if page is None:
                return
            for found in page:
                digest = digest_of(found["path"])
                if digest is not None:
                    yield Stored(digest, found["size"], found["last_modified"].timestamp())

    @contextlib.asynccontextmanager
    async def local(self, digest: str, size: int) -> AsyncIterator[Path]:
        """Give a copy in the spool."""
        async with self._spool.file(size) as path:
            with path.open("xb") as file:
                try:
                    async for piece in checked(digest, self.read(digest, 0, size), size):
                        await asyncio.to_thread(file.write, piece)
                except RefusedError as error:
                    raise damaged(digest, "was altered where it is kept") from error
            yield path

    def scratch(self, bytes_max: int) -> contextlib.AbstractAsyncContextManager[Path]:
        """Give a name in the spool."""
        return self._spool.file(bytes_max)

    async def address(self, digest: str, life_s: int) -> str | None:
        """Return a signed address: whoever has it reads this one blob until it expires."""
        with self._calls("no address was signed"):
            return await obstore.sign_async(self._public, "GET", key_of(digest), timedelta(seconds=life_s))

    async def check(self) -> None:
        """See that the bucket exists and lets us list it: without that right a blob that is missing looks forbidden."""
        with self._calls("nothing can be uploaded or fetched"):
            await anext(aiter(obstore.list(self._store, prefix="sha256", chunk_size=1)), None)

    @contextlib.contextmanager
    def _calls(self, consequence: str, then: str = "then try again") -> Iterator[None]:
        try:
            yield
        except WherryError:
            raise
        except (BaseError, OSError) as error:
            raise self._trouble(error, consequence, then) from None  # what obstore says may hold a session token

    def _trouble(self, error: BaseError | OSError, consequence: str, then: str) -> UnreachableError:
        said = str(error)
        code, status = _CODE.search(said), _STATUS.search(said)
        denied = status is not None and status[1] in ("401", "403")
        if any(path in said for path in KEYLESS):
            return UnreachableError(
                "blobs_forbidden",
                f"there are no credentials for {self.where}",
                consequence=consequence,
                next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write keys/s3.json in the data folder",
            )
        refused = denied or isinstance(error, PermissionDeniedError | UnauthenticatedError)
        if code is not None:
            why = code[1]
        elif status is not None:
            why = f"it answered {status[1]}"
        else:
            why = "no answer in time" if "kind: Timeout" in said else "no answer"
        if refused:
            return UnreachableError(
                "blobs_forbidden",
                f"{self.where} does not let us in: {why}",
                consequence=consequence,
                next_step=f"see that its credentials are right and may get, put, delete and list there, {then}",
            )
        return UnreachableError(
            "blobs_unreachable",
            f"{self.where} does not answer as a bucket does: {why}",
            consequence=consequence,
            next_step=f"see that the bucket exists, that endpoint and region are right and the network is up, {then}",
        )


def _open(url: str, endpoint: str, region: str, credentials: Credentials | None) -> S3Store:
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", "") or os.environ.get("AWS_ENDPOINT_URL", "")
    given: dict[str, Any] = {"region": region, "endpoint": endpoint.rstrip("/")}
    if credentials is not None:
        given.update(msgspec.structs.asdict(credentials))
    options: ClientConfig = {
        "allow_http": endpoint.startswith("http:"),
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "timeout": timedelta(seconds=CALL_S),
    }
    bundle = os.environ.get(CA_BUNDLE)
    if bundle:
        options["root_certificate"] = _authorities(Path(bundle))
    return S3Store(
        parts.netloc,
        prefix=prefix or None,
        client_options=options,
        retry_config={"max_retries": RETRIES_MAX, "retry_timeout": timedelta(seconds=RETRY_S)},
        **{key: value for key, value in given.items() if value},
    )


def _authorities(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RefusedError(
            "settings_invalid",
            f"{CA_BUNDLE} names {path}, which cannot be read: {error.strerror}",
            consequence="the bucket was not opened",
            next_step="correct it, or unset it",
        ) from error
