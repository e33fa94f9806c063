"""Layers that can be seen as y = W x, and what they see of x: what second-order passes need of a network.

Such a layer is a Conv, Gemm or MatMul with one weight of its own. H = Σ x xᵀ over calibration inputs says what moving its
weights costs: ‖(W′ − W) X‖² = tr((W′ − W) H (W′ − W)ᵀ).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from wherry_optimizer.activations import Stages, rows_of
from wherry_shared.errors import RefusedError

COLUMNS_MAX = 8192
"""Layers with more inputs than this are left alone: H would not fit."""

POSITIONS_WANTED = 4.0
"""Times its columns: a layer is looked at on more calls than was said, where those show fewer positions of it."""
POSITIONS_MIN = 2.0
"""Times its columns: a layer of which fewer positions are seen wants its own W, since what they say is mostly chance."""
FEW = 0.3
"""What a layer wants is held near its own W by this times columns per position, beside the damping."""
ZEROS_MAX = 0.01
"""A layer with more zeros than this was pruned, and they stay."""
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
        if node.input[0] in weights:
            continue  # what it reads is always the same
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A layer, and what is known of it when its turn comes."""

    layer: Layer
    wanted: Matrix
    """W for what the layer reads now, which comes nearest to what the original computes from what it reads there."""
    hessian: Matrix
    """H of what the layer reads now."""


def in_turn(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    calls: Sequence[Mapping[str, Array]],
    samples: int,
    positions: int,
    seed: int,
    damping: float,
) -> Iterator[Seen]:
    """Give one layer after another, each as it is when those before it have been changed.

    The caller changes the weights of `model` between two turns. What that moves is seen by the layers behind it, and they are
    asked to make up for it: min ‖W′ x′ − W x‖² over the calibration positions, x of the original and x′ of the model as it is
    ("GPTAQ: Efficient finetuning-free quantization for asymmetric calibration", Li and others, 2025).

    Args:
        model: prepared, its weights as they were; changed by the caller.
        layers: of it, in the order of the graph.
        calls: calibration inputs.
        samples: so many of them at least are looked at, if there are as many.
        positions: of a convolution, so many at most are looked at per call.
        seed: draws them.
        damping: holds `wanted` near W, as a share of the mean of H's diagonal. A layer that was pruned before wants W.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    original = onnx.ModelProto()
    original.CopyFrom(model)
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.input, []).append(layer)
    now, before = Stages(model, calls), Stages(original, calls)
    for number, (name, group) in enumerate(groups.items()):
        values, old = now.reach(name), before.reach(name)
        for key in dict.fromkeys(_reads(one, weights) for one in group):
            same = [one for one in group if _reads(one, weights) == key]
            dims = list(weights[same[0].weight].dims)
            seen = values, old if number else None  # nothing was changed before the first
            hessian, cross, count = _moments(*seen, same[0], dims, samples, positions, seed)
            for layer in same:
                weight = as_matrix(numpy_helper.to_array(weights[layer.weight]), layer)
                yield Seen(layer, _wanted(weight, hessian, cross, damping, count), hessian)


def _reads(layer: Layer, weights: Mapping[str, onnx.TensorProto]) -> tuple[Any, ...]:
    """Return what decides which columns a layer makes of its input."""
    if layer.operator != "Conv":
        return ("rows",)
    return (
        *weights[layer.weight].dims[1:],
        *(str(layer.attributes.get(key)) for key in ("strides", "dilations", "pads")),
    )


def _moments(
    values: Sequence[Array],
    old: Sequence[Array] | None,
    layer: Layer,
    dims: Sequence[int],
    samples: int,
    positions: int,
    seed: int,
) -> tuple[Matrix, Matrix | None, int]:
    """Return Σ x′ x′ᵀ, Σ x x′ᵀ (only where there is an original, and enough to compare with it), and how many x′ there were."""
    rng = np.random.default_rng(seed)
    count, enough = 0, False
    total: Single | None = None
    mixed: Single | None = None
    if old is not None:
        values = values[: len(old)]
    for number, value in enumerate(values):
        if number >= samples and total is not None and count >= POSITIONS_WANTED * len(total):
            break
        state = rng.bit_generator.state
        rows = rows_of(value, layer.operator, layer.attributes, dims, positions, rng)
        if number == 0:
            enough = len(rows) * len(values) >= POSITIONS_MIN * rows.shape[1]
        count += len(rows)
        total = rows.T @ rows if total is None else total + rows.T @ rows
        if old is not None and enough:
            rng.bit_generator.state = state  # the same places
            other = rows_of(old[number], layer.operator, layer.attributes, dims, positions, rng)
            mixed = other.T @ rows if mixed is None else mixed + other.T @ rows
    if total is None:
        raise RefusedError(
            "data_missing",
            "there is no calibration call to look at",
            consequence="the variant was not made",
            next_step="give the recipe calibration data",
        )
    return total.astype(np.float64), None if mixed is None else mixed.astype(np.float64), count


def _wanted(weight: Matrix, hessian: Matrix, cross: Matrix | None, damping: float, count: int) -> Matrix:
    """Return W (C + λ) (H + λ)⁻¹, C = Σ x x′ᵀ."""
    if cross is None or float((weight == 0).mean()) > ZEROS_MAX:
        return weight
    dead = np.diag(hessian) == 0
    share = damping + FEW * len(hessian) / count
    extra = np.full(len(hessian), share * float(np.mean(np.diag(hessian))))
    extra[dead] = 1.0  # what is always zero wants nothing else
    ridge = np.diag(extra)
    return np.asarray(np.linalg.solve(hessian + ridge, (weight @ (cross + ridge)).T).T)


def quantize_channels(weights: Array, axis: int) -> tuple[Array, Array]:
    """Return (int8 weights, float32 scales) with w ≈ q · scale per slice along `axis`; zero stays zero."""
    moved = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    scale = (np.abs(moved).max(axis=1) / 127.0).astype(np.float32)
    # below the smallest normal number the scale itself has too few bits left to be one
    scale = np.where(scale == 0, np.float32(1.0), np.maximum(scale, np.finfo(np.float32).tiny))
    shape = [1] * weights.ndim
    shape[axis] = -1
    return np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8), scale
