"""Measuring: ratios within one run, memory in a process of its own, a gate that no NaN passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.optimizer.models import classifier
from wherry_optimizer import measure
from wherry_shared import golden
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


def test_quick_calls_are_timed_many_in_a_row_so_that_what_others_leave_in_caches_counts_little() -> None:
    now, last = [0.0], [""]

    def caller(key: str) -> Callable[[], None]:
        def call() -> None:
            now[0] += 1e-6 if last[0] == key else 9e-6
            last[0] = key

        return call

    calls = {key: caller(key) for key in ("a", "b")}
    found = measure.interleaved(calls, {"a": "a", "b": "a"}, rounds=5, seconds=9.0, clock=lambda: now[0])
    assert found["b"].p50_us == pytest.approx(1.0)


def test_of_several_turns_the_one_counts_in_which_the_reference_was_quickest() -> None:
    turns = iter([(15.0, 10.0), (12.0, 5.0), (14.0, 4.0)])

    def measured() -> dict[str, measure.Latency]:
        one, other = next(turns)
        return {"a": measure.Latency(one, 1.0), "b": measure.Latency(other, other / one)}

    found = measure.least_disturbed(measured, "a", times=3, pause_s=0.0)
    assert found["b"].p50_us == 5.0


def test_measuring_stops_after_its_seconds_but_not_before_three_rounds() -> None:
    now, count = [0.0], [0]

    def call() -> None:
        now[0] += 10.0
        count[0] += 1

    measure.interleaved({"a": call}, {"a": "a"}, rounds=100, seconds=1.0, clock=lambda: now[0])
    assert count[0] == 2 + 3 * measure.CALLS_PER_ROUND


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


def test_this_machine_has_a_hardware_class() -> None:
    facts = measure.machine()
    assert facts.arch
    assert time.monotonic() > 0
