"""What telemetry says of simulated devices: a director's looks at what each one serves, drawn from the table of behaviours.

Devices of virtual time answer requests only while they judge a candidate; a rollout with controls compares for hours after
that. So what they would have measured is drawn here, from the same table and at the same rate, for whatever answers on each
device at that moment. How telemetry travels and is stored is tested where that is real; what is made of it is the engine's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from wherry_agent.children import Loadable, ServeModel
from wherry_server.comparison import BASELINE_PERIODS, ratio_of
from wherry_server.gates import APP, QUANTILES, Gate
from wherry_server.lanes import Due, period
from wherry_server.plan import Plan
from wherry_shared.clock import MICROSECONDS
from wherry_shared.sketch import Sketch
from wherry_simulators.models import Behaviours, binomial, traffic


@dataclass(slots=True)
class _Window:
    """What one device measured in one period, of the candidate or of anything else; drawn when somebody asks."""

    asked: dict[str, tuple[Loadable, float]] = field(default_factory=dict)
    """By variant: what answered, and how many requests it got that are not drawn yet."""
    requests: int = 0
    errors: int = 0
    crashes: int = 0
    latency_us: dict[str, Sketch] = field(default_factory=dict)


def measures(gate: Gate) -> bool:
    """Tell whether simulated devices measure what a gate compares: no application tells them numbers."""
    return not gate.metric.startswith(APP)


class Meter:
    """The windows of one rollout's devices."""

    def __init__(self, plan: Plan, behaviours: Behaviours, requests_per_s: float, source: random.Random) -> None:
        self._plan = plan
        (self._planned,) = plan.models
        self._behaviours = behaviours
        self._requests_per_s = requests_per_s
        self._random = source
        self._timed = any(gate.metric in QUANTILES for gate in plan.compared)
        self._windows: dict[tuple[str, bool], dict[int, _Window]] = {}
        """(device, whether the candidate answered) → period → what was measured."""

    def look(self, devices: Mapping[str, Mapping[str, ServeModel]], now_us: int, seconds: float) -> None:
        """Add what every device measured in the last `seconds`; `devices`: what each one serves, by model."""
        at = period(self._plan, now_us - round(seconds * MICROSECONDS))
        for name, device in devices.items():
            serving = device.get(self._planned.model)
            if serving is None:
                continue
            for loadable, share in _answering(serving):
                candidate = loadable.manifest == self._planned.manifest
                window = self._windows.setdefault((name, candidate), {}).setdefault(at, _Window())
                before = window.asked.get(loadable.digest, (loadable, 0.0))[1]
                window.asked[loadable.digest] = (loadable, before + self._requests_per_s * seconds * share)

    def sides(self, gate: Gate, one: Due) -> tuple[dict[str, float], dict[str, float]]:
        """Return the value of each device in a lane as `comparison` reads it: with the candidate, and with anything else."""
        sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
        length = self._plan.period_s * MICROSECONDS
        lane = range(one.begin // length, one.end // length)
        for (device, candidate), windows in self._windows.items():
            found = [self._drawn(device, windows[at]) for at in lane if at in windows]
            value = self._value(gate, one, device, found) if found else None
            if value is not None:
                sides[0 if candidate else 1][device] = value
        return sides

    def _drawn(self, device: str, window: _Window) -> _Window:
        for loadable, requests in window.asked.values():
            behaviour = self._behaviours.variant(device, loadable)
            # a crash ends one worker of many in a period, and not its requests
            drawn = traffic(self._random, msgspec.structs.replace(behaviour, crash_per_request=0.0), round(requests))
            window.requests += drawn.requests
            window.errors += drawn.errors
            window.crashes += binomial(self._random, round(requests), behaviour.crash_per_request)
            for bucket, value, times in drawn.latencies if self._timed else ():
                window.latency_us.setdefault(bucket, Sketch()).add(value, times)
        window.asked.clear()
        return window

    def _value(self, gate: Gate, one: Due, device: str, found: list[_Window]) -> float | None:
        if gate.metric in QUANTILES:
            before = self._windows.get((device, False), {})
            known = [
                self._drawn(device, before[at]) for at in range(one.wave - BASELINE_PERIODS, one.wave) if at in before
            ]
            ratio = ratio_of(_merged(known), _merged(found), QUANTILES[gate.metric])
            return None if ratio is None else min(ratio / gate.unit, 1.0)
        if gate.metric == "crash_rate":
            hours = len(found) * self._plan.period_s / 3600
            return min(sum(window.crashes for window in found) / hours / gate.caps(self._plan.period_s)[one.lane], 1.0)
        shares = [min(window.errors / (window.requests * gate.unit), 1.0) for window in found if window.requests]
        return sum(shares) / len(shares) if shares else None


def _answering(serving: ServeModel) -> list[tuple[Loadable, float]]:
    """Return what answers requests, and which share of them; a shadow answers none."""
    split = bool(serving.trial) and serving.mode != "replace" and serving.incumbent is not None
    if not split or serving.incumbent is None:
        return [(serving.active, 1.0)]
    share = 0.0 if serving.mode == "shadow" else serving.share
    return [(one, part) for one, part in ((serving.active, share), (serving.incumbent, 1.0 - share)) if part > 0]


def _merged(windows: Iterable[_Window]) -> dict[str, Sketch]:
    found: dict[str, Sketch] = {}
    for window in windows:
        for bucket, sketch in window.latency_us.items():
            found.setdefault(bucket, Sketch()).merge(sketch)
    return found
