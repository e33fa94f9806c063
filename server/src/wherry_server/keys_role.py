"""The `keys` role: opens content keys that publishers sealed for it, and wraps each for the devices that are to run the bundle.

It alone has private keys that open them, in a folder of its own (`key_ring`); of the server it needs the database, and nothing
that signs. It may be stopped for as long as nobody new needs a key: what is wrapped stays in the database, and a device keeps
what it was given. `wrap` is one pass; the process repeats it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from sqlalchemy import String, bindparam, delete, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import catalogue, cohorts
from wherry_server.content_keys import record_of
from wherry_server.db.database import Database
from wherry_server.db.tables import ContentKey, Device, WrappedKey, table
from wherry_server.jobs import for_ever, stop_on_signals, until_stopped
from wherry_server.reading import GIVEN
from wherry_server.settings import Settings
from wherry_server.targeting import parse_selector
from wherry_server.times import now_us
from wherry_shared import content_keys
from wherry_shared.errors import RefusedError
from wherry_shared.ids import split_target
from wherry_shared.key_ring import KeyRing

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the process looks whether a device lacks a key, as long as looking is cheap."""
LOOK_SHARE = 0.05
"""Of its time that looking may take: a look at a large fleet that finds nothing is repeated less often."""
AT_ONCE = 200
"""Keys that one transaction wraps."""

_sealed = table(ContentKey)
_wrapped = table(WrappedKey)
_devices = table(Device)
_LACKING = text(
    "SELECT DISTINCT d.id AS device, d.content_key AS public, k.manifest, k.blob FROM content_key k"
    " JOIN assignment a ON a.project_id = k.project_id AND a.to_manifest = k.manifest"
    " JOIN device d ON d.id = a.device_id AND d.state = 'active' AND d.content_key <> ''"
    " LEFT JOIN wrapped_key w ON w.device_id = d.id AND w.blob = k.blob AND w.public = d.content_key"
    " WHERE k.project_id = :project AND w.blob IS NULL AND k.recipient IN :ours AND k.sealed NOT IN :closed"
    " AND (a.outcome IN :given OR EXISTS (SELECT 1 FROM assignment n WHERE n.device_id = a.device_id"
    " AND n.model = a.model AND n.from_manifest = a.to_manifest))"
    " LIMIT :count"
).bindparams(*(bindparam(name, type_=String, expanding=True) for name in ("given", "ours", "closed")))
"""Devices that may read a bundle (as `reading` judges it) and lack a key for one of its blobs."""


class KeysRole:
    """Wraps content keys for one project."""

    def __init__(self, database: Database, project: str, ring: KeyRing) -> None:
        self._database = database
        self._project = project
        self._ring = ring
        self._known: dict[tuple[str, str], bytes] = {}
        """(blob, sealed) → content key, opened once in the life of the process."""
        self._closed: set[str] = set()
        """Sealed keys that did not open: said once, and not looked at again, so that others get theirs."""

    async def wrap(self) -> int:
        """Wrap what devices with an assignment lack; return how many keys were wrapped."""
        done = 0
        while True:
            async with self._database.read() as connection:
                asked = {
                    "project": self._project,
                    "given": list(GIVEN),
                    "ours": self._ring.names(),
                    "closed": sorted(self._closed),
                    "count": AT_ONCE,
                }
                lacking = (await connection.execute(_LACKING, asked)).all()
            closed = len(self._closed)
            wrapped = await self._wrap([(row.device, row.public, row.manifest, row.blob) for row in lacking])
            done += wrapped
            if len(lacking) < AT_ONCE or (not wrapped and len(self._closed) == closed):
                return done

    async def wrap_bundle(self, target: str, cohort: str = "") -> int:
        """Wrap the keys of `MODEL/VERSION` for a cohort, or for every device, before any rollout names it.

        Raises:
            RefusedError: `bundle_unknown` or `cohort_unknown`.
        """
        model, version = split_target(target)
        async with self._database.read() as connection:
            bundle = await catalogue.show_bundle(connection, self._project, model, version)
            selector = (await cohorts.find(connection, self._project, cohort))["selector"] if cohort else "all"
            devices = [one.id for one in await cohorts.members(connection, self._project, parse_selector(selector))]
        return await self.wrap_ahead(bundle["manifest"], devices)

    async def wrap_ahead(self, manifest: str, devices: Sequence[str]) -> int:
        """Wrap the keys of a bundle for devices that have no assignment yet; return how many keys were wrapped."""
        done = 0
        async with self._database.read() as connection:
            blobs = list(
                await connection.scalars(
                    select(_sealed.c.blob).where(_sealed.c.project_id == self._project, _sealed.c.manifest == manifest)
                )
            )
        for start in range(0, len(devices), AT_ONCE):
            part = devices[start : start + AT_ONCE]
            async with self._database.read() as connection:
                rows = (
                    await connection.execute(
                        select(_devices.c.id, _devices.c.content_key).where(
                            _devices.c.id.in_(part), _devices.c.state == "active", _devices.c.content_key != ""
                        )
                    )
                ).all()
                wrapped = await connection.execute(
                    select(_wrapped.c.device_id, _wrapped.c.blob, _wrapped.c.public).where(
                        _wrapped.c.device_id.in_(part)
                    )
                )
                have = {tuple(row) for row in wrapped}
            done += await self._wrap(
                [
                    (row.id, row.content_key, manifest, blob)
                    for row in rows
                    for blob in blobs
                    if (row.id, blob, row.content_key) not in have
                ]
            )
        return done

    async def reseal(self) -> int:
        """Seal what was sealed for older keys of this role for the current one; return how many were."""
        current = self._ring.current()
        name = content_keys.fingerprint(current)
        async with self._database.write() as connection:
            rows = (
                await connection.execute(
                    select(_sealed).where(
                        _sealed.c.project_id == self._project,
                        _sealed.c.recipient != name,
                        _sealed.c.recipient.in_(self._ring.names()),
                    )
                )
            ).all()
            for row in rows:
                record = record_of(row)
                key = self._ring.unseal(record)
                again = content_keys.seal(key, current, model=record.model, plain=record.plain, blob=record.blob)
                await connection.execute(
                    update(_sealed)
                    .where(
                        _sealed.c.project_id == self._project,
                        _sealed.c.manifest == row.manifest,
                        _sealed.c.blob == row.blob,
                    )
                    .values(recipient=again.recipient, sealed=again.sealed)
                )
        return len(rows)

    async def state(self) -> dict[str, int]:
        """Return how many keys are sealed for whom, by the digest of the role's key."""
        async with self._database.read() as connection:
            rows = await connection.execute(
                select(_sealed.c.recipient, func.count())
                .where(_sealed.c.project_id == self._project)
                .group_by(_sealed.c.recipient)
            )
            return {str(recipient): int(count) for recipient, count in rows}

    async def _wrap(self, wanted: Sequence[tuple[str, str, str, str]]) -> int:
        """Wrap keys: (device, its public key, manifest, blob)."""
        done = 0
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            async with self._database.write() as connection:
                for device, public, manifest, blob in part:
                    done += await self._wrap_one(connection, device, public, manifest, blob)
        return done

    async def _wrap_one(self, connection: AsyncConnection, device: str, public: str, manifest: str, blob: str) -> bool:
        row = (
            await connection.execute(
                select(_sealed).where(
                    _sealed.c.project_id == self._project, _sealed.c.manifest == manifest, _sealed.c.blob == blob
                )
            )
        ).one_or_none()
        active = await connection.scalar(
            select(_devices.c.id).where(
                _devices.c.id == device, _devices.c.state == "active", _devices.c.content_key == public
            )
        )
        if row is None or active is None:  # it was revoked, or has another key, since it was looked at
            return False
        record = record_of(row)
        which = (blob, record.sealed)
        if which not in self._known:
            try:
                self._known[which] = self._ring.unseal(record)
            except RefusedError as error:
                if record.sealed not in self._closed:
                    log.warning("%s", error)
                self._closed.add(record.sealed)
                return False
        wrapped = content_keys.seal(
            self._known[which],
            content_keys.parse_public(public),
            model=record.model,
            plain=record.plain,
            blob=blob,
            device=device,
        )
        await connection.execute(delete(_wrapped).where(_wrapped.c.device_id == device, _wrapped.c.blob == blob))
        await connection.execute(
            insert(_wrapped).values(
                device_id=device,
                blob=blob,
                project_id=self._project,
                model=record.model,
                plain=record.plain,
                public=public,
                recipient=wrapped.recipient,
                sealed=wrapped.sealed,
                created_at=now_us(),
            )
        )
        return True


def open_ring(settings: Settings) -> KeyRing:
    """Open the keys of this role, asking for their password now and not when the first device waits.

    Raises:
        RefusedError: `keys_folder_missing`, `key_absent`, `password_missing` or `password_wrong`.
        DeviceError: `key_exposed`.
    """
    if not settings.content_keys:
        raise RefusedError(
            "keys_folder_missing",
            "nobody said where the keys role keeps its keys",
            consequence="nothing was started",
            next_step="wherry keys init FOLDER, then wherry serve keys --keys FOLDER",
        )
    ring = KeyRing(Path(settings.content_keys).expanduser())
    ring.current()
    for name in ring.names():
        ring.private(name)
    return ring


def run(settings: Settings) -> None:
    """Wrap keys for a project until told to stop. It may be killed at any moment and started again.

    Raises:
        RefusedError: as `open_ring`.
    """
    ring = open_ring(settings)

    async def main() -> None:
        stopping = asyncio.Event()
        stop_on_signals(stopping)
        database = Database.open(settings.database_url)
        role = KeysRole(database, settings.project, ring)

        async def work() -> None:
            while True:
                began = time.monotonic()
                count = await role.wrap()
                if count:
                    log.info("wrapped %d keys", count)
                await asyncio.sleep(max(LOOK_S, (time.monotonic() - began) / LOOK_SHARE if not count else 0))

        log.info("wrapping content keys for project %s", settings.project)
        try:
            await until_stopped({"wrap": for_ever(work)}, stopping)
        finally:
            await database.close()

    uvloop.run(main())
