"""The audit log: whatever is done to it behind the server's back is found, and the place is named."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.server.harness import Running, running
from wherry_server import audit
from wherry_server.cli.everything import app
from wherry_server.db import migrate
from wherry_server.db.database import Database
from wherry_server.settings import Settings
from wherry_shared.errors import WherryError

PROJECT = "default"
KEY = audit.seal_key(b"m" * 32)
LENGTH = 6
ATTEMPTS = 40
Tamper = Callable[[AsyncConnection, int], Awaitable[int | None]]
"""Does something to the entry with an id, and returns where it has to be found; None where it cannot be done."""


async def unguard(connection: AsyncConnection) -> None:
    """Take away what the database itself refuses, as who administers it can."""
    if connection.dialect.name == "sqlite":
        for change in ("update", "delete"):
            await connection.execute(text(f"DROP TRIGGER audit_entry_{change}"))
    else:
        await connection.execute(text("DROP TRIGGER audit_entry_kept ON audit_entry"))


def field(name: str, value: str) -> Tamper:
    async def change(connection: AsyncConnection, victim: int) -> int:
        await connection.execute(text(f"UPDATE audit_entry SET {name} = {value} WHERE id = {victim}"))
        return victim

    return change


async def remove(connection: AsyncConnection, victim: int) -> int:
    await connection.execute(text(f"DELETE FROM audit_entry WHERE id = {victim}"))
    return min(victim + 1, LENGTH)


async def cut(connection: AsyncConnection, victim: int) -> int:
    """Remove an entry and all behind it, and say that there never were more."""
    await connection.execute(text(f"DELETE FROM audit_entry WHERE id >= {victim}"))
    last = await connection.scalar(text("SELECT hash FROM audit_entry ORDER BY id DESC LIMIT 1"))
    await connection.execute(
        text("UPDATE audit_head SET entries = :n, entry_id = :id, hash = :hash"),
        {"n": victim - 1, "id": victim - 1, "hash": last or audit.GENESIS},
    )
    return victim


async def rewrite(connection: AsyncConnection, victim: int) -> int:
    """Change an entry and compute the whole rest of the chain again, as who reads this code can."""
    await connection.execute(text(f"UPDATE audit_entry SET actor = 'token:mallory' WHERE id = {victim}"))
    before = audit.GENESIS
    async for rows in audit.batches(connection, PROJECT):
        for row in rows:
            hashed = audit.entry_hash(before, PROJECT, row.at, row.actor, row.action, row.subject, row.detail)
            await connection.execute(
                text("UPDATE audit_entry SET previous_hash = :before, hash = :hash WHERE id = :id"),
                {"before": before, "hash": hashed, "id": row.id},
            )
            before = hashed
    await connection.execute(text("UPDATE audit_head SET hash = :hash"), {"hash": before})
    return victim


async def unseal_all(connection: AsyncConnection, victim: int) -> int:
    """The same, as if seals had come later."""
    await rewrite(connection, victim)
    await connection.execute(text(f"UPDATE audit_entry SET seal = '' WHERE id <= {victim}"))
    return victim + 1


async def rewrite_unsealed(connection: AsyncConnection, victim: int) -> int:
    """Compute all of it again, and say that it is from before there were seals."""
    await rewrite(connection, victim)
    await connection.execute(text("UPDATE audit_entry SET seal = ''"))
    await connection.execute(text("UPDATE audit_head SET seal = ''"))
    return 1


async def cut_unsealed(connection: AsyncConnection, victim: int) -> int:
    await cut(connection, victim)
    await connection.execute(text("UPDATE audit_head SET seal = ''"))
    return victim


async def swap(connection: AsyncConnection, victim: int) -> int | None:
    if victim == LENGTH:
        return None
    for was, will in ((victim, 1000), (victim + 1, victim), (1000, victim + 1)):
        await connection.execute(text(f"UPDATE audit_entry SET id = {will} WHERE id = {was}"))
    return victim


async def forget_head(connection: AsyncConnection, _victim: int) -> int:
    await connection.execute(text("DELETE FROM audit_head"))
    return LENGTH + 1


TAMPERINGS: dict[str, Tamper] = {
    "at": field("at", "at + 1"),
    "actor": field("actor", "'token:mallory'"),
    "action": field("action", "'nothing.much'"),
    "subject": field("subject", "'somebody'"),
    "detail": field("detail", """'{"before": 2}'"""),
    "hash": field("hash", "'" + "f" * 64 + "'"),
    "previous_hash": field("previous_hash", "'" + "f" * 64 + "'"),
    "seal": field("seal", "'" + "f" * 64 + "'"),
    "removed": remove,
    "cut off": cut,
    "computed again": rewrite,
    "computed again, without seals": rewrite_unsealed,
    "cut off, without a seal": cut_unsealed,
    "with a seal that is no text of ours": field("seal", "'ä'"),
    "moved": swap,
    "without its head": forget_head,
}


@pytest.mark.backends
def test_whatever_is_done_to_any_entry_is_found_and_located(tmp_path: Path, backend: str) -> None:
    settings = Settings.load(tmp_path / "data")
    settings.data.mkdir()
    migrate.upgrade(settings.database_url)

    async def work() -> int:
        database, tried = Database.open(settings.database_url, audit_key=KEY), 0
        try:
            for number in range(LENGTH):
                async with database.write(audited=True) as connection:
                    if number == 0:
                        await audit.begin(connection, PROJECT)
                    await audit.append(connection, PROJECT, "token:a", "n.v", f"s-{number}", before=1, after=number)
            async with database.read() as connection:
                whole = await audit.verify(connection, PROJECT, KEY)
                assert (whole.broken_at, whole.entries, whole.unsealed) == (None, LENGTH, 0)
                assert (await audit.verify(connection, PROJECT, audit.seal_key(b"o" * 32))).broken_at == 1
            for name, tamper in TAMPERINGS.items():
                for victim in range(1, LENGTH + 1):
                    async with database.engine.connect() as connection, connection.begin() as transaction:
                        await unguard(connection)
                        place = await tamper(connection, victim)
                        found = await audit.verify(connection, PROJECT, KEY)
                        await transaction.rollback()
                    if place is not None:
                        assert found.broken_at == place, (name, victim, found)
                        assert found.why
                        tried += 1
            for victim in range(1, LENGTH):
                async with database.engine.connect() as connection, connection.begin() as transaction:
                    await unguard(connection)
                    place = await unseal_all(connection, victim)
                    found = await audit.verify(connection, PROJECT, KEY, unsealed_max=LENGTH)
                    strictly = await audit.verify(connection, PROJECT, KEY)
                    await transaction.rollback()
                assert found.broken_at == place, "the first that still has a seal has a wrong one"
                assert strictly.broken_at == 1, "nobody said that entries have no seals"
            return tried
        finally:
            await database.close()

    assert asyncio.run(work()) == LENGTH * len(TAMPERINGS) - 1


@pytest.mark.backends
@pytest.mark.parametrize(
    "tamper",
    [cut, cut_unsealed, rewrite, rewrite_unsealed, forget_head, "all"],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_what_is_added_later_does_not_mend_a_log_that_was_tampered_with(
    tmp_path: Path, backend: str, tamper: Tamper | str
) -> None:
    settings = Settings.load(tmp_path / "data")
    settings.data.mkdir()
    migrate.upgrade(settings.database_url)

    async def work() -> None:
        database = Database.open(settings.database_url, audit_key=KEY)
        try:
            async with database.write(audited=True) as connection:
                await audit.begin(connection, PROJECT)
                for number in range(LENGTH):
                    await audit.append(connection, PROJECT, "token:a", "n.v", f"s-{number}")
            async with database.write() as connection:
                await unguard(connection)
                if isinstance(tamper, str):
                    await connection.execute(text("DELETE FROM audit_entry"))
                    await connection.execute(text("DELETE FROM audit_head"))
                else:
                    await tamper(connection, 2)
            for _ in range(2):
                async with database.write(audited=True) as connection:
                    await audit.append(connection, PROJECT, "token:b", "n.v", "later")
                async with database.read() as connection:
                    found = await audit.verify(connection, PROJECT, KEY)
                assert found.broken_at is not None
                assert found.why
        finally:
            await database.close()

    asyncio.run(work())


@pytest.mark.backends
@pytest.mark.parametrize("change", ["UPDATE audit_entry SET actor = 'x'", "DELETE FROM audit_entry"])
def test_the_database_refuses_to_change_an_entry(tmp_path: Path, backend: str, change: str) -> None:
    settings = Settings.load(tmp_path / "data")
    settings.data.mkdir()
    migrate.upgrade(settings.database_url)

    async def work() -> None:
        database = Database.open(settings.database_url, audit_key=KEY)
        try:
            async with database.write() as connection:
                await audit.append(connection, PROJECT, "token:a", "n.v", "s")
            with pytest.raises(DBAPIError, match="append-only"):
                async with database.write() as connection:
                    await connection.execute(text(change))
        finally:
            await database.close()

    asyncio.run(work())


@pytest.mark.backends
def test_two_servers_that_write_at_once_keep_one_chain(tmp_path: Path, backend: str) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(running(tmp_path / "data", api_changes_per_s=0)) for _ in range(2)]
        clients = [stack.enter_context(server.http()) for server in servers]

        def write(number: int) -> int:
            path, body = "/api/v1/cohorts", {"name": f"c-{number}", "selector": "all"}
            return clients[number % 2].post(path, json=body).status_code

        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(write, range(ATTEMPTS)))
        assert set(statuses) == {201}, "nobody is told that another change came first"
        verdict = clients[0].get("/api/v1/audit/verify").json()
        listed = clients[1].get("/api/v1/audit", params={"action": "cohort.create"}).json()
        assert verdict["whole"], verdict
        assert len(listed) == ATTEMPTS
        assert verdict["unsealed"] == 0


def said(server: Running, *arguments: str) -> tuple[int, Any]:
    """Run a command in this process and return exit status and what it says as JSON, or the code of its refusal."""
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            status = typer.main.get_command(app).main(
                ["--server", server.url, "--token", server.admin, *arguments, "--json"], standalone_mode=False
            )
        except WherryError as error:
            return 1, error.code
    return status or 0, json.loads(out.getvalue())


def test_an_export_is_gone_on_with_and_the_log_has_to_agree_with_it(tmp_path: Path, no_environment: None) -> None:
    file = tmp_path / "audit.jsonl"
    with running(tmp_path / "data") as server, server.http() as http:
        server.enrolment_token()
        assert said(server, "audit", "export", str(file))[1]["added"] == 1
        server.enrolment_token()
        assert said(server, "audit", "export", str(file))[1] == {"file": str(file), "entries": 2, "added": 1}
        lines = file.read_text().splitlines()
        exported = [json.loads(line) for line in lines]
        assert [one["hash"] for one in exported] == [one["hash"] for one in http.get("/api/v1/audit").json()[::-1]]
        assert said(server, "audit", "verify", "--against", str(file))[0] == 0
        file.write_text("\n".join([lines[0].replace("token:admin", "token:other"), *lines[1:]]) + "\n")
        assert said(server, "audit", "verify", "--against", str(file)) == (1, "audit_broken")
        file.write_text("no entry\n")
        assert said(server, "audit", "export", str(file)) == (1, "audit_file")
    with running(tmp_path / "restored") as server:  # what was put back, or made up, has another history
        server.enrolment_token()
        server.enrolment_token()
        file.write_text("\n".join(lines) + "\n")
        status, verdict = said(server, "audit", "verify", "--against", str(file))
        assert (status, verdict["broken_at"]) == (1, exported[-1]["id"])
