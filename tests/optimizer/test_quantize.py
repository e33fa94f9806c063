"""Quantizing: what becomes int8, what stays float, and what is told when nothing happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.optimizer.models import blobs, classifier
from wherry_optimizer.model import read_onnx
from wherry_optimizer.passes import CATALOGUE, Work, module, quantize, quantize_tflite, quantize_weights, simplify
from wherry_optimizer.sources import locate
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError


@pytest.fixture
def work(tmp_path: Path) -> Work:
    points, _ = blobs(64)
    return Work(tmp_path, [{"x": point[None]} for point in points])


def agreement(one: Path, two: Path) -> float:
    points, _ = blobs(400, seed=11)
    first, second = (load(path, "onnx").run({"x": points})["p"].argmax(1) for path in (one, two))
    return float((first == second).mean())


def test_static_int8_keeps_the_answers_and_quarters_the_weights(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize.apply(path, quantize.Parameters(), work)
    assert result.notes["quantized_nodes"] == 2
    assert agreement(path, result.path) > 0.97
    types = {t.name: t.data_type for t in onnx.load(result.path).graph.initializer}
    assert types["first_quantized"] == onnx.TensorProto.INT8


def test_excluded_nodes_stay_float(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize.apply(path, quantize.Parameters(exclude=["two$"]), work)
    assert result.notes == {"quantized_nodes": 1, "excluded_nodes": 1}


def test_weight_only_int8_keeps_the_answers_nearly_exactly(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize_weights.apply(path, quantize_weights.Parameters(minimum_elements=500), work)
    assert result.notes["quantized_weights"] == 2
    assert agreement(path, result.path) > 0.99
    with pytest.raises(RefusedError) as caught:
        quantize_weights.apply(path, quantize_weights.Parameters(minimum_elements=10**6), work)
    assert caught.value.code == "pass_noop"


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(-8, 8, width=32)))
def test_a_quantized_weight_is_off_by_half_a_step_at_most_and_zero_stays_zero(weights: np.ndarray) -> None:
    for axis in (0, 1):
        quantized, scale = quantize_weights.quantize_channels(weights, axis)
        step = scale.reshape((-1, 1) if axis == 0 else (1, -1))
        assert (np.abs(quantized * step - weights) <= step * 0.5001).all()
        assert (quantized[weights == 0] == 0).all()


def test_simplifying_keeps_the_answers(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx", constants=True)
    result = simplify.apply(path, simplify.Parameters(), work)
    assert result.notes["nodes_after"] <= result.notes["nodes_before"]
    assert agreement(path, result.path) == 1.0


def pitch_tflite() -> Path:
    return locate(
        "basic_pitch/saved_models/icassp_2022/nmp.tflite",
        distribution="basic-pitch",
        version="",
        folder=Path(),
        what="the model",
    )


def test_a_tflite_model_becomes_int8_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    first = quantize_tflite.apply(pitch_tflite(), quantize_tflite.Parameters(), Work(tmp_path, []))
    assert first.path.stat().st_size < 0.6 * pitch_tflite().stat().st_size
    load(first.path, "tflite").close()
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(RefusedError) as caught:
        quantize_tflite.apply(first.path, quantize_tflite.Parameters(), Work(again, []))
    assert caught.value.code in ("pass_noop", "pass_failed")


def test_every_pass_of_the_catalogue_has_its_module_and_parameters() -> None:
    for info in CATALOGUE:
        made = module(info)
        assert made.Parameters() is not None
        assert callable(made.apply)


def test_an_onnx_model_that_is_quantized_is_known_as_such(tmp_path: Path, work: Work) -> None:
    result = quantize.apply(classifier(tmp_path / "m.onnx"), quantize.Parameters(), work)
    with pytest.raises(RefusedError) as caught:
        quantize_weights.apply(result.path, quantize_weights.Parameters(), work)
    assert caught.value.code == "already_quantized"
    assert read_onnx(result.path).graph.node
