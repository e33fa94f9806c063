"""Who this device is: what enrolment gave it, kept under `HOME/identity`; only its key and certificate are ever renewed.

`device.json` is written after all it names and makes the identity whole; a device without it is not enrolled. Light enough for the
supervisor: keys and certificates stay PEM files that only the courier opens. With a key at rest (`wherry_agent.sealing`) the
document is sealed, and the private key an encrypted PEM file, which TLS libraries read as it is.
"""

from __future__ import annotations

import base64
import binascii
import logging
from pathlib import Path

import msgspec

from wherry_agent.disk import Disk
from wherry_agent.sealing import IDENTITY, STOPS, Seal, close, is_sealed, opened
from wherry_shared.clock import MICROSECONDS
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.frames import KEY_BYTES

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "identity"
DEVICE_FILE = "device.json"
COPY_FILE = "device.copy.json"
"""The same once more: a worn card that alters the one must not cost the device its name, and with it everything that serves."""
KEY_FILE = "key.pem"
CERTIFICATE_FILE = "certificate.pem"
CA_FILE = "ca.pem"
ENCRYPTED_KEY = b"-----BEGIN ENCRYPTED"
PAIR_PREFIX = "pair-"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `HOME/identity/device.json` (mode 0600)."""

    format: int
    device: str
    project: str
    name: str
    server: str
    """Address at which the device enrolled."""
    root_digest: str
    """SHA-256 in hex of the TUF root v1 that the enrolment token pinned."""
    tuf_path: str
    bearer: str
    mac_key: str
    broker_host: str
    broker_port: int
    broker_tls: bool = False
    broker_tokens: bool = False
    """Whether the broker's password is a token that the server gives for each connection."""
    pair: str = ""
    """Folder below `identity` that holds the key and certificate in use; empty: `identity` itself, where enrolment put
    them. Replacing `device.json` is what makes a renewed pair count, whole."""
    not_before: int = 0
    """Validity (µs) of the certificate in use, for those that cannot read it; 0: not noted."""
    not_after: int = 0
    content_key: str = ""
    """Digest of the X25519 public key for which content keys are sealed (`device_keys`); empty: it has none yet."""

    @property
    def authorization(self) -> str:
        """Value of the HTTP header `Authorization`."""
        return f"Bearer {self.device}:{self.bearer}"

    @property
    def frame_key(self) -> bytes:
        """Key that authenticates frames (`wherry_shared.frames`)."""
        return base64.b64decode(self.mac_key)


def folder(home: Path) -> Path:
    """Return where identity files are."""
    return home / FOLDER


def pair_folder(home: Path, identity: Identity) -> Path:
    """Return where the key and certificate in use are."""
    return folder(home) / identity.pair


def shown_pair(home: Path, identity: Identity, wall_s: float) -> tuple[Path, Path] | None:
    """Return certificate and key to show over HTTPS; None once it has expired, when only the bearer is left to renew it."""
    if identity.not_after and wall_s * MICROSECONDS >= identity.not_after:
        return None
    found = pair_folder(home, identity)
    files = found / CERTIFICATE_FILE, found / KEY_FILE
    return files if all(file.is_file() for file in files) else None


def authority(home: Path) -> Path | None:
    """Return the file of the authority to believe of the server; None if the enrolment named none, so those of this machine are asked.

    An empty file is no word of that kind: it was damaged, and whoever uses it says so.
    """
    file = folder(home) / CA_FILE
    return file if file.exists() else None


def load(home: Path, seal: Seal | None = None) -> Identity | None:
    """Read the identity, from its copy if the disk altered it; None if this device is not enrolled.

    Raises:
        RefusedError: `identity_invalid`; `at_rest_key_missing`, `at_rest_key_other` or `record_clear`.
        DeviceError: `cipher_missing`.
    """
    try:
        return _read(folder(home) / DEVICE_FILE, seal)
    except RefusedError as error:
        if error.code in STOPS:
            raise
        try:
            copy = _read(folder(home) / COPY_FILE, seal)
        except (RefusedError, OSError):
            copy = None
        if copy is None:
            raise
        log.error("%s; its copy is taken", error.message)
        return copy


def write(home: Path, disk: Disk, identity: Identity) -> None:
    """Put an identity, and then its copy, in the place of what was there; without room for the copy the old one stays.

    Raises:
        DeviceError: `disk_full`, `read_only` or `disk`.
    """
    data = close(disk.seal, IDENTITY, encode(identity))
    disk.write_atomic(folder(home) / DEVICE_FILE, data)
    try:
        disk.write_atomic(folder(home) / COPY_FILE, data)
    except DeviceError as error:
        log.warning("the identity has no new copy: %s", error)


def password(seal: Seal | None) -> str:
    """Return what a private key may be encrypted with; for one that is not, it is not asked for."""
    return seal.password if seal is not None else ""


def content_password(seal: Seal | None) -> str:
    """Return what opens the private keys for content keys, empty without a key at rest."""
    return seal.content_password if seal is not None else ""


def is_in_line(home: Path, identity: Identity, seal: Seal | None) -> bool:
    """Tell whether identity and private key lie on the disk as the settings wish, sealed or not."""
    wished = seal is not None and seal.writes
    key = pair_folder(home, identity) / KEY_FILE
    try:
        records = [path.read_bytes() for path in (folder(home) / DEVICE_FILE, folder(home) / COPY_FILE)]
        locked = not key.exists() or key.read_bytes().startswith(ENCRYPTED_KEY) == wished
    except OSError:
        return False
    return locked and all(is_sealed(record) == wished for record in records)


def _read(path: Path, seal: Seal | None) -> Identity | None:
    try:
        data = opened(seal, IDENTITY, path.read_bytes()).data
    except FileNotFoundError:
        return None
    try:
        identity = msgspec.json.decode(data, type=Identity)
        whole = identity.format == FORMAT and len(identity.frame_key) == KEY_BYTES and _is_pair(identity.pair)
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error) as error:
        raise _invalid(path, str(error)) from error
    if not whole:
        raise _invalid(path, f"format {identity.format}")
    return identity


def encode(identity: Identity) -> bytes:
    """Return the bytes of `device.json`."""
    return msgspec.json.format(msgspec.json.encode(identity)) + b"\n"


def _is_pair(name: str) -> bool:
    return not name or (name.startswith(PAIR_PREFIX) and name.removeprefix(PAIR_PREFIX).isalnum())


def _invalid(path: Path, why: str) -> RefusedError:
    return RefusedError(
        "identity_invalid",
        f"{path} is not an identity that this release reads: {why}",
        consequence="the device cannot speak to its server",
        next_step="remove the folder and enrol again",
    )
