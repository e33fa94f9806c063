"""A swap is done when the worker and every live handle did it, or the handles' time is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.builders import MODEL, confirmed, loadable
from tests.agent.test_turns import Full, Recorder
from wherry_agent import state as s
from wherry_agent.daemon import HANDLES_SECONDS_MAX


class Handles:
    """A handle server with one handle, which acts when a test says so."""

    def __init__(self) -> None:
        self.acted = False

    def settled(self, name: str) -> bool:
        return self.acted or name != MODEL

    def describe(self) -> list[dict[str, object]]:
        return [{"model": MODEL, "pid": 4711, "settled": self.acted}]


@pytest.fixture
def daemon(tmp_path: Path) -> Recorder:
    made = Recorder(tmp_path, Full())
    made._state = confirmed()
    made._handles = Handles()  # type: ignore[assignment]
    made.turns = []  # type: ignore[attr-defined]
    made._turn = made.turns.append  # type: ignore[method-assign, attr-defined]
    return made


SERVED = s.Served(MODEL, loadable().digest, 7, ok=True)


def test_it_waits_for_a_handle_and_goes_on_when_that_acted(daemon: Recorder) -> None:
    daemon._worker_served(SERVED)
    assert daemon.turns == []
    daemon._handles_settled(MODEL)
    assert daemon.turns == [], "some other handle spoke"
    daemon._handles.acted = True
    daemon._handles_settled(MODEL)
    daemon._handles_settled(MODEL)
    assert daemon.turns == [SERVED]


def test_it_waits_no_longer_than_their_time(daemon: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    daemon._worker_served(SERVED)
    due_s, late = daemon._timers[f"handles {MODEL}"]
    assert 0 < due_s - daemon._started_s <= HANDLES_SECONDS_MAX + 60
    late()
    late()
    assert daemon.turns == [SERVED]
    assert "processes [4711] do not answer" in caplog.text


def test_what_failed_or_died_is_not_waited_for(daemon: Recorder) -> None:
    failed = s.Served(MODEL, loadable().digest, 7, ok=False, reason="load_failed")
    daemon._worker_served(failed)
    assert daemon.turns == [failed]
    daemon._worker_served(SERVED)
    daemon._worker_died("signal 9", ordered=False)
    daemon._handles.acted = True
    daemon._handles_settled(MODEL)
    assert daemon.turns[1:] == [s.WorkerDied("the worker ended with signal 9", False)], "the dead worker serves nothing"
