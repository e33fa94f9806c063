"""A worker that lives and does nothing is noticed: by its pulse, which stands still, or by runs that never end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from tests.agent.serving_kit import infer_body, loadable, until
from tests.agent.swap_kit import Rest, supervised, versions
from tests.shared.engines import models
from wherry_agent import in_flight, processes
from wherry_agent.answering.gate import RunGate, cores
from wherry_agent.children import Ran, ServeModel


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOK_S", 0.2)
    monkeypatch.setattr(processes, "ABORT_S", 0.5)


def test_a_worker_that_stands_still_makes_way_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SILENT_LOOKS", 60)  # it beats once a second, on a machine without a rest
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path) as site:
        site.serve(ServeModel(name="scale", active=first))
        monkeypatch.setattr(processes, "SILENT_LOOKS", 15)
        pid = site.worker.pid
        os.kill(pid, signal.SIGSTOP)
        until(lambda: site.worker.pid not in (0, pid), "another follows", 60)
        monkeypatch.setattr(processes, "SILENT_LOOKS", 60)
        site.wait_served()
        caller = Rest(site, keep=False)
        assert caller.ask() == ("1.1.0", 1.0)
        ((detail, ordered),) = site.deaths
        assert "no sign of life" in detail
        assert not ordered, "it counts as a death"


def test_runs_that_never_end_cost_their_worker_its_life_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SILENT_LOOKS", 10_000)
    monkeypatch.setattr(processes, "HELD_SECONDS_MAX", 1.5)
    item = loadable(models.slow(tmp_path / "slow.onnx", turns=1 << 30))  # with a 1 for input; with 0 it is fast
    with supervised(tmp_path) as site:
        site.serve(ServeModel(name="scale", active=item, deadline_ms=1500))
        pid = site.worker.pid
        callers = [threading.Thread(target=ask_for_ever, args=(site.port,), daemon=True) for _ in range(cores() + 1)]
        for caller in callers:
            caller.start()
        until(lambda: site.deaths, "it is ended", 60)
        for caller in callers:
            caller.join(30)
        ((detail, ordered),) = site.deaths
        seconds = re.search(r"no run ended for (\d+) s although others waited", detail)
        assert seconds is not None, detail
        assert int(seconds[1]) >= 3, "twice what its terms give a request"
        assert not ordered
        assert site.ran == [(Ran("scale", item.manifest, item.variant),)], "whoever decides knows whose run it was"
        until(lambda: site.worker.pid not in (0, pid), "another follows", 60)


def ask_for_ever(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/v2/models/scale/infer", json.dumps(infer_body([[1.0, 0.0, 0.0, 0.0]])))
        connection.getresponse()


def test_while_somebody_waits_and_no_run_ends_time_is_counted() -> None:
    gate = RunGate(1)
    gate.enter()
    left = gate.left
    waiter = threading.Thread(target=gate.enter)
    waiter.start()
    until(lambda: gate.waiting == 1, "it waits")
    assert gate.left == left
    gate.leave()
    waiter.join(20)
    assert gate.left != left


def test_a_pulse_is_read_from_the_page() -> None:
    descriptor = in_flight.make_page()
    page = in_flight.Page(descriptor)
    assert in_flight.read_pulse(descriptor) == (0, 0)
    slot = page.begin(7)
    page.beat(1500)
    page.beat(0)
    assert in_flight.read_pulse(descriptor) == (2, 0)
    page.beat(2500)
    assert in_flight.read_pulse(descriptor) == (3, 2500)
    assert in_flight.read_page(descriptor, {7: Ran("m", "d", "v")}) == (Ran("m", "d", "v"),), "marks are as they were"
    page.end(slot)
    assert in_flight.read_page(descriptor, {}) == ()
    os.close(descriptor)
