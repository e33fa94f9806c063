"""nginx in front of the API: it ends TLS, asks devices for their certificate, and hands it on so that nobody else can.

The headers that carry the certificate are always set by nginx, so what a client sends under their names is gone; and they
count only beside a secret that nginx adds, so whoever reaches the API around nginx has nothing to say. A device that shows
no certificate gets to the API without: the API decides. One that shows a bad certificate, or an expired one, is refused by nginx
(400); devices leave an expired one out (`identity.shown_pair`).
"""

from __future__ import annotations

import secrets
from pathlib import Path

from wherry_server import peer
from wherry_server.broker_config import replace
from wherry_server.identity import DeviceAuthority
from wherry_server.secret_files import write_secret
from wherry_server.settings import Settings
from wherry_shared.limits import BLOB_BYTES_MAX

CONFIGURATION = "nginx.conf"


def configuration(settings: Settings, folder: Path, *, name: str, listen: str) -> str:
    """Return the server block."""
    return f"""\
# Written by `wherry proxy config`; to be included in the http block of nginx. Holds a secret: mode 0600, read by nginx as root.
server {{
    listen {listen} ssl;
    server_name {name};
    ssl_certificate {folder / "proxy.pem"};
    ssl_certificate_key {folder / "proxy.key"};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_client_certificate {folder / "devices-ca.pem"};
    ssl_verify_client optional;
    ssl_verify_depth 1;
    ssl_session_tickets off;
    client_max_body_size {BLOB_BYTES_MAX};
    proxy_request_buffering off;

    location / {{
        proxy_pass http://{settings.host}:{settings.port};
        proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Proto https;
        proxy_set_header {peer.CERTIFICATE_HEADER} $ssl_client_escaped_cert;
        proxy_set_header {peer.SECRET_HEADER} {settings.proxy_secret_file.read_text().strip()};
        proxy_buffering off;
    }}
}}
"""


def write(settings: Settings, authority: DeviceAuthority, *, folder: Path, name: str, listen: str) -> Path:
    """Write configuration and certificates, making the secret if there is none; return the path of the configuration.

    Args:
        settings: of the API behind.
        authority: signs what nginx shows to devices.
        folder: where to.
        name: host name or address under which devices find nginx.
        listen: address and port, as nginx writes them.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not settings.proxy_secret_file.exists():
        write_secret(settings.proxy_secret_file, secrets.token_urlsafe(32).encode() + b"\n")
    pair = authority.issue_server([name], days=365)
    replace(folder / "devices-ca.pem", authority.ca_pem.encode())
    replace(folder / "proxy.pem", pair.certificate)
    write_secret(folder / "proxy.key", pair.key)
    write_secret(folder / CONFIGURATION, configuration(settings, folder, name=name, listen=listen).encode())
    return folder / CONFIGURATION
