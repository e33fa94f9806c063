"""What a device says to a broker before anything is known of that broker, and that its threads outlive any trouble."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.agent.serving_kit import until
from wherry_agent import link as link_module
from wherry_agent.courier_http import Http
from wherry_agent.identity import Identity
from wherry_agent.link import Callbacks, Link
from wherry_server.identity import DeviceAuthority
from wherry_shared.errors import UnreachableError

BEARER = "the-secret-of-this-device"


def nothing(*_: object) -> None:
    """Hear nothing."""


def identity(port: int) -> Identity:
    return Identity(
        format=1,
        device="d" * 22,
        project="default",
        name="bench",
        server="http://127.0.0.1:1",
        root_digest="0" * 64,
        tuf_path="/tuf/default",
        bearer=BEARER,
        mac_key="a2V5" * 11,
        broker_host="127.0.0.1",
        broker_port=port,
        broker_tls=False,
    )


def test_the_broker_is_told_the_devices_name_and_never_its_secret(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        broker.settimeout(20)
        known = identity(broker.getsockname()[1])
        callbacks = Callbacks(
            up=nothing, down=nothing, offer=nothing, ack=nothing, reached=nothing, outgoing=lambda _kind: []
        )
        link = Link(tmp_path, known, known.server, callbacks)
        link.start()
        try:
            connection, _ = broker.accept()
            with connection:
                connection.settimeout(20)
                said = connection.recv(4096)
        finally:
            link.stop()
    assert known.device.encode() in said
    assert BEARER.encode() not in said
    assert said[0] == 0x10, "CONNECT"
    assert said[9] & 0xC0 == 0x80, "a user name and no password"


def test_no_trouble_ends_the_threads_that_keep_in_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HTTP_AFTER_S", 0.0)
    monkeypatch.setattr(link_module, "HTTP_EVERY_S", 0.01)
    monkeypatch.setattr(link_module, "RECONNECT_MIN_S", 0.01)
    asked: dict[str, int] = {"http": 0, "mqtt": 0}

    def outgoing(_kind: str) -> list[bytes]:
        asked["http"] += 1
        raise ZeroDivisionError

    def client(*_: object) -> None:
        asked["mqtt"] += 1
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(link_module, "new_client", client)
    callbacks = Callbacks(up=nothing, down=nothing, offer=nothing, ack=nothing, reached=nothing, outgoing=outgoing)
    link = Link(tmp_path, identity(1), "http://127.0.0.1:1", callbacks)
    link.start()
    try:
        until(lambda: asked["http"] > 2 and asked["mqtt"] > 2, "both try again and again", 60)
    finally:
        link.stop()


@pytest.mark.parametrize("ca", [b"-----BEGIN CERTIFICATE-----\nnonsense\n", b"", None])
def test_an_authority_that_cannot_be_read_is_said_so(tmp_path: Path, ca: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if ca is not None:
        path.write_bytes(ca)
    http = Http(ca=path, server="https://127.0.0.1:1")
    with (
        pytest.raises(UnreachableError, match=r"ca\.pem is no certificate authority"),
        http.request("GET", "https://127.0.0.1:1/x"),
    ):
        pass


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("trouble", "password", "said"),
    [
        (lambda folder: spoil(folder / "key.pem"), "of the disk", "cannot be used"),
        (lambda folder: spoil(folder / "certificate.pem"), "of the disk", "cannot be used"),
        (lambda folder: (folder / "key.pem").unlink(), "of the disk", r"key\.pem: No such file"),
        (lambda _folder: None, "another", "cannot be used"),
        (lambda _folder: None, "", "cannot be used"),
    ],
    ids=["key damaged", "certificate damaged", "key gone", "wrong password", "no password"],
)
def test_a_pair_that_cannot_be_used_is_not_called_an_authority(
    tmp_path: Path, trouble: Callable[[Path], None], password: str, said: str
) -> None:
    DeviceAuthority.create(tmp_path, "here")
    made = DeviceAuthority.open(tmp_path, days=1)
    pair = made.issue_double("d" * 22, timedelta(hours=1))
    key = load_pem_private_key(pair.key, None)
    (tmp_path / "ca.pem").write_text(made.ca_pem)
    (tmp_path / "certificate.pem").write_bytes(pair.certificate)
    how = BestAvailableEncryption(b"of the disk")
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
    shown = tmp_path / "certificate.pem", tmp_path / "key.pem"

    def ask(secret: str) -> str:
        http = Http(ca=tmp_path / "ca.pem", server="https://127.0.0.1:1", pair=shown, password=secret)
        with pytest.raises(UnreachableError) as found, http.request("GET", "https://127.0.0.1:1/x"):
            pass
        return found.value.sentence()

    assert "refused" in ask("of the disk"), "what is in order gets as far as the network"
    trouble(tmp_path)
    answer = ask(password)
    assert re.search(said, answer)
    assert "its key, cannot be used" in answer
    assert "authority" not in answer
    assert "of the disk" not in answer, "the password"
