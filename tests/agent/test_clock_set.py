"""Whether a clock that is behind a verified time is set forward: only where the owner allows it, and only forward."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path

import pytest

from tests.agent.builders import confirmed, run, trust
from wherry_agent import state as s
from wherry_agent.daemon import Daemon
from wherry_agent.settings import Settings

FLOOR_S = 1_900_000_000


def known() -> s.State:
    state, _ = run(confirmed("1.0.0"), s.Refreshed(trust(2, time_floor_us=FLOOR_S * 1_000_000)))
    return state


@pytest.mark.parametrize(
    ("allowed", "now_s", "set_to"),
    [(True, 0.0, FLOOR_S), (True, FLOOR_S - 1.0, FLOOR_S), (True, FLOOR_S + 1.0, None), (False, 0.0, None)],
)
def test_it_is_set_forward_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, now_s: float, set_to: float | None
) -> None:
    told: list[tuple[int, float]] = []
    monkeypatch.setattr("wherry_agent.daemon.time.time", lambda: now_s)
    monkeypatch.setattr("wherry_agent.daemon.time.clock_settime", lambda clock, to: told.append((clock, to)))
    Daemon(Settings(home=str(tmp_path), set_clock=allowed))._set_clock(known())
    assert told == ([(time.CLOCK_REALTIME, set_to)] if set_to is not None else [])


def test_one_that_may_not_be_set_is_left_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_clock: int, _to: float) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("wherry_agent.daemon.time.time", lambda: 0.0)
    monkeypatch.setattr("wherry_agent.daemon.time.clock_settime", refuse)
    with caplog.at_level(logging.WARNING):
        Daemon(Settings(home=str(tmp_path), set_clock=True))._set_clock(known())
    assert "cannot be set" in caplog.text
