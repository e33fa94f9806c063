"""The update machine: what a device does next, given what it knows and what happened. Pure.

    offer ──▶ Resolving ─▶ Fetching ─▶ Judging ─▶ Queued ─▶ Swapping ─▶ OnTrial ─▶ Idle (confirmed)
                  │  ▲         │  ▲       │  │ next variant    │           │  ╲
     refused ◀────┤  └Waiting──┴──┴───────┤  └──▶ Fetching     │           │   Proving ─▶ Idle (confirmed_idle)
                  ▼                       ▼                    ▼           ▼      │
                Idle                Idle (failed)           Returning ◀────┴──────┘
                                                             │     ╲
                                                     Idle (returned) Safe

A candidate that only runs beside the incumbent (shadow), answers a share (split) or stands by (blue-green with share 0)
is OnTrial too, but never confirmed: its time ends in Compared, where a newer offer may promote it.

Rules for whoever edits this module:

1. `step` and `resume` take everything as arguments: no clock, disk, network, log or randomness, also not through a
   helper. Values are frozen; the state is written durably *before* the effects run, and every effect may be repeated.
2. One `match` over phases, inside each phase one over events. An event that a phase ignores is *named* there, so that a
   new event does not type-check until each phase has answered it.
3. Every phase has an exit that needs no outside event: a deadline (`limit_ms`), a counted limit, or another slot's
   deadline (`Queued`, and a trial that passed and waits for its group). `Idle`, `Compared` and `Safe` are ends; an offer leaves them.
4. The serving set, offers and the queue are level-triggered: after every event `_settle` compares what is with what
   should be. A phase only changes its slot.
5. Only reasons in `reasons.VERDICTS` are held against a variant. Everything else is trouble: `Waiting`, then again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import msgspec

from wherry_agent import health, mending, put_back, revoking, upgrades
from wherry_agent.children import Candidate, Loadable, Ran
from wherry_agent.contracts import broken_by
from wherry_agent.state import (
    Accepted,
    Acked,
    Altered,
    CanaryDone,
    Cancel,
    Collect,
    Compared,
    Condemned,
    Connected,
    Counts,
    Crashes,
    Declared,
    Declares,
    Downs,
    Effect,
    Engines,
    EnginesProbed,
    Event,
    Falls,
    Fetched,
    Fetching,
    GoldenChecked,
    HandedOver,
    HandOverAsked,
    Idle,
    Job,
    Judging,
    Measured,
    Mended,
    Offered,
    OnTrial,
    Phase,
    Proving,
    Queued,
    Refreshed,
    RefreshFailed,
    Rejudged,
    Resolved,
    Resolving,
    RestartWorker,
    Returning,
    RunGolden,
    Safe,
    SendReports,
    Serve,
    Served,
    Slot,
    SlotEvent,
    State,
    Stopping,
    Swapping,
    Task,
    TaskFailed,
    Tick,
    Told,
    TrustWatch,
    Waiting,
    WorkerDied,
    WorkerReady,
)
from wherry_agent.turn import (
    ALTERED_RETRY_S,
    CRASH_WINDOW_MS,
    CRASHES_MAX,
    DECIDING,
    DOWNS_MIN,
    DOWNS_ORDINARY,
    FALL_MS,
    FALLS_MAX,
    FAULTS_MAX,
    FETCH_MS,
    GROUP_WAIT_MS,
    HELD_RETRY_MIN_MS,
    JUDGE_GRACE_MS,
    MODELS_MAX,
    PROVE_MS,
    REFRESH_MS,
    RESOLVE_MS,
    RESTARTS_MAX,
    RETRY_MAX_MS,
    RETRY_MIN_MS,
    RETURN_MS,
    RETURN_TRIES_MAX,
    SERVE_MS,
    STEADY_MS,
    SWAP_MS,
    TRIED_MAX,
    Turn,
    answering,
    end_of,
    flags_of,
    kept,
    kind_of,
    may_try_held,
    names_incumbent,
    plain,
    same_attempt,
    serving,
)
from wherry_shared import flags, reasons
from wherry_shared.clock import Now, Since
from wherry_shared.wire import ModelState, OfferedModel, Report, VariantTried

__all__ = [
    "Effect",
    "Event",
    "State",
    "initial",
    "kept",
    "limit_ms",
    "may_wait",
    "next_deadline_ms",
    "outgoing",
    "resume",
    "running",
    "serving",
    "sheltered",
    "step",
    "trust_state",
]


def initial(*, device: str, project: str, stream: str) -> State:
    """Return the state of a device that was just enrolled; `stream` is a random epoch for its reports."""
    return State(device=device, project=project, stream=stream)


def step(state: State, event: Event, now: Now) -> tuple[State, tuple[Effect, ...]]:
    """Return the next state, and the effects to run once that state is on disk."""
    turn = Turn(state, now)
    match event:
        case Offered():
            turn.adopt_trust(event.trust)
            _accept(turn, event)
        case Refreshed():
            turn.adopt_trust(event.trust)
            turn.refreshed()
            revoking.revoked(turn, event)
        case RefreshFailed():
            turn.refresh_failed(event.reason)
        case WorkerReady():
            upgrades.started(turn)
            if serving(turn.state) == serving(turn.before):
                _tell(turn)
        case Acked():
            turn.acked(event)
            put_back.noticed(turn, event)
        case Declares():
            _declare(turn, event)
        case WorkerDied():
            _worker_died(turn, event)
        case Stopping():
            return replace(state, stopped=True), ()
        case Tick() | Connected():
            turn.state = replace(
                turn.state, downs=_downs_of_steady(turn.state.downs, now), falls=_falls_of_steady(turn.state.falls, now)
            )
            turn.watch_trust(connected=isinstance(event, Connected))
            for name in tuple(turn.state.models):
                _slot_step(turn, name, event)
            _watch_worker(turn)
            upgrades.watch(turn)
        case EnginesProbed():
            upgrades.probed(turn, event)
        case Rejudged():
            upgrades.rejudged(turn, event)
        case HandOverAsked():
            upgrades.asked(turn, event)
        case HandedOver():
            upgrades.handed_over(turn, event)
        case Altered():
            mending.altered(turn, event)
        case Mended():
            mending.mended(turn, event)
        case Resolved():
            if event.trust is not None:
                turn.adopt_trust(event.trust)
            _slot_step(turn, event.model, event)
        case Served():
            _answered(turn, event)
            upgrades.served(turn, event)
            _slot_step(turn, event.model, event)
        case Fetched() | TaskFailed() | CanaryDone() | Measured() | Condemned() | GoldenChecked():
            _slot_step(turn, event.model, event)
        case _:
            assert_never(event)
    return _settle(turn)


def resume(state: State, now: Now) -> tuple[State, tuple[Effect, ...]]:
    """Return the state after a restart or a power cut, and the effects to repeat.

    Children are gone and the worker's memory with them: the worker is told what to serve when it is `WorkerReady`. The
    default is to go back to the incumbent; each phase that goes on says why.
    """
    turn = Turn(state, now)
    tried = [name for name, slot in state.models.items() if _is_tried(slot.phase)]
    judged = upgrades.being_judged(state)
    downs = _downs_after(state, now, tried=bool(tried or judged))
    falls = _falls_after(state, now, tried=bool(tried or judged))
    turn.state = replace(turn.state, told=None, stopped=False, downs=downs, falls=falls)
    turn.resume_watch()
    turn.state = replace(turn.state, crashes=_crashes_over_boots(turn.state.crashes, now))
    upgrades.resume(turn, tried=bool(tried))
    _fallen(turn)
    alone = len(tried) == 1 and not judged
    for name in tuple(turn.state.models):
        slot = turn.state.models[name]  # as it is now: one of its group may have taken it back
        if slot.held is not None:
            # A device that reboots often still gets there: in another boot the shortest wait begins.
            since = turn.since(slot.held.since)
            wait_ms = slot.held.wait_ms if since == slot.held.since else HELD_RETRY_MIN_MS
            slot = replace(slot, held=replace(slot.held, since=since, wait_ms=wait_ms))
            turn.put(name, slot)
        phase = slot.phase
        match phase:
            case Idle() | Compared() | Safe():
                pass  # nothing is under way
            case Resolving(job):
                turn.resolve(name, slot, job)  # nothing was served yet, and asking again is free
            case Fetching(job):
                turn.fetch(name, slot, job)  # the download resumes where it was
            case Waiting():
                # A reboot ends the wait: how long it was is unknown, and a device that reboots often still gets there.
                since = turn.since(phase.since)
                wait_ms = phase.wait_ms if since == phase.since else 0
                turn.put(name, replace(slot, phase=replace(phase, since=since, wait_ms=wait_ms)))
            case Queued():
                turn.put(name, replace(slot, phase=replace(phase, since=turn.since(phase.since))))
            case Judging(job):
                # The canary touches nobody, unless it takes the whole machine down: so it is counted.
                job = _restarted(job, stopped=state.stopped, alone=alone)
                reason, detail = _downed(job, state.downs)
                if reason in reasons.VERDICTS:
                    turn.variant_failed(name, slot, _unharmed(job), reason, detail)
                elif reason:
                    turn.fail(name, slot, job, reason, detail)
                else:
                    turn.judge(name, slot, job)
            case Swapping(job) | OnTrial(job) | Proving(job):
                # The candidate passed its canary and a power cut says nothing about it: the trial goes on, counted.
                job = _restarted(job, stopped=state.stopped, alone=alone)
                counts = _carried(phase.counts)
                reason, detail = _downed(job, state.downs)
                if reason:
                    turn.go_back(name, slot, job, reason, detail, counts)
                else:
                    began = _began(phase)
                    began = turn.since(began) if began is not None else None
                    again = Swapping(job, Since.at(now), phase.trial, phase.crashes, began, counts)
                    turn.put(name, replace(slot, phase=again))
            case Returning():
                # Going back is what it was about: the incumbent is served as soon as the worker is there.
                turn.put(name, replace(slot, phase=replace(phase, since=Since.at(now), tries=0)))
            case _:
                assert_never(phase)
    if turn.state.owed:
        turn.effects.append(SendReports())
    turn.effects.append(Collect(kept(turn.state)))
    return _settle(turn)


def outgoing(state: State) -> tuple[Report, ...]:
    """Return the reports to send, in order, each naming the oldest one still held."""
    first = state.owed[0].seq if state.owed else state.seq
    return tuple(msgspec.structs.replace(report, first=first) for report in state.owed)


def running(state: State) -> dict[str, str]:
    """Return model → manifest digest of what answers requests here (or is to, once the worker has done it)."""
    return {model.name: answering(model).manifest for model in serving(state)}


def trust_state(state: State, now: Now) -> str:
    """Return what the hello says about trust: empty, `trust_stale` or `clock_unset`."""
    if state.trust is None:
        return ""
    if now.wall_us < state.trust.time_floor_us:
        return reasons.CLOCK_UNSET
    return reasons.TRUST_STALE if now.wall_us > state.trust.expires_at else ""


def limit_ms(phase: Phase, members: int = 1) -> int | None:
    """Return how long a phase may last before `Tick` ends it; None for ends, and for waits that others end.

    `members`: so many models of one group are loaded at once and answered for together.
    """
    match phase:
        case Resolving():
            return RESOLVE_MS
        case Fetching():
            return FETCH_MS
        case Judging(job):
            return job.offered.trial.canary_s * 1000 + JUDGE_GRACE_MS
        case Swapping():
            return SWAP_MS * members
        case OnTrial(job):
            return None if phase.passed else job.offered.trial.max_s * 1000
        case Proving():
            return PROVE_MS
        case Returning():
            return _patience_ms(RETURN_MS * members, phase.tries)
        case Waiting():
            return phase.wait_ms
        case Queued(job):
            return GROUP_WAIT_MS if job.offered.group else None
        case Idle() | Compared() | Safe():
            return None
        case _:
            assert_never(phase)


def next_deadline_ms(state: State, now: Now) -> int:
    """Return in how many milliseconds `Tick` is due."""
    left: list[int] = []
    for slot in state.models.values():
        limit = limit_ms(slot.phase, _members(state, slot.phase))
        if limit is not None and not isinstance(slot.phase, Idle | Compared | Safe):
            left.append(limit - slot.phase.since.elapsed_ms(now))
        if slot.held is not None and may_try_held(slot):
            left.append(slot.held.wait_ms - slot.held.since.elapsed_ms(now))
    if state.told is not None:
        left.append(_serve_ms(state, state.told) - state.told.since.elapsed_ms(now))
    left += upgrades.deadlines_ms(state.engines, now)
    if state.downs is not None:
        left.append(STEADY_MS - state.downs.since.elapsed_ms(now))
    if state.falls is not None:
        left.append((STEADY_MS if state.falls.lasted else FALL_MS) - state.falls.since.elapsed_ms(now))
    left.append(_watch_ms(state.watch) - state.watch.since.elapsed_ms(now) if state.watch is not None else 0)
    return max(0, min(left))


def may_wait(old: State, new: State) -> bool:
    """Tell whether two states differ in nothing that a restart would miss, so that the newer need not be written.

    That is: a trial's running counts, what the worker was told and has not answered, which engines it has in memory and
    what follows from that, and when trust is asked for next; `resume` begins each of them anew.
    """
    if old is new:
        return True
    return _without_passing(old) == _without_passing(new)


def _patience_ms(limit_ms: int, failures: int) -> int:
    """Return how long a worker may stay silent: twice as long after each failure, so that what is only slow gets there."""
    return max(limit_ms, min(limit_ms << min(failures, 16), RETRY_MAX_MS))


def _members(state: State, phase: Phase) -> int:
    """Return how many models the worker loads as one with a model in this phase."""
    if not isinstance(phase, Swapping | Returning) or not phase.job.offered.group:
        return 1
    others = (slot.phase for slot in state.models.values())
    return sum(type(one) is type(phase) and _group_of(one) == phase.job.offered.group for one in others)


def _group_of(phase: Phase) -> str:
    return phase.job.offered.group if isinstance(phase, Swapping | Returning) else ""


def _serve_ms(state: State, told: Told) -> int:
    """Return how long the worker may take for the next of the models that it has not answered for."""
    slot = state.models.get(told.waiting[0], Slot())
    failures = slot.phase.tries if isinstance(slot.phase, Returning) else slot.faults
    return _patience_ms(SERVE_MS * _members(state, slot.phase), failures)


def _without_passing(state: State) -> State:
    plain = {name: _without_counts(slot) for name, slot in state.models.items()}
    return replace(state, models=plain, told=None, watch=None, engines=Engines(installed=state.engines.installed))


def sheltered(state: State) -> State:
    """Return what may serve while nothing can be remembered: what is trusted, and nothing under way."""
    models = {
        name: replace(slot, phase=slot.phase if isinstance(slot.phase, Safe) else Idle())
        for name, slot in state.models.items()
        if slot.incumbent is not None or isinstance(slot.phase, Safe)
    }
    offer = replace(state.offer, models={}) if state.offer is not None else None
    engines = Engines(installed=state.engines.installed, barred=True)
    return replace(state, models=models, offer=offer, told=None, watch=None, engines=engines)


def _without_counts(slot: Slot) -> Slot:
    phase = slot.phase
    return replace(slot, phase=replace(phase, counts=Counts())) if isinstance(phase, OnTrial | Proving) else slot


# --- the offer -----------------------------------------------------------------------------------


def _accept(turn: Turn, event: Offered) -> None:
    """Take a verified offer as what the device should have: only newer ones, and the same bytes change nothing."""
    offer, known = event.offer, turn.state.offer
    if offer.device != turn.state.device or offer.project != turn.state.project:
        return
    if known is not None and (offer.epoch, offer.serial) <= (known.epoch, known.serial):
        return
    unsupported = ""
    if offer.critical:
        unsupported = f"needs {', '.join(sorted(offer.critical))[:200]}, unknown to this agent"
    else:
        unsupported = flags.trouble(offer.flags)
    models = dict(offer.models)
    if len(models) > MODELS_MAX:
        unsupported = f"names {len(models)} models, at most {MODELS_MAX} fit a device"
        models = {name: models[name] for name in sorted(models)[:MODELS_MAX]}
    groups = {group: set(members) for group, members in offer.groups.items()}
    for group, members in groups.items():
        for name in members & models.keys():
            if not models[name].group:
                models[name] = msgspec.structs.replace(models[name], group=group)
    for name, offered in models.items():
        if offered.group:
            groups.setdefault(offered.group, set()).add(name)
    turn.state = replace(
        turn.state,
        offer=Accepted(
            offer.epoch,
            offer.serial,
            event.digest,
            offer.expires_at,
            models,
            unsupported,
            flags=flags_of(turn.state) if unsupported else offer.flags,
            groups={group: tuple(sorted(members)) for group, members in sorted(groups.items())},
        ),
    )


def _declare(turn: Turn, event: Declares) -> None:
    """Take somebody's word for what applications rely on, and let go of a bundle on its way that breaks it."""
    known = turn.state.contracts.get(event.model)
    if known is not None and known.by == "settings" and event.by != "settings":
        return  # the operator's word stands
    others = {name: declared for name, declared in turn.state.contracts.items() if name != event.model}
    if event.contract is None:
        if known is None or known.by != event.by:
            return
        turn.state = replace(turn.state, contracts=others)
        return
    declared = Declared(event.contract, event.by)
    if known == declared:
        return
    while len(others) >= MODELS_MAX:
        del others[next(iter(others))]
    turn.state = replace(turn.state, contracts={**others, event.model: declared})
    slot = turn.state.models.get(event.model)
    if slot is None:
        return
    phase = slot.phase
    if isinstance(phase, Resolving):
        turn.effects.append(Cancel(event.model))
        turn.resolve(event.model, slot, phase.job)
    elif isinstance(phase, Fetching | Judging | Queued | Waiting) and phase.job.candidates:
        why = broken_by(event.contract, phase.job)
        if why:
            turn.effects.append(Cancel(event.model))
            turn.refuse(event.model, slot, phase.job, reasons.CONTRACT_BROKEN, why)
    elif isinstance(phase, Swapping | OnTrial | Proving):
        why = broken_by(event.contract, phase.job)
        if why:
            turn.go_back(event.model, slot, phase.job, reasons.CONTRACT_BROKEN, why, phase.counts)


def _unsupported(offer: Accepted, offered: OfferedModel, slot: Slot) -> str:
    """Say what of an offered model this device does not do; empty if it can."""
    if offer.unsupported:
        return offer.unsupported
    if offered.group:
        why = _group_unsupported(offer, offered.group)
        if why:
            return why
    share = f"a share of {offered.share:g}"
    if offered.mode in ("replace", "none"):
        return f"{share} of the requests needs mode split" if offered.share < 1.0 else ""
    if slot.incumbent is None:
        return f"mode {offered.mode} needs a version that is confirmed here, and there is none"
    if offered.mode == "blue_green":
        return "" if offered.share in (0.0, 1.0) else f"{share}: a blue-green stands by (0) or takes over (1)"
    return "" if 0.0 <= offered.share <= 1.0 else f"{share} is none"


def _group_unsupported(offer: Accepted, group: str) -> str:
    """Say why the models of a group cannot be had all or none; empty if they can."""
    members = offer.groups.get(group, ())
    for name in members:
        offered = offer.models.get(name)
        if offered is None:
            return f"group {group} names {name}, which the offer does not hold"
        if offered.mode == "none":
            return (
                f"group {group} is swapped at once, and {name} is to be removed: a removal cannot be taken back with it"
            )
        if offered.mode != "replace":
            return f"group {group} is swapped at once, and {name} is offered as {offered.mode}"
        if sum(name in others for others in offer.groups.values()) > 1:
            return f"{name} of group {group} is in another group too"
    return ""


def _reconsider(turn: Turn, name: str, offer: Accepted, offered: OfferedModel) -> None:
    """Compare one slot with what the accepted offer says about its model."""
    slot = turn.state.models.get(name, Slot())
    phase = slot.phase
    removal = offered.mode == "none"
    match phase:
        case Idle() | Safe():
            _begin(turn, name, slot, offer, offered)
        case Resolving(job) | Fetching(job) | Judging(job) | Queued(job) | Waiting(job):
            if job.again and not removal:
                return  # compared when what served last has had its chance
            if not removal and same_attempt(job.offered, offered) and not _unsupported(offer, offered, slot):
                if job.offered != offered or job.serial != offer.serial:
                    turn.put(name, replace(slot, phase=replace(phase, job=_renewed(job, offered, offer.serial))))
                return
            turn.effects.append(Cancel(name))
            slot = replace(slot, phase=Idle(), settled=None)
            turn.put(name, slot)
            _begin(turn, name, slot, offer, offered, reason=reasons.WITHDRAWN if names_incumbent(slot, offered) else "")
        case Swapping(job) | OnTrial(job) | Proving(job):
            if _unsupported(offer, offered, slot):
                pass  # refused when the trial is over
            elif names_incumbent(slot, offered):
                detail = "the offer names the incumbent"
                turn.go_back(name, slot, job, reasons.WITHDRAWN, detail, phase.counts)
            elif removal or offered.manifest != job.offered.manifest:
                _displace(turn, name, slot, phase)
            else:
                _adjust(turn, name, slot, phase, _renewed(job, offered, offer.serial))
        case Compared(job):
            _after_compared(turn, name, slot, job, offer, offered)
        case Returning():
            pass  # compared again when it is over
        case _:
            assert_never(phase)


def _displace(turn: Turn, name: str, slot: Slot, phase: Swapping | OnTrial | Proving) -> None:
    """An offer of something else waits for a verdict; where none will come, it ends the trial."""
    if kind_of(phase.job.offered) not in DECIDING:
        detail = "the offer names something else"
        turn.go_back(name, slot, phase.job, reasons.SUPERSEDED, detail, phase.counts)


def _adjust(turn: Turn, name: str, slot: Slot, phase: Swapping | OnTrial | Proving, job: Job) -> None:
    """Newer terms for the candidate on trial: another way to try it is a fresh trial, another share is taken over."""
    before, now = kind_of(phase.job.offered), kind_of(job.offered)
    if before == now and now in DECIDING:
        pass  # a trial that decides ends under the terms under which it began
    elif before != now or not same_attempt(phase.job.offered, job.offered):
        turn.begin_trial(name, slot, _unharmed(job))  # it is here and proved: no download, no canary
    elif job != phase.job:
        turn.put(name, replace(slot, phase=replace(phase, job=job)))
        if job.offered.share != phase.job.offered.share and isinstance(phase, OnTrial):
            turn.began(name, job, phase.counts)


def _after_compared(turn: Turn, name: str, slot: Slot, job: Job, offer: Accepted, offered: OfferedModel) -> None:
    """Compare what was compared with a newer offer: the same again is done, another way to try it starts from here."""
    same = offered.mode != "none" and offered.manifest == job.offered.manifest
    if same and end_of(offered) == end_of(job.offered) and kind_of(offered) == kind_of(job.offered):
        return
    slot = replace(slot, phase=Idle(), settled=None)
    turn.put(name, slot)
    if same and end_of(offered) not in slot.ends and not _unsupported(offer, offered, slot):
        # resolved again, since it may have been revoked meanwhile; what is proved is neither fetched nor judged again
        again = Job(offered, offer.serial, tried=job.tried, proved=job.candidates[0])
        turn.resolve(name, slot, again, report=True)
    else:
        _begin(turn, name, slot, offer, offered)
        turn.effects.append(Collect(kept(turn.state)))


def _begin(turn: Turn, name: str, slot: Slot, offer: Accepted, offered: OfferedModel, reason: str = "") -> None:
    """From rest: remove, acknowledge, refuse or start."""
    end = end_of(offered)
    why = _unsupported(offer, offered, slot)
    if end in slot.ends or (slot.settled == end and not isinstance(slot.phase, Safe)):
        return
    if why:
        job = Job(offered, offer.serial)
        turn.refuse(name, slot, job, reasons.UNSUPPORTED, why)
    elif offered.mode == "none":
        had = slot.incumbent is not None or slot.held is not None
        slot = Slot(settled=end, ends=slot.ends, unfit=slot.unfit)
        turn.put(name, slot)
        turn.report(name, "removed", offered=offered, serial=offer.serial, reason=reason)
        if had:
            turn.effects.append(Collect(kept(turn.state)))
    elif slot.incumbent is not None and slot.incumbent.manifest == offered.manifest and isinstance(slot.phase, Idle):
        incumbent = replace(slot.incumbent, offered=plain(offered))
        turn.put(name, replace(slot, incumbent=incumbent, settled=end))
        state: ModelState = "confirmed_idle" if incumbent.idle else "confirmed"
        turn.report(name, state, offered=offered, serial=offer.serial, reason=reason)
    elif len(turn.state.models) >= MODELS_MAX and name not in turn.state.models:
        why = f"this device already has {MODELS_MAX} models"
        turn.refuse(name, slot, Job(offered, offer.serial), reasons.UNSUPPORTED, why)
    else:
        turn.resolve(name, slot, Job(offered, offer.serial), report=True)


# --- slots: phases × events ----------------------------------------------------------------------


def _slot_step(turn: Turn, name: str, event: SlotEvent) -> None:
    slot = turn.state.models.get(name)
    if slot is None:
        return
    phase = slot.phase
    match phase:
        case Idle():
            _idle(turn, name, slot, event)
        case Resolving():
            _resolving(turn, name, slot, phase, event)
        case Fetching():
            _fetching(turn, name, slot, phase, event)
        case Judging():
            _judging(turn, name, slot, phase, event)
        case Queued():
            _queued(turn, name, slot, phase, event)
        case Swapping():
            _swapping(turn, name, slot, phase, event)
        case OnTrial():
            _on_trial(turn, name, slot, phase, event)
        case Proving():
            _proving(turn, name, slot, phase, event)
        case Compared():
            _compared(turn, name, slot, event)
        case Returning():
            _returning(turn, name, slot, phase, event)
        case Waiting():
            _waiting(turn, name, slot, phase, event)
        case Safe():
            _safe(event)
        case _:
            assert_never(phase)


def _idle(turn: Turn, name: str, slot: Slot, event: SlotEvent) -> None:
    match event:
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Resolved() | Fetched() | TaskFailed() | CanaryDone():
            pass  # late: its job is over
        case Measured() | Condemned() | GoldenChecked():
            pass  # late: its trial is over
        case Tick() | Connected():
            pass
        case WorkerDied():
            pass  # counted for the whole device in `_worker_died`
        case _:
            assert_never(event)


def _resolving(turn: Turn, name: str, slot: Slot, phase: Resolving, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case Resolved() if _speaks_of(event, job):
            _resolved(turn, name, slot, job, event)
        case TaskFailed() if _speaks_of(event, job) and event.task == "resolve":
            turn.trouble(name, slot, job, "resolve", event)
        case Tick() if _overdue(phase, turn.now):
            turn.effects.append(Cancel(name))
            turn.trouble(name, slot, job, "resolve", _late(name, job, "resolve"))
        case Resolved() | Fetched() | TaskFailed() | CanaryDone():
            pass  # late: of another job
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Measured() | Condemned() | GoldenChecked() | Tick() | Connected() | WorkerDied():
            pass
        case _:
            assert_never(event)


def _fetching(turn: Turn, name: str, slot: Slot, phase: Fetching, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case Fetched() if _speaks_of(event, job) and event.variant == job.loadable.variant:
            turn.judge(name, slot, replace(job, troubles=0), report=True)
        case TaskFailed() if _speaks_of(event, job) and event.task == "fetch":
            turn.trouble(name, slot, job, "fetch", event)
        case Tick() if _overdue(phase, turn.now):
            turn.effects.append(Cancel(name))
            turn.trouble(name, slot, job, "fetch", _late(name, job, "fetch"))
        case Resolved() | Fetched() | TaskFailed() | CanaryDone():
            pass  # late: of another job or variant
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Measured() | Condemned() | GoldenChecked() | Tick() | Connected() | WorkerDied():
            pass
        case _:
            assert_never(event)


def _judging(turn: Turn, name: str, slot: Slot, phase: Judging, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case CanaryDone() if _speaks_of(event, job) and event.digest == job.loadable.digest:
            _judged(turn, name, slot, job, event)
        case TaskFailed() if _speaks_of(event, job) and event.task == "judge":
            turn.trouble(name, slot, job, "judge", event)
        case Tick() if _overdue(phase, turn.now):
            # A canary ends itself in time, and its parent does: what is silent still is the agent, or it slept.
            turn.effects.append(Cancel(name))
            turn.trouble(name, slot, job, "judge", _late(name, job, "judge"))
        case Resolved() | Fetched() | TaskFailed() | CanaryDone():
            pass  # late: of another job or variant
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Measured() | Condemned() | GoldenChecked() | Tick() | Connected() | WorkerDied():
            pass
        case _:
            assert_never(event)


def _queued(turn: Turn, name: str, slot: Slot, phase: Queued, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case Tick() if job.offered.group and _overdue(phase, turn.now):
            if _complete(turn, job.offered.group):  # it waits for its turn, not for another of its group
                turn.put(name, replace(slot, phase=replace(phase, since=Since.at(turn.now))))
            else:
                hours = GROUP_WAIT_MS // 3600_000
                turn.leave_group(name, slot, job, f"group {job.offered.group} was not complete within {hours} h")
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Resolved() | Fetched() | TaskFailed() | CanaryDone() | Measured() | Condemned() | GoldenChecked():
            pass  # `_admit` moves it on as soon as no other model is being tried
        case Tick() | Connected() | WorkerDied():
            pass
        case _:
            assert_never(event)


def _swapping(turn: Turn, name: str, slot: Slot, phase: Swapping, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case Served() if turn.is_current(event) and event.digest == job.loadable.digest:
            if not event.ok and event.reason == reasons.GROUP:
                pass  # the one of its group that could not be served says why, and takes it along
            elif _misses(event, job):
                _not_served(turn, name, slot, phase, event)
            else:
                since = phase.began if phase.began is not None else Since.at(turn.now)
                turn.put(name, replace(slot, phase=OnTrial(job, since, phase.trial, phase.crashes, phase.counts)))
                if phase.began is None:
                    turn.began(name, job)
        case Served():
            pass  # of an earlier serving set, in which the candidate was not
        case WorkerDied():
            _crashed(turn, name, slot, phase, event)
        case Tick() if _overdue(phase, turn.now, _members(turn.state, phase)):
            # The worker is silent, which may be its own fault: nothing is held against the variant.
            detail = f"the worker did not serve it within {phase.since.elapsed_ms(turn.now) // 1000} s"
            turn.effects.append(RestartWorker(detail))
            turn.go_back(name, slot, job, reasons.CHILD_FAILED, detail, phase.counts)
        case Tick() | Connected():
            pass
        case Resolved() | Fetched() | TaskFailed() | CanaryDone() | Measured() | Condemned() | GoldenChecked():
            pass  # late
        case _:
            assert_never(event)


def _on_trial(turn: Turn, name: str, slot: Slot, phase: OnTrial, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case Measured() if event.trial == phase.trial and event.candidate.digest == job.loadable.digest:
            _measured(turn, name, slot, phase, event)
        case Condemned() if event.trial == phase.trial and event.digest == job.loadable.digest:
            turn.go_back(name, slot, job, event.reason, event.detail, phase.counts)
        case WorkerDied():
            _crashed(turn, name, slot, phase, event)
        case Served() if turn.is_current(event) and event.digest == job.loadable.digest and _misses(event, job):
            _not_served(turn, name, slot, phase, event)
        case Tick() if not phase.passed and _overdue(phase, turn.now):
            if kind_of(job.offered) in DECIDING:
                # its time is over: what was not compared (latency) is left to the golden vectors, failures are not
                why = _too_many_failed(job, phase.counts)
                if why:
                    turn.go_back(name, slot, job, reasons.HEALTH_ERRORS, why, phase.counts)
                else:
                    _prove(turn, name, slot, phase, enough=_enough(phase))
            else:
                turn.compare(name, slot, job, phase.counts)
        case Served() | Measured() | Condemned() | GoldenChecked():
            pass  # of an earlier serving set or trial, or nothing new
        case Tick() | Connected() | Resolved() | Fetched() | TaskFailed() | CanaryDone():
            pass
        case _:
            assert_never(event)


def _proving(turn: Turn, name: str, slot: Slot, phase: Proving, event: SlotEvent) -> None:
    job = phase.job
    match event:
        case GoldenChecked() if event.trial == phase.trial and event.digest == job.loadable.digest:
            why = _too_many_failed(job, phase.counts)
            if not event.passed:
                turn.go_back(name, slot, job, event.reason or reasons.HEALTH_GOLDEN, event.detail, phase.counts)
            elif why:
                turn.go_back(name, slot, job, reasons.HEALTH_ERRORS, why, phase.counts)
            else:
                turn.passed(name, slot, phase, "requests" if phase.enough else "idle", phase.counts)
        case Measured() if event.trial == phase.trial and event.candidate.digest == job.loadable.digest:
            counts = _counted(phase.counts, event, 0.0)
            verdict = health.judge(
                job.offered.trial, event.candidate, event.baseline, has_incumbent=slot.incumbent is not None
            )
            if verdict.outcome == "fail":
                turn.go_back(name, slot, job, verdict.reason, verdict.detail, counts)
            elif counts.requests >= phase.counts.requests:  # else it comes late: of before
                turn.put(name, replace(slot, phase=replace(phase, counts=counts)))
        case Condemned() if event.trial == phase.trial and event.digest == job.loadable.digest:
            turn.go_back(name, slot, job, event.reason, event.detail, phase.counts)
        case WorkerDied():
            _crashed(turn, name, slot, phase, event)
        case Tick() if _overdue(phase, turn.now):
            turn.effects.append(RestartWorker("it did not answer for the golden vectors"))
            detail = f"golden vectors were not run again within {PROVE_MS // 1000} s"
            turn.go_back(name, slot, job, reasons.CHILD_FAILED, detail, phase.counts)
        case Served() if turn.is_current(event) and event.digest == job.loadable.digest and _misses(event, job):
            _not_served(turn, name, slot, phase, event)
        case Served() | Measured() | Condemned() | GoldenChecked():
            pass  # of an earlier serving set or trial, or nothing new
        case Tick() | Connected() | Resolved() | Fetched() | TaskFailed() | CanaryDone():
            pass
        case _:
            assert_never(event)


def _compared(turn: Turn, name: str, slot: Slot, event: SlotEvent) -> None:
    match event:
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Resolved() | Fetched() | TaskFailed() | CanaryDone() | Measured() | Condemned() | GoldenChecked():
            pass  # late: its trial is over
        case Tick() | Connected() | WorkerDied():
            pass
        case _:
            assert_never(event)


def _returning(turn: Turn, name: str, slot: Slot, phase: Returning, event: SlotEvent) -> None:
    incumbent = slot.incumbent
    match event:
        case Served() if turn.is_current(event) and incumbent is not None:
            if event.digest != incumbent.loadable.digest:
                return
            if event.ok:
                turn.returned(name, slot, phase)
            else:
                _return_again(turn, name, slot, phase, event)
        case WorkerDied() if event.ordered or (incumbent is not None and _elsewhere(event, incumbent.loadable)):
            pass  # the next worker is told the same; the deadline counts
        case WorkerDied() if phase.tries + 1 < RETURN_TRIES_MAX:
            turn.put(name, replace(slot, phase=replace(phase, tries=phase.tries + 1, since=Since.at(turn.now))))
        case WorkerDied():
            turn.returned(name, slot, phase)  # what dies from here on is counted against what was confirmed
        case Tick() if _overdue(phase, turn.now, _members(turn.state, phase)):
            _return_again(turn, name, slot, phase, event)
        case Served() | Tick() | Connected():
            pass
        case Resolved() | Fetched() | TaskFailed() | CanaryDone() | Measured() | Condemned() | GoldenChecked():
            pass  # late
        case _:
            assert_never(event)


WAY_OPEN = (reasons.NETWORK, reasons.CONDITIONS)
"""What `Connected` ends waiting for."""


def _waiting(turn: Turn, name: str, slot: Slot, phase: Waiting, event: SlotEvent) -> None:
    match event:
        case Tick() if _overdue(phase, turn.now):
            turn.retry(name, slot, phase)
        case Connected() if phase.reason in WAY_OPEN and phase.since.elapsed_ms(turn.now) >= RETRY_MIN_MS:
            turn.retry(name, slot, phase)
        case Served():
            _incumbent_served(turn, name, slot, event)
        case Tick() | Connected() | WorkerDied():
            pass
        case Resolved() | Fetched() | TaskFailed() | CanaryDone() | Measured() | Condemned() | GoldenChecked():
            pass  # late
        case _:
            assert_never(event)


def _safe(event: SlotEvent) -> None:
    match event:
        case (
            Resolved() | Fetched() | TaskFailed() | CanaryDone() | Served() | Measured() | Condemned() | GoldenChecked()
        ):
            pass  # a newer offer leads out, or what served last in its time
        case Tick() | Connected() | WorkerDied():
            pass
        case _:
            assert_never(event)


# --- what the phases share -----------------------------------------------------------------------


def _resolved(turn: Turn, name: str, slot: Slot, job: Job, event: Resolved) -> None:
    """Leave out what is known to fail here, and start with the best of the rest."""
    fresh, tried = [], list(event.passed_over)
    for candidate in event.candidates:
        bad = turn.known_bad(candidate.loadable)
        if bad is not None and bad.attempt >= job.offered.attempt:
            tried.append(
                VariantTried(
                    id=candidate.loadable.variant,
                    digest=candidate.loadable.digest,
                    outcome="failed",
                    engine=f"{bad.engine} {bad.engine_version}",
                    reason=bad.reason,
                    why="failed here before",
                )
            )
        else:
            fresh.append(candidate)
    proved = next((candidate for candidate in fresh if _same_file(candidate, job.proved)), None)
    if proved is not None and job.proved is not None:
        # its files are here and its canary passed under this very engine: it waits for its turn
        figures = tuple(one for one in job.tried if one.id == proved.loadable.variant)
        passed = msgspec.structs.replace(proved, loadable=job.proved.loadable)
        job = replace(job, troubles=0, candidates=(passed,), tried=(*tried, *figures)[-TRIED_MAX:])
        job = replace(job, preprocess_id=event.preprocess_id, offered=plain(job.offered))
        turn.put(name, replace(slot, phase=Queued(job, Since.at(turn.now))))
        return
    job = replace(job, troubles=0, tried=tuple(tried[:TRIED_MAX]), preprocess_id=event.preprocess_id, proved=None)
    if not fresh:
        reason = reasons.KNOWN_BAD if event.candidates else reasons.NO_VARIANT
        detail = "every variant that fits failed here before" if event.candidates else "no variant fits this device"
        turn.refuse(name, slot, job, reason, detail)
        return
    turn.fetch(name, slot, replace(job, candidates=tuple(fresh[: job.offered.trial.variant_tries])))


def _judged(turn: Turn, name: str, slot: Slot, job: Job, event: CanaryDone) -> None:
    result = event.result
    if result.passed:
        found = VariantTried(
            id=job.loadable.variant,
            digest=job.loadable.digest,
            outcome="candidate",
            engine=f"{job.loadable.engine} {job.loadable.engine_version}",
            why=job.candidates[0].why,
            peak_memory_bytes=result.peak_memory_bytes,
            latency_p50_us=result.latency_p50_us,
            latency_p99_us=result.latency_p99_us,
            latency_ratio=result.latency_ratio,
            incumbent_p50_us=result.incumbent_p50_us,
            incumbent_p99_us=result.incumbent_p99_us,
        )
        measured = msgspec.structs.replace(job.loadable, peak_memory_bytes=result.peak_memory_bytes)
        first = msgspec.structs.replace(job.candidates[0], loadable=measured)
        job = replace(job, candidates=(first, *job.candidates[1:]), tried=(*job.tried, found)[-TRIED_MAX:], troubles=0)
        turn.put(name, replace(slot, phase=Queued(job, Since.at(turn.now))))
    elif result.reason in reasons.VERDICTS:
        turn.variant_failed(name, slot, job, result.reason, result.detail, result.peak_memory_bytes)
    else:
        reason = result.reason or reasons.CHILD_FAILED
        # a file that the disk altered is fetched again: the courier finds that it is not what it was
        task: Task = "fetch" if reason in reasons.ALTERED else "judge"
        wait_s = ALTERED_RETRY_S if reason in reasons.ALTERED else 0.0
        late = TaskFailed(name, job.offered.manifest, job.offered.attempt, task, reason, result.detail, wait_s)
        turn.trouble(name, slot, job, task, late)


def _measured(turn: Turn, name: str, slot: Slot, phase: OnTrial, event: Measured) -> None:
    verdict = health.judge(
        phase.job.offered.trial, event.candidate, event.baseline, has_incumbent=slot.incumbent is not None
    )
    counts = _counted(phase.counts, event, verdict.latency_ratio)
    phase = replace(phase, counts=counts)
    decides = kind_of(phase.job.offered) in DECIDING
    match verdict.outcome:
        case "fail":
            turn.go_back(name, slot, phase.job, verdict.reason, verdict.detail, counts)
        case "pass" | "unknown" | "open" if not decides:
            turn.put(name, replace(slot, phase=phase))
        case "pass":
            turn.passed(name, slot, phase, "requests", counts)
        case "unknown" | "open" if phase.passed:
            turn.put(name, replace(slot, phase=phase))
        case "unknown":
            _prove(turn, name, replace(slot, phase=phase), phase, enough=True)
        case "open":
            turn.put(name, replace(slot, phase=phase))
        case _:
            assert_never(verdict.outcome)


def _misses(event: Served, job: Job) -> bool:
    """Tell whether the worker does not do what the mode needs: every one but replace needs both versions in memory."""
    return not event.ok or (job.offered.mode != "replace" and not event.incumbent_loaded)


def _not_served(turn: Turn, name: str, slot: Slot, phase: Swapping | OnTrial | Proving, event: Served) -> None:
    reason = event.reason or (reasons.MEMORY_SHORT if event.ok else reasons.LOAD_FAILED)
    turn.go_back(name, slot, phase.job, reason, event.detail, phase.counts)


def _same_file(candidate: Candidate, proved: Candidate | None) -> bool:
    """Tell whether a resolved variant is the one that was proved here, for the same engine."""
    if proved is None:
        return False
    one, other = candidate.loadable, proved.loadable
    return (one.digest, one.engine, one.engine_version) == (other.digest, other.engine, other.engine_version)


def _enough(phase: OnTrial) -> bool:
    """Tell whether a trial saw enough good requests, whatever is known of their latency."""
    terms, counts = phase.job.offered.trial, phase.counts
    answered = counts.requests - counts.errors
    return answered >= terms.min_requests and counts.errors <= terms.error_rate_max * counts.requests


def _too_many_failed(job: Job, counts: Counts) -> str:
    """Say that more requests failed than the terms allow, be they ever so few: at its end no trial waits for more."""
    requests, errors = counts.requests + counts.earlier_requests, counts.errors + counts.earlier_errors
    allowed = job.offered.trial.error_rate_max
    return f"{errors} of {requests} requests failed, at most {allowed:.1%}" if errors > allowed * requests else ""


def _prove(turn: Turn, name: str, slot: Slot, phase: OnTrial, *, enough: bool) -> None:
    """Let golden vectors decide where traffic does not."""
    since = Since.at(turn.now)
    proving = Proving(phase.job, since, phase.trial, phase.since, phase.crashes, phase.counts, enough)
    turn.put(name, replace(slot, phase=proving))
    turn.effects.append(RunGolden(name, phase.job.loadable.digest, phase.trial))


def _crashed(turn: Turn, name: str, slot: Slot, phase: Swapping | OnTrial | Proving, event: WorkerDied) -> None:
    """A worker that dies while a candidate is on trial counts against the candidate, unless it ran only others."""
    loadable = phase.job.loadable
    innocent = event.ordered or _elsewhere(event, loadable)
    crashes = phase.crashes if innocent else phase.crashes + 1
    counts = _carried(phase.counts)
    if crashes > phase.job.offered.trial.crashes_max:
        anyones = len(event.ran) > 1 if event.ran else len(serving(turn.state)) > 1
        turn.go_back(name, slot, phase.job, reasons.CRASH, event.detail, counts, anyones=anyones)
        return
    began = _began(phase)
    again = Swapping(phase.job, Since.at(turn.now), phase.trial, crashes, began, counts)
    turn.put(name, replace(slot, phase=again))


def _ran(loadable: Loadable) -> Ran:
    return Ran(loadable.model, loadable.manifest, loadable.variant)


def _elsewhere(event: WorkerDied, loadable: Loadable) -> bool:
    """Tell whether the worker is known to have died while it ran other versions, and not this one."""
    return bool(event.ran) and _ran(loadable) not in event.ran


def _began(phase: Swapping | OnTrial | Proving) -> Since | None:
    return phase.since if isinstance(phase, OnTrial) else phase.began


def _return_again(turn: Turn, name: str, slot: Slot, phase: Returning, event: Served | Tick) -> None:
    """The incumbent did not come back: a new worker is tried a few times, then the version before it.

    A worker that only is silent says nothing of the version: without one before it, it is tried for as long as it takes.
    """
    altered = isinstance(event, Served) and event.reason in reasons.ALTERED  # which no new worker mends
    if phase.tries + 1 < RETURN_TRIES_MAX and not altered:
        turn.put(name, replace(slot, phase=replace(phase, tries=phase.tries + 1, since=Since.at(turn.now))))
        if not isinstance(event, Served) or event.reason != reasons.GROUP:  # else it is told again, now alone
            turn.effects.append(RestartWorker(f"it did not serve {name} again"))
        return
    reason, detail = reasons.CHILD_FAILED, "the worker did not serve it again"
    if isinstance(event, Served):
        reason, detail = event.reason or reasons.LOAD_FAILED, event.detail
    else:
        turn.effects.append(RestartWorker(detail))
    if reason == reasons.CHILD_FAILED and slot.last_good is None:
        turn.returned(name, slot, phase)
        _try_later(turn, name, replace(turn.state.models[name], faults=phase.tries))
    else:
        turn.give_up(name, slot, reason, detail)


def _try_later(turn: Turn, name: str, slot: Slot) -> None:
    """Count one more failure that nobody is to blame for, and leave the next try to the watch on the worker."""
    turn.put(name, replace(slot, faults=slot.faults + 1))
    told = turn.state.told
    waiting = told.waiting if told is not None else ()
    if name not in waiting:
        waiting = (name, *waiting)
    turn.state = replace(turn.state, told=Told(Since.at(turn.now), waiting))


def _worker_died(turn: Turn, event: WorkerDied) -> None:
    """A death is a trial's or a return's unless the worker ran only others; else it is counted, up to a loop."""
    turn.state = replace(turn.state, told=None)
    theirs = [name for name, slot in turn.state.models.items() if _takes(slot, event)]
    confirmed = [
        name
        for name, slot in turn.state.models.items()
        if slot.incumbent is not None and _ran(slot.incumbent.loadable) in event.ran
    ]
    for name in tuple(turn.state.models):
        _slot_step(turn, name, event)
    if theirs or event.ordered:
        return
    before = turn.state.crashes
    if before is None or before.since.elapsed_ms(turn.now) > CRASH_WINDOW_MS:
        before = Crashes(Since.at(turn.now), 0)
    running = {**before.running, **{name: before.running.get(name, 0) + 1 for name in confirmed}}
    crashes = Crashes(turn.since(before.since), before.count + 1, running=running)
    turn.state = replace(turn.state, crashes=crashes)
    if crashes.count > CRASHES_MAX:
        _break_loop(turn, crashes, event)


def _takes(slot: Slot, event: WorkerDied) -> bool:
    """Tell whether a death of the worker is to be counted in the trial, or in the return, of a model."""
    phase = slot.phase
    match phase:
        case Swapping(job) | OnTrial(job) | Proving(job):
            return not _elsewhere(event, job.loadable)
        case Returning():
            return slot.incumbent is None or not _elsewhere(event, slot.incumbent.loadable)
        case _:
            return False


def _break_loop(turn: Turn, crashes: Crashes, event: WorkerDied) -> None:
    """What ran in most of these deaths gives way, of several the one that was confirmed last."""
    suspects = [
        (crashes.running.get(name, 0), slot.incumbent.order, name)
        for name, slot in turn.state.models.items()
        if slot.incumbent is not None and not isinstance(slot.phase, Safe)
    ]
    if not suspects:
        turn.state = replace(turn.state, crashes=None)
        return
    times, _, name = max(suspects)
    slot = turn.state.models[name]
    phase = slot.phase
    if isinstance(phase, Swapping | OnTrial | Proving):
        # what it would give way to is not what is on trial: that goes first, and one more death breaks the loop
        turn.go_back(name, slot, phase.job, reasons.CRASH, event.detail, phase.counts, anyones=True)
        return
    turn.state = replace(turn.state, crashes=None)
    alone = times == crashes.count and len(event.ran) == 1
    anyones = not alone and len(serving(turn.state)) > 1
    turn.give_up(name, slot, reasons.CRASH, event.detail, anyones=anyones)


def _crashes_over_boots(crashes: Crashes | None, now: Now) -> Crashes | None:
    """Go on counting when each boot ends soon after a death; a boot that passed without one ends the count."""
    if crashes is None or crashes.since.boot == now.boot:
        return crashes
    return None if crashes.rebooted else replace(crashes, since=Since.at(now), rebooted=True)


# --- a machine that goes down --------------------------------------------------------------------


def _is_tried(phase: Phase) -> bool:
    return isinstance(phase, Judging | Swapping | OnTrial | Proving)


def _restarted(job: Job, *, stopped: bool, alone: bool) -> Job:
    """Count a restart while a candidate was tried; one that was ordered speaks against nobody."""
    job = replace(job, restarts=job.restarts + 1)
    return job if stopped else replace(job, downs=job.downs + 1, downs_shared=job.downs_shared or not alone)


def _unharmed(job: Job) -> Job:
    return replace(job, restarts=0, downs=0, downs_shared=False)


def _downed(job: Job, ordinary: Downs | None) -> tuple[str, str]:
    """Say why a candidate is not tried in this boot again, if the machine went down with it too often.

    It is held against the candidate if nothing else was tried at those times, and if the machine did not go down just as
    well before it came.
    """
    allowed = job.offered.trial.restarts_max
    if job.downs < allowed or not job.downs:
        total = f"{job.restarts} restarts while it was tried"
        return (reasons.RESTARTS, total) if job.restarts >= RESTARTS_MAX else ("", "")
    detail = f"the device went down {job.downs} times while it was tried"
    if job.downs_shared:
        return reasons.RESTARTS, f"{detail}, and something else was, too"
    if ordinary is not None and ordinary.count >= DOWNS_ORDINARY:
        return reasons.RESTARTS, f"{detail}, and {ordinary.count} times before without anything being tried"
    return (reasons.DEVICE_DOWN if job.downs >= DOWNS_MIN else reasons.RESTARTS), detail


def _downs_after(state: State, now: Now, *, tried: bool) -> Downs | None:
    """Count how the life before this one ended, if nothing was tried in it though it could; this one begins now."""
    count = state.downs.count if state.downs is not None else 0
    count += not state.stopped and not tried and state.offer is not None
    return Downs(Since.at(now), min(count, DOWNS_ORDINARY)) if count else None


def _downs_of_steady(downs: Downs | None, now: Now) -> Downs | None:
    return None if downs is not None and downs.since.elapsed_ms(now) >= STEADY_MS else downs


def _falls_after(state: State, now: Now, *, tried: bool) -> Falls | None:
    """Count the life before this one if it was short and nobody ended it; one in which something was tried counts there."""
    falls = state.falls
    if falls is None:
        return None
    if falls.lasted:
        count = 0
    else:
        count = falls.count + (not state.stopped and not tried)
    return Falls(falls.model, Since.at(now), count)


def _falls_of_steady(falls: Falls | None, now: Now) -> Falls | None:
    """A life that lasts ends the row, and a day of it acquits what was confirmed."""
    if falls is None or falls.since.elapsed_ms(now) >= STEADY_MS:
        return None
    return replace(falls, count=0, lasted=True) if falls.since.elapsed_ms(now) >= FALL_MS else falls


def _fallen(turn: Turn) -> None:
    """What was confirmed last gives way if the machine goes down again and again since; what it cannot give way to stays.

    Only once: if the machine still goes down after that, it was not this version.
    """
    falls = turn.state.falls
    if falls is None or falls.count < FALLS_MAX:
        return
    turn.state = replace(turn.state, falls=None)
    slot = turn.state.models.get(falls.model, Slot())
    if slot.incumbent is None or slot.last_good is None or isinstance(slot.phase, Safe):
        return
    minutes = FALL_MS // 60_000
    detail = f"the device went down {falls.count} times in a row within {minutes} minutes, and not before it came"
    turn.give_up(falls.model, slot, reasons.DEVICE_DOWN, detail, anyones=len(serving(turn.state)) > 1)


# --- what was confirmed --------------------------------------------------------------------------


def _incumbent_served(turn: Turn, name: str, slot: Slot, event: Served) -> None:
    """Outside trials: a version that was confirmed here fails to load, which is tried again in a new worker, counted.

    A file that was altered on the disk stays so in a new worker: that version gives way at once. One that fails without
    a reason of its own, and has none before it, is tried again for as long as it takes.
    """
    incumbent = slot.incumbent
    if incumbent is None or not turn.is_current(event) or event.digest != incumbent.loadable.digest:
        return
    if event.ok:
        if slot.faults:
            turn.put(name, replace(slot, faults=0))
    elif slot.faults + 1 < FAULTS_MAX and event.reason not in reasons.ALTERED:
        turn.put(name, replace(slot, faults=slot.faults + 1))
        turn.effects.append(RestartWorker(f"{name} could not be served: {event.reason}"))
    elif event.reason == reasons.CHILD_FAILED and slot.last_good is None:
        _try_later(turn, name, slot)
    else:
        turn.give_up(name, slot, event.reason or reasons.LOAD_FAILED, event.detail)


def _settle(turn: Turn) -> tuple[State, tuple[Effect, ...]]:
    """Compare what is with what should be: engines, offer, queue, serving set, reports."""
    upgrades.settle(turn)
    turn.try_held()
    offer = turn.state.offer
    if offer is not None and not turn.expired():
        for name, offered in offer.models.items():
            _reconsider(turn, name, offer, offered)
        _hold_together(turn, offer)
    _admit(turn)
    _forget(turn)
    if serving(turn.state) != serving(turn.before) or not flags.same(flags_of(turn.state), flags_of(turn.before)):
        turn.state = replace(turn.state, revision=turn.state.revision + 1)
        _tell(turn)
    if turn.state.seq != turn.before.seq and SendReports() not in turn.effects:
        turn.effects.append(SendReports())
    return turn.state, tuple(turn.effects)


def _hold_together(turn: Turn, offer: Accepted) -> None:
    """Give up what is under way in a group of which one came to nothing here."""
    for group, members in offer.groups.items():
        out = next((name for name in members if _came_to_nothing(turn, offer, name)), None)
        if out is None:
            continue
        said = turn.state.models[out].told
        why = f"{out} of group {group} did not come through" + (f": {said.reason}" if said is not None else "")
        unfit = end_of(offer.models[out]) in turn.state.models[out].unfit
        for name in members:
            slot = turn.state.models.get(name, Slot())
            phase = slot.phase
            if not isinstance(phase, Resolving | Fetching | Judging | Queued | Waiting):
                continue
            if phase.job.offered.group == group:
                turn.leave_group(name, slot, phase.job, why, unfit=unfit)


def _came_to_nothing(turn: Turn, offer: Accepted, name: str) -> bool:
    """Tell whether a model does not run what is offered, and will not under this attempt."""
    slot, offered = turn.state.models.get(name), offer.models.get(name)
    if slot is None or offered is None:
        return False
    return end_of(offered) in slot.ends and not names_incumbent(slot, offered)


def _complete(turn: Turn, group: str) -> tuple[str, ...]:
    """Return those of a group that wait for their trial, if all others run what is offered; else nothing."""
    offer = turn.state.offer
    waiting: list[str] = []
    for name in offer.groups.get(group, ()) if offer is not None else ():
        slot, offered = turn.state.models.get(name, Slot()), offer.models.get(name) if offer is not None else None
        phase = slot.phase
        if offered is None:
            return ()
        if isinstance(phase, Queued) and same_attempt(phase.job.offered, offered):
            waiting.append(name)
        elif not (isinstance(phase, Idle) and names_incumbent(slot, offered)):
            return ()
    return tuple(waiting)


def _admit(turn: Turn) -> None:
    """One model, or one whole group, is swapped and tried at a time, so that a crash has few suspects."""
    if any(_occupies(slot.phase) for slot in turn.state.models.values()) or turn.state.engines.handing_over is not None:
        return
    for name in sorted(turn.state.models):
        slot = turn.state.models[name]
        if not isinstance(slot.phase, Queued):
            continue
        job = slot.phase.job
        if turn.expired() and not job.again:
            turn.expire(name, slot, job)
            continue
        chosen = _complete(turn, job.offered.group) if job.offered.group else (name,)
        for one in chosen:
            waiting = turn.state.models[one]
            assert isinstance(waiting.phase, Queued)
            turn.begin_trial(one, waiting, waiting.phase.job)
        if chosen:
            return


def _occupies(phase: Phase) -> bool:
    return isinstance(phase, Swapping | OnTrial | Proving | Returning)


def _tell(turn: Turn) -> None:
    """Tell the worker what to serve, and wait for its answers."""
    models = serving(turn.state)
    waiting = tuple(model.name for model in models)
    turn.state = replace(turn.state, told=Told(Since.at(turn.now), waiting) if waiting else None)
    turn.effects.append(Serve(turn.state.revision, models, flags_of(turn.state)))


def _answered(turn: Turn, event: Served) -> None:
    told = turn.state.told
    wanted = next((model.active.digest for model in serving(turn.state) if model.name == event.model), "")
    if told is not None and turn.is_current(event) and event.digest == wanted:
        waiting = tuple(name for name in told.waiting if name != event.model)
        if waiting != told.waiting:
            _go_on_waiting(turn, waiting)


def _go_on_waiting(turn: Turn, waiting: tuple[str, ...]) -> None:
    """The worker goes on to its next model: the waits for that begin now."""
    turn.state = replace(turn.state, told=Told(Since.at(turn.now), waiting) if waiting else None)
    for name in waiting:
        slot = turn.state.models.get(name, Slot())
        if isinstance(slot.phase, Swapping | Returning):
            turn.put(name, replace(slot, phase=replace(slot.phase, since=Since.at(turn.now))))


def _watch_worker(turn: Turn) -> None:
    """End a worker that does not answer: it hangs, also where no trial waits for it.

    The model at which it is stuck has failed to load once more.
    """
    told = turn.state.told
    if told is None or told.since.elapsed_ms(turn.now) < _serve_ms(turn.state, told):
        return
    waited_s = told.since.elapsed_ms(turn.now) // 1000
    turn.state = replace(turn.state, told=None)
    name, detail = told.waiting[0], f"the worker did not answer within {waited_s} s"
    stuck = next((model for model in serving(turn.state) if model.name == name), None)
    if stuck is not None:
        late = Served(name, stuck.active.digest, turn.state.revision, False, reasons.CHILD_FAILED, detail)
        _slot_step(turn, name, late)
    if not any(isinstance(effect, RestartWorker) for effect in turn.effects):
        turn.effects.append(RestartWorker(detail))


def _forget(turn: Turn) -> None:
    """Drop slots that hold nothing and that the offer does not name."""
    wanted = turn.state.offer.models if turn.state.offer is not None else {}
    empty = [
        name
        for name, slot in turn.state.models.items()
        if slot.incumbent is None and isinstance(slot.phase, Idle) and name not in wanted
    ]
    if empty:
        turn.state = replace(turn.state, models={n: s for n, s in turn.state.models.items() if n not in empty})


def _speaks_of(event: Resolved | Fetched | TaskFailed | CanaryDone, job: Job) -> bool:
    return event.manifest == job.offered.manifest and event.attempt == job.offered.attempt


def _overdue(phase: Phase, now: Now, members: int = 1) -> bool:
    limit = limit_ms(phase, members)
    assert limit is not None
    assert not isinstance(phase, Idle | Compared | Safe)
    return phase.since.elapsed_ms(now) >= limit


def _late(name: str, job: Job, task: Task) -> TaskFailed:
    offered = job.offered
    return TaskFailed(
        name, offered.manifest, offered.attempt, task, reasons.CHILD_FAILED, "it did not end in time", 0.0
    )


def _renewed(job: Job, offered: OfferedModel, serial: int) -> Job:
    """Take over newer terms for the same attempt."""
    return replace(job, offered=offered if not job.candidates else plain(offered), serial=serial)


def _counted(counts: Counts, event: Measured, latency_ratio: float) -> Counts:
    arm = event.candidate
    return replace(
        counts,
        requests=arm.requests,
        errors=arm.errors,
        fallbacks=arm.fallbacks,
        latency_ratio=latency_ratio or counts.latency_ratio,
        compared=arm.compared,
        agreed=arm.agreed,
        skipped=arm.skipped,
    )


def _carried(counts: Counts) -> Counts:
    """Keep the totals of a worker process that is gone."""
    return Counts(
        latency_ratio=counts.latency_ratio,
        earlier_requests=counts.earlier_requests + counts.requests,
        earlier_errors=counts.earlier_errors + counts.errors,
        earlier_fallbacks=counts.earlier_fallbacks + counts.fallbacks,
        earlier_compared=counts.earlier_compared + counts.compared,
        earlier_agreed=counts.earlier_agreed + counts.agreed,
        earlier_skipped=counts.earlier_skipped + counts.skipped,
    )


def _watch_ms(watch: TrustWatch) -> int:
    return REFRESH_MS if watch.running else watch.wait_ms
