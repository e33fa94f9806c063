"""What flows through a network: the inputs of its layers on calibration samples, as rows of the matrices they multiply.

Second-order pruning and least-squares repair both hold y = W x as it was, for the x that really occur.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from numpy.lib.stride_tricks import sliding_window_view

from wherry_optimizer.model import subgraphs

Array = npt.NDArray[Any]

SENSITIVITY_SAMPLES = 8
"""Calibration samples on which the operators of a model are ranked by what quantizing them costs."""
SENSITIVITY_NODES_MAX = 128


class Taps:
    """A model that also tells tensors from inside."""

    def __init__(self, model: onnx.ModelProto, wanted: Collection[str]) -> None:
        """Open the model.

        Args:
            model: is left as it is.
            wanted: tensors to tell, which may be inputs and outputs as well.
        """
        import onnxruntime

        self._fed = sorted({item.name for item in model.graph.input} & set(wanted))
        self._asked = sorted(set(wanted) - set(self._fed))
        if not self._asked:
            return
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.intra_op_num_threads = 1  # other candidates have the other cores
        self._session = onnxruntime.InferenceSession(
            _part(model, self._asked).SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        self._takes = {item.name for item in self._session.get_inputs()}

    def run(self, sample: Mapping[str, Array]) -> dict[str, Array]:
        """Return the wanted tensors for one call."""
        given = {name: value for name, value in sample.items() if self._asked and name in self._takes}
        found = self._session.run(self._asked, given) if self._asked else []
        return dict(zip(self._asked, found, strict=True)) | {name: sample[name] for name in self._fed}


def _part(model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """Return what makes the wanted tensors, as outputs: ONNX Runtime runs all nodes, whatever it is asked for."""
    graph = model.graph
    needed, kept = set(wanted), []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                for below in subgraphs(inner):
                    needed.update(name for one in below.node for name in one.input)
                    needed.update(output.name for output in below.output)
    known = {output.name: output for output in graph.output}
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = graph.name
    part.graph.node.extend(reversed(kept))
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    part.graph.input.extend(item for item in graph.input if item.name in needed)
    part.graph.output.extend(known.get(name) or onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    return part


def rows_of(
    value: Array,
    operator: str,
    attributes: Mapping[str, Any],
    dims: Sequence[int],
    positions: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Return the inputs of single outputs of a layer, (positions, columns) float32, at most `positions`, drawn by `rng`.

    Args:
        value: input of the layer.
        operator: Conv, Gemm or MatMul.
        attributes: of the node.
        dims: shape of its weight.
        positions: so many at most.
        rng: draws them.
    """
    if operator != "Conv":
        return _some(value.reshape(-1, value.shape[-1]), positions, rng).astype(np.float32)
    spatial = len(dims) - 2
    kernel = [int(size) for size in dims[2:]]
    strides: list[int] = list(attributes.get("strides", [1] * spatial))
    dilations: list[int] = list(attributes.get("dilations", [1] * spatial))
    pads = list(attributes.get("pads", [0] * 2 * spatial))
    padded = np.pad(value, [(0, 0), (0, 0), *((pads[axis], pads[axis + spatial]) for axis in range(spatial))])
    spans = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + spatial))
    windows: Array = sliding_window_view(padded, spans, axes)  # type: ignore[call-overload]  # NumPy's own stub allows one axis only
    # windows: (batch, channels, *out, *span) → strides along out, dilation along span
    steps = tuple(slice(None, None, stride) for stride in strides)
    holes = tuple(slice(None, None, dilation) for dilation in dilations)
    windows = windows[(slice(None), slice(None), *steps, *holes)]
    batch, channels = windows.shape[:2]
    outs = windows.shape[2 : 2 + spatial]
    total = batch * int(np.prod(outs))
    chosen = np.arange(total) if total <= positions else rng.choice(total, positions, replace=False)
    where = np.unravel_index(chosen, (batch, *outs))
    index: tuple[Any, ...] = (where[0], slice(None), *where[1:])
    taken = windows[index]
    return np.asarray(taken, dtype=np.float32).reshape(len(chosen), channels * int(np.prod(kernel)))


def _some(rows: Array, count: int, rng: np.random.Generator) -> Array:
    return rows if len(rows) <= count else rows[rng.choice(len(rows), count, replace=False)]


def run_all(
    model: onnx.ModelProto, names: Sequence[str], calls: Sequence[Mapping[str, Array]], *, as_written: bool = False
) -> list[list[Array]]:
    """Return the named outputs of a model for each call, on one thread; `as_written`: operator by operator, nothing fused."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if as_written:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return [session.run(list(names), dict(call)) for call in calls]


def distance(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> float:
    """Return how far outputs moved: L2, as a share, the largest over the outputs."""
    errors = []
    for index in range(len(wanted[0])):
        gap = sum(
            float(np.square(a[index].astype(np.float64) - b[index]).sum()) for a, b in zip(found, wanted, strict=True)
        )
        size = sum(float(np.square(b[index].astype(np.float64)).sum()) for b in wanted)
        errors.append(float(np.sqrt(gap / size)) if size else float(gap > 0))
    return max(errors, default=0.0)
