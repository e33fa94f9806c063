"""Carries decisions into rows: who is exposed, who is withdrawn, and the offers that say so, for one transaction.

Offers are composed and signed *before* the transaction, from what was read (`Prepared`), so that the database is locked for
the writing only; the transaction then holds the caller's comparison of revision and lease, and nobody else writes offers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import evidence, offers
from wherry_server.db import bulk
from wherry_server.evidence import Candidate
from wherry_server.offers import Composed, Composer, Wanted
from wherry_server.outcomes import ENDED, LIVE, STANDING
from wherry_server.plan import Plan
from wherry_server.rollout import Scope
from wherry_server.targeting import signed
from wherry_shared.errors import RefusedError
from wherry_shared.wire import OfferedModel

KNOWN_BAD = "known_bad"
"""Reason of an assignment that was taken back because the bundle is known to be bad on the device's hardware."""


@dataclass(slots=True)
class Prepared:
    """What a transaction will write."""

    exposed: list[Candidate] = field(default_factory=list)
    stage: int = -1
    tried: bool = False
    """Whether they are exposed to a first of two rounds."""
    promoted: list[tuple[str, str]] = field(default_factory=list)
    """(device, model) of those whose candidate is to take over."""
    withdrawn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Devices in scope that a newer rollout has: left alone, and counted as superseded."""
    scope: Scope = "unconfirmed"
    """Of the withdrawal, if there is one."""
    retried: list[tuple[str, str]] = field(default_factory=list)
    """(device, model) of those that try once more."""
    composed: list[Composed] = field(default_factory=list)
    refused: list[RefusedError] = field(default_factory=list)
    """Offers that could not be made; their devices are left as they are."""


async def read_exposing(connection: AsyncConnection, candidates: Sequence[Candidate]) -> dict[str, offers.Current]:
    """Read what the next offers of `candidates` are composed from."""
    return await offers.current(connection, [one.device for one in candidates])


def expose(
    prepared: Prepared,
    row: Any,
    plan: Plan,
    stage: int,
    candidates: Sequence[Candidate],
    current: dict[str, offers.Current],
    composer: Composer,
    now: int,
    *,
    tried: bool = False,
) -> None:
    """Compose the offers of a stage's devices. Signs, so call it outside of the event loop's thread."""
    prepared.stage = stage
    prepared.tried = tried
    forwards: dict[int, dict[str, OfferedModel]] = {}
    wanted: dict[str, dict[str, OfferedModel]] = {}
    for one in candidates:
        if one.attempt not in forwards:
            forwards[one.attempt] = offers.forwards(plan, row.id, one.attempt, tried=tried)
        wanted[one.device] = forwards[one.attempt]
    offered = _compose(prepared, wanted, current, composer, now, offers.with_flag(plan, current))
    prepared.exposed += [one for one in candidates if one.device in offered]


async def read_withdrawing(
    connection: AsyncConnection, rollout: str, scope: Scope, stage: int, recalled: frozenset[str] = frozenset()
) -> list[Any]:
    """Return the assignments that a withdrawal brings back: (device_id, model, from_*, owned).

    Of scope `recalled` those of such devices, as far as they did not confirm meanwhile.
    """
    rows = await connection.execute(
        _WITHDRAWING,
        {
            "rollout": rollout,
            "outcomes": LIVE if scope == "recalled" else [*LIVE, "superseded"],
            "all": scope == "all",
            "in_stage": scope == "stage",
            "stage": stage,
        },
    )
    return [one for one in rows if scope != "recalled" or one.device_id in recalled]


def withdraw(
    prepared: Prepared,
    row: Any,
    plan: Plan,
    rows: Sequence[Any],
    current: dict[str, offers.Current],
    composer: Composer,
    now: int,
    flags: Mapping[str, Mapping[str, Any]],
) -> None:
    """Compose the offers that name each device's own `from`. Signs, so call it outside of the event loop's thread.

    Of a flag's rollout, `flags` are those that the devices have without it.
    """
    changed: dict[str, dict[str, OfferedModel]] = {}
    for one in rows:
        if not one.owned:
            prepared.lost.append(one.device_id)
            continue
        back = changed.setdefault(one.device_id, {})
        if not plan.flag:
            back[one.model] = offers.backwards(plan, row.id, one.from_target, one.from_manifest)
    offered = _compose(prepared, changed, current, composer, now, flags)
    prepared.withdrawn += [device for device in changed if device in offered]


async def read_promoting(connection: AsyncConnection, rollout: str, stage: int, limit: int) -> list[Any]:
    """Return the assignments of stages up to `stage` whose candidate did not take over yet, lowest key first."""
    return list(await connection.execute(_PROMOTING, {"rollout": rollout, "stage": stage, "limit": limit}))


def promote(
    prepared: Prepared,
    row: Any,
    plan: Plan,
    rows: Sequence[Any],
    current: dict[str, offers.Current],
    composer: Composer,
    now: int,
) -> None:
    """Compose the offers with which candidates take over. Signs, so call it outside of the event loop's thread."""
    wanted: dict[str, dict[str, OfferedModel]] = {}
    for one in rows:
        if not one.owned:
            prepared.lost.append(one.device_id)
            continue
        wanted.setdefault(one.device_id, {})[one.model] = offers.forwards(plan, row.id, one.attempt)[one.model]
    offered = _compose(prepared, wanted, current, composer, now, {})
    prepared.promoted += [(one.device_id, one.model) for one in rows if one.device_id in offered]


async def read_retrying(connection: AsyncConnection, row: Any, plan: Plan, *, failed: bool) -> list[Any]:
    """Return the assignments that ended without success and that nobody else took over: (device_id, model, attempt).

    Never on hardware on which the bundle is known to be bad; where that was cleared, also those that it was taken back from.
    """
    outcomes = list(ENDED) if failed else ["excused"]
    found = list(await connection.execute(_RETRYING, {"rollout": row.id, "outcomes": outcomes, "known_bad": KNOWN_BAD}))
    bad = await evidence.on_bad_hardware(connection, row, plan, [one.device_id for one in found])
    return [one for one in found if one.owned and one.device_id not in bad]


def retry(
    prepared: Prepared,
    row: Any,
    plan: Plan,
    rows: Sequence[Any],
    current: dict[str, offers.Current],
    composer: Composer,
    now: int,
) -> None:
    """Compose the offers of the next attempts. Signs, so call it outside of the event loop's thread."""
    wanted: dict[str, dict[str, OfferedModel]] = {}
    for one in rows:
        forwards = offers.forwards(plan, row.id, one.attempt + 1, tried=bool(one.tried))
        again = wanted.setdefault(one.device_id, {})
        again |= {model: offered for model, offered in forwards.items() if model == one.model}
    offered = _compose(prepared, wanted, current, composer, now, offers.with_flag(plan, current))
    prepared.retried += [(one.device_id, one.model) for one in rows if one.device_id in offered]


def _compose(
    prepared: Prepared,
    wanted: Mapping[str, Mapping[str, OfferedModel]],
    current: dict[str, offers.Current],
    composer: Composer,
    now: int,
    flags: Mapping[str, Mapping[str, Any]],
) -> set[str]:
    """Compose one offer a device, with `wanted` put over what it is offered already; return who can be offered it.

    Whom `flags` does not name keeps those that it has.

    Who was removed since it was read is left out; whose offer cannot be made is named in `prepared.refused`.
    """
    known = [(device, current[device], models) for device, models in wanted.items() if device in current]
    made, refused = composer.compose_all(
        [Wanted(device, one, {**one.models, **models}, flags.get(device)) for device, one, models in known], now
    )
    prepared.composed += made
    prepared.refused += refused
    return {one.device for one in made}


async def apply(connection: AsyncConnection, row: Any, plan: Plan, prepared: Prepared, now: int) -> None:
    """Write what was prepared, inside the caller's transaction."""
    if prepared.exposed:
        await _insert(connection, row, plan, prepared, now)
    for at in range(0, len(prepared.withdrawn), offers.DEVICES_PER_READ):
        part = prepared.withdrawn[at : at + offers.DEVICES_PER_READ]
        await connection.execute(
            _WITHDRAW_FLAG if plan.flag else _WITHDRAW,
            {
                "rollout": row.id,
                "devices": part,
                "now": now,
                "outcomes": [*STANDING, "superseded"],
                "reason": KNOWN_BAD if prepared.scope == "recalled" else "",
            },
        )
        for planned in plan.targets:
            await connection.execute(
                _OTHERS_PENDING, {"rollout": row.id, "devices": part, "now": now, "model": planned.model}
            )
    if prepared.retried:
        await connection.execute(
            _RETRY,
            [{"rollout": row.id, "device": device, "model": model, "now": now} for device, model in prepared.retried],
        )
    if prepared.promoted:
        await connection.execute(
            _PROMOTE,
            [{"rollout": row.id, "device": device, "model": model, "now": now} for device, model in prepared.promoted],
        )
    if prepared.scope in ("stage", "all"):
        for planned in plan.targets:
            await connection.execute(
                _FORMER,
                {
                    "rollout": row.id,
                    "project": row.project_id,
                    "model": planned.model,
                    "to": planned.manifest,
                    "all": prepared.scope == "all",
                    "stage": prepared.stage,
                },
            )
    if prepared.lost:
        await connection.execute(_LOST, [{"rollout": row.id, "device": device, "now": now} for device in prepared.lost])
    await offers.write(connection, row.project_id, prepared.composed)


async def _insert(connection: AsyncConnection, row: Any, plan: Plan, prepared: Prepared, now: int) -> None:
    """Insert the assignments of a stage by one statement over the devices and what they run at this moment."""
    await connection.execute(
        text(
            "CREATE TEMPORARY TABLE IF NOT EXISTS exposing (device_id TEXT PRIMARY KEY, stratum TEXT, share_key BIGINT,"
            " attempt INTEGER)"
        )
    )
    await connection.execute(text("DELETE FROM exposing"))
    rows = sorted((one.device, one.stratum, signed(one.key), one.attempt or plan.attempt) for one in prepared.exposed)
    await bulk.fill(connection, "exposing", ("device_id", "stratum", "share_key", "attempt"), rows)
    for planned in plan.targets:
        named = {
            "rollout": row.id,
            "project": row.project_id,
            "model": planned.model,
            "stage": prepared.stage,
            "to": planned.manifest,
            "target": planned.target,
            "now": now,
        }
        await connection.execute(_ASSIGN, {**named, "tried": prepared.tried})
        await connection.execute(_SUPERSEDE, named)


# What is taken back is taken back from all that run it: also where a later rollout tried another one and the device went back,
# whatever became of that rollout.
_RUNS_AGAIN = (
    "NOT EXISTS (SELECT 1 FROM assignment n WHERE n.device_id = a.device_id AND n.model = a.model"
    " AND n.rollout_id <> a.rollout_id AND n.exposed_at > a.exposed_at AND n.outcome NOT IN ('withdrawn', 'revert_pending',"
    " 'reverted', 'superseded', 'returned', 'failed', 'refused', 'excused'))"
)
_WITHDRAWING = text(
    f"SELECT a.device_id, a.model, a.attempt, a.from_manifest, a.from_target, a.tried, {_RUNS_AGAIN} AS owned"  # noqa: S608 - constants
    " FROM assignment a JOIN device d ON d.id = a.device_id AND d.state = 'active'"  # who was shut out hears nothing
    " WHERE a.rollout_id = :rollout AND a.outcome IN :outcomes"
    " AND (a.outcome NOT IN ('confirmed', 'confirmed_idle', 'superseded') OR :all OR (:in_stage AND a.stage = :stage))"
).bindparams(bindparam("outcomes", expanding=True))
_RETRYING = text(
    f"SELECT a.device_id, a.model, a.attempt, a.tried, {evidence.OWNED} AS owned FROM assignment a"  # noqa: S608 - constants
    " JOIN device d ON d.id = a.device_id AND d.state = 'active' WHERE a.rollout_id = :rollout"
    " AND (a.outcome IN :outcomes OR (a.outcome IN ('withdrawn', 'revert_pending', 'reverted') AND a.reason = :known_bad))"
).bindparams(bindparam("outcomes", expanding=True))
_RETRY = text(
    "UPDATE assignment SET outcome = 'exposed', attempt = attempt + 1, exposed_at = :now, noticed_at = 0, settled_at = 0,"
    " reason = 'retry', detail = '', released_at = 0 WHERE rollout_id = :rollout AND device_id = :device AND model = :model"
    " AND outcome IN ('returned', 'failed', 'refused', 'excused', 'withdrawn', 'revert_pending', 'reverted')"
)
_PROMOTING = text(
    f"SELECT a.device_id, a.model, a.attempt, {evidence.OWNED} AS owned FROM assignment a"  # noqa: S608 - constants
    " JOIN device d ON d.id = a.device_id AND d.state = 'active' WHERE a.rollout_id = :rollout AND a.tried"
    " AND a.stage <= :stage AND a.outcome IN ('exposed', 'proved', 'confirmed', 'confirmed_idle')"
    " ORDER BY a.share_key LIMIT :limit"
)
# `tried` falls first: what a device still says of its first round no longer proves anything.
_PROMOTE = text(
    "UPDATE assignment SET outcome = 'exposed', tried = false, exposed_at = :now, noticed_at = 0, settled_at = 0,"
    " reason = 'promoted', detail = '' WHERE rollout_id = :rollout AND device_id = :device AND model = :model"
    " AND outcome IN ('exposed', 'proved', 'confirmed', 'confirmed_idle')"
)
_LOST = text(
    "UPDATE assignment SET outcome = 'superseded', settled_at = :now WHERE rollout_id = :rollout AND device_id = :device"
    " AND outcome IN ('exposed', 'proved', 'confirmed', 'confirmed_idle')"
)
_OTHERS_PENDING = text(
    "UPDATE assignment SET outcome = 'superseded', settled_at = :now WHERE rollout_id <> :rollout"
    " AND outcome = 'revert_pending' AND device_id IN :devices AND model = :model"
).bindparams(bindparam("devices", expanding=True))
# Whom another rollout took over would go back to what is taken back here: it goes back to what it had before that.
_FORMER = text(
    "UPDATE assignment SET (from_manifest, from_target) = (SELECT a.from_manifest, a.from_target FROM assignment a"
    " WHERE a.rollout_id = :rollout AND a.device_id = assignment.device_id AND a.model = assignment.model)"
    " WHERE model = :model AND from_manifest = :to AND to_manifest <> :to"
    " AND rollout_id IN (SELECT id FROM rollout WHERE project_id = :project AND model = :model AND id <> :rollout)"
    " AND EXISTS (SELECT 1 FROM assignment a WHERE a.rollout_id = :rollout AND a.device_id = assignment.device_id"
    " AND a.model = assignment.model AND a.to_manifest = :to AND a.exposed_at <= assignment.exposed_at"
    " AND (:all OR a.stage = :stage))"
)
_WHY = "reason = CASE WHEN :reason <> '' THEN :reason ELSE reason END"
_WITHDRAW = text(
    "UPDATE assignment SET outcome = CASE WHEN outcome IN ('exposed', 'proved') AND COALESCE((SELECT m.running FROM device_model m"  # noqa: S608 - constants
    " WHERE m.device_id = assignment.device_id AND m.model = assignment.model), '') = from_manifest"
    f" THEN 'withdrawn' ELSE 'revert_pending' END, {_WHY}, settled_at = :now"
    " WHERE rollout_id = :rollout AND device_id IN :devices AND outcome IN :outcomes"
    " AND EXISTS (SELECT 1 FROM device d WHERE d.id = assignment.device_id AND d.state = 'active')"
).bindparams(bindparam("devices", expanding=True), bindparam("outcomes", expanding=True))
_WITHDRAW_FLAG = text(  # who never said that it has the offer with the variant has not changed, as far as is known
    "UPDATE assignment SET outcome = CASE WHEN noticed_at = 0 THEN 'withdrawn' ELSE 'revert_pending' END,"  # noqa: S608 - constants
    f" {_WHY}, settled_at = :now"
    " WHERE rollout_id = :rollout AND device_id IN :devices AND outcome IN :outcomes"
    " AND EXISTS (SELECT 1 FROM device d WHERE d.id = assignment.device_id AND d.state = 'active')"
).bindparams(bindparam("devices", expanding=True), bindparam("outcomes", expanding=True))
_SUPERSEDE = text(
    "UPDATE assignment SET outcome = 'superseded', settled_at = :now WHERE model = :model AND rollout_id <> :rollout"
    " AND outcome IN ('exposed', 'proved', 'confirmed', 'confirmed_idle', 'revert_pending')"
    " AND device_id IN (SELECT device_id FROM exposing)"
    " AND rollout_id IN (SELECT id FROM rollout WHERE project_id = :project AND model = :model"
    " AND state IN ('running', 'paused', 'returning'))"
)
_ASSIGN = text(
    "INSERT INTO assignment (rollout_id, device_id, model, project_id, stage, stratum, share_key, from_manifest,"
    " from_target, to_manifest, to_target, attempt, exposed_at, noticed_at, outcome, reason, detail, settled_at, requests,"
    " errors, latency_ratio, released_at, simulated, tried, compared, agreed, skipped)"
    " SELECT :rollout, e.device_id, :model, :project, :stage, e.stratum, e.share_key,"
    # A device that runs the bundle already goes back to where its last assignment came from, else it stays.
    # What is being taken back from it is nothing to go back to either.
    " CASE WHEN m.running = :to THEN COALESCE(NULLIF(p.from_manifest, ''), :to)"
    " ELSE COALESCE(t.from_manifest, m.running, '') END,"
    " CASE WHEN m.running = :to THEN COALESCE(NULLIF(p.from_target, ''), :target)"
    " ELSE COALESCE(t.from_target, b.model || '/' || b.version, '') END,"
    " :to, :target, e.attempt, :now, 0, 'exposed', '', '', 0, 0, 0, 0, 0, d.simulated, :tried, 0, 0, 0"
    " FROM exposing e JOIN device d ON d.id = e.device_id AND d.state = 'active'"
    " LEFT JOIN device_model m ON m.device_id = e.device_id AND m.model = :model"
    " LEFT JOIN bundle b ON b.project_id = :project AND b.manifest = m.running"
    " LEFT JOIN assignment p ON m.running = :to AND p.device_id = e.device_id AND p.model = :model"
    " AND p.to_manifest = :to AND p.exposed_at = (SELECT max(q.exposed_at) FROM assignment q"
    " WHERE q.device_id = e.device_id AND q.model = :model AND q.to_manifest = :to)"
    " LEFT JOIN assignment t ON m.running <> :to AND t.device_id = e.device_id AND t.model = :model"
    " AND t.to_manifest = m.running AND t.outcome IN ('revert_pending', 'withdrawn') AND t.exposed_at = (SELECT max(q.exposed_at)"
    " FROM assignment q WHERE q.device_id = e.device_id AND q.model = :model AND q.to_manifest = m.running)"
    " WHERE true ORDER BY e.device_id ON CONFLICT (rollout_id, device_id, model) DO NOTHING"
)
