"""A folder of X25519 keys that open content keys: those of the `keys` role, or of a publisher who encrypts bundles.

    FOLDER/HEX.pem      a private key in PEM, encrypted under a password, mode 0600; HEX is the digest of its public half
    FOLDER/public.pem   the public half of the newest, for which content keys are sealed from now on
    FOLDER/content/     of a publisher: the content key of every plaintext it encrypted, sealed for the newest

Older private keys stay until nothing is sealed for them any more.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from wherry_shared import content_keys, key_files, limits, wire
from wherry_shared.digest import hex_of
from wherry_shared.errors import RefusedError

PUBLIC_FILE = "public.pem"
CONTENT = "content"
RECORD_BYTES_MAX = 4 * limits.KIB


class KeyRing:
    """The keys of a folder; private ones are opened when they are first needed, which asks for their password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, X25519PrivateKey] = {}

    def add(self, password: str = "") -> X25519PublicKey:
        """Make a key pair, which is the current one from now on.

        Raises:
            DeviceError: the folder cannot be written.
        """
        key = X25519PrivateKey.generate()
        lock = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        name = hex_of(content_keys.fingerprint(key.public_key()))
        key_files.store(self.folder / f"{name}.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
        key_files.keep(self.folder / PUBLIC_FILE, content_keys.pem_of(key.public_key()))
        return key.public_key()

    def current(self) -> X25519PublicKey:
        """Return the key for which content keys are sealed.

        Raises:
            RefusedError: `key_absent` or `content_key_invalid`.
        """
        try:
            return content_keys.parse_public_pem((self.folder / PUBLIC_FILE).read_bytes())
        except FileNotFoundError as error:
            raise RefusedError(
                "key_absent", f"{self.folder} has no keys", next_step=f"make them: wherry keys init {self.folder}"
            ) from error

    def names(self) -> list[str]:
        """Return the digests of all keys that are here."""
        return sorted(f"sha256:{path.stem}" for path in self.folder.glob("*.pem") if path.name != PUBLIC_FILE)

    def drop(self, name: str) -> None:
        """Remove a private key for which nothing is sealed any more.

        Raises:
            RefusedError: `key_in_use`, it is the current one.
        """
        if name == content_keys.fingerprint(self.current()):
            raise RefusedError("key_in_use", "the current key is not removed", next_step="rotate first")
        (self.folder / f"{hex_of(name)}.pem").unlink(missing_ok=True)

    def unseal(self, record: wire.SealedKey) -> bytes:
        """Return the content key in a record.

        Raises:
            RefusedError: `content_key_wrong`, `key_absent`, `password_missing` or `password_wrong`.
            DeviceError: `key_exposed`.
        """
        return content_keys.unseal(record, self.private(record.recipient))

    def private(self, name: str) -> X25519PrivateKey:
        """Return a private key.

        Raises:
            RefusedError: `key_absent`, `key_invalid`, `password_missing` or `password_wrong`.
            DeviceError: `key_exposed`.
        """
        known = self._opened.get(name)
        if known is not None:
            return known
        try:
            key = key_files.read_private(self.folder / f"{hex_of(name)}.pem")
        except FileNotFoundError as error:
            raise RefusedError(
                "key_absent",
                f"the key {name} is not in {self.folder}",
                consequence="what was sealed for it stays closed",
                next_step="have the publisher seal it for the current key: wherry-optimizer encrypt, then wherry bundle push",
            ) from error
        if not isinstance(key, X25519PrivateKey):
            raise RefusedError("key_invalid", f"{name} in {self.folder} is not an X25519 key")
        self._opened[name] = key
        return key

    # --- what a publisher keeps ---------------------------------------------------------------------

    def content_key(self, model: str, plain: str) -> bytes | None:
        """Return the content key under which this plaintext of this model was encrypted last.

        Raises:
            RefusedError: as `unseal`.
        """
        path = self._path(model, plain)
        if not path.exists():
            return None
        record = wire.parse(wire.SealedKey, path.read_bytes(), bytes_max=RECORD_BYTES_MAX)
        return self.unseal(record)

    def keep(self, key: bytes, model: str, plain: str, blob: str) -> None:
        """Keep the content key of a plaintext."""
        path = self._path(model, plain)
        key_files.keep(path, wire.encode(content_keys.seal(key, self.current(), model=model, plain=plain, blob=blob)))

    def _path(self, model: str, plain: str) -> Path:
        return self.folder / CONTENT / f"{model}-{hex_of(plain)}.json"
