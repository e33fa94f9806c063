"""The rollout engine: `decide(plan, progress, evidence, now) → (progress, decisions)`. Pure.

    created ─start─▶ running ─every stage proved itself─▶ done
                     │  ▲ pause, resume
                     ▼  │
                     paused
    running, paused ─breach, deadline, abort, revert─▶ returning ─all back, or revert_s─▶ halted │ aborted │ reverted
    done, halted, aborted ─operator says revert─▶ returning ─▶ reverted

Rules for whoever edits this:

1. Judge first, then obey a pause, then widen. Nothing is exposed in a turn that found a breach, or devices to recall.
2. Deciding twice is harmless: the director commits progress and decisions in one transaction that compares the
   revision, and a decision says what should be so (devices at or below the cut-off are exposed), never what to add.
3. Every state that is not final has an exit that needs no device: `running` has `stage_max_s`, `returning` has
   `revert_s`; `created` and `paused` wait for a person and say so, and so does `running` before a stage that a date or
   an approval holds back. No deadline runs while a date, people, a rate or windows are what is missing. Waits are by
   the monotonic clock and start again after a reboot of the director's machine; that is counted, and `RESTARTS_MAX`
   ends it.
4. Counts come in, counts are compared as integers, and a share becomes a count in `targeting.share_count` only.
5. `done`, `halted`, `aborted` and `reverted` are final: evidence never moves them. A release that is done stays desired:
   newcomers of the cohort below the stored cut-off are still exposed. Only a person's `revert` leaves a final state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from wherry_server.gates import BESIDE, Verdict, beside, control, counts_devices, share, threshold
from wherry_server.plan import OnHalt, Plan
from wherry_server.sequential import LANES_MAX, Pairs, may_expose, merge
from wherry_server.targeting import cut_offs, share_count
from wherry_shared.clock import MICROSECONDS, Now, Since

State = Literal["created", "running", "paused", "returning", "halted", "aborted", "reverted", "done"]
Command = Literal["", "start", "pause", "resume", "abort", "revert", "retry", "retry_failed"]
Scope = Literal["unconfirmed", "stage", "all", "recalled"]
FINAL: frozenset[State] = frozenset({"halted", "aborted", "reverted", "done"})
ACTIVE: frozenset[State] = frozenset({"running", "paused", "returning"})
"""States in which a rollout holds its devices against others of the same model."""
_SCOPES: dict[OnHalt, Scope] = {"hold": "unconfirmed", "revert_stage": "stage", "revert_all": "all"}
EXPOSED_PER_TURN = 10_000
"""Devices of one exposing transaction; a larger stage takes several turns, each of which judges first."""
PACE_ERROR = 0.05
"""Error probability of the bound on the harm rate that sets the pace of `adaptive`."""
UNPROVED_SHARE_MAX = 0.5
"""An adaptive rollout goes no further than this before its gates pass, so that there are controls left."""
RESTARTS_MAX = 50
"""Reboots of the director's machine within one wait; more would keep a stage waiting for ever."""


class _Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of progress and evidence."""


class Lane(_Value, frozen=True, kw_only=True):
    """What a lane of a comparison has seen (`sequential`)."""

    pairs: Pairs = ()
    spent: dict[str, int] = {}
    """Stratum → lowest `targeting.control_rank` that was used as a control."""


class Compared(_Value, frozen=True, kw_only=True):
    """What all comparisons have seen so far."""

    lanes: dict[str, list[Lane]] = {}
    """Metric → lanes."""
    waves: dict[str, int] = {}
    """Period in which devices were exposed → the lane that comes next for them."""

    def of(self, metric: str) -> list[Lane]:
        """The lanes of a metric, all of them."""
        known = self.lanes.get(metric, [])
        return [*known, *[Lane()] * (LANES_MAX - len(known))]


class Taken(_Value, frozen=True, kw_only=True):
    """What one lane of one wave adds."""

    wave: int
    lane: int
    lanes: dict[str, Lane]
    """Metric → what is added to it, with what is spent then."""


class Progress(_Value, frozen=True, kw_only=True):
    """How far a rollout is. Stored with every decision."""

    state: State = "created"
    stage: int = -1
    """Index of the stage; −1 before the first."""
    cut_offs: dict[str, int] = {}
    """Stratum → key; never falls."""
    entered: Since | None = None
    """Start of the stage, or of the return; none while rate or windows hold the stage up."""
    proved: Since | None = None
    """When the stage's sample first stood: its soak counts from here."""
    ending: Literal["", "halted", "aborted", "reverted"] = ""
    """What `returning` becomes."""
    reason: str = ""
    restarts: int = 0
    """Waits of this stage that a reboot started again."""
    compared: Compared = Compared()
    widened: bool = False
    """Whether an adaptive rollout has reached the whole share of its stage."""
    promoting: bool = False
    """Whether the second round is under way: what was tried beside the incumbent takes over."""
    released: bool = False
    """Whether the hold-back was let go, when all was done."""
    paced: Since | None = None
    """Since when the plan's rate counts: the stage's start, or the last time that nothing could be exposed."""
    paced_from: int = 0
    """Devices that the stage had exposed by then."""
    reached: int = 0
    """Devices that the stage had exposed when its deadline last began anew; of plans with a rate or a window."""


class Counts(_Value, frozen=True, kw_only=True):
    """Devices of one stage by what became of them; each is counted in exactly one field."""

    pending: int = 0
    """Exposed, not settled, within the deadlines."""
    silent: int = 0
    late: int = 0
    proved: int = 0
    """Compared, or standing by: what the first of two rounds asks for."""
    confirmed: int = 0
    confirmed_idle: int = 0
    failed: int = 0
    """Returned, failed or refused, for a reason that speaks against the bundle."""
    excused: int = 0
    """Ended their attempt for a reason that speaks neither for nor against the bundle."""
    withdrawn: int = 0
    reverted: int = 0
    revert_pending: int = 0
    superseded: int = 0

    @property
    def settled(self) -> int:
        """Devices that answered for or against the bundle."""
        return self.confirmed + self.confirmed_idle + self.proved + self.failed

    @property
    def heard(self) -> int:
        """Devices that nobody waits for any more."""
        return self.settled + self.silent + self.late

    @property
    def standing(self) -> int:
        """Devices that are exposed now."""
        return self.heard + self.pending

    @property
    def awaited(self) -> int:
        """Devices that answered or still may within the deadlines: who is silent or late keeps no small stage waiting."""
        return self.settled + self.pending

    @property
    def ever(self) -> int:
        """Devices that were ever exposed."""
        gone = self.excused + self.withdrawn + self.reverted + self.revert_pending + self.superseded
        return self.standing + gone


class Evidence(_Value, frozen=True, kw_only=True):
    """What the director read for one decision."""

    stages: list[Counts] = []
    """By the stage in which a device was exposed."""
    members: int = 0
    """Devices of the cohort now."""
    unexposed: int = 0
    """Members at or below the stored cut-offs that may be exposed and are not yet."""
    closed: int = 0
    """Members that are free and at or below the cut-offs, and whose maintenance window is shut."""
    approvals: dict[str, int] = {}
    """`approval_key` of a stage → people who agreed to it."""
    at: Now | None = None
    """When it was decided; written down with the decision, so that it can be made again."""
    held: int = 0
    """Members at or below the cut-offs that another rollout holds, or whose hardware the bundle is known bad on."""
    next_cut_offs: dict[str, int] = {}
    """`targeting.cut_offs` of `next_share` over the members now; empty if it was not asked for."""
    next_share: float = 0.0
    """What `next_share()` asked for, where the strategy is adaptive."""
    happened: dict[str, int] = {}
    """Metric of a gate → devices to which it happened, over all stages; those that the plan asks for."""
    unpromoted: list[int] = []
    """By stage: devices whose candidate runs beside the incumbent, or stands by, and did not fail."""
    beside: dict[str, Pairs] = {}
    """Metric of a shadow → histogram over devices, in `sequential.SHARE_STEPS`."""
    promoted_to: int | None = None
    """In a second round, the stage up to which devices are to be promoted: those beyond it are not looked at."""
    unmeasured: int = 0
    """Of the confirmed devices of an adaptive rollout: those whose first lane no comparison has seen yet."""
    taken: list[Taken] = []
    """Lanes of comparisons that ended since the last decision, in the order of waves and lanes."""
    command: Command = ""
    recalled: int = 0
    """Devices that are offered the bundle, are not confirmed, and should have what they had before: it is known to be bad on
    their hardware, or they went back from it to what another rollout had taken back meanwhile."""

    @property
    def total(self) -> Counts:
        """Counts over all stages, or those that a second round has come to."""
        fields = Counts.__struct_fields__
        seen = range(len(self.stages) if self.promoted_to is None else self.promoted_to + 1)
        stages = [self.stage(index) for index in seen]
        return Counts(**{name: sum(getattr(counts, name) for counts in stages) for name in fields})

    def stage(self, index: int) -> Counts:
        """Counts of the devices that a stage exposed; what was proved beside the incumbent is open in a second round."""
        counts = self.stages[index] if 0 <= index < len(self.stages) else Counts()
        if self.promoted_to is None or not counts.proved:
            return counts
        return msgspec.structs.replace(counts, pending=counts.pending + counts.proved, proved=0)

    @property
    def to_promote(self) -> int:
        """Devices that a second round has come to and that are still to be told."""
        return sum(self.unpromoted[: self.promoted_to + 1]) if self.promoted_to is not None else 0


def approval_key(stage: int, round_: int) -> str:
    """Return under what `Evidence.approvals` has a stage of a round."""
    return str(stage) if round_ == 1 else f"{stage}/{round_}"


class _Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="decision"):
    """Base of decisions."""


class Expose(_Decision, tag="expose", frozen=True, kw_only=True):
    """Every member at or below its stratum's cut-off should have the bundle (as many as fit into one transaction now)."""

    stage: int
    share: float
    """Of strata that have no cut-off."""
    cut_offs: dict[str, int]
    limit: int | None = None
    """No more devices than this now."""


class Withdraw(_Decision, tag="withdraw", frozen=True, kw_only=True):
    """Every assigned device in scope should have its own `from`; unconfirmed ones always are in scope.

    Scope `recalled`: those only, and of them only the ones that `Evidence.recalled` counts.
    """

    scope: Scope
    stage: int
    """The stage that scope `stage` means."""


class Promote(_Decision, tag="promote", frozen=True, kw_only=True):
    """Every device of these stages whose candidate ran beside the incumbent, or stands by, should have it answer."""

    stage: int
    """The last of them."""
    limit: int | None = None


class Moved(_Decision, tag="moved", frozen=True, kw_only=True):
    """The rollout is in another state, for this reason, by these verdicts."""

    state: State
    reason: str
    verdicts: list[Verdict] = []


class Retry(_Decision, tag="retry", frozen=True, kw_only=True):
    """Every device that ended its attempt without a verdict should try once more, as the attempt after it."""

    failed: bool
    """Those that failed for a reason that speaks against the bundle as well."""


Decision: TypeAlias = Expose | Promote | Withdraw | Moved | Retry


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rollout is not further yet: a stable code, and how much of what is needed is there."""

    code: str
    have: int = 0
    need: int = 0
    unit: str = "devices"


def verdicts(plan: Plan, evidence: Evidence, compared: Compared) -> list[Verdict]:
    """Judge everything exposed so far; `compared` is what comparisons have seen, `evidence.taken` included."""
    total = evidence.total
    population = total.standing
    second = evidence.promoted_to is not None
    bound = functools.partial(threshold, cohort=evidence.members)
    return [
        bound("failure", plan.failure, bad=total.failed, judged=total.settled, population=total.awaited),
        bound("silent", plan.silent, bad=total.silent, judged=total.heard, population=population),
        bound("late", plan.late, bad=total.late, judged=total.heard, population=population),
        bound(
            "excused",
            plan.excused,
            bad=total.excused,
            judged=total.heard + total.excused,
            population=population + total.excused,
        ),
        *(
            share(
                gate,
                bad=(bad := evidence.happened.get(gate.metric, 0)),
                good=max(total.settled - bad, 0),
                under_way=total.pending,
                quiet=total.silent + total.late + total.excused,
            )
            for gate in plan.gates
            if counts_devices(gate.metric)
        ),
        *(
            beside(
                gate,
                evidence.beside.get(gate.metric, ()),
                under_way=total.pending,
                quiet=total.silent + total.late + total.excused,
            )
            for gate in plan.gates
            if gate.metric in BESIDE and not second
        ),
        *(
            control(gate, [lane.pairs for lane in compared.of(gate.metric)], plan.period_s)
            for gate in plan.compared
            if plan.paired is not second or not plan.two_rounds
        ),
    ]


def seen(progress: Progress, evidence: Evidence) -> Evidence:
    """Return evidence as the round has it that is under way."""
    second = progress.promoting and progress.state in ("running", "paused")
    return msgspec.structs.replace(evidence, promoted_to=progress.stage if second else None)


def split_verdict(found: Sequence[Verdict], plan: Plan) -> Literal["better", "same", "worse", "undecided"]:
    """Return what came of a split by the gates that compare; every interval holds at all looks together."""
    compared = {gate.metric for gate in plan.compared}
    judged = [verdict for verdict in found if verdict.gate in compared]
    if any(verdict.outcome == "breach" for verdict in judged):
        return "worse"
    if not judged or any(verdict.outcome == "unknown" for verdict in judged):
        return "undecided"
    below = any(verdict.numbers is not None and verdict.numbers.high < 0 for verdict in judged)
    return "better" if below else "same"


def decide(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> tuple[Progress, tuple[Decision, ...]]:
    """Return the next progress, and what should be so once it is stored."""
    progress = _after_reboot(progress, now)
    if evidence.taken:
        progress = msgspec.structs.replace(progress, compared=with_taken(progress.compared, evidence.taken))
    evidence = seen(progress, evidence)
    match progress.state:
        case "created":
            return _created(plan, progress, evidence, now)
        case "running" | "paused":
            return _under_way(plan, progress, evidence, now)
        case "returning":
            return _returning(plan, progress, evidence, now)
        case "done" | "halted" | "aborted" | "reverted":
            return _final(plan, progress, evidence, now)


def allowed_now(plan: Plan, evidence: Evidence) -> int:
    """Return how many more devices an adaptive rollout may expose.

    Whoever never spoke of it has not been harmed yet; who is confirmed is judged once every gate could judge it.
    """
    total = evidence.total
    return may_expose(
        bound=plan.harm_bound,
        exposed=total.settled + total.pending + total.late,
        bad=total.failed,
        good=max(total.confirmed + total.confirmed_idle - evidence.unmeasured, 0),
        error=PACE_ERROR,
    )


def next_share(plan: Plan, progress: Progress, evidence: Evidence) -> float:
    """Return the share of the cohort that an adaptive rollout should reach, as far as `evidence` (its counts) allows."""
    if progress.widened:
        return plan.share_of(0, done=True)
    whole = plan.share_of(0)
    found = verdicts(plan, evidence, progress.compared)
    if _proved(plan, found):
        return whole
    if not evidence.members:
        return 0.0
    most = min(whole, UNPROVED_SHARE_MAX) if plan.gates else whole
    return min(most, (evidence.total.standing + allowed_now(plan, evidence)) / evidence.members)


def ahead(plan: Plan, progress: Progress, evidence: Evidence, keys: Mapping[str, Iterable[int]]) -> Evidence:
    """Return `evidence` with what comes next over the `keys` of each stratum: the next stage, more of it, or the hold-back."""
    following, wanted, found = progress.stage + 1, 0.0, dict[str, int]()
    if progress.promoting:
        following = len(plan.stages)
    if plan.strategy == "adaptive" and progress.state != "done":
        wanted = next_share(plan, progress, evidence)
        found = cut_offs(keys, wanted, progress.cut_offs) if wanted > 0 else {}
    elif following < len(plan.stages):
        found = plan.cut_offs(following, keys, progress.cut_offs)
    elif plan.held_back and progress.state != "done":
        found = plan.cut_offs(len(plan.stages) - 1, keys, progress.cut_offs, done=True)
    return msgspec.structs.replace(evidence, next_cut_offs=found, next_share=wanted)


def reach(plan: Plan, progress: Progress) -> float:
    """Return the share that a stratum without a cut-off is exposed to."""
    if progress.stage < 0 or (plan.strategy == "adaptive" and not progress.widened):
        return 0.0
    return plan.share_of(len(plan.stages) - 1 if progress.promoting else progress.stage, done=progress.released)


def takes_newcomers(plan: Plan, progress: Progress) -> bool:
    """Tell whether devices are exposed now: in a second round, only once it has come to all stages."""
    return progress.stage >= 0 and (not progress.promoting or progress.stage == len(plan.stages) - 1)


def following(plan: Plan, progress: Progress) -> tuple[int, int] | None:
    """Return what begins when the current stage has proved itself: the index of a stage, and its round; None: the end."""
    last = len(plan.stages) - 1
    if progress.stage < last:
        return progress.stage + 1, 2 if progress.promoting else 1
    if progress.promoting or plan.rounds == 1:
        return None
    return (last if plan.strategy == "blue_green" else 0), 2


def approvable(plan: Plan, progress: Progress, stage: int, round_: int) -> bool:
    """Tell whether the agreement of people to a stage (its index) of a round still means something."""
    if progress.state not in ("created", "running", "paused") or not plan.approvers(stage, round_):
        return False
    begun = (2 if progress.promoting else 1, progress.stage)
    return (round_, stage) > begun


def why_not_yet(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> list[Why]:
    """Say what a rollout waits for; empty in a final state."""
    evidence = seen(progress, evidence)
    match progress.state:
        case "created":
            return [Why(code="not_started", unit="operator")]
        case "paused":
            return [Why(code="paused", unit="operator")]
        case "returning":
            total = evidence.total
            waited = _elapsed_s(progress.entered, now)
            return [
                Why(code="revert_pending", have=total.reverted, need=total.reverted + total.revert_pending),
                Why(code="revert_deadline", have=waited, need=plan.revert_s, unit="s"),
            ]
        case "running":
            missing, coming = _missing(plan, progress, evidence, now), following(plan, progress)
            return missing if missing or coming is None else _entry(plan, *coming, evidence, now)
        case "done" | "halted" | "aborted" | "reverted":
            return []


# --- states -------------------------------------------------------------------------------------


def _created(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> tuple[Progress, tuple[Decision, ...]]:
    if evidence.command in ("abort", "revert"):
        state: State = "aborted"
        return (
            msgspec.structs.replace(progress, state=state, reason="operator"),
            (Moved(state=state, reason="operator"),),
        )
    if evidence.command != "start":
        return progress, ()
    started = msgspec.structs.replace(progress, state="running")
    if _entry(plan, 0, 1, evidence, now):
        return started, (Moved(state="running", reason="operator"),)
    entered, decisions = _enter_stage(plan, started, 0, evidence, now)
    return entered, (Moved(state="running", reason="operator"), *decisions)


def _under_way(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> tuple[Progress, tuple[Decision, ...]]:
    found = verdicts(plan, evidence, progress.compared)
    breached = [verdict for verdict in found if verdict.outcome == "breach"]
    if evidence.command == "revert":
        return _return(progress, "reverted", "operator", "all", now)
    if breached:
        scope = _SCOPES[plan.on_halt]
        return _return(progress, "halted", f"{breached[0].gate}_bound", scope, now, found=breached)
    if evidence.command == "abort":
        return _return(progress, "aborted", "operator", _least_scope(plan), now)
    if evidence.recalled and not evidence.command:
        return progress, (_recall(progress),)
    if progress.state == "paused":
        if evidence.command != "resume":
            return progress, ()
        resumed = msgspec.structs.replace(
            progress, state="running", entered=Since.at(now), reason="", restarts=0, paced=None
        )
        return resumed, (Moved(state="running", reason="operator"),)
    if evidence.command == "pause":
        paused = msgspec.structs.replace(progress, state="paused", reason="operator", entered=None)
        return paused, (Moved(state="paused", reason="operator"),)
    if evidence.command in ("retry", "retry_failed"):
        again = msgspec.structs.replace(progress, entered=Since.at(now), proved=None)
        return again, (Retry(failed=evidence.command == "retry_failed"),)
    return _running(plan, progress, evidence, found, now)


def _running(
    plan: Plan, progress: Progress, evidence: Evidence, found: list[Verdict], now: Now
) -> tuple[Progress, tuple[Decision, ...]]:
    if progress.stage < 0:
        waits = _entry(plan, 0, 1, evidence, now)
        return (progress, ()) if waits else _enter_stage(plan, progress, 0, evidence, now)
    progress, pace = _pace(plan, progress, evidence, now)
    missing = _missing(plan, progress, evidence, now)
    if all(why.code == "soak" for why in missing) and progress.proved is None:
        progress = msgspec.structs.replace(progress, proved=Since.at(now))
        missing = _missing(plan, progress, evidence, now)
    if not missing:
        last = progress.stage == len(plan.stages) - 1
        if last and not progress.promoting and (plan.two_rounds or plan.split is not None):
            return _first_round_over(plan, progress, evidence, found, now)
        if last:
            ended = msgspec.structs.replace(progress, state="done", entered=None, proved=None)
            moved = Moved(state="done", reason="proved", verdicts=found)
            if not plan.held_back:
                return ended, (moved,)
            return _release(plan, ended, moved, evidence)
        if _entry(plan, progress.stage + 1, 2 if progress.promoting else 1, evidence, now):
            return progress, ()
        if progress.promoting:
            return _promote(plan, progress, progress.stage + 1, evidence, now)
        return _enter_stage(plan, progress, progress.stage + 1, evidence, now)
    if evidence.closed or (
        pace == 0 and (evidence.unexposed or evidence.to_promote)
    ):  # only time is missing: the deadline stands still
        progress = msgspec.structs.replace(progress, entered=None)
    elif progress.entered is None:
        progress = msgspec.structs.replace(progress, entered=Since.at(now))
    if _elapsed_s(progress.entered, now) >= plan.stage_max_s or progress.restarts > RESTARTS_MAX:
        reason = f"stage_deadline:{missing[0].code}"
        return _return(progress, "halted", reason, _least_scope(plan), now)
    if evidence.to_promote:
        return progress, () if pace == 0 else (Promote(stage=progress.stage, limit=pace),)
    if plan.strategy == "adaptive":
        return _adapt(plan, progress, evidence, found, pace)
    if evidence.unexposed and pace != 0:
        share = plan.share_of(progress.stage)
        return progress, (Expose(stage=progress.stage, share=share, cut_offs=progress.cut_offs, limit=pace),)
    return progress, ()


def _first_round_over(
    plan: Plan, progress: Progress, evidence: Evidence, found: list[Verdict], now: Now
) -> tuple[Progress, tuple[Decision, ...]]:
    """Everything ran beside the incumbent, or its time is over: promote, keep or go back, as the plan says."""
    if plan.split is None:
        if plan.on_success == "end":
            return _return(progress, "reverted", "shadow_passed", "all", now, found=found)
        return _second_round(plan, progress, evidence, found, "proved_beside", now)
    verdict = split_verdict(found, plan)
    reason = f"split_{verdict}"
    then = "back" if verdict == "worse" else getattr(plan.split, verdict)
    if then == "back":
        return _return(progress, "reverted", reason, "all", now, found=found)
    if plan.two_rounds:
        return _second_round(plan, progress, evidence, found, reason, now)
    ended = msgspec.structs.replace(progress, state="done", entered=None, proved=None, reason=reason)
    moved = Moved(state="done", reason=reason, verdicts=found)
    return (ended, (moved,)) if then == "keep" else _release(plan, ended, moved, evidence)


def _release(plan: Plan, ended: Progress, moved: Moved, evidence: Evidence) -> tuple[Progress, tuple[Decision, ...]]:
    """Let go whoever was held back."""
    ended = msgspec.structs.replace(ended, cut_offs=_raised(ended, evidence), released=True)
    share = plan.share_of(ended.stage, done=True)
    first = plan.rate.within(0) if plan.rate else None
    return ended, (moved, Expose(stage=ended.stage, share=share, cut_offs=ended.cut_offs, limit=first))


def _second_round(
    plan: Plan, progress: Progress, evidence: Evidence, found: list[Verdict], reason: str, now: Now
) -> tuple[Progress, tuple[Decision, ...]]:
    """Begin to promote, if everybody agreed who is asked."""
    coming = following(plan, progress)
    assert coming is not None
    if _entry(plan, *coming, evidence, now):
        return progress, ()
    return _promote(plan, progress, coming[0], evidence, now, found, reason)


def _promote(
    plan: Plan,
    progress: Progress,
    stage: int,
    evidence: Evidence,
    now: Now,
    found: Sequence[Verdict] = (),
    reason: str = "",
) -> tuple[Progress, tuple[Decision, ...]]:
    """Begin the second round, or its next stage."""
    entered = msgspec.structs.replace(
        progress, stage=stage, promoting=True, entered=Since.at(now), proved=None, restarts=0, reason=""
    )
    told = max(evidence.stage(stage).ever - sum(evidence.unpromoted[stage : stage + 1]), 0)
    entered = msgspec.structs.replace(
        entered, paced=Since.at(now) if plan.rate else None, paced_from=told, reached=told
    )
    promote = Promote(stage=stage, limit=plan.rate.within(0) if plan.rate else None)
    if progress.promoting:
        return entered, (promote,)
    return entered, (Moved(state="running", reason=reason, verdicts=list(found)), promote)


def _least_scope(plan: Plan) -> Scope:
    """Return what an end without a breach takes back; who flips together flips back together."""
    return "all" if plan.strategy == "blue_green" else "unconfirmed"


def _adapt(
    plan: Plan, progress: Progress, evidence: Evidence, found: list[Verdict], pace: int | None
) -> tuple[Progress, tuple[Decision, ...]]:
    """Widen as far as the expected harm allows; all at once where every gate has passed."""
    proved = _proved(plan, found)
    limit = _least(pace, None if proved else allowed_now(plan, evidence))
    if limit == 0:
        return progress, ()
    if not evidence.unexposed and not progress.widened:
        raised = _raised(progress, evidence)
        progress = msgspec.structs.replace(
            progress, cut_offs=raised, widened=0 < plan.share_of(0) <= evidence.next_share
        )
    elif not evidence.unexposed:
        return progress, ()
    return progress, (Expose(stage=0, share=reach(plan, progress), cut_offs=progress.cut_offs, limit=limit),)


def _proved(plan: Plan, found: list[Verdict]) -> bool:
    """Tell whether every gate with stated errors passes; without one nothing is proved."""
    return bool(plan.gates) and all(verdict.outcome == "pass" for verdict in found if verdict.numbers is not None)


def _returning(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> tuple[Progress, tuple[Decision, ...]]:
    if evidence.command == "revert" and progress.ending != "reverted":
        return _return(progress, "reverted", "operator", "all", now)
    pending = evidence.total.revert_pending
    expired = _elapsed_s(progress.entered, now) >= plan.revert_s or progress.restarts > RESTARTS_MAX
    if pending and not expired:
        return progress, ()
    state: State = progress.ending or "halted"
    ended = msgspec.structs.replace(progress, state=state, entered=None, proved=None)
    return ended, (Moved(state=state, reason="revert_deadline" if pending else progress.reason),)


def _final(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> tuple[Progress, tuple[Decision, ...]]:
    if evidence.command == "revert" and progress.state != "reverted" and progress.stage >= 0:
        return _return(progress, "reverted", "operator", "all", now)
    if progress.state == "done" and evidence.command in ("retry", "retry_failed"):
        return progress, (Retry(failed=evidence.command == "retry_failed"),)
    if progress.state == "done" and evidence.recalled:
        return progress, (_recall(progress),)
    if progress.state == "done" and evidence.unexposed:
        progress, pace = _pace(plan, progress, evidence, now)
        share = reach(plan, progress)
        expose = Expose(stage=progress.stage, share=share, cut_offs=progress.cut_offs, limit=pace)
        return progress, () if pace == 0 else (expose,)
    return progress, ()


# --- parts --------------------------------------------------------------------------------------


def _enter_stage(
    plan: Plan, progress: Progress, index: int, evidence: Evidence, now: Now
) -> tuple[Progress, tuple[Decision, ...]]:
    raised = _raised(progress, evidence)
    entered = msgspec.structs.replace(
        progress, stage=index, cut_offs=raised, entered=Since.at(now), proved=None, restarts=0, reason=""
    )
    entered = msgspec.structs.replace(entered, paced=Since.at(now) if plan.rate else None, paced_from=0, reached=0)
    limit = _least(
        plan.rate.within(0) if plan.rate else None,
        allowed_now(plan, evidence) if plan.strategy == "adaptive" else None,
    )
    return entered, (Expose(stage=index, share=reach(plan, entered), cut_offs=raised, limit=limit),)


def _entry(plan: Plan, index: int, round_: int, evidence: Evidence, now: Now) -> list[Why]:
    """Say what a stage waits for before it begins: a date, people."""
    found = []
    if index == 0 and round_ == 1 and now.wall_us < plan.start_us:
        found.append(Why(code="start_at", need=-(-(plan.start_us - now.wall_us) // MICROSECONDS), unit="s"))
    agreed, needed = evidence.approvals.get(approval_key(index, round_), 0), plan.approvers(index, round_)
    if agreed < needed:
        found.append(Why(code="approval", have=agreed, need=needed, unit="people"))
    return found


def _pace(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> tuple[Progress, int | None]:
    """Return how many devices the rate lets expose now, None for any number.

    Where there is a rate or a window, the stage's deadline begins anew with whatever it exposed.
    """
    if plan.rate is None and plan.window is None:
        return progress, None
    ever = evidence.stage(progress.stage).ever
    if progress.promoting:
        ever -= sum(evidence.unpromoted[progress.stage : progress.stage + 1])
    if ever > progress.reached:
        progress = msgspec.structs.replace(
            progress, reached=ever, entered=Since.at(now) if progress.entered is not None else None
        )
    if plan.rate is None:
        return progress, None
    widening = plan.strategy == "adaptive" and not progress.widened
    if not evidence.unexposed and not evidence.to_promote and not widening:  # what nobody could use is not saved up
        return (msgspec.structs.replace(progress, paced=None) if progress.paced is not None else progress), None
    if progress.paced is None or progress.paced.boot != now.boot:
        progress = msgspec.structs.replace(progress, paced=Since.at(now), paced_from=ever)
        return progress, plan.rate.within(0)
    waited_s = progress.paced.elapsed_ms(now) / 1000
    return progress, max(progress.paced_from + plan.rate.within(waited_s) - ever, 0)


def _least(*limits: int | None) -> int | None:
    """Return the lowest of limits, None where there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def _raised(progress: Progress, evidence: Evidence) -> dict[str, int]:
    """Return the cut-offs of what comes next; none falls."""
    known = progress.cut_offs
    return {name: max(key, known.get(name, 0)) for name, key in {**known, **evidence.next_cut_offs}.items()}


def with_taken(compared: Compared, taken: Sequence[Taken]) -> Compared:
    """Return what comparisons have seen with `taken` added; what they have seen already changes nothing."""
    lanes, waves = dict(compared.lanes), dict(compared.waves)
    for one in taken:
        if one.lane != waves.get(str(one.wave), 0):
            continue
        waves[str(one.wave)] = one.lane + 1
        for metric, added in one.lanes.items():
            every = Compared(lanes=lanes).of(metric)
            before = every[one.lane]
            every[one.lane] = Lane(pairs=merge((before.pairs, added.pairs)), spent={**before.spent, **added.spent})
            lanes[metric] = every
    return Compared(lanes=lanes, waves=waves)


def _return(
    progress: Progress,
    ending: Literal["halted", "aborted", "reverted"],
    reason: str,
    scope: Scope,
    now: Now,
    *,
    found: Sequence[Verdict] = (),
) -> tuple[Progress, tuple[Decision, ...]]:
    returning = msgspec.structs.replace(
        progress, state="returning", ending=ending, reason=reason, entered=Since.at(now), proved=None, restarts=0
    )
    moved = Moved(state="returning", reason=reason, verdicts=list(found))
    return returning, (moved, Withdraw(scope=scope, stage=progress.stage))


def _recall(progress: Progress) -> Withdraw:
    return Withdraw(scope="recalled", stage=progress.stage)


def _missing(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> list[Why]:
    """What the current stage still has to prove, most telling first; `soak` is last and stands alone at the end."""
    if progress.stage < 0:
        return _entry(plan, 0, 1, evidence, now)
    stage = plan.stages[progress.stage]
    fresh, total = evidence.stage(progress.stage), evidence.total
    found: list[Why] = []
    if evidence.unexposed:
        found.append(Why(code="exposing", have=total.standing, need=total.standing + evidence.unexposed))
    if evidence.to_promote:
        found.append(Why(code="promoting", have=total.standing - evidence.to_promote, need=total.standing))
    if evidence.closed:
        found.append(Why(code="window", have=total.standing, need=total.standing + evidence.closed))
    if plan.strategy == "adaptive" and not progress.widened:
        need = share_count(plan.share_of(0), evidence.members)
        found.append(Why(code="widening", have=total.standing, need=need))
    if total.standing == 0:
        found.append(Why(code="held" if evidence.held else "no_devices", have=0, need=1))
    judged = verdicts(plan, evidence, progress.compared)
    few = [one for one in judged if one.numbers is None and one.outcome == "unknown" and one.bad]
    if few and not _more_come(plan, progress, evidence):
        found.append(Why(code="too_few", have=few[0].judged, need=few[0].needed))
    sample = min(plan.sample_min, fresh.standing)
    if fresh.settled < sample:
        found.append(Why(code="sample", have=fresh.settled, need=sample))
    needed = share_count(plan.settled_share, total.standing)
    if total.heard < needed:
        found.append(Why(code="in_flight", have=total.heard, need=needed))
    confirmed = min(stage.confirmed_min, fresh.standing)
    good = fresh.confirmed + fresh.proved
    if good < confirmed:
        found.append(Why(code="traffic", have=good, need=confirmed))
    # a split ends by its time: what is undecided then has an answer of its own
    waited = {gate.metric for gate in plan.compared} if plan.split is not None else frozenset()
    for verdict in judged:
        if verdict.outcome != "pass" and total.standing and verdict.gate not in waited:
            found.append(Why(code=f"gate_{verdict.gate}", have=verdict.judged, need=verdict.needed))
    soaked = _elapsed_s(progress.proved, now)
    soak_s = stage.soak_s
    if plan.split is not None and plan.split.by == "devices":
        soak_s += plan.split.for_s
    if soaked < soak_s:
        found.append(Why(code="soak", have=soaked, need=soak_s, unit="s"))
    return found


def _more_come(plan: Plan, progress: Progress, evidence: Evidence) -> bool:
    """Tell whether the stage still hears of devices by itself."""
    widens = plan.strategy == "adaptive" and not progress.widened and allowed_now(plan, evidence) > 0
    return bool(evidence.unexposed or evidence.closed or evidence.to_promote or evidence.total.pending) or widens


def _elapsed_s(since: Since | None, now: Now) -> int:
    return since.elapsed_ms(now) // 1000 if since is not None else 0


def _after_reboot(progress: Progress, now: Now) -> Progress:
    """Start the waits of another boot again, and count it."""
    stale = [wait for wait in (progress.entered, progress.proved) if wait is not None and wait.boot != now.boot]
    if not stale:
        return progress
    again = Since.at(now)
    return msgspec.structs.replace(
        progress,
        entered=again if progress.entered is not None else None,
        proved=again if progress.proved is not None else None,
        restarts=progress.restarts + 1,
    )
