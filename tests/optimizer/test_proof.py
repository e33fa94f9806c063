"""Golden vectors are measured: no false alarm of an honest engine, and broken weights are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.optimizer.models import blobs, classifier
from wherry_optimizer import breaking, cli, proof
from wherry_optimizer.pack import Packed, pack_model
from wherry_optimizer.sources import locate
from wherry_shared import golden
from wherry_shared.engines import load


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    np.savez(folder / "x.npz", x=blobs(32)[0])
    path = classifier(folder / "m.onnx")
    return pack_model(path, name="m", version="1.0.0", licence="MIT", output=folder, inputs=folder / "x.npz")


def test_no_way_to_run_a_variant_is_a_false_alarm_and_broken_weights_are_caught(packed: Packed) -> None:
    (found,) = proof.prove(packed.path, tries=15)
    assert found.ways >= 5
    assert found.false_alarms == []
    expected = {kind: proof.Count(3) for kind in breaking.KINDS}
    assert found.broken == expected | {"swapped": proof.Count()}, "no two layers are of one shape"
    assert found.misses == 0


def test_the_command_line_tells_them(packed: Packed) -> None:
    done = CliRunner().invoke(cli.app, ["prove", str(packed.path), "--tries", "3", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)
    assert (row["variant"], row["false_alarms"]) == ("float", [])
    assert CliRunner().invoke(cli.app, ["prove", str(packed.path), "--tries", "0"]).exit_code == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("kind", ["bit", "zeroed", "exchanged"])
def test_breaking_changes_one_place_and_nothing_else(kind: str, dtype: type) -> None:
    values = np.arange(1, 81).reshape(8, 10).astype(dtype)
    made = breaking.break_weights(values, kind, np.random.default_rng(0))
    assert made.shape == values.shape
    assert made.dtype == values.dtype
    changed = (made != values) & ~(np.isnan(made) if np.dtype(dtype).kind == "f" else False)
    assert changed.sum() == {"bit": 1, "zeroed": 10, "exchanged": 20}[kind]


def test_a_broken_file_of_either_format_still_loads_and_differs(tmp_path: Path) -> None:
    where = "basic_pitch/saved_models/icassp_2022/nmp.tflite"
    tflite = locate(where, distribution="basic-pitch", version="", folder=Path(), what="the model")
    kinds: set[tuple[str, str]] = set()
    for path in (classifier(tmp_path / "m.onnx"), tflite):
        data = path.read_bytes()
        format_ = "onnx" if path.suffix == ".onnx" else "tflite"
        for kind, made in breaking.broken(data, format_, 5, 0):
            assert made != data
            kinds.add((kind, format_))
            file = tmp_path / f"{kind}.{format_}"
            file.write_bytes(made)
            load(file, format_).close()
    assert kinds >= {(kind, one) for kind in breaking.KINDS[:4] for one in ("onnx", "tflite")}


def quantized(folder: Path) -> Path:
    """Write two integer layers of one shape, each with its scale."""
    nodes, initializers = [], []
    for name, factor in (("a", 0.02), ("b", 0.05)):
        values = np.random.default_rng(ord(name)).integers(-99, 99, (8, 8)).astype(np.int8)
        initializers += [
            numpy_helper.from_array(values, f"{name}_w"),
            numpy_helper.from_array(np.float32(factor), f"{name}_s"),
        ]
        nodes += [helper.make_node("DequantizeLinear", [f"{name}_w", f"{name}_s"], [f"{name}_f"])]
    nodes += [helper.make_node("MatMul", ["x", "a_f"], ["h"]), helper.make_node("MatMul", ["h", "b_f"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:], initializers)
    path = folder / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    return path


def test_a_wrong_scale_and_swapped_layers_are_made_as_they_say(tmp_path: Path) -> None:
    whole = onnx.load(quantized(tmp_path))
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    for kind, data in breaking.broken(whole.SerializeToString(), "onnx", 10, 0):
        after = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(data).graph.initializer}
        changed = {name for name, value in after.items() if (value != before[name]).any()}
        if kind == "scaled":
            (name,) = changed
            assert name.endswith("_s")
            assert after[name] == pytest.approx(before[name] * breaking.SCALED)
        elif kind == "swapped":
            assert changed == {"a_w", "b_w"}
            assert (after["a_w"] == before["b_w"]).all()
        else:
            assert len(changed) == 1, "what was broken before is mended"


def test_a_way_that_moves_alone_is_an_alarm_if_it_is_held_out() -> None:
    expected = golden.Expected(np.array([0.0, 1.0], np.float32), (2,))
    vectors = golden.Golden((golden.Vector({}, {"y": expected}),), {"y": golden.Tolerance(1e-3, 0.0)})
    ways = {"one": {"y": 1e-5}, "two": {"y": 5e-5}, "three": {"y": 6e-4}}
    assert proof.held_out(ways, vectors) == ["three"]
    assert proof.held_out({**ways, "four": {"y": 7e-5}}, vectors) == []


def test_a_model_without_weights_has_nothing_to_break(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.zeros((2, 2), np.float32), tensor.name))
    assert list(breaking.broken(model.SerializeToString(), "onnx", 3, 0)) == []
