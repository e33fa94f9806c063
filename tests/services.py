"""Programs that tests need beside Python: a missing one skips the test, or fails it where everything has to be there."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NoReturn

import pytest

REQUIRED = "WHERRY_REQUIRE_SERVICES"
"""Set to 1 by `.ci/run`, which installs the programs first: then a skip would hide a hole."""


def needs(*programs: str) -> None:
    """Go on only if every program is on the path."""
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    lacks(f"not installed: {', '.join(missing)}")


def lacks(why: str) -> NoReturn:
    """Skip a test for what this machine lacks, or fail it where everything has to be there."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{why} ({REQUIRED}=1)")
    pytest.skip(why)


def needs_private_mounts() -> None:
    """Go on only where this user may mount things that nobody else sees: root, as a rule."""
    needs("unshare", "mount")
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, timeout=30)
    if done.returncode:
        lacks(f"no mounts of its own for this user: {done.stderr.strip()}")


def needs_network_namespaces() -> None:
    """Go on only where this user may make network namespaces and cables between them: root, as a rule."""
    needs("ip")
    name = f"wherry-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
    if done.returncode:
        lacks(f"no network namespaces for this user: {done.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", name], check=True, timeout=30)
