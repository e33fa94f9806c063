"""`python -m wherry_agent.canary`: prove one candidate where its death touches nobody.

One `Judge` on standard input, one `Judged` on standard output. The engine is imported and has run something before the
memory limit is set, since importing alone takes more than some budgets; then the candidate is loaded, its golden
vectors are run, its peak is read, and its latency is measured, interleaved with the incumbent's so that a busy device
refuses no good model. Whoever reads the answer must be ready for none: that is what this process is for
(`canary_exit.classify_exit`).
"""

from __future__ import annotations

import logging
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wherry_agent.answering import memory
from wherry_agent.answering.arms import RUNS_LEFT_OUT, read_golden, reason_of
from wherry_agent.answering.intact import Unlocking, check_weights, open_variant
from wherry_agent.canary_exit import peak_of
from wherry_agent.children import Judge, Judged, Loadable, encode_line
from wherry_shared import golden, reasons
from wherry_shared.engines.canonical import Bound
from wherry_shared.engines.errors import BadInput, EngineFault, OutOfMemory
from wherry_shared.engines.session import Array, EngineLimits
from wherry_shared.engines.tiny import run_tiny
from wherry_shared.errors import RefusedError, WherryError

log = logging.getLogger(__name__)

NICENESS = 10
TASK_BYTES_MAX = 16 * 1024 * 1024
RUNS_MAX = 100
"""Of each side: enough for a 99th percentile, and no more work than a device can spare."""
MEASURE_SECONDS_MAX = 3.0
PAIRS_MIN = 30
"""Runs on each side below which a ratio is no verdict."""
INPUTS_MAX = 4
"""Golden inputs on which latency is measured."""


def main() -> int:
    """Judge the candidate on standard input."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    # what a runtime prints must not pass for the verdict: standard output becomes standard error
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        task = msgspec.json.decode(sys.stdin.buffer.read(TASK_BYTES_MAX), type=Judge)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("no task: %s", error)
        return 2
    os.nice(NICENESS)
    Unlocking.password = task.unlock
    ended = threading.Event()
    threading.Thread(target=_watch, args=(task.seconds_max, ended, answer), name="watch", daemon=True).start()
    verdict = judge(task)
    ended.set()
    os.write(answer, encode_line(verdict))
    return 0


def _watch(seconds: float, ended: threading.Event, answer: int) -> None:
    """End this process with a verdict when its time is over, whatever native code is doing."""
    if not ended.wait(seconds):
        detail = f"not judged within {seconds} s"
        os.write(answer, encode_line(Judged(passed=False, reason=reasons.TIMEOUT, detail=detail)))
        os._exit(0)


def judge(task: Judge) -> Judged:
    """Judge a candidate in this process."""
    try:
        run_tiny(task.candidate.engine)
    except (WherryError, ArithmeticError) as error:  # the engine does not work here: no word about the model
        gone = isinstance(error, WherryError) and error.code == reasons.ENGINE_MISSING
        reason = reasons.ENGINE_MISSING if gone else reasons.CHILD_FAILED
        return Judged(passed=False, reason=reason, detail=f"{task.candidate.engine}: {error}"[:500])
    base = _reset_peak()
    try:
        check_weights(task.candidate)
        vectors = read_golden(task.candidate)  # before the limit: they are not what the candidate needs
        base = _reset_peak()
        with _limited(task.memory_bytes_max):
            proved = _prove(task.candidate, vectors)
    except (WherryError, MemoryError) as error:
        reason, detail = _verdict(error)
        return Judged(passed=False, reason=reason, detail=detail[:500], peak_memory_bytes=_peak_above(base))
    peak = _peak_above(base)
    found = Judged(
        passed=not proved.misses,
        reason=reasons.GOLDEN_MISS if proved.misses else "",
        detail="; ".join(str(miss) for miss in proved.misses[:5])[:500],
        vectors=proved.vectors,
        peak_memory_bytes=peak,
        load_ms=proved.load_ms,
    )
    if proved.misses:
        return found
    if task.memory_bytes_max and peak > task.memory_bytes_max:
        detail = f"needs {peak} bytes, at most {task.memory_bytes_max} are allowed"
        return msgspec.structs.replace(found, passed=False, reason=reasons.OVER_MEMORY, detail=detail)
    return _with_latency(found, proved, task)


@dataclass(frozen=True, slots=True)
class _Proved:
    """A loaded candidate after its golden vectors."""

    bound: Bound
    inputs: list[dict[str, Array]]
    vectors: int
    misses: list[golden.Miss]
    load_ms: float


def _prove(candidate: Loadable, vectors: golden.Golden) -> _Proved:
    started = time.perf_counter()
    bound = open_variant(candidate, EngineLimits(slots=1))
    load_ms = (time.perf_counter() - started) * 1000
    try:
        misses = golden.check(vectors, bound.run)
    except OutOfMemory:
        raise
    except EngineFault as fault:
        raise EngineFault("golden_miss", f"a golden vector made the model fail: {fault}") from fault
    inputs = [dict(vector.inputs) for vector in vectors.vectors[:INPUTS_MAX]]
    return _Proved(bound, inputs, len(vectors.vectors), misses, load_ms)


def _verdict(error: BaseException) -> tuple[str, str]:
    if isinstance(error, OutOfMemory | MemoryError):
        return reasons.OVER_MEMORY, str(error) or "an allocation failed"
    if isinstance(error, EngineFault):
        return (reasons.GOLDEN_MISS if error.code == "golden_miss" else reasons.LOAD_FAILED), str(error)
    if isinstance(error, RefusedError):  # golden vectors or options that cannot be read: the bundle, not the model
        return reasons.BUNDLE_INVALID, str(error)
    return reason_of(error), str(error)


# --- memory ---------------------------------------------------------------------------------------


class _limited:  # noqa: N801 - reads as a statement
    """RLIMIT_DATA at what this process has now plus a budget, and back again (contracts.md §6)."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._before = resource.getrlimit(resource.RLIMIT_DATA)

    def __enter__(self) -> None:
        if self._budget:
            soft = _status_bytes("VmData") + self._budget
            hard = self._before[1]
            if hard != resource.RLIM_INFINITY:
                soft = min(soft, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._before)


def _reset_peak() -> int:
    """Begin a new peak (VmHWM) at what is resident now; return that in bytes."""
    memory.trim()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:  # then the peak may include the import, which is never smaller
        log.info("the peak cannot be reset: %s", error)
    return _status_bytes("VmRSS")


def _peak_above(base: int) -> int:
    return max(0, peak_of(os.getpid()) - base)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise WherryError("no_status", f"/proc/self/status has no {field}")


# --- latency --------------------------------------------------------------------------------------


def _with_latency(found: Judged, proved: _Proved, task: Judge) -> Judged:
    """Measure the candidate, beside the incumbent where there is one, memory for it, and a request both can answer."""
    incumbent = _incumbent(task, proved.inputs)
    candidate_us, incumbent_us = _measure(
        proved.bound.run, incumbent.run if incumbent is not None else None, proved.inputs
    )
    p50, p99 = statistics.median(candidate_us), _p99(candidate_us)
    ratio = 0.0
    found = msgspec.structs.replace(found, latency_p50_us=p50, latency_p99_us=p99)
    if len(incumbent_us) >= PAIRS_MIN:
        theirs = statistics.median(incumbent_us)
        ratio = p50 / theirs
        found = msgspec.structs.replace(
            found, latency_ratio=ratio, incumbent_p50_us=theirs, incumbent_p99_us=_p99(incumbent_us)
        )
    if task.latency_ratio_max and ratio > task.latency_ratio_max:
        return msgspec.structs.replace(
            found,
            passed=False,
            reason=reasons.HEALTH_LATENCY,
            detail=f"median {p50:.0f} µs is {ratio:.2f} times the incumbent's, at most {task.latency_ratio_max:.2f}",
        )
    return found


def _p99(us: list[float]) -> float:
    return sorted(us)[min(len(us) - 1, int(len(us) * 0.99))]


def _incumbent(task: Judge, inputs: list[dict[str, Array]]) -> Bound | None:
    loadable = task.incumbent
    if loadable is None:
        return None
    need = loadable.peak_memory_bytes or 3 * Path(loadable.path).stat().st_size
    if not memory.fits_beside(need, memory.RESERVE_BYTES_DEFAULT, memory.available_bytes()):
        log.info("no memory to measure beside the incumbent")
        return None
    try:
        check_weights(loadable)
        bound = open_variant(loadable, EngineLimits(slots=1))
        for given in inputs:
            bound.run(given)
    except BadInput as error:
        log.info("the incumbent cannot answer the candidate's golden inputs: %s", error)
        return None
    except WherryError as error:  # it serves elsewhere; here it is only a yardstick
        log.warning("the incumbent cannot be measured: %s", error)
        return None
    return bound


def _measure(
    candidate: Callable[[dict[str, Array]], object],
    incumbent: Callable[[dict[str, Array]], object] | None,
    inputs: list[dict[str, Array]],
) -> tuple[list[float], list[float]]:
    """Time both in turn on the same inputs; return microseconds, the first runs left out (if there are others)."""
    ours: list[float] = []
    theirs: list[float] = []
    deadline = time.monotonic() + MEASURE_SECONDS_MAX
    for turn in range(RUNS_LEFT_OUT + RUNS_MAX):
        given = inputs[turn % len(inputs)]
        ours.append(_timed_us(candidate, given))
        if incumbent is not None:
            theirs.append(_timed_us(incumbent, given))
        if time.monotonic() > deadline:
            break
    left_out = min(RUNS_LEFT_OUT, len(ours) - 1)
    return ours[left_out:], theirs[left_out:]


def _timed_us(run: Callable[[dict[str, Array]], object], given: dict[str, Array]) -> float:
    started = time.perf_counter_ns()
    run(given)
    return (time.perf_counter_ns() - started) / 1000


if __name__ == "__main__":
    sys.exit(main())
