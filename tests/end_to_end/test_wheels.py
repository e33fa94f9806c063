"""The agent from wheels alone: in a bare environment, without uv, without the other members, it enrols and serves.

The short form gives the environment what the wheels declare, out of the environment that the tests run in, and nothing
else; the long form lets pip install it all from an index, as a device does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.agent.daemon_kit import Agent, Site, site
from tests.shared.engines import models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` builds of the two members that a device installs."""
    folder = tmp_path_factory.mktemp("wheels")
    words = [f"VENV={sys.prefix}", "MEMBERS=shared agent", f"DIST={folder / 'dist'}", f"RELEASE={folder / 'release'}"]
    done = subprocess.run(
        ["make", "-o", "setup", "dist", *words], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def bare(folder: Path) -> Path:
    """Make an environment with nothing in it; return its site-packages."""
    venv.create(folder, with_pip=False)
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


def install(wheels: Path, folder: Path, *words: str) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--prefix", str(folder)]
    options = ["--ignore-installed", "--no-warn-script-location", "--find-links", str(wheels)]
    subprocess.run([*pip, *options, *words], check=True, timeout=170)


def declared(of: metadata.Distribution, extras: frozenset[str], found: dict[str, metadata.Distribution]) -> None:
    """Gather what a distribution declares to need, and what that needs, as far as it is not a member."""
    for text in of.requires or []:
        need = Requirement(text)
        applies = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""})
        if applies and need.name not in found and not need.name.startswith("wherry-"):
            found[need.name] = metadata.distribution(need.name)
            declared(found[need.name], frozenset(need.extras), found)


def lend(distributions: dict[str, metadata.Distribution], site_packages: Path) -> None:
    """Link distributions of this environment into another one."""
    for distribution in distributions.values():
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
        for top in tops:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(distribution.locate_file(top))))


class Installed(Agent):
    """The agent of a bare environment, run as its owner would, with nothing of this one in sight."""

    def __init__(self, server: Site, name: str, environment: Path) -> None:
        self.environment = environment
        super().__init__(server, name)

    def start(self) -> subprocess.Popen[bytes]:
        argv = [str(self.environment / "bin/wherry-agent"), "run", "--home", str(self.home), "--name", self.name]
        more = ["--http-port", str(self.port), "--server", self.site.url, "--token", self.site.enrolment]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen([*argv, *more], stderr=log, stdout=log, cwd="/", env=bare_words())
        return self.child


def bare_words() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": os.environ.get("LANG", "C.UTF-8")}


def say(environment: Path, code: str) -> str:
    python = str(environment / "bin/python")
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, cwd="/", env=bare_words())
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def check_serves(environment: Path, folder: Path) -> None:
    code = (
        "import importlib.util as u, wherry_agent, wherry_shared; print(wherry_agent.__file__, wherry_shared.__file__)"
    )
    assert all(path.startswith(str(environment)) for path in say(environment, code).split())
    others = ("wherry_server", "wherry_optimizer", "wherry_simulators", "fastapi", "onnx", "zstandard")
    seen = f"import importlib.util as u; print([n for n in {others} if u.find_spec(n)])"
    assert say(environment, seen) == "[]"
    with site(folder) as server:
        server.release("1.0.0", models.scale(folder / "one.onnx", 2.0))
        device = Installed(server, "bare", environment)
        try:
            device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
            server.deploy("1.0.0", "bare", trial_s=2)
            device.until_serves("1.0.0")
            code, answer = device.infer(3.0)
            assert (code, answer["outputs"][0]["data"][0]) == (200, 6.0)
            assert device.stop() == 0
        finally:
            if device.child.poll() is None:
                device.child.kill()
                device.child.wait(10)


@pytest.mark.services
def test_the_agent_runs_from_its_wheels_with_what_they_declare(wheels: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    site_packages = bare(environment)
    install(wheels, environment, "--no-index", "--no-deps", "--no-compile", "wherry-agent", "wherry-shared")
    needed: dict[str, metadata.Distribution] = {}
    for member in metadata.distributions(path=[str(site_packages)]):
        declared(member, frozenset({"onnx"}), needed)
    assert "numpy" in needed
    lend(needed, site_packages)
    check_serves(environment, tmp_path)


def test_wheels_name_their_siblings_by_version_and_carry_no_tests(wheels: Path) -> None:
    names = sorted(path.name.split("-")[0] for path in wheels.glob("*.whl"))
    assert names == ["wherry_agent", "wherry_shared"]
    code = "import json, sys, zipfile; print(json.dumps([zipfile.ZipFile(n).namelist() for n in sys.argv[1:]]))"
    listed = subprocess.run(
        [sys.executable, "-c", code, *map(str, wheels.glob("*.whl"))], capture_output=True, check=True
    )
    for files in json.loads(listed.stdout):
        assert all(name.startswith(("wherry_agent", "wherry_shared")) for name in files)
        assert not any("test" in name for name in files)


@pytest.mark.soak
@pytest.mark.services
def test_the_agent_runs_from_its_wheels_and_an_index(wheels: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    bare(environment)
    install(wheels, environment, "wherry-agent[onnx]")
    check_serves(environment, tmp_path)
