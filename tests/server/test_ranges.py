"""Which bytes answer a conditional or ranged request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_server.ranges import Answer, answer

ETAG = '"sha256:aa"'


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, Answer(200, 0, 100)),
        ({"range": "bytes=0-9"}, Answer(206, 0, 10)),
        ({"range": "bytes=90-"}, Answer(206, 90, 100)),
        ({"range": "bytes=90-1000"}, Answer(206, 90, 100)),
        ({"range": "bytes=-10"}, Answer(206, 90, 100)),
        ({"range": "bytes=-1000"}, Answer(206, 0, 100)),
        ({"range": "bytes=-0"}, Answer(416)),
        ({"range": "bytes=100-"}, Answer(416)),
        ({"range": "bytes=100-100"}, Answer(416)),
        ({"range": "bytes=9-0"}, Answer(200, 0, 100)),
        ({"range": "bytes=-"}, Answer(200, 0, 100)),
        ({"range": "bytes=0-9,20-29"}, Answer(200, 0, 100)),
        ({"range": "lines=0-9"}, Answer(200, 0, 100)),
        ({"range": "bytes=" + "9" * 40 + "-"}, Answer(200, 0, 100)),
        ({"range": "BYTES = 1 - 2"}, Answer(206, 1, 3)),
        ({"range": "bytes=0-9", "if-range": ETAG}, Answer(206, 0, 10)),
        ({"range": "bytes=0-9", "if-range": '"other"'}, Answer(200, 0, 100)),
        ({"range": "bytes=0-9", "if-range": "W/" + ETAG}, Answer(200, 0, 100)),
        ({"range": "bytes=0-9", "if-range": "Wed, 21 Oct 2015 07:28:00 GMT"}, Answer(200, 0, 100)),
        ({"if-none-match": ETAG}, Answer(304)),
        ({"if-none-match": "W/" + ETAG}, Answer(304)),
        ({"if-none-match": '"x", ' + ETAG}, Answer(304)),
        ({"if-none-match": "*"}, Answer(304)),
        ({"if-none-match": '"x"'}, Answer(200, 0, 100)),
        ({"if-none-match": ETAG, "range": "bytes=0-9"}, Answer(304)),
        ({"if-none-match": '"x"', "range": "bytes=0-9"}, Answer(206, 0, 10)),
    ],
)
def test_a_request_gets_the_bytes_that_the_standard_gives_it(headers: dict[str, str], expected: Answer) -> None:
    assert answer(100, ETAG, headers) == expected


def test_no_range_fits_an_empty_object() -> None:
    assert answer(0, ETAG, {"range": "bytes=0-"}) == Answer(416)
    assert answer(0, ETAG, {"range": "bytes=-5"}) == Answer(416)
    assert answer(0, ETAG, {}) == Answer(200, 0, 0)


@given(
    size=st.integers(0, 300),
    wanted=st.one_of(
        st.text(max_size=20),
        st.from_regex(r"bytes=[0-9]{0,3}-[0-9]{0,3}", fullmatch=True),
    ),
)
def test_whatever_is_asked_the_answer_lies_within_the_object(size: int, wanted: str) -> None:
    found = answer(size, ETAG, {"range": wanted})
    assert found.status in (200, 206, 416)
    assert 0 <= found.start <= found.stop <= size
    if found.status == 206:
        assert found.length > 0
    if found.status == 200:
        assert found.length == size
