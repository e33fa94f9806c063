"""The director as a process, with a real broker: killed in the middle of a stage, it goes on where its rows are."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from sqlalchemy import insert

from tests.server.fleet_kit import MODEL, PROJECT, FakeDevice, enrol_rows, manifest_of
from tests.server.harness import free_port, in_database, until
from wherry_server import broker as brokers
from wherry_server import rollouts
from wherry_server.db.database import Database
from wherry_server.db.tables import Bundle
from wherry_server.services import prepare
from wherry_server.settings import Settings
from wherry_shared import frames, ids, topics, wire

DEVICES = 24
pytestmark = pytest.mark.services


class Fleet:
    """Fake devices behind one MQTT connection (the development broker has no access control)."""

    def __init__(self, settings: Settings, devices: list[FakeDevice]) -> None:
        self.devices = {device.id: device for device in devices}
        self.lock = threading.Lock()
        self.acked: set[tuple[str, int]] = set()
        self.serials: dict[str, list[int]] = {device.id: [] for device in devices}
        self.held: set[str] = set()
        """Devices that hear offers but say nothing yet."""
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="fleet")
        self.client.reconnect_delay_set(min_delay=1, max_delay=1)
        self.client.on_connect = self.connected
        self.client.on_message = self.received
        self.client.connect_async(settings.broker_host, settings.broker_port)
        self.client.loop_start()

    def connected(self, client: Any, *_: Any) -> None:
        for device in self.devices.values():
            client.subscribe([(topics.down(device.id, "offer"), 1), (topics.down(device.id, "ack"), 0)])
        with self.lock:
            for device in self.devices.values():
                client.publish(topics.up(device.id, "hello"), device.hello(), qos=1)

    def received(self, _client: Any, _user: Any, message: Any) -> None:
        _, name, kind = message.topic.split("/")
        with self.lock:
            device = self.devices[name]
            if kind == "ack":
                device.take_ack(message.payload)
                ack = wire.parse(wire.Ack, frames.unseal(device.key, "ack", name, message.payload))
                self.acked |= {(name, seq) for seq in range(1, ack.seq + 1)}
            elif device.take_offer(message.payload):
                self.serials[name].append(device.known[1])
                self.send(device)

    def send(self, device: FakeDevice) -> None:
        if device.id not in self.held:
            for frame in device.owed_frames():
                self.client.publish(topics.up(device.id, "report"), frame, qos=1)

    def send_again(self) -> None:
        """What real devices do with back-off."""
        with self.lock:
            for device in self.devices.values():
                self.send(device)

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@contextmanager
def role(name: str, settings: Settings, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A role of the server as a process of its own."""
    command = [sys.executable, "-m", "wherry_server.cli", "serve", name, "--data", str(settings.data), *more]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def asked(settings: Settings, work: Any) -> Any:
    """Run `work(database)` in a loop and connection of its own."""

    async def run() -> Any:
        database = Database.open(settings.database_url)
        try:
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(run())


def show(settings: Settings, number: int) -> dict[str, Any]:
    async def work(database: Database) -> Any:
        async with database.read() as connection:
            return await rollouts.show(connection, PROJECT, number, fresh_s=0)

    found: dict[str, Any] = asked(settings, work)
    return found


def rows(settings: Settings, sql: str) -> list[Any]:
    async def work(connection: Any) -> list[Any]:
        return list((await connection.exec_driver_sql(sql)).all())

    return in_database(settings, work)


def stocked(settings: Settings, *versions: str) -> list[FakeDevice]:
    """Put a bundle, or more, and devices into what was prepared, and return the devices."""
    master = settings.master_key_file.read_bytes()
    devices = [
        FakeDevice(name, frames.device_key(master, name)) for name in (ids.new_device_id() for _ in range(DEVICES))
    ]

    async def publish(connection: Any) -> None:
        await connection.execute(
            insert(Bundle),
            [
                {
                    "project_id": PROJECT,
                    "model": MODEL,
                    "version": version,
                    "manifest": manifest_of(version),
                    "manifest_bytes": 1,
                    "config": {},
                    "total_bytes": 1,
                    "created_at": 1,
                    "created_by": "test",
                }
                for version in versions or ("1.1.0",)
            ],
        )

    in_database(settings, publish)
    asked(settings, lambda database: enrol_rows(database, list({d.id for d in devices})))
    return devices


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Settings, list[FakeDevice]]:
    """A data folder with one bundle and enrolled devices."""
    settings = Settings.load(tmp_path / "data", broker_port=free_port(), project=PROJECT)
    settings.save()
    prepare(settings)
    return settings, stocked(settings)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_stage_it_loses_nothing_acknowledged_and_exposes_nobody_twice(prepared):
    settings, devices = prepared
    wish = {
        "models": [{"model": MODEL, "version": "1.1.0"}],
        "selector": "all",
        "stages": [{"share": 0.5}, {"share": 1.0}],
        "settled_share": 1.0,
        "start": True,
    }
    number = asked(settings, lambda database: rollouts.create(database, PROJECT, "test", wish))["number"]
    with role("broker", settings) as broker:
        until(lambda: brokers.answers(settings))
        fleet = Fleet(settings, devices)
        fleet.held = {device.id for device in devices[::2]}  # the stage cannot end before they speak
        try:
            with role("director", settings) as director:
                until(lambda: show(settings, number)["counts"]["real"]["confirmed"] > 0)
                until(lambda: len(fleet.acked) > 0)
                director.kill()
                director.wait()
                acknowledged = set(fleet.acked)
                exposed = len(rows(settings, "SELECT 1 FROM assignment"))
                assert exposed == DEVICES // 2
                assert show(settings, number)["state"] == "running"
                stored = {(row[0], row[1]) for row in rows(settings, "SELECT device_id, seq FROM report_log")}
                assert acknowledged <= stored
            # nobody directs now; devices go on and hold what is not acknowledged
            fleet.held = set()
            fleet.send_again()
            with role("director", settings):
                until(lambda: (fleet.send_again(), show(settings, number)["stage"] == 1)[1])
                broker.kill()  # and the broker forgets every offer that it was given
                broker.wait()
                with role("broker", settings):
                    until(lambda: brokers.answers(settings))
                    until(lambda: (fleet.send_again(), show(settings, number)["state"] == "done")[1], 40)
                    until(lambda: (fleet.send_again(), not any(device.owed for device in devices))[1])
            assert show(settings, number)["counts"]["real"]["confirmed"] == DEVICES
            assert {device.running for device in devices} == {manifest_of("1.1.0")}
            assert all(serials == [1] for serials in fleet.serials.values())
            stored = {(row[0], row[1]) for row in rows(settings, "SELECT device_id, seq FROM report_log")}
            assert fleet.acked == stored
            assert len(stored) == sum(device.seq for device in devices)
        finally:
            fleet.stop()


def test_a_broker_full_of_rubbish_stops_nobody(prepared):
    settings, devices = prepared
    wish = {
        "models": [{"model": MODEL, "version": "1.1.0"}],
        "selector": "all",
        "stages": [{"share": 1.0}],
        "start": True,
    }
    number = asked(settings, lambda database: rollouts.create(database, PROJECT, "test", wish))["number"]
    with role("broker", settings), role("director", settings):
        until(lambda: brokers.answers(settings))
        fleet = Fleet(settings, devices)
        try:
            name = devices[0].id
            rubbish = [b"", b"x", b"\xff" * 1000, b"A" * 43 + b"." + b"{}", devices[1].hello(), b"[" * 50_000]
            for kind in ("hello", "report", "telemetry"):
                for payload in rubbish:
                    fleet.client.publish(topics.up(name, kind), payload, qos=1)  # type: ignore[arg-type]
            for topic in (f"w1/zz/{name}/report", f"w1/{ids.shard(name)}/short/report", f"w1/00/{name}/nonsense"):
                fleet.client.publish(topic, b"x", qos=1)
            until(lambda: (fleet.send_again(), show(settings, number)["state"] == "done")[1])
        finally:
            fleet.stop()
