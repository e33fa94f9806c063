"""Where a bundle is not offered again: devices on which it failed, and hardware on which it failed beyond the bound.

A device is in quarantine for a bundle while the last attempt that a rollout made with it there failed, nobody released it,
and no other version of the model was confirmed since. Nothing is stored for that but the assignment itself and when it was
released. Hardware is condemned (`known_bad`) as soon as the bundle failed there beyond the bound, whatever becomes of the
rollout, and cleared by an operator only; after that it takes another failure there to condemn it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, evidence, fleet
from wherry_server.db import bulk
from wherry_server.db.database import Database
from wherry_server.db.tables import AuditEntry, KnownBad, table
from wherry_server.outcomes import FAILURES
from wherry_server.plan import Plan
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError

FIRST = ("", "", "")
CLEARED, CONDEMNED = "known_bad.clear", "known_bad.condemn"
"""Actions of the audit log."""
_ENTRY = table(AuditEntry)


async def devices(
    connection: AsyncConnection,
    project: str,
    *,
    model: str = "",
    reason: str = "",
    device: str = "",
    after: tuple[str, str, str] = FIRST,
    limit: int,
) -> list[dict[str, Any]]:
    """Return the devices in quarantine, with the reason, by (device, model, manifest); those behind `after`.

    Raises:
        RefusedError: `device_unknown`.
    """
    found = (await fleet.find_device(connection, project, device)).id if device else ""
    rows = await connection.execute(
        _DEVICES,
        {
            "project": project,
            "outcomes": list(FAILURES),
            "model": model,
            "reason": reason,
            "device": found,
            **dict(zip(("after_device", "after_model", "after_manifest"), after, strict=True)),
            "limit": limit,
        },
    )
    return [dict(row) for row in rows.mappings()]


async def release(database: Database, project: str, actor: str, device: str, model: str) -> dict[str, Any]:
    """Let a device out, for every bundle of a model; what is offered there next is a new attempt.

    Raises:
        RefusedError: `device_unknown`, or `not_quarantined`.
    """
    async with database.write() as connection:
        found = await fleet.find_device(connection, project, device)
        changed = await connection.execute(
            _RELEASE, {"device": found.id, "model": model, "outcomes": list(FAILURES), "now": now_us()}
        )
        if not changed.rowcount:
            raise RefusedError(
                "not_quarantined",
                f"{found.name} is not in quarantine for {model[:64]}",
                consequence="nothing was changed",
                next_step="see who is: wherry quarantine list",
            )
        await audit.append(connection, project, actor, "quarantine.release", found.id, model=model)
    return {"device": found.id, "name": found.name, "model": model, "released": changed.rowcount}


async def hardware(connection: AsyncConnection, project: str) -> list[dict[str, Any]]:
    """Return the bundles that are known to be bad, by hardware class."""
    rows = await connection.execute(_HARDWARE, {"project": project})
    return [dict(row) for row in rows.mappings()]


async def condemnable(connection: AsyncConnection, row: Any, plan: Plan) -> dict[str, evidence.BadClass]:
    """Return the hardware on which the bundle of a rollout failed beyond the bound and that is not condemned yet."""
    bad = await evidence.bad_classes(connection, row.id, plan)
    if not bad:
        return {}
    manifests = [planned.manifest for planned in plan.targets]
    known = await evidence.known_bad(connection, row, plan)
    cleared: dict[str, int] = {}
    for one in await connection.execute(
        select(_ENTRY.c.at, _ENTRY.c.detail)
        .where(_ENTRY.c.project_id == row.project_id, _ENTRY.c.action == CLEARED, _ENTRY.c.subject.in_(manifests))
        .order_by(_ENTRY.c.id)
    ):
        cleared[str(one.detail.get("hardware_class", ""))] = one.at
    return {name: found for name, found in bad.items() if name not in known and found.at > cleared.get(name, 0)}


async def condemn(
    connection: AsyncConnection, row: Any, plan: Plan, bad: Mapping[str, evidence.BadClass], moment: int
) -> None:
    """Keep the bundle of a rollout from this hardware, inside the caller's transaction."""
    await bulk.upsert(
        connection,
        table(KnownBad),
        ("project_id", "manifest", "hardware_class", "reason", "devices", "updated_at"),
        [
            (row.project_id, planned.manifest, name, found.reason, found.devices, moment)
            for planned in plan.targets
            for name, found in bad.items()
        ],
        update=("reason", "devices", "updated_at"),
    )
    for name, found in bad.items():
        said = {"hardware_class": name, "reason": found.reason, "devices": found.devices, "rollout": row.number}
        await audit.append(connection, row.project_id, "director", CONDEMNED, plan.targets[0].manifest, **said)


async def clear(database: Database, project: str, actor: str, manifest: str, hardware_class: str) -> None:
    """Forget that a bundle is bad on a hardware class; devices on which it failed stay in quarantine.

    Raises:
        RefusedError: `not_known_bad`.
    """
    async with database.write() as connection:
        gone = await connection.execute(
            _CLEAR, {"project": project, "manifest": manifest, "hardware_class": hardware_class}
        )
        if gone.rowcount != 1:
            raise RefusedError(
                "not_known_bad",
                "that bundle is not known to be bad on that hardware",
                consequence="nothing was changed",
                next_step="see what is: wherry quarantine hardware",
            )
        await audit.append(connection, project, actor, CLEARED, manifest, hardware_class=hardware_class)


_DEVICES = text(
    "SELECT a.device_id AS device, d.name, a.model, a.to_target AS target, a.to_manifest AS manifest, a.attempt, a.outcome,"
    " a.reason, a.settled_at, r.number AS rollout FROM assignment a JOIN device d ON d.id = a.device_id"
    " JOIN rollout r ON r.id = a.rollout_id WHERE a.project_id = :project AND a.outcome IN :outcomes AND a.released_at = 0"
    " AND (:model = '' OR a.model = :model) AND (:reason = '' OR a.reason = :reason)"
    " AND (:device = '' OR a.device_id = :device) AND NOT EXISTS (SELECT 1 FROM assignment n"
    " WHERE n.device_id = a.device_id AND n.model = a.model AND n.exposed_at > a.exposed_at"
    " AND (n.to_manifest = a.to_manifest OR n.outcome IN ('confirmed', 'confirmed_idle')))"
    " AND (a.device_id, a.model, a.to_manifest) > (:after_device, :after_model, :after_manifest)"
    " ORDER BY a.device_id, a.model, a.to_manifest LIMIT :limit"
).bindparams(bindparam("outcomes", expanding=True))
_RELEASE = text(
    "UPDATE assignment SET released_at = :now WHERE device_id = :device AND model = :model AND outcome IN :outcomes"
    " AND released_at = 0"
).bindparams(bindparam("outcomes", expanding=True))
_HARDWARE = text(
    "SELECT k.manifest, k.hardware_class, k.reason, k.devices, k.updated_at, COALESCE(b.model || '/' || b.version,"
    " (SELECT max(a.to_target) FROM assignment a JOIN rollout r ON r.id = a.rollout_id"
    " WHERE r.project_id = k.project_id AND a.to_manifest = k.manifest), '') AS target FROM known_bad k LEFT JOIN bundle b ON b.project_id = k.project_id AND b.manifest = k.manifest"
    " WHERE k.project_id = :project ORDER BY k.manifest, k.hardware_class"
)
_CLEAR = text(
    "DELETE FROM known_bad WHERE project_id = :project AND manifest = :manifest AND hardware_class = :hardware_class"
)
