"""Alembic's entry: one asynchronous connection, the metadata of `db.tables`, one transaction for all steps."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection
from sqlmodel import sql

from wherry_server.db import tables
from wherry_server.db.database import Database

metadata = tables.table(tables.Device).metadata


def plain_types(kind: str, value: Any, _context: Any) -> str | Literal[False]:
    """Write SQLModel's own string type as the plain one, so that migrations need SQLAlchemy only."""
    return "sa.String()" if kind == "type" and isinstance(value, sql.sqltypes.AutoString) else False


def run(connection: Connection) -> None:
    """Run the steps on an open connection."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_item=plain_types,
        render_as_batch=context.config.attributes.get("batch", False),
    )
    with context.begin_transaction():
        context.run_migrations()


async def upgrade() -> None:
    """Open the configured database and migrate it in one writing transaction."""
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    database = Database.open(url)
    try:
        async with database.write() as connection:
            await connection.run_sync(run)
    finally:
        await database.close()


asyncio.run(upgrade())
