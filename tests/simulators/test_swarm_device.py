"""What a swarm device does with bytes that are not what they claim, and with a table that says bad things."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from wherry_agent import state as s
from wherry_shared import dsse, frames, topics, wire
from wherry_shared.facts import DeviceFacts
from wherry_shared.wire import Ack, Offer, OfferedModel, Trial
from wherry_simulators.enrolment import Identity
from wherry_simulators.hands import Hands
from wherry_simulators.models import Behaviour, Behaviours, VariantBehaviour, digest_of
from wherry_simulators.swarm_device import SwarmDevice, Tally

DEVICE = "d" * 22
KEY = bytes(32)


class Keys:
    def __init__(self):
        self.verifiers = {"director": lambda message, signature: signature == message[-8:]}
        self.asked = 0

    def unknown(self):
        self.asked += 1


def device_with(behaviours, keys, tally, speed=20.0):
    identity = Identity(DEVICE, "default", "secret", KEY, "127.0.0.1", 1, "/tuf/default")
    source = random.Random(1)
    return SwarmDevice(
        identity,
        Hands(DEVICE, behaviours, source),
        keys,
        tally,
        facts=DeviceFacts(arch="x86_64", memory_bytes=1 << 30),
        source=source,
        speed=speed,
        requests_per_s=20.0,
        on_logs=lambda device: None,
    )


def envelope(*, device=DEVICE, project="default", keyid="director", serial=1, version="1.0.0", sign=lambda m: m[-8:]):
    offered = OfferedModel(
        target=f"m/{version}", manifest=digest_of(version), rollout="r", trial=Trial(min_requests=20, max_s=600)
    )
    offer = Offer(
        format=1,
        device=device,
        project=project,
        epoch=1,
        serial=serial,
        issued_at=0,
        expires_at=1 << 60,
        models={"m": offered},
    )
    return dsse.sign(dsse.OFFER_TYPE, wire.encode(offer), keyid, sign)


@pytest.mark.parametrize(
    "data",
    [
        b"not an envelope",
        envelope(sign=lambda message: b"forged"),
        envelope(keyid="stranger"),
        envelope(device="e" * 22),
        envelope(project="other"),
        envelope()[:-9] + b'"}',
    ],
    ids=["garbage", "forged", "unknown key", "of another device", "of another project", "cut short"],
)
def test_an_offer_that_is_not_what_it_claims_changes_nothing(data):
    keys, tally = Keys(), Tally()
    device = device_with(Behaviours(), keys, tally)
    before = device.state
    device._on_message(topics.down(DEVICE, "offer"), data)
    assert device.state is before
    assert (tally.offers, tally.offers_refused) == (0, 1)
    assert keys.asked == (b'"stranger"' in data)


def test_an_acknowledgement_under_another_key_is_not_believed():
    tally = Tally()
    device = device_with(Behaviours(), Keys(), tally)
    ack = wire.encode(Ack(format=1, device=DEVICE, stream="report", epoch=device.state.stream, seq=1))
    device._on_message(topics.down(DEVICE, "ack"), frames.seal(b"x" * 32, "ack", DEVICE, ack))
    device._on_message(topics.down(DEVICE, "ack"), frames.seal(KEY, "report", DEVICE, ack))
    assert tally.acks_refused == 2


def live(device, until):
    """Let a device live without a broker until `until` holds."""

    async def run():
        device.start()
        deadline = time.monotonic() + 20
        device._on_message(topics.down(DEVICE, "offer"), envelope())
        while not until():
            assert time.monotonic() < deadline, device.state
            device.beat(time.monotonic())
            await asyncio.sleep(0.01)

    asyncio.run(run())


def said(device):
    return [report.state for report in device.state.owed]


def test_a_good_model_is_confirmed_and_measured():
    device = device_with(Behaviours(), Keys(), Tally())
    live(device, lambda: "confirmed" in said(device))
    assert said(device) == ["fetching", "judging", "trial", "confirmed"]
    (message,) = device._telemetry.values()
    assert [(window.arm, window.rollout, window.manifest) for window in message.windows] == [
        ("candidate", "r", digest_of("1.0.0"))
    ]


def test_a_model_that_takes_the_machine_down_goes_back_after_restarts():
    table = Behaviours({"m/1.0.0": Behaviour(variants=[VariantBehaviour(down_per_request=1.0)])})
    device = device_with(table, Keys(), Tally())
    boots = set()

    def ended():
        boots.add(device.boot)
        return "returned" in said(device)

    live(device, ended)
    assert device.state.owed[-1].reason == "device_down"
    assert len(boots) > 2
    assert isinstance(device.state.models["m"].phase, s.Idle)
