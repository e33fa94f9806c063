"""Frames: a message with its HMAC-SHA256 under the key that device and server share.

`frame = base64url(mac) "." payload`, mac over `"wherry/1/" kind "/" device LF payload`, so that a frame of one kind or
device can never pass as another. The broker carries frames and cannot make one. Server and device derive the same key;
ingest needs no look-up: HKDF-SHA256 (RFC 5869) from a master key that the broker never sees.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from wherry_shared.errors import RefusedError
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX

KEY_BYTES = 32
_MAC_CHARS = 43


def device_key(master: bytes, device: str) -> bytes:
    """Derive the 32-byte frame key of `device` from the server's master key (HKDF-SHA256, one block)."""
    pseudo = hmac.digest(b"wherry frame key v1", master, hashlib.sha256)
    return hmac.digest(pseudo, device.encode() + b"\x01", hashlib.sha256)


def seal(key: bytes, kind: str, device: str, payload: bytes) -> bytes:
    """Frame `payload`."""
    return base64.urlsafe_b64encode(_mac(key, kind, device, payload))[:_MAC_CHARS] + b"." + payload


def unseal(key: bytes, kind: str, device: str, frame: bytes) -> bytes:
    """Check a frame and return its payload.

    Raises:
        RefusedError: `frame_too_large`, `frame_invalid` (not a frame) or `frame_forged` (wrong key, kind, device or
            altered bytes).
    """
    if len(frame) > MQTT_PAYLOAD_BYTES_MAX:
        raise RefusedError("frame_too_large", f"frame of {len(frame)} bytes, at most {MQTT_PAYLOAD_BYTES_MAX}")
    if len(frame) <= _MAC_CHARS or frame[_MAC_CHARS : _MAC_CHARS + 1] != b".":
        raise RefusedError("frame_invalid", "not a frame: no authentication code in front")
    payload = frame[_MAC_CHARS + 1 :]
    expected = base64.urlsafe_b64encode(_mac(key, kind, device, payload))[:_MAC_CHARS]
    if not hmac.compare_digest(expected, frame[:_MAC_CHARS]):
        raise RefusedError("frame_forged", f"{kind} frame was not made by {device}, or was altered on its way")
    return payload


def _mac(key: bytes, kind: str, device: str, payload: bytes) -> bytes:
    return hmac.digest(key, b"wherry/1/" + kind.encode() + b"/" + device.encode() + b"\n" + payload, hashlib.sha256)
