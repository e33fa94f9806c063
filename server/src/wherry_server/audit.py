"""Who did what: append-only entries, each with the hash of the one before, sealed by the server's key.

An entry is written in the transaction of what it tells. The hash shows a changed, a removed and a moved entry; the seal, made with
a key that is not in the database, shows a chain that somebody computed again; the head, sealed as well, shows a missing end. A seal
that was taken away is a wrong one, and what is added behind a head with a wrong seal does not mend it. The database refuses to change
or delete an entry (triggers of migration 0014). A log that was put back to an older state, head and all, is shown only by what was kept
elsewhere: an export, or a webhook's receiver.

Two writers cannot follow the same entry: each changes the head, and on PostgreSQL the later one loses its transaction and is run again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import AuditEntry, AuditHead, table
from wherry_server.times import now_us

GENESIS = "0" * 64
"""What stands before the first entry of a project."""
BATCH = 1000
"""Entries that are read at once."""
LOST = "lost"
"""For the seal of a head that goes on from one whose seal was wrong."""

_entries = table(AuditEntry)
_heads = table(AuditHead)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the log is whole, or where it is first not what was written."""

    broken_at: int | None
    """Id of the entry; of one that is missing at the end, the id that it had."""
    why: str
    entries: int
    """That follow from each other, from the first on."""
    unsealed: int
    """Of those, written before there were seals."""
    head: str
    """Hash of the last of them: what to keep elsewhere."""


def seal_key(master_key: bytes) -> bytes:
    """Return the key of the seals."""
    return hmac.digest(master_key, b"wherry audit seal", "sha256")


def entry_hash(previous: str, project: str, at: int, actor: str, action: str, subject: str, detail: Any) -> str:
    """Return the hash of an entry: SHA-256 of the canonical JSON list of all it says and the hash before it."""
    said = msgspec.json.encode([previous, project, at, actor, action, subject, detail], order="sorted")
    return hashlib.sha256(said).hexdigest()


def entry_seal(key: bytes, hashed: str) -> str:
    """Return the seal of an entry."""
    return hmac.digest(key, f"entry {hashed}".encode(), "sha256").hex() if key else ""


def head_seal(key: bytes, entries: int, hashed: str) -> str:
    """Return the seal of a head."""
    return hmac.digest(key, f"head {entries} {hashed}".encode(), "sha256").hex() if key else ""


async def begin(connection: AsyncConnection, project: str) -> None:
    """Begin the log of a new project, in a transaction of a `Database` that has the key of the seals."""
    key = _key(connection)
    await connection.execute(
        insert(_heads).values(project_id=project, entries=0, entry_id=0, hash=GENESIS, seal=head_seal(key, 0, GENESIS))
    )


async def seal_head(connection: AsyncConnection, project: str) -> None:
    """Seal how long a log from before there were seals is: once, in the upgrade that brings them."""
    head = (await connection.execute(select(_heads).where(_heads.c.project_id == project))).one_or_none()
    if head is None:
        await begin(connection, project)
    elif not head.seal:
        sealed = head_seal(_key(connection), head.entries, head.hash)
        await connection.execute(update(_heads).where(_heads.c.project_id == project).values(seal=sealed))


async def append(
    connection: AsyncConnection, project: str, actor: str, action: str, subject: str, **detail: Any
) -> None:
    """Add an entry inside the caller's writing transaction.

    Args:
        connection: a transaction of `Database.write`.
        project: whose log it is.
        actor: `token:NAME`, `person:NAME`, `device:ID` or a role of the server such as `director`.
        action: `NOUN.VERB`, such as `bundle.publish`.
        subject: what was acted on.
        detail: JSON values: `before` and `after` of what changed, and the evidence for it.
    """
    head = (
        await connection.execute(select(_heads).where(_heads.c.project_id == project).with_for_update())
    ).one_or_none()
    key, at = _key(connection), now_us()
    if head is None:
        head = await _head_again(connection, project)
    before, entries = head.hash, head.entries
    good = _same(head.seal, head_seal(key, entries, before))
    hashed = entry_hash(before, project, at, actor, action, subject, detail)
    made = await connection.scalar(
        insert(_entries)
        .values(
            project_id=project,
            at=at,
            actor=actor,
            action=action,
            subject=subject,
            detail=detail,
            previous_hash=before,
            hash=hashed,
            seal=entry_seal(key, hashed),
        )
        .returning(_entries.c.id)
    )
    await connection.execute(
        update(_heads)
        .where(_heads.c.project_id == project)
        .values(
            entries=entries + 1,
            entry_id=made,
            hash=hashed,
            seal=head_seal(key, entries + 1, hashed) if good else LOST,
        )
    )


async def _head_again(connection: AsyncConnection, project: str) -> Any:
    """Return a head, not sealed, for a project that had one which somebody took away: it goes on from what is there."""
    of_project = _entries.c.project_id == project
    count = await connection.scalar(select(func.count()).select_from(_entries).where(of_project)) or 0
    last = (
        await connection.execute(
            select(_entries.c.id, _entries.c.hash).where(of_project).order_by(_entries.c.id.desc()).limit(1)
        )
    ).one_or_none()
    place = {"entry_id": last.id, "hash": last.hash} if last is not None else {"entry_id": 0, "hash": GENESIS}
    await connection.execute(insert(_heads).values(project_id=project, entries=count, seal=LOST, **place))
    return (await connection.execute(select(_heads).where(_heads.c.project_id == project))).one()


async def batches(connection: AsyncConnection, project: str, after: int = 0) -> AsyncIterator[list[Any]]:
    """Yield the entries of a project behind an id, the oldest first."""
    while True:
        rows = list(
            await connection.execute(
                select(_entries)
                .where(_entries.c.project_id == project, _entries.c.id > after)
                .order_by(_entries.c.id)
                .limit(BATCH)
            )
        )
        if rows:
            yield rows
            after = rows[-1].id
        if len(rows) < BATCH:
            return


async def verify(connection: AsyncConnection, project: str, key: bytes, unsealed_max: int = 0) -> Verdict:
    """Compute the whole log again, with the key of the seals, and find the first entry that is not what was written.

    Args:
        connection: to read with.
        project: whose log.
        key: of the seals.
        unsealed_max: how many entries, from the first on, may have no seal since they are older than seals. Who says it knows it
            from elsewhere: a log whose seals were all taken away looks the same.
    """
    before, last, entries, unsealed = GENESIS, 0, 0, 0

    def verdict(broken_at: int | None, why: str = "") -> Verdict:
        return Verdict(broken_at=broken_at, why=why, entries=entries, unsealed=unsealed, head=before)

    async for rows in batches(connection, project):
        for row in rows:
            if row.previous_hash != before:
                return verdict(row.id, "entries before it are missing, or it was moved")
            if row.hash != entry_hash(before, project, row.at, row.actor, row.action, row.subject, row.detail):
                return verdict(row.id, "it was changed")
            if not row.seal and unsealed == entries < unsealed_max:
                unsealed += 1
            elif not row.seal:
                return verdict(row.id, "it has no seal")
            elif not _same(row.seal, entry_seal(key, row.hash)):
                return verdict(row.id, "its seal is not this server's")
            before, last, entries = row.hash, row.id, entries + 1
    head = (await connection.execute(select(_heads).where(_heads.c.project_id == project))).one_or_none()
    if head is None:
        return verdict(last + 1, "it is not known how long the log was")
    if not _same(head.seal, head_seal(key, head.entries, head.hash)):
        return verdict(last + 1, "the seal that says how long the log was is not this server's")
    if (head.entries, head.hash) != (entries, before):
        return verdict(last + 1, f"{max(head.entries - entries, 1)} entries are missing at the end")
    return verdict(None)


def first_broken(entries: Sequence[Any]) -> int | None:
    """Return the id of the first exported entry that is not what its hash says, or does not follow from the one before it."""
    before = ""
    for one in entries:
        said = entry_hash(one.previous_hash, one.project, one.at, one.actor, one.action, one.subject, one.detail)
        if one.hash != said or before not in ("", one.previous_hash):
            return int(one.id)
        before = one.hash
    return None


def _same(said: str, wanted: str) -> bool:
    return hmac.compare_digest(said.encode(), wanted.encode())  # of text it would take ASCII only


def _key(connection: AsyncConnection) -> bytes:
    found: bytes = connection.sync_connection.get_execution_options().get("wherry_audit_key", b"")  # type: ignore[union-attr]
    return found
