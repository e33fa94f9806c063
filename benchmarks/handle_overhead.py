"""What a call through the in-process handle costs above bare onnxruntime: median of interleaved runs, in microseconds.

Both sides run the same file on the same input in the same process: `InferenceSession.run` with its output names given,
and `Model.run` of a handle connected to a real supervisor socket. Rounds alternate so that a busy machine slows both.
The model is small on purpose: the less the engine does, the more an overhead shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from wherry_agent.children import Loadable, ServeModel
from wherry_agent.handle import Model
from wherry_agent.handle_server import HandleServer
from wherry_shared import digest, engine_telemetry
from wherry_shared.bundle import Bounds, Interface, TensorSpec

engine_telemetry.turn_off()  # for both sides
import onnxruntime  # noqa: E402 - it reads that when it is imported

ROOT = Path(__file__).parents[1]
TARGET_US = 1.0


def small_model(path: Path) -> None:
    """A perceptron of 16, 64 and 4 units: 6 to 10 µs in onnxruntime."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in (("w1", (16, 64)), ("w2", (64, 4)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "mlp", [x], [y], weights)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )


def interface() -> Interface:
    return Interface(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=["n", 16])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=["n", 4])],
        dims={"n": Bounds(minimum=1, maximum=64)},
    )


def bare(path: Path) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def median_us(call, calls: int) -> float:
    times = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return statistics.median(times) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "mlp.onnx"
        small_model(path)
        server = HandleServer(folder / "handle.sock")
        loadable = Loadable(
            model="mlp",
            target="mlp/1.0.0",
            manifest=digest.of_bytes(b"mlp"),
            variant="float",
            digest=digest.of_file(path),
            engine="onnxruntime",
            engine_version=onnxruntime.__version__,
            format="onnx",
            path=str(path),
            golden_path="",
            config_path="",
            interface=interface(),
        )
        server.publish("mlp", ServeModel(name="mlp", active=loadable))
        session = bare(path)
        feed = {"x": np.ones((1, 16), np.float32)}
        names = ["y"]
        differences, ratios, floors = [], [], []
        with Model("mlp", socket=folder / "handle.sock") as model:
            for _ in range(options.rounds):
                plain = median_us(lambda: session.run(names, feed), options.calls)
                handled = median_us(lambda: model.run(feed), options.calls)
                differences.append(handled - plain)
                ratios.append(handled / plain)
                floors.append(plain)
        server.close()
    result = {
        "handle_overhead_us": round(statistics.median(differences), 3),
        "handle_ratio": round(statistics.median(ratios), 3),
        "bare_us": round(statistics.median(floors), 3),
        "target_us": TARGET_US,
        "rounds": options.rounds,
        "calls": options.calls,
        "onnxruntime": onnxruntime.__version__,
    }
    out = ROOT / "build" / "bench" / "handle_overhead.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"| in-process handle over bare onnxruntime | {result['handle_overhead_us']:.2f} µs at a bare median of "
        f"{result['bare_us']:.1f} µs (target ≤ {TARGET_US:.1f} µs) | `python benchmarks/handle_overhead.py` |"
    )


if __name__ == "__main__":
    main()
