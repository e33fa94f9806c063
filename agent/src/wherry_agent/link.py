"""The way to the server: MQTT while the broker can be reached, HTTP when it cannot.

One thread keeps one MQTT connection: exact topics, QoS 1, no session on the broker, and after each loss a new client
behind a back-off with jitter. Another asks over HTTP while there is no connection. Both only carry: bytes of offers and
acknowledgements go to the owner's callbacks, which must return at once; nothing is believed here.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from wherry_agent import identity as identities
from wherry_agent.identity import Identity
from wherry_shared import frames, topics, wire
from wherry_shared.errors import WherryError
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX

if TYPE_CHECKING:
    from wherry_agent.courier_http import Http

log = logging.getLogger(__name__)

KEEPALIVE_S = 30
CONNECT_S = 10.0
RECONNECT_MIN_S = 1.0
RECONNECT_MAX_S = 60.0
STEADY_S = 30.0
"""A connection that held this long starts the back-off anew."""
HTTP_AFTER_S = 10.0
"""Without MQTT for this long, HTTP takes over."""
HTTP_EVERY_S = 30.0
HTTP_NUDGED_S = 2.0
"""With something new to say, HTTP waits no longer than this."""
OFFER_EVERY_S = 60.0
"""Beside MQTT, the offer is asked for over HTTP about this often at most."""
ANSWER_BYTES_MAX = 20 * MQTT_PAYLOAD_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Who hears what; called from this module's threads."""

    up: Callable[[], None]
    """The server can be reached over MQTT: say hello, and send what is owed."""
    down: Callable[[], None]
    offer: Callable[[bytes, bool], None]
    """Bytes that claim to be an envelope; true if the server gave them over HTTP."""
    ack: Callable[[bytes], None]
    """Bytes that claim to be an acknowledgement's frame."""
    reached: Callable[[], None]
    """The server answered over HTTP."""
    outgoing: Callable[[topics.Up], list[bytes]]
    """Payloads to post over HTTP now: at most 20 of a stream, one hello."""
    retire: Callable[[bytes], None] = lambda _frame: None
    """Bytes that claim to be the server's order to end."""


def new_client(home: Path, identity: Identity, password: str = "") -> mqtt.Client:
    """Return a client that would connect as this device, once, with what enrolment gave it; `password` is of its key.

    Raises:
        OSError: its key or certificate cannot be used.
    """
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2,
        client_id=identity.device,
        clean_session=True,
        protocol=mqtt.MQTTv311,
        reconnect_on_failure=False,
    )
    client.username_pw_set(identity.device)
    client.connect_timeout = CONNECT_S
    client.max_queued_messages_set(64)
    if identity.broker_tls:
        folder = identities.pair_folder(home, identity)
        client.tls_set(
            str(identities.folder(home) / identities.CA_FILE),
            str(folder / identities.CERTIFICATE_FILE),
            str(folder / identities.KEY_FILE),
            keyfile_password=password,
        )
    return client


class Link:
    """The device's connection."""

    def __init__(
        self, home: Path, identity: Identity, server: str, callbacks: Callbacks, *, password: str = ""
    ) -> None:
        """Prepare; `password` is that of the device's key on the disk."""
        self._home = home
        self._password = password
        self._identity = identity
        self._server = server.rstrip("/")
        self._callbacks = callbacks
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._client: mqtt.Client | None = None
        self._connected = threading.Event()
        self._nudged = threading.Event()
        self._offer_wanted = threading.Event()
        self._offer_again_s = 0.0
        self._down_since = time.monotonic()
        self._answered_s = float("-inf")
        self._etag = ""
        self._threads = [
            threading.Thread(target=self._keep_mqtt, name="mqtt", daemon=True),
            threading.Thread(target=self._keep_http, name="http", daemon=True),
        ]

    def start(self) -> None:
        """Begin to connect."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Disconnect and end the threads."""
        self._stop.set()
        self._lost.set()
        self._connected.set()
        for thread in self._threads:
            thread.join(CONNECT_S + 1)

    def renew(self, identity: Identity) -> None:
        """The device has another certificate: where it is shown, connect anew with it."""
        self._identity = identity
        if identity.broker_tls:
            self._lost.set()

    @property
    def is_up(self) -> bool:
        """Whether MQTT is connected and its topics are subscribed."""
        return self._connected.is_set() and not self._stop.is_set()

    @property
    def way(self) -> str:
        """By which way the server is reached: `mqtt`, `http` or `no`."""
        if self.is_up:
            return "mqtt"
        return "http" if time.monotonic() - self._answered_s < 2 * HTTP_EVERY_S else "no"

    def publish(self, kind: topics.Up, payload: bytes) -> bool:
        """Send a message over MQTT, framed; False if there is no connection or it is too large."""
        client = self._client
        if client is None or not self.is_up:
            return False
        frame = self.seal(kind, payload)
        if len(frame) > MQTT_PAYLOAD_BYTES_MAX:
            log.error("a %s of %d bytes is too large to send", kind, len(frame))
            return False
        # a hello stays at the broker for a server that subscribes only later; the next one replaces it
        sent = client.publish(topics.up(self._identity.device, kind), frame, qos=1, retain=kind == "hello")
        return sent.rc == mqtt.MQTT_ERR_SUCCESS

    def nudge(self) -> None:
        """There is something new to send; over HTTP, if that is the way, do it soon."""
        self._nudged.set()

    def ask_offer(self) -> None:
        """What the broker passes on cannot be relied on: ask the server itself for the offer, soon."""
        self._offer_wanted.set()

    def seal(self, kind: str, payload: bytes) -> bytes:
        """Frame a message as this device's."""
        return frames.seal(self._identity.frame_key, kind, self._identity.device, payload)

    def unseal(self, kind: str, frame: bytes) -> bytes:
        """Check a frame for this device.

        Raises:
            RefusedError: `frame_invalid`, `frame_forged` or `frame_too_large`.
        """
        return frames.unseal(self._identity.frame_key, kind, self._identity.device, frame)

    def post_logs(self, body: bytes) -> None:
        """Send log lines over HTTP.

        Raises:
            UnreachableError: `network`.
        """
        with self._http().request(
            "POST", f"{self._server}/device/v1/logs", headers={"Content-Type": "application/json"}, body=body
        ) as answer:
            if answer.status >= 300:
                log.warning("log lines were not taken: HTTP %d", answer.status)

    # --- MQTT ---

    def _keep_mqtt(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s * (0.5 + random.random())):  # noqa: S311 - jitter
            began = time.monotonic()
            try:
                self._one_connection()
            except (OSError, ValueError) as error:
                log.info("broker %s:%d: %s", self._identity.broker_host, self._identity.broker_port, error)
            except Exception:  # the thread's border: a device whose thread ended would be dark for ever
                log.exception("broker %s:%d", self._identity.broker_host, self._identity.broker_port)
            if time.monotonic() - began > STEADY_S:
                wait_s = RECONNECT_MIN_S
            else:
                wait_s = min(max(2 * wait_s, RECONNECT_MIN_S), RECONNECT_MAX_S)

    def _one_connection(self) -> None:
        self._lost.clear()  # before the identity is read: another certificate ends a connection with this one
        identity = self._identity
        client = new_client(self._home, identity, self._password)
        if identity.broker_tokens:
            client.username_pw_set(identity.device, self._broker_token())
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.connect(identity.broker_host, identity.broker_port, keepalive=KEEPALIVE_S)
        self._client = client
        client.loop_start()
        try:
            while not self._stop.is_set() and not self._lost.wait(1.0):
                pass
        finally:
            self._client = None
            was_up = self._connected.is_set()
            self._connected.clear()
            client.disconnect()
            client.loop_stop()
            if self._stop.is_set():
                self._connected.set()  # nobody waits any more
            elif was_up:
                self._down_since = time.monotonic()
                self._callbacks.down()

    def _broker_token(self) -> str:
        """Ask the server for the password of the next connection.

        Raises:
            OSError: there is none.
        """
        try:
            with self._http().request("POST", f"{self._server}/device/v1/broker-token", body=b"") as answer:
                body = answer.read(ANSWER_BYTES_MAX)
                if answer.status != 200:
                    raise OSError(f"the server gave no token for the broker: HTTP {answer.status}")
            return wire.parse(wire.BrokerToken, body).token
        except WherryError as error:
            raise OSError(f"no token for the broker: {error}") from error

    def _on_connect(
        self, client: mqtt.Client, _data: Any, _flags: Any, code: ReasonCode, _p: Properties | None
    ) -> None:
        if code.is_failure:
            log.warning("the broker refused the connection: %s", code)
            self._lost.set()
            return
        device = self._identity.device
        client.subscribe([(topics.down(device, "offer"), 1), (topics.down(device, "ack"), 0)])

    def _on_subscribe(self, _client: mqtt.Client, _data: Any, _mid: int, _codes: Any, _p: Properties | None) -> None:
        self._connected.set()
        self._callbacks.up()

    def _on_disconnect(
        self, _client: mqtt.Client, _data: Any, _f: Any, _code: ReasonCode, _p: Properties | None
    ) -> None:
        self._lost.set()

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        if len(message.payload) > MQTT_PAYLOAD_BYTES_MAX:
            log.warning("a message of %d bytes on %s is ignored", len(message.payload), message.topic)
        elif message.topic == topics.down(self._identity.device, "offer"):
            if message.payload:  # an empty retained message only clears the topic
                self._callbacks.offer(bytes(message.payload), False)
        elif message.topic == topics.down(self._identity.device, "ack"):
            self._callbacks.ack(bytes(message.payload))
        else:
            log.warning("a message on %s is ignored", message.topic)

    # --- HTTP ---

    def _keep_http(self) -> None:
        while not self._stop.is_set():
            if self._connected.is_set():
                self._try(self._answer_wish)
                self._stop.wait(1.0)
                continue
            down_s = time.monotonic() - self._down_since
            if down_s < HTTP_AFTER_S:
                self._stop.wait(HTTP_AFTER_S - down_s)
                continue
            self._nudged.clear()
            self._try(self._exchange)
            self._wait_down(HTTP_EVERY_S * (0.5 + random.random()))  # noqa: S311 - jitter

    def _answer_wish(self) -> None:
        """Ask over HTTP for the offer although there is MQTT, at a bounded rate."""
        if not self._offer_wanted.is_set() or time.monotonic() < self._offer_again_s:
            return
        self._offer_wanted.clear()
        self._offer_again_s = time.monotonic() + OFFER_EVERY_S * (0.5 + random.random())  # noqa: S311 - jitter
        self._get_offer(self._http(), "")

    def _try(self, what: Callable[[], None]) -> None:
        try:
            what()
        except WherryError as error:
            log.info("server %s: %s", self._server, error)
        except Exception:  # the thread's border, as of the other one
            log.exception("server %s", self._server)

    def _wait_down(self, seconds: float) -> None:
        began = time.monotonic()
        while not self._stop.is_set() and not self._connected.is_set():
            waited_s = time.monotonic() - began
            if waited_s >= seconds or (self._nudged.is_set() and waited_s >= HTTP_NUDGED_S):
                return
            self._stop.wait(0.5)

    def _exchange(self) -> None:
        """Say hello, ask for the offer, deliver what is owed."""
        http = self._http()
        base = f"{self._server}/device/v1"
        hello = self._callbacks.outgoing("hello")
        if hello:
            with http.request("POST", f"{base}/hello", body=self.seal("hello", hello[0])) as answer:
                answer.read(ANSWER_BYTES_MAX)
        self._get_offer(http, self._etag)
        self._answered_s = time.monotonic()
        self._callbacks.reached()
        for kind, path in (("report", "reports"), ("telemetry", "telemetry")):
            payloads = self._callbacks.outgoing(kind)  # type: ignore[arg-type]
            if not payloads:
                continue
            lines = b"\n".join(self.seal(kind, payload) for payload in payloads)
            with http.request("POST", f"{base}/{path}", body=lines) as answer:
                body = answer.read(ANSWER_BYTES_MAX)
                if answer.status != 200:
                    log.warning("%s were not taken: HTTP %d", path, answer.status)
                    continue
            for line in body.splitlines():
                if line:
                    self._callbacks.ack(line)

    def _get_offer(self, http: Http, etag: str) -> None:
        headers = {"If-None-Match": etag} if etag else {}
        with http.request("GET", f"{self._server}/device/v1/offer", headers=headers) as answer:
            body = answer.read(ANSWER_BYTES_MAX)
            if answer.status == 200 and body:
                self._etag = answer.header("ETag")
                self._callbacks.offer(body, True)
            elif answer.status >= 400:
                log.warning("the server gave no offer: HTTP %d", answer.status)
            shut_out = answer.status == 403
        if shut_out:
            with http.request("GET", f"{self._server}/device/v1/retirement") as answer:
                body = answer.read(ANSWER_BYTES_MAX)
                if answer.status == 200:
                    self._callbacks.retire(body)

    def _http(self) -> Http:
        from wherry_agent.courier_http import of_device

        return of_device(self._home, self._identity, self._server, password=self._password, wall_s=time.time())
