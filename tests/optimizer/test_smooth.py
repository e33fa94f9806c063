"""Channels made alike before int8: nothing moves in float, and int8 moves less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from wherry_optimizer import passes
from wherry_optimizer.activations import distance, run_all
from wherry_optimizer.passes import quantize_dynamic, smooth
from wherry_shared.errors import RefusedError

RNG = np.random.default_rng(0)


def network(path: Path) -> Path:
    """Two products that read one input, which a third operator reads as well."""
    weights = [numpy_helper.from_array(RNG.normal(size=(64, 80)).astype(np.float32), name) for name in ("a", "b")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("MatMul", ["x", "b"], ["q"]),
        helper.make_node("Sub", ["p", "q"], ["y"]),
        helper.make_node("Relu", ["x"], ["z"]),
    ]
    shapes = {"x": ["n", 64], "y": ["n", 80], "z": ["n", 64]}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "two", [infos["x"]], [infos["y"], infos["z"]], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    return path


def calls(outlier: float) -> list[dict[str, np.ndarray]]:
    values = RNG.normal(size=(16, 4, 64)).astype(np.float32)
    values[:, :, 7] *= outlier
    return [{"x": value} for value in values]


def test_int8_moves_outputs_less_where_a_channel_is_large(tmp_path: Path) -> None:
    source, given = network(tmp_path / "two.onnx"), calls(100.0)
    made = smooth.apply(source, smooth.Parameters(), passes.Work(tmp_path, given))
    assert [row["layers"] for row in made.notes["smoothed"]] == [2]
    models = {name: onnx.load(path) for name, path in (("source", source), ("smooth", made.path))}
    for name in ("source", "smooth"):
        folder = tmp_path / name
        folder.mkdir()
        path = source if name == "source" else made.path
        result = quantize_dynamic.apply(path, quantize_dynamic.Parameters(), passes.Work(folder, given))
        models[f"{name} int8"] = onnx.load(result.path)
    outputs = {name: run_all(model, ["y", "z"], given) for name, model in models.items()}
    assert distance(outputs["smooth"], outputs["source"]) < 1e-5
    errors = {name: distance(outputs[f"{name} int8"], outputs["source"]) for name in ("source", "smooth")}
    assert errors["smooth"] < 0.7 * errors["source"]


def test_where_no_channel_is_large_nothing_is_changed(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        smooth.apply(network(tmp_path / "two.onnx"), smooth.Parameters(), passes.Work(tmp_path, calls(1.0)))
    assert caught.value.code == "pass_noop"


def test_factors_are_one_in_the_mean_and_leave_dead_channels_alone() -> None:
    found = smooth.factors(np.array([1.0, 100.0, 0.0, 4.0]), np.array([1.0, 1.0, 1.0, 0.0]), 0.5)
    assert found[[2, 3]].tolist() == [1.0, 1.0]
    assert found[1] / found[0] == pytest.approx(10.0)
    assert found[0] * found[1] == pytest.approx(1.0)
