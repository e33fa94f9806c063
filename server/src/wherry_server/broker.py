"""The embedded MQTT broker of `wherry dev` (rumqttd, through iotcore): on loopback, in a process of its own.

It has no access control, no TLS and keeps nothing over a restart, so it is for development only. Nothing that Wherry
promises rests on it: offers are in the database and are published again, and devices keep what was not acknowledged.
"""

from __future__ import annotations

import logging
import socket

from iotcore import Broker

from wherry_server.settings import Settings
from wherry_shared.limits import KIB, MQTT_PAYLOAD_BYTES_MAX

CONNECTIONS_MAX = 10_000
PACKET_BYTES_MAX = MQTT_PAYLOAD_BYTES_MAX + 1 * KIB
"""The largest payload, and room for its topic."""
IN_FLIGHT_MAX = 200
"""Messages on their way to one client: ingest takes from all devices through one connection."""
CONNECT_TIMEOUT_MS = 30_000

WARNING = "for development only: the broker has no access control, no TLS, and forgets everything when it stops"


def run(settings: Settings) -> None:
    """Be the broker until the process is told to end."""
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)  # its spans log every packet as an error
    Broker(
        port=settings.broker_port,
        listen=settings.broker_host,
        max_connections=CONNECTIONS_MAX,
        max_payload_size=PACKET_BYTES_MAX,
        max_inflight_count=IN_FLIGHT_MAX,
        connection_timeout_ms=CONNECT_TIMEOUT_MS,
    ).run_forever()


def answers(settings: Settings, timeout_s: float = 0.5) -> bool:
    """Tell whether something takes connections where the broker should be."""
    try:
        with socket.create_connection((settings.broker_host, settings.broker_port), timeout=timeout_s):
            return True
    except OSError:
        return False
