"""What an application asks a model stays on the device: nothing of it is in anything that is sent, also when it fails.

Unless its offer asks for samples *and* the device's own settings consent: either alone changes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.agent.daemon_kit import Agent, Site, site
from tests.agent.serving_kit import until
from tests.offering import offer
from tests.shared.engines import models
from wherry_agent import identity, sampling, status
from wherry_agent.answering.withheld import withhold
from wherry_server.settings import Settings
from wherry_shared.limits import SAMPLE_SHARE_MAX

SECRET = 987654.0
SAMPLE = base64.b64encode(struct.pack("<4f", SECRET, 1.0, 2.0, 3.0))
"""How what is asked below is written in a sample."""
ASKED = {sampling.FLAG: {"scale": SAMPLE_SHARE_MAX}}


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
@pytest.mark.slow
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
            everything = bytes(api.said) + bytes(broker.said)
            assert b"requests failed" in everything, "the failure itself is told"
            assert b"out of data bounds" in everything, "in words"
            assert not leaked(api, broker)
            check_that_no_secret_was_told(device, broker)
            check_that_a_sample_needs_the_offer_and_the_owner(server, device, api, broker)
        finally:
            if device.child.poll() is None:
                device.child.kill()
                device.child.wait(10)


def check_that_no_secret_was_told(device: Agent, broker: Recorder) -> None:
    """Neither by a message of the broker's, nor in the log of the supervisor and its children, nor in what the doctor says."""
    known = identity.load(device.home)
    assert known is not None
    key = (identity.pair_folder(device.home, known) / identity.KEY_FILE).read_text().splitlines()[2]
    doctor = [sys.executable, "-m", "wherry_agent.cli", "doctor", "--json", "--home", str(device.home)]
    told = {
        "broker": bytes(broker.said).decode("latin-1"),
        "log": device.log.read_text(),
        "doctor": subprocess.run(doctor, capture_output=True, text=True, timeout=120).stdout,
    }
    secrets = {"bearer": known.bearer, "frame key": known.mac_key, "private key": key, "token": device.site.enrolment}
    assert all(told.values())
    for place, text in told.items():
        assert not [name for name, secret in secrets.items() if secret in text], place


def check_that_a_sample_needs_the_offer_and_the_owner(
    server: Site, device: Agent, api: Recorder, broker: Recorder
) -> None:
    known = identity.load(device.home)
    assert known is not None

    def windows() -> int:
        return bytes(broker.said).count(b'"windows":[{')

    def hears() -> None:
        """Ask, and wait until what was counted afterwards has left the device."""
        for _ in range(2):
            before = windows()
            for _ in range(15):
                assert device.infer(SECRET)[0] == 200
            until(lambda before=before: windows() > before, "a window has left it", 60)

    # the offer asks, and nobody consented
    offer(Settings(data=server.data), known.device, {}, ASKED)
    start(server, device, api)
    device.until("it has its flags", lambda shown: shown["flags"] and shown["models"]["scale"]["doing"] == "idle")
    hears()
    assert "asked for, and not sent" in status.render(device.status())
    assert not leaked(api, broker)

    # both
    device.stop()
    settings(server.folder, 'samples_consent = ["scale"]\n')
    start(server, device, api)
    until(lambda: device.child.poll() is None and device.status()["running"], "it runs", 60)
    until(lambda: device.infer(SECRET)[0] == 200 and SAMPLE in bytes(broker.said), "a sample is sent", 60)
    query = "SELECT 1 FROM telemetry_window WHERE instr(body, ?) > 0"
    until(lambda: stored(server, query, SAMPLE), "and stored", 60)

    # the owner consented, and the offer does not ask any more
    offer(Settings(data=server.data), known.device, {}, {})
    device.until("it has none", lambda shown: not shown["flags"])
    before = bytes(broker.said).count(SAMPLE)
    hears()
    assert bytes(broker.said).count(SAMPLE) == before


def stored(server: Site, query: str, *values: bytes) -> list[tuple[int]]:
    path = server.data / "wherry.sqlite"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
        return connection.execute(query, values).fetchall()


def leaked(*recorders: Recorder) -> list[bytes]:
    said = b"".join(bytes(one.said) for one in recorders)
    return [form for form in (SAMPLE, *forms(SECRET)) if form in said]


def settings(folder: Path, more: str = "") -> Path:
    path = folder / "agent.toml"
    path.write_text(f"window_s = 0.5\n{more}")
    return path


def use(server: Site, device: Agent, api: Recorder, broker: Recorder) -> None:
    """Let the device speak to its server through the recorders only."""
    device.until("it enrolled", lambda shown: shown["connected"] == "mqtt")
    device.stop()
    path = identity.folder(device.home) / identity.DEVICE_FILE
    known = json.loads(path.read_bytes())
    changed = {"broker_port": broker.port, "server": f"http://127.0.0.1:{api.port}"}
    path.write_text(json.dumps({**known, **changed}))
    start(server, device, api)
    device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])


def start(server: Site, device: Agent, api: Recorder) -> None:
    """Start the device so that it asks its server through the recorder."""
    real, server.url = server.url, f"http://127.0.0.1:{api.port}"
    try:
        device.start()
    finally:
        server.url = real
