"""Weights on few values: how far outputs move, what compresses, and what stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import zstandard
from onnx import TensorProto, helper, numpy_helper

from tests.optimizer.models import blobs, classifier
from wherry_optimizer import layers, passes
from wherry_optimizer.layers import relative_error
from wherry_optimizer.passes import round_weights
from wherry_optimizer.passes.round_weights import Parameters, round_matrix, round_plain
from wherry_shared.errors import RefusedError


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """A layer and what it sees, whose inputs go together as those of real layers do."""
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(2000, 30)) @ rng.normal(size=(30, 200)) + 0.3 * rng.normal(size=(2000, 200))
    return rng.normal(size=(64, 200)), seen.T @ seen


def compressed(weights: np.ndarray) -> float:
    """Return bytes of the int8 codes, as a share of float32."""
    codes, _ = layers.quantize_channels(weights.astype(np.float32), 0)
    return len(zstandard.compress(codes.tobytes(), 19)) / (4 * weights.size)


def test_a_coarser_grid_compresses_better_and_moves_outputs_little(layer: tuple[np.ndarray, np.ndarray]) -> None:
    weights, hessian = layer
    before = compressed(weights)
    for levels, size_max, error_max in ((31, 0.8, 0.02), (7, 0.52, 0.06)):
        rounded = round_matrix(weights, hessian, levels, 0.01)
        assert compressed(rounded) < size_max * before
        error = relative_error(weights, rounded, hessian)
        assert error < error_max
        assert error < 0.3 * relative_error(weights, round_plain(weights, levels), hessian)


def test_int8_finds_the_same_few_codes_in_every_row(layer: tuple[np.ndarray, np.ndarray]) -> None:
    weights, hessian = layer
    codes, _ = layers.quantize_channels(round_matrix(weights, hessian, 7, 0.01).astype(np.float32), 0)
    assert np.abs(codes).max(axis=1).tolist() == [127] * len(codes)
    assert set(np.unique(codes)) <= {round(step * 127 / 7) for step in range(-7, 8)}


def test_zeros_stay_and_rows_of_zeros_and_dead_inputs_do_no_harm(layer: tuple[np.ndarray, np.ndarray]) -> None:
    weights, hessian = layer[0].copy(), layer[1].copy()
    weights[:, ::3] = 0
    weights[5] = 0
    hessian[7], hessian[:, 7] = 0, 0
    rounded = round_matrix(weights, hessian, 15, 0.01)
    assert np.isfinite(rounded).all()
    assert not rounded[:, ::3].any()
    assert not rounded[5].any()
    assert relative_error(weights, rounded, hessian) < 0.05


def test_a_network_keeps_its_answers_and_its_contract(tmp_path: Path) -> None:
    points, _ = blobs(64)
    source = classifier(tmp_path / "model.onnx")
    work = passes.Work(tmp_path, [{"x": point[None]} for point in points])
    made = round_weights.apply(source, Parameters(levels=15, minimum_elements=64), work)
    assert all(row["output_error"] < 0.1 for row in made.notes["layers"])
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for path in (source, made.path)
    )
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_a_table_is_rounded_by_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(80, 64)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        "table",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(table, "table")],
    )
    path = tmp_path / "table.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    work = passes.Work(tmp_path, [{"ids": np.arange(4)}])
    made = round_weights.apply(path, Parameters(levels=15), work)
    rounded = numpy_helper.to_array(onnx.load(made.path).graph.initializer[0])
    assert max(len(np.unique(row)) for row in rounded) <= 31
    assert float(np.abs(rounded - table).max()) <= float(np.abs(table).max()) / 15
    with pytest.raises(RefusedError) as caught:
        round_weights.apply(path, Parameters(levels=15, exclude=["table"]), work)
    assert caught.value.code == "pass_noop"
