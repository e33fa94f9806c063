"""A worker under its real supervisor, and callers who never try twice: for swaps, hand-overs and crashes under load."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.agent.serving_kit import infer_body, loadable, until
from tests.shared.engines import models
from wherry_agent import children, processes
from wherry_agent.children import Loadable, ServeModel
from wherry_agent.socket_name import SocketName
from wherry_shared import digest

CLIENTS = 8
FILES = 8
"""Different model files; versions beyond that repeat their numbers, not their names."""
CALL_SECONDS_MAX = 60.0
BODY = json.dumps(infer_body([[1.0, 1.0, 1.0, 1.0]])).encode()


def versions(folder: Path, count: int) -> list[Loadable]:
    """Return versions 1.1.0, 1.2.0, …; version 1.n.0 multiplies by (n - 1) % FILES + 1."""
    files = [loadable(models.scale(folder / f"{n}.onnx", n + 1.0)) for n in range(min(count, FILES))]
    found = []
    for number in range(1, count + 1):
        target = f"scale/1.{number}.0"
        file = files[(number - 1) % FILES]
        found.append(msgspec.structs.replace(file, target=target, manifest=digest.of_bytes(target.encode())))
    return found


def right_value(version: str) -> float:
    return (int(version.split(".")[1]) - 1) % FILES + 1.0


class Supervised:
    """The supervisor's `WorkerProcess` on real workers, told what to serve as the daemon would."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.tcp = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.tcp.getsockname()[1]
        self.unix_path = folder / f"w{self.port}.sock"
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.unix_path))
        self.unix.listen(128)
        self.events: list[children.WorkerEvent] = []
        self.deaths: list[tuple[str, bool]] = []
        self.ran: list[tuple[children.Ran, ...]] = []
        """What each worker was running when it died."""
        self.gone: list[int] = []
        self.said: children.Serve = children.Serve(revision=0, models=[])
        self.loaded: set[str] = set()
        """Versions that were ever told to be served."""
        self.grpc_port = more.get("grpc_port", 0)
        self.grpc_path = folder / "grpc.sock"
        name = SocketName(self.grpc_path) if self.grpc_port else None
        self.worker = processes.WorkerProcess(
            [self.tcp, self.unix],
            on_event=self._heard,
            on_death=self._died,
            on_gone=self.gone.append,
            memory_reserve_bytes=0,
            grpc_socket=name,
            **more,
        )
        self.worker.start()

    def _heard(self, event: children.WorkerEvent, _: int) -> None:
        self.events.append(event)
        if isinstance(event, children.Ready):
            self.worker.send(self.said)

    def _died(self, detail: str, ordered: bool, ran: tuple[children.Ran, ...]) -> None:
        self.ran.append(ran)
        self.deaths.append((detail, ordered))

    def tell(self, *wanted: ServeModel) -> None:
        self.loaded |= {one.active.target.rpartition("/")[2] for one in wanted}
        self.said = children.Serve(revision=self.said.revision + 1, models=list(wanted))
        self.worker.send(self.said)

    def serve(self, *wanted: ServeModel) -> None:
        """Make `wanted` the desired state and wait until every model of it is in service."""
        self.tell(*wanted)
        self.wait_served()

    def wait_served(self) -> None:
        names = {model.name for model in self.said.models}

        def answered() -> bool:
            answers = [e for e in self.events if isinstance(e, children.Serving) and e.revision == self.said.revision]
            assert all(answer.ok for answer in answers), answers
            return {answer.model for answer in answers} == names

        until(answered, f"revision {self.said.revision} is served", 60)

    def hand_over(self) -> str:
        """Let another worker take over; return the trouble, empty if there was none."""
        done: list[str] = []
        self.worker.hand_over(done.append)
        until(lambda: done, "the hand-over has ended", 60)
        return done[0]

    def close(self) -> None:
        self.worker.stop(children.Stop())
        self.tcp.close()
        self.unix.close()


@contextmanager
def supervised(folder: Path, **more: Any) -> Iterator[Supervised]:
    made = Supervised(folder, **more)
    try:
        yield made
    finally:
        made.close()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Rest:
    """Asks over HTTP and never asks the same thing twice."""

    def __init__(self, of: Supervised, *, unix: bool = False, keep: bool = True) -> None:
        self._make = (
            (lambda: _UnixConnection(of.unix_path, CALL_SECONDS_MAX))
            if unix
            else (lambda: http.client.HTTPConnection("127.0.0.1", of.port, timeout=CALL_SECONDS_MAX))
        )
        self._keep = keep
        self._connection: http.client.HTTPConnection | None = None
        self.connects = 0

    def ask(self) -> tuple[str, float]:
        """Return which version answered, and what."""
        if self._connection is None:
            self._connection = self._make()
        if self._connection.sock is None:
            self.connects += 1
        try:
            self._connection.request("POST", "/v2/models/scale/infer", BODY, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = json.loads(response.read())
        except Exception:
            self.close()
            raise
        if not self._keep:
            self.close()
        if response.status != 200:
            raise AssertionError(f"{response.status} {answer}")
        return answer["model_version"], answer["outputs"][0]["data"][0]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Grpc:
    """Asks over one gRPC channel; `retries` of the channel are off."""

    def __init__(self, of: Supervised, *, unix: bool = False) -> None:
        import grpc
        import numpy as np

        from wherry_agent.serving.messages import SERVICE, message

        request = message("ModelInferRequest")(model_name="scale")
        tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        assert tensor.name == "x"
        request.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        address = f"unix:{of.grpc_path}" if unix else f"127.0.0.1:{of.grpc_port}"
        self._channel = grpc.insecure_channel(address, options=options)
        self._call = self._channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=lambda value: value.SerializeToString(),
            response_deserializer=message("ModelInferResponse").FromString,
        )
        self._request = request
        self.connects = 0

    def ask(self) -> tuple[str, float]:
        answer = self._call(self._request, timeout=CALL_SECONDS_MAX, wait_for_ready=self.connects == 0)
        self.connects = 1
        return answer.model_version, struct.unpack("<f", answer.raw_output_contents[0][:4])[0]

    def close(self) -> None:
        self._channel.close()


CALLERS: dict[str, Callable[[Supervised], Any]] = {
    "keep-alive": Rest,
    "new connection": lambda of: Rest(of, keep=False),
    "unix socket": lambda of: Rest(of, unix=True),
    "gRPC": Grpc,
    "gRPC unix socket": lambda of: Grpc(of, unix=True),
}
"""Ways to ask; each has `ask`, `close` and `connects`."""
HANDED_OVER = ("keep-alive", "new connection", "unix socket")
"""Those that see nothing of a change of the worker process."""


class Crowd:
    """Callers who ask all the time, each in a thread of its own."""

    def __init__(self, of: Supervised, kind: str, count: int = CLIENTS, pause_s: float = 0.002) -> None:
        self._of = of
        self._pause_s = pause_s
        """Between two requests of one caller: without one they take the cores from what is tested."""
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.callers = [CALLERS[kind](of) for _ in range(count)]
        self.answers = 0
        self.seen: set[str] = set()
        self.wrong: list[str] = []
        """Answers that no loaded version would give."""
        self.failures: list[str] = []
        self.seconds: list[float] = []
        self._threads = [threading.Thread(target=self._main, args=(caller,)) for caller in self.callers]
        for thread in self._threads:
            thread.start()

    def _main(self, caller: Any) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            try:
                version, value = caller.ask()
            except Exception as error:
                with self._lock:
                    self.failures.append(repr(error))
                continue
            with self._lock:
                self.seconds.append(time.perf_counter() - began)
                self.answers += 1
                self.seen.add(version)
                if version not in self._of.loaded or value != right_value(version):
                    self.wrong.append(f"{version} gave {value}")
            if self._pause_s:
                time.sleep(self._pause_s)
        caller.close()

    def wait_for_more(self, count: int = 1) -> None:
        """Wait until so many requests more were answered, or one failed."""
        failed, goal = len(self.failures), self.answers + count
        until(lambda: self.answers >= goal or len(self.failures) > failed, f"{count} answers", 60)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def crowd(of: Supervised, kind: str, count: int = CLIENTS, pause_s: float = 0.002) -> Iterator[Crowd]:
    made = Crowd(of, kind, count, pause_s)
    try:
        yield made
    finally:
        made.stop()
