"""Tensors as the Open Inference Protocol writes them in JSON: flat or nested lists, by datatype.

What does not parse is the caller's fault and says which tensor and why. Numbers are checked against the range of their
datatype, since numpy would wrap or saturate them without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np

from wherry_shared.bundle import Datatype
from wherry_shared.engines.errors import BadInput
from wherry_shared.engines.session import DTYPES, Array
from wherry_shared.limits import TENSOR_RANK_MAX

ELEMENTS_MAX = 64 * 1024 * 1024

_flat: dict[str, msgspec.json.Decoder[Any]] = {
    "b": msgspec.json.Decoder(list[bool]),
    "u": msgspec.json.Decoder(list[int]),
    "i": msgspec.json.Decoder(list[int]),
    "f": msgspec.json.Decoder(list[float]),
    "O": msgspec.json.Decoder(list[str]),
}
_nested: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def decode(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Array:
    """Return the array that a request's `data` holds.

    Raises:
        BadInput: unknown datatype, wrong type of a value, value out of range, or another number of values than `shape`.
    """
    dtype = DTYPES.get(cast("Datatype", datatype))
    if dtype is None:
        raise BadInput(f"input {name!r}: datatype {datatype[:40]!r} is not supported in JSON")
    if len(shape) > TENSOR_RANK_MAX or any(axis < 0 for axis in shape):
        raise BadInput(f"input {name!r}: shape {list(shape)[:TENSOR_RANK_MAX]} cannot be")
    count = math.prod(shape)
    if count > ELEMENTS_MAX:
        raise BadInput(f"input {name!r}: {count} elements, at most {ELEMENTS_MAX}")
    values = _values(name, datatype, dtype, data)
    if len(values) != count:
        raise BadInput(f"input {name!r} has {len(values)} values, its shape {list(shape)} asks for {count}")
    return _array(name, datatype, dtype, values).reshape(shape)


def _values(name: str, datatype: str, dtype: np.dtype[Any], data: msgspec.Raw) -> list[Any]:
    decoder = _flat[dtype.kind]
    try:
        return cast("list[Any]", decoder.decode(data))
    except msgspec.ValidationError:
        pass  # perhaps it is nested
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"input {name!r}: {error}") from error
    try:
        flat: list[Any] = []
        _flatten(_nested.decode(data), flat, 0)
        return cast("list[Any]", msgspec.convert(flat, decoder.type))
    except (msgspec.DecodeError, RecursionError, TypeError) as error:
        raise BadInput(f"input {name!r}: its data are not {datatype} values: {error}") from error


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
    if dtype.kind in "ui" and values:
        info = np.iinfo(dtype)
        if min(values) < info.min or max(values) > info.max:
            raise BadInput(f"input {name!r}: a value is out of the range of {datatype}")
    with np.errstate(over="ignore"):
        array = np.array(values, dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadInput(f"input {name!r}: a value is out of the range of {datatype}")
    return array


def encode(array: Array) -> list[Any]:
    """Return the flat values of an output. NaN and Inf, where an interface allows them, become null: JSON has neither."""
    return cast("list[Any]", array.ravel().tolist())
