"""What a variant costs: bytes on disk and on the wire, time, memory.

Latency is told as a ratio, measured interleaved with the float variant in one run, since absolute times on a shared
machine say little. Peak memory is that of a fresh process that does nothing but load the engine and the variant and run
it (`wherry_optimizer.peak`), under the allocator settings that devices use.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from wherry_shared import limits
from wherry_shared.bundle import Figures, Format
from wherry_shared.errors import RefusedError
from wherry_shared.facts import FEATURES, DeviceFacts, EngineFacts, hardware_class
from wherry_shared.limits import ALLOCATOR

ZSTD_LEVEL = 19
CALLS_PER_ROUND = 3
"""The best of so many calls counts in a round: what disturbs a call only makes it slower."""
TIMED_SECONDS = 100e-6
"""Quicker calls are timed by as many in a row as take about so long: else caches that others filled are what is measured."""
CALLS_TIMED_MAX = 100
PEAK_SECONDS_MAX = 120.0
PEAK_RUNS = 5


@dataclass(frozen=True, slots=True)
class Latency:
    """Median of rounds, in microseconds, and over the reference of the same rounds."""

    p50_us: float
    ratio: float


class PeakTask(msgspec.Struct, frozen=True, kw_only=True):
    """What the child process is asked to load and run."""

    path: str
    format: Format
    engine: str
    options: dict[str, str | int | float | bool]
    golden: str
    """File with golden vectors: their inputs are run."""
    tensors: dict[str, str]
    runs: int = PEAK_RUNS


class PeakAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child process found."""

    peak_bytes: int
    load_ms: float


def download_bytes(path: Path, level: int = ZSTD_LEVEL) -> int:
    """Return the bytes on the wire: zstd at a high level within the window that devices decode, or raw if smaller."""
    data = path.read_bytes()
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=limits.ZSTD_WINDOW_BYTES_MAX.bit_length() - 1
    )
    return min(len(data), len(zstandard.ZstdCompressor(compression_params=parameters).compress(data)))


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    references: Mapping[str, str],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time calls in turns, each round in another order, and relate each to its reference of the same round.

    Args:
        calls: by id.
        references: id → id of what it is compared with.
        rounds: at most so many (at least three are run).
        seconds: no new round after this long.
        clock: a monotonic clock.
    """
    ids = list(calls)
    counts: dict[str, int] = {}
    for key, call in calls.items():
        call()
        began = clock()
        call()
        counts[key] = max(1, min(CALLS_TIMED_MAX, round(TIMED_SECONDS / max(clock() - began, 1e-9))))
    times: dict[str, list[float]] = {key: [] for key in ids}
    start = clock()
    for number in range(max(3, rounds)):
        if number >= 3 and clock() - start > seconds:
            break
        shift = number % len(ids)
        for key in ids[shift:] + ids[:shift]:
            best = float("inf")
            for _ in range(CALLS_PER_ROUND):
                call, began = calls[key], clock()
                for _ in range(counts[key]):
                    call()
                best = min(best, (clock() - began) / counts[key])
            times[key].append(best)
    return {
        key: Latency(
            p50_us=statistics.median(times[key]) * 1e6,
            ratio=statistics.median(a / b for a, b in zip(times[key], times[references[key]], strict=True)),
        )
        for key in ids
    }


def least_disturbed(
    measured: Callable[[], dict[str, Latency]], reference: str, *, times: int, pause_s: float
) -> dict[str, Latency]:
    """Measure several times and return the time in which the reference was quickest.

    Who shares a core with this machine slows units that some kernels need more than others do, for seconds on end, and so
    changes ratios, too (int8 of a small network from 0.42 to 0.66 of float). When the reference is quickest nobody does.
    The choice is made by the reference alone.

    Args:
        measured: measures once.
        reference: id of what others are compared with.
        times: so often.
        pause_s: seconds between two.
    """
    found: list[dict[str, Latency]] = []
    for number in range(times):
        if number:
            time.sleep(pause_s)
        found.append(measured())
    return min(found, key=lambda one: one[reference].p50_us)


def peak(task: PeakTask) -> PeakAnswer:
    """Load and run a variant in a fresh process.

    Raises:
        RefusedError: `measure_failed` if the process dies, says nothing or takes too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wherry_optimizer.peak"],
            input=msgspec.json.encode(task),
            capture_output=True,
            timeout=PEAK_SECONDS_MAX,
            check=False,
            env={**os.environ, **ALLOCATOR},
        )
    except subprocess.TimeoutExpired as error:
        raise RefusedError(
            "measure_failed",
            f"measuring memory took more than {PEAK_SECONDS_MAX:.0f} s",
            consequence="the memory that devices need is not known, so nothing was packed",
            next_step="build on a machine that is less busy, or make the model smaller",
        ) from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RefusedError(
            "measure_failed",
            f"measuring memory ended with {done.returncode}: {' '.join(last)[:300]}",
            consequence="the memory that devices need is not known, so nothing was packed",
            next_step="look at the last line above; free memory on this machine, and build again",
        )
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=PeakAnswer)


def machine() -> DeviceFacts:
    """Return what of this machine decides the hardware class of measurements."""
    flags: set[str] = set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: the class then has no CPU features
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return DeviceFacts(arch=platform.machine(), cpu_features=[name for name in FEATURES if name in flags])


def figures(engine: EngineFacts, latency: Latency, memory: PeakAnswer) -> tuple[str, Figures]:
    """Return (hardware class, figures) of a measurement on this machine."""
    return hardware_class(machine(), engine), Figures(
        latency_p50_us=round(latency.p50_us, 1),
        latency_ratio=round(latency.ratio, 4),
        peak_memory_bytes=memory.peak_bytes,
        load_ms=round(memory.load_ms, 2),
    )


def tools(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of installed distributions, those that are missing left out."""
    import importlib.metadata

    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
