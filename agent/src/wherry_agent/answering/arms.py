"""A loaded variant, and what is counted about it.

Counting is split from running so that the caller of a run never waits for a sketch longer than a short lock, and so
that the same variant can be counted as candidate first and as incumbent later, without being loaded twice.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from wherry_agent.answering.intact import check_weights, open_variant, read_golden_bytes
from wherry_agent.answering.withheld import withhold
from wherry_agent.children import ArmName, ArmStats, Loadable
from wherry_agent.in_flight import UNREAD, Page, mark_of
from wherry_shared import golden, reasons
from wherry_shared.engines.canonical import BUCKET_BITS, BUCKET_MASK, Bound, ShortWay
from wherry_shared.engines.errors import EngineFault, OutOfMemory
from wherry_shared.engines.session import Array, EngineLimits
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.limits import (
    GOLDEN_BYTES_MIN_BUDGET,
    GOLDEN_DECODED_BYTES_MAX,
    GOLDEN_SHARE_OF_VARIANT,
    METRIC_NAME,
    METRIC_VALUE_MAX,
    METRICS_PER_WINDOW_MAX,
)
from wherry_shared.sketch import LOG_GAMMA, VALUE_MIN, Sketch
from wherry_shared.wire import Sum

log = logging.getLogger(__name__)

RUNS_LEFT_OUT = 10
"""Runs after a load whose latency is not evidence (contracts.md §4)."""
WARM_RUNS = 3
CLASSES_MAX = 64
"""Classes that one arm's histogram tells apart; the rest is counted under `OTHER_CLASS`."""
OTHER_CLASS = "other"
CONFIDENCE_ROWS_MAX = 16
"""Rows of one answer, spread evenly, whose top value is looked at; classes are counted over all of them."""
ERROR_CHARS_MAX = 500
PENDING_MAX = 16384
"""Answers of a worker that wait to be counted; whoever leaves one more counts them."""


@dataclass(eq=False)
class Loaded:
    """A variant in memory. Whoever runs it holds a reference; the last one to let go frees it."""

    loadable: Loadable
    bound: Bound
    load_ms: float
    runs_to_leave_out: int = RUNS_LEFT_OUT
    notes: dict[str, Any] = field(default_factory=dict)
    """What whoever serves it looks up in every request; it lives as long as the variant is loaded."""
    page: Page = UNREAD
    """Where every run of it is noted under `mark`, for the supervisor to read if it is the last one."""
    mark: int = field(init=False)
    short_way: ShortWay = field(init=False)
    """Of `bound`, for who runs it in the path of a request."""

    def __post_init__(self) -> None:
        self.mark = mark_of(self.loadable)
        self.short_way = self.bound.short_way()

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self.loadable.target.rpartition("/")[2]


def key_of(loadable: Loadable) -> tuple[str, str, str]:
    """Return what tells loaded variants apart: the same file in another bundle may have another interface."""
    return loadable.model, loadable.manifest, loadable.variant


def load_variant(loadable: Loadable, limits: EngineLimits | None = None, page: Page = UNREAD) -> Loaded:
    """Load and warm a variant: its first runs allocate and are slow, and must not be a caller's.

    Raises:
        DeviceError: `digest_mismatch` or `disk`: its file is not what was verified; `key_missing`.
        EngineFault: it does not load, or fails on the smallest input that its interface allows.
        WherryError: see `engines.load`.
    """
    started = time.perf_counter()
    slot = page.begin(mark_of(loadable))
    try:
        check_weights(loadable)
        bound = open_variant(loadable, limits)
        inputs = _warm_inputs(loadable, bound)
        for _ in range(WARM_RUNS):
            if inputs is not None:
                bound.run(inputs)
    finally:
        page.end(slot)
    return Loaded(loadable, bound, (time.perf_counter() - started) * 1000, page=page)


def _warm_inputs(loadable: Loadable, bound: Bound) -> dict[str, Array] | None:
    """Return inputs to warm up with; None without any that can be trusted, which is no reason not to serve."""
    if not loadable.golden_path:
        return bound.warm_inputs()
    try:
        return dict(read_golden(loadable).vectors[0].inputs)
    except DeviceError as error:
        log.warning("model %s is not warmed: %s", loadable.model, error)
        return None


def reason_of(error: BaseException) -> str:
    """Return the reason code for a variant that could not be loaded; only a fault of the variant is a verdict."""
    if isinstance(error, OutOfMemory | MemoryError):
        return reasons.OVER_MEMORY
    if isinstance(error, EngineFault):
        return reasons.LOAD_FAILED
    if isinstance(error, RefusedError):
        return reasons.BUNDLE_INVALID
    if isinstance(error, DeviceError) and error.code in (*reasons.ALTERED, reasons.ENGINE_MISSING):
        return error.code
    return reasons.CHILD_FAILED


def read_golden(loadable: Loadable) -> golden.Golden:
    """Read the golden vectors of a variant from disk, bounded by what a bundle may hold.

    Raises:
        DeviceError: `digest_mismatch` or `disk`; says nothing about the variant.
        RefusedError: `golden_invalid` or `golden_too_large`.
    """
    try:
        weights_bytes = Path(loadable.path).stat().st_size
    except OSError as error:
        raise DeviceError(reasons.DISK, f"the weights {loadable.digest} are gone: {error.strerror}") from error
    bytes_max = max(GOLDEN_BYTES_MIN_BUDGET, int(weights_bytes * GOLDEN_SHARE_OF_VARIANT))
    data = read_golden_bytes(loadable, bytes_max)
    return golden.decode(data, decoded_bytes_max=GOLDEN_DECODED_BYTES_MAX)


def check_told(name: str, value: float) -> None:
    """Refuse what no application may tell.

    Raises:
        RefusedError: `metric_name` or `metric_value`.
    """
    if not METRIC_NAME.fullmatch(name):
        raise RefusedError("metric_name", f"{name[:60]!r} is no name of a metric: {METRIC_NAME.pattern}")
    if not isfinite(value) or abs(value) > METRIC_VALUE_MAX:
        raise RefusedError("metric_value", f"{name} {value} is not a number up to {METRIC_VALUE_MAX:g}")


@dataclass(eq=False)
class Counter:
    """Counts of one arm; cumulative, safe from threads."""

    loadable: Loadable
    arm: ArmName
    trial: str = ""
    pending: deque[int] = field(default_factory=deque)
    """Runs that callers left behind without waiting for the lock, as `canonical.ShortWay` returns them; see `fold`."""
    seen: Mapping[str, Array] | None = None
    """Outputs of the last of them: a sample for the class histogram, a few a second."""
    _answered: deque[int] = field(default_factory=deque)
    """The same of a worker, whose runs wait for the run gate; these did not have to."""
    life: int = field(default_factory=itertools.count(1).__next__)
    """Which counter of this process it is."""
    _fold_left_out: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _requests: int = 0
    _errors: int = 0
    _fallbacks: int = 0
    _rejected: int = 0
    _latency: dict[int, Sketch] = field(default_factory=dict)
    _wait: Sketch = field(default_factory=Sketch)
    _classes: dict[str, int] = field(default_factory=dict)
    _confidence: Sketch = field(default_factory=Sketch)
    _compared: int = 0
    _agreed: int = 0
    _skipped: int = 0
    _distance: Sketch = field(default_factory=Sketch)
    _metrics: dict[str, Sum] = field(default_factory=dict)
    _last_error: str = ""
    _changes: int = 0
    _told: int = 0

    def __post_init__(self) -> None:
        self._labelled = next(
            ((spec.name, spec.labels) for spec in self.loadable.interface.outputs if spec.labels), None
        )

    def answered(self, loaded: Loaded, bucket: int, engine_ns: int, wait_ns: int, outputs: Mapping[str, Array]) -> None:
        """Count a run that gave an answer; if there is nothing but its time to count, when somebody looks."""
        if self._labelled is None and not wait_ns and loaded.runs_to_leave_out <= 0:
            self._answered.append(engine_ns << BUCKET_BITS | bucket)
            if len(self._answered) >= PENDING_MAX:
                self.fold()
            return
        found = self._top_classes(outputs) if self._labelled is not None else None
        with self._lock:
            self._requests += 1
            self._wait.add(wait_ns / 1000)
            self._add_latency(loaded, bucket, engine_ns)
            if found is not None:
                self._add_classes(*found)
            self._changes += 1

    def failed(self, error: str, *, fallback: bool) -> None:
        """Count a run that the model failed; `fallback`: somebody else answered it."""
        with self._lock:
            self._requests += 1
            self._errors += 1
            self._fallbacks += fallback
            self._last_error = withhold(error)[:ERROR_CHARS_MAX]
            self._changes += 1

    def compared(self, *, agreed: bool, distance: float | None) -> None:
        """Count a comparison with the incumbent's answer to the same request."""
        with self._lock:
            self._compared += 1
            self._agreed += agreed
            if distance is not None:
                self._distance.add(distance)
            self._changes += 1

    def skipped(self) -> None:
        """Count a request on which a shadow should have run and did not."""
        with self._lock:
            self._skipped += 1
            self._changes += 1

    def rejected(self, reason: str) -> None:
        """Count an answer that the application calls wrong."""
        with self._lock:
            self._rejected += 1
            self._last_error = reason[:ERROR_CHARS_MAX]
            self._changes += 1

    def told(self, name: str, value: float) -> None:
        """Count a number that the application tells of an answer.

        Raises:
            RefusedError: as `check_told`; `metrics_too_many` names.
        """
        check_told(name, value)
        with self._lock:
            known = self._metrics.get(name)
            if known is None and len(self._metrics) >= METRICS_PER_WINDOW_MAX:
                raise RefusedError(
                    "metrics_too_many",
                    f"{self.loadable.model} has {METRICS_PER_WINDOW_MAX} metrics already, {name} is one too many",
                )
            self._metrics[name] = Sum(
                count=known.count + 1 if known is not None else 1,
                total=known.total + value if known is not None else value,
            )
            self._changes += 1

    def leave_out(self, runs: int) -> None:
        """Leave so many runs of `fold` out of the latency from now on: the variant was just loaded."""
        with self._lock:
            self._fold_left_out = runs

    def fold(self) -> None:
        """Count the runs that were left behind, outside the calls."""
        seen, self.seen = self.seen, None
        found = self._top_classes(seen) if seen is not None and self._labelled is not None else None
        with self._lock:
            # what callers append meanwhile waits for the next turn
            runs = [self.pending.popleft() for _ in range(len(self.pending))]
            answered = [self._answered.popleft() for _ in range(len(self._answered))]
            self._requests += len(runs) + len(answered)
            self._changes += len(runs) + len(answered)
            if answered:
                self._wait.add(0.0, len(answered))
            if found is not None:
                self._add_classes(*found)
            left_out = min(self._fold_left_out, len(runs))
            self._fold_left_out -= left_out
            if left_out < len(runs) or answered:
                packed = np.array(runs[left_out:] + answered, np.int64)
                times_ns, buckets = packed >> BUCKET_BITS, packed & BUCKET_MASK
                for bucket in np.unique(buckets).tolist():
                    self._sketch(bucket).merge(_sketched(times_ns[buckets == bucket] / 1000))

    def stats(self) -> ArmStats:
        """Return the counts as they stand."""
        self.fold()
        with self._lock:
            return ArmStats(
                model=self.loadable.model,
                manifest=self.loadable.manifest,
                variant=self.loadable.variant,
                digest=self.loadable.digest,
                arm=self.arm,
                trial=self.trial,
                requests=self._requests,
                errors=self._errors,
                fallbacks=self._fallbacks,
                rejected=self._rejected,
                latency_us={str(bucket): sketch.to_wire() for bucket, sketch in self._latency.items()},
                wait_us=self._wait.to_wire(),
                classes=dict(self._classes),
                confidence=self._confidence.to_wire(),
                compared=self._compared,
                agreed=self._agreed,
                skipped=self._skipped,
                distance=self._distance.to_wire(),
                metrics=dict(self._metrics),
                last_error=self._last_error,
                life=self.life,
            )

    def news(self) -> ArmStats | None:
        """Return the counts if they changed since the last call of this."""
        self.fold()
        with self._lock:
            if self._changes == self._told:
                return None
            self._told = self._changes
        return self.stats()

    def told_everything(self) -> bool:
        """Tell whether nothing changed since the last `news`."""
        self.fold()
        with self._lock:
            return self._changes == self._told

    def _add_latency(self, loaded: Loaded, bucket: int, engine_ns: int) -> None:
        if loaded.runs_to_leave_out > 0:
            loaded.runs_to_leave_out -= 1
            return
        self._sketch(bucket).add(engine_ns / 1000)

    def _add_classes(self, classes: list[tuple[str, int]], confidences: list[float]) -> None:
        for name, times in classes:
            if name not in self._classes and len(self._classes) >= CLASSES_MAX:
                name = OTHER_CLASS  # noqa: PLW2901 - the histogram is bounded
            self._classes[name] = self._classes.get(name, 0) + times
        for value in confidences:
            self._confidence.add(value)

    def _sketch(self, bucket: int) -> Sketch:
        sketch = self._latency.get(bucket)
        if sketch is None:
            sketch = self._latency[bucket] = Sketch()
        return sketch

    def _top_classes(self, outputs: Mapping[str, Array]) -> tuple[list[tuple[str, int]], list[float]]:
        """Return how often each class is on top, and the values of some of those tops; below 0 they count as 0."""
        if self._labelled is None:
            return [], []
        name, labels = self._labelled
        values = outputs.get(name)
        if values is None or not values.size:
            return [], []
        if values.dtype.kind == "O":  # text is told where it is a class that the bundle names: it may be what was asked
            known = collections.Counter(text if text in labels else OTHER_CLASS for text in values.ravel().tolist())
            return list(known.items()), []
        if values.shape[-1] != len(labels):
            return [], []
        if values.size == len(labels):  # one row, as most requests have
            top = int(values.argmax())
            value = float(values.item(top))
            return [(labels[top], 1)], [max(value, 0.0)] if isfinite(value) else []
        rows = values.reshape(-1, len(labels))
        tops = rows.argmax(axis=1)
        times = np.bincount(tops)
        classes = [(labels[index], int(times[index])) for index in times.nonzero()[0].tolist()]
        step = -(-len(rows) // CONFIDENCE_ROWS_MAX)
        found = (float(rows[row, tops[row]]) for row in range(0, len(rows), step))
        return classes, [max(value, 0.0) for value in found if isfinite(value)]


def _sketched(values: Array) -> Sketch:
    """Count many values at once; a call of `Sketch.add` for each would take longer than a small model."""
    made = Sketch()
    positive = values[values >= VALUE_MIN]
    bins, counts = np.unique(np.ceil(np.log(positive) / LOG_GAMMA).astype(np.int64), return_counts=True)
    made.bins = dict(zip(bins.tolist(), counts.tolist(), strict=True))
    made.zeros = len(values) - len(positive)
    made.count, made.total = len(values), float(values.sum())
    return made
