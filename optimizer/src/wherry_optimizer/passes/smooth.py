"""Channels of activations made alike before int8: what is large in the input of a product is divided, and its weights multiplied.

int8 of activations has one range for a whole tensor, and in transformers a few channels are many times larger than the
others, which are left with few steps. x W = (x / s) (s W) holds for any s, so the trouble is shared with the weights, that
have ranges of their own for each output: s = max|x|^a / max|W|^(1 - a) for each channel (Xiao and others, "SmoothQuant",
2023; with a = 0.75 MiniLM's outputs move half as far as with none, with a = 0.5 by a fifth less).
The division is a Mul of its own in front of the products that read the same input, since what they read is mostly read by
others as well (residuals); it costs little beside them. Float results stay the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from wherry_optimizer.activations import Taps
from wherry_optimizer.layers import Layer, as_matrix, find, from_matrix
from wherry_optimizer.model import prepare_prunable
from wherry_optimizer.passes import Array, Result, Work, excluded
from wherry_shared.errors import RefusedError

FACTOR_MAX = 64.0
"""A channel is divided by at most so much of the usual."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far to go, where, and what to look at."""

    share: float = 0.75
    """How much of the trouble goes into the weights: 0 leaves the activations as they are, 1 makes all channels alike."""
    spread_min: float = 4.0
    """Inputs whose largest channel is at most so many times the median one are left alone."""
    minimum_elements: int = 4096
    """Layers with fewer weights are left alone."""
    samples: int = 32
    exclude: list[str] = []
    """Patterns of node names that are left alone."""

    def __post_init__(self) -> None:
        """Check what the type cannot say."""
        if not 0 < self.share <= 1:
            raise ValueError("share lies between 0 and 1")


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Smooth the model; see `passes.Pass`."""
    model = prepare_prunable(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    groups: dict[str, list[Layer]] = {}
    for layer in find(model.graph, weights, parameters.minimum_elements):
        if layer.operator != "Conv" and not excluded(layer.name, parameters.exclude):
            groups.setdefault(layer.input, []).append(layer)
    largest = _largest(model, groups, work, parameters.samples)
    rows: list[dict[str, Any]] = []
    for name, layers in groups.items():
        usual = float(np.median(largest[name]))
        spread = float(largest[name].max()) / usual if usual else 0.0
        if spread <= parameters.spread_min:
            continue
        matrices = {layer.weight: as_matrix(numpy_helper.to_array(weights[layer.weight]), layer) for layer in layers}
        scale = factors(
            largest[name], np.max([np.abs(one).max(axis=0) for one in matrices.values()], axis=0), parameters.share
        )
        for layer in layers:
            tensor = weights[layer.weight]
            original = numpy_helper.to_array(tensor)
            moved = from_matrix(matrices[layer.weight] * scale, original.shape, layer).astype(original.dtype)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(moved), layer.weight))
        _divide(model.graph, name, matrices, scale)
        rows.append({"input": name[-80:], "layers": len(layers), "spread": round(spread, 1)})
    if not rows:
        raise RefusedError(
            "pass_noop",
            f"smoothing changed nothing: no input of a product has a channel {parameters.spread_min:g} times the median",
            consequence="the variant would be the source again",
            next_step="take this pass out of the recipe",
        )
    target = work.folder / "smooth.onnx"
    onnx.save(model, target)
    return Result(target, {"smoothed": rows})


def factors(activations: Array, weights: Array, share: float) -> Array:
    """Return what each channel is divided by, of geometric mean one.

    Args:
        activations: largest magnitude of each channel.
        weights: that of what it is multiplied with.
        share: see `Parameters.share`.
    """
    floor = np.finfo(np.float32).tiny
    dead = (activations <= floor) | (weights <= floor)
    logs = share * np.log(np.maximum(activations, floor)) - (1 - share) * np.log(np.maximum(weights, floor))
    logs[dead] = np.nan
    if dead.all():
        return np.ones_like(logs)
    bound = np.log(FACTOR_MAX)
    return np.asarray(np.exp(np.clip(np.nan_to_num(logs - np.nanmean(logs)), -bound, bound)))


def _largest(model: onnx.ModelProto, groups: dict[str, list[Layer]], work: Work, samples: int) -> dict[str, Array]:
    """Return the largest magnitude of each channel of each input, over calibration calls."""
    found: dict[str, Array] = {}
    if not groups:
        return found
    taps = Taps(model, groups)
    for call in work.calibration[:samples]:
        for name, value in taps.run(call).items():
            now = np.abs(value.reshape(-1, value.shape[-1])).max(axis=0, initial=0.0).astype(np.float64)
            found[name] = np.maximum(found[name], now) if name in found else now
    return found


def _divide(graph: onnx.GraphProto, name: str, weights: Collection[str], scale: Array) -> None:
    """Put a Mul behind a tensor, for the layers of these weights."""
    factor, smoothed = f"{name}_smoothing", f"{name}_smoothed"
    graph.initializer.append(numpy_helper.from_array((1 / scale).astype(np.float32), factor))
    readers = [index for index, node in enumerate(graph.node) if len(node.input) > 1 and node.input[1] in weights]
    for index in readers:
        graph.node[index].input[0] = smoothed
    graph.node.insert(readers[0], helper.make_node("Mul", [name, factor], [smoothed], name=smoothed))
