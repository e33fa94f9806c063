"""Renewal: a new key and certificate for a device that its server knows, by the secret that enrolment gave it.

The new pair is written whole into a folder of its own; `device.json`, which names the folder, is replaced last. Whenever
power goes, the device has either the old pair or the new one. The X25519 key for content keys is renewed with it: what was
sealed for the old one is sealed for the new one here, and the old one goes. The old pair stays until the next renewal, since somebody
may be connecting with it now.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from wherry_agent import identity as identities
from wherry_agent.children import Renew, Renewed
from wherry_agent.courier_enrol import ANSWER_BYTES_MAX, key_bytes, problem, validity
from wherry_agent.courier_http import Http
from wherry_agent.device_keys import DeviceKeys
from wherry_agent.disk import Disk
from wherry_agent.identity import Identity
from wherry_shared import content_keys, reasons, wire
from wherry_shared.errors import RefusedError, UnreachableError

PATH = "/device/v1/renew"


def renew(task: Renew, known: Identity, http: Http, server: str, disk: Disk) -> Renewed:
    """Renew the certificate, or only say how long the one in use is valid.

    Raises:
        RefusedError: `enrol_refused` (the server wants none of it), `trust_invalid` (its answer is not for this key, this
            device, or not of the authority of the enrolment) or `message_invalid`.
        UnreachableError: `network`.
        DeviceError: `disk_full` or `disk`.
    """
    home = Path(task.home)
    folder = identities.folder(home)
    if task.only_look:
        kept = disk.read(identities.pair_folder(home, known) / identities.CERTIFICATE_FILE) or b""
        return _renewed(validity(kept))
    _tidy(folder, known, disk)
    keys = DeviceKeys(home, identities.content_password(disk.seal))
    keys.tidy(known.content_key, disk)
    content_key = keys.make(disk)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate_pem = _ask(http, server, known.device, key, content_keys.text_of(content_key))
    _check(certificate_pem, key, known.device, disk.read(folder / identities.CA_FILE) or b"")
    valid = validity(certificate_pem)
    pair = identities.PAIR_PREFIX + secrets.token_hex(8)
    disk.mkdir(folder / pair)
    disk.write_atomic(folder / pair / identities.KEY_FILE, key_bytes(key, disk.seal))
    disk.write_atomic(folder / pair / identities.CERTIFICATE_FILE, certificate_pem)
    renewed = msgspec.structs.replace(
        known,
        pair=pair,
        not_before=valid[0],
        not_after=valid[1],
        content_key=content_keys.fingerprint(content_key),
    )
    identities.write(home, disk, renewed)
    keys.tidy(renewed.content_key, disk)
    return _renewed(valid)


def _renewed(valid: tuple[int, int]) -> Renewed:
    return Renewed(not_before=valid[0], not_after=valid[1])


def _tidy(folder: Path, known: Identity, disk: Disk) -> None:
    """Remove pairs that are not in use: the one before, and what a renewal that was cut short left."""
    disk.sync_folder(folder)  # a courier that was killed may have named the pair in use without making that durable
    for path in folder.glob(f"{identities.PAIR_PREFIX}*"):
        if path.name != known.pair:
            disk.remove_tree(path)
    if known.pair:
        disk.unlink(folder / identities.KEY_FILE)
        disk.unlink(folder / identities.CERTIFICATE_FILE)
    disk.sweep(folder)


def _ask(http: Http, server: str, device: str, key: ec.EllipticCurvePrivateKey, content_key: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    csr_pem = request.public_bytes(Encoding.PEM).decode()
    body = wire.encode(wire.RenewRequest(format=wire.FORMAT, csr_pem=csr_pem, content_key=content_key))
    with http.request("POST", server + PATH, headers={"Content-Type": "application/json"}, body=body) as response:
        data = response.read(ANSWER_BYTES_MAX)
        if response.status in (404, 408, 429) or response.status >= 500:
            raise UnreachableError(reasons.NETWORK, f"the server answered {response.status}")
        if response.status != 200:
            raise RefusedError(reasons.ENROL_REFUSED, problem(data, response.status))
    return wire.parse(wire.RenewAnswer, data).certificate_pem.encode()


def _check(certificate_pem: bytes, key: ec.EllipticCurvePrivateKey, device: str, ca_pem: bytes) -> None:
    """Check that a certificate is of the kept authority, for this key and this device."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise _foreign("the authority that this device enrolled with did not sign it") from error
    if certificate.public_key() != key.public_key():
        raise _foreign("it is for another key")
    names = [item.value for item in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise _foreign("it is for another device")


def _foreign(why: str) -> RefusedError:
    return RefusedError(
        reasons.TRUST_INVALID,
        f"the server's answer is no certificate of this device: {why}",
        consequence="the certificate in use stays",
        next_step="see whether this is the server that the device enrolled with",
    )
