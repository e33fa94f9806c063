"""Who did what: append-only entries, each with the hash of the one before, so that a changed or removed entry shows.

An entry is written in the transaction of what it tells. Two writers cannot follow the same entry: the database holds
`previous_hash` unique within a project.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import AuditEntry, table
from wherry_server.times import now_us

GENESIS = "0" * 64
"""What stands before the first entry of a project."""
VERIFY_BATCH = 1000

_entries = table(AuditEntry)


def entry_hash(previous: str, project: str, at: int, actor: str, action: str, subject: str, detail: Any) -> str:
    """Return the hash of an entry: SHA-256 of the canonical JSON list of all it says and the hash before it."""
    said = msgspec.json.encode([previous, project, at, actor, action, subject, detail], order="sorted")
    return hashlib.sha256(said).hexdigest()


async def append(
    connection: AsyncConnection, project: str, actor: str, action: str, subject: str, **detail: Any
) -> None:
    """Add an entry inside the caller's writing transaction.

    Args:
        connection: a transaction of `Database.write`.
        project: whose log it is.
        actor: `token:NAME`, `device:ID` or a role of the server such as `director`.
        action: `NOUN.VERB`, such as `bundle.publish`.
        subject: what was acted on.
        detail: JSON values: what was, what is.
    """
    previous = await connection.scalar(
        select(_entries.c.hash).where(_entries.c.project_id == project).order_by(_entries.c.id.desc()).limit(1)
    )
    at = now_us()
    before = previous or GENESIS
    await connection.execute(
        insert(AuditEntry).values(
            project_id=project,
            at=at,
            actor=actor,
            action=action,
            subject=subject,
            detail=detail,
            previous_hash=before,
            hash=entry_hash(before, project, at, actor, action, subject, detail),
        )
    )


async def broken_at(connection: AsyncConnection, project: str) -> int | None:
    """Return the id of the first entry that does not follow from the one before it; None if the chain holds."""
    before, last = GENESIS, 0
    while True:
        rows = (
            await connection.execute(
                select(_entries)
                .where(_entries.c.project_id == project, _entries.c.id > last)
                .order_by(_entries.c.id)
                .limit(VERIFY_BATCH)
            )
        ).all()
        for row in rows:
            expected = entry_hash(before, project, row.at, row.actor, row.action, row.subject, row.detail)
            if row.previous_hash != before or row.hash != expected:
                return int(row.id)
            before, last = row.hash, row.id
        if len(rows) < VERIFY_BATCH:
            return None
