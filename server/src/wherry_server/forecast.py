"""What a plan would do: `decide` over a fleet of numbers whose outcomes are stated, before anyone presses start. Pure.

The engine is the real one; what is not real is said in `Outcomes`: each device confirms, fails, stays silent or is late with
stated probabilities, independent of the others, and settles after a time that is even around `settle_s`. People approve at
once. For gates with a control, devices get values as stated (`Values`): all with traffic answer in every period, and are of one stratum.

A real director mostly hears of failures before confirmations, and looks at both together. Where that is not said (`fails_s`,
`look_s`), an adaptive plan is forecast to widen on the first good news, and so to expose more than it does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

import msgspec

from wherry_server.gates import BESIDE, Gate
from wherry_server.lanes import Due, due, period
from wherry_server.plan import Plan
from wherry_server.rollout import (
    ACTIVE,
    EXPOSED_PER_TURN,
    FINAL,
    Counts,
    Evidence,
    Expose,
    Lane,
    Moved,
    Progress,
    Promote,
    Taken,
    Withdraw,
    ahead,
    approval_key,
    decide,
    reach,
    takes_newcomers,
)
from wherry_server.sequential import CONTROLS_MAX, LANES_MAX, SHARE_STEPS, Pairs, merge, pair_up
from wherry_server.targeting import exposed, in_turns, key_of
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
IDLE_STEP_PART = 0.01
"""Of the time that nothing has happened for: a week of waiting is not looked at every minute."""
CRASHES_BEFORE = 0.5
"""How often workers of the incumbent die, times the harm of a gate on that."""
VALUE_SPREAD_MAX = 0.28
"""Standard deviation of devices' values, of the cap: they lie even between 0 and √12 of this."""
_WHOLE = 1 << 64


class Outcomes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What devices are taken to do, as probabilities; who is none of these is confirmed."""

    failed: float = 0.01
    silent: float = 0.01
    late: float = 0.0
    idle: float = 0.0
    """Of the confirmed: those without traffic."""
    settle_s: float = 120.0
    settle_spread: float = 0.5
    """By what part of it devices settle sooner or later."""
    fails_s: float = 0.0
    """Seconds until a device that fails has failed; 0: `settle_s`."""
    look_s: float = 0.0
    """How often the director looks; 0: twenty times while a device settles."""
    returned: float = 1.0
    """Of the failed: those that went back from a trial."""
    crashed: float = 0.0
    """Of the failed: those whose worker or canary crashed."""
    worse: float = 0.0
    """By how many times the harm that matters the bundle is worse, in every gate with a control."""
    spread: float = 0.1
    """Standard deviation of devices' values in such a gate, of its cap; crashes vary as such rare events do."""


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


def check(outcomes: Outcomes, devices: int) -> None:
    """Refuse what cannot be forecast.

    Raises:
        RefusedError: `forecast_range`.
    """
    shares = (outcomes.failed, outcomes.silent, outcomes.late)
    parts = (*shares, outcomes.idle, outcomes.returned, outcomes.crashed, outcomes.settle_spread)
    if not all(0 <= share <= 1 for share in parts) or sum(shares) > 1:
        raise RefusedError("forecast_range", "outcomes are probabilities, and failed + silent + late is at most 1")
    if not 1 <= outcomes.settle_s <= 7 * 86_400 or not 0 <= devices <= DEVICES_MAX:
        raise RefusedError("forecast_range", f"settle_s is 1 s to 7 d, and a fleet has at most {DEVICES_MAX} devices")
    if not 0 <= outcomes.fails_s <= 7 * 86_400 or not 0 <= outcomes.look_s <= 3_600:
        raise RefusedError("forecast_range", "fails_s is 0 to 7 d, and look_s 0 to 1 h")
    if not 0 <= outcomes.worse <= 1_000 or not 0 <= outcomes.spread <= VALUE_SPREAD_MAX:
        raise RefusedError("forecast_range", f"worse is 0 to 1000, and spread 0 to {VALUE_SPREAD_MAX}")


def synthetic(devices: int) -> list[Member]:
    """Return a fleet of one kind."""
    return [Member(f"device-{number}") for number in range(devices)]


def forecast(plan: Plan, members: Sequence[Member], outcomes: Outcomes, runs: int) -> list[Run]:
    """Run a plan so many times, each with other keys and other luck."""
    check(outcomes, len(members))
    most = max(1, min(runs, RUNS_MAX, DEVICE_RUNS_MAX // max(len(members), 1)))
    return [_Fleet(plan, members, outcomes, f"forecast-{number}").run() for number in range(most)]


class _Due(NamedTuple):
    """A device that will come to something."""

    at_s: float
    order: int
    stage: int
    wave: int
    device: str
    became: str


def _rare(luck: float, mean: float) -> int:
    """Return the number of events of which so many are expected, by a number between 0 and 1 (Poisson, inverted)."""
    count, chance = 0, math.exp(-mean)
    below = chance
    while luck > below and count < 20 * (mean + 10):
        count += 1
        chance *= mean / count
        below += chance
    return count


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
        self.due: list[_Due] = []
        self.happened = dict.fromkeys(("failed", "returned", "crashed"), 0)
        self.waves: dict[int, list[str]] = {}
        """Period → devices exposed in it that will confirm, and answer requests."""
        self.confirmed: dict[int, int] = {}
        """Period → devices exposed in it that have confirmed."""
        self.controls = {gate.metric: [0] * LANES_MAX for gate in plan.compared}
        """Metric → devices used as a control, by lane."""
        self.proved: list[list[str]] = [[] for _ in plan.stages]
        """Devices whose candidate runs beside the incumbent, or stands by, by stage."""
        self.beside = 0
        """Devices that were ever proved so."""
        self.progress = Progress()
        self.begun: list[int] = []
        self._below: list[tuple[int, Member]] = []
        self._stands: object = None
        self.start_us = max(plan.start_us, 0)

    def run(self) -> Run:
        now_s, quiet_s, detected = 0.0, 0.0, None
        step_s = self.outcomes.look_s or max(1.0, self.outcomes.settle_s / STEPS_PER_SETTLING)
        command = "start"
        for _ in range(TURNS_MAX):
            self._settle(now_s)
            now = Now("forecast", round(now_s * 1000), self.start_us / MICROSECONDS + now_s)
            evidence = self._evidence(now, command)
            command = ""
            before = self.progress
            self.progress, decisions = decide(self.plan, before, evidence, now)
            if (self.progress.promoting, self.progress.stage) > (before.promoting, before.stage):
                self.begun.append(round(now_s))
            for one in decisions:
                if isinstance(one, Expose):
                    self._expose(one, now, now_s)
                elif isinstance(one, Promote):
                    self._promote(one, now, now_s)
                elif isinstance(one, Withdraw):
                    self._withdraw(one)
                elif isinstance(one, Moved) and one.state == "returning" and detected is None:
                    detected = round(now_s)
            if self.progress.state in FINAL:
                break
            busy = bool(self.due) or evidence.unexposed or decisions
            quiet_s = now_s if busy else quiet_s
            now_s += step_s if busy else max(step_s, IDLE_STEP_S, IDLE_STEP_PART * (now_s - quiet_s))
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
        share, reached = reach(plan, progress), takes_newcomers(plan, progress)
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
            approvals={
                approval_key(stage, number): plan.approvers(stage, number)
                for stage in range(len(plan.stages))
                for number in (1, 2)
            },
            happened={gate.metric: self.happened[gate.metric] for gate in plan.gates if gate.metric in self.happened},
            unmeasured=self._unmeasured(),
            taken=self._taken(now) if plan.compared and progress.state in ACTIVE else [],
            command=command,  # type: ignore[arg-type]
            unpromoted=[len(devices) for devices in self.proved] if plan.two_rounds else [],
            beside=self._beside(),
        )
        return ahead(plan, progress, found, self.keys)

    def _expose(self, one: Expose, now: Now, now_s: float) -> None:
        most = EXPOSED_PER_TURN if one.limit is None else min(one.limit, EXPOSED_PER_TURN)
        window, cut_offs = self.plan.window, self.progress.cut_offs
        free = (
            member
            for key, member in self.left
            if exposed(key, member.stratum, cut_offs, one.share)
            and (window is None or window.open_at(now.wall_us, member.timezone))
        )
        chosen = list(islice(in_turns(free, attrgetter("stratum")) if self.plan.takes_turns else free, most))
        for member in chosen:
            self._count(one.stage, "pending", 1)
            when, became = self._fate(member.id)
            first = self.plan.two_rounds and not self.progress.promoting
            if first and became in ("confirmed", "confirmed_idle"):
                became, when = "proved", when + self.beside_s
            wave = period(self.plan, now.wall_us)
            heapq.heappush(self.due, _Due(now_s + when, len(self.due), one.stage, wave, member.id, became))
            if self.plan.compared and (self.plan.paired or not first):
                with_traffic = self.waves.setdefault(wave, [])
                if became in ("proved", "confirmed"):
                    with_traffic.append(member.id)
        told = {member.id for member in chosen}
        self.left = [ranked for ranked in self.left if ranked[1].id not in told]

    @property
    def beside_s(self) -> float:
        """How long a candidate runs beside the incumbent: a shadow and a split of requests end by their time."""
        return self.plan.tried[1].max_s if self.plan.tries in ("shadow", "split") else 0.0

    def _promote(self, one: Promote, now: Now, now_s: float) -> None:
        """Let candidates take over; who failed beside the incumbent failed there, and the rest confirm."""
        most = EXPOSED_PER_TURN if one.limit is None else min(one.limit, EXPOSED_PER_TURN)
        wave = period(self.plan, now.wall_us)
        for stage in range(one.stage + 1):
            told, self.proved[stage] = self.proved[stage][:most], self.proved[stage][most:]
            most -= len(told)
            self._count(stage, "proved", -len(told))
            self._count(stage, "pending", len(told))
            for device in told:
                when, became = self._fate(device)
                heapq.heappush(self.due, _Due(now_s + when, len(self.due), stage, wave, device, became))
            if self.plan.compared and not self.plan.paired:
                self.waves.setdefault(wave, []).extend(told)

    def _fate(self, device: str) -> tuple[float, str]:
        luck = share_key(f"{self.salt}/outcome", device) / _WHOLE
        outcomes, plan = self.outcomes, self.plan
        early = 1 + outcomes.settle_spread * (2 * share_key(f"{self.salt}/time", device) / _WHOLE - 1)
        settles_s = outcomes.settle_s * early
        if luck < outcomes.failed:
            return (outcomes.fails_s or outcomes.settle_s) * early, "failed"
        if luck < outcomes.failed + outcomes.silent:
            return plan.silent_s, "silent"
        if luck < outcomes.failed + outcomes.silent + outcomes.late:
            return plan.late_s, "late"
        idle = share_key(f"{self.salt}/idle", device) / _WHOLE < outcomes.idle
        return settles_s, "confirmed_idle" if idle else "confirmed"

    def _settle(self, now_s: float) -> None:
        while self.due and self.due[0].at_s <= now_s:
            one = heapq.heappop(self.due)
            self._count(one.stage, "pending", -1)
            self._count(one.stage, one.became, 1)
            if one.became == "failed":
                self.happened["failed"] += 1
                luck = share_key(f"{self.salt}/kind", one.device) / _WHOLE
                self.happened["returned"] += luck < self.outcomes.returned
                self.happened["crashed"] += 1 - luck <= self.outcomes.crashed
            elif one.became == "proved":
                self.proved[one.stage].append(one.device)
                self.beside += 1
            elif one.became in ("confirmed", "confirmed_idle"):
                self.confirmed[one.wave] = self.confirmed.get(one.wave, 0) + 1

    # --- what is compared -----------------------------------------------------------------------

    def _unmeasured(self) -> int:
        if self.plan.strategy != "adaptive" or not self.plan.compared or self.progress.widened:
            return 0
        seen = self.progress.compared.waves
        return sum(devices for wave, devices in self.confirmed.items() if not seen.get(str(wave)))

    def _taken(self, now: Now) -> list[Taken]:
        """Measure the lanes that have ended, as the director does."""
        found = []
        for one in due(self.plan, self.progress.compared, list(self.waves), now.wall_us):
            lanes = {gate.metric: self._lane(gate, one) for gate in self.plan.compared}
            found.append(Taken(wave=one.wave, lane=one.lane, lanes=lanes))
        return found

    def _lane(self, gate: Gate, one: Due) -> Lane:
        """Compare a wave with devices that are not exposed and not used in this lane yet, in the numbers of `draw`."""
        used = self.controls[gate.metric]
        salt = f"{self.salt}/{gate.metric}/{one.lane}"
        mine = self.waves[one.wave]
        if self.plan.paired:
            parts = [
                pair_up(
                    [self._value(gate, one.lane, salt, device, self.outcomes.worse)], [self._own(gate, one, device)]
                )
                for device in mine
            ]
            return Lane(pairs=merge(parts))
        fresh = max(int(len(self.left) * (1 - self.outcomes.idle)) - used[one.lane], 0)
        if not mine or not fresh:
            return Lane()
        count = min(fresh, len(mine) * min(max(fresh // 2 // len(mine), 1), CONTROLS_MAX))
        controls = [f"control {used[one.lane] + number}" for number in range(count)]
        used[one.lane] += count
        return Lane(
            pairs=pair_up(
                [self._value(gate, one.lane, salt, device, self.outcomes.worse) for device in mine],
                [self._value(gate, one.lane, salt, device, 0.0) for device in controls],
            )
        )

    def _own(self, gate: Gate, one: Due, device: str) -> float:
        """Return what the incumbent of a device shows beside the candidate."""
        return self._value(gate, one.lane, f"{self.salt}/{gate.metric}/{one.lane}", device, 0.0)

    def _beside(self) -> dict[str, Pairs]:
        """Return what shadows came to: half of what is tolerated on every device, and what is stated to be worse."""
        found: dict[str, Pairs] = {}
        for gate in self.plan.gates:
            if gate.metric in BESIDE and self.beside:
                value = min((gate.tolerated or 0.0) / 2 + self.outcomes.worse * gate.harm, 1.0)
                found[gate.metric] = ((int(value * SHARE_STEPS), self.beside),)
        return found

    def _value(self, gate: Gate, lane: int, salt: str, device: str, worse: float) -> float:
        """Return what a device shows in a lane, of the lane's cap."""
        luck = share_key(salt, device) / _WHOLE
        cap = gate.caps(self.plan.period_s)[lane]
        if gate.metric != "crash_rate":
            return min(luck * self.outcomes.spread * math.sqrt(12) + worse * gate.harm / cap, 1.0)
        hours = (1 << lane) * self.plan.period_s / 3600
        return min(_rare(luck, gate.harm * hours * (CRASHES_BEFORE + worse)) / (cap * hours), 1.0)

    def _withdraw(self, one: Withdraw) -> None:
        """Bring devices back at once: how long that takes is no part of the forecast."""
        self.due.clear()
        for number, stage in enumerate(self.stages):
            confirmed = one.scope == "all" or (one.scope == "stage" and number == one.stage)
            for name in ("pending", "proved", "silent", "late"):
                stage["withdrawn"] = stage.get("withdrawn", 0) + stage.pop(name, 0)
            for name in ("confirmed", "confirmed_idle") if confirmed else ():
                stage["reverted"] = stage.get("reverted", 0) + stage.pop(name, 0)

    def _count(self, stage: int, name: str, change: int) -> None:
        self.stages[stage][name] = self.stages[stage].get(name, 0) + change
