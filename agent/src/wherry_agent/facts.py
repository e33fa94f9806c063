"""`python -m wherry_agent.facts`: find out what this device is, in a process of its own, and print it as JSON.

The supervisor imports no engine, so it asks this child. Everything here is read, nothing is guessed: an engine is there
if it ran a tiny model, a CPU feature if the kernel says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from wherry_agent import __version__
from wherry_shared.errors import DeviceError
from wherry_shared.facts import FEATURES, DeviceFacts

PROBE_SECONDS_MAX = 180.0


def read(home: Path, engines: list[str], labels: dict[str, str]) -> DeviceFacts:
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


def gather(home: Path, engines: list[str]) -> DeviceFacts:
    """Look at this machine; `engines` restricts which engines are probed, empty for all."""
    from wherry_shared.engines import probe

    cpu_model, flags = _cpu()
    return DeviceFacts(
        arch=platform.machine(),
        os=_os_name(),
        python=platform.python_version(),
        agent=__version__,
        cpu_model=cpu_model,
        cpu_features=[feature for feature in FEATURES if feature in flags],
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory("MemTotal"),
        disk_free_bytes=shutil.disk_usage(home if home.exists() else Path("/")).free,
        engines=probe(engines or None),
        timezone=time.tzname[0],
    )


def memory(field: str) -> int:
    """Return a field of /proc/meminfo in bytes, 0 if the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0  # not Linux, or not a number: then memory is not a fact
    return 0


def temperature_c() -> float | None:
    """Return the hottest thermal zone in °C, None where the kernel has none."""
    found = []
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue  # a sensor that cannot be read now
    return max(found) if found else None


def _cpu() -> tuple[str, set[str]]:
    """Return the CPU's name and its flags (x86: `flags`, ARM: `Features`)."""
    name, flags = platform.processor(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
        elif key.strip() == "model name":
            name = value.strip()
    return name, flags


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def main() -> None:
    """Print the facts of this device."""
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/")
    engines = [name for name in (sys.argv[2] if len(sys.argv) > 2 else "").split(",") if name]
    sys.stdout.buffer.write(msgspec.json.encode(gather(home, engines)) + b"\n")


if __name__ == "__main__":
    main()
