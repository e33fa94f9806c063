"""`python -m wherry_agent.facts`: find out what this device is, in a process of its own, and print it as JSON.

The supervisor imports no engine, so it asks this child. Everything here is read, nothing is guessed: an engine is there
if it ran a tiny model, a CPU feature if the kernel says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path

import msgspec

from wherry_agent import __version__, readings
from wherry_shared.facts import FEATURES, DeviceFacts


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
        memory_bytes=readings.memory_bytes("MemTotal"),
        disk_free_bytes=shutil.disk_usage(home if home.exists() else Path("/")).free,
        engines=probe(engines or None),
        timezone=time.tzname[0],
    )


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


def installed_engines() -> dict[str, str]:
    """Return engine, or what engines need → version and time of installation, without importing any (which takes seconds)."""
    from importlib import metadata

    from wherry_shared.engines import ENGINES

    found = {}
    for name in (*ENGINES, "numpy"):
        try:
            distribution = metadata.distribution(name)
            record = distribution.locate_file(f"{name.replace('-', '_')}-{distribution.version}.dist-info")
            changed = Path(str(record)).stat().st_mtime_ns
        except (metadata.PackageNotFoundError, OSError):
            continue
        found[name] = f"{distribution.version} {changed}"
    return found


def main() -> None:
    """Print the facts of this device; with `--installed` only which engines lie on its disk."""
    if sys.argv[1:] == ["--installed"]:
        sys.stdout.buffer.write(msgspec.json.encode(installed_engines()) + b"\n")
        return
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/")
    engines = [name for name in (sys.argv[2] if len(sys.argv) > 2 else "").split(",") if name]
    sys.stdout.buffer.write(msgspec.json.encode(gather(home, engines)) + b"\n")


if __name__ == "__main__":
    main()
