"""A device without NumPy: nobody is blamed, everybody is told, and it serves as soon as the package is there."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path

import pytest

from tests.agent.serving_kit import loadable, until
from tests.agent.swap_kit import Rest, Supervised, supervised
from tests.shared.engines import models
from wherry_agent import leash, processes
from wherry_agent.canary_exit import classify_exit
from wherry_agent.children import Judge, Judged, Ready, ServeModel, Serving
from wherry_agent.workers import bare
from wherry_shared import reasons

WORDS = "no numpy was installed here"


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands in the way of numpy in every child that starts from now on."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "numpy.py").write_text(f"raise ImportError({WORDS!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "numpy.py"


def ask(site: Supervised, path: str, method: str = "GET") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")
    finally:
        connection.close()


def test_a_worker_without_numpy_says_so_and_serves_once_it_is_there(
    tmp_path: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = loadable(models.scale(tmp_path / "one.onnx", 2.0))
    with supervised(tmp_path) as site:
        site.tell()
        code, said = until(lambda: ask(site, "/v2/health/ready"), "an answer")
        assert code == 503
        assert f"{WORDS} (so: no model is served here; next: {bare.NEXT_STEP})" in said["error"]
        assert ask(site, "/v2/health/live") == (200, {"live": True})
        assert ask(site, "/v2/models/scale/infer", "POST")[0] == 503
        site.tell(ServeModel(name="scale", active=item))
        (answer,) = until(lambda: [one for one in site.events if isinstance(one, Serving)], "it answers for the model")
        assert (answer.ok, answer.reason, answer.detail) == (False, reasons.ENGINE_MISSING, WORDS)
        pid = site.worker.pid

        broken.unlink()
        site.events.clear()
        site.tell(ServeModel(name="scale", active=item))
        until(lambda: [one for one in site.events if isinstance(one, Ready)], "it begins anew", 60)
        site.serve(ServeModel(name="scale", active=item))
        caller = Rest(site)
        assert caller.ask() == ("1.0.0", 2.0)
        caller.close()
        assert site.worker.pid == pid
        assert site.deaths == [], "nothing died, so nothing is counted"


def test_one_that_was_to_take_over_answers_nobody(tmp_path: Path, broken: Path) -> None:
    item = loadable(models.scale(tmp_path / "one.onnx", 2.0))
    hidden = broken.rename(broken.with_suffix(".hidden"))
    with supervised(tmp_path) as site:
        site.serve(ServeModel(name="scale", active=item))
        pid = site.worker.pid
        hidden.rename(broken)
        assert WORDS in site.hand_over()
        caller = Rest(site, keep=False)
        assert [caller.ask()[0] for _ in range(20)] == ["1.0.0"] * 20
        assert (site.worker.pid, site.deaths) == (pid, [])


def test_a_client_that_asks_without_end_holds_up_nobody(tmp_path: Path, broken: Path) -> None:
    with supervised(tmp_path) as site:
        site.tell()
        with socket.create_connection(("127.0.0.1", site.port), 20) as half:
            half.sendall(b"GET /v2 HTTP/1.1\r\nHost:")
            assert until(lambda: ask(site, "/v2/health/live"), "an answer")[0] == 200


def test_a_canary_without_numpy_is_no_verdict(tmp_path: Path, broken: Path) -> None:
    item = loadable(models.scale(tmp_path / "one.onnx", 2.0))
    said: list[Judged] = []
    processes.canary(Judge(candidate=item, memory_bytes_max=0, seconds_max=30, latency_ratio_max=0), said.append)
    until(lambda: said, "it ends", 60)
    assert (said[0].passed, said[0].reason) == (False, reasons.ENGINE_MISSING)
    assert reasons.ENGINE_MISSING not in reasons.VERDICTS
    assert classify_exit(leash.UNAVAILABLE, 0, 0)[0] == reasons.ENGINE_MISSING
