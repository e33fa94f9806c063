"""Encrypted tiles: exactly what was put in, from any range, or a refusal; keys that open one blob for one recipient."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_shared import content_keys, limits, tiles, wire
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError

KEY = bytes(range(32))
TILE = limits.TILE_BYTES_MIN


def header_of(plain: bytes, *, content: bytes | None = None, tile_bytes: int = TILE) -> tiles.Header:
    content_, encoding = (plain, "raw") if content is None else (content, "zstd")
    return tiles.Header(
        content_bytes=len(content_),
        content_digest=of_bytes(content_),
        plain_bytes=len(plain),
        plain_digest=of_bytes(plain),
        encoding=encoding,
        tile_bytes=tile_bytes,
    )


def sealed_of(plain: bytes, key: bytes = KEY, **how) -> bytes:
    header = header_of(plain, **how)
    sealed = b"".join(tiles.seal(io.BytesIO(how.get("content") or plain), header, key))
    assert len(sealed) == header.sealed_bytes
    return sealed


def opened(sealed: bytes, plain: bytes, key: bytes = KEY) -> bytes:
    return tiles.open_all(io.BytesIO(sealed), key, of_bytes(plain))


def content(size: int) -> bytes:
    return hashlib.shake_128(str(size).encode()).digest(size)


sizes = st.integers(0, 4 * TILE) | st.sampled_from([0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE])


@settings(max_examples=40, deadline=None)
@given(size=sizes, start=st.integers(0, 4 * TILE), length=st.integers(0, 2 * TILE))
def test_any_size_comes_back_and_any_range_of_it(size: int, start: int, length: int):
    plain = content(size)
    sealed = sealed_of(plain)
    assert opened(sealed, plain) == plain
    start = min(start, size)
    stop = min(start + length, size)
    assert tiles.open_range(io.BytesIO(sealed), KEY, start, stop) == plain[start:stop]


@settings(max_examples=150, deadline=None)
@given(size=sizes, data=st.data())
def test_any_flipped_bit_is_refused(size: int, data: st.DataObject):
    plain = content(size)
    sealed = bytearray(sealed_of(plain))
    at = data.draw(st.integers(0, len(sealed) - 1) | st.integers(0, tiles.HEADER_BYTES - 1))
    sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RefusedError):
        opened(bytes(sealed), plain)
    with contextlib.suppress(RefusedError):  # a range of it is right or refused, never other bytes
        assert tiles.open_range(io.BytesIO(bytes(sealed)), KEY, 0, size) == plain


def test_tiles_are_not_cut_off_moved_repeated_or_taken_from_another_blob():
    plain = content(3 * TILE)
    header = header_of(plain)
    sealed, other = sealed_of(plain), sealed_of(content(3 * TILE - 1) + b"x")
    parts = [sealed[slice(*header.span(index))] for index in range(3)]
    head = sealed[: tiles.HEADER_BYTES]
    wrong = {
        "cut": head + parts[0] + parts[1],
        "cut in a tile": sealed[:-1],
        "moved": head + parts[1] + parts[0] + parts[2],
        "repeated": head + parts[0] + parts[0] + parts[2],
        "longer": sealed + parts[2],
        "spliced": head + parts[0] + other[slice(*header.span(1))] + parts[2],
        "another header": header_of(content(2 * TILE)).encode() + parts[0] + parts[1],
        "another tile size": header_of(plain, tile_bytes=2 * TILE).encode() + b"".join(parts),
    }
    for what, bytes_ in wrong.items():
        with pytest.raises(RefusedError):
            pytest.fail(f"{what}: {opened(bytes_, plain)[:8]!r}")
    with pytest.raises(RefusedError, match="does not open"):
        opened(sealed, plain, key=bytes(32))
    with pytest.raises(RefusedError, match="not sha256"):
        opened(sealed, b"mixed up")


def test_a_frame_in_tiles_is_decoded_within_what_it_says():
    plain = b"weights" * 5000
    frame = zstandard.ZstdCompressor(level=3).compress(plain)
    assert opened(sealed_of(plain, content=frame), plain) == plain
    liar = tiles.Header(len(frame), of_bytes(frame), 100, of_bytes(plain), "zstd", TILE)
    sealed = b"".join(tiles.seal(io.BytesIO(frame), liar, KEY))
    with pytest.raises(RefusedError, match="more than it says"):
        opened(sealed, plain)


def test_the_same_key_gives_the_same_bytes_and_no_nonce_twice_for_other_content():
    plain = content(TILE)
    assert sealed_of(plain) == sealed_of(plain)
    frame = zstandard.ZstdCompressor().compress(plain)
    one, other = sealed_of(plain), sealed_of(plain, content=frame)
    same = sum(a == b for a, b in zip(one[tiles.HEADER_BYTES :], other[tiles.HEADER_BYTES :], strict=False))
    assert same < TILE / 64, "two contents under one key stream would give away their difference"


def test_a_key_opens_for_its_recipient_under_its_own_words_only():
    private, stranger = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    blob, plain = of_bytes(b"at rest"), of_bytes(b"plain")
    record = content_keys.seal(KEY, private.public_key(), model="thing", plain=plain, blob=blob, device="d" * 22)
    assert content_keys.unseal(record, private) == KEY
    assert wire.parse(wire.SealedKey, wire.encode(record)) == record
    with pytest.raises(RefusedError, match="another key"):
        content_keys.unseal(record, stranger)
    for changed in ({"blob": plain}, {"model": "other"}, {"device": "e" * 22}, {"plain": blob}, {"sealed": "AAAA"}):
        with pytest.raises(RefusedError, match="does not open"):
            content_keys.unseal(msgspec.structs.replace(record, **changed), private)


def test_the_worked_example_of_the_page_is_what_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "formats" / "encryption.md").read_text()
    example = page.split("```hex", 1)[1].split("```", 1)[0]
    sealed = bytes.fromhex("".join(line.partition("#")[0] for line in example.splitlines()))
    assert tiles.open_all(io.BytesIO(sealed), KEY, of_bytes(b"wherry")) == b"wherry"
    assert sealed == b"".join(tiles.seal(io.BytesIO(b"wherry"), header_of(b"wherry"), KEY))
