"""What a thief at the broker gets: a real mosquitto as `wherry broker config` writes it, and devices that misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import getpass
import itertools
import os
import pwd
import queue
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import MQTTProtocolVersion

from tests.broker_kit import Client, Guarded, Member, down, guarded, mosquitto, up
from tests.server.fleet_kit import FakeDevice
from tests.server.harness import csr, free_port, running, until
from tests.server.test_ingest import report
from tests.services import lacks, needs
from wherry_server import broker_config, collector, doorkeeper
from wherry_server.broker_link import open_link
from wherry_server.doorkeeper import Doorkeeper
from wherry_server.ingest import KINDS, Ingest
from wherry_server.jobs import every, until_stopped
from wherry_server.services import open_services
from wherry_server.settings import Settings
from wherry_server.times import now_us
from wherry_shared import frames, topics, wire
from wherry_shared.errors import DeviceError
from wherry_shared.ids import new_device_id
from wherry_shared.limits import MIB, MQTT_PAYLOAD_BYTES_MAX

pytestmark = pytest.mark.services
TLS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("broker")) as found:
        yield found


@pytest.fixture(scope="module")
def pair(site: Guarded) -> tuple[Member, Member]:
    return site.device("thief"), site.device("victim")


def test_a_device_reads_its_own_topics_whatever_it_subscribes_to(site: Guarded, pair: tuple[Member, Member]) -> None:
    thief, victim = pair
    role = site.role()
    role.publish(down(victim, "offer"), b"kept for the victim", retain=True)
    ear = site.let_in(thief.pair, thief.id)
    tricks = ["#", "+/#", "w1/#", "w1/+/offer", "w1/+/+/report", down(victim, "offer"), down(victim, "ack")]
    tricks += [f"$share/group/{down(victim, 'offer')}", "$share/group/w1/#", "$SYS/#", f"w1/{victim.id}/#"]
    ear.subscribe(*tricks, down(thief, "offer"))
    fellow = site.let_in(victim.pair, victim.id)
    fellow.publish(up(victim, "report"), b"what the victim says")
    role.publish(down(victim, "offer"), b"for the victim", retain=True)
    role.publish(down(victim, "ack"), b"for the victim")
    role.publish(down(thief, "offer"), b"for the thief")
    role.publish(
        down(thief, "ack"), b"the end"
    )  # everything before it was delivered by then, one connection, one order
    found: set[tuple[str, bytes]] = set()
    until(lambda: found.update(ear.all_heard()) or any(payload == b"the end" for _, payload in found))
    assert found == {(down(thief, "offer"), b"for the thief"), (down(thief, "ack"), b"the end")}
    for client in (role, ear, fellow):
        client.close()


def test_a_device_writes_its_own_reports_only(site: Guarded, pair: tuple[Member, Member]) -> None:
    thief, victim = pair
    role = site.role()
    role.subscribe("w1/#", "#")
    hand = site.let_in(thief.pair, thief.id, will=(up(victim, "report"), b"forged by will"))
    for topic in (up(victim, "report"), up(victim, "hello"), down(victim, "offer"), down(victim, "ack")):
        hand.publish(topic, b"forged")
        hand.publish(topic, b"forged and kept", retain=True)
    for topic in (down(thief, "offer"), down(thief, "ack"), f"w1/{thief.id}/report", f"w2/aa/{thief.id}/report", "any"):
        hand.publish(topic, b"forged")
    hand.client.socket().shutdown(2)  # without a goodbye: the broker publishes the will, if it may
    hand.ends.get(timeout=20)
    hand = site.let_in(thief.pair, thief.id)
    hand.publish(up(thief, "report"), b"the end")
    assert role.hear() == (up(thief, "report"), b"the end")
    hand.close()
    role.close()


def test_the_client_id_is_the_certificates_name(site: Guarded, pair: tuple[Member, Member]) -> None:
    thief, victim = pair
    fellow = site.let_in(victim.pair, victim.id)
    for version in (MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5):
        hand = site.let_in(thief.pair, victim.id, version=version)  # claims the victim's id, to end its session
        hand.publish(up(thief, "report"), b"still the thief")
        hand.close()
    fellow.publish(up(victim, "report"), b"still here")
    assert fellow.ends.empty()
    fellow.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")  # that they are old is why they are tried
def test_nobody_gets_in_without_a_certificate_of_the_right_authority(
    site: Guarded, pair: tuple[Member, Member], tmp_path: Path
) -> None:
    thief = pair[0]
    server_port = site.settings.broker_server_port
    assert site.kept_out(None)
    assert site.kept_out(None, port=server_port)
    assert site.kept_out(thief.pair, "wherry-server", port=server_port), "a device where the server's roles come in"
    with site.services() as services:
        shown = services.authority.issue_server(["127.0.0.1"], days=1)
        stranger = type(services.authority)
    file = tmp_path / "pair.pem"
    file.write_bytes(shown.certificate + shown.key)
    assert site.kept_out(file), "what a server shows is no device"
    stranger.create(tmp_path, "elsewhere")
    own = stranger.open(tmp_path, days=1).issue_double(pair[1].id, timedelta(hours=1))
    file.write_bytes(own.certificate + own.key)
    assert site.kept_out(file, pair[1].id), "an authority of the thief's own, with the victim's name"
    old = site.context(thief.pair)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    assert site.kept_out(None, context=old)


def test_a_device_that_is_revoked_is_out_at_once_with_every_certificate_it_ever_got(site: Guarded) -> None:
    member, bystander = site.device("lost"), site.device("kept")
    with site.server.as_device(member.answer) as http:
        key = ec.generate_private_key(ec.SECP256R1())
        request = wire.RenewRequest(format=1, csr_pem=csr(key, member.id))
        answer = http.post("/device/v1/renew", content=wire.encode(request))
        renewed = wire.parse(wire.RenewAnswer, answer.content)
    fresh = site.member("lost-renewed", replace_certificate(member.answer, renewed.certificate_pem), key)
    live, other = site.let_in(fresh.pair, fresh.id), site.let_in(bystander.pair, bystander.id)
    with site.server.http() as http, site.server.as_device(member.answer) as device:
        assert device.get("/device/v1/offer").status_code == 204
        assert http.post("/api/v1/devices/lost/revoke").status_code == 200
        assert device.get("/device/v1/offer").json()["code"] == "device_revoked"
    sessions = {version: tls_session(site, fresh, version) for version in TLS}
    with site.services() as services:
        asyncio.run(Doorkeeper(services, print).turn(leading=True))
    live.ends.get(timeout=20)
    for version, (context, session) in sessions.items():
        until(lambda v=version, c=context, s=session: not resumes(site, fresh, c, s))  # type: ignore[misc]
    for one in (member, fresh):
        until(lambda one=one: site.kept_out(one.pair, one.id))  # type: ignore[misc]
    other.publish(up(bystander, "report"), b"still here")
    assert other.ends.empty()
    other.close()


def test_who_came_back_before_the_broker_had_read_the_list_is_ended_again(
    site: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = site.device("quick")
    told: list[bool] = []

    async def deaf(_settings: object) -> bool:
        told.append(False)
        return False

    with site.services() as services, site.server.http() as http:
        keeper = Doorkeeper(services, print)
        assert http.post("/api/v1/devices/quick/revoke").status_code == 200
        first = site.let_in(member.pair, member.id)
        monkeypatch.setattr(doorkeeper, "CUT_AGAIN_S", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(doorkeeper, "reload", deaf)
            asyncio.run(keeper.turn(leading=True))
            first.ends.get(timeout=20)
            second = site.let_in(member.pair, member.id)  # the broker knows nothing of the list
            asyncio.run(keeper.turn(leading=True))
            second.ends.get(timeout=20)
            third = site.let_in(member.pair, member.id)
        assert told == [False, False]
        assert member.id in cuts(site)
        asyncio.run(keeper.turn(leading=True))
        third.ends.get(timeout=20)
        until(lambda: not gets_in(site, member.pair, member.id))
        assert member.id not in cuts(site), "once the list is in force, it has an end"


def cuts(site: Guarded) -> set[str]:
    """Return the devices whose sessions are still to be ended."""
    with sqlite3.connect(site.settings.data / "wherry.sqlite") as database:
        return {device for (device,) in database.execute("SELECT device_id FROM session_cut")}


def test_a_mosquitto_that_root_starts_reads_its_list_again_as_the_user_that_it_became(tmp_path: Path) -> None:
    needs("mosquitto")
    if os.geteuid() != 0:
        lacks("mosquitto becomes another user only where root starts it")
    user = "nobody"
    with tempfile.TemporaryDirectory(prefix="wherry-broker-", dir="/tmp") as name, running(tmp_path / "data") as server:
        folder = Path(name)
        settings = msgspec.structs.replace(
            server.settings, broker_tls=True, broker_port=free_port(), broker_server_port=free_port()
        )
        services = open_services(settings)
        authority = services.authority
        with pytest.raises(DeviceError, match="cannot read") as closed:  # a temporary folder is its owner's
            broker_config.write(settings, authority, authority.revocations([]), folder=folder / "broker", user=user)
        assert closed.value.code == "broker_folder_closed"
        folder.chmod(0o711)
        written = broker_config.write(
            settings, authority, authority.revocations([]), folder=folder / "broker", user=user, listen="127.0.0.1"
        )
        assert broker_config.to_be_given(written.parent, user) == []
        assert broker_config.to_be_given(written.parent, "root") != []
        device = new_device_id()
        pair = authority.issue_double(device, timedelta(hours=1))
        file = tmp_path / "pair.pem"
        file.write_bytes(pair.certificate + pair.key)
        serial = f"{x509.load_pem_x509_certificate(pair.certificate).serial_number:x}"
        with mosquitto(written, settings.broker_port) as process:
            site = Guarded(dataclasses.replace(server, settings=settings), tmp_path, process)
            assert f"Uid:\t{pwd.getpwnam(user).pw_uid}" in Path(f"/proc/{process.pid}/status").read_text()
            site.let_in(file, device).close()
            broker_config.replace(written.parent / broker_config.REVOKED, authority.revocations([(serial, now_us())]))
            os.kill(int((written.parent / broker_config.PID).read_text()), signal.SIGHUP)
            until(lambda: not gets_in(site, file, device))
        asyncio.run(services.close())


def test_the_list_is_kept_up_to_date_where_the_configuration_was_written(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    with running(tmp_path / "data") as server:
        server.settings.save()
        words = ["broker", "config", "--data", str(server.settings.data), "--output", str(elsewhere)]
        command = [sys.executable, "-m", "wherry_server.cli", *words, "--user", getpass.getuser()]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        settings = Settings.load(server.settings.data)
        device = server.device("kept-elsewhere")
        serial = x509.load_pem_x509_certificate(device.certificate_pem.encode()).serial_number
        with server.http() as http:
            assert http.post("/api/v1/devices/kept-elsewhere/revoke").status_code == 200
        services = open_services(settings)
        asyncio.run(Doorkeeper(services, print).turn(leading=False))
        asyncio.run(services.close())
        found = x509.load_pem_x509_crl((elsewhere / broker_config.REVOKED).read_bytes())
        assert [one.serial_number for one in found] == [serial]
        assert not (server.settings.data / "broker").exists()


class Served:
    """Ingest at the guarded broker, in a thread."""

    def __init__(self, site: Guarded) -> None:
        self.ready = threading.Event()
        self.site = site
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)
        self.thread.start()
        assert self.ready.wait(20)

    async def run(self) -> None:
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        services = open_services(self.site.settings)
        self.ingest = Ingest(services.database, services.master_key, services.project)
        link = open_link(self.site.settings, "ingest", [topics.ingest_filter(kind) for kind in KINDS])
        self.gathers = collector.Collector(self.ingest, link.publish, lambda _stored: None, link.clear, guarded=True)
        link.on_message, link.on_connect = self.gathers.received, self.ready.set
        keeper = Doorkeeper(services, link.clear)

        async def watch() -> None:
            await keeper.turn(leading=True)

        jobs = {"link": link.run(), "ingest": self.gathers.run(), "doors": every(0.1, watch)}
        try:
            await until_stopped(jobs, self.stopping)
        finally:
            await services.close()

    def settle(self) -> None:
        """Wait until nothing of what was sent is on its way any more."""
        last = -1
        while last != (last := self.ingest.refused["bad_topic"]):
            time.sleep(0.3)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join(20)


def stored(site: Guarded, device: str) -> int:
    with sqlite3.connect(site.settings.data / "wherry.sqlite") as database:
        (count,) = database.execute("SELECT count(*) FROM report_log WHERE device_id = ?", [device]).fetchone()
        return int(count)


def test_a_hostile_device_takes_nothing_from_others_and_is_shut_out(
    site: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("DEVICE_MESSAGES_MAX", 200), ("FLOOD_MESSAGES", 2_000), ("STRAYS_MAX", 2_000)):
        monkeypatch.setattr(collector, name, value)
    thief, victim = site.device("flooding"), site.device("honest")
    served = Served(site)
    villain, honest = (FakeDevice(one.id, base64.b64decode(one.answer.mac_key)) for one in (thief, victim))
    hand, fellow = site.let_in(thief.pair, thief.id), site.let_in(victim.pair, victim.id)
    fellow.subscribe(down(victim, "ack"))
    good = report(villain, 1)
    bad = [b"", b"\0" * 40, b"{}" * 30, good[:-1], good[:8] + b"\xff" * 40, b"x" * MQTT_PAYLOAD_BYTES_MAX]
    bad += [report(honest, 1), villain.frame("report", villain_hello(honest.id))]
    bad += [frames.seal(villain.key, "report", villain.id, b"[" * 50_000)]
    bad += [report(villain, seq, first) for seq, first in ((0, 0), (-1, 1), (2**62, 1), (4, 9))]
    hello = villain.frame("hello", villain_hello(honest.id))
    shut_out = threading.Event()
    hand.client.on_disconnect = lambda *_: shut_out.set()

    def flood() -> None:
        for number in itertools.count():
            if shut_out.is_set():
                return
            hand.client.publish(up(thief, "report"), bad[number % len(bad)], qos=0)
            hand.client.publish(up(thief, "report"), report(villain, 3 - number % 3), qos=0)  # again, and in disorder
            hand.client.publish(up(thief, "hello"), hello, qos=0)
            hand.client.publish(f"w1/{number:06x}/{thief.id}/hello", b"kept for ever", qos=0, retain=True)
            time.sleep(0.0005)  # the rest of this process has to live, too

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    for seq in (1, 2, 3):
        honest.acked = min(honest.acked, seq - 1)
        while honest.acked < seq:  # as a device does, which sends again what is not acknowledged
            fellow.publish(up(victim, "report"), report(honest, seq))
            with contextlib.suppress(queue.Empty):
                ack = frames.unseal(honest.key, "ack", honest.id, fellow.hear(2.0)[1])
                honest.acked = wire.parse(wire.Ack, ack).seq
    assert shut_out.wait(60)
    thread.join(20)
    until(lambda: site.kept_out(thief.pair, thief.id))
    assert (stored(site, victim.id), stored(site, thief.id)) == (3, 3), "each once, whatever was sent again"
    seen = set(served.ingest.refused)
    assert {
        "frame_forged",
        "frame_invalid",
        "message_invalid",
        "message_foreign",
        "stream_invalid",
        "bad_topic",
    } <= seen
    with site.server.http() as http, site.server.as_device(thief.answer) as device:
        shown = http.get("/api/v1/devices/flooding").json()
        assert (shown["state"], shown["state_reason"]) == ("quarantined", "flooding")
        assert device.get("/device/v1/offer").json()["code"] == "device_revoked"
        assert http.post("/api/v1/devices/flooding/readmit").json()["state"] == "active"
        assert device.get("/device/v1/offer").status_code == 204
    served.settle()
    until(lambda: not kept(site, thief))
    hand, role = until(lambda: back(site, thief)), site.role()
    role.subscribe(up(thief, "telemetry"))
    hand.publish(up(thief, "telemetry"), b"x" * (MQTT_PAYLOAD_BYTES_MAX + 1))
    hand.publish(up(thief, "telemetry"), b"the end")
    assert role.hear()[1] == b"the end", "what is too large is dropped"
    hand.client.publish(up(thief, "telemetry"), b"x" * MIB, qos=1)
    hand.ends.get(timeout=20)  # and what is much too large ends the connection
    role.close()
    served.stop()
    fellow.close()


def test_nobody_is_shut_out_by_a_topic_that_another_device_chose(site: Guarded) -> None:
    thief, victim = site.device("slandering"), site.device("slandered")
    served = Served(site)
    hand = site.let_in(thief.pair, thief.id)
    for _ in range(collector.STRAYS_MAX + 10):
        hand.client.publish(f"w1/{victim.id}/{thief.id}/hello", b"as if by the victim", qos=0)
    with site.server.http() as http:
        until(lambda: http.get("/api/v1/devices/slandering").json()["state"] == "quarantined")
        hand.ends.get(timeout=20)  # which comes after whoever is suspected was shut out
        assert http.get("/api/v1/devices/slandered").json()["state"] == "active"
    served.stop()


def test_of_a_device_that_left_for_good_the_broker_keeps_nothing(site: Guarded) -> None:
    leaving, staying = site.device("leaving"), site.device("staying")
    served, role = Served(site), site.role()
    for member in (leaving, staying):
        hand = site.let_in(member.pair, member.id)
        for client, topic in ((hand, up(member, "hello")), (role, down(member, "offer"))):
            client.client.publish(topic, b"kept", qos=1, retain=True).wait_for_publish(20)
    for member in (leaving, staying):
        assert hello_kept(site, member)
        assert offer_kept(site, member)
    with site.server.http() as http:
        assert http.post("/api/v1/devices/leaving/decommission", json={}).status_code == 200
    until(lambda: not hello_kept(site, leaving))  # from now on nobody takes over its session
    until(lambda: not offer_kept(site, leaving))
    assert hello_kept(site, staying)
    assert offer_kept(site, staying)
    served.stop()
    role.close()


def hello_kept(site: Guarded, member: Member) -> bool:
    return keeps(site.role(), up(member, "hello"), "$SYS/broker/version")


def offer_kept(site: Guarded, member: Member) -> bool:
    file = site.folder / "double.pem"
    with site.services() as services:
        pair = services.authority.issue_double(member.id, timedelta(minutes=5))
    file.write_bytes(pair.certificate + pair.key)
    return keeps(site.let_in(file, member.id), down(member, "offer"), down(member, "ack"))


def keeps(client: Client, topic: str, last: str) -> bool:
    """Tell whether the broker keeps a message of a topic; it comes before the answer to a later subscription."""
    client.subscribe(topic, last)
    client.close()
    return (topic, b"kept") in client.all_heard()


def back(site: Guarded, member: Member) -> Client | None:
    """Connect, if the broker has read by now that the device is let in again."""
    made = site.connect(member.pair, member.id)
    with contextlib.suppress(queue.Empty):
        if made.codes.get(timeout=2) == 0:
            return made
    made.client.loop_stop()
    return None


def kept(site: Guarded, member: Member) -> list[str]:
    """Return topics of no use on which the broker keeps something of a device."""
    role = site.role()
    role.subscribe("w1/+/+/hello")
    role.subscribe("$SYS/broker/version")  # behind the kept messages, which come with the subscription before
    role.close()
    topic_of = up(member, "hello")
    return [topic for topic, payload in role.all_heard() if payload and member.id in topic and topic != topic_of]


def villain_hello(foreign: str) -> wire.Hello:
    return wire.Hello(format=1, device=foreign, at=1, boot="b", agent="0")


def tls_session(site: Guarded, member: Member, version: ssl.TLSVersion) -> tuple[ssl.SSLContext, ssl.SSLSession | None]:
    """Connect with one version of TLS; return what a client keeps to resume the session without showing a certificate."""
    context = site.context(member.pair)
    context.minimum_version = context.maximum_version = version
    plain = socket.create_connection(("127.0.0.1", site.settings.broker_port), 10)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        secure.sendall(hello_packet("nobody"))
        assert secure.recv(4) == b"\x20\x02\x00\x00"
        return context, secure.session


def resumes(site: Guarded, member: Member, context: ssl.SSLContext, session: ssl.SSLSession | None) -> bool:
    """Tell whether a client gets in by an earlier session."""
    try:
        plain = socket.create_connection(("127.0.0.1", site.settings.broker_port), 10)
        with context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as secure:
            secure.sendall(hello_packet(member.id))
            return secure.recv(4) == b"\x20\x02\x00\x00"
    except OSError:
        return False


def gets_in(site: Guarded, pair: Path, device: str) -> bool:
    """Tell whether the broker takes a device now, which may be before it has read its list."""
    try:
        plain = socket.create_connection(("127.0.0.1", site.settings.broker_port), 10)
        with site.context(pair).wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            secure.sendall(hello_packet(device))
            return secure.recv(4) == b"\x20\x02\x00\x00"
    except OSError:
        return False


def hello_packet(name: str) -> bytes:
    body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(name).to_bytes(2, "big") + name.encode()
    return bytes([0x10, len(body)]) + body


def replace_certificate(answer: wire.EnrolAnswer, pem: str) -> wire.EnrolAnswer:
    return msgspec.structs.replace(answer, certificate_pem=pem)
