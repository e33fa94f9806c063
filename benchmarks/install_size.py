"""Disk that a device's install takes: wherry-shared and wherry-agent with all dependencies and compiled files, no engine.

Run: `python benchmarks/install_size.py` (needs a package index, as a device does). Builds the wheels (`make dist`), makes
a bare virtual environment without pip, installs `wherry-agent` into it from the wheels and the index, compiles every
file, and counts the bytes that the files occupy. The interpreter itself is not counted: a device has it.

Writes `build/bench/install_size.json`: `install_size_mb` (MiB, allocated blocks), and the parts. Bound: 32.
"""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIB = 1024 * 1024
BLOCK_BYTES = 512


def occupied_bytes(folder: Path) -> Counter[str]:
    """Return what each part of a site-packages folder occupies: its files' blocks, folders included."""
    found: Counter[str] = Counter()
    for path in folder.rglob("*"):
        found[path.relative_to(folder).parts[0]] += path.lstat().st_blocks * BLOCK_BYTES
    return found


def install(folder: Path) -> Path:
    """Install the agent from the wheels into a bare environment; return its site-packages."""
    venv.create(folder, with_pip=False)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    target = ["--prefix", str(folder), "--ignore-installed", "--no-compile", "--find-links", str(ROOT / "dist")]
    subprocess.run([*pip, *target, "wherry-agent"], check=True)
    compileall.compile_dir(site_packages, quiet=2, workers=1)
    return site_packages


def main() -> None:
    """Measure and write the result."""
    subprocess.run(["make", "dist", f"VENV={Path(sys.prefix)}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="wherry-size-") as name:
        parts = occupied_bytes(install(Path(name)))
    result = {
        "install_size_mb": round(sum(parts.values()) / MIB, 1),
        "parts_mb": {part: round(size / MIB, 2) for part, size in parts.most_common() if size > MIB // 20},
    }
    target = ROOT / "build" / "bench" / "install_size.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
