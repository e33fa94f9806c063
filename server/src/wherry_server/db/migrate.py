"""Brings a database to the newest schema; whoever prepares a data folder calls it before a database is used.

Alembic is imported only where something is to be done: it takes longer than to see that nothing is.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.database import Database

if TYPE_CHECKING:
    from alembic.config import Config

SCRIPTS = Path(__file__).parent / "migrations"
NEWEST = max(path.name[:4] for path in (SCRIPTS / "versions").glob("[0-9]*.py"))
"""Revisions are numbered in one line, and their files begin with the number."""
SEALS = "0014"
"""The revision that brought seals of the audit log."""
_REVISION = text("SELECT version_num FROM alembic_version")


def config(url: str) -> Config:
    """Return Alembic's configuration for a database URL, without a file."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(SCRIPTS))
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return made


async def revision(connection: AsyncConnection) -> str:
    """Return the schema that a database has, empty if it has none."""
    if not await connection.run_sync(lambda sync: inspect(sync).has_table("alembic_version")):
        return ""
    return str(await connection.scalar(_REVISION) or "")


def upgrade(url: str) -> str:
    """Run the migrations that are missing, and return the revision before. Not from inside an event loop: the script runs its own."""
    before = asyncio.run(_revision_of(url))
    if before != NEWEST:
        from alembic import command

        command.upgrade(config(url), "head")
    return before


async def _revision_of(url: str) -> str:
    database = Database.open(url)
    try:
        async with database.read() as connection:
            return await revision(connection)
    finally:
        await database.close()
