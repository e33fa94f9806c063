"""One candidate in a process of its own: make the file, check its contract, run it on the samples of one split.

Passes are other people's graph surgery and engines are native code: either may crash, hang or take all memory. So each
candidate runs in a child (`python -m wherry_optimizer.attempt`) under limits of memory and time; what becomes of the child is
an answer too, and the search goes on. `run` is what a process pool calls; all that it needs are paths, so the pool may be
on other machines that see the same folder.

What was made is kept by digest of all that it was made of (source, passes, calibration data, tools): first the file after
each pass, so that candidates share their beginnings, then the whole answer, so that a search that was broken off goes on
where it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_optimizer import confined, making, measure, metrics, passes
from wherry_optimizer.data import Sample
from wherry_optimizer.evaluate import AGREEMENT, Distance, some
from wherry_optimizer.recipe import convert_parameters
from wherry_shared import digest
from wherry_shared.bundle import Format
from wherry_shared.engines import load
from wherry_shared.engines.session import Session
from wherry_shared.errors import DeviceError, RefusedError, WherryError

Array = npt.NDArray[Any]
Kept = TypeVar("Kept")

CACHE_FORMAT = 2
"""Goes up when answers of older releases mean something else."""
TOOLS = ("wherry-optimizer", "onnx", "onnxruntime", "onnxslim", "ai-edge-quantizer", "ai-edge-litert", "numpy")
SECONDS_MAX = 300.0
LARGE_BYTES = 32 * 2**20
LARGE_LEVEL = 9
"""Files beyond `LARGE_BYTES` are compressed at this level while candidates are compared: the highest takes minutes."""


UNFINISHED = "tmp"
"""How names in the cache begin that are not whole yet."""
UNFINISHED_SECONDS_MAX = 86_400.0
"""Nothing is being made for so long."""
_NOTES = msgspec.json.Decoder(list[dict[str, Any]])
SKIPPED = ("pass_noop", "already_quantized", "pass_failed", "contract_changed")
"""What an optional pass may be refused for."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A pass with its parameters."""

    use: str
    parameters: dict[str, Any] = {}
    optional: bool = False
    """Where it changes nothing, or nothing that holds, go on without it."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is asked."""

    problem: str
    """File with a `Problem`."""
    cache: str
    steps: list[Step]
    options: dict[str, str | int | float | bool] = {}
    part: str = "selection"
    memory_bytes_max: int = making.MEMORY_BYTES_MAX
    seconds_max: float = SECONDS_MAX


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it: a file and what it showed, or a refusal."""

    code: str = ""
    """Empty where it was made and run."""
    why: str = ""
    path: str = ""
    digest: str = ""
    bytes: int = 0
    download_bytes: int = 0
    notes: list[dict[str, Any]] = []
    evidence: list[Any] = []
    error: float = 0.0
    """Distance of its outputs from the source's: L2, as a share, the largest over the outputs."""
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, its data and what is asked of it. Names of tensors are the file's own."""

    source: Path
    format: Format
    digest: str
    metric: metrics.MetricOf
    calibration: tuple[dict[str, Array], ...]
    """Single calls."""
    selection: tuple[Sample, ...]
    """What candidates are compared on."""
    test: tuple[Sample, ...]
    """What the chosen ones are confirmed on, once."""
    state: dict[str, str] = field(default_factory=dict)
    """Input → output that it is of the step before. A sample then has a leading axis of steps on all other inputs."""
    seed: int = 0

    def part(self, name: str) -> tuple[Sample, ...]:
        """Return the samples of a split."""
        return self.selection if name == "selection" else self.test

    def data_digest(self, name: str) -> str:
        """Return the digest of a split, or of the calibration calls."""
        sha = [self.metric.name, ",".join(self.metric.outputs), repr(sorted(self.state.items())), str(self.seed)]
        rows: Sequence[tuple[Mapping[str, Array], Any]] = (
            [(row, None) for row in self.calibration]
            if name == "calibration"
            else [(sample.inputs, sample.label) for sample in self.part(name)]
        )
        for inputs, label in rows:
            for key in sorted(inputs):
                value = inputs[key]
                text = (
                    repr(value.tolist()).encode() if value.dtype.kind == "O" else np.ascontiguousarray(value).tobytes()
                )
                sha.append(f"{key};{value.dtype};{value.shape};{digest.of_bytes(text)}")
            plain = label.tolist() if isinstance(label, np.ndarray | np.generic) else label
            sha.append(repr(plain))
        return digest.of_bytes("\n".join(sha).encode())


def write_problem(problem: Problem, folder: Path) -> Path:
    """Write a problem where children of this process find it; only what this process wrote is ever read back.

    It is named by what it holds: searches for several models, at the same time, may share a cache.
    """
    data = pickle.dumps(problem)
    path = folder / "problems" / f"{digest.of_bytes(data).partition(':')[2]}.pickle"
    _keep(path, data)
    return path


def answer_of(session: Session, sample: Sample, state: Mapping[str, str]) -> dict[str, Array]:
    """Run one sample; where there is state, step by step, with the steps' outputs stacked along a new first axis."""
    if not state:
        return session.run(sample.inputs)
    given = {name: value for name, value in sample.inputs.items() if name not in state}
    held = {name: sample.inputs[name] for name in state}
    found: list[dict[str, Array]] = []
    for step in range(len(next(iter(given.values())))):
        outputs = session.run({name: np.asarray(value[step]) for name, value in given.items()} | held)
        held = {name: outputs[output] for name, output in state.items()}
        found.append({name: value for name, value in outputs.items() if name not in state.values()})
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


def calls_of(session: Session, sample: Sample, state: Mapping[str, str]) -> Iterator[dict[str, Array]]:
    """Yield the single calls that a sample is made of, each with the state that the model has by then."""
    if not state:
        yield dict(sample.inputs)
        return
    given = {name: value for name, value in sample.inputs.items() if name not in state}
    held = {name: sample.inputs[name] for name in state}
    for step in range(len(next(iter(given.values())))):
        call = {name: np.asarray(value[step]) for name, value in given.items()} | held
        yield call
        outputs = session.run(call)
        held = {name: outputs[output] for name, output in state.items()}


def run(task: Task) -> Answer:
    """Do a task in a child of its own; what kills the child becomes a refusal."""
    ended = confined.run(
        [sys.executable, "-m", "wherry_optimizer.attempt"],
        seconds_max=task.seconds_max,
        memory_bytes_max=task.memory_bytes_max,
        given=msgspec.json.encode(task),
        environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        limited=True,
    )
    if ended.how != "well":
        return Answer(code=f"pass_{ended.how}", why=ended.why, seconds=ended.seconds)
    try:
        answer = decode((ended.out.splitlines() or [b""])[-1])
    except ValueError:  # it ended itself: what it wrote last, if anything, is a pass's own chatter
        return Answer(code="pass_crashed", why="its process ended without an answer", seconds=ended.seconds)
    return msgspec.structs.replace(answer, seconds=ended.seconds)


def main() -> None:
    """Do the task on stdin."""
    confined.die_with_parent()
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    confined.limit_memory(task.memory_bytes_max)
    answer = attempt(task)
    sys.stdout.buffer.write(b"\n" + encode(answer) + b"\n")
    sys.stdout.flush()


def attempt(task: Task) -> Answer:
    """Do a task in this process, or find its answer in the cache.

    A `WherryError` becomes the answer; everything else is a crash for `run` to tell. What this machine could not do just
    now (a `DeviceError`: memory, room on a disk, an engine that is missing) is no property of the candidate and is not kept.
    """
    problem: Problem = pickle.loads(Path(task.problem).read_bytes())  # noqa: S301 - this program's own parent wrote it
    cache = Path(task.cache)
    row = cache / "answers" / f"{key_of(problem, task)}.json"
    found = _read(row, decode)
    if found is not None and (not found.path or Path(found.path).exists()):
        return msgspec.structs.replace(found, cached=True)
    try:
        answer = _attempt(problem, task, cache)
    except Exception as error:
        if not isinstance(error, WherryError):
            if is_full(error):
                return Answer(code="disk_full", why=f"no room is left in {cache} to make it")
            raise
        answer = Answer(code=error.code, why=error.message)
        if isinstance(error, DeviceError):
            return answer
    _keep(row, encode(answer))
    return answer


def is_full(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came of, is that no room is left on a disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def sweep(cache: Path) -> None:
    """Take away what children left that were killed in the middle of it, a day ago or longer."""
    for kind in ("answers", "files", "problems", "references", "sources"):
        for path in (cache / kind).glob(f"{UNFINISHED}*"):
            with contextlib.suppress(OSError):  # another search took it away
                if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS_MAX:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def encode(answer: Answer) -> bytes:
    """Write an answer as a line of JSON in which NaN and infinities stay what they are: an overflow is evidence too."""
    return json.dumps(msgspec.to_builtins(answer)).encode()


def decode(line: bytes) -> Answer:
    """Read what `encode` wrote."""
    return msgspec.convert(json.loads(line), Answer)


def key_of(problem: Problem, task: Task) -> str:
    """Return the name of a task's answer: a digest of all that goes into it."""
    parts = (_file_key(problem, task.steps), sorted(task.options.items()), task.part, problem.data_digest(task.part))
    return digest.of_bytes(msgspec.json.encode(parts)).partition(":")[2]


def _file_key(problem: Problem, steps: Sequence[Step]) -> str:
    tools = measure.tools(TOOLS)
    parts = (CACHE_FORMAT, problem.digest, list(steps), problem.data_digest("calibration"), tools)
    return digest.of_bytes(msgspec.json.encode(parts)).partition(":")[2]


def _attempt(problem: Problem, task: Task, cache: Path) -> Answer:
    path, notes = _make(problem, task.steps, cache)
    metric = metrics.make(problem.metric)
    options = {"threads": 1, **task.options}
    session = load(path, problem.format, options=options)
    source = session if not task.steps else load(problem.source, problem.format, options={"threads": 1})
    try:
        evidence, error = _compare(problem, task, cache, session, source, metric)
    finally:
        session.close()
        if source is not session:
            source.close()
    size = path.stat().st_size
    return Answer(
        path=str(path),
        digest=digest.of_file(path),
        bytes=size,
        download_bytes=measure.download_bytes(path, measure.ZSTD_LEVEL if size <= LARGE_BYTES else LARGE_LEVEL),
        notes=notes,
        evidence=evidence,
        error=error,
    )


def _make(problem: Problem, steps: Sequence[Step], cache: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Make the file of a sequence of passes, from the longest beginning that is there already."""
    if not steps:
        return problem.source, []
    folder = cache / "files"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_file_key(problem, steps)}.{problem.format}"
    about = target.with_suffix(".json")
    said = _read(about, _NOTES.decode)
    if said:
        if "skipped" in said[-1]:
            return _make(problem, steps[:-1], cache)[0], said
        if target.exists():
            return target, said
    before, notes = _make(problem, steps[:-1], cache)
    step = steps[-1]
    info = passes.find(step.use)
    parameters = convert_parameters(step.parameters, passes.module(info).Parameters, step.use)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as own:
        work = passes.Work(Path(own), problem.calibration, problem.seed)
        try:
            result = making.apply(info, before, problem.source, problem.format, parameters, work)
        except RefusedError as error:
            if not (step.optional and error.code in SKIPPED):
                raise
            notes = [*notes, {"pass": info.name, "skipped": error.message}]
            _keep(about, msgspec.json.encode(notes, enc_hook=making.plain))
            return before, notes
        notes = [*notes, {"pass": info.name, **result.notes}]
        _keep(about, msgspec.json.encode(notes, enc_hook=making.plain))
        shutil.move(result.path, target)
    return target, notes


def _compare(
    problem: Problem, task: Task, cache: Path, session: Session, source: Session, metric: metrics.Metric
) -> tuple[list[Any], float]:
    """Return the evidence of every sample and the distance of the outputs from the source's."""
    kept = cache / "references"
    kept.mkdir(parents=True, exist_ok=True)
    name = digest.of_bytes(f"{problem.digest} {problem.data_digest(task.part)}".encode()).partition(":")[2]
    path = kept / f"{name}.npz"
    references = dict(np.load(path)) if path.exists() else {}
    fresh: dict[str, Array] = {}
    evidence: list[Any] = []
    distance = Distance()
    for index, sample in enumerate(problem.part(task.part)):
        outputs = answer_of(session, sample, problem.state)
        asked = problem.metric.name == AGREEMENT
        first = problem.metric.outputs[0] if problem.metric.outputs else next(iter(outputs))
        old: Mapping[str, Array] | None = None
        if f"{index}/{first}" not in references:
            old = outputs if session is source else answer_of(source, sample, problem.state)
        for key, value in outputs.items():
            if value.dtype.kind not in "fiub":
                continue
            entry = f"{index}/{key}"
            reference = references.get(entry)
            if reference is None and old is not None:
                reference = some(old[key], problem.seed + index)
                fresh[entry] = reference
            if reference is None:
                continue
            distance.add(key, some(value, problem.seed + index), reference)
        if asked:
            whole = old if old is not None else (outputs if session is source else None)
            label: Any = whole[first] if whole is not None else answer_of(source, sample, problem.state)[first]
        else:
            label = sample.label
        evidence.append(metrics.evidence_of(metric, problem.metric.name, outputs, label))
    if fresh:
        with tempfile.NamedTemporaryFile(dir=kept, prefix=UNFINISHED, suffix=".npz", delete=False) as file:
            np.savez(file, **fresh)
        Path(file.name).replace(path)
    return evidence, distance.largest


def _read(path: Path, read: Callable[[bytes], Kept]) -> Kept | None:
    """Return what was kept; nothing where there is none, or where a machine that lost power left a file that is not whole."""
    try:
        return read(path.read_bytes())
    except (FileNotFoundError, ValueError):  # msgspec's errors are ValueErrors
        return None


def _keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: other children read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)


if __name__ == "__main__":
    main()
