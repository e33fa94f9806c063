"""In which numbers a model file keeps its weights, found by looking into it: what a table calls its precision.

The kind that holds the most weights gives the name, among integers where the file is quantized (scales and biases may
stay float), among floats otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from wherry_optimizer.model import Model, is_quantized, read_onnx

FLOAT = "float32"
_ONNX: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
    TensorProto.INT16: "int16",
    TensorProto.UINT16: "int16",
}
"""Other types hold indices and shapes, not weights."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What the weights are. `quantized`: integers with scales, so QDQ on and off are two ways to run it."""

    name: str
    quantized: bool


def precision_of(model: Model) -> Precision:
    """Look into a model file.

    Raises:
        RefusedError: as `model.read_onnx`.
    """
    if model.format == "onnx":
        graph = read_onnx(model.path)
        return _named(_onnx_weights(graph), quantized=is_quantized(graph))
    counts = _tflite_weights(model.path)
    return _named(counts, quantized=any(name.startswith("int") for name in counts))


def _named(counts: Counter[str], *, quantized: bool) -> Precision:
    kinds = Counter({name: count for name, count in counts.items() if name.startswith("int") == quantized})
    fallback = "int8" if quantized else FLOAT
    return Precision(kinds.most_common(1)[0][0] if kinds else fallback, quantized)


def _onnx_weights(model: onnx.ModelProto) -> Counter[str]:
    """Return kind → elements, initializers and constants together."""
    counts: Counter[str] = Counter()
    for tensor in _tensors(model.graph):
        kind = _ONNX.get(tensor.data_type)
        if kind is not None:
            elements = 1
            for length in tensor.dims:
                elements *= length
            counts[kind] += elements
    return counts


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _tflite_weights(path: Path) -> Counter[str]:
    """Return kind → elements of tensors with stored values; integers count only where they have scales."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = {
        schema.TensorType.FLOAT32: "float32",
        schema.TensorType.FLOAT16: "float16",
        schema.TensorType.INT8: "int8",
        schema.TensorType.UINT8: "int8",
        schema.TensorType.INT16: "int16",
        schema.TensorType.INT4: "int4",
    }
    file = schema.Model.GetRootAs(path.read_bytes(), 0)
    counts: Counter[str] = Counter()
    for number in range(file.SubgraphsLength()):
        graph = file.Subgraphs(number)
        for position in range(graph.TensorsLength()):
            tensor = graph.Tensors(position)
            kind = kinds.get(tensor.Type())
            if kind is None or not file.Buffers(tensor.Buffer()).DataLength():
                continue
            scales = tensor.Quantization()
            if kind.startswith("int") and (scales is None or not scales.ScaleLength()):
                continue
            elements = 1
            for axis in range(tensor.ShapeLength()):
                elements *= int(tensor.Shape(axis))
            counts[kind] += elements
    return counts
