"""A search under a gate: candidates in rounds over a process pool, then figures of those that passed, then one confirmation.

`candidates.propose` says what to try, `attempt.run` tries it in a child, `gate.hold` judges it; this module only keeps
time. Whatever fails is kept with its reason, and the others go on. Latency is measured after the pool is idle, interleaved
in one process, by CPU time; the variant that is chosen is confirmed on samples that it was not chosen by. Where they
contradict, the next of a short list that was fixed before is confirmed, and each pays its part of the risk (`gate`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import msgspec

from wherry_optimizer import attempt, candidates, gate, making, measure, metrics, passes
from wherry_optimizer.attempt import Answer, Problem, Task
from wherry_optimizer.bundling import Bundled
from wherry_optimizer.candidates import SOURCE, Candidate, Fared, Prefer, Row, Target
from wherry_optimizer.labelled import Parts
from wherry_shared import golden
from wherry_shared.bundle import Figures
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError, WherryError

MEASURED_MAX = 10
"""So many of the variants that passed are measured, the smallest downloads first."""
ROUNDS = 25
ROUND_SECONDS = 12.0
WORKERS = 2
SECONDS_MAX = 300.0
MADE_HERE = "measured here"
NOT_MEASURED = "nobody measured latency on that hardware"

Progress = Callable[[str], None]
Run = Callable[[Task], Answer]


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to search, and for what."""

    budget: gate.Budget
    prefer: Prefer = "balanced"
    seconds_max: float = SECONDS_MAX
    """Candidates that are not done by then are given up; measuring and confirming come after it."""
    workers: int = WORKERS
    prune: bool = True
    memory_bytes_max: int = making.MEMORY_BYTES_MAX
    candidate_seconds_max: float = attempt.SECONDS_MAX
    reported: Mapping[str, Figures] = field(default_factory=dict)
    """Digest of a file → figures that devices of the target's class reported."""
    measured_here: bool = True
    """Whether this machine is of the target's class, so that latency here says something."""
    weigh: bool = True
    """Measure latency and memory; without, only what was reported counts, and bytes."""


@dataclass(slots=True)
class Tried:
    """A candidate and all that became of it."""

    candidate: Candidate
    answer: Answer
    verdict: gate.Verdict
    drop: gate.Drop | None = None
    latency_ratio: float = nan
    latency_us: float = nan
    peak_bytes: float = nan
    load_ms: float = nan
    pareto: bool = False

    @property
    def id(self) -> str:
        """Of the candidate."""
        return self.candidate.id


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What the test split said about a variant of the short list."""

    id: str
    drop: gate.Drop
    """Its interval has the confidence that this confirmation has to have."""
    error: float
    verdict: gate.Verdict
    source: gate.Drop
    """Of the source against itself."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search for one target."""

    target: Target
    tried: list[Tried]
    chosen: str
    """Id; the source where no candidate passed; the last of the short list where the test split contradicts all of it."""
    reason: str
    confirmations: tuple[Confirmation, ...]
    """In the order in which they were made; only the last may have passed."""
    best: Mapping[Prefer, str]
    """Preference → what is first by it. Only `chosen` is confirmed."""
    seconds: float
    cut_short: bool
    """The time was up before the proposals were."""

    @property
    def confirmation(self) -> Confirmation | None:
        """That of the chosen variant."""
        return self.confirmations[-1] if self.confirmations else None

    def find(self, key: str) -> Tried:
        """Return a candidate that was tried."""
        return next(item for item in self.tried if item.id == key)

    @property
    def refused(self) -> list[Tried]:
        """What was kept out."""
        return [item for item in self.tried if not item.verdict.passed]


@dataclass(frozen=True, slots=True)
class Result:
    """What a search over all targets found."""

    problem: Problem
    parts: Parts
    found: list[Found]
    settings: Settings
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    """Target → the chosen file."""
    bundled: Bundled | None = None
    """The bundle of the source and of what was chosen, where one was asked for."""

    def chosen(self, target: str) -> Tried:
        """Return what was chosen for a target."""
        found = next(item for item in self.found if item.target.name == target)
        return found.find(found.chosen)


def search(
    problem: Problem,
    target: Target,
    settings: Settings,
    folder: Path,
    say: Progress | None = None,
    run: Run = attempt.run,
) -> Found:
    """Search for one target.

    Args:
        problem: model and data.
        target: what to choose for.
        settings: limits and preferences.
        folder: the cache; a search that was broken off goes on from what it holds.
        say: told each step in a sentence.
        run: what does a task; in place of `attempt.run` for a caller that wants no children.

    Raises:
        RefusedError: `source_failed` where the source itself cannot be run on the data.
    """
    say = say or (lambda _: None)
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    attempt.sweep(folder)
    path = attempt.write_problem(problem, folder)
    metric = metrics.make(problem.metric)

    def task(candidate: Candidate, part: str = "selection") -> Task:
        return Task(
            problem=str(path),
            cache=str(folder),
            steps=list(candidate.steps),
            options=dict(candidate.options),
            part=part,
            memory_bytes_max=settings.memory_bytes_max,
            seconds_max=settings.candidate_seconds_max,
        )

    source = Candidate(SOURCE, ())
    own = run(task(source))
    if own.code:
        raise RefusedError(
            "source_failed",
            f"the model itself fails on the data: {own.why} [{own.code}]",
            consequence="there is nothing to compare with, so nothing was tried",
            next_step="run the model on one sample by hand; look at the metric and at the labels",
        )
    tried = [
        Tried(source, own, gate.Verdict(True, "the source"), gate.compare(metric.value, own.evidence, own.evidence))
    ]
    if not isfinite(own.error):
        raise RefusedError(
            "model_not_finite",
            f"the model itself answers NaN or Inf on some of {len(own.evidence)} samples",
            consequence="no variant can be compared with that, so nothing was tried",
            next_step="run the model on each sample by hand; train or export it again, or take those samples out",
        )
    value = metric.value(own.evidence)
    if not isfinite(value):
        raise RefusedError(
            "metric_undefined",
            f"{problem.metric.name} of the model itself is no number on {len(own.evidence)} samples",
            consequence="there is nothing to compare with, so nothing was tried",
            next_step="give samples of every class, or another metric",
        )
    say(f"float: {problem.metric.name} {value:.4f} on {len(own.evidence)} samples")
    fared: dict[str, Fared] = {}
    others = [
        info.name for info in passes.catalogue() if info not in passes.CATALOGUE and problem.format in info.formats
    ]
    cut_short = False
    while True:
        proposed = candidates.propose(fared, problem.format, target, prune=settings.prune, others=others)
        if not proposed:
            break
        left = settings.seconds_max - (time.monotonic() - began)
        if left <= 0:
            cut_short = True
            break
        for candidate, answer in _pool(proposed, task, settings.workers, left, run):
            if answer is None:
                cut_short = True
                continue
            item = _judge(candidate, answer, tried[0].answer, metric, problem, settings.budget)
            tried.append(item)
            fared[candidate.id] = Fared(item.verdict.passed, item.answer.code, item.verdict.by, item.answer.error)
            again = ", from the cache" if answer.cached else f", {answer.seconds:.1f} s"
            say(f"{item.id}: {'passed' if item.verdict.passed else 'refused'}: {item.verdict.why}{again}")
        if cut_short:
            break
    passed = [item for item in tried if item.verdict.passed]
    _weigh(passed, problem, settings, say)
    rows = {item.id: _row(item, settings.budget, len(problem.test)) for item in passed}
    best = set(candidates.pareto(list(rows.values())))
    for item in passed:
        item.pareto = item.id in best
    ranked = candidates.rank(list(rows.values()), rows[SOURCE], settings.prefer)
    preferred: dict[Prefer, str] = {
        prefer: candidates.rank([rows[key] for key in best], rows[SOURCE], prefer)[0].id
        for prefer in candidates.PREFERENCES
    }
    listed = candidates.shortlist([row for row in ranked if row.id in best], ranked, len(gate.CONFIRMATION_RISKS))
    chosen = listed[0].id
    confirmations: list[Confirmation] = []
    if chosen == SOURCE:
        reason = "no candidate passed that is smaller or faster" if len(passed) > 1 else "no candidate passed the gate"
    else:
        for number, row in enumerate(listed):
            chosen = row.id
            candidate = next(item.candidate for item in tried if item.id == chosen)
            confirmations.append(confirm(problem, candidate, task, metric, settings.budget, run, number))
            say(f"{chosen}, on {len(problem.test)} test samples: {confirmations[-1].verdict.why}")
            if confirmations[-1].verdict.passed:
                break
        where = MADE_HERE if settings.measured_here and settings.weigh else NOT_MEASURED
        reason = candidates.reason(rows[chosen], rows[SOURCE], settings.prefer, len(passed), measured=where)
        if chosen != listed[0].id:
            reason += f"; {', '.join(one.id for one in confirmations[:-1])} came first and fresh samples contradicted"
    seconds = time.monotonic() - began
    return Found(target, tried, chosen, reason, tuple(confirmations), preferred, seconds, cut_short)


def confirm(
    problem: Problem,
    candidate: Candidate,
    task: Callable[[Candidate, str], Task],
    metric: metrics.Metric,
    budget: gate.Budget,
    run: Run,
    number: int = 0,
) -> Confirmation:
    """Judge a candidate of the short list on the test split, which the list was not made by.

    Args:
        problem: model and data.
        candidate: the one.
        task: makes its task.
        metric: of the problem.
        budget: of the search.
        run: what does a task.
        number: how many of the list were contradicted before.

    Raises:
        RefusedError: `source_failed` or what the candidate failed with: it ran on the selection split.
    """
    answers = [run(task(one, "test")) for one in (Candidate(SOURCE, ()), candidate)]
    for answer in answers:
        if answer.code:
            raise RefusedError(
                answer.code, f"on the test split: {answer.why}", next_step="look at the samples that it fails on"
            )
    own, source = answers[1].evidence, answers[0].evidence
    drop = gate.compare(metric.value, own, source, seed=problem.seed, confidence=gate.confidence_of(number))
    verdict = gate.confirm(drop, answers[1].error, budget, problem.metric.name)
    same = gate.compare(metric.value, source, source, seed=problem.seed)
    return Confirmation(candidate.id, drop, answers[1].error, verdict, same)


def _pool(
    proposed: Sequence[Candidate], task: Callable[[Candidate], Task], workers: int, seconds: float, run: Run
) -> Iterator[tuple[Candidate, Answer | None]]:
    """Try candidates at the same time; those that are not done when the time is up get no answer.

    The pool is joblib's, so `joblib.parallel_config(backend="dask")` around a search moves it to a cluster whose machines
    see the cache folder. Here its workers are threads: each of them only waits for a child process.
    """
    from joblib import Parallel, delayed

    ends = time.time() + seconds
    pool = Parallel(n_jobs=min(workers, len(proposed)), prefer="threads", return_as="generator")
    yield from zip(proposed, pool(delayed(_begin)(run, task(one), ends) for one in proposed), strict=True)


def _begin(run: Run, task: Task, ends: float) -> Answer | None:
    left = ends - time.time()
    if left <= 0:
        return None
    answer = run(msgspec.structs.replace(task, seconds_max=min(task.seconds_max, left)))
    # ended by the search's time and not by its own: nothing is known about it
    return None if answer.code == "pass_timeout" and left < task.seconds_max else answer


def _judge(
    candidate: Candidate,
    answer: Answer,
    source: Answer,
    metric: metrics.Metric,
    problem: Problem,
    budget: gate.Budget,
) -> Tried:
    if answer.code:
        return Tried(candidate, answer, gate.Verdict(False, answer.why, answer.code))
    if answer.digest == source.digest:
        return Tried(candidate, answer, gate.Verdict(False, "it changed nothing", "pass_noop"))
    drop = gate.compare(metric.value, answer.evidence, source.evidence, seed=problem.seed)
    return Tried(candidate, answer, gate.hold(drop, answer.error, budget, problem.metric.name), drop)


def _weigh(passed: Sequence[Tried], problem: Problem, settings: Settings, say: Progress) -> None:
    """Measure latency and memory of what passed: here, or as devices of the class reported."""
    if settings.reported and not any(item.answer.digest in settings.reported for item in passed):
        say(
            f"none of {len(settings.reported)} files that figures were reported of is among the {len(passed)} that passed"
        )
    for item in passed:
        reported = settings.reported.get(item.answer.digest)
        base = settings.reported.get(passed[0].answer.digest)
        if reported is not None:
            item.latency_us, item.peak_bytes = reported.latency_p50_us, float(reported.peak_memory_bytes)
            if base is not None and base.latency_p50_us:
                item.latency_ratio = reported.latency_p50_us / base.latency_p50_us
    if not settings.weigh:
        return
    smallest = sorted(passed[1:], key=lambda item: item.answer.download_bytes)[: MEASURED_MAX - 1]
    chosen = [passed[0], *smallest]
    say(f"measuring {len(chosen)} variants")
    call = problem.calibration[0]
    _weigh_memory(chosen, call, problem, say)
    if not settings.measured_here:
        return
    sessions = {
        item.id: load(Path(item.answer.path), problem.format, options={"threads": 1, **item.candidate.options})
        for item in chosen
    }
    calls: dict[str, Callable[[], Any]] = {
        key: lambda session=session: session.run(call)  # type: ignore[misc]
        for key, session in sessions.items()
    }
    # one thread, so CPU time is latency less what other processes take of it
    latency = measure.interleaved(
        calls, dict.fromkeys(calls, SOURCE), rounds=ROUNDS, seconds=ROUND_SECONDS, clock=time.process_time
    )
    for item in chosen:
        item.latency_ratio, item.latency_us = latency[item.id].ratio, latency[item.id].p50_us
    for session in sessions.values():
        session.close()


def _weigh_memory(chosen: Sequence[Tried], call: Mapping[str, attempt.Array], problem: Problem, say: Progress) -> None:
    """Measure peak memory and load time, each in a process of its own that makes one call."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "call.golden"
        vectors.write_bytes(_as_vector(call, problem))
        for item in chosen:
            try:
                answer = measure.peak(
                    measure.PeakTask(
                        path=item.answer.path,
                        format=problem.format,
                        engine="",
                        options={"threads": 1, **item.candidate.options},
                        golden=str(vectors),
                        tensors={},
                    )
                )
            except WherryError as error:
                say(f"{item.id}: {error.message}")
                continue
            item.peak_bytes, item.load_ms = float(answer.peak_bytes), answer.load_ms


def _as_vector(call: Mapping[str, attempt.Array], problem: Problem) -> bytes:
    """Write a call as what `measure.peak` reads."""
    session = load(problem.source, problem.format, options={"threads": 1})
    outputs = session.run(call)
    session.close()
    expected = {name: golden.Expected(value, value.shape) for name, value in outputs.items()}
    tolerances = {name: golden.Tolerance(0.0, 0.0) for name in outputs}
    return golden.encode(golden.Golden((golden.Vector(dict(call), expected),), tolerances, synthetic=True))


def _row(item: Tried, budget: gate.Budget, samples: int) -> Row:
    value = item.drop.value if item.drop is not None else nan
    odds = gate.odds(item.drop, budget, samples) if item.drop is not None else 1.0
    drop = item.drop.drop if item.drop is not None else 0.0
    lost = 0.0 if drop <= 0 else drop / budget.drop_max if budget.drop_max > 0 else inf
    size = item.answer.download_bytes
    return Row(item.id, size, item.latency_ratio, item.peak_bytes, value, odds, item.answer.error, lost)
