"""What a model of 64 MB costs: many swaps of it leave nothing behind, and a whole agent installs, tries and returns in 700 MB."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from onnx import helper, numpy_helper

from tests.agent.daemon_kit import agent, children_of, site
from tests.agent.serving_kit import loadable, until, worker
from tests.shared.engines.models import floats, save
from wherry_agent.answering import memory
from wherry_agent.children import Loadable, ServeModel
from wherry_agent.workers.worker import Worker
from wherry_shared import digest
from wherry_shared.bundle import Interface, TensorSpec

MIB = 1024 * 1024
MODEL_BYTES = 64 * MIB
SWAPS = 20
LEFT_BEHIND_MAX = MODEL_BYTES // 4
AGENT_BYTES_MAX = 700 * MIB
SHAPE = (6, MIB // 4)
SAMPLE_S = 0.1
WIDTH = 4096


def large(path: Path, seed: int, factor: float) -> Path:
    """y = factor · x, and 64 MiB of random weights, multiplied by nothing in the end."""
    random = np.random.default_rng(seed)
    shapes = {"first": (4, WIDTH), "second": (WIDTH, WIDTH), "third": (WIDTH, 4)}
    weights = [numpy_helper.from_array(random.random(shape, np.float32), name) for name, shape in shapes.items()]
    constants = [
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("f", factor), ("z", 0))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("MatMul", ["a", "second"], ["b"]),
        helper.make_node("MatMul", ["b", "third"], ["c"]),
        helper.make_node("Mul", ["c", "z"], ["nothing"]),
        helper.make_node("Mul", ["x", "f"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nothing"], ["y"]),
    ]
    save(path, nodes, [floats("x", ["n", 4])], [floats("y", ["n", 4])], [*weights, *constants])
    assert path.stat().st_size >= MODEL_BYTES
    return path


FRAGMENTED = """
from pathlib import Path
from wherry_agent.answering import memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [bytes(4000) for _ in range(12_000)]  # each from the heap, none large enough to be mapped by itself
pin = blocks[-1]
blocks.clear()  # the heap's end is in use, so the C library keeps all that is free below it
kept = resident()
memory.trim()
print(kept - resident(), pin is not None)
"""


def test_trimming_gives_back_what_the_heap_would_keep():
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout.split()[0]) > 24 * MIB


def test_a_worker_trims_once_for_what_was_freed(monkeypatch: pytest.MonkeyPatch):
    turns: list[str] = []
    loader = SimpleNamespace(freed=threading.Event())
    teller = SimpleNamespace(_stopping=False, _urgent=True, _tick=threading.Condition(), _loader=loader)

    def sent() -> bool:
        turns.append("sent")
        teller._urgent, teller._stopping = True, len(turns) > 5
        if turns.count("sent") == 2:
            loader.freed.set()
        return False

    teller._send_stats = sent
    teller._regions = SimpleNamespace(reclaim=lambda: None)
    teller._page, teller._held_ms = SimpleNamespace(beat=lambda held_ms: None), lambda: 0
    monkeypatch.setattr("wherry_agent.workers.worker.STATS_SECONDS_MIN", 0)
    monkeypatch.setattr(memory, "trim", lambda: turns.append("trimmed"))
    Worker._tell(teller)  # type: ignore[arg-type]
    assert turns == ["sent", "sent", "trimmed", "sent", "sent", "sent"]


def test_a_worker_that_is_asked_nothing_more_gives_its_buffers_back(tmp_path: Path) -> None:
    mean = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0, 1])]
    file = save(tmp_path / "mean.onnx", mean, [floats("x", SHAPE)], [floats("y", [1, 1])])
    interface = Interface(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[*SHAPE])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[1, 1])],
    )
    x = np.ones(SHAPE, np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": SHAPE, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=loadable(file, interface=interface)))
        before = pss_bytes(process.process.pid)
        for _ in range(2):
            status, answer = process.call("POST", "/v2/models/scale/infer", head + x.tobytes(), headers)
            assert (status, answer["outputs"][0]["data"]) == (200, [1.0])
        until(
            lambda: pss_bytes(process.process.pid) < before + x.nbytes // 2,
            "what the large requests were received into is given back",
        )


def version(of: Loadable, number: int) -> Loadable:
    target = f"scale/1.{number}.0"
    return msgspec.structs.replace(of, target=target, manifest=digest.of_bytes(target.encode()))


def pss_bytes(pid: int) -> int:
    """Memory of a process, shared pages divided among those who share them; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def tree(pid: int) -> list[int]:
    """Return a process and everything that it started, and so on."""
    found = [pid]
    for parent in found:
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
        except OSError:  # gone meanwhile, or a kernel without these lists
            found += children_of(parent)
    return found


def test_many_swaps_of_a_large_model_leave_nothing_behind(tmp_path: Path) -> None:
    files = [loadable(large(tmp_path / f"{n}.onnx", n, n + 2.0)) for n in range(2)]
    every = [version(files[n % 2], n) for n in range(SWAPS + 1)]
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=every[0]))
        process.infer([[1.0, 1.0, 1.0, 1.0]])
        pid = process.process.pid
        start = pss_bytes(pid)
        assert start > MODEL_BYTES
        for number, new in enumerate(every[1:], 1):
            process.serve(ServeModel(name="scale", active=new, incumbent=every[number - 1], trial=f"t{number}"))
            process.serve(ServeModel(name="scale", active=new))
            code, answer = process.infer([[1.0, 1.0, 1.0, 1.0]])
            assert (code, answer["outputs"][0]["data"][0]) == (200, number % 2 + 2.0)
        until(
            lambda: pss_bytes(pid) <= start + LEFT_BEHIND_MAX,
            f"{SWAPS} swaps later no more than {(start + LEFT_BEHIND_MAX) // MIB} MiB are held",
        )


class Sampler:
    """Adds up the memory of a process and all that it started, again and again."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self.peak = 0
        self.at_peak: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            each = [(pid, pss_bytes(pid)) for pid in tree(self._pid)]
            total = sum(size for _, size in each)
            if total > self.peak:
                self.peak = total
                self.at_peak = [(name_of(pid), size // MIB) for pid, size in each]

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-40:].strip()
    return "gone"


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_a_large_model_is_installed_tried_and_returned_in_700_megabytes(tmp_path: Path) -> None:
    """No process of the agent may have more, and a sampler adds up what they all have together."""
    with site(tmp_path) as server:
        server.release("1.0.0", large(tmp_path / "one.onnx", 1, 2.0))
        server.release("1.1.0", large(tmp_path / "two.onnx", 2, 3.0))
        with agent(server, "small") as device:
            resource.prlimit(device.child.pid, resource.RLIMIT_DATA, (AGENT_BYTES_MAX, AGENT_BYTES_MAX))
            sampler = Sampler(device.child.pid)
            try:
                device.until("its engines are known", lambda shown: shown["engines"])
                server.deploy("1.0.0", "small", trial_s=1)
                device.until_serves("1.0.0")
                server.deploy("1.1.0", "small", trial_s=600)
                device.until_doing("on trial")
                assert set(device.ask(3)) == {"1.1.0"}
                server.deploy("1.0.0", "small", attempt=2)
                device.until_serves("1.0.0")
                assert set(device.ask(3)) == {"1.0.0"}
            finally:
                sampler.stop()
            limits = Path(f"/proc/{device.status()['worker_pid']}/limits").read_text()
            assert str(AGENT_BYTES_MAX) in next(line for line in limits.splitlines() if "data size" in line)
            assert MODEL_BYTES < sampler.peak <= AGENT_BYTES_MAX, sampler.at_peak
