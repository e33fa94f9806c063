"""Tells other systems what happened here: every entry of the audit log as a CloudEvent, signed, and again until it arrives.

An entry is due to a webhook as soon as it is in the log, so nothing that was done goes untold, whatever was down. Each is told at least
once; the id of the event tells a repetition. No receiver waits for another: each always has room for one delivery under way, and for
a few more while the whole is not busy. A receiver that fails is left alone for a pause that grows, then asked with one event; each
failure is a try of everything that waits for it. What did not arrive after `TRIES_MAX` tries is dead: it is kept, listed, and sent
again when an operator says so.

Events: https://github.com/cloudevents/spec (JSON, structured). Signatures: https://www.standardwebhooks.com (HMAC-SHA256).
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import random
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import httpx
import msgspec
from sqlalchemy import case, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.database import Database
from wherry_server.db.tables import AuditEntry, Webhook, WebhookDelivery, table
from wherry_server.times import now_us
from wherry_server.webhooks import WEBHOOKS_MAX, secret

log = logging.getLogger(__name__)

TRIES_MAX = 10
"""Of one event; with the pauses below the last one is about six hours after the first."""
PAUSE_S_FIRST = 10.0
PAUSE_S_MAX = 2 * 3_600.0
ANSWER_S = 10.0
"""How long a receiver may take to answer."""
ENTRIES_PER_TURN = 500
UNDER_WAY_PER_RECEIVER = 4
"""Deliveries at the same time to one webhook; one where it failed last, or where what all share is taken."""
SHARED_MAX = 28
"""Deliveries at the same time beyond the first to each webhook."""
UNDER_WAY_MAX = WEBHOOKS_MAX + SHARED_MAX
TURN_S = 1.0
"""A turn waits so long for what is under way, then looks for what is new."""
DEAD_KEPT_US = 30 * 86_400 * 1_000_000
ERROR_CHARS_MAX = 200
TYPE_PREFIX = "dev.wherry."
_SECOND_US = 1_000_000

_HOOKS, _DUE, _ENTRIES = table(Webhook), table(WebhookDelivery), table(AuditEntry)


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
    return random.uniform(0.5, 1.0) * min(PAUSE_S_FIRST * 2.0 ** min(tries - 1, 32), PAUSE_S_MAX)  # noqa: S311  # no secret


def room(receiver: str, under_way: Counter[str], failures: int) -> int:
    """Return how many deliveries to a receiver may begin beside what is under way: none of them ever lacks room for one."""
    mine = under_way[receiver]
    shared = SHARED_MAX - sum(many - 1 for many in under_way.values() if many)
    most = 1 if failures else min(UNDER_WAY_PER_RECEIVER, max(mine, 1) + shared)
    return max(0, most - mine)


@dataclass(frozen=True, slots=True)
class Sent:
    """A delivery under way, or ended."""

    webhook: str
    event: int
    tries: int
    """Before this one."""
    began: int


def _went_wrong(task: asyncio.Task[str]) -> str:
    """Return why a delivery did not arrive; empty: it did. A fault of our own is one more reason to send it again."""
    fault = task.exception()
    if fault is None:
        return task.result()
    log.error("a delivery failed by a fault of this server", exc_info=fault)
    return f"{type(fault).__name__}: {fault}"[:ERROR_CHARS_MAX]


class Postman:
    """Brings what happened to whoever wants to know."""

    def __init__(self, database: Database, project: str, master_key: bytes, http: httpx.AsyncClient) -> None:
        self._database = database
        self._project = project
        self._master_key = master_key
        self._http = http
        self._under_way: dict[asyncio.Task[str], Sent] = {}

    async def turn(self) -> bool:
        """Take up what is new, begin what is due, note what ended; tell whether there was, or is, anything to send."""
        await self._take_up()
        await self._begin()
        if not self._under_way:
            return False
        await asyncio.wait(self._under_way, timeout=TURN_S, return_when=asyncio.FIRST_COMPLETED)
        await self._note()
        return True

    async def rest(self) -> None:
        """Break off what is under way: another one sends it."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        self._under_way.clear()

    async def _begin(self) -> None:
        """Begin deliveries that are due, as many as there is room for; whoever has fewest under way comes first.

        What waits longest is sent first, so an event that its receiver always refuses stands behind those that it would take.
        """
        now, taken = now_us(), Counter(sent.webhook for sent in self._under_way.values())
        begun: list[tuple[Any, Any]] = []
        async with self._database.read() as connection:
            hooks = await connection.execute(
                select(_HOOKS).where(_HOOKS.c.project_id == self._project, _HOOKS.c.open_at <= now)
            )
            for hook in sorted(hooks, key=lambda one: taken[one.id]):
                free = room(hook.id, taken, hook.failures)
                if not free:
                    continue
                sending = [sent.event for sent in self._under_way.values() if sent.webhook == hook.id]
                rows = await connection.execute(
                    select(_DUE.c.tries, _ENTRIES)
                    .join(_ENTRIES, _ENTRIES.c.id == _DUE.c.event)
                    .where(_DUE.c.webhook_id == hook.id, _DUE.c.state == "waiting", _DUE.c.next_at <= now)
                    .where(_DUE.c.event.not_in(sending))
                    .order_by(_DUE.c.next_at, _DUE.c.event)
                    .limit(free)
                )
                found = rows.all()
                taken[hook.id] += len(found)
                begun += ((hook, row) for row in found)
        for hook, row in begun:
            sent = Sent(hook.id, row.id, row.tries, now_us())
            self._under_way[asyncio.create_task(self._send(hook, row.id, event_of(row)))] = sent

    async def _note(self) -> None:
        """Write down what ended. What cannot be written is written in the next turn, so the rows stay what they were till then."""
        ended = [(task, sent) for task, sent in self._under_way.items() if task.done()]
        if not ended:
            return
        async with self._database.write() as connection:
            arrived = {sent.webhook for task, sent in ended if not _went_wrong(task)}
            for task, sent in ended:
                one = (_DUE.c.webhook_id == sent.webhook, _DUE.c.event == sent.event)
                if error := _went_wrong(task):
                    await self._failed(connection, sent, error, alive=sent.webhook in arrived)
                else:
                    await connection.execute(delete(_DUE).where(*one))
            if arrived:
                await connection.execute(
                    update(_HOOKS).where(_HOOKS.c.id.in_(arrived), _HOOKS.c.failures > 0).values(failures=0, open_at=0)
                )
        for task, _ in ended:
            del self._under_way[task]

    async def _failed(self, connection: AsyncConnection, sent: Sent, error: str, *, alive: bool) -> None:
        """Have the event wait, and its receiver too, unless another event arrived meanwhile or this failure was noted already.

        A receiver's failure is a try of all that waits for it; what began before the receiver was left alone is not a second one.
        """
        following = now_us() + int(pause_s(sent.tries + 1) * _SECOND_US)
        tried = {"tries": _DUE.c.tries + 1, "error": error}
        tried["state"] = case((_DUE.c.tries + 1 >= TRIES_MAX, "dead"), else_="waiting")
        mine = (_DUE.c.webhook_id == sent.webhook, _DUE.c.state == "waiting")
        hook = (await connection.execute(select(_HOOKS).where(_HOOKS.c.id == sent.webhook))).one_or_none()
        if hook is None:
            return  # forgotten meanwhile, and its rows with it
        if not alive and sent.began >= hook.open_at:
            shut = now_us() + int(pause_s(hook.failures + 1) * _SECOND_US)
            await connection.execute(
                update(_HOOKS).where(_HOOKS.c.id == hook.id).values(failures=hook.failures + 1, open_at=shut)
            )
            waits = (_DUE.c.next_at <= sent.began, _DUE.c.event != sent.event)
            await connection.execute(update(_DUE).where(*mine, *waits).values(tried))
        await connection.execute(
            update(_DUE)
            .where(*mine, _DUE.c.event == sent.event, _DUE.c.tries == sent.tries)
            .values({**tried, "next_at": following})
        )

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
                await self._take_up_for(connection, hook)

    async def _take_up_for(self, connection: AsyncConnection, hook: Any) -> None:
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
            await connection.execute(insert(WebhookDelivery), [self._due(hook.id, event) for event in due])

    def _due(self, webhook: str, event: int) -> dict[str, Any]:
        made = {"webhook_id": webhook, "event": event, "project_id": self._project, "created_at": now_us()}
        return {**made, "state": "waiting", "tries": 0, "next_at": made["created_at"], "error": ""}

    async def _send(self, hook: Any, event: int, body: bytes) -> str:
        """Send one event and return what went wrong; empty: it arrived."""
        at_s = now_us() // _SECOND_US
        headers = {
            "Content-Type": "application/cloudevents+json; charset=utf-8",
            "webhook-id": str(event),
            "webhook-timestamp": str(at_s),
            "webhook-signature": signature(secret(self._master_key, hook.id), str(event), at_s, body),
        }
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                self._http.stream("POST", hook.url, content=body, headers=headers) as answer,
            ):
                return "" if answer.is_success else f"it answered {answer.status_code}"
        except TimeoutError:
            return f"no answer within {ANSWER_S:.0f} s"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:ERROR_CHARS_MAX]
