"""Other people's programs under limits: a process group of its own, with an end to its time and its memory.

    ended = confined.run([python, "-m", "onnx2tf", ...], seconds_max=600.0, memory_bytes_max=8 * 2**30)

What becomes of the program is a value, not an exception. Limits of memory are set by `python -m wherry_optimizer.confined`,
which then becomes the program: a process with threads must not run Python between fork and exec.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TOLD_CHARS_MAX = 300


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
        env={**os.environ, **(environment or {})},
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
    last = " ".join(told.strip().splitlines()[-1:])[:TOLD_CHARS_MAX]
    if "MemoryError" in last or "bad_alloc" in last or child.returncode == -signal.SIGKILL:
        why = f"it took more than {memory_bytes_max / 1e9:.1f} GB of memory ({last or 'killed'})"
        return Ended("memory", why, out, told, seconds)
    name = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit status {child.returncode}"
    return Ended("crashed", f"its process ended with {name}: {last}", out, told, seconds)


def limit_memory(bytes_max: int) -> None:
    """Limit this process's data; where the platform has no such limit, time is limited still."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (bytes_max, bytes_max))


def main() -> None:
    """Become the program: BYTES PROGRAM ARGUMENT…."""
    limit_memory(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - its arguments are a list, and this process only sets limits


if __name__ == "__main__":
    main()
