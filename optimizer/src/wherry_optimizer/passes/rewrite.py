"""The same function with less arithmetic, where an exporter spelled out what there is an operator for.

Four rewrites, in this order:

- A one-hot matrix times a table (`Equal` with a ramp, or `OneHot`, then `MatMul` or `Gemm` without a transpose) picks rows of
  the table: it becomes a `Gather`. Indices that no row has picked a row of zeros, and still do.
- What is computed element by element from a row of a table, with constants, is computed into the table once.
- GELU, by erf or tanh (Hendrycks and Gimpel, 2016), however it is spelled, is spelled as onnxruntime fuses it; layer normalization (Ba
  and others, 2016) becomes `LayerNormalization`, along other axes than the last too; hard swish (Howard and others, 2019) becomes
  x · HardSigmoid(x). They are recognised by what they compute and not by how: the region between two tensors is run on random
  values and compared with the definition.
- A scale and an offset by constants, before or after a convolution or product (batch normalization is both), become part of its
  weights and bias.

Results stay the same but for rounding; the whole is compared with the original on calibration samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pathlib import Path  # isort: skip

from wherry_optimizer.activations import Taps, distance, part_of, run_all
from wherry_optimizer.model import drop_unread, opset_of, prepare_prunable, sort_nodes, subgraphs
from wherry_optimizer.passes import Array, Result, Work
from wherry_shared.errors import RefusedError

log = logging.getLogger(__name__)

Float64: TypeAlias = npt.NDArray[np.float64]

LAYER_NORM_OPSET = 17
"""The first one that has `LayerNormalization`."""
ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "Ceil",
        "Clip",
        "Cos",
        "Div",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Tanh",
    ]
)
"""Each element of the result comes from the elements at the same place."""
REDUCING = frozenset(
    [
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL2",
        "Reshape",
        "Expand",
        "Squeeze",
        "Unsqueeze",
        "Cast",
        "Identity",
    ]
)
"""What a layer normalization that is spelled out holds beside them."""
SHAPES = frozenset(["Shape", "Size", "ConstantOfShape"])
"""What they say depends on the shape of what they read only."""
REGION_NODES_MAX = 40
"""A region that is to be recognised has at most so many."""
REACH = 24
"""So many nodes are looked at on either side of a Tanh or a Sqrt."""
SAME = 2e-5
"""Largest difference from a definition, relative to the largest value: float32 keeps 7 digits, of which some get lost."""
ROUNDING = 4.0
"""Outputs may move by so many times what they move by when the runtime fuses nothing."""
ROW_AXES = 2
"""What a look-up by a list of indices gives has so many axes."""
EPSILON_MAX = 0.01
_FAR = np.logspace(1.1, 4, 60)
GRID = np.concatenate([-_FAR[::-1], np.linspace(-12, 12, 4801), _FAR]).astype(np.float32)
"""What activations are compared on: densely where they bend, and far out."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing to choose but how far results may move."""

    difference_max: float = 1e-3
    """Distance of the outputs from the original's on calibration samples: L2, as a share. Further only where the runtime's own
    fusions move the original by as much: outputs that are all but zero have few digits that mean anything."""
    samples: int = 4
    """Calibration samples that are compared."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Rewrite the graph; see `passes.Pass`."""
    original = prepare_prunable(path)
    model = onnx.ModelProto()
    model.CopyFrom(original)
    call = dict(work.calibration[0]) if work.calibration else None
    counts = {"one_hot": 0, "folded": 0, "gelu": 0, "hard_swish": 0, "layer_norm": 0, "affine": 0}
    while _one_hot(_View(model)):
        counts["one_hot"] += 1
    while folded := _fold(_View(model)):
        counts["folded"] += folded
    for curve in CURVES:
        while _curve(_View(model), curve):
            counts[curve.name] += 1
    if call is not None and (newer := _with_layer_norm(model)) is not None:
        while _layer_norm(_View(newer), call):
            counts["layer_norm"] += 1
        model = newer if counts["layer_norm"] else model
    while _absorb(_View(model)):
        counts["affine"] += 1
    if not any(counts.values()):
        raise RefusedError(
            "pass_noop",
            "rewriting changed nothing: no one-hot product, no arithmetic on a table, no spelled-out activation or "
            "normalization, no scale or offset that a layer could take",
            consequence="the variant would be the source again",
            next_step="take this pass out of the recipe",
        )
    onnx.checker.check_model(model)
    names, calls = [output.name for output in model.graph.output], work.calibration[: parameters.samples]
    wanted = run_all(original, names, calls) if calls else []
    moved = distance(run_all(model, names, calls), wanted) if calls else 0.0
    if not moved <= parameters.difference_max and not moved <= ROUNDING * distance(
        run_all(original, names, calls, as_written=True), wanted
    ):
        raise RefusedError(
            "pass_failed",
            f"rewriting moved the outputs by {moved:.2g} of their size",
            consequence="the variant was not made",
            next_step="take `rewrite` out of the recipe: the model runs without it",
        )
    target = work.folder / "rewritten.onnx"
    onnx.save(model, target)
    before, after = len(original.graph.node), len(model.graph.node)
    return Result(target, {**counts, "nodes_before": before, "nodes_after": after, "outputs_moved": moved})


@dataclass(slots=True)
class _View:
    """A graph with what its rewrites ask for; made anew after each."""

    model: onnx.ModelProto
    graph: onnx.GraphProto = field(init=False)
    maker: dict[str, onnx.NodeProto] = field(init=False)
    readers: dict[str, list[onnx.NodeProto]] = field(init=False)
    place: dict[str, int] = field(init=False)
    """Output of a node → where in the order it is made."""
    kept: frozenset[str] = field(init=False)
    """Read by somebody beside nodes of this graph: outputs, and what subgraphs read."""
    weights: dict[str, onnx.TensorProto] = field(init=False)
    _shapes: dict[str, list[int]] | None = None
    _named: set[str] = field(default_factory=set)
    """Names that were given out."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """What shape inference knows, unknown axes as -1."""
        if self._shapes is None:
            self._shapes = _inferred(self.model)
        return self._shapes

    def reaches(self, name: str, axes: int) -> bool:
        """Tell whether a tensor has so many axes at least: a constant with more would give it new ones."""
        return axes <= 1 or len(self.shapes.get(name, [])) >= axes

    def __post_init__(self) -> None:
        self.graph = graph = self.model.graph
        self.maker = {name: node for node in graph.node for name in node.output if name}
        self.place = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
        self.readers = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        below = [inner for inner in subgraphs(graph) if inner is not graph]
        inside = {name for inner in below for node in inner.node for name in node.input}
        inside |= {output.name for inner in below for output in inner.output}
        self.kept = frozenset({output.name for output in graph.output} | inside)
        self.weights = {tensor.name: tensor for tensor in graph.initializer}

    def value(self, name: str) -> Array | None:
        """Return a constant."""
        tensor = self.weights.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add_weight(self, base: str, value: Array) -> str:
        """Add a constant under a name that is free."""
        name = self.free(base)
        tensor = numpy_helper.from_array(np.array(value, order="C"), name)
        self.graph.initializer.append(tensor)
        self.weights[name] = tensor
        return name

    def free(self, base: str) -> str:
        """Return a name that no tensor has."""
        taken = self.maker.keys() | self.weights.keys() | {item.name for item in self.graph.input} | self._named
        number = 0
        while f"{base}.{number}" in taken:
            number += 1
        self._named.add(f"{base}.{number}")
        return f"{base}.{number}"

    def replace(self, name: str, nodes: Sequence[onnx.NodeProto]) -> None:
        """Let `nodes`, the last of which makes `name`, stand where its maker stood; take out what nobody reads then."""
        old = next(node for node in self.graph.node if name in node.output)
        at = list(self.graph.node).index(old)
        self.graph.node.pop(at)
        for offset, node in enumerate(nodes):
            self.graph.node.insert(at + offset, node)
        drop_unread(self.graph)
        named = {item for node in self.graph.node for item in node.output}
        infos = [info for info in self.graph.value_info if info.name in named]
        del self.graph.value_info[:]
        self.graph.value_info.extend(infos)
        sort_nodes(self.graph)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


# one-hot products


def _one_hot(view: _View) -> bool:
    """Rewrite one product of a one-hot matrix and a table."""
    for node in view.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or (node.op_type == "Gemm" and not _plain_gemm(node)):
            continue
        table = view.value(node.input[1])
        if table is None or table.ndim != 2 or table.dtype.kind != "f":
            continue
        indices = _indices(view, node.input[0], len(table))
        if indices is None:
            continue
        taken, whole, negative = indices
        view.replace(node.output[0], _look_up(view, node, table, taken, whole, negative=negative))
        return True
    return False


def _plain_gemm(node: onnx.NodeProto) -> bool:
    usual = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    return all(bool(_attribute(node, name, value) == value) for name, value in usual.items())


def _inferred(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return what shape inference knows of shapes, unknown axes as -1."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {
        info.name: [axis.dim_value if axis.HasField("dim_value") else -1 for axis in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.input, *inferred.output)
        if info.type.tensor_type.HasField("shape")
    }


def _indices(view: _View, name: str, depth: int) -> tuple[str, bool, bool] | None:
    """Return (tensor of indices, whether it has no axis for the depth, whether -1 is the last row) of a one-hot matrix."""
    node = view.maker.get(name)
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = view.maker.get(node.input[0])
    if node is None:
        return None
    if node.op_type == "OneHot":
        counted, values = view.value(node.input[1]), view.value(node.input[2])
        fits = counted is not None and counted.size == 1 and int(counted.reshape(-1)[0]) == depth
        plain = values is not None and values.tolist() == [0, 1] and _attribute(node, "axis", -1) == -1
        return (node.input[0], True, True) if fits and plain else None
    if node.op_type != "Equal":
        return None
    for left, right in (node.input, reversed(node.input)):
        one, ramp = left, view.value(right)
        if (
            ramp is None
            or ramp.dtype.kind not in "iu"
            or not ramp.ndim
            or ramp.shape[-1] != depth
            or ramp.size != depth
        ):
            continue  # a number between two of a ramp of floats is no index
        if not np.array_equal(ramp.reshape(-1), np.arange(depth)):
            continue
        while (expand := view.maker.get(one)) is not None and expand.op_type == "Expand":
            before, after = view.shapes.get(expand.input[0], []), view.shapes.get(one, [])
            if not before or len(before) != len(after) or before[-1] != 1:
                break
            if any(a == 1 and b != 1 for a, b in zip(before[:-1], after[:-1], strict=True)):
                break  # it repeats more than the last axis
            one = expand.input[0]
        if (view.shapes.get(one) or [0])[-1] == 1:
            return one, False, False
    return None


def _look_up(
    view: _View, node: onnx.NodeProto, table: Array, indices: str, whole: bool, *, negative: bool
) -> list[onnx.NodeProto]:
    """Return nodes that pick the rows; what is no index picks the row of zeros at the end."""
    base, depth = node.output[0], len(table)
    rows = view.add_weight(f"{base}/table", np.vstack([table, np.zeros((1, table.shape[1]), table.dtype)]))
    zero, end = (view.add_weight(f"{base}/bound", np.array(value, np.int64)) for value in (0, depth))
    nodes: list[onnx.NodeProto] = []

    def add(operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or view.free(f"{base}/{operator}")
        nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    index = add("Cast", indices, to=TensorProto.INT64)
    if not whole:
        index = add("Squeeze", index, view.add_weight(f"{base}/axis", np.array([-1], np.int64)))
    if negative:
        index = add("Where", add("Less", index, zero), add("Add", index, end), index)
    outside = add("Or", add("Less", index, zero), add("GreaterOrEqual", index, end))
    index = add("Where", outside, end, index)
    if node.op_type == "Gemm" and len(node.input) > 2:
        add("Add", add("Gather", rows, index, axis=0), node.input[2], output=base)
    else:
        add("Gather", rows, index, output=base, axis=0)
    return nodes


# arithmetic on tables


def _fold(view: _View) -> int:
    """Compute what follows one look-up, element by element, into its table; return how many nodes that saves."""
    for node in view.graph.node:
        if node.op_type != "Gather" or _attribute(node, "axis", 0) != 0 or node.output[0] in view.kept:
            continue
        table = view.value(node.input[0])
        if table is None or table.ndim != 2 or table.dtype != np.float32:
            continue
        region, out = _after(view, node.output[0], table.shape[1])
        if not region:
            continue
        made = _evaluate(view, region, {node.output[0]: table}, out)
        made = made.reshape(-1, made.shape[-1])
        if made.shape != table.shape or not np.isfinite(made).all():
            continue
        name = view.add_weight(f"{out}/table", made.astype(np.float32))
        view.replace(out, [helper.make_node("Gather", [name, node.input[1]], [out], name=f"{out}/Gather", axis=0)])
        return len(region)
    return 0


def _after(view: _View, start: str, width: int) -> tuple[list[onnx.NodeProto], str]:
    """Return the nodes that compute on rows alone, and the one tensor that others read; nothing if there are more."""
    inside, region = {start}, []
    for node in view.graph.node:
        reads = inside & set(node.input)
        if (
            reads
            and node.op_type in ELEMENTWISE
            and all(name in inside or not name or _broadcasts(view, start, name, width) for name in node.input)
        ):
            inside.add(node.output[0])
            region.append(node)
    own = {id(node) for node in region}
    read = [
        name
        for name in inside
        if name in view.kept or any(id(reader) not in own for reader in view.readers.get(name, []))
    ]
    return (region, read[0]) if len(read) == 1 and read[0] != start else ([], "")


def _broadcasts(view: _View, start: str, name: str, width: int) -> bool:
    """Tell whether a constant is the same for all rows, and adds no axis."""
    value = view.value(name)
    if value is None or not (value.size == 1 or (value.size == width and value.shape[-1] == width)):
        return False
    return value.ndim <= ROW_AXES or view.reaches(start, value.ndim)


# what is recognised by what it computes


@dataclass(frozen=True, slots=True)
class _Region:
    """All that lies between one tensor and another."""

    start: str
    end: str
    nodes: tuple[onnx.NodeProto, ...]
    beside: tuple[str, ...]
    """What else it reads, that is no constant: shapes."""


def _regions(view: _View, around: onnx.NodeProto, allowed: frozenset[str], *, shapes: bool) -> Iterator[_Region]:
    """Yield regions through a node, the largest first: nothing inside is read from outside, and only `start` is read by it.

    Args:
        view: of the graph.
        around: a node inside.
        allowed: operators.
        shapes: what says a shape may be read beside.
    """
    behind = _reach(view, around, allowed, forward=False)
    ahead = _reach(view, around, allowed, forward=True)
    starts = dict.fromkeys(name for node in behind for name in node.input if name and name not in view.weights)
    for end in reversed([node.output[0] for node in ahead]):
        for start in starts:
            region = _between(view, start, end, allowed, shapes=shapes)
            if region is not None and any(node.output[0] == around.output[0] for node in region.nodes):
                yield region


def _reach(view: _View, node: onnx.NodeProto, allowed: frozenset[str], *, forward: bool) -> list[onnx.NodeProto]:
    """Return nodes in reach of one, itself first."""
    found = {node.output[0]: node}
    waiting = [node]
    while waiting and len(found) < REACH:
        now = waiting.pop(0)
        near = (
            view.readers.get(now.output[0], [])
            if forward
            else [view.maker[name] for name in now.input if name in view.maker]
        )
        for other in near:
            if other.op_type in allowed and other.output[0] not in found:
                found[other.output[0]] = other
                waiting.append(other)
    return sorted(found.values(), key=lambda one: view.place[one.output[0]])


def _between(view: _View, start: str, end: str, allowed: frozenset[str], *, shapes: bool) -> _Region | None:
    """Return the region from `start` to `end`, if it is one."""
    inside: dict[str, onnx.NodeProto] = {}
    beside: dict[str, None] = {}
    waiting = [end]
    while waiting:
        name = waiting.pop()
        if name == start or name in inside or name in beside or not name or name in view.weights:
            continue
        node = view.maker.get(name)
        if shapes and node is not None and name != end and _says_a_shape(view, name):
            beside[name] = None
        elif node is None or node.op_type not in allowed or len(inside) == REGION_NODES_MAX:
            return None
        else:
            inside[name] = node
            waiting += node.input
    nodes = sorted(inside.values(), key=lambda one: view.place[one.output[0]])
    if not any(start in node.input for node in nodes):
        return None
    own = {id(node) for node in nodes}
    for name in inside:
        if name != end and (name in view.kept or any(id(reader) not in own for reader in view.readers.get(name, []))):
            return None
    return _Region(start, end, tuple(nodes), tuple(beside))


def _says_a_shape(view: _View, name: str) -> bool:
    """Tell whether a tensor comes from `Shape` and constants alone."""
    waiting, seen = [name], set()
    while waiting:
        now = waiting.pop()
        if now in seen or not now or now in view.weights:
            continue
        seen.add(now)
        node = view.maker.get(now)
        if node is None or len(seen) > REGION_NODES_MAX:
            return False
        if node.op_type not in SHAPES:
            waiting += node.input
    return True


def _evaluate(view: _View, nodes: Sequence[onnx.NodeProto], given: Mapping[str, Array], out: str) -> Array:
    """Run some nodes by themselves."""
    return np.asarray(run_all(part_of(view.model, nodes, given, [out]), [out], [given])[0][0])


def _try(view: _View, region: _Region, given: Mapping[str, Array]) -> Array | None:
    """Run a region on values that it was not made for; nothing where it refuses them."""
    try:
        return _evaluate(view, region.nodes, given, region.end)
    except Exception as error:  # onnxruntime's errors have no base of their own
        log.debug("the region that ends in %s takes no such values: %s", region.end, error)
        return None


def _close(found: Array | None, wanted: Array) -> bool:
    scale = float(np.abs(wanted).max()) or 1.0
    return (
        found is not None
        and found.size == wanted.size
        and bool(np.abs(found.astype(np.float64).reshape(wanted.shape) - wanted).max() <= SAME * scale)
    )


@dataclass(frozen=True, slots=True)
class _Curve:
    """A function of one number, and how to write it."""

    name: str
    around: str
    """An operator that every spelling has."""
    value: Callable[[Float64], Float64]
    nodes: Callable[[_View, _Region], list[onnx.NodeProto]]
    spelled: tuple[str, ...] = ()
    """Operators of the spelling that is wanted, where `around` is one of them: what has just these stays."""


def _curve(view: _View, curve: _Curve) -> bool:
    """Spell one activation as the runtime is quickest with it."""
    wanted = curve.value(GRID.astype(np.float64))
    for node in view.graph.node:
        if node.op_type != curve.around or node.name.startswith(_SPELLED):
            continue
        for region in _regions(view, node, ELEMENTWISE, shapes=False):
            values = [view.value(name) for inner in region.nodes for name in inner.input]
            constants = [value for value in values if value is not None]
            if any(value.size != 1 for value in constants):
                continue
            found = _try(view, region, {region.start: GRID})
            if found is None or found.size != GRID.size:
                continue
            if not np.allclose(found.reshape(-1), wanted, rtol=SAME, atol=SAME):
                continue
            if not view.reaches(region.start, max((value.ndim for value in constants), default=0)):
                continue
            if tuple(inner.op_type for inner in region.nodes) == curve.spelled:
                for inner in region.nodes:
                    inner.name = f"{_SPELLED}{inner.output[0]}"
                break
            view.replace(region.end, curve.nodes(view, region))
            return True
    return False


_SPELLED = "wherry/rewritten/"
"""Begins the names of nodes that are as they should be."""


def _gelu_of(x: Float64) -> Float64:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def _gelu_nodes(view: _View, region: _Region) -> list[onnx.NodeProto]:
    """Return x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, in the order of the graph that onnxruntime's FastGeluFusion looks for."""
    x, build = region.start, _Builder(view, region.end)
    cube = build("Pow", x, build.scalar(3.0))
    inner = build("Mul", build("Add", x, build("Mul", cube, build.scalar(0.044715))), build.scalar(np.sqrt(2 / np.pi)))
    half = build("Mul", x, build.scalar(0.5))
    build("Mul", half, build("Add", build("Tanh", inner), build.scalar(1.0)), last=True)
    return build.nodes


def _erf_gelu_of(x: Float64) -> Float64:
    from scipy.special import erf

    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))))


def _erf_gelu_nodes(view: _View, region: _Region) -> list[onnx.NodeProto]:
    """Return x (1 + erf(x / √2)) / 2, in the order of the graph that onnxruntime's GeluFusion looks for."""
    x, build = region.start, _Builder(view, region.end)
    erf = build("Erf", build("Div", x, build.scalar(np.sqrt(2))))
    build("Mul", build("Mul", x, build("Add", erf, build.scalar(1.0))), build.scalar(0.5), last=True)
    return build.nodes


def _hard_swish_of(x: Float64) -> Float64:
    return np.asarray(x * np.clip(x + 3, 0, 6) / 6)


def _hard_swish_nodes(view: _View, region: _Region) -> list[onnx.NodeProto]:
    build = _Builder(view, region.end)
    build("Mul", region.start, build("HardSigmoid", region.start, alpha=1 / 6, beta=0.5), last=True)
    return build.nodes


CURVES = (
    _Curve("gelu", "Tanh", _gelu_of, _gelu_nodes, ("Pow", "Mul", "Add", "Mul", "Mul", "Tanh", "Add", "Mul")),
    _Curve("gelu", "Erf", _erf_gelu_of, _erf_gelu_nodes, ("Div", "Erf", "Add", "Mul", "Mul")),
    _Curve("hard_swish", "Clip", _hard_swish_of, _hard_swish_nodes),
)


class _Builder:
    """Makes the nodes of a replacement."""

    def __init__(self, view: _View, end: str) -> None:
        self.view, self.end = view, end
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, operator: str, *inputs: str, last: bool = False, **attributes: Any) -> str:
        name = self.end if last else self.view.free(f"{self.end}/{operator}")
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"{_SPELLED}{name}", **attributes))
        return name

    def scalar(self, value: float) -> str:
        return self.view.add_weight(f"{self.end}/constant", np.array(value, np.float32))

    def vector(self, value: Array) -> str:
        return self.view.add_weight(f"{self.end}/vector", value.astype(np.float32))


def _with_layer_norm(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model with an opset that has `LayerNormalization`, or nothing if it cannot be raised."""
    if opset_of(model) >= LAYER_NORM_OPSET:
        return model
    if all(node.op_type not in ("Sqrt", "Pow", "Reciprocal") for node in model.graph.node):
        return None
    try:
        newer = onnx.version_converter.convert_version(model, LAYER_NORM_OPSET)
        onnx.checker.check_model(newer)
    except Exception:  # the converter is C++ and raises RuntimeError and its own classes
        log.info(
            "the opset cannot be raised to %d: normalizations stay as they are spelled", LAYER_NORM_OPSET, exc_info=True
        )
        return None
    return newer


def _layer_norm(view: _View, call: Mapping[str, Array]) -> bool:
    """Replace one normalization that is spelled out."""
    allowed = ELEMENTWISE | REDUCING
    for node in view.graph.node:
        if node.op_type not in ("Sqrt", "Reciprocal", "Pow") or node.name.startswith(_SPELLED):
            continue
        for region in _regions(view, node, allowed, shapes=True):
            if sum(inner.op_type.startswith("Reduce") for inner in region.nodes) < 2:
                continue
            norm = _normalizes(view, region, call)
            if norm is not None:
                view.replace(region.end, _layer_norm_nodes(view, region, norm))
                return True
    return False


@dataclass(frozen=True, slots=True)
class _Norm:
    """y = γ (x - mean) / √(variance + ε) + β along one axis."""

    rank: int
    axis: int
    gamma: Array
    beta: Array
    epsilon: float


def _normalizes(view: _View, region: _Region, call: Mapping[str, Array]) -> _Norm | None:
    """Return what a region does if it is a layer normalization of its start, along any one axis."""
    taps = Taps(view.model, {region.start, *region.beside})
    seen = taps.run(call)
    shape = seen[region.start].shape
    if seen[region.start].dtype != np.float32:
        return None
    beside = {name: seen[name] for name in region.beside}
    constants = [value for node in region.nodes for name in node.input if (value := view.value(name)) is not None]
    floats = [value for value in constants if value.dtype == np.float32]
    small = sorted(
        {float(one) for value in floats if value.size == 1 and 0 < (one := value.reshape(-1)[0]) < EPSILON_MAX}
    )
    rng = np.random.default_rng(0)
    inputs = [
        (rng.normal(size=shape) * scale + shift).astype(np.float32) for scale, shift in ((1, 0), (0.01, 0), (3, 1))
    ]
    outputs: list[Array] = []
    for x in inputs:
        y = _try(view, region, {region.start: x, **beside})
        if y is None or y.shape != x.shape or not np.isfinite(y).all():
            return None
        outputs.append(y)
    for axis in range(len(shape) - 1, -1, -1):
        size = shape[axis]
        if size < 2:
            continue
        vectors = [value.reshape(-1) for value in floats if value.size == size]
        wanted = [np.moveaxis(y, axis, -1).reshape(-1, size) for y in outputs]
        for epsilon in small:
            plain = [_normal(np.moveaxis(x, axis, -1), epsilon).reshape(-1, size) for x in inputs]
            gamma, beta = _line(np.vstack(plain), np.vstack(wanted), vectors)
            if all(_close(y, n * gamma + beta) for n, y in zip(plain, wanted, strict=True)):
                return _Norm(len(shape), axis, gamma, beta, epsilon)
    return None


def _normal(x: Array, epsilon: float) -> Array:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon))


def _line(x: Array, y: Array, vectors: Sequence[Array]) -> tuple[Array, Array]:
    """Return slope and offset of each column, as the constants that they come from where one is that close."""
    centre = x.mean(axis=0)
    spread = np.square(x - centre).sum(axis=0)
    slope = ((x - centre) * y).sum(axis=0) / np.where(spread > 0, spread, 1.0)
    offset = y.mean(axis=0) - slope * centre

    def exact(found: Array, usual: float) -> Array:
        known = [*vectors, np.full(found.shape, usual, np.float32)]
        near = min(known, key=lambda one: float(np.abs(one - found).max()))
        scale = float(np.abs(near).max()) or 1.0
        return near if np.abs(near - found).max() <= 1e-3 * scale else found

    return exact(slope, 1.0), exact(offset, 0.0)


def _layer_norm_nodes(view: _View, region: _Region, norm: _Norm) -> list[onnx.NodeProto]:
    """Return `LayerNormalization` (opset 17) over the last axis, between two transpositions where it is another axis."""
    build = _Builder(view, region.end)
    perm = list(range(norm.rank))
    perm[norm.axis], perm[-1] = perm[-1], perm[norm.axis]
    last = norm.axis == norm.rank - 1
    x = region.start if last else build("Transpose", region.start, perm=perm)
    gamma, beta = build.vector(norm.gamma), build.vector(norm.beta)
    made = build("LayerNormalization", x, gamma, beta, last=last, axis=-1, epsilon=norm.epsilon)
    if not last:
        build("Transpose", made, last=True, perm=perm)
    return build.nodes


# scales and offsets


@dataclass(frozen=True, slots=True)
class _Affine:
    """y = x · scale + shift, by constants that are single numbers or one per channel."""

    source: str
    scale: Array
    shift: Array


def _absorb(view: _View) -> bool:
    """Let one layer take a scale or offset that stands before or after it."""
    for node in view.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            if _take_before(view, node):
                return True
        elif (affine := _affine(view, node)) is not None and _take_after(view, node, affine):
            return True
    return False


def _affine(view: _View, node: onnx.NodeProto) -> _Affine | None:
    if node.name.startswith(_SPELLED):
        return None  # the runtime fuses it as it is
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    if node.op_type == "BatchNormalization":
        terms = [view.value(name) for name in node.input[1:5]]
        if len(node.output) != 1 or _attribute(node, "training_mode", 0) or any(term is None for term in terms):
            return None
        gamma, beta, mean, variance = (np.asarray(term, np.float64) for term in terms)
        scale = gamma / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
        return _Affine(node.input[0], scale, beta - mean * scale)
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    left, right = (view.value(name) for name in node.input)
    if (left is None) == (right is None):
        return None
    constant = left if right is None else right
    if constant is None or constant.dtype != np.float32 or (left is not None and node.op_type in ("Div", "Sub")):
        return None
    source = node.input[1] if right is None else node.input[0]
    wide = constant.astype(np.float64)
    if (node.op_type == "Div" and not wide.all()) or not view.reaches(source, constant.ndim):
        return None
    if node.op_type in ("Mul", "Div"):
        return _Affine(source, wide if node.op_type == "Mul" else 1 / wide, none)
    return _Affine(source, one, wide if node.op_type == "Add" else -wide)


def _layer_weight(view: _View, node: onnx.NodeProto) -> Array | None:
    """Return the weight of a layer that may be changed: float, constant, and nobody else's."""
    if len(node.input) < 2 or len(view.readers.get(node.input[1], [])) != 1 or node.input[1] in view.kept:
        return None
    weight = view.value(node.input[1])
    plain = node.op_type != "Gemm" or (_attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0)
    return weight if weight is not None and weight.dtype == np.float32 and weight.ndim >= 2 and plain else None


def _alone(view: _View, name: str) -> bool:
    """Tell whether one node of this graph reads a tensor, and nobody else."""
    return name not in view.kept and len(view.readers.get(name, [])) == 1


def _take_after(view: _View, node: onnx.NodeProto, affine: _Affine) -> bool:
    """Let the layer that makes what is scaled do it itself."""
    layer = view.maker.get(affine.source)
    if layer is None or layer.op_type not in ("Conv", "MatMul", "Gemm") or not _alone(view, affine.source):
        return False
    weight = _layer_weight(view, layer)
    if weight is None:
        return False
    if layer.op_type == "Conv":
        channels, axis, rank = weight.shape[0], 0, weight.ndim - 1
    elif weight.ndim == 2:
        axis = 0 if layer.op_type == "Gemm" and _attribute(layer, "transB", 0) else 1
        channels, rank = weight.shape[axis], 1
    else:
        return False
    plain = node.op_type == "BatchNormalization"
    scale, shift = (_per_channel(term, channels, 1 if plain else rank) for term in (affine.scale, affine.shift))
    if scale is None or shift is None or (layer.op_type == "MatMul" and shift.any()):
        return False
    bias = np.zeros(channels)
    if len(layer.input) > 2 and layer.input[2]:
        known = view.value(layer.input[2])
        if known is None or known.shape not in ((channels,), (1, channels), (1,), ()):
            return False
        bias = np.broadcast_to(known.reshape(-1), (channels,)).astype(np.float64)
    turned = scale.reshape([channels if index == axis else 1 for index in range(weight.ndim)])
    return _remake(view, layer, weight * turned, bias * scale + shift, node.output[0])


def _per_channel(term: Array, channels: int, rank: int) -> Array | None:
    """Return a constant as one number per channel, if it is the same everywhere else; `rank`: axes from the channels on."""
    if term.size == 1:
        return np.full(channels, float(term.reshape(-1)[0]))
    fits = term.size == channels and term.ndim >= rank and term.shape[term.ndim - rank] == channels
    return np.asarray(term, np.float64).reshape(-1) if fits else None


def _take_before(view: _View, layer: onnx.NodeProto) -> bool:
    """Let a layer do itself what is done to what it reads: a single number for all of it."""
    before = view.maker.get(layer.input[0])
    if before is None or not _alone(view, layer.input[0]):
        return False
    affine, weight = _affine(view, before), _layer_weight(view, layer)
    if affine is None or weight is None or affine.scale.size != 1 or affine.shift.size != 1:
        return False
    scale, shift = float(affine.scale.reshape(-1)[0]), float(affine.shift.reshape(-1)[0])
    padded = any(_attribute(layer, "pads", [0])) or _attribute(layer, "auto_pad", b"NOTSET") not in (
        b"NOTSET",
        b"VALID",
    )
    if shift and (layer.op_type != "Conv" or padded):
        return False  # what is padded stays zero
    bias: Array | None = None
    if layer.op_type == "Conv":
        known = view.value(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros(weight.shape[0])
        if known is None:
            return False
        sums = weight.astype(np.float64).reshape(weight.shape[0], -1).sum(axis=1)
        bias = known.astype(np.float64) + shift * sums
    return _remake(view, layer, weight.astype(np.float64) * scale, bias, layer.output[0], affine.source)


def _remake(
    view: _View, layer: onnx.NodeProto, weight: Array, bias: Array | None, output: str, source: str = ""
) -> bool:
    """Put a layer with other weights, and perhaps another input, where `output` is made."""
    made = onnx.NodeProto.FromString(layer.SerializeToString())
    made.input[0] = source or layer.input[0]
    made.input[1] = view.add_weight(layer.input[1], weight.astype(np.float32))
    if bias is not None and (bias.any() or len(layer.input) > 2) and layer.op_type != "MatMul":
        del made.input[2:]
        made.input.append(view.add_weight(f"{layer.output[0]}/bias", bias.astype(np.float32)))
    made.output[0] = output
    view.replace(output, [made])
    return True
