"""MQTT 3.1.1 for volume: one asyncio protocol per connection, clean sessions, QoS 0 and 1, exact topics.

OASIS MQTT 3.1.1 (2014). A real agent speaks through paho; two hundred of those do not fit one process cheaply, while
this costs about 3 KB and a few microseconds per message. It knows only what a device needs: CONNECT, SUBSCRIBE,
PUBLISH, PUBACK, PINGREQ. What a server must never send ends the connection with a reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PACKET_BYTES_MAX = 256 * 1024
"""A remaining length above this ends the connection: an offer has at most 100 KB."""
KEEP_ALIVE_S = 60
_CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK, _PINGREQ, _PINGRESP, _DISCONNECT = (
    0x10, 0x20, 0x30, 0x40, 0x82, 0x90, 0xC0, 0xD0, 0xE0,
)  # fmt: skip


class ProtocolError(Exception):
    """The other side sent what MQTT 3.1.1 does not allow it to send."""


def _string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _packet(kind: int, body: bytes) -> bytes:
    """Put the fixed header in front of `body` (clause 2.2: the length has 7 bits per byte)."""
    length = len(body)
    head = bytearray([kind])
    while True:
        digit = length & 0x7F
        length >>= 7
        head.append(digit | 0x80 if length else digit)
        if not length:
            return bytes(head) + body


def connect(client: str, username: str, password: str, keep_alive_s: int = KEEP_ALIVE_S) -> bytes:
    """Return a CONNECT with a clean session."""
    flags = 0x02 | (0x80 if username else 0) | (0x40 if username and password else 0)
    body = _string("MQTT") + bytes([4, flags]) + keep_alive_s.to_bytes(2, "big") + _string(client)
    if username:
        body += _string(username)
        if password:
            body += _string(password)
    return _packet(_CONNECT, body)


def subscribe(packet_id: int, filters: dict[str, int]) -> bytes:
    """Return a SUBSCRIBE of filters with their QoS."""
    body = packet_id.to_bytes(2, "big") + b"".join(_string(name) + bytes([qos]) for name, qos in filters.items())
    return _packet(_SUBSCRIBE, body)


def publish(topic: str, payload: bytes, packet_id: int = 0) -> bytes:
    """Return a PUBLISH: QoS 1 with a packet id, QoS 0 without."""
    middle = packet_id.to_bytes(2, "big") if packet_id else b""
    return _packet(_PUBLISH | (0x02 if packet_id else 0), _string(topic) + middle + payload)


class Splitter:
    """Cuts a byte stream into packets, however it arrives."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes in and return the packets that are whole: (first byte, body).

        Raises:
            ProtocolError: a length that is malformed or above `PACKET_BYTES_MAX`.
        """
        buffer = self._buffer
        buffer += data
        packets: list[tuple[int, bytes]] = []
        start = 0
        while True:
            end = _end_of_packet(buffer, start)
            if end is None:
                break
            body, after = end
            packets.append((buffer[start], bytes(buffer[body:after])))
            start = after
        if start:
            del buffer[:start]
        return packets


def _end_of_packet(buffer: bytearray, start: int) -> tuple[int, int] | None:
    length = 0
    for index in range(4):
        at = start + 1 + index
        if at >= len(buffer):
            return None
        length |= (buffer[at] & 0x7F) << (7 * index)
        if not buffer[at] & 0x80:
            if length > PACKET_BYTES_MAX:
                raise ProtocolError(f"packet of {length} bytes")
            return (at + 1, at + 1 + length) if at + 1 + length <= len(buffer) else None
    raise ProtocolError("remaining length has more than four bytes")


class Connection(asyncio.Protocol):
    """One device's connection. `on_message(topic, payload)` is called on the event loop; `closed` ends with it."""

    def __init__(
        self,
        client: str,
        *,
        username: str,
        password: str,
        filters: dict[str, int],
        on_ready: Callable[[], None],
        on_message: Callable[[str, bytes], None],
    ) -> None:
        self._hello = connect(client, username, password)
        self._filters = filters
        self._on_ready = on_ready
        self._on_message = on_message
        self._splitter = Splitter()
        self._transport: asyncio.Transport | None = None
        self._packet_id = 0
        self._quiet_pings = 0
        self._ping: asyncio.TimerHandle | None = None
        self.ready = False
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the connection ended; the result says why."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say CONNECT."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._hello)
        self._ping = asyncio.get_running_loop().call_later(KEEP_ALIVE_S / 2, self._on_ping)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._end(f"connection lost: {exc}" if exc else "connection closed by the broker")

    def data_received(self, data: bytes) -> None:
        """Take packets in; whatever breaks the protocol ends the connection."""
        try:
            for kind, body in self._splitter.feed(data):
                self._on_packet(kind, body)
        except (ProtocolError, UnicodeDecodeError) as error:
            self.abort(f"protocol error: {error}")

    def publish(self, topic: str, payload: bytes, *, qos: int) -> bool:
        """Send a message; False when there is no connection (the caller keeps what must not be lost)."""
        if self._transport is None or not self.ready:
            return False
        packet_id = self._next_id() if qos else 0
        self._transport.write(publish(topic, payload, packet_id))
        return True

    def close(self) -> None:
        """Leave with a DISCONNECT."""
        if self._transport is not None and not self.closed.done():
            self._transport.write(_packet(_DISCONNECT, b""))
            self._transport.close()

    def abort(self, why: str) -> None:
        """Drop the connection without a goodbye, as a crash or a cut cable would."""
        self._end(why)
        if self._transport is not None:
            self._transport.abort()

    def _on_packet(self, kind: int, body: bytes) -> None:
        self._quiet_pings = 0
        if kind & 0xF0 == _PUBLISH:
            self._on_publish(kind, body)
        elif kind == _CONNACK:
            if len(body) != 2 or body[1] != 0:
                raise ProtocolError(f"connection refused with code {body[1] if len(body) == 2 else 'missing'}")
            assert self._transport is not None
            self._transport.write(subscribe(self._next_id(), self._filters))
        elif kind == _SUBACK:
            if 0x80 in body[2:]:
                raise ProtocolError("subscription refused")
            self.ready = True
            self._on_ready()
        elif kind not in {_PUBACK, _PINGRESP}:
            raise ProtocolError(f"packet type 0x{kind:02x} is not for a client")

    def _on_publish(self, kind: int, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2], "big")
        qos = (kind >> 1) & 0x03
        payload_at = end + 2 if qos else end
        if qos > 1 or len(body) < payload_at:
            raise ProtocolError("PUBLISH that is cut short or of QoS 2")
        if qos:
            assert self._transport is not None
            self._transport.write(_packet(_PUBACK, body[end:payload_at]))
        self._on_message(body[2:end].decode(), body[payload_at:])

    def _on_ping(self) -> None:
        if self._transport is None or self.closed.done():
            return
        self._quiet_pings += 1
        if self._quiet_pings > 3:
            self.abort("the broker has been silent for more than a keep-alive")
            return
        self._transport.write(_packet(_PINGREQ, b""))
        self._ping = asyncio.get_running_loop().call_later(KEEP_ALIVE_S / 2, self._on_ping)

    def _next_id(self) -> int:
        self._packet_id = self._packet_id % 0xFFFF + 1
        return self._packet_id

    def _end(self, why: str) -> None:
        self.ready = False
        if self._ping is not None:
            self._ping.cancel()
        if not self.closed.done():
            self.closed.set_result(why)
