"""Structured pruning: what belongs together goes together, what cannot be followed stays, and the rest makes up for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.optimizer.models import blobs, classifier
from wherry_optimizer.channels import analyse
from wherry_optimizer.passes import Work, prune_channels
from wherry_optimizer.passes.prune_channels import Parameters
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError


class Net:
    """A graph under construction; weights are drawn when they are first named."""

    def __init__(self, shape: list[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind.lower()}{len(self.nodes)}_{index}" for index in range(outputs)]
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def keep(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype)
        return name

    def drawn(self, *shape: int) -> str:
        return self.keep(self.rng.normal(0, np.sqrt(2 / max(np.prod(shape[1:]), 1)), shape))

    def conv(self, x: str, into: int, out: int, *, bias: bool = True, **attributes: Any) -> str:
        more = [self.drawn(out)] if bias else []
        return self.node("Conv", x, self.drawn(out, into, 3, 3), *more, pads=[1] * 4, **attributes)

    def head(self, x: str, channels: int) -> str:
        return self.node("Gemm", self.node("Flatten", self.node("GlobalAveragePool", x)), self.drawn(channels, 4))

    def save(self, path: Path, output: str, opset: int = 15) -> Path:
        free = ["n", *self.shape]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, free)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, free if len(free) == 3 else ["n", 4])],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def calls(shape: list[int], count: int = 16) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(6, *shape))
    return [{"x": np.tensordot(rng.normal(size=6), base, 1)[None].astype(np.float32)} for _ in range(count)]


def prune(path: Path, shape: list[int], **more: Any) -> Any:
    parameters = Parameters(**{"ratio": 0.5, "minimum_channels": 2, "samples": 16, **more})
    return prune_channels.apply(path, parameters, Work(path.parent, calls(shape)))


def widths(path: Path) -> dict[str, list[int]]:
    return {
        node.name: list(tensor.dims)
        for model in [onnx.load(path)]
        for node in model.graph.node
        for tensor in model.graph.initializer
        if len(node.input) > 1 and node.input[1] == tensor.name
    }


IMAGE = [3, 8, 8]


def chain(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 16))
    x = net.node("MaxPool", net.node("Relu", net.conv(x, 16, 16)), kernel_shape=[2, 2], strides=[2, 2])
    return net.node("Gemm", net.node("Flatten", x), net.drawn(256, 4))


def residual(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 16))
    y = net.node("Relu", net.conv(x, 16, 16))
    return net.head(net.node("Relu", net.node("Add", net.conv(y, 16, 16), x)), 16)


def concatenated(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 8))
    y = net.node("Relu", net.conv(x, 8, 12))
    return net.head(net.conv(net.node("Concat", x, y, axis=1), 20, 16), 16)


def depthwise(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 16))
    x = net.node("Relu", net.node("Conv", x, net.drawn(16, 1, 3, 3), net.drawn(16), pads=[1] * 4, group=16))
    return net.head(net.node("Relu", net.conv(x, 16, 16)), 16)


def grouped(net: Net) -> str:
    """Between two layers of 1 × 1 and beside a shortcut, as in ResNeXt (Xie and others, 2017)."""
    x = net.node("Relu", net.conv("x", 3, 16))
    y = net.node("Relu", net.node("Conv", x, net.drawn(24, 16, 1, 1), net.drawn(24)))
    y = net.node("Relu", net.node("Conv", y, net.drawn(12, 4, 3, 3), net.drawn(12), pads=[1] * 4, group=6))
    return net.head(net.node("Add", net.node("Conv", y, net.drawn(16, 12, 1, 1)), x), 16)


def multiplied(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 8))
    return net.head(net.node("Relu", net.node("Conv", x, net.drawn(32, 1, 3, 3), pads=[1] * 4, group=8)), 32)


def channels_last(net: Net) -> str:
    """As converters from TensorFlow write them: images with channels last, turned for each convolution and back."""
    there, back = [0, 3, 1, 2], [0, 2, 3, 1]
    x = net.node("Transpose", net.conv(net.node("Transpose", "x", perm=there), 3, 16, bias=False), perm=back)
    x = net.node("Relu", net.node("Add", x, net.drawn(16)))
    x = net.node("Transpose", net.conv(net.node("Transpose", x, perm=there), 16, 16), perm=back)
    x = net.node("ReduceMean", net.node("Relu", x), axes=[1, 2], keepdims=0)
    return net.node("MatMul", x, net.drawn(16, 4))


def normalised(net: Net) -> str:
    x = net.conv("x", 3, 16, bias=False)
    scale = [net.keep(net.rng.uniform(0.5, 1.5, 16)) for _ in range(4)]
    x = net.node("Relu", net.node("BatchNormalization", x, *scale))
    return net.head(net.node("Relu", net.conv(x, 16, 16)), 16)


def gated(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 16))
    squeezed = net.node("Relu", net.node("Conv", net.node("GlobalAveragePool", x), net.drawn(8, 16, 1, 1)))
    gate = net.node("Sigmoid", net.node("Conv", squeezed, net.drawn(16, 8, 1, 1)))
    return net.head(net.conv(net.node("Mul", x, gate), 16, 16), 16)


def parted(net: Net) -> str:
    x = net.node("Relu", net.conv("x", 3, 16))
    one, two = net.node("Split", x, net.keep([6, 10], np.int64), outputs=2, axis=1)
    y = net.node("Concat", net.node("Relu", net.conv(one, 6, 8)), two, axis=1)
    return net.head(net.conv(y, 18, 16), 16)


def attention(net: Net) -> str:
    wide, heads, inner = 24, 6, 4
    shape, back = net.keep([0, 0, heads, inner], np.int64), net.keep([0, 0, wide], np.int64)
    parts = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        whole = net.node("Add", net.node("MatMul", "x", net.drawn(16, wide)), net.drawn(wide))
        parts.append(net.node("Transpose", net.node("Reshape", whole, shape), perm=order))
    scores = net.node("Softmax", net.node("Mul", net.node("MatMul", parts[0], parts[1]), net.keep(0.5)), axis=-1)
    mixed = net.node("Transpose", net.node("MatMul", scores, parts[2]), perm=[0, 2, 1, 3])
    x = net.node("MatMul", net.node("Reshape", mixed, back), net.drawn(wide, 16))
    y = net.node("Erf", net.node("Add", net.node("MatMul", x, net.drawn(16, 32)), net.drawn(32)))
    return net.node("Add", net.node("MatMul", y, net.drawn(32, 16)), "x")


@pytest.mark.parametrize(
    ("build", "shape", "shares"),
    [
        (chain, IMAGE, 2),
        (residual, IMAGE, 2),
        (concatenated, IMAGE, 3),
        (depthwise, IMAGE, 2),
        (grouped, IMAGE, 2),
        (multiplied, IMAGE, 1),
        (channels_last, [8, 8, 3], 2),
        (normalised, IMAGE, 2),
        (gated, IMAGE, 3),
        (parted, IMAGE, 4),
        (attention, [5, 16], 3),
    ],
)
def test_groups_are_found_and_the_network_that_is_left_runs_and_is_smaller(
    build: Any, shape: list[int], shares: int, tmp_path: Path
) -> None:
    net = Net(shape)
    path = net.save(tmp_path / "m.onnx", build(net))
    before = path.read_bytes()
    result = prune(path, shape)
    assert path.read_bytes() == before
    assert len(result.notes["layers"]) == shares, result.notes
    assert result.path.stat().st_size < 0.75 * len(before)
    for call in calls(shape, 4):
        one, two = (next(iter(load(file, "onnx").run(call).values())) for file in (path, result.path))
        assert one.shape == two.shape
        assert np.isfinite(two).all()


@pytest.mark.parametrize("build", [residual, attention])
def test_repair_keeps_far_more_than_removing_alone(build: Any, tmp_path: Path) -> None:
    shape = [5, 16] if build is attention else IMAGE
    net = Net(shape)
    path = net.save(tmp_path / "m.onnx", build(net))
    lost = []
    for repair in (True, False):
        result = prune(path, shape, repair=repair, ratio=0.4)
        gaps, sizes = 0.0, 0.0
        for call in calls(shape):
            one, two = (next(iter(load(file, "onnx").run(call).values())) for file in (path, result.path))
            gaps, sizes = gaps + float(np.square(one - two).sum()), sizes + float(np.square(one).sum())
        lost.append(np.sqrt(gaps / sizes))
    assert lost[0] < 0.75 * lost[1], lost


def test_a_head_goes_as_a_whole(tmp_path: Path) -> None:
    net = Net([5, 16])
    path = net.save(tmp_path / "m.onnx", attention(net))
    result = prune(path, [5, 16])
    heads = result.notes["layers"][0]
    assert (heads["channels"], heads["removed"]) == (6, 3)
    weights = [dims for name, dims in widths(result.path).items() if name.startswith("matmul")]
    assert weights.count([16, 12]) == 3
    assert [12, 8] in weights


def test_heads_go_by_default_and_what_is_too_small_says_so(tmp_path: Path) -> None:
    """Six heads of four channels are as many channels as a layer of 24; a layer of 12 would keep 8, and is left alone."""
    net = Net([5, 16])
    path = net.save(tmp_path / "m.onnx", attention(net))
    result = prune(path, [5, 16], minimum_channels=8, ratio=0.9)
    assert next((row["channels"], row["removed"]) for row in result.notes["layers"]) == (6, 4), "two heads stay"
    small = Net(IMAGE)
    x = small.node("Relu", small.conv(small.node("Relu", small.conv("x", 3, 12)), 12, 32))
    result = prune(
        small.save(tmp_path / "s.onnx", small.head(small.node("Relu", small.conv(x, 32, 32)), 32)),
        IMAGE,
        minimum_channels=8,
    )
    (said,) = [reason for reason in result.notes["left_alone"] if "go as a whole" in reason]
    assert "12 parts that go as a whole, of which 8 stay" in said


def test_channels_that_a_residual_joins_are_cut_alike(tmp_path: Path) -> None:
    net = Net(IMAGE)
    path = net.save(tmp_path / "m.onnx", residual(net))
    shapes = [dims for name, dims in sorted(widths(prune(path, IMAGE).path).items()) if name.startswith("conv")]
    assert shapes == [[8, 3, 3, 3], [8, 8, 3, 3], [8, 8, 3, 3]]


def reasons_of(path: Path) -> str:
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    shapes = {
        item.name: [axis.dim_value if axis.HasField("dim_value") else -1 for axis in item.type.tensor_type.shape.dim]
        for item in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    }
    return "; ".join(sorted({group.reason for group in analyse(model.graph, shapes).groups if group.reason}))


def shared_blocks(net: Net) -> str:
    weight = net.drawn(16, 4, 3, 3)
    x = net.node("Conv", net.node("Relu", net.conv("x", 3, 16)), weight, pads=[1] * 4, group=4)
    return net.head(net.node("Conv", x, weight, pads=[1] * 4, group=4), 16)


def layer_normalised(net: Net) -> str:
    x = net.node("Transpose", net.conv("x", 3, 16), perm=[0, 2, 3, 1])
    x = net.node("LayerNormalization", x, net.drawn(16), net.drawn(16), axis=-1)
    return net.head(net.node("Transpose", x, perm=[0, 3, 1, 2]), 16)


def over_channels(net: Net) -> str:
    return net.head(net.node("Softmax", net.conv("x", 3, 16), axis=1), 16)


def with_input(net: Net) -> str:
    return net.head(net.node("Add", net.conv("x", 3, 3), "x"), 3)


def unknown(net: Net) -> str:
    return net.head(net.node("LRN", net.conv("x", 3, 16), size=3), 16)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (shared_blocks, "grouped convolution conv2 is not followed: its weight is shared"),
        (layer_normalised, "LayerNormalization layernormalization2 normalises over them"),
        (over_channels, "Softmax softmax1 works along them"),
        (with_input, "joins them with 'x', which cannot lose any"),
        (unknown, "it goes through LRN lrn1, whose channels are not followed"),
        (chain, "it is the output"),
    ],
)
def test_what_cannot_be_followed_is_left_alone_with_the_reason(build: Any, why: str, tmp_path: Path) -> None:
    net = Net(IMAGE)
    assert why in reasons_of(net.save(tmp_path / "m.onnx", build(net), opset=17))


def test_a_layer_norm_along_other_axes_changes_nothing(tmp_path: Path) -> None:
    net = Net(IMAGE)
    x = net.node("LayerNormalization", net.node("Relu", net.conv("x", 3, 16)), net.drawn(8), net.drawn(8), axis=-1)
    path = net.save(tmp_path / "m.onnx", net.head(x, 16), opset=17)
    assert prune(path, IMAGE).notes["layers"][0]["removed"] == 8


def test_blocks_of_a_grouped_convolution_go_as_a_whole(tmp_path: Path) -> None:
    net = Net(IMAGE)
    path = net.save(tmp_path / "m.onnx", grouped(net))
    made = prune(path, IMAGE).path
    (node,) = [one for one in onnx.load(made).graph.node if any(item.name == "group" for item in one.attribute)]
    assert next(item.i for item in node.attribute if item.name == "group") == 3
    dims = widths(made)
    assert dims[node.name] == [6, 4, 3, 3]


def test_a_network_of_which_nothing_can_go_is_refused_with_the_reasons(tmp_path: Path) -> None:
    net = Net(IMAGE)
    path = net.save(tmp_path / "m.onnx", with_input(net))
    with pytest.raises(RefusedError, match="cannot lose any") as caught:
        prune(path, IMAGE)
    assert caught.value.code == "pass_noop"


def test_half_of_a_redundant_layer_goes_without_a_changed_answer(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    points, _ = blobs(300, seed=4)
    work = Work(tmp_path, [{"x": point[None]} for point in points])
    result = prune_channels.apply(path, Parameters(ratio=0.5, samples=300), work)
    assert result.notes["layers"][0]["removed"] == 48
    fresh, _ = blobs(300, seed=8)
    old, new = (load(file, "onnx").run({"x": fresh})["p"].argmax(1) for file in (path, result.path))
    assert (old == new).mean() > 0.97
