"""Which channels of a network belong together: what has to go if one of them goes.

Every tensor that can lose channels carries *atoms* along one axis: a number for each position. Layers with weights make
fresh atoms for their outputs; operators hand them on (activations, pooling, normalisation, depthwise convolution), join those
of two tensors position by position (residual additions, gates), line them up (concatenation), cut them (split), repeat
them (flattening) or weld several into one (the dimensions of an attention head, the blocks of a grouped convolution). Atoms that were joined are one *class*: they
go together. What an operator does with a class that this module does not know *freezes* it, with the reason, and everything
that hangs on it stays as it is.

The idea of following dependencies through the graph is that of "DepGraph: Towards any structural pruning" (Fang and
others, 2023); working on ONNX follows "Structurally prune anything" (Wang and others, 2024). Nothing here changes a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]
Atoms = npt.NDArray[np.int64]

SAME = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "HardSwish",
        "Clip",
        "Erf",
        "Gelu",
        "Elu",
        "Selu",
        "Celu",
        "Mish",
        "Softplus",
        "Softsign",
        "Exp",
        "Log",
        "Sqrt",
        "Abs",
        "Neg",
        "Reciprocal",
        "Identity",
        "Dropout",
        "Cast",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Not",
    ]
)
"""Operators with one tensor whose channels stay where they are. Pools keep the first two axes, where their channels are."""
PAIRS = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Where"])
POOLS = frozenset(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])


@dataclass(frozen=True, slots=True)
class Carried:
    """Atoms of a tensor: along which axis of how many."""

    axis: int
    rank: int
    atoms: Atoms


@dataclass(frozen=True, slots=True)
class Cut:
    """A place that shrinks with its atoms: an axis of an initializer, or one entry of a shape."""

    tensor: str
    axis: int
    atoms: Atoms
    entry: int | None = None
    """For a shape: the index of the entry, which becomes the number of atoms that are left times `per`."""
    per: int = 1
    node: str = ""
    """In place of a tensor: the grouped convolution with this output, whose `group` is their number."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer that multiplies channels: it can make up for those that go."""

    node: str
    operator: str
    input: str
    weight: str
    bias: str
    output: str
    attributes: dict[str, Any]
    atoms: Atoms
    """Of its input, in the order of its weight's input axis."""


@dataclass(slots=True)
class Group:
    """Classes of atoms with the same consumers: what one decision is about."""

    classes: list[int]
    consumers: list[Consumer]
    reason: str = ""
    """Why it is left alone; empty if it can be pruned."""


@dataclass(slots=True)
class Dependencies:
    """What `analyse` found."""

    groups: list[Group] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    root: dict[int, int] = field(default_factory=dict)
    """Atom → its class."""


def analyse(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> Dependencies:
    """Follow channels through a prepared graph.

    Args:
        graph: weights are initializers, each shape of a Reshape is its own.
        shapes: of every tensor, from shape inference; −1 for an axis that is not fixed.
    """
    return _Analysis(graph, shapes).run()


class _Analysis:
    """One walk through a graph, in its order, which is topological."""

    def __init__(self, graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.users: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                self.users[name] = self.users.get(name, 0) + 1
        self.carried: dict[str, Carried] = {}
        self.parent: list[int] = []
        self.frozen: dict[int, str] = {}
        self.cuts: list[Cut] = []
        self.consumers: list[Consumer] = []

    def run(self) -> Dependencies:
        """Walk, then gather groups."""
        for index, node in enumerate(self.graph.node):
            self.step(node, node.name or f"node {index}")
        for output in self.graph.output:
            self.freeze(output.name, f"it is the output {output.name!r}")
        return self.gather()

    # atoms

    def fresh(self, count: int) -> Atoms:
        begin = len(self.parent)
        self.parent.extend(range(begin, begin + count))
        return np.arange(begin, begin + count)

    def find(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def join(self, one: Atoms, two: Atoms) -> None:
        for a, b in zip(one.tolist(), two.tolist(), strict=True):
            self.parent[self.find(a)] = self.find(b)

    def freeze_atoms(self, atoms: Atoms, why: str) -> None:
        for atom in atoms.tolist():
            self.frozen.setdefault(atom, why)

    def freeze(self, name: str, why: str) -> None:
        carried = self.carried.get(name)
        if carried is not None:
            self.freeze_atoms(carried.atoms, why)

    def shape(self, name: str) -> list[int] | None:
        if name in self.weights:
            return list(self.weights[name].dims)
        found = self.shapes.get(name)
        return None if found is None else list(found)

    # operators

    def step(self, node: onnx.NodeProto, name: str) -> None:
        """Hand atoms through one node."""
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        inputs = [one for one in node.input if one in self.carried]
        kind = node.op_type if node.domain in ("", "ai.onnx") else ""
        data = node.input[0] if node.input else ""
        shared = any(one in self.weights and self.users[one] > 1 and _size(self.weights[one]) > 1 for one in node.input)
        if (
            kind in ("Conv", "ConvTranspose", "Gemm", "MatMul")
            and len(node.input) > 1
            and node.input[1] in self.weights
        ):
            if shared and kind != "Conv":
                self.give_up(node, f"{kind} {name} shares its weight")
            else:
                self.layer(node, name, kind, attributes, shared=shared)
        elif not inputs:
            return
        elif kind in SAME:
            self.carried[node.output[0]] = self.carried[data] if data in self.carried else self.carried[inputs[0]]
            if kind in POOLS and self.carried[node.output[0]].axis != 1:
                self.give_up(node, f"{kind} {name} pools over them")
        elif kind in PAIRS:
            self.pair(node, name, kind)
        elif kind in ("BatchNormalization", "InstanceNormalization") and data in self.carried and not shared:
            carried = self.carried[data]
            if carried.axis != 1:
                self.give_up(node, f"{kind} {name} normalises over them")
                return
            for parameter in node.input[1:]:
                self.cuts.append(Cut(parameter, 0, carried.atoms))
            self.carried[node.output[0]] = carried
        elif kind == "LayerNormalization":
            self.layer_norm(node, name, attributes)
        elif kind == "Concat":
            self.concat(node, name, attributes)
        elif kind == "Split":
            self.split(node, name, attributes)
        elif kind == "Flatten" and data in self.carried:
            self.flatten(node, name, attributes)
        elif kind == "Reshape" and data in self.carried:
            self.reshape(node, name)
        elif kind == "Transpose" and data in self.carried:
            carried = self.carried[data]
            order = list(attributes.get("perm", range(carried.rank - 1, -1, -1)))
            self.carried[node.output[0]] = Carried(order.index(carried.axis), carried.rank, carried.atoms)
        elif kind == "MatMul" and len(inputs) == 2:
            self.product(node, name)
        elif kind in ("Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceMax", "Pad", "Resize"):
            self.along(node, name, kind, attributes)
        elif kind == "Squeeze" and data in self.carried:
            self.squeeze(node, name, attributes)
        elif kind == "Shape":
            # lengths of other axes stay; that of the channels would be wrong wherever it is used
            if self.asks_channels(node):
                self.freeze(data, f"Shape {name} asks for their number")
        else:
            self.give_up(node, f"it goes through {node.op_type} {name}, whose channels are not followed")

    def give_up(self, node: onnx.NodeProto, why: str) -> None:
        for name in node.input:
            self.freeze(name, why)
        for name in node.output:
            self.carried.pop(name, None)

    def layer(self, node: onnx.NodeProto, name: str, kind: str, attributes: dict[str, Any], *, shared: bool) -> None:
        """A layer with weights: takes the atoms of its input, makes new ones for its output."""
        weight, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
        dims = list(self.weights[weight].dims)
        rank = len(dims) if kind in ("Conv", "ConvTranspose") else len(self.shape(node.output[0]) or [])
        group = int(attributes.get("group", 1))
        carried = self.carried.get(node.input[0])
        plain = self.weights[weight].data_type == onnx.TensorProto.FLOAT and (not bias or bias in self.weights)
        whole = carried is not None and carried.axis == 1 and len(carried.atoms) == group * dims[1]
        if kind == "Conv" and group > 1 and carried is not None and whole and plain and not shared:
            self.blocks(node, carried, group, dims[0])
            return
        if group > 1 or not plain or shared or rank == 0 or (kind in ("Gemm", "MatMul") and len(dims) != 2):
            what = "grouped convolution" if group > 1 else kind
            why = (
                "its weight is shared or not plain"
                if not plain or shared
                else "its input is not, or its weight has an odd shape"
            )
            self.give_up(node, f"{what} {name} is not followed: {why}")
            return
        into, out = _axes(kind, attributes)
        if into < 0:
            self.give_up(node, f"{kind} {name} has its input transposed")
            return
        if carried is not None:
            where = 1 if kind in ("Conv", "ConvTranspose") else carried.rank - 1
            if carried.axis != where or len(carried.atoms) != dims[into]:
                self.give_up(node, f"{kind} {name} multiplies along another axis")
                carried = None
            else:
                self.cuts.append(Cut(weight, into, carried.atoms))
                self.consumers.append(
                    Consumer(name, kind, node.input[0], weight, bias, node.output[0], attributes, carried.atoms)
                )
        atoms = self.fresh(dims[out])
        self.cuts.append(Cut(weight, out, atoms))
        if bias:
            if list(self.weights[bias].dims) == [dims[out]] and self.users[bias] == 1:
                self.cuts.append(Cut(bias, 0, atoms))
            else:
                self.freeze_atoms(atoms, f"the bias of {name} has a shape of its own or is shared")
        self.carried[node.output[0]] = Carried(1 if kind in ("Conv", "ConvTranspose") else rank - 1, rank, atoms)

    def blocks(self, node: onnx.NodeProto, carried: Carried, group: int, outputs: int) -> None:
        """A grouped convolution: each block of inputs makes a block of outputs, and both go as a whole or not at all.

        Of a depthwise one a block is a single channel. Taking as many out of each block instead would tie channels together
        that have nothing to do with each other.
        """
        rows = carried.atoms.reshape(group, -1)
        for row in rows:
            self.join(row[1:], np.full(len(row) - 1, row[0]))
        made = np.repeat(rows[:, 0], outputs // group)
        self.cuts += [Cut(name, 0, made) for name in node.input[1:] if name]
        self.cuts.append(Cut("", 0, rows[:, 0], node=node.output[0]))
        self.carried[node.output[0]] = Carried(1, carried.rank, made)

    def layer_norm(self, node: onnx.NodeProto, name: str, attributes: dict[str, Any]) -> None:
        """Along other axes than the channels' it changes nothing; over them it would see another mean without some."""
        carried = self.carried.get(node.input[0])
        axis = int(attributes.get("axis", -1))
        if carried is None or len(node.output) > 1 or carried.axis >= axis % carried.rank:
            self.give_up(
                node,
                f"LayerNormalization {name} normalises over them: without some, mean and variance of all are others",
            )
            return
        self.carried[node.output[0]] = carried

    def pair(self, node: onnx.NodeProto, name: str, kind: str) -> None:
        """Element by element, with broadcasting from the right."""
        output = self.shape(node.output[0])
        if output is None:
            self.give_up(node, f"the shape of {kind} {name} is not known")
            return
        rank = len(output)
        held: Carried | None = None
        for one in node.input:
            carried = self.carried.get(one)
            if carried is None or len(carried.atoms) == 1:
                continue
            axis = carried.axis + rank - carried.rank
            if held is not None and (held.axis != axis or len(held.atoms) != len(carried.atoms)):
                self.give_up(node, f"{kind} {name} brings different axes together")
                return
            if held is not None:
                self.join(held.atoms, carried.atoms)
            held = Carried(axis, rank, carried.atoms)
        if held is None:
            self.give_up(node, f"{kind} {name} has one channel")
            return
        for one in node.input:
            if one in self.carried and len(self.carried[one].atoms) > 1:
                continue
            shape = self.shape(one)
            if shape is None:
                self.give_up(node, f"the shape of an input of {kind} {name} is not known")
                return
            axis = held.axis - (rank - len(shape))
            if axis < 0 or shape[axis] == 1:
                continue  # the same for every channel
            if one in self.weights and self.users[one] == 1 and shape[axis] == len(held.atoms):
                self.cuts.append(Cut(one, axis, held.atoms))
                continue
            self.give_up(node, f"{kind} {name} joins them with {one!r}, which cannot lose any")
            return
        self.carried[node.output[0]] = held

    def concat(self, node: onnx.NodeProto, name: str, attributes: dict[str, Any]) -> None:
        first = next(self.carried[one] for one in node.input if one in self.carried)
        axis = int(attributes.get("axis", 0)) % first.rank
        parts: list[Atoms] = []
        for one in node.input:
            carried = self.carried.get(one)
            shape = self.shape(one)
            if carried is not None and carried.axis == axis and first.axis == axis:
                parts.append(carried.atoms)
            elif carried is None and first.axis == axis and shape is not None and shape[axis] > 0:
                atoms = self.fresh(shape[axis])
                self.freeze_atoms(atoms, f"Concat {name} takes them from {one!r}, which cannot lose any")
                parts.append(atoms)
            elif carried is not None and carried.axis == first.axis and first.axis != axis:
                self.join(first.atoms, carried.atoms)
            else:
                self.give_up(node, f"Concat {name} lines up what is not followed")
                return
        atoms = np.concatenate(parts) if parts else first.atoms
        self.carried[node.output[0]] = Carried(first.axis, first.rank, atoms)

    def split(self, node: onnx.NodeProto, name: str, attributes: dict[str, Any]) -> None:
        carried = self.carried.get(node.input[0])
        if carried is None:
            return
        axis = int(attributes.get("axis", 0)) % carried.rank
        if axis != carried.axis:
            for output in node.output:
                self.carried[output] = carried
            return
        sizes = node.input[1] if len(node.input) > 1 and node.input[1] else ""
        if sizes not in self.weights or self.users[sizes] > 1:
            self.give_up(node, f"Split {name} has parts that are not stored with it alone")
            return
        begin = 0
        for index, size in enumerate(numpy_helper.to_array(self.weights[sizes]).tolist()):
            atoms = carried.atoms[begin : begin + size]
            self.cuts.append(Cut(sizes, 0, atoms, entry=index))
            self.carried[node.output[index]] = Carried(axis, carried.rank, atoms)
            begin += size

    def flatten(self, node: onnx.NodeProto, name: str, attributes: dict[str, Any]) -> None:
        carried, shape = self.carried[node.input[0]], self.shape(node.input[0])
        axis = int(attributes.get("axis", 1))
        inner = None if shape is None else shape[axis:]
        if inner is None or carried.axis < axis or any(length < 0 for length in inner):
            self.give_up(node, f"Flatten {name} mixes axes whose lengths are not known")
            return
        atoms = _merged(carried.atoms, inner, carried.axis - axis)
        self.carried[node.output[0]] = Carried(1, 2, atoms)

    def reshape(self, node: onnx.NodeProto, name: str) -> None:
        """Follow channels that are merged with what stands beside them, or cut into heads."""
        carried, before, after = self.carried[node.input[0]], self.shape(node.input[0]), self.shape(node.output[0])
        target = node.input[1]
        if before is None or after is None or target not in self.weights or self.users[target] > 1:
            self.give_up(node, f"Reshape {name} has a shape that is not stored with it alone")
            return
        stored = numpy_helper.to_array(self.weights[target]).tolist()
        axis = carried.axis
        if len(after) == len(before) + 1 and before[:axis] == after[:axis] and before[axis + 1 :] == after[axis + 2 :]:
            heads, inner = after[axis], after[axis + 1]
            if heads > 0 and inner > 0 and heads * inner == len(carried.atoms) and stored[axis] == heads:
                rows = carried.atoms.reshape(heads, inner)
                for row in rows:  # a head goes as a whole
                    self.join(row[1:], np.full(inner - 1, row[0]))
                self.cuts.append(Cut(target, 0, rows[:, 0], entry=axis))
                self.carried[node.output[0]] = Carried(axis, len(after), rows[:, 0])
                return
        begin = _same_start(before, after, axis)
        tail = before[begin:]
        if len(after) == begin + 1 and all(length > 0 for length in tail):
            atoms = _merged(carried.atoms, tail, axis - begin)
            if stored[begin] != -1:
                per = len(atoms) // len(carried.atoms)
                self.cuts.append(Cut(target, 0, carried.atoms, entry=begin, per=per))
            self.carried[node.output[0]] = Carried(begin, len(after), atoms)
            return
        self.give_up(node, f"Reshape {name} moves them in a way that is not followed")

    def product(self, node: onnx.NodeProto, name: str) -> None:
        """Two tensors from inside multiplied: heads are a batch axis of both."""
        one, two = (self.carried[item] for item in node.input)
        same = one.rank == two.rank and one.axis == two.axis < one.rank - 2 and len(one.atoms) == len(two.atoms)
        if not same:
            self.give_up(node, f"MatMul {name} multiplies what is not followed")
            return
        self.join(one.atoms, two.atoms)
        self.carried[node.output[0]] = one

    def along(self, node: onnx.NodeProto, name: str, kind: str, attributes: dict[str, Any]) -> None:
        """Operators that work along axes which must not be the channels'."""
        carried = self.carried.get(node.input[0])
        if carried is None:
            return
        if kind in ("Softmax", "LogSoftmax"):
            axes = [int(attributes.get("axis", -1)) % carried.rank]
        elif kind in ("Pad", "Resize"):
            axes = [] if carried.axis == 1 and self.spatial(node, kind, carried.rank) else [carried.axis]
        else:
            stored = node.input[1] if len(node.input) > 1 else ""
            listed = attributes.get("axes") or (
                numpy_helper.to_array(self.weights[stored]).tolist() if stored in self.weights else range(carried.rank)
            )
            axes = [int(axis) % carried.rank for axis in listed]
        if carried.axis in axes:
            self.give_up(node, f"{kind} {name} works along them")
            return
        gone = [] if kind in ("Softmax", "LogSoftmax", "Pad", "Resize") or attributes.get("keepdims", 1) else axes
        shift = sum(axis < carried.axis for axis in gone)
        self.carried[node.output[0]] = Carried(carried.axis - shift, carried.rank - len(gone), carried.atoms)

    def spatial(self, node: onnx.NodeProto, kind: str, rank: int) -> bool:
        """Tell whether a Pad or Resize leaves the second axis alone."""
        if kind == "Pad":
            pads = node.input[1] if len(node.input) > 1 else ""
            if pads not in self.weights or (len(node.input) > 3 and node.input[3]):
                return False
            values = numpy_helper.to_array(self.weights[pads]).tolist()
            return len(values) == 2 * rank and values[1] == values[1 + rank] == 0
        scales = node.input[2] if len(node.input) > 2 else ""
        return scales in self.weights and float(numpy_helper.to_array(self.weights[scales]).reshape(-1)[1]) == 1.0

    def squeeze(self, node: onnx.NodeProto, name: str, attributes: dict[str, Any]) -> None:
        carried = self.carried[node.input[0]]
        stored = node.input[1] if len(node.input) > 1 else ""
        listed = attributes.get("axes") or (
            numpy_helper.to_array(self.weights[stored]).tolist() if stored in self.weights else None
        )
        if listed is None:
            self.give_up(node, f"Squeeze {name} does not say which axes")
            return
        axes = [int(axis) % carried.rank for axis in listed]
        shift = sum(axis < carried.axis for axis in axes)
        self.carried[node.output[0]] = Carried(carried.axis - shift, carried.rank - len(axes), carried.atoms)

    def asks_channels(self, node: onnx.NodeProto) -> bool:
        """Tell whether what comes of a Shape may be the number of channels; only Gather of another axis says no."""
        carried = self.carried[node.input[0]]
        for user in self.graph.node:
            if node.output[0] not in user.input:
                continue
            index = user.input[1] if user.op_type in ("Gather", "Slice") and len(user.input) > 1 else ""
            if user.op_type == "Gather" and index in self.weights:
                if any(
                    int(one) % carried.rank == carried.axis
                    for one in numpy_helper.to_array(self.weights[index]).reshape(-1)
                ):
                    return True
            elif user.op_type == "Slice" and index in self.weights and user.input[2] in self.weights:
                begin = int(numpy_helper.to_array(self.weights[index]).reshape(-1)[0]) % carried.rank
                end = int(numpy_helper.to_array(self.weights[user.input[2]]).reshape(-1)[0])
                end = end + carried.rank if end < 0 else min(end, carried.rank)
                if begin <= carried.axis < end:
                    return True
            else:
                return True
        return False

    # groups

    def gather(self) -> Dependencies:
        """Put classes with the same places together."""
        root = {atom: self.find(atom) for atom in range(len(self.parent))}
        reasons: dict[int, str] = {}
        for atom, why in self.frozen.items():
            reasons.setdefault(root[atom], why)
        eats: dict[int, list[int]] = {}
        for index, consumer in enumerate(self.consumers):
            for kind in {root[atom] for atom in consumer.atoms.tolist()}:
                eats.setdefault(kind, []).append(index)
        made: dict[int, list[int]] = {}
        for index, cut in enumerate(self.cuts):
            for kind in {root[atom] for atom in cut.atoms.tolist()}:
                made.setdefault(kind, []).append(index)
        groups: dict[tuple[tuple[int, ...], tuple[int, ...], str], Group] = {}
        for kind in sorted(set(root.values())):
            used = tuple(eats.get(kind, ()))
            why = reasons.get(kind, "" if used else "nothing multiplies them, so nothing could make up for them")
            key = (used, tuple(made.get(kind, ())), why)
            group = groups.setdefault(key, Group([], [self.consumers[index] for index in used], why))
            group.classes.append(kind)
        return Dependencies(list(groups.values()), self.cuts, root)


def _axes(kind: str, attributes: Mapping[str, Any]) -> tuple[int, int]:
    """Return (input axis, output axis) of a weight; −1 where the input is transposed."""
    if kind == "Conv":
        return 1, 0
    if kind == "ConvTranspose":
        return 0, 1
    if attributes.get("transA", 0):
        return -1, -1
    return (1, 0) if attributes.get("transB", 0) else (0, 1)


def _merged(atoms: Atoms, lengths: Sequence[int], axis: int) -> Atoms:
    """Return atoms along axes that are merged into one: repeated by what stands inside, tiled by what stands outside."""
    inside = int(np.prod(lengths[axis + 1 :], dtype=np.int64))
    outside = int(np.prod(lengths[:axis], dtype=np.int64))
    return np.tile(np.repeat(atoms, inside), outside)


def _same_start(before: Sequence[int], after: Sequence[int], most: int) -> int:
    """Return how many axes at the start are the same, at most `most`."""
    count = 0
    while count < min(most, len(after) - 1) and before[count] == after[count]:
        count += 1
    return count


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
