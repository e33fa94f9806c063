"""systemd is told that the agent is ready, alive and stopping; and the unit is one that systemd accepts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agent.daemon_kit import Agent, site
from tests.agent.serving_kit import until
from tests.services import needs
from wherry_agent import cli
from wherry_agent.notify import Notifier

ROOT = Path(__file__).parents[2]


class Systemd:
    """The end of the line where systemd listens."""

    def __init__(self, address: str) -> None:
        self.line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.line.bind(address)
        self.line.setblocking(False)
        self.said: list[str] = []

    def hear(self) -> list[str]:
        try:
            while True:
                self.said += self.line.recv(4096).decode().split("\n")
        except BlockingIOError:
            return self.said


@pytest.fixture
def systemd(tmp_path: Path):
    listening = Systemd(str(tmp_path / "notify"))
    yield listening
    listening.line.close()


def test_without_systemd_nothing_is_said_and_nothing_fails() -> None:
    quiet = Notifier.from_environment({})
    quiet.ready()
    quiet.alive("well")
    quiet.stopping()
    assert not quiet.watched


def test_words_are_said_once_and_beats_each_time(systemd: Systemd, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "9000000", "PATH": "/bin"}
    line = Notifier.from_environment(environment)
    assert environment == {"PATH": "/bin"}, "children must not speak for the agent"
    assert line.beat_s == 3.0
    for _ in range(2):
        line.ready()
        line.alive("serves\nm")
    assert systemd.hear() == ["READY=1", "WATCHDOG=1", "STATUS=serves m", "WATCHDOG=1"]


def test_a_watchdog_of_another_process_is_not_ours(tmp_path: Path) -> None:
    theirs = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "9000000", "WATCHDOG_PID": "1"}
    assert not Notifier.from_environment(theirs).watched
    ours = {**theirs, "NOTIFY_SOCKET": "@wherry", "WATCHDOG_USEC": "9000000", "WATCHDOG_PID": str(os.getpid())}
    line = Notifier.from_environment(ours)
    assert line.watched
    line.ready()  # nobody listens there


class Watched(Agent):
    """An agent that systemd would have started."""

    def start(self) -> subprocess.Popen[bytes]:
        os.environ["NOTIFY_SOCKET"], os.environ["WATCHDOG_USEC"] = str(self.site.folder / "notify"), "600000"
        try:
            return super().start()
        finally:
            del os.environ["NOTIFY_SOCKET"], os.environ["WATCHDOG_USEC"]


@pytest.mark.services
@pytest.mark.slow
def test_an_agent_beats_only_while_its_loop_turns(systemd: Systemd, tmp_path: Path) -> None:
    with site(tmp_path) as server:
        device = Watched(server, "lamp")
        try:
            until(lambda: "READY=1" in systemd.hear(), "it is ready")
            until(lambda: systemd.hear().count("WATCHDOG=1") > 3, "it beats")
            until(lambda: "STATUS=serves nothing yet; server by mqtt" in systemd.hear(), "it says what it does")
            os.kill(device.child.pid, signal.SIGSTOP)
            state = Path(f"/proc/{device.child.pid}/stat")
            until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "it hangs")
            heard = len(systemd.hear())
            time.sleep(1.0)  # five beats
            assert len(systemd.hear()) == heard, "somebody else speaks for the loop"
            os.kill(device.child.pid, signal.SIGCONT)
            until(lambda: len(systemd.hear()) > heard, "it beats again")
            assert device.stop() == 0
            assert systemd.hear()[-1] == "STOPPING=1"
        finally:
            if device.child.poll() is None:
                device.child.kill()
                device.child.wait(10)


def test_the_unit_in_deploy_is_the_one_that_is_installed() -> None:
    installed = ROOT / "agent/src/wherry_agent/systemd/wherry-agent.service"
    assert (ROOT / "deploy/systemd/wherry-agent.service").read_bytes() == installed.read_bytes()


@pytest.mark.parametrize("home", ["/var/lib/wherry", "/srv/edge/wherry"])
def test_the_unit_names_this_install_and_systemd_takes_it(home: str, tmp_path: Path, capsys) -> None:
    assert cli.main(["unit", "--home", home]) == 0
    text = capsys.readouterr().out
    assert f"ExecStart={Path(sys.prefix) / 'bin/wherry-agent'} run --home {home}\n" in text
    assert ("ReadWritePaths=/srv/edge/wherry" in text) == (home != "/var/lib/wherry")
    beats_s, stop_s = (int(re.search(rf"{key}=(\d+)", text)[1]) for key in ("WatchdogSec", "TimeoutStopSec"))
    assert beats_s >= 120, "longer than a courier may take to enrol"
    assert stop_s >= 30, "longer than a worker may take to answer what is in flight"
    needs("systemd-analyze")
    unit = tmp_path / "wherry-agent.service"
    unit.write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in (checked.stdout + checked.stderr).splitlines() if "wherry-agent" in line]
    assert not complaints
