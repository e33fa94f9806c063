"""Flags as operators keep them: made, changed and deleted with an entry in the audit log; nothing here makes offers.

The director notices a change by its revision and brings every device's offer up to date (`flag_bearer`).
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, flag_values, fleet
from wherry_server.db.database import Database
from wherry_server.db.tables import Assignment, Rollout, table
from wherry_server.db.tables import Flag as FlagRow
from wherry_server.flags import PREFIX, Flag, parse_flag, ready, together
from wherry_server.outcomes import LIVE
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError

_FLAG, _ROLLOUT = table(FlagRow), table(Rollout)
_ASSIGNMENT = table(Assignment)
HOLDING = ("created", "running", "paused", "returning", "done")
"""States of rollouts in which they may give a variant to a device; halted and aborted ones give it to whom they left it."""
_GIVES = or_(
    _ROLLOUT.c.state.in_(HOLDING),
    select(_ASSIGNMENT.c.device_id)
    .where(_ASSIGNMENT.c.rollout_id == _ROLLOUT.c.id, _ASSIGNMENT.c.outcome.in_(LIVE[:3]))
    .exists(),
)
SPREAD_FRESH_S = 3.0
SPREAD_SHARE = 20
"""A count of devices is shown for SPREAD_FRESH_S, or this many times what it took if that is longer."""
SPREADS_MAX = 256
"""Flags whose counts are remembered."""
Check = Callable[[dict[str, Any]], None]


class _Spread(NamedTuple):
    """What a count found."""

    revisions: tuple[int, int, int]
    until: float
    counted: list[dict[str, Any]]


_spreads: OrderedDict[tuple[str, str], _Spread] = OrderedDict()
"""By project and flag."""


async def save(
    database: Database, project: str, actor: str, wish: Mapping[str, Any], *, replace: bool, check: Check | None = None
) -> dict[str, Any]:
    """Save a flag and return it; `check` sees the one that is replaced, and may refuse.

    Raises:
        RefusedError: as `parse_flag`; `name_taken` (without `replace`), `flag_unknown` (with it), `flag_in_use`, or
            `flags_too_large`.
    """
    flag = parse_flag(wish)
    now = now_us()
    async with database.write() as connection:
        before = await _row(connection, project, flag.name) if replace else None
        if before is not None and check is not None:
            check(public(before))
        if before is not None and _same(before.definition, msgspec.to_builtins(flag)):
            return public(before)
        await _fits(connection, project, flag)
        said: dict[str, Any] = {"after": msgspec.to_builtins(flag)}
        if before is not None:
            await _keeps_what_is_out(connection, project, before.definition, flag)
            said["before"] = before.definition
            await connection.execute(
                update(_FLAG)
                .where(_FLAG.c.project_id == project, _FLAG.c.name == flag.name)
                .values(
                    definition=msgspec.to_builtins(flag),
                    revision=before.revision + 1,
                    updated_at=now,
                    updated_by=actor,
                )
            )
        else:
            try:
                await connection.execute(
                    insert(_FLAG).values(
                        project_id=project,
                        name=flag.name,
                        definition=msgspec.to_builtins(flag),
                        salt=secrets.token_urlsafe(16),
                        revision=1,
                        created_at=now,
                        created_by=actor,
                        updated_at=now,
                        updated_by=actor,
                    )
                )
            except IntegrityError as error:
                raise RefusedError(
                    "name_taken",
                    f"there is a flag {flag.name!r} already",
                    consequence="nothing was changed",
                    next_step="change it: wherry flag set",
                ) from error
        await audit.append(connection, project, actor, "flag.change" if replace else "flag.create", flag.name, **said)
        return public(await _row(connection, project, flag.name))


async def remove(database: Database, project: str, actor: str, name: str, check: Check | None = None) -> None:
    """Delete a flag, unless `check` refuses: applications get their own defaults from then on.

    Raises:
        RefusedError: `flag_unknown` or `flag_in_use`.
    """
    async with database.write() as connection:
        row = await _row(connection, project, name)
        if check is not None:
            check(public(row))
        out = await holding(connection, project, name)
        if out:
            raise _in_use(name, "it cannot be deleted", out)
        await connection.execute(delete(_FLAG).where(_FLAG.c.project_id == project, _FLAG.c.name == name))
        await audit.append(connection, project, actor, "flag.delete", name, before=row.definition)


async def find(connection: AsyncConnection, project: str, name: str) -> dict[str, Any]:
    """Return a flag.

    Raises:
        RefusedError: `flag_unknown`.
    """
    return public(await _row(connection, project, name))


async def every(connection: AsyncConnection, project: str) -> list[dict[str, Any]]:
    """Return all flags by name."""
    rows = await connection.execute(select(_FLAG).where(_FLAG.c.project_id == project).order_by(_FLAG.c.name))
    return [public(row) for row in rows]


async def spread(connection: AsyncConnection, project: str, name: str) -> list[dict[str, Any]]:
    """Count the devices that should have each variant of a flag now, by what gives it to them.

    As long as neither the flag nor its rollouts changed, the count may be some seconds old.

    Raises:
        RefusedError: `flag_unknown`.
    """
    row = await _row(connection, project, name)
    moved = await connection.scalar(
        select(func.sum(_ROLLOUT.c.revision)).where(_ROLLOUT.c.project_id == project, _ROLLOUT.c.model == PREFIX + name)
    )
    revisions = (row.created_at, row.revision, moved or 0)
    known = _spreads.get((project, name))
    if known is not None and known.revisions == revisions and time.monotonic() < known.until:
        return known.counted
    started = time.monotonic()
    flag = ready(msgspec.convert(row.definition, Flag), row.salt)
    counted = _counted(await flag_values.sources(connection, project, [flag]), name)
    ended = time.monotonic()
    _spreads[project, name] = _Spread(revisions, ended + max(SPREAD_FRESH_S, SPREAD_SHARE * (ended - started)), counted)
    _spreads.move_to_end((project, name))
    while len(_spreads) > SPREADS_MAX:
        _spreads.popitem(last=False)
    return counted


async def preview(connection: AsyncConnection, project: str, wish: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a definition would change, without saving it: who would have which variant, and for how many that is new.

    Raises:
        RefusedError: as `parse_flag`.
    """
    flag = parse_flag(wish)
    row = (await connection.execute(_one(project, flag.name))).one_or_none()
    wanted = ready(flag, row.salt if row is not None else secrets.token_urlsafe(16))
    after = await flag_values.sources(connection, project, [wanted])
    before: dict[str, Any] = {}
    if row is not None:
        known = ready(msgspec.convert(row.definition, Flag), row.salt)
        found = await flag_values.sources(connection, project, [known])
        before = {device: known.flag.variants[mine[flag.name].variant] for device, mine in found.items()}
    values = {device: flag.variants[mine[flag.name].variant] for device, mine in after.items()}
    changed = sum(
        device not in before or msgspec.json.encode(before[device]) != msgspec.json.encode(value)
        for device, value in values.items()
    )
    return {"name": flag.name, "devices": len(after), "changed": changed, "spread": _counted(after, flag.name)}


async def explain(connection: AsyncConnection, project: str, name: str, device: str) -> dict[str, Any]:
    """Say which variant one device should have, what its current offer says, and whether the device knows that offer.

    Raises:
        RefusedError: `flag_unknown` or `device_unknown`.
    """
    row = await _row(connection, project, name)
    found = await fleet.find_device(connection, project, device)
    wanted = ready(msgspec.convert(row.definition, Flag), row.salt)
    sources = await flag_values.sources(connection, project, [wanted], [found.id])
    current = await fleet.offer_of(connection, found.id)
    flags = current.flags if current is not None else {}
    known = current is not None and (found.offer_epoch, found.offer_serial) >= (current.epoch, current.serial)
    source = sources[found.id][name] if found.id in sources else None
    return {
        "device": found.id,
        "name": found.name,
        "flag": name,
        "variant": source.variant if source is not None else "",
        "value": wanted.flag.variants[source.variant] if source is not None else None,
        "by": source.by if source is not None else "",
        "number": source.number if source is not None else 0,
        "offered": name in flags,
        "offered_value": flags.get(name),
        "known": known,
    }


def public(row: Any) -> dict[str, Any]:
    """Return a row as the API shows it."""
    return {
        "description": "",
        "rules": [],
        **row.definition,
        "revision": row.revision,
        "created_at": row.created_at,
        "created_by": row.created_by,
        "updated_at": row.updated_at,
        "updated_by": row.updated_by,
    }


async def holding(connection: AsyncConnection, project: str, name: str) -> list[Any]:
    """Return the rollouts (number, state, plan) that give, or may give, variants of a flag, newest first."""
    rows = await connection.execute(
        select(_ROLLOUT.c.number, _ROLLOUT.c.state, _ROLLOUT.c.plan)
        .where(_ROLLOUT.c.project_id == project, _ROLLOUT.c.model == PREFIX + name, _GIVES)
        .order_by(_ROLLOUT.c.number.desc())
    )
    return list(rows)


async def _keeps_what_is_out(connection: AsyncConnection, project: str, before: Mapping[str, Any], flag: Flag) -> None:
    """Refuse another value for a variant that a rollout gives: it would reach every device at once."""
    known = before["variants"]
    changed = {
        variant
        for variant, value in known.items()
        if variant not in flag.variants or not _same(value, flag.variants[variant])
    }
    if before["type"] != flag.type:
        changed |= set(known)
    if not changed:
        return
    out = [row for row in await holding(connection, project, flag.name) if row.plan.get("variant") in changed]
    if out:
        raise _in_use(flag.name, f"variant {out[0].plan['variant']!r} cannot change", out)


async def _fits(connection: AsyncConnection, project: str, flag: Flag) -> None:
    others = [
        one.flag for one in (await flag_values.definitions(connection, project)).flags if one.flag.name != flag.name
    ]
    why = together([*others, flag])
    if why:
        raise RefusedError(
            "flags_too_large",
            f"with it, one device may have {why}",
            consequence="nothing was changed",
            next_step="delete flags that nobody asks for, or make their values smaller",
        )


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same JSON: 1, 1.0 and true differ."""
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")


def _counted(found: Mapping[str, Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    counted = Counter(mine[name] for mine in found.values())
    return [
        {"variant": one.variant, "by": one.by, "number": one.number, "devices": devices}
        for one, devices in sorted(counted.items())
    ]


def _one(project: str, name: str) -> Any:
    return select(_FLAG).where(_FLAG.c.project_id == project, _FLAG.c.name == name)


async def _row(connection: AsyncConnection, project: str, name: str) -> Any:
    row = (await connection.execute(_one(project, name))).one_or_none()
    if row is None:
        raise RefusedError(
            "flag_unknown", f"there is no flag {name[:80]!r}", next_step="see them with: wherry flag list"
        )
    return row


def _in_use(name: str, what: str, out: list[Any]) -> RefusedError:
    numbers = ", ".join(f"{row.number} ({row.state})" for row in out[:5])
    order = "abort" if out[0].state == "created" else "revert"
    return RefusedError(
        "flag_in_use",
        f"flag {name}: {what} while rollouts give it: {numbers}",
        consequence="nothing was changed",
        next_step=f"take back what it gives: wherry rollout {order} {out[0].number}",
    )
