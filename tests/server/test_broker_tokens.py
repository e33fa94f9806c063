"""Tokens for brokers that check them: what they say, who gets them, and that an agent gives one as its password."""

from __future__ import annotations

import base64
import socket
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from joserfc import errors, jwt
from joserfc.jwk import KeySet

from tests.agent.test_link import nothing
from tests.server.harness import Running, running
from wherry_agent import identity as identities
from wherry_agent.link import Callbacks, Link
from wherry_server import broker_tokens
from wherry_shared import topics, wire


def keys_of(server: Running) -> KeySet:
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        found = http.get("/install/broker-keys.json").json()
    assert all("d" not in key for key in found["keys"]), "public keys only"
    return KeySet.import_key_set(found)


def allowed(acl: list[dict[str, str]], action: str, topic: str) -> bool:
    """Decide as EMQX does: the first rule that fits; `eq ` is the filter itself, not what it stands for."""
    for rule in acl:
        pattern = rule["topic"].removeprefix("eq ")
        fits = pattern == topic or (pattern == "#" and not rule["topic"].startswith("eq "))
        if fits and rule["action"] in (action, "all"):
            return rule["permission"] == "allow"
    raise AssertionError("no rule fits")


def test_a_token_names_its_device_and_opens_its_own_topics_for_an_hour(tmp_path: Path, monkeypatch: Any) -> None:
    with running(tmp_path / "data", broker_tokens=True) as server:
        mine, other = server.device("mine"), server.device("other")
        assert mine.broker_tokens
        with server.as_device(mine) as http:
            given = wire.parse(wire.BrokerToken, http.post("/device/v1/broker-token").content)
        claims = jwt.decode(given.token, keys_of(server), algorithms=["ES256"]).claims
        assert {claims["sub"], claims["username"], claims["clientid"]} == {mine.device}
        assert claims["exp"] - claims["iat"] == 3600
        assert given.expires_at == claims["exp"] * 1_000_000
        for device, good in ((mine.device, True), (other.device, False)):
            assert allowed(claims["acl"], "subscribe", topics.down(device, "offer")) is good
            assert allowed(claims["acl"], "publish", topics.up(device, "report")) is good
            assert not allowed(claims["acl"], "publish", topics.down(device, "offer"))
            assert not allowed(claims["acl"], "subscribe", topics.up(device, "report"))
        for trick in ("#", "w1/#", "w1/+/offer", f"w1/{other.device}/#"):
            assert not allowed(claims["acl"], "subscribe", trick)
        head, body, seal = given.token.split(".")
        forged = base64.urlsafe_b64encode(
            base64.urlsafe_b64decode(body + "==").replace(mine.device.encode(), b"x")
        ).decode()
        with pytest.raises(errors.BadSignatureError):
            jwt.decode(f"{head}.{forged.rstrip('=')}.{seal}", keys_of(server), algorithms=["ES256"])
        with server.http() as http, server.as_device(mine) as device:
            http.post("/api/v1/devices/mine/revoke")
            assert device.post("/device/v1/broker-token").json()["code"] == "device_revoked"
        monkeypatch.setattr(broker_tokens, "LIFE_S", -1)
        with server.as_device(other) as http:
            over = wire.parse(wire.BrokerToken, http.post("/device/v1/broker-token").content)
        with pytest.raises(errors.ExpiredTokenError):
            jwt.JWTClaimsRegistry().validate(jwt.decode(over.token, keys_of(server), algorithms=["ES256"]).claims)


def test_an_agent_gives_the_broker_its_token(tmp_path: Path) -> None:
    with running(tmp_path / "data", broker_tokens=True) as server, socket.create_server(("127.0.0.1", 0)) as broker:
        broker.settimeout(60)
        answer = server.device("agent")
        known = identities.Identity(
            format=1,
            device=answer.device,
            project=answer.project,
            name="agent",
            server=server.url,
            root_digest="",
            tuf_path=answer.tuf_path,
            bearer=answer.bearer,
            mac_key=answer.mac_key,
            broker_host="127.0.0.1",
            broker_port=broker.getsockname()[1],
            broker_tokens=True,
        )
        callbacks = Callbacks(
            up=nothing, down=nothing, offer=nothing, ack=nothing, reached=nothing, outgoing=lambda _kind: []
        )
        link = Link(tmp_path, known, server.url, callbacks)
        link.start()
        try:
            connection, _ = broker.accept()
            with connection:
                connection.settimeout(60)
                packet = b""
                while b"." not in packet or not _whole(packet):
                    packet += connection.recv(4096)
        finally:
            link.stop()
        password = packet[packet.rindex(answer.device.encode()) + len(answer.device) + 2 :]
        assert jwt.decode(password.decode(), keys_of(server), algorithms=["ES256"]).claims["clientid"] == answer.device


def _whole(packet: bytes) -> bool:
    """Tell whether an MQTT CONNECT has come whole (its length has two digits of base 128)."""
    return len(packet) >= 3 + (packet[1] & 0x7F) + (packet[2] << 7)


def test_old_answers_and_identities_mean_no_token() -> None:
    old = msgspec.json.encode({"format": 1, "device": "d", "project": "p", "certificate_pem": "", "ca_pem": "", "bearer": "",
                               "mac_key": "", "broker_host": "h", "broker_port": 1})  # fmt: skip
    assert not wire.parse(wire.EnrolAnswer, old).broker_tokens
