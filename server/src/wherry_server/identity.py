"""Device certificates: a private CA in the data folder signs short-lived ones over keys that never leave the device."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Request:
    """A checked certificate request: whoever made it holds the key."""

    public_key: ec.EllipticCurvePublicKey
    key_digest: str
    """Of the public key (SubjectPublicKeyInfo): tells a device that repeats its enrolment from another."""
    names: tuple[str, ...]
    """Common names of its subject, as claimed."""


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
    except Exception as error:  # the parser's errors are of many kinds, all of them the sender's fault
        raise _invalid(str(error) or type(error).__name__) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("the key is not on the curve P-256")
    if not csr.is_signature_valid:
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
        self._certificate = certificate
        self._life = timedelta(days=days)
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    @staticmethod
    def create(folder: Path, project: str) -> None:
        """Make key and certificate of the authority, unless they are there."""
        if (folder / CERTIFICATE_FILE).exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Wherry"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"devices of {project}"),
            ]
        )
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
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_secret(folder / KEY_FILE, secret)
        write_secret(folder / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))

    @classmethod
    def open(cls, folder: Path, *, days: float) -> DeviceAuthority:
        """Read the authority that `create` made; its certificates live `days`.

        Raises:
            DeviceError: `device_ca_missing`.
        """
        try:
            key = serialization.load_pem_private_key((folder / KEY_FILE).read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE_FILE).read_bytes())
        except FileNotFoundError as error:
            raise DeviceError(
                "device_ca_missing",
                f"{error.filename} is missing",
                consequence="no device can enrol",
                next_step="restore the keys folder from a backup",
            ) from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(key, certificate, days)

    def issue(self, request: Request, device: str, project: str) -> Issued:
        """Sign a certificate that names the device id (and nothing that the request claims)."""
        now = datetime.now(UTC).replace(microsecond=0)
        expires = now + self._life
        serial = x509.random_serial_number()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(
                x509.Name(
                    [
                        x509.NameAttribute(NameOID.ORGANIZATION_NAME, project),
                        x509.NameAttribute(NameOID.COMMON_NAME, device),
                    ]
                )
            )
            .issuer_name(self._certificate.subject)
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
