"""Deliberate bugs: each is put into the machine, and some world has to notice.

A simulator that is kinder than the real world finds nothing, and says so in green. So it is software under test as well:
every row below is a mistake that somebody could make in the machine or the daemon, as a wrapper around the real
functions. `hunt` runs the scenarios on each until a rule is violated; a mutant that nobody notices is a hole in the
checkers or a missing fault, and fails the build. Add one for every bug that was found elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from wherry_agent import machine
from wherry_agent import state as s
from wherry_agent.children import Judged, ServeModel
from wherry_shared import reasons
from wherry_shared.clock import Now, Since
from wherry_shared.wire import Report
from wherry_simulators import scenarios
from wherry_simulators.brain import REAL, Brain, Turn
from wherry_simulators.scenario import Scenario
from wherry_simulators.scenarios import downs, engines, groups, modes, trouble, wear
from wherry_simulators.world import World

DEVICES_MAX = 12
"""Devices per world in the hunt: rules are broken one device at a time."""
HUNTED = tuple(row for row in scenarios.ALL if not any(release.gates for release in row.releases))
"""Gates judge the server's decisions, and need more devices than the hunt has."""
ASSERTION = "the machine keeps its own assertions"
_TRIAL = (s.Swapping, s.OnTrial, s.Proving)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake."""

    name: str
    brain: Brain
    first: tuple[Scenario, ...] = ()
    """Where it is likely to show: tried before the others."""


CONTROL = Mutant("the machine as it is", REAL)
"""Has to survive: a rule that the real machine breaks catches nothing."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a mutant."""

    mutant: str
    caught: bool
    rule: str
    scenario: str
    seed: int
    runs: int


def hunt(seeds: int, only: Callable[[Mutant], bool] = lambda _: True) -> Iterator[Fate]:
    """Run the scenarios on each mutant until one notices; at most `seeds` seeds of each scenario."""
    for mutant in ALL:
        if only(mutant):
            yield fate(mutant, seeds)


def fate(mutant: Mutant, seeds: int) -> Fate:
    """Run the scenarios on one mutant until one notices."""
    runs = 0
    for seed in range(seeds):
        for row in (*mutant.first, *(row for row in HUNTED if row not in mutant.first)):
            runs += 1
            devices = min(row.devices, DEVICES_MAX)
            try:
                result = World(row, seed, brain=mutant.brain, devices=devices, until_violated=True).run()
            except AssertionError:
                return Fate(mutant.name, True, ASSERTION, row.name, seed, runs)
            if result.violations:
                return Fate(mutant.name, True, result.violations[0].rule, row.name, seed, runs)
    return Fate(mutant.name, False, "", "", 0, runs)


# --- ways to be wrong ----------------------------------------------------------------------------


def _step(wrong: Callable[[s.State, s.Event, Now], Turn]) -> Brain:
    return replace(REAL, step=wrong)


def _resume(wrong: Callable[[s.State, Now], Turn]) -> Brain:
    return replace(REAL, resume=wrong)


def _events(change: Callable[[s.State, s.Event], s.Event | None]) -> Brain:
    """Hear something else than what was said, or nothing."""

    def step(state: s.State, event: s.Event, now: Now) -> Turn:
        heard = change(state, event)
        return (state, ()) if heard is None else machine.step(state, heard, now)

    return _step(step)


def _effects(change: Callable[[s.Event | None, s.Effect], s.Effect | None]) -> Brain:
    """Do something else than what was decided, or nothing."""

    def kept(event: s.Event | None, turn: Turn) -> Turn:
        return turn[0], tuple(done for effect in turn[1] if (done := change(event, effect)) is not None)

    return replace(
        REAL,
        step=lambda state, event, now: kept(event, machine.step(state, event, now)),
        resume=lambda state, now: kept(None, machine.resume(state, now)),
    )


def _slots(change: Callable[[s.Slot, Now], s.Slot]) -> Callable[[s.State, Now], s.State]:
    def changed(state: s.State, now: Now) -> s.State:
        return replace(state, models={name: change(slot, now) for name, slot in state.models.items()})

    return changed


def _phases_never_overdue(*kinds: type[Any]) -> Brain:
    """Start the wait of these phases anew at every tick."""

    def again(slot: s.Slot, now: Now) -> s.Slot:
        if isinstance(slot.phase, kinds):
            return replace(slot, phase=replace(slot.phase, since=Since.at(now)))
        return slot

    refresh = _slots(again)

    def step(state: s.State, event: s.Event, now: Now) -> Turn:
        return machine.step(refresh(state, now) if isinstance(event, s.Tick) else state, event, now)

    return _step(step)


def _job(state: s.State, model: str) -> s.Job | None:
    slot = state.models.get(model)
    job = getattr(slot.phase, "job", None) if slot is not None else None
    return job if isinstance(job, s.Job) else None


# --- the mistakes --------------------------------------------------------------------------------


def _stale_verdict(state: s.State, event: s.Event) -> s.Event:
    if isinstance(event, s.CanaryDone):
        job = _job(state, event.model)
        if job is not None and job.candidates:
            offered = job.offered
            return replace(event, manifest=offered.manifest, attempt=offered.attempt, digest=job.loadable.digest)
    return event


def _stale_counts(state: s.State, event: s.Event) -> s.Event:
    slot = state.models.get(event.model) if isinstance(event, s.Measured) else None
    if isinstance(event, s.Measured) and slot is not None and isinstance(slot.phase, s.OnTrial):
        candidate = msgspec.structs.replace(event.candidate, digest=slot.phase.job.loadable.digest)
        return replace(event, trial=slot.phase.trial, candidate=candidate)
    return event


def _old_offer(state: s.State, event: s.Event, now: Now) -> Turn:
    return machine.step(replace(state, offer=None) if isinstance(event, s.Offered) else state, event, now)


def _unjudged(state: s.State, event: s.Event, now: Now) -> Turn:
    after, effects = machine.step(state, event, now)
    if isinstance(event, s.Fetched):
        job = _job(after, event.model)
        if job is not None and isinstance(after.models[event.model].phase, s.Judging):
            passed = s.CanaryDone(
                event.model, job.offered.manifest, job.offered.attempt, job.loadable.digest, Judged(passed=True)
            )
            later, more = machine.step(after, passed, now)
            return later, (*effects, *more)
    return after, effects


def _forgetful(state: s.State, now: Now) -> s.State:  # noqa: ARG001  # the form of `_slots`
    models = {name: replace(slot, ends=()) for name, slot in state.models.items()}
    return replace(state, known_bad=(), models=models)


def _renumbering(state: s.State, now: Now) -> Turn:
    owed = tuple(
        msgspec.structs.replace(report, seq=number) for number, report in enumerate(state.owed, start=state.seq)
    )
    return machine.resume(replace(state, owed=owed, seq=state.seq + len(owed)), now)


def _confirming(state: s.State, now: Now) -> Turn:
    after, effects = machine.resume(state, now)
    for name, slot in state.models.items():
        phase = slot.phase
        if isinstance(phase, s.OnTrial):
            confirmed = s.Installed(phase.job.offered, phase.job.loadable, after.confirmations + 1)
            trusted = replace(slot, incumbent=confirmed, last_good=slot.incumbent, phase=s.Idle(), settled=None)
            after = replace(after, models={**after.models, name: trusted})
            after, more = machine.step(after, s.Connected(), now)
            effects = (*effects, *more)
    return after, effects


def _giving_up(slot: s.Slot, now: Now) -> s.Slot:  # noqa: ARG001  # the form of `_slots`
    job = getattr(slot.phase, "job", None)
    if isinstance(slot.phase, (*_TRIAL, s.Returning)) and isinstance(job, s.Job):
        end = s.End(job.offered.manifest, job.offered.rollout, job.offered.attempt)
        return replace(slot, phase=s.Idle(), ends=(*slot.ends, end), settled=None)
    return slot


def _uncounted(slot: s.Slot, now: Now) -> s.Slot:  # noqa: ARG001  # the form of `_slots`
    job = getattr(slot.phase, "job", None)
    if isinstance(job, s.Job) and not isinstance(slot.phase, s.Idle | s.Safe):
        return replace(slot, phase=replace(slot.phase, job=replace(job, restarts=0, downs=0)))
    return slot


# --- machines that go down -----------------------------------------------------------------------


def _at_boot(change: Callable[[s.State], s.State]) -> Brain:
    """Begin a life with something else than what the journal holds."""
    return _resume(lambda state, now: machine.resume(change(state), now))


def _canary_uncounted(slot: s.Slot, now: Now) -> s.Slot:
    return _uncounted(slot, now) if isinstance(slot.phase, s.Judging) else slot


def _one_is_enough(slot: s.Slot, now: Now) -> s.Slot:  # noqa: ARG001  # the form of `_slots`
    if not isinstance(slot.phase, _TRIAL):
        return slot
    job = slot.phase.job
    return replace(slot, phase=replace(slot.phase, job=replace(job, downs=max(job.downs, 2))))


def _blameless(state: s.State, now: Now) -> Turn:
    """Take what goes down with a device for something that happens."""
    after, effects = machine.resume(state, now)
    models = {
        name: replace(slot, phase=replace(slot.phase, reason=reasons.RESTARTS))
        if isinstance(slot.phase, s.Returning) and slot.phase.reason == reasons.DEVICE_DOWN
        else slot
        for name, slot in after.models.items()
    }
    bad = tuple(one for one in after.known_bad if one.reason != reasons.DEVICE_DOWN)
    return replace(after, models=models, known_bad=bad), effects


def _shortened(state: s.State) -> s.State:
    return replace(state, falls=replace(state.falls, lasted=False)) if state.falls is not None else state


def _disordered(state: s.State) -> s.State:
    tried = any(isinstance(slot.phase, (s.Judging, *_TRIAL)) for slot in state.models.values())
    return state if tried else replace(state, stopped=False)


def _unmarked(slot: s.Slot, now: Now) -> s.Slot:  # noqa: ARG001  # the form of `_slots`
    return replace(slot, rejudging=None)


def _stopped_for_ever(state: s.State, now: Now) -> Turn:
    after, effects = machine.resume(state, now)
    return replace(after, stopped=state.stopped), effects


# --- what was confirmed --------------------------------------------------------------------------


def _changed_before(change: Callable[[s.Slot, Now], s.Slot], *kinds: type[Any]) -> Brain:
    """Change all slots before these events are heard."""
    changed = _slots(change)
    return _step(
        lambda state, event, now: machine.step(changed(state, now) if isinstance(event, kinds) else state, event, now)
    )


def _believing(reason: str, instead: str) -> Brain:
    """Take one reason for which a version could not be served for another."""
    return _events(
        lambda _, event: (
            replace(event, reason=instead) if isinstance(event, s.Served) and event.reason == reason else event
        )
    )


def _deaf_in_safety(state: s.State, event: s.Event) -> s.Event | None:
    safe = any(isinstance(slot.phase, s.Safe) for slot in state.models.values())
    return None if safe and isinstance(event, s.Offered) else event


def _undeclared(report: Report) -> Report:
    return msgspec.structs.replace(report, state="waiting") if report.state == "safe" else report


def _impatient(state: s.State, event: s.Event, now: Now) -> Turn:
    """Take the silence of a canary for a verdict."""
    after, effects = machine.step(state, event, now)
    for name, slot in state.models.items():
        silent = isinstance(event, s.Tick) and isinstance(slot.phase, s.Judging)
        if silent and isinstance(slot.phase, s.Judging) and isinstance(after.models[name].phase, s.Waiting):
            job = slot.phase.job
            late = Judged(passed=False, reason=reasons.TIMEOUT, detail="nothing was heard of it")
            offered = job.offered
            done = s.CanaryDone(name, offered.manifest, offered.attempt, job.loadable.digest, late)
            return machine.step(state, done, now)
    return after, effects


def _sent_is_done(state: s.State, event: s.Event, now: Now) -> Turn:
    return machine.step(replace(state, owed=()) if state.owed else state, event, now)


def _at_reports(change: Callable[[Report], Report]) -> Brain:
    def step(state: s.State, event: s.Event, now: Now) -> Turn:
        after, effects = machine.step(state, event, now)
        owed = tuple(change(report) if report.seq >= state.seq else report for report in after.owed)
        return replace(after, owed=owed), effects

    return _step(step)


def _flattering(state: s.State, event: s.Event) -> s.Event:  # noqa: ARG001  # the form of `_events`
    if isinstance(event, s.Measured):
        return replace(event, candidate=msgspec.structs.replace(event.candidate, errors=0))
    return event


def _eternal(state: s.State, event: s.Event) -> s.Event:  # noqa: ARG001  # the form of `_events`
    if isinstance(event, s.Offered):
        return replace(event, offer=msgspec.structs.replace(event.offer, expires_at=1 << 61))
    return event


def _on_trial(state: s.State) -> bool:
    return any(isinstance(slot.phase, _TRIAL) for slot in state.models.values())


# --- modes ---------------------------------------------------------------------------------------


def _beside(phase: s.Phase) -> bool:
    return isinstance(phase, s.OnTrial) and (
        phase.job.offered.mode in ("shadow", "split") or not phase.job.offered.share
    )


def _eager(state: s.State, event: s.Event, now: Now) -> Turn:
    """Confirm what only runs beside the incumbent as soon as it did well."""
    after, effects = machine.step(state, event, now)
    slot = after.models.get(event.model) if isinstance(event, s.Measured) else None
    if isinstance(event, s.Measured) and slot is not None and _beside(slot.phase):
        phase = slot.phase
        assert isinstance(phase, s.OnTrial)
        if event.candidate.requests >= phase.job.offered.trial.min_requests:
            confirmed = s.Installed(phase.job.offered, phase.job.loadable, after.confirmations + 1)
            trusted = replace(slot, incumbent=confirmed, last_good=slot.incumbent, phase=s.Idle(), settled=None)
            after, more = machine.step(
                replace(after, models={**after.models, event.model: trusted}), s.Connected(), now
            )
            effects = (*effects, *more)
    return after, effects


def _told(change: Callable[[ServeModel], ServeModel]) -> Brain:
    """Tell the worker something else than what was decided."""

    def changed(_: s.Event | None, effect: s.Effect) -> s.Effect:
        if isinstance(effect, s.Serve):
            return replace(effect, models=tuple(change(model) if model.trial else model for model in effect.models))
        return effect

    return _effects(changed)


def _bringing_again(state: s.State, event: s.Event, now: Now) -> Turn:
    """Begin from nothing when an offer promotes what is here."""
    if isinstance(event, s.Offered):
        models = dict(state.models)
        for name, slot in state.models.items():
            offered = event.offer.models.get(name)
            job = getattr(slot.phase, "job", None)
            if not isinstance(slot.phase, s.OnTrial | s.Compared) or not isinstance(job, s.Job) or offered is None:
                continue
            if offered.manifest == job.offered.manifest and offered.mode != job.offered.mode:
                models[name] = replace(slot, phase=s.Resolving(s.Job(offered, event.offer.serial), Since.at(now)))
        state = replace(state, models=models)
    return machine.step(state, event, now)


def _without_held(state: s.State, effect: s.Effect) -> s.Effect:
    if not isinstance(effect, s.Collect):
        return effect
    dropped = {slot.held.version.loadable.digest for slot in state.models.values() if slot.held is not None}
    return s.Collect(tuple(loadable for loadable in effect.keep if loadable.digest not in dropped))


def _careless_in_safety(state: s.State, event: s.Event, now: Now) -> Turn:
    turn = machine.step(state, event, now)
    return turn[0], tuple(_without_held(turn[0], effect) for effect in turn[1])


def _without_compared(state: s.State, effect: s.Effect) -> s.Effect:
    if not isinstance(effect, s.Collect):
        return effect
    dropped = {slot.phase.job.loadable.digest for slot in state.models.values() if isinstance(slot.phase, s.Compared)}
    return s.Collect(tuple(loadable for loadable in effect.keep if loadable.digest not in dropped))


def _dropping(turn: Turn) -> Turn:
    return turn[0], tuple(_without_compared(turn[0], effect) for effect in turn[1])


def _hasty(state: s.State, event: s.Event, now: Now) -> Turn:
    """End what runs beside the incumbent at its first deadline of any kind: long before its time."""
    if isinstance(event, s.Tick):
        for slot in state.models.values():
            if _beside(slot.phase):
                assert isinstance(slot.phase, s.OnTrial)
                later_ms = now.monotonic_ms + slot.phase.job.offered.trial.max_s * 1000
                return machine.step(state, event, Now(now.boot, later_ms, now.wall_s))
    return machine.step(state, event, now)


def _agreeable(state: s.State, event: s.Event) -> s.Event:  # noqa: ARG001  # the form of `_events`
    if isinstance(event, s.Measured):
        return replace(event, candidate=msgspec.structs.replace(event.candidate, agreed=event.candidate.compared))
    return event


def _roomy(state: s.State, event: s.Event) -> s.Event:  # noqa: ARG001  # the form of `_events`
    return replace(event, incumbent_loaded=True) if isinstance(event, s.Served) else event


# --- groups --------------------------------------------------------------------------------------


def _alone(state: s.State, name: str) -> s.State:
    """Let one model on trial forget which group it is of."""
    slot = state.models.get(name)
    if slot is None or not isinstance(slot.phase, _TRIAL):
        return state
    job = slot.phase.job
    alone = replace(job, offered=msgspec.structs.replace(job.offered, group=""))
    return replace(state, models={**state.models, name: replace(slot, phase=replace(slot.phase, job=alone))})


def _deciding_alone(state: s.State, event: s.Event, now: Now) -> Turn:
    return machine.step(_alone(state, event.model) if isinstance(event, s.Measured) else state, event, now)


def _failing_alone(state: s.State, event: s.Event, now: Now) -> Turn:
    alone = isinstance(event, s.Served) and not event.ok
    return machine.step(_alone(state, event.model) if isinstance(event, s.Served) and alone else state, event, now)


def _restarting_alone(state: s.State, now: Now) -> Turn:
    for name, slot in state.models.items():
        if isinstance(slot.phase, _TRIAL) and slot.phase.job.offered.group:
            given_up = {**state.models, name: _giving_up(slot, now)}
            return machine.resume(replace(state, models=given_up), now)
    return machine.resume(state, now)


def _ungrouped(state: s.State, event: s.Event) -> s.Event:  # noqa: ARG001  # the form of `_events`
    if not isinstance(event, s.Offered):
        return event
    models = {name: msgspec.structs.replace(one, group="") for name, one in event.offer.models.items()}
    return replace(event, offer=msgspec.structs.replace(event.offer, models=models, groups={}))


def _blaming(state: s.State, event: s.Event, now: Now) -> Turn:
    after, effects = machine.step(state, event, now)
    bad = list(after.known_bad)
    for name, slot in after.models.items():
        before = state.models.get(name, s.Slot()).phase
        if isinstance(slot.phase, s.Returning) and slot.phase.reason == reasons.GROUP and isinstance(before, _TRIAL):
            one = slot.phase.job.loadable
            bad.append(s.KnownBad(one.digest, one.engine, one.engine_version, reasons.CRASH, 1))
    return replace(after, known_bad=tuple(bad)), effects


def _one_by_one(_: s.Event | None, effect: s.Effect) -> s.Effect:
    if not isinstance(effect, s.Serve):
        return effect
    seen: set[str] = set()
    models = []
    for model in effect.models:
        if model.trial and model.group in seen and model.incumbent is not None:
            models.append(ServeModel(name=model.name, active=model.incumbent, deadline_ms=model.deadline_ms))
        else:
            models.append(model)
        seen |= {model.group} - {""}
    return replace(effect, models=tuple(models))


def _at(name: str) -> tuple[Scenario, ...]:
    return (scenarios.find(name),)


ALL: tuple[Mutant, ...] = (
    Mutant("effects run before the journal is written", replace(REAL, journal_first=False)),
    Mutant(
        "a verdict of the canary counts for whatever is being judged",
        _events(_stale_verdict),
        _at("verdicts that come late"),
    ),
    Mutant("counts of an earlier trial count for this one", _events(_stale_counts), _at("verdicts that come late")),
    Mutant("a trial has no deadline", _phases_never_overdue(s.OnTrial)),
    Mutant("proving has no deadline", _phases_never_overdue(s.Proving), _at("a worker that hangs")),
    Mutant(
        "resolving and fetching have no deadline",
        _phases_never_overdue(s.Resolving, s.Fetching),
        _at("three releases reach their ends through a storm"),
    ),
    Mutant("judging has no deadline", _phases_never_overdue(s.Judging), _at("children that never answer")),
    Mutant("a wait after trouble never ends", _phases_never_overdue(s.Waiting), _at("offers that expire")),
    Mutant(
        "what was bad is forgotten",
        _step(lambda state, event, now: machine.step(_forgetful(state, now), event, now)),
    ),
    Mutant(
        "what was bad is forgotten at a restart",
        _resume(lambda state, now: machine.resume(_forgetful(state, now), now)),
    ),
    Mutant("owed reports get new numbers at a restart", _resume(_renumbering)),
    Mutant("a report counts as delivered once it was sent", _step(_sent_is_done)),
    Mutant(
        "owed reports are dropped at a restart",
        _resume(lambda state, now: machine.resume(replace(state, owed=()), now)),
    ),
    Mutant("an offer with a lower serial is accepted", _step(_old_offer)),
    Mutant("an offer never expires", _events(_eternal), _at("offers that expire")),
    Mutant("a candidate serves before it was judged", _step(_unjudged)),
    Mutant("a restart during a trial confirms the candidate", _resume(_confirming)),
    Mutant(
        "a restart during a trial ends it without a word",
        _resume(lambda state, now: machine.resume(_slots(_giving_up)(state, now), now)),
    ),
    Mutant(
        "restarts during a trial are not counted",
        _resume(lambda state, now: machine.resume(_slots(_uncounted)(state, now), now)),
        downs.TABLE,
    ),
    Mutant(
        "what a canary does to the machine is not counted",
        _resume(lambda state, now: machine.resume(_slots(_canary_uncounted)(state, now), now)),
        downs.TABLE,
    ),
    Mutant(
        "a single power cut is held against a candidate",
        _resume(lambda state, now: machine.resume(_slots(_one_is_enough)(state, now), now)),
        downs.TABLE[5:],
    ),
    Mutant("what a device goes down with is held against nobody", _resume(_blameless), downs.TABLE),
    Mutant(
        "an end in order is taken for one that nobody ordered",
        _at_boot(lambda state: replace(state, stopped=False)),
        downs.TABLE[4:],
    ),
    Mutant("an end in order makes those that follow orderly", _resume(_stopped_for_ever), downs.TABLE),
    Mutant(
        "a device that goes down anyway blames what it tries",
        _at_boot(lambda state: replace(state, downs=None)),
        downs.TABLE[-1:],
    ),
    Mutant(
        "what takes the machine down when it is trusted keeps its place",
        _at_boot(lambda state: replace(state, falls=None)),
        downs.TABLE[8:9],
    ),
    Mutant("a life that lasted counts as a short one", _at_boot(_shortened), downs.TABLE[10:11]),
    Mutant("an end in order is held against what is trusted", _at_boot(_disordered), downs.TABLE[11:12]),
    Mutant(
        "what is trusted is blamed on a device that went down before it came",
        _step(lambda state, event, now: machine.step(replace(state, downs=None), event, now)),
        downs.TABLE[12:13],
    ),
    Mutant(
        "what a canary with a new engine does to the machine is not counted",
        _resume(lambda state, now: machine.resume(_slots(_unmarked)(state, now), now)),
        engines.TABLE[-1:],
    ),
    Mutant("the silence of a canary is held against its candidate", _step(_impatient), trouble.CANARY_LOST),
    Mutant(
        "deaths of the worker are not counted",
        _step(lambda state, event, now: machine.step(replace(state, crashes=None), event, now)),
        wear.DEATHS,
    ),
    Mutant(
        "deaths of the worker are forgotten at a restart",
        _at_boot(lambda state: replace(state, crashes=None)),
        wear.DEATHS,
    ),
    Mutant(
        "failures to load what was confirmed are not counted",
        _changed_before(lambda slot, _: replace(slot, faults=0), s.Served),
        wear.LOADS,
    ),
    Mutant(
        "the version before the confirmed one is forgotten",
        _changed_before(lambda slot, _: replace(slot, last_good=None), s.Served, s.WorkerDied),
        wear.LOADS,
    ),
    Mutant("the safe state is not declared", _at_reports(_undeclared), wear.SAFE),
    Mutant("an offer does not lead out of the safe state", _events(_deaf_in_safety), wear.SAFE),
    Mutant(
        "what served last is forgotten in the safe state",
        _changed_before(lambda slot, _: replace(slot, held=None), s.Tick),
        wear.HELD,
    ),
    Mutant(
        "the file of what served last is collected",
        _step(_careless_in_safety),
        wear.HELD,
    ),
    Mutant(
        "what a scrub finds is not fetched again",
        _effects(lambda _, effect: None if isinstance(effect, s.Mend) else effect),
        wear.FILES,
    ),
    Mutant(
        "an altered file is held against its version",
        _believing(reasons.DIGEST_MISMATCH, reasons.LOAD_FAILED),
        wear.FILES,
    ),
    Mutant(
        "an engine that is gone is held against the version",
        _believing(reasons.ENGINE_MISSING, reasons.LOAD_FAILED),
        engines.MISSING,
    ),
    Mutant(
        "what came to nothing for want of an engine is not begun again with one",
        _changed_before(lambda slot, _: replace(slot, unfit=()), s.EnginesProbed),
        engines.MISSING,
    ),
    Mutant(
        "no other worker takes over when an engine was replaced",
        _effects(lambda _, effect: None if isinstance(effect, s.HandOver) else effect),
        engines.TABLE,
    ),
    Mutant(
        "a new worker is not told what to serve",
        _effects(
            lambda event, effect: None if isinstance(event, s.WorkerReady) and isinstance(effect, s.Serve) else effect
        ),
    ),
    Mutant(
        "a death of the worker during a trial is ignored",
        _events(lambda state, event: None if isinstance(event, s.WorkerDied) and _on_trial(state) else event),
    ),
    Mutant("errors of the candidate are not counted", _events(_flattering)),
    Mutant(
        "latency is not compared",
        _events(lambda _, event: replace(event, baseline=None) if isinstance(event, s.Measured) else event),
    ),
    Mutant(
        "golden vectors that fail in place are taken for passed",
        _events(lambda _, event: replace(event, passed=True) if isinstance(event, s.GoldenChecked) else event),
    ),
    Mutant(
        "a load that failed is taken for a success",
        _events(lambda _, event: replace(event, ok=True) if isinstance(event, s.Served) else event),
    ),
    Mutant(
        "a version that a new engine breaks is taken for good",
        _events(
            lambda _, event: (
                replace(event, result=msgspec.structs.replace(event.result, passed=True))
                if isinstance(event, s.Rejudged)
                else event
            )
        ),
        engines.TABLE,
    ),
    Mutant(
        "a version that a new engine breaks serves with it",
        _events(lambda _, event: None if isinstance(event, s.Rejudged) and not event.result.passed else event),
        engines.TABLE,
    ),
    Mutant(
        "files are collected while they may still serve",
        _effects(lambda _, effect: s.Collect(()) if isinstance(effect, s.Collect) else effect),
    ),
    Mutant(
        "a report says that what was offered runs",
        _at_reports(lambda report: msgspec.structs.replace(report, running=report.manifest)),
    ),
    Mutant("a shadow that does well is confirmed", _step(_eager), modes.TABLE),
    Mutant("a shadow answers", _told(lambda model: msgspec.structs.replace(model, mode="replace")), modes.TABLE),
    Mutant("a standby answers", _told(lambda model: msgspec.structs.replace(model, share=1.0)), modes.TABLE),
    Mutant("a promotion brings the bundle again", _step(_bringing_again), modes.TABLE),
    Mutant(
        "what was compared loses its files",
        replace(
            REAL,
            step=lambda state, event, now: _dropping(machine.step(state, event, now)),
            resume=lambda state, now: _dropping(machine.resume(state, now)),
        ),
        modes.TABLE,
    ),
    Mutant("a shadow ends before its time", _step(_hasty), modes.TABLE),
    Mutant("a shadow that disagrees is believed", _events(_agreeable), modes.TABLE),
    Mutant("a standby that does not fit is believed to be there", _events(_roomy), modes.TABLE),
    Mutant("one of a group is judged alone", _step(_deciding_alone), groups.TABLE),
    Mutant("one of a group that does not load goes back alone", _step(_failing_alone), groups.TABLE),
    Mutant("a restart takes one of a group back alone", _resume(_restarting_alone), groups.TABLE),
    Mutant("the groups of an offer are ignored", _events(_ungrouped), groups.TABLE),
    Mutant("the others of a group are remembered as bad", _step(_blaming), groups.TABLE),
    Mutant("a group is swapped one by one", _effects(_one_by_one), groups.TABLE),
    Mutant("a model waits for its group for ever", _phases_never_overdue(s.Queued), groups.TABLE),
    Mutant(
        "a report that says no gives no reason",
        _at_reports(lambda report: msgspec.structs.replace(report, reason="")),
    ),
    Mutant(
        "what happened is written only when another offer comes",
        replace(REAL, may_wait=lambda old, new: old.offer == new.offer),
    ),
    Mutant(
        "what the worker ran when it died is not asked",
        _events(lambda _, event: replace(event, ran=()) if isinstance(event, s.WorkerDied) else event),
        groups.TABLE,
    ),
)
