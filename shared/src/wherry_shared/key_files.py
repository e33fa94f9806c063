"""Ed25519 signing keys in files: PEM, one key a file, readable by their owner only, created durably or not at all.

A key file that others can read is not used: a key that may be known is not a key. Keys that people keep are encrypted
(PKCS 8, AES-256-CBC under scrypt or PBKDF2 as `cryptography` chooses best); a server's online keys are not, since
nobody is there to type.
"""

from __future__ import annotations

import getpass
import os
import secrets
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from wherry_shared.errors import DeviceError, RefusedError

PEM_BYTES_MAX = 4096
PASSWORD_VARIABLE = "WHERRY_KEY_PASSWORD"  # noqa: S105  # a name
PASSWORD_FILE_VARIABLE = "WHERRY_KEY_PASSWORD_FILE"  # noqa: S105
PASSWORD_CHARS_MIN = 8
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def password_of(what: str, *, fresh: bool = False) -> str:
    """Return the password of a key: from WHERRY_KEY_PASSWORD, from the file that WHERRY_KEY_PASSWORD_FILE names, or typed.

    Args:
        what: which key, for the person who types.
        fresh: the key is being made, so a short password is refused and a typed one has to be repeated.

    Raises:
        RefusedError: `password_missing`, `password_short` or `password_differs`.
    """
    given = os.environ.get(PASSWORD_VARIABLE, "")
    if not given and (file := os.environ.get(PASSWORD_FILE_VARIABLE)):
        try:
            given = Path(file).read_text(encoding="utf-8").rstrip("\n")
        except OSError as error:
            raise RefusedError("password_missing", f"{file}: {error.strerror}") from error
    if not given and sys.stdin.isatty():
        given = getpass.getpass(f"Password of {what}: ")
        if fresh and getpass.getpass("Again: ") != given:
            raise RefusedError("password_differs", "the two passwords are not the same")
    if not given:
        raise RefusedError(
            "password_missing",
            f"{what} has a password, and nobody is here to type it",
            consequence="nothing was signed",
            next_step=f"set {PASSWORD_FILE_VARIABLE} to a file that holds it, or run this at a terminal",
        )
    if fresh and len(given) < PASSWORD_CHARS_MIN:
        raise RefusedError("password_short", f"a password of a key has at least {PASSWORD_CHARS_MIN} characters")
    return given


def create(path: Path, password: str = "") -> CryptoSigner:
    """Generate a key and store it with mode 0600; its folder, where it is made for it, gets 0700.

    Args:
        path: where.
        password: encrypts the file; empty: it is not encrypted.

    Raises:
        FileExistsError: there is a file already; it is left alone.
    """
    key = Ed25519PrivateKey.generate()
    lock = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    store(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return CryptoSigner(key)


def store(path: Path, pem: bytes) -> None:
    """Store a private key that is not there yet, durably, with mode 0600; its folder, where it is made for it, gets 0700.

    Raises:
        FileExistsError: there is a file already; it is left alone.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def keep(path: Path, data: bytes) -> None:
    """Replace a file durably; its folder, where it is made for it, is the owner's alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> CryptoSigner:
    """Read a signing key; of one that is encrypted the password is asked for (`password_of`).

    Raises:
        FileNotFoundError: there is none.
        RefusedError: `key_invalid`, `password_missing` or `password_wrong`.
        DeviceError: `key_exposed`, if others than its owner can read it.
    """
    key = read_private(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise RefusedError(
            "key_invalid",
            f"{path} is not an Ed25519 key",
            consequence="nothing was signed",
            next_step="give the PEM file of an Ed25519 key, or leave it out: one is made",
        )
    return CryptoSigner(key)


def read_private(path: Path) -> PrivateKeyTypes:
    """Read a private key of any kind.

    Raises:
        FileNotFoundError: there is none.
        RefusedError: `key_invalid`, `password_missing` or `password_wrong`.
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
    password = password_of(str(path)).encode() if data.lstrip().startswith(_ENCRYPTED) else None
    try:
        return load_pem_private_key(data, password)
    except (ValueError, TypeError) as error:
        if password is not None and "password" in str(error).lower():
            raise RefusedError(
                "password_wrong", f"{path} does not open with this password", consequence="nothing was signed"
            ) from error
        raise RefusedError(
            "key_invalid",
            f"{path} is not a PEM private key",
            consequence="nothing was signed",
            next_step="give the PEM file of an Ed25519 key, or leave it out: one is made",
        ) from error


def public_pem(signer: Signer) -> str:
    """Return the public half as PEM."""
    return pem_of(signer.public_key)


def pem_of(key: Key) -> str:
    """Return a public key as PEM.

    Raises:
        RefusedError: `key_invalid`.
    """
    text = str(key.keyval.get("public", ""))
    if key.keytype == "ed25519":
        try:
            raw = Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
        except ValueError as error:
            raise RefusedError("key_invalid", f"key {key.keyid[:64]} is not an Ed25519 key") from error
        return raw.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return text


def parse_public(pem: str) -> SSlibKey:
    """Parse a public key: Ed25519, or ECDSA on P-256, which is what security modules hold.

    Raises:
        RefusedError: `key_invalid`.
    """
    try:
        key = load_pem_public_key(pem[:PEM_BYTES_MAX].encode())
    except (ValueError, TypeError) as error:
        raise RefusedError("key_invalid", "not a PEM public key", next_step="send an Ed25519 public key") from error
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return SSlibKey.from_crypto(key)
    if not isinstance(key, Ed25519PublicKey):
        raise RefusedError("key_invalid", "neither an Ed25519 nor a P-256 key", next_step="send an Ed25519 public key")
    return SSlibKey.from_crypto(key)
