"""Cohorts: saved selectors, and who they take now.

Membership is live: it is worked out from facts and labels whenever somebody asks, and stored nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit
from wherry_server.db import bulk
from wherry_server.db.database import Database
from wherry_server.db.tables import Cohort, table
from wherry_server.targeting import And, Compare, Everything, Not, Or, Selector, Value, View, matches, parse_selector
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name

_COHORT = table(Cohort)
SECOND_US = 1_000_000
STATIC_MAX = 80
"""Devices of a static cohort: their ids are its selector, which has 2,000 characters."""


class Member(NamedTuple):
    """A device that a selector takes, with what targeting needs of it."""

    id: str
    view: View | None
    """None where neither selector nor strata look at the device."""
    facts: str
    """Facts as JSON text."""


# --- views --------------------------------------------------------------------------------------


class Seen(Mapping[str, Value | Sequence[str]]):
    """What selectors see of a device row (`id, name, state, labels, facts, simulated, last_seen_at, enrolled_at`).

    A field is worked out when somebody looks at it: most selectors look at two, of thousands of devices.
    Labels that an operator set win over those that the device reports about itself.
    """

    __slots__ = ("_facts", "_now", "_row", "_runs")

    def __init__(self, row: Any, runs: Mapping[str, str], now: int) -> None:
        self._row, self._runs, self._now = row, runs, now
        self._facts: dict[str, Any] | None = None

    def __getitem__(self, field: str) -> Value | Sequence[str]:
        """Return a field.

        Raises:
            KeyError: the device does not have it.
        """
        found: Value | Sequence[str] | None = self.get(field)
        if found is None:
            raise KeyError(field)
        return found

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field, or `default`."""
        if field in _OF_ROW:
            return getattr(self._row, field)
        family, dot, rest = field.partition(".")
        found = self._in_family(family, rest) if dot else self._plain(field)
        return default if found is None else found

    def __iter__(self) -> Iterator[str]:
        """Name the fields that the device has."""
        named = [*_OF_ROW, *_PLAIN, *(f"{family}.{rest}" for family in _IN_FAMILIES for rest in self._members(family))]
        return (field for field in named if self.get(field) is not None)

    def __len__(self) -> int:
        """Count the fields that the device has."""
        return sum(1 for _ in self)

    def _plain(self, field: str) -> Any:
        row, facts = self._row, self.facts
        if field in _TEXTS:
            value = facts.get(field)
            return value if isinstance(value, str) and value else None
        if field in _NUMBERS:
            value = facts.get(field)
            return value if isinstance(value, int) else None
        match field:
            case "simulated":
                return "true" if row.simulated else "false"
            case "enrolled":
                return (self._now - row.enrolled_at) // SECOND_US
            case "last_seen":
                return (self._now - row.last_seen_at) // SECOND_US if row.last_seen_at else None
            case "cpu_feature":
                return [str(feature) for feature in facts.get("cpu_features") or []]
            case "engine":
                return [str(engine.get("name")) for engine in self._engines()]
            case _:
                return None

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the device; none if they are not an object."""
        if self._facts is None:
            found = _decoded(self._row.facts)
            self._facts = found if isinstance(found, dict) else {}
        return self._facts

    def _engines(self) -> list[dict[str, Any]]:
        return [engine for engine in self.facts.get("engines") or [] if isinstance(engine, dict)]

    def _engine(self, name: str) -> str | None:
        return next(
            (str(one.get("version")) for one in reversed(self._engines()) if str(one.get("name")) == name), None
        )

    def _label(self, name: str) -> str | None:
        for labels in (_decoded(self._row.labels), self.facts.get("labels")):
            if labels and name in labels:
                return str(labels[name])
        return None

    def _in_family(self, family: str, rest: str) -> str | None:
        match family:
            case "engine":
                return self._engine(rest)
            case "label":
                return self._label(rest)
            case "runs":
                return self._runs.get(rest)
            case _:
                return None

    def _members(self, family: str) -> Iterable[str]:
        if family == "label":
            return {**(self.facts.get("labels") or {}), **(_decoded(self._row.labels) or {})}
        return self._runs if family == "runs" else [str(one.get("name")) for one in self._engines()]


def _decoded(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, str) else value


_OF_ROW = ("id", "name", "state")
_TEXTS = ("arch", "os", "python", "agent", "cpu_model", "accelerator", "timezone")
_NUMBERS = ("cores", "memory_bytes", "disk_free_bytes")
_PLAIN = (*_TEXTS, *_NUMBERS, "simulated", "enrolled", "last_seen", "cpu_feature", "engine")
_IN_FAMILIES = ("engine", "label", "runs")


def looks(selector: Selector) -> set[str]:
    """Return the fields that a selector looks at."""
    match selector:
        case Everything():
            return set()
        case Compare(field=field):
            return {field}
        case Not(inner=inner):
            return looks(inner)
        case And(parts=parts) | Or(parts=parts):
            return set().union(*(looks(part) for part in parts))


async def members(
    connection: AsyncConnection,
    project: str,
    selector: Selector,
    *,
    also: frozenset[str] = frozenset(),
    devices: Sequence[str] | None = None,
) -> list[Member]:
    """Return the active devices that a selector takes.

    Args:
        connection: where.
        project: whose.
        selector: whom.
        also: fields that the caller wants to see as well.
        devices: ids (of this project) of the only ones to look at.
    """
    fields = looks(selector) | also
    rows: Iterable[Any]
    if devices is None:
        rows = await connection.execute(text(_DEVICES + _OF_PROJECT), {"project": project})
    else:
        rows = await bulk.select_in(connection, _DEVICES + _NAMED, devices)
    if not fields:
        return [Member(row.id, None, row.facts) for row in rows]
    runs: dict[str, dict[str, str]] = {}
    if any(field.startswith("runs.") for field in fields):
        for run in await connection.execute(_RUNS, {"project": project}):
            runs.setdefault(run.device_id, {})[run.model] = run.version
    now = now_us()
    found = []
    for row in rows:
        seen = Seen(row, runs.get(row.id, {}), now)
        if matches(selector, seen):
            found.append(Member(row.id, seen, row.facts))
    return found


_DEVICES = (
    "SELECT id, name, state, CAST(labels AS TEXT) AS labels, CAST(facts AS TEXT) AS facts, simulated, last_seen_at,"
    " enrolled_at FROM device WHERE state = 'active'"
)
_OF_PROJECT, _NAMED = " AND project_id = :project", " AND id IN :keys"
_RUNS = text(
    "SELECT m.device_id, m.model, b.version FROM device_model m JOIN bundle b"
    " ON b.project_id = m.project_id AND b.manifest = m.running WHERE m.project_id = :project"
)


# --- saved cohorts ------------------------------------------------------------------------------


async def frozen(connection: AsyncConnection, project: str, selector: str) -> str:
    """Return the selector of exactly those devices that `selector` takes now.

    Raises:
        RefusedError: `bad_selector`, or `cohort_static` for nobody, or for more than STATIC_MAX.
    """
    found = await members(connection, project, parse_selector(selector))
    if not 1 <= len(found) <= STATIC_MAX:
        raise RefusedError(
            "cohort_static",
            f"the selector takes {len(found)} devices now, a static cohort has 1 to {STATIC_MAX}",
            consequence="nothing was stored",
            next_step="give the devices a label, and save a cohort of that",
        )
    return f"id in ({', '.join(sorted(member.id for member in found))})"


async def save(
    database: Database,
    project: str,
    actor: str,
    name: str,
    selector: str,
    *,
    replace: bool,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Save a cohort and return it; `check` sees the one that is replaced, and may refuse.

    Raises:
        RefusedError: `bad_name`, `bad_selector`, `name_taken` (without `replace`) or `cohort_unknown` (with it).
    """
    check_name(name, "cohort")
    parse_selector(selector)
    async with database.write() as connection:
        if replace:
            if check is not None:
                check(await find(connection, project, name))
            changed = await connection.execute(
                update(_COHORT).where(_COHORT.c.project_id == project, _COHORT.c.name == name).values(selector=selector)
            )
            if changed.rowcount != 1:
                raise _unknown(name)
        else:
            try:
                await connection.execute(
                    insert(_COHORT).values(
                        project_id=project, name=name, selector=selector, created_at=now_us(), created_by=actor
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
        await audit.append(connection, project, actor, action, name, selector=selector)
        return await find(connection, project, name)


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
        if check is not None:
            check(await find(connection, project, name))
        gone = await connection.execute(delete(_COHORT).where(_COHORT.c.project_id == project, _COHORT.c.name == name))
        if gone.rowcount != 1:
            raise _unknown(name)
        await audit.append(connection, project, actor, "cohort.delete", name)


async def preview(connection: AsyncConnection, project: str, selector: str, limit: int) -> dict[str, Any]:
    """Say whom a selector takes now: how many, how many of them simulated, and the first few by name."""
    found = await members(connection, project, parse_selector(selector), also=frozenset({"name"}))
    views = [member.view for member in found if member.view is not None]
    names = sorted(str(seen["name"]) for seen in views)
    return {
        "selector": selector,
        "devices": len(found),
        "simulated": sum(seen["simulated"] == "true" for seen in views),
        "names": names[:limit],
    }


def _public(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "selector": row.selector,
        "created_at": row.created_at,
        "created_by": row.created_by,
    }


def _unknown(name: str) -> RefusedError:
    return RefusedError(
        "cohort_unknown", f"there is no cohort {name[:80]!r}", next_step="see them with: wherry cohort list"
    )
