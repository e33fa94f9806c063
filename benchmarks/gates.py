"""False halts, and devices exposed before a bad model is halted, of Wherry's gate and of three rules in use elsewhere.

One fleet for all: devices whose error rates follow a beta distribution (their standard deviation is 1.4 times the mean), whose
number of requests differs by an order of magnitude, and all of whose rates rise and fall by the hour. A candidate multiplies
the error rate of the devices that have it. Every rule looks once an hour, at everything that is known by then.

- **Wherry** judges request errors of candidates against devices that keep the incumbent (`sequential.compare`; smallest
  harm that matters: half as many errors again) and exposes as many devices as `sequential.may_expose` allows (at most
  `HARMED_MAX` harmed ones expected), up to half of the fleet until the gate passes, then all but the hold-back. No device
  is caught by its own trial, which would only help.
- **hawkBit** (`ThresholdRolloutGroupErrorCondition`): groups one after the other, the next once the share of finished devices
  reaches the success threshold; halts when failed / *all* devices of a group exceeds the error threshold.
- **Greengrass** (IoT Jobs abort criteria): devices at a rate that doubles with their successes; halts when at least
  `minNumberOfExecutedThings` have ended and the share of failed ones reaches `thresholdPercentage`.
- **FleetML** (`CanaryManager.EvaluateStage`): 5 %, 50 %, 100 %; at the end of a stage's time it goes back if more than 20 % of
  the devices in it failed, else the next stage starts.

These three know failed devices only. So each device judges itself after its first hour: it failed if its error rate
is above a limit. That limit is theirs to choose, and so are thresholds, minimum counts, group sizes and rates (FleetML's 20 %
is fixed): of all settings in `*_SETTINGS`, each rule gets the one that exposes the fewest devices over all harms among
those whose false-halt rate, on fleets of its own, is at most alpha. The tuning sees the very fleets' parameters, as no
operator would. A run that does not halt counts the devices that have the candidate at its end: all, for these three.
Ratios compare sums over `FACTORS`; `by_factor` has them apart.

Two more fleets, on which the other rules have no equal, measure the same of gates on crashes of workers per hour (`CrashWorld`: rates
differ a hundredfold and drift) and on what applications tell (`AgreedWorld`: the share of answers to which people agree, which differs by
device, drifts by the hour, and is told of a few answers only). `false_halt_rate` is the largest of all.

    python benchmarks/gates.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wherry_server import sequential
from wherry_server.gates import Gate
from wherry_server.rollout import UNPROVED_SHARE_MAX

OUT = Path(__file__).parents[1] / "build" / "bench" / "gates.json"
DEVICES = 2_000
HOURS = 48
ALPHA = BETA = 0.05
ERROR_RATE = 0.01
"""Mean of the devices' error rates."""
HARM = ERROR_RATE / 2
"""The smallest harm that matters: half as many errors again. (Where the hour halves all rates, it halves a doubling too.)"""
CAP = 5 * ERROR_RATE
HARMED_MAX = 5.0
HOLD_BACK = 0.05
FACTORS = (2.0, 5.0, 20.0)
MORE_NULL_MAX, MORE_BAD_MAX = 500, 50
"""Fleets of each further gate: enough to tell a false-halt rate of 5 % from 8 %."""
HOUR_S = 3_600
ERRORS = Gate(metric="errors", harm=HARM, cap=CAP, alpha=ALPHA, beta=BETA)
CRASHES = Gate(metric="crash_rate", harm=0.02, alpha=ALPHA, beta=BETA)
CRASH_RATE = 0.02
"""Mean of the devices' crashes per hour."""
AGREED = Gate(metric="app:agreed", harm=0.1, better="higher", alpha=ALPHA, beta=BETA)
WRONG = 0.1
"""Mean of the devices' shares of answers to which people do not agree."""
Floats = NDArray[np.float64]


# --- fleets -------------------------------------------------------------------------------------


@dataclass
class World:
    """One fleet over time; devices are in the order of their keys."""

    seed: int
    factor: float
    devices: int = DEVICES
    hours: int = HOURS
    incumbent: Floats = field(init=False)
    """(device, hour): error rate as measured with the incumbent."""
    candidate: Floats = field(init=False)
    requests: Floats = field(init=False)

    def __post_init__(self) -> None:
        """Draw devices, hours, requests and errors."""
        random = np.random.default_rng(self.seed)
        rate = random.beta(0.5, 0.5 / ERROR_RATE - 0.5, self.devices)
        busy = np.exp(random.normal(4.5, 1.0, self.devices))
        drift = self._drift(random)
        requests = random.poisson(np.clip(busy, 5, 2_000)[:, None], (self.devices, self.hours)) + 1
        expected = rate[:, None] * drift[None, :]
        self.incumbent = random.binomial(requests, np.clip(expected, 0, 1)) / requests
        self.candidate = random.binomial(requests, np.clip(expected * self.factor, 0, 1)) / requests
        self.requests = requests.astype(np.float64)

    @property
    def gate(self) -> Gate:
        """What judges this fleet."""
        return ERRORS

    def values(self, cells: Floats, lane: int) -> list[float]:
        """Return the value of each device in a lane, of the lane's cap; `cells`: (device, hour)."""
        cap = self.gate.caps(HOUR_S)[lane]
        values: list[float] = np.minimum(cells / cap, 1.0).mean(axis=1).tolist()
        return values

    def _drift(self, random: np.random.Generator) -> Floats:
        """Return by what the hours multiply: a day's rhythm, and a walk."""
        hour = np.arange(self.hours) + random.uniform(0, 24)
        drift: Floats = np.exp(0.7 * np.sin(hour * math.tau / 24) + np.cumsum(random.normal(0, 0.05, self.hours)))
        return drift


class CrashWorld(World):
    """Workers that crash: few times, on most devices hardly ever, on some often."""

    def __post_init__(self) -> None:
        """Draw devices, hours and crashes."""
        random = np.random.default_rng(self.seed)
        rate = random.gamma(0.3, CRASH_RATE / 0.3, self.devices)
        expected = rate[:, None] * self._drift(random)[None, :]
        self.incumbent = random.poisson(expected).astype(np.float64)
        self.candidate = random.poisson(expected * self.factor).astype(np.float64)
        self.requests = np.ones_like(self.incumbent)

    @property
    def gate(self) -> Gate:
        """What judges this fleet."""
        return CRASHES

    def values(self, cells: Floats, lane: int) -> list[float]:
        """Return crashes per hour over the lane, of its cap."""
        values: list[float] = np.minimum(cells.mean(axis=1) / CRASHES.caps(HOUR_S)[lane], 1.0).tolist()
        return values


class AgreedWorld(World):
    """People who agree or not to a few answers of each device an hour."""

    def __post_init__(self) -> None:
        """Draw devices, hours and verdicts."""
        random = np.random.default_rng(self.seed)
        wrong = random.beta(0.8, 0.8 / WRONG - 0.8, self.devices)[:, None] * self._drift(random)[None, :]
        told = random.poisson(4.0, (self.devices, self.hours)) + 1
        self.incumbent = random.binomial(told, 1 - np.clip(wrong, 0, 1)) / told
        self.candidate = random.binomial(told, 1 - np.clip(wrong * self.factor, 0, 1)) / told
        self.requests = told.astype(np.float64)

    @property
    def gate(self) -> Gate:
        """What judges this fleet."""
        return AGREED

    def values(self, cells: Floats, lane: int) -> list[float]:
        """Return the mean of the hours' means as the gate sees it: 1 is the worst."""
        del lane  # the cap is the same in all
        values: list[float] = (1 - np.clip(cells, AGREED.floor, AGREED.most)).mean(axis=1).tolist()
        return values


@dataclass
class Run:
    """How a rollout went."""

    exposed: int
    halted: bool
    hours: int


# --- Wherry -------------------------------------------------------------------------------------


@dataclass
class Waves:
    """Who was exposed in which hour, and the differences by lane; what the director keeps, as arrays."""

    world: World
    exposed: int = 0
    waves: list[tuple[int, int, int]] = field(default_factory=list)
    """(hour, from, to) in the order of keys."""
    lanes: list[sequential.Pairs] = field(default_factory=lambda: [()] * sequential.LANES_MAX)
    spent: list[int] = field(default_factory=list)
    """By lane: controls are taken from the highest rank downwards, and never again."""

    def __post_init__(self) -> None:
        """Start with no control used."""
        self.spent = [self.world.devices] * sequential.LANES_MAX

    def expose(self, hour: int, count: int, most: int) -> None:
        """Expose the next devices by key."""
        following = min(self.exposed + count, most)
        if following > self.exposed:
            self.waves.append((hour, self.exposed, following))
            self.exposed = following

    def measure(self, hour: int) -> None:
        """Take the values of lanes that end with this hour."""
        for start, first, after in self.waves:
            age = hour - start
            lane = sequential.lane_of(age)
            if lane < sequential.LANES_MAX and sequential.lane_of(age + 1) > lane:
                self._lane(lane, hour - 2**lane + 1, hour + 1, first, after)

    def _lane(self, lane: int, begin: int, end: int, first: int, after: int) -> None:
        """Compare a wave with devices that were not exposed by the end of the lane, and not used in it."""
        mine = self.world.values(self.world.candidate[first:after, begin:end], lane)
        theirs = self.world.values(self.world.incumbent[self.exposed :, begin:end], lane)
        held_back = self.world.devices - math.ceil(HOLD_BACK * self.world.devices)
        pairs, self.spent[lane] = sequential.draw(
            list(enumerate(mine, first)),
            [
                (at if at < held_back else at - self.world.devices, value)
                for at, value in enumerate(theirs, self.exposed)
            ],
            self.spent[lane],
        )
        self.lanes[lane] = sequential.merge((self.lanes[lane], pairs))

    def judge(self) -> sequential.Outcome:
        """Judge everything so far."""
        gate = self.world.gate
        return sequential.outcome(self.lanes, gate.harm, gate.alpha, gate.beta, gate.caps(HOUR_S))


def adaptive(world: World) -> Run:
    """Widen as the expected harm allows, to all once the gate passes."""
    waves, most = Waves(world), world.devices - math.ceil(HOLD_BACK * world.devices)
    waves.expose(0, _allowed(0, 0), most)
    for hour in range(world.hours):
        judged = waves.exposed
        waves.measure(hour)
        found = waves.judge()
        if found == "breach":
            return Run(waves.exposed, halted=True, hours=hour + 1)
        if found == "pass":
            waves.expose(hour + 1, most, most)
        else:
            waves.expose(hour + 1, _allowed(waves.exposed, judged), int(UNPROVED_SHARE_MAX * world.devices))
    return Run(waves.exposed, halted=False, hours=world.hours)


def _allowed(exposed: int, judged: int) -> int:
    return sequential.may_expose(bound=HARMED_MAX, exposed=exposed, bad=0, good=judged, error=BETA)


def staged(world: World, shares: tuple[float, ...] = (0.05, 0.5, 1.0)) -> Run:
    """The same gate between fixed stages: `unknown` never widens."""
    waves, most, stage = Waves(world), world.devices - math.ceil(HOLD_BACK * world.devices), 0
    waves.expose(0, math.ceil(shares[0] * world.devices), most)
    for hour in range(world.hours):
        waves.measure(hour)
        found = waves.judge()
        if found == "breach":
            return Run(waves.exposed, halted=True, hours=hour + 1)
        if found == "pass" and stage + 1 < len(shares):
            stage += 1
            waves.expose(hour + 1, math.ceil(shares[stage] * world.devices) - waves.exposed, most)
    return Run(waves.exposed, halted=False, hours=world.hours)


def watched(world: World) -> Run:
    """A stage of 5 % that is looked at every hour and never widened: as many looks as can be."""
    waves = Waves(world)
    waves.expose(0, world.devices // 20, world.devices)
    for hour in range(world.hours):
        waves.measure(hour)
        if waves.judge() == "breach":
            return Run(waves.exposed, halted=True, hours=hour + 1)
    return Run(waves.exposed, halted=False, hours=world.hours)


RUNNERS: dict[str, Callable[[World], Run]] = {"adaptive": adaptive, "staged": staged, "watched": watched}


# --- the other rules ----------------------------------------------------------------------------

DEVICE_LIMITS = tuple(ERROR_RATE * times for times in (2, 3, 5, 8, 12, 20))
PERCENTAGES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
Rule = Callable[[World, Any], Run]
Runner = Callable[[World], Run]


def hawkbit(world: World, setting: tuple[float, tuple[float, ...], float]) -> Run:
    """Groups one after the other; failed over all devices of the group. All devices of a group end in an hour."""
    limit, groups, threshold = setting
    exposed = 0
    for hour, share in enumerate(groups):
        following = math.ceil(share * world.devices)
        failed = int((world.candidate[exposed:following, hour] > limit).sum())
        if failed / (following - exposed) > threshold:
            return Run(following, halted=True, hours=hour + 1)
        exposed = following
    return Run(world.devices, halted=False, hours=len(groups))


def equal(count: int) -> tuple[float, ...]:
    """Return the shares at which groups of equal size end."""
    return tuple((at + 1) / count for at in range(count))


HAWKBIT_SETTINGS = list(
    itertools.product(
        DEVICE_LIMITS, (equal(5), equal(10), equal(20), (0.05, 0.5, 1.0), (0.01, 0.05, 0.25, 1.0)), PERCENTAGES
    )
)


def greengrass(world: World, setting: tuple[float, int, int, float]) -> Run:
    """A rate that doubles with successes; failed over ended devices, from a minimum on."""
    limit, rate, minimum, threshold = setting
    exposed = failed = 0
    for hour in range(world.hours):
        following = min(exposed + rate, world.devices)
        failed += int((world.candidate[exposed:following, hour] > limit).sum())
        exposed = following
        if exposed >= minimum and failed / exposed >= threshold:
            return Run(exposed, halted=True, hours=hour + 1)
        if exposed == world.devices:
            break
        rate *= 2
    return Run(world.devices, halted=False, hours=hour + 1)


GREENGRASS_SETTINGS = list(itertools.product(DEVICE_LIMITS, (10, 20, 50, 100), (10, 20, 50, 100, 200), PERCENTAGES))


def fleetml(world: World, setting: float) -> Run:
    """Three stages; failed over all devices so far, at the end of a stage, against 20 %."""
    exposed = failed = 0
    for hour, share in enumerate((0.05, 0.5, 1.0)):
        following = math.ceil(share * world.devices)
        failed += int((world.candidate[exposed:following, hour] > setting).sum())
        exposed = following
        if failed / exposed > 0.2:
            return Run(exposed, halted=True, hours=hour + 1)
    return Run(world.devices, halted=False, hours=3)


FLEETML_SETTINGS = list(DEVICE_LIMITS)


# --- measuring ----------------------------------------------------------------------------------


def worlds(first: int, count: int, factor: float, hours: int = HOURS) -> Iterator[World]:
    """Make fleets, each once."""
    return (World(first + seed, factor, hours=hours) for seed in range(count))


def more_gates(*, null: int, bad: int) -> dict[str, Any]:
    """Measure gates that the other rules know nothing like."""
    found: dict[str, Any] = {}
    for kind in (CrashWorld, AgreedWorld):
        false_halts = dict.fromkeys(RUNNERS, 0)
        for seed in range(null):
            world = kind(60_000_000 + seed, 1.0)
            for name, run in RUNNERS.items():
                false_halts[name] += run(world).halted
        harmed = {factor: [adaptive(kind(70_000_000 + seed, factor)) for seed in range(bad)] for factor in FACTORS}
        gate = kind(0, 1.0, devices=1, hours=1).gate
        found[gate.metric] = {
            "harm": gate.harm,
            "false_halt_rates": {name: count / null for name, count in false_halts.items()},
            "exposed": {str(factor): mean_exposed(runs) for factor, runs in harmed.items()},
            "not_halted": {str(factor): 1 - halt_rate(runs) for factor, runs in harmed.items()},
        }
    return found


def halt_rate(runs: list[Run]) -> float:
    """Return the share of runs that halted."""
    return sum(run.halted for run in runs) / len(runs)


def mean_exposed(runs: list[Run]) -> float:
    """Return the mean number of devices that had the candidate when the rollout halted."""
    return sum(run.exposed for run in runs) / len(runs)


def tune(rule: Rule, settings: list[Any], null: list[World], bad: dict[float, list[World]]) -> tuple[Any, float, bool]:
    """Return the best setting for a rule, its false-halt rate while tuning, and whether that is at most alpha."""
    rates = [(halt_rate([rule(world, setting) for world in null]), setting) for setting in settings]
    fair = [(rate, setting) for rate, setting in rates if rate <= ALPHA]
    if not fair:
        rate, setting = min(rates, key=lambda one: one[0])
        return setting, rate, False
    exposures = [
        (sum(mean_exposed([rule(world, setting) for world in group]) for group in bad.values()), rate, setting)
        for rate, setting in fair
    ]
    _, rate, setting = min(exposures, key=lambda one: one[0])
    return setting, rate, True


def measure(*, null: int, bad: int, tuning: int) -> dict[str, Any]:
    """Measure everything; the arguments are numbers of fleets."""
    false_halts = dict.fromkeys(RUNNERS, 0)
    for world in worlds(10_000_000, null, 1.0):
        for name, run in RUNNERS.items():
            false_halts[name] += run(world).halted
    exposed: dict[str, dict[float, float]] = {name: {} for name in ("adaptive", "staged")}
    missed: dict[str, dict[float, float]] = {name: {} for name in ("adaptive", "staged")}
    detection: dict[float, float] = {}
    test_worlds = {factor: list(worlds(20_000_000, bad, factor)) for factor in FACTORS}
    for factor, group in test_worlds.items():
        for name, run in (("adaptive", adaptive), ("staged", staged)):
            runs = [run(world) for world in group]
            exposed[name][factor] = mean_exposed(runs)
            missed[name][factor] = 1 - halt_rate(runs)
            if name == "adaptive":
                detection[factor] = float(np.median([run.hours for run in runs]))
    tuning_null = list(worlds(30_000_000, tuning, 1.0, hours=24))
    tuning_bad = {factor: list(worlds(40_000_000, max(tuning // 4, 5), factor, hours=24)) for factor in FACTORS}
    others: dict[str, Any] = {}
    rules: tuple[tuple[str, Rule, list[Any]], ...] = (
        ("hawkbit", hawkbit, HAWKBIT_SETTINGS),
        ("greengrass", greengrass, GREENGRASS_SETTINGS),
        ("fleetml", fleetml, FLEETML_SETTINGS),
    )
    fresh_null = list(worlds(50_000_000, tuning, 1.0, hours=24))
    for name, rule, settings in rules:
        setting, tuned_rate, equal = tune(rule, settings, tuning_null, tuning_bad)
        results = {factor: [rule(world, setting) for world in group] for factor, group in test_worlds.items()}
        others[name] = {
            "setting": setting,
            "false_halt_rate_tuned": tuned_rate,
            "false_halt_rate": halt_rate([rule(world, setting) for world in fresh_null]),
            "at_most_alpha": equal,
            "exposed": {str(factor): mean_exposed(runs) for factor, runs in results.items()},
            "not_halted": {str(factor): 1 - halt_rate(runs) for factor, runs in results.items()},
        }
    ours = sum(exposed["adaptive"].values())
    more = more_gates(null=min(null, MORE_NULL_MAX), bad=min(bad, MORE_BAD_MAX))
    rates = [count / null for count in false_halts.values()]
    rates += [rate for one in more.values() for rate in one["false_halt_rates"].values()]
    return {
        "false_halt_rate": max(rates),
        "alpha": ALPHA,
        **{f"exposure_ratio_to_{name}": ours / sum(found["exposed"].values()) for name, found in others.items()},
        "by_factor": {
            name: {str(factor): exposed["adaptive"][factor] / found["exposed"][str(factor)] for factor in FACTORS}
            for name, found in others.items()
        },
        "false_halt_rates": {name: count / null for name, count in false_halts.items()},
        "fleets": {"null": null, "bad": bad, "tuning": tuning, "devices": DEVICES, "hours": HOURS},
        "wherry": {
            name: {
                "exposed": {str(factor): value for factor, value in exposed[name].items()},
                "not_halted": {str(factor): value for factor, value in missed[name].items()},
            }
            for name in exposed
        },
        "median_hours_to_halt": {str(factor): hours for factor, hours in detection.items()},
        "more_gates": more,
        "pairs_needed": sequential.sample_needed(HARM / CAP, ALPHA, BETA),
        "others": others,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer fleets, under a minute of CPU")
    quick = parser.parse_args().quick
    result = measure(null=100, bad=20, tuning=40) if quick else measure(null=2_000, bad=200, tuning=300)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
