"""Roles as forks of a process that has imported already what they share.

Most of what a role takes to start is importing; a fork has it, and its memory is shared. It imports the rest and waits at a
gate until its parent has made everything ready. Only from a process without threads, and before any database or blob
store was opened: what those hold does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from wherry_server import roles
from wherry_server.settings import Role, Settings
from wherry_shared.errors import WherryError

POSSIBLE = sys.platform == "linux"
"""Elsewhere system libraries may not survive a fork."""


class Gate:
    """Holds children back until it is opened; those whose parent ends or gives up before end too."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        self._waiting = 0

    def expect(self) -> None:
        """Count one that will wait."""
        self._waiting += 1

    def wait(self) -> None:
        """In a child: return when the gate is opened."""
        os.close(self._in)
        if not os.read(self._out, 1):
            sys.exit("the parent gave up before everything was ready")
        os.close(self._out)

    def open(self) -> None:
        """In the parent: let everybody pass."""
        os.write(self._in, b"." * self._waiting)

    def close(self) -> None:
        """In the parent: it is needed no more."""
        os.close(self._in)
        os.close(self._out)


class Forked:
    """A forked child with as much of the face of `subprocess.Popen` as supervision asks for."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=body)
        self._process.start()

    @property
    def returncode(self) -> int:
        """Exit code, negative for a signal; only once it ended."""
        code = self._process.exitcode
        assert code is not None
        return code

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode


def start(role: Role, settings: Settings, log: Path, gate: Gate, lock: IO[str]) -> Forked:
    """Fork a role, which writes to `log`, waits at the gate, and leaves the lock to its parent."""
    parent = os.getpid()
    gate.expect()

    def body() -> None:
        os.setpgid(0, 0)  # Ctrl-C reaches the parent only
        lock.close()
        with log.open("ab") as out:
            os.dup2(out.fileno(), sys.stdout.fileno())
            os.dup2(out.fileno(), sys.stderr.fileno())
        os.environ[roles.PARENT] = str(parent)
        roles.die_with_parent()
        roles.load(role, settings)
        gate.wait()
        try:
            roles.run(role, settings)
        except WherryError as error:
            sys.exit(error.diagnostics())

    return Forked(body)
