"""Content at rest, encrypted in tiles: each opens by itself, none can be moved, dropped, repeated or taken from elsewhere.

`docs/formats/encryption.md` fixes the format. A header of 96 bytes says what is inside; the key of the tiles is derived from
the content key *and* that header, which names the digest of what is encrypted. So the same key and the same content always
give the same bytes, and no nonce is ever used for two contents, whoever encrypts. Each tile is authenticated with the header,
its index and the number of tiles; the digest of the plaintext is checked at the end.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wherry_shared import limits, zstd
from wherry_shared.digest import CHUNK_BYTES, hex_of
from wherry_shared.errors import RefusedError

MAGIC = b"WTILES01"
TAG_BYTES = 16
KEY_BYTES = 32
_HEADER = struct.Struct(">8sIB3xQQ32s32s")
HEADER_BYTES = _HEADER.size
_PLACE = struct.Struct(">QQ")
_PURPOSE = b"wherry tiles 1"

Encoding = Literal["raw", "zstd"]
ENCODINGS: tuple[Encoding, ...] = ("raw", "zstd")
"""What the tiles hold: the plaintext, or one zstd frame of it; the header has the position here."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of an encrypted blob say."""

    content_bytes: int
    """Of what the tiles hold."""
    content_digest: str
    plain_bytes: int
    plain_digest: str
    encoding: Encoding = "raw"
    tile_bytes: int = limits.TILE_BYTES

    @property
    def tiles(self) -> int:
        """How many tiles there are; nothing is one empty tile, so that it is authenticated too."""
        return max(1, -(-self.content_bytes // self.tile_bytes))

    @property
    def sealed_bytes(self) -> int:
        """Length of the whole blob."""
        return HEADER_BYTES + self.content_bytes + self.tiles * TAG_BYTES

    def span(self, index: int) -> tuple[int, int]:
        """Return where in the blob a tile begins and ends."""
        start = HEADER_BYTES + index * (self.tile_bytes + TAG_BYTES)
        return start, min(start + self.tile_bytes + TAG_BYTES, self.sealed_bytes)

    def encode(self) -> bytes:
        """Return the header's bytes."""
        return _HEADER.pack(
            MAGIC,
            self.tile_bytes,
            ENCODINGS.index(self.encoding),
            self.content_bytes,
            self.plain_bytes,
            bytes.fromhex(hex_of(self.content_digest)),
            bytes.fromhex(hex_of(self.plain_digest)),
        )


def parse_header(data: bytes) -> Header:
    """Parse the first `HEADER_BYTES` bytes of an encrypted blob.

    Raises:
        RefusedError: `tiles_invalid`.
    """
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        raise _invalid("it does not begin as an encrypted blob does")
    _, tile_bytes, encoding, content_bytes, plain_bytes, content, plain = _HEADER.unpack(data[:HEADER_BYTES])
    if not limits.TILE_BYTES_MIN <= tile_bytes <= limits.TILE_BYTES_MAX or tile_bytes & (tile_bytes - 1):
        raise _invalid(f"tiles of {tile_bytes} bytes")
    if encoding >= len(ENCODINGS) or any(data[13:16]):
        raise _invalid("its content is in an encoding that is not known here")
    if max(content_bytes, plain_bytes) > limits.BLOB_BYTES_MAX:
        raise _invalid(f"it claims {max(content_bytes, plain_bytes)} bytes")
    header = Header(
        content_bytes=content_bytes,
        content_digest=f"sha256:{content.hex()}",
        plain_bytes=plain_bytes,
        plain_digest=f"sha256:{plain.hex()}",
        encoding=ENCODINGS[encoding],
        tile_bytes=tile_bytes,
    )
    if header.encoding == "raw" and (content_bytes, content) != (plain_bytes, plain):
        raise _invalid("its content and its plaintext are said to be the same, and described differently")
    return header


class Cipher:
    """Seals and opens the tiles of one blob."""

    def __init__(self, key: bytes, header: Header) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a content key has {KEY_BYTES} bytes")
        self.header = header
        self._bound = header.encode()
        self._aead = AESGCM(HKDF(SHA256(), KEY_BYTES, None, _PURPOSE + self._bound).derive(key))

    def seal(self, index: int, content: bytes) -> bytes:
        """Return a tile of the content, encrypted."""
        return self._aead.encrypt(_nonce(index), content, self._place(index))

    def open(self, index: int, sealed: bytes) -> bytes:
        """Return the content of a tile.

        Raises:
            RefusedError: `tile_altered`: these are not the bytes of this tile, or this is not the key.
        """
        try:
            return self._aead.decrypt(_nonce(index), sealed, self._place(index))
        except (InvalidTag, ValueError) as error:
            raise RefusedError(
                "tile_altered",
                f"tile {index} of {self.header.tiles} does not open",
                consequence="nothing of it is used",
                next_step="check that the blob is whole and that the key is this blob's",
            ) from error

    def _place(self, index: int) -> bytes:
        return self._bound + _PLACE.pack(index, self.header.tiles)


def seal(source: BinaryIO, header: Header, key: bytes) -> Iterator[bytes]:
    """Encrypt what `header` describes, piece by piece.

    Raises:
        RefusedError: `tiles_invalid`, `source` is not what the header says; what came out by then is to be thrown away.
    """
    cipher = Cipher(key, header)
    yield header.encode()
    sha, count = hashlib.sha256(), 0
    for index in range(header.tiles):
        content = _exactly(source, min(header.tile_bytes, header.content_bytes - count))
        sha.update(content)
        count += len(content)
        yield cipher.seal(index, content)
    if count != header.content_bytes or f"sha256:{sha.hexdigest()}" != header.content_digest or source.read(1):
        raise _invalid("what was to be encrypted changed meanwhile")


def describe(source: BinaryIO) -> tuple[int, str]:
    """Return length and digest of what can be read from `source`."""
    sha, count = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        sha.update(chunk)
        count += len(chunk)
    return count, f"sha256:{sha.hexdigest()}"


def open_all(source: BinaryIO, key: bytes, plain_digest: str, *, bytes_max: int = limits.BLOB_BYTES_MAX) -> bytes:
    """Return the whole plaintext, which is only in memory; it is exactly what `plain_digest` names.

    Raises:
        RefusedError: `tiles_invalid`, `tile_altered`, or `plain_too_large` beyond `bytes_max`.
    """
    header = parse_header(source.read(HEADER_BYTES))
    if header.plain_digest != plain_digest:
        raise _invalid(f"it holds {header.plain_digest}, not {plain_digest}")
    if max(header.plain_bytes, header.content_bytes) > bytes_max:
        raise RefusedError("plain_too_large", f"{plain_digest} has {header.plain_bytes} bytes, at most {bytes_max}")
    cipher = Cipher(key, header)
    content = io.BytesIO()
    for index in range(header.tiles):
        start, stop = header.span(index)
        content.write(cipher.open(index, _exactly(source, stop - start)))
    if source.read(1):
        raise _invalid("something follows its last tile")
    plain = content.getvalue()
    if header.encoding == "zstd":
        try:
            inflated = zstd.inflate(plain, header.plain_bytes)
        except zstd.ZstdInvalidError as error:
            raise _invalid(f"what its tiles hold is no zstd frame: {error}") from error
        if inflated is None:
            raise _invalid("its frame holds more than it says")
        plain = inflated
    if len(plain) != header.plain_bytes or f"sha256:{hashlib.sha256(plain).hexdigest()}" != plain_digest:
        raise _invalid("its plaintext has another digest than it says")
    return plain


def open_range(source: BinaryIO, key: bytes, start: int, stop: int) -> bytes:
    """Return content bytes `start` to `stop` (of a zstd frame: of the frame), reading only the tiles that hold them.

    What is returned is authentic in its place; whether the rest is there nobody looked.

    Raises:
        RefusedError: `tiles_invalid` or `tile_altered`.
    """
    source.seek(0)
    header = parse_header(source.read(HEADER_BYTES))
    if not 0 <= start <= stop <= header.content_bytes:
        raise _invalid(f"bytes {start} to {stop} of {header.content_bytes} were asked for")
    if start == stop:
        return b""
    cipher = Cipher(key, header)
    first, last = start // header.tile_bytes, (stop - 1) // header.tile_bytes
    source.seek(header.span(first)[0])
    found = bytearray()
    for index in range(first, last + 1):
        begin, end = header.span(index)
        found += cipher.open(index, _exactly(source, end - begin))
    offset = first * header.tile_bytes
    return bytes(found[start - offset : stop - offset])


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "big")


def _exactly(source: BinaryIO, count: int) -> bytes:
    """Read so many bytes, fewer only at the end."""
    data = source.read(count)
    while len(data) < count and (more := source.read(count - len(data))):
        data += more
    return data


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "tiles_invalid",
        f"not an encrypted blob as it should be: {why}",
        consequence="nothing of it is used",
        next_step="fetch it again, or have the publisher encrypt the bundle again",
    )
