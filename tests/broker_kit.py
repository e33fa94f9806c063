"""A mosquitto in production form for tests: as `wherry broker config` writes it, with devices that enrolled at a real server."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import queue
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.server.harness import Running, csr, enrol, free_port, running, until
from tests.services import needs
from wherry_server import broker_config
from wherry_server.services import Services, open_services
from wherry_server.settings import Settings
from wherry_shared import topics, wire


@dataclass
class Client:
    """An MQTT client that writes down what it hears."""

    client: paho.Client
    heard: queue.SimpleQueue[tuple[str, bytes]] = field(default_factory=queue.SimpleQueue)
    codes: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)
    """0 for a connection that was let in, anything else for one that was not."""
    ends: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)

    def hear(self, wait_s: float = 20.0) -> tuple[str, bytes]:
        return self.heard.get(timeout=wait_s)

    def all_heard(self) -> list[tuple[str, bytes]]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.heard.get_nowait())
        return found

    def subscribe(self, *filters: str) -> None:
        """Subscribe one by one, whatever the broker says to it."""
        granted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.client.on_subscribe = lambda *words: granted.put(1)
        for one in filters:
            self.client.subscribe(one, qos=1)
        for _ in filters:
            granted.get(timeout=20)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        self.client.publish(topic, payload, qos=qos, retain=retain).wait_for_publish(20)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@dataclass
class Member:
    """An enrolled device and the files of its certificate."""

    answer: wire.EnrolAnswer
    pair: Path
    """Certificate and key."""

    @property
    def id(self) -> str:
        return self.answer.device


@dataclass
class Guarded:
    """A server whose broker is guarded."""

    server: Running
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def settings(self) -> Settings:
        return self.server.settings

    def device(self, name: str) -> Member:
        key = ec.generate_private_key(ec.SECP256R1())
        answer = enrol(self.server, self.server.enrolment_token(), name, csr_pem=csr(key))
        assert answer.status_code == 200, answer.text
        return self.member(name, wire.parse(wire.EnrolAnswer, answer.content), key)

    def member(self, name: str, answer: wire.EnrolAnswer, key: ec.EllipticCurvePrivateKey) -> Member:
        pair = self.folder / f"{name}.pem"
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pair.write_bytes(answer.certificate_pem.encode() + secret)
        return Member(answer, pair)

    def context(self, pair: Path | None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(self.settings.keys_folder / "devices-ca.pem"))
        if pair is not None:
            made.load_cert_chain(pair)
        return made

    def connect(
        self,
        pair: Path | None,
        client_id: str,
        *,
        port: int = 0,
        version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311,
        will: tuple[str, bytes] | None = None,
        context: ssl.SSLContext | None = None,
        clean: bool = True,
    ) -> Client:
        """Connect without waiting for an answer."""
        options: dict[str, Any] = {} if version == MQTTProtocolVersion.MQTTv5 else {"clean_session": clean}
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version, reconnect_on_failure=False, **options
        )
        client.tls_set_context(context or self.context(pair))
        made = Client(client)
        client.on_connect = lambda _c, _d, _f, code, _p: made.codes.put(code.value)
        client.on_disconnect = lambda _c, _d, _f, code, _p: made.ends.put(str(code))
        client.on_message = lambda _c, _d, message: made.heard.put((message.topic, message.payload))
        if will is not None:
            client.will_set(*will, qos=1)
        client.connect("127.0.0.1", port or self.settings.broker_port, keepalive=20)
        client.loop_start()
        return made

    def let_in(self, pair: Path, client_id: str, **words: Any) -> Client:
        made = self.connect(pair, client_id, **words)
        assert made.codes.get(timeout=20) == 0
        return made

    def kept_out(self, pair: Path | None, client_id: str = "whoever", **words: Any) -> bool:
        """Tell whether nobody was let in: no answer that says so, and the connection is gone."""
        try:
            made = self.connect(pair, client_id, **words)
        except (OSError, ssl.SSLError):
            return True
        try:
            made.ends.get(timeout=20)
            return made.codes.empty() or made.codes.get() != 0
        finally:
            made.client.loop_stop()

    def role(self) -> Client:
        """Connect as a role of the server."""
        from wherry_server.broker_link import LIFE
        from wherry_server.identity import ServersAuthority

        pair = ServersAuthority.ensure(self.settings.keys_folder).issue(broker_config.SERVER_USER, LIFE)
        file = self.folder / "role.pem"
        file.write_bytes(pair.certificate + pair.key)
        return self.let_in(file, "role", port=self.settings.broker_server_port)

    @contextlib.contextmanager
    def services(self) -> Iterator[Services]:
        opened = open_services(self.settings)
        try:
            yield opened
        finally:
            asyncio.run(opened.close())


@contextlib.contextmanager
def mosquitto(configuration: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run mosquitto until the block ends."""
    needs("mosquitto")
    log = configuration.with_name("mosquitto.log")
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(shutil.which("mosquitto")), "-c", str(configuration)], stdout=out, stderr=subprocess.STDOUT
        )
        try:

            def listens() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError):
                    import socket

                    socket.create_connection(("127.0.0.1", port), 1).close()
                    return True
                return False

            until(listens)
            yield process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def guarded(folder: Path, **overrides: Any) -> Iterator[Guarded]:
    """Run a server, and the broker that its devices are told of."""
    needs("mosquitto")
    overrides = {"broker_tls": True, "broker_port": free_port(), "broker_server_port": free_port(), **overrides}
    with running(folder / "data", **overrides) as server:
        with contextlib.closing(_Opened(server.settings)) as opened:
            authority = opened.services.authority
            written = broker_config.write(
                server.settings, authority, authority.revocations([]), user=getpass.getuser(), listen="127.0.0.1"
            )
        server.settings.save()
        with mosquitto(written, server.settings.broker_port) as process:
            yield Guarded(server, folder, process)


class _Opened:
    def __init__(self, settings: Settings) -> None:
        self.services = open_services(settings)

    def close(self) -> None:
        asyncio.run(self.services.close())


def up(member: Member, kind: topics.Up) -> str:
    return topics.up(member.id, kind)


def down(member: Member, kind: topics.Down) -> str:
    return topics.down(member.id, kind)
