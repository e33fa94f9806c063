"""The port for gRPC, which a worker opens itself: whoever asks is told whether it could."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.agent.serving_kit import until, worker
from tests.agent.swap_kit import supervised
from wherry_agent import children, status


def test_a_worker_says_that_it_waits_for_the_port_and_that_it_has_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with worker(tmp_path, WHERRY_GRPC_PORT=str(port)) as process:
            process.send(children.Serve(revision=1, models=[]))
            assert process.event(children.Grpc).doing == "waiting for the port"
            taken.close()
            assert process.event(children.Grpc).doing == "served"
            socket.create_connection(("127.0.0.1", port), timeout=20).close()


def test_the_supervisor_hears_it_also_of_the_worker_that_follows(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, supervised(tmp_path, grpc_port=taken.getsockname()[1]) as site:

        def said() -> list[str]:
            return [event.doing for event in site.events if isinstance(event, children.Grpc)]

        site.tell()
        until(lambda: said() == ["waiting for the port"], "the worker waits")
        taken.close()
        until(lambda: said()[-1] == "served", "it has the port")
        assert site.hand_over() == ""
        until(lambda: said().count("served") == 2, "the next one has it")


def test_the_status_says_it() -> None:
    shown = {"grpc": "127.0.0.1:1", "grpc_doing": "waiting for the port"}
    assert status._grpc(shown) == ", gRPC 127.0.0.1:1 (waiting for the port)"
    assert status._grpc({**shown, "grpc_doing": "served"}) == ", gRPC 127.0.0.1:1"
