"""What tests of worker, canary and handle share: loadables with real files, and a real worker process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.shared.engines import models
from wherry_agent.canary_exit import child_environment
from wherry_agent.children import Loadable, Serve, ServeModel, Stop, WorkerEvent, encode_line
from wherry_shared import digest, golden
from wherry_shared.bundle import Interface
from wherry_shared.engines.canonical import open_bound

DEADLINE_S = 30.0
SAMPLE = 1000
"""Entries kept of a larger output."""


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll `condition` until it is true; return its value."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {deadline_s} s: {what}")


def loadable(
    path: Path,
    version: str = "1.0.0",
    *,
    model: str = "scale",
    interface: Interface | None = None,
    engine: str = "onnxruntime",
    format_: str = "onnx",
    spoil: bool = False,
    rows: np.ndarray | None = None,
    **more: Any,
) -> Loadable:
    """Make a loadable of a model file, with golden vectors that its own outputs pass (unless `spoil`)."""
    interface = interface or models.interface()
    plain = Loadable(
        model=model,
        target=f"{model}/{version}",
        manifest=digest.of_bytes(f"{model}/{version}".encode()),
        variant="float",
        digest=digest.of_file(path) if path.exists() else digest.of_bytes(b""),
        engine=engine,
        engine_version="1.0",
        format=format_,
        path=str(path),
        golden_path="",
        config_path="",
        interface=interface,
        **more,
    )
    bound = open_bound(plain)
    name = interface.inputs[0].name
    inputs = [{name: row} for row in rows] if rows is not None else [bound.warm_inputs()]
    vectors = []
    for given in inputs:
        expected = {output: golden.Expected(value + spoil, value.shape) for output, value in bound.run(given).items()}
        vectors.append(golden.Vector(given, expected))
    bound.close()
    tolerances = {spec.name: golden.Tolerance(1e-4, 1e-4) for spec in interface.outputs}
    data = golden.encode(golden.Golden(tuple(vectors), tolerances))
    golden_path = path.parent / digest.hex_of(digest.of_bytes(data))
    golden_path.write_bytes(data)
    return msgspec.structs.replace(plain, golden_path=str(golden_path))


def instead(item: Loadable, path: Path) -> Loadable:
    """Return the loadable with another file as its weights, as if a publisher had signed that one."""
    return msgspec.structs.replace(item, path=str(path), digest=digest.of_file(path))


class WorkerProcess:
    """A worker as the supervisor starts it: control channel and listening sockets by descriptor."""

    def __init__(self, folder: Path, tcp: socket.socket | None = None, **environment: str) -> None:
        self.tcp = tcp or socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.unix_path = folder / f"worker-{self.port}.sock"
        self.unix_path.unlink(missing_ok=True)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.unix_path))
        self.unix.listen(64)
        self.control, theirs = socket.socketpair()
        fds = (theirs.fileno(), self.tcp.fileno(), self.unix.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wherry_agent.workers"],
            pass_fds=fds,
            env={
                **child_environment(),
                **environment,
                "WHERRY_CONTROL_FD": str(fds[0]),
                "WHERRY_LISTEN_FDS": f"{fds[1]},{fds[2]}",
            },
        )
        theirs.close()
        self.events: list[Any] = []
        self._rest = b""
        self._revision = 0

    def send(self, message: msgspec.Struct) -> None:
        self.control.sendall(encode_line(message))

    def pump(self) -> None:
        """Take what events have come."""
        self.control.settimeout(0.01)
        try:
            chunk = self.control.recv(1 << 20)
        except TimeoutError:
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self.events += [msgspec.json.decode(line, type=WorkerEvent) for line in lines]

    def event(self, kind: type, test: Callable[[Any], bool] = lambda _: True) -> Any:
        """Wait for the next event of `kind` that passes `test`; events before it are dropped."""

        def found() -> Any:
            self.pump()
            for index, event in enumerate(self.events):
                if isinstance(event, kind) and test(event):
                    del self.events[: index + 1]
                    return event
            return None

        return until(found, f"{kind.__name__} from the worker")

    def serve(self, *wanted: ServeModel) -> list[Any]:
        """Make `wanted` the desired state; return one `Serving` per model."""
        from wherry_agent.children import Serving

        self._revision += 1
        self.send(Serve(revision=self._revision, models=list(wanted)))
        return [
            self.event(Serving, lambda event, name=model.name: (event.revision, event.model) == (self._revision, name))
            for model in wanted
        ]

    def arm(self, arm: str, test: Callable[[Any], bool]) -> Any:
        """Wait for statistics of an arm that pass `test`."""
        from wherry_agent.children import Stats

        event = self.event(Stats, lambda stats: any(one.arm == arm and test(one) for one in stats.arms))
        return next(one for one in event.arms if one.arm == arm and test(one))

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers or {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def infer(self, rows: list[list[float]], model: str = "scale", version: str = "") -> tuple[int, Any]:
        path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
        return self.call("POST", path, infer_body(rows))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it crashed, as some tests mean it to
            self.send(Stop())
        self.control.close()
        try:
            self.process.wait(DEADLINE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.tcp.close()
            self.unix.close()


def infer_body(rows: list[list[float]], name: str = "x") -> dict[str, Any]:
    shape = [len(rows), len(rows[0])]
    return {"inputs": [{"name": name, "datatype": "FP32", "shape": shape, "data": rows}]}


@contextmanager
def worker(folder: Path, **environment: str) -> Iterator[WorkerProcess]:
    process = WorkerProcess(folder, **environment)
    try:
        yield process
    finally:
        process.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
