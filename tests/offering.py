"""Gives devices of a test's server what the director would: offers, by the real composer."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from wherry_server import offers
from wherry_server.db.database import Database
from wherry_server.settings import Settings
from wherry_server.times import now_us
from wherry_shared import dsse, key_files, wire


def give(settings: Settings, device: str, *manifests: str) -> None:
    """Offer a device bundles besides what it was offered before; each stands under a model name of its own."""

    async def run() -> None:
        database = Database.open(settings.database_url)
        composer = offers.Composer(settings.project, "a-key", lambda data: data[:64])
        added = {name: wire.OfferedModel(target=f"{name}/1.0.0", manifest=name) for name in manifests}
        try:
            async with database.write() as connection:
                known = (await offers.current(connection, [device]))[device]
                made = composer.compose(device, known, {**known.models, **added}, 1)
                await offers.write(connection, settings.project, [made])
        finally:
            await database.close()

    asyncio.run(run())


def offer(settings: Settings, device: str, models: dict[str, wire.OfferedModel], flags: dict[str, Any]) -> None:
    """Make the next offer of a device, signed by the director's key; the server that runs on the folder sends it."""
    signer = key_files.load(next(settings.data.rglob("director.pem")))

    def sign(message: bytes) -> bytes:
        return bytes.fromhex(signer.sign(message).signature)

    async def run() -> None:
        database = Database.open(settings.database_url)
        keyid = signer.public_key.keyid
        composer = offers.Composer(settings.project, keyid, sign)
        try:
            async with database.write() as connection:
                known = (await offers.current(connection, [device]))[device]
                made = composer.compose(device, known, models, now_us())
                payload = wire.parse(wire.Offer, dsse.open_envelope(made.envelope)[1])
                payload = msgspec.structs.replace(payload, flags=flags)
                envelope = dsse.sign(dsse.OFFER_TYPE, wire.encode(payload), keyid, sign)
                await offers.write(connection, settings.project, [made._replace(envelope=envelope)])
        finally:
            await database.close()

    asyncio.run(run())
