"""The port and the unix socket for gRPC, which a worker opens itself: whoever asks is told whether it could."""

from __future__ import annotations

import os
import queue
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.agent.daemon_kit import free_ports
from tests.agent.serving_kit import loadable, until, worker
from tests.agent.swap_kit import supervised
from tests.shared.engines import models
from wherry_agent import children, status
from wherry_agent.children import ServeModel
from wherry_agent.socket_name import SocketName


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
    shown = {"grpc": "127.0.0.1:1", "grpc_doing": "waiting for the port", "grpc_socket": "/run/g.sock"}
    assert status._grpc(shown) == ", gRPC 127.0.0.1:1 (waiting for the port), gRPC unix:/run/g.sock"
    shown |= {"grpc_doing": "served", "grpc_socket_doing": "not served"}
    assert status._grpc(shown) == ", gRPC 127.0.0.1:1, gRPC unix:/run/g.sock (not served)"


def asked(path: Path, value: float) -> bool:
    """Ask once over a new connection; tell whether the answer is `value`, False if nobody answers in this moment."""
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
    with triton.InferenceServerClient(f"unix:{path}") as client:
        try:
            return bool((client.infer("scale", [tensor], client_timeout=20).as_numpy("y") == value).all())
        except triton.InferenceServerException as error:
            if error.status() != "StatusCode.UNAVAILABLE":
                raise
            return False


def test_one_unix_socket_leads_to_whichever_worker_answers(tmp_path: Path) -> None:
    one, two = (loadable(models.scale(tmp_path / f"{n}.onnx", n), f"1.{n}.0") for n in (2.0, 3.0))
    with supervised(tmp_path, grpc_port=free_ports(1)[0]) as site:

        def sockets() -> set[str]:
            return {path.name for path in tmp_path.glob("grpc*")}

        site.serve(ServeModel(name="scale", active=one))
        until(lambda: site.grpc_path.exists() and asked(site.grpc_path, 2.0), "the first worker answers")
        first = site.grpc_path.readlink()
        assert stat.S_IMODE(site.grpc_path.stat().st_mode) == 0o660
        with grpc.insecure_channel(f"unix:{site.grpc_path}") as channel:
            grpc.channel_ready_future(channel).result(20)
            site.serve(ServeModel(name="scale", active=two))  # in the process
            assert asked(site.grpc_path, 3.0)
            assert site.hand_over() == ""
            second = site.grpc_path.readlink()
            assert second != first
            assert asked(site.grpc_path, 3.0), "the name leads to the next worker before the old one goes"
            until(lambda: len(site.gone) == 1, "the old worker has ended, and unlinked what it opened")
            assert asked(site.grpc_path, 3.0)
            assert sockets() == {"grpc.sock", str(second)}
            # a connection from before the change is made anew, to the same name
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert live(b"", timeout=20, wait_for_ready=True) == b"\x08\x01"
        os.kill(site.worker.pid, signal.SIGKILL)
        until(lambda: site.grpc_path.readlink() != second and asked(site.grpc_path, 3.0), "after a crash", 60)
        assert sockets() == {"grpc.sock", str(site.grpc_path.readlink())}
    assert sockets() == set()


def test_shared_memory_is_refused_over_the_unix_socket_which_names_no_user(tmp_path: Path) -> None:
    path = tmp_path / "g.sock"
    with worker(tmp_path, WHERRY_GRPC_PORT=str(free_ports(1)[0]), WHERRY_GRPC_SOCKET=str(path)) as process:
        process.send(children.Serve(revision=1, models=[]))
        assert process.event(children.Grpc).socket == ""
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, "the supervisor opens it to others, nobody before"
        with triton.InferenceServerClient(f"unix:{path}") as client:
            assert client.is_server_live()
            for call in (
                lambda: client.register_system_shared_memory("r", "/r", 8),
                client.get_system_shared_memory_status,
            ):
                with pytest.raises(triton.InferenceServerException, match="over gRPC's port or HTTP"):
                    call()


@pytest.mark.parametrize("path", ["/nowhere/g.sock", f"/tmp/{'x' * 107}"])
def test_a_worker_without_a_unix_socket_serves_the_port_and_says_why(tmp_path: Path, path: str) -> None:
    port = free_ports(1)[0]
    with worker(tmp_path, WHERRY_GRPC_PORT=str(port), WHERRY_GRPC_SOCKET=path) as process:
        process.send(children.Serve(revision=1, models=[]))
        said = process.event(children.Grpc)
        assert (said.doing, said.socket.partition(":")[0]) == ("served", "not served")
        socket.create_connection(("127.0.0.1", port), timeout=20).close()


def test_a_name_clears_up_what_others_left_and_leads_to_what_is_there(tmp_path: Path) -> None:
    for left in ("g.sock", "g-123456.sock", "g-123456.link"):
        (tmp_path / left).touch()
    shared: list[Path] = []
    name = SocketName(tmp_path / "g.sock", shared.append)
    assert list(tmp_path.iterdir()) == []
    one, two = name.fresh(), name.fresh()
    for path in (one, two):
        with pytest.raises(FileNotFoundError):
            name.lead_to(path)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
        for _ in range(2):
            name.lead_to(path)
            assert (tmp_path / "g.sock").readlink() == Path(path.name)
    assert shared == [one, one, two, two]
    name.forget(one)
    name.forget(one)
    assert sorted(tmp_path.iterdir()) == sorted([two, tmp_path / "g.sock"])
    name.close()
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_go_past_protobuf_unchanged(tmp_path: Path) -> None:
    width, path = 50_000, tmp_path / "g.sock"
    large = loadable(models.scale(tmp_path / "m.onnx", 2.0, width=width), interface=models.interface(width=width))
    with worker(tmp_path, WHERRY_GRPC_PORT=str(free_ports(1)[0]), WHERRY_GRPC_SOCKET=str(path)) as process:
        process.serve(ServeModel(name="scale", active=large))
        process.event(children.Grpc)
        rng = np.random.default_rng(0)
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        with triton.InferenceServerClient(f"unix:{path}") as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            for length in range(1, 9):  # of the request's id, so that the tensor begins at any address
                x = rng.random((2, width), np.float32)
                tensor = triton.InferInput("x", list(x.shape), "FP32")
                tensor.set_data_from_numpy(x)
                found = client.infer("scale", [tensor], request_id="i" * length, client_timeout=20)
                assert np.array_equal(found.as_numpy("y"), 2 * x)
                client.async_stream_infer("scale", [tensor], request_id="s" * length)
                found, error = answers.get(timeout=20)
                assert error is None
                assert np.array_equal(found.as_numpy("y"), 2 * x)
                assert found.get_response().id == "s" * length
            tensor = triton.InferInput("x", [2, width - 1], "FP32")
            tensor.set_data_from_numpy(x[:, 1:])
            client.async_stream_infer("scale", [tensor], request_id="wrong")
            found, error = answers.get(timeout=20)
            assert "shape" in error.message()
            client.stop_stream()
            with pytest.raises(triton.InferenceServerException, match="shape"):
                client.infer("scale", [tensor])
