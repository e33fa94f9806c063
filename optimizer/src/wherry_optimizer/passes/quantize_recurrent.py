"""Dynamic int8 of LSTM layers: weights int8 per gate and row, ranges of inputs and states taken anew at every step.

Static quantizers leave recurrent layers float, and a dynamic one makes ConvInteger of the convolutions beside them. Here
only the LSTM becomes onnxruntime's DynamicQuantizeLSTM, and `quantize-static` may come before or after. Weights that an
exporter slices and stacks from others are no weights yet: `simplify` before it folds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from wherry_optimizer.layers import quantize_channels
from wherry_optimizer.model import prepare, read_onnx, subgraphs
from wherry_optimizer.passes import Array, Result, Work, excluded
from wherry_shared.errors import RefusedError

DOMAIN = "com.microsoft"
OPERATOR = "DynamicQuantizeLSTM"
INPUTS = 8
"""Of an LSTM: X, W, R, B, lengths, first h, first c, peepholes. The quantized one has scales and zero points after them."""
KEPT = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")
"""Attributes that both operators have."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to quantize."""

    exclude: list[str] = []
    """Patterns of node names that stay float."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the recurrent layers; see `passes.Pass`."""
    model = prepare(read_onnx(path))
    count = sum(_quantize(graph, parameters.exclude) for graph in subgraphs(model.graph))
    if not count:
        raise RefusedError(
            "pass_noop",
            "quantization changed nothing: no LSTM whose weights are constants of its own",
            consequence="the variant would be the source again",
            next_step="put `simplify` before this pass, or take it out of the recipe",
        )
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    target = work.folder / "recurrent.onnx"
    onnx.save(model, target)
    return Result(target, {"quantized_nodes": count})


def _quantize(graph: onnx.GraphProto, exclude: Collection[str]) -> int:
    """Quantize the layers of one graph that have weights of their own in it; return how many."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    read = Counter(name for inner in subgraphs(graph) for node in inner.node for name in node.input)
    count = 0
    for node in graph.node:
        if node.op_type != "LSTM" or node.domain not in ("", "ai.onnx") or excluded(node.name, exclude):
            continue
        attributes = {item.name: item for item in node.attribute}
        batch_first = "layout" in attributes and attributes["layout"].i
        if batch_first or not all(_own(name, weights, read) for name in node.input[1:3]):
            continue
        inputs = [*node.input, *[""] * (INPUTS - len(node.input))]
        for index in (1, 2):
            tensor = weights[inputs[index]]
            stored = _stored(numpy_helper.to_array(tensor), tensor.name)
            graph.initializer.remove(tensor)
            graph.initializer.extend(stored)
            inputs[index] = stored[0].name
            inputs += [one.name for one in stored[1:]]
        made = helper.make_node(OPERATOR, inputs, list(node.output), name=node.name, domain=DOMAIN)
        made.attribute.extend(item for name, item in attributes.items() if name in KEPT)
        node.CopyFrom(made)
        count += 1
    return count


def _own(name: str, weights: Mapping[str, onnx.TensorProto], read: Mapping[str, int]) -> bool:
    tensor = weights.get(name)
    if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or read[name] > 1:
        return False
    return bool(np.isfinite(numpy_helper.to_array(tensor)).all())


def _stored(weight: Array, name: str) -> list[onnx.TensorProto]:
    """Return a weight (directions, 4 hidden, inputs) as (directions, inputs, 4 hidden) of int8, with scales and zero points."""
    directions, gates, inputs = weight.shape
    values, scale = quantize_channels(weight.reshape(directions * gates, inputs), 0)
    turned = np.ascontiguousarray(values.reshape(weight.shape).transpose(0, 2, 1))
    return [
        numpy_helper.from_array(turned, f"{name}_int8"),
        numpy_helper.from_array(scale.reshape(directions, gates), f"{name}_scale"),
        numpy_helper.from_array(np.zeros((directions, gates), np.int8), f"{name}_zero"),
    ]
