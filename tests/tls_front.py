"""TLS in front of what speaks plainly on loopback: a forwarder with a certificate of the server's own device authority.

`wherry dev` has a broker and an API without TLS. Behind this front a device meets both as it would in production: it
checks the server's certificate against the CA of its enrolment, and shows its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from wherry_agent import identity

CHUNK_BYTES = 64 * 1024


def server_certificate(keys: Path, folder: Path, *, days: int = 1) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1, signed by the authority under `keys`; (certificate, key)."""
    authority_key = load_pem_private_key((keys / "devices-ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((keys / "devices-ca.pem").read_bytes())
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    paths = folder / "front.pem", folder / "front.key"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


class TlsFront:
    """Forwards TLS connections on a port of its own to a plain port; with `ca`, only clients with its certificate."""

    def __init__(self, upstream_port: int, certificate: Path, key: Path, *, ca: Path | None = None) -> None:
        self._upstream = ("127.0.0.1", upstream_port)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        if ca is not None:
            self._context.load_verify_locations(ca)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.clients: list[str] = []
        """Common names of the certificates that clients showed."""
        self.serials: list[str] = []
        """Their serial numbers, in hex."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        near.settimeout(20)
        try:
            secure = self._context.wrap_socket(near, server_side=True)
            far = socket.create_connection(self._upstream, timeout=20)
        except OSError:
            near.close()
            return
        shown = secure.getpeercert() or {}
        self.clients += [str(part[0][1]) for part in shown.get("subject", ())]
        self.serials += [str(shown["serialNumber"]).lower().lstrip("0")] if shown else []
        # both directions in one thread: an SSL object is not for two threads at a time
        secure.settimeout(0.05)
        far.settimeout(0.05)
        with secure, far, contextlib.suppress(OSError):
            while True:
                for source, sink in ((secure, far), (far, secure)):
                    try:
                        chunk = source.recv(CHUNK_BYTES)
                    except (TimeoutError, ssl.SSLWantReadError):
                        continue
                    if not chunk:
                        return
                    sink.settimeout(20)
                    sink.sendall(chunk)
                    sink.settimeout(0.05)


def use_tls(home: Path, broker_port: int, server: str) -> None:
    """Let an enrolled device use a broker with TLS from now on, and a server by another address."""
    path = identity.folder(home) / identity.DEVICE_FILE
    known = json.loads(path.read_bytes())
    path.write_text(json.dumps({**known, "broker_port": broker_port, "broker_tls": True, "server": server}))
