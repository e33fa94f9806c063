"""Tensors as the Open Inference Protocol writes them: JSON lists, or raw bytes (little endian, C order).

What does not parse is the caller's fault and says which tensor and why. Numbers in JSON are checked against the range of
their datatype, since numpy would wrap or saturate them without a word. BYTES elements are text, length-prefixed in raw
form. BF16 is a number in JSON, rounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np

from wherry_shared.engines import bf16
from wherry_shared.engines.errors import BadInput
from wherry_shared.engines.session import DTYPES, Array
from wherry_shared.limits import TENSOR_RANK_MAX

ELEMENTS_MAX = 64 * 1024 * 1024
LISTED_MAX = 256
PIECE_BYTES = 1 << 16
"""A longer list of numbers is read piece by piece: as Python's numbers, all at once, it takes ten times the memory of its tensor."""
_NUMBER_BYTES_MAX = 64
"""So far ahead the end of a number is looked for, where a piece is to end."""
COPIED_BYTES_MAX = 1 << 15
"""Up to here an output is copied into its response; beyond, it is sent from where it lies."""

_RANGES: dict[np.dtype[Any], tuple[float, float]] = {
    **{dtype: (np.iinfo(dtype).min, np.iinfo(dtype).max) for dtype in DTYPES.values() if dtype.kind in "ui"},
    # the largest numbers that are still rounded to a finite one
    np.dtype(np.float16): (math.nextafter(-65520.0, 0), math.nextafter(65520.0, 0)),
    np.dtype(np.float32): (math.nextafter(-3.4028235677973366e38, 0), math.nextafter(3.4028235677973366e38, 0)),
    np.dtype(np.float64): (-math.inf, math.inf),
}
_TYPES: dict[str, np.dtype[Any]] = dict(DTYPES.items())

_flat: dict[str, msgspec.json.Decoder[Any]] = {
    "b": msgspec.json.Decoder(list[bool]),
    "u": msgspec.json.Decoder(list[int]),
    "i": msgspec.json.Decoder(list[int]),
    "f": msgspec.json.Decoder(list[float]),
    "O": msgspec.json.Decoder(list[str]),
}
_nested: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def check_shape(name: str, datatype: str, shape: Sequence[int]) -> tuple[np.dtype[Any], int]:
    """Return the numpy dtype and the number of elements of a tensor as its request describes it.

    Raises:
        BadInput: unknown datatype, or a shape that cannot be.
    """
    dtype = _TYPES.get(datatype)
    if dtype is None:
        raise BadInput(
            f"tensor {name[:80]!r}: datatype {datatype[:40]!r} is not supported; there are {', '.join(_TYPES)}"
        )
    if len(shape) > TENSOR_RANK_MAX or min(shape, default=0) < 0:
        raise BadInput(f"tensor {name[:80]!r}: shape {list(shape)[:TENSOR_RANK_MAX]} cannot be")
    count = math.prod(shape)
    if count > ELEMENTS_MAX:
        raise BadInput(f"tensor {name[:80]!r}: {count} elements, at most {ELEMENTS_MAX}")
    return dtype, count


def decode(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Array:
    """Return the array that a request's JSON `data` holds.

    Raises:
        BadInput: unknown datatype, wrong type of a value, value out of range, or another number of values than `shape`.
    """
    dtype, count = check_shape(name, datatype, shape)
    if datatype == "BF16":
        narrowed = bf16.narrow(decode(name, "FP32", shape, data))
        if not bf16.finite(narrowed):
            raise BadInput(f"input {name[:80]!r}: a value is out of the range of BF16")
        return narrowed
    if not memoryview(data):
        raise BadInput(f"input {name[:80]!r} has neither data nor binary_data_size nor a shared memory region")
    if len(memoryview(data)) > PIECE_BYTES and dtype.kind in "fiu":
        array = _piecewise(name, datatype, dtype, count, memoryview(data))
        if array is not None:
            return array.reshape(shape)
    values = _values(name, datatype, dtype, data)
    if len(values) != count:
        raise BadInput(f"input {name[:80]!r} has {len(values)} values, its shape {list(shape)} asks for {count}")
    return _array(name, datatype, dtype, values).reshape(shape)


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Return the array that raw bytes hold; it lies in `data` where it can, and is read only.

    Raises:
        BadInput: unknown datatype, or another number of bytes than `shape` asks for.
    """
    dtype, count = check_shape(name, datatype, shape)
    return from_checked(name, dtype, shape, count, data)


def from_checked(name: str, dtype: np.dtype[Any], shape: Sequence[int], count: int, data: bytes | memoryview) -> Array:
    """Return the array that raw bytes hold, whose dtype and count `check_shape` gave.

    Raises:
        BadInput: as `from_bytes`.
    """
    if dtype.kind == "O":
        return from_texts(name, shape, _split(name, count, data))
    if len(data) != count * dtype.itemsize:
        raise BadInput(
            f"input {name[:80]!r} has {len(data)} bytes of raw data, "
            f"{dtype} of shape {list(shape)} asks for {count * dtype.itemsize}"
        )
    if not count:
        return np.empty(shape, dtype)
    array = np.frombuffer(data, dtype)
    if not array.flags.aligned:
        array = array.copy()
    if dtype.kind == "b" and array.view(np.uint8).max() > 1:
        raise BadInput(f"input {name[:80]!r}: a BOOL is one byte, 0 or 1")
    return array.reshape(shape)


def encode(array: Array, datatype: str = "") -> list[Any]:
    """Return the flat values of an output. NaN and Inf, where an interface allows them, become null: JSON has neither."""
    if datatype == "BF16":
        array = bf16.widen(array)
    return cast("list[Any]", array.ravel().tolist())


def to_bytes(array: Array) -> bytes | memoryview:
    """Return an output as raw bytes; a large one is not copied."""
    if array.dtype.kind == "O":
        parts = []
        for element in array.ravel().tolist():
            text = element.encode() if isinstance(element, str) else bytes(element)
            parts += [len(text).to_bytes(4, "little"), text]
        return b"".join(parts)
    if array.nbytes <= COPIED_BYTES_MAX:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def classify(array: Array, count: int, labels: Sequence[str] | None) -> Array:
    """Return the largest `count` entries of each row of the last axis as `value:index[:label]`, largest first.

    Raises:
        BadInput: an output that has no order.
    """
    if array.dtype.kind not in "uif" or not array.ndim:
        raise BadInput("classification needs an output of numbers with at least one axis")
    count = min(count, array.shape[-1])
    rows = array.reshape(-1, array.shape[-1])
    best = np.argsort(-rows.astype(np.float64), axis=-1, kind="stable")[:, :count]
    made = np.empty(best.shape, np.object_)
    for row, indices in enumerate(best.tolist()):
        for place, index in enumerate(indices):
            label = f":{labels[index]}" if labels and index < len(labels) else ""
            value = rows[row, index]
            made[row, place] = f"{value:f}:{index}{label}" if array.dtype.kind == "f" else f"{value}:{index}{label}"
    return made.reshape(*array.shape[:-1], count)


def from_texts(name: str, shape: Sequence[int], elements: Sequence[bytes | memoryview]) -> Array:
    """Return BYTES elements as the array that engines take; there are as many as `shape` says.

    Raises:
        BadInput: one of them is not UTF-8.
    """
    made = np.empty(len(elements), np.object_)
    for index, element in enumerate(elements):
        try:
            made[index] = str(element, "utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"input {name[:80]!r}: element {index} is not UTF-8, which BYTES has to be here") from error
    return made.reshape(shape)


def _split(name: str, count: int, data: bytes | memoryview) -> list[memoryview]:
    """Return length-prefixed elements."""
    view = memoryview(data)
    if len(view) < 4 * count:  # before anything of that size is made
        raise BadInput(f"input {name[:80]!r} has {len(view)} bytes of raw data, too few for {count} elements")
    elements = []
    offset = 0
    for index in range(count):
        if offset + 4 > len(view):
            raise BadInput(f"input {name[:80]!r}: its raw data end within element {index} of {count}")
        (length,) = struct.unpack_from("<I", view, offset)
        offset += 4
        if length > len(view) - offset:
            raise BadInput(f"input {name[:80]!r}: element {index} has {length} bytes, {len(view) - offset} follow")
        elements.append(view[offset : offset + length])
        offset += length
    if offset != len(view):
        raise BadInput(f"input {name[:80]!r}: {len(view) - offset} bytes follow its last element")
    return elements


def _values(name: str, datatype: str, dtype: np.dtype[Any], data: msgspec.Raw) -> list[Any]:
    decoder = _flat[dtype.kind]
    try:
        return cast("list[Any]", decoder.decode(data))
    except msgspec.ValidationError:
        pass  # perhaps it is nested
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"input {name[:80]!r}: {error}") from error
    try:
        flat: list[Any] = []
        _flatten(_nested.decode(data), flat, 0)
        return cast("list[Any]", msgspec.convert(flat, decoder.type))
    except (msgspec.DecodeError, RecursionError, TypeError) as error:
        raise BadInput(f"input {name[:80]!r}: its data are not {datatype} values: {error}") from error


def _piecewise(name: str, datatype: str, dtype: np.dtype[Any], count: int, text: memoryview) -> Array | None:
    """Read a flat list of `count` numbers; None if that is not what it is, which `_values` finds words for."""
    end = len(text) - 1
    if bytes(text[:1]) != b"[" or 2 * count > len(
        text
    ):  # a number and its comma: nothing is made for a shape that lies
        return None
    decoder = _flat[dtype.kind]
    made, filled, start = np.empty(count, dtype), 0, 1
    while start <= end:
        cut = end
        if end - start > PIECE_BYTES:
            comma = bytes(text[start + PIECE_BYTES : start + PIECE_BYTES + _NUMBER_BYTES_MAX]).find(b",")
            cut = start + PIECE_BYTES + comma
            if comma < 0:
                return None
        try:
            values = decoder.decode(b"[" + bytes(text[start:cut]) + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if not values or filled + len(values) > count:
            return None
        made[filled : filled + len(values)] = _array(name, datatype, dtype, values)
        filled, start = filled + len(values), cut + 1
    return made if filled == count else None


def _flatten(value: Any, into: list[Any], depth: int) -> None:
    if depth > TENSOR_RANK_MAX or not isinstance(value, list):
        raise TypeError(f"expected lists of values, at most {TENSOR_RANK_MAX} deep")
    for entry in value:
        if isinstance(entry, list):
            _flatten(entry, into, depth + 1)
        else:
            into.append(entry)


def _array(name: str, datatype: str, dtype: np.dtype[Any], values: list[Any]) -> Array:
    if dtype.kind == "O":
        made = np.empty(len(values), dtype)
        made[:] = values
        return made
    if dtype.kind == "b":
        return np.array(values, dtype)
    if dtype.kind == "f" and len(values) > LISTED_MAX:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype)
        good = bool(np.isfinite(array).all())
    else:  # looking at a few numbers one by one is faster than telling numpy not to warn
        low, high = _RANGES[dtype]
        good = not values or (low <= min(values) and max(values) <= high)
        array = np.array(values, dtype) if good else np.empty(0, dtype)
    if not good:
        raise BadInput(f"input {name[:80]!r}: a value is out of the range of {datatype}")
    return array
