"""A database of an older release, as it was, brought to the newest schema by `wherry init`.

`dumps/NNNN.jsonl` holds the rows of a small server (devices that enrolled, a bundle with its trust, rollouts that were done
and one that halted) as release NNNN kept them; a file is never changed once it is there. 0018 has rows in every table of its time,
among them a flag, approvals, a webhook with a dead letter and a sealed audit log, and a rollout that is under way.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Boolean, Connection, MetaData, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, cohorts, explaining, flag_book, fleet, rollouts, webhooks
from wherry_server.db import migrate
from wherry_server.db.database import Database
from wherry_server.services import prepare
from wherry_server.settings import Settings

DUMPS = sorted((Path(__file__).parent / "dumps").glob("*.jsonl"))
PROJECT = "default"
MASTER_KEY = b"the master key of a dump, 32 by."
"""Of the server whose audit log a dump has sealed."""
SEALED = {"0018"}


def bytes_of(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) and "base64" in value else value


def load(connection: Connection, file: Path) -> Counter[str]:
    """Insert the rows of a dump into the tables as they are now; JSON columns take their text decoded."""
    found = MetaData()
    found.reflect(connection)
    counted: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        one = json.loads(line)
        table = found.tables[one["table"]]
        row = {name: bytes_of(value) for name, value in one["row"].items()}
        for name, value in row.items():
            if isinstance(table.c[name].type, JSON) and value is not None:
                row[name] = json.loads(value)
            elif isinstance(table.c[name].type, Boolean):
                row[name] = bool(value)
        connection.execute(table.insert().values(row))
        counted[table.name] += 1
    return counted


def count(connection: Connection) -> Counter[str]:
    found = MetaData()
    found.reflect(connection)
    return Counter(
        {
            table.name: number
            for table in found.sorted_tables
            if (number := connection.scalar(select(func.count()).select_from(table)))
        }
    )


async def answers(connection: AsyncConnection, before: Counter[str]) -> None:
    """Ask for what is there; every decision that an older engine made follows from its evidence by the newest one."""
    verdict = await audit.verify(connection, PROJECT, audit.seal_key(MASTER_KEY))
    assert (verdict.broken_at, verdict.entries, verdict.unsealed) == (None, before["audit_entry"], 0)
    devices, _ = await fleet.list_devices(connection, PROJECT, fleet.Filter(limit=100))
    assert len(devices) == before["device"]
    states = []
    for one in await rollouts.every(connection, PROJECT, "", ""):
        told = await explaining.explain(connection, PROJECT, one["number"], devices[0]["id"])
        assert told["differing"] == []
        assert told["device"]["code"]
        states.append((told["state"], len(told["decided"])))
    assert {state for state, _ in states} == {"done", "halted", "created", "running"}
    assert sum(decided for _, decided in states) == before["decision"]
    (flag,) = await flag_book.every(connection, PROJECT)
    assert (flag["name"], flag["rules"][0]["share"]) == ("beta", 0.5)
    (cohort,) = await cohorts.every(connection, PROJECT)
    assert (cohort["kept"], cohort["kept_from"]) == (0, ""), "a live one, as they all were"
    (dead,) = await webhooks.deliveries(connection, PROJECT, "chat", "dead")
    assert dead["error"] == "a error"


@pytest.mark.backends
@pytest.mark.parametrize("file", DUMPS, ids=lambda file: file.stem)
def test_an_older_database_is_upgraded_with_all_that_is_in_it(
    file: Path, tmp_path: Path, backend: str, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'old.sqlite'}"
    if backend == "postgres":
        url = request.getfixturevalue("postgres").empty()
    configured = migrate.config(url)
    command.upgrade(configured, file.stem)

    async def fill() -> Counter[str]:
        database = Database.open(url)
        try:
            async with database.write() as connection:
                return await connection.run_sync(load, file)
        finally:
            await database.close()

    before = asyncio.run(fill())
    assert before["device"] > 5
    migrate.upgrade(url)
    command.check(configured)

    async def look() -> tuple[Counter[str], list[dict[str, Any]]]:
        database = Database.open(url)
        try:
            async with database.read() as connection:
                shown = [await rollouts.show(connection, PROJECT, number) for number in (1, 2, 3)]
                if file.stem in SEALED:
                    await answers(connection, before)
                return await connection.run_sync(count), shown
        finally:
            await database.close()

    after, shown = asyncio.run(look())
    after.pop("alembic_version")
    assert {name: after[name] for name in before} == dict(before), "no row was lost"
    assert [one["state"] for one in shown] == ["done", "done", "halted"]
    assert shown[2]["counts"]["real"]["returned"] > 0
    assert shown[2]["reason"] == "failure_bound"


def test_a_log_from_before_there_were_seals_is_sealed_from_the_upgrade_on(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "data")
    settings.data.mkdir()
    command.upgrade(migrate.config(settings.database_url), DUMPS[0].stem)

    async def work(do: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        database = Database.open(settings.database_url, audit_key=audit.seal_key(settings.master_key_file.read_bytes()))
        try:
            async with database.write() as connection:
                return await do(connection)
        finally:
            await database.close()

    settings.keys_folder.mkdir()
    settings.master_key_file.write_bytes(MASTER_KEY)
    old = asyncio.run(work(lambda c: c.run_sync(load, DUMPS[0])))["audit_entry"]
    prepare(settings)
    key = audit.seal_key(MASTER_KEY)
    asyncio.run(work(lambda c: audit.append(c, PROJECT, "token:a", "n.v", "s")))
    for allowed, broken_at, unsealed in ((old, None, old), (old + 1, None, old), (old - 1, old, old - 1), (0, 1, 0)):
        found = asyncio.run(work(lambda c, allowed=allowed: audit.verify(c, PROJECT, key, allowed)))
        assert (found.broken_at, found.unsealed) == (broken_at, unsealed), allowed
    asyncio.run(work(lambda c: c.exec_driver_sql("UPDATE audit_head SET seal = ''")))
    prepare(settings)
    assert asyncio.run(work(lambda c: audit.verify(c, PROJECT, key, old))).broken_at, "only the upgrade seals"


def test_every_schema_that_was_released_has_a_dump() -> None:
    script = ScriptDirectory.from_config(migrate.config(""))
    assert script.get_current_head() == migrate.NEWEST
    revisions = {found.revision for found in script.walk_revisions()}
    assert {file.stem for file in DUMPS} <= revisions
    assert {"0001", *SEALED} <= {file.stem for file in DUMPS}
