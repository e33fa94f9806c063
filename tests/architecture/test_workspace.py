"""What holds for the repository as a whole."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMBERS = ("shared", "optimizer", "server", "agent", "simulators")


def test_all_members_carry_one_version() -> None:
    versions = {
        member: tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]["version"]
        for member in MEMBERS
    }
    assert len(set(versions.values())) == 1
    for member, version in versions.items():
        assert importlib.import_module(f"wherry_{member}").__version__ == version


@pytest.mark.parametrize("script", ["wherry", "wherry-optimizer", "wherry-agent", "wherry-sim"])
def test_every_console_script_of_the_members_answers_help(script: str) -> None:
    for member in MEMBERS:
        scripts = tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"].get("scripts", {})
        if script in scripts:
            module, function = scripts[script].split(":")
            code = f"import sys; from {module} import {function} as main; sys.argv = ['{script}', '--help']; sys.exit(main())"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert "usage" in done.stdout.lower()
            return
    pytest.fail(f"no member installs {script}")


FORBIDDEN_ON_THE_SUPERVISOR = (
    "numpy",
    "onnxruntime",
    "cryptography",
    "tuf",
    "asyncio",
    "pydantic",
    "requests",
    "httpx",
)


def test_importing_the_supervisor_loads_nothing_heavy() -> None:
    code = "import sys, wherry_agent.daemon; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "wherry_agent.daemon" in loaded
    assert not loaded & set(FORBIDDEN_ON_THE_SUPERVISOR)


def test_requirements_are_hashed_and_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("python-*.txt"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        pins = [line for line in lines if "==" in line]
        assert len(pins) > 90
        assert all(line.endswith("\\") for line in pins)
        assert not [line for line in lines if "://" in line or line.startswith(("-i", "--index", "--extra", "--find"))]
