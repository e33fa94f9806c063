"""What a database says when it cannot, and what is done about it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from tests.postgres import Postgres
from tests.server.fleet_kit import fleet, run
from wherry_server import collector
from wherry_server.collector import Collector
from wherry_server.db.database import DATABASE_ERRORS, Database, lost, transient
from wherry_server.ingest import Stored
from wherry_shared import topics


class SaidError(Exception):
    """An error of a driver."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("error", "loses", "passes"),
    [
        (DBAPIError("s", {}, SaidError("40001")), True, True),
        (DBAPIError("s", {}, SaidError("40P01")), True, True),
        (DBAPIError("s", {}, SaidError("53300")), False, True),
        (DBAPIError("s", {}, SaidError("57P01")), False, True),
        (DBAPIError("s", {}, SaidError("08006")), False, True),
        (DBAPIError("s", {}, SaidError(""), connection_invalidated=True), False, True),
        (DBAPIError("s", {}, SaidError("22003")), False, False),
        (IntegrityError("s", {}, SaidError("23505")), False, False),
        (OperationalError("s", {}, Exception("database is locked")), False, True),
        (ConnectionRefusedError(), False, True),
        (asyncpg.CannotConnectNowError(), False, True),
        (asyncpg.InterfaceError("closed"), False, True),
        (ValueError("not for a database"), False, False),
    ],
)
def test_the_database_or_what_it_was_asked(error: Exception, loses: bool, passes: bool) -> None:
    assert lost(error) == loses
    assert transient(error) == passes


def test_a_server_that_is_not_there_is_a_database_error_and_passes(tmp_path: Path) -> None:
    async def work() -> None:
        database = Database.open(f"postgresql+asyncpg://wherry@/wherry?host={tmp_path}")
        try:
            with pytest.raises(DATABASE_ERRORS) as caught:
                async with database.read() as connection:
                    await connection.execute(text("SELECT 1"))
            assert transient(caught.value)
        finally:
            await database.close()

    asyncio.run(work())


def test_of_two_writers_of_one_row_one_loses_and_says_so(postgres: Postgres) -> None:
    url = postgres.database()

    async def late(database: Database) -> None:
        async with database.write() as second:
            await second.execute(text("SELECT n FROM counter"))
            async with database.write() as first:
                await first.execute(text("UPDATE counter SET n = n + 1"))
            await second.execute(text("UPDATE counter SET n = n + 1"))

    async def work() -> None:
        database = Database.open(url)
        try:
            async with database.write() as connection:
                await connection.execute(text("CREATE TABLE counter (n INTEGER)"))
                await connection.execute(text("INSERT INTO counter VALUES (0)"))
            with pytest.raises(DBAPIError) as caught:
                await late(database)
            assert lost(caught.value)
        finally:
            await database.close()

    asyncio.run(work())


@pytest.mark.backends
def test_messages_outlast_a_database_that_goes_away(tmp_path: Path, backend: str, monkeypatch) -> None:
    """Connections end in the middle (PostgreSQL), the file is locked for longer than a writer waits (SQLite)."""
    monkeypatch.setattr(collector, "RETRY_MIN_S", 0.01)

    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            stored: list[Stored] = []
            acknowledged: list[str] = []
            gathers = Collector(found.ingest, lambda topic, _frame: acknowledged.append(topic), stored.append)
            honest, failed = found.ingest.store_batch, []

            async def cut_once(batch):
                if not failed:
                    failed.append(True)
                    if backend == "postgres":
                        async with found.database.write() as connection:
                            await connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
                    raise OperationalError("BEGIN IMMEDIATE", {}, Exception("database is locked"))
                return await honest(batch)

            found.ingest.store_batch = cut_once  # type: ignore[method-assign]
            running = asyncio.create_task(gathers.run())
            gathers.received(topics.up(device.id, "hello"), device.hello())
            for _ in range(2_000):
                if stored:
                    break
                await asyncio.sleep(0.005)
            running.cancel()
            assert failed
            assert stored, "what was received is stored in the end"

    run(work())
