"""Publishes offers from their current rows.

What is not published yet goes first; a hello that is behind and a broker that came back make rows unpublished again.

The row is the truth. A message is published as the row is now, whatever made it change; a crash between publishing and
marking publishes again, which changes nothing for a device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.database import Database
from wherry_server.mqtt import Link
from wherry_server.times import now_us
from wherry_shared import topics
from wherry_shared.errors import UnreachableError

log = logging.getLogger(__name__)

WINDOW = 2000
"""Offers on their way to the broker at a time."""
ACKNOWLEDGED_S = 15.0
IDLE_S = 1.0


class Outbox:
    """Drains one project's offers to one broker."""

    def __init__(self, database: Database, project: str, link: Link) -> None:
        self._database = database
        self._project = project
        self._link = link
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look again now."""
        self._woken.set()

    async def again(self, devices: Sequence[str] | None = None) -> None:
        """Publish the offers of `devices` again, of all if None is given."""
        async with self._database.write() as connection:
            if devices is None:
                await connection.execute(_ALL_AGAIN, {"project": self._project, "now": now_us()})
            elif devices:
                await connection.execute(_AGAIN, {"devices": list(devices)})
        self.wake()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            await self._link.connected.wait()
            self._woken.clear()
            if not await self.drain():
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._woken.wait()
                except TimeoutError:
                    continue

    async def drain(self) -> int:
        """Publish a window of what is not published, mark what the broker has, and return how many that were."""
        async with self._database.read() as connection:
            rows = (
                await connection.execute(_PENDING, {"project": self._project, "limit": WINDOW, "now": now_us()})
            ).all()
        if not rows:
            return 0
        sent = []
        try:
            for row in rows:
                sent.append((row, self._link.publish_retained(topics.down(row.device_id, "offer"), row.envelope)))
            await asyncio.wait([future for _, future in sent], timeout=ACKNOWLEDGED_S)
        except UnreachableError as error:
            log.warning("offers wait for the broker: %s", error)
        there = []
        for row, future in sent:
            if future.done() and future.exception() is None:
                there.append((row.device_id, row.epoch, row.serial))
            else:
                future.cancel()
        if there:
            async with self._database.write() as connection:
                await _mark(connection, there)
        return len(there)


async def _mark(connection: AsyncConnection, there: Sequence[tuple[str, int, int]]) -> None:
    """Mark offers (device, epoch, serial) as published, where the row is still that one."""
    if connection.dialect.name == "sqlite":
        await connection.exec_driver_sql(_MARK_EACH, list(there))
    else:
        devices, epochs, serials = (list(column) for column in zip(*there, strict=True))
        await connection.exec_driver_sql(_MARK_ALL, (devices, epochs, serials))


_PENDING = text(
    "SELECT o.device_id, o.epoch, o.serial, o.envelope FROM offer o JOIN device d ON d.id = o.device_id"
    " WHERE o.published = false AND o.project_id = :project AND o.expires_at > :now AND d.state = 'active' LIMIT :limit"
)
_MARK_EACH = "UPDATE offer SET published = true WHERE device_id = ? AND epoch = ? AND serial = ?"
_MARK_ALL = (
    "UPDATE offer AS o SET published = true FROM unnest($1::varchar[], $2::bigint[], $3::bigint[]) AS t (device, epoch, serial)"
    " WHERE o.device_id = t.device AND o.epoch = t.epoch AND o.serial = t.serial"
)
_AGAIN = text("UPDATE offer SET published = false WHERE device_id IN :devices").bindparams(
    bindparam("devices", expanding=True)
)
_ALL_AGAIN = text("UPDATE offer SET published = false WHERE project_id = :project AND expires_at > :now")
