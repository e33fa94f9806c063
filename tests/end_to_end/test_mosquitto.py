"""Another broker than the embedded one: a real agent and the server's roles meet in mosquitto, as they would in production.

Plain and on loopback; what a broker with mutual TLS adds comes with the production deployment.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_link import identity, nothing
from tests.end_to_end.test_first_day import dense_model
from tests.server.harness import Running, free_port, running
from tests.server.test_cli import said, wherry
from tests.server.test_director_process import role
from tests.services import needs
from wherry_agent import link as link_module
from wherry_agent.identity import Identity
from wherry_agent.link import Callbacks
from wherry_optimizer.pack import pack_model
from wherry_server import broker, mqtt
from wherry_server.settings import Settings
from wherry_shared import frames, topics
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX
from wherry_shared.publishing import PublisherKey, push, sign
from wherry_simulators.processes import Child, wait_for

pytestmark = pytest.mark.services
WAIT_S = 60.0


@contextmanager
def mosquitto(folder: Path, port: int) -> Iterator[Path]:
    """Run mosquitto with a configuration of its own; gives its log, which names every packet."""
    needs("mosquitto")
    configuration, log = folder / "mosquitto.conf", folder / "mosquitto.log"
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nmessage_size_limit {MQTT_PAYLOAD_BYTES_MAX}\n"
        "log_dest stderr\nlog_type all\n"
    )
    with log.open("wb") as out:
        broker = subprocess.Popen(
            [str(shutil.which("mosquitto")), "-c", str(configuration)], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            wait_for("mosquitto", lambda: "running" in log.read_text(), WAIT_S)
            yield log
        finally:
            broker.kill()
            broker.wait()


def test_a_release_reaches_a_device_and_its_word_the_server_through_mosquitto(tmp_path: Path) -> None:
    port = free_port()
    with (
        mosquitto(tmp_path, port) as log,
        running(tmp_path / "data", broker_port=port) as server,
        role("director", _saved(server)),
    ):
        packed = pack_model(
            dense_model(tmp_path / "model.onnx", 1), output=tmp_path, name="my-model", version="1.0.0", licence="MIT"
        )
        key = PublisherKey.open(tmp_path / "publisher.pem")
        with server.remote() as remote:
            sign(packed.path, remote, key)
            push(packed.path, remote, key)
        given = ["--server", server.url, "--token", server.enrolment_token(), "--home", str(tmp_path / "device")]
        arguments = ["wherry_agent.cli", "run", *given, "--name", "bench-1", "--http-port", "0"]
        agent = Child("bench-1", arguments, tmp_path / "agent.log").start()
        try:
            wait_for("the agent to enrol", lambda: said(server, "device", "list"), WAIT_S)
            (device,) = said(server, "device", "list")  # type: ignore[misc]
            done = wherry(server, "deploy", "my-model:1.0.0", "--device", "bench-1", "--trial", "1", "--watch")
            assert done.returncode == 0, done.stdout + done.stderr + agent.tail()
            wait_for("telemetry", lambda: f"/{device['id']}/report'" in log.read_text(), WAIT_S)  # type: ignore[index]
        finally:
            agent.stop()
        packets = log.read_text()
        for direction, topic in (("to", "offer"), ("from", "report"), ("from", "hello"), ("to", "ack")):
            named = f"{device['id']}/{topic}'"  # type: ignore[index]
            lines = [line for line in packets.splitlines() if "PUBLISH" in line and named in line]
            assert any(("Received" if direction == "from" else "Sending") in line for line in lines), (topic, packets)


async def _first_heard(port: int, device: Identity) -> bytes:
    """Return the first hello that a server hears that subscribes now."""
    link = mqtt.Link("127.0.0.1", port, name="late", filters=[topics.ingest_filter("hello")])
    heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
    link.on_message = lambda topic, payload: heard.put_nowait((topic, payload))
    task = asyncio.create_task(link.run())
    try:
        topic, frame = await asyncio.wait_for(heard.get(), WAIT_S)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert topic == topics.up(device.device, "hello")
    return frames.unseal(device.frame_key, "hello", device.device, frame)


@contextmanager
def embedded(folder: Path, port: int) -> Iterator[None]:
    """Run the broker of `wherry dev`."""
    settings = Settings(data=folder / "server", broker_port=port)
    settings.data.mkdir()
    settings.save()
    with role("broker", settings):
        wait_for("the broker", lambda: broker.answers(settings), WAIT_S)
        yield


@pytest.mark.parametrize("started", [mosquitto, embedded], ids=["mosquitto", "embedded"])
def test_a_server_that_subscribes_late_gets_the_last_hello_of_each_device(started: Any, tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port):
        known = identity(port)
        up = threading.Event()
        callbacks = Callbacks(
            up=up.set, down=nothing, offer=nothing, ack=nothing, reached=nothing, outgoing=lambda _kind: []
        )
        link = link_module.Link(tmp_path, known, known.server, callbacks)
        link.start()
        try:
            assert up.wait(WAIT_S)
            assert link.publish("hello", b"what was")
            assert link.publish("hello", b"what is")
            wait_for("the broker to have both", lambda: asyncio.run(_first_heard(port, known)) == b"what is", WAIT_S)
        finally:
            link.stop()
        assert asyncio.run(_first_heard(port, known)) == b"what is", "also when the device is gone"


def _saved(server: Running) -> Settings:
    """Write the settings where a role of its own process reads them."""
    server.settings.save()
    return server.settings
