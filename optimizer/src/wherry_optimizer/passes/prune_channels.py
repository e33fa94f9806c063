"""Structured pruning after training: whole channels, neurons and attention heads go, and what reads them makes up for it.

`channels.analyse` says what belongs together. Of each group that can be pruned the classes go whose loss the consuming
layers can best make up for: removing columns S of a layer y = W x costs Σ w_S² / [H⁻¹]_SS when the others are fitted again
(Hassibi and Stork, 1993; used for whole structures in "Optimal brain compression", Frantar and Alistarh, 2022). They go in
rounds, with the layer fitted after each. Then the layer's weights and bias are the least-squares answer
min ‖W′ x′ + b′ − (W x + b)‖², where x′ is what reaches it in the network that was pruned so far and x what reached it in the
original: errors made before are made up for as well, not passed on.

The network becomes smaller and faster on every engine. A group that cannot be resolved is left alone, and the notes say why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, shape_inference

from wherry_optimizer.activations import Array, Taps, rows_of
from wherry_optimizer.channels import Consumer, Dependencies, Group, analyse
from wherry_optimizer.model import prepare_prunable
from wherry_optimizer.passes import Result, Work, excluded
from wherry_shared.errors import RefusedError

ROUNDS = 6
SAMPLES_MIN = 32
ROWS_WANTED = 32.0
"""Times its columns: where `SAMPLES_MIN` samples showed so many rows of a layer, the others are not run."""
FEW = 0.03
"""Fitted weights are held near those that are there by this times columns per row that was seen, beside the damping."""
SEQUENTIAL_MAX = 24
"""Groups up to which the pruned network is run again for each; with more, all are fitted to what the original sees."""
COLUMNS_MAX = 8192
WIDE_CLASSES_MIN = 2
"""Of classes that hold several channels each, such as attention heads, so many stay."""
REASONS_MAX = 20

Matrix = npt.NDArray[np.float64]
Moments = tuple[Matrix, Matrix, float, int]
"""(Σ x′ x′ᵀ, Σ y x′ᵀ, Σ y², how many) over calibration rows: x′ reaches the layer in the pruned network and ends in a one, y = W x + b is
what the layer gave in the original."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much to remove, from what, and what to look at."""

    ratio: float = 0.5
    """Share of the classes of each group that goes."""
    minimum_channels: int = 8
    """So many channels stay in each group, and groups with fewer than twice as many are left alone. An attention head counts as the
    channels it holds, and two stay."""
    samples: int = 200
    """Calibration samples looked at, fewer where those show enough."""
    positions: int = 128
    """Positions of a layer looked at per sample, drawn by the seed."""
    damping: float = 0.001
    """Added to the diagonal of H, as a share of its mean."""
    exclude: list[str] = []
    """Patterns of names of consuming nodes whose groups are left alone."""
    repair: bool = True
    """Fit the consumers again; without it, removing is all that is done (to see what the fitting is worth)."""

    def __post_init__(self) -> None:
        """Check what the type cannot say."""
        if not 0 < self.ratio < 1:
            raise ValueError("ratio lies between 0 and 1")


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Prune the model; see `passes.Pass`."""
    original = prepare_prunable(path)
    _own_shapes(original.graph)
    found = analyse(original.graph, _shapes(original))
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    alone = [group.reason or _unfit(group, found, weights, parameters) for group in found.groups]
    chosen = [group for group, reason in zip(found.groups, alone, strict=True) if not reason]
    reasons = sorted({reason for reason in alone if reason})
    if not chosen:
        raise RefusedError(
            "pass_noop",
            f"no channel can go: {'; '.join(reasons[:REASONS_MAX]) or 'no layer passes channels on to another'}",
            consequence="the variant would be the source again",
            next_step="prune single weights by prune-obs instead",
        )
    made, rows = _prune(original, chosen, found, parameters, work)
    onnx.checker.check_model(made)
    target = work.folder / "channels.onnx"
    onnx.save(made, target)
    return Result(target, {"ratio": parameters.ratio, "layers": rows, "left_alone": reasons[:REASONS_MAX]})


def _unfit(group: Group, found: Dependencies, weights: Mapping[str, onnx.TensorProto], parameters: Parameters) -> str:
    """Return why a group that could be resolved is left alone all the same; empty if it is not."""
    first = group.consumers[0].node[-40:]
    stay = _floor(group, found, parameters)
    if len(group.classes) < 2 * stay:
        return f"what {first} reads has {len(group.classes)} parts that go as a whole, of which {stay} stay"
    for consumer in group.consumers:
        name = consumer.node[-40:]
        if (columns := _columns(consumer, weights)) > COLUMNS_MAX:
            return f"{name} has {columns} columns, and up to {COLUMNS_MAX} are fitted again"
        if consumer.operator == "ConvTranspose":
            return f"{name} is a ConvTranspose, which is not fitted again"
        if consumer.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return f"{name} pads by itself (auto_pad), which is not fitted again"
        if excluded(consumer.node, parameters.exclude):
            return f"{name} is excluded"
    return ""


def _floor(group: Group, found: Dependencies, parameters: Parameters) -> int:
    """Return how many classes of a group stay at least."""
    one = group.classes[0]
    channels = max(sum(found.root[atom] == one for atom in set(cut.atoms.tolist())) for cut in found.cuts)
    wide = -(-parameters.minimum_channels // channels)
    return max(min(WIDE_CLASSES_MIN, parameters.minimum_channels), wide)


def _columns(consumer: Consumer, weights: Mapping[str, onnx.TensorProto]) -> int:
    dims = list(weights[consumer.weight].dims)
    return int(np.prod(dims[1:])) if consumer.operator == "Conv" else len(consumer.atoms)


def _prune(
    original: onnx.ModelProto, groups: Sequence[Group], found: Dependencies, parameters: Parameters, work: Work
) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """Go through the groups in the order of the graph.

    Until the end what is gone is only multiplied with zero: the answers are the same, and nothing changes its shape.
    """
    calls = list(work.calibration[: parameters.samples])
    order = {node.output[0]: index for index, node in enumerate(original.graph.node)}
    groups = sorted(groups, key=lambda group: min(order[consumer.output] for consumer in group.consumers))
    sequential = len(groups) <= SEQUENTIAL_MAX
    current = onnx.ModelProto()
    current.CopyFrom(original)
    gone: set[int] = set()
    rows: list[dict[str, Any]] = []
    moments: dict[str, Moments] = {}
    if not sequential:
        consumers = {consumer.output: consumer for group in groups for consumer in group.consumers}
        moments = _moments(original, current, list(consumers.values()), calls, parameters, work.seed)
    for group in groups:
        if sequential:
            moments = _moments(original, current, group.consumers, calls, parameters, work.seed)
        weights = {tensor.name: tensor for tensor in current.graph.initializer}
        fits = [
            _Fit(consumer, weights, moments[consumer.output], found, gone, parameters) for consumer in group.consumers
        ]
        count = min(round(parameters.ratio * len(group.classes)), len(group.classes) - _floor(group, found, parameters))
        removed = _choose(group.classes, fits, count)
        gone |= removed
        errors = [fit.write(removed, repair=parameters.repair) for fit in fits]
        rows.append(
            {
                "layer": ", ".join(consumer.node[-40:] for consumer in group.consumers),
                "channels": len(group.classes),
                "removed": len(removed),
                "output_error": round(max(errors), 4),
            }
        )
    _cut(current, found, gone)
    return current, rows


class _Fit:
    """One consumer: its weight as a matrix over what reaches it, and the moments of that."""

    def __init__(
        self,
        consumer: Consumer,
        weights: Mapping[str, onnx.TensorProto],
        moments: Moments,
        found: Dependencies,
        gone: set[int],
        parameters: Parameters,
    ) -> None:
        self.consumer = consumer
        self.tensor = weights[consumer.weight]
        self.bias = weights.get(consumer.bias)
        inside, cross, self.energy, count = moments
        kernel = int(np.prod(self.tensor.dims[2:])) if consumer.operator == "Conv" else 1
        self.classes = np.repeat(np.array([found.root[atom] for atom in consumer.atoms.tolist()]), kernel)
        self.before = ~np.isin(self.classes, list(gone))
        self.matrix = _matrix(numpy_helper.to_array(self.tensor), consumer)
        # damping pulls towards the weights that are there, not towards zero
        size = len(self.classes)
        share = parameters.damping + FEW * size / count
        damping = share * (float(np.mean(np.diag(inside)[:size])) or 1.0)
        self.inside, self.cross = inside.copy(), cross.copy()
        self.inside[np.arange(size), np.arange(size)] += damping
        self.cross[:, :size] += damping * self.matrix
        self.energy += damping * float(np.square(self.matrix).sum())

    def _kept(self, removed: set[int]) -> npt.NDArray[np.bool_]:
        return self.before & ~np.isin(self.classes, list(removed))

    def _index(self, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the kept columns, and that of the constant one where there is a bias to fit."""
        index = np.flatnonzero(kept)
        return np.append(index, len(kept)) if self.bias is not None else index

    def scores(self, removed: set[int]) -> dict[int, float]:
        """Return class → what removing it costs beyond what is lost already, as a share of the layer's output."""
        kept = self._kept(removed)
        index, count = self._index(kept), int(kept.sum())
        inverse = np.linalg.inv(self.inside[np.ix_(index, index)])
        weights = self.cross[:, index] @ inverse
        price = np.square(weights[:, :count]).sum(axis=0) / np.diag(inverse)[:count]
        total: dict[int, float] = {}
        for kind, one in zip(self.classes[kept].tolist(), price.tolist(), strict=True):
            total[kind] = total.get(kind, 0.0) + one / (self.energy or 1.0)
        return total

    def write(self, removed: set[int], *, repair: bool) -> float:
        """Put the fitted weights back, zero where columns go; return how far the layer's output is from the original's."""
        kept = self._kept(removed)
        index, count = self._index(kept), int(kept.sum())
        bias = numpy_helper.to_array(self.bias).astype(np.float64).reshape(-1) if self.bias is not None else None
        if repair:
            fitted = np.linalg.solve(self.inside[np.ix_(index, index)], self.cross[:, index].T).T
            if self.bias is not None and bias is not None:
                value = fitted[:, count].astype(np.float32).reshape(list(self.bias.dims))
                self.bias.CopyFrom(numpy_helper.from_array(value, self.bias.name))
        else:
            own = self.matrix[:, kept]
            fitted = own if bias is None else np.column_stack([own, bias])
        whole = np.zeros_like(self.matrix)
        whole[:, kept] = fitted[:, :count]
        value = _from_matrix(whole, self.tensor, self.consumer)
        self.tensor.CopyFrom(numpy_helper.from_array(value, self.tensor.name))
        explained = float((fitted * self.cross[:, index]).sum())
        square = float(np.einsum("ij,jk,ik->", fitted, self.inside[np.ix_(index, index)], fitted, optimize=True))
        lost = self.energy - 2 * explained + square
        return float(np.sqrt(max(lost, 0.0) / self.energy)) if self.energy > 0 else 0.0


def _matrix(value: Array, consumer: Consumer) -> Matrix:
    """Return a weight as (outputs, columns)."""
    if consumer.operator == "Conv":
        return value.reshape(len(value), -1).astype(np.float64)
    return (value if consumer.attributes.get("transB", 0) else value.T).astype(np.float64)


def _from_matrix(matrix: Matrix, tensor: onnx.TensorProto, consumer: Consumer) -> Array:
    turned = consumer.operator != "Conv" and not consumer.attributes.get("transB", 0)
    return np.ascontiguousarray((matrix.T if turned else matrix).reshape(list(tensor.dims)), dtype=np.float32)


def _choose(classes: Sequence[int], fits: Sequence[_Fit], count: int) -> set[int]:
    """Return the classes that go, the cheapest first, priced again after each round."""
    removed: set[int] = set()
    for number in range(1, ROUNDS + 1):
        wanted = round(count * number / ROUNDS) - len(removed)
        if wanted <= 0:
            continue
        total = dict.fromkeys((kind for kind in classes if kind not in removed), 0.0)
        for fit in fits:
            for kind, price in fit.scores(removed).items():
                if kind in total:
                    total[kind] += price
        removed |= set(sorted(total, key=lambda kind: (total[kind], kind))[:wanted])
    return removed


def _moments(
    original: onnx.ModelProto,
    current: onnx.ModelProto,
    consumers: Sequence[Consumer],
    calls: Sequence[Mapping[str, Array]],
    parameters: Parameters,
    seed: int,
) -> dict[str, Moments]:
    """Return the moments of consumers, by their outputs."""
    inputs = {consumer.input for consumer in consumers}
    before = Taps(original, inputs)
    after = Taps(current, inputs)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    matrices = {one.output: _matrix(weights[one.weight], one).astype(np.float32) for one in consumers}
    totals: dict[str, Moments] = {}
    for number, call in enumerate(calls):
        if number >= SAMPLES_MIN and all(count >= ROWS_WANTED * len(inside) for inside, *_, count in totals.values()):
            break
        old, new = before.run(call), after.run(call)
        for consumer in consumers:
            was, now = (
                rows_of(
                    values[consumer.input],
                    consumer.operator,
                    consumer.attributes,
                    list(weights[consumer.weight].shape),
                    parameters.positions,
                    np.random.default_rng([seed, number]),  # the same positions of both
                )
                for values in (old, new)
            )
            y = was @ matrices[consumer.output].T
            if consumer.bias:
                y += weights[consumer.bias].reshape(-1)
            x = np.pad(now, ((0, 0), (0, 1)), constant_values=1.0)
            held = totals.get(consumer.output)
            own = ((x.T @ x).astype(np.float64), (y.T @ x).astype(np.float64), float(np.square(y).sum()), len(x))
            totals[consumer.output] = (
                own if held is None else (held[0] + own[0], held[1] + own[1], held[2] + own[2], held[3] + own[3])
            )
    return totals


def _cut(model: onnx.ModelProto, found: Dependencies, gone: set[int]) -> None:
    """Take what is gone out of every tensor and shape."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for cut in found.cuts:
        stay = np.array([found.root[atom] not in gone for atom in cut.atoms.tolist()])
        if stay.all():
            continue
        if not cut.tensor:
            node = next(item for item in model.graph.node if item.output[0] == cut.node)
            next(item for item in node.attribute if item.name == "group").i = int(stay.sum())
            continue
        value = numpy_helper.to_array(weights[cut.tensor])
        if cut.entry is None:
            value = np.ascontiguousarray(np.compress(stay, value, axis=cut.axis))
        else:
            value = value.copy()
            value[cut.entry] = int(stay.sum()) * cut.per
        weights[cut.tensor].CopyFrom(numpy_helper.from_array(value, cut.tensor))
    del model.graph.value_info[:]


def _own_shapes(graph: onnx.GraphProto) -> None:
    """Give every Reshape a shape of its own, since each is cut by itself."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for index, node in enumerate(graph.node):
        if node.op_type == "Reshape" and node.input[1] in stored:
            name = f"{node.input[1]}_of_{index}"
            graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(stored[node.input[1]]), name))
            node.input[1] = name


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the shape of every tensor whose rank is known; −1 for axes that are not fixed."""
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        item.name: [axis.dim_value if axis.HasField("dim_value") else -1 for axis in item.type.tensor_type.shape.dim]
        for item in (*graph.input, *graph.value_info, *graph.output)
        if item.type.tensor_type.HasField("shape")
    }
