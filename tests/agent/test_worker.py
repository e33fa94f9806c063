"""A real worker process: swaps, trials, fallbacks, golden re-runs, crashes."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import WorkerProcess, infer_body, instead, loadable, until, worker
from tests.shared.engines import models
from wherry_agent.children import GoldenDone, Ready, RunGolden, Serve, ServeModel, Serving, Stats
from wherry_shared import reasons

ONES = [[1.0, 1.0, 1.0, 1.0]]
ZEROS = [[0.0, 0.0, 0.0, 0.0]]


def value(answer) -> float:
    return answer["outputs"][0]["data"][0]


def test_a_worker_says_ready_serves_and_stops(tmp_path: Path):
    with worker(tmp_path) as process:
        assert process.event(Ready).pid == process.process.pid
        process.serve()
        assert process.call("GET", "/v2/health/live") == (200, {"live": True})
        assert process.call("GET", "/v2/health/ready")[0] == 503
        first = loadable(models.scale(tmp_path / "a.onnx", 2.0))
        (serving,) = process.serve(ServeModel(name="scale", active=first))
        assert serving.ok
        assert serving.load_ms > 0
        status, answer = process.infer(ONES)
        assert (status, value(answer), answer["model_version"]) == (200, 2.0, "1.0.0")
        assert answer["parameters"] == {"wherry_variant": "float"}
        assert process.call("GET", "/v2/health/ready") == (200, {"ready": True})
    assert process.process.returncode == 0


def test_repeating_a_serve_is_answered_and_changes_nothing(tmp_path: Path):
    with worker(tmp_path) as process:
        wanted = ServeModel(name="scale", active=loadable(models.scale(tmp_path / "a.onnx", 2.0)))
        process.serve(wanted)
        (again,) = process.serve(wanted)
        assert again.ok
        assert again.load_ms == 0.0
        process.serve()  # an empty set has nothing to be answered about
        until(lambda: process.infer(ONES)[0] == 404, "the model is withdrawn")


def test_swaps_under_concurrent_load_fail_no_request(tmp_path: Path):
    versions = [loadable(models.scale(tmp_path / f"{n}.onnx", n), f"1.{n}.0") for n in range(1, 7)]
    failures: list[object] = []
    seen: set[str] = set()
    stop = threading.Event()

    def keep_asking(process: WorkerProcess, keep_alive: bool) -> None:
        body = json.dumps(infer_body(ONES))
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
        while not stop.is_set():
            try:
                connection.request("POST", "/v2/models/scale/infer", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                version = answer["model_version"]
                seen.add(version)
                if response.status != 200 or value(answer) != float(version.split(".")[1]):
                    failures.append(answer)
                if not keep_alive:
                    connection.close()
            except Exception as error:
                failures.append(repr(error))
                return
        connection.close()

    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=versions[0]))
        threads = [threading.Thread(target=keep_asking, args=(process, keep)) for keep in (True, True, False)]
        for thread in threads:
            thread.start()
        until(lambda: "1.1.0" in seen, "the first version answers")
        for old, new in itertools.pairwise(versions):
            process.serve(ServeModel(name="scale", active=new, incumbent=old, trial="t"))
            process.serve(ServeModel(name="scale", active=new))
            until(lambda new=new: new.target.split("/")[1] in seen, "the new version answers")
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert seen == {f"1.{n}.0" for n in range(1, 7)}


@pytest.mark.parametrize("kind", ["raises", "nan", "slow"])
def test_what_a_candidate_fails_is_answered_by_the_incumbent(tmp_path: Path, kind: str):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    bad_input = ONES
    if kind == "raises":
        path, bad_input = models.choosy(tmp_path / "bad.onnx", 3.0), [[7.0, 1.0, 1.0, 1.0]]
    elif kind == "nan":
        path, bad_input = models.root(tmp_path / "bad.onnx"), [[-1.0, -1.0, -1.0, -1.0]]
    else:
        path = models.slow(tmp_path / "bad.onnx", 3.0)
    candidate = loadable(path, "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=good))
        (serving,) = process.serve(
            ServeModel(name="scale", active=candidate, incumbent=good, trial="t1", deadline_ms=60)
        )
        assert serving.incumbent_loaded
        status, answer = process.infer(ZEROS)
        assert (status, answer["model_version"]) == (200, "1.1.0")
        assert "wherry_fallback" not in answer["parameters"]

        status, answer = process.infer(bad_input)
        assert status == 200
        assert answer["parameters"]["wherry_fallback"] is True
        assert answer["model_version"] == "1.0.0"
        assert value(answer) == 2 * bad_input[0][0]
        arm = process.arm("candidate", lambda one: one.errors == 1)
        assert (arm.requests, arm.fallbacks, arm.trial) == (2, 1, "t1")
        words = {"raises": "run_failed", "nan": "not_finite", "slow": "deadline"}
        assert words[kind] in arm.last_error

        process.serve(ServeModel(name="scale", active=good))
        status, answer = process.infer(bad_input)
        assert (status, answer["model_version"]) == (200, "1.0.0")


def test_a_slow_candidate_keeps_neither_gate_nor_callers(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    slow = loadable(models.slow(tmp_path / "slow.onnx", 3.0, turns=20_000), "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=slow, incumbent=good, trial="t", deadline_ms=30))
        answers: list[object] = []

        def ask() -> None:
            answers.append(process.infer(ONES))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [200] * 12
        assert all(answer["parameters"]["wherry_fallback"] for _, answer in answers)
        arm = process.arm("candidate", lambda one: one.errors == 12)
        assert arm.fallbacks == 12


def test_bad_input_is_never_evidence(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=candidate, incumbent=good, trial="t"))
        for _ in range(3):
            assert process.infer([[1.0, 2.0]])[0] == 400
        process.infer(ONES)
        arm = process.arm("candidate", lambda one: one.requests > 0)
        assert (arm.requests, arm.errors) == (1, 0)


def test_without_an_incumbent_the_caller_gets_the_error(tmp_path: Path):
    candidate = loadable(models.root(tmp_path / "bad.onnx"))
    with worker(tmp_path) as process:
        (serving,) = process.serve(ServeModel(name="scale", active=candidate, trial="t"))
        assert not serving.incumbent_loaded
        status, answer = process.infer([[-1.0, 0.0, 0.0, 0.0]])
        assert status == 500
        assert "not_finite" in answer["error"]
        arm = process.arm("candidate", lambda one: one.errors == 1)
        assert arm.fallbacks == 0


def test_a_confirmed_candidate_is_counted_anew_as_incumbent(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=good))
        for _ in range(3):
            process.infer(ONES)
        process.serve(ServeModel(name="scale", active=candidate, incumbent=good, trial="t"))
        for _ in range(2):
            process.infer(ONES)
        process.serve(ServeModel(name="scale", active=candidate))
        process.infer(ONES)
        final: dict[tuple[str, str], int] = {}

        def complete() -> bool:
            process.pump()
            for event in process.events:
                if isinstance(event, Stats):
                    final.update({(one.digest, one.arm): one.requests for one in event.arms})
            return len(final) == 3

        until(complete, "statistics of three arms")
        assert final == {
            (good.digest, "incumbent"): 3,
            (candidate.digest, "candidate"): 2,
            (candidate.digest, "incumbent"): 1,
        }


def test_latency_leaves_the_first_ten_runs_out_and_is_kept_by_shape(tmp_path: Path):
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=loadable(models.scale(tmp_path / "a.onnx", 2.0))))
        for _ in range(12):
            process.infer(ONES)
        for _ in range(3):
            process.infer(ONES * 4)
        arm = process.arm("incumbent", lambda one: one.requests == 15)
        assert {bucket: sum(wire.values()) for bucket, wire in arm.latency_us.items()} == {"2": 2, "4": 3}
        assert sum(arm.wait_us.values()) == 15


def test_a_version_that_does_not_load_leaves_what_serves(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    broken_path = tmp_path / "broken.onnx"
    broken_path.write_bytes(b"\x08\x08garbage")
    broken = msgspec.structs.replace(instead(good, broken_path), manifest="sha256:" + "0" * 64, target="scale/9.0.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=good))
        (serving,) = process.serve(ServeModel(name="scale", active=broken, incumbent=good, trial="t"))
        assert (serving.ok, serving.reason) == (False, reasons.LOAD_FAILED)
        assert process.infer(ONES)[1]["model_version"] == "1.0.0"


def test_only_the_newest_of_several_serves_counts(tmp_path: Path):
    versions = [loadable(models.scale(tmp_path / f"{n}.onnx", n), f"1.{n}.0") for n in range(1, 6)]
    with worker(tmp_path) as process:
        for revision, version in enumerate(versions, 1):
            process.send(Serve(revision=revision, models=[ServeModel(name="scale", active=version)]))
        process.event(Serving, lambda event: event.revision == 5 and event.ok)
        assert process.infer(ONES)[1]["model_version"] == "1.5.0"


def test_golden_vectors_are_run_in_place(tmp_path: Path):
    rows = np.random.default_rng(0).uniform(0, 1, (3, 2, 4)).astype(np.float32)
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0), rows=rows)
    spoilt = loadable(models.scale(tmp_path / "bad.onnx", 3.0), "1.1.0", rows=rows, spoil=True)
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=good))
        process.send(RunGolden(model="scale", digest=good.digest, trial="t"))
        done = process.event(GoldenDone)
        assert (done.passed, done.digest, done.trial) == (True, good.digest, "t")
        process.serve(ServeModel(name="scale", active=spoilt, incumbent=good, trial="t"))
        process.send(RunGolden(model="scale", digest=spoilt.digest, trial="t"))
        done = process.event(GoldenDone)
        assert not done.passed
        assert "off by" in done.detail
        process.send(RunGolden(model="scale", digest="sha256:" + "0" * 64, trial="t"))
        assert not process.event(GoldenDone).passed


def test_a_file_that_was_altered_is_not_loaded_by_the_next_worker(tmp_path: Path):
    weights = models.scale(tmp_path / "a.onnx", 2.0)
    good = loadable(weights)
    with worker(tmp_path) as process:
        assert process.serve(ServeModel(name="scale", active=good))[0].ok
    models.scale(weights, 3.0)
    with worker(tmp_path) as process:
        (serving,) = process.serve(ServeModel(name="scale", active=good))
        assert (serving.ok, serving.reason) == (False, reasons.DIGEST_MISMATCH)
        assert process.infer(ONES)[0] == 404
        models.scale(weights, 2.0)
        assert process.serve(ServeModel(name="scale", active=good))[0].ok, "the same bytes again are the same variant"


def test_altered_golden_vectors_take_no_version_out_of_service_and_are_no_verdict(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    Path(good.golden_path).write_bytes(b"altered")
    with worker(tmp_path) as process:
        assert process.serve(ServeModel(name="scale", active=good))[0].ok
        process.send(RunGolden(model="scale", digest=good.digest, trial="t"))
        done = process.event(GoldenDone)
        assert (done.passed, done.reason) == (False, reasons.DIGEST_MISMATCH)


@pytest.mark.parametrize("engine", ["ai-edge-litert", "tflite-runtime"])
def test_a_worker_serves_tflite_on_both_runtimes(tmp_path: Path, engine: str):
    path = tmp_path / "nmp.tflite"
    path.write_bytes(models.PITCH_TFLITE.read_bytes())
    pitch = loadable(
        path, model="pitch", interface=models.PITCH, engine=engine, format_="tflite", tensors=models.PITCH_TENSORS
    )
    with worker(tmp_path) as process:
        (serving,) = process.serve(ServeModel(name="pitch", active=pitch))
        assert serving.ok, serving.detail
        status, about = process.call("GET", "/v2/models/pitch")
        assert about["platform"] == "tensorflow_tflite"
        assert about["inputs"] == [{"name": "audio", "datatype": "FP32", "shape": [-1, 43844, 1]}]
        audio = {"name": "audio", "datatype": "FP32", "shape": [1, 43844, 1], "data": [0.0] * 43844}
        status, answer = process.call(
            "POST", "/v2/models/pitch/infer", {"inputs": [audio], "outputs": [{"name": "note"}]}
        )
        assert status == 200
        assert [output["shape"] for output in answer["outputs"]] == [[1, 172, 88]]


def test_a_killed_worker_refuses_nobody(tmp_path: Path):
    """The supervisor holds the listening socket: who connects between two workers waits for the next."""
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    first = WorkerProcess(tmp_path)
    try:
        first.serve(ServeModel(name="scale", active=good))
        os.kill(first.process.pid, signal.SIGSEGV)
        assert first.process.wait(20) == -signal.SIGSEGV
        answers: list[object] = []
        caller = threading.Thread(target=lambda: answers.append(first.infer(ONES)))
        caller.start()
        second = WorkerProcess(tmp_path, tcp=first.tcp)
        try:
            second.serve(ServeModel(name="scale", active=good))
            caller.join(20)
        finally:
            second.close()
    finally:
        first.close()
    assert [status for status, _ in answers] == [200]


def test_a_worker_ends_when_its_supervisor_is_gone(tmp_path: Path):
    process = WorkerProcess(tmp_path)
    process.event(Ready)
    process.control.close()
    assert process.process.wait(20) == 0
    process.tcp.close()
    process.unix.close()


def test_memory_for_one_version_only_swaps_cold_without_a_failed_request(tmp_path: Path):
    """A candidate that was measured to need more than there is pushes the old version out first; callers wait."""
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0", peak_memory_bytes=1 << 50)
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=old))
        statuses: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                statuses.append(process.infer(ONES)[0])

        thread = threading.Thread(target=ask)
        thread.start()
        (serving,) = process.serve(ServeModel(name="scale", active=new, incumbent=old, trial="t"))
        stop.set()
        thread.join()
        assert serving.ok
        assert not serving.incumbent_loaded
        assert "one version only" in serving.detail
        assert process.infer(ONES)[1]["model_version"] == "1.1.0"
        assert set(statuses) == {200}


def test_old_sessions_are_freed_after_swaps(tmp_path: Path):
    """Six swaps of a 24 MB model must not leave six models in memory."""
    versions = [loadable(models.heavy(tmp_path / f"{n}.onnx", 24), f"1.{n}.0") for n in range(6)]
    with worker(tmp_path) as process:

        def resident() -> int:
            for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) // 1024
            raise AssertionError

        process.serve(ServeModel(name="scale", active=versions[0]))
        base = resident()
        for old, new in itertools.pairwise(versions):
            process.serve(ServeModel(name="scale", active=new, incumbent=old, trial="t"))
            process.serve(ServeModel(name="scale", active=new))
            process.infer(ONES)
        until(lambda: resident() <= base + 40, f"memory back near {base} MB, is {resident()} MB")
