"""Layers that can be seen as y = W x, and what they see of x: what second-order passes need of a network.

Such a layer is a Conv, Gemm or MatMul with one weight of its own. H = Σ x xᵀ over calibration inputs says what moving its
weights costs: ‖(W′ − W) X‖² = tr((W′ − W) H (W′ − W)ᵀ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from wherry_optimizer.activations import Taps, rows_of

COLUMNS_MAX = 8192
"""Layers with more inputs than this are left alone: H would not fit."""

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose weight can be seen as W: (rows, columns), acting on columns of its input."""

    name: str
    operator: str
    input: str
    weight: str
    attributes: dict[str, Any]


def tensor_size(tensor: onnx.TensorProto) -> int:
    """Return the number of elements of an initializer."""
    return int(np.prod(tensor.dims)) if tensor.dims else 1


def relative_error(before: Matrix, after: Matrix, hessian: Matrix) -> float:
    """Return ‖(W′−W) X‖ / ‖W X‖ on the calibration data that made the Hessian."""
    moved = after - before
    energy = float(np.einsum("ij,jk,ik->", before, hessian, before, optimize=True))
    lost = float(np.einsum("ij,jk,ik->", moved, hessian, moved, optimize=True))
    return float(np.sqrt(max(lost, 0.0) / energy)) if energy > 0 else 0.0


def find(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], minimum_elements: int) -> list[Layer]:
    """Return the layers of a prepared graph with weights that are large enough."""
    users: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    found: list[Layer] = []
    for index, node in enumerate(graph.node):
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        tensor = weights.get(node.input[1])
        name = node.name or f"node {index}"
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        columns = _columns(node.op_type, list(tensor.dims), attributes)
        shared = users[node.input[1]] > 1  # a weight with several users has no single input to keep
        if columns is None or shared or columns > COLUMNS_MAX or tensor_size(tensor) < minimum_elements:
            continue
        found.append(Layer(name, node.op_type, node.input[0], node.input[1], attributes))
    return found


def _columns(operator: str, dims: Sequence[int], attributes: Mapping[str, Any]) -> int | None:
    """Return the number of inputs of one output, None where the layer is of a kind that is left alone."""
    if operator == "Conv":
        plain = attributes.get("group", 1) == 1 and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        return int(np.prod(dims[1:])) if len(dims) in (3, 4) and plain else None
    if len(dims) != 2 or attributes.get("transA", 0):
        return None
    return dims[1] if attributes.get("transB", 0) else dims[0]


def as_matrix(weight: Array, layer: Layer) -> Matrix:
    """Return W, (rows, columns): a row for each output channel."""
    if layer.operator == "Conv":
        return weight.reshape(weight.shape[0], -1).astype(np.float64)
    transposed = bool(layer.attributes.get("transB", 0))
    return (weight if transposed else weight.T).astype(np.float64)


def from_matrix(matrix: Matrix, shape: tuple[int, ...], layer: Layer) -> Array:
    """Return a weight of the given shape as the layer stores it; undoes `as_matrix`."""
    if layer.operator == "Conv":
        return matrix.reshape(shape)
    return matrix if layer.attributes.get("transB", 0) else matrix.T


def hessians(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    weights: Mapping[str, onnx.TensorProto],
    calls: Sequence[Mapping[str, Array]],
    positions: int,
    seed: int,
) -> dict[str, Matrix]:
    """Run the model on calls with the layers' inputs as outputs and add up x xᵀ for each.

    Args:
        model: prepared, its weights as they were.
        layers: of it.
        weights: its initializers.
        calls: calibration inputs.
        positions: of a convolution, so many at most are looked at per call.
        seed: draws them.
    """
    rng = np.random.default_rng(seed)
    sums: dict[str, npt.NDArray[np.float32]] = {}
    taps = Taps(model, {layer.input for layer in layers})
    for sample in calls:
        values = taps.run(sample)
        for layer in layers:
            dims = list(weights[layer.weight].dims)
            rows = rows_of(values[layer.input], layer.operator, layer.attributes, dims, positions, rng)
            product = rows.T @ rows
            if layer.name in sums:
                sums[layer.name] += product
            else:
                sums[layer.name] = product
    return {name: total.astype(np.float64) for name, total in sums.items()}


def quantize_channels(weights: Array, axis: int) -> tuple[Array, Array]:
    """Return (int8 weights, float32 scales) with w ≈ q · scale per slice along `axis`; zero stays zero."""
    moved = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    scale = (np.abs(moved).max(axis=1) / 127.0).astype(np.float32)
    # below the smallest normal number the scale itself has too few bits left to be one
    scale = np.where(scale == 0, np.float32(1.0), np.maximum(scale, np.finfo(np.float32).tiny))
    shape = [1] * weights.ndim
    shape[axis] = -1
    return np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8), scale
