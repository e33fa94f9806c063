"""What the supervisor reads of the machine it runs on: memory, temperature, and the facts that a child finds out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wherry_agent import lean
from wherry_agent.canary_exit import status_bytes
from wherry_agent.conditions import Conditions
from wherry_shared.errors import DeviceError
from wherry_shared.facts import DeviceFacts

PROBE_SECONDS_MAX = 180.0
METERED_SECONDS_MAX = 5.0
METERED_COMMAND = (
    "busctl",
    "get-property",
    "org.freedesktop.NetworkManager",
    "/org/freedesktop/NetworkManager",
    "org.freedesktop.NetworkManager",
    "Metered",
)
"""Answers `u N`: 1 and 3 are yes and a guess at it, 2 and 4 no (NetworkManager's NMMetered)."""
_M_ARENA_MAX = -8
"""`mallopt` parameter of glibc (malloc.h)."""


def ask_facts(home: Path, engines: Sequence[str], labels: dict[str, str]) -> DeviceFacts:
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


def ask_installed_engines() -> str:
    """Return what changes when an engine is installed, replaced or removed; empty if it cannot be found out."""
    argv = [sys.executable, "-m", "wherry_agent.facts", "--installed"]
    try:
        return subprocess.run(argv, stdout=subprocess.PIPE, timeout=PROBE_SECONDS_MAX, check=True, text=True).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""  # the probe, which imports them, is asked instead


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
    """Return what this process takes: resident bytes, threads, and descriptors."""
    return {
        "resident_bytes": status_bytes(os.getpid(), "VmRSS"),
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def modules() -> list[str]:
    """Return the modules that this process holds."""
    unused = {*lean.deferred(), *lean.BLOCKED}
    return sorted(name for name in tuple(sys.modules) if name not in unused)


def temperature_c(sys_folder: str = "/sys") -> float | None:
    """Return the hottest thermal zone in °C, None where the kernel has none."""
    found = []
    for path in Path(sys_folder, "class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue  # a sensor that cannot be read now
    return max(found) if found else None


@dataclass(frozen=True, slots=True)
class Power:
    """Where the current comes from."""

    mains: bool | None
    """None if nothing says so."""
    battery: bool
    percent: int | None


def power(sys_folder: str = "/sys") -> Power:
    """Read the power supplies that feed this device; batteries of mice and pens do not."""
    online: list[bool] = []
    batteries: list[tuple[str, int | None]] = []
    for folder in sorted(Path(sys_folder, "class/power_supply").glob("*")):
        kind = _word(folder / "type")
        if kind == "Battery" and _word(folder / "scope") != "Device":
            text = _word(folder / "capacity")
            batteries.append((_word(folder / "status"), int(text) if text.isdigit() else None))
        elif kind not in ("", "Battery"):
            online.append(_word(folder / "online") == "1")
    mains: bool | None = any(online) if online else None
    if mains is None and batteries:
        mains = all(status in ("Charging", "Full", "Not charging") for status, _ in batteries)
    known = [percent for _, percent in batteries if percent is not None]
    return Power(mains, bool(batteries), min(known) if known else None)


def _word(path: Path) -> str:
    """Return what a file of the kernel says, empty if it says nothing."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


class Metered:
    """Whether the network costs by volume; asked in a thread at most once a minute, so that nobody waits for it."""

    def __init__(self, settings: Conditions) -> None:
        self._settings = settings
        self._asked_s = time.monotonic()
        self._known = self._ask()

    @property
    def known(self) -> bool | None:
        """What is known now, None for nothing."""
        if time.monotonic() - self._asked_s > self._settings.check_s / 2:
            self._asked_s = time.monotonic()
            with contextlib.suppress(RuntimeError):  # no thread can be had in this moment: what is known stands
                threading.Thread(target=self._ask_again, name="metered", daemon=True).start()
        return self._known

    def _ask_again(self) -> None:
        self._known = self._ask()

    def _ask(self) -> bool | None:
        settings = self._settings
        if settings.metered != "auto":
            return settings.metered == "yes"
        if settings.metered_file:
            return {"yes": True, "no": False}.get(_word(Path(settings.metered_file)).lower())
        try:
            said = subprocess.run(METERED_COMMAND, capture_output=True, timeout=METERED_SECONDS_MAX, check=True)
        except (OSError, subprocess.SubprocessError):
            return None  # no NetworkManager here
        return {b"u 1": True, b"u 3": True, b"u 2": False, b"u 4": False}.get(said.stdout.strip())


def local(wall_s: float) -> tuple[int, int]:
    """Return (weekday, 0 for Monday; minute of the day) of a wall time, in this device's zone."""
    found = time.localtime(wall_s)
    return found.tm_wday, found.tm_hour * 60 + found.tm_min
