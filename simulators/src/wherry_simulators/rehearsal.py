"""A plan on the real machine: devices of virtual time obey it, and the forecast of the same plan stands beside.

Everything but the models is real here (machine, offers, reports, the engine's decisions); the forecast knows of devices only
with which probability they fail and how long they take. That time is measured in the rehearsal, so the two can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection
from typing import Any

import msgspec

from wherry_server import outcomes
from wherry_server.forecast import Outcomes, Run, forecast, synthetic
from wherry_server.plan import Plan, parse_plan
from wherry_shared.errors import RefusedError
from wherry_simulators.campaign import Campaign, check_plan
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, MODEL, Release, Scenario, manifest_of
from wherry_simulators.world import TURN_MS, World

OLD, NEW = "1.0.0", "1.1.0"
ERROR_RATE = 0.8
"""Of requests, on a device where the new version fails."""
DAYS_MAX = 60


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a plan on the real machine, and what was forecast."""

    devices: int
    settle_s: float
    """In the middle, from exposure to settling."""
    fails_s: float
    """The same of devices that failed; 0 without one."""
    real: Run
    forecast: list[Run]
    violations: int


def plan_of(wish: dict[str, Any]) -> Plan:
    """Return the plan of a plan file, for the simulated bundle.

    Raises:
        RefusedError: as `plan.parse_plan` and `campaign.check_plan`; `plan_flag`.
    """
    if wish.get("flag"):
        raise RefusedError(
            "plan_flag",
            "a rehearsal tries a bundle, and no device tries a flag",
            next_step="forecast the plan: wherry rollout simulate",
        )
    known = {name: value for name, value in wish.items() if name not in ("models", "start", "device", "cohort")}
    bundle = {"model": MODEL, "version": NEW, "manifest": manifest_of(NEW)}
    plan = parse_plan({**known, "selector": "all", "models": [bundle]})
    check_plan(plan)
    return plan


def rehearse(plan: Plan, devices: int, failed: float, seed: int, runs: int = 10) -> Rehearsal:
    """Run a plan on the real machine, on devices of which a share fails, and forecast it."""
    bad = Behaviour(affected=failed, variants=[VariantBehaviour(error_rate=ERROR_RATE)]) if failed else Behaviour()
    release = Release(NEW, bad, at_ms=HOUR_MS, stages=tuple(plan.stages), plan=plan)
    row = Scenario("a plan is rehearsed", (Release(OLD), release), devices=devices, settle_ms=DAYS_MAX * 24 * HOUR_MS)
    world = World(row, seed)
    result = world.run()
    campaign = world.campaigns[NEW]
    settle_s, spread = _times(campaign, outcomes.FAILURES, ended_well=True)
    fails_s, _ = _times(campaign, outcomes.FAILURES, ended_well=False)
    began = campaign.moved_ms[0] if campaign.moved_ms else 0
    breach = [at for at, moved in zip(campaign.moved_ms, campaign.moves, strict=True) if moved.state == "returning"]
    real = Run(
        state=campaign.progress.state,
        reason=campaign.progress.reason,
        duration_s=(campaign.moved_ms[-1] - began) // 1000 if campaign.moved_ms else 0,
        exposed=len(campaign.assigned),
        failed=sum(one.outcome in ("returned", "failed", "refused") for one in campaign.assigned.values()),
        detected_s=(breach[0] - began) // 1000 if breach else None,
        stages=[],
    )
    told = Outcomes(
        failed=failed,
        silent=0.0,
        settle_s=settle_s or fails_s or 1.0,
        settle_spread=spread,
        fails_s=fails_s,
        look_s=TURN_MS / 1000,
    )
    return Rehearsal(
        devices=devices,
        settle_s=told.settle_s,
        fails_s=fails_s,
        real=real,
        forecast=forecast(plan, synthetic(devices), told, runs),
        violations=result.violation_count,
    )


def _times(campaign: Campaign, failures: Collection[str], *, ended_well: bool) -> tuple[float, float]:
    """Return after how many seconds devices settled, in the middle, and by what part of it sooner or later; 0 without one."""
    times = [
        (one.settled_ms - one.exposed_ms) / 1000
        for one in campaign.assigned.values()
        if one.settled_ms and (one.outcome not in failures) is ended_well
    ]
    if not times:
        return 0.0, 0.0
    middle = max(1.0, statistics.median(times))
    return middle, min((max(times) - min(times)) / 2 / middle, 1.0)
