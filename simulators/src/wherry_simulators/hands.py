"""What runs effects on a simulated device: couriers, canaries and a worker that behave by the table.

An effect becomes work (`Work`) that is done after some time; doing it changes what is on the disk or in the worker and
gives the events that a daemon would hand to the machine. Nothing here decides. Time belongs to the caller: the world
puts work on its agenda, the swarm on its event loop; both call `do` when it is due.

What a crash takes is taken here too: `crash` kills the worker and every child, the store stays.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from wherry_agent import state as s
from wherry_agent.children import ArmStats, Judged, Loadable, Ran, Serve, Trust
from wherry_agent.children import RunGolden as RunGoldenCommand
from wherry_shared import reasons
from wherry_shared.clock import MICROSECONDS, Now
from wherry_shared.wire import VariantTried
from wherry_simulators import models
from wherry_simulators.models import Behaviour, Behaviours
from wherry_simulators.worker import Files, Ledger, MachineDownError, Worker

WORKER_START_MS = 600
TRUST_LIFE_S = 86_400
REFRESH_MS = 400
GOLDEN_MS = 250
SERVE_MS = 150
HAND_OVER_MS = 1_500
MEND_MS = 2_000


@dataclass(frozen=True, slots=True)
class Work:
    """Something that takes `wait_ms` and then happens, unless who does it is gone by then."""

    wait_ms: int
    act: Callable[[], tuple[s.Event, ...]]
    model: str = ""
    """The model whose child does it; empty for the worker and for refreshing trust."""
    child: int = 0
    """Which child of that model; a later one or `Cancel` makes it unwanted."""
    worker: int = 0
    """Which worker process does it; 0: none."""
    loads: bool = False
    """Whether the worker loads or runs a model in it, and may hang there."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What may go wrong around a child, drawn by the world; the swarm has none."""

    reason: str
    detail: str = "simulated trouble"
    retry_after_s: float | None = 20.0


@dataclass(frozen=True, slots=True)
class Poured:
    """What a stretch of requests led to."""

    events: tuple[s.Event, ...] = ()
    """What the daemon says: counts of candidates, or that the worker died."""
    start: Work | None = None
    """The start of the next worker, if this one died."""
    arms: tuple[ArmStats, ...] = ()


class Hands:
    """One device's children, worker and store."""

    def __init__(self, device: str, behaviours: Behaviours, source: random.Random) -> None:
        self.device = device
        self._behaviours = behaviours
        self._random = source
        self.files = Files()
        self._more: list[Work] = []
        self.passed: set[str] = set()
        """Digests that a canary passed on this device, ever: the truth that checkers compare with."""
        self.proved: set[tuple[str, str]] = set()
        """(digest, engine version) that a canary passed: the truth that checkers compare with."""
        self.worker: Worker | None = None
        self._told: Serve | None = None
        self.process = 0
        """Number of the worker process."""
        self.ledger = Ledger()
        """What really happened in trials: the truth that checkers compare with."""
        self._targets: dict[str, str] = {}
        """Manifest → target, as the config on disk has it."""
        self._children: dict[str, int] = {}
        self._child = 0
        self._free_ms = 0
        """When the worker will have done what it was told."""
        self._trust = 0
        self._hung = -1
        """The worker process that hangs."""

    # --- life -------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Lose everything that is not on disk."""
        self.worker = None
        self.process += 1
        self._children.clear()
        self._free_ms = 0

    def start_worker(self) -> Work:
        """Start a worker process; its `WorkerReady` follows."""
        self.process += 1
        self.worker = None
        self._free_ms = 0

        def act() -> tuple[s.Event, ...]:
            self.worker = self._new_worker()
            return (s.WorkerReady(),)

        return Work(WORKER_START_MS, act, worker=self.process)

    def _new_worker(self) -> Worker:
        return Worker(self.device, self._behaviours, self._random, self.ledger, self.files)

    def kill_worker(self, detail: str, ran: tuple[Ran, ...] = ()) -> tuple[s.Event, Work]:
        """End the worker, of what it ran or from outside; return the event that says so, and the start of the next one."""
        return s.WorkerDied(detail, ran=ran), self.start_worker()

    def hang(self) -> None:
        """Let the worker do nothing any more until it is ended."""
        self._hung = self.process

    def wanted(self, work: Work) -> bool:
        """Tell whether the one who does this work still lives and was not told to stop."""
        if work.worker:
            return work.worker == self.process != self._hung
        return not work.model or self._children.get(work.model) == work.child

    @property
    def wants(self) -> set[str]:
        """Digests that the worker is to have loaded once it did all that it was told."""
        wanted = self._told.models if self._told is not None else ()
        return {one.digest for model in wanted for one in (model.active, model.incumbent) if one is not None}

    def has(self, manifest: str, variant: str) -> bool:
        """Tell whether the files of a variant are on disk."""
        return models.digest_of(f"{manifest}/{variant}") in self.files.here

    def more(self) -> list[Work]:
        """Return the work that what was just done leads to."""
        found, self._more = self._more, []
        return found

    def busy(self, now: Now) -> bool:
        """Tell whether the worker is dead, starting, hung, or still has commands to follow."""
        return self.worker is None or self._hung == self.process or self._free_ms > now.monotonic_ms

    # --- effects ----------------------------------------------------------------------------------

    def take(self, effect: s.Effect, now: Now, trouble: Trouble | None = None) -> list[Work]:
        """Begin an effect; return the work that it leads to. `SendReports` is the caller's: the link is not here."""
        match effect:
            case s.Resolve(model, offered):
                return [self._resolve(effect, trouble)] if offered.manifest else self._stop(model)
            case s.Fetch():
                return [self._fetch(effect, trouble)]
            case s.Judge():
                return [self._judge(effect)]
            case s.Rejudge():
                return [self._rejudge(effect)]
            case s.HandOver():
                return [Work(self._about(HAND_OVER_MS), self._hand_over)]
            case s.Cancel(model):
                return self._stop(model)
            case s.Serve(revision, wanted):
                command = self._told = Serve(revision=revision, models=list(wanted))
                return self._tell(now, SERVE_MS, lambda worker: self._serve(worker, command), loads=bool(wanted))
            case s.RunGolden(model, digest, trial):
                golden = RunGoldenCommand(model=model, digest=digest, trial=trial)
                return self._tell(now, GOLDEN_MS, lambda worker: _golden(worker, golden), loads=True)
            case s.RestartWorker(why):
                start = self.start_worker()
                return [Work(1, lambda: (s.WorkerDied(why, ordered=True),)), start]
            case s.Refresh():
                return [self._refresh(now, trouble)]
            case s.Collect(keep):
                self.files.keep({loadable.digest for loadable in keep})
                return []
            case s.Mend():
                return [self._mend(effect, trouble)]
            case s.SendReports():
                return []

    def _stop(self, model: str) -> list[Work]:
        self._children.pop(model, None)
        return []

    def _start(self, model: str) -> int:
        self._child += 1
        self._children[model] = self._child
        return self._child

    def _resolve(self, effect: s.Resolve, trouble: Trouble | None) -> Work:
        model, offered = effect.model, effect.offered
        self._targets[offered.manifest] = offered.target
        behaviour = self._behaviours.on(self.device, offered.manifest, offered.target)

        def act() -> tuple[s.Event, ...]:
            failed = trouble or _own(behaviour.resolve, behaviour)
            if failed is not None:
                return (_failed(model, offered.manifest, offered.attempt, "resolve", failed),)
            found = models.candidates(behaviour, model, offered.target, offered.manifest, self.files.engine)
            if not found or self.files.engine == models.NO_ENGINE:
                none = Trouble(reasons.NO_VARIANT, "no engine that it needs", None)
                return (_failed(model, offered.manifest, offered.attempt, "resolve", none),)
            over = VariantTried(
                id="huge", digest=models.digest_of("huge"), outcome="misfit", why="needs 64 GiB of memory"
            )
            return (
                s.Resolved(
                    model=model,
                    manifest=offered.manifest,
                    attempt=offered.attempt,
                    candidates=tuple(found),
                    passed_over=(over,),
                ),
            )

        return Work(self._about(behaviour.resolve_ms), act, model=model, child=self._start(model))

    def _fetch(self, effect: s.Fetch, trouble: Trouble | None) -> Work:
        model, manifest = effect.model, effect.manifest
        behaviour = self._behaviours.on(self.device, manifest, self._targets.get(manifest, ""))

        def act() -> tuple[s.Event, ...]:
            failed = trouble or _own(behaviour.fetch, behaviour)
            if failed is not None:
                return (_failed(model, manifest, effect.attempt, "fetch", failed),)
            self.files.put(models.digest_of(f"{manifest}/{effect.variant}"))
            return (s.Fetched(model=model, manifest=manifest, attempt=effect.attempt, variant=effect.variant),)

        return Work(self._about(behaviour.fetch_ms), act, model=model, child=self._start(model))

    def _mend(self, effect: s.Mend, trouble: Trouble | None) -> Work:
        model, manifest, variant = effect.model, effect.manifest, effect.variant

        def act() -> tuple[s.Event, ...]:
            if trouble is not None:
                return (s.Mended(model, manifest, variant, trouble.reason, trouble.detail),)
            self.files.put(models.digest_of(f"{manifest}/{variant}"))
            return (s.Mended(model, manifest, variant),)

        key = f"mend {manifest}"
        return Work(self._about(MEND_MS), act, model=key, child=self._start(key))

    def _serve(self, worker: Worker, command: Serve) -> tuple[s.Event, ...]:
        events = _served(worker, command)
        for one in worker.serving.values():
            dies_ms = self._behaviours.variant(self.device, one).dies_ms
            if dies_ms:
                self._more.append(Work(dies_ms, self._die, worker=self.process))
        for model in command.models:
            down_ms = self._behaviours.variant(self.device, model.active).down_ms
            if down_ms and not model.trial:
                self._more.append(Work(down_ms, self._go_down, worker=self.process))
        return events

    def _go_down(self) -> tuple[s.Event, ...]:
        raise MachineDownError

    def _die(self) -> tuple[s.Event, ...]:
        died, start = self.kill_worker("simulated death after loading")
        self._more.append(start)
        return (died,)

    def _judge(self, effect: s.Judge) -> Work:
        loadable = effect.candidate
        behaviour = self._behaviours.variant(self.device, loadable)
        ratio = 0.0
        if effect.incumbent is not None:
            before = self._behaviours.variant(self.device, effect.incumbent)
            ratio = behaviour.latency_us / before.latency_us

        def act() -> tuple[s.Event, ...]:
            if behaviour.canary_down:
                raise MachineDownError
            if loadable.digest not in self.files.here:
                gone = Trouble(reasons.DISK, "the candidate's file is not there", None)
                return (_failed(loadable.model, loadable.manifest, effect.attempt, "judge", gone),)
            reason = self._verdict(loadable)
            if not reason and ratio > effect.latency_ratio_max:
                reason = reasons.HEALTH_LATENCY
            if not reason and 0 < effect.memory_bytes_max < behaviour.peak_memory_bytes:
                reason = reasons.OVER_MEMORY
            if not reason:
                self.passed.add(loadable.digest)
                self.proved.add((loadable.digest, self.files.engine))
            result = Judged(
                passed=not reason,
                reason=reason,
                detail="simulated canary" if reason else "",
                vectors=8,
                peak_memory_bytes=behaviour.peak_memory_bytes,
                load_ms=float(behaviour.load_ms),
                latency_p50_us=behaviour.latency_us,
                latency_p99_us=max(behaviour.latency_us, behaviour.tail_us) * 1.5,
                latency_ratio=ratio,
                incumbent_p50_us=behaviour.latency_us / ratio if ratio else 0.0,
                incumbent_p99_us=behaviour.latency_us / ratio * 1.5 if ratio else 0.0,
            )
            return (s.CanaryDone(loadable.model, loadable.manifest, effect.attempt, loadable.digest, result),)

        child = self._start(loadable.model)
        return Work(self._about(behaviour.canary_ms), act, model=loadable.model, child=child)

    def _verdict(self, loadable: Loadable) -> str:
        behaviour = self._behaviours.variant(self.device, loadable)
        if self.files.engine == models.NO_ENGINE:
            return reasons.ENGINE_MISSING
        newer = self.files.engine == models.NEWER_ENGINE_VERSION
        trouble = self.files.trouble(loadable.digest)
        return trouble or behaviour.canary or (behaviour.canary_newer if newer else "")

    def _rejudge(self, effect: s.Rejudge) -> Work:
        loadable = effect.candidate
        behaviour = self._behaviours.variant(self.device, loadable)

        def act() -> tuple[s.Event, ...]:
            if behaviour.canary_newer_down and self.files.engine == models.NEWER_ENGINE_VERSION:
                raise MachineDownError
            reason = self._verdict(loadable)
            if not reason:
                self.proved.add((loadable.digest, self.files.engine))
            result = Judged(passed=not reason, reason=reason, detail="simulated canary" if reason else "")
            return (s.Rejudged(effect.model, loadable.digest, loadable.engine_version, result),)

        key = f"again {effect.model}"
        return Work(self._about(behaviour.canary_ms), act, model=key, child=self._start(key))

    def _hand_over(self) -> tuple[s.Event, ...]:
        """Another worker process serves what this one was told last, and this one is gone."""
        if self.worker is None or self._told is None:
            return (s.HandedOver("there is no worker to take over from"),)
        self.process += 1
        self._free_ms = 0
        self.worker = self._new_worker()
        return (*_served(self.worker, self._told), s.HandedOver())

    def _refresh(self, now: Now, trouble: Trouble | None) -> Work:
        def act() -> tuple[s.Event, ...]:
            if trouble is not None:
                return (s.RefreshFailed(trouble.reason, trouble.detail),)
            return (s.Refreshed(self.trust(now)),)

        return Work(self._about(REFRESH_MS), act)

    def trust(self, now: Now) -> Trust:
        """Return what a courier says about trust after a refresh now."""
        self._trust += 1
        return Trust(
            current=self._trust,
            floors={"timestamp": self._trust},
            time_floor_us=now.wall_us,
            expires_at=now.wall_us + TRUST_LIFE_S * MICROSECONDS,
            changed=True,
        )

    def _tell(
        self, now: Now, wait_ms: int, command: Callable[[Worker], tuple[s.Event, ...]], *, loads: bool
    ) -> list[Work]:
        """Put a command behind those that the worker still has to do; a worker that does not live yet gets nothing."""
        if self.worker is None:
            return []
        self._free_ms = max(self._free_ms, now.monotonic_ms) + wait_ms

        def act() -> tuple[s.Event, ...]:
            return () if self.worker is None else command(self.worker)

        return [Work(self._free_ms - now.monotonic_ms, act, worker=self.process, loads=loads)]

    # --- traffic ----------------------------------------------------------------------------------

    def pour(self, requests: int) -> Poured:
        """Let callers make requests to every served model.

        Raises:
            MachineDownError: a variant took the whole machine down.
        """
        if self.worker is None or self._hung == self.process:
            return Poured()
        stats = self.worker.pour(requests)
        if stats is None:
            died, start = self.kill_worker("simulated crash under traffic", self.worker.ran)
            return Poured((died,), start)
        baselines = {arm.model: arm for arm in stats.arms if arm.arm == "incumbent"}
        measured = tuple(
            s.Measured(model=arm.model, trial=arm.trial, candidate=arm, baseline=baselines.get(arm.model))
            for arm in stats.arms
            if arm.arm in ("candidate", "shadow")
        )
        return Poured(measured, None, tuple(stats.arms))

    def _about(self, milliseconds: int) -> int:
        """Return a time around `milliseconds`: no two devices are equally fast."""
        return max(1, int(milliseconds * (0.5 + self._random.random())))


def _own(reason: str, behaviour: Behaviour) -> Trouble | None:
    return Trouble(reason, "by the table", behaviour.retry_after_s) if reason else None


def _failed(model: str, manifest: str, attempt: int, task: str, trouble: Trouble) -> s.TaskFailed:
    return s.TaskFailed(
        model=model,
        manifest=manifest,
        attempt=attempt,
        task=task,  # type: ignore[arg-type]
        reason=trouble.reason,
        detail=trouble.detail,
        retry_after_s=trouble.retry_after_s,
    )


def _served(worker: Worker, command: Serve) -> tuple[s.Event, ...]:
    return tuple(
        s.Served(
            model=answer.model,
            digest=answer.digest,
            revision=answer.revision,
            ok=answer.ok,
            reason=answer.reason,
            detail=answer.detail,
            incumbent_loaded=answer.incumbent_loaded,
            engine_version=worker.engine_version,
        )
        for answer in worker.serve(command)
    )


def _golden(worker: Worker, command: RunGoldenCommand) -> tuple[s.Event, ...]:
    done = worker.golden(command)
    if done is None:
        return ()
    return (s.GoldenChecked(done.model, done.digest, done.trial, done.passed, done.detail),)
