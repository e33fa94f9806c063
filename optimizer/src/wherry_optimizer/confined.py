"""Other people's programs under limits: a process group of its own, with an end to its time and its memory.

    ended = confined.run([python, "-m", "onnx2tf", ...], seconds_max=600.0, memory_bytes_max=8 * 2**30)

What becomes of the program is a value, not an exception. Limits of memory are set by `python -m wherry_optimizer.confined`,
which then becomes the program: a process with threads must not run Python between fork and exec.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

TOLD_CHARS_MAX = 300
TOLD_BYTES_MAX = 64 * 2**10
"""Of the end of what a worker wrote to stderr."""
ANSWER_PART_BYTES = 2**16
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of `linux/prctl.h`."""
PARENT = "WHERRY_CONFINED_BY"
"""Variable with the id of the process that watches over a program."""
DYING_SECONDS_MAX = 10.0
"""Between a worker's last word and its end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a program."""

    how: Literal["well", "timeout", "memory", "crashed"]
    why: str
    """A sentence about it; empty where it ended well."""
    out: bytes
    told: str
    """What it wrote to stderr."""
    seconds: float


def run(
    command: Sequence[str | Path],
    *,
    seconds_max: float,
    memory_bytes_max: int,
    given: bytes = b"",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limited: bool = False,
) -> Ended:
    """Run a program to its end, or to the end of its time.

    Args:
        command: program and arguments.
        seconds_max: then its whole process group is killed.
        memory_bytes_max: of data, for each of its processes.
        given: its standard input.
        folder: where it runs.
        environment: beside this process's own variables.
        limited: the program sets its limit of memory itself.
    """
    wrapped = [] if limited else [sys.executable, "-P", "-m", "wherry_optimizer.confined", str(memory_bytes_max)]
    began = time.monotonic()
    child = subprocess.Popen(
        [*wrapped, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, **(environment or {}), PARENT: str(os.getpid())},
        start_new_session=True,
    )
    try:
        out, heard = child.communicate(given, timeout=seconds_max)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        out, heard = child.communicate()
        why = f"it took more than {seconds_max:.0f} s"
        return Ended("timeout", why, out, heard.decode(errors="replace"), time.monotonic() - began)
    seconds, told = time.monotonic() - began, heard.decode(errors="replace")
    if child.returncode == 0:
        return Ended("well", "", out, told, seconds)
    return _died(child.returncode, told, seconds, memory_bytes_max, out)


def _died(status: int, told: str, seconds: float, memory_bytes_max: int, out: bytes = b"") -> Ended:
    """Tell what a program died of, by its exit status and the last line of what it wrote to stderr."""
    last = " ".join(told.strip().splitlines()[-1:])[:TOLD_CHARS_MAX]
    if "MemoryError" in last or "bad_alloc" in last or status == -signal.SIGKILL:
        why = f"it took more than {memory_bytes_max / 1e9:.1f} GB of memory ({last or 'killed'})"
        return Ended("memory", why, out, told, seconds)
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return Ended("crashed", f"its process ended with {name}: {last}", out, told, seconds)


class Worker:
    """A program that answers lines with lines and sets its limit of memory itself; begun again after it died."""

    def __init__(self, command: Sequence[str | Path], memory_bytes_max: int) -> None:
        """Say what program; it is begun by the first question, or by `begin`.

        Args:
            command: program and arguments.
            memory_bytes_max: what it limits itself to, for the words about its end.
        """
        self._command = command
        self._memory_bytes_max = memory_bytes_max
        self._child: subprocess.Popen[bytes] | None = None
        self._heard: IO[bytes] | None = None

    def begin(self) -> subprocess.Popen[bytes]:
        """Start the program, if it is not there."""
        if self._child is None:
            self._heard = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the program lives
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._heard,
                bufsize=0,
                env={**os.environ, PARENT: str(os.getpid())},
                start_new_session=True,
            )
        return self._child

    def ask(self, line: bytes, seconds_max: float) -> Ended:
        """Give the program a line and wait for its answer.

        Args:
            line: without an end.
            seconds_max: then its whole process group is killed.
        """
        child, began, answer = self.begin(), time.monotonic(), bytearray()
        assert child.stdin is not None and child.stdout is not None  # noqa: PT018 - both are pipes
        with contextlib.suppress(BrokenPipeError):  # it is dead: what of, is told below
            child.stdin.write(line + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not answer.endswith(b"\n"):
                left = began + seconds_max - time.monotonic()
                if not selector.select(max(left, 0.0)):
                    self.close()
                    return Ended("timeout", f"it took more than {seconds_max:.0f} s", b"", "", seconds_max)
                part = os.read(child.stdout.fileno(), ANSWER_PART_BYTES)
                if not part:
                    return self._dead(child, began)
                answer += part
        return Ended("well", "", bytes(answer), "", time.monotonic() - began)

    def _dead(self, child: subprocess.Popen[bytes], began: float) -> Ended:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its output and lives: `close` kills it
            child.wait(DYING_SECONDS_MAX)
        assert self._heard is not None
        self._heard.seek(max(self._heard.seek(0, os.SEEK_END) - TOLD_BYTES_MAX, 0))
        told = self._heard.read().decode(errors="replace")
        self.close()
        return _died(child.returncode, told, time.monotonic() - began, self._memory_bytes_max)

    def close(self) -> None:
        """End the program and what it started; the next question begins another."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for file in (child.stdin, child.stdout, self._heard):
            if file is not None:
                file.close()


def limit_memory(bytes_max: int) -> None:
    """Limit this process's data; where the platform has no such limit, time is limited still."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (bytes_max, bytes_max))


def die_with_parent() -> None:
    """End this process when the one that watches over it ends: nobody else would, whatever it does and however long.

    The kernel does it (`prctl`, PR_SET_PDEATHSIG), since a thread that looked for the parent would wait for native code that
    holds the interpreter. The signal comes when the *thread* ends that began this process; those here wait for it. Where
    the platform has no such thing, what is confined ends by itself.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):  # it ended before this was said
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Become the program: BYTES PROGRAM ARGUMENT…."""
    die_with_parent()
    limit_memory(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - its arguments are a list, and this process only sets limits


if __name__ == "__main__":
    main()
