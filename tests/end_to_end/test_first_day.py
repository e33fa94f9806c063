"""The first day, as the README tells it: every command as a person would type it, every process a real one, nothing else touched.

Only ports and folders differ from the README, so that nothing of this machine is used.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from wherry_simulators.processes import Child, free_port, wait_for

pytestmark = pytest.mark.services

MODULES = {
    "wherry": "wherry_server.cli",
    "wherry-optimizer": "wherry_optimizer.cli",
    "wherry-agent": "wherry_agent.cli",
}
SHADOW = """
strategy = "shadow"
stages = [{share = 1.0, confirmed_min = 0}]
trial = {max_s = 4, min_requests = 5, agreement_min = 0.9, shadow_cpu_share_max = 0.9}
"""
ZEROS = {"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [0.0] * 8}
WAIT_S = 60.0
COMMAND_S = 120.0


class Bench:
    """A person's workstation: a home of its own, a working folder, terminals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.env = {
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / ".config"),
            "XDG_DATA_HOME": str(self.home / ".local" / "share"),
            "XDG_CACHE_HOME": str(self.home / ".cache"),
            "TERM": "dumb",
        }
        self.terminals: list[Child] = []

    def start(self, name: str, *arguments: str) -> Child:
        """Run a command that goes on, in a terminal of its own."""
        child = Child(name, [MODULES[arguments[0]], *arguments[1:]], self.folder / f"{name}.log", self.env).start()
        self.terminals.append(child)
        return child

    def run(self, *arguments: str) -> str:
        """Run a command to its good end; return what it printed."""
        done = self._done(*arguments)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """Run a command that has to be refused; return what it says, unwrapped."""
        done = self._done(*arguments)
        assert done.returncode in (1, 2), f"{' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def _done(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", MODULES[arguments[0]], *arguments[1:]],
            cwd=self.folder,
            env={**{k: v for k, v in os.environ.items() if not k.startswith(("WHERRY_", "XDG_"))}, **self.env},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for child in reversed(bench.terminals):
        child.stop()


def dense_model(path: Path, seed: int) -> Path:
    """Write a small classifier: x float32 (batch, 8) → scores float32 (batch, 3)."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(8, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weights"], ["sums"]), helper.make_node("Softmax", ["sums"], ["scores"])],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def curl(url: str, body: dict[str, Any] | None = None) -> Any:
    """What `curl -s` would print, decoded."""
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        return json.loads(answer.read())


def answers_like(port: int, source: Path, version: str) -> bool:
    """Tell whether the device answers what onnxruntime answers for the file on the workstation."""
    rows = np.random.default_rng(7).normal(size=(5, 8)).astype(np.float32)
    expected = onnxruntime.InferenceSession(str(source)).run(None, {"x": rows})[0]
    tensor = {"name": "x", "datatype": "FP32", "shape": [5, 8], "data": rows.ravel().tolist()}
    found = curl(f"http://127.0.0.1:{port}/v2/models/my-model/infer", {"inputs": [tensor]})
    (scores,) = found["outputs"]
    assert found["model_version"] == version
    assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [5, 3])
    np.testing.assert_allclose(np.reshape(scores["data"], (5, 3)), expected, rtol=1e-5, atol=1e-6)
    return True


@pytest.mark.slow
def test_the_first_day(bench: Bench) -> None:
    port, broker, serving = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    first, second = (dense_model(bench.folder / f"model-{n}.onnx", n) for n in (1, 2))

    # terminal 1
    server = bench.start("dev", "wherry", "dev", "--port", str(port), "--broker-port", str(broker))
    wait_for("the first screen", lambda: "Ctrl-C ends it" in server.tail(60), WAIT_S)
    screen = server.tail(60)
    assert url in screen
    assert "Admin token, shown this once" in screen
    assert "Starting the Wherry development server" in screen
    assert re.search(r"wherry-agent run --server \S+ --home \S+ --name bench-1", screen)

    # terminal 2
    token = bench.run("wherry", "token", "create", "--quiet").strip()
    device = str(bench.home / "wherry-device")
    agent = bench.start(
        "agent",
        *("wherry-agent", "run", "--server", url, "--token", token, "--home", device, "--name", "bench-1"),
        *("--http-port", str(serving)),
    )
    wait_for("the device", lambda: "bench-1" in bench.run("wherry", "device", "list"), WAIT_S)

    # terminal 3
    def push(source: Path, version: str) -> None:
        bundle = f"my-model-{version}"
        bench.run(
            *("wherry-optimizer", "pack", str(source), "--name", "my-model", "--version", version),
            *("--licence", "Apache-2.0", "--attribution", "me", "--output", bundle),
        )
        assert f"my-model/{version}" in bench.run("wherry-optimizer", "sign", bundle)
        bench.run("wherry", "bundle", "push", bundle)

    def release(source: Path, version: str) -> None:
        push(source, version)
        bench.run("wherry", "deploy", f"my-model:{version}", "--device", "bench-1", "--trial", "2", "--watch")

    release(first, "1.0.0")
    key = bench.home / ".config" / "wherry" / "publisher.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    metadata = curl(f"http://127.0.0.1:{serving}/v2/models/my-model")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("my-model", ["1.0.0"], "onnxruntime_onnx")
    assert answers_like(serving, first, "1.0.0")
    shown = bench.run("wherry", "device", "show", "bench-1")
    assert "my-model  runs 1.0.0; state confirmed_idle" in shown
    assert re.search(r"variant +float", shown)
    assert re.search(r"why +\S", shown)
    assert re.search(r"variant +float on onnxruntime \S+, peak \d", shown)
    assert re.search(r"canary +\d+\.\d\d ms median, \d+\.\d\d ms p99", shown)
    (model,) = bench.json("wherry", "device", "show", "bench-1")["models"]
    assert 0 < model["canary_p50_us"] <= model["canary_p99_us"]
    assert model["peak_memory_bytes"] > 2**20
    assert (model["version"], model["variant"], model["engine"].split()[0]) == ("1.0.0", "float", "onnxruntime")

    release(second, "1.1.0")
    assert answers_like(serving, second, "1.1.0")

    bench.run("wherry", "rollback", "my-model", "--device", "bench-1", "--watch")
    assert answers_like(serving, first, "1.0.0")
    status = bench.run("wherry-agent", "status", "--home", device)
    assert re.search(r"serves +my-model/1.0.0 variant float", status), status
    assert "because" in status
    lines = bench.run("wherry", "device", "logs", "bench-1")
    assert "my-model · confirmed" in lines

    # terminal 1: Ctrl-C, and again the next morning; the agent went on all the while
    server.stop()
    assert answers_like(serving, first, "1.0.0")
    server = bench.start("dev-again", "wherry", "dev")
    wait_for("the second screen", lambda: "Ctrl-C ends it" in server.tail(60), WAIT_S)
    assert "Admin token" not in server.tail(60)
    bundles = bench.json("wherry", "bundle", "list")
    assert [(bundle["model"], bundle["version"]) for bundle in bundles] == [
        ("my-model", "1.1.0"),
        ("my-model", "1.0.0"),
    ]
    bench.run("wherry", "deploy", "my-model:1.1.0", "--device", "bench-1", "--trial", "2", "--watch")
    assert answers_like(serving, second, "1.1.0")

    # the next version runs unseen beside this one, agrees with it, and is promoted
    push(second, "1.2.0")
    (bench.folder / "shadow.toml").write_text(SHADOW)
    made = bench.json(
        *("wherry", "rollout", "create", "my-model:1.2.0", "--device", "bench-1", "--plan", "shadow.toml", "--start")
    )
    explain = ("wherry", "rollout", "explain", str(made["number"]))

    def promoted() -> bool:
        url = f"http://127.0.0.1:{serving}/v2/models/my-model/infer"
        versions = [curl(url, {"inputs": [ZEROS]})["model_version"] for _ in range(10)]
        return versions[-1] == "1.2.0" and bench.json(*explain)["state"] == "done"

    wait_for("the promotion of the shadow", promoted, WAIT_S)
    said = bench.run(*explain)
    assert "proved_beside" in said
    assert "promote up to stage 1" in said
    assert answers_like(serving, second, "1.2.0")
    assert agent.alive()
    assert agent.stop() == 0
    assert "is not running" in bench.run("wherry-agent", "status", "--home", device)


def test_what_goes_wrong_is_said_with_a_next_step(bench: Bench) -> None:
    """Three things that people do on their first day."""
    said = bench.refused("wherry", "bundle", "list")
    assert "start wherry dev" in said
    (bench.folder / "model.onnx").write_bytes(b"this is no model")
    pack = ("wherry-optimizer", "pack", "model.onnx", "--name", "my-model", "--version", "1.0.0", "--attribution", "me")
    assert "model.onnx" in bench.refused(*pack, "--licence", "Apache-2.0")
    dense_model(bench.folder / "model.onnx", 1)
    assert "licence" in bench.refused(*pack, "--licence", "").lower()
    bench.run(*pack, "--licence", "Apache-2.0", "--output", "my-model-1.0.0")
    assert "start wherry dev" in bench.refused("wherry-optimizer", "sign", "my-model-1.0.0")
    assert not (bench.home / ".config").exists(), "no key was made for nothing"
    assert "--token" in bench.refused("wherry-agent", "run", "--home", str(bench.home / "device"))
