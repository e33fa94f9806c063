"""Weight-only int8 of an ONNX model: each large float weight becomes int8 per channel behind a DequantizeLinear.

Arithmetic stays float, so accuracy hardly moves and no calibration is needed; what shrinks is the file. The runtime
folds the dequantization at load only with the session option `disable_quant_qdq`, which the variant should carry.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from wherry_optimizer.model import is_quantized, prepare, read_onnx
from wherry_optimizer.passes import Array, Result, Work, excluded
from wherry_shared.errors import RefusedError

OUTPUT_AXIS = {"Conv": 0, "MatMul": 1, "Gather": 0}


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to quantize."""

    minimum_elements: int = 1024
    """Smaller weights stay float."""
    exclude: list[str] = []
    """Patterns of weight names that stay float."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the weights; see `passes.Pass`."""
    source = read_onnx(path)
    if is_quantized(source):
        raise RefusedError(
            "already_quantized",
            f"{path.name} holds quantized operators already",
            consequence="the variant was not made",
            next_step="take this pass out of the recipe, or name the float file as its source",
        )
    model = prepare(source)
    graph = model.graph
    axes = _axes(graph)
    count = 0
    nodes: list[onnx.NodeProto] = []
    for tensor in list(graph.initializer):
        axis = axes.get(tensor.name)
        if axis is None or tensor.data_type != onnx.TensorProto.FLOAT or excluded(tensor.name, parameters.exclude):
            continue
        weights = numpy_helper.to_array(tensor)
        if weights.size < parameters.minimum_elements or axis >= weights.ndim:
            continue
        quantized, scale = quantize_channels(weights, axis)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(quantized, f"{tensor.name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{tensor.name}_scale"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{tensor.name}_int8", f"{tensor.name}_scale"], [tensor.name], axis=axis
            )
        )
        count += 1
    if not count:
        raise RefusedError(
            "pass_noop",
            "quantization changed nothing: no weight is large enough",
            consequence="the variant would be the source again",
            next_step="take this pass out of the recipe",
        )
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    onnx.checker.check_model(model)
    target = work.folder / "weights-int8.onnx"
    onnx.save(model, target)
    return Result(target, {"quantized_weights": count})


def quantize_channels(weights: Array, axis: int) -> tuple[Array, Array]:
    """Return (int8 weights, float32 scales) with w ≈ q · scale per slice along `axis`; zero stays zero."""
    moved = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    scale = (np.abs(moved).max(axis=1) / 127.0).astype(np.float32)
    # below the smallest normal number the scale itself has too few bits left to be one
    scale = np.where(scale == 0, np.float32(1.0), np.maximum(scale, np.finfo(np.float32).tiny))
    shape = [1] * weights.ndim
    shape[axis] = -1
    return np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def _axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the output-channel axis of every weight that all its users read in the same way."""
    found: dict[str, int | None] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            axis: int | None = None
            if node.op_type == "Gemm" and index == 1:
                axis = 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1
            elif (node.op_type in ("Conv", "MatMul") and index == 1) or (node.op_type == "Gather" and index == 0):
                axis = OUTPUT_AXIS[node.op_type]
            found[name] = axis if found.get(name, axis) == axis else None
    return {name: axis for name, axis in found.items() if axis is not None}
