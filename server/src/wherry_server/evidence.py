"""From rows to counts: everything that a decision is made on is read here, in one transaction.

Deciding gets integers, never rows. Who may be exposed is worked out here too, since it needs the members of the cohort:
`Scan` is the expensive part, and the director takes it no more often than its cost allows.

Which rollout may take a device (per model): one that holds it already keeps it. A device held by another *active*
rollout (running, paused, returning) is taken over only by a higher priority, or at equal priority by a newer rollout
whose plan says `supersede`. A finished release gives way to any newer one, and a release that is done takes
newcomers only where no newer one has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Boolean, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import cohorts
from wherry_server.db import bulk
from wherry_server.gates import BESIDE, counts_devices
from wherry_server.outcomes import ENDED, FAILURES
from wherry_server.pacing import Window
from wherry_server.plan import Plan
from wherry_server.rollout import (
    ACTIVE,
    Command,
    Counts,
    Evidence,
    Progress,
    ahead,
    approval_key,
    reach,
    takes_newcomers,
)
from wherry_server.sequential import SHARE_STEPS, Pairs
from wherry_server.targeting import cut_off_of, exact, key_of, parse_selector
from wherry_shared import reasons
from wherry_shared.errors import RefusedError
from wherry_shared.facts import DeviceFacts, hardware_class

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
CLASS_BAD_DEVICES_MIN = 2
"""A hardware class is known bad by no fewer devices than this: one may just be broken."""
CLASS_BAD_SHARE_MIN = 0.1
"""And by no smaller share of its judged devices, also where the plan bounds a count over all classes."""


class Candidate(NamedTuple):
    """A member that a stage may expose."""

    device: str
    key: int
    stratum: str
    timezone: str = ""
    """Where the plan has a window."""
    attempt: int = 0
    """The attempt to make it with; 0 for that of the plan."""


_Reach = tuple[dict[str, int], float]


@dataclass(slots=True)
class Scan:
    """The members of a rollout's cohort now."""

    members: int = 0
    keys: dict[str, list[int]] = field(default_factory=dict)
    """Stratum → keys of all members that may take part."""
    free: list[Candidate] = field(default_factory=list)
    """Members that this rollout has not exposed and may expose, whatever their key; lowest key first."""
    held: list[Candidate] = field(default_factory=list)
    """Members that another rollout holds, on whose hardware the bundle is known to be bad, or that are in quarantine."""
    recalled: frozenset[str] = frozenset()
    """Devices to take the bundle back from, of those that are not confirmed."""
    _below: dict[str, tuple[_Reach, list[Candidate]]] = field(default_factory=dict)
    """The last answers: while nothing changes the same is asked in every turn."""

    @property
    def size(self) -> tuple[int, int, int, int]:
        """By which two scans are compared: members, free ones, held ones, recalled ones."""
        return self.members, len(self.free), len(self.held), len(self.recalled)

    def unexposed(self, stored: Mapping[str, int], share: float) -> list[Candidate]:
        """Return the free members at or below the cut-offs, lowest key first."""
        return self._known("free", self.free, stored, share)

    def kept_back(self, stored: Mapping[str, int], share: float) -> list[Candidate]:
        """Return the held members at or below the cut-offs."""
        return self._known("held", self.held, stored, share)

    def leave_out(self, devices: set[str]) -> None:
        """Note that devices have been exposed, by whatever rollout."""
        self.free = [one for one in self.free if one.device not in devices]
        self._below.clear()

    def _known(
        self, which: str, candidates: list[Candidate], stored: Mapping[str, int], share: float
    ) -> list[Candidate]:
        reached = dict(stored), share
        known = self._below.get(which)
        if known is None or known[0] != reached:
            known = self._below[which] = reached, below(candidates, stored, share)
        return known[1]

    def open(self, plan: Plan, stored: Mapping[str, int], share: float, now: int) -> list[Candidate]:
        """Return those of `unexposed` whose maintenance window is open."""
        return in_window(plan, self.unexposed(stored, share), now)


def below(candidates: list[Candidate], stored: Mapping[str, int], share: float) -> list[Candidate]:
    """Return the candidates at or below the cut-offs, in their order."""
    cut_offs = {stratum: cut_off_of(stratum, stored, share) for stratum in {one.stratum for one in candidates}}
    return [one for one in candidates if one.key <= cut_offs[one.stratum]]


def timezone_of(facts: str) -> str:
    """Return the time zone that facts (JSON text) name, empty if they name none."""
    found = msgspec.json.decode(facts)
    zone = found.get("timezone") if isinstance(found, dict) else None
    return zone if isinstance(zone, str) else ""


def in_window(plan: Plan, candidates: list[Candidate], now: int) -> list[Candidate]:
    """Return the candidates whose maintenance window is open."""
    return [one for one in candidates if plan.window.open_at(now, one.timezone)] if plan.window else candidates


async def scan(connection: AsyncConnection, row: Any, plan: Plan) -> Scan:
    """Read the members of a rollout and what holds them. `row` is the rollout's."""
    strata = tuple(plan.strata)
    also = frozenset({*strata, "timezone"} if plan.window else strata)
    bad = await known_bad(connection, row, plan)
    selector = parse_selector(plan.selector)
    members = await cohorts.members(connection, row.project_id, selector, also=also, facts=bool(bad))
    taken = await _taken(connection, row, plan)
    failures = await _failures(connection, row, plan)
    found = Scan(members=len(members))
    found.recalled = await _recalled(connection, row, plan, bad)
    for member in members:
        stratum = stratum_of(plan, member)
        key = key_of(row.salt, member.id)
        found.keys.setdefault(stratum, []).append(key)
        holder = taken.get(member.id)
        if holder == row.id:
            continue
        timezone = _text(member.view.get("timezone")) if plan.window and member.view is not None else ""
        failed = failures.get(member.id)
        attempt = max(plan.attempt, failed.attempt + 1) if failed is not None else 0
        candidate = Candidate(member.id, key, stratum, timezone, attempt)
        quarantined = failed is not None and not failed.released and failed.attempt >= plan.attempt
        if (
            holder is not None
            or (quarantined and not plan.rollback)
            or (bad and not bad.isdisjoint(classes(member.facts)))
        ):
            found.held.append(candidate)
        else:
            found.free.append(candidate)
    found.free.sort(key=_key)
    for keys in found.keys.values():
        keys.sort()  # whoever sorts them again has little to do
    return found


async def held_by(connection: AsyncConnection, row: Any, plan: Plan, device: str) -> dict[str, Any] | None:
    """Return what keeps a rollout from a member of its cohort, as `code` with what belongs to it; None if nothing does."""
    holder = (await _taken(connection, row, plan)).get(device)
    if holder is not None and holder != row.id:
        other = (await connection.execute(_HOLDER, {"rollout": holder})).one()
        return {"code": "held", "rollout": other.number, "rollout_state": other.state, "priority": other.priority}
    failed = (await _failures(connection, row, plan)).get(device)
    if failed is not None and not failed.released and failed.attempt >= plan.attempt and not plan.rollback:
        return {"code": "quarantine", "rollout": failed.rollout, "reason": failed.reason, "attempt": failed.attempt}
    bad = await known_bad(connection, row, plan)
    if bad:
        facts = await connection.scalar(_FACTS, {"device": device})
        found = sorted(bad & classes(facts or ""))
        if found:
            return {"code": "known_bad", "hardware_class": found[0]}
    return None


async def _recalled(connection: AsyncConnection, row: Any, plan: Plan, bad: set[str]) -> frozenset[str]:
    """Return the devices that are offered a bundle of the plan, are not confirmed, and should have what they had before."""
    found: set[str] = set()
    for planned in plan.targets:
        named = {"rollout": row.id, "outcomes": list(ENDED), "named": f"%{planned.manifest}%"}
        found |= {one.device_id for one in await connection.execute(_ASTRAY, named)}
        if bad:
            rows = await connection.execute(_OFFERED, named)
            found |= {one.device_id for one in rows if not bad.isdisjoint(classes(one.facts))}
    return frozenset(found)


async def on_bad_hardware(connection: AsyncConnection, row: Any, plan: Plan, devices: Sequence[str]) -> set[str]:
    """Return those of some devices on whose hardware a bundle of the plan is known to be bad."""
    bad = await known_bad(connection, row, plan)
    facts = await bulk.select_in(connection, _FACTS_OF, devices) if bad else []
    return {one.id for one in facts if not bad.isdisjoint(classes(one.facts))}


def stratum_of(plan: Plan, member: cohorts.Member) -> str:
    """Return the stratum of a member."""
    return "/".join(_text(member.view.get(name)) for name in plan.strata) if member.view is not None else ""


async def read(
    connection: AsyncConnection,
    row: Any,
    plan: Plan,
    progress: Progress,
    found: Scan | None,
    tallied: Tally,
) -> Evidence:
    """Return the evidence for one decision; without a scan nobody is seen as unexposed.

    Args:
        connection: where.
        row: the rollout's.
        plan: parsed.
        progress: its.
        found: the members now.
        tallied: what became of the devices, by `tally`.
    """
    stages = counts(plan, tallied)
    now = tallied.now
    command: Command = row.wanted
    evidence = Evidence(
        stages=stages,
        command=command,
        happened=tallied.happened,
        approvals=await approvals(connection, row, plan),
        unpromoted=tallied.unpromoted,
        beside=tallied.beside,
    )
    if found is None:
        return evidence
    evidence = msgspec.structs.replace(evidence, members=found.members, unmeasured=_unmeasured(tallied, plan, progress))
    share, reached = reach(plan, progress), takes_newcomers(plan, progress)
    unexposed = found.unexposed(progress.cut_offs, share) if reached else []
    free = in_window(plan, unexposed, now)
    evidence = msgspec.structs.replace(
        evidence,
        unexposed=len(free),
        closed=len(unexposed) - len(free),
        held=len(found.kept_back(progress.cut_offs, share)) if reached else 0,
        recalled=len(found.recalled),
    )
    return ahead(plan, progress, evidence, found.keys)


class Told(NamedTuple):
    """Devices of one stage with one outcome for one reason, and what they count as."""

    stage: int
    outcome: str
    reason: str
    simulated: bool
    became: str
    devices: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the devices of a rollout, counted once for all that is made of it."""

    now: int
    rows: tuple[Told, ...]
    happened: dict[str, int]
    """Devices to which happened what the plan's gates ask for."""
    unpromoted: list[int]
    """By stage, devices whose candidate did not take over yet, of plans with two rounds."""
    beside: dict[str, Pairs]
    waves: dict[int, int]
    """Confirmed devices by the period in which they were exposed, where that may set the pace."""

    @property
    def devices(self) -> int:
        """How many were counted."""
        return sum(row.devices for row in self.rows)

    @property
    def broken(self) -> int:
        """Devices that tried the bundle and failed with it."""
        return sum(row.devices for row in self.rows if row.outcome in ("returned", "failed"))

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """Devices by stage, outcome, reason, and whether they are simulated: what people read."""
        found: dict[tuple[int, str, str, bool], int] = {}
        for row in self.rows:
            key = (row.stage, row.outcome, row.reason, bool(row.simulated))
            found[key] = found.get(key, 0) + row.devices
        names = ("stage", "outcome", "reason", "simulated")
        return [{**dict(zip(names, key, strict=True)), "devices": devices} for key, devices in sorted(found.items())]


async def tally(connection: AsyncConnection, rollout: str, plan: Plan, now: int) -> Tally:
    """Count the devices of a rollout."""
    named = {"rollout": rollout, "silent": now - plan.silent_s * SECOND_US, "late": now - plan.late_s * SECOND_US}
    told = [Told(*row) for row in await connection.execute(_TALLY, named)]
    if plan.window is not None and any(one.became == "late" for one in told):
        told = [one for one in told if one.became != "late"]
        told += await _overdue(connection, plan.window, plan.late_s, named, now)
    return Tally(
        now,
        tuple(told),
        await _happened(connection, rollout, plan),
        await _unpromoted(connection, rollout, plan),
        await _beside(connection, rollout, plan),
        await _waves(connection, rollout, plan),
    )


async def _overdue(
    connection: AsyncConnection, window: Window, late_s: int, named: Mapping[str, Any], now: int
) -> list[Told]:
    """Return the devices that would be late if their windows never shut: late is who had so much time *in* its window."""
    zone = "json_extract(d.facts, '$.timezone')" if connection.dialect.name == "sqlite" else "d.facts ->> 'timezone'"
    found: list[Told] = []
    for row in await connection.execute(text(_OVERDUE.replace("{zone}", zone)), named):
        since = row.minute * MINUTE_US
        late = window.open_for(late_s, since, now, row.zone if isinstance(row.zone, str) else "")
        found.append(
            Told(row.stage, row.outcome, row.reason, row.simulated, "late" if late else "pending", row.devices)
        )
    return found


def counts(plan: Plan, tallied: Tally) -> list[Counts]:
    """Return the devices of each stage by what became of them."""
    stages: list[dict[str, int]] = [{} for _ in plan.stages]
    for row in tallied.rows:
        into = stages[row.stage]
        into[row.became] = into.get(row.became, 0) + row.devices
    return [Counts(**stage) for stage in stages]


async def _happened(connection: AsyncConnection, rollout: str, plan: Plan) -> dict[str, int]:
    """Count the devices to which happened what the plan's gates ask for."""
    if not plan.gates:
        return {}
    found = (await connection.execute(_HAPPENED, {"rollout": rollout, "crash": reasons.CRASH})).one()
    return {gate.metric: getattr(found, gate.metric) or 0 for gate in plan.gates if counts_devices(gate.metric)}


async def _unpromoted(connection: AsyncConnection, rollout: str, plan: Plan) -> list[int]:
    """Count, by stage, the devices whose candidate did not take over yet, of plans with two rounds."""
    if not plan.two_rounds:
        return []
    found = [0] * len(plan.stages)
    for one in await connection.execute(_UNPROMOTED, {"rollout": rollout}):
        found[one.stage] = one.devices
    return found


async def _beside(connection: AsyncConnection, rollout: str, plan: Plan) -> dict[str, Pairs]:
    if not any(gate.metric in BESIDE for gate in plan.gates):
        return {}
    rows = await connection.execute(_BESIDE, {"rollout": rollout})
    return beside_of(plan, [(row.compared, row.agreed, row.skipped, row.devices) for row in rows])


def beside_of(plan: Plan, rows: Iterable[tuple[int, int, int, int]]) -> dict[str, Pairs]:
    """Return what shadows came to: one value of each device that is through with it, by whatever end.

    Of runs that were compared, `trial.min_requests` make a value: fewer say nothing of the device.

    Args:
        plan: whose gates ask.
        rows: (runs compared, runs that agreed, runs skipped, how many devices)
    """
    found = {gate.metric: Counter[int]() for gate in plan.gates if gate.metric in BESIDE}
    for compared, agreed, skipped, devices in rows:
        parts = {"disagreed": (max(compared - agreed, 0), compared), "skipped": (skipped, compared + skipped)}
        for metric, values in found.items():
            part, runs = parts[metric]
            if runs >= max(plan.trial.min_requests, 1):
                values[part * SHARE_STEPS // runs] += devices
    return {metric: tuple(sorted(values.items())) for metric, values in found.items()}


async def _waves(connection: AsyncConnection, rollout: str, plan: Plan) -> dict[int, int]:
    if plan.strategy != "adaptive" or not plan.compared:
        return {}
    found = await connection.execute(_CONFIRMED, {"rollout": rollout, "length": plan.period_s * SECOND_US})
    return {one.wave: one.devices for one in found}


def _unmeasured(tallied: Tally, plan: Plan, progress: Progress) -> int:
    """Count the confirmed devices of waves that no comparison has seen, where that sets the pace."""
    if plan.strategy != "adaptive" or not plan.compared or progress.widened:
        return 0
    return sum(devices for wave, devices in tallied.waves.items() if not progress.compared.waves.get(str(wave)))


async def reports_since(connection: AsyncConnection, project: str, after: int, most: int) -> int:
    """Count the reports that were received after a moment, up to `most`."""
    return int(await connection.scalar(_REPORTS, {"project": project, "after": after, "most": most}) or 0)


def classes(facts: str) -> set[str]:
    """Return the hardware classes of a device from its facts as JSON text: one per engine."""
    try:
        parsed = _facts.decode(facts)
    except msgspec.ValidationError:  # no facts yet
        return set()
    return {hardware_class(parsed, engine) for engine in parsed.engines}


class BadClass(NamedTuple):
    """Hardware on which the bundle of a rollout failed beyond its bound."""

    reason: str
    devices: int
    at: int
    """When the last of them failed."""


async def bad_classes(connection: AsyncConnection, rollout: str, plan: Plan) -> dict[str, BadClass]:
    """Return the hardware classes on which the bundle of a rollout failed beyond its bound."""
    failed: dict[str, int] = {}
    judged: dict[str, int] = {}
    reason: dict[str, str] = {}
    last: dict[str, int] = {}
    for row in await connection.execute(_SETTLED, {"rollout": rollout}):
        for name in _tried_classes(row.facts, row.body) or classes(row.facts):
            judged[name] = judged.get(name, 0) + 1
            if row.outcome in ("returned", "failed") and row.reason:
                failed[name] = failed.get(name, 0) + 1
                reason[name] = row.reason
                last[name] = max(last.get(name, 0), row.settled_at)
    bound = plan.failure
    return {
        name: BadClass(reason[name], bad, last[name])
        for name, bad in failed.items()
        if bad >= CLASS_BAD_DEVICES_MIN
        and bad >= exact(CLASS_BAD_SHARE_MIN) * judged[name]
        and (
            (bound.count is not None and bad > bound.count)
            or (
                bound.share is not None and judged[name] >= bound.sample_min and bad > exact(bound.share) * judged[name]
            )
        )
    }


def _tried_classes(facts: str, body: str | None) -> set[str]:
    """Return the classes of the engines on which a report says that a variant was tried."""
    if not body:
        return set()
    try:
        parsed, report = _facts.decode(facts), _report.decode(body)
    except msgspec.ValidationError:
        return set()
    tried = {variant.engine.split(" ")[0] for variant in report.variants if variant.engine}
    return {hardware_class(parsed, engine) for engine in parsed.engines if engine.name in tried}


async def _taken(connection: AsyncConnection, row: Any, plan: Plan) -> dict[str, str]:
    """Return which rollout keeps a device from this one: device → rollout id, this rollout's own included."""
    models = {planned.model for planned in plan.targets}
    holders = [row.id]
    for other in await connection.execute(_OTHERS, {"project": row.project_id, "me": row.id, "model": row.model}):
        if other.model not in models:
            continue
        if other.state in ACTIVE:
            outranks = row.priority > other.priority or (
                row.priority == other.priority and row.number > other.number and plan.supersede
            )
            if not outranks:
                holders.append(other.id)
        elif other.number > row.number:
            holders.append(other.id)
    taken: dict[str, str] = {}
    mine: str = row.id
    for device, rollout, outcome in await connection.execute(_TAKEN, {"rollouts": holders, "model": row.model}):
        if rollout == mine or outcome not in ("withdrawn", "reverted", "superseded"):
            taken[device] = mine if taken.get(device) == mine else rollout
    return taken


async def approvals(connection: AsyncConnection, row: Any, plan: Plan) -> dict[str, int]:
    """Count the people who agreed to each stage."""
    if plan.approval is None:
        return {}
    found = await connection.execute(_APPROVALS, {"rollout": row.id})
    return {approval_key(one.stage, one.round): one.people for one in found}


async def _failures(connection: AsyncConnection, row: Any, plan: Plan) -> dict[str, _Failure]:
    """Return on which devices a bundle of the plan failed, in their last attempt: device → failure."""
    manifests = [planned.manifest for planned in plan.targets]
    rows = await connection.execute(
        _FAILED, {"project": row.project_id, "manifests": manifests, "outcomes": list(FAILURES), "me": row.id}
    )
    found: dict[str, _Failure] = {}
    for one in rows:
        known = found.get(one.device_id)
        if known is None or one.attempt > known.attempt:
            found[one.device_id] = _Failure(one.attempt, bool(one.released_at), one.reason, one.number)
    return found


async def known_bad(connection: AsyncConnection, row: Any, plan: Plan) -> set[str]:
    """Return the hardware classes to leave out; a plan with a higher attempt tries again what was condemned before it was made."""
    named = {"project": row.project_id, "manifests": [planned.manifest for planned in plan.targets]}
    rows = await connection.execute(_BAD, {**named, "again": plan.attempt > 1, "rollout": row.id})
    return {one.hardware_class for one in rows}


def _text(value: object) -> str:
    if value is None:
        return ""
    return "+".join(sorted(str(one) for one in value)) if isinstance(value, list) else str(value)


def load_progress(raw: Any) -> Progress:
    """Read the progress that a row holds.

    Raises:
        RefusedError: `progress_invalid`, if a newer release wrote it.
    """
    try:
        return msgspec.convert(raw or {}, Progress)
    except msgspec.ValidationError as error:
        raise RefusedError("progress_invalid", f"stored progress is not readable: {error}") from error


_facts = msgspec.json.Decoder(DeviceFacts)
_key = attrgetter("key")


class _Failure(NamedTuple):
    attempt: int
    released: bool
    reason: str
    rollout: int


class _Tried(msgspec.Struct):
    engine: str = ""


class _Variants(msgspec.Struct):
    variants: list[_Tried] = []


_report = msgspec.json.Decoder(_Variants)

UNSETTLED = (
    "WHEN a.exposed_at <= :silent AND (a.noticed_at = 0"
    " OR (SELECT d.last_seen_at FROM device d WHERE d.id = a.device_id) <= :silent) THEN 'silent'"
    " WHEN a.noticed_at > 0 AND a.noticed_at <= :late THEN 'late' ELSE 'pending' END"
)
"""The end of an SQL CASE over `assignment a`: what a device counts as that has not settled."""
# Who fell silent is looked up only among those that have been exposed for long enough.
_TALLY = text(
    "SELECT a.stage, a.outcome, a.reason, a.simulated,"  # noqa: S608 - constants
    " CASE WHEN a.outcome IN ('returned', 'failed', 'refused') THEN 'failed'"
    f" WHEN a.outcome <> 'exposed' THEN a.outcome {UNSETTLED} AS became, count(*) AS devices"
    " FROM assignment a WHERE a.rollout_id = :rollout GROUP BY a.stage, a.outcome, a.reason, a.simulated, became"
)
_OVERDUE = (
    "SELECT stage, outcome, reason, simulated, minute, zone, count(*) AS devices FROM"  # noqa: S608 - constants
    " (SELECT a.stage, a.outcome, a.reason, a.simulated, a.noticed_at / 60000000 AS minute, {zone} AS zone,"
    f" CASE WHEN a.outcome <> 'exposed' THEN a.outcome {UNSETTLED} AS became"
    " FROM assignment a JOIN device d ON d.id = a.device_id WHERE a.rollout_id = :rollout AND a.noticed_at <= :late) AS o"
    " WHERE became = 'late' GROUP BY stage, outcome, reason, simulated, minute, zone"
)
_HAPPENED = text(
    "SELECT count(*) AS failed, sum(CASE WHEN outcome = 'returned' THEN 1 ELSE 0 END) AS returned,"
    " sum(CASE WHEN reason = :crash THEN 1 ELSE 0 END) AS crashed FROM assignment"
    " WHERE rollout_id = :rollout AND outcome IN ('returned', 'failed', 'refused')"
)
_REPORTS = text(
    "SELECT count(*) FROM (SELECT 1 FROM report_log WHERE project_id = :project AND received_at > :after LIMIT :most) AS r"
)
_CONFIRMED = text(
    "SELECT exposed_at / :length AS wave, count(*) AS devices FROM assignment WHERE rollout_id = :rollout"
    " AND outcome IN ('confirmed', 'confirmed_idle') GROUP BY wave"
)
_UNPROMOTED = text(
    "SELECT a.stage, count(*) AS devices FROM assignment a JOIN device d ON d.id = a.device_id AND d.state = 'active'"
    " WHERE a.rollout_id = :rollout AND a.tried"
    " AND a.outcome IN ('exposed', 'proved', 'confirmed', 'confirmed_idle') GROUP BY a.stage"
)
_BESIDE = text(
    "SELECT compared, agreed, skipped, count(*) AS devices FROM assignment WHERE rollout_id = :rollout AND tried"
    " AND outcome IN ('proved', 'returned') AND compared + skipped > 0 GROUP BY compared, agreed, skipped"
)
_OTHERS = text(
    "SELECT id, number, priority, state, model FROM rollout WHERE project_id = :project AND model = :model"
    " AND id <> :me AND state IN ('running', 'paused', 'returning', 'done')"
)
_TAKEN = text(
    "SELECT device_id, rollout_id, outcome FROM assignment WHERE rollout_id IN :rollouts AND model = :model"
).bindparams(bindparam("rollouts", expanding=True))
_BAD = text(
    "SELECT hardware_class FROM known_bad WHERE project_id = :project AND manifest IN :manifests"
    " AND (NOT :again OR updated_at >= (SELECT created_at FROM rollout WHERE id = :rollout))"
).bindparams(bindparam("manifests", expanding=True), bindparam("again", type_=Boolean))
_APPROVALS = text(
    "SELECT stage, round, count(*) AS people FROM approval WHERE rollout_id = :rollout GROUP BY stage, round"
)
_HOLDER = text("SELECT number, state, priority FROM rollout WHERE id = :rollout")
_FACTS = text("SELECT CAST(facts AS TEXT) FROM device WHERE id = :device")
_FACTS_OF = "SELECT id, CAST(facts AS TEXT) AS facts FROM device WHERE id IN :keys"
OWNED = (
    "NOT EXISTS (SELECT 1 FROM assignment n"
    " JOIN rollout r ON r.id = n.rollout_id WHERE n.device_id = a.device_id AND n.model = a.model"
    " AND n.rollout_id <> a.rollout_id AND n.exposed_at > a.exposed_at"
    " AND n.outcome NOT IN ('withdrawn', 'revert_pending', 'reverted', 'superseded')"
    " AND NOT (n.outcome IN ('returned', 'failed', 'refused', 'excused') AND r.state IN ('halted', 'aborted', 'reverted')))"
)
"""An SQL condition on `assignment a`: a device belongs to the rollout that exposed it last, unless that one gave it back."""
_NAMED = "EXISTS (SELECT 1 FROM offer o WHERE o.device_id = a.device_id AND CAST(o.models AS TEXT) LIKE :named)"
# Who ended the attempt has it on offer as long as the offer names it; who had it before has nothing to go back to.
_OFFERED = text(
    "SELECT a.device_id, CAST(d.facts AS TEXT) AS facts FROM assignment a"  # noqa: S608 - constants
    " JOIN device d ON d.id = a.device_id AND d.state = 'active'"
    " WHERE a.rollout_id = :rollout AND a.from_manifest <> a.to_manifest AND (a.outcome IN ('exposed', 'proved')"
    f" OR (a.outcome IN :outcomes AND {_NAMED})) AND {OWNED}"
).bindparams(bindparam("outcomes", expanding=True))
# A rollout that ended while another one had its devices gave that one where they go back to (`assignments`), but not to those
# that went back by themselves: they run what was taken back.
_ASTRAY = text(
    "SELECT a.device_id FROM assignment a JOIN device d ON d.id = a.device_id AND d.state = 'active'"  # noqa: S608 - constants
    " JOIN device_model m ON m.device_id = a.device_id AND m.model = a.model"
    " WHERE a.rollout_id = :rollout AND a.outcome IN :outcomes AND m.running NOT IN (a.from_manifest, a.to_manifest)"
    " AND EXISTS (SELECT 1 FROM assignment g JOIN rollout r ON r.id = g.rollout_id AND r.state IN ('returning', 'halted',"
    " 'aborted', 'reverted') WHERE g.device_id = a.device_id AND g.model = a.model AND g.rollout_id <> a.rollout_id"
    " AND g.outcome = 'superseded' AND g.to_manifest = m.running AND g.from_manifest = a.from_manifest)"
    f" AND {_NAMED} AND {OWNED}"
).bindparams(bindparam("outcomes", expanding=True))
_FAILED = text(
    "SELECT a.device_id, a.attempt, a.released_at, a.reason, r.number FROM assignment a"
    " JOIN rollout r ON r.id = a.rollout_id WHERE a.project_id = :project"
    " AND a.to_manifest IN :manifests AND a.outcome IN :outcomes AND a.rollout_id <> :me AND NOT EXISTS (SELECT 1 FROM"
    " assignment n WHERE n.device_id = a.device_id AND n.model = a.model AND n.to_manifest = a.to_manifest"
    " AND n.exposed_at > a.exposed_at AND n.outcome IN ('confirmed', 'confirmed_idle'))"
).bindparams(bindparam("manifests", expanding=True), bindparam("outcomes", expanding=True))
_SETTLED = text(
    "SELECT a.device_id, a.outcome, a.reason, a.settled_at, CAST(d.facts AS TEXT) AS facts, CAST(m.body AS TEXT) AS body"
    " FROM assignment a JOIN device d ON d.id = a.device_id"
    " LEFT JOIN device_model m ON m.device_id = a.device_id AND m.model = a.model AND m.rollout_id = a.rollout_id"
    " WHERE a.rollout_id = :rollout AND a.outcome IN ('confirmed', 'confirmed_idle', 'returned', 'failed')"
)
