"""Child processes that belong together: started, watched, restarted with back-off, and ended in reverse order."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wherry_server.forked import Forked
from wherry_server.roles import PARENT

BACK_OFF_FIRST_S = 0.5
BACK_OFF_MAX_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A child that lived this long starts again without back-off from earlier ends."""
END_GRACE_S = 10.0
"""How long a child may take to end before it is killed."""
LOG_BYTES_MAX = 10_000_000
"""A child's log beyond this is set aside as `.1` when the child starts."""
TAIL_LINES = 12


@dataclass(slots=True)
class Child:
    """One process and how often it had to be started again."""

    name: str
    command: Sequence[str]
    log: Path
    fork: Callable[[], Forked] | None = None
    """How it starts the first time, quicker than by its command."""
    process: subprocess.Popen[bytes] | Forked | None = None
    started_at: float = 0.0
    restarts: int = 0
    failures: int = 0
    """Ends in a row before it was healthy: decides the back-off."""
    start_again_at: float = field(default=0.0)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process in a process group of its own, so that Ctrl-C reaches the parent only."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES_MAX:
            self.log.replace(self.log.with_suffix(".log.1"))
        fork, self.fork = self.fork, None
        self.started_at = time.monotonic()
        if fork is not None:
            self.process = fork()
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                env={**os.environ, PARENT: str(os.getpid())},
            )

    def tail(self) -> str:
        """Return the last lines of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        except FileNotFoundError:
            return ""


class Supervisor:
    """Keeps children running until it is told to end them."""

    def __init__(self, children: Sequence[Child], say: Callable[[str], None]) -> None:
        self.children = list(children)
        self._say = say

    def start(self) -> None:
        """Start every child."""
        for child in self.children:
            child.start()

    def turn(self) -> None:
        """Look after every child once: note ends, start again what is due."""
        now = time.monotonic()
        for child in self.children:
            if child.running:
                continue
            if child.process is not None:
                code = child.process.returncode
                child.process = None
                lived = now - child.started_at
                child.failures = 0 if lived >= HEALTHY_AFTER_S else child.failures + 1
                wait = back_off_s(child.failures)
                child.restarts += 1
                child.start_again_at = now + wait
                self._say(
                    f"{child.name} ended ({_describe(code)}) after {lived:.0f} s; restart {child.restarts} "
                    f"in {wait:.1f} s; log: {child.log}"
                )
            elif now >= child.start_again_at:
                child.start()

    def stop(self) -> None:
        """End the children in reverse order; one that does not obey is killed."""
        for child in reversed(self.children):
            if child.process is None:
                continue
            if child.running:
                child.process.terminate()
            try:
                child.process.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                self._say(f"{child.name} did not end within {END_GRACE_S:.0f} s and was killed")
                child.process.kill()
                child.process.wait()
            child.process = None


def back_off_s(failures: int) -> float:
    """Return how long to wait before the next start, after so many failures in a row."""
    if failures == 0:
        return 0.0
    return float(min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2 ** (min(failures, 20) - 1)))


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"
