"""The messages of the protocol over gRPC, made at run time from `oip.binpb` (the compiled `oip.proto`).

They live in a descriptor pool of their own. Other packages register the same names, so the pool that a process shares
would refuse the second of them. Made this way they also need no generated code, which fits only some releases of
protobuf.

Raw tensors are taken out of a message, and put into one, by hand: protobuf would copy each of them twice, which for an
image costs more than everything else together.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

TAKEN_BYTES_MIN = 1 << 15
"""Smaller messages are left whole: copying them costs less than looking into them."""
FIELDS_MAX = 2048
"""Of a message that is looked into; none that is answered has as many."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types (protobuf.dev, "Encoding")."""

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("wherry_agent.serving").joinpath("oip.binpb").read_bytes()
).file:
    _pool.Add(_file)


def message(name: str) -> Any:
    """Return the class of a message."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


def taken_out(data: bytes, field: int) -> tuple[bytes, list[memoryview]]:
    """Return a message without the entries of a repeated `bytes` field, and those entries where they lie in `data`.

    What is not well-formed, small, or of too many fields comes back whole, for protobuf to read or to refuse.
    """
    if len(data) < TAKEN_BYTES_MIN:
        return data, []
    whole = memoryview(data)
    kept: list[memoryview] = []
    taken: list[memoryview] = []
    at = rest = fields = 0
    try:
        while at < len(data):
            begin, fields = at, fields + 1
            key, at = _varint(data, at)
            kind = key & 7
            if kind == _BYTES:
                length, at = _varint(data, at)
                if key >> 3 == field:
                    kept.append(whole[rest:begin])
                    taken.append(whole[at : at + length])
                    rest = at + length
                at += length
            elif kind == _VARINT:
                _, at = _varint(data, at)
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                return data, []
            if fields > FIELDS_MAX:
                return data, []
    except IndexError:  # it ends within a number
        return data, []
    if at != len(data):
        return data, []
    return b"".join([*kept, whole[rest:]]), taken


def put_in(data: bytes, field: int, entries: Sequence[bytes | memoryview]) -> bytes:
    """Return a message with entries of a repeated `bytes` field behind what it says."""
    parts: list[bytes | memoryview] = [data]
    for entry in entries:
        parts += [_number(field << 3 | _BYTES), _number(len(entry)), entry]
    return b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of at most ten bytes; return it, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _number(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
