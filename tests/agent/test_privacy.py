"""What an application asks a model stays on the device: nothing of it is in anything that is sent, also when it fails."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
from pathlib import Path

import pytest

from tests.agent.daemon_kit import Agent, Site, site
from tests.agent.serving_kit import until
from tests.shared.engines import models
from wherry_agent import identity
from wherry_agent.answering.withheld import withhold

SECRET = 987654.0


class Recorder:
    """A forwarder that keeps what the device says."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream = ("127.0.0.1", upstream_port)
        self.said = bytearray()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._upstream, timeout=20)
            except OSError:
                return
            far.settimeout(None)
            threading.Thread(target=self._pump, args=(near, far, self.said), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, None), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                if kept is not None:
                    with self._lock:
                        kept += chunk
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def forms(value: float) -> list[bytes]:
    """Return how a value may look in a message: text, raw tensors, base64 of them."""
    raw = [struct.pack(code, value) for code in ("<f", "<d")] + [struct.pack("<i", int(value))]
    return [str(int(value)).encode(), *raw, *(base64.b64encode(one * 4)[:12] for one in raw)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("idx=98765 must be within the inclusive range [-2,1]", "idx=… must be within the inclusive range …"),
        ("could not convert 'Ada Lovelace' to float", "could not convert … to float"),
        ('got "x": -1.5e+10 and 0x7f', "got …: … and …"),
        ("deadline of 20 ms", "deadline of … ms"),
        ("Gather_12 in int8 [run_failed]", "Gather_12 in int8 [run_failed]"),
    ],
)
def test_an_errors_words_stay_and_its_values_do_not(text: str, expected: str) -> None:
    assert withhold(text) == expected


@pytest.mark.services
def test_nothing_that_was_asked_is_in_anything_that_is_sent(tmp_path: Path) -> None:
    with site(tmp_path) as server:
        server.release("1.0.0", models.scale(tmp_path / "one.onnx", 2.0))
        server.release("1.1.0", models.choosy(tmp_path / "two.onnx", 2.0))
        api, broker = Recorder(server.port), Recorder(server.broker_port)
        device = Agent(server, "lamp", "--config", str(settings(tmp_path)))
        try:
            use(server, device, api, broker)
            server.deploy("1.0.0", "lamp", trial_s=2)
            device.until_serves("1.0.0")
            for _ in range(20):
                assert device.infer(SECRET)[0] == 200
            server.deploy("1.1.0", "lamp", trial_s=120)
            device.until_doing("on trial")
            # the candidate fails on it, and the engine's words name the value; the incumbent answers
            until(lambda: device.infer(SECRET)[0] == 200 and device.model()["doing"] == "idle", "it went back", 60)
            device.until("all is told", lambda shown: shown["reports_owed"] == 0)
            assert server.call("POST", "/api/v1/devices/lamp/logs", {})[0] < 300
            until(lambda: b"/device/v1/logs" in api.said, "log lines were sent", 60)
            until(lambda: b'"windows":[{' in broker.said, "telemetry was sent", 60)
            assert device.stop() == 0
        finally:
            if device.child.poll() is None:
                device.child.kill()
                device.child.wait(10)
    everything = bytes(api.said) + bytes(broker.said)
    assert b"requests failed" in everything, "the failure itself is told"
    assert b"out of data bounds" in everything, "in words"
    for form in forms(SECRET):
        assert form not in everything


def settings(folder: Path) -> Path:
    path = folder / "agent.toml"
    path.write_text("window_s = 0.5\n")
    return path


def use(server: Site, device: Agent, api: Recorder, broker: Recorder) -> None:
    """Let the device speak to its server through the recorders only."""
    device.until("it enrolled", lambda shown: shown["connected"] == "mqtt")
    device.stop()
    path = identity.folder(device.home) / identity.DEVICE_FILE
    known = json.loads(path.read_bytes())
    changed = {"broker_port": broker.port, "server": f"http://127.0.0.1:{api.port}"}
    path.write_text(json.dumps({**known, **changed}))
    real, server.url = server.url, f"http://127.0.0.1:{api.port}"
    try:
        device.start()
    finally:
        server.url = real
    device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
