"""One way to read and one way to write.

A write is one transaction that sees and changes a consistent state: SQLite `BEGIN IMMEDIATE` (one writer, WAL,
`synchronous=FULL`), PostgreSQL `REPEATABLE READ` with bounded retry on serialization failure by the caller: the director
takes another turn, ingest stores its batch again, the API runs the request again (`api.again`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

BUSY_TIMEOUT_MS = 15_000
"""How long a SQLite writer waits for another process's transaction."""

_CONFLICTS = frozenset({"40001", "40P01"})
"""SQLSTATE of PostgreSQL for a transaction that lost against another one: serialization_failure, deadlock_detected."""
_AWAY = ("08", "53", "57P")
"""SQLSTATE beginnings of a server that is not there for us now: connection, insufficient resources, shutting down."""
DATABASE_ERRORS = (DBAPIError, PoolTimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
"""Everything by which a database says no; a connection that cannot be made at all comes as the driver's own or the system's."""


def lost(error: BaseException) -> bool:
    """Tell whether a transaction lost against another one, so that the same again can succeed at once."""
    return isinstance(error, DBAPIError) and _sqlstate(error) in _CONFLICTS


def transient(error: BaseException) -> bool:
    """Tell whether the database, and not what it was asked, is why something failed: the same can succeed later."""
    if isinstance(error, OSError | OperationalError | PoolTimeoutError | asyncpg.InterfaceError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return _sqlstate(error) in _CONFLICTS or _sqlstate(error).startswith(_AWAY)


def _sqlstate(error: BaseException) -> str:
    said = getattr(error, "orig", None) if isinstance(error, DBAPIError) else error
    return str(getattr(said, "sqlstate", "") or "")


class Database:
    """An engine with Wherry's transaction rules."""

    def __init__(self, engine: AsyncEngine, audit_key: bytes = b"") -> None:
        self.engine = engine.execution_options(wherry_audit_key=audit_key)
        self.is_sqlite = engine.dialect.name == "sqlite"

    @classmethod
    def open(cls, url: str, *, audit_key: bytes = b"") -> Database:
        """Open `sqlite+aiosqlite:///PATH` or `postgresql+asyncpg://…`; `audit_key` seals what is added to the audit log."""
        if not url.startswith("sqlite"):
            return cls(create_async_engine(url, isolation_level="REPEATABLE READ", pool_pre_ping=True), audit_key)
        engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # the driver must not begin by itself: `begin` below decides how
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Any) -> None:
            mode = connection.get_execution_options().get("wherry_begin", "BEGIN")
            connection.exec_driver_sql(mode)

        return cls(engine, audit_key)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads."""
        async with self.engine.connect() as connection:
            yield connection
            await connection.rollback()

    @asynccontextmanager
    async def write(self, *, audited: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes: commits at the end, rolls back on any exception.

        Args:
            audited: wait at the beginning for others that add to the audit log, rather than lose against one of them at the end:
                for what many do at once.
        """
        async with self.engine.connect() as connection:
            await connection.execution_options(wherry_begin="BEGIN IMMEDIATE" if self.is_sqlite else "BEGIN")
            async with connection.begin():
                if audited and not self.is_sqlite:  # SQLite has one writer at a time anyway
                    # as the first statement: PostgreSQL takes the snapshot after it
                    await connection.exec_driver_sql("LOCK TABLE audit_head IN EXCLUSIVE MODE")
                yield connection

    async def close(self) -> None:
        """Close all connections."""
        await self.engine.dispose()
