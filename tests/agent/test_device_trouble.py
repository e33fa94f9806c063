"""Trouble of the device itself under a whole agent: what it serves then, what it says, and how it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.agent.daemon_kit import MODEL, Agent, agent, site
from tests.agent.serving_kit import until
from tests.services import needs_private_mounts
from tests.shared.engines import models
from wherry_agent.handle import Model

pytestmark = pytest.mark.services

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


class OnReadOnly(Agent):
    """An agent whose home takes no writes; nobody else sees that mount."""

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(self.home), "--name", self.name]
        argv += ["--http-port", str(self.port), *self.flags]
        with self.log.open("ab") as log:
            mounted = ["unshare", "-m", "sh", "-c", READ_ONLY, str(self.home), *argv]
            self.child = subprocess.Popen(mounted, stderr=log, stdout=log)
        return self.child


@pytest.mark.slow
def test_an_agent_on_a_disk_that_takes_no_writes_serves_on_and_says_so(tmp_path: Path) -> None:
    needs_private_mounts()
    with site(tmp_path) as wherry:
        wherry.release("1.0.0", models.scale(tmp_path / "one.onnx", 2.0))
        with agent(wherry, "lamp") as first:
            first.until("it is enrolled", lambda shown: shown["engines"])
            wherry.deploy("1.0.0", "lamp", trial_s=1)
            first.until_serves("1.0.0")
            first.until("nothing is owed", lambda shown: shown["reports_owed"] == 0)
            first.stop()

        def said() -> str:
            return str(wherry.call("GET", "/api/v1/devices/lamp")[1]["trust_state"])

        journal = (first.home / "journal.json").read_bytes()
        stuck = OnReadOnly(wherry, "lamp")
        try:
            until(lambda: stuck.child.poll() is not None or said() == "read_only", "the server knows", 60)
            assert stuck.child.poll() is None, stuck.tail()
            try:
                until(lambda: _answers(stuck), "it serves what is installed", 60)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{stuck.tail()}") from error
            assert stuck.ask(5) == ["1.0.0"] * 5
            assert stuck.status()["running"], "it is found where its sockets are"
            with Model(MODEL, socket=stuck.home / "run" / "handle.sock") as model:
                assert model.run({"x": np.ones((1, 4), np.float32)}).by.version == "1.0.0"
        finally:
            stuck.stop()
        assert (first.home / "journal.json").read_bytes() == journal
        with agent(wherry, "lamp") as again:
            again.until_serves("1.0.0")
            until(lambda: said() == "", "all is well again", 60)


def _answers(of: Agent) -> bool:
    try:
        return of.infer()[0] == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_file_that_the_disk_altered_is_found_by_the_scrub_and_brought_again(tmp_path: Path) -> None:
    home = tmp_path / "lamp"
    home.mkdir()
    (home / "agent.toml").write_text("scrub_every_s = 2.0\n")
    with site(tmp_path) as wherry, agent(wherry, "lamp") as lamp:
        wherry.release("1.0.0", models.scale(tmp_path / "one.onnx", 2.0))
        lamp.until("it is enrolled", lambda shown: shown["engines"])
        wherry.deploy("1.0.0", "lamp", trial_s=1)
        lamp.until_serves("1.0.0")
        weights = max((home / "store" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
        whole = weights.read_bytes()
        weights.write_bytes(bytes(len(whole)))
        until(lambda: "1 versions altered" in lamp.log.read_text(errors="replace"), "the scrub finds it", 60)
        until(lambda: weights.exists() and weights.read_bytes() == whole, "it is brought again", 90)
        assert lamp.ask(5) == ["1.0.0"] * 5
        last = lamp.until("it says so", lambda shown: "fetched again" in str(shown["models"]))
        assert last["known_bad"] == []
