"""The same function with less arithmetic: what is recognised, what only looks like it, and that nothing moves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from wherry_optimizer.activations import distance, run_all
from wherry_optimizer.passes import Work, rewrite
from wherry_shared.errors import RefusedError

WIDTH, DEPTH = 8, 11
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(DEPTH, WIDTH)).astype(np.float32)
INDICES = np.array([[0, 3, DEPTH - 1], [DEPTH, -1, 400]], np.int32)
"""Of rows that there are, and of some that there are not."""


class Net:
    """A graph that is written down operator by operator."""

    def __init__(self, kind: int, shape: list[Any], opset: int = 15) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("x", kind, shape)
        self.outputs: list[str] = []
        self.opset = opset

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", [self.input], infos, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def rewritten(model: onnx.ModelProto, folder: Path, *calls: np.ndarray) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Rewrite a model, and check that it answers as before."""
    path = folder / "net.onnx"
    onnx.save(model, path)
    given = [{"x": call} for call in calls]
    result = rewrite.apply(path, rewrite.Parameters(), Work(folder, given))
    made = onnx.load(result.path)
    names = [output.name for output in model.graph.output]
    assert distance(run_all(made, names, given), run_all(model, names, given)) < 1e-6
    return made, result.notes


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def left_alone(model: onnx.ModelProto, folder: Path, call: np.ndarray) -> None:
    onnx.save(model, folder / "net.onnx")
    with pytest.raises(RefusedError) as caught:
        rewrite.apply(folder / "net.onnx", rewrite.Parameters(), Work(folder, [{"x": call}]))
    assert caught.value.code == "pass_noop"


def one_hot(net: Net, *, expand: bool = True) -> str:
    """Write x == ramp, as a float matrix."""
    column = net("Unsqueeze", "x", net.const([2], np.int64))
    if expand:
        shape = net("Concat", net("Shape", "x"), net.const([DEPTH], np.int64), axis=0)
        column = net("Expand", column, shape)
    ramp = net.const(np.arange(DEPTH)[None, None], np.int32)
    return net("Cast", net("Equal", column, ramp), to=TensorProto.FLOAT)


@pytest.mark.parametrize("expand", [True, False])
def test_a_one_hot_matrix_times_a_table_picks_rows_and_none_for_what_is_no_index(expand: bool, tmp_path: Path) -> None:
    net = Net(TensorProto.INT32, ["n", 3])
    made, notes = rewritten(
        net.model(net("MatMul", one_hot(net, expand=expand), net.const(TABLE))), tmp_path, INDICES, INDICES[:1]
    )
    assert notes["one_hot"] == 1
    assert operators(made)["MatMul"] == operators(made)["Equal"] == 0
    (out,) = run_all(made, [made.graph.output[0].name], [{"x": INDICES}])[0]
    assert np.array_equal(out[0], TABLE[INDICES[0]])
    assert not out[1].any()


def test_an_operator_for_one_hot_counts_negative_indices_from_the_end(tmp_path: Path) -> None:
    net = Net(TensorProto.INT64, ["n"])
    hot = net("OneHot", "x", net.const(DEPTH, np.int64), net.const([0, 1]), axis=-1)
    bias = net.const(RNG.normal(size=WIDTH))
    made, notes = rewritten(
        net.model(net("Gemm", hot, net.const(TABLE), bias)), tmp_path, np.array([0, -1, 5, -DEPTH, 40, -40])
    )
    assert (notes["one_hot"], notes["folded"]) == (1, 1), "the offset is in the table"
    assert operators(made)["Gemm"] == operators(made)["OneHot"] == 0


def test_numbers_between_two_of_a_ramp_pick_no_row(tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", 3])
    same = net("Equal", net("Unsqueeze", "x", net.const([2], np.int64)), net.const(np.arange(DEPTH)))
    model = net.model(net("MatMul", net("Cast", same, to=TensorProto.FLOAT), net.const(TABLE)))
    left_alone(model, tmp_path, np.array([[0, 2.5, 1]], np.float32))


@pytest.mark.parametrize("what", ["ramp", "offset", "axis"])
def test_what_only_looks_like_a_one_hot_product_stays(what: str, tmp_path: Path) -> None:
    net = Net(TensorProto.INT32, ["n", DEPTH if what == "axis" else 3])
    column = "x" if what == "axis" else net("Unsqueeze", "x", net.const([2], np.int64))
    values = np.arange(DEPTH) * 2 if what == "ramp" else np.arange(DEPTH)
    same = net("Equal", column, net.const(values, np.int32))
    hot = net("Cast", same, to=TensorProto.FLOAT)
    if what == "offset":
        hot = net("Add", hot, net.const(1.0))
    left_alone(
        net.model(net("MatMul", hot, net.const(TABLE))),
        tmp_path,
        np.zeros((2, DEPTH if what == "axis" else 3), np.int32),
    )


def test_arithmetic_on_rows_is_done_in_the_table(tmp_path: Path) -> None:
    net = Net(TensorProto.INT64, ["n"])
    row = net("Gather", net.const(TABLE), "x")
    shifted = net("Add", row, net.const(RNG.normal(size=(1, WIDTH))))
    made, notes = rewritten(net.model(net("Mul", shifted, net("Sigmoid", shifted))), tmp_path, np.array([0, 4, 10]))
    assert (notes["folded"], dict(operators(made))) == (3, {"Gather": 1})


@pytest.mark.parametrize("what", ["table", "activation", "scale"])
def test_a_constant_that_adds_an_axis_stays(what: str, tmp_path: Path) -> None:
    one = np.full((1, 1, 1), 2.0)
    if what == "table":
        net = Net(TensorProto.INT64, ["n"])
        y, call = net("Mul", net("Gather", net.const(TABLE), "x"), net.const(one)), np.array([1, 2])
    else:
        net = Net(TensorProto.FLOAT, ["n", WIDTH])
        call = RNG.normal(size=(2, WIDTH)).astype(np.float32)
        if what == "activation":
            y = gelu(net, net("Exp", "x"), "ranks")
        else:
            y = net("Mul", net("MatMul", "x", net.const(RNG.normal(size=(WIDTH, 3)))), net.const(one))
    left_alone(net.model(net("ReduceMax", y, axes=[0], keepdims=0)), tmp_path, call)


def test_an_activation_that_ends_far_out_stays(tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    x = net("Clip", "x", net.const(-500.0), net.const(500.0))
    made, notes = rewritten(
        net.model(gelu(net, x, "pow"), gelu(net, "x", "half last")),
        tmp_path,
        RNG.normal(size=(2, WIDTH)).astype(np.float32),
    )
    assert (notes["gelu"], operators(made)["Clip"]) == (2, 1), "what ends at 500 is no GELU, and stays before one"


def test_a_row_that_others_read_too_stays_as_it_is(tmp_path: Path) -> None:
    net = Net(TensorProto.INT64, ["n"])
    row = net("Gather", net.const(TABLE), "x")
    left_alone(net.model(net("Tanh", row), net("Softmax", row)), tmp_path, np.array([0, 4]))


def gelu(net: Net, x: str, how: str) -> str:
    """Write x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 in one of the ways in which exporters do."""
    root, cubic = np.sqrt(2 / np.pi), 0.046 if how == "other cubic" else 0.044715
    if how == "pow":
        cube = net("Mul", net("Pow", x, net.const(3.0)), net.const(cubic))
    else:
        cube = net("Mul", x, net("Mul", x, net("Mul", net.const(cubic), x)))
    tanh = net("Tanh", net("Mul", net("Add", x, cube), net.const(root)))
    if how == "other scale":
        tanh = net("Tanh", net("Mul", net("Add", x, cube), net.const(0.8)))
    one = net("Add", net.const(np.ones((1, 1, 1)) if how == "ranks" else 1.0), tanh)
    if how == "half last":
        return net("Mul", net("Mul", x, one), net.const(0.5))
    if how == "divided":
        return net("Div", net("Mul", one, x), net.const(2.0))
    return net("Mul", x, net("Mul", net.const(0.5), one))


@pytest.mark.parametrize("how", ["pow", "half first", "half last", "divided", "ranks"])
def test_gelu_is_recognised_however_it_is_spelled(how: str, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", 3, WIDTH])
    x = net("Add", "x", net.const(RNG.normal(size=WIDTH)))
    made, notes = rewritten(
        net.model(net("Softmax", gelu(net, x, how))), tmp_path, RNG.normal(size=(2, 3, WIDTH)).astype(np.float32)
    )
    assert notes["gelu"] == 1
    assert "FastGelu" in fused(made, tmp_path)


@pytest.mark.parametrize("how", ["other cubic", "other scale"])
def test_what_is_nearly_gelu_stays(how: str, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    left_alone(net.model(gelu(net, "x", how)), tmp_path, RNG.normal(size=(2, WIDTH)).astype(np.float32))


@pytest.mark.parametrize("how", ["multiplied", "half first"])
def test_gelu_by_erf_is_recognised_and_what_follows_takes_nothing_of_it(how: str, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    x = net("Exp", "x")
    one = net("Add", net("Erf", net("Mul", x, net.const(np.sqrt(0.5)))), net.const(1.0))
    if how == "half first":
        y = net("Mul", x, net("Mul", one, net.const(0.5)))
    else:
        y = net("Mul", net("Mul", x, one), net.const(0.5))
    made, notes = rewritten(
        net.model(net("MatMul", y, net.const(RNG.normal(size=(WIDTH, 3))))),
        tmp_path,
        RNG.normal(size=(2, WIDTH)).astype(np.float32),
    )
    assert (notes["gelu"], notes["affine"]) == (1, 0)
    assert "Gelu" in fused(made, tmp_path)


def test_gelu_that_the_runtime_fuses_as_it_is_stays(tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    one = net("Add", net("Erf", net("Div", "x", net.const(np.sqrt(2)))), net.const(1.0))
    y = net("Mul", net("Mul", "x", one), net.const(0.5))
    model = net.model(net("MatMul", y, net.const(RNG.normal(size=(WIDTH, 3)))))
    left_alone(model, tmp_path, RNG.normal(size=(2, WIDTH)).astype(np.float32))


def hard_swish(net: Net, x: str, how: str) -> str:
    """Write x · min(max(x + 3, 0), 6) / 6 in one of the ways in which exporters do."""
    top, shift = (5.0 if how == "other top" else 6.0), (2.5 if how == "other shift" else 3.0)
    clipped = net("Clip", net("Add", x, net.const(shift)), net.const(0.0), net.const(top))
    if how == "clip first":
        return net("Mul", x, net("Div", clipped, net.const(6.0)))
    if how == "multiplied":
        return net("Mul", net("Mul", clipped, x), net.const(1 / 6))
    return net("Div", net("Mul", x, clipped), net.const(6.0))


@pytest.mark.parametrize("how", ["clip last", "clip first", "multiplied"])
def test_hard_swish_is_recognised_however_it_is_spelled(how: str, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    x = net("Exp", "x")
    made, notes = rewritten(
        net.model(net("Softmax", hard_swish(net, x, how))), tmp_path, RNG.normal(size=(2, WIDTH)).astype(np.float32)
    )
    assert notes["hard_swish"] == 1
    assert dict(operators(made)) == {"Exp": 1, "HardSigmoid": 1, "Mul": 1, "Softmax": 1}


@pytest.mark.parametrize("how", ["other top", "other shift"])
def test_what_is_nearly_hard_swish_stays(how: str, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    left_alone(net.model(hard_swish(net, "x", how)), tmp_path, RNG.normal(size=(2, WIDTH)).astype(np.float32))


CHANNELS = 6
PER_CHANNEL = RNG.uniform(0.5, 2.0, size=(1, CHANNELS, 1, 1))


def conv(net: Net, x: str, *, kernel: int = 1, group: int = 1, pad: int = 0, biased: bool = False) -> str:
    weight = net.const(RNG.normal(size=(CHANNELS, CHANNELS // group, kernel, kernel)))
    bias = [net.const(RNG.normal(size=CHANNELS))] if biased else []
    return net("Conv", x, weight, *bias, group=group, pads=[pad] * 4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("kernel", "group", "pad"), [(1, 1, 0), (3, 1, 1), (3, CHANNELS, 1), (3, 2, 0)])
def test_a_convolution_takes_the_scales_and_offsets_around_it(
    kernel: int, group: int, pad: int, biased: bool, tmp_path: Path
) -> None:
    net = Net(TensorProto.FLOAT, ["n", CHANNELS, 7, 7])
    x = net("Div", net("Relu", "x"), net.const(0.3))
    y = conv(net, x, kernel=kernel, group=group, pad=pad, biased=biased)
    y = net("Sub", net("Add", net("Mul", net.const(PER_CHANNEL), y), net.const(0.7)), net.const(PER_CHANNEL[0]))
    terms = [net.const(RNG.uniform(0.5, 2.0, size=CHANNELS)) for _ in range(4)]
    y = net("BatchNormalization", y, *terms, epsilon=1e-3)
    made, notes = rewritten(
        net.model(net("Sigmoid", y)), tmp_path, RNG.normal(size=(2, CHANNELS, 7, 7)).astype(np.float32)
    )
    assert notes["affine"] == 5
    assert dict(operators(made)) == {"Relu": 1, "Conv": 1, "Sigmoid": 1}


def test_an_offset_is_taken_by_what_follows_unless_that_is_padded(tmp_path: Path) -> None:
    for pad, left in ((0, 0), (1, 1)):
        net = Net(TensorProto.FLOAT, ["n", CHANNELS, 7, 7])
        x = net("Add", net("Relu", "x"), net.const(0.4))
        model = net.model(net("Mul", conv(net, x, kernel=3, pad=pad), net.const(2.0)))
        made, _ = rewritten(model, tmp_path, RNG.normal(size=(1, CHANNELS, 7, 7)).astype(np.float32))
        assert operators(made)["Add"] == left


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_product_takes_what_it_has_room_for(transposed: int, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", CHANNELS])
    row = np.arange(1.0, 5.0)
    weight = net.const(RNG.normal(size=(4, CHANNELS) if transposed else (CHANNELS, 4)))
    gemm = net("Gemm", net("Mul", "x", net.const(3.0)), weight, net.const(row), transB=transposed)
    product = net(
        "MatMul",
        net("Mul", net("Add", net("Mul", gemm, net.const(row)), net.const(0.1)), net.const(2.0)),
        net.const(RNG.normal(size=(4, 5))),
    )
    made, notes = rewritten(
        net.model(net("Add", net("Mul", product, net.const(0.5)), net.const(np.ones(5)))),
        tmp_path,
        RNG.normal(size=(3, CHANNELS)).astype(np.float32),
    )
    assert notes["affine"] == 5
    assert dict(operators(made)) == {"Gemm": 1, "MatMul": 1, "Add": 1}, "a product has no bias"


@pytest.mark.parametrize("what", ["shared weight", "read twice", "left", "every place", "computed weight"])
def test_a_scale_that_a_layer_cannot_take_stays(what: str, tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", CHANNELS, 7, 7])
    y = conv(net, "x")
    outputs = []
    if what == "shared weight":
        outputs.append(net("Conv", net("Relu", "x"), net.nodes[0].input[1]))
    if what == "read twice":
        outputs.append(net("Softmax", y))
    if what == "computed weight":
        net.nodes[0].input[1] = net("Sigmoid", net.nodes[0].input[1])
        net.nodes.insert(0, net.nodes.pop())
    places = net.const(RNG.normal(size=(1, 1, 7, 7)) if what == "every place" else 2.0)
    scaled = net("Div", places, y) if what == "left" else net("Mul", y, places)
    left_alone(net.model(scaled, *outputs), tmp_path, RNG.normal(size=(2, CHANNELS, 7, 7)).astype(np.float32))


def test_a_gelu_whose_middle_others_read_stays(tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    whole = gelu(net, "x", "pow")
    tanh = next(node.output[0] for node in net.nodes if node.op_type == "Tanh")
    left_alone(net.model(whole, net("Softmax", tanh)), tmp_path, RNG.normal(size=(2, WIDTH)).astype(np.float32))


def test_a_middle_that_a_branch_reads_is_read_from_outside(tmp_path: Path) -> None:
    net = Net(TensorProto.FLOAT, ["n", WIDTH])
    whole = gelu(net, "x", "pow")
    tanh = next(node.output[0] for node in net.nodes if node.op_type == "Tanh")
    branches = [
        helper.make_graph(
            [helper.make_node(operator, [tanh], ["b"])],
            operator,
            [],
            [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        )
        for operator in ("Neg", "Abs")
    ]
    yes = net.const(True, np.bool_)
    branch = net("If", net("Identity", yes), then_branch=branches[0], else_branch=branches[1])
    left_alone(net.model(whole, branch), tmp_path, RNG.normal(size=(2, WIDTH)).astype(np.float32))


def norm(net: Net, x: str, how: str, axis: int, shape: tuple[int, ...]) -> str:
    """Write γ (x - mean) / √(variance + ε) + β in one of the ways in which exporters do."""
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    gamma, beta = (net.const(RNG.normal(size=sizes)) for _ in range(2))
    epsilon = net.const(1e-3 if how == "large epsilon" else 1e-6)
    axes = [axis, 1] if how == "two axes" else [axis]
    count = net.const(1.0 / np.prod([shape[one] for one in axes]))

    def mean(name: str) -> str:
        if how == "mean":
            return net("ReduceMean", name, axes=axes)
        return net("Mul", net("ReduceSum", name, net.const(axes, np.int64)), count)

    if how == "squares":  # E[x²] - E[x]², and the mean expanded by a shape that is computed
        average = mean(x)
        variance = net("Max", net("Sub", mean(net("Mul", x, x)), net("Mul", average, average)), net.const(0.0))
        average = net("Expand", average, net("Shape", x))
        factor = net("Mul", net("Reciprocal", net("Sqrt", net("Add", variance, epsilon))), gamma)
        return net("Add", net("Mul", net("Sub", x, average), factor), beta)
    centred = x if how == "not centred" else net("Sub", x, mean(x))
    variance = net("Add", mean(net("Mul", centred, centred)), epsilon)
    if how == "power":
        scaled = net("Mul", centred, net("Pow", variance, net.const(-0.5)))
    else:
        scaled = net("Div", centred, net("Sqrt", variance))
    return net("Add", net("Mul", scaled, gamma), beta)


@pytest.mark.parametrize("axis", [2, 1])
@pytest.mark.parametrize("how", ["mean", "sum", "squares", "power", "large epsilon"])
def test_a_normalization_is_recognised_however_it_is_spelled(how: str, axis: int, tmp_path: Path) -> None:
    shape = (2, 5, WIDTH)
    net = Net(TensorProto.FLOAT, ["n", *shape[1:]])
    x = net("Relu", "x")
    made, notes = rewritten(
        net.model(net("Softmax", norm(net, x, how, axis, shape))), tmp_path, RNG.normal(size=shape).astype(np.float32)
    )
    assert notes["layer_norm"] == 1
    assert operators(made)["Transpose"] == (0 if axis == 2 else 2)
    assert operators(made)["LayerNormalization"] == 1


@pytest.mark.parametrize("how", ["two axes", "not centred"])
def test_what_is_no_normalization_of_one_axis_stays(how: str, tmp_path: Path) -> None:
    shape = (2, 5, WIDTH)
    net = Net(TensorProto.FLOAT, ["n", *shape[1:]])
    left_alone(net.model(norm(net, "x", how, 2, shape)), tmp_path, RNG.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize(("moved", "by_itself", "kept"), [(0.5, 0.1, False), (0.5, 0.2, True), (0.0009, 0.0, True)])
def test_outputs_may_move_by_little_or_by_what_the_runtime_itself_moves_them(
    moved: float, by_itself: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(TensorProto.INT64, ["n"])
    onnx.save(net.model(net("Tanh", net("Gather", net.const(TABLE), "x"))), tmp_path / "net.onnx")
    told = iter([moved, by_itself])
    monkeypatch.setattr(rewrite, "distance", lambda found, wanted: next(told))
    work = Work(tmp_path, [{"x": np.array([1, 2])}])
    if kept:
        assert rewrite.apply(tmp_path / "net.onnx", rewrite.Parameters(), work).notes["outputs_moved"] == moved
        return
    with pytest.raises(RefusedError, match=f"moved the outputs by {moved}") as caught:
        rewrite.apply(tmp_path / "net.onnx", rewrite.Parameters(), work)
    assert caught.value.code == "pass_failed"


def fused(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Return the operators that onnxruntime makes of a model when it loads it."""
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(folder / "fused.onnx")
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), settings)
    return operators(onnx.load(folder / "fused.onnx"))
