"""The certificate that a device shows over HTTPS, where the API ends TLS itself or behind a proxy that ends it.

The proxy hands the certificate on in a header, beside a secret that only it and the server know: without the secret the header
is nothing, whoever sends it. Either way the certificate is checked here once more, so a proxy that was set up wrongly lets nobody in.
"""

from __future__ import annotations

import hmac
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fastapi import Request

from wherry_server.heads import HeadLimit
from wherry_server.services import Services
from wherry_shared.errors import RefusedError
from wherry_shared.ids import is_device_id

SCOPE = "wherry.certificate"
"""Where the protocol leaves the bytes of the certificate (DER) for the application."""
SECRET_HEADER = "x-wherry-proxy"  # noqa: S105  # a header's name
CERTIFICATE_HEADER = "x-wherry-certificate"
HEADER_CHARS_MAX = 16 * 1024


@dataclass(frozen=True, slots=True)
class Shown:
    """What a certificate of our authority says."""

    device: str
    serial: str


class TlsProtocol(HeadLimit):
    """uvicorn's HTTP, which tells the application the certificate of the other side."""

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        secure = self.transport.get_extra_info("ssl_object")
        if secure is not None:
            cast("dict[str, Any]", self.scope)[SCOPE] = secure.getpeercert(binary_form=True)


def tls_options(keys: Path, pair: tuple[Path, Path]) -> dict[str, Any]:
    """Return what uvicorn is told to end TLS: certificates of clients are looked at, if they show one."""
    return {
        "http": TlsProtocol,
        "ssl_certfile": str(pair[0]),
        "ssl_keyfile": str(pair[1]),
        "ssl_ca_certs": str(keys / "devices-ca.pem"),
        "ssl_cert_reqs": ssl.CERT_OPTIONAL,
    }


def certificate(request: Request, services: Services) -> Shown | None:
    """Return the certificate that came with a request, None if there was none.

    Raises:
        RefusedError: `certificate_invalid`.
    """
    data: bytes | None = request.scope.get(SCOPE)
    if data is not None:
        return _read(lambda: x509.load_der_x509_certificate(data), services)
    secret = services.proxy_secret
    given = request.headers.get(SECRET_HEADER, "")
    forwarded = request.headers.get(CERTIFICATE_HEADER, "")
    if not secret or not forwarded or not hmac.compare_digest(given.encode(), secret.encode()):
        return None
    if len(forwarded) > HEADER_CHARS_MAX:
        raise _invalid("it is too long")
    return _read(lambda: x509.load_pem_x509_certificate(unquote(forwarded).encode()), services)


def _read(load: Any, services: Services) -> Shown:
    try:
        found = load()
        found.verify_directly_issued_by(services.authority.certificate)
        names = [str(item.value) for item in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        now = datetime.now(UTC)
        in_time = found.not_valid_before_utc <= now <= found.not_valid_after_utc
        good = in_time and ExtendedKeyUsageOID.CLIENT_AUTH in usage and len(names) == 1 and is_device_id(names[0])
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise _invalid(str(error) or "this server's authority did not sign it") from error
    if not good:
        raise _invalid("it is not of a device, or not of this time")
    return Shown(names[0], f"{found.serial_number:x}")


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "certificate_invalid",
        f"the certificate that came with this request is not good: {why}",
        consequence="nothing was done",
        next_step="connect without it and renew it, or enrol the device again",
    )
