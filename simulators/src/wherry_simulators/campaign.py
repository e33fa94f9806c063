"""A rollout on the simulated server, decided by the real engine.

This is the director without a database: what a report makes of an assignment (`wherry_server.outcomes`), what is offered
forwards and backwards (`wherry_server.offers`) and what follows (`wherry_server.rollout`) are the real functions; only the
rows and the counting over them are plain Python here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from wherry_server import comparison, evidence, offers, outcomes
from wherry_server.evidence import Candidate, Scan
from wherry_server.forecast import Member
from wherry_server.lanes import due, period
from wherry_server.plan import Plan
from wherry_server.rollout import (
    Command,
    Counts,
    Evidence,
    Expose,
    Lane,
    Moved,
    Progress,
    Promote,
    Retry,
    Scope,
    Taken,
    Withdraw,
    ahead,
    approval_key,
    decide,
    reach,
    takes_newcomers,
    with_taken,
)
from wherry_server.sequential import Pairs
from wherry_server.targeting import exposed, in_turns, key_of, signed
from wherry_shared import reasons
from wherry_shared.clock import Now
from wherry_shared.errors import RefusedError
from wherry_shared.wire import OfferedModel, Report
from wherry_simulators.meter import Meter, measures
from wherry_simulators.server import Server


@dataclass(slots=True)
class Assignment:
    """A device that was exposed: the columns of the real table that decisions need."""

    stage: int
    exposed_ms: int
    from_target: str
    from_manifest: str
    outcome: str = "exposed"
    settled_ms: int = 0
    reason: str = ""
    tried: bool = False
    noticed_ms: int = 0
    """When it first spoke of its exposure."""
    exposed_us: int = 0
    """The same by wall time."""
    compared: tuple[int, int, int] = (0, 0, 0)
    """Of a shadow: runs that were compared, that agreed, that were skipped."""


def check_plan(plan: Plan) -> None:
    """Refuse what simulated devices cannot carry: no application tells them numbers.

    Raises:
        RefusedError: `rehearsal_plan`.
    """
    told = sorted(gate.metric for gate in plan.compared if not measures(gate))
    if told:
        raise RefusedError(
            "rehearsal_plan",
            f"no application tells simulated devices the numbers of {', '.join(told)}",
            next_step="leave that gate out, or forecast the plan: wherry rollout simulate",
        )


class _Wave(NamedTuple):
    """A device of a wave, as `comparison` reads it."""

    device_id: str
    stratum: str
    share_key: int


class Campaign:
    """One rollout of one model. People approve at once, as in a forecast."""

    def __init__(
        self,
        server: Server,
        plan: Plan,
        rollout: str,
        *,
        members: Mapping[str, Member] | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`members`: strata and time zones, by device; `meter`: what telemetry says, for plans that compare."""
        check_plan(plan)
        self.server = server
        self.plan = plan
        self.rollout = rollout
        self.progress = Progress()
        self.command: Command = "start"
        self.assigned: dict[str, Assignment] = {}
        self.moves: list[Moved] = []
        self.moved_ms: list[int] = []
        self._now_ms = 0
        self._keys = {device: key_of(rollout, device) for device in server.records}
        self._members = members or {}
        self._meter = meter
        self._heard_ms: dict[str, int] = {}
        self._last: dict[str, int] = {}
        """Device → highest number of a report of this rollout."""

    @property
    def model(self) -> str:
        """The model that is rolled out."""
        return self.plan.models[0].model

    def heard(self, device: str, now_ms: int) -> None:
        """Note that a device was heard of."""
        self._heard_ms[device] = self._now_ms = now_ms

    def turn(self, now: Now) -> list[tuple[str, OfferedModel]]:
        """Decide once; return the devices whose desired model changes."""
        evidence = self._evidence(now)
        self.command = ""
        self.progress, decisions = decide(self.plan, self.progress, evidence, now)
        changes: list[tuple[str, OfferedModel]] = []
        for decision in decisions:
            match decision:
                case Expose(stage=stage, limit=limit):
                    changes += self._expose(stage, limit, now)
                case Promote(stage=stage, limit=limit):
                    changes += self._promote(stage, limit, now)
                case Withdraw(scope=scope, stage=stage):
                    changes += self._withdraw(scope, stage)
                case Retry():
                    raise RuntimeError("nobody orders a retry here")
                case Moved():
                    self.moves.append(decision)
                    self.moved_ms.append(now.monotonic_ms)
        return changes

    def on_report(self, device: str, report: Report) -> None:
        """Carry a report that was just stored into the assignment that it speaks of, as ingest does.

        One that was overtaken (a later one of this rollout is stored already) undoes nothing.
        """
        if report.rollout == self.rollout and report.seq < self._last.get(device, 0):
            return
        if report.rollout == self.rollout:
            self._last[device] = report.seq
        assignment = self.assigned.get(device)
        if assignment is None or report.model != self.model:
            return
        planned = self.plan.models[0]
        change = outcomes.judge(
            outcomes.Assigned(
                self.rollout,
                self.plan.attempt,
                assignment.from_manifest,
                planned.manifest,
                assignment.outcome,
                assignment.tried,
            ),
            report,
        )
        if change is not None:
            assignment.outcome, assignment.reason = change.outcome, change.reason
            assignment.noticed_ms = assignment.noticed_ms or self._now_ms
            if assignment.tried:
                assignment.compared = (report.compared, report.agreed, report.skipped)
            if change.settled and not assignment.settled_ms:
                assignment.settled_ms = self._now_ms

    # --- what is done ------------------------------------------------------------------------------

    def _expose(self, stage: int, limit: int | None, now: Now) -> list[tuple[str, OfferedModel]]:
        tried = self.plan.two_rounds and not self.progress.promoting
        offered = offers.forwards(self.plan, self.rollout, tried=tried)[self.model]
        changes: list[tuple[str, OfferedModel]] = []
        free = sorted(self._open(now), key=self._keys.__getitem__)
        if self.plan.takes_turns:
            free = in_turns(free, lambda device: self._of(device).stratum)
        for device in free[:limit]:
            manifest, target = self._runs(device)
            self.assigned[device] = Assignment(
                stage, now.monotonic_ms, target, manifest, tried=tried, exposed_us=now.wall_us
            )
            changes.append((device, offered))
        return changes

    def _promote(self, stage: int, limit: int | None, now: Now) -> list[tuple[str, OfferedModel]]:
        offered = offers.forwards(self.plan, self.rollout)[self.model]
        due = sorted(
            (one for one in self._unpromoted() if self.assigned[one].stage <= stage), key=self._keys.__getitem__
        )
        for device in due[:limit]:
            one = self.assigned[device]
            one.outcome, one.tried, one.exposed_ms, one.settled_ms = "exposed", False, now.monotonic_ms, 0
            one.noticed_ms = 0
            one.exposed_us = now.wall_us
        return [(device, offered) for device in due[:limit]]

    def _unpromoted(self) -> list[str]:
        return [device for device, one in self.assigned.items() if one.tried and one.outcome in outcomes.STANDING]

    def _withdraw(self, scope: Scope, stage: int) -> list[tuple[str, OfferedModel]]:
        changes: list[tuple[str, OfferedModel]] = []
        for device, one in self.assigned.items():
            confirmed = one.outcome in {"confirmed", "confirmed_idle"}
            in_scope = not confirmed or scope == "all" or (scope == "stage" and one.stage == stage)
            if not in_scope or one.outcome not in outcomes.LIVE:
                continue
            changes.append((device, offers.backwards(self.plan, self.rollout, one.from_target, one.from_manifest)))
            if one.outcome not in outcomes.ENDED:
                back = one.outcome in ("exposed", "proved") and self._runs(device)[0] == one.from_manifest
                one.outcome = "withdrawn" if back else "revert_pending"
        return changes

    def _due(self) -> list[str]:
        share = reach(self.plan, self.progress)
        return [
            device
            for device, key in self._keys.items()
            if device not in self.assigned and exposed(key, self._of(device).stratum, self.progress.cut_offs, share)
        ]

    def _open(self, now: Now) -> list[str]:
        """Return those that are due and whose maintenance window is open."""
        window = self.plan.window
        return [one for one in self._due() if window is None or window.open_at(now.wall_us, self._of(one).timezone)]

    def _of(self, device: str) -> Member:
        return self._members.get(device) or Member(device)

    def _runs(self, device: str) -> tuple[str, str]:
        """Return (manifest, target) of what a device last said that it runs."""
        record = self.server.records[device]
        report = record.current.get(self.model)
        manifest = report.running if report is not None else ""
        for offered in reversed(record.offers.values()):
            if self.model in offered and offered[self.model].manifest == manifest:
                return manifest, offered[self.model].target
        return "", ""

    # --- evidence ---------------------------------------------------------------------------------

    def _evidence(self, now: Now) -> Evidence:
        stages = [dict.fromkeys(Counts.__struct_fields__, 0) for _ in self.plan.stages]
        for device, assignment in self.assigned.items():
            stages[assignment.stage][self._count(device, assignment, now)] += 1
        due = self._due() if takes_newcomers(self.plan, self.progress) else []
        free = self._open(now) if due else []
        keys: dict[str, list[int]] = {}
        for device, key in self._keys.items():
            keys.setdefault(self._of(device).stratum, []).append(key)
        evidence = Evidence(
            stages=[Counts(**counts) for counts in stages],
            happened=self._happened(),
            members=len(self._keys),
            unexposed=len(free),
            closed=len(due) - len(free),
            approvals={
                approval_key(stage, number): self.plan.approvers(stage, number)
                for stage in range(len(self.plan.stages))
                for number in (1, 2)
            },
            unmeasured=self._unmeasured(),
            taken=self._taken(now) if self.progress.state in ("running", "paused") else [],
            unpromoted=self._promotable(),
            beside=self._beside(),
            command=self.command,
        )
        return ahead(self.plan, self.progress, evidence, keys)

    def _waves(self) -> dict[int, list[str]]:
        """Return the devices by the period in which they were exposed, of the round that compares."""
        found: dict[int, list[str]] = {}
        for device, one in self.assigned.items():
            if one.tried is self.plan.paired:
                found.setdefault(period(self.plan, one.exposed_us), []).append(device)
        return found

    def _unmeasured(self) -> int:
        """Count the confirmed devices of waves that no comparison has seen, where that sets the pace."""
        if self.plan.strategy != "adaptive" or not self.plan.compared or self.progress.widened:
            return 0
        seen, good = self.progress.compared.waves, ("confirmed", "confirmed_idle")
        return sum(
            self.assigned[device].outcome in good
            for wave, devices in self._waves().items()
            if not seen.get(str(wave))
            for device in devices
        )

    def _taken(self, now: Now) -> list[Taken]:
        """Measure the lanes that have ended, as `comparison.take` does."""
        if not self.plan.compared or self._meter is None:
            return []
        waves, compared = self._waves(), self.progress.compared
        free = [
            Candidate(device, key, self._of(device).stratum)
            for device, key in self._keys.items()
            if device not in self.assigned
        ]
        taken: list[Taken] = []
        for one in due(self.plan, compared, list(waves), now.wall_us):
            members = [_Wave(each, self._of(each).stratum, signed(self._keys[each])) for each in waves[one.wave]]
            lanes: dict[str, Lane] = {}
            for gate in self.plan.compared:
                sides = self._meter.sides(gate, one)
                if self.plan.paired:
                    lanes[gate.metric] = Lane(pairs=comparison.own_pairs(members, *sides))
                else:
                    known = compared.of(gate.metric)[one.lane]
                    lanes[gate.metric] = comparison.lane_of(self.plan, known, members, Scan(free=free), *sides)
            taken.append(Taken(wave=one.wave, lane=one.lane, lanes=lanes))
            compared = with_taken(compared, taken[-1:])
        return taken

    def _promotable(self) -> list[int]:
        stages = [self.assigned[device].stage for device in self._unpromoted()]
        return [stages.count(stage) for stage in range(len(self.plan.stages))] if self.plan.two_rounds else []

    def _beside(self) -> dict[str, Pairs]:
        """Return what shadows came to, as `wherry_server.evidence` reads it."""
        through = [one for one in self.assigned.values() if one.tried and one.outcome in ("proved", "returned")]
        counted = Counter(one.compared for one in through)
        return evidence.beside_of(self.plan, [(*runs, devices) for runs, devices in counted.items()])

    def _happened(self) -> dict[str, int]:
        """Count the devices to which happened what the plan's gates ask for."""
        failed = [one for one in self.assigned.values() if one.outcome in outcomes.FAILURES]
        found = {
            "failed": len(failed),
            "returned": sum(one.outcome == "returned" for one in failed),
            "crashed": sum(one.reason == reasons.CRASH for one in failed),
        }
        return {gate.metric: found[gate.metric] for gate in self.plan.gates if gate.metric in found}

    def _count(self, device: str, assignment: Assignment, now: Now) -> str:
        """Return the one count that a device is in, by the deadlines of `evidence`."""
        if assignment.outcome in outcomes.FAILURES:
            return "failed"
        if assignment.outcome != "exposed":
            return assignment.outcome
        silent_ms, late_ms = now.monotonic_ms - self.plan.silent_s * 1000, now.monotonic_ms - self.plan.late_s * 1000
        vanished = not assignment.noticed_ms or self._heard_ms.get(device, 0) <= silent_ms
        if assignment.exposed_ms <= silent_ms and vanished:
            return "silent"
        late = 0 < assignment.noticed_ms <= late_ms
        if late and self.plan.window is not None:  # by the time in which its window was open
            zone = self._of(device).timezone
            since_us = now.wall_us - (now.monotonic_ms - assignment.noticed_ms) * 1000
            late = self.plan.window.open_for(self.plan.late_s, since_us, now.wall_us, zone)
        return "late" if late else "pending"
