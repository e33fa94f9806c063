"""Gates turn counts of devices into a verdict. Pure.

The unit is the device. A gate that has too little to go by says `unknown`, which never widens a rollout: no data is not
success. A `Bound` is a fixed threshold, right where somebody knows what is too much at once. A `Gate` has stated errors: it
decides as soon as the evidence allows, at every look, and says in numbers why (`sequential`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import msgspec

from wherry_server.sequential import Finding, Pairs, bounded, compare
from wherry_server.targeting import exact
from wherry_shared.errors import RefusedError

COUNT_MAX = 10_000_000
TOLERATED_MIN = 0.0001
HARM_MIN = 0.001
HARM_OF_CAP_MAX = 0.9
ERROR_MIN, ERROR_MAX = 1e-6, 0.5
CAP_TIMES = 5
"""Unless a gate says otherwise, a device counts for at most so many times the harm that matters."""
LATENCY_CAP_MIN = 2.0
"""The same for latency, whose values are ratios around 1: at least this, by default."""
LATENCY_CAP_MAX = 100.0
Metric = Literal["failed", "returned", "crashed", "errors", "latency", "latency_p90", "latency_p99"]
QUANTILES: dict[Metric, float] = {"latency": 0.5, "latency_p90": 0.9, "latency_p99": 0.99}
"""Metrics of engine time, with the quantile that each one compares."""
COMPARED: frozenset[Metric] = frozenset({"errors", *QUANTILES})
"""Metrics that compare devices with the candidate with devices that keep the incumbent."""


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is too much: more than `count` devices at once, or more than `share` of at least `sample_min`.

    Where fewer than `sample_min` devices exist at all, all of them are the sample.
    """

    count: int | None = None
    share: float | None = None
    sample_min: int = 1


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A metric that is held to what is tolerated, or to a control, with stated errors.

    `failed` are devices that failed for a reason that speaks against the bundle, `returned` those of them that went back
    from a trial, `crashed` those whose worker or canary crashed. `errors` is the share of its requests that a device fails,
    `latency` its median engine time over its own median before the wave, `latency_p90` and `latency_p99` the same of the
    time within which 90 and 99 of 100 requests are done; all are compared with devices that keep the incumbent.
    """

    metric: Metric
    harm: float
    """The smallest harm that matters: how much more than what is tolerated, or than the control."""
    tolerated: float | None = None
    """Share of devices up to which a halt would be false; of metrics without a control."""
    cap: float | None = None
    """Of metrics with a control: a device that has more counts as if it had this (default: see `unit`)."""
    alpha: float = 0.05
    """Probability of ever halting a bundle that does no harm, at most."""
    beta: float = 0.05
    """Probability of ever passing a bundle that does the harm, at most."""

    @property
    def unit(self) -> float:
        """The cap that holds."""
        if self.cap is not None:
            return self.cap
        if self.metric in QUANTILES:
            return max(LATENCY_CAP_MIN, 1 + CAP_TIMES * self.harm)
        return min(CAP_TIMES * self.harm, 1.0)


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


def threshold(gate: str, bound: Bound, *, bad: int, judged: int, population: int) -> Verdict:
    """Judge `bad` of `judged` devices, out of a `population` of which the others may still answer."""
    needed = min(bound.sample_min, population)
    outcome: Literal["pass", "breach", "unknown"]
    if bound.count is not None and bad > bound.count:
        outcome = "breach"
    elif judged < max(needed, 1):
        outcome = "unknown"
    elif bound.share is not None and bad > exact(bound.share) * judged:
        outcome = "breach"
    else:
        outcome = "pass"
    return Verdict(gate=gate, outcome=outcome, bad=bad, judged=judged, needed=needed)


def check_gate(gate: Gate) -> None:
    """Refuse a gate that could not decide.

    Raises:
        RefusedError: `plan_gate`.
    """
    what = f"gate {gate.metric}"
    if gate.metric in COMPARED:
        if gate.tolerated is not None:
            raise RefusedError("plan_gate", f"{what}: it has a control, so nothing is tolerated beside it")
        base, most = (1.0, LATENCY_CAP_MAX) if gate.metric in QUANTILES else (0.0, 1.0)
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


def share(gate: Gate, *, bad: int, good: int, under_way: int, quiet: int) -> Verdict:
    """Judge devices by what became of them; see `sequential.bounded` for what each count means."""
    found = bounded(
        bad=bad,
        good=good,
        under_way=under_way,
        quiet=quiet,
        tolerated=gate.tolerated or TOLERATED_MIN,
        harm=gate.harm,
        alpha=gate.alpha,
        beta=gate.beta,
    )
    return Verdict(
        gate=gate.metric, outcome=found.outcome, bad=bad, judged=bad + good, needed=found.needed, numbers=found
    )


def control(gate: Gate, lanes: Sequence[Pairs]) -> Verdict:
    """Judge differences between candidates and controls, by lane; see `sequential.compare`."""
    unit = gate.unit
    found = _compare(tuple(lanes), gate.harm / unit, gate.alpha, gate.beta)
    found = msgspec.structs.replace(found, estimate=found.estimate * unit, low=found.low * unit, high=found.high * unit)
    return Verdict(
        gate=gate.metric, outcome=found.outcome, bad=0, judged=found.sample, needed=found.needed, numbers=found
    )


@functools.lru_cache(maxsize=256)
def _compare(lanes: tuple[Pairs, ...], harm: float, alpha: float, beta: float) -> Finding:
    """Judge; a rollout is looked at every second, and its pairs change once a period."""
    return compare(lanes, harm, alpha, beta)
