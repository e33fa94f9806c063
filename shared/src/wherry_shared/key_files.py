"""Ed25519 signing keys in files: PEM, one key a file, readable by their owner only, created durably or not at all.

A key file that others can read is not used: a key that may be known is not a key.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from wherry_shared.errors import DeviceError, RefusedError

PEM_BYTES_MAX = 4096


def create(path: Path) -> CryptoSigner:
    """Generate a key and store it with mode 0600; its folder, where it is made for it, gets 0700.

    Raises:
        FileExistsError: there is a file already; it is left alone.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.link(scratch, path)
    finally:
        scratch.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return CryptoSigner(key)


def load(path: Path) -> CryptoSigner:
    """Read a key.

    Raises:
        FileNotFoundError: there is none.
        RefusedError: `key_invalid`.
        DeviceError: `key_exposed`, if others than its owner can read it.
    """
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        data = file.read(PEM_BYTES_MAX)
    if mode & 0o077:
        raise DeviceError(
            "key_exposed",
            f"{path} can be read by others than its owner",
            consequence="it is not used",
            next_step=f"chmod 600 {path}, and replace the key if somebody may have read it",
        )
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise RefusedError(
            "key_invalid",
            f"{path} is not a PEM private key",
            consequence="nothing was signed",
            next_step="give the PEM file of an Ed25519 key without a password, or leave it out: one is made",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RefusedError(
            "key_invalid",
            f"{path} is not an Ed25519 key",
            consequence="nothing was signed",
            next_step="give the PEM file of an Ed25519 key without a password, or leave it out: one is made",
        )
    return CryptoSigner(key)


def public_pem(signer: CryptoSigner) -> str:
    """Return the public half as PEM."""
    key = load_pem_private_key(signer.private_bytes, None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def parse_public(pem: str) -> SSlibKey:
    """Parse a public key.

    Raises:
        RefusedError: `key_invalid`.
    """
    try:
        key = load_pem_public_key(pem[:PEM_BYTES_MAX].encode())
    except (ValueError, TypeError) as error:
        raise RefusedError("key_invalid", "not a PEM public key", next_step="send an Ed25519 public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise RefusedError("key_invalid", "not an Ed25519 key", next_step="send an Ed25519 public key")
    return SSlibKey.from_crypto(key)
