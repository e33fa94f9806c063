"""Enrolment: from a token that a person pasted to an identity on disk.

The key is made here and never leaves; the token's third part is the digest of TUF root v1, so that the first contact
with the server is already checked. `device.json` is written last: until then enrolment starts again with the same key.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from wherry_agent import identity as identities
from wherry_agent.children import Enrol
from wherry_agent.courier_http import Http
from wherry_agent.device_keys import DeviceKeys
from wherry_agent.disk import Disk
from wherry_agent.identity import Identity
from wherry_agent.sealing import Seal
from wherry_agent.trust import ROOT_FILE
from wherry_shared import content_keys, ids, limits, reasons, wire
from wherry_shared.clock import MICROSECONDS
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError, UnreachableError

PATH = "/device/v1/enrol"
ANSWER_BYTES_MAX = 64 * limits.KIB
_TOKEN = re.compile(r"wherry1\.([A-Za-z0-9_-]{16,128})\.([0-9a-f]{64})")
_TUF_PATH = re.compile(r"/[A-Za-z0-9/_-]{1,120}")


def enrol(task: Enrol, disk: Disk) -> Identity:
    """Enrol, or return the identity that is already here.

    Raises:
        RefusedError: `enrol_refused`, `trust_invalid` (the server's root is not the token's) or `identity_invalid`.
        UnreachableError: `network`.
        DeviceError: `disk_full` or `disk`.
    """
    home = Path(task.home)
    known = identities.load(home, disk.seal)
    if known is not None:
        return known
    parts = _TOKEN.fullmatch(task.token.strip())
    if parts is None:
        raise RefusedError(
            reasons.ENROL_REFUSED,
            "this is not an enrolment token",
            next_step="paste the whole of it: wherry1.SECRET.DIGEST",
        )
    folder = identities.folder(home)
    disk.mkdir(folder)
    disk.mkdir(home / "trust")
    key = device_key(folder / identities.KEY_FILE, disk)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, task.name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    server = task.server.rstrip("/")
    http = Http(ca=Path(task.ca) if task.ca else None)
    content_key = DeviceKeys(home, identities.content_password(disk.seal)).any_or_make(disk)
    answer = _ask(http, server, task, request.public_bytes(Encoding.PEM).decode(), content_keys.text_of(content_key))
    root = _root(http, server + answer.tuf_path, parts[2])
    not_before, not_after = validity(answer.certificate_pem.encode())
    disk.write_atomic(home / "trust" / ROOT_FILE, root)
    disk.write_atomic(folder / identities.CERTIFICATE_FILE, answer.certificate_pem.encode())
    if answer.ca_pem:
        disk.write_atomic(folder / identities.CA_FILE, answer.ca_pem.encode())
    else:
        disk.unlink(folder / identities.CA_FILE)
    identity = Identity(
        format=identities.FORMAT,
        device=answer.device,
        project=answer.project,
        name=task.name,
        server=server,
        root_digest=parts[2],
        tuf_path=answer.tuf_path,
        bearer=answer.bearer,
        mac_key=answer.mac_key,
        broker_host=answer.broker_host,
        broker_port=answer.broker_port,
        broker_tls=answer.broker_tls,
        broker_tokens=answer.broker_tokens,
        not_before=not_before,
        not_after=not_after,
        content_key=content_keys.fingerprint(content_key),
    )
    identities.write(home, disk, identity)
    return identity


def public_key(home: Path, disk: Disk) -> tuple[bytes, str]:
    """Return the public key (PEM) with which this device enrols, and its digest, by which operators know it; makes it.

    Raises:
        RefusedError: `identity_invalid`.
        DeviceError: `disk_full` or `disk`.
    """
    disk.mkdir(home)
    disk.mkdir(identities.folder(home))
    public = device_key(identities.folder(home) / identities.KEY_FILE, disk).public_key()
    encoded = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), of_bytes(encoded)


def device_key(path: Path, disk: Disk) -> ec.EllipticCurvePrivateKey:
    """Read the device key, or make it: an enrolment that was cut short goes on with the same one."""
    data = disk.read(path)
    if data is not None:
        try:
            known = open_key(data, disk.seal)
        except (ValueError, TypeError) as error:
            raise RefusedError(
                "identity_invalid", f"{path} is not a private key", next_step="remove it and enrol again"
            ) from error
        if isinstance(known, ec.EllipticCurvePrivateKey):
            return known
        raise RefusedError("identity_invalid", f"{path} is not a P-256 key", next_step="remove it and enrol again")
    key = ec.generate_private_key(ec.SECP256R1())
    disk.write_atomic(path, key_bytes(key, disk.seal))
    return key


def open_key(data: bytes, seal: Seal | None) -> PrivateKeyTypes:
    """Read a private key, encrypted or not.

    Raises:
        ValueError, TypeError: it is none, or not for this seal.
    """
    sealed = data.startswith(identities.ENCRYPTED_KEY)
    return load_pem_private_key(data, identities.password(seal).encode() if sealed else None)


def key_bytes(key: PrivateKeyTypes, seal: Seal | None) -> bytes:
    """Return a private key as it belongs on this device's disk."""
    wished = seal is not None and seal.writes
    how = BestAvailableEncryption(identities.password(seal).encode()) if wished else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


def bring_in_line(home: Path, disk: Disk) -> Identity | None:
    """Write identity and private key again as the settings wish, sealed or not; the key first, which both ways open.

    Raises:
        RefusedError: `identity_invalid`; `at_rest_key_missing`, `at_rest_key_other` or `record_clear`.
        DeviceError: `disk_full`, `read_only` or `disk`.
    """
    known = identities.load(home, disk.seal)
    if known is None or identities.is_in_line(home, known, disk.seal):
        return known
    path = identities.pair_folder(home, known) / identities.KEY_FILE
    if disk.read(path) is not None:
        disk.write_atomic(path, key_bytes(device_key(path, disk), disk.seal))
    DeviceKeys(home, identities.content_password(disk.seal)).bring_in_line(disk)
    identities.write(home, disk, known)
    return known


def _ask(http: Http, server: str, task: Enrol, csr_pem: str, content_key: str) -> wire.EnrolAnswer:
    body = wire.encode(
        wire.EnrolRequest(
            format=wire.FORMAT,
            token=task.token.strip(),
            csr_pem=csr_pem,
            name=task.name,
            labels=task.labels,
            content_key=content_key,
        )
    )
    headers = {"Content-Type": "application/json"}
    with http.request("POST", server + PATH, headers=headers, body=body) as response:
        data = response.read(ANSWER_BYTES_MAX)
        if response.status in (408, 429) or response.status >= 500:
            raise UnreachableError(reasons.NETWORK, problem(data, response.status))
        if response.status != 200:
            raise RefusedError(reasons.ENROL_REFUSED, problem(data, response.status))
    answer = wire.parse(wire.EnrolAnswer, data)
    if not ids.is_device_id(answer.device) or _TUF_PATH.fullmatch(answer.tuf_path) is None:
        raise RefusedError("message_invalid", "the server's answer names no device or no TUF repository")
    return answer


def _root(http: Http, base: str, digest: str) -> bytes:
    with http.request("GET", f"{base}/1.root.json") as response:
        if response.status != 200:
            raise UnreachableError(reasons.NETWORK, f"the server answered {response.status} for its root")
        data = response.read(limits.TUF_ROOT_BYTES_MAX)
    if hashlib.sha256(data).hexdigest() != digest:
        raise RefusedError(
            reasons.TRUST_INVALID,
            "the server's root of trust is not the one that the token names",
            consequence="this device was not enrolled",
            next_step="get a new token from the server that you mean; somebody may be in between",
        )
    return data


def validity(certificate_pem: bytes) -> tuple[int, int]:
    """Return from when until when (µs) a certificate is valid.

    Raises:
        RefusedError: `message_invalid`, it is none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except ValueError as error:
        raise RefusedError("message_invalid", f"not a certificate: {error}") from error
    bounds = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return int(bounds[0].timestamp()) * MICROSECONDS, int(bounds[1].timestamp()) * MICROSECONDS


def problem(data: bytes, status: int) -> str:
    """Say in words what a server answered instead of what was asked."""
    try:
        told = msgspec.json.decode(data)
    except msgspec.DecodeError:
        told = None
    said = told if isinstance(told, dict) else {}
    detail, step = said.get("detail"), said.get("next_step")
    words = f": {str(detail)[:300]}" if detail else ""
    return f"the server answered {status}{words}" + (f" (next: {str(step)[:300]})" if step else "")
