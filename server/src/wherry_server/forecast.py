"""What a plan would do: `decide` over a fleet of numbers whose outcomes are stated, before anyone presses start. Pure.

The engine is the real one; what is not real is said in `Outcomes`: each device confirms, fails, stays silent or is late with
stated probabilities, independent of the others, and settles after a time that is even between half and one and a half of
`settle_s`. People approve at once. Gates that compare with a control need telemetry, which is not invented: they are refused.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec

from wherry_server.plan import Plan
from wherry_server.rollout import (
    EXPOSED_PER_TURN,
    FINAL,
    Counts,
    Evidence,
    Expose,
    Moved,
    Progress,
    Withdraw,
    ahead,
    decide,
    reach,
)
from wherry_server.targeting import exposed, key_of
from wherry_shared.clock import MICROSECONDS, Now
from wherry_shared.errors import RefusedError
from wherry_shared.ids import share_key

RUNS_MAX = 100
DEVICES_MAX = 100_000
DEVICE_RUNS_MAX = 200_000
"""Devices times runs: more runs of a large fleet tell little more."""
TURNS_MAX = 200_000
STEPS_PER_SETTLING = 20
IDLE_STEP_S = 60
_WHOLE = 1 << 64


class Outcomes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What devices are taken to do, as probabilities; who is none of these is confirmed."""

    failed: float = 0.01
    silent: float = 0.01
    late: float = 0.0
    idle: float = 0.0
    """Of the confirmed: those without traffic."""
    settle_s: float = 120.0


class Member(msgspec.Struct, frozen=True):
    """A device, as far as a plan looks at it."""

    id: str
    stratum: str = ""
    timezone: str = ""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """How one run ended."""

    state: str
    reason: str
    duration_s: int
    exposed: int
    failed: int
    detected_s: int | None
    """From the start to the breach, if there was one."""
    stages: list[int]
    """Seconds after which each stage began."""


def check(plan: Plan, outcomes: Outcomes, devices: int) -> None:
    """Refuse what cannot be forecast.

    Raises:
        RefusedError: `forecast_range` or `forecast_gates`.
    """
    shares = (outcomes.failed, outcomes.silent, outcomes.late)
    if not all(0 <= share <= 1 for share in (*shares, outcomes.idle)) or sum(shares) > 1:
        raise RefusedError("forecast_range", "outcomes are probabilities, and failed + silent + late is at most 1")
    if not 1 <= outcomes.settle_s <= 7 * 86_400 or not 0 <= devices <= DEVICES_MAX:
        raise RefusedError("forecast_range", f"settle_s is 1 s to 7 d, and a fleet has at most {DEVICES_MAX} devices")
    if plan.compared:
        raise RefusedError(
            "forecast_gates",
            f"gate {plan.compared[0].metric} compares telemetry, which a forecast does not invent",
            next_step="leave it out, or measure it on a simulated fleet: benchmarks/gates.py",
        )


def synthetic(devices: int) -> list[Member]:
    """Return a fleet of one kind."""
    return [Member(f"device-{number}") for number in range(devices)]


def forecast(plan: Plan, members: Sequence[Member], outcomes: Outcomes, runs: int) -> list[Run]:
    """Run a plan so many times, each with other keys and other luck."""
    check(plan, outcomes, len(members))
    most = max(1, min(runs, RUNS_MAX, DEVICE_RUNS_MAX // max(len(members), 1)))
    return [_Fleet(plan, members, outcomes, f"forecast-{number}").run() for number in range(most)]


class _Fleet:
    """Counts that change as devices settle; no device is looked at twice in a turn."""

    def __init__(self, plan: Plan, members: Sequence[Member], outcomes: Outcomes, salt: str) -> None:
        self.plan, self.outcomes, self.salt = plan, outcomes, salt
        ranked = sorted((key_of(salt, member.id), member) for member in members)
        self.keys: dict[str, list[int]] = {}
        for key, member in ranked:
            self.keys.setdefault(member.stratum, []).append(key)
        self.left = ranked
        self.members = len(ranked)
        self.stages: list[dict[str, int]] = [{} for _ in plan.stages]
        self.due: list[tuple[float, int, int, str, str]] = []
        """(when, order, stage, what it was counted as, what it is then)."""
        self.progress = Progress()
        self.begun: list[int] = []
        self._below: list[tuple[int, Member]] = []
        self._stands: object = None
        self.start_us = max(plan.start_us, 0)

    def run(self) -> Run:
        now_s, detected = 0.0, None
        step_s = max(1.0, self.outcomes.settle_s / STEPS_PER_SETTLING)
        command = "start"
        for _ in range(TURNS_MAX):
            self._settle(now_s)
            now = Now("forecast", round(now_s * 1000), self.start_us / MICROSECONDS + now_s)
            evidence = self._evidence(now, command)
            command = ""
            before = self.progress
            self.progress, decisions = decide(self.plan, before, evidence, now)
            if self.progress.stage > before.stage:
                self.begun.append(round(now_s))
            for one in decisions:
                if isinstance(one, Expose):
                    self._expose(one, now, now_s)
                elif isinstance(one, Withdraw):
                    self._withdraw(one)
                elif isinstance(one, Moved) and one.state == "returning" and detected is None:
                    detected = round(now_s)
            if self.progress.state in FINAL:
                break
            busy = bool(self.due) or evidence.unexposed or decisions
            now_s += step_s if busy else max(step_s, IDLE_STEP_S)
        total = self._evidence(Now("forecast", round(now_s * 1000), now_s), "").total
        return Run(
            state=self.progress.state,
            reason=self.progress.reason,
            duration_s=round(now_s),
            exposed=total.ever,
            failed=total.failed,
            detected_s=detected,
            stages=self.begun,
        )

    def _evidence(self, now: Now, command: str) -> Evidence:
        plan, progress = self.plan, self.progress
        share, reached = reach(plan, progress), progress.stage >= 0
        stands = (progress.cut_offs, share, reached, len(self.left))
        if stands != self._stands:
            self._stands = stands
            self._below = [
                one for one in self.left if reached and exposed(one[0], one[1].stratum, progress.cut_offs, share)
            ]
        below = self._below
        free = [one for one in below if plan.window is None or plan.window.open_at(now.wall_us, one[1].timezone)]
        found = Evidence(
            stages=[Counts(**stage) for stage in self.stages],
            members=self.members,
            unexposed=len(free),
            closed=len(below) - len(free),
            approvals={str(stage): plan.approvers(stage) for stage in range(len(plan.stages))},
            happened={
                gate.metric: sum(stage.get("failed", 0) for stage in self.stages)
                for gate in plan.gates
                if gate.metric == "failed"
            },
            command=command,  # type: ignore[arg-type]
        )
        return ahead(plan, progress, found, self.keys)

    def _expose(self, one: Expose, now: Now, now_s: float) -> None:
        most = EXPOSED_PER_TURN if one.limit is None else min(one.limit, EXPOSED_PER_TURN)
        left = []
        for key, member in self.left:
            window = self.plan.window
            shut = window is not None and not window.open_at(now.wall_us, member.timezone)
            if most <= 0 or shut or not exposed(key, member.stratum, self.progress.cut_offs, one.share):
                left.append((key, member))
                continue
            most -= 1
            self._count(one.stage, "pending", 1)
            when, became = self._fate(member.id)
            heapq.heappush(self.due, (now_s + when, len(self.due), one.stage, "pending", became))
        self.left = left

    def _fate(self, device: str) -> tuple[float, str]:
        luck = share_key(f"{self.salt}/outcome", device) / _WHOLE
        outcomes, plan = self.outcomes, self.plan
        settles_s = outcomes.settle_s * (0.5 + share_key(f"{self.salt}/time", device) / _WHOLE)
        if luck < outcomes.failed:
            return settles_s, "failed"
        if luck < outcomes.failed + outcomes.silent:
            return plan.silent_s, "silent"
        if luck < outcomes.failed + outcomes.silent + outcomes.late:
            return plan.late_s, "late"
        idle = share_key(f"{self.salt}/idle", device) / _WHOLE < outcomes.idle
        return settles_s, "confirmed_idle" if idle else "confirmed"

    def _settle(self, now_s: float) -> None:
        while self.due and self.due[0][0] <= now_s:
            _, _, stage, was, became = heapq.heappop(self.due)
            self._count(stage, was, -1)
            self._count(stage, became, 1)

    def _withdraw(self, one: Withdraw) -> None:
        """Bring devices back at once: how long that takes is no part of the forecast."""
        self.due.clear()
        for number, stage in enumerate(self.stages):
            confirmed = one.scope == "all" or (one.scope == "stage" and number == one.stage)
            for name in ("pending", "silent", "late"):
                stage["withdrawn"] = stage.get("withdrawn", 0) + stage.pop(name, 0)
            for name in ("confirmed", "confirmed_idle") if confirmed else ():
                stage["reverted"] = stage.get("reverted", 0) + stage.pop(name, 0)

    def _count(self, stage: int, name: str, change: int) -> None:
        self.stages[stage][name] = self.stages[stage].get(name, 0) + change
