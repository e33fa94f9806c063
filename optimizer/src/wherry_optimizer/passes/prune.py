"""Second-order pruning after training: weights go to zero and the others move to make up for it.

For each layer the output y = W x is held as it was on calibration data, H = Σ x xᵀ. Removing weight j of a row costs
w_j² / [H⁻¹]_jj (Hassibi and Stork, "Second order derivatives for network pruning", 1993). Weights go in a few rounds,
most of them early (Zhu and Gupta, "To prune, or not to prune", 2017); after each round the weights that are left are
fitted again, which is the least-squares problem min ‖(W′ − W) X‖² with the zeros held, solved for all rows at once by
conjugate gradients. Going in rounds and fitting matters: with correlated inputs, choosing once and correcting column by
column loses up to seven times as much.

Layers are pruned in the order of the graph, and each is asked for what it should have computed from what it reads now, so that it
also makes up for what those before it moved (see `layers.in_turn`).

N:M patterns (of every M weights in a row at most N stay) go the same way, block by block, as in "SparseGPT: Massive language
models can be accurately pruned in one-shot" (Frantar and Alistarh, 2023).

Zeros in a dense tensor make no CPU faster: what shrinks is the compressed download. Activations come from running the
model with the layers' inputs as extra outputs.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from wherry_optimizer.layers import Matrix, Single, find, from_matrix, in_turn, relative_error, tensor_size
from wherry_optimizer.model import prepare_prunable
from wherry_optimizer.passes import Result, Work, excluded
from wherry_shared.errors import RefusedError

log = logging.getLogger(__name__)

ROUNDS = 5
"""Rounds in which weights are removed."""
FIT_STEPS = 8
"""Steps of conjugate gradients after a round, at most; the last fit gets `LAST_FIT_STEPS`."""
LAST_FIT_STEPS = 30
FIT_GAIN_MIN = 0.02
"""A fit ends with the step that lowers the error by less than this share; the last fit with `LAST_FIT_GAIN_MIN`.

Fits between rounds only have to rank the weights well: with these two ends `file-type` takes about two thirds of the
products with H and its layers move by 1 % more of what pruning moves them."""
LAST_FIT_GAIN_MIN = 0.002


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much to remove, from what, and what to look at."""

    sparsity: float = 0.5
    """Share of weights to remove in each pruned layer."""
    pattern: str = ""
    """`N:M`: of every M weights in a row of a layer at most N stay, such as 2:4; `sparsity` then says nothing."""
    minimum_elements: int = 4096
    """Layers with fewer weights are left alone."""
    error_max: float = 0.5
    """A layer whose output would move by more than this share (L2, on calibration data) is left alone."""
    samples: int = 32
    """Calibration samples looked at, and more where they show a layer at few positions."""
    positions: int = 256
    """Positions of a convolution looked at per sample, drawn by the seed."""
    damping: float = 0.01
    """Added to the diagonal of H, as a share of its mean."""
    exclude: list[str] = []
    """Patterns of node names that are left alone."""

    def __post_init__(self) -> None:
        """Check what the type cannot say."""
        if not 0 < self.sparsity < 1:
            raise ValueError("sparsity lies between 0 and 1")
        if self.pattern and not (re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.pattern) and self.stay < self.of):
            raise ValueError("pattern is N:M with N below M, such as 2:4")

    @property
    def stay(self) -> int:
        """N of the pattern, 0 without one."""
        return int(self.pattern.partition(":")[0] or 0)

    @property
    def of(self) -> int:
        """M of the pattern, 0 without one."""
        return int(self.pattern.partition(":")[2] or 0)


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Prune the model; see `passes.Pass`."""
    model = prepare_prunable(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    large = find(model.graph, weights, parameters.minimum_elements)
    layers = [layer for layer in large if not excluded(layer.name, parameters.exclude)]
    if not layers:
        raise RefusedError(
            "pass_noop",
            "pruning changed nothing: no dense or convolution weight is large enough",
            consequence="the variant would be the source again",
            next_step="raise error_max of the pass, or take it out of the recipe",
        )
    report: list[dict[str, Any]] = []
    for seen in in_turn(
        model, layers, work.calibration, parameters.samples, parameters.positions, work.seed, parameters.damping
    ):
        layer, hessian = seen.layer, seen.hessian
        tensor = weights[layer.weight]
        original = numpy_helper.to_array(tensor)
        if parameters.pattern:
            pruned = prune_pattern(seen.wanted, hessian, parameters.stay, parameters.of, parameters.damping)
        else:
            pruned = prune_matrix(seen.wanted, hessian, parameters.sparsity, parameters.damping)
        error = relative_error(seen.wanted, pruned, hessian)
        row = {"layer": layer.name[-80:], "weights": int(original.size), "output_error": round(error, 4)}
        if error > parameters.error_max:
            report.append({**row, "left_alone": True})
            continue
        restored = from_matrix(pruned, original.shape, layer).astype(original.dtype)
        tensor.CopyFrom(numpy_helper.from_array(restored, layer.weight))
        report.append({**row, "zeros": round(float((restored == 0).mean()), 4)})
    if all("left_alone" in row for row in report):
        raise RefusedError(
            "pass_noop",
            f"pruning changed nothing: every layer would move beyond {parameters.error_max}",
            consequence="the variant would be the source again",
            next_step="raise error_max of the pass, or take it out of the recipe",
        )
    target = work.folder / "pruned.onnx"
    onnx.save(model, target)
    total = sum(tensor_size(tensor) for tensor in weights.values())
    zeros = sum(round(row["weights"] * row.get("zeros", 0)) for row in report)
    return Result(
        target,
        {
            "pattern" if parameters.pattern else "sparsity": parameters.pattern or parameters.sparsity,
            "zeros_of_all_weights": round(zeros / total, 3),
            "layers": report,
        },
    )


def prune_matrix(weights: Matrix, hessian: Matrix, sparsity: float, damping: float) -> Matrix:
    """Return a copy of `weights` with that share of zeros, the rest fitted to keep W x.

    Args:
        weights: (rows, columns).
        hessian: Σ x xᵀ over calibration inputs, (columns, columns).
        sparsity: share of zeros over the whole layer.
        damping: see `Parameters.damping`.
    """
    price, single = _prices(hessian, damping)
    target = weights.astype(np.float32)
    fitted = target
    for number in range(1, ROUNDS + 1):
        share = sparsity * (1 - (1 - number / ROUNDS) ** 3)
        kept = np.ones(weights.size, dtype=bool)
        count = round(share * weights.size)
        if count:
            kept[np.argpartition(fitted**2 * price, count - 1, axis=None)[:count]] = False
        ends = (LAST_FIT_STEPS, LAST_FIT_GAIN_MIN) if number == ROUNDS else (FIT_STEPS, FIT_GAIN_MIN)
        fitted = _fit(target, fitted, kept.reshape(weights.shape), single, *ends)
    return fitted.astype(np.float64)


def prune_pattern(weights: Matrix, hessian: Matrix, stay: int, of: int, damping: float) -> Matrix:
    """Return a copy of `weights` with at most `stay` of every `of` entries of a row left, the rest fitted to keep W x.

    Args:
        weights: (rows, columns); the columns that do not fill a last block of `of` stay as they are.
        hessian: Σ x xᵀ over calibration inputs, (columns, columns).
        stay: N of N:M.
        of: M of N:M.
        damping: see `Parameters.damping`.
    """
    price, single = _prices(hessian, damping)
    target = weights.astype(np.float32)
    rows, columns = target.shape
    whole = columns // of * of
    fitted, left = target, of
    while left > stay:  # a step removes a part of what is too much in each block, so that the others are fitted between
        left = max(stay, left - max(1, (of - stay + ROUNDS - 1) // ROUNDS))
        cost = (fitted**2 * price)[:, :whole].reshape(rows, whole // of, of)
        order = np.argsort(-cost, axis=2, kind="stable")
        kept = np.zeros(cost.shape, dtype=bool)
        np.put_along_axis(kept, order[:, :, :left], True, axis=2)
        mask = np.ones((rows, columns), dtype=bool)
        mask[:, :whole] = kept.reshape(rows, whole)
        ends = (LAST_FIT_STEPS, LAST_FIT_GAIN_MIN) if left == stay else (FIT_STEPS, FIT_GAIN_MIN)
        fitted = _fit(target, fitted, mask, single, *ends)
    return fitted.astype(np.float64)


def _prices(hessian: Matrix, damping: float) -> tuple[Single, Single]:
    """Return what removing a weight costs per square of it, (columns,), and the damped H, of mean diagonal one."""
    h = hessian.astype(np.float64, copy=True)
    dead = np.diag(h) == 0  # inputs that are always zero: their weights do nothing here
    h[dead, dead] = 1.0
    h[np.diag_indices(len(h))] += damping * float(np.mean(np.diag(h)))
    h /= float(np.mean(np.diag(h)))  # then single precision serves the products, which are nearly all of the work
    return (1.0 / np.diag(np.linalg.inv(h))).astype(np.float32), h.astype(np.float32)


def _fit(
    target: Single, start: Single, kept: npt.NDArray[np.bool_], hessian: Single, steps: int, gain_min: float
) -> Single:
    """Minimize (w − t) H (w − t)ᵀ for every row over the kept weights, all others zero.

    Conjugate gradients with H's diagonal as preconditioner; rows are independent problems with step lengths of their
    own, so one product with H serves all. Every step lowers every row's error; at most `steps` are taken, and none after
    one that lowers the sum over rows by less than `gain_min` of it.
    """
    diagonal = np.diag(hessian)
    fitted = np.where(kept, start, np.float32(0))
    gap = target - fitted
    pull = gap @ hessian
    error = float(np.vdot(gap, pull))
    residual = pull * kept
    direction = scaled = residual / diagonal
    size = (residual * scaled).sum(axis=1)
    for _ in range(steps):
        product = (direction @ hessian) * kept
        curvature = (direction * product).sum(axis=1)
        length = np.divide(size, curvature, out=np.zeros_like(size), where=curvature > 0)
        fitted += length[:, None] * direction
        gained = float(length @ size)
        error -= gained
        if gained < gain_min * error:
            break
        residual -= length[:, None] * product
        scaled = residual / diagonal
        after = (residual * scaled).sum(axis=1)
        turn = np.divide(after, size, out=np.zeros_like(size), where=size > 0)[:, None]
        direction, size = scaled + turn * direction, after
    return fitted
