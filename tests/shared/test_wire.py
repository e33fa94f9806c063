"""What old agents speak: unknown fields pass, unknown formats do not, and garbage is refused with a code."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_shared import limits, wire
from wherry_shared.errors import RefusedError

DEVICE = "A" * 22
REPORT = wire.Report(
    format=1, device=DEVICE, epoch="e", seq=3, first=1, at=5, model="m", state="trial", target="m/1.0.0", requests=7
)
OFFER = wire.Offer(
    format=1,
    device=DEVICE,
    project="default",
    epoch=1,
    serial=4,
    issued_at=1,
    expires_at=2,
    models={"m": wire.OfferedModel(target="m/1.0.0", manifest="sha256:" + "0" * 64)},
)


@pytest.mark.parametrize(
    "message", [REPORT, OFFER, wire.Ack(format=1, device=DEVICE, stream="report", epoch="e", seq=9)]
)
def test_a_message_comes_back_as_it_went(message) -> None:
    assert wire.parse(type(message), wire.encode(message)) == message


def test_fields_of_a_later_release_are_ignored() -> None:
    body = json.loads(wire.encode(REPORT)) | {"invented_later": [1, 2, 3]}
    assert wire.parse(wire.Report, json.dumps(body).encode()) == REPORT


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": 2}, "message_format"),
        ({"seq": "3"}, "message_invalid"),
        ({"state": "dancing"}, "message_invalid"),
        ({"model": None}, "message_invalid"),
        ({"seq": 2**70}, "message_invalid"),
    ],
    ids=["another format", "a string for a number", "an unknown state", "null", "a number beyond 64 bits"],
)
def test_a_report_is_refused_with(change: dict[str, object], code: str) -> None:
    body = json.loads(wire.encode(REPORT)) | change
    with pytest.raises(RefusedError) as caught:
        wire.parse(wire.Report, json.dumps(body).encode())
    assert caught.value.code == code


def test_a_window_that_tells_more_is_read_by_whoever_knows_less_and_the_other_way_round() -> None:
    class Older(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
        """A window, as agents and servers had it that knew neither crashes nor metrics."""

        model: str
        requests: int = 0

    kind = {"model": "m", "manifest": "sha256:0", "variant": "v", "arm": "candidate", "start": 1, "duration_us": 2}
    told = wire.Window(**kind, requests=3, crashes=1, metrics={"agreed": wire.Sum(count=2, total=1.5)})
    assert wire.parse(wire.Window, wire.encode(told)) == told
    assert wire.parse(Older, wire.encode(told)) == Older(model="m", requests=3)
    before = json.dumps({**kind, "requests": 3}).encode()
    assert wire.parse(wire.Window, before) == msgspec.structs.replace(told, crashes=0, metrics={})
    assert json.loads(wire.encode(wire.Window(**kind, requests=3))) == {**kind, "requests": 3}, (
        "old servers see no news"
    )


def test_an_offer_with_a_window_is_one_without_to_older_agents_and_the_other_way_round() -> None:
    windowed = msgspec.structs.replace(OFFER.models["m"], windows=["22:00-05:00"])
    assert wire.parse(wire.OfferedModel, wire.encode(windowed)) == windowed
    older = {name: value for name, value in json.loads(wire.encode(windowed)).items() if name != "windows"}
    assert wire.parse(wire.OfferedModel, json.dumps(older).encode()) == OFFER.models["m"]
    assert "windows" not in json.loads(wire.encode(OFFER.models["m"]))


def test_an_oversize_message_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RefusedError) as caught:
        wire.parse(wire.Report, b" " * (limits.MQTT_PAYLOAD_BYTES_MAX + 1))
    assert caught.value.code == "message_too_large"


def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack() -> None:
    with pytest.raises(RefusedError):
        wire.parse(wire.Offer, b'{"flags":' + b"[" * 40_000 + b"]" * 40_000 + b"}")


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused_or_parsed_never_anything_else(data: bytes) -> None:
    for kind in (wire.Report, wire.Offer, wire.Hello, wire.Telemetry, wire.Ack, wire.EnrolRequest):
        with pytest.raises(RefusedError):
            wire.parse(kind, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(list(json.loads(wire.encode(REPORT)))), JSON))
def test_a_report_with_any_json_in_its_fields_is_refused_or_parsed(changes: dict[str, object]) -> None:
    body = json.loads(wire.encode(REPORT)) | changes
    try:
        parsed = wire.parse(wire.Report, json.dumps(body).encode())
    except RefusedError:
        return
    assert wire.parse(wire.Report, wire.encode(parsed)) == parsed
