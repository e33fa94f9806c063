"""Tells other systems what happened here: every entry of the audit log as a CloudEvent, signed, and again until it arrives.

An entry is due to a webhook as soon as it is in the log, so nothing that was done goes untold, whatever was down. What did not
arrive after `TRIES_MAX` tries is dead: it is kept, listed, and sent again when an operator says so. Each is told at least once; the
id of the event tells a repetition.

Events: https://github.com/cloudevents/spec (JSON, structured). Signatures: https://www.standardwebhooks.com (HMAC-SHA256).
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import random
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit
from wherry_server.db.database import Database
from wherry_server.db.tables import AuditEntry, Webhook, WebhookDelivery, table
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name

log = logging.getLogger(__name__)

TRIES_MAX = 10
"""Of one event; with the pauses below the last one is about six hours after the first."""
PAUSE_S_FIRST = 10.0
PAUSE_S_MAX = 2 * 3_600.0
ANSWER_S = 10.0
"""How long a receiver may take to answer."""
ENTRIES_PER_TURN = 500
SENT_PER_TURN = 16
"""At the same time."""
DEAD_KEPT_US = 30 * 86_400 * 1_000_000
WEBHOOKS_MAX = 100
TYPES_MAX = 20
URL_CHARS_MAX = 500
ERROR_CHARS_MAX = 200
TYPE_PREFIX = "dev.wherry."
_SECOND_US = 1_000_000

_HOOKS, _DUE, _ENTRIES = table(Webhook), table(WebhookDelivery), table(AuditEntry)


def secret(master_key: bytes, webhook: str) -> str:
    """Return the secret with which a webhook's events are signed; it is derived, so nothing stored tells it."""
    return "whsec_" + base64.b64encode(hmac.digest(master_key, b"webhook\n" + webhook.encode(), "sha256")).decode()


def signature(secret_text: str, event: str, at_s: int, body: bytes) -> str:
    """Return the signature header of a message."""
    key = base64.b64decode(secret_text.removeprefix("whsec_"))
    return "v1," + base64.b64encode(hmac.digest(key, f"{event}.{at_s}.".encode() + body, "sha256")).decode()


def event_of(entry: Any) -> bytes:
    """Return the CloudEvent of an audit entry."""
    said = {
        "specversion": "1.0",
        "id": str(entry.id),
        "source": f"/projects/{entry.project_id}",
        "type": TYPE_PREFIX + entry.action,
        "subject": entry.subject,
        "time": datetime.fromtimestamp(entry.at / _SECOND_US, UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": {"actor": entry.actor, **entry.detail},
    }
    return msgspec.json.encode(said)


def pause_s(tries: int) -> float:
    """Return how long to wait after so many tries: doubling, with jitter, so that a receiver is not met by all at once."""
    return random.uniform(0.5, 1.0) * min(PAUSE_S_FIRST * 2.0 ** (tries - 1), PAUSE_S_MAX)  # noqa: S311  # no secret


# --- what operators do --------------------------------------------------------------------------


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
        await audit.append(connection, project, actor, "webhook.create", name, url=url, types=list(types))
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
    """Return all webhooks, with what waits and what is dead."""
    rows = (await connection.execute(select(_HOOKS).where(_HOOKS.c.project_id == project))).all()
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


async def remove(database: Database, project: str, actor: str, name: str) -> None:
    """Forget a webhook and what was due to it.

    Raises:
        RefusedError: `webhook_unknown`.
    """
    async with database.write() as connection:
        row = await _find(connection, project, name)
        await connection.execute(delete(_DUE).where(_DUE.c.webhook_id == row.id))
        await connection.execute(delete(_HOOKS).where(_HOOKS.c.id == row.id))
        await audit.append(connection, project, actor, "webhook.delete", name)


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
    return {name: getattr(row, name) for name in ("name", "url", "types", "created_at", "created_by")}


# --- what the director does ---------------------------------------------------------------------


class Postman:
    """Brings what happened to whoever wants to know."""

    def __init__(self, database: Database, project: str, master_key: bytes, http: httpx.AsyncClient) -> None:
        self._database = database
        self._project = project
        self._master_key = master_key
        self._http = http

    async def turn(self) -> int:
        """Take up what is new, send what is due, and return how many were sent."""
        await self._take_up()
        now = now_us()
        async with self._database.read() as connection:
            rows = (
                await connection.execute(
                    select(_DUE.c.webhook_id, _DUE.c.event, _DUE.c.tries, _HOOKS.c.url)
                    .join(_HOOKS, _HOOKS.c.id == _DUE.c.webhook_id)
                    .where(_DUE.c.project_id == self._project, _DUE.c.state == "waiting", _DUE.c.next_at <= now)
                    .order_by(_DUE.c.next_at, _DUE.c.event)
                    .limit(SENT_PER_TURN)
                )
            ).all()
            wanted = select(_ENTRIES).where(_ENTRIES.c.id.in_({row.event for row in rows}))
            entries = {entry.id: entry for entry in await connection.execute(wanted)}
        if not rows:
            return 0
        errors = await asyncio.gather(*(self._send(row, event_of(entries[row.event])) for row in rows))
        async with self._database.write() as connection:
            for row, error in zip(rows, errors, strict=True):
                one = (_DUE.c.webhook_id == row.webhook_id, _DUE.c.event == row.event)
                if not error:
                    await connection.execute(delete(_DUE).where(*one))
                    continue
                tries = row.tries + 1
                state = "dead" if tries >= TRIES_MAX else "waiting"
                following = now_us() + int(pause_s(tries) * _SECOND_US)
                await connection.execute(
                    update(_DUE).where(*one).values(state=state, tries=tries, next_at=following, error=error)
                )
        return len(rows)

    async def _take_up(self) -> None:
        """Note for every webhook what the log has behind its position."""
        async with self._database.read() as connection:
            hooks = (await connection.execute(select(_HOOKS).where(_HOOKS.c.project_id == self._project))).all()
            last = await connection.scalar(
                select(func.max(_ENTRIES.c.id)).where(_ENTRIES.c.project_id == self._project)
            )
        behind = [hook for hook in hooks if hook.position < (last or 0)]
        if not behind:
            return
        async with self._database.write() as connection:
            await connection.execute(
                delete(_DUE).where(_DUE.c.state == "dead", _DUE.c.created_at < now_us() - DEAD_KEPT_US)
            )
            for hook in behind:
                rows = (
                    await connection.execute(
                        select(_ENTRIES.c.id, _ENTRIES.c.action)
                        .where(_ENTRIES.c.project_id == self._project, _ENTRIES.c.id > hook.position)
                        .order_by(_ENTRIES.c.id)
                        .limit(ENTRIES_PER_TURN)
                    )
                ).all()
                moved = await connection.execute(
                    update(_HOOKS)
                    .where(_HOOKS.c.id == hook.id, _HOOKS.c.position == hook.position)
                    .values(position=rows[-1].id)
                )
                due = [row.id for row in rows if any(fnmatchcase(row.action, one) for one in hook.types)]
                if moved.rowcount == 1 and due:
                    now = now_us()
                    await connection.execute(
                        insert(WebhookDelivery),
                        [
                            {
                                "webhook_id": hook.id,
                                "event": event,
                                "project_id": self._project,
                                "state": "waiting",
                                "tries": 0,
                                "next_at": 0,
                                "error": "",
                                "created_at": now,
                            }
                            for event in due
                        ],
                    )

    async def _send(self, row: Any, body: bytes) -> str:
        """Send one event and return what went wrong; empty: it arrived."""
        at_s = now_us() // _SECOND_US
        headers = {
            "Content-Type": "application/cloudevents+json; charset=utf-8",
            "webhook-id": str(row.event),
            "webhook-timestamp": str(at_s),
            "webhook-signature": signature(secret(self._master_key, row.webhook_id), str(row.event), at_s, body),
        }
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                self._http.stream("POST", row.url, content=body, headers=headers) as answer,
            ):
                return "" if answer.is_success else f"it answered {answer.status_code}"
        except TimeoutError:
            return f"no answer within {ANSWER_S:.0f} s"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:ERROR_CHARS_MAX]
