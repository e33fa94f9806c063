"""Swaps, hand-overs to another process, and crashes, under callers who never try twice: who may notice what."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.agent.daemon_kit import free_ports
from tests.agent.serving_kit import alive, until
from tests.agent.swap_kit import BODY, CALLERS, CLIENTS, HANDED_OVER, Crowd, Supervised, crowd, supervised, versions
from wherry_agent import processes
from wherry_agent.children import ServeModel

SWAPS = 200
SWAPS_SOAK = 2000
HAND_OVERS = 3
HAND_OVERS_SOAK = 50
KILLS = 1


def model(active, **more) -> ServeModel:
    return ServeModel(name="scale", active=active, **more)


def how(site: Supervised) -> list[tuple[str, bool]]:
    """Return how workers died, whatever they ran in that moment: that is luck under load."""
    return [(detail.partition(" while it ran ")[0], ordered) for detail, ordered in site.deaths]


def check(people: Crowd) -> None:
    assert people.failures == []
    assert people.wrong == []
    assert people.answers > 0


@pytest.mark.parametrize("kind", CALLERS)
def test_no_request_fails_while_versions_are_swapped(tmp_path: Path, kind: str) -> None:
    swap(tmp_path, kind, SWAPS)


@pytest.mark.soak
@pytest.mark.parametrize("kind", CALLERS)
def test_no_request_fails_while_many_versions_are_swapped(tmp_path: Path, kind: str) -> None:
    swap(tmp_path, kind, SWAPS_SOAK)


def swap(tmp_path: Path, kind: str, swaps: int) -> None:
    every = versions(tmp_path, swaps + 1)
    with supervised(tmp_path, grpc_port=free_ports(1)[0] if "gRPC" in kind else 0) as site:
        site.serve(model(every[0]))
        with crowd(site, kind) as people:
            people.wait_for_more(CLIENTS)
            for version in every[1:]:
                site.serve(model(version))
                people.wait_for_more()
        check(people)
        assert len(people.seen) > swaps // 2
        assert site.deaths == []


@pytest.mark.parametrize("kind", HANDED_OVER)
def test_no_request_fails_while_workers_take_over_from_each_other(tmp_path: Path, kind: str) -> None:
    take_over(tmp_path, kind, HAND_OVERS)


@pytest.mark.soak
@pytest.mark.parametrize("kind", HANDED_OVER)
def test_no_request_fails_while_workers_take_over_many_times(tmp_path: Path, kind: str) -> None:
    take_over(tmp_path, kind, HAND_OVERS_SOAK)


def take_over(tmp_path: Path, kind: str, count: int) -> None:
    first, second = versions(tmp_path, 2)
    with supervised(tmp_path) as site:
        site.serve(model(first))
        pids = [site.worker.pid]
        with crowd(site, kind) as people:
            people.wait_for_more(CLIENTS)
            for _ in range(count):
                assert site.hand_over() == ""
                pids.append(site.worker.pid)
                people.wait_for_more(CLIENTS)
            until(lambda: site.gone == pids[:-1], "those before have ended")
            site.serve(model(second))
            until(lambda: "1.2.0" in people.seen, "the last worker does what it is told")
        check(people)
        assert len(set(pids)) == count + 1
        assert site.deaths == [], "nobody died who was to go on"
        assert not any(alive(pid) for pid in pids[:-1])
        if kind != "new connection":
            assert [caller.connects for caller in people.callers] == [1] * CLIENTS, "connections live on"


@pytest.mark.parametrize("kind", ["keep-alive", "new connection"])
def test_without_memory_for_two_workers_callers_wait_and_no_request_fails(tmp_path: Path, kind: str) -> None:
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path, available_bytes=lambda: 0) as site:
        site.serve(model(first))
        before = site.worker.pid
        with crowd(site, kind) as people:
            people.wait_for_more(CLIENTS)
            assert site.hand_over() == ""
            people.wait_for_more(CLIENTS)
        check(people)
        assert site.worker.pid != before
        assert site.deaths == [("exit code 0", True)]
        if kind == "keep-alive":
            assert [caller.connects for caller in people.callers] == [1] * CLIENTS


def test_connections_that_nobody_uses_are_handed_over_too(tmp_path: Path) -> None:
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path) as site:
        site.serve(model(first))
        callers = [CALLERS[kind](site) for kind in ("keep-alive", "unix socket") for _ in range(20)]
        for caller in callers:
            caller.ask()
        for _ in range(2):
            assert site.hand_over() == ""
        assert [caller.ask()[0] for caller in callers] == ["1.1.0"] * len(callers)
        assert [caller.connects for caller in callers] == [1] * len(callers)
        for caller in callers:
            caller.close()


def test_a_request_that_has_begun_is_answered_by_the_worker_that_read_it(tmp_path: Path) -> None:
    """Half of one, and two at once; after the answers the connections live on in the other worker."""
    (first,) = versions(tmp_path, 1)
    head = "POST /v2/models/scale/infer HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    with supervised(tmp_path) as site:
        site.serve(model(first))
        with (
            socket.create_connection(("127.0.0.1", site.port), 30) as half,
            socket.create_connection(("127.0.0.1", site.port), 30) as twice,
        ):
            half.sendall(whole.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")[: -len(BODY)])
            assert half.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n", "its head was read"
            old = site.worker.pid
            assert site.hand_over() == ""
            twice.sendall(whole + whole)
            half.sendall(BODY)
            assert answers(half, 1) == 1
            until(lambda: site.gone == [old], "the old worker has ended")
            half.sendall(whole + whole)
            assert answers(twice, 2) == answers(half, 2) == 2
        assert site.deaths == []


def answers(connection: socket.socket, count: int) -> int:
    """Read so many answers; return how many were good."""
    data = b""
    while data.count(b"HTTP/1.1 ") < count or not data.rstrip().endswith(b"}"):
        chunk = connection.recv(1 << 16)
        assert chunk, data
        data += chunk
    assert b"Connection: close" not in data
    return data.count(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal 11"),
        (None, "cannot serve scale"),
    ],
)
def test_a_worker_that_cannot_take_over_leaves_the_old_one_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, says: str
) -> None:
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path) as site:
        site.serve(model(first))
        pid = site.worker.pid
        with crowd(site, "keep-alive") as people:
            people.wait_for_more(CLIENTS)
            if program is not None:
                site.worker._argv = [sys.executable, "-c", program]
            else:
                Path(first.path).write_bytes(b"altered")
            assert says in site.hand_over()
            people.wait_for_more(CLIENTS)
        check(people)
        assert site.worker.pid == pid
        assert site.deaths == site.gone == []


def test_a_worker_that_does_not_take_over_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "HAND_OVER_SECONDS_MAX", 0.5)
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path) as site:
        site.serve(model(first))
        pid = site.worker.pid
        mark = tmp_path / "pid"
        text = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        site.worker._argv = [sys.executable, "-c", text]
        assert "within its time" in site.hand_over()
        assert site.worker.pid == pid
        if mark.exists():
            until(lambda: not Path(f"/proc/{mark.read_text()}").exists(), "it is ended")


def test_what_is_wanted_meanwhile_is_served_by_the_one_that_takes_over(tmp_path: Path) -> None:
    first, second = versions(tmp_path, 2)
    with supervised(tmp_path) as site:
        site.serve(model(first))
        with crowd(site, "keep-alive", 2) as people:
            done: list[str] = []
            site.worker.hand_over(done.append)
            site.tell(model(second))
            until(lambda: done, "it has taken over", 60)
            assert done == [""]
            people.seen.clear()
            people.wait_for_more(4)
        check(people)
        assert "1.2.0" in people.seen
        refused: list[str] = []
        site.worker.hand_over(done.append)
        site.worker.hand_over(refused.append)
        assert refused, "one at a time"
        until(lambda: len(done) == 2, "the first of them has ended", 60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("kind", HANDED_OVER)
def test_a_killed_worker_fails_only_what_it_held(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path) as site:
        site.serve(model(first))
        with crowd(site, kind) as people:
            for kill in range(1, KILLS + 1):
                people.wait_for_more(CLIENTS)
                os.kill(site.worker.pid, number)
                until(lambda kill=kill: len(site.deaths) == kill, "its death is noticed")
                people.wait_for_more(CLIENTS)
                until(lambda: site.worker.pid, "another follows")
            people.wait_for_more(CLIENTS)
        assert people.wrong == []
        assert len(people.failures) <= CLIENTS * KILLS
        assert not any("Refused" in failure for failure in people.failures)
        assert how(site) == [(f"signal {number.value}", False)] * KILLS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_spare_worker_takes_the_place_of_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(processes, "SPARE_AFTER_S", 0.05)
    first, second = versions(tmp_path, 2)
    with supervised(tmp_path, warm_start="on") as site:
        site.serve(model(first))
        with crowd(site, "new connection") as people:
            spare = until(lambda: site.worker.spare_pid, "a spare")
            os.kill(site.worker.pid, number)
            until(lambda: site.worker.pid == spare, "it takes over")
            people.wait_for_more(CLIENTS)
            site.serve(model(second))
            following = until(lambda: site.worker.spare_pid, "another spare")
            os.kill(following, signal.SIGKILL)
            until(lambda: site.worker.spare_pid != following, "its death is noticed")
            people.wait_for_more(CLIENTS)
            assert site.hand_over() == "", "which leaves the spare out: its engines are those of the past"
            people.wait_for_more(CLIENTS)
        until(lambda: spare in site.gone, "it has made way")
        assert people.wrong == []
        assert len(people.failures) <= CLIENTS
        assert how(site) == [(f"signal {number.value}", False)]
        assert following not in site.gone, "it never answered"


def test_there_is_no_spare_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SPARE_AFTER_S", 0.0)
    available = [processes.SPARE_MEMORY_BYTES_MIN - 1]
    (first,) = versions(tmp_path, 1)
    with supervised(tmp_path, warm_start="auto", available_bytes=lambda: available[0]) as site:
        site.serve(model(first))
        until(lambda: not site.worker._spare_planned, "it was thought of")
        assert site.worker.spare_pid == 0
        available[0] += 1
        site.serve(model(first))
        assert until(lambda: site.worker.spare_pid, "a spare")
