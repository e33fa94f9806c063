"""Why a rollout or a device is where it is, and whether what was decided follows from what was known.

Every decision is written down with its evidence and its moment; asking the engine again with the same has to give the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import cohorts, evidence, forecast, gates, rollouts, standing
from wherry_server.db.tables import Decision, table
from wherry_server.plan import Plan, parse_plan
from wherry_server.rollout import Evidence, Progress, decide
from wherry_server.targeting import parse_selector
from wherry_shared.errors import RefusedError

_DECISION = table(Decision)
REPLAYED_MAX = 2_000
"""The newest decisions of a rollout are replayed, no more than these."""


def follows(plan: Plan, before: Any, known: Any, decided: Any, then: Any = None) -> bool | None:
    """Tell whether a recorded decision, and the progress that was there `then`, follow from its evidence.

    None if the record does not say when it was.
    """
    found = msgspec.convert(known, Evidence)
    if found.at is None:
        return None
    after, again = decide(plan, msgspec.convert(before, Progress), found, found.at)
    if then is not None and after != msgspec.convert(then, Progress):
        return False
    return msgspec.json.encode(msgspec.to_builtins(again), order="sorted") == msgspec.json.encode(
        decided, order="sorted"
    )


async def explain(connection: AsyncConnection, project: str, number: int, device: str) -> dict[str, Any]:
    """Return what a rollout waits for, what was decided and on what, and where a device stands, if one is given.

    Raises:
        RefusedError: `rollout_unknown` or `device_unknown`.
    """
    row = await rollouts.find(connection, project, number)
    shown = await rollouts.show(connection, project, number)
    plan = parse_plan(row.plan)
    query = select(_DECISION).where(_DECISION.c.rollout_id == row.id).order_by(_DECISION.c.revision.desc())
    rows = (await connection.execute(query.limit(REPLAYED_MAX))).all()[::-1]
    decided = await asyncio.to_thread(_replayed, plan, rows, row.progress)
    return {
        "number": number,
        "state": shown["state"],
        "reason": shown["reason"],
        **{name: shown[name] for name in ("stage", "stages_total", "round", "rounds_total", "following")},
        "why_not_yet": shown["why_not_yet"],
        "gates": shown["gates"],
        "needs": _needs(plan),
        "decided": decided,
        "replayed": sum(one["follows"] is not None for one in decided),
        "differing": [one["revision"] for one in decided if one["follows"] is False],
        "device": await standing.device(connection, row, plan, device) if device else None,
    }


def _replayed(plan: Plan, rows: Sequence[Any], progress: Any) -> list[dict[str, Any]]:
    """Return decisions with whether each follows, and led to where the next one began (the last: to `progress`)."""
    began = [*(one.progress_before for one in rows[1:]), progress] if rows else []
    return [
        {
            "revision": one.revision,
            "at": one.at,
            "round": 2 if one.progress_before.get("promoting") else 1,
            "decisions": one.decisions,
            "known": {name: value for name, value in one.evidence.items() if name not in ("at", "taken")},
            "follows": follows(plan, one.progress_before, one.evidence, one.decisions, then),
        }
        for one, then in zip(rows, began, strict=True)
    ]


async def simulate(connection: AsyncConnection, project: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Forecast a plan: over the fleet as it stands, or over so many devices of one kind.

    Args:
        connection: where the fleet is.
        project: whose.
        wish: `plan` (its models may be left out), `devices` (synthetic ones), `outcomes` (`forecast.Outcomes`), `runs`.

    Raises:
        RefusedError: as `plan.parse_plan` and `forecast.check`; `forecast_range`.
    """
    try:
        outcomes = msgspec.convert(wish.get("outcomes") or {}, forecast.Outcomes)
        devices = msgspec.convert(wish.get("devices") or 0, int)
        runs = msgspec.convert(wish.get("runs") or 20, int)
        plan_wish = msgspec.convert(wish.get("plan") or {}, dict[str, Any])
    except msgspec.ValidationError as error:
        raise RefusedError("forecast_range", f"not a wish for a forecast: {error}") from error
    known = {name: value for name, value in plan_wish.items() if name not in _WHATEVER}
    selector = known.get("selector") or "all"
    if plan_wish.get("cohort"):
        selector = (await cohorts.find(connection, project, str(plan_wish["cohort"])))["selector"]
    plan = parse_plan({**known, "selector": selector, "models": [_ANY]})
    forecast.check(outcomes, devices)
    if devices:
        members = forecast.synthetic(devices)
    else:
        also = frozenset({*plan.strata, "timezone"})
        found = await cohorts.members(connection, project, parse_selector(plan.selector), also=also)
        members = [
            forecast.Member(one.id, evidence.stratum_of(plan, one), str((one.view or {}).get("timezone", "")))
            for one in found
        ]
    done = await asyncio.to_thread(forecast.forecast, plan, members, outcomes, runs)
    detected = [run.detected_s for run in done if run.detected_s is not None]
    return {
        "devices": len(members),
        "runs": len(done),
        "outcomes": msgspec.to_builtins(outcomes),
        "ends": {state: sum(run.state == state for run in done) for state in sorted({run.state for run in done})},
        "duration_s": _spread([run.duration_s for run in done]),
        "exposed": _spread([run.exposed for run in done]),
        "failed": _spread([run.failed for run in done]),
        "detected_s": _spread(detected) if detected else None,
        "stages_s": msgspec.to_builtins(done[0].stages),
        "needs": _needs(plan),
    }


def _needs(plan: Plan) -> list[dict[str, Any]]:
    """Return by what samples each gate with stated errors is expected to decide."""
    return [
        {"gate": gate.metric, "samples": msgspec.to_builtins(gates.needs(gate, plan.period_s))} for gate in plan.gates
    ]


def _spread(values: list[int]) -> dict[str, int]:
    ranked = sorted(values)
    return {name: ranked[round(at * (len(ranked) - 1))] for name, at in (("low", 0.1), ("middle", 0.5), ("high", 0.9))}


_WHATEVER = ("models", "flag", "variant", "measure", "start", "device", "cohort")
_ANY = {"model": "model", "version": "1.0.0", "manifest": "sha256:" + "0" * 64}
"""Which bundle it is makes no difference to a forecast."""
