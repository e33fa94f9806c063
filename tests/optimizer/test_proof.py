"""Golden vectors are measured: no false alarm of an honest engine, and broken weights are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from tests.optimizer.models import blobs, classifier
from wherry_optimizer import cli, proof
from wherry_optimizer.pack import Packed, pack_model
from wherry_optimizer.sources import locate
from wherry_shared.engines import load


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    np.savez(folder / "x.npz", x=blobs(32)[0])
    path = classifier(folder / "m.onnx")
    return pack_model(path, name="m", version="1.0.0", licence="MIT", output=folder, inputs=folder / "x.npz")


def test_no_way_to_run_a_variant_is_a_false_alarm_and_broken_weights_are_caught(packed: Packed) -> None:
    (found,) = proof.prove(packed.path, tries=9)
    assert found.ways >= 5
    assert found.false_alarms == []
    assert found.broken == dict.fromkeys(proof.KINDS, (3, 3))


def test_the_command_line_tells_them(packed: Packed) -> None:
    done = CliRunner().invoke(cli.app, ["prove", str(packed.path), "--tries", "3", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)
    assert (row["variant"], row["false_alarms"]) == ("float", [])
    assert CliRunner().invoke(cli.app, ["prove", str(packed.path), "--tries", "0"]).exit_code == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("kind", proof.KINDS)
def test_breaking_changes_one_place_and_nothing_else(kind: str, dtype: type) -> None:
    values = np.arange(1, 81).reshape(8, 10).astype(dtype)
    made = proof.break_weights(values, kind, np.random.default_rng(0))
    assert made.shape == values.shape
    assert made.dtype == values.dtype
    changed = (made != values) & ~(np.isnan(made) if np.dtype(dtype).kind == "f" else False)
    assert changed.sum() == {"bit": 1, "zeroed": 10, "exchanged": 20}[kind]


def test_a_broken_file_of_either_format_still_loads_and_differs(tmp_path: Path) -> None:
    where = "basic_pitch/saved_models/icassp_2022/nmp.tflite"
    tflite = locate(where, distribution="basic-pitch", version="", folder=Path(), what="the model")
    for path in (classifier(tmp_path / "m.onnx"), tflite):
        data = path.read_bytes()
        format_ = "onnx" if path.suffix == ".onnx" else "tflite"
        for kind, made in proof.broken(data, format_, 3, 0):
            assert made != data
            file = tmp_path / f"{kind}.{format_}"
            file.write_bytes(made)
            load(file, format_).close()


def test_a_model_without_weights_has_nothing_to_break(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.zeros((2, 2), np.float32), tensor.name))
    assert list(proof.broken(model.SerializeToString(), "onnx", 3, 0)) == []
