"""What holds for the repository as a whole."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.agent.daemon_kit import agent, site
from tests.shared.engines import models
from wherry_agent import status

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
    "urllib3",
    # light to write, heavy to hold: what these are needed for is done by children, or never
    "argparse",
    "email",
    "http.client",
    "inspect",
    "shutil",
    "tarfile",
    "tempfile",
    "tomllib",
    "typing_extensions",
    "urllib.request",
    "wherry_agent.cli",
    "wherry_agent.courier_http",
    "wherry_shared.engines",
    "zstandard",
)


def test_a_running_supervisor_holds_nothing_heavy(tmp_path: Path) -> None:
    with site(tmp_path) as server, agent(server, "light") as device:
        server.release("1.0.0", models.scale(tmp_path / "one.onnx", 2.0))
        device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        server.deploy("1.0.0", "light", trial_s=2)
        device.until_serves("1.0.0")
        shown = device.until("trust is in order", lambda known: known["trust"] == "ok")
        loaded = set((status.question(device.home, "modules") or {})["modules"])
        assert device.stop() == 0
    assert {"wherry_agent.daemon", "paho.mqtt.client"} <= loaded
    assert not loaded & set(FORBIDDEN_ON_THE_SUPERVISOR)
    assert shown["process"]["resident_bytes"] > 0


def test_requirements_are_hashed_and_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("python-*.txt"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        pins = [line for line in lines if "==" in line]
        assert len(pins) > 90
        assert all(line.endswith("\\") for line in pins)
        assert not [line for line in lines if "://" in line or line.startswith(("-i", "--index", "--extra", "--find"))]
