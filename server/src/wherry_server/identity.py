"""Device certificates: a private CA in the data folder signs short-lived ones over keys that never leave the device.

The same authority signs what the server shows to devices (for servers only, so that no device can pass for the server),
and the list of certificates that were revoked. The roles of the server come to the broker with certificates of another
authority: no device gets in where they do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wherry_server.secret_files import write_secret
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, RefusedError

CA_DAYS = 3650
CLOCK_SKEW = timedelta(minutes=5)
"""A certificate is valid from this long ago, so that a clock that is behind takes it; of short ones a tenth of their life."""
CLOCK_SKEW_SHARE = 0.1
CSR_BYTES_MAX = 16 * 1024
KEY_FILE = "devices-ca.key"
CERTIFICATE_FILE = "devices-ca.pem"
SERVERS_STEM = "servers-ca"
REVOCATIONS_DAYS = 7
"""A list of revoked certificates is good for this long: a broker that gets no newer one lets nobody in any more."""


@dataclass(frozen=True, slots=True)
class Request:
    """A checked certificate request: whoever made it holds the key."""

    public_key: ec.EllipticCurvePublicKey
    key_digest: str
    """Of the public key (SubjectPublicKeyInfo): tells a device that repeats its enrolment from another."""
    names: tuple[str, ...]
    """Common names of its subject, as claimed."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and what the database keeps of it."""

    pem: str
    serial: str
    expires_at: int


def check_request(csr_pem: str) -> Request:
    """Check a certificate request: P-256, signed by its own key.

    Raises:
        RefusedError: `csr_invalid`.
    """
    if len(csr_pem) > CSR_BYTES_MAX:
        raise _invalid(f"{len(csr_pem)} bytes, at most {CSR_BYTES_MAX}")
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        key = csr.public_key()
        subject = csr.subject
        signed = csr.is_signature_valid
    except Exception as error:  # the parser's errors are of many kinds, all of them the sender's fault
        raise _invalid(str(error) or type(error).__name__) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("the key is not on the curve P-256")
    if not signed:
        raise _invalid("it is not signed by its own key")
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    names = tuple(str(item.value) for item in subject.get_attributes_for_oid(NameOID.COMMON_NAME))
    return Request(public_key=key, key_digest=of_bytes(encoded), names=names)


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "csr_invalid",
        f"the certificate request is not usable: {why}",
        consequence="no certificate was issued",
        next_step="make a P-256 key and a request signed with it",
    )


class DeviceAuthority:
    """Signs certificates of devices."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, days: float) -> None:
        self._key = key
        self.certificate = certificate
        self._life = timedelta(days=days)
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    @staticmethod
    def create(folder: Path, project: str) -> None:
        """Make key and certificate of the authority, unless they are there."""
        _create(folder / KEY_FILE, folder / CERTIFICATE_FILE, f"devices of {project}")

    @classmethod
    def open(cls, folder: Path, *, days: float) -> DeviceAuthority:
        """Read the authority that `create` made; its certificates live `days`.

        Raises:
            DeviceError: `device_ca_missing`.
        """
        key, certificate = _open(folder / KEY_FILE, folder / CERTIFICATE_FILE)
        return cls(key, certificate, days)

    def issue(self, request: Request, device: str, project: str) -> Issued:
        """Sign a certificate that names the device id (and nothing that the request claims)."""
        now = datetime.now(UTC).replace(microsecond=0)
        expires = now + self._life
        serial = x509.random_serial_number()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(project, device))
            .issuer_name(self.certificate.subject)
            .public_key(request.public_key)
            .serial_number(serial)
            .not_valid_before(now - min(CLOCK_SKEW, self._life * CLOCK_SKEW_SHARE))
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return Issued(
            pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            serial=f"{serial:x}",
            expires_at=int(expires.timestamp()) * 1_000_000,
        )

    def issue_server(self, hosts: Sequence[str], *, days: float) -> Pair:
        """Make what a server shows that devices reach under `hosts` (names or addresses)."""
        return _pair(
            self._key, self.certificate, hosts[0], timedelta(days=days), ExtendedKeyUsageOID.SERVER_AUTH, hosts
        )

    def issue_double(self, device: str, life: timedelta) -> Pair:
        """Make a short-lived certificate that names a device, by which the server takes its session at the broker over."""
        return _pair(self._key, self.certificate, device, life, ExtendedKeyUsageOID.CLIENT_AUTH)

    def revocations(self, serials: Iterable[tuple[str, int]]) -> bytes:
        """Sign the list (PEM) of revoked certificates: (serial in hex, when in µs)."""
        now = datetime.now(UTC).replace(microsecond=0)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - CLOCK_SKEW)
            .next_update(now + timedelta(days=REVOCATIONS_DAYS))
        )
        for serial, at_us in serials:
            revoked = x509.RevokedCertificateBuilder(int(serial, 16), datetime.fromtimestamp(at_us // 1_000_000, UTC))
            builder = builder.add_revoked_certificate(revoked.build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class ServersAuthority:
    """Signs what the roles of the server show to the broker."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    @classmethod
    def ensure(cls, folder: Path) -> ServersAuthority:
        """Open the authority, making it if it is not there."""
        files = folder / f"{SERVERS_STEM}.key", folder / f"{SERVERS_STEM}.pem"
        _create(*files, "servers")
        return cls(*_open(*files))

    def issue(self, name: str, life: timedelta) -> Pair:
        """Make a certificate for a client that is part of the server."""
        return _pair(self._key, self._certificate, name, life, ExtendedKeyUsageOID.CLIENT_AUTH)


def _create(key_file: Path, certificate_file: Path, common_name: str) -> None:
    if certificate_file.exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Wherry", common_name)
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_secret(key_file, _secret(key))
    write_secret(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))


def _open(key_file: Path, certificate_file: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    except FileNotFoundError as error:
        raise DeviceError(
            "device_ca_missing",
            f"{error.filename} is missing",
            consequence="no device can enrol",
            next_step="restore the keys folder from a backup",
        ) from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, certificate


def _pair(
    signer: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    common_name: str,
    life: timedelta,
    usage: x509.ObjectIdentifier,
    hosts: Sequence[str] = (),
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC).replace(microsecond=0)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name("Wherry", common_name))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - min(CLOCK_SKEW, life * CLOCK_SKEW_SHARE))
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False)
    certificate = builder.sign(signer, hashes.SHA256())
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), _secret(key))


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(organization: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
