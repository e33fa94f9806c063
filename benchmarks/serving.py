"""Local serving against bare `InferenceSession.run`, and against MLServer and KServe, interleaved in one run.

Two models: `small` (a perceptron, a few µs of engine time, so that what serving costs shows) and `image` (600 KB of input
and three numbers out, so that moving a tensor shows). Every way of asking is one blocking client with prebuilt bytes and
takes its turn in every round, so that a busy machine slows all of them; figures are medians over rounds. Requests per
second come from wrk with 8 connections, each server in turn, by every way of REST that it takes. `rps_ratio_to_best_peer`
is our JSON over the best way of the best peer, `rps_binary_ratio_to_best_peer` our raw bytes over the same. Peers run in
environments of their own (`peers/environments.py`), with the same ONNX Runtime, one thread a run and no more than one
server process.

`loopback_floor_us` is what one of these clients waits for a process that answers prepared bytes and does nothing else.

Memory is the set of a server in proportion among its own processes, when nothing is asked any more: what the files mapped
by several of them hold counts once, and what anybody else maps counts whole. PSS of the kernel would give away half of the
worker's libraries, since this script maps the same files, and nothing of the peers', which have files of their own.
`idle_pss_ratio_to_best_peer` counts the process that serves, alone, with its default settings, after all its requests of the run
(`fresh_pss_ratio_to_best_peer`: before the first one); `idle_grpc_pss_ratio_to_best_peer` that of a second worker, which has gRPC
switched on and takes all calls over gRPC; `idle_pss_with_supervisor_ratio` adds the resident set of
the agent's supervisor, which peers have no counterpart of and without which nothing is delivered, as `supervisor_rss` measured
it (left out with `--quick`); what both map counts twice there.

Run: `make bench NAME=serving`. Writes `build/bench/serving.json`, with the figures of `supervisor_rss`, `swap_gap`,
`rollback` and `crash_points` in it, each measured by its own script in the same run (`--quick` leaves those out).
Needs wrk (Debian package `wrk`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from wherry_shared import engine_telemetry

engine_telemetry.turn_off()  # for everybody who is compared
import onnxruntime  # noqa: E402 - it reads that when it is imported

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import handle_overhead  # noqa: E402 - the path has to be set first
from peers import environments  # noqa: E402
from tests.agent import serving_kit  # noqa: E402

from wherry_agent.canary_exit import child_environment  # noqa: E402
from wherry_agent.children import Loadable, ServeModel  # noqa: E402
from wherry_agent.handle import Model  # noqa: E402
from wherry_agent.handle_server import HandleServer  # noqa: E402
from wherry_shared.bundle import Bounds, Interface, TensorSpec  # noqa: E402

START_SECONDS_MAX = 90.0
IMAGE = (1, 3, 224, 224)
CONNECTIONS = 8
REST_S = 3.0
"""Without a request before memory is looked at: the worker gives back what it holds for speed when it is not asked."""
WARM_CALLS = 3
"""Of each way of asking, before any clock runs."""
OUT = ROOT / "build" / "bench" / "serving.json"
OTHERS = ("supervisor_rss", "swap_gap", "rollback", "crash_points")


def image_model(path: Path) -> None:
    """Mean of each channel: reads the whole input, and little else."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *IMAGE[1:]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([node], "image", [x], [y])
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9).SerializeToString()
    )


def image_interface() -> Interface:
    return Interface(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=["n", *IMAGE[1:]])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=["n", 3])],
        dims={"n": Bounds(minimum=1, maximum=8)},
    )


# --- requests --------------------------------------------------------------------------------------


def head(model: str, length: int, header_length: int | None = None) -> bytes:
    lines = [f"POST /v2/models/{model}/infer HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    if header_length is None:
        lines.append("Content-Type: application/json")
    else:
        lines += ["Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {header_length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def json_body(array: np.ndarray) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def binary_body(array: np.ndarray) -> tuple[bytes, int]:
    """Return a request of the binary tensor extension, answered in binary, and the length of its JSON part."""
    parameters = {"binary_data_size": array.nbytes}
    tensor = {"name": "x", "datatype": "FP32", "shape": list(array.shape), "parameters": parameters}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return text + array.tobytes(), len(text)


def shared_body(shape: tuple[int, ...], size: int, region: str) -> tuple[bytes, int]:
    """Return a request whose tensor is in shared memory, answered in binary."""
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": size}
    tensor = {"name": "x", "datatype": "FP32", "shape": list(shape), "parameters": parameters}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return text, len(text)


class Raw:
    """One keep-alive connection that sends prebuilt bytes and reads one answer.

    Servers close a connection that was idle for some seconds while others had their turn; it is opened anew then.
    """

    def __init__(self, address: int | Path) -> None:
        self._address = address
        self._socket = self._open()
        self._head = b"-"
        """Of the answer before; most are alike in all but their tensors."""
        self._whole = 0
        """Bytes of an answer with that head."""

    def ask(self, request: bytes) -> bytes:
        """Return the body of a 200 answer.

        Raises:
            RuntimeError: any other answer, or a connection that ends in the middle of one.
        """
        data = self._send(request)
        if not data:
            self._socket.close()
            self._socket = self._open()
            data = self._send(request)
        if len(data) == self._whole and data.startswith(self._head):
            return data[len(self._head) :]
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        found = re.search(rb"content-length: *(\d+)", data[:end], re.IGNORECASE)
        length = int(found[1]) if found else 0
        while len(data) < end + 4 + length:
            data += self._more()
        if not data.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(data[:500].decode(errors="replace"))
        self._head, self._whole = data[: end + 4], len(data)
        return data[end + 4 :]

    def _open(self) -> socket.socket:
        if isinstance(self._address, int):
            made = socket.create_connection(("127.0.0.1", self._address))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            made = socket.socket(socket.AF_UNIX)
            made.connect(str(self._address))
        # a timeout of the kernel's: Python's own asks the kernel twice for each answer
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 30, 0))
        return made

    def _send(self, request: bytes) -> bytes:
        """Send, and return the first bytes of the answer; none if the server had closed the connection."""
        try:
            self._socket.sendall(request)
            return self._socket.recv(1 << 16)
        except (BrokenPipeError, ConnectionResetError):
            return b""

    def _more(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise RuntimeError("the server closed the connection in the middle of an answer")
        return data

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def grpc_call(stack: contextlib.ExitStack, address: int | Path, model: str, array: np.ndarray) -> Callable[[], Any]:
    """Return one blocking ModelInfer with a message that is built once."""
    import grpc
    import tritonclient.grpc as triton
    from tritonclient.grpc import service_pb2

    tensor = triton.InferInput("x", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.extend([tensor._get_tensor()])  # noqa: SLF001 - the message is to be built outside the clock
    message.raw_input_contents.append(tensor._get_content())  # noqa: SLF001
    data = message.SerializeToString()
    target = f"127.0.0.1:{address}" if isinstance(address, int) else f"unix:{address}"
    channel = stack.enter_context(grpc.insecure_channel(target))
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    return lambda: call(data, timeout=30)


# --- servers ---------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def until_ready(port: int, model: str, process: subprocess.Popen[bytes], log: Path) -> float:
    """Wait until a server says that the model is ready; return the seconds that took."""
    import http.client

    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS_MAX:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", f"/v2/models/{model}/ready")
            if connection.getresponse().status == 200:
                return time.monotonic() - began
        time.sleep(0.05)
    raise RuntimeError(f"not ready within {START_SECONDS_MAX} s: {log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def started(argv: list[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(argv, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Peer:
    """A peer that serves both models."""

    def __init__(self, name: str, http_port: int, grpc_port: int, process: subprocess.Popen[bytes], start_s: float):
        self.name, self.http_port, self.grpc_port, self.process, self.start_s = (
            name,
            http_port,
            grpc_port,
            process,
            start_s,
        )


@contextlib.contextmanager
def mlserver(folder: Path, models: dict[str, Path]) -> Iterator[Peer]:
    home = folder / "mlserver"
    http_port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    for name, path in models.items():
        (home / name).mkdir(parents=True)
        settings = {
            "name": name,
            "implementation": "mlserver_runtime.OnnxModel",
            "parameters": {"uri": str(path), "version": "1.0.0"},
        }
        (home / name / "model-settings.json").write_text(json.dumps(settings))
    settings = {
        "host": "127.0.0.1",
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        # its default of one worker process does not start with the uvloop that pip chooses
        "parallel_workers": 0,
        "debug": False,
        "use_structured_logging": False,
    }
    (home / "settings.json").write_text(json.dumps(settings))
    shutil.copy(ROOT / "benchmarks" / "peers" / "mlserver_runtime.py", home)
    python = environments.python_of("mlserver")
    log = folder / "mlserver.log"
    with started([str(python.with_name("mlserver")), "start", "."], home, log) as process:
        start_s = until_ready(http_port, "small", process, log)
        yield Peer("mlserver", http_port, grpc_port, process, start_s)


@contextlib.contextmanager
def kserve(folder: Path, models: dict[str, Path]) -> Iterator[Peer]:
    http_port, grpc_port = free_port(), free_port()
    python = environments.python_of("kserve")
    script = ROOT / "benchmarks" / "peers" / "kserve_server.py"
    argv = [str(python), str(script), str(http_port), str(grpc_port)]
    log = folder / "kserve.log"
    with started([*argv, *(f"{name}={path}" for name, path in models.items())], folder, log) as process:
        start_s = until_ready(http_port, "small", process, log)
        yield Peer("kserve", http_port, grpc_port, process, start_s)


def tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):
            for text in child.read_text(encoding="ascii").split():
                found += tree(int(text))
    return found


def set_mb(pid: int) -> float:
    """Return what a process and all below it hold, as if nobody else mapped their files, in MiB."""
    own_kb, files = 0, dict[tuple[str, str, str], int]()
    for one in tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for mapping, fields in mappings(Path(f"/proc/{one}/smaps").read_text(encoding="utf-8", errors="replace")):
                private_kb = fields["Anonymous"]
                own_kb += fields["Pss"] if mapping is None else private_kb
                if mapping is not None:  # of a file that several map, as much as the one that has most of it
                    files[mapping] = max(files.get(mapping, 0), fields["Rss"] - private_kb)
    return (own_kb + sum(files.values())) / 1024


ECHO = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
length, answer = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
connection, _ = listener.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while True:
    got = 0
    while got < length:
        chunk = len(connection.recv(65536))
        if not chunk:
            sys.exit()
        got += chunk
    connection.sendall(answer)
"""


def echo(stack: contextlib.ExitStack, request: bytes, body: bytes) -> Callable[[], bytes]:
    """Return a call that is answered with `body` by a process that does nothing else: what two processes cost here."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    argv = [sys.executable, "-c", ECHO, str(len(request)), answer.hex()]
    process = stack.enter_context(subprocess.Popen(argv, env=child_environment(), stdout=subprocess.PIPE))
    stack.callback(process.kill)
    assert process.stdout is not None
    client = Raw(int(process.stdout.readline()))
    stack.callback(client.close)
    return lambda: client.ask(request)


BARE = """
import sys, time
from concurrent import futures
import grpc, numpy, onnxruntime
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
server = grpc.server(futures.ThreadPoolExecutor(2))
server.add_insecure_port("127.0.0.1:0")
server.start()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in sys.argv[1:]]
print("ready", flush=True)
time.sleep(600)
"""


def bare_mb(files: dict[str, Path]) -> float:
    """Return what a process holds that has these models in onnxruntime and an empty gRPC server, and nothing else."""
    argv = [sys.executable, "-c", BARE, *map(str, files.values())]
    with subprocess.Popen(argv, env=child_environment(), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(1.0)
            return set_mb(process.pid)
        finally:
            process.kill()


def serve(worker: serving_kit.WorkerProcess, loadables: dict[str, Loadable]) -> None:
    """Bring the models into service."""
    answers = worker.serve(*(ServeModel(name=key, active=item) for key, item in loadables.items()))
    assert all(answer.ok for answer in answers), answers


def mappings(smaps: str) -> Iterator[tuple[tuple[str, str, str] | None, dict[str, int]]]:
    """Yield each mapping of /proc/PID/smaps: device, inode and offset of its file (None without one), and its fields in kB."""
    mapping: tuple[str, str, str] | None = None
    fields: dict[str, int] = {}
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            if fields:
                yield mapping, fields
            mapping = None if words[4] == "0" else (words[3], words[4], words[2])
            fields = {}
        elif words[-1] == "kB":
            fields[words[0][:-1]] = int(words[1])
    if fields:
        yield mapping, fields


def wrk(port: int, path: str, body: bytes, headers: dict[str, str], folder: Path, seconds: float) -> dict[str, float]:
    """Load one server with 8 connections; return requests per second, failures and the median latency in µs."""
    (folder / "body").write_bytes(body)
    script = folder / "wrk.lua"
    lines = [
        'wrk.method = "POST"',
        f'local file = io.open("{folder / "body"}", "rb")',
        'wrk.body = file:read("*a")',
        "file:close()",
        *(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()),
        "done = function(summary, latency, requests)",
        '  io.write(string.format("RESULT %d %d %d %f\\n", summary.requests, summary.duration,',
        "    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout,",
        "    latency:percentile(50)))",
        "end",
    ]
    script.write_text("\n".join(lines) + "\n")
    argv = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "-s", str(script), f"http://127.0.0.1:{port}{path}"]
    answer = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    requests, duration_us, failed, median_us = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+)", answer).groups()  # type: ignore[union-attr]
    return {
        "per_s": int(requests) / (int(duration_us) / 1e6),
        "failed": int(failed),
        "p50_us": float(median_us),
    }


# --- the measurement -------------------------------------------------------------------------------


def median_us(call: Callable[[], Any], seconds: float) -> float:
    """Return the median of as many calls as fit into the time, in µs."""
    times: list[int] = []
    end = time.perf_counter_ns() + int(seconds * 1e9)
    while (now := time.perf_counter_ns()) < end:
        call()
        times.append(time.perf_counter_ns() - now)
    return statistics.median(times) / 1000


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="wherry-serving-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        files = {"small": folder / "small.onnx", "image": folder / "image.onnx"}
        handle_overhead.small_model(files["small"])
        image_model(files["image"])
        loadables = {
            "small": serving_kit.loadable(files["small"], model="small", interface=handle_overhead.interface()),
            "image": serving_kit.loadable(files["image"], model="image", interface=image_interface()),
        }
        grpc_port = free_port()
        grpc_path = folder / "grpc.sock"
        began = time.monotonic()
        worker = stack.enter_context(serving_kit.worker(folder))
        serve(worker, loadables)
        start_s = time.monotonic() - began
        grpc_worker = stack.enter_context(
            serving_kit.worker(folder, WHERRY_GRPC_PORT=str(grpc_port), WHERRY_GRPC_SOCKET=str(grpc_path))
        )
        serve(grpc_worker, loadables)
        peers = [stack.enter_context(peer(folder, files)) for peer in (mlserver, kserve)]

        small = np.ones((1, 16), np.float32)
        image = np.random.default_rng(0).random(IMAGE, np.float32)
        bare = {key: handle_overhead.bare(path) for key, path in files.items()}
        tcp, uds = Raw(worker.port), Raw(worker.unix_path)
        stack.callback(tcp.close)
        stack.callback(uds.close)
        region = Path("/dev/shm") / f"wherry-bench-{os.getpid()}"
        region.write_bytes(image.tobytes())
        stack.callback(region.unlink)
        key = f"/{region.name}"
        register = json.dumps({"key": key, "offset": 0, "byte_size": image.nbytes}).encode()
        status, said = worker.call("POST", "/v2/systemsharedmemory/region/bench/register", register)
        assert status == 200, said

        def post(client: Raw, model: str, body: tuple[bytes, int] | bytes) -> Callable[[], bytes]:
            data, header = (body, None) if isinstance(body, bytes) else body
            request = head(model, len(data), header) + data
            return lambda: client.ask(request)

        handles = HandleServer(folder / "handle.sock")
        stack.callback(handles.close)
        for key, item in loadables.items():
            handles.publish(key, ServeModel(name=key, active=item))
        in_process = {key: stack.enter_context(Model(key, socket=folder / "handle.sock")) for key in files}
        shared = shared_body(IMAGE, image.nbytes, "bench")
        cases: dict[str, Callable[[], Any]] = {
            "bare small": lambda: bare["small"].run(["y"], {"x": small}),
            "bare image": lambda: bare["image"].run(["y"], {"x": image}),
            "handle small": lambda: in_process["small"].run({"x": small}),
            "handle image": lambda: in_process["image"].run({"x": image}),
            "rest json small": post(tcp, "small", json_body(small)),
            "rest binary small": post(tcp, "small", binary_body(small)),
            "uds binary small": post(uds, "small", binary_body(small)),
            "rest json image": post(tcp, "image", json_body(image)),
            "rest binary image": post(tcp, "image", binary_body(image)),
            "uds binary image": post(uds, "image", binary_body(image)),
            "shm image": post(uds, "image", shared),
            "shm tcp image": post(tcp, "image", shared),
            "grpc small": grpc_call(stack, grpc_port, "small", small),
            "grpc image": grpc_call(stack, grpc_port, "image", image),
            "grpc uds small": grpc_call(stack, grpc_path, "small", small),
            "grpc uds image": grpc_call(stack, grpc_path, "image", image),
        }
        data, length = binary_body(small)
        request = head("small", len(data), length) + data
        cases["echo small"] = echo(stack, request, tcp.ask(request))
        for peer in peers:
            client = Raw(peer.http_port)
            stack.callback(client.close)
            cases[f"{peer.name} json small"] = post(client, "small", json_body(small))
            cases[f"{peer.name} json image"] = post(client, "image", json_body(image))
            cases[f"{peer.name} grpc small"] = grpc_call(stack, peer.grpc_port, "small", small)
            cases[f"{peer.name} grpc image"] = grpc_call(stack, peer.grpc_port, "image", image)
        # MLServer refuses the binary tensor extension over REST
        kserve_client = Raw(peers[1].http_port)
        stack.callback(kserve_client.close)
        cases["kserve binary image"] = post(kserve_client, "image", binary_body(image))

        time.sleep(1.0)
        servers = {
            "wherry worker": worker.process,
            "wherry worker with gRPC": grpc_worker.process,
            **{peer.name: peer.process for peer in peers},
        }
        fresh = {key: set_mb(process.pid) for key, process in servers.items()}
        for call in cases.values():
            for _ in range(WARM_CALLS):
                call()
        found: dict[str, list[float]] = {key: [] for key in cases}
        for _ in range(rounds):
            for key, call in cases.items():
                found[key].append(median_us(call, seconds))
        ways = {"wherry": worker.port, **{peer.name: peer.http_port for peer in peers}}
        rates: dict[str, list[float]] = {f"{key} json": [] for key in ways}
        framing = {"wherry binary": worker.port, "kserve binary": peers[1].http_port}
        rates |= {key: [] for key in framing}
        failed = 0
        path, plain = "/v2/models/small/infer", {"Content-Type": "application/json"}
        binary, header = binary_body(small)
        framed = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(header)}
        for _ in range(rounds):
            for key, port in ways.items():
                result = wrk(port, path, json_body(small), plain, folder, max(1.0, seconds * 2))
                rates[f"{key} json"].append(result["per_s"])
                failed += int(result["failed"])
            for key, port in framing.items():
                result = wrk(port, path, binary, framed, folder, max(1.0, seconds * 2))
                rates[key].append(result["per_s"])
                failed += int(result["failed"])
        time.sleep(REST_S)
        memory = {key: set_mb(process.pid) for key, process in servers.items()}
        memory["bare process with gRPC"] = bare_mb(files)

    p50 = {key: statistics.median(values) for key, values in found.items()}

    def over(key: str, base: str) -> float:
        return statistics.median([a - b for a, b in zip(found[key], found[base], strict=True)])

    per_s = {key: statistics.median(values) for key, values in rates.items()}
    best_rate = max(rate for key, rate in per_s.items() if not key.startswith("wherry "))
    best_memory = min(memory["mlserver"], memory["kserve"])
    best_small = min(p50["mlserver json small"], p50["kserve json small"])
    return {
        "handle_overhead_us": round(over("handle small", "bare small"), 2),
        "rest_json_overhead_us": round(over("rest json small", "bare small"), 1),
        "rest_binary_overhead_us": round(over("rest binary small", "bare small"), 1),
        "loopback_floor_us": round(p50["echo small"], 1),
        "uds_overhead_us": round(over("uds binary small", "bare small"), 1),
        "grpc_overhead_us": round(over("grpc small", "bare small"), 1),
        "shm_600k_ratio_to_bare": round(p50["shm image"] / p50["bare image"], 2),
        "rest_binary_600k_overhead_us": round(over("rest binary image", "bare image"), 1),
        "rps_ratio_to_best_peer": round(per_s["wherry json"] / best_rate, 2),
        "rps_binary_ratio_to_best_peer": round(per_s["wherry binary"] / best_rate, 2),
        "p50_ratio_to_best_peer": round(p50["rest json small"] / best_small, 3),
        "kserve_binary_600k_ratio": round(p50["kserve binary image"] / p50["rest binary image"], 1),
        "grpc_ratio_to_best_peer": round(
            p50["grpc small"] / min(p50["mlserver grpc small"], p50["kserve grpc small"]), 2
        ),
        "grpc_600k_ratio_to_best_peer": round(
            p50["grpc image"] / min(p50["mlserver grpc image"], p50["kserve grpc image"]), 2
        ),
        "idle_pss_ratio_to_best_peer": round(memory["wherry worker"] / best_memory, 2),
        "idle_grpc_pss_ratio_to_best_peer": round(memory["wherry worker with gRPC"] / best_memory, 2),
        "fresh_pss_ratio_to_best_peer": round(fresh["wherry worker"] / min(fresh["mlserver"], fresh["kserve"]), 2),
        "idle_bare_ratio_to_best_peer": round(memory["bare process with gRPC"] / best_memory, 2),
        "requests_failed": failed,
        "start_s": {"wherry worker": round(start_s, 2), **{peer.name: round(peer.start_s, 2) for peer in peers}},
        "p50_us": {key: round(value, 1) for key, value in p50.items()},
        "requests_per_s": {key: round(value) for key, value in per_s.items()},
        "fresh_pss_mb": {key: round(value, 1) for key, value in fresh.items()},
        "idle_pss_mb": {key: round(value, 1) for key, value in memory.items()},
        "rounds": rounds,
        "seconds": seconds,
        "onnxruntime": onnxruntime.__version__,
    }


def other(name: str) -> dict[str, Any]:
    """Run another benchmark in a process of its own and return what it wrote.

    One that ends with an error has measured all the same if it wrote: its figures say what failed, and its name is kept.

    Raises:
        RuntimeError: it wrote nothing.
    """
    target = OUT.parent / f"{name}.json"
    target.unlink(missing_ok=True)  # what an earlier run wrote is no answer of this one
    code = subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py")], cwd=ROOT, check=False).returncode
    if not target.exists():
        raise RuntimeError(f"{name} ended with {code} and wrote nothing")
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found | ({f"{name}_exit_code": code} if code else {})


def with_supervisor(result: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of idle memory with the supervisor counted, where that was measured."""
    if "supervisor_rss_mb" not in result:
        return {}
    idle = result["idle_pss_mb"]
    ours = idle["wherry worker"] + result["supervisor_rss_mb"]
    return {"idle_pss_with_supervisor_ratio": round(ours / min(idle["mlserver"], idle["kserve"]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way of asking in each round")
    parser.add_argument("--quick", action="store_true", help="leave out what the other benchmarks measure")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended as well
    if shutil.which("wrk") is None:
        sys.exit("error: wrk is missing, so requests per second cannot be measured; install the Debian package wrk")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for measured in (lambda: measure(options.rounds, options.seconds), *_others(quick=options.quick)):
        found = measured()
        result |= {key: value for key, value in found.items() if key not in result}
        result |= with_supervisor(result)
        OUT.write_text(json.dumps(result, indent=2) + "\n")  # what follows takes half an hour
    print(json.dumps(result, indent=2))


def _others(*, quick: bool) -> list[Callable[[], dict[str, Any]]]:
    return [] if quick else [functools.partial(other, name) for name in OTHERS]


if __name__ == "__main__":
    main()
