"""Coarser weights after training: the weights of a row take few evenly spaced values, and those not yet rounded make up for it.

int8 weights cost some seven bits each in a compressed download, since they use all of 255 steps. Here each output channel
gets a grid of `levels` steps on either side of zero; whatever quantizes to int8 afterwards finds only so many values, so
the codes compress to about the logarithm of their number, while the kernels and their speed stay those of int8.

Columns are rounded one after another, those that see most first, and what rounding one moves the output by is taken
over by the columns that are still free: the second-order step of "Optimal brain compression" (Frantar and Alistarh, 2022) in
the order and with the Cholesky factor of "GPTQ" (Frantar and others, 2023). Layers are rounded in the order of the graph, and make
up for what those before them moved, too (see `layers.in_turn`). What was zero stays zero, so this may
follow pruning.

Tables that Gather reads have no input to hold; they are rounded without making up.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from wherry_optimizer.layers import Matrix, Single, find, from_matrix, in_turn, relative_error, tensor_size
from wherry_optimizer.model import prepare_prunable
from wherry_optimizer.passes import Array, Result, Work, excluded
from wherry_shared.errors import RefusedError

from pathlib import Path  # isort: skip

BLOCK = 128
"""Columns that are rounded before the rest is told."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How coarse, of what, and what to look at."""

    levels: int = 31
    """Steps on either side of zero: 127 would be int8 itself, 7 is what 4 bits hold."""
    minimum_elements: int = 4096
    """Layers with fewer weights are left alone."""
    error_max: float = 0.3
    """A layer whose output would move by more than this share (L2, on calibration data) is left alone."""
    samples: int = 32
    """Calibration samples looked at, and more where they show a layer at few positions."""
    positions: int = 256
    """Positions of a convolution looked at per sample, drawn by the seed."""
    damping: float = 0.01
    """Added to the diagonal of H, as a share of its mean."""
    exclude: list[str] = []
    """Patterns of node names, or of names of tables, that are left alone."""

    def __post_init__(self) -> None:
        """Check what the type cannot say."""
        if not 1 <= self.levels <= 127:
            raise ValueError("levels lies between 1 and 127")


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Round the model's weights; see `passes.Pass`."""
    model = prepare_prunable(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    large = find(model.graph, weights, parameters.minimum_elements)
    layers = [layer for layer in large if not excluded(layer.name, parameters.exclude)]
    report: list[dict[str, Any]] = []
    for seen in in_turn(
        model, layers, work.calibration, parameters.samples, parameters.positions, work.seed, parameters.damping
    ):
        layer = seen.layer
        tensor = weights[layer.weight]
        original = numpy_helper.to_array(tensor)
        rounded = round_matrix(seen.wanted, seen.hessian, parameters.levels, parameters.damping)
        error = relative_error(seen.wanted, rounded, seen.hessian)
        row = {"layer": layer.name[-80:], "weights": int(original.size), "output_error": round(error, 4)}
        if error > parameters.error_max:
            report.append({**row, "left_alone": True})
            continue
        restored = from_matrix(rounded, original.shape, layer).astype(original.dtype)
        tensor.CopyFrom(numpy_helper.from_array(restored, layer.weight))
        report.append(row)
    for name in _tables(model.graph, weights, parameters):
        original = numpy_helper.to_array(weights[name])
        rounded = round_plain(original, parameters.levels)
        gap = float(np.linalg.norm(rounded - original) / max(float(np.linalg.norm(original)), 1e-30))
        row = {"layer": name[-80:], "weights": int(original.size), "output_error": round(gap, 4)}
        if gap > parameters.error_max:
            report.append({**row, "left_alone": True})
            continue
        weights[name].CopyFrom(numpy_helper.from_array(rounded, name))
        report.append(row)
    if all("left_alone" in row for row in report):
        raise RefusedError(
            "pass_noop",
            "rounding changed nothing: no weight is large enough, or all would move beyond error_max",
            consequence="the variant would be the source again",
            next_step="raise levels or error_max of the pass, or take it out of the recipe",
        )
    target = work.folder / "rounded.onnx"
    onnx.save(model, target)
    return Result(target, {"levels": parameters.levels, "layers": report})


def round_matrix(weights: Matrix, hessian: Matrix, levels: int, damping: float) -> Matrix:
    """Return `weights` on a grid for each row, fitted column by column to keep W x.

    The largest weight of a row is kept as the end of its grid, so that int8 by the largest value finds the same steps.

    Args:
        weights: (rows, columns).
        hessian: Σ x xᵀ over calibration inputs, (columns, columns).
        levels: steps on either side of zero.
        damping: see `Parameters.damping`.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = _factor(hessian[np.ix_(order, order)], damping)
    left = weights[:, order].astype(np.float32)
    held, scale = left == 0, _scale(left, levels)
    ends = np.argmax(np.abs(left), axis=1)
    pivots = np.diag(factor)
    found = np.zeros_like(left)
    rows, columns = left.shape
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        gaps = np.zeros((rows, end - begin), np.float32)
        for column in range(begin, end):
            codes = np.clip(np.rint(left[:, column] / scale), -levels, levels)
            codes[held[:, column]] = 0
            last = ends == column
            codes[last] = np.sign(weights[last, order[column]]) * levels
            found[:, column] = codes * scale
            gaps[:, column - begin] = (left[:, column] - found[:, column]) / pivots[column]
            left[:, column + 1 : end] -= gaps[:, column - begin, None] * factor[column, column + 1 : end]
        left[:, end:] -= gaps @ factor[begin:end, end:]
    undone = np.empty_like(found)
    undone[:, order] = found
    return undone.astype(np.float64)


def round_plain(weights: Array, levels: int) -> Array:
    """Return a table, (rows, …), on a grid for each row."""
    flat = weights.reshape(len(weights), -1).astype(np.float32)
    scale = _scale(flat, levels)[:, None]
    return np.asarray(np.rint(flat / scale) * scale, dtype=weights.dtype).reshape(weights.shape)


def _scale(rows: Single, levels: int) -> Single:
    """Return the step of each row's grid; 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1)
    return np.where(largest == 0, np.float32(1), np.maximum(largest, np.finfo(np.float32).tiny) / levels).astype(
        np.float32
    )


def _factor(hessian: Matrix, damping: float) -> Single:
    """Return the upper triangle U with H⁻¹ = Uᵀ U, of the damped H."""
    h = hessian.astype(np.float64, copy=True)
    dead = np.diag(h) == 0  # inputs that are always zero: their weights do nothing here
    h[dead, dead] = 1.0
    h[np.diag_indices(len(h))] += damping * float(np.mean(np.diag(h)))
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


def _tables(graph: onnx.GraphProto, weights: dict[str, onnx.TensorProto], parameters: Parameters) -> list[str]:
    """Return the float tables that Gather alone reads, by rows."""
    users: dict[str, set[bool]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            rows = (
                node.op_type == "Gather"
                and index == 0
                and not any(item.name == "axis" and item.i for item in node.attribute)
            )
            users.setdefault(name, set()).add(rows)
    return [
        name
        for name, tensor in weights.items()
        if users.get(name) == {True}
        and tensor.data_type == onnx.TensorProto.FLOAT
        and len(tensor.dims) >= 2
        and tensor_size(tensor) >= parameters.minimum_elements
        and not excluded(name, parameters.exclude)
    ]
