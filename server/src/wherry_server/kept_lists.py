"""Lists of static cohorts go when nothing refers to them any more.

A list is referred to by the selector of a cohort, by the rules of a flag, and by the plan of a rollout that may still expose
somebody: one that is created, under way, or done. Nothing else looks at members: what a rollout that ended otherwise did is in
its assignments. A list is collected when two looks in a row, a round of the director apart, found nothing of that kind, so that
what is being written down meanwhile keeps it.
"""

from __future__ import annotations

import re

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit
from wherry_server.db.database import Database

COLLECTED = "cohort.collect"
"""Action of the audit log: its subject is the list."""
_LIST = re.compile(r"\bkept\.([A-Za-z0-9_-]+)")


async def collect(database: Database, project: str, suspects: frozenset[str]) -> frozenset[str]:
    """Delete the lists that were suspect and still are, each in a transaction of its own; return those that are suspect now."""
    async with database.read() as connection:
        found = await unreferred(connection, project)
    for one in sorted(found & suspects):
        async with database.write() as connection:
            if one not in await unreferred(connection, project):
                continue
            gone = await connection.execute(_DELETE, {"project": project, "list": one})
            await audit.append(connection, project, "director", COLLECTED, one, devices=gone.rowcount)
    return found - suspects


async def unreferred(connection: AsyncConnection, project: str) -> frozenset[str]:
    """Return the lists that nothing refers to."""
    named = {"project": project}
    known = {row.list_id for row in await connection.execute(_LISTS, named)}
    if not known:
        return frozenset()
    said = [row.said for row in await connection.execute(_REFERRING, named)]
    return frozenset(known - {one for text_ in said for one in _LIST.findall(text_)})


_LISTS = text("SELECT DISTINCT list_id FROM kept_member WHERE project_id = :project")
_REFERRING = text(
    "SELECT selector AS said FROM cohort WHERE project_id = :project"
    " UNION ALL SELECT CAST(definition AS TEXT) FROM flag WHERE project_id = :project"
    " UNION ALL SELECT CAST(plan AS TEXT) FROM rollout WHERE project_id = :project"
    " AND state NOT IN ('halted', 'aborted', 'reverted')"
)
_DELETE = text("DELETE FROM kept_member WHERE project_id = :project AND list_id = :list")
