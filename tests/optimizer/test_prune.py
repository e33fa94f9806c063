"""Second-order pruning: it does what the theory says, on matrices and on graphs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.optimizer.models import blobs, classifier, conv
from wherry_optimizer import activations, layers
from wherry_optimizer.activations import distance, rows_of, run_all
from wherry_optimizer.passes import Work, prune
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError


def correlated(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Inputs whose columns say much about each other, as activations do."""
    return rng.normal(size=(rows, columns // 2)) @ rng.normal(size=(columns // 2, columns)) + 0.1 * rng.normal(
        size=(rows, columns)
    )


def lost(before: np.ndarray, after: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm((after - before) @ x.T) / np.linalg.norm(before @ x.T))


@settings(max_examples=20)
@given(st.integers(0, 50), st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([16, 40, 120]))
def test_it_loses_far_less_than_dropping_the_smallest_weights(seed: int, sparsity: float, columns: int) -> None:
    rng = np.random.default_rng(seed)
    x = correlated(400, columns, rng)
    weights = rng.normal(size=(12, columns))
    pruned = prune.prune_matrix(weights, x.T @ x, sparsity, 0.01)
    assert (pruned == 0).mean() == pytest.approx(sparsity, abs=0.01)
    plain = np.where(np.abs(weights) <= np.quantile(np.abs(weights), sparsity), 0, weights)
    assert lost(weights, pruned, x) < 0.7 * lost(weights, plain, x)


@given(st.integers(0, 50))
def test_weights_that_are_left_are_the_least_squares_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = correlated(300, 20, rng)
    weights = rng.normal(size=(3, 20))
    h = x.T @ x + 0.05 * np.eye(20) * np.mean(np.diag(x.T @ x))
    kept = rng.random(weights.shape) < 0.5
    h /= np.mean(np.diag(h))
    single = weights.astype(np.float32)
    fitted = prune._fit(single, single, kept, h.astype(np.float32), 40, 0.0)
    for row in range(3):
        s = np.flatnonzero(kept[row])
        best = np.linalg.solve(h[np.ix_(s, s)], h[s] @ weights[row])
        np.testing.assert_allclose(fitted[row, s], best, rtol=1e-2, atol=1e-3)
        assert (fitted[row, ~kept[row]] == 0).all()


def test_one_weight_is_removed_with_the_best_answer_of_the_others() -> None:
    rng = np.random.default_rng(1)
    x = correlated(200, 4, rng)
    weights = np.array([[1e-3, 1.0, -2.0, 0.5]])
    pruned = prune.prune_matrix(weights, x.T @ x, 0.25, 1e-6)
    assert np.flatnonzero(pruned[0] == 0).tolist() == [0]
    best, *_ = np.linalg.lstsq(x[:, 1:], x @ weights[0], rcond=None)
    np.testing.assert_allclose(pruned[0, 1:], best, rtol=1e-3)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    rng = np.random.default_rng(2)
    x = correlated(100, 8, rng)
    x[:, 3] = 0
    pruned = prune.prune_matrix(rng.normal(size=(5, 8)), x.T @ x, 0.5, 0.01)
    assert np.isfinite(pruned).all()


def test_the_rows_of_a_convolution_are_what_it_multiplies(tmp_path: Path) -> None:
    path = conv(tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    weight = numpy_helper.to_array(graph.initializer[0])
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in graph.node[0].attribute}
    image = np.random.default_rng(0).normal(size=(2, 3, 9, 11)).astype(np.float32)
    rows = rows_of(image, "Conv", attributes, list(weight.shape), 10_000, np.random.default_rng(0))
    product = rows @ weight.reshape(4, -1).T
    # the graph pools relu(conv) over positions: the same from our rows, image by image
    pooled = np.maximum(product, 0).reshape(2, -1, 4).mean(axis=1)
    np.testing.assert_allclose(load(path, "onnx").run({"image": image})["y"], pooled, rtol=1e-4)


def test_a_graph_is_pruned_layer_by_layer_and_keeps_its_answers(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    before = path.read_bytes()
    points, _ = blobs(128, seed=4)
    work = Work(tmp_path, [{"x": point[None]} for point in points])
    result = prune.apply(path, prune.Parameters(sparsity=0.5, minimum_elements=500, samples=128), work)
    assert path.read_bytes() == before
    zeros = [row["zeros"] for row in result.notes["layers"]]
    assert zeros == pytest.approx([0.5, 0.5], abs=0.01)
    fresh, _ = blobs(300, seed=8)
    old, new = (load(file, "onnx").run({"x": fresh})["p"].argmax(1) for file in (path, result.path))
    assert (old == new).mean() > 0.95


def test_a_model_whose_only_pruned_layer_reads_its_input_is_pruned(tmp_path: Path) -> None:
    points, _ = blobs(128, seed=4)
    work = Work(tmp_path, [{"x": point[None]} for point in points])
    result = prune.apply(classifier(tmp_path / "m.onnx"), prune.Parameters(sparsity=0.3, minimum_elements=1000), work)
    assert [row["zeros"] for row in result.notes["layers"]] == pytest.approx([0.3], abs=0.01)


def test_a_layer_that_would_move_too_far_is_left_alone(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    points, _ = blobs(64)
    work = Work(tmp_path, [{"x": point[None]} for point in points])
    with pytest.raises(RefusedError) as caught:
        prune.apply(path, prune.Parameters(sparsity=0.95, minimum_elements=500, error_max=0.01), work)
    assert caught.value.code == "pass_noop"
    with pytest.raises(RefusedError) as caught:
        prune.apply(path, prune.Parameters(sparsity=0.5, exclude=["^layer/"]), work)
    assert caught.value.code == "pass_noop"


@pytest.mark.parametrize(("stay", "of"), [(2, 4), (1, 4), (4, 8)])
def test_a_pattern_holds_in_every_block_and_loses_less_than_the_smallest_weights(stay: int, of: int) -> None:
    rng = np.random.default_rng(stay)
    x = correlated(400, 42, rng)
    weights = rng.normal(size=(12, 42))
    pruned = prune.prune_pattern(weights, x.T @ x, stay, of, 0.01)
    blocks = pruned[:, : 42 // of * of].reshape(12, -1, of)
    assert ((blocks != 0).sum(axis=2) == stay).all()
    assert (pruned[:, 42 // of * of :] != 0).all()
    order = np.argsort(np.abs(weights[:, : 42 // of * of].reshape(12, -1, of)), axis=2)
    plain = weights.copy().reshape(12, -1)[:, : 42 // of * of].reshape(12, -1, of)
    np.put_along_axis(plain, order[:, :, : of - stay], 0.0, axis=2)
    whole = np.concatenate([plain.reshape(12, -1), weights[:, 42 // of * of :]], axis=1)
    assert lost(weights, pruned, x) < 0.75 * lost(weights, whole, x)


def test_two_of_four_weights_of_a_graph_stay(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    points, _ = blobs(128, seed=4)
    work = Work(tmp_path, [{"x": point[None]} for point in points])
    result = prune.apply(path, prune.Parameters(pattern="2:4", minimum_elements=500, samples=128), work)
    assert [row["zeros"] for row in result.notes["layers"]] == pytest.approx([0.5, 0.5], abs=0.01)
    assert result.notes["pattern"] == "2:4"
    for wrong in ("4:2", "2:2", "2/4", "0:4"):
        with pytest.raises(ValueError, match="N:M"):
            prune.Parameters(pattern=wrong)


def test_a_layer_makes_up_for_what_pruning_moved_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    sizes = (48, 96, 96, 32)
    weights = [
        numpy_helper.from_array((rng.normal(size=pair) / np.sqrt(pair[0])).astype(np.float32), f"w{index}")
        for index, pair in enumerate(pairwise(sizes))
    ]
    nodes, name = [], "x"
    for index, tensor in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [name, tensor.name], [f"p{index}"], name=f"product{index}"))
        name = f"p{index}"
        if index < len(weights) - 1:
            nodes.append(helper.make_node("Relu", [name], [f"r{index}"]))
            name = f"r{index}"
    infos = [
        helper.make_tensor_value_info(key, TensorProto.FLOAT, ["n", size]) for key, size in (("x", 48), (name, 32))
    ]
    graph = helper.make_graph(nodes, "three", [infos[0]], [infos[1]], weights)
    path = tmp_path / "three.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    mixing = rng.normal(size=(48, 48)).astype(np.float32)
    calls = [{"x": rng.normal(size=(64, 48)).astype(np.float32) @ mixing} for _ in range(24)]

    def moved() -> float:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        made = prune.apply(path, prune.Parameters(sparsity=0.7, minimum_elements=100), Work(folder, calls[:16]))
        fresh = calls[16:]
        return distance(run_all(onnx.load(made.path), [name], fresh), run_all(onnx.load(path), [name], fresh))

    asked = moved()
    monkeypatch.setattr(layers, "FEW", 1e9)  # every layer wants its own weights
    assert asked < 0.95 * moved()


def branching(path: Path) -> onnx.ModelProto:
    """A network with a residual, a branch that reads from outside, and a tensor that is needed much later."""
    rng = np.random.default_rng(5)
    names = ("a", "b", "c", "d")
    weights = [numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32), name) for name in names]
    weights.append(numpy_helper.from_array(np.array(True), "yes"))
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["early"], ["out"])],
            operator,
            [],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        )
        for operator in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("Tanh", ["p"], ["early"]),
        helper.make_node("MatMul", ["early", "b"], ["q"]),
        helper.make_node("Add", ["q", "early"], ["r"]),
        helper.make_node("MatMul", ["r", "c"], ["s"]),
        helper.make_node("If", ["yes"], ["t"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Mul", ["s", "t"], ["u"]),
        helper.make_node("MatMul", ["u", "d"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "branching", [infos[0]], [infos[1]], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, path)
    return model


def test_stages_give_what_the_whole_model_gives_with_the_weights_of_the_time(tmp_path: Path) -> None:
    model = branching(tmp_path / "branching.onnx")
    calls = [{"x": np.random.default_rng(seed).normal(size=(3, 16)).astype(np.float32)} for seed in range(5)]
    stages = activations.Stages(model, calls)
    for name, changed in (("x", "a"), ("early", "b"), ("r", "c"), ("u", "d")):
        taps = activations.Taps(model, {name})
        for value, call in zip(stages.reach(name), calls, strict=True):
            assert np.allclose(value, taps.run(call)[name], atol=1e-5)
        tensor = next(one for one in model.graph.initializer if one.name == changed)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.5), changed))


def test_stages_give_up_the_last_calls_where_too_much_would_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = branching(tmp_path / "branching.onnx")
    calls = [{"x": np.full((3, 16), number, np.float32)} for number in range(40)]
    monkeypatch.setattr(activations, "KEPT_BYTES_MAX", 12 * 3 * 16 * 4)
    stages = activations.Stages(model, calls)
    assert len(stages.reach("early")) == 13
    assert len(stages.reach("u")) == 13
    monkeypatch.setattr(activations, "KEPT_BYTES_MAX", 1)
    assert len(activations.Stages(model, calls).reach("u")) == activations.KEPT_CALLS_MIN
