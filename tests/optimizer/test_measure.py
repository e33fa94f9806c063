"""Measuring: ratios within one run, memory in a process of its own, a gate that no NaN passes."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from tests.optimizer.models import classifier
from wherry_optimizer import evaluate, gate, measure
from wherry_shared import golden
from wherry_shared.bundle import Accuracy
from wherry_shared.errors import RefusedError
from wherry_shared.golden import Expected, Golden, Tolerance, Vector


def test_latency_is_told_as_a_ratio_within_the_same_rounds() -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    calls = {"a": lambda: spend(0.010), "b": lambda: spend(0.004)}
    found = measure.interleaved(calls, {"a": "a", "b": "a"}, rounds=5, seconds=9.0, clock=lambda: now[0])
    assert found["a"].ratio == pytest.approx(1.0)
    assert found["b"].ratio == pytest.approx(0.4)
    assert found["b"].p50_us == pytest.approx(4000)


def test_measuring_stops_after_its_seconds_but_not_before_three_rounds() -> None:
    now, count = [0.0], [0]

    def call() -> None:
        now[0] += 10.0
        count[0] += 1

    measure.interleaved({"a": call}, {"a": "a"}, rounds=100, seconds=1.0, clock=lambda: now[0])
    assert count[0] == 1 + 3 * measure.CALLS_PER_ROUND


def vectors(path: Path) -> Path:
    value = np.zeros((1, 48), np.float32)
    encoded = golden.encode(
        Golden((Vector({"x": value}, {"p": Expected(value, value.shape)}),), {"p": Tolerance(1.0, 0.0)})
    )
    path.write_bytes(encoded)
    return path


def test_peak_memory_is_that_of_a_process_that_runs_the_model(tmp_path: Path) -> None:
    task = measure.PeakTask(
        path=str(classifier(tmp_path / "m.onnx")),
        format="onnx",
        engine="onnxruntime",
        options={},
        golden=str(vectors(tmp_path / "golden")),
        tensors={},
    )
    answer = measure.peak(task)
    assert 20_000_000 < answer.peak_bytes < 1_000_000_000
    assert answer.load_ms > 0


def test_a_measuring_process_that_fails_is_told_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    task = measure.PeakTask(
        path=str(tmp_path / "m.onnx"),
        format="onnx",
        engine="onnxruntime",
        options={},
        golden=str(vectors(tmp_path / "golden")),
        tensors={},
    )
    with pytest.raises(RefusedError, match="load_failed") as caught:
        measure.peak(task)
    assert caught.value.code == "measure_failed"


def test_download_bytes_are_never_more_than_the_file(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(5000))
    assert measure.download_bytes(noise) == 5000
    assert measure.download_bytes(zeros) < 100


def accuracy(drop: float) -> Accuracy:
    return Accuracy(
        metric="accuracy", value=0.9, standard_error=0.01, drop=drop, samples=400, drop_standard_error=0.002
    )


@pytest.mark.parametrize(("drop", "passed"), [(-0.01, True), (0.015, True), (0.0151, False), (math.nan, False)])
def test_the_gate_passes_up_to_the_budget_and_no_nan(drop: float, passed: bool) -> None:
    verdict = gate.judge(accuracy(drop), 0.015)
    assert verdict.passed is passed
    assert "0.0020" in verdict.why


def test_a_paired_drop_has_a_smaller_error_than_two_separate_ones() -> None:
    rng = np.random.default_rng(0)
    source = (rng.random(500) < 0.8).astype(float)
    own = source.copy()
    own[:5] = 0
    drop = evaluate.estimate(source - own)
    assert drop.value == pytest.approx((source - own).mean())
    assert drop.standard_error < evaluate.estimate(source).standard_error / 3


def test_one_sample_has_no_standard_error() -> None:
    with pytest.raises(RefusedError) as caught:
        evaluate.estimate(np.array([1.0]))
    assert caught.value.code == "data_short"


def test_this_machine_has_a_hardware_class() -> None:
    facts = measure.machine()
    assert facts.arch
    assert time.monotonic() > 0
