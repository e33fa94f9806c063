"""`wherry-agent status`: the socket answers for as long as the agent runs, and what it says can be read."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent.builders import (
    MODEL,
    confirmed,
    digest_of,
    fetched,
    judged,
    now,
    offer,
    offered,
    resolved,
    run,
    served,
)
from wherry_agent import machine, status
from wherry_agent import state as s
from wherry_shared.clock import Since


def test_what_goes_wrong_once_is_not_the_end_of_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.accept
    failed: list[int] = []

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if listener is server._socket and len(failed) < 2:
            failed.append(errno.EMFILE)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(listener)

    def broken() -> object:
        raise ZeroDivisionError

    (tmp_path / "run").mkdir()
    server = status.Server(tmp_path / "run" / status.SOCKET, {"status": lambda: {"fine": True}, "broken": broken})
    try:
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert status.question(tmp_path, "status") == {"fine": True}, "the accept that waited already"
        assert status.question(tmp_path, "broken") is None
        assert status.question(tmp_path, "status") == {"fine": True}
        assert len(failed) == 2
    finally:
        server.close()
    server._thread.join(20)
    assert not server._thread.is_alive(), "closing ends the thread"


def test_what_the_canary_measured_of_both_is_shown_and_reported() -> None:
    figures = {"latency_p50_us": 41.0, "latency_p99_us": 63.0, "incumbent_p50_us": 40.0, "incumbent_p99_us": 58.0}
    state, _ = run(
        confirmed("1.0.0"),
        offer(2, {MODEL: offered("1.1.0")}),
        resolved("1.1.0"),
        fetched("1.1.0"),
        judged("1.1.0", latency_ratio=1.025, peak_memory_bytes=12_340_000, **figures),
    )
    state, _ = run(state, served(state, "1.1.0"))
    shown = status.describe(state, now())
    ours, theirs = "median 41 µs, 99 % within 63 µs, 12.3 MB at its peak", "median 40 µs, 99 % within 58 µs"
    assert f"canary: {ours}; the version before it {theirs}" in status.render({"running": False, **shown})
    tried = [one for report in machine.outgoing(state) for one in report.variants if one.latency_ratio]
    assert tried, [report.state for report in machine.outgoing(state)]
    assert all((one.incumbent_p50_us, one.incumbent_p99_us) == (40.0, 58.0) for one in tried)


def test_how_long_trouble_waits_is_said_in_its_unit() -> None:
    state, _ = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}), resolved("1.1.0"))
    failed = s.TaskFailed(MODEL, digest_of(f"{MODEL}/1.1.0"), 1, "fetch", "disk_full", "no room", 60.0)
    shown = status.describe(run(state, failed)[0], now())
    assert "disk_full · no room · waits 60 s" in status.render({"running": False, **shown})


def test_what_an_engine_lets_a_device_wait_for_is_shown_with_what_is_left_of_the_wait() -> None:
    since = Since.at(now(1_000))
    engines = s.Engines(
        again={MODEL: s.Again(since, 10_000, 2)},
        hand_over_again=s.Again(since, 20_000, 1),
        denied={"onnxruntime": s.Denied("1.21.0", "sha256:00", since, 3600_000, 3)},
    )
    shown = status.describe(replace(confirmed(), engines=engines), now(5_000))["engine_waits"]
    assert isinstance(shown, list)
    assert [status.wait_words(one) for one in shown] == [
        f"{MODEL} is judged with the new engine again in 6 s, after 2 times in vain",
        "another worker is to take over in 16 s, after 1 times in vain",
        "onnxruntime 1.21.0, which the worker could not load, is believed again in 3596 s, after 3 times in vain",
    ]
    assert status.describe(confirmed(), now())["engine_waits"] == []
