"""Child processes of a demo or a test: started with a log file of their own, ended by id, waited for with a deadline."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from wherry_shared.errors import UnreachableError

STOP_S = 15.0
"""How long a child may take to end after SIGTERM before it is killed."""
T = TypeVar("T")


def free_port() -> int:
    """Return a loopback TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_for(what: str, probe: Callable[[], T | None], seconds: float, *, every_s: float = 0.1) -> T:
    """Ask `probe` until it returns something true, and return that.

    Raises:
        UnreachableError: `timeout`, when `seconds` have passed; the last exception of the probe is its cause.
    """
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while True:
        try:
            found = probe()
        except (OSError, ValueError, LookupError, UnreachableError) as error:
            last, found = error, None
        if found:
            return found
        if time.monotonic() > deadline:
            raise UnreachableError("timeout", f"waited {seconds:.0f} s for {what}") from last
        time.sleep(every_s)


class Child:
    """A Python module run as a child process, its output in a file."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        self._arguments = [sys.executable, "-m", *arguments]
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Child:
        """Start (again), appending to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, start_new_session=True
            )
        return self

    @property
    def pid(self) -> int:
        """The process id.

        Raises:
            RuntimeError: it was never started.
        """
        if self.process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self.process.pid

    def alive(self) -> bool:
        """Tell whether it runs."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL it: what a crash looks like."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=STOP_S)

    def stop(self) -> int | None:
        """SIGTERM, then SIGKILL after `STOP_S`; return the exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=STOP_S)
        return self.process.returncode

    def tail(self, lines: int = 20) -> str:
        """Return the last lines of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""
