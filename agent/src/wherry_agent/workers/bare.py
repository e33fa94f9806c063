"""A worker on a device that has no NumPy, and so no engine: it says so to everybody, and serves once there is one.

A process that died of the missing package would look like a crash of whatever it was to serve, again and again. This one
answers each `Serve` with `engine_missing`, which is held against nobody, and each request with 503 and what to do. When it is
told to serve something and the package can be imported by then, it becomes an ordinary worker under its own process id.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

import msgspec

from wherry_agent.accepting import ACCEPT_PAUSE_SECONDS
from wherry_agent.children import (
    GoldenDone,
    Grpc,
    GrpcDoing,
    Ready,
    RunGolden,
    Serve,
    Serving,
    Stop,
    WorkerCommand,
    encode_line,
)
from wherry_agent.lines import LineWriter, read_lines
from wherry_agent.serving import passing
from wherry_shared import reasons

log = logging.getLogger(__name__)

COMMAND_BYTES_MAX = 16 * 1024 * 1024
REQUEST_SECONDS_MAX = 10.0
HOLD_SECONDS = 2.0
"""Before the first client is answered by one that has models to serve: if it was only to take over from a worker that
serves, it is ended by then."""
POLL_MS = 250
TRY_SECONDS_MAX = 60.0
"""How long an import of the missing package may take when it is tried again."""
TALKERS_MAX = 16
"""Clients that are answered at once; more wait."""
NEXT_STEP = "install wherry-agent[onnx] or wherry-agent[litert] on the device"
GRPC: GrpcDoing = "not served: its packages are missing"

_commands: msgspec.json.Decoder[WorkerCommand] = msgspec.json.Decoder(WorkerCommand)


def lacking() -> str:
    """Return why no engine can be used in this process; empty if that is not so."""
    try:
        import numpy as np  # noqa: F401 - to see whether it can be
    except ImportError as error:
        return str(error).strip().partition("\n")[0] or "numpy cannot be imported"
    return ""


def is_there_now() -> bool:
    """Tell whether a new process could import what this one could not: here a second try would not be the first."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import numpy"], capture_output=True, timeout=TRY_SECONDS_MAX, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("whether numpy is there now cannot be found out: %s", error)
        return False
    return done.returncode == 0


class Bare:
    """Says on `listeners` and over `control` why nothing is served."""

    def __init__(
        self,
        control: socket.socket,
        listeners: list[socket.socket],
        why: str,
        *,
        take_over: Sequence[socket.socket] = (),
        grpc: bool = False,
    ) -> None:
        self._control = control
        self._writer = LineWriter(control)
        self._listeners = listeners
        self._why = why
        self._take_over = list(take_over)
        self._grpc = grpc
        self._closed = False
        self._started: threading.Timer | None = None
        self._talkers = threading.BoundedSemaphore(TALKERS_MAX)

    def run(self) -> None:
        """Speak until `Stop`, or until the supervisor is gone; does not return if it becomes an ordinary worker."""
        log.error("no engine can be used: %s; next: %s", self._why, NEXT_STEP)
        self._say(Ready(pid=os.getpid()))
        if self._grpc:
            self._say(Grpc(doing=GRPC, socket=GRPC))
        with contextlib.suppress(OSError):  # the supervisor is gone: there is nobody to say it to
            for line in read_lines(self._control, line_bytes_max=COMMAND_BYTES_MAX):
                command = _commands.decode(line)
                if isinstance(command, Stop):
                    break
                self._do(command)
        self._closed = True

    # -- inside ----------------------------------------------------------------------------------

    def _do(self, command: Serve | RunGolden) -> None:
        match command:
            case Serve():
                if command.models and is_there_now():
                    log.info("numpy is there now")
                    # descriptors, leash and process id stay; the supervisor hears `Ready` again and says what to serve
                    os.execv(sys.executable, [sys.executable, "-m", "wherry_agent.workers"])  # noqa: S606
                for model in command.models:
                    self._say(
                        Serving(
                            revision=command.revision,
                            model=model.name,
                            digest=model.active.digest,
                            ok=False,
                            reason=reasons.ENGINE_MISSING,
                            detail=self._why,
                        )
                    )
                if self._started is None:
                    self._started = threading.Timer(HOLD_SECONDS if command.models else 0.0, self._start)
                    self._started.daemon = True
                    self._started.start()
            case RunGolden():
                self._say(
                    GoldenDone(
                        model=command.model,
                        digest=command.digest,
                        trial=command.trial,
                        passed=False,
                        reason=reasons.ENGINE_MISSING,
                        detail=self._why,
                    )
                )

    def _say(self, message: msgspec.Struct) -> None:
        try:
            self._writer.write(encode_line(message))
        except OSError as error:
            log.warning("an event could not be sent: %s", error)

    def _start(self) -> None:
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        for end in self._take_over:
            threading.Thread(target=self._take_from, args=(end,), name="take-over", daemon=True).start()

    def _accept(self) -> None:
        poll = select.poll()
        by_fd = {listener.fileno(): listener for listener in self._listeners}
        for fd, listener in by_fd.items():
            listener.setblocking(False)  # as every worker has it: they share the flag
            poll.register(fd, select.POLLIN)
        while not self._closed:
            for fd, _ in poll.poll(POLL_MS):
                try:
                    connection, _ = by_fd[fd].accept()
                except (BlockingIOError, ConnectionAbortedError):  # the client is gone
                    continue
                except OSError as error:
                    log.error("accept failed: %s", error)
                    time.sleep(ACCEPT_PAUSE_SECONDS)
                    continue
                self._talk(connection)

    def _take_from(self, end: socket.socket) -> None:
        with end:
            for connection in passing.taken(end):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        self._talkers.acquire()
        try:
            threading.Thread(target=self._answer, args=(connection,), name="http", daemon=True).start()
        except RuntimeError as error:  # no thread can be had in this moment
            log.error("a client is hung up on: %s", error)
            connection.close()
            self._talkers.release()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(REQUEST_SECONDS_MAX)
                _Handler(connection, self._why)
                connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            log.debug("a client is gone: %s", error)
        finally:
            self._talkers.release()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    def __init__(self, connection: socket.socket, why: str) -> None:
        self._why = why
        super().__init__(connection, "local", None)  # type: ignore[arg-type]

    def handle_one_request(self) -> None:
        """Answer any method and path."""
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                return
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), COMMAND_BYTES_MAX))
        except (TimeoutError, ValueError):  # it never ends, or does not say where
            return
        finally:
            self.close_connection = True
        alive = self.path.partition("?")[0] == "/v2/health/live"
        said: dict[str, Any] = (
            {"live": True}
            if alive
            else {"error": f"no engine: {self._why} (so: no model is served here; next: {NEXT_STEP})"}
        )
        body = msgspec.json.encode(said)
        self.send_response(HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the library
        """Say nothing: every request would be a line."""
