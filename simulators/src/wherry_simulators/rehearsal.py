"""A plan on the real machine: devices of virtual time obey it, and the forecast of the same plan stands beside.

Everything but the models is real here (machine, offers, reports, the engine's decisions); the forecast knows of devices only
with which probability they fail and how long they take. That time is measured in the rehearsal, so the two can be compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from wherry_server import outcomes
from wherry_server.forecast import CRASHES_BEFORE, Member, Outcomes, Run, forecast
from wherry_server.gates import QUANTILES
from wherry_server.plan import Plan, parse_plan
from wherry_shared.errors import RefusedError
from wherry_shared.ids import share_key
from wherry_simulators.campaign import Campaign, check_plan
from wherry_simulators.device import EPOCH_WALL_S
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, MODEL, Release, Scenario, manifest_of
from wherry_simulators.world import TURN_MS, World, names

OLD, NEW = "1.0.0", "1.1.0"
ERROR_RATE = 0.8
"""Of requests, on a device where the new version fails."""
ERRORS_BEFORE = 0.002
"""Of requests, on every device and with either version."""
DAYS_MAX = 60
WEEK_S = 7 * 86_400


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


def members_of(devices: int, strata: Mapping[str, float], zones: Mapping[str, float]) -> list[Member]:
    """Return a fleet of so many devices, of strata and time zones with these weights; of one kind where none are given."""

    def drawn(weights: Mapping[str, float], what: str, device: str) -> str:
        at = share_key(what, device) / 2**64 * sum(weights.values())
        for name, weight in weights.items():
            at -= weight
            if at < 0:
                return name
        return ""

    return [Member(name, drawn(strata, "stratum", name), drawn(zones, "timezone", name)) for name in names(devices)]


def rehearse(
    plan: Plan,
    devices: int,
    failed: float,
    seed: int,
    runs: int = 10,
    *,
    silent: float = 0.0,
    worse: float = 0.0,
    strata: Mapping[str, float] | None = None,
    zones: Mapping[str, float] | None = None,
) -> Rehearsal:
    """Run a plan on the real machine, on devices of which a share fails, and forecast it.

    Args:
        plan: of `plan_of`.
        devices: how many.
        failed: the share on which the new version fails, of those that are there.
        silent: the share that neither hears nor says anything, from before the rollout until it has ended.
        seed: of everything that is left to chance.
        runs: forecasts.
        worse: by how many times the harm that matters the new version is worse, in every gate with a control.
        strata: weights of the plan's strata.
        zones: weights of time zones, for plans with a window.
    """
    at_ms, plan = _beginning(plan)
    members = members_of(devices, strata or {}, zones or {})
    old, new = (_behaviour(plan, row_worse) for row_worse in (0.0, worse))
    if failed:
        new = msgspec.structs.replace(new, error_rate=ERROR_RATE)
    release = Release(
        NEW,
        Behaviour(affected=failed or 1.0, variants=[new]),
        at_ms=at_ms,
        stages=tuple(plan.stages),
        plan=plan,
        members={one.id: one for one in members},
    )
    first = Release(OLD, Behaviour(variants=[old]))
    row = Scenario(
        "a plan is rehearsed",
        (first, release),
        devices=devices,
        settle_ms=DAYS_MAX * 24 * HOUR_MS,
        silent=frozenset(one.id for one in members if share_key("silent", one.id) / 2**64 < silent),
        silent_from_ms=at_ms,
    )
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
        failed=failed * (1 - silent),
        silent=silent,
        settle_s=settle_s or fails_s or 1.0,
        settle_spread=spread,
        fails_s=fails_s,
        look_s=TURN_MS / 1000,
        worse=worse,
    )
    return Rehearsal(
        devices=devices,
        settle_s=told.settle_s,
        fails_s=fails_s,
        real=real,
        forecast=forecast(plan, members, told, runs),
        violations=result.violation_count,
    )


def weights(said: Collection[str]) -> dict[str, float]:
    """Read `NAME=WEIGHT`s.

    Raises:
        RefusedError: `rehearsal_weight`.
    """
    found: dict[str, float] = {}
    for one in said:
        name, _, weight = one.rpartition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < math.inf:
            raise RefusedError(
                "rehearsal_weight",
                f"{one!r} is no NAME=WEIGHT",
                next_step="such as --stratum x86_64=0.8 --stratum armv7l=0.2",
            )
    return found


def _beginning(plan: Plan) -> tuple[int, Plan]:
    """Return when the rollout begins in virtual time, and the plan with that date: at the hour and the day of the week that it has."""
    at_s = 3600
    if plan.start_us:
        at_s += round(plan.start_us / 1e6 - EPOCH_WALL_S - at_s) % WEEK_S
    date = datetime.fromtimestamp(EPOCH_WALL_S + at_s, UTC).isoformat() if plan.start_us or plan.window else ""
    return at_s * 1000, msgspec.structs.replace(plan, start_at=date)


def _behaviour(plan: Plan, worse: float) -> VariantBehaviour:
    """Return a version that is worse by so many times the harm that matters, in what the plan compares."""
    harms = {gate.metric: gate.harm for gate in plan.compared}
    row = Scenario("", ())
    slower = max((harms[metric] for metric in QUANTILES if metric in harms), default=0.0)
    crashes_per_h = harms.get("crash_rate", 0.0) * (CRASHES_BEFORE + worse)
    return VariantBehaviour(
        error_rate=min(ERRORS_BEFORE + worse * harms["errors"], 1.0) if "errors" in harms else 0.0,
        latency_us=VariantBehaviour().latency_us * (1 + worse * slower),
        crash_per_request=crashes_per_h / 3600 / row.requests_per_s,
    )


def _times(campaign: Campaign, failures: Collection[str], *, ended_well: bool) -> tuple[float, float]:
    """Return after how many seconds devices settled, in the middle, and by what part of it sooner or later; 0 without one.

    What a candidate takes beside the incumbent before it is proved is the plan's, and left out.
    """
    plan = campaign.plan
    beside_s = plan.tried[1].max_s if plan.tries in ("shadow", "split") else 0
    times = [
        (one.settled_ms - one.exposed_ms) / 1000 - (beside_s if one.tried and ended_well else 0)
        for one in campaign.assigned.values()
        if one.settled_ms and (one.outcome not in failures) is ended_well
    ]
    if not times:
        return 0.0, 0.0
    middle = max(1.0, statistics.median(times))
    return middle, min((max(times) - min(times)) / 2 / middle, 1.0)
