"""The supervisor's side of a canary: how to start one, and what its death means. No numpy, no engine.

A canary that ends with a `Judged` line spoke for itself. One that died did not, and how it died is the verdict.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from wherry_agent import leash
from wherry_shared import reasons
from wherry_shared.limits import ALLOCATOR

NEAR_LIMIT = 0.9
"""A canary killed with its peak at or above this share of its limit ran out of memory (contracts.md §6)."""
GRACE_S = 10.0
"""The canary ends itself at `Judge.seconds_max`; this much later its parent kills it."""

ENGINE_BYTES = 40 * 1024 * 1024
"""What a canary takes before it loads anything (measured: 38 to 65 MB); the low end, so that no death by memory is missed."""


def child_environment() -> dict[str, str]:
    """Return the environment for workers and canaries: this one, with an allocator that gives memory back."""
    return {**os.environ, **ALLOCATOR, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def peak_of(pid: int) -> int:
    """Return the peak resident bytes (VmHWM) of a living process, 0 if it is gone. Sample it while a canary runs."""
    return status_bytes(pid, "VmHWM")


def status_bytes(pid: int, field: str) -> int:
    """Return a field of /proc/PID/status in bytes, 0 if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def classify_exit(
    returncode: int, peak: int, limit: int, *, timed_out: bool = False, out_of_memory: bool = False
) -> tuple[str, str]:
    """Say what the death of a canary without a verdict means.

    Args:
        returncode: as `subprocess.Popen.returncode`: negative for a signal.
        peak: highest `peak_of` seen (bytes), 0 if it was never seen.
        limit: `Judge.memory_bytes_max`: bytes above what the process needs with its engine imported, 0 for no limit.
        timed_out: its parent killed it because it overran.
        out_of_memory: the kernel says that it killed it for its memory.

    Returns:
        (reason, detail); the reason is a verdict of `wherry_shared.reasons`, but for `engine_missing`.
    """
    if returncode == leash.UNAVAILABLE:
        return reasons.ENGINE_MISSING, "the canary cannot import what engines need; the agent's log names the package"
    if timed_out:
        return reasons.TIMEOUT, "the canary did not end in time and was killed"
    if out_of_memory:
        return reasons.OVER_MEMORY, f"the kernel ended the canary for its memory, {limit} allowed above the engine"
    near = limit > 0 and peak - ENGINE_BYTES >= NEAR_LIMIT * limit
    if returncode < 0:
        name = _signal_name(-returncode)
        # SIGKILL without us is the kernel's out-of-memory killer; abort and a null pointer are how native code takes
        # a failed allocation
        if near and -returncode in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
            return (
                reasons.OVER_MEMORY,
                f"the canary died of {name} with {peak} bytes in use, {limit} allowed above the engine",
            )
        return reasons.CRASH, f"the canary died of {name}"
    return reasons.CRASH, f"the canary ended with exit code {returncode} and no verdict"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
