"""Signed envelopes over the DSSE pre-authentication encoding (secure-systems-lab/dsse, protocol.md, v1).

Signing and verifying take functions, so that a module which only *builds* envelopes imports no cryptography.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from wherry_shared import wire
from wherry_shared.errors import RefusedError

OFFER_TYPE = "application/vnd.wherry.offer.v1+json"


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: `DSSEv1 LEN(type) type LEN(payload) payload`."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload_type: str, payload: bytes, keyid: str, signer: Callable[[bytes], bytes]) -> bytes:
    """Wrap `payload` into an envelope signed by `signer`."""
    signature = signer(pre_authentication(payload_type, payload))
    return wire.encode(
        wire.Envelope(payload=base64.b64encode(payload).decode(), keyid=keyid, sig=base64.b64encode(signature).decode())
    )


def open_envelope(data: bytes) -> tuple[wire.Envelope, bytes, bytes]:
    """Take an envelope apart without trusting it: (envelope, payload, signature).

    Raises:
        RefusedError: `message_invalid`, `message_too_large` or `envelope_invalid` (base64).
    """
    envelope = wire.parse(wire.Envelope, data)
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.sig, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError("envelope_invalid", "payload or signature is not base64") from error
    return envelope, payload, signature


def verify(payload_type: str, data: bytes, verifiers: dict[str, Callable[[bytes, bytes], bool]]) -> bytes:
    """Return the payload of an envelope if a known key signed it.

    Args:
        payload_type: what the payload must be.
        data: the envelope.
        verifiers: key id → function of (message, signature) that tells whether the signature is good.

    Raises:
        RefusedError: `key_unknown`, `signature_bad`, or as `open_envelope`.
    """
    envelope, payload, signature = open_envelope(data)
    verifier = verifiers.get(envelope.keyid)
    if verifier is None:
        raise RefusedError("key_unknown", f"no key {envelope.keyid[:80]!r} is trusted for {payload_type}")
    if not verifier(pre_authentication(payload_type, payload), signature):
        raise RefusedError("signature_bad", f"the signature of {envelope.keyid[:80]!r} does not fit")
    return payload
