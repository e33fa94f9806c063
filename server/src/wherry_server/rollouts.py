"""Rollouts as operators see them: made from a wish, told what to do, shown with counts and reasons.

Nothing here decides: a command is written down as `wanted`, and the director applies it in its next turn.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, cohorts, evidence, flag_book, fleet
from wherry_server.db.database import Database
from wherry_server.db.tables import Approval, Assignment, Bundle, Decision, Rollout, RolloutStatus, table
from wherry_server.lease import boot_id
from wherry_server.outcomes import LIVE
from wherry_server.plan import Plan, parse_plan
from wherry_server.rollout import (
    Command,
    Evidence,
    Progress,
    State,
    Why,
    approvable,
    following,
    seen,
    verdicts,
    why_not_yet,
)
from wherry_server.targeting import parse_selector
from wherry_server.times import now_us
from wherry_shared.clock import MICROSECONDS, Now
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name, is_device_id

_ROLLOUT, _BUNDLE, _DECISION, _ASSIGNMENT = table(Rollout), table(Bundle), table(Decision), table(Assignment)
_APPROVAL, _STATUS = table(Approval), table(RolloutStatus)
APPROVABLE: frozenset[State] = frozenset({"created", "running", "paused"})
ALLOWED: dict[Command, frozenset[State]] = {
    "start": frozenset({"created"}),
    "pause": frozenset({"running"}),
    "resume": frozenset({"paused"}),
    "abort": frozenset({"created", "running", "paused"}),
    "revert": frozenset({"running", "paused", "returning", "done", "halted", "aborted"}),
    "retry": frozenset({"running", "done"}),
    "retry_failed": frozenset({"running", "done"}),
}
"""In which states a command may be given."""
TALLIED = ("exposed", "pending", *LIVE[1:], "withdrawn", "revert_pending", "reverted", "superseded")
BACK_TRIAL_S = 5
"""A device without traffic goes back within this time: what ran there before has proved itself once."""
LISTED_MAX = 200
TOLD: frozenset[State] = frozenset({"running", "paused", "done"})
"""States in which the director says how a rollout stands."""
STATUS_FRESH_S = 20.0
"""What it said counts for this long; it says it every second while something changes, and again before this has passed."""
DECISIONS_MAX = 200
_ONLY = 'id = "{}"'
"""The selector of a rollout for one device."""


async def create(database: Database, project: str, actor: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Make a rollout and return it.

    Args:
        database: where.
        project: whose.
        actor: who wants it, for the audit log.
        wish: the fields of a plan (`docs/formats/plan.md`), with `models: [{model, version}]`, whose manifests are looked
            up here; whom it is for as one of `cohort` (saved name), `selector` (text) or `device` (id or name); and
            `start: true` to start it at once.

    Raises:
        RefusedError: as `plan.parse_plan`; `bundle_unknown`, `cohort_unknown`, `device_unknown`, `plan_target`.
    """
    async with database.write() as connection:
        number = await _create(connection, project, actor, dict(wish))
    async with database.read() as connection:
        return await show(connection, project, number)


async def _create(connection: AsyncConnection, project: str, actor: str, wish: dict[str, Any]) -> int:
    try:
        msgspec.json.encode(wish)
    except (UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise RefusedError("plan_invalid", f"not a plan: {error}") from error
    start = wish.pop("start", False)
    if not isinstance(start, bool):
        raise RefusedError("plan_invalid", "start is true or false")
    selector, cohort = await _target(connection, project, wish)
    models = wish.pop("models", [] if wish.get("flag") else None)
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise RefusedError("plan_invalid", "models is a list of {model, version}")
    plan = parse_plan(
        {
            **await _with_value(connection, project, wish),
            "models": [await _planned(connection, project, one) for one in models],
            "selector": selector,
            "cohort": cohort,
        }
    )
    highest = await connection.scalar(select(func.max(_ROLLOUT.c.number)).where(_ROLLOUT.c.project_id == project))
    number, now = (highest or 0) + 1, now_us()
    await connection.execute(
        insert(_ROLLOUT).values(
            id=secrets.token_urlsafe(12),
            project_id=project,
            number=number,
            model=plan.targets[0].model,
            plan=msgspec.to_builtins(plan),
            progress=msgspec.to_builtins(Progress()),
            state="created",
            reason="",
            salt=secrets.token_urlsafe(16),
            priority=plan.priority,
            revision=1,
            lease_epoch=0,
            wanted="start" if start else "",
            created_at=now,
            created_by=actor,
            updated_at=now,
        )
    )
    await audit.append(
        connection,
        project,
        actor,
        "rollout.create",
        str(number),
        models=[planned.target for planned in plan.targets],
        selector=selector,
        started=start,
    )
    return number


async def _target(connection: AsyncConnection, project: str, wish: dict[str, Any]) -> tuple[str, str]:
    """Return (selector, cohort name) of whom a wish is for."""
    given = {name: wish.pop(name) for name in ("cohort", "selector", "device") if wish.get(name) not in (None, "")}
    if len(given) != 1 or not all(isinstance(value, str) for value in given.values()):
        raise RefusedError(
            "plan_target",
            "say whom the rollout is for by exactly one of cohort, selector or device",
            next_step="to reach every device: selector all",
        )
    ((kind, value),) = given.items()
    if kind == "device":
        found = await fleet.find_device(connection, project, value)
        return _ONLY.format(found.id), ""
    if kind == "cohort":
        return str((await cohorts.find(connection, project, value))["selector"]), value
    return value, ""


def only_device(selector: str) -> str:
    """Return the device for which a rollout was made that names a device; empty if it names none."""
    before, _, behind = _ONLY.partition("{}")
    device = selector.removeprefix(before).removesuffix(behind)
    return device if is_device_id(device) and selector == _ONLY.format(device) else ""


async def _with_value(connection: AsyncConnection, project: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Return a wish with the value of the variant that it names, if it is of a flag.

    Raises:
        RefusedError: `plan_invalid`, `flag_unknown` or `plan_flag`.
    """
    if "value" in wish:
        raise RefusedError("plan_invalid", "a plan names a variant; its value is the flag's")
    if not wish.get("flag"):
        return wish
    flag = await flag_book.find(connection, project, str(wish["flag"]))
    if wish.get("variant") not in flag["variants"]:
        raise RefusedError(
            "plan_flag",
            f"flag {flag['name']} has no variant {str(wish.get('variant'))[:64]!r}",
            consequence="nothing was stored",
            next_step=f"its variants: {', '.join(sorted(flag['variants']))[:200]}",
        )
    return {**wish, "value": flag["variants"][wish["variant"]]}


async def _planned(connection: AsyncConnection, project: str, one: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(one) - {"model", "version"})
    if unknown:
        raise RefusedError("plan_invalid", f"a model is {{model, version}}; unknown: {', '.join(unknown)[:100]}")
    model, version = str(one.get("model", "")), str(one.get("version", ""))
    manifest = await connection.scalar(
        select(_BUNDLE.c.manifest).where(
            _BUNDLE.c.project_id == project, _BUNDLE.c.model == model, _BUNDLE.c.version == version
        )
    )
    if manifest is None:
        raise RefusedError(
            "bundle_unknown",
            f"there is no bundle {model[:64]} {version[:64]}",
            consequence="nothing was stored",
            next_step="push it first: wherry bundle push",
        )
    return {"model": model, "version": version, "manifest": manifest}


async def command(
    database: Database,
    project: str,
    actor: str,
    number: int,
    wanted: Command,
    check: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a command down for the director and return the rollout; `check` sees its revision, and may refuse.

    Raises:
        RefusedError: `rollout_unknown`, or `rollout_state` where the command makes no sense.
    """
    async with database.write() as connection:
        row = await find(connection, project, number)
        if check is not None:
            check(row.revision)
        progress = evidence.load_progress(row.progress)
        pending = row.wanted and row.wanted != wanted and wanted not in ("abort", "revert")
        pointless = wanted == "revert" and (progress.stage < 0 or progress.ending == "reverted")
        if row.state not in ALLOWED[wanted] or pending or pointless:
            what = f"{row.state}, and {row.wanted} is wanted" if row.wanted else row.state
            raise RefusedError(
                "rollout_state",
                f"rollout {number} is {what}: {wanted} is not possible now",
                consequence="nothing was changed",
                next_step=f"possible in: {', '.join(sorted(ALLOWED[wanted]))}",
            )
        await connection.execute(
            update(_ROLLOUT)
            .where(_ROLLOUT.c.id == row.id)
            .values(wanted=wanted, revision=row.revision + 1, updated_at=now_us())
        )
        await audit.append(connection, project, actor, f"rollout.{wanted}", str(number), state=row.state)
    async with database.read() as connection:
        return await show(connection, project, number)


async def approve(
    database: Database, project: str, actor: str, number: int, stage: int, round_: int = 1
) -> dict[str, Any]:
    """Agree that a stage (from 1) of a round begins, and return the rollout. Twice is as good as once.

    Raises:
        RefusedError: `rollout_unknown`, `rollout_state`, `approval_pointless` or `approval_refused`.
    """
    async with database.write() as connection:
        row = await find(connection, project, number)
        plan, progress = parse_plan(row.plan), evidence.load_progress(row.progress)
        if row.state not in APPROVABLE:
            raise RefusedError("rollout_state", f"rollout {number} is {row.state}: nothing waits for approval")
        if not approvable(plan, progress, stage - 1, round_):
            raise RefusedError(
                "approval_pointless",
                f"stage {stage} of round {round_} of rollout {number} does not wait for approval",
                consequence="nothing was changed",
                next_step="see what it waits for: wherry rollout show",
            )
        allowed, name = plan.approval, actor.partition(":")[2]
        if allowed is None or (_same_one(row.created_by, actor) and not allowed.creator):
            raise RefusedError(
                "approval_refused", "who made a rollout does not approve it", next_step="ask somebody else"
            )
        if allowed.names and name not in allowed.names:
            raise RefusedError(
                "approval_refused", "the plan names who may approve", next_step=f"ask {', '.join(allowed.names)[:200]}"
            )
        known = select(_APPROVAL.c.actor).where(
            _APPROVAL.c.rollout_id == row.id, _APPROVAL.c.stage == stage - 1, _APPROVAL.c.round == round_
        )
        if not any(_same_one(one, actor) for one in await connection.scalars(known)):
            await connection.execute(
                insert(_APPROVAL).values(
                    rollout_id=row.id, stage=stage - 1, round=round_, actor=actor, project_id=project, at=now_us()
                )
            )
            await audit.append(connection, project, actor, "rollout.approve", str(number), stage=stage, round=round_)
    async with database.read() as connection:
        return await show(connection, project, number)


def _same_one(one: str, other: str) -> bool:
    """Tell whether two actors are one: who has a token and a login has both under one name, however they are written."""
    (kind, _, name), others = one.partition(":"), other.partition(":")[2]
    return kind in ("token", "person") and name.casefold() == others.casefold()


async def roll_back(database: Database, project: str, actor: str, model: str, device: str | None) -> dict[str, Any]:
    """Bring a model back to what ran before: of its newest rollout, or on one device only. Returns the rollout that does it.

    Raises:
        RefusedError: `bad_name`, `nothing_to_roll_back` or `device_unknown`.
    """
    check_name(model, "model")
    if device is None:
        async with database.read() as connection:
            number = await newest(connection, project, model)
        if number is None:
            raise _nothing(f"no rollout of {model[:64]} has reached a device that could go back")
        return await command(database, project, actor, number, "revert")
    async with database.write() as connection:
        found = await fleet.find_device(connection, project, device)
        target = await _before(connection, found.id, model)
        if "/" not in target:
            raise _nothing(f"it is not known what {found.name} ran of {model[:64]} before")
        priority = await connection.scalar(_PRIORITY, {"device": found.id, "model": model}) or 0
        number = await _create(
            connection,
            project,
            actor,
            {
                "models": [{"model": model, "version": target.split("/", 1)[1]}],
                "device": found.id,
                "stages": [{"share": 1.0, "confirmed_min": 0}],
                "trial": {"max_s": BACK_TRIAL_S},
                "rollback": True,
                "supersede": True,
                "priority": priority,
                "start": True,
            },
        )
    async with database.read() as connection:
        return await show(connection, project, number)


async def newest(connection: AsyncConnection, project: str, model: str) -> int | None:
    """Return the newest rollout of a model that devices could go back from; what a rollback brought is none."""
    rows = await connection.execute(_REACHED.where(_ROLLOUT.c.project_id == project, _ROLLOUT.c.model == model))
    return next((int(row.number) for row in rows if not row.plan.get("rollback")), None)


async def _before(connection: AsyncConnection, device: str, model: str) -> str:
    """Return the target that a device had of a model before the one that it has now; empty if that is not known.

    If a rollback brought what it has now, this is what came before that again, and never what the rollback took away.
    """
    rows = await connection.execute(_HISTORY.where(_ASSIGNMENT.c.device_id == device, _ASSIGNMENT.c.model == model))
    back_to = ""
    for row in rows:
        returned = bool(row.plan.get("rollback"))
        if returned and not back_to and row.outcome in _HERE:
            back_to = row.to_manifest
        elif not returned and (row.to_manifest == back_to if back_to else row.outcome in _HERE):
            return str(row.from_target)
    return ""


async def find(connection: AsyncConnection, project: str, number: int) -> Any:
    """Return the row of a rollout.

    Raises:
        RefusedError: `rollout_unknown`.
    """
    row = (
        await connection.execute(select(_ROLLOUT).where(_ROLLOUT.c.project_id == project, _ROLLOUT.c.number == number))
    ).one_or_none()
    if row is None:
        raise RefusedError(
            "rollout_unknown", f"there is no rollout {number}", next_step="see which there are: wherry rollout list"
        )
    return row


async def every(
    connection: AsyncConnection,
    project: str,
    model: str | None,
    state: str | None,
    *,
    before: int | None = None,
    limit: int = LISTED_MAX,
) -> list[dict[str, Any]]:
    """Return the newest rollouts, newest first; `before`: of those with a smaller number."""
    query = select(_ROLLOUT).where(_ROLLOUT.c.project_id == project).order_by(_ROLLOUT.c.number.desc())
    if model:
        query = query.where(_ROLLOUT.c.model == model)
    if state:
        query = query.where(_ROLLOUT.c.state == state)
    if before is not None:
        query = query.where(_ROLLOUT.c.number < before)
    return [_summary(row) for row in (await connection.execute(query.limit(limit))).all()]


async def show(
    connection: AsyncConnection, project: str, number: int, *, fresh_s: float = STATUS_FRESH_S
) -> dict[str, Any]:
    """Return a rollout with counts per stage, real and simulated apart, and why it is not further yet.

    What the director said of it in the last `fresh_s` seconds is good enough.

    Raises:
        RefusedError: `rollout_unknown`.
    """
    row = await find(connection, project, number)
    plan, progress = parse_plan(row.plan), evidence.load_progress(row.progress)
    now = now_us()
    found, details = await _standing(connection, row, plan, progress, now, fresh_s)
    tallies = {kind: _tally(details, simulated=kind == "simulated") for kind in ("real", "simulated")}
    waits = why_not_yet(plan, progress, found, _here(now))
    if row.wanted:
        waits = [Why(code="ordered", unit="director"), *(why for why in waits if why.unit != "operator")]
    return {
        **_summary(row),
        "plan": msgspec.to_builtins(plan),
        "stages": [
            {
                "share": stage.share,
                "count": stage.count,
                "soak_s": stage.soak_s,
                "confirmed_min": stage.confirmed_min,
                "state": _stage_state(index, progress),
                "counts": {name: getattr(counts, name) for name in counts.__struct_fields__},
            }
            for index, (stage, counts) in enumerate(zip(plan.stages, found.stages, strict=True))
        ],
        "members": found.members,
        "unexposed": found.unexposed,
        "held": found.held,
        "closed": found.closed,
        "counts": tallies,
        "outcomes": details,
        "following": _following(plan, progress),
        "gates": msgspec.to_builtins(verdicts(plan, seen(progress, found), progress.compared)),
        "why_not_yet": msgspec.to_builtins(waits),
    }


async def _standing(
    connection: AsyncConnection, row: Any, plan: Plan, progress: Progress, now: int, fresh_s: float
) -> tuple[Evidence, list[dict[str, Any]]]:
    """Return what is so, and devices by outcome: as the director saw it some moments ago, or else counted now."""
    if row.state in TOLD:
        said = (await connection.execute(select(_STATUS).where(_STATUS.c.rollout_id == row.id))).one_or_none()
        if said is not None and now - said.at < fresh_s * MICROSECONDS:
            found = msgspec.convert(said.evidence, Evidence)
            approvals = await evidence.approvals(connection, row, plan)
            return msgspec.structs.replace(found, command=row.wanted, approvals=approvals), said.outcomes
    tallied = await evidence.tally(connection, row.id, plan, now)
    if row.state in ("running", "paused"):
        scan = await evidence.scan(connection, row, plan)
        return await evidence.read(connection, row, plan, progress, scan, tallied), tallied.outcomes
    found = await evidence.read(connection, row, plan, progress, None, tallied)  # nobody is exposed any more, or yet
    members = await cohorts.count(connection, row.project_id, parse_selector(plan.selector))
    return msgspec.structs.replace(found, members=members), tallied.outcomes


async def decisions(
    connection: AsyncConnection, project: str, number: int, after: int, limit: int = DECISIONS_MAX
) -> list[dict[str, Any]]:
    """Return what was decided on a rollout and on what evidence, oldest first, behind a revision.

    Raises:
        RefusedError: `rollout_unknown`.
    """
    row = await find(connection, project, number)
    rows = await connection.execute(
        select(_DECISION)
        .where(_DECISION.c.rollout_id == row.id, _DECISION.c.revision > after)
        .order_by(_DECISION.c.revision)
        .limit(limit)
    )
    return [
        {
            "revision": one.revision,
            "at": one.at,
            "decisions": one.decisions,
            "evidence": one.evidence,
            "progress_before": one.progress_before,
        }
        for one in rows
    ]


def _here(now: int) -> Now:
    """Return an instant that compares with the waits of a director on this machine."""
    return Now(boot_id(), time.monotonic_ns() // 1_000_000, now / MICROSECONDS)


def _following(plan: Plan, progress: Progress) -> dict[str, int] | None:
    coming = following(plan, progress) if progress.state in APPROVABLE else None
    if coming is None:
        return None
    return {"stage": coming[0] + 1, "round": coming[1], "approvers": plan.approvers(*coming)}


def _stage_state(index: int, progress: Progress) -> str:
    if index > progress.stage:
        return "ahead"
    if index < progress.stage or progress.state == "done":
        return "proved"
    return "under_way" if progress.state in ("running", "paused") else "stopped"


def _tally(details: list[dict[str, Any]], *, simulated: bool) -> dict[str, int]:
    """Count devices by outcome; `exposed` is everybody who ever was, `pending` who has not settled."""
    tally = dict.fromkeys(TALLIED, 0)
    for one in details:
        if one["simulated"] is simulated:
            tally["exposed"] += one["devices"]
            tally["pending" if one["outcome"] == "exposed" else one["outcome"]] += one["devices"]
    return tally


def _summary(row: Any) -> dict[str, Any]:
    plan = cast("dict[str, Any]", row.plan)
    progress = cast("dict[str, Any]", row.progress)
    return {
        "number": row.number,
        "id": row.id,
        "model": row.model,
        "version": plan["models"][0]["version"] if plan.get("models") else plan.get("variant", ""),
        "models": plan.get("models", []),
        "flag": plan.get("flag", ""),
        "variant": plan.get("variant", ""),
        "cohort": plan.get("cohort", ""),
        "selector": plan["selector"],
        "state": row.state,
        "reason": row.reason,
        "wanted": row.wanted,
        "stage": progress.get("stage", -1),
        "stages_total": len(plan["stages"]),
        "round": 2 if progress.get("promoting") else 1,
        "rounds_total": msgspec.convert(plan, Plan).rounds,
        "priority": row.priority,
        "revision": row.revision,
        "created_at": row.created_at,
        "created_by": row.created_by,
        "updated_at": row.updated_at,
    }


def _nothing(message: str) -> RefusedError:
    return RefusedError(
        "nothing_to_roll_back",
        message,
        consequence="nothing was changed",
        next_step="deploy the version that you want: wherry deploy MODEL:VERSION",
    )


_HERE = ("exposed", "proved", "confirmed", "confirmed_idle")
"""Outcomes of devices that have, or will have, what the rollout brings."""
_REACHED = (
    select(_ROLLOUT.c.number, _ROLLOUT.c.plan)
    .where(_ROLLOUT.c.state.in_(("running", "paused", "done", "halted", "aborted")))
    .where(
        select(_ASSIGNMENT.c.device_id)
        .where(_ASSIGNMENT.c.rollout_id == _ROLLOUT.c.id, _ASSIGNMENT.c.outcome.in_(_HERE))
        .exists()
    )
    .order_by(_ROLLOUT.c.number.desc())
)
_HISTORY = (
    select(
        _ASSIGNMENT.c.from_target,
        _ASSIGNMENT.c.from_manifest,
        _ASSIGNMENT.c.to_manifest,
        _ASSIGNMENT.c.outcome,
        _ROLLOUT.c.plan,
    )
    .join(_ROLLOUT, _ROLLOUT.c.id == _ASSIGNMENT.c.rollout_id)
    .where(_ASSIGNMENT.c.outcome.in_((*_HERE, "superseded")), _ASSIGNMENT.c.from_manifest != "")
    .where(_ASSIGNMENT.c.from_manifest != _ASSIGNMENT.c.to_manifest)
    .order_by(_ROLLOUT.c.number.desc())
)
_PRIORITY = text(
    "SELECT max(r.priority) FROM rollout r JOIN assignment a ON a.rollout_id = r.id WHERE a.device_id = :device"
    " AND a.model = :model AND r.state IN ('running', 'paused', 'returning') AND a.outcome <> 'superseded'"
)
