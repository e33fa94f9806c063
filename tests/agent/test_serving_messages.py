"""Raw tensors on their way past protobuf: what is taken out of a message and put in is what protobuf would have seen."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_agent.serving import messages
from wherry_agent.serving.messages import FIELDS_MAX, TAKEN_BYTES_MIN, message, put_in, taken_out

REQUEST, RESPONSE = message("ModelInferRequest"), message("ModelInferResponse")
RAW_IN, RAW_OUT = 7, 6
LARGE = bytes(TAKEN_BYTES_MIN)


@pytest.fixture(scope="module", autouse=True)
def every_size() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(messages, "TAKEN_BYTES_MIN", 0)
    yield
    patch.undo()


def made(name: str, shape: list[int], raw: list[bytes]):
    request = REQUEST(model_name=name, id="1")
    request.parameters["n"].int64_param = -1
    request.parameters["d"].double_param = 0.5
    request.inputs.add(name=name, datatype="FP32", shape=shape)
    request.raw_input_contents.extend(raw)
    return request


def read(data: bytes):
    rest, taken = taken_out(data, RAW_IN)
    request = REQUEST.FromString(rest)
    assert not (taken and request.raw_input_contents)
    request.raw_input_contents.extend(map(bytes, taken))
    return request


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=5), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), st.lists(st.binary(max_size=300)))
def test_what_is_taken_out_is_what_protobuf_reads(name: str, shape: list[int], raw: list[bytes]) -> None:
    request = made(name, shape, raw)
    data = request.SerializeToString()
    assert list(map(bytes, taken_out(data, RAW_IN)[1])) == raw
    assert read(data) == request
    between = (
        data + REQUEST(model_version="2").SerializeToString() + REQUEST(raw_input_contents=[b"z"]).SerializeToString()
    )
    assert read(between) == REQUEST.FromString(between)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 80), st.integers(0, 79), st.integers(0, 255))
def test_a_damaged_message_is_read_as_protobuf_reads_it_or_refused(end: int, at: int, byte: int) -> None:
    data = bytearray(made("x", [1, 300], [b"abc", bytes(20)]).SerializeToString())
    data[at % len(data)] = byte
    damaged = bytes(data[:end])
    try:
        expected = REQUEST.FromString(damaged)
    except DecodeError:
        return  # what remains of it is refused as well, or an entry of a message that is not wanted is lost
    assert read(damaged) == expected


def test_a_message_of_many_fields_and_a_small_one_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    many = made("x", [1], [b""] * (FIELDS_MAX + 1)).SerializeToString()
    assert taken_out(many, RAW_IN) == (many, [])
    monkeypatch.undo()
    monkeypatch.setattr(messages, "TAKEN_BYTES_MIN", TAKEN_BYTES_MIN)
    small = made("x", [1], [b"abc"]).SerializeToString()
    assert taken_out(small, RAW_IN) == (small, [])
    large = made("x", [1], [LARGE]).SerializeToString()
    assert taken_out(large, RAW_IN)[1] == [LARGE]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16384, 1 << 21])
def test_what_is_put_in_is_read_by_protobuf(size: int) -> None:
    response = RESPONSE(model_name="m")
    response.outputs.add(name="y", datatype="UINT8", shape=[size])
    parts = [bytes(size), memoryview(b"ab")]
    found = RESPONSE.FromString(put_in(response.SerializeToString(), RAW_OUT, parts))
    assert list(found.raw_output_contents) == list(map(bytes, parts))
    del found.raw_output_contents[:]
    assert found == response
