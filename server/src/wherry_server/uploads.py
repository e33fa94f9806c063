"""Uploaded blobs that no bundle names: they wait for one, count as gone a day before their time is over, then are deleted.

That day is what keeps the two apart that never meet: a publish that found a blob here commits long before anybody may
delete it, and whoever is told that a blob is not here uploads it again, which makes it new. Nothing is deleted by itself,
since a database that was set up anew or restored from a backup does not know what others rely on: `wherry blobs collect`
shows first what it would do.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.blob_folder import FolderBlobs
from wherry_server.blobs import REFRESHED_S, Blobs, Stored
from wherry_server.db.database import Database
from wherry_server.db.tables import BlobOwner, table

DAY_S = 86_400.0
UPLOADS_DAYS_MIN = 3
"""Below this a blob would be deleted in the very day in which it is looked at or refreshed."""
ASKED_AT_ONCE = 500

_owners = table(BlobOwner)

assert REFRESHED_S + DAY_S < UPLOADS_DAYS_MIN * DAY_S


@dataclass(frozen=True, slots=True)
class Collected:
    """What is, or would be, gone."""

    blobs: int
    bytes: int
    leftovers: int
    """Files of uploads that a killed process left."""


async def here(
    connection: AsyncConnection, blobs: Blobs, digests: Collection[str], days: int, *, now_s: float
) -> dict[str, Stored]:
    """Return those of many blobs that are here and stay; `now_s` is wall time."""
    found = await blobs.stats(digests)
    oldest = now_s - (days - 1) * DAY_S
    old = [digest for digest, blob in found.items() if blob.modified_s < oldest]
    named = await _named(connection, old)
    return {digest: blob for digest, blob in found.items() if blob.modified_s >= oldest or digest in named}


async def collect(database: Database, blobs: Blobs, days: int, *, delete: bool, now_s: float) -> Collected:
    """Find, and with `delete` remove, what was uploaded so many days ago and is in no bundle of any project."""
    oldest = now_s - days * DAY_S
    count = length = 0
    waiting: list[Stored] = []

    async def judge() -> None:
        nonlocal count, length
        async with database.read() as connection:
            named = await _named(connection, [blob.digest for blob in waiting])
        for blob in waiting:
            if blob.digest not in named:
                count, length = count + 1, length + blob.bytes
                if delete:
                    await blobs.delete(blob.digest)
        waiting.clear()

    async for blob in blobs.listed():
        if blob.modified_s < oldest:
            waiting.append(blob)
        if len(waiting) == ASKED_AT_ONCE:
            await judge()
    await judge()
    leftovers = blobs.sweep(older_than_s=DAY_S) if delete and isinstance(blobs, FolderBlobs) else 0
    return Collected(count, length, leftovers)


async def _named(connection: AsyncConnection, digests: Collection[str]) -> set[str]:
    named: set[str] = set()
    asked = list(digests)
    for start in range(0, len(asked), ASKED_AT_ONCE):
        part = asked[start : start + ASKED_AT_ONCE]
        named.update(await connection.scalars(select(_owners.c.digest).where(_owners.c.digest.in_(part))))
    return named
