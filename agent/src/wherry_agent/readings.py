"""What the supervisor reads of the machine it runs on: memory, temperature, and the facts that a child finds out."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from wherry_agent import lean
from wherry_shared.errors import DeviceError
from wherry_shared.facts import DeviceFacts

PROBE_SECONDS_MAX = 180.0
_M_ARENA_MAX = -8
"""`mallopt` parameter of glibc (malloc.h)."""


def ask_facts(home: Path, engines: list[str], labels: dict[str, str]) -> DeviceFacts:
    """Ask a child for the facts.

    Raises:
        DeviceError: `facts_failed`.
    """
    argv = [sys.executable, "-m", "wherry_agent.facts", str(home), ",".join(engines)]
    try:
        run = subprocess.run(argv, stdout=subprocess.PIPE, timeout=PROBE_SECONDS_MAX, check=True)
        facts = msgspec.json.decode(run.stdout, type=DeviceFacts)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        raise DeviceError(
            "facts_failed",
            f"this device cannot be described: {error}",
            consequence="no bundle can be chosen for it",
            next_step="run python -m wherry_agent.facts and see what it says",
        ) from error
    return msgspec.structs.replace(facts, labels=labels)


def use_one_arena() -> None:
    """Let all threads of this process share one malloc arena, which saves a MB; to be called before there are any."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; other C libraries have no arenas
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Return what importing and starting left free to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def memory_bytes(field: str) -> int:
    """Return a field of /proc/meminfo in bytes, 0 if the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0  # not Linux, or not a number: then memory is not a fact
    return 0


def process() -> dict[str, object]:
    """Return what this process takes: resident bytes, threads, descriptors, and the modules that it holds."""
    resident = 0
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            resident = int(line.split()[1]) * 1024
    unused = {*lean.deferred(), *lean.BLOCKED}
    return {
        "resident_bytes": resident,
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "modules": sorted(name for name in sys.modules if name not in unused),
    }


def temperature_c() -> float | None:
    """Return the hottest thermal zone in °C, None where the kernel has none."""
    found = []
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue  # a sensor that cannot be read now
    return max(found) if found else None
