"""A worker without engines: takes the real commands, gives the real events, behaves by the table.

Like the real one it is told what it should serve and works out what to load and free; it counts per arm since the trial
began, leaves the first runs after a load out of the latencies, answers with the incumbent what the candidate fails, and
forgets everything when it dies.
"""

from __future__ import annotations

import random
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from wherry_agent.children import ArmStats, GoldenDone, Loadable, Ran, RunGolden, Serve, ServeModel, Serving, Stats
from wherry_agent.turn import answering
from wherry_shared import reasons
from wherry_shared.sketch import Sketch
from wherry_simulators import models
from wherry_simulators.models import Behaviours

WARM_RUNS = 10
"""Runs after a load whose latency is no evidence (contracts.md §4)."""


@dataclass(slots=True)
class _Arm:
    """Counts of one loaded variant."""

    loadable: Loadable
    trial: str = ""
    requests: int = 0
    errors: int = 0
    fallbacks: int = 0
    compared: int = 0
    agreed: int = 0
    runs: int = 0
    latency_us: dict[str, Sketch] = field(default_factory=dict)

    def stats(self, arm: str) -> ArmStats:
        return ArmStats(
            model=self.loadable.model,
            manifest=self.loadable.manifest,
            variant=self.loadable.variant,
            digest=self.loadable.digest,
            arm=arm,
            trial=self.trial,
            requests=self.requests,
            errors=self.errors,
            fallbacks=self.fallbacks,
            compared=self.compared,
            agreed=self.agreed,
            latency_us={bucket: sketch.to_wire() for bucket, sketch in self.latency_us.items()},
            last_error="simulated engine fault" if self.errors else "",
        )

    def count(self, latencies: list[tuple[str, float, int]]) -> None:
        for bucket, value, times in latencies:
            cold = min(times, max(0, WARM_RUNS - self.runs))
            self.runs += times
            if times > cold:
                self.latency_us.setdefault(bucket, Sketch()).add(value, times - cold)


@dataclass(slots=True)
class Files:
    """What is on one device's disk: the files of variants, by digest, and an engine. Survives everything."""

    here: set[str] = field(default_factory=set)
    """Those that are on disk."""
    altered: set[str] = field(default_factory=set)
    """Those whose bytes are not what was verified."""
    engine: str = models.ENGINE_VERSION
    """A worker has in memory what was there when it first loaded something."""

    def put(self, digest: str) -> None:
        """A courier brought a file, verified."""
        self.here.add(digest)
        self.altered.discard(digest)

    def keep(self, digests: AbstractSet[str]) -> None:
        """Delete all others."""
        self.here &= digests
        self.altered &= digests

    def trouble(self, digest: str) -> str:
        """Return the reason for which a file cannot be loaded; empty if it can."""
        if digest not in self.here:
            return reasons.DISK
        return reasons.DIGEST_MISMATCH if digest in self.altered else ""


@dataclass(slots=True)
class Ledger:
    """What really happened on a device, whatever the machine came to know of it."""

    requests: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests that candidates got, by model and trial; runs of a shadow are among them."""
    answered_by: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests that callers had answered by a bundle, by model and manifest."""
    errors: dict[tuple[str, str], int] = field(default_factory=dict)
    golden: set[tuple[str, str]] = field(default_factory=set)
    """(model, trial) in which the golden vectors passed in place."""
    answered: int = 0
    """Requests that callers got an answer to."""
    failed: int = 0
    """Requests that callers got an error for: the candidate failed and no incumbent was loaded."""


class MachineDownError(Exception):
    """A variant took the whole machine down, and everything on it."""


class Worker:
    """Serves by the table. `None` from a method that answers means: it died doing that."""

    def __init__(
        self, device: str, behaviours: Behaviours, source: random.Random, ledger: Ledger, files: Files
    ) -> None:
        """`files`: what is on disk; what is in memory outlives its file."""
        self._device = device
        self._files = files
        self._behaviours = behaviours
        self._random = source
        self._serving: dict[str, ServeModel] = {}
        self._arms: dict[str, _Arm] = {}
        """By digest of the loaded variant."""
        self._ledger = ledger
        self.engine_version = files.engine
        self.told = False
        """Whether it was told what to serve yet."""
        self.ran: tuple[Ran, ...] = ()
        """What it was running when it died."""
        self.well = True
        """Whether everything that it was told last could be loaded."""

    @property
    def serving(self) -> dict[str, Loadable]:
        """What answers requests now, by model: most of them, in a split."""
        return {name: answering(one) for name, one in self._serving.items()}

    @property
    def commands(self) -> dict[str, ServeModel]:
        """What it does now, by model."""
        return dict(self._serving)

    def trial(self, model: str) -> str:
        """Return the trial that the model's active variant is in; empty if it is trusted."""
        return self._serving[model].trial if model in self._serving else ""

    def serve(self, command: Serve) -> list[Serving]:
        """Bring the serving set to what `command` says, groups all or none.

        A variant that does not load leaves what served before.
        """
        self.told = True
        answers: list[Serving] = []
        after: dict[str, ServeModel] = {}
        troubles = {wanted.name: self._load(wanted) for wanted in command.models}
        broken = {wanted.group for wanted in command.models if wanted.group and troubles[wanted.name]}
        for wanted in command.models:
            reason = troubles[wanted.name] or (reasons.GROUP if wanted.group in broken else "")
            if reason:
                before = self._serving.get(wanted.name)
                if before is not None:
                    after[wanted.name] = before
            else:
                after[wanted.name] = wanted
            answers.append(
                Serving(
                    revision=command.revision,
                    model=wanted.name,
                    digest=wanted.active.digest,
                    ok=not reason,
                    reason=reason,
                    detail="by the table" if reason else "",
                    incumbent_loaded=self.both_loaded(wanted),
                    load_ms=float(self._behaviours.variant(self._device, wanted.active).load_ms),
                )
            )
        self.well = all(answer.ok for answer in answers)
        self._serving = after
        keep = {one.active.digest for one in after.values()}
        keep |= {one.incumbent.digest for one in after.values() if one.incumbent is not None}
        self._arms = {digest: arm for digest, arm in self._arms.items() if digest in keep}
        return answers

    def both_loaded(self, wanted: ServeModel) -> bool:
        """Tell whether the incumbent is in memory beside the candidate."""
        return wanted.incumbent is not None and wanted.incumbent.digest in self._arms

    def _load(self, wanted: ServeModel) -> str:
        """Load what `wanted` needs; return the reason for which the active variant cannot be loaded."""
        arm = self._arms.get(wanted.active.digest)
        if arm is None:
            self.engine_version = self.engine_version or self._files.engine
            reason = reasons.ENGINE_MISSING if self.engine_version == models.NO_ENGINE else ""
            reason = reason or self._files.trouble(wanted.active.digest)
            reason = reason or self._behaviours.variant(self._device, wanted.active).load
            if reason:
                return reason
            arm = self._arms[wanted.active.digest] = _Arm(wanted.active)
        if arm.trial != wanted.trial and wanted.trial:
            arm = self._arms[wanted.active.digest] = _Arm(wanted.active, runs=arm.runs)
        arm.trial = wanted.trial
        if self._behaviours.variant(self._device, wanted.active).alone and wanted.incumbent is not None:
            self._arms.pop(wanted.incumbent.digest, None)
        elif wanted.incumbent is not None and wanted.incumbent.digest not in self._arms:
            self._arms[wanted.incumbent.digest] = _Arm(wanted.incumbent)
        return ""

    def golden(self, command: RunGolden) -> GoldenDone | None:
        """Run the golden vectors of a loaded variant; None if that variant is not loaded (nothing answers)."""
        arm = self._arms.get(command.digest)
        if arm is None:
            return None
        passed = self._behaviours.variant(self._device, arm.loadable).golden
        if passed:
            self._ledger.golden.add((command.model, command.trial))
        return GoldenDone(
            model=command.model,
            digest=command.digest,
            trial=command.trial,
            passed=passed,
            detail="" if passed else "simulated golden miss",
        )

    def pour(self, requests: int) -> Stats | None:
        """Let callers make `requests` requests to every served model; None if a variant took the worker down.

        Raises:
            MachineDownError: a variant took the whole machine down.
        """
        arms: list[ArmStats] = []
        for serving in self._serving.values():
            active = self._arms[serving.active.digest]
            shadow = bool(serving.trial) and serving.mode == "shadow"
            behaviour = self._behaviours.variant(self._device, serving.active)
            drawn = models.traffic(self._random, behaviour, self._share(serving, requests))
            active.requests += drawn.requests
            active.errors += drawn.errors
            active.count(drawn.latencies)
            ledger = self._ledger
            if serving.trial:
                key = (serving.name, serving.trial)
                ledger.requests[key] = ledger.requests.get(key, 0) + drawn.requests
                ledger.errors[key] = ledger.errors.get(key, 0) + drawn.errors
            if shadow:
                compared = drawn.requests - drawn.errors
                active.compared += compared
                active.agreed += models.binomial(self._random, compared, behaviour.agreement)
            else:
                self._answered(serving.active, drawn.requests)
            incumbent = None if serving.incumbent is None else self._arms.get(serving.incumbent.digest)
            if incumbent is None:
                ledger.failed += drawn.errors
                ledger.answered += drawn.requests - drawn.errors
            else:
                mine = requests if shadow else requests - drawn.requests + drawn.errors
                if drawn.crashed:
                    mine = 0  # the worker is gone before it got to them
                again = models.traffic(self._random, self._behaviours.variant(self._device, incumbent.loadable), mine)
                incumbent.count(again.latencies)
                incumbent.requests += mine
                active.fallbacks += 0 if shadow else drawn.errors
                ledger.answered += mine if shadow else drawn.requests - drawn.errors + mine
                self._answered(incumbent.loadable, mine)
            if drawn.down:
                raise MachineDownError
            if drawn.crashed:
                self.ran = (Ran(serving.name, serving.active.manifest, serving.active.variant),)
                return None
            arms.append(active.stats("shadow" if shadow else "candidate" if serving.trial else "incumbent"))
            if incumbent is not None:
                arms.append(incumbent.stats("incumbent"))
        return Stats(arms=arms)

    def _share(self, serving: ServeModel, requests: int) -> int:
        """Return how many of the requests the active variant gets."""
        if not serving.trial or serving.mode == "replace" or serving.incumbent is None:
            return requests
        return models.binomial(self._random, requests, serving.share)

    def _answered(self, loadable: Loadable, requests: int) -> None:
        if requests:
            key = (loadable.model, loadable.manifest)
            self._ledger.answered_by[key] = self._ledger.answered_by.get(key, 0) + requests
