"""Content keys on their way: a key of 32 bytes, sealed for one X25519 key by HPKE (RFC 9180), bound to the blob it opens.

What travels and what is kept is ciphertext for exactly one recipient: the `keys` role, a publisher's key ring, or one device.
The words that a seal is bound to (model, blob, device) are checked by opening it: nobody can hand a key on under other words.
"""

from __future__ import annotations

import base64
import binascii
import secrets

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from wherry_shared.digest import check_digest, of_bytes
from wherry_shared.errors import RefusedError
from wherry_shared.tiles import KEY_BYTES
from wherry_shared.wire import FORMAT, SealedKey

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_PURPOSE = "wherry content key 1"
PUBLIC_BYTES = 32


def new_key() -> bytes:
    """Make a content key."""
    return secrets.token_bytes(KEY_BYTES)


def seal(key: bytes, recipient: X25519PublicKey, *, model: str, plain: str, blob: str, device: str = "") -> SealedKey:
    """Seal a content key for a recipient; `device` names the one that it is for."""
    record = SealedKey(
        format=FORMAT, model=model, plain=plain, blob=blob, device=device, recipient=fingerprint(recipient), sealed=""
    )
    sealed = _SUITE.encrypt(key, recipient, _bound(record))
    return msgspec.structs.replace(record, sealed=base64.b64encode(sealed).decode())


def unseal(record: SealedKey, private: X25519PrivateKey) -> bytes:
    """Open a sealed content key.

    Raises:
        RefusedError: `content_key_wrong`: it is for somebody else, or not what it says.
    """
    if record.format != FORMAT or record.recipient != fingerprint(private.public_key()):
        raise _wrong(record, "it is for another key")
    try:
        check_digest(record.blob)
        key = _SUITE.decrypt(base64.b64decode(record.sealed, validate=True), private, _bound(record))
    except (InvalidTag, binascii.Error, ValueError) as error:
        raise _wrong(record, "it does not open") from error
    if len(key) != KEY_BYTES:
        raise _wrong(record, f"it holds {len(key)} bytes")
    return key


def fingerprint(public: X25519PublicKey) -> str:
    """Return the digest by which a recipient's key is known."""
    return of_bytes(public.public_bytes_raw())


def text_of(public: X25519PublicKey) -> str:
    """Return a public key as it stands in messages."""
    return base64.b64encode(public.public_bytes_raw()).decode()


def parse_public(text: str) -> X25519PublicKey:
    """Read a public key from a message.

    Raises:
        RefusedError: `content_key_invalid`.
    """
    try:
        raw = base64.b64decode(text, validate=True)
        return X25519PublicKey.from_public_bytes(raw)
    except (binascii.Error, ValueError) as error:
        raise RefusedError("content_key_invalid", "not an X25519 public key in base64") from error


def pem_of(public: X25519PublicKey) -> bytes:
    """Return a public key as PEM, for people."""
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def parse_public_pem(pem: bytes) -> X25519PublicKey:
    """Read a public key from PEM.

    Raises:
        RefusedError: `content_key_invalid`.
    """
    try:
        public = load_pem_public_key(pem)
    except (ValueError, TypeError) as error:
        raise RefusedError("content_key_invalid", "not a PEM public key") from error
    if not isinstance(public, X25519PublicKey):
        raise RefusedError(
            "content_key_invalid", "not an X25519 key", next_step="give the public.pem that wherry keys init wrote"
        )
    return public


def _bound(record: SealedKey) -> bytes:
    words = (_PURPOSE, record.model, record.plain, record.blob, record.device, record.recipient)
    return "\n".join(words).encode()


def _wrong(record: SealedKey, why: str) -> RefusedError:
    return RefusedError(
        "content_key_wrong",
        f"the sealed key of {record.blob[:80]}: {why}",
        consequence="it opens nothing",
        next_step="have it sealed again by the keys role",
    )
