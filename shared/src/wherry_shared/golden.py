"""Golden vectors: inputs with the outputs that one variant gave, and how far a device may be from them.

A device runs them before a variant may serve (contracts.md §7). On the wire they are one zstd frame around
`WHGOLD01`, the length of a JSON header (uint32, little endian), the header, and the raw tensors one after another in
header order (little endian, C order; text as the Open Inference Protocol has it, its length before each element).
Decoding is bounded in bytes and elements before anything is believed.

An output passes if |y − e| ≤ atol + rtol · |e| everywhere and, where `argmax_margin` is set, if the largest entry of
each row of the last axis is the expected one wherever the expected row leads by more than that margin. Large outputs
are kept as samples: flat index (start + i · step) mod size, which needs no random generator to be repeated. Text passes
if it is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_shared import limits, zstd
from wherry_shared.errors import RefusedError

Array: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = Mapping[str, Array]

FORMAT = 1
MAGIC = b"WHGOLD01"
HEADER_BYTES_MAX = limits.MIB
ZSTD_LEVEL = 19
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Open Inference Protocol datatypes of numbers that golden vectors can hold (BF16 is held as its bits)."""
TEXT = "BYTES"
"""The datatype of text: arrays of `str` objects, which are compared exactly."""
EXACT = 0.0
"""`atol` and `rtol` of what is text."""
ALIGNED_BYTES = 16
"""How NumPy's own memory begins, and with it what applications ask with; vector units sum from there."""
_LENGTH_BYTES = 4
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Sample:
    """Which flat indices of a large output were kept: (start + i · step) mod size."""

    start: int
    step: int
    count: int

    def indices(self, size: int) -> npt.NDArray[np.int64]:
        """Return the kept flat indices of a tensor with `size` elements."""
        return (self.start + np.arange(self.count, dtype=np.int64) * self.step) % size


@dataclass(frozen=True, slots=True)
class Expected:
    """What one output has to be: all of it (`sample` None, `values` has `shape`), or some entries (`values` is flat)."""

    values: Array
    shape: tuple[int, ...]
    sample: Sample | None = None


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an output may be from what is expected."""

    atol: float
    rtol: float
    argmax_margin: float | None = None
    """None: the largest entry is not compared (or the output is sampled)."""


@dataclass(frozen=True, slots=True)
class Vector:
    """One call: inputs and expected outputs under canonical names."""

    inputs: dict[str, Array]
    expected: dict[str, Expected]


@dataclass(frozen=True, slots=True)
class Golden:
    """The golden vectors of one variant."""

    vectors: tuple[Vector, ...]
    tolerances: dict[str, Tolerance]
    synthetic: bool = False
    """Inputs were drawn from the interface's ranges, not taken from data."""


@dataclass(frozen=True, slots=True)
class Miss:
    """One output of one vector that is not what was expected."""

    vector: int
    output: str
    why: str
    """`missing`, `shape`, `dtype`, `value`, `argmax` or `text`."""
    difference: float = 0.0
    """Largest |y − e| over the compared entries, NaN if a NaN or Inf came instead of a number; of text, how many differ."""
    allowed: float = 0.0
    """What was allowed at the entry that is furthest beyond its tolerance."""

    def __str__(self) -> str:
        if self.why in ("value", "argmax"):
            figures = f": off by {self.difference:.3g}, allowed {self.allowed:.3g}"
            return f"vector {self.vector}, output {self.output}: {self.why}{figures}"
        if self.why == "text":
            return f"vector {self.vector}, output {self.output}: text, {self.difference:.0f} of its elements differ"
        return f"vector {self.vector}, output {self.output}: {self.why}"


def check(golden: Golden, run: Callable[[dict[str, Array]], Tensors]) -> list[Miss]:
    """Run every vector and say where the outputs are not what they must be; empty means passed.

    `run` takes and returns tensors under canonical names; what it raises is not caught.
    """
    found: list[Miss] = []
    for index, vector in enumerate(golden.vectors):
        outputs = run(dict(vector.inputs))
        for name, expected in vector.expected.items():
            miss = compare(index, name, expected, golden.tolerances[name], outputs.get(name))
            if miss is not None:
                found.append(miss)
    return found


def compare(vector: int, name: str, expected: Expected, tolerance: Tolerance, output: Array | None) -> Miss | None:
    """Compare one output with what is expected; None means it passes."""
    if output is None:
        return Miss(vector, name, "missing")
    if tuple(output.shape) != expected.shape:
        return Miss(vector, name, "shape")
    if output.dtype != expected.values.dtype:
        return Miss(vector, name, "dtype")
    values = output
    if expected.sample is not None:
        values = output.reshape(-1)[expected.sample.indices(output.size)]
    if is_text(values):
        differ = text_differences(values, expected.values)
        return Miss(vector, name, "text", float(differ)) if differ else None
    have, want = values.astype(np.float64), expected.values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where((have == want) | (np.isnan(have) & np.isnan(want)), 0.0, np.abs(have - want))
        allowed = tolerance.atol + tolerance.rtol * np.abs(want)
        beyond = np.where(np.isfinite(difference), difference - allowed, np.inf)
    if beyond.size and float(beyond.max()) > 0:
        worst = int(beyond.reshape(-1).argmax())
        off = float(difference.reshape(-1)[worst])
        return Miss(vector, name, "value", off if math.isfinite(off) else math.nan, float(allowed.reshape(-1)[worst]))
    if tolerance.argmax_margin is not None and expected.sample is None and want.ndim and want.shape[-1] > 1:
        top = np.sort(want, axis=-1)
        leads = (top[..., -1] - top[..., -2]) > tolerance.argmax_margin
        moved = leads & (have.argmax(axis=-1) != want.argmax(axis=-1))
        if bool(moved.any()):
            return Miss(vector, name, "argmax", float(difference.max()), tolerance.argmax_margin)
    return None


def is_text(array: Array) -> bool:
    """Tell whether an array holds text and not numbers."""
    return array.dtype.kind == "O"


def text_differences(one: Array, other: Array) -> int:
    """Return how many elements of two arrays of text, of one shape, are not the same."""
    return int(np.count_nonzero(one != other))


class _Tensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    sample: tuple[int, int, int] | None = None

    def dtype(self) -> np.dtype[Any]:
        if self.datatype not in DTYPES:
            raise _invalid(f"datatype {self.datatype[:20]!r}")
        return DTYPES[self.datatype]

    def count(self) -> int:
        """Return the number of stored elements; checks shape and sample."""
        if len(self.shape) > limits.TENSOR_RANK_MAX or any(axis < 0 for axis in self.shape):
            raise _invalid(f"shape of {self.name[:80]!r}")
        size = math.prod(self.shape)
        if self.sample is None:
            return size
        start, step, count = self.sample
        if not (0 <= start < size < 1 << 40 and 0 < step <= size and 0 < count <= size):
            raise _invalid(f"sample of {self.name[:80]!r}")
        return count


class _Vector(msgspec.Struct, frozen=True, kw_only=True):
    inputs: list[_Tensor]
    outputs: list[_Tensor]


class _Tolerance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    atol: float
    rtol: float
    argmax_margin: float | None = None


class _Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    format: int
    vectors: list[_Vector]
    tolerances: dict[str, _Tolerance]
    synthetic: bool = False


def encode(golden: Golden) -> bytes:
    """Encode golden vectors; the same values and library version give the same bytes.

    Raises:
        RefusedError: `golden_datatype` for a tensor that the format cannot hold.
    """
    rows: list[_Vector] = []
    raw: list[bytes] = []
    for vector in golden.vectors:
        row = _Vector(inputs=[], outputs=[])
        for name, array in vector.inputs.items():
            row.inputs.append(_Tensor(name=name, datatype=datatype_of(array), shape=list(array.shape)))
            raw.append(_raw(array))
        for name, expected in vector.expected.items():
            sample = expected.sample
            row.outputs.append(
                _Tensor(
                    name=name,
                    datatype=datatype_of(expected.values),
                    shape=list(expected.shape),
                    sample=None if sample is None else (sample.start, sample.step, sample.count),
                )
            )
            raw.append(_raw(expected.values))
        rows.append(row)
    tolerances = {
        name: _Tolerance(atol=t.atol, rtol=t.rtol, argmax_margin=t.argmax_margin)
        for name, t in golden.tolerances.items()
    }
    header = msgspec.json.encode(
        _Header(format=FORMAT, vectors=rows, tolerances=tolerances, synthetic=golden.synthetic), order="deterministic"
    )
    import zstandard  # where bundles are made; devices only decode

    parameters = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, window_log=limits.ZSTD_WINDOW_BYTES_MAX.bit_length() - 1, write_content_size=True, threads=0
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(
        b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *raw])
    )


def decode(data: bytes, *, decoded_bytes_max: int = limits.GOLDEN_DECODED_BYTES_MAX) -> Golden:
    """Decode golden vectors; the arrays are read-only, and aligned as an application's are.

    Raises:
        RefusedError: `golden_invalid`, or `golden_too_large` beyond `decoded_bytes_max`.
    """
    body = _inflate(data, decoded_bytes_max)
    if body[: len(MAGIC)] != MAGIC:
        raise _invalid("wrong magic")
    at = len(MAGIC) + 4
    length = int.from_bytes(body[len(MAGIC) : at], "little")
    if length > HEADER_BYTES_MAX or at + length > len(body):
        raise _invalid(f"header of {length} bytes")
    try:
        header = msgspec.json.decode(body[at : at + length], type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(str(error)) from error
    if header.format != FORMAT:
        raise _invalid(f"format {header.format}, this release reads {FORMAT}")
    if not 1 <= len(header.vectors) <= limits.GOLDEN_VECTORS_MAX:
        raise _invalid(f"{len(header.vectors)} vectors, expected 1 to {limits.GOLDEN_VECTORS_MAX}")
    cursor = _Cursor(body, at + length)
    vectors: list[Vector] = []
    for row in header.vectors:
        inputs = {tensor.name: cursor.take(tensor) for tensor in row.inputs}
        expected: dict[str, Expected] = {}
        for tensor in row.outputs:
            if tensor.name not in header.tolerances:
                raise _invalid(f"output {tensor.name[:80]!r} has no tolerance")
            values = cursor.take(tensor)
            if tensor.sample is None:
                expected[tensor.name] = Expected(values, tuple(tensor.shape))
            else:
                expected[tensor.name] = Expected(values, tuple(tensor.shape), Sample(*tensor.sample))
        if not inputs or not expected:
            raise _invalid("a vector without inputs or outputs")
        vectors.append(Vector(inputs, expected))
    if cursor.at != len(body):
        raise _invalid(f"{len(body) - cursor.at} bytes too many")
    return Golden(tuple(vectors), _tolerances(header), header.synthetic)


def datatype_of(array: Array) -> str:
    """Return the Open Inference Protocol datatype of an array.

    Raises:
        RefusedError: `golden_datatype`.
    """
    if is_text(array):
        return TEXT
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise RefusedError(
            "golden_datatype",
            f"golden vectors cannot hold {array.dtype}",
            consequence="the model cannot be proved on a device, so nothing was built",
            next_step="cast that tensor within the model to a datatype of docs/formats/inference.md",
        )
    return name


def sample_of(size: int, count: int, seed: int = 0) -> Sample:
    """Choose `count` flat indices of a tensor with `size` elements, spread evenly, none twice (count ≤ size).

    The step is the integer nearest below size · (√5 − 1)/2 that shares no factor with size, so that no axis is favoured.
    """
    step = max(1, int(size * 0.6180339887498949))
    while math.gcd(step, size) != 1:
        step -= 1
    return Sample(seed % size, step, min(count, size))


@dataclass(slots=True)
class _Cursor:
    """Takes tensors off the body one after another, never beyond its end."""

    body: bytes
    at: int = field(default=0)
    texts: int = field(default=0)

    def take(self, tensor: _Tensor) -> Array:
        array = self._texts(tensor) if tensor.datatype == TEXT else self._numbers(tensor)
        if tensor.sample is not None:
            return array
        try:
            return array.reshape(tensor.shape)
        except (ValueError, OverflowError) as error:  # a zero axis beside one that no array can have
            raise _invalid(f"shape of {tensor.name[:80]!r}") from error

    def _numbers(self, tensor: _Tensor) -> Array:
        dtype, count = tensor.dtype(), tensor.count()
        if self.at + count * dtype.itemsize > len(self.body):
            raise _invalid(f"{tensor.name[:80]!r} is cut short")
        array = np.frombuffer(self.body, dtype=dtype, count=count, offset=self.at)
        self.at += count * dtype.itemsize
        if (
            array.__array_interface__["data"][0] % ALIGNED_BYTES
        ):  # engines sum such memory in another order, or cannot read it at all
            array = array.copy()
            array.flags.writeable = False
        return array

    def _texts(self, tensor: _Tensor) -> Array:
        count = tensor.count()
        self.texts += count
        if self.texts > limits.GOLDEN_TEXTS_MAX:
            raise _invalid(f"more than {limits.GOLDEN_TEXTS_MAX} elements of text")
        array = np.empty(count, np.object_)
        for index in range(count):
            start = self.at + _LENGTH_BYTES
            stop = start + int.from_bytes(self.body[self.at : start], "little")
            if stop > len(self.body):
                raise _invalid(f"{tensor.name[:80]!r} is cut short")
            try:
                array[index] = self.body[start:stop].decode()
            except UnicodeDecodeError as error:
                raise _invalid(f"{tensor.name[:80]!r} is not UTF-8") from error
            self.at = stop
        array.flags.writeable = False
        return array


def _tolerances(header: _Header) -> dict[str, Tolerance]:
    for name, row in header.tolerances.items():
        margin = row.argmax_margin if row.argmax_margin is not None else 0.0
        if not all(math.isfinite(value) and value >= 0 for value in (row.atol, row.rtol, margin)):
            raise _invalid(f"tolerance of {name[:80]!r}")
    return {name: Tolerance(t.atol, t.rtol, t.argmax_margin) for name, t in header.tolerances.items()}


def _raw(array: Array) -> bytes:
    if is_text(array):
        return b"".join(_raw_text(element) for element in array.ravel().tolist())
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _raw_text(element: object) -> bytes:
    try:
        data = element.encode() if isinstance(element, str) else None
    except UnicodeEncodeError:  # half of a surrogate pair
        data = None
    if data is None:
        raise RefusedError(
            "golden_datatype",
            f"a golden vector holds {type(element).__name__} that is not text",
            consequence="the model cannot be proved on a device, so nothing was built",
            next_step="give samples of str; other bytes go in as UINT8 (docs/adr/0015-bytes-are-text.md)",
        )
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def _inflate(data: bytes, bytes_max: int) -> bytes:
    try:
        body = zstd.inflate(data, bytes_max)
    except zstd.ZstdInvalidError as error:
        raise _invalid(str(error)) from error
    if body is None:
        raise RefusedError(
            "golden_too_large",
            f"golden vectors decode to more than {bytes_max} bytes",
            consequence="the variant cannot be proved here",
            next_step="give fewer or smaller samples, and build the bundle again",
        )
    return body


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "golden_invalid",
        f"not golden vectors: {why}",
        consequence="the variant cannot be proved here",
        next_step="build the bundle again by this release of wherry-optimizer, or update this reader",
    )
