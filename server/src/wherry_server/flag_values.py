"""Which variant of each flag every device has now, and why: rules over its facts, below what rollouts gave it.

Worked out whenever somebody asks. A rollout gives its variant to the devices that it exposed, until it takes it back; of
several, the one that exposed the device last does. One that went back from it, or was withdrawn, has what was there before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import TextClause, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import cohorts, views
from wherry_server.db.tables import Flag as FlagRow
from wherry_server.db.tables import table
from wherry_server.flags import PREFIX, Flag, Ready, Source, ready
from wherry_server.targeting import Everything

_FLAG = table(FlagRow)
_SEEING_NOTHING: dict[str, Any] = {}


class Definitions(NamedTuple):
    """All flags of a project."""

    flags: tuple[Ready, ...] = ()
    """By name."""
    revisions: tuple[tuple[str, int], ...] = ()
    """What tells whether any has changed since."""

    def values(self, sources: dict[str, Source]) -> dict[str, Any]:
        """Return what an offer carries."""
        return {one.flag.name: one.flag.variants[sources[one.flag.name].variant] for one in self.flags}


async def definitions(connection: AsyncConnection, project: str) -> Definitions:
    """Read all flags."""
    rows = (
        await connection.execute(
            select(_FLAG.c.name, _FLAG.c.revision, _FLAG.c.definition, _FLAG.c.salt)
            .where(_FLAG.c.project_id == project)
            .order_by(_FLAG.c.name)
        )
    ).all()
    return Definitions(
        tuple(ready(msgspec.convert(row.definition, Flag), row.salt) for row in rows),
        tuple((row.name, row.revision) for row in rows),
    )


async def revisions(connection: AsyncConnection, project: str) -> tuple[tuple[str, int], ...]:
    """Return what tells whether any flag has changed."""
    rows = await connection.execute(
        select(_FLAG.c.name, _FLAG.c.revision).where(_FLAG.c.project_id == project).order_by(_FLAG.c.name)
    )
    return tuple((row.name, row.revision) for row in rows)


async def without(connection: AsyncConnection, row: Any, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the flags that devices have if what one rollout gave is taken back. `row` is the rollout's."""
    found = await definitions(connection, row.project_id)
    told = await sources(connection, row.project_id, found.flags, devices, but=row.id)
    return {device: found.values(mine) for device, mine in told.items()}


async def sources(
    connection: AsyncConnection,
    project: str,
    flags: Sequence[Ready],
    devices: Sequence[str] | None = None,
    *,
    but: str = "",
) -> dict[str, dict[str, Source]]:
    """Return device → flag → its variant.

    Args:
        connection: where.
        project: whose.
        flags: which.
        devices: of whom; of all active devices if None.
        but: id of a rollout that is thought away.
    """
    seen = frozenset().union(*(views.looks(selector) for one in flags for selector, _, _ in one.rules))
    members = await cohorts.members(connection, project, Everything(), also=seen, devices=devices)
    given = await _given(connection, project, flags, devices, but)
    return await asyncio.to_thread(_worked_out, members, flags, given)


def _worked_out(
    members: Sequence[cohorts.Member], flags: Sequence[Ready], given: dict[str, dict[str, Source]]
) -> dict[str, dict[str, Source]]:
    """Ask the rules of each flag about each device that no rollout gave a variant of it. Slow for many: in a thread."""
    found: dict[str, dict[str, Source]] = {}
    for member in members:
        view = member.view if member.view is not None else _SEEING_NOTHING
        mine = given.get(member.id, {})
        found[member.id] = {one.flag.name: mine.get(one.flag.name) or one.ruled(member.id, view) for one in flags}
    return found


async def _given(
    connection: AsyncConnection, project: str, flags: Sequence[Ready], devices: Sequence[str] | None, but: str
) -> dict[str, dict[str, Source]]:
    """Return what rollouts gave: device → flag → variant."""
    variants = {PREFIX + one.flag.name: one.flag.variants for one in flags}
    if not variants:
        return {}
    named: dict[str, Any] = {"project": project, "flags": list(variants), "but": but}
    if devices is None:
        rows = await connection.execute(_given_by(""), named)
    elif connection.dialect.name == "sqlite":
        rows = await connection.execute(
            _given_by(_IN_JSON), {**named, "devices": msgspec.json.encode(devices).decode()}
        )
    else:
        rows = await connection.execute(_given_by(_IN_ARRAY), {**named, "devices": list(devices)})
    given: dict[str, dict[str, Source]] = {}
    for row in rows:
        variant = row.to_target.partition("/")[2]
        if variant in variants[row.model]:
            flag = row.model.removeprefix(PREFIX)
            given.setdefault(row.device_id, {})[flag] = Source(variant, "rollout", row.number)
    return given


def _given_by(whom: str) -> TextClause:
    return text(_GIVEN + whom + " ORDER BY a.exposed_at, r.number").bindparams(bindparam("flags", expanding=True))


_IN_JSON = " AND a.device_id IN (SELECT value FROM json_each(:devices))"
_IN_ARRAY = " AND a.device_id = ANY(CAST(:devices AS VARCHAR[]))"
_GIVEN = (
    "SELECT a.device_id, a.model, a.to_target, r.number FROM rollout r JOIN assignment a ON a.rollout_id = r.id"
    " WHERE r.project_id = :project AND r.model IN :flags AND r.id <> :but"
    " AND (a.outcome IN ('exposed', 'confirmed', 'confirmed_idle')"
    " OR (a.outcome = 'superseded' AND r.state IN ('running', 'paused', 'done')))"
)
