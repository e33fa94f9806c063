"""Candidates against devices that keep the incumbent: from telemetry to a verdict, through the real director and ingest."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.fleet_kit import MODEL, PROJECT, FakeDevice, Fleet, fleet, manifest_of, run
from wherry_server import comparison
from wherry_server.evidence import Candidate, Scan, load_progress
from wherry_server.gates import QUANTILES, Gate
from wherry_server.lanes import GRACE_S, due
from wherry_server.plan import parse_plan
from wherry_server.rollout import Compared, Lane, Progress, Taken, with_taken
from wherry_server.sequential import LANES_MAX, Pairs, merge, outcome, pair_up
from wherry_server.targeting import KEY_MAX, control_rank, signed, unsigned
from wherry_server.times import now_us
from wherry_shared import wire
from wherry_shared.sketch import Sketch

pytestmark = pytest.mark.backends

PERIOD_S = 60
GATE = {"metric": "errors", "harm": 0.1}
REQUESTS = 200
PLAN = parse_plan(
    {
        "models": [{"model": "m", "version": "1.0.0", "manifest": "sha256:" + "a" * 64}],
        "selector": "all",
        "stages": [{"share": 1.0}],
        "gates": [GATE],
        "period_s": PERIOD_S,
    }
)


class Telling:
    """A fleet whose devices tell, for every period, how many of their requests failed."""

    def __init__(self, found: Fleet, rates: dict[str, float]) -> None:
        """`rates`: version → share of requests that fail."""
        self.found, self.rates = found, {manifest_of(version): rate for version, rate in rates.items()}
        self.random = random.Random(7)
        self.start = now_us() // (PERIOD_S * 1_000_000) * PERIOD_S * 1_000_000
        self.seqs: dict[str, int] = {}
        self.what: Callable[[FakeDevice], str] = lambda device: device.running
        """What of a device its rates and times go by."""
        self.medians_us: dict[str, float] = {}
        """Version → median engine time on the fastest device."""
        self.crash_shares: dict[str, float] = {}
        """Version → share of periods in which the worker dies."""
        self.agreed: dict[str, float] = {}
        """Version → share of answers to which somebody agrees, on a device that is as good as they come."""
        found.conductor.moment = lambda: self.start + int(found.seconds * 1_000_000)

    async def period(self) -> None:
        """Let a period pass in which every device answers, then let the director look."""
        at = self.start + int(self.found.seconds // PERIOD_S) * PERIOD_S * 1_000_000 + 1
        frames = [(device.id, self._telemetry(device, at)) for device in self.found.devices.values()]
        await self.found.ingest.store_batch({"telemetry": frames})
        await self.found.turn(PERIOD_S)
        for _ in range(3):
            await self.found.turn(1)
        self.found.seconds = (self.found.seconds // PERIOD_S) * PERIOD_S + GRACE_S + 5
        for _ in range(4):
            await self.found.turn(1)

    def _telemetry(self, device: FakeDevice, at: int) -> bytes:
        seq = self.seqs[device.id] = self.seqs.get(device.id, 0) + 1
        rate = self.rates[self.what(device)]
        window = wire.Window(
            model=MODEL,
            manifest=device.running,
            variant="v",
            arm="incumbent",
            start=at,
            duration_us=1_000_000,
            requests=REQUESTS,
            errors=sum(self.random.random() < rate for _ in range(REQUESTS)),
            latency_us={"3": self._latency(device).to_wire()} if self.medians_us else {},
            metrics=self._metrics(device),
        )
        died = self.random.random() < self._of(self.crash_shares, device, 0.0)
        crash = msgspec.structs.replace(window, requests=0, errors=0, latency_us={}, metrics={}, crashes=1)
        windows = [window, crash] if died else [window]
        return device.frame(
            "telemetry",
            wire.Telemetry(format=1, device=device.id, epoch="t", seq=seq, first=1, at=at, windows=windows),
        )

    def _of(self, by_version: dict[str, float], device: FakeDevice, otherwise: float) -> float:
        return {manifest_of(version): value for version, value in by_version.items()}.get(self.what(device), otherwise)

    def _metrics(self, device: FakeDevice) -> dict[str, wire.Sum]:
        share = self._of(self.agreed, device, -1) * random.Random(device.id).uniform(0.9, 1)
        told = sum(self.random.random() < share for _ in range(20))
        return {"agreed": wire.Sum(count=20, total=float(told))} if share >= 0 else {}

    def _latency(self, device: FakeDevice) -> Sketch:
        """Devices differ tenfold, and are a tenth slower or faster from window to window."""
        median = self._of(self.medians_us, device, 0.0)
        own = random.Random(device.id).uniform(1, 10) * self.random.uniform(0.9, 1.1)
        sketch = Sketch()
        for _ in range(40):
            sketch.add(median * own * self.random.uniform(0.8, 1.2))
        return sketch


def gate_of(shown: dict[str, Any], metric: str = "errors") -> dict[str, Any]:
    (found,) = [one for one in shown["gates"] if one["gate"] == metric]
    return dict(found)


def test_a_version_that_fails_requests_its_trial_lets_pass_is_halted_and_taken_back(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            telling = Telling(found, {"1.0.0": 0.02, "1.1.0": 0.4})
            number = await found.roll_out(
                "1.1.0", stages=[{"share": 0.25}, {"share": 1.0}], gates=[GATE], period_s=PERIOD_S
            )
            await found.turn()
            await found.turn()
            shown = await found.show(number)
            assert gate_of(shown)["outcome"] == "unknown"
            assert "gate_errors" in [why["code"] for why in shown["why_not_yet"]], "no data never widen"
            assert shown["stage"] == 0
            for _ in range(3):
                await telling.period()
            shown = await found.until(number, "halted")
            assert shown["reason"] == "errors_bound"
            assert shown["counts"]["real"]["exposed"] == 15
            assert {device.running for device in devices} == {manifest_of("1.0.0")}
            numbers = gate_of(shown)["numbers"]
            assert 0 < numbers["low"] < numbers["estimate"] < numbers["high"]
            assert 0.3 < numbers["estimate"] < 0.45
            assert numbers["sample"] == 15

    run(work())


def test_a_version_that_fails_no_more_than_its_control_goes_on_and_the_control_group_comes_last(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(80, version="1.0.0")
            telling = Telling(found, {"1.0.0": 0.02, "1.1.0": 0.02})
            number = await found.roll_out(
                "1.1.0", stages=[{"share": 0.5}, {"share": 1.0, "soak_s": 70}], gates=[GATE], period_s=PERIOD_S
            )
            await found.turn()
            for _ in range(6):
                await telling.period()
                shown = await found.show(number)
                if shown["stage"] == 1:
                    break
            assert gate_of(shown)["outcome"] == "pass"
            await found.turn()
            changed = [device for device in devices if device.running == manifest_of("1.1.0")]
            assert len(changed) == 76, "one in twenty is held back until it is done"
            shown = await found.show(number)
            assert (shown["state"], shown["unexposed"]) == ("running", 0)
            for _ in range(3):
                await telling.period()
            await found.until(number, "done")
            await found.turn()
            await found.turn()
            assert {device.running for device in devices} == {manifest_of("1.1.0")}
            # what the comparison saw can be replayed from the decisions
            rows = await found.rows("SELECT evidence FROM decision ORDER BY revision")
            assert sum('"taken"' in row.evidence for row in rows) >= 1

    run(work())


def test_an_adaptive_rollout_waits_for_the_comparison_and_reaches_few_devices_of_a_bad_version(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(200, version="1.0.0")
            telling = Telling(found, {"1.0.0": 0.02, "1.1.0": 0.3})
            number = await found.roll_out("1.1.0", strategy="adaptive", gates=[GATE], period_s=PERIOD_S)
            for _ in range(6):
                await found.turn()
            shown = await found.show(number)
            assert shown["counts"]["real"]["confirmed"] == 5, "all are confirmed, and none has been compared"
            assert shown["counts"]["real"]["exposed"] == 5
            for _ in range(8):
                await telling.period()
                if (await found.show(number))["state"] != "running":
                    break
            shown = await found.until(number, "halted")
            assert shown["reason"] == "errors_bound"
            assert shown["counts"]["real"]["exposed"] <= 33
            assert {device.running for device in devices} == {manifest_of("1.0.0")}

    run(work())


@pytest.mark.parametrize(("median_us", "outcome"), [(1_600.0, "breach"), (1_000.0, "pass")])
def test_a_version_is_slower_where_devices_are_slower_than_they_were(tmp_path: Path, median_us: float, outcome: str):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(80, version="1.0.0")
            telling = Telling(found, {"1.0.0": 0.0, "1.1.0": 0.0})
            telling.medians_us = {"1.0.0": 1_000.0, "1.1.0": median_us}
            for _ in range(2):
                await telling.period()
            number = await found.roll_out(
                "1.1.0",
                stages=[{"share": 0.5}, {"share": 1.0}],
                gates=[{"metric": "latency", "harm": 0.4}],
                period_s=PERIOD_S,
            )
            await found.turn()
            for _ in range(4):
                await telling.period()
                shown = await found.show(number)
                if shown["state"] != "running" or shown["stage"] == 1:
                    break
            said = gate_of(shown, "latency")
            assert said["outcome"] == outcome
            assert abs(said["numbers"]["estimate"] - (median_us / 1_000 - 1)) < 0.1
            if outcome == "breach":
                assert (await found.until(number, "halted"))["reason"] == "latency_bound"
                assert {device.running for device in devices} == {manifest_of("1.0.0")}

    run(work())


RATED = {"metric": "crash_rate", "harm": 10.0}
AGREED = {"metric": "app:agreed", "better": "higher", "harm": 0.2}
OUTCOMES = [
    # gate, what the old and the new version do, outcome, estimate, why
    (RATED, (0.05, 0.05), "pass", 0.0, "a worker that dies three times an hour, as it did before"),
    (RATED, (0.05, 0.9), "breach", 51.0, "one that dies nearly every minute"),
    (AGREED, (0.8, 0.8), "pass", 0.0, "people agree as they did"),
    (AGREED, (0.8, 0.4), "breach", 0.4, "people agree to half as many"),
    ({**AGREED, "better": "lower"}, (0.8, 0.4), "pass", -0.4, "fewer are better"),
    (AGREED, (0.8, 2.0), "pass", -0.24, "nobody may have more than the cap"),
]


@pytest.mark.parametrize(("gate", "does", "outcome", "estimate", "why"), OUTCOMES)
def test_crashes_and_what_applications_tell_are_compared(
    tmp_path: Path, gate: dict[str, Any], does: tuple[float, float], outcome: str, estimate: float, why: str
):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(120, version="1.0.0")
            telling = Telling(found, {"1.0.0": 0.0, "1.1.0": 0.0})
            known = telling.crash_shares if gate is RATED else telling.agreed
            known.update(zip(("1.0.0", "1.1.0"), does, strict=True))
            stages = [{"share": 0.5}, {"share": 1.0}]
            number = await found.roll_out("1.1.0", stages=stages, gates=[gate], period_s=PERIOD_S)
            await found.turn()
            for _ in range(7):
                await telling.period()
                shown = await found.show(number)
                if shown["state"] != "running" or shown["stage"] == 1:
                    break
            said = gate_of(shown, gate["metric"])
            assert said["outcome"] == outcome, why
            assert abs(said["numbers"]["estimate"] - estimate) < (9 if gate is RATED else 0.12), why
            if outcome == "breach":
                assert (await found.until(number, "halted"))["reason"] == f"{gate['metric']}_bound"

    run(work())


RATIOS = [
    # counts and medians per bucket before and after, ratio, why
    ({"1": (30, 100)}, {"1": (30, 150)}, 1.5, "one bucket"),
    ({"1": (30, 100), "2": (40, 400)}, {"1": (30, 150), "2": (99, 400)}, 1.25, "the mean of two"),
    ({"1": (30, 100), "2": (29, 400)}, {"1": (30, 150), "2": (99, 900)}, 1.5, "too few requests before"),
    ({"1": (30, 100)}, {"1": (29, 150)}, None, "too few requests after"),
    ({"1": (30, 100)}, {"2": (30, 150)}, None, "nothing in common"),
    ({}, {"1": (30, 150)}, None, "no time before"),
    ({"1": (30, 0)}, {"1": (30, 150)}, None, "a clock that did not move"),
]


@pytest.mark.parametrize(("before", "after", "ratio", "why"), RATIOS)
def test_latency_is_compared_within_shapes(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], ratio: float | None, why: str
):
    def sketches(side: dict[str, tuple[int, int]]) -> dict[str, Sketch]:
        made = {}
        for bucket, (count, value) in side.items():
            made[bucket] = Sketch()
            made[bucket].add(value, count)
        return made

    found = comparison.ratio_of(sketches(before), sketches(after), 0.5)
    assert found == (None if ratio is None else pytest.approx(ratio, rel=0.03)), why


def drawn(rng: random.Random, median_us: float, slow_share: float, slower: float, requests: int) -> dict[str, Sketch]:
    """Return the engine times of a device, of which a share is so many times slower than the others."""
    sketch = Sketch()
    for _ in range(requests):
        sketch.add(median_us * rng.lognormvariate(0, 0.2) * (slower if rng.random() < slow_share else 1.0))
    return {"4": sketch}


def test_a_slower_tail_is_seen_where_the_median_is_not():
    rng = random.Random(5)
    before, after = drawn(rng, 900, 0, 1, 2_000), drawn(rng, 900, 0.05, 6, 2_000)
    median, p90, p99 = (comparison.ratio_of(before, after, quantile) for quantile in QUANTILES.values())
    assert median == pytest.approx(1, rel=0.05)
    assert p90 == pytest.approx(1, rel=0.2)
    assert p99 is not None
    assert p99 > 3


@pytest.mark.parametrize(("quantile", "needed"), [(0.5, 30), (0.9, 30), (0.99, 300)])
def test_a_quantile_needs_requests_beyond_it(quantile: float, needed: int):
    rng = random.Random(6)
    few, enough = drawn(rng, 900, 0, 1, needed - 1), drawn(rng, 900, 0, 1, needed)
    assert comparison.ratio_of(enough, few, quantile) is None
    assert comparison.ratio_of(few, enough, quantile) is None
    assert comparison.ratio_of(enough, enough, quantile) == 1


@pytest.mark.parametrize("metric", ["latency_p90", "latency_p99"])
def test_a_gate_on_the_tail_halts_falsely_no_more_often_than_it_says(metric: Any):
    """Devices differ in speed and in their tail, and hours in load; every device is looked at as it comes."""
    rng = random.Random(7)
    gate = Gate(metric=metric, harm=0.5, alpha=0.1, beta=0.1)
    quantile, runs, devices = QUANTILES[gate.metric], 30, 25

    def value(hour: float, slower: float) -> float:
        median_us, slow_share = rng.uniform(300, 5_000), rng.uniform(0.12, 0.3)
        before = drawn(rng, median_us, slow_share, 3, 300)
        ratio = comparison.ratio_of(before, drawn(rng, median_us * hour, slow_share, 3 * slower, 300), quantile)
        assert ratio is not None
        return min(ratio / gate.unit, 1.0)

    def halted(slower: float) -> bool:
        lane: Pairs = ()
        for _ in range(devices):
            hour = rng.uniform(0.7, 1.6)
            lane = merge([lane, pair_up([value(hour, slower)], [value(hour, 1.0)])])
            if outcome([lane], gate.harm / gate.unit, gate.alpha, gate.beta) == "breach":
                return True
        return False

    assert sum(halted(1.0) for _ in range(runs)) <= gate.alpha * runs
    assert all(halted(3.0) for _ in range(5))


@pytest.mark.parametrize("bins", [{"x": 1}, {"5": -1}, {"999999": 1}, {"9999999": 1}])
def test_a_sketch_that_is_none_stops_nothing(bins: dict[str, int]):
    assert comparison.sketch_of(bins) is None
    assert comparison.sketch_of({"5": 3, "z": 1}) is not None


def test_a_lane_is_due_once_its_periods_and_the_grace_have_passed():
    second = 1_000_000

    def lanes(at_s: int, **waves: int) -> list[tuple[int, int, int, int]]:
        found = due(
            PLAN, Compared(waves={name.removeprefix("w"): lane for name, lane in waves.items()}), [100], at_s * second
        )
        return [(one.wave, one.lane, one.begin // second, one.end // second) for one in found]

    exposed_s = 100 * PERIOD_S
    assert lanes(exposed_s + 2 * PERIOD_S + GRACE_S - 1) == []
    first = (100, 0, exposed_s + PERIOD_S, exposed_s + 2 * PERIOD_S)
    second_lane = (100, 1, exposed_s + 2 * PERIOD_S, exposed_s + 4 * PERIOD_S)
    assert lanes(exposed_s + 2 * PERIOD_S + GRACE_S) == [first]
    assert lanes(exposed_s + 4 * PERIOD_S + GRACE_S) == [first, second_lane]
    assert lanes(exposed_s + 4 * PERIOD_S + GRACE_S, w100=1) == [second_lane]
    assert len(lanes(exposed_s + 10_000 * PERIOD_S)) == LANES_MAX


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(-256, 256), st.integers(0, KEY_MAX)), max_size=12
    )
)
def test_what_was_taken_counts_once(rows: list[tuple[int, int, int, int]]):
    taken = [
        Taken(wave=wave, lane=lane, lanes={"errors": Lane(pairs=((step, 1),), spent={"": key})})
        for wave, lane, step, key in rows
    ]
    once = with_taken(Compared(), taken)
    assert with_taken(once, [one for one in taken if one.lane < once.waves.get(str(one.wave), 0)]) == once
    assert sum(count for lane in once.of("errors") for _, count in lane.pairs) == sum(once.waves.values())
    assert len(once.of("errors")) == LANES_MAX


@given(st.integers(0, KEY_MAX), st.sampled_from([0.0, 0.05, 0.5]))
def test_progress_with_any_rank_comes_back_from_the_database(key: int, held_back: float):
    lane = Lane(pairs=((-3, 2), (7, 1)), spent={"x": control_rank(key, held_back)})
    progress = Progress(compared=Compared(lanes={"errors": [lane]}, waves={"7": 1}))
    stored = msgspec.json.decode(json.dumps(msgspec.to_builtins(progress)))
    assert load_progress(stored) == progress


@given(st.lists(st.integers(0, KEY_MAX), min_size=2, max_size=8, unique=True))
def test_whoever_is_held_back_is_the_last_control(keys: list[int]):
    held = [key for key in keys if control_rank(key, 0.05) < 0]
    assert all(key > 0.94 * KEY_MAX for key in held)
    assert all(key < 0.96 * KEY_MAX for key in keys if key not in held)
    for part in (held, [key for key in keys if key not in held]):
        assert sorted(part, key=lambda key: control_rank(key, 0.05)) == sorted(part)


@given(st.integers(0, KEY_MAX))
def test_a_key_comes_back_from_the_database(key: int):
    assert unsigned(signed(key)) == key


@pytest.mark.parametrize(
    ("gate", "unit"),
    [
        (Gate(metric="errors", harm=0.01), 0.05),
        (Gate(metric="errors", harm=0.4), 1.0),
        (Gate(metric="errors", harm=0.01, cap=0.2), 0.2),
        (Gate(metric="latency", harm=0.1), 2.0),
        (Gate(metric="latency", harm=0.5), 3.5),
        (Gate(metric="latency_p99", harm=0.5), 3.5),
    ],
)
def test_a_device_counts_for_so_much_and_no_more(gate: Gate, unit: float):
    assert gate.unit == pytest.approx(unit)


WINDOWS = [
    # device, with the candidate, period, requests, errors, arm
    ("a", True, 1, 100, 10, "candidate"),
    ("b", True, 1, 100, 100, "incumbent"),  # above the cap of 0.5
    ("c", False, 1, 100, 0, "incumbent"),
    ("d", False, 1, 50, 10, "incumbent"),
    ("d", False, 1, 50, 0, "incumbent"),  # the same period: 10 of 100
    ("e", False, 1, 0, 0, "incumbent"),  # nobody asked it
    ("f", False, 0, 100, 100, "incumbent"),  # another period
    ("g", True, 1, 100, 100, "shadow"),  # nobody got its answers
    ("a", True, 2, 100, 30, "incumbent"),
    ("a", True, 3, 100, 10, "incumbent"),
    ("c", False, 2, 100, 5, "incumbent"),  # silent in period 3
]


def test_each_device_has_the_mean_of_its_periods_as_its_value(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            names = sorted({row[0] for row in WINDOWS})
            devices = dict(zip(names, await found.enrol(len(names)), strict=True))
            seqs = dict.fromkeys(names, 0)
            frames = []
            for name, candidate, period, requests, errors, arm in WINDOWS:
                seqs[name] += 1
                at = (1_000 + period) * PERIOD_S * 1_000_000 + 5
                window = wire.Window(
                    model="m",
                    manifest=PLAN.models[0].manifest if candidate else manifest_of("1.0.0"),
                    variant="v",
                    arm=arm,  # type: ignore[arg-type]
                    start=at,
                    duration_us=1,
                    requests=requests,
                    errors=errors,
                )
                message = wire.Telemetry(
                    format=1, device=devices[name].id, epoch="t", seq=seqs[name], first=1, at=at, windows=[window]
                )
                frames.append((devices[name].id, devices[name].frame("telemetry", message)))
            await found.ingest.store_batch({"telemetry": frames})

            async def values(lane: int) -> tuple[dict[str, float], dict[str, float]]:
                at = (1_000 + (1 << (lane + 1)) + 1) * PERIOD_S * 1_000_000
                one = due(PLAN, Compared(waves={"1000": lane}), [1_000], at)[0]
                async with found.database.read() as connection:
                    row = SimpleNamespace(project_id=PROJECT)
                    both = await comparison.values(connection, row, PLAN, PLAN.gates[0], one)
                known = {device.id: name for name, device in devices.items()}
                mine, theirs = ({known[device]: round(value, 6) for device, value in side.items()} for side in both)
                return mine, theirs

            assert await values(0) == ({"a": 0.2, "b": 1.0}, {"c": 0.0, "d": 0.2})
            assert await values(1) == ({"a": 0.4}, {"c": 0.1})

    run(work())


def test_strata_are_compared_apart_and_a_lane_remembers_what_it_used():
    def member(name: str, stratum: str, key: int) -> Any:
        return SimpleNamespace(device_id=name, stratum=stratum, share_key=signed(key))

    scan = Scan(free=[Candidate(f"x{at}", 1_000 + at, "x") for at in range(4)], held=[Candidate("y0", 2_000, "y")])
    controls = {"x0": 0.0, "x1": 0.0, "x2": 0.0, "x3": 0.0, "y0": 1.0}
    wave = [member("a", "x", 1), member("b", "y", 2), member("c", "z", 3), member("d", "x", 4)]
    lane = comparison.lane_of(PLAN, Lane(), wave, scan, {"a": 1.0, "b": 1.0, "c": 1.0}, controls)
    assert lane.pairs == ((0, 1), (256, 1)), "d was not measured, and z has no control"
    assert lane.spent == {"x": 1_002, "y": 2_000}
    again = comparison.lane_of(
        PLAN, lane, [member("d", "x", 4), member("x3", "x", 1_003)], scan, dict.fromkeys(("d", "x3"), 1.0), controls
    )
    assert again.pairs == ((256, 1),)
    assert again.spent == {"x": 1_001}
