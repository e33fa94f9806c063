"""`wherry doctor`: whether a server's parts are there and let this machine in, asked one by one.

Each question says `ok`, `note` (worth knowing) or `bad`, and for what is bad the next step. Nothing is changed but for one
small blob, which is written, fetched as a device would fetch it, and deleted again.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx

from wherry_server import broker
from wherry_server.blobs import Blobs
from wherry_server.db import migrate
from wherry_server.db.database import DATABASE_ERRORS, Database
from wherry_server.services import open_blobs
from wherry_server.settings import Settings
from wherry_server.times import now_us
from wherry_server.trust import Trust
from wherry_shared.errors import WherryError
from wherry_shared.limits import MIB

Level = Literal["ok", "note", "bad"]

ANSWER_S = 10.0
PROBE_BYTES = 64
FREE_BYTES_MIN = 512 * MIB
EXPIRY_NEAR_US = 21 * 86_400 * 1_000_000
"""Time in which people come together and sign."""
MARGINS_US = {"snapshot": 86_400 * 1_000_000, "timestamp": 3_600 * 1_000_000}
"""What the server signs by itself is signed anew at half its life: less than this is left only where nobody does."""
_ONLINE = "the director signs it: wherry serve director"
ROLE_STEPS = {
    "root": "a ceremony: wherry trust root renew",
    "targets": "a ceremony: wherry trust root renew",
    "snapshot": _ONLINE,
    "timestamp": _ONLINE,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one question found."""

    level: Level
    detail: str
    next_step: str = ""


Question = Callable[[Settings], Awaitable[Finding]]


async def examine(settings: Settings) -> AsyncIterator[tuple[str, Finding]]:
    """Ask everything."""
    for name, question in QUESTIONS.items():
        try:
            yield name, await question(settings)
        except WherryError as error:
            yield name, Finding("bad", error.message, error.next_step or error.consequence)


async def _data(settings: Settings) -> Finding:
    if not settings.master_key_file.is_file():
        return Finding("bad", f"{settings.data} has no keys", f"wherry init --data {settings.data}")
    open_to_others = [path.name for path in _secrets(settings) if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    if open_to_others:
        return Finding("bad", f"others can read {', '.join(open_to_others)}", f"chmod -R go= {settings.keys_folder}")
    free = shutil.disk_usage(settings.data).free
    words = f"{settings.data}, {free // MIB} MiB free"
    return Finding("ok", words) if free >= FREE_BYTES_MIN else Finding("bad", words, "make room on this disk")


def _secrets(settings: Settings) -> list[Path]:
    return [settings.keys_folder, *(path for path in (settings.s3_key_file,) if path.exists())]


async def _database(settings: Settings) -> Finding:
    database = Database.open(settings.database_url)
    try:
        async with database.read() as connection:
            found = await migrate.revision(connection)
    except DATABASE_ERRORS as error:
        return Finding("bad", f"no answer: {error}", "see that it runs, and that user, password and name are right")
    finally:
        await database.close()
    kind = "SQLite" if database.is_sqlite else "PostgreSQL"
    if found != migrate.NEWEST:
        return Finding("bad", f"{kind}, schema {found or 'missing'}, this release has {migrate.NEWEST}", "wherry init")
    return Finding("ok", f"{kind}, schema {found}")


async def _blobs(settings: Settings) -> Finding:
    blobs = open_blobs(settings)
    await blobs.check()
    data = secrets.token_bytes(PROBE_BYTES)
    digest = await blobs.put_bytes(data)
    try:
        if await blobs.get(digest, bytes_max=PROBE_BYTES) != data:
            return Finding("bad", f"{blobs.where} gives back other bytes than it took", "find out what alters them")
        return await _fetched(settings, blobs, digest, data)
    finally:
        await blobs.delete(digest)


async def _fetched(settings: Settings, blobs: Blobs, digest: str, data: bytes) -> Finding:
    address = await blobs.address(digest, settings.presign_s) if settings.presign_s else None
    if address is None:
        return Finding("ok", f"{blobs.where}: written, read and deleted; the API sends the bytes to devices")
    where = f"{urlsplit(address).scheme}://{urlsplit(address).netloc}"
    step = "see s3_public_endpoint and s3_region, or let the API send the bytes: presign_s = 0"
    try:
        async with httpx.AsyncClient(timeout=ANSWER_S) as http:
            answer = await http.get(address)
    except httpx.HTTPError as error:
        return Finding("bad", f"devices are sent to {where}, which does not answer here: {type(error).__name__}", step)
    if answer.content != data:
        return Finding("bad", f"devices are sent to {where}, which answers {answer.status_code}", step)
    words = f"{blobs.where}: written, read and deleted; devices are sent to {where}"
    if where.startswith("http:"):
        return Finding("note", f"{words}, and refuse that once they reach the API by https")
    return Finding("ok", words)


async def _broker(settings: Settings) -> Finding:
    where = f"{settings.broker_host}:{settings.broker_port}"
    if await asyncio.to_thread(broker.answers, settings, ANSWER_S):
        return Finding("ok", f"{where} takes connections")
    return Finding("bad", f"nobody answers at {where}", "start the broker, or see broker_host and broker_port")


async def _trust(settings: Settings) -> Finding:
    state = await asyncio.to_thread(Trust.open(settings.trust_folder).public_state)
    lives = {name: (role["expires_at"], ROLE_STEPS[name]) for name, role in state["roles"].items()}
    lives |= {
        publisher["name"]: (publisher["expires_at"], "its publisher: wherry trust renew")
        for publisher in state["publishers"]
        if publisher["expires_at"]
    }
    name, (expires_at, step) = min(lives.items(), key=lambda one: one[1][0] - MARGINS_US.get(one[0], EXPIRY_NEAR_US))
    left_us = expires_at - now_us()
    day = datetime.fromtimestamp(expires_at / 1_000_000, UTC).date()
    if left_us <= 0:
        return Finding("bad", f"{name} expired on {day}: devices install nothing, and serve on", step)
    if left_us < MARGINS_US.get(name, EXPIRY_NEAR_US):
        return Finding("note", f"{name} is good until {day} only", step)
    if state["development"]:
        return Finding(
            "note", "root and targets keys are on this machine", "hold a ceremony: docs/runbooks/root-rotation.md"
        )
    return Finding("ok", f"nothing expires soon; next is {name}, on {day}")


async def _api(settings: Settings) -> Finding:
    try:
        async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as http:
            answer = await http.get(f"{settings.url}/api/v1/health")
    except httpx.HTTPError:
        return Finding("note", f"no API runs on this machine at {settings.url}")
    if answer.status_code == httpx.codes.OK:
        return Finding("ok", f"{settings.url} answers: {answer.json()['status']}")
    return Finding("bad", f"{settings.url} answers {answer.status_code}", "look into its log")


QUESTIONS: dict[str, Question] = {
    "data folder": _data,
    "database": _database,
    "trust": _trust,
    "blobs": _blobs,
    "broker": _broker,
    "api": _api,
}
"""In the order in which one part needs the other."""
