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
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]

SENSITIVITY_SAMPLES = 8
"""Calibration samples on which the operators of a model are ranked by what quantizing them costs."""
SENSITIVITY_NODES_MAX = 128


KEPT_BYTES_MAX = 2**30
"""Of what `Stages` keeps between two of them."""
KEPT_CALLS_MIN = 8
"""So many calls are kept whatever they take."""


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
        self._session = onnxruntime.InferenceSession(
            _part(model, self._asked).SerializeToString(), _quiet(), providers=["CPUExecutionProvider"]
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
        needed.update(_reads(node))
    known = {output.name: output for output in graph.output}
    inputs = [item for item in graph.input if item.name in needed]
    outputs = [known.get(name) or onnx.helper.make_empty_tensor_value_info(name) for name in wanted]
    return _of_nodes(model, kept[::-1], inputs, outputs)


def part_of(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], given: Mapping[str, Array], wanted: Sequence[str]
) -> onnx.ModelProto:
    """Return some nodes of a model as a model of its own, which takes values like those given.

    Args:
        model: whose weights the nodes read.
        nodes: in its order.
        given: tensors from outside; only their datatypes and numbers of axes count.
        wanted: tensors that the nodes make.
    """
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in given.items()
    ]
    return _of_nodes(model, nodes, inputs, [onnx.helper.make_empty_tensor_value_info(name) for name in wanted])


def _of_nodes(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(nodes)
    needed = {name for node in nodes for name in _reads(node)} | {output.name for output in outputs}
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    part.graph.input.extend(inputs)
    part.graph.output.extend(outputs)
    return part


class Stages:
    """A model run on several calls from one tensor to the next: every node runs once, with the weights that it has by then.

    What is read later is kept for every call. Where that is more than `KEPT_BYTES_MAX`, the last calls are given up.
    """

    def __init__(self, model: onnx.ModelProto, calls: Sequence[Mapping[str, Array]]) -> None:
        """Begin before the first node.

        Args:
            model: its weights may be changed between two stages, its nodes not.
            calls: inputs.
        """
        self._model = model
        self._kept = [dict(call) for call in calls]
        self._left = {index: _reads(node) for index, node in enumerate(model.graph.node)}
        """Nodes that have not run, and what they read."""
        self._makers = {name: index for index, node in enumerate(model.graph.node) for name in node.output if name}

    def reach(self, name: str) -> list[Array]:
        """Return a tensor for every call, those that were given up excepted; what was reached before may be forgotten."""
        if self._kept and name not in self._kept[0]:
            self._run(name)
        return [kept[name] for kept in self._kept]

    def _run(self, name: str) -> None:
        nodes, waiting = set[int](), [name]
        while waiting:
            index = self._makers.get(waiting.pop())
            if index in self._left and index not in nodes:
                nodes.add(index)
                waiting += [one for one in self._left[index] if one not in self._kept[0]]
        for index in nodes:
            del self._left[index]
        later = {one for reads in self._left.values() for one in reads} | {name}
        made = {one for index in nodes for one in self._model.graph.node[index].output if one}
        asked = sorted(made & later)
        session = self._part(sorted(nodes), asked)
        fresh: list[dict[str, Array]] = []
        size = 0
        for kept in self._kept:
            taken = {one.name: kept[one.name] for one in session.get_inputs()}
            found = dict(zip(asked, session.run(asked, taken), strict=True))
            if other := [key for key, value in found.items() if not isinstance(value, np.ndarray)]:
                raise RefusedError(
                    "pass_unfit",
                    f"{other[0]!r} is no tensor, and what is between layers is kept as tensors",
                    consequence="the variant was not made",
                    next_step="take the pass out of the recipe for this model",
                )
            fresh.append({key: value for key, value in kept.items() if key in later} | found)
            size += sum(value.nbytes for value in fresh[-1].values())
            if size > KEPT_BYTES_MAX and len(fresh) >= KEPT_CALLS_MIN:
                break
        self._kept = fresh

    def _part(self, indices: Sequence[int], asked: Sequence[str]) -> Any:
        """Return a session of some nodes, which takes what was kept."""
        import onnxruntime

        nodes = [self._model.graph.node[index] for index in indices]
        read = {name for node in nodes for name in _reads(node)}
        given = {name: value for name, value in self._kept[0].items() if name in read}
        part = part_of(self._model, nodes, given, asked)
        return onnxruntime.InferenceSession(part.SerializeToString(), _quiet(), providers=["CPUExecutionProvider"])


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return what a node reads, its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for below in subgraphs(inner):
                names += [name for one in below.node for name in one.input if name]
                names += [output.name for output in below.output]
    return names


def _quiet() -> Any:
    """Return settings of a session on one thread, since other candidates have the other cores."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    return settings


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

    settings = _quiet()
    if as_written:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
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
