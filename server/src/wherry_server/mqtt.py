"""The director's and ingest's link to the broker: gmqtt, MQTT 3.1.1, reconnected for ever with back-off.

Every connection is a new client with a clean session: nothing is left to the broker to remember. What was published with
QoS 1 counts as carried out only when the broker acknowledged it; what was not is told to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from gmqtt import Client, Subscription
from gmqtt.mqtt.constants import MQTTv311
from gmqtt.storage import PersistentStorage

from wherry_shared.errors import UnreachableError

log = logging.getLogger(__name__)

KEEPALIVE_S = 20
CONNECT_TIMEOUT_S = 10.0
BACK_OFF_MIN_S = 0.2
BACK_OFF_MAX_S = 10.0
_NEVER = -2
"""gmqtt's own reconnecting stays off (−1 would be "for ever"): a fresh client is simpler than a revived one."""

_quiet = logging.getLogger(f"{__name__}.gmqtt")
_quiet.setLevel(logging.CRITICAL)
"""gmqtt logs every packet and every ordinary disconnect; what matters is logged here."""


class Acknowledged:
    """Which of the messages that were published together the broker has: a future for each would cost more than the rest."""

    def __init__(self) -> None:
        self.there: set[int] = set()
        """Positions of those that it has."""
        self._left = 0
        self._over = asyncio.Event()
        self._over.set()

    def expect(self) -> None:
        """One more was sent."""
        self._left += 1
        self._over.clear()

    def got(self, position: int) -> None:
        """The broker has it."""
        self.there.add(position)
        self._left -= 1
        if not self._left:
            self._over.set()

    def lose(self) -> None:
        """The connection is gone: nothing more will come."""
        self._over.set()

    async def wait(self, seconds: float) -> None:
        """Wait until the broker has all of them, the connection is gone, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()


class _Unacknowledged(PersistentStorage):  # type: ignore[misc]  # gmqtt publishes no types
    """gmqtt's store of what the broker has not acknowledged, from which publishers learn when it has."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, tuple[Acknowledged, int]] = {}
        self.last = 0

    def push_message(self, mid: int, raw_package: bytes) -> None:
        """Note the number under which a message went out."""
        super().push_message(mid, raw_package)
        self.last = mid

    def remove_message_by_mid(self, mid: int) -> None:
        """The broker has it."""
        super().remove_message_by_mid(mid)
        waiting = self.waiting.pop(mid, None)
        if waiting is not None:
            acknowledged, position = waiting
            acknowledged.got(position)


class Link:
    """A connection that comes back by itself."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        name: str,
        filters: Sequence[str] = (),
        context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Prepare; `context`, if the broker speaks TLS, is made anew for each connection."""
        self._address = (host, port)
        self._name = name
        self._filters = filters
        self._context = context
        self.on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        """Called with topic and payload; set before `run`."""
        self.on_connect: Callable[[], None] = lambda: None
        self._client: Any = None
        self._sent = _Unacknowledged()
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Connect, stay, connect again, until cancelled."""
        wait = BACK_OFF_MIN_S
        while True:
            lost = asyncio.Event()
            try:
                await self._connect(lost)
                wait = BACK_OFF_MIN_S
                log.info("connected to the broker at %s:%d", *self._address)
                self.on_connect()
                await lost.wait()
                log.warning("lost the broker at %s:%d", *self._address)
            except (OSError, TimeoutError, UnreachableError) as error:
                log.warning("cannot reach the broker at %s:%d: %s", *self._address, error)
            finally:
                await self._close()
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, not a secret
            wait = min(wait * 2, BACK_OFF_MAX_S)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 0; without a connection it is lost, as QoS 0 may be."""
        if self.connected.is_set():
            self._client.publish(topic, payload, qos=0)

    def clear(self, topic: str) -> None:
        """Have the broker forget what it keeps of a topic; without a connection nothing happens."""
        if self.connected.is_set():
            self._client.publish(topic, b"", qos=0, retain=True)

    def publish_retained(self, topic: str, payload: bytes, acknowledged: Acknowledged, position: int) -> None:
        """Publish retained with QoS 1; `acknowledged` is told when the broker has it, or when it will never say so.

        Raises:
            UnreachableError: `broker_unreachable`, without a connection.
        """
        if not self.connected.is_set():
            raise UnreachableError("broker_unreachable", "no connection to the broker")
        self._client.publish(topic, payload, qos=1, retain=True)
        acknowledged.expect()
        self._sent.waiting[self._sent.last] = acknowledged, position

    async def _connect(self, lost: asyncio.Event) -> None:
        self._sent = _Unacknowledged()
        client = Client(
            f"wherry-{self._name}-{secrets.token_hex(6)}",
            clean_session=True,
            persistent_storage=self._sent,
            logger=_quiet,
        )
        client.set_config({"reconnect_retries": _NEVER})
        granted = asyncio.Event()
        client.on_message = self._received
        client.on_disconnect = lambda *_: lost.set()
        client.on_subscribe = lambda *_: granted.set()
        self._client = client
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            context = self._context() if self._context is not None else False
            await client.connect(*self._address, ssl=context, version=MQTTv311, keepalive=KEEPALIVE_S)
            if self._filters:
                client.subscribe([Subscription(name, qos=1) for name in self._filters])
                await granted.wait()
        if lost.is_set():
            raise UnreachableError("broker_unreachable", "the broker closed the connection at once")
        self.connected.set()

    def _received(self, _client: Any, topic: str, payload: bytes, _qos: int, _properties: Any) -> int:
        self.on_message(topic, payload)
        return 0

    async def _close(self) -> None:
        self.connected.clear()
        client, self._client = self._client, None
        waiting, self._sent.waiting = self._sent.waiting, {}
        for acknowledged, _ in waiting.values():
            acknowledged.lose()
        if client is not None:
            with contextlib.suppress(Exception):  # a client that never connected has nothing to close
                async with asyncio.timeout(1):
                    await client.disconnect()
