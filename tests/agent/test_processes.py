"""Children: started on a leash, cancelled, restarted, and what their deaths mean. Real processes, little programs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.agent.builders import loadable
from tests.agent.daemon_kit import alive
from tests.agent.serving_kit import until
from wherry_agent import children, processes
from wherry_shared import reasons


def program(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Let this program stand where a courier or canary would."""
    path = folder / "program.py"
    path.write_text("import json, os, sys, time\n" + textwrap.dedent(text))
    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, str(path)])


def courier_answer(timeout_s: float = 20.0) -> children.CourierAnswer:
    found: list[children.CourierAnswer] = []
    processes.courier(children.Fetch(home="/h", server="http://s", manifest="m", variant="float"), found.append)
    return until(lambda: found and found[0], "the courier answered", timeout_s)


def canary_verdict(**terms: int) -> children.Judged:
    found: list[children.Judged] = []
    processes.canary(children.Judge(candidate=loadable(), **terms), found.append)  # type: ignore[arg-type]
    return until(lambda: found and found[0], "the canary was judged", 30)


def test_a_courier_reads_its_task_and_its_last_line_is_the_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(
        monkeypatch,
        tmp_path,
        """
        task = json.load(sys.stdin)
        print(json.dumps({"kind": "progress", "done_bytes": 1, "total_bytes": 2}))
        print(json.dumps({"kind": "fetched", "manifest": task["manifest"], "variant": task["variant"], "bytes": 7}))
        """,
    )
    assert courier_answer() == children.Fetched(manifest="m", variant="float", bytes=7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sys.exit(3)", "ended with 3"),
        ("os.kill(os.getpid(), 9)", "ended with -9"),
        ("print('this is no answer')", "courier:"),
        ("print(json.dumps({'kind': 'dance'}))", "courier:"),
    ],
)
def test_a_courier_that_dies_or_talks_nonsense_is_trouble_that_may_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, says: str
) -> None:
    program(monkeypatch, tmp_path, text)
    answer = courier_answer()
    assert isinstance(answer, children.Failed)
    assert (answer.reason, answer.retry_after_s) == (reasons.CHILD_FAILED, 0)
    assert says in answer.detail


def test_a_cancelled_child_is_killed_and_its_answer_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program(monkeypatch, tmp_path, f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    found: list[children.CourierAnswer] = []
    short = processes.courier(children.Fetch(home="/h", server="s", manifest="m", variant="v"), found.append)
    until(lambda: mark.exists() and mark.read_text(), "it runs")
    short.cancel()
    short.join(10)
    assert found == []
    assert not alive(int(mark.read_text()))


def test_the_death_of_a_canary_is_a_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(monkeypatch, tmp_path, "os.kill(os.getpid(), 11)")
    verdict = canary_verdict()
    assert (verdict.passed, verdict.reason) == (False, reasons.CRASH)
    assert "SIGSEGV" in verdict.detail


def test_a_canary_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.3)
    program(monkeypatch, tmp_path, "time.sleep(60)")
    assert canary_verdict(seconds_max=0).reason == reasons.TIMEOUT


def test_a_canary_that_could_not_be_started_says_nothing_about_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "command", lambda *_: ["/nonexistent/python"])
    assert canary_verdict().reason == reasons.CHILD_FAILED


def test_a_child_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(
        f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(
        "import subprocess, time\nfrom wherry_agent import processes\n"
        "subprocess.Popen(processes.command('sleeper'), env=processes.environment())\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), *sys.path])
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env={**os.environ, "PYTHONPATH": path})
    child = int(until(lambda: mark.exists() and mark.read_text(), "the child runs"))
    assert alive(child)
    parent.kill()
    parent.wait(10)
    until(lambda: not alive(child), "the child died too", 10)


WORKER = """\
import json, os, socket, sys
control = socket.socket(fileno=int(os.environ["WHERRY_CONTROL_FD"]))
control.sendall(json.dumps({"kind": "ready", "pid": os.getpid()}).encode() + b"\\n")
for line in control.makefile("rb"):
    message = json.loads(line)
    if message["kind"] == "stop":
        break
    if message["kind"] == "run_golden":
        os.kill(os.getpid(), 11)
    if message["revision"] == 13:
        control.sendall(b"gibberish\\n")
    for model in message["models"]:
        said = {"kind": "serving", "revision": message["revision"], "model": model["name"], "digest": "d", "ok": True}
        control.sendall(json.dumps(said).encode() + b"\\n")
"""


class Running:
    """A worker process of the little program above."""

    def __init__(self, folder: Path, text: str = WORKER, *, start: bool = True, available_bytes: int = 1 << 40) -> None:
        path = folder / "worker.py"
        path.write_text(text)
        self.events: list[children.WorkerEvent] = []
        self.deaths: list[tuple[str, bool]] = []
        self.gone: list[int] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.worker = processes.WorkerProcess(
            [self.listener],
            on_event=lambda event, _: self.events.append(event),
            on_death=lambda detail, ordered, _: self.deaths.append((detail, ordered)),
            on_gone=self.gone.append,
            memory_reserve_bytes=0,
            argv=[sys.executable, str(path)],
            available_bytes=lambda: available_bytes,
        )
        if start:
            self.worker.start()

    def ready(self, count: int) -> int:
        """Wait for the `count`-th worker; return its process id."""
        until(lambda: sum(isinstance(e, children.Ready) for e in self.events) >= count, f"worker {count} is ready")
        return [event.pid for event in self.events if isinstance(event, children.Ready)][count - 1]

    def close(self) -> None:
        self.worker.stop(children.Stop())
        self.listener.close()


def test_a_worker_that_dies_is_followed_by_another_and_its_death_is_told(tmp_path: Path) -> None:
    running = Running(tmp_path)
    first = running.ready(1)
    os.kill(first, signal.SIGSEGV)
    second = running.ready(2)
    assert running.deaths == [("signal 11", False)]
    running.worker.restart()
    running.ready(3)
    assert running.deaths[1:] == [("signal 9", True)]
    running.worker.send(children.Serve(revision=13, models=[]))
    running.ready(4)
    assert second != first
    running.close()
    assert len(running.deaths) == 3
    assert running.worker.pid == 0


def test_an_order_that_comes_after_a_crash_does_not_make_it_ordered(tmp_path: Path) -> None:
    running = Running(tmp_path, start=False)
    running.worker.restart()  # there is nothing to end yet
    running.worker.start()
    os.kill(running.ready(1), signal.SIGKILL)
    running.ready(2)
    running.close()
    assert running.deaths == [("signal 9", False)]


def test_a_worker_that_crashes_on_its_way_out_crashed(tmp_path: Path) -> None:
    running = Running(tmp_path, WORKER.replace("        break", "        os.kill(os.getpid(), 11)"), available_bytes=0)
    running.ready(1)
    troubles: list[str] = []
    running.worker.hand_over(troubles.append)  # without memory for a second worker
    running.ready(2)
    assert until(lambda: troubles, "the hand-over ended") == [""]
    running.close()
    assert running.deaths == [("signal 11", False)]


def test_a_worker_that_closes_its_end_is_ended_and_nobody_ordered_it(tmp_path: Path) -> None:
    closes = "control.shutdown(2), __import__('time').sleep(60)"
    running = Running(tmp_path, WORKER.replace("os.kill(os.getpid(), 11)", closes))
    running.ready(1)

    def told() -> bool:
        running.worker.send(children.RunGolden(model="m", digest="d", trial=1))
        return bool(running.deaths)

    until(told, "it is ended as soon as it is told something")
    running.close()
    assert running.deaths == [("signal 9", False)]


def test_what_is_said_to_a_worker_that_is_gone_is_said_to_nobody(tmp_path: Path) -> None:
    running = Running(tmp_path)
    pid = running.ready(1)
    os.kill(pid, signal.SIGKILL)
    for _ in range(50):
        running.worker.send(children.Serve(revision=1, models=[]))
        time.sleep(0.002)
    running.ready(2)
    assert running.deaths == [("signal 9", False)]  # it was told things, and nobody ended it
    running.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "worker"]
