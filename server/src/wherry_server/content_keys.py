"""Content keys in the database: sealed for the `keys` role as they came from publishers, wrapped for devices as it made them.

Nothing here opens anything: rows go in and out as ciphertext. Only `keys_role` has a key that opens the former, only a device
one that opens its own of the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import ContentKey, WrappedKey, table
from wherry_server.times import now_us
from wherry_shared import content_keys, wire
from wherry_shared.bundle import Manifest, encrypted_layers
from wherry_shared.errors import RefusedError

if TYPE_CHECKING:
    from wherry_server.auth import DeviceIdentity

_sealed = table(ContentKey)
_wrapped = table(WrappedKey)


def checked_public(text: str) -> str:
    """Return a device's public key as it came, empty if it has none.

    Raises:
        RefusedError: `content_key_invalid`.
    """
    return content_keys.text_of(content_keys.parse_public(text)) if text else ""


async def store(
    connection: AsyncConnection, project: str, manifest_digest: str, manifest: Manifest, keys: Sequence[wire.SealedKey]
) -> None:
    """Keep the sealed keys of an encrypted bundle; one that is sealed for another key now takes the place of the former.

    Raises:
        RefusedError: `content_keys_missing`, an encrypted blob has none; `content_key_invalid`, one is for no blob of it.
    """
    encrypted = {layer.digest: plain for plain, layer in encrypted_layers(manifest).items()}
    for key in keys:
        if encrypted.get(key.blob) != key.plain or key.device:
            raise RefusedError(
                "content_key_invalid",
                f"the sealed key of {key.blob[:80]} is for no encrypted blob of this bundle",
                consequence="the bundle was not accepted",
                next_step="encrypt the bundle again: wherry-optimizer encrypt",
            )
    rows = select(_sealed.c.blob).where(_sealed.c.project_id == project, _sealed.c.manifest == manifest_digest)
    there = set(await connection.scalars(rows))
    missing = set(encrypted) - there - {key.blob for key in keys}
    if missing:
        raise RefusedError(
            "content_keys_missing",
            f"{len(missing)} of {len(encrypted)} encrypted blobs have no content key: {', '.join(sorted(missing))[:300]}",
            consequence="the bundle was not accepted: no device could read it",
            next_step="push the folder that wherry-optimizer encrypt wrote, with its .wherry/keys",
        )
    for key in keys:
        which = (_sealed.c.project_id == project, _sealed.c.manifest == manifest_digest, _sealed.c.blob == key.blob)
        await connection.execute(delete(_sealed).where(*which))
        await connection.execute(
            insert(_sealed).values(
                project_id=project,
                manifest=manifest_digest,
                blob=key.blob,
                model=key.model,
                plain=key.plain,
                recipient=key.recipient,
                sealed=key.sealed,
                created_at=now_us(),
            )
        )


async def of_device(connection: AsyncConnection, device: DeviceIdentity, manifest: str) -> wire.SealedKeys:
    """Return the keys of a bundle that are wrapped for a device, and how many are not yet."""
    blobs = list(
        await connection.scalars(
            select(_sealed.c.blob).where(_sealed.c.project_id == device.project, _sealed.c.manifest == manifest)
        )
    )
    rows = (
        await connection.execute(
            select(_wrapped).where(
                _wrapped.c.device_id == device.id,
                _wrapped.c.project_id == device.project,
                _wrapped.c.blob.in_(blobs),
            )
        )
    ).all()
    found = [
        wire.SealedKey(
            format=wire.FORMAT,
            model=row.model,
            plain=row.plain,
            blob=row.blob,
            device=device.id,
            recipient=row.recipient,
            sealed=row.sealed,
        )
        for row in rows
    ]
    return wire.SealedKeys(format=wire.FORMAT, keys=found, missing=len(blobs) - len(found))


def record_of(row: object) -> wire.SealedKey:
    """Return a row of sealed keys as what it is."""
    fields = {name: getattr(row, name) for name in ("model", "plain", "blob", "recipient", "sealed")}
    return msgspec.convert({"format": wire.FORMAT, **fields}, wire.SealedKey)
