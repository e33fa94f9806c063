"""One step being made: what the phases of `machine` do to the state, each in one place, at one instant. Pure.

`Turn` holds the state so far and the effects so far. Its methods are the moves between phases: each puts the slot into
its next phase, owes the report that belongs to it and asks for the effects; which event leads where is said in `machine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, assert_never

import msgspec

from wherry_agent.children import Candidate, Loadable, ServeModel, Trust
from wherry_agent.contracts import contract_of, preprocess_of
from wherry_agent.state import (
    Acked,
    Cancel,
    Collect,
    Compared,
    Counts,
    Effect,
    End,
    Falls,
    Fetch,
    Fetching,
    Held,
    Idle,
    Installed,
    Job,
    Judge,
    Judging,
    KnownBad,
    OnTrial,
    Passed,
    Phase,
    Proving,
    Queued,
    Refresh,
    Resolve,
    Resolving,
    Returning,
    Safe,
    Served,
    Slot,
    State,
    Swapping,
    Task,
    TaskFailed,
    TrustWatch,
    Waiting,
)
from wherry_shared import reasons, wire
from wherry_shared.clock import MICROSECONDS, Now, Since
from wherry_shared.limits import REPORT_DETAIL_CHARS_MAX
from wherry_shared.wire import ModelState, OfferedModel, Report, VariantTried

# --- limits: every wait, count and queue ends ----------------------------------------------------

RESOLVE_MS = 5 * 60_000
FETCH_MS = 6 * 3600_000
"""The courier gives up on a stalled connection much earlier; this bounds a slow one."""
JUDGE_GRACE_MS = 30_000
"""Above the trial's `canary_s`, which the canary's parent enforces itself."""
SWAP_MS = 120_000
SERVE_MS = 180_000
"""Longer than `SWAP_MS`: a swap judges itself first, and this is for everything else that the worker has to load."""
PROVE_MS = 120_000
RETURN_MS = SWAP_MS + 50_000
"""A return may load the incumbent as slowly as any swap, after waiting for handles and for memory (10 s each) and for a
new worker to start (30 s). Doubled with each try."""
RETURN_TRIES_MAX = 3
FAULTS_MAX = 3
"""Failures in a row to bring a confirmed version into service before it gives way to the last known good."""
CRASHES_MAX = 3
"""Worker deaths outside trials within CRASH_WINDOW_MS, or as early in boots that follow each other; one more is a loop."""
CRASH_WINDOW_MS = 10 * 60_000
RESTARTS_MAX = 100
"""Restarts in one trial, however orderly: each begins its time anew, and it has to end."""
DOWNS_MIN = 2
"""Ends of the machine in a trial that speak against the candidate: one power cut says nothing, whatever the terms are."""
DOWNS_ORDINARY = 2
"""Ends of the machine in a row without a trial, after which one in a trial speaks against nobody."""
STEADY_MS = 24 * 3600_000
"""An agent that ran for so long is steady: what took the machine down before is over."""
FALLS_MAX = 4
"""Short lives of the agent in a row, nothing being tried, after which the version that was confirmed last gives way."""
FALL_MS = 3600_000
"""A life of the agent that lasts so long is not a short one."""
HELD_RETRY_MIN_MS = 10 * 60_000
"""In the safe state, until what served last is tried again: out of the window in which crashes are counted. Doubled each time."""
HELD_RETRY_MAX_MS = 24 * 3600_000
REJUDGE_DOWNS_MAX = 3
"""Ends of the machine while a confirmed version was judged with a new engine; then it is judged with that no more."""
RETRY_MIN_MS = 5_000
ALTERED_RETRY_S = 600.0
"""A candidate whose file the disk altered is fetched again no sooner: a bad disk must not cost a download in a loop."""
RETRY_MAX_MS = 3600_000
REFRESH_MS = 5 * 60_000
REFRESH_MIN_MS = 60_000
REFRESH_MAX_MS = 3600_000
"""Asking costs one conditional request: the daemon starts the courier only on change or at half of the life."""
OWED_MAX = 256
"""Reports kept for the server; beyond it the oldest are dropped, and counted as lost by `first`."""
KNOWN_BAD_MAX = 256
ENDS_MAX = 16
TRIED_MAX = 16
GROUP_WAIT_MS = 24 * 3600_000
"""A model that is ready waits no longer than this for the others of its group: longer than a slow download takes."""
MODELS_MAX = 64
"""Models that an offer may name, and slots beyond which it begins no new one: never more than twice as many."""

REFUSALS = frozenset(
    {
        reasons.KNOWN_BAD,
        reasons.NO_VARIANT,
        reasons.CONTRACT_BROKEN,
        reasons.UNSUPPORTED,
        reasons.BUNDLE_INVALID,
        reasons.BELOW_FLOOR,
        reasons.REVOKED,
    }
)
"""What the courier may find that trying again cannot change: the bundle is refused under this attempt."""
WITHDRAWN = frozenset({reasons.BELOW_FLOOR, reasons.REVOKED})
"""What its publisher says of a version that nobody is to run any more."""

Kind = Literal["replace", "blue_green", "standby", "split", "shadow"]
"""How a candidate is tried: its mode, with a blue-green that does not answer yet told apart as `standby`."""
DECIDING: frozenset[Kind] = frozenset({"replace", "blue_green"})
"""Trials whose good end confirms the candidate; the others end as `Compared`, and the incumbent goes on alone."""


def kind_of(offered: OfferedModel) -> Kind:
    """Return how an offered candidate is to be tried."""
    match offered.mode:
        case "replace" | "none":
            return "replace"
        case "blue_green":
            return "standby" if offered.share < 1.0 else "blue_green"
        case "split" | "shadow":
            return offered.mode
        case _:
            assert_never(offered.mode)


def answering(model: ServeModel) -> Loadable:
    """Return what answers the requests to a model: the candidate only where it takes over from the incumbent."""
    if model.incumbent is None or not model.trial or model.mode == "replace":
        return model.active
    return model.active if model.mode == "blue_green" and model.share >= 1.0 else model.incumbent


def for_handles(model: ServeModel) -> ServeModel:
    """Return what applications' own processes are told: of a candidate that does not answer they know nothing.

    A split is left to the worker, which keeps a caller on one side: a handle asks it as in any trial.
    """
    if model.incumbent is None or not model.trial or model.mode == "split" or answering(model) == model.active:
        return model
    return ServeModel(name=model.name, active=model.incumbent, deadline_ms=model.deadline_ms)


def serving(state: State) -> tuple[ServeModel, ...]:
    """Return what the worker should serve, in order of names: a function of the state alone."""
    models = []
    for name in sorted(state.models):
        slot = state.models[name]
        incumbent = slot.incumbent.loadable if slot.incumbent is not None else None
        phase = slot.phase
        match phase:
            case Swapping(job) | OnTrial(job) | Proving(job):
                models.append(_on_trial(name, job, incumbent, phase.trial))
            case Returning(job) if incumbent is not None and phase.tries == 0:
                # all of a group go back together; one that does not come back must not keep the others from it
                deadline_ms = job.offered.trial.deadline_ms
                group = job.offered.group
                models.append(ServeModel(name=name, active=incumbent, deadline_ms=deadline_ms, group=group))
            case Idle() | Resolving() | Fetching() | Judging() | Queued() | Waiting() | Compared() | Returning():
                if slot.incumbent is not None and incumbent is not None:
                    deadline_ms = slot.incumbent.offered.trial.deadline_ms
                    models.append(ServeModel(name=name, active=incumbent, deadline_ms=deadline_ms))
            case Safe():
                pass
            case _:
                assert_never(phase)
    return tuple(models)


def flags_of(state: State) -> Mapping[str, Any]:
    """Return the feature flags of this device."""
    return state.offer.flags if state.offer is not None else {}


def _on_trial(name: str, job: Job, incumbent: Loadable | None, trial: str) -> ServeModel:
    offered = job.offered
    plainly = offered.mode == "replace"
    return ServeModel(
        name=name,
        active=job.loadable,
        incumbent=incumbent,
        trial=trial,
        deadline_ms=offered.trial.deadline_ms,
        mode=offered.mode,
        share=offered.share,
        salt="" if plainly else offered.rollout or trial,
        shadow_cpu_share_max=offered.trial.shadow_cpu_share_max,
        group=offered.group,
    )


def kept(state: State) -> tuple[Loadable, ...]:
    """Return all whose files may be needed: what serves, what it may go back to, what is under way."""
    kept: list[Loadable] = []
    for slot in state.models.values():
        held = slot.held.version if slot.held is not None else None
        kept += [version.loadable for version in (slot.incumbent, slot.last_good, held) if version is not None]
        if not isinstance(slot.phase, Idle | Safe):
            job = slot.phase.job
            kept += [candidate.loadable for candidate in job.candidates]
            kept += [job.proved.loadable] if job.proved is not None else []
    return tuple(kept)


def end_of(offered: OfferedModel) -> End:
    """Return what names the attempt that an offer asks for."""
    return End(offered.manifest, offered.rollout, offered.attempt, offered.mode)


def same_attempt(one: OfferedModel, other: OfferedModel) -> bool:
    """Tell whether two offers bring the same bundle under the same attempt, in whatever mode."""
    return replace(end_of(one), mode="replace") == replace(end_of(other), mode="replace")


def names_incumbent(slot: Slot, offered: OfferedModel) -> bool:
    """Tell whether an offer asks for what is trusted here already."""
    if offered.mode == "none":
        return slot.incumbent is None
    return slot.incumbent is not None and slot.incumbent.manifest == offered.manifest


def may_try_held(slot: Slot) -> bool:
    """Tell whether nothing serves and nothing is done about it, or what is done waits for something."""
    if slot.held is None or slot.incumbent is not None:
        return False
    return isinstance(slot.phase, Safe) or (isinstance(slot.phase, Waiting) and not slot.phase.job.again)


def plain(offered: OfferedModel) -> OfferedModel:
    """Leave out the fleet's figures, which only resolving needs."""
    return msgspec.structs.replace(offered, figures={})


def retry_ms(troubles: int, retry_after_s: float | None = None) -> int:
    """Back-off without jitter (the daemon adds it): doubles from RETRY_MIN_MS to RETRY_MAX_MS."""
    wait_ms = RETRY_MIN_MS << min(max(troubles - 1, 0), 16)
    return min(RETRY_MAX_MS, max(wait_ms, round((retry_after_s or 0.0) * 1000)))


class Turn:
    """One step being made: the state so far and the effects so far, at one instant."""

    __slots__ = ("before", "effects", "now", "state")

    def __init__(self, state: State, now: Now) -> None:
        self.before = state
        self.state = state
        self.now = now
        self.effects: list[Effect] = []

    # --- time ---

    def since(self, since: Since) -> Since:
        """Go on with a wait, or begin it again if it began in another boot."""
        return since if since.boot == self.now.boot else Since.at(self.now)

    def reference_us(self) -> int:
        """Return the time that expiry is compared with: never before a time that was verified."""
        floor = self.state.trust.time_floor_us if self.state.trust is not None else 0
        return max(self.now.wall_us, floor)

    def expired(self) -> bool:
        """Tell whether the accepted offer is too old to start anything."""
        return self.state.offer is not None and self.reference_us() >= self.state.offer.expires_at

    def calm(self) -> bool:
        """Tell whether this device does not go down by itself."""
        return self.state.downs is None or self.state.downs.count < DOWNS_ORDINARY

    def is_current(self, event: Served) -> bool:
        """Tell whether the worker speaks of the newest serving set."""
        return event.revision == self.state.revision

    # --- trust ---

    def adopt_trust(self, trust: Trust) -> None:
        """Take over what the courier verified; a late, older answer lowers nothing."""
        known = self.state.trust
        if known is not None and trust.current <= known.current:
            floor = max(known.time_floor_us, trust.time_floor_us)
            expires = known.expires_at if trust.current < known.current else trust.expires_at
            trust = msgspec.structs.replace(known, time_floor_us=floor, expires_at=expires)
        elif known is not None and trust.time_floor_us < known.time_floor_us:
            trust = msgspec.structs.replace(trust, time_floor_us=known.time_floor_us)
        self.state = replace(self.state, trust=msgspec.structs.replace(trust, changed=False))

    def refreshed(self) -> None:
        """Trust is up to date: the next refresh is due at half of what is left of its life."""
        trust = self.state.trust
        left_ms = (trust.expires_at - self.reference_us()) // (MICROSECONDS // 1000) if trust is not None else 0
        wait_ms = min(max(left_ms // 2, REFRESH_MIN_MS), REFRESH_MAX_MS)
        self.state = replace(self.state, watch=TrustWatch(Since.at(self.now), wait_ms))

    def refresh_failed(self, reason: str) -> None:
        """Refresh again after a back-off."""
        troubles = (self.state.watch.troubles if self.state.watch is not None else 0) + 1
        watch = TrustWatch(Since.at(self.now), retry_ms(troubles), running=False, troubles=troubles, reason=reason)
        self.state = replace(self.state, watch=watch)

    def resume_watch(self) -> None:
        """The courier is gone: trust is refreshed with the first tick."""
        self.state = replace(self.state, watch=None)

    def watch_trust(self, *, connected: bool) -> None:
        """Refresh when it is due, and note when a refresh does not end."""
        watch = self.state.watch
        if watch is not None:
            waited_ms = watch.since.elapsed_ms(self.now)
            if watch.running and waited_ms >= REFRESH_MS:
                self.refresh_failed(reasons.CHILD_FAILED)
                return
            early = connected and watch.reason == reasons.NETWORK and waited_ms >= RETRY_MIN_MS
            if watch.running or not (early or waited_ms >= watch.wait_ms):
                return
        troubles = watch.troubles if watch is not None else 0
        running = TrustWatch(Since.at(self.now), 0, running=True, troubles=troubles)
        self.state = replace(self.state, watch=running)
        self.effects.append(Refresh())

    # --- reports ---

    def acked(self, event: Acked) -> None:
        """Forget reports that the server has; a number that was never given is not believed."""
        if event.stream != self.state.stream or event.seq >= self.state.seq:
            return
        self.state = replace(self.state, owed=tuple(report for report in self.state.owed if report.seq > event.seq))

    def report(
        self,
        name: str,
        state: ModelState,
        *,
        job: Job | None = None,
        offered: OfferedModel | None = None,
        serial: int = 0,
        reason: str = "",
        detail: str = "",
        counts: Counts | None = None,
        trial_end: str = "",
    ) -> None:
        """Owe the server a report on a model, as the slot is now."""
        slot = self.state.models.get(name, Slot())
        offered = job.offered if job is not None else offered
        counts = counts or Counts()
        serves = next((answering(model) for model in serving(self.state) if model.name == name), None)
        report = Report(
            format=wire.FORMAT,
            device=self.state.device,
            epoch=self.state.stream,
            seq=self.state.seq,
            first=0,
            at=self.now.wall_us,
            model=name,
            state=state,
            target=offered.target if offered is not None else "",
            manifest=offered.manifest if offered is not None else "",
            running=serves.manifest if serves is not None else "",
            running_variant=serves.variant if serves is not None else "",
            incumbent=slot.incumbent.manifest if slot.incumbent is not None else "",
            rollout=offered.rollout if offered is not None else "",
            attempt=offered.attempt if offered is not None else 0,
            serial=job.serial if job is not None else serial,
            reason=reason,
            detail=detail[:REPORT_DETAIL_CHARS_MAX],
            variants=_tried(slot, job, offered),
            serving=_beside(slot, serves, offered),
            requests=counts.requests + counts.earlier_requests,
            errors=counts.errors + counts.earlier_errors,
            fallbacks=counts.fallbacks + counts.earlier_fallbacks,
            trial_end=trial_end,
            latency_ratio=counts.latency_ratio,
            mode=offered.mode if offered is not None else "replace",
            share=offered.share if offered is not None else 1.0,
            group=offered.group if offered is not None else "",
            compared=counts.compared + counts.earlier_compared,
            agreed=counts.agreed + counts.earlier_agreed,
            skipped=counts.skipped + counts.earlier_skipped,
        )
        owed = (*self.state.owed, report)[-OWED_MAX:]
        self.state = replace(self.state, owed=owed, seq=self.state.seq + 1)
        if name in self.state.models:
            self.put(name, replace(slot, told=report))

    # --- slots ---

    def put(self, name: str, slot: Slot) -> None:
        """Replace a slot."""
        self.state = replace(self.state, models={**self.state.models, name: slot})

    def resolve(self, name: str, slot: Slot, job: Job, *, report: bool = False) -> None:
        """Find out which variants fit."""
        job = replace(job, candidates=())
        self.put(name, replace(slot, phase=Resolving(job, Since.at(self.now))))
        if report:
            self.report(name, "fetching", job=job)
        contract, preprocess = contract_of(self.state, name), preprocess_of(self.state, name)
        self.effects.append(Resolve(name, job.offered, contract, preprocess))

    def fetch(self, name: str, slot: Slot, job: Job) -> None:
        """Download the variant in hand."""
        job = replace(job, offered=plain(job.offered))
        self.put(name, replace(slot, phase=Fetching(job, Since.at(self.now))))
        self.effects.append(Fetch(name, job.offered.manifest, job.offered.attempt, job.loadable.variant))

    def judge(self, name: str, slot: Slot, job: Job, *, report: bool = False) -> None:
        """Give the variant in hand to the canary."""
        self.put(name, replace(slot, phase=Judging(job, Since.at(self.now))))
        if report:
            self.report(name, "judging", job=job)
        trial = job.offered.trial
        self.effects.append(
            Judge(
                model=name,
                attempt=job.offered.attempt,
                candidate=job.loadable,
                incumbent=slot.incumbent.loadable if slot.incumbent is not None else None,
                memory_bytes_max=trial.canary_memory_bytes_max,
                seconds_max=trial.canary_s,
                latency_ratio_max=trial.canary_latency_ratio_max,
            )
        )

    def trouble(self, name: str, slot: Slot, job: Job, task: Task, event: TaskFailed) -> None:
        """The work could not be done: refuse what trying again cannot change, wait with the rest."""
        if event.reason in REFUSALS:
            self.refuse(name, slot, job, event.reason, event.detail)
            return
        # what the operator asked to wait for is no trouble: the wait is as long as it says
        job = replace(job, troubles=job.troubles + (event.reason != reasons.CONDITIONS))
        report = job.reported != event.reason
        job = replace(job, reported=event.reason)
        wait_ms = retry_ms(job.troubles, event.retry_after_s)
        phase = Waiting(job, Since.at(self.now), event.reason, event.detail[:REPORT_DETAIL_CHARS_MAX], wait_ms, task)
        self.put(name, replace(slot, phase=phase))
        if report:
            self.report(name, "waiting", job=job, reason=event.reason, detail=event.detail)

    def retry(self, name: str, slot: Slot, phase: Waiting) -> None:
        """The wait is over: the same work again, unless the offer is too old by now."""
        if self.expired() and not phase.job.again:
            self.expire(name, slot, phase.job)
            return
        match phase.then:
            case "resolve":
                self.resolve(name, slot, phase.job)
            case "fetch":
                self.fetch(name, slot, phase.job)
            case "judge":
                self.judge(name, slot, phase.job)
            case _:
                assert_never(phase.then)

    def expire(self, name: str, slot: Slot, job: Job) -> None:
        """An expired offer starts nothing: wait for the director to sign it again."""
        self.put(name, replace(slot, phase=Idle(), settled=None))
        detail = "the offer expired before it came to a trial"
        self.report(name, "waiting", job=job, reason=reasons.OFFER_EXPIRED, detail=detail)

    def refuse(self, name: str, slot: Slot, job: Job, reason: str, detail: str) -> None:
        """End a job that cannot be done here, before anything was tried; what was withdrawn is not tried again either."""
        held = slot.held
        if held is not None and reason in WITHDRAWN and held.version.manifest == job.offered.manifest:
            slot = replace(slot, held=None)
        self._ended(name, slot, job, unfit=reason == reasons.NO_VARIANT)
        self.report(name, "refused", job=job, reason=reason, detail=detail)
        self._safe_again(name, job, reason, detail)

    def fail(self, name: str, slot: Slot, job: Job, reason: str, detail: str, *, unfit: bool = False) -> None:
        """End a job of which no variant is left; `unfit`: for want of an engine."""
        self._ended(name, slot, job, unfit=unfit)
        self.report(name, "failed", job=job, reason=reason, detail=detail)
        self._safe_again(name, job, reason, detail)
        self.effects.append(Collect(kept(self.state)))

    def _safe_again(self, name: str, job: Job, reason: str, detail: str) -> None:
        """A model that once served here and has nothing left is safe, also when the way out of that came to nothing."""
        slot = self.state.models[name]
        if slot.incumbent is None and slot.contract is not None and isinstance(slot.phase, Idle):
            self.put(name, replace(slot, phase=Safe(reason, detail[:REPORT_DETAIL_CHARS_MAX])))
            self.report(name, "safe", job=job, reason=reason, detail=detail)

    def _ended(self, name: str, slot: Slot, job: Job, *, unfit: bool) -> None:
        phase: Phase = slot.phase if isinstance(slot.phase, Safe) else Idle()
        self.put(name, replace(_closed(slot, job.offered, unfit=unfit), phase=phase, settled=None))

    def reopen(self) -> None:
        """Other engines are here: what came to nothing for want of one is begun again by the standing offer."""
        for name, slot in tuple(self.state.models.items()):
            if slot.unfit:
                ends = tuple(end for end in slot.ends if end not in slot.unfit)
                self.put(name, replace(slot, ends=ends, unfit=()))

    def try_held(self) -> None:
        """Where nothing serves, give what served last to the canary again, and then a trial: both need no network."""
        offer = self.state.offer
        for name, slot in tuple(self.state.models.items()):
            held = slot.held
            if held is None or not may_try_held(slot) or held.since.elapsed_ms(self.now) < held.wait_ms:
                continue
            version = held.version
            offered = offer.models.get(name) if offer is not None and not self.expired() else None
            if offered is None or offered.mode != "replace" or offered.manifest != version.manifest:
                offered = version.offered
            offered = msgspec.structs.replace(plain(offered), mode="replace", group="")
            candidate = Candidate(loadable=version.loadable, bytes=0, why="served here last")
            serial = offer.serial if offer is not None else 0
            again = Held(version, Since.at(self.now), min(HELD_RETRY_MAX_MS, 2 * held.wait_ms))
            ends = tuple(end for end in slot.ends if end != end_of(offered))
            self.state = replace(self.state, known_bad=self._other_bad(version.loadable))
            due = replace(slot, ends=ends, held=again)
            self.judge(name, due, Job(offered, serial, candidates=(candidate,), again=True), report=True)

    def known_bad(self, loadable: Loadable) -> KnownBad | None:
        """Return what is held against a variant with this engine, in this bundle or in any."""
        key = (loadable.digest, loadable.engine, loadable.engine_version)
        for bad in self.state.known_bad:
            if (bad.digest, bad.engine, bad.engine_version) == key and bad.manifest in ("", loadable.manifest):
                return bad
        return None

    def remember(self, loadable: Loadable, reason: str, attempt: int) -> None:
        """Hold a verdict against a variant with this engine."""
        if reason not in reasons.VERDICTS:
            return
        bundle = loadable.manifest if reason in reasons.OF_THE_BUNDLE else ""
        bad = KnownBad(loadable.digest, loadable.engine, loadable.engine_version, reason, attempt, bundle)
        self.state = replace(self.state, known_bad=(*self._other_bad(loadable), bad)[-KNOWN_BAD_MAX:])

    def _other_bad(self, loadable: Loadable) -> tuple[KnownBad, ...]:
        """Return what is held against others than this variant with this engine."""
        bad = self.known_bad(loadable)
        return tuple(other for other in self.state.known_bad if other is not bad)

    def variant_failed(
        self, name: str, slot: Slot, job: Job, reason: str, detail: str, peak_memory_bytes: int = 0
    ) -> None:
        """The canary condemned the variant in hand: the next one, if there may be one."""
        loadable = job.loadable
        self.remember(loadable, reason, job.offered.attempt)
        tried = VariantTried(
            id=loadable.variant,
            digest=loadable.digest,
            outcome="failed",
            engine=f"{loadable.engine} {loadable.engine_version}",
            reason=reason,
            why=detail[:200],
            peak_memory_bytes=peak_memory_bytes,
        )
        job = replace(
            job, tried=(*job.tried, tried)[-TRIED_MAX:], candidates=job.candidates[1:], canaries=job.canaries + 1
        )
        if job.candidates and job.canaries < job.offered.trial.variant_tries:
            self.fetch(name, slot, job)
        else:
            self.fail(name, slot, job, reason, detail)

    def begin_trial(self, name: str, slot: Slot, job: Job) -> None:
        """Tell the worker to do what the candidate's mode says; counts and deadline begin when it does."""
        offered = job.offered
        trial = f"{offered.rollout or '-'}.{offered.attempt}.{self.state.revision + 1}"
        self.put(name, replace(slot, phase=Swapping(replace(job, proved=None), Since.at(self.now), trial)))

    def began(self, name: str, job: Job, counts: Counts | None = None) -> None:
        """Say that the candidate does what its mode says."""
        state: ModelState = "standby" if kind_of(job.offered) == "standby" else "trial"
        self.report(name, state, job=job, counts=counts)

    def compare(self, name: str, slot: Slot, job: Job, counts: Counts) -> None:
        """The time of a trial that never confirms is over: the incumbent goes on alone."""
        job = replace(job, candidates=job.candidates[:1])
        self.put(name, replace(slot, phase=Compared(job, counts), settled=None))
        self.report(name, "compared", job=job, counts=counts, trial_end="time")

    def confirm(self, name: str, slot: Slot, job: Job, counts: Counts, *, idle: bool, generation: int = 0) -> None:
        """The trial ended well: the candidate is what is trusted from now on."""
        order = self.state.confirmations + 1
        self.state = replace(self.state, confirmations=order)
        job = replace(job, tried=_outcome(job.tried, "serving"))
        installed = Installed(plain(job.offered), job.loadable, order, idle, job.tried, generation)
        first = slot.contract is None
        self.put(
            name,
            replace(
                slot,
                incumbent=installed,
                last_good=slot.incumbent,
                phase=Idle(),
                contract=job.loadable.interface if first else slot.contract,
                contract_preprocess=job.preprocess_id if first else slot.contract_preprocess,
                settled=end_of(job.offered),
                faults=0,
                held=None,
            ),
        )
        if not self.calm():
            self.state = replace(self.state, falls=None)
        elif slot.incumbent is not None:
            self.state = replace(self.state, falls=Falls(name, Since.at(self.now)))
        state: ModelState = "confirmed_idle" if idle else "confirmed"
        self.report(name, state, job=job, counts=counts, trial_end="idle" if idle else "requests")
        self.effects.append(Collect(kept(self.state)))

    def passed(self, name: str, slot: Slot, phase: OnTrial | Proving, passed: Passed, counts: Counts) -> None:
        """The candidate did well: it is confirmed, with all of its group once the last of them did."""
        job = phase.job
        if not job.offered.group:
            self.confirm(name, slot, job, counts, idle=passed == "idle")
            return
        began = phase.since if isinstance(phase, OnTrial) else phase.began
        self.put(name, replace(slot, phase=OnTrial(job, began, phase.trial, phase.crashes, counts, passed)))
        members = (name, *self.mates(name, job))
        phases = {member: self.state.models[member].phase for member in members}
        if all(isinstance(one, OnTrial) and one.passed for one in phases.values()):
            generation = self.state.confirmations + 1
            for member, one in phases.items():
                assert isinstance(one, OnTrial)
                idle, there = one.passed == "idle", self.state.models[member]
                self.confirm(member, there, one.job, one.counts, idle=idle, generation=generation)

    def mates(self, name: str, job: Job) -> tuple[str, ...]:
        """Return the other models that are on trial as one group with this one."""
        return tuple(
            other
            for other, slot in self.state.models.items()
            if other != name
            and job.offered.group
            and isinstance(slot.phase, Swapping | OnTrial | Proving)
            and slot.phase.job.offered.group == job.offered.group
        )

    def go_back(
        self, name: str, slot: Slot, job: Job, reason: str, detail: str, counts: Counts, *, anyones: bool = False
    ) -> None:
        """End a trial badly, with all of its group: serve the incumbents again, hold a verdict against the variant.

        `anyones`: what happened may be the doing of another version that the worker has; it is held against none.
        """
        mates = self.mates(name, job)
        over = reason not in (reasons.WITHDRAWN, reasons.SUPERSEDED)
        if not anyones:
            self.remember(job.loadable, reason, job.offered.attempt)
        unfit = reason == reasons.ENGINE_MISSING
        self._go_back(name, slot, job, reason, detail, counts, over=over, unfit=unfit)
        for mate in mates:
            other = self.state.models[mate]
            assert isinstance(other.phase, Swapping | OnTrial | Proving)
            why, words = reasons.GROUP, f"{name} of group {job.offered.group} went back: {reason}"
            wanted = self.state.offer.models.get(mate) if self.state.offer is not None else None
            if anyones:
                why, words = reason, detail
            elif not over and wanted is not None and names_incumbent(other, wanted):
                why, words = reason, detail  # the same offer takes it back too
            self._go_back(mate, other, other.phase.job, why, words, other.phase.counts, over=over, unfit=unfit)

    def _go_back(
        self, name: str, slot: Slot, job: Job, reason: str, detail: str, counts: Counts, *, over: bool, unfit: bool
    ) -> None:
        if over:
            outcome: Literal["failed", "not_tried"] = "not_tried" if reason == reasons.GROUP else "failed"
            job = replace(job, tried=_outcome(job.tried, outcome, reason))
            slot = _closed(slot, job.offered, unfit=unfit)
        else:
            job = replace(job, tried=_outcome(job.tried, "not_tried", reason))
        phase = Returning(job, Since.at(self.now), reason, detail[:REPORT_DETAIL_CHARS_MAX], 0, counts)
        self.put(name, replace(slot, phase=phase, settled=None, faults=0))
        if slot.incumbent is None:
            self.returned(name, self.state.models[name], phase)

    def leave_group(self, name: str, slot: Slot, job: Job, why: str, *, unfit: bool = False) -> None:
        """Give up before a trial: the group cannot be had whole; `unfit`: for want of an engine."""
        self.effects.append(Cancel(name))
        job = replace(job, tried=_outcome(job.tried, "not_tried", reasons.GROUP))
        self.fail(name, slot, job, reasons.GROUP, why, unfit=unfit)

    def returned(self, name: str, slot: Slot, phase: Returning) -> None:
        """The incumbent answers again, or there is none."""
        self.put(name, replace(slot, phase=Idle()))
        self._say_returned(name, phase)
        self._safe_again(name, phase.job, phase.reason, phase.detail)
        self.effects.append(Collect(kept(self.state)))

    def _say_returned(self, name: str, phase: Returning) -> None:
        withdrawn = phase.reason == reasons.WITHDRAWN
        self.report(
            name,
            "returned",
            job=phase.job,
            reason=phase.reason,
            detail=phase.detail,
            counts=phase.counts,
            trial_end="withdrawn" if withdrawn else f"returned:{phase.reason}",
        )

    def give_up(self, name: str, slot: Slot, reason: str, detail: str, *, anyones: bool = False) -> None:
        """The confirmed version does not work any more: the last known good one, or the safe state.

        In the safe state its files stay, and it is tried again from time to time (`try_held`).
        If only its file was altered on this disk, or its engine was replaced or is gone, its attempt is not over: an offer
        that names it brings it again, or another variant. `anyones`: it may be the doing of another model; it gives way all
        the same, but nothing is held against it. A trial from which it was to come back ends with it, and is reported with
        what is trusted from now on.
        """
        incumbent = slot.incumbent
        assert incumbent is not None
        if not anyones:
            self.remember(incumbent.loadable, reason, incumbent.offered.attempt)
        if not isinstance(slot.phase, Idle | Safe | Compared | Returning):
            self.effects.append(Cancel(name))
        job = Job(incumbent.offered, self.state.offer.serial if self.state.offer is not None else 0)
        ends = slot.ends
        over = reason not in (*reasons.ALTERED, reasons.ENGINE_CHANGED, reasons.ENGINE_MISSING)
        if over:
            ends = (*ends, end_of(incumbent.offered))[-ENDS_MAX:]
        detail = detail[:REPORT_DETAIL_CHARS_MAX]
        back, ended = slot.last_good, slot.phase
        phase = Idle() if back is not None else Safe(reason, detail)
        held = (
            Held(incumbent, Since.at(self.now), HELD_RETRY_MIN_MS)
            if back is None and over and reason not in WITHDRAWN
            else None
        )
        self.put(
            name,
            replace(slot, incumbent=back, last_good=None, phase=phase, ends=ends, settled=None, faults=0, held=held),
        )
        if isinstance(ended, Returning):
            self._say_returned(name, ended)
        if back is not None:
            self.report(name, "returned", job=job, reason=reason, detail=detail, trial_end=f"returned:{reason}")
        else:
            self.report(name, "safe", job=job, reason=reason, detail=detail)
        if incumbent.generation:
            self._step_back(incumbent.generation, f"{name} of its group gave way: {reason}", over=over)
        self.effects.append(Collect(kept(self.state)))

    def _step_back(self, generation: int, detail: str, *, over: bool) -> None:
        """What was confirmed with a version that gave way gives way too, where there is a version before it."""
        for name, slot in tuple(self.state.models.items()):
            incumbent = slot.incumbent
            if incumbent is None or incumbent.generation != generation or slot.last_good is None:
                continue
            ends = (*slot.ends, end_of(incumbent.offered))[-ENDS_MAX:] if over else slot.ends
            back = replace(slot, incumbent=slot.last_good, last_good=None, ends=ends, settled=None, faults=0)
            self.put(name, back)
            job = Job(incumbent.offered, self.state.offer.serial if self.state.offer is not None else 0)
            end = f"returned:{reasons.GROUP}"
            self.report(name, "returned", job=job, reason=reasons.GROUP, detail=detail, trial_end=end)


def _tried(slot: Slot, job: Job | None, offered: OfferedModel | None) -> list[VariantTried]:
    """Return what a report says of variants; of the incumbent, which one serves: the rest was told in its own trial."""
    if job is not None:
        return list(job.tried)
    if slot.incumbent is None or offered is None or slot.incumbent.manifest != offered.manifest:
        return []
    return [variant for variant in slot.incumbent.tried if variant.outcome == "serving"]


def _beside(slot: Slot, serves: Loadable | None, offered: OfferedModel | None) -> VariantTried | None:
    """Return how what serves was chosen, where a report is about another bundle."""
    incumbent = slot.incumbent
    if serves is None or incumbent is None or incumbent.loadable.manifest != serves.manifest:
        return None
    if offered is not None and offered.manifest == serves.manifest:
        return None
    return next((variant for variant in incumbent.tried if variant.outcome == "serving"), None)


def _closed(slot: Slot, offered: OfferedModel, *, unfit: bool) -> Slot:
    """Note that an attempt is over; `unfit`: until other engines are here."""
    end = end_of(offered)
    ends = (*slot.ends, end)[-ENDS_MAX:]
    return replace(slot, ends=ends, unfit=(*slot.unfit, end)[-ENDS_MAX:] if unfit else slot.unfit)


def _outcome(
    tried: tuple[VariantTried, ...], outcome: Literal["serving", "failed", "not_tried"], reason: str = ""
) -> tuple[VariantTried, ...]:
    """Say of the last variant tried how it ended."""
    if not tried:
        return tried
    return (*tried[:-1], msgspec.structs.replace(tried[-1], outcome=outcome, reason=reason))
