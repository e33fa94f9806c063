"""Weight-only int8 or 4-bit of an ONNX model: each large float weight is stored as integers and decoded by the graph.

Arithmetic stays float, so accuracy hardly moves and no calibration is needed; what shrinks is the file. Weights of Conv,
ConvTranspose, MatMul, Gemm, Gather tables and of LSTM, GRU and RNN are taken, also within subgraphs.

How they are decoded is `form`:

- `dequantize`: a DequantizeLinear. The runtime folds it at load only with the session option `disable_quant_qdq`, which
  the variant should then carry, and which a model with static QDQ must not.
- `fold`: any weight of two axes or more; Cast and Mul (4-bit: shifts first), which every runtime folds into float weights while it loads the model. It
  costs nothing at run time, needs no option, and may follow static or dynamic int8, whose operators it leaves alone.

Memory is that of float weights once they are folded. Large int8 tables that Gather reads are not: their rows are decoded after they
were picked, and the table stays as small in memory as it is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from wherry_optimizer.layers import quantize_channels
from wherry_optimizer.model import is_quantized, prepare, read_onnx, subgraphs
from wherry_optimizer.passes import Array, Result, Work, excluded
from wherry_shared.errors import RefusedError

OUTPUT_AXIS = {("Conv", 1): 0, ("MatMul", 1): 1, ("Gather", 0): 0, ("ConvTranspose", 1): 1} | {
    (operator, index): 1 for operator in ("LSTM", "GRU", "RNN") for index in (1, 2)
}
"""(operator, input) → axis of the weight along which each slice has a scale of its own: that of output channels."""
TABLE_BYTES_MIN = 2**20
"""A float table of Gather from this size on is decoded row by row, as rows are picked; smaller ones are folded."""
NIBBLE_ZERO = 8
"""4-bit values are stored with this offset, so that 0 stays 0."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to quantize."""

    minimum_elements: int = 1024
    """Smaller weights stay float."""
    exclude: list[str] = []
    """Patterns of weight names that stay float."""
    form: Literal["dequantize", "fold"] = "dequantize"
    bits: Literal[4, 8] = 8
    """4 needs form `fold`, and takes MatMul, Gemm and Gather weights; the others become int8."""
    block: int = 32
    """4-bit: so many values in a row share a scale."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        if self.bits == 4 and self.form != "fold":
            raise ValueError("4 bits need form = 'fold'")
        if self.block < 2 or self.block % 2:
            raise ValueError("block is an even number from 2 on")


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the weights; see `passes.Pass`."""
    source = read_onnx(path)
    if is_quantized(source) and parameters.form == "dequantize":
        raise RefusedError(
            "already_quantized",
            f"{path.name} holds quantized operators already",
            consequence="the variant was not made",
            next_step="take this pass out of the recipe, name the float file as its source, or say form = 'fold'",
        )
    model = prepare(source)
    counts = [_quantize_graph(graph, parameters) for graph in subgraphs(model.graph)]
    eight, four = sum(row[0] for row in counts), sum(row[1] for row in counts)
    if not eight + four:
        raise RefusedError(
            "pass_noop",
            "quantization changed nothing: no weight is large enough",
            consequence="the variant would be the source again",
            next_step="take this pass out of the recipe",
        )
    onnx.checker.check_model(model)
    target = work.folder / f"weights-int{parameters.bits}.onnx"
    onnx.save(model, target)
    return Result(target, {"quantized_weights": eight + four} | ({"of_4_bits": four} if parameters.bits == 4 else {}))


def _quantize_graph(graph: onnx.GraphProto, parameters: Parameters) -> tuple[int, int]:
    """Quantize the initializers of one graph; return how many became int8 and 4-bit."""
    axes = _axes(graph, anything=parameters.form == "fold")
    eight = four = 0
    nodes: list[onnx.NodeProto] = []
    for tensor in list(graph.initializer):
        found = axes.get(tensor.name)
        if found is None or tensor.data_type != TensorProto.FLOAT or excluded(tensor.name, parameters.exclude):
            continue
        operator, axis = found
        weights = numpy_helper.to_array(tensor)
        if weights.size < parameters.minimum_elements or axis >= weights.ndim or not np.isfinite(weights).all():
            continue
        graph.initializer.remove(tensor)
        halves = parameters.bits == 4 and operator in ("MatMul", "Gemm", "Gather") and weights.ndim == 2
        if halves:
            decode, stored = _four_bits(weights, axis, parameters.block, tensor.name)
            four += 1
        elif (
            parameters.form == "fold"
            and operator == "Gather"
            and weights.nbytes >= TABLE_BYTES_MIN
            and (readers := _gathers(graph, tensor.name))
        ):
            decode, stored = [], _rows(graph, weights, tensor.name, readers)
            eight += 1
        else:
            decode, stored = _eight_bits(weights, axis, tensor.name, parameters.form)
            eight += 1
        graph.initializer.extend(stored)
        nodes += decode
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return eight, four


def _eight_bits(weights: Array, axis: int, name: str, form: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    quantized, scale = quantize_channels(weights, axis)
    values = numpy_helper.from_array(quantized, f"{name}_int8")
    if form == "dequantize":
        node = helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=axis)
        return [node], [values, numpy_helper.from_array(scale, f"{name}_scale")]
    shape = [1] * weights.ndim
    shape[axis] = -1
    nodes = [
        helper.make_node("Cast", [f"{name}_int8"], [f"{name}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_cast", f"{name}_scale"], [name]),
    ]
    return nodes, [values, numpy_helper.from_array(scale.reshape(shape), f"{name}_scale")]


def _gathers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """Return the nodes of this very graph that read a table, nothing if others do too."""
    readers = [node for node in graph.node if name in node.input]
    return readers if len(readers) == sum(name in node.input for node in _nodes(graph)) else []


def _rows(graph: onnx.GraphProto, weights: Array, name: str, readers: list[onnx.NodeProto]) -> list[onnx.TensorProto]:
    """Let Gather pick int8 rows and their scales, and decode what was picked; return the table and the scales."""
    quantized, scale = quantize_channels(weights, 0)
    outputs = {node.output[0] for node in readers}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if not outputs.intersection(node.output):
            kept.append(node)
            continue
        indices, out = node.input[1], node.output[0]
        kept += [
            helper.make_node(
                "Gather", [f"{name}_int8", indices], [f"{out}_int8"], name=f"{node.name or out}_int8", axis=0
            ),
            helper.make_node(
                "Gather", [f"{name}_scale", indices], [f"{out}_scale"], name=f"{node.name or out}_scale", axis=0
            ),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out]),
        ]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
    shape = [-1] + [1] * (weights.ndim - 1)
    return [
        numpy_helper.from_array(quantized, f"{name}_int8"),
        numpy_helper.from_array(scale.reshape(shape), f"{name}_scale"),
    ]


def _four_bits(weights: Array, axis: int, block: int, name: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Store a matrix as nibbles: rows are output channels, and each `block` of a row has a scale of its own."""
    rows = np.ascontiguousarray(np.moveaxis(weights, axis, 0))
    packed, scale, columns = pack_nibbles(rows, block)
    stored = [
        numpy_helper.from_array(packed, f"{name}_int4"),
        numpy_helper.from_array(scale, f"{name}_scale"),
        numpy_helper.from_array(np.array(4, np.uint8), f"{name}_four"),
        numpy_helper.from_array(np.array(NIBBLE_ZERO, np.float32), f"{name}_zero"),
        numpy_helper.from_array(np.array([len(rows), -1], np.int64), f"{name}_rows"),
        numpy_helper.from_array(np.array([0], np.int64), f"{name}_start"),
        numpy_helper.from_array(np.array([columns], np.int64), f"{name}_end"),
        numpy_helper.from_array(np.array([1], np.int64), f"{name}_axis"),
    ]
    whole = name if axis == 0 else f"{name}_whole"
    nodes = [
        helper.make_node("BitShift", [f"{name}_int4", f"{name}_four"], [f"{name}_high"], direction="RIGHT"),
        helper.make_node("BitShift", [f"{name}_int4", f"{name}_four"], [f"{name}_left"], direction="LEFT"),
        helper.make_node("BitShift", [f"{name}_left", f"{name}_four"], [f"{name}_low"], direction="RIGHT"),
        helper.make_node("Concat", [f"{name}_low", f"{name}_high"], [f"{name}_both"], axis=2),
        helper.make_node("Cast", [f"{name}_both"], [f"{name}_cast"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_cast", f"{name}_zero"], [f"{name}_centred"]),
        helper.make_node("Mul", [f"{name}_centred", f"{name}_scale"], [f"{name}_scaled"]),
        helper.make_node("Reshape", [f"{name}_scaled", f"{name}_rows"], [f"{name}_long"]),
        helper.make_node("Slice", [f"{name}_long", f"{name}_start", f"{name}_end", f"{name}_axis"], [whole]),
    ]
    if axis:
        nodes.append(helper.make_node("Transpose", [whole], [name], perm=[1, 0]))
    return nodes, stored


def pack_nibbles(rows: Array, block: int) -> tuple[Array, Array, int]:
    """Return (packed uint8 (rows, blocks, block / 2), scales float32 (rows, blocks, 1), columns) of a float matrix.

    The first half of a block is in the low nibbles, the second in the high ones.
    """
    count, columns = rows.shape
    blocks = -(-columns // block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    values = padded.reshape(count, blocks, block)
    scale = np.abs(values).max(axis=2, keepdims=True) / 7.0
    scale = np.where(scale == 0, np.float32(1.0), np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.float32)
    nibbles = (np.clip(np.rint(values / scale), -7, 7) + NIBBLE_ZERO).astype(np.uint8)
    return nibbles[:, :, : block // 2] | (nibbles[:, :, block // 2 :] << 4), scale, columns


def _axes(graph: onnx.GraphProto, *, anything: bool) -> dict[str, tuple[str, int]]:
    """Return operator and output-channel axis of every weight that all its users read in the same way.

    With `anything`, others are given their first axis: a weight that is decoded before it is used may be used in any way,
    such as being sliced and stacked first, as exporters do with those of recurrent cells. What an operator of another domain
    reads stays: quantized ones have their scales there.
    """
    foreign: set[str] = set()
    found: dict[str, tuple[str, int] | None] = {}
    for node in _nodes(graph):
        for index, name in enumerate(node.input):
            axis = OUTPUT_AXIS.get((node.op_type, index))
            if node.op_type == "Gemm" and index == 1:
                axis = 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1
            known_domain = node.domain in ("", "ai.onnx")
            foreign |= set() if known_domain else {name}
            use = None if axis is None or not known_domain else (node.op_type, axis)
            found[name] = use if found.get(name, use) == use else None
    outputs = {item.name for item in graph.output}
    known = {name: use for name, use in found.items() if use is not None and name not in outputs}
    if anything:
        ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        others = found.keys() - known.keys() - foreign
        known |= {name: ("", 0) for name in others if ranks.get(name, 0) >= 2}
    return known


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of all below it, which read its weights as well."""
    for inner in subgraphs(graph):
        yield from inner.node
