"""A moment without threads (a service may have so many, and no more) costs the supervisor a try, and nothing for ever."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agent.builders import loadable as candidate
from tests.agent.serving_kit import loadable, until
from tests.agent.swap_kit import Rest, supervised
from tests.shared.engines import models
from wherry_agent import children, processes
from wherry_agent import state as s
from wherry_agent.daemon import Daemon
from wherry_agent.settings import Settings
from wherry_shared import reasons

Refuse = Callable[[str], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Let no thread of a name be had."""
    real = threading.Thread.start
    names: set[str] = set()

    def start(thread: threading.Thread) -> None:
        kind = "timer" if isinstance(thread, threading.Timer) else thread.name
        if kind in names:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    return names.add


@pytest.mark.parametrize("name", ["courier", "canary"])
def test_a_child_that_gets_no_thread_is_trouble_that_passes(refuse: Refuse, name: str) -> None:
    refuse(name)
    said: list[children.CourierAnswer | children.Judged] = []
    if name == "courier":
        processes.courier(children.Fetch(home="/h", server="http://s", manifest="m", variant="float"), said.append)
    else:
        processes.canary(children.Judge(candidate=candidate()), said.append)
    (answer,) = said
    assert isinstance(answer, children.Failed | children.Judged)
    assert answer.reason == reasons.CHILD_FAILED
    assert "thread" in answer.detail


def test_what_nobody_foresaw_in_the_thread_of_a_child_is_told_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(processes, "encode_line", broken)
    said: list[children.CourierAnswer] = []
    short = processes.courier(children.Fetch(home="/h", server="http://s", manifest="m", variant="v"), said.append)
    until(lambda: said, "it is told")
    short.join(20)
    assert isinstance(said[0], children.Failed)
    child = short._child
    assert child is not None
    assert child.wait(20) < 0, "nobody would have read what it says"


def test_a_child_whose_words_nobody_can_read_goes_on(refuse: Refuse) -> None:
    refuse("worker-log")
    stream = io.BytesIO(b"words")
    processes.drain(stream, "worker")
    assert stream.closed


def test_a_worker_serves_without_timers_and_without_its_log(tmp_path: Path, refuse: Refuse) -> None:
    item = loadable(models.scale(tmp_path / "one.onnx", 2.0))
    refuse("timer")
    refuse("worker-log")
    with supervised(tmp_path, warm_start="on") as site:
        site.serve(children.ServeModel(name="scale", active=item))
        refuse("worker")
        pid = site.worker.pid
        assert "no other worker can be started" in site.hand_over()
        caller = Rest(site)
        assert caller.ask() == ("1.0.0", 2.0)
        caller.close()
        assert (site.worker.pid, site.deaths, site.worker.spare_pid) == (pid, [], 0)


def test_trust_is_asked_for_again_when_there_was_no_thread(tmp_path: Path, refuse: Refuse) -> None:
    refuse("timestamp")
    refuse("facts")
    daemon = Daemon(Settings(home=str(tmp_path)))
    daemon._server = "http://127.0.0.1:1"
    daemon._state = s.State(device="d" * 22, project="p", stream="e")
    daemon._identity = type("Known", (), {"tuf_path": "/tuf/p"})()  # type: ignore[assignment]
    daemon._refresh()
    assert daemon._queue.get_nowait() == s.RefreshFailed(reasons.CHILD_FAILED, "no thread can be had")
    daemon._look_again()
    assert "facts" in daemon._timers


def test_an_agent_that_is_stopped_while_it_waits_to_enrol_ends(tmp_path: Path) -> None:
    daemon = Daemon(Settings(home=str(tmp_path)))
    daemon._queue.put(daemon._look_again)
    assert not daemon._signalled(5), "there is nothing to look at yet"
    daemon._queue.put(daemon._stop)
    assert daemon._signalled(5)
