"""One signed offer per device, with numbers that only rise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from tests.postgres import Postgres
from tests.server.fleet_kit import MODEL, fleet, manifest_of, run
from wherry_server import offers, signing
from wherry_server.db.database import Database
from wherry_server.offers import Composer, Current, Number, next_number
from wherry_shared import dsse, key_files, wire
from wherry_shared.errors import RefusedError, UnreachableError

numbers = st.builds(Number, st.integers(0, 5), st.integers(0, 50))

NUMBERS = [
    # stored, known by the device → next
    ((0, 0), (0, 0), (1, 1)),
    ((1, 1), (0, 0), (1, 2)),
    ((1, 1), (1, 1), (1, 2)),
    ((1, 7), (1, 3), (1, 8)),
    ((1, 3), (1, 7), (1, 8)),  # restored from a backup
    ((0, 0), (1, 7), (1, 8)),
    ((1, 9), (2, 4), (2, 5)),  # the epoch was raised meanwhile
    ((2, 4), (1, 9), (2, 5)),
]


@pytest.mark.parametrize(("stored", "known", "following"), NUMBERS)
def test_the_next_number_is_above_the_row_and_above_what_the_device_knows(
    stored: tuple, known: tuple, following: tuple
):
    assert next_number(Number(*stored), Number(*known)) == Number(*following)


@given(numbers, numbers)
def test_a_device_always_obeys_the_next_offer(stored: Number, known: Number):
    following = next_number(stored, known)
    assert following > stored
    assert following > known


def test_an_offer_is_signed_over_its_exact_bytes():
    key = Ed25519PrivateKey.generate()
    composer = Composer("default", "kid", key.sign)
    entry = wire.OfferedModel(target="m/1.0.0", manifest=manifest_of("1.0.0"), rollout="r")
    made = composer.compose("d" * 22, Current(Number(0, 0), Number(0, 0), {}), {"m": entry}, 1_000)

    def check(message: bytes, signature: bytes) -> bool:
        try:
            key.public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    offer = wire.parse(wire.Offer, dsse.verify(dsse.OFFER_TYPE, made.envelope, {"kid": check}))
    assert (offer.epoch, offer.serial, offer.issued_at) == (1, 1, 1_000)
    assert offer.expires_at == 1_000 + offers.LIFE_US
    assert offer.models == {"m": entry}
    with pytest.raises(RefusedError):
        dsse.verify("application/other", made.envelope, {"kid": check})


def test_a_large_batch_is_signed_by_another_process_and_by_this_one_once_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    file = tmp_path / "keys" / "director.pem"
    signer = key_files.create(file)
    here: list[bytes] = []

    def sign(data: bytes) -> bytes:
        here.append(data)
        return bytes.fromhex(signer.sign(data).signature)

    none = Current(Number(0, 0), Number(0, 0), {})
    entry = wire.OfferedModel(target="m/1.0.0", manifest=manifest_of("1.0.0"), rollout="r")
    wanted = [offers.Wanted(f"{number:022}", none, {"m": entry}) for number in range(signing.APART_MIN)]
    keyid = signer.public_key.keyid
    composer = Composer("default", keyid, sign, file)
    try:
        made = composer.compose_all(wanted, 1_000)
        assert (len(made[0]), made[1], here) == (signing.APART_MIN, [], [])
        assert made == Composer("default", keyid, sign).compose_all(wanted, 1_000)
        here.clear()
        process = composer._signer._process
        assert process is not None
        process.kill()
        assert composer.compose_all(wanted, 1_000) == made
        assert len(here) == len(wanted)
    finally:
        composer.close()


def test_a_key_file_that_was_replaced_signs_nothing_under_the_old_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    old, file = key_files.create(tmp_path / "old.pem"), tmp_path / "director.pem"
    key_files.create(file)
    here: list[bytes] = []

    def sign(data: bytes) -> bytes:
        here.append(data)
        return bytes.fromhex(old.sign(data).signature)

    signer = signing.Signer(dsse.OFFER_TYPE, old.public_key.keyid, sign, file)
    assert len(signer.envelopes([b"{}"] * signing.APART_MIN)) == len(here) == signing.APART_MIN


def test_an_offer_that_no_message_can_carry_is_refused():
    composer = Composer("default", "kid", lambda data: b"s" * 64)
    entry = wire.OfferedModel(target="m/1.0.0", manifest=manifest_of("1.0.0"), rollout="r" * 500)
    many = {f"m{number}": entry for number in range(200)}
    with pytest.raises(RefusedError) as caught:
        composer.compose("d" * 22, Current(Number(0, 0), Number(0, 0), {}), many, 1_000)
    assert caught.value.code == "offer_too_large"


def test_an_offer_composed_from_what_is_no_longer_so_writes_nothing_at_all(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            first, second = await found.enrol(2)
            compose = found.conductor.composer.compose
            none = Current(Number(0, 0), Number(0, 0), {})
            async with found.database.write() as connection:
                await offers.write(connection, "default", [compose(first.id, none, {}, 1)])
            ahead = none._replace(known=Number(1, 7))  # a higher number does not excuse it
            for stale in (compose(first.id, none, {}, 2), compose(first.id, ahead, {}, 2)):
                with pytest.raises(UnreachableError) as caught:
                    async with found.database.write() as connection:
                        await offers.write(connection, "default", [compose(second.id, none, {}, 2), stale])
                assert caught.value.code == "offer_changed"
            rows = await found.rows("SELECT device_id, serial, issued_at FROM offer")
            assert [tuple(row) for row in rows] == [(first.id, 1, 1)]

    run(work())


def test_of_two_writers_of_a_first_offer_one_composes_again(postgres: Postgres):
    composer = Composer("default", "kid", Ed25519PrivateKey.generate().sign)
    (first, second), _ = composer.compose_all(
        [offers.Wanted("d" * 22, Current(offers.NOTHING, offers.NOTHING, {}), {}) for _ in range(2)], 1
    )

    async def late(database: Database) -> None:
        async with database.write() as connection:
            await connection.execute(text("SELECT 1 FROM offer"))
            async with database.write() as other:
                await offers.write(other, "default", [first])
            await offers.write(connection, "default", [second])

    async def work() -> None:
        database = Database.open(postgres.database())
        try:
            with pytest.raises(UnreachableError) as caught:
                await late(database)
            assert caught.value.code == "offer_changed"
            async with database.read() as connection:
                kept = (
                    await connection.execute(text("SELECT envelope FROM offer JOIN unpublished USING (device_id)"))
                ).all()
            assert [bytes(row.envelope) for row in kept] == [first.envelope]
        finally:
            await database.close()

    run(work())


def test_a_hello_with_a_higher_number_is_answered_above_it_and_a_lower_one_by_the_current_row(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            behind, ahead = await found.enrol(2)
            await found.until(await found.roll_out("1.0.0"), "done")
            ahead.known = (1, 500)
            async with found.database.write() as connection:
                await connection.execute(text("DELETE FROM unpublished"))
            await found.say_hello([behind, ahead])
            await found.turn()
            rows = {row.device_id: row for row in await found.rows(_SERIALS)}
            assert (rows[behind.id].serial, rows[behind.id].waiting) == (1, None)
            assert (rows[ahead.id].serial, rows[ahead.id].waiting) == (501, 501)
            assert ahead.known == (1, 501)
            assert ahead.running == manifest_of("1.0.0")
            behind.known = (0, 0)
            await found.say_hello([behind])
            found.conductor.outbox = Recorder()  # type: ignore[assignment]
            await found.conductor.reconcile()
            assert found.conductor.outbox.devices == [behind.id]  # type: ignore[union-attr]

    run(work())


_SERIALS = (
    "SELECT o.device_id, o.serial, o.models, u.serial AS waiting FROM offer o"
    " LEFT JOIN unpublished u ON u.device_id = o.device_id"
)


class Recorder:
    """An outbox that remembers what it was asked for."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    async def again(self, devices: list[str]) -> None:
        self.devices += devices

    def wake(self) -> None:
        """Nothing is published here."""


def test_an_offer_past_half_of_its_life_is_signed_anew_with_the_same_content(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            (device,) = await found.enrol(1)
            await found.until(await found.roll_out("1.0.0"), "done")
            assert await found.conductor.resign() == 0
            async with found.database.write() as connection:
                await connection.execute(
                    text("UPDATE offer SET issued_at = issued_at - :half"), {"half": offers.HALF_LIFE_US + 1}
                )
            assert await found.conductor.resign() == 1
            (row,) = await found.rows(_SERIALS)
            assert (row.serial, row.waiting) == (2, 2)
            assert manifest_of("1.0.0") in row.models
            await found.exchange()
            assert device.offered == {manifest_of("1.0.0"): 2}
            assert device.running == manifest_of("1.0.0")
            assert MODEL in row.models

    run(work())
