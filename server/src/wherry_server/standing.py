"""Where the devices of a rollout stand: all that it exposed as a list, or one, also where it was not exposed, and why.

A device that was exposed is in the state that the engine counts it in (`evidence`): its outcome, or `pending`, `silent` and
`late` until it has one. Any other is told by what keeps it out: its key, its window, another rollout, what failed on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import evidence, fleet, rollouts
from wherry_server.db import bulk
from wherry_server.outcomes import Standing
from wherry_server.plan import Plan, parse_plan
from wherry_server.rollout import reach
from wherry_server.targeting import exposed, key_of
from wherry_server.times import now_us
from wherry_shared.clock import MICROSECONDS

_SHOWN = ("state", "stage", "reason", "attempt", "exposed_at", "noticed_at", "settled_at", "last_seen_at")


async def devices(
    connection: AsyncConnection,
    project: str,
    number: int,
    *,
    state: Standing | None = None,
    stage: int | None = None,
    after: str = "",
    limit: int,
) -> list[dict[str, Any]]:
    """Return the devices that a rollout exposed, by id; those behind `after`, of one state or stage (from 1) if told.

    Raises:
        RefusedError: `rollout_unknown`.
    """
    row = await rollouts.find(connection, project, number)
    plan, now = parse_plan(row.plan), now_us()
    named = {
        **_deadlines(row.id, plan, now),
        "state": state or "",
        "stage": -1 if stage is None else stage - 1,
        "after": after,
        "limit": limit,
    }
    windowed = plan.window is not None and state in (None, "pending", "late")
    if windowed:  # who waits for its window is told from who is late below
        named["state"] = ""
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        rows = (await connection.execute(_DEVICES, named)).all()
        waits = await _waits(connection, plan, rows, now) if windowed else frozenset()
        shown = [{"device": one.device_id, "name": one.name, **_shown(one, waits)} for one in rows]
        found += [one for one in shown if state in (None, one["state"])]
        if len(rows) < limit:
            break
        named["after"] = rows[-1].device_id
    return found[:limit]


async def device(connection: AsyncConnection, row: Any, plan: Plan, name: str) -> dict[str, Any]:
    """Return where a device stands in a rollout (`row`), as a `code` with what belongs to it.

    Raises:
        RefusedError: `device_unknown`.
    """
    found = await fleet.find_device(connection, row.project_id, name)
    progress = evidence.load_progress(row.progress)
    key, now = key_of(row.salt, found.id), now_us()
    said: dict[str, Any] = {"device": found.id, "name": found.name, "share_key": f"{key:016x}", "cut_off": None}
    assigned = (await connection.execute(_DEVICE, {**_deadlines(row.id, plan, now), "device": found.id})).one_or_none()
    if assigned is not None:
        shown = _shown(assigned, await _waits(connection, plan, [assigned], now))
        return {**said, "code": shown.pop("state"), **shown, **await _more(connection, row, plan, assigned, now)}
    scan = await evidence.scan(connection, row, plan)
    one = next((one for one in (*scan.held, *scan.free) if one.device == found.id), None)
    if one is None:
        return {**said, "code": "not_member"}
    at = progress.cut_offs.get(one.stratum)
    said |= {"stratum": one.stratum, "cut_off": f"{at:016x}" if at is not None else None}
    held = await evidence.held_by(connection, row, plan, found.id)
    if held is not None:
        return {**said, **held}
    if progress.stage < 0 or not exposed(key, one.stratum, progress.cut_offs, reach(plan, progress)):
        return {**said, "code": "ahead"}
    if plan.window is not None and not plan.window.open_at(now, one.timezone):
        return {**said, "code": "window", "timezone": one.timezone}
    return {**said, "code": "next"}


def _deadlines(rollout: str, plan: Plan, now: int) -> dict[str, Any]:
    return {"rollout": rollout, "silent": now - plan.silent_s * MICROSECONDS, "late": now - plan.late_s * MICROSECONDS}


async def _waits(connection: AsyncConnection, plan: Plan, rows: Sequence[Any], now: int) -> frozenset[str]:
    """Return the devices that would be late if their windows never shut, and are not."""
    if plan.window is None:
        return frozenset()
    late = {row.device_id: row.noticed_at for row in rows if row.state == "late"}
    facts = await bulk.select_in(connection, _FACTS, list(late))
    return frozenset(
        one.id
        for one in facts
        if not plan.window.open_for(plan.late_s, late[one.id], now, evidence.timezone_of(one.facts))
    )


def _shown(row: Any, waits: frozenset[str]) -> dict[str, Any]:
    state = "pending" if row.device_id in waits else row.state
    return {**{name: getattr(row, name) for name in _SHOWN}, "stage": row.stage + 1, "state": state}


async def _more(connection: AsyncConnection, row: Any, plan: Plan, assigned: Any, now: int) -> dict[str, Any]:
    """Return what there is to say of an assigned device beside its state: its deadline, or who took it over."""
    if assigned.state == "pending":
        if assigned.noticed_at and plan.window is not None:
            return {}  # when it is late depends on when its window is open
        if not assigned.noticed_at:
            return {"silent_in_s": max(plan.silent_s - (now - assigned.exposed_at) // MICROSECONDS, 0)}
        return {"late_in_s": max(plan.late_s - (now - assigned.noticed_at) // MICROSECONDS, 0)}
    if assigned.state == "superseded":
        named = {"rollout": row.id, "device": assigned.device_id, "at": assigned.exposed_at}
        return {"rollout": await connection.scalar(_SUCCESSOR, named)}
    return {}


_FACTS = "SELECT id, CAST(facts AS TEXT) AS facts FROM device WHERE id IN :keys"
_COLUMNS = (
    "SELECT a.device_id, d.name, a.stage, a.reason, a.attempt, a.exposed_at, a.noticed_at, a.settled_at, d.last_seen_at,"  # noqa: S608 - constants
    f" CASE WHEN a.outcome <> 'exposed' THEN a.outcome {evidence.UNSETTLED} AS state"
    " FROM assignment a JOIN device d ON d.id = a.device_id WHERE a.rollout_id = :rollout"
)
_DEVICES = text(
    f"SELECT * FROM ({_COLUMNS} AND a.device_id > :after AND (:stage < 0 OR a.stage = :stage)) s"  # noqa: S608 - constants
    " WHERE :state = '' OR s.state = :state ORDER BY s.device_id LIMIT :limit"
)
_DEVICE = text(f"{_COLUMNS} AND a.device_id = :device ORDER BY a.model LIMIT 1")
_SUCCESSOR = text(
    "SELECT r.number FROM assignment a JOIN assignment n ON n.device_id = a.device_id AND n.model = a.model"
    " AND n.rollout_id <> a.rollout_id AND n.exposed_at >= a.exposed_at JOIN rollout r ON r.id = n.rollout_id"
    " WHERE a.rollout_id = :rollout AND a.device_id = :device AND n.exposed_at >= :at ORDER BY n.exposed_at LIMIT 1"
)
