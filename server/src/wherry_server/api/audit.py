"""The audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select

from wherry_server import audit
from wherry_server.answers import Entry, Verdict, shaped
from wherry_server.api.again import Again
from wherry_server.api.pages import CursorId, Paging, check_text
from wherry_server.auth import ServicesDep, Viewer
from wherry_server.db.tables import AuditEntry, table

router = APIRouter(prefix="/api/v1/audit", tags=["audit"], route_class=Again)

_entries = table(AuditEntry)
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


@router.get("/verify")
async def verify_audit(services: ServicesDep, _viewer: Viewer) -> Verdict:
    """Compute the whole chain again."""
    async with services.database.read() as connection:
        broken = await audit.broken_at(connection, services.project)
    return Verdict(whole=broken is None, broken_at=broken)
