"""Which blobs a device may read: those of the bundles that this server gave it, not all of its project.

A stolen device so opens the models on it and no others. What counts is the server's own word: its current offer, what its
assignments gave it, and what it had before by an earlier assignment. What a device reports that it runs counts for nothing.
The blobs of a manifest never change, so a process reads each manifest once; a request costs three indexed queries.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec
from sqlalchemy import bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.auth import DeviceIdentity
from wherry_server.blobs import Blobs, unknown
from wherry_server.db.tables import BlobEncoding, BlobOwner, Bundle, table
from wherry_server.outcomes import LIVE
from wherry_shared.bundle import parse_manifest
from wherry_shared.limits import MANIFEST_BYTES_MAX

MANIFESTS_KEPT = 1_000
"""Manifests whose digests a process keeps at hand: about 2 kB each."""
GIVEN = (*LIVE, "revert_pending")
"""Outcomes under which what an assignment gave is, or may still be, on the device."""

_owners = table(BlobOwner)
_encodings = table(BlobEncoding)
_bundles = table(Bundle)


class _Named(msgspec.Struct, frozen=True):
    """The part of an offered model that counts here."""

    manifest: str = ""


_offered = msgspec.json.Decoder(dict[str, _Named])
_OFFER = text("SELECT CAST(models AS TEXT) FROM offer WHERE device_id = :device AND project_id = :project")
_ASSIGNED = text(
    "SELECT DISTINCT a.to_manifest FROM assignment a WHERE a.device_id = :device AND a.project_id = :project"
    " AND (a.outcome IN :given OR EXISTS (SELECT 1 FROM assignment n WHERE n.device_id = a.device_id"
    " AND n.model = a.model AND n.from_manifest = a.to_manifest))"
).bindparams(bindparam("given", expanding=True))


class Readers:
    """Judges who reads what, for the one project of this process."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._named: OrderedDict[str, frozenset[str]] = OrderedDict()

    async def size(self, connection: AsyncConnection, device: DeviceIdentity, digest: str) -> int:
        """Return the length of a blob (raw or encoded) that the device may read.

        Raises:
            RefusedError: `blob_unknown`; a blob that is not for this device looks as if it did not exist.
        """
        size = await connection.scalar(
            select(_owners.c.bytes).where(_owners.c.project_id == device.project, _owners.c.digest == digest)
        )
        if size is None or not await self._may(connection, device, digest):
            raise unknown(digest)
        return int(size)

    async def info(
        self, connection: AsyncConnection, device: DeviceIdentity, digest: str
    ) -> tuple[int, list[tuple[str, str, int]]]:
        """Return length and encodings (encoding, digest, bytes) of a blob that the device may read.

        Raises:
            RefusedError: `blob_unknown`.
        """
        size = await self.size(connection, device, digest)
        rows = await connection.execute(
            select(_encodings.c.encoding, _encodings.c.encoded_digest, _encodings.c.bytes).where(
                _encodings.c.project_id == device.project,
                _encodings.c.digest == digest,
                _encodings.c.encoded_digest != digest,
            )
        )
        return size, [(row.encoding, row.encoded_digest, row.bytes) for row in rows]

    async def _may(self, connection: AsyncConnection, device: DeviceIdentity, digest: str) -> bool:
        named: set[str] = set()
        for manifest in await self._given(connection, device):
            named |= await self._blobs_of(connection, device.project, manifest)
        if digest in named:
            return True
        raws = await connection.scalars(
            select(_encodings.c.digest).where(
                _encodings.c.project_id == device.project, _encodings.c.encoded_digest == digest
            )
        )
        return any(raw in named for raw in raws)

    async def _given(self, connection: AsyncConnection, device: DeviceIdentity) -> set[str]:
        whose = {"device": device.id, "project": device.project}
        models = await connection.scalar(_OFFER, whose)
        offered = _offered.decode(models).values() if models else ()
        assigned = await connection.scalars(_ASSIGNED, {**whose, "given": list(GIVEN)})
        return {one.manifest for one in offered if one.manifest} | set(assigned)

    async def _blobs_of(self, connection: AsyncConnection, project: str, manifest: str) -> frozenset[str]:
        found = self._named.get(manifest)
        if found is None:
            accepted = select(_bundles.c.id).where(_bundles.c.project_id == project, _bundles.c.manifest == manifest)
            if await connection.scalar(accepted) is None:  # a device may be offered back what it only said it ran
                return frozenset()
            parsed = parse_manifest(await self._blobs.get(manifest, bytes_max=MANIFEST_BYTES_MAX))
            found = frozenset({manifest, parsed.config.digest, *(layer.digest for layer in parsed.layers)})
            self._named[manifest] = found
            if len(self._named) > MANIFESTS_KEPT:
                self._named.popitem(last=False)
        else:
            self._named.move_to_end(manifest)
        return found
