"""Telemetry messages per second, end to end: devices → broker → ingest → SQLite (synchronous=FULL), committed and acknowledged.

Every device is an MQTT connection of its own that keeps at most 20 messages unacknowledged, as the protocol says, and
counts a message only when its end-to-end acknowledgement came. Broker and director are processes of their own.

    python benchmarks/telemetry_per_s.py [--devices 200] [--messages 300]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from sqlalchemy import insert, text

from wherry_server.db.database import Database
from wherry_server.db.tables import Device
from wherry_server.services import prepare
from wherry_server.settings import Settings
from wherry_shared import frames, ids, topics, wire
from wherry_shared.limits import STREAM_IN_FLIGHT_MAX

STALLED_S = 3.0
OUT = Path(__file__).parents[1] / "build" / "bench" / "telemetry_per_s.json"


def text_field(value: str) -> bytes:
    """An MQTT string."""
    data = value.encode()
    return struct.pack("!H", len(data)) + data


def packet(kind: int, body: bytes) -> bytes:
    """An MQTT 3.1.1 control packet."""
    size, length = len(body), b""
    while True:
        size, digit = divmod(size, 128)
        length += bytes([digit | (0x80 if size else 0)])
        if not size:
            return bytes([kind]) + length + body


class Sender(asyncio.Protocol):
    """One device: sends prebuilt frames in order, a window at a time, and moves on with each acknowledgement."""

    def __init__(self, device: str, key: bytes, count: int) -> None:
        self.device, self.key, self.count = device, key, count
        self.topic = text_field(topics.up(device, "telemetry"))
        self.frames = [self.frame(seq) for seq in range(1, count + 1)]
        self.sent = self.acked = 0
        self.done = asyncio.get_running_loop().create_future()
        self.ready = asyncio.get_running_loop().create_future()
        self.buffer = b""
        self.moved = time.monotonic()

    def frame(self, seq: int) -> bytes:
        """One minute of one model, as an agent sends it."""
        window = wire.Window(
            model="file-type",
            manifest="sha256:" + "a" * 64,
            variant="int8",
            arm="incumbent",
            start=1_700_000_000_000_000 + seq * 60_000_000,
            duration_us=60_000_000,
            requests=120,
            latency_us={"11": {str(500 + step): 3 for step in range(8)}},
            wait_us={"300": 120},
        )
        message = wire.Telemetry(format=1, device=self.device, epoch="bench", seq=seq, first=1, at=1, windows=[window])
        return frames.seal(self.key, "telemetry", self.device, wire.encode(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect and subscribe to the acknowledgements."""
        self.transport = transport
        hello = text_field("MQTT") + bytes([4, 2]) + struct.pack("!H", 60) + text_field(self.device)
        transport.write(packet(0x10, hello))  # type: ignore[attr-defined]
        wanted = struct.pack("!H", 1) + text_field(topics.down(self.device, "ack")) + b"\0"
        transport.write(packet(0x82, wanted))  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Take whole packets off the stream."""
        self.buffer += data
        while True:
            size = shift = 0
            at = 1
            while at < len(self.buffer) and at < 5:
                byte = self.buffer[at]
                size |= (byte & 0x7F) << shift
                shift += 7
                at += 1
                if not byte & 0x80:
                    break
            else:
                return
            if len(self.buffer) < at + size:
                return
            kind, body, self.buffer = self.buffer[0] & 0xF0, self.buffer[at : at + size], self.buffer[at + size :]
            if kind == 0x90 and not self.ready.done():
                self.ready.set_result(None)
            elif kind == 0x30:
                length = struct.unpack_from("!H", body)[0]
                payload = frames.unseal(self.key, "ack", self.device, body[2 + length :])
                self.take(wire.parse(wire.Ack, payload).seq)

    def take(self, seq: int) -> None:
        """An acknowledgement."""
        if seq > self.acked:
            self.acked, self.moved = seq, time.monotonic()
            self.send()
            if self.acked >= self.count and not self.done.done():
                self.done.set_result(None)

    def send(self) -> None:
        """Fill the window."""
        out = []
        while self.sent < min(self.count, self.acked + STREAM_IN_FLIGHT_MAX):
            number = struct.pack("!H", self.sent % 65_000 + 1)
            out.append(packet(0x32, self.topic + number + self.frames[self.sent]))
            self.sent += 1
        if out:
            self.transport.write(b"".join(out))  # type: ignore[attr-defined]

    def nudge(self) -> None:
        """Send again what was not acknowledged for long: an acknowledgement has QoS 0 and may be lost."""
        if not self.done.done() and time.monotonic() - self.moved > STALLED_S:
            self.sent, self.moved = self.acked, time.monotonic()
            self.send()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_broker(settings: Settings, folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Start mosquitto if it is there, the embedded broker if not."""
    program = shutil.which("mosquitto") or ("/usr/sbin/mosquitto" if Path("/usr/sbin/mosquitto").exists() else None)
    if program is None:
        command = [sys.executable, "-m", "wherry_server.cli", "serve", "broker", "--data", str(settings.data)]
        return "iotcore", subprocess.Popen(command, stdin=subprocess.PIPE)
    configuration = folder / "mosquitto.conf"
    configuration.write_text(
        f"listener {settings.broker_port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\npersistence false\n"
        "max_inflight_messages 1000\nmax_queued_messages 100000\nlog_type error\n"
    )
    return "mosquitto", subprocess.Popen([program, "-c", str(configuration)])


async def reachable(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise SystemExit("the broker did not start")


async def enrol(settings: Settings, devices: list[str]) -> None:
    database = Database.open(settings.database_url)
    values = [
        {
            "id": one,
            "project_id": settings.project,
            "name": one,
            "labels": {},
            "facts": {},
            "bearer_hash": "",
            "key_digest": one,
            "enrolled_at": 1,
        }
        for one in devices
    ]
    async with database.write() as connection:
        await connection.execute(insert(Device), values)
    await database.close()


async def measure(settings: Settings, devices: int, messages: int) -> tuple[float, int]:
    """Return (seconds, rows stored)."""
    master = settings.master_key_file.read_bytes()
    names = [ids.new_device_id() for _ in range(devices)]
    await enrol(settings, names)
    await reachable(settings.broker_port)
    loop = asyncio.get_running_loop()
    senders = []
    for name in names:
        _, sender = await loop.create_connection(
            lambda name=name: Sender(name, frames.device_key(master, name), messages), "127.0.0.1", settings.broker_port
        )
        senders.append(sender)
    await asyncio.gather(*(sender.ready for sender in senders))
    senders[0].send()  # the director is there once it has acknowledged the first window
    while senders[0].acked == 0:
        await asyncio.sleep(0.2)
        senders[0].nudge()
    before = senders[0].acked
    started = time.perf_counter()
    for sender in senders:
        sender.moved = time.monotonic()
        sender.send()
    waiting = asyncio.gather(*(sender.done for sender in senders))
    while not waiting.done():
        await asyncio.wait([waiting], timeout=1)
        for sender in senders:
            sender.nudge()
    seconds = time.perf_counter() - started
    database = Database.open(settings.database_url)
    async with database.read() as connection:
        stored = int(await connection.scalar(text("SELECT count(*) FROM telemetry_log")) or 0)
        windows = int(await connection.scalar(text("SELECT count(*) FROM telemetry_window")) or 0)
    await database.close()
    if not stored == windows == devices * messages:
        raise SystemExit(f"{devices * messages} sent, {stored} stored, {windows} windows: not every message once")
    return seconds, stored - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--messages", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=f"wherry-bench-{secrets.token_hex(2)}-") as name:
        folder = Path(name)
        settings = Settings.load(folder / "data", broker_port=free_port())
        settings.save()
        prepare(settings)
        kind, broker = start_broker(settings, folder)
        director = subprocess.Popen(
            [sys.executable, "-m", "wherry_server.cli", "serve", "director", "--data", str(settings.data)],
            stdin=subprocess.PIPE,
        )
        try:
            seconds, stored = uvloop.run(measure(settings, options.devices, options.messages))
        finally:
            for process in (director, broker):
                process.kill()
                process.wait()
    rate = round(stored / seconds)
    print(f"{stored} messages of {options.devices} devices in {seconds:.2f} s through {kind}: {rate} per second")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"telemetry_per_s": rate, "broker": kind, "devices": options.devices}) + "\n")


if __name__ == "__main__":
    main()
