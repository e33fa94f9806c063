"""A rollout on the simulated server, decided by the real engine.

This is the director without a database: what a report makes of an assignment (`wherry_server.outcomes`), what is offered
forwards and backwards (`wherry_server.offers`) and what follows (`wherry_server.rollout`) are the real functions; only the
rows and the counting over them are plain Python here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from wherry_server import evidence, offers, outcomes
from wherry_server.plan import Plan
from wherry_server.rollout import (
    Command,
    Counts,
    Evidence,
    Expose,
    Moved,
    Progress,
    Promote,
    Retry,
    Scope,
    Withdraw,
    ahead,
    decide,
    reach,
    takes_newcomers,
)
from wherry_server.sequential import Pairs
from wherry_server.targeting import exposed, key_of
from wherry_shared import reasons
from wherry_shared.clock import Now
from wherry_shared.errors import RefusedError
from wherry_shared.wire import OfferedModel, Report
from wherry_simulators.server import Server

STRATUM = ""
"""All devices are of one kind here."""


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
    compared: tuple[int, int, int] = (0, 0, 0)
    """Of a shadow: runs that were compared, that agreed, that were skipped."""


def check_plan(plan: Plan) -> None:
    """Refuse what simulated devices cannot carry: they send no telemetry, are of one kind and zone, and nobody approves.

    Raises:
        RefusedError: `rehearsal_plan`.
    """
    if plan.compared or plan.held_back or plan.window or plan.strata or plan.approval:
        raise RefusedError(
            "rehearsal_plan",
            "a rehearsal carries plans without controls, strata, windows and approval",
            next_step="leave those out, or forecast the plan: wherry rollout simulate",
        )


class Campaign:
    """One rollout of one model."""

    def __init__(self, server: Server, plan: Plan, rollout: str) -> None:
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
            if assignment.tried:
                assignment.compared = (report.compared, report.agreed, report.skipped)
            if change.settled and not assignment.settled_ms:
                assignment.settled_ms = self._now_ms

    # --- what is done ------------------------------------------------------------------------------

    def _expose(self, stage: int, limit: int | None, now: Now) -> list[tuple[str, OfferedModel]]:
        tried = self.plan.two_rounds and not self.progress.promoting
        offered = offers.forwards(self.plan, self.rollout, tried=tried)[self.model]
        changes: list[tuple[str, OfferedModel]] = []
        for device in sorted(self._due(), key=self._keys.__getitem__)[:limit]:
            manifest, target = self._runs(device)
            self.assigned[device] = Assignment(stage, now.monotonic_ms, target, manifest, tried=tried)
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
            if device not in self.assigned and exposed(key, STRATUM, self.progress.cut_offs, share)
        ]

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
        evidence = Evidence(
            stages=[Counts(**counts) for counts in stages],
            happened=self._happened(),
            members=len(self._keys),
            unexposed=len(self._due()) if takes_newcomers(self.plan, self.progress) else 0,
            unpromoted=self._promotable(),
            beside=self._beside(),
            command=self.command,
        )
        return ahead(self.plan, self.progress, evidence, {STRATUM: self._keys.values()})

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
        """Return the one count that a device is in."""
        if assignment.outcome in outcomes.FAILURES:
            return "failed"
        if assignment.outcome != "exposed":
            return assignment.outcome
        if now.monotonic_ms - self._heard_ms.get(device, assignment.exposed_ms) > self.plan.silent_s * 1000:
            return "silent"
        return "late" if now.monotonic_ms - assignment.exposed_ms > self.plan.late_s * 1000 else "pending"
