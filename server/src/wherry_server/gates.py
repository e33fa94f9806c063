"""Gates turn counts of devices into a verdict. Pure.

The unit is the device. A gate that has too little to go by says `unknown`, which never widens a rollout: no data is not
success. A `Bound` is a fixed threshold, right where somebody knows what is too much at once. A `Gate` has stated errors: it
decides as soon as the evidence allows, at every look, and says in numbers why (`sequential`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from wherry_server.sequential import (
    LANES_MAX,
    STEPS,
    Finding,
    Pairs,
    bounded,
    bounded_mean,
    bounded_needed,
    compare,
    sample_needed,
)
from wherry_server.targeting import exact
from wherry_shared.errors import RefusedError
from wherry_shared.limits import METRIC_NAME_PATTERN

COUNT_MAX = 10_000_000
SHARE_BAD_MIN = 2
"""Devices that are a share of fewer than the sample: one failed device in a stage of one is not 100 %."""
TOLERATED_MIN = 0.0001
HARM_MIN = 0.001
HARM_OF_CAP_MAX = 0.9
ERROR_MIN, ERROR_MAX = 1e-6, 0.5
CAP_TIMES = 5
"""Unless a gate says otherwise, a device counts for at most so many times the harm that matters."""
LATENCY_CAP_MIN = 2.0
"""The same for latency, whose values are ratios around 1: at least this, by default."""
LATENCY_CAP_MAX = 100.0
CRASHES_COUNTED_MIN = 2
"""However short a lane is: so many crashes of a device count in it."""
CRASH_RATE_CAP_MAX = 3_600.0
"""Crashes per hour."""
STEPS_OF_HARM_MIN = 2
"""A harm of fewer of the steps in which differences are kept could never be ruled out."""
APP = "app:"
"""Before the name under which an application tells numbers (`wire.Window.metrics`)."""
Metric: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern="^(failed|returned|crashed|disagreed|skipped|errors|crash_rate|latency|latency_p90|latency_p99"
        f"|{APP}{METRIC_NAME_PATTERN})$"
    ),
]
QUANTILES: dict[Metric, float] = {"latency": 0.5, "latency_p90": 0.9, "latency_p99": 0.99}
"""Metrics of engine time, with the quantile that each one compares."""
BESIDE: frozenset[Metric] = frozenset({"disagreed", "skipped"})
"""Metrics of a shadow: a share of its runs on each device."""
_COMPARED = frozenset({"errors", "crash_rate", *QUANTILES})


def has_control(metric: str) -> bool:
    """Tell whether a metric compares devices with the candidate with devices that keep the incumbent."""
    return metric in _COMPARED or metric.startswith(APP)


def counts_devices(metric: str) -> bool:
    """Tell whether a metric is a share of devices, by what became of them."""
    return not has_control(metric) and metric not in BESIDE


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is too much: more than `count` devices at once, or more than `share` of at least `sample_min`.

    Where fewer than `sample_min` devices are exposed, all of them are the sample; but a single one is no share then, unless
    the cohort has no more: it may just be broken.
    """

    count: int | None = None
    share: float | None = None
    sample_min: int = 1


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A metric that is held to what is tolerated, or to a control, with stated errors.

    `failed` are devices that failed for a reason that speaks against the bundle, `returned` those of them that went back
    from a trial, `crashed` those whose worker or canary crashed. `disagreed` and `skipped` are of a shadow: the share of its
    runs on a device that did not agree with the incumbent, or that its CPU budget did not allow. `errors` is the share of its requests that a device fails,
    `crash_rate` how often its worker died in an hour of service, `latency` its median engine time over its own median before
    the wave, `latency_p90` and `latency_p99` the same of the time within which 90 and 99 of 100 requests are done,
    `app:NAME` the mean of the numbers that the application told; all are compared with devices that keep the incumbent.
    """

    metric: Metric
    harm: float
    """The smallest harm that matters: how much more than what is tolerated, or than the control."""
    tolerated: float | None = None
    """Share of devices up to which a halt would be false; of metrics without a control."""
    cap: float | None = None
    """Of metrics with a control: a device that has more counts as if it had this (default: see `most`)."""
    better: Literal["", "higher", "lower"] = ""
    """Of `app:NAME`: which numbers are good."""
    least: float | None = None
    """Of `app:NAME`: a number that is less counts as if it were this; 0 by default."""
    alpha: float = 0.05
    """Probability of ever halting a bundle that does no harm, at most."""
    beta: float = 0.05
    """Probability of ever passing a bundle that does the harm, at most."""

    @property
    def most(self) -> float:
        """The cap that holds."""
        if self.cap is not None:
            return self.cap
        if self.metric in QUANTILES:
            return max(LATENCY_CAP_MIN, 1 + CAP_TIMES * self.harm)
        if self.metric.startswith(APP):
            return 1.0
        if self.metric == "crash_rate":
            return CAP_TIMES * self.harm
        return min(CAP_TIMES * self.harm, 1.0)

    @property
    def floor(self) -> float:
        """The least that holds."""
        return self.least or 0.0

    @property
    def unit(self) -> float:
        """How far values may lie apart: differences are kept in units of this, but for `crash_rate`."""
        return self.most - self.floor

    def caps(self, period_s: int) -> tuple[float, ...]:
        """Return by lane how far values may lie apart.

        In a quarter of an hour one crash is four per hour: so that it is not cut to a rate that means nothing there, a
        device may have `CRASHES_COUNTED_MIN` crashes in every lane.
        """
        if self.metric != "crash_rate":
            return (self.unit,) * LANES_MAX
        return tuple(max(self.unit, CRASHES_COUNTED_MIN / _lane_h(lane, period_s)) for lane in range(LANES_MAX))

    def part(self, value: float) -> float:
        """Return a value as a number from 0 to 1, 1 being the worst."""
        part = min(max((value - self.floor) / self.unit, 0.0), 1.0)
        return 1 - part if self.better == "higher" else part


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a gate says, with the counts that decided."""

    gate: str
    outcome: Literal["pass", "breach", "unknown"]
    bad: int
    judged: int
    needed: int
    """The sample that the gate waits for."""
    numbers: Finding | None = None
    """Of a gate with stated errors: estimate, interval and evidence."""


def check_bound(bound: Bound, what: str) -> None:
    """Refuse a bound that bounds nothing.

    Raises:
        RefusedError: `plan_bound`.
    """
    if bound.count is None and bound.share is None:
        raise RefusedError("plan_bound", f"{what} bounds neither a count nor a share", next_step="give one of the two")
    if bound.count is not None and not 0 <= bound.count <= COUNT_MAX:
        raise RefusedError("plan_bound", f"{what}.count {bound.count} is not 0 to {COUNT_MAX}")
    if bound.share is not None and not 0 <= bound.share < 1:
        raise RefusedError("plan_bound", f"{what}.share {bound.share} is not at least 0 and below 1")
    if not 1 <= bound.sample_min <= COUNT_MAX:
        raise RefusedError("plan_bound", f"{what}.sample_min {bound.sample_min} is not 1 to {COUNT_MAX}")


def threshold(gate: str, bound: Bound, *, bad: int, judged: int, population: int, cohort: int = 0) -> Verdict:
    """Judge `bad` of `judged` devices.

    Args:
        gate: its name.
        bound: what is too much.
        bad: devices that count against it.
        judged: devices that count at all, these included.
        population: devices that are exposed: those that are not judged may still answer.
        cohort: devices that there are, also those that are not exposed.
    """
    needed = min(bound.sample_min, population)
    outcome: Literal["pass", "breach", "unknown"]
    if bound.count is not None and bad > bound.count:
        outcome = "breach"
    elif judged < max(needed, 1):
        outcome = "unknown"
    elif bound.share is not None and bad > exact(bound.share) * judged:
        outcome = "breach"
        wanted = min(bound.sample_min, cohort)
        if bad < SHARE_BAD_MIN and judged < wanted:  # a stage of one: neither too much nor none
            outcome, needed = "unknown", wanted
    else:
        outcome = "pass"
    return Verdict(gate=gate, outcome=outcome, bad=bad, judged=judged, needed=needed)


def check_gate(gate: Gate, period_s: int) -> None:
    """Refuse a gate that could not decide.

    Raises:
        RefusedError: `plan_gate`.
    """
    what = f"gate {gate.metric}"
    if gate.metric.startswith(APP):
        _check_app(gate, what)
    elif gate.better or gate.least is not None:
        raise RefusedError("plan_gate", f"{what}: better and least are of {APP}NAME")
    elif has_control(gate.metric):
        if gate.tolerated is not None:
            raise RefusedError("plan_gate", f"{what}: it has a control, so nothing is tolerated beside it")
        base, most = (1.0, LATENCY_CAP_MAX) if gate.metric in QUANTILES else (0.0, 1.0)
        if gate.metric == "crash_rate":
            most = CRASH_RATE_CAP_MAX
            if gate.harm * STEPS < STEPS_OF_HARM_MIN * gate.caps(period_s)[-1]:
                hours = _lane_h(LANES_MAX - 1, period_s)
                raise RefusedError(
                    "plan_gate",
                    f"{what}: harm {gate.harm} per hour is less than could be told in {hours:g} hours of a device",
                    next_step="give a larger harm, or a larger period_s",
                )
        if not (gate.harm >= HARM_MIN and base + gate.harm / HARM_OF_CAP_MAX <= gate.unit <= most):
            raise RefusedError(
                "plan_gate",
                f"{what}: harm {gate.harm} is not at least {HARM_MIN}, or cap {gate.unit} not clearly above"
                f" {base + gate.harm} and at most {most}",
            )
    else:
        if gate.cap is not None:
            raise RefusedError("plan_gate", f"{what}: cap is of metrics with a control")
        if gate.tolerated is None or not TOLERATED_MIN <= gate.tolerated < 1:
            raise RefusedError("plan_gate", f"{what}: tolerated {gate.tolerated} is not {TOLERATED_MIN} to 1")
        if not (gate.harm >= HARM_MIN and gate.tolerated + gate.harm < 1):
            raise RefusedError(
                "plan_gate", f"{what}: harm {gate.harm} is not {HARM_MIN} to what is left of 1 over tolerated"
            )
    for name in ("alpha", "beta"):
        error = getattr(gate, name)
        if not ERROR_MIN <= error <= ERROR_MAX:
            raise RefusedError("plan_gate", f"{what}: {name} {error} is not {ERROR_MIN} to {ERROR_MAX}")


def _check_app(gate: Gate, what: str) -> None:
    if gate.tolerated is not None:
        raise RefusedError("plan_gate", f"{what}: it has a control, so nothing is tolerated beside it")
    if not gate.better:
        raise RefusedError("plan_gate", f'{what}: better is missing, "higher" or "lower"')
    if not (math.isfinite(gate.floor) and math.isfinite(gate.most) and math.isfinite(gate.harm) and gate.unit > 0):
        raise RefusedError("plan_gate", f"{what}: cap {gate.most} is not above least {gate.floor}")
    part = gate.harm / gate.unit
    if not STEPS_OF_HARM_MIN / STEPS <= part <= HARM_OF_CAP_MAX:
        raise RefusedError(
            "plan_gate",
            f"{what}: harm {gate.harm} is not {STEPS_OF_HARM_MIN}/{STEPS} to {HARM_OF_CAP_MAX} of what lies between least"
            f" {gate.floor} and cap {gate.most}",
            next_step="let least and cap be nearer to the numbers that the application tells",
        )


def share(gate: Gate, *, bad: int, good: int, under_way: int, quiet: int) -> Verdict:
    """Judge devices by what became of them; see `sequential.bounded` for what each count means."""
    found = _bounded(gate, bad, good, under_way, quiet)
    return Verdict(
        gate=gate.metric, outcome=found.outcome, bad=bad, judged=bad + good, needed=found.needed, numbers=found
    )


def beside(gate: Gate, values: Pairs, *, under_way: int, quiet: int) -> Verdict:
    """Judge the share of a shadow's runs, one value a device; see `sequential.bounded_mean`."""
    found = bounded_mean(
        values,
        under_way=under_way,
        quiet=quiet,
        tolerated=gate.tolerated or TOLERATED_MIN,
        harm=gate.harm,
        alpha=gate.alpha,
        beta=gate.beta,
    )
    return Verdict(
        gate=gate.metric, outcome=found.outcome, bad=0, judged=found.sample, needed=found.needed, numbers=found
    )


def control(gate: Gate, lanes: Sequence[Pairs], period_s: int) -> Verdict:
    """Judge differences between candidates and controls, by lane; see `sequential.compare`."""
    needed = min(one.devices for one in needs(gate, period_s)) if gate.metric == "crash_rate" else 0
    found = _compare(tuple(lanes), gate.harm, gate.alpha, gate.beta, gate.caps(period_s), needed)
    return Verdict(
        gate=gate.metric, outcome=found.outcome, bad=0, judged=found.sample, needed=found.needed, numbers=found
    )


@functools.lru_cache(maxsize=256)
def _bounded(gate: Gate, bad: int, good: int, under_way: int, quiet: int) -> Finding:
    """Judge; a rollout is looked at every second, and mostly nothing has changed."""
    return bounded(
        bad=bad,
        good=good,
        under_way=under_way,
        quiet=quiet,
        tolerated=gate.tolerated or TOLERATED_MIN,
        harm=gate.harm,
        alpha=gate.alpha,
        beta=gate.beta,
    )


@functools.lru_cache(maxsize=256)
def _compare(
    lanes: tuple[Pairs, ...], harm: float, alpha: float, beta: float, caps: tuple[float, ...], needed: int
) -> Finding:
    """Judge; a rollout is looked at every second, and its pairs change once a period."""
    return compare(lanes, harm, alpha, beta, caps, needed)


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """With how many devices a gate is expected to decide, and when."""

    devices: int
    after_s: int
    """From the exposure of the last of them, at most; 0: once they have settled."""
    device_hours: float
    """Of service with the bundle that are looked at until then."""


@functools.lru_cache(maxsize=64)
def needs(gate: Gate, period_s: int) -> tuple[Need, ...]:
    """Return by what samples a gate is expected to decide: fewer devices that are watched for longer, where that helps."""
    if not has_control(gate.metric):
        devices = bounded_needed(gate.tolerated or TOLERATED_MIN, gate.harm, gate.alpha, gate.beta)
        return (Need(devices=devices, after_s=0, device_hours=0.0),)
    found: list[Need] = []
    for lane, cap in enumerate(gate.caps(period_s)):
        hours, part = _lane_h(lane, period_s), gate.harm / cap
        if gate.metric != "crash_rate":
            devices = sample_needed(part, gate.alpha, gate.beta, lane=lane)
        elif part * STEPS < STEPS_OF_HARM_MIN:
            continue
        else:  # crashes come one by one: a device has `harm * hours` of them, and so varies
            spread = math.sqrt(gate.harm * hours) / (cap * hours)
            devices = sample_needed(part, gate.alpha, gate.beta, spread, lane, 1 / STEPS)
        if not found or devices < found[-1].devices:
            after_s = (1 << (lane + 1)) * period_s
            found.append(Need(devices=devices, after_s=after_s, device_hours=devices * hours))
    return tuple(found)


def _lane_h(lane: int, period_s: int) -> float:
    """Return how many hours the periods of a lane take."""
    return (1 << lane) * period_s / 3600
