"""Gives devices of a test's server what the director would: offers, by the real composer."""

from __future__ import annotations

import asyncio
from pathlib import Path

from wherry_server import offers
from wherry_server.db.database import Database
from wherry_server.settings import Settings
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


def sign(data: Path, offer: wire.Offer) -> bytes:
    """Return an offer as the director of a development server would send it; `data` is the server's folder."""
    signer = key_files.load(data / "keys" / "director.pem")

    def signature(message: bytes) -> bytes:
        return bytes.fromhex(signer.sign(message).signature)

    return dsse.sign(dsse.OFFER_TYPE, wire.encode(offer), signer.public_key.keyid, signature)
