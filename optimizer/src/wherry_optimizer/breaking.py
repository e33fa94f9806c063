"""Files with one thing wrong: what golden vectors are chosen to notice, and what they are measured by.

Digests catch all of it on the way to a device. Golden vectors stand for what digests cannot see: an engine, a driver or a CPU
that computes something else, a build that took the wrong file. Five ways of being wrong are tried, at places drawn by a seed:

- `bit`: a high bit of one weight turned,
- `zeroed`: one slice of a weight gone,
- `exchanged`: two slices of a weight in each other's place,
- `scaled`: a weight, or the scale that an integer weight is read by, `SCALED` times what it is,
- `swapped`: two weights of one shape, so two layers, in each other's place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from wherry_optimizer.model import subgraphs
from wherry_shared.bundle import Format

Array = npt.NDArray[Any]
_Get = Callable[[], Array]
_Put = Callable[[Array], None]
_Places = list[tuple[_Get, _Put, str]]

KINDS = ("bit", "zeroed", "exchanged", "scaled", "swapped")
SCALED = 1.1
ELEMENTS_MIN = 64
"""Smaller weights are not broken: most of them are shapes and scales."""
DRAWS_MAX = 20
"""A break that changes nothing (rows of zeros exchanged) is drawn again, so often."""
BYTES_MAX = 256 * 2**20
"""Larger files are not broken: each takes a copy in memory and on disk."""


def broken(data: bytes, format_: Format, tries: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (kind, file) with one thing wrong each, the kinds in turn; fewer where a model has hardly any weights.

    Args:
        data: an ONNX or TFLite file.
        format_: of the file.
        tries: so many files.
        seed: of the places.
    """
    if len(data) > BYTES_MAX:
        return
    rng = np.random.default_rng(seed)
    model = _Onnx(data) if format_ == "onnx" else _Tflite(data)
    for number in range(tries):
        kind = KINDS[number % len(KINDS)]
        for _ in range(DRAWS_MAX):
            undo = model.break_one(kind, rng)
            if undo is not None:
                yield kind, model.serialised()
                undo()
                break


def break_weights(values: Array, kind: str, rng: np.random.Generator) -> Array:
    """Return a copy of a weight that is broken in one place (`bit`, `zeroed` or `exchanged`)."""
    made = np.array(values)
    if kind == "bit":
        flat = made.reshape(-1).view(f"u{made.itemsize}")
        place = int(rng.integers(flat.size))
        flat[place] ^= flat.dtype.type(1 << (8 * made.itemsize - 2))
        return made
    rows = made.reshape(len(made), -1) if made.ndim > 1 and len(made) > 1 else made.reshape(-1, 1)
    one, two = rng.choice(len(rows), 2, replace=False)
    if kind == "zeroed":
        rows[one] = 0
    else:
        rows[[one, two]] = rows[[two, one]]
    return rows.reshape(made.shape)


class _Weights(ABC):
    """Weights of a model that can be read, written and drawn."""

    def __init__(self) -> None:
        self.places: _Places = []
        """(read, write, name) of each weight that is large enough."""
        self.scales: dict[str, tuple[_Get, _Put]] = {}
        """Name of an integer weight → its scale."""

    @abstractmethod
    def serialised(self) -> bytes:
        """Return the file."""

    def break_one(self, kind: str, rng: np.random.Generator) -> Callable[[], None] | None:
        """Break one place; return what mends it again, or None where nothing was changed."""
        if not self.places:
            return None
        sizes = np.array([get().size for get, _, _ in self.places], dtype=np.float64)
        index = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
        get, put, name = self.places[index]
        values = get()
        if kind == "swapped":
            alike = [
                place
                for number, place in enumerate(self.places)
                if number != index and place[0]().shape == values.shape and place[0]().dtype == values.dtype
            ]
            if not alike:
                return None
            other_get, other_put, _ = alike[int(rng.integers(len(alike)))]
            other = other_get()
            if other.tobytes() == values.tobytes():
                return None

            def swap(one: Array, two: Array) -> None:
                put(one)
                other_put(two)

            swap(other, values)
            return lambda: swap(values, other)
        if kind == "scaled":
            if values.dtype.kind != "f":
                if name not in self.scales:
                    return None
                get, put = self.scales[name]
                values = get()
            made = (values * SCALED).astype(values.dtype)
        else:
            made = break_weights(values, kind, rng)
        if made.tobytes() == values.tobytes():
            return None
        put(made)
        return lambda: put(values)


class _Onnx(_Weights):
    """Initializers and constants, also of subgraphs."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._model = onnx.load_from_string(data)
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
        named: dict[str, TensorProto] = {}
        for graph in subgraphs(self._model.graph):
            for tensor in graph.initializer:
                named[tensor.name] = tensor
            for node in graph.node:
                for item in node.attribute:
                    if item.type == onnx.AttributeProto.TENSOR:
                        named[node.output[0]] = item.t
        self.places = [
            (*_tensor(tensor), name)
            for name, tensor in named.items()
            if tensor.data_type in kinds and int(np.prod(tensor.dims)) >= ELEMENTS_MIN
        ]
        for graph in subgraphs(self._model.graph):
            for node in graph.node:
                if node.op_type == "DequantizeLinear" and node.input[1] in named:
                    self.scales[node.input[0]] = _tensor(named[node.input[1]])

    def serialised(self) -> bytes:
        return bytes(self._model.SerializeToString())


def _tensor(tensor: TensorProto) -> tuple[_Get, _Put]:
    name = tensor.name
    return (
        lambda: numpy_helper.to_array(tensor),
        lambda values: tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name)),
    )


class _Tflite(_Weights):
    """Tensors with stored values."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        from ai_edge_litert import schema_py_generated as schema

        self._model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
        self._size = len(data)
        types: Mapping[int, Any] = {
            schema.TensorType.FLOAT32: np.float32,
            schema.TensorType.FLOAT16: np.float16,
            schema.TensorType.INT8: np.int8,
        }
        for number, graph in enumerate(self._model.subgraphs):
            for position, tensor in enumerate(graph.tensors):
                buffer = self._model.buffers[tensor.buffer]
                size = int(np.prod(tensor.shape)) if tensor.shape is not None and len(tensor.shape) else 0
                if tensor.type not in types or buffer.data is None or size < ELEMENTS_MIN:
                    continue
                name = f"{number}/{position}"
                self.places.append((*_buffer(buffer, types[tensor.type], list(tensor.shape)), name))
                scales = tensor.quantization.scale if tensor.quantization is not None else None
                if scales is not None and len(scales):
                    self.scales[name] = _scale(tensor.quantization)

    def serialised(self) -> bytes:
        import flatbuffers

        builder = flatbuffers.Builder(self._size)
        builder.Finish(self._model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def _buffer(buffer: Any, dtype: Any, shape: Sequence[int]) -> tuple[_Get, _Put]:
    def get() -> Array:
        found: Array = np.asarray(buffer.data, dtype=np.uint8).view(dtype).reshape(shape)
        return found

    def put(values: Array) -> None:
        buffer.data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    return get, put


def _scale(quantization: Any) -> tuple[_Get, _Put]:
    def put(values: Array) -> None:
        quantization.scale = values

    return lambda: np.asarray(quantization.scale, dtype=np.float32), put
