"""The verdict on a candidate in its trial, from counts alone: pass, fail, or not yet.

Four kinds of evidence, each with a floor below which it says nothing: failed requests (`errors_min`), answers that the
application itself called wrong (the same floor and rate), a shadow's agreement with the incumbent (`min_requests`
comparisons), and engine time against the incumbent, per shape bucket and only in buckets with enough requests on both
sides (contracts.md §4); what an application ran in its own process compares with its like only. Without a common bucket
latency is *unknown*, never a failure: a device cannot condemn what it could not compare. The floor of failed requests ends with the trial:
`machine` confirms nothing of which more failed than the terms allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wherry_agent.children import ArmStats
from wherry_shared.reasons import APPLICATION, HEALTH_AGREEMENT, HEALTH_ERRORS, HEALTH_LATENCY
from wherry_shared.sketch import Sketch
from wherry_shared.wire import IN_PROCESS, Trial

BUCKET_REQUESTS_MIN = 30
"""Requests that a shape bucket needs on each side before its latencies are compared."""
MEDIAN_GROWN_US_MIN = 100.0
"""A median that grew by less is no evidence: engine time of a small model depends more on which process ran it (an
application's own, or the worker that runs its calls in a trial) and on what else wants a core than on the model."""
TAIL_QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class Verdict:
    """`open`: evidence may still come. `unknown`: errors are fine, and latency can not be compared on this device."""

    outcome: Literal["pass", "fail", "open", "unknown"]
    reason: str = ""
    detail: str = ""
    latency_ratio: float = 0.0
    """Largest ratio of medians over the compared buckets; 0 if none was compared."""


@dataclass(frozen=True, slots=True)
class _Latency:
    """What the latency evidence says."""

    outcome: Literal["pass", "fail", "open", "unknown"]
    detail: str = ""
    ratio: float = 0.0


def judge(terms: Trial, candidate: ArmStats, baseline: ArmStats | None, *, has_incumbent: bool) -> Verdict:
    """Weigh what a candidate did so far.

    Args:
        terms: the trial's terms, from the offer.
        candidate: its counts since the trial began.
        baseline: the incumbent's counts in this boot, if it had any.
        has_incumbent: without one (first installation) there is nothing to compare latency with, and none is asked for.
    """
    latency = _latency(terms, candidate, baseline, has_incumbent=has_incumbent)
    for count, reason, what in (
        (candidate.errors, HEALTH_ERRORS, "requests failed"),
        (candidate.rejected, APPLICATION, "answers were called wrong by the application"),
    ):
        if count >= terms.errors_min and count > terms.error_rate_max * candidate.requests:
            last = f"; last: {candidate.last_error}" if candidate.last_error else ""
            detail = f"{count} of {candidate.requests} {what}, at most {terms.error_rate_max:.1%}{last}"
            return Verdict("fail", reason, detail, latency.ratio)
    compared, agreed = candidate.compared, candidate.agreed
    if compared >= terms.min_requests and agreed < terms.agreement_min * compared:
        detail = f"{agreed} of {compared} answers agreed with the incumbent's, at least {terms.agreement_min:.1%} must"
        return Verdict("fail", HEALTH_AGREEMENT, detail, latency.ratio)
    if latency.outcome == "fail":
        return Verdict("fail", HEALTH_LATENCY, latency.detail, latency.ratio)
    answered = candidate.requests - candidate.errors
    if answered < terms.min_requests:
        return Verdict("open", detail=f"{answered} of {terms.min_requests} requests", latency_ratio=latency.ratio)
    if max(candidate.errors, candidate.rejected) > terms.error_rate_max * candidate.requests:
        return Verdict("open", detail="too few failures to condemn, too many to pass", latency_ratio=latency.ratio)
    return Verdict(latency.outcome, detail=latency.detail, latency_ratio=latency.ratio)


def _latency(terms: Trial, candidate: ArmStats, baseline: ArmStats | None, *, has_incumbent: bool) -> _Latency:
    if not has_incumbent:
        return _Latency("pass", "no incumbent to compare latency with")
    before = _buckets(baseline)
    if not before:
        return _Latency(
            "unknown", f"the incumbent has no shape bucket with {BUCKET_REQUESTS_MIN} requests in this boot"
        )
    after = _buckets(candidate)
    common = sorted(before.keys() & after.keys())
    if not common:
        if after and {_inside(bucket) for bucket in after}.isdisjoint(map(_inside, before)):
            return _Latency("unknown", "one ran in applications' own processes, the other in the worker")
        return _Latency("open", "no shape bucket has enough requests on both sides")
    worst = 0.0
    for bucket in common:
        median, tail = _quantiles(after[bucket])
        median_before, tail_before = _quantiles(before[bucket])
        ratio = median / median_before if median_before > 0 else 0.0
        worst = max(worst, ratio)
        if ratio > terms.latency_ratio_max and median - median_before >= MEDIAN_GROWN_US_MIN:
            detail = f"median {median:.0f} µs, incumbent {median_before:.0f} µs ({_words(bucket)})"
            return _Latency("fail", detail, worst)
        grown_ms = (tail - tail_before) / 1000
        if tail > terms.latency_tail_ratio_max * tail_before and grown_ms >= terms.latency_tail_min_ms:
            detail = f"90th percentile {tail:.0f} µs, incumbent {tail_before:.0f} µs ({_words(bucket)})"
            return _Latency("fail", detail, worst)
    return _Latency("pass", ratio=worst)


def _inside(bucket: str) -> bool:
    return bucket.startswith(IN_PROCESS)


def _words(bucket: str) -> str:
    return f"bucket 2^{bucket.removeprefix(IN_PROCESS)}{', in process' if _inside(bucket) else ''}"


def _buckets(arm: ArmStats | None) -> dict[str, Sketch]:
    if arm is None:
        return {}
    sketches = {bucket: Sketch.from_wire(bins) for bucket, bins in arm.latency_us.items()}
    return {bucket: sketch for bucket, sketch in sketches.items() if sketch.count >= BUCKET_REQUESTS_MIN}


def _quantiles(sketch: Sketch) -> tuple[float, float]:
    return sketch.quantile(0.5) or 0.0, sketch.quantile(TAIL_QUANTILE) or 0.0
