"""What is no model, or not a whole one, is refused with the reason; what is one is brought into shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.optimizer.models import FEATURES, blobs, classifier
from wherry_optimizer import model
from wherry_optimizer.sources import locate
from wherry_shared.engines import load as open_session
from wherry_shared.errors import RefusedError


def refusal(path: Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        model.load(path)
    return caught.value


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model at all", b"\x08\x01", b"PK\x03\x04" + b"\0" * 60, b"\0" * 100],
    ids=["empty", "text", "bare protobuf", "zip", "zeros"],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    error = refusal(path)
    assert error.code == "model_foreign"
    assert ("is empty" in error.message) == (content == b"")
    assert "cut short" in error.next_step


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "m.onnx").code == "model_missing"
    assert refusal(tmp_path).code == "model_missing"


@pytest.mark.parametrize("opset", [1, 6, 99])
def test_an_unsupported_opset_is_refused_with_the_supported_ones(tmp_path: Path, opset: int) -> None:
    path = classifier(tmp_path / "m.onnx")
    graph = onnx.load(path)
    graph.opset_import[0].version = opset
    path.write_bytes(graph.SerializeToString())
    error = refusal(path)
    assert error.code == "model_opset"
    assert f"opset {opset}" in error.message
    assert "7 to 23" in error.message


def test_a_graph_with_a_hole_is_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    graph = onnx.load(path)
    del graph.graph.node[1]
    path.write_bytes(graph.SerializeToString())
    assert refusal(path).code == "model_corrupted"


def test_a_cut_onnx_file_is_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).code in ("model_foreign", "model_corrupted")


def test_a_broken_tflite_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3" + b"\0" * 200)
    assert refusal(path).code == "model_corrupted"


def test_weights_in_constant_nodes_become_initializers_and_answers_stay(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx", constants=True, opset=11)
    prepared = model.prepare(model.read_onnx(path))
    assert {tensor.name for tensor in prepared.graph.initializer} == {"first", "second"}
    assert model.opset_of(prepared) >= 13
    after = tmp_path / "prepared.onnx"
    onnx.save(prepared, after)
    points, _ = blobs(5)
    old, new = (open_session(file, "onnx").run({"x": points})["p"] for file in (path, after))
    np.testing.assert_allclose(old, new, atol=1e-6)


def test_weights_beside_the_file_are_found(tmp_path: Path) -> None:
    graph = onnx.load(classifier(tmp_path / "whole.onnx"))
    onnx.save(graph, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    loaded = model.load(tmp_path / "m.onnx")
    assert [file.name for file in loaded.external] == ["weights.bin"]
    (tmp_path / "weights.bin").unlink()
    assert refusal(tmp_path / "m.onnx").code == "model_corrupted"


def test_a_distribution_that_is_not_installed_is_refused_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        locate("x.onnx", distribution="no-such-thing", version="1.2.3", folder=tmp_path, what="the model")
    assert caught.value.code == "source_missing"
    assert "no-such-thing==1.2.3" in caught.value.next_step


def test_a_distribution_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        locate("x", distribution="numpy", version="0.1", folder=tmp_path, what="the model")
    assert caught.value.code == "source_version"


def test_a_relative_source_stands_beside_the_recipe(tmp_path: Path) -> None:
    assert locate("m.onnx", distribution="", version="", folder=tmp_path, what="") == tmp_path / "m.onnx"
    assert FEATURES == 48
