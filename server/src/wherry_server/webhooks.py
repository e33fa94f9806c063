"""Webhooks as operators keep them: which other systems are told what the audit log says, and what has not arrived.

`postman` brings it to them.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit
from wherry_server.db.database import Database
from wherry_server.db.tables import AuditEntry, Webhook, WebhookDelivery, table
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name

WEBHOOKS_MAX = 100
TYPES_MAX = 20
URL_CHARS_MAX = 500

_HOOKS, _DUE, _ENTRIES = table(Webhook), table(WebhookDelivery), table(AuditEntry)


def secret(master_key: bytes, webhook: str) -> str:
    """Return the secret with which a webhook's events are signed; it is derived, so nothing stored tells it."""
    return "whsec_" + base64.b64encode(hmac.digest(master_key, b"webhook\n" + webhook.encode(), "sha256")).decode()


async def create(
    database: Database, project: str, master_key: bytes, actor: str, name: str, url: str, types: Sequence[str]
) -> dict[str, Any]:
    """Make a webhook that is told what happens from now on, and return it with its secret, this once.

    Raises:
        RefusedError: `bad_name`, `webhook_invalid` or `name_taken`.
    """
    check_name(name, "webhook")
    _check(url, types)
    made = secrets.token_hex(8)
    async with database.write() as connection:
        there = (await connection.execute(select(_HOOKS.c.name).where(_HOOKS.c.project_id == project))).scalars().all()
        if name in there:
            raise RefusedError("name_taken", f"there is a webhook {name!r} already", consequence="nothing was changed")
        if len(there) >= WEBHOOKS_MAX:
            raise RefusedError("webhook_invalid", f"there are {WEBHOOKS_MAX} webhooks already")
        await audit.append(
            connection, project, actor, "webhook.create", name, url=without_secrets(url), types=list(types)
        )
        last = await connection.scalar(select(func.max(_ENTRIES.c.id)).where(_ENTRIES.c.project_id == project))
        await connection.execute(
            insert(Webhook).values(
                id=made,
                project_id=project,
                name=name,
                url=url,
                types=list(types),
                position=last or 0,
                created_at=now_us(),
                created_by=actor,
            )
        )
        row = await _find(connection, project, name)
    return {**_public(row), "secret": secret(master_key, made)}


def _check(url: str, types: Sequence[str]) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        good = good and url.isascii() and url.isprintable() and " " not in url and (parts.port or 1) > 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        good = False
    if not good or len(url) > URL_CHARS_MAX:
        raise RefusedError("webhook_invalid", "url is no http or https address", consequence="nothing was stored")
    if not 1 <= len(types) <= TYPES_MAX or not all(1 <= len(one) <= 64 and one.isprintable() for one in types):
        raise RefusedError(
            "webhook_invalid", f"types are 1 to {TYPES_MAX} patterns", next_step='such as "rollout.*", or "*" for all'
        )


async def every(connection: AsyncConnection, project: str) -> list[dict[str, Any]]:
    """Return all webhooks, with what waits and what is dead, and how their receivers fare."""
    rows = (await connection.execute(select(_HOOKS).where(_HOOKS.c.project_id == project))).all()
    return await _counted(connection, project, rows)


async def find(connection: AsyncConnection, project: str, name: str) -> dict[str, Any]:
    """Return one of them.

    Raises:
        RefusedError: `webhook_unknown`.
    """
    (found,) = await _counted(connection, project, [await _find(connection, project, name)])
    return found


def without_secrets(url: str) -> str:
    """Return an address that anybody may read: scheme and host, since chat services put the secret into what follows."""
    parts = urlsplit(url)
    rest = parts.path.strip("/") or parts.query or parts.fragment
    return f"{parts.scheme}://{parts.netloc}/{'…' if rest else ''}"


def definition(webhook: Mapping[str, Any]) -> dict[str, Any]:
    """Return what operators say of a webhook, without how it fares."""
    return {name: webhook[name] for name in ("name", "url", "types", "created_at", "created_by")}


async def _counted(connection: AsyncConnection, project: str, rows: Sequence[Any]) -> list[dict[str, Any]]:
    counted = await connection.execute(
        select(_DUE.c.webhook_id, _DUE.c.state, func.count().label("many"))
        .where(_DUE.c.project_id == project)
        .group_by(_DUE.c.webhook_id, _DUE.c.state)
    )
    counts = {(row.webhook_id, row.state): row.many for row in counted}
    return [
        {**_public(row), "waiting": counts.get((row.id, "waiting"), 0), "dead": counts.get((row.id, "dead"), 0)}
        for row in rows
    ]


async def change(
    database: Database,
    project: str,
    actor: str,
    name: str,
    url: str,
    types: Sequence[str],
    *,
    check: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Give a webhook another address and other types, and have its receiver asked at once.

    Raises:
        RefusedError: `webhook_unknown`, `webhook_invalid`, or what `check` raises of what is there.
    """
    _check(url, types)
    async with database.write() as connection:
        row = await _find(connection, project, name)
        check(_public(row))
        if (row.url, row.types) != (url, list(types)):
            values = {"url": url, "types": list(types), "failures": 0, "open_at": 0}
            await connection.execute(update(_HOOKS).where(_HOOKS.c.id == row.id).values(values))
            before = {"url": without_secrets(row.url), "types": row.types}
            after = {"url": without_secrets(url), "types": list(types), "moved": row.url != url}
            await audit.append(connection, project, actor, "webhook.change", name, before=before, **after)
        return await find(connection, project, name)


async def remove(
    database: Database,
    project: str,
    actor: str,
    name: str,
    *,
    check: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Forget a webhook and what was due to it.

    Raises:
        RefusedError: `webhook_unknown`, or what `check` raises of what is there.
    """
    async with database.write() as connection:
        row = await _find(connection, project, name)
        check(_public(row))
        await connection.execute(delete(_DUE).where(_DUE.c.webhook_id == row.id))
        await connection.execute(delete(_HOOKS).where(_HOOKS.c.id == row.id))
        await audit.append(
            connection,
            project,
            actor,
            "webhook.delete",
            name,
            before={"url": without_secrets(row.url), "types": row.types},
        )


async def deliveries(connection: AsyncConnection, project: str, name: str, state: str) -> list[dict[str, Any]]:
    """Return what has not arrived at a webhook, the oldest first.

    Raises:
        RefusedError: `webhook_unknown`.
    """
    row = await _find(connection, project, name)
    wanted = select(_DUE).where(_DUE.c.webhook_id == row.id).order_by(_DUE.c.event)
    if state:
        wanted = wanted.where(_DUE.c.state == state)
    return [
        {
            "event": one.event,
            "state": one.state,
            "tries": one.tries,
            "next_at": one.next_at,
            "error": one.error,
            "created_at": one.created_at,
        }
        for one in await connection.execute(wanted)
    ]


async def redeliver(database: Database, project: str, actor: str, name: str, event: int) -> None:
    """Send what did not arrive once more, now, with as many tries as the first time.

    Raises:
        RefusedError: `webhook_unknown` or `delivery_unknown`.
    """
    async with database.write() as connection:
        row = await _find(connection, project, name)
        found = await connection.execute(
            update(_DUE)
            .where(_DUE.c.webhook_id == row.id, _DUE.c.event == event)
            .values(state="waiting", tries=0, next_at=0)
        )
        if found.rowcount != 1:
            raise RefusedError("delivery_unknown", f"event {event} does not wait for {name}, or has arrived")
        await connection.execute(update(_HOOKS).where(_HOOKS.c.id == row.id).values(open_at=0))
        await audit.append(connection, project, actor, "webhook.redeliver", name, event=event)


async def _find(connection: AsyncConnection, project: str, name: str) -> Any:
    row = (
        await connection.execute(select(_HOOKS).where(_HOOKS.c.project_id == project, _HOOKS.c.name == name))
    ).one_or_none()
    if row is None:
        raise RefusedError(
            "webhook_unknown", f"there is no webhook {name[:80]!r}", next_step="see them with: wherry webhook list"
        )
    return row


def _public(row: Any) -> dict[str, Any]:
    told = ("name", "url", "types", "created_at", "created_by", "failures", "open_at")
    return {name: getattr(row, name) for name in told}
