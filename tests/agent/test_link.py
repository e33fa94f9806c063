"""What a device says to a broker before anything is known of that broker."""

from __future__ import annotations

import socket
from pathlib import Path

from wherry_agent.identity import Identity
from wherry_agent.link import Callbacks, Link

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
