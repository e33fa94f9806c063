"""Cohorts: saved selectors, and who they take now.

Membership is worked out from facts and labels whenever somebody asks. A static cohort is a list of devices, stored once and never changed,
and a selector of those that are on it: rollouts, flags and previews know no difference. How a large fleet is read is in `views`,
when a list goes in `kept_lists`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import bindparam, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit
from wherry_server.db import bulk
from wherry_server.db.database import Database
from wherry_server.db.tables import Cohort, KeptMember, table
from wherry_server.targeting import Selector, View, matches, parse_selector
from wherry_server.times import now_us
from wherry_server.views import Judge, Seen, lists, looks
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name

_COHORT = table(Cohort)
STATIC_MAX = 200_000
"""Devices of a static cohort: so many rows are written in one transaction."""

WALK_MIN, WALK_MAX = 200, 20_000
"""Devices of one read of those that go by name; every read is larger than the one before."""
WALK_EXPECTED_MAX = 4_000
"""Where more than this would be walked over for a few names, the database looks for the combinations that count."""
COMBINATIONS_MAX = 100


class Member(NamedTuple):
    """A device that a selector takes, with what targeting needs of it."""

    id: str
    view: View | None
    """None where neither selector nor strata look at the device."""
    facts: str = ""
    """Facts as JSON text, where they were asked for."""


# --- members ------------------------------------------------------------------------------------


async def members(
    connection: AsyncConnection,
    project: str,
    selector: Selector,
    *,
    also: frozenset[str] = frozenset(),
    devices: Sequence[str] | None = None,
    facts: bool = False,
) -> list[Member]:
    """Return the active devices that a selector takes.

    Args:
        connection: where.
        project: whose.
        selector: whom.
        also: fields that the caller wants to see as well.
        devices: ids (of this project) of the only ones to look at.
        facts: whether the caller wants all facts, too.
    """
    if devices is not None:
        return await _members_of(connection, project, selector, also, devices)
    looking = bool(looks(selector) | also)
    if not looking and not matches(selector, {}):
        return []  # `not all`
    judge = await _judge(connection, project, selector, also)
    wanted = ["d.id AS member", judge.projection.expressions] if looking else ["d.id AS member"]
    if facts:
        wanted.append("CAST(d.facts AS TEXT) AS told")
    rows = await _rows(connection, project, judge, ", ".join(wanted))
    end = 1 + judge.projection.width
    if not looking:
        return [Member(row[0], None, row[-1] if facts else "") for row in rows]
    return [Member(row[0], judge.view(row[1:end]), row[-1] if facts else "") for row in rows if judge.takes(row[1:end])]


async def _members_of(
    connection: AsyncConnection, project: str, selector: Selector, also: frozenset[str], devices: Sequence[str]
) -> list[Member]:
    """Return which of a few devices a selector takes."""
    rows = await bulk.select_in(connection, _DEVICES, devices)
    fields = looks(selector) | also
    runs = await _running(connection, project) if any(field.startswith("runs.") for field in fields) else {}
    kept = await keeping(connection, lists(fields), devices)
    now = now_us()
    seen = [(row, Seen(row, runs.get(row.id, {}), now, kept.get(row.id, ()))) for row in rows]
    return [Member(row.id, view if fields else None, row.facts) for row, view in seen if matches(selector, view)]


async def count(connection: AsyncConnection, project: str, selector: Selector) -> int:
    """Count the active devices that a selector takes."""
    judge = await _judge(connection, project, selector)
    return sum(row.devices for row in await _counted(connection, project, judge) if judge.takes(row[1:]))


async def _judge(
    connection: AsyncConnection, project: str, selector: Selector, also: frozenset[str] = frozenset()
) -> Judge:
    versions: dict[str, str] = {}
    if any(field.startswith("runs.") for field in looks(selector) | also):
        versions = {row.manifest: row.version for row in await connection.execute(_VERSIONS, {"project": project})}
    return Judge(selector, versions, now_us(), also=also, sqlite=connection.dialect.name == "sqlite")


async def _counted(connection: AsyncConnection, project: str, judge: Judge) -> Iterable[Any]:
    """Count the devices of each combination of values: (devices, values…)."""
    if not judge.alike:
        return await _rows(connection, project, judge, f"1 AS devices, {judge.projection.expressions}")
    places = ", ".join(str(2 + at) for at in range(judge.projection.width))
    wanted = f"count(*) AS devices, {judge.projection.expressions}"
    return await _rows(connection, project, judge, wanted, f" GROUP BY {places}")


async def _rows(
    connection: AsyncConnection, project: str, judge: Judge, wanted: str, more: str = "", **named: Any
) -> Iterable[Any]:
    """Read the active devices; SQL is ours, what people wrote is bound."""
    joins = judge.projection.joins
    sql = f"SELECT {wanted} FROM device d{joins} WHERE d.project_id = :project AND d.state = 'active'{more}"  # noqa: S608
    statement = text(sql)
    if "combinations" in named:
        statement = statement.bindparams(bindparam("combinations", expanding=True))
    return await connection.execute(statement, {"project": project, **judge.projection.bound, **named})


async def _running(connection: AsyncConnection, project: str) -> dict[str, dict[str, str]]:
    """Return device → model → version."""
    found: dict[str, dict[str, str]] = {}
    for row in await connection.execute(_RUNS, {"project": project}):
        found.setdefault(row.device_id, {})[row.model] = row.version
    return found


async def keeping(
    connection: AsyncConnection, lists_asked: Sequence[str], devices: Sequence[str]
) -> dict[str, set[str]]:
    """Return for each of a few devices the lists, of these, that keep it."""
    found: dict[str, set[str]] = {}
    for one in lists_asked:
        for row in await bulk.select_in(connection, _KEPT, devices, list=one):
            found.setdefault(row.device_id, set()).add(one)
    return found


async def _names(
    connection: AsyncConnection, project: str, judge: Judge, combinations: Mapping[str, bool], wanted: int, share: float
) -> list[str]:
    """Return the first names of those that are taken, going through the devices by name.

    Args:
        connection: where.
        project: whose.
        judge: of what.
        combinations: what was seen of any device, and whether one with it is taken.
        wanted: how many names there are to find.
        share: of all devices that are taken.
    """
    more, named = "", dict[str, Any]()
    taken = [seen for seen, one in combinations.items() if one]
    if judge.alike and wanted > WALK_EXPECTED_MAX * share and len(taken) <= COMBINATIONS_MAX:
        more, named = f" AND {judge.projection.seen} IN :combinations", {"combinations": taken}
    names: list[str] = []
    after, batch = "", WALK_MIN
    while len(names) < wanted:
        rows = list(
            await _rows(
                connection,
                project,
                judge,
                f"d.name AS called, {judge.projection.expressions}",
                f"{more} AND d.name > :after ORDER BY d.name LIMIT :batch",
                after=after,
                batch=batch,
                **named,
            )
        )
        names += [row.called for row in rows if judge.takes(row[1:])]
        if len(rows) < batch:
            break
        after, batch = rows[-1].called, min(8 * batch, WALK_MAX)
    return names[:wanted]


_DEVICES = (
    "SELECT id, name, state, CAST(labels AS TEXT) AS labels, CAST(facts AS TEXT) AS facts, simulated, last_seen_at,"
    " enrolled_at FROM device WHERE state = 'active' AND id IN :keys"
)
_RUNS = text(
    "SELECT m.device_id, m.model, b.version FROM device_model m JOIN bundle b"
    " ON b.project_id = m.project_id AND b.manifest = m.running WHERE m.project_id = :project"
)
_KEPT = "SELECT device_id FROM kept_member WHERE list_id = :list AND device_id IN :keys"
_VERSIONS = text("SELECT manifest, version FROM bundle WHERE project_id = :project")


# --- saved cohorts ------------------------------------------------------------------------------


async def _keep(connection: AsyncConnection, project: str, selector: str) -> dict[str, Any]:
    """Store whom a selector takes now, and return what a static cohort of them has.

    Raises:
        RefusedError: `bad_selector`, or `cohort_static` for nobody, or for more than STATIC_MAX.
    """
    found = await members(connection, project, parse_selector(selector))
    if not 1 <= len(found) <= STATIC_MAX:
        raise RefusedError(
            "cohort_static",
            f"the selector takes {len(found)} devices now, a static cohort has 1 to {STATIC_MAX}",
            consequence="nothing was stored",
            next_step="give the devices a label, and save a live cohort of that",
        )
    made = secrets.token_hex(8)
    rows = [(made, member.id, project) for member in found]
    await bulk.insert_new(connection, table(KeptMember), ("list_id", "device_id", "project_id"), rows)
    return {"selector": f"kept.{made} = true", "kept": len(found), "kept_from": selector}


async def save(
    database: Database,
    project: str,
    actor: str,
    name: str,
    selector: str,
    *,
    replace: bool,
    static: bool = False,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Save a cohort and return it; `check` sees the one that is replaced, and may refuse.

    Args:
        database: where.
        project: whose.
        actor: who wants it, for the audit log.
        name: of the cohort.
        selector: whom it takes.
        replace: whether it is there already.
        static: whether it keeps whom the selector takes now, whatever becomes of them.
        check: sees what is replaced.

    Raises:
        RefusedError: `bad_name`, `bad_selector`, `cohort_static`, `name_taken` (without `replace`) or `cohort_unknown` (with it).
    """
    check_name(name, "cohort")
    parse_selector(selector)
    async with database.write() as connection:
        before: dict[str, Any] = {}
        if replace:
            now = await find(connection, project, name)
            if check is not None:
                check(now)
            before = {"before": _said(now)}
        live = {"selector": selector, "kept": 0, "kept_from": ""}
        values = await _keep(connection, project, selector) if static else live
        if replace:
            changed = await connection.execute(
                update(_COHORT).where(_COHORT.c.project_id == project, _COHORT.c.name == name).values(**values)
            )
            if changed.rowcount != 1:
                raise _unknown(name)
        else:
            try:
                await connection.execute(
                    insert(_COHORT).values(
                        project_id=project, name=name, **values, created_at=now_us(), created_by=actor
                    )
                )
            except IntegrityError as error:
                raise RefusedError(
                    "name_taken",
                    f"there is a cohort {name!r} already",
                    consequence="nothing was changed",
                    next_step="change it with PUT, or choose another name",
                ) from error
        action = "cohort.change" if replace else "cohort.create"
        await audit.append(connection, project, actor, action, name, **before, **_said(values))
        return await find(connection, project, name)


def _said(cohort: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the audit log says of a cohort."""
    return {key: cohort[key] for key in ("selector", "kept", "kept_from") if cohort[key]}


async def find(connection: AsyncConnection, project: str, name: str) -> dict[str, Any]:
    """Return a saved cohort.

    Raises:
        RefusedError: `cohort_unknown`.
    """
    row = (
        await connection.execute(select(_COHORT).where(_COHORT.c.project_id == project, _COHORT.c.name == name))
    ).one_or_none()
    if row is None:
        raise _unknown(name)
    return _public(row)


async def every(connection: AsyncConnection, project: str) -> list[dict[str, Any]]:
    """Return all saved cohorts by name."""
    rows = await connection.execute(select(_COHORT).where(_COHORT.c.project_id == project).order_by(_COHORT.c.name))
    return [_public(row) for row in rows]


async def remove(
    database: Database, project: str, actor: str, name: str, check: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Forget a cohort, unless `check` refuses. Rollouts keep the selector that they were created with.

    Raises:
        RefusedError: `cohort_unknown`.
    """
    async with database.write() as connection:
        now = await find(connection, project, name)
        if check is not None:
            check(now)
        gone = await connection.execute(delete(_COHORT).where(_COHORT.c.project_id == project, _COHORT.c.name == name))
        if gone.rowcount != 1:
            raise _unknown(name)
        await audit.append(connection, project, actor, "cohort.delete", name, before=_said(now))


async def preview(connection: AsyncConnection, project: str, selector: str, limit: int) -> dict[str, Any]:
    """Say whom a selector takes now: how many, how many of them simulated, and the first few by name."""
    judge = await _judge(connection, project, parse_selector(selector))
    everybody = devices = simulated = 0
    combinations: dict[str, bool] = {}
    for row in await _counted(connection, project, judge):
        taken = judge.takes(row[1:])
        everybody += row.devices
        combinations[row.seen] = taken or combinations.get(row.seen, False)
        if taken:
            devices += row.devices
            simulated += row.devices if row.simulated else 0
    share = devices / everybody if everybody else 0.0
    return {
        "selector": selector,
        "devices": devices,
        "simulated": simulated,
        "names": await _names(connection, project, judge, combinations, min(limit, devices), share),
    }


def _public(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "selector": row.selector,
        "kept": row.kept,
        "kept_from": row.kept_from,
        "created_at": row.created_at,
        "created_by": row.created_by,
    }


def _unknown(name: str) -> RefusedError:
    return RefusedError(
        "cohort_unknown", f"there is no cohort {name[:80]!r}", next_step="see them with: wherry cohort list"
    )
