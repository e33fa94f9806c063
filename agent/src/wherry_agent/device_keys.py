"""The content keys of this device: its own X25519 keys, the sealed keys that it was given, and what they open.

    HOME/identity/content-HEX.pem   an X25519 private key (0600), encrypted where a key at rest is set; HEX is the digest
                                     of its public half
    HOME/store/keys/HEX.json         the sealed key of the blob HEX (`wire.SealedKey`), for one of those

Plaintext is only ever returned, never written. Only the courier, the canary and the worker come here; the supervisor knows
paths and digests.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from wherry_agent import identity as identities
from wherry_agent.disk import Disk
from wherry_shared import content_keys, limits, reasons, tiles, wire
from wherry_shared.digest import hex_of
from wherry_shared.errors import DeviceError, RefusedError

log = logging.getLogger(__name__)

PREFIX = "content-"
KEYS_OF_STORE = 3
"""`HOME/store/blobs/sha256/HEX`: so many folders up is `store`, one more is the home."""
RECORD_BYTES_MAX = 4 * limits.KIB


class DeviceKeys:
    """What this device can open."""

    def __init__(self, home: Path, password: str = "") -> None:
        """Look below a home; `password` opens private keys that are encrypted (`identity.content_password`)."""
        self._private = identities.folder(home)
        self._password = password.encode()
        self._kept = home / "store" / "keys"

    def make(self, disk: Disk) -> X25519PublicKey:
        """Make a key pair, durable before anybody hears of it."""
        key = X25519PrivateKey.generate()
        disk.mkdir(self._private)
        self._write(key, disk)
        return key.public_key()

    def bring_in_line(self, disk: Disk) -> None:
        """Write private keys again as the settings wish, encrypted with the key at rest or not."""
        for name in self._names():
            key = self._open(name)
            if key is not None:
                self._write(key, disk)

    def any_or_make(self, disk: Disk) -> X25519PublicKey:
        """Return the public half of a key that is here; an enrolment that was cut short goes on with the same one."""
        for name in self._names():
            key = self._open(name)
            if key is not None:
                return key.public_key()
        return self.make(disk)

    def keep(self, record: wire.SealedKey, disk: Disk) -> None:
        """Keep a sealed key that this device can open.

        Raises:
            RefusedError: `content_key_wrong`.
        """
        self._unseal(record)
        disk.mkdir(self._kept)
        disk.write_atomic(self._kept / f"{hex_of(record.blob)}.json", wire.encode(record))

    def opens(self, blob: str) -> bool:
        """Tell whether there is a key here for a blob."""
        try:
            self.content_key(blob)
        except DeviceError:
            return False
        return True

    def content_key(self, blob: str) -> bytes:
        """Return the content key of a blob.

        Raises:
            DeviceError: `key_missing`.
        """
        path = self._kept / f"{hex_of(blob)}.json"
        try:
            data = path.read_bytes()[: RECORD_BYTES_MAX + 1]
            record = wire.parse(wire.SealedKey, data, bytes_max=RECORD_BYTES_MAX)
            if record.blob != blob:
                raise RefusedError("content_key_wrong", f"{path.name} is for {record.blob[:80]}")
            return self._unseal(record)
        except OSError as error:
            raise missing(f"there is no key for {blob} on this device") from error
        except RefusedError as error:
            raise missing(f"the key for {blob} on this device opens nothing: {error.message}") from error

    def tidy(self, current: str, disk: Disk) -> None:
        """Seal what is kept for the current key of this device anew, then remove the private keys that nothing needs."""
        own = self._open(hex_of(current)) if current else None
        if own is None:
            return
        needed = {hex_of(current)}
        for path in sorted(self._kept.glob("*.json")):
            try:
                record = wire.parse(wire.SealedKey, path.read_bytes(), bytes_max=RECORD_BYTES_MAX)
                if record.recipient != current:
                    again = content_keys.seal(
                        self._unseal(record),
                        own.public_key(),
                        model=record.model,
                        plain=record.plain,
                        blob=record.blob,
                        device=record.device,
                    )
                    disk.write_atomic(path, wire.encode(again))
            except RefusedError as error:  # it opens nothing now, and would open nothing then
                log.warning("%s is of no use: %s", path.name, error.message)
        for name in self._names():
            if name not in needed:
                disk.unlink(self._path(name))

    def _names(self) -> list[str]:
        return sorted(path.stem.removeprefix(PREFIX) for path in self._private.glob(f"{PREFIX}*.pem"))

    def _path(self, name: str) -> Path:
        return self._private / f"{PREFIX}{name}.pem"

    def _write(self, key: X25519PrivateKey, disk: Disk) -> None:
        wished = disk.seal is not None and disk.seal.writes
        how = BestAvailableEncryption(identities.content_password(disk.seal).encode()) if wished else NoEncryption()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
        disk.write_atomic(self._path(hex_of(content_keys.fingerprint(key.public_key()))), pem)

    def _open(self, name: str) -> X25519PrivateKey | None:
        try:
            pem = self._path(name).read_bytes()
            sealed = pem.startswith(identities.ENCRYPTED_KEY)
            key = load_pem_private_key(pem, self._password if sealed else None)
        except OSError:
            return None
        except (ValueError, TypeError):
            log.warning("%s is no private key, or the key at rest does not open it", self._path(name).name)
            return None
        return key if isinstance(key, X25519PrivateKey) else None

    def _unseal(self, record: wire.SealedKey) -> bytes:
        try:
            key = self._open(hex_of(record.recipient))
        except RefusedError:
            key = None
        if key is None:
            raise RefusedError("content_key_wrong", "it is for a key that is not on this device")
        return content_keys.unseal(record, key)


def open_blob(path: Path, plain_digest: str, bytes_max: int = limits.BLOB_BYTES_MAX, *, password: str = "") -> bytes:
    """Return the plaintext of an encrypted blob of a store, in memory.

    Raises:
        DeviceError: `key_missing`, or `disk` if it cannot be read.
        RefusedError: `tiles_invalid` or `plain_too_large`: it was not made as it should be.
    """
    store = path.parents[KEYS_OF_STORE - 1]
    key = DeviceKeys(store.parent, password).content_key(f"sha256:{path.name}")
    try:
        with path.open("rb") as file:
            return tiles.open_all(file, key, plain_digest, bytes_max=bytes_max)
    except OSError as error:
        raise DeviceError(reasons.DISK, f"{path.name} cannot be read: {error.strerror or error}") from error
    except RefusedError as error:
        if error.code != "tile_altered":  # its bytes were hashed: then it is the key
            raise
        raise missing(f"the key for sha256:{path.name} on this device is not the one it was encrypted with") from error


def missing(why: str) -> DeviceError:
    """Return the error of a device that lacks a content key."""
    return DeviceError(
        reasons.KEY_MISSING,
        why,
        consequence="the bundle is not used on this device; what serves goes on",
        next_step="see that wherry serve keys runs, and that the device has a content key: docs/runbooks/content-keys.md",
    )
