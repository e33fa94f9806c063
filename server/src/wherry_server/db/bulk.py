"""Many rows in one call, without the ORM and without a compiled statement per row.

On SQLite a plain `executemany` costs 3 µs a row where SQLAlchemy's own takes 6 to 9 and `session.add_all` 150. On
PostgreSQL many rows come by a binary COPY into a staging table of the connection, and from there by one statement.
JSON columns take encoded text.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Table, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import JSON

COPY_MIN = 20
"""Rows from which on COPY costs less than one execution for each."""


async def insert_new(
    connection: AsyncConnection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Insert rows; one whose primary key is there already changes nothing."""
    await _insert(connection, table, columns, rows, "NOTHING")


async def upsert(
    connection: AsyncConnection,
    table: Table,
    columns: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
    *,
    update: Sequence[str],
    guard: str = "",
) -> None:
    """Insert rows; where the primary key is there already, set the columns `update` if `guard` (SQL) holds."""
    action = "UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in update)
    await _insert(connection, table, columns, rows, f"{action} WHERE {guard}" if guard else action)


async def select_in(connection: AsyncConnection, select: str, keys: Sequence[str]) -> Sequence[Row[Any]]:
    """Run a select with many keys; it says `IN :keys` in one place. Thousands of bound names cost more than the query."""
    if connection.dialect.name == "sqlite":
        statement = select.replace(":keys", "(SELECT value FROM json_each(?))")
        found = await connection.exec_driver_sql(statement, (json.dumps(list(keys)),))
    else:
        found = await connection.exec_driver_sql(select.replace("IN :keys", "= ANY($1::varchar[])"), (list(keys),))
    return found.all()


async def fill(connection: AsyncConnection, name: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Bring rows into a temporary table of our own, in the transaction that made or emptied it."""
    if connection.dialect.name == "sqlite":
        places = ", ".join("?" * len(columns))
        await connection.exec_driver_sql(f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({places})", list(rows))  # noqa: S608  # of our own
    else:
        await _copy_into(connection, name, columns, rows)


async def _copy_into(
    connection: AsyncConnection, name: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Bring rows into a table by PostgreSQL's binary COPY, in the transaction that an earlier statement began."""
    driver = (await connection.get_raw_connection()).driver_connection
    if driver is None:
        raise RuntimeError("a connection in a transaction has no driver's connection")
    await driver.copy_records_to_table(name, records=rows, columns=list(columns))


async def _insert(
    connection: AsyncConnection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]], action: str
) -> None:
    if not rows:
        return
    keys = [column.name for column in table.primary_key]
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"
    conflict = f"ON CONFLICT ({', '.join(keys)}) DO {action}"
    if connection.dialect.name == "sqlite":
        await connection.exec_driver_sql(f"{into} VALUES ({', '.join('?' * len(columns))}) {conflict}", list(rows))
    elif len(rows) >= COPY_MIN and _distinct(rows, [columns.index(key) for key in keys]):
        await _copy(connection, table, columns, rows, into, conflict)
    else:
        encoded = [isinstance(table.c[name].type, JSON) for name in columns]
        values = ", ".join(f"CAST(:{n} AS JSON)" if j else f":{n}" for n, j in zip(columns, encoded, strict=True))
        named = [dict(zip(columns, row, strict=True)) for row in rows]
        await connection.execute(text(f"{into} VALUES ({values}) {conflict}"), named)


async def _copy(
    connection: AsyncConnection,
    table: Table,
    columns: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
    into: str,
    conflict: str,
) -> None:
    """Bring rows by COPY; the staging table has the columns' types and none of the rules, and is empty after a commit."""
    listed = ", ".join(columns)
    name = f"stage_{table.name}_{zlib.crc32(listed.encode()):08x}"
    await connection.exec_driver_sql(  # what begins the transaction, if nothing has yet
        f"CREATE TEMP TABLE IF NOT EXISTS {name} ON COMMIT DELETE ROWS AS SELECT {listed} FROM {table.name} WITH NO DATA"  # noqa: S608  # names of our own tables
    )
    await _copy_into(connection, name, columns, rows)
    await connection.exec_driver_sql(f"{into} SELECT {listed} FROM {name} {conflict}")  # noqa: S608  # of our own
    await connection.exec_driver_sql(f"DELETE FROM {name}")  # noqa: S608  # the same again may follow in this transaction


def _distinct(rows: Sequence[tuple[Any, ...]], places: Sequence[int]) -> bool:
    """Tell whether no two rows have the same key: one statement may not change a row twice."""
    return len({tuple(row[place] for place in places) for row in rows}) == len(rows)
