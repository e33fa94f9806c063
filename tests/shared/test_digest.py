"""Digests that check while streaming."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_shared import digest
from wherry_shared.errors import RefusedError


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_good_bytes_pass_in_any_chunks(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert b"".join(digest.checked(chunks, digest.of_bytes(whole), len(whole))) == whole


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_byte_is_noticed(whole: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    with pytest.raises(RefusedError) as caught:
        list(digest.checked([changed], digest.of_bytes(whole), len(whole)))
    assert caught.value.code == "digest_mismatch"


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_stream_cut_short_is_noticed(whole: bytes, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(RefusedError) as caught:
        list(digest.checked([whole[:end]], digest.of_bytes(whole), len(whole)))
    assert caught.value.code == "length_mismatch"


def test_a_stream_that_goes_on_is_refused_before_its_extra_bytes_pass() -> None:
    passed: list[bytes] = []
    with pytest.raises(RefusedError) as caught:
        passed.extend(digest.checked(iter([b"abc", b"d"]), digest.of_bytes(b"abc"), 3))
    assert caught.value.code == "length_mismatch"
    assert passed == [b"abc"]


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * (digest.CHUNK_BYTES + 17))
    assert digest.of_file(path) == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "G" * 64, "md5:" + "0" * 64, "sha256:" + "A" * 64]
)
def test_what_is_not_a_digest(text: str) -> None:
    assert not digest.is_digest(text)
    with pytest.raises(RefusedError):
        digest.check_digest(text)
