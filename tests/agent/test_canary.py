"""The canary as the supervisor runs it: a child with one task, whose death is a verdict too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import instead, loadable
from tests.shared.engines import models
from wherry_agent.canary_exit import ENGINE_BYTES, child_environment, classify_exit
from wherry_agent.children import Judge, Judged, Loadable, encode_line
from wherry_shared import reasons
from wherry_shared.digest import hex_of, of_bytes
from wherry_shared.engines import tiny

MB = 1024 * 1024


def run(task: Judge) -> tuple[int, Judged | None]:
    child = subprocess.run(
        [sys.executable, "-m", "wherry_agent.canary"],
        input=encode_line(task),
        capture_output=True,
        env=child_environment(),
        timeout=60,
    )
    lines = child.stdout.splitlines()
    return child.returncode, msgspec.json.decode(lines[-1], type=Judged) if lines else None


def judged(task: Judge) -> Judged:
    code, verdict = run(task)
    assert code == 0
    assert verdict is not None
    return verdict


def tiny_tflite(path: Path, like: Loadable, data: bytes) -> Loadable:
    path.write_bytes(data)
    from wherry_shared.bundle import Interface, TensorSpec

    spec = {"datatype": "FP32", "shape": [2]}
    interface = Interface(inputs=[TensorSpec(name="x", **spec)], outputs=[TensorSpec(name="y", **spec)])
    return msgspec.structs.replace(instead(like, path), format="tflite", engine="ai-edge-litert", interface=interface)


def test_a_good_candidate_passes_with_figures(tmp_path: Path):
    rows = np.random.default_rng(0).uniform(0, 1, (3, 2, 4)).astype(np.float32)
    candidate = loadable(models.scale(tmp_path / "a.onnx", 2.0), rows=rows)
    verdict = judged(Judge(candidate=candidate, memory_bytes_max=64 * MB))
    assert verdict.passed, verdict
    assert verdict.vectors == 3
    assert 0 < verdict.peak_memory_bytes < 64 * MB
    assert 0 < verdict.latency_p50_us <= verdict.latency_p99_us
    assert verdict.load_ms > 0
    assert verdict.latency_ratio == 0.0, "there is no incumbent to compare with"


@pytest.mark.parametrize("engine", ["ai-edge-litert", "tflite-runtime"])
def test_a_tflite_candidate_is_judged_on_either_runtime(tmp_path: Path, engine: str):
    path = tmp_path / "nmp.tflite"
    path.write_bytes(models.PITCH_TFLITE.read_bytes())
    audio = np.zeros((1, 1, 43844, 1), np.float32)
    audio[0, 0, :, 0] = np.sin(np.arange(43844) * 2 * np.pi * 440 / 22050)  # A4
    candidate = loadable(
        path,
        model="pitch",
        interface=models.PITCH,
        engine=engine,
        format_="tflite",
        tensors=models.PITCH_TENSORS,
        rows=audio,
    )
    verdict = judged(Judge(candidate=candidate, memory_bytes_max=256 * MB))
    assert verdict.passed, verdict
    assert verdict.vectors == 1
    assert verdict.peak_memory_bytes > MB


def test_latency_is_a_ratio_to_the_incumbent_in_the_same_process(tmp_path: Path):
    incumbent = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    same = loadable(models.scale(tmp_path / "b.onnx", 2.0), "1.1.0")
    verdict = judged(Judge(candidate=same, incumbent=incumbent, latency_ratio_max=3.0))
    assert verdict.passed, verdict
    assert 0.3 < verdict.latency_ratio < 3.0
    assert verdict.latency_ratio == pytest.approx(verdict.latency_p50_us / verdict.incumbent_p50_us)
    assert 0 < verdict.incumbent_p50_us <= verdict.incumbent_p99_us
    slow_rows = np.ones((1, 1, 4), np.float32)
    slow = loadable(models.slow(tmp_path / "c.onnx", turns=20), "1.2.0", rows=slow_rows)
    verdict = judged(Judge(candidate=slow, incumbent=incumbent, latency_ratio_max=3.0))
    assert (verdict.passed, verdict.reason) == (False, reasons.HEALTH_LATENCY)
    assert verdict.latency_ratio > 3.0


def test_a_golden_miss_is_a_verdict(tmp_path: Path):
    spoilt = loadable(models.scale(tmp_path / "a.onnx", 2.0), spoil=True)
    verdict = judged(Judge(candidate=spoilt))
    assert (verdict.passed, verdict.reason) == (False, reasons.GOLDEN_MISS)
    assert "output y" in verdict.detail


def test_another_file_behind_the_golden_vectors_is_a_miss(tmp_path: Path):
    rows = np.random.default_rng(0).uniform(0, 1, (2, 1, 4)).astype(np.float32)
    right = loadable(models.scale(tmp_path / "a.onnx", 2.0), rows=rows)
    wrong = instead(right, models.scale(tmp_path / "b.onnx", 2.001))
    assert judged(Judge(candidate=wrong)).reason == reasons.GOLDEN_MISS


def test_a_model_that_fails_on_a_golden_vector_misses_it(tmp_path: Path):
    rows = np.zeros((1, 1, 4), np.float32)
    candidate = loadable(models.choosy(tmp_path / "a.onnx"), rows=rows)
    broken = instead(candidate, models.save_gather_out_of_range(tmp_path / "b.onnx"))
    verdict = judged(Judge(candidate=broken))
    assert verdict.reason == reasons.GOLDEN_MISS
    assert "run_failed" in verdict.detail


def test_a_candidate_over_its_memory_budget_is_refused(tmp_path: Path):
    heavy = loadable(models.heavy(tmp_path / "heavy.onnx", 96))
    verdict = judged(Judge(candidate=heavy, memory_bytes_max=32 * MB))
    assert (verdict.passed, verdict.reason) == (False, reasons.OVER_MEMORY), verdict
    assert verdict.peak_memory_bytes < 64 * MB, "it was stopped at the limit, not measured beyond it"
    verdict = judged(Judge(candidate=heavy, memory_bytes_max=512 * MB))
    assert verdict.passed, verdict
    assert verdict.peak_memory_bytes > 20 * MB


def test_a_candidate_that_never_ends_is_ended(tmp_path: Path):
    quick = loadable(models.slow(tmp_path / "a.onnx", turns=1), rows=np.ones((1, 1, 4), np.float32))
    endless = instead(quick, models.slow(tmp_path / "b.onnx", turns=100_000_000))
    verdict = judged(Judge(candidate=endless, seconds_max=2))
    assert (verdict.passed, verdict.reason) == (False, reasons.TIMEOUT)


def test_a_file_that_does_not_load_and_golden_vectors_that_do_not_decode(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    junk = tmp_path / hex_of(of_bytes(b"junk" * 100))
    junk.write_bytes(b"junk" * 100)
    assert judged(Judge(candidate=instead(good, junk))).reason == reasons.LOAD_FAILED
    assert judged(Judge(candidate=msgspec.structs.replace(good, golden_path=str(junk)))).reason == (
        reasons.BUNDLE_INVALID
    )
    (tmp_path / "large").write_bytes(b"x" * 300_000)
    verdict = judged(Judge(candidate=msgspec.structs.replace(good, golden_path=str(tmp_path / "large"))))
    assert verdict.reason == reasons.BUNDLE_INVALID
    verdict = judged(Judge(candidate=msgspec.structs.replace(good, golden_path=str(tmp_path / "gone"))))
    assert verdict.reason not in reasons.VERDICTS, "a lost file says nothing about the model"


def test_a_file_that_was_altered_after_it_was_verified_is_no_verdict(tmp_path: Path):
    weights = models.scale(tmp_path / "a.onnx", 2.0)
    good = loadable(weights)
    untouched = weights.read_bytes()
    weights.write_bytes(untouched[:-1] + bytes([untouched[-1] ^ 1]))
    verdict = judged(Judge(candidate=good))
    assert (verdict.passed, verdict.reason) == (False, reasons.DIGEST_MISMATCH), verdict
    weights.write_bytes(untouched)
    golden_path = Path(good.golden_path)
    golden_path.write_bytes(golden_path.read_bytes() + b"x")
    verdict = judged(Judge(candidate=good))
    assert (verdict.passed, verdict.reason) == (False, reasons.DIGEST_MISMATCH), verdict


def test_an_engine_that_is_not_here_is_no_verdict(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    verdict = judged(Judge(candidate=msgspec.structs.replace(good, format="tflite", engine="onnxruntime")))
    assert verdict.reason not in {reasons.CRASH, reasons.GOLDEN_MISS}
    assert not verdict.passed


def test_native_code_that_segfaults_takes_only_the_canary_with_it(tmp_path: Path):
    """One byte of a TFLite file altered (where its subgraphs are) makes the real runtime read through a null pointer."""
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    data = bytearray(tiny.MODELS["tflite"])
    data[18] = 0
    code, verdict = run(Judge(candidate=tiny_tflite(tmp_path / "crash.tflite", good, bytes(data))))
    assert verdict is None
    assert code == -11
    assert classify_exit(code, 0, 0)[0] == reasons.CRASH


@pytest.mark.parametrize(
    ("code", "peak", "limit", "timed_out", "reason"),
    [
        (-11, 0, 0, False, reasons.CRASH),
        (-11, ENGINE_BYTES + 50 * MB, 100 * MB, False, reasons.CRASH),
        (-9, ENGINE_BYTES + 95 * MB, 100 * MB, False, reasons.OVER_MEMORY),
        (-6, ENGINE_BYTES + 95 * MB, 100 * MB, False, reasons.OVER_MEMORY),
        (-15, ENGINE_BYTES + 95 * MB, 100 * MB, False, reasons.CRASH),
        (-9, ENGINE_BYTES + 10 * MB, 100 * MB, False, reasons.CRASH),
        (-9, 0, 0, True, reasons.TIMEOUT),
        (1, 0, 0, False, reasons.CRASH),
        (-99, 0, 0, False, reasons.CRASH),
    ],
)
def test_how_a_canary_died_is_the_verdict(code: int, peak: int, limit: int, timed_out: bool, reason: str):
    assert classify_exit(code, peak, limit, timed_out=timed_out)[0] == reason


def test_no_task_is_no_verdict():
    child = subprocess.run(
        [sys.executable, "-m", "wherry_agent.canary"], input=b"nonsense", capture_output=True, timeout=60
    )
    assert child.returncode == 2
    assert child.stdout == b""
