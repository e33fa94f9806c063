"""Private keys of a trust folder: Ed25519, PEM, one file per role, readable by their owner only.

Which files are there says what this machine may do: `targets` and `root` belong offline, `snapshot`, `timestamp` and
`director` to the director role. In development all five are on one machine.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from wherry_server.trust_objects import create_file
from wherry_shared.errors import DeviceError, RefusedError

ROLES = ("root", "targets", "snapshot", "timestamp", "director")


class Keys:
    """The keys of a folder, read when they are first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signers: dict[str, CryptoSigner] = {}

    def create(self) -> None:
        """Generate what is not there yet."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for role in ROLES:
            path = self._folder / f"{role}.pem"
            if not path.exists():
                create_file(path, CryptoSigner.generate_ed25519().private_bytes, mode=0o600)

    def has(self, role: str) -> bool:
        """Tell whether the key of `role` is on this machine."""
        return (self._folder / f"{role}.pem").exists()

    def signer(self, role: str) -> CryptoSigner:
        """Return the key of `role`.

        Raises:
            RefusedError: `key_absent` (not on this machine) or `key_invalid`.
            DeviceError: `key_exposed`, if others can read the file.
        """
        signer = self._signers.get(role)
        if signer is None:
            path = self._folder / f"{role}.pem"
            try:
                data = path.read_bytes()
                mode = path.stat().st_mode
            except FileNotFoundError as error:
                raise RefusedError(
                    "key_absent", f"the {role} key is not on this machine", next_step="run this where the key is kept"
                ) from error
            if mode & 0o077:
                raise DeviceError(
                    "key_exposed",
                    f"{path} can be read by others than its owner",
                    consequence="it is not used",
                    next_step=f"chmod 600 {path}, and rotate the key if somebody may have read it",
                )
            signer = self._signers[role] = CryptoSigner(_private_key(data, role))
        return signer


def _private_key(data: bytes, role: str) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise RefusedError("key_invalid", f"the {role} key is not a PEM private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RefusedError("key_invalid", f"the {role} key is not an Ed25519 key")
    return key


def parse_public_key(pem: str) -> SSlibKey:
    """Parse an Ed25519 public key.

    Raises:
        RefusedError: `key_invalid`.
    """
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, TypeError) as error:
        raise RefusedError("key_invalid", "not a PEM public key", next_step="send an Ed25519 public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise RefusedError("key_invalid", "not an Ed25519 key", next_step="send an Ed25519 public key")
    return SSlibKey.from_crypto(key)


def public_pem(signer: CryptoSigner) -> str:
    """Return the public half of a signer as PEM."""
    private = load_pem_private_key(signer.private_bytes, None)
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
