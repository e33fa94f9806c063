"""How the roles of the server come to the broker: plainly to the one of `wherry dev`, with a certificate to others.

The certificate is made for each connection and lives for days: nothing has to be renewed, and nothing lies about.
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from wherry_server.broker_config import SERVER_USER
from wherry_server.identity import CERTIFICATE_FILE, Pair, ServersAuthority
from wherry_server.mqtt import Link
from wherry_server.secret_files import write_secret
from wherry_server.settings import Settings

LIFE = timedelta(days=30)
"""Of a role's certificate: as long as a connection may last, since brokers look at it only when it begins."""


def open_link(settings: Settings, name: str, filters: Sequence[str]) -> Link:
    """Return the link of a role; `name` tells it from others in the broker's log."""
    if not settings.broker_tls:
        return Link(settings.broker_host, settings.broker_port, name=name, filters=filters)

    def context() -> ssl.SSLContext:
        return client_context(settings, ServersAuthority.ensure(settings.keys_folder).issue(SERVER_USER, LIFE))

    return Link(settings.broker_server_host, settings.broker_server_port, name=name, filters=filters, context=context)


def client_context(settings: Settings, pair: Pair) -> ssl.SSLContext:
    """Return a context that shows `pair` and believes only what the device authority signed."""
    made = ssl.create_default_context(cafile=str(settings.keys_folder / CERTIFICATE_FILE))
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.TemporaryDirectory(prefix="role-", dir=settings.keys_folder) as folder:
        file = Path(folder) / "pair.pem"
        write_secret(file, pair.certificate + pair.key)
        made.load_cert_chain(file)
    return made
