"""Environments of tools that cannot live beside this one's: made once, by pip, below the user's cache folder.

A tool pins what it needs, another Python among it; it is run as a program and never imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wherry_shared.errors import RefusedError

PROBE_SECONDS_MAX = 30.0
INSTALL_SECONDS_MAX = 1800.0


@dataclass(frozen=True, slots=True)
class Tool:
    """What is installed, and on which Python."""

    name: str
    requirements: tuple[str, ...]
    python_min: tuple[int, int]
    about: str


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "onnx2tf",
            # pins all that it needs itself; on an older Python pip takes an old release, with TensorFlow
            ("onnx2tf==2.6.9",),
            (3, 12),
            "ONNX to TFLite without TensorFlow, about 660 MB",
        ),
    )
}


def home() -> Path:
    """Return the folder of all environments."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "wherry" / "environments"


def find(name: str) -> Path:
    """Return the interpreter of a tool's environment.

    Raises:
        RefusedError: `environment_missing`, with the command that makes it.
    """
    python = home() / name / "bin" / "python"
    if not (home() / name / _mark(TOOLS[name])).exists():
        raise RefusedError(
            "environment_missing",
            f"{name} is not installed ({home() / name})",
            consequence="nothing was done",
            next_step=f"run wherry-optimizer env {name}, which needs Python {_text(TOOLS[name].python_min)} or newer",
        )
    return python


def make(name: str, python: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """Make a tool's environment, if it is not there, and return its interpreter.

    Args:
        name: of `TOOLS`.
        python: the interpreter to make it from; by default this one or one on the path that is new enough.
        say: told each step in a sentence.

    Raises:
        RefusedError: `environment_unknown`, `environment_python` (no Python is new enough) or `environment_failed`.
    """
    if name not in TOOLS:
        raise RefusedError("environment_unknown", f"there is no tool {name!r}", next_step=f"use {', '.join(TOOLS)}")
    tool, folder = TOOLS[name], home() / name
    if (folder / _mark(tool)).exists():
        return folder / "bin" / "python"
    base = _interpreter(tool, python)
    shutil.rmtree(folder, ignore_errors=True)
    say(f"installing {', '.join(tool.requirements)} into {folder}")
    own = folder / "bin" / "python"
    pip: list[str | Path] = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *tool.requirements]
    venv: list[str | Path] = [base, "-m", "venv", folder]
    for command in (venv, pip):
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=False)
        if done.returncode:
            last = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])[:300]
            raise RefusedError(
                "environment_failed",
                f"{name} could not be installed: {last}",
                consequence="no conversion is possible; everything else works as before",
                next_step="see that pip reaches its index, and that the disk has 1 GB left; then run it again",
            )
    (folder / _mark(tool)).touch()
    return own


def _mark(tool: Tool) -> str:
    """The file that says that the environment is whole, and what for: another release's is made anew."""
    return ".complete " + " ".join(tool.requirements)


def _interpreter(tool: Tool, given: Path | None) -> Path:
    names = [str(given)] if given else [sys.executable, *(f"python3.{minor}" for minor in range(14, 10, -1)), "python3"]
    ask = f"import sys; sys.exit(sys.version_info < {tool.python_min})"
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        # what a version manager puts on the path may name a Python that is not there
        if not subprocess.run(
            [path, "-c", ask], capture_output=True, timeout=PROBE_SECONDS_MAX, check=False
        ).returncode:
            return Path(path)
    where = str(given) if given else "this machine"
    raise RefusedError(
        "environment_python",
        f"{tool.name} needs Python {_text(tool.python_min)} or newer, which {where} is not"
        if given
        else f"{tool.name} needs Python {_text(tool.python_min)} or newer, and none is on the path",
        consequence="nothing was installed",
        next_step="install one, and name it: --python /path/to/python3.12",
    )


def _text(version: tuple[int, int]) -> str:
    return ".".join(str(part) for part in version)
