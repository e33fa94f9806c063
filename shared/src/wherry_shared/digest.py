"""Digests that check while streaming: bytes are counted and hashed on their way, never read twice."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from wherry_shared.errors import RefusedError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
CHUNK_BYTES = 1 << 20


def is_digest(text: str) -> bool:
    """Tell whether `text` is `sha256:` and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(text: str) -> str:
    """Return `text` if it is a digest.

    Raises:
        RefusedError: `bad_digest`.
    """
    if not is_digest(text):
        raise RefusedError(
            "bad_digest",
            f"{text[:80]!r} is not a digest of the form sha256:<64 hex digits>",
            consequence="nothing was looked up",
            next_step="write it as `inspect` shows it",
        )
    return text


def hex_of(digest: str) -> str:
    """Return the 64 hex digits of a digest."""
    return check_digest(digest)[7:]


def of_bytes(data: bytes) -> str:
    """Return the digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """Return the digest of a file, read in chunks."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return "sha256:" + sha.hexdigest()


class Verifier:
    """Counts and hashes bytes against a declared digest and length, and refuses at the first byte too many."""

    def __init__(self, digest: str, length: int) -> None:
        self._digest = check_digest(digest)
        self._length = length
        self._sha = hashlib.sha256()
        self.seen = 0

    def update(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            RefusedError: `length_mismatch`, as soon as there are more bytes than declared.
        """
        self.seen += len(chunk)
        if self.seen > self._length:
            raise RefusedError(
                "length_mismatch",
                f"{self._digest} is longer than its {self._length} declared bytes",
                consequence="what came is thrown away",
                next_step="fetch or copy it again; if that does not help, build and push it again",
            )
        self._sha.update(chunk)

    def finish(self) -> None:
        """Check the whole.

        Raises:
            RefusedError: `length_mismatch` or `digest_mismatch`.
        """
        if self.seen != self._length:
            raise RefusedError(
                "length_mismatch",
                f"{self._digest} ended after {self.seen} of its {self._length} declared bytes",
                consequence="what came is thrown away",
                next_step="fetch or copy it again; if that does not help, build and push it again",
            )
        found = "sha256:" + self._sha.hexdigest()
        if found != self._digest:
            raise RefusedError(
                "digest_mismatch",
                f"expected {self._digest}, found {found}",
                consequence="what came is thrown away",
                next_step="fetch or copy it again; if that does not help, build and push it again",
            )


def checked(chunks: Iterable[bytes], digest: str, length: int) -> Iterator[bytes]:
    """Pass `chunks` on while checking them; the error comes before the end of iteration.

    Raises:
        RefusedError: `length_mismatch` or `digest_mismatch`.
    """
    verifier = Verifier(digest, length)
    for chunk in chunks:
        verifier.update(chunk)
        yield chunk
    verifier.finish()
