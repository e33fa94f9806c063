"""The agent from wheels alone: in a bare environment, without uv, without the other members, it enrols and serves.

The short form gives the environment what the wheels declare, out of the environment that the tests run in, and nothing
else; the long form lets pip install it all from an index, as a device does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.agent.daemon_kit import Agent, Site, site
from tests.agent.serving_kit import until
from tests.shared.engines import models
from wherry_agent import status

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
    """Install with the pip of this environment into another one, whose interpreter its scripts name."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin/python"),
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "install", "--find-links", str(wheels), *words], check=True, timeout=170)
    script = (folder / "bin/wherry-agent").read_text().splitlines()[0]
    assert script == f"#!{folder}/bin/python", "it would run in another environment"


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


def check_serves(environment: Path, folder: Path, add_engine: Callable[[], None] | None = None) -> None:
    """Let the agent of an environment install a model; with `add_engine` it begins without an engine, which comes later."""
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
            device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines_probed"])
            if add_engine is not None:
                check_without_engine(device)
                add_engine()
                device.child.send_signal(signal.SIGHUP)
            device.until("it has an engine", lambda shown: shown["engines"])
            server.deploy("1.0.0", "bare", trial_s=2)
            device.until_serves("1.0.0")
            code, answer = device.infer(3.0)
            assert (code, answer["outputs"][0]["data"][0]) == (200, 6.0)
            assert device.stop() == 0
        finally:
            if device.child.poll() is None:
                device.child.kill()
                device.child.wait(10)


def check_without_engine(device: Installed) -> None:
    shown = device.status()
    assert (shown["engines"], shown["worker_deaths"]) == ([], {})
    assert "none works" in status.render(shown)
    code, said = until(device.infer, "it answers")
    assert code == 503
    assert "install wherry-agent[onnx]" in said["error"]
    assert "Traceback" not in device.log.read_text()
    doctor = subprocess.run(
        [str(device.environment / "bin/wherry-agent"), "doctor", "--home", str(device.home)],
        capture_output=True,
        text=True,
        timeout=60,
        env=bare_words(),
    )
    assert [line.split()[1] for line in doctor.stdout.splitlines() if line.startswith("BAD")] == ["engines"]
    assert "install wherry-agent[onnx]" in doctor.stdout
    assert doctor.returncode == 1


@pytest.mark.services
@pytest.mark.slow
def test_the_agent_runs_from_its_wheels_with_what_they_declare(wheels: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    site_packages = bare(environment)
    install(wheels, environment, "--no-index", "--no-deps", "--no-compile", "wherry-agent", "wherry-shared")
    members = list(metadata.distributions(path=[str(site_packages)]))

    def lend_for(*extras: str) -> dict[str, metadata.Distribution]:
        needed: dict[str, metadata.Distribution] = {}
        for member in members:
            declared(member, frozenset(extras), needed)
        lend(needed, site_packages)
        return needed

    assert "numpy" not in lend_for()
    check_serves(environment, tmp_path, add_engine=lambda: lend_for("onnx"))


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
