"""Encryption at rest: what a record on disk is when a key is set, and what each mix-up of key and record is called.

A sealed record is one line `wherry-sealed 1 KEY PLACE NUMBER NONCE` and the ciphertext of AES-256-GCM with its tag; the line is
authenticated with it. So a record opens only under its key (KEY is a digest that tells keys apart), at its own place
(each place has a key of its own, too), and says at which number of its order it stood: whoever reads compares that with
what the record beside it says (`journal`, `telemetry`, and `Marks` for both). Light enough for the supervisor.

`Mode`: `on` reads sealed records only; `migrate` reads clear ones as well and writes sealed ones; `off` writes clear
ones, and with the key still named reads sealed ones, so that a device goes back without losing anything. Trouble with the key
stops whoever asked and touches nothing: the key may only be late.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Literal, NamedTuple

import msgspec

from wherry_agent import cipher
from wherry_shared.errors import RefusedError

Mode = Literal["off", "migrate", "on"]

MAGIC = b"wherry-sealed"
FORMAT = 1
HEAD_BYTES_MAX = 200
KEY_ID_CHARS = 16
IDENTITY = "identity"
KEY_PASSWORD, CONTENT_PASSWORD = "key", "content"


class Opened(NamedTuple):
    """What a record holds."""

    data: bytes
    number: int
    """Where in its order it stood; 0 for a clear one."""
    sealed: bool


class Seal:
    """The platform's key, and what is done with it on this device."""

    def __init__(self, key: bytes, mode: Mode, source: str = "") -> None:
        assert len(key) == cipher.KEY_BYTES
        self._key = key
        self.mode: Mode = mode
        self.source = source
        """Where the key is from, for a person."""
        self.id = self._derived("id").hex()[:KEY_ID_CHARS]

    @property
    def writes(self) -> bool:
        """Whether what is written is sealed."""
        return self.mode != "off"

    @property
    def password(self) -> str:
        """What the device's private key (PKCS#8) is encrypted with."""
        return self._derived(KEY_PASSWORD).hex()

    @property
    def content_password(self) -> str:
        """What the private keys for content keys are encrypted with: canary and worker get this, and nothing else of the seal."""
        return self._derived(CONTENT_PASSWORD).hex()

    def line(self) -> bytes:
        """Return what a child gets over its standard input to seal alike; nobody else may see it."""
        return msgspec.json.encode([self._key.hex(), self.mode, self.source])

    @classmethod
    def of_line(cls, line: bytes) -> Seal:
        """Read what `line` wrote.

        Raises:
            msgspec.DecodeError, ValueError: it is none.
        """
        key, mode, source = msgspec.json.decode(line, type=tuple[str, Mode, str])
        return cls(bytes.fromhex(key), mode, source)

    def close(self, place: str, data: bytes, number: int = 0) -> bytes:
        """Return a sealed record.

        Raises:
            DeviceError: `cipher_missing`.
        """
        nonce = os.urandom(cipher.NONCE_BYTES)
        head = f"{MAGIC.decode()} {FORMAT} {self.id} {place} {number} {nonce.hex()}\n".encode()
        return head + cipher.encrypt(self._derived(f"place {place}"), nonce, data, head)

    def open(self, place: str, record: bytes) -> Opened:
        """Return what a sealed record holds.

        Raises:
            RefusedError: `at_rest_key_other`, `record_altered`.
            DeviceError: `cipher_missing`.
        """
        head, newline, sealed = record.partition(b"\n")
        parts = head[:HEAD_BYTES_MAX].split(b" ")
        if len(parts) != 6 or parts[:2] != [MAGIC, b"%d" % FORMAT] or not parts[4].isdigit():
            raise _altered(place)
        if parts[2].decode(errors="replace") != self.id:
            raise RefusedError(
                "at_rest_key_other",
                f"{place} is sealed with key {parts[2][:KEY_ID_CHARS].decode(errors='replace')}, this one is {self.id}",
                consequence="nothing was changed on the disk; the agent does not start without the right key",
                next_step=LOST_KEY,
            )
        try:
            nonce = bytes.fromhex(parts[5].decode())
            if parts[3] != place.encode() or len(nonce) != cipher.NONCE_BYTES:
                raise _altered(place)
            data = cipher.decrypt(self._derived(f"place {place}"), nonce, sealed, head + newline)
        except (ValueError, cipher.ForgedError) as error:
            raise _altered(place) from error
        return Opened(data, int(parts[4]), sealed=True)

    def _derived(self, purpose: str) -> bytes:
        return hmac.digest(self._key, b"wherry at rest 1 " + purpose.encode(), hashlib.sha256)


LOST_KEY = (
    "set at_rest_key to what holds that key; if it is lost for good, what it sealed is lost too: remove the home folder's"
    " journal.json*, marks*, telemetry.db* and identity, and enrol again"
)


def is_sealed(record: bytes) -> bool:
    """Tell whether bytes claim to be a sealed record."""
    return record.startswith(MAGIC + b" ")


def close(seal: Seal | None, place: str, data: bytes, number: int = 0) -> bytes:
    """Return what is to be written: sealed where that is wished.

    Raises:
        DeviceError: `cipher_missing`.
    """
    return seal.close(place, data, number) if seal is not None and seal.writes else data


def opened(seal: Seal | None, place: str, record: bytes) -> Opened:
    """Return what a record holds, sealed or not.

    Raises:
        RefusedError: `at_rest_key_missing` (sealed, and no key is set), `at_rest_key_other`, `record_clear` (not sealed where all has to
            be) or `record_altered`.
        DeviceError: `cipher_missing`.
    """
    if is_sealed(record):
        if seal is None:
            raise RefusedError(
                "at_rest_key_missing",
                f"{place} is sealed, and the settings name no key",
                consequence="nothing was changed on the disk; the agent does not start without its key",
                next_step=LOST_KEY,
            )
        return seal.open(place, record)
    if seal is not None and seal.mode == "on":
        raise RefusedError(
            "record_clear",
            f'{place} is not sealed, and at_rest is "on"',
            consequence="it is not believed: somebody may have put it there; nothing was changed on the disk",
            next_step='if this device wrote it before it had a key, start it once with at_rest = "migrate"',
        )
    return Opened(record, 0, sealed=False)


STOPS = frozenset({"at_rest_key_missing", "at_rest_key_other", "record_clear"})
"""Trouble of settings, not of a record: nothing is set aside for it."""


def _altered(place: str) -> RefusedError:
    return RefusedError(
        "record_altered",
        f"{place}: the sealed bytes are not those that this device wrote there",
        consequence="they are not believed",
        next_step="see who had this disk; a record that rotted looks the same",
    )
