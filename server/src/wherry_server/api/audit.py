"""The audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from wherry_server import audit
from wherry_server.answers import Entry, ExportedEntry, Verdict, shaped
from wherry_server.api.again import Again
from wherry_server.api.pages import CursorId, Paging, check_text
from wherry_server.auth import ServicesDep, Viewer
from wherry_server.db.tables import AuditEntry, table

router = APIRouter(prefix="/api/v1/audit", tags=["audit"], route_class=Again)

_entries = table(AuditEntry)
JSON_LINES = "application/jsonl"
ID_MAX = 2**31 - 1
"""Of an entry, as PostgreSQL's INTEGER holds it."""


@router.get("")
async def list_audit(
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    before: Annotated[int, Query(ge=1, le=ID_MAX, description="entries older than this id")] = ID_MAX,
    actor: Annotated[str, Query(max_length=128, description="whose")] = "",
    action: Annotated[str, Query(max_length=64, description="such as rollout.create")] = "",
    subject: Annotated[str, Query(max_length=128, description="of what")] = "",
) -> list[Entry]:
    """List entries, the newest first."""
    older = min(before, page.behind(CursorId) or ID_MAX)
    wanted = select(_entries).where(_entries.c.project_id == services.project, _entries.c.id < older)
    for column, value in ((_entries.c.actor, actor), (_entries.c.action, action), (_entries.c.subject, subject)):
        if value:
            check_text(value)
            wanted = wanted.where(column == value)
    async with services.database.read() as connection:
        rows = (await connection.execute(wanted.order_by(_entries.c.id.desc()).limit(page.limit + 1))).all()
    return [shaped(Entry, row) for row in page.full(rows, lambda row: row.id)]


def _exported(row: Any) -> ExportedEntry:
    said = row._mapping  # noqa: SLF001  # the name under which SQLAlchemy documents it
    return shaped(ExportedEntry, {**said, "project": row.project_id})


@router.get("/verify")
async def verify_audit(
    services: ServicesDep,
    _viewer: Viewer,
    unsealed: Annotated[
        int,
        Query(
            ge=0, le=ID_MAX, description="how many entries at the beginning are older than seals, and so may have none"
        ),
    ] = 0,
) -> Verdict:
    """Compute the whole log again, with the key of its seals."""
    async with services.database.read() as connection:
        found = await audit.verify(connection, services.project, audit.seal_key(services.master_key), unsealed)
    return Verdict(whole=found.broken_at is None, **asdict(found))


@router.get(
    "/export",
    response_class=StreamingResponse,
    responses={200: {"content": {JSON_LINES: {"schema": {"type": "string"}}}}},
)
async def export_audit(
    services: ServicesDep,
    _viewer: Viewer,
    after: Annotated[int, Query(ge=0, le=ID_MAX, description="entries behind this id")] = 0,
) -> StreamingResponse:
    """Send the log as lines of JSON, the oldest entry first: what to keep elsewhere, and to verify without this server."""

    async def lines() -> AsyncIterator[bytes]:
        async with services.database.read() as connection:
            async for rows in audit.batches(connection, services.project, after):
                yield b"".join(msgspec.json.encode(_exported(row)) + b"\n" for row in rows)

    return StreamingResponse(lines(), media_type=JSON_LINES)
