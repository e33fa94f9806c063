"""Frames carry what one device said, and nothing else passes for it; envelopes carry what a key signed."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from wherry_shared import dsse, frames, limits
from wherry_shared.errors import RefusedError

MASTER = b"m" * 32
DEVICE = "A" * 22
OTHER = "B" * 22
KEY = frames.device_key(MASTER, DEVICE)


@given(st.binary(max_size=500))
def test_a_frame_opens_to_what_was_sealed(payload: bytes) -> None:
    assert frames.unseal(KEY, "report", DEVICE, frames.seal(KEY, "report", DEVICE, payload)) == payload


@pytest.mark.parametrize(
    ("key", "kind", "device"),
    [
        (KEY, "telemetry", DEVICE),
        (KEY, "report", OTHER),
        (frames.device_key(MASTER, OTHER), "report", DEVICE),
        (frames.device_key(b"n" * 32, DEVICE), "report", DEVICE),
    ],
    ids=["another kind", "another device", "another device's key", "another master key"],
)
def test_a_frame_does_not_pass_as(key: bytes, kind: str, device: str) -> None:
    frame = frames.seal(KEY, "report", DEVICE, b"{}")
    with pytest.raises(RefusedError) as caught:
        frames.unseal(key, kind, device, frame)
    assert caught.value.code == "frame_forged"


@given(st.binary(min_size=0, max_size=120))
def test_foreign_bytes_are_refused_with_a_code(data: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        frames.unseal(KEY, "report", DEVICE, data)
    assert caught.value.code in {"frame_invalid", "frame_forged"}


def test_an_oversize_frame_is_refused_before_it_is_hashed() -> None:
    with pytest.raises(RefusedError) as caught:
        frames.unseal(KEY, "report", DEVICE, b"x" * (limits.MQTT_PAYLOAD_BYTES_MAX + 1))
    assert caught.value.code == "frame_too_large"


def test_the_frame_key_is_hkdf_sha256_of_the_master_key() -> None:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    expected = HKDF(SHA256(), 32, salt=b"wherry frame key v1", info=DEVICE.encode()).derive(MASTER)
    assert frames.device_key(MASTER, DEVICE) == expected


def test_pre_authentication_follows_the_example_of_the_dsse_protocol() -> None:
    assert dsse.pre_authentication("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


PRIVATE = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def _good(message: bytes, signature: bytes) -> bool:
    try:
        PRIVATE.public_key().verify(signature, message)
    except InvalidSignature:
        return False
    return True


def test_an_envelope_opens_with_the_key_that_signed_it() -> None:
    envelope = dsse.sign(dsse.OFFER_TYPE, b'{"a":1}', "key-1", PRIVATE.sign)
    assert dsse.verify(dsse.OFFER_TYPE, envelope, {"key-1": _good}) == b'{"a":1}'


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda e: {**e, "payload": base64.b64encode(b'{"a":2}').decode()}, "signature_bad"),
        (lambda e: {**e, "keyid": "key-2"}, "key_unknown"),
        (lambda e: {**e, "sig": base64.b64encode(b"\0" * 64).decode()}, "signature_bad"),
        (lambda e: {**e, "payload": "!!"}, "envelope_invalid"),
        (lambda e: {k: v for k, v in e.items() if k != "sig"}, "message_invalid"),
        (lambda _e: [], "message_invalid"),
    ],
    ids=["payload altered", "unknown key", "signature altered", "not base64", "field missing", "not an object"],
)
def test_an_envelope_is_refused_when(change, code: str) -> None:
    envelope = json.loads(dsse.sign(dsse.OFFER_TYPE, b'{"a":1}', "key-1", PRIVATE.sign))
    with pytest.raises(RefusedError) as caught:
        dsse.verify(dsse.OFFER_TYPE, json.dumps(change(envelope)).encode(), {"key-1": _good})
    assert caught.value.code == code


def test_a_signature_for_one_type_is_none_for_another() -> None:
    envelope = dsse.sign("application/other", b"{}", "key-1", PRIVATE.sign)
    with pytest.raises(RefusedError) as caught:
        dsse.verify(dsse.OFFER_TYPE, envelope, {"key-1": _good})
    assert caught.value.code == "signature_bad"
