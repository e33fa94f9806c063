"""Publishes offers from their current rows.

Which rows those are stands in `unpublished`; a hello that is behind and a broker that came back put rows there again.

The row is the truth. A message is published as the row is now, whatever made it change; a crash between publishing and
marking publishes again, which changes nothing for a device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.database import Database
from wherry_server.mqtt import Acknowledged, Link
from wherry_server.times import now_us
from wherry_shared import topics
from wherry_shared.errors import UnreachableError

log = logging.getLogger(__name__)

WINDOW = 2000
"""Offers on their way to the broker at a time."""
ACKNOWLEDGED_S = 15.0
IDLE_S = 1.0
BREATH = 100
"""Offers handed to the connection before others in the process get their turn."""


class Outbox:
    """Drains one project's offers to one broker."""

    def __init__(self, database: Database, project: str, link: Link, *, idle_s: float = IDLE_S) -> None:
        """Prepare; `idle_s` is how often to look without being woken."""
        self._database = database
        self._project = project
        self._link = link
        self._idle_s = idle_s
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
                    async with asyncio.timeout(self._idle_s):
                        await self._woken.wait()
                except TimeoutError:
                    continue

    async def drain(self) -> int:
        """Publish what is not published, once through; return how many offers the broker has now that it had not.

        While one window is on its way the next is read.
        """
        total, (rows, after) = 0, await self._read("")
        while rows:
            (there, whole), (following, after) = await asyncio.gather(self._publish(rows), self._read(after))
            if there:
                async with self._database.write() as connection:
                    await _mark(connection, there)
            total += len(there)
            if not whole:
                break
            rows = following
        return total

    async def _read(self, after: str) -> tuple[list[Any], str]:
        """Return the next offers that can be published, and behind which device to look for more."""
        now = now_us()
        async with self._database.read() as connection:
            while True:
                named = {"project": self._project, "after": after, "limit": WINDOW}
                found = (await connection.execute(_WAITING, named)).all()
                if not found:
                    return [], after
                after = found[-1].device_id
                rows = [row for row in found if row.state == "active" and row.expires_at is not None]
                rows = [row for row in rows if row.expires_at > now]
                if rows:
                    return rows, after

    async def _publish(self, rows: Sequence[Any]) -> tuple[list[tuple[str, int, int]], bool]:
        """Return which of them the broker acknowledged, and whether the link took all."""
        acknowledged = Acknowledged()
        try:
            for position, row in enumerate(rows):
                topic = topics.down(row.device_id, "offer")
                self._link.publish_retained(topic, row.envelope, acknowledged, position)
                if position % BREATH == BREATH - 1:
                    await asyncio.sleep(0)
            await acknowledged.wait(ACKNOWLEDGED_S)
        except UnreachableError as error:
            log.warning("offers wait for the broker: %s", error)
        there = [rows[position] for position in sorted(acknowledged.there)]
        return [(row.device_id, row.epoch, row.serial) for row in there], len(there) == len(rows)


async def _mark(connection: AsyncConnection, there: Sequence[tuple[str, int, int]]) -> None:
    """Mark offers (device, epoch, serial) as published, where the row is still that one."""
    if connection.dialect.name == "sqlite":
        await connection.exec_driver_sql(_MARK_EACH, list(there))
    else:
        devices, epochs, serials = (list(column) for column in zip(*there, strict=True))
        await connection.exec_driver_sql(_MARK_ALL, (devices, epochs, serials))


# Looked up one by one, which is what it takes: joined, a database without fresh statistics reads the whole fleet for a window.
_WAITING = text(
    "SELECT u.device_id, u.epoch, u.serial, (SELECT d.state FROM device d WHERE d.id = u.device_id) AS state,"
    " (SELECT o.expires_at FROM offer o WHERE o.device_id = u.device_id AND o.epoch = u.epoch AND o.serial = u.serial)"
    " AS expires_at,"
    " (SELECT o.envelope FROM offer o WHERE o.device_id = u.device_id AND o.epoch = u.epoch AND o.serial = u.serial)"
    " AS envelope FROM unpublished u"
    " WHERE u.project_id = :project AND u.device_id > :after ORDER BY u.device_id LIMIT :limit"
)
_MARK_EACH = "DELETE FROM unpublished WHERE device_id = ? AND epoch = ? AND serial = ?"
_MARK_ALL = (
    "DELETE FROM unpublished AS u USING unnest($1::varchar[], $2::bigint[], $3::bigint[]) AS t (device, epoch, serial)"
    " WHERE u.device_id = t.device AND u.epoch = t.epoch AND u.serial = t.serial"
)
_AGAIN = text(
    "INSERT INTO unpublished (device_id, project_id, epoch, serial)"
    " SELECT device_id, project_id, epoch, serial FROM offer WHERE device_id IN :devices"
    " ON CONFLICT (device_id) DO UPDATE SET epoch = excluded.epoch, serial = excluded.serial"
).bindparams(bindparam("devices", expanding=True))
_ALL_AGAIN = text(
    "INSERT INTO unpublished (device_id, project_id, epoch, serial) SELECT device_id, project_id, epoch, serial FROM offer"
    " WHERE project_id = :project AND expires_at > :now"
    " ON CONFLICT (device_id) DO UPDATE SET epoch = excluded.epoch, serial = excluded.serial"
)
