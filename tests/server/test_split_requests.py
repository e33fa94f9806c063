"""A split of requests: each device is its own control, in latency too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.server.fleet_kit import MODEL, FakeDevice, fleet, manifest_of, run
from tests.server.test_comparison import PERIOD_S, Telling, drawn, gate_of
from wherry_server import comparison
from wherry_server.gates import QUANTILES, Gate
from wherry_server.sequential import Pairs, merge, outcome, pair_up
from wherry_shared import wire


@pytest.mark.parametrize("metric", ["latency", "latency_p99"])
def test_a_split_of_requests_halts_falsely_no_more_often_than_it_says(metric: Any):
    """A fifth of each device's requests against the other four; both over what the device took an hour before."""
    rng = random.Random(11)
    gate = Gate(metric=metric, harm=0.5, alpha=0.1, beta=0.1)
    quantile, runs, devices = QUANTILES[gate.metric], 15, 20

    def halted(slower: float) -> bool:
        lane: Pairs = ()
        for _ in range(devices):
            median_us, slow_share, hour = rng.uniform(300, 5_000), rng.uniform(0.12, 0.3), rng.uniform(0.7, 1.6)
            before = drawn(rng, median_us, slow_share, 3, 300)
            sides = [(median_us * hour * slower, 300), (median_us * hour, 1_200)]
            ratios = [
                comparison.ratio_of(before, drawn(rng, median, slow_share, 3, many), quantile) for median, many in sides
            ]
            mine, theirs = [min((ratio or 0) / gate.unit, 1.0) for ratio in ratios]
            lane = merge([lane, pair_up([mine], [theirs])])
            if outcome([lane], gate.harm / gate.unit, gate.alpha, gate.beta) == "breach":
                return True
        return False

    assert sum(halted(1.0) for _ in range(runs)) <= gate.alpha * runs
    assert all(halted(3.0) for _ in range(3))


class Splitting(Telling):
    """Devices that answer half of their requests with a version beside what they run."""

    beside = ""

    def _telemetry(self, device: FakeDevice, at: int) -> bytes:
        if not self.beside:
            return super()._telemetry(device, at)
        seq = self.seqs[device.id] = self.seqs.get(device.id, 0) + 1
        windows = []
        for manifest, arm in ((device.running, "incumbent"), (manifest_of(self.beside), "candidate")):
            self.what = lambda _, shown=manifest: shown
            bins = self._latency(device).to_wire()
            common = {"model": MODEL, "manifest": manifest, "variant": "v", "arm": arm, "start": at}
            windows.append(wire.Window(**common, duration_us=1_000_000, requests=40, latency_us={"3": bins}))
        what = {"device": device.id, "epoch": "t", "seq": seq, "first": 1, "at": at}
        return device.frame("telemetry", wire.Telemetry(format=1, **what, windows=windows))


@pytest.mark.parametrize(("median_us", "reason"), [(1_600.0, "latency_bound"), (1_000.0, "split_same")])
def test_a_split_of_requests_compares_each_device_with_itself(tmp_path: Path, median_us: float, reason: str):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            telling = Splitting(found, {"1.0.0": 0.0, "1.1.0": 0.0})
            telling.medians_us = {"1.0.0": 1_000.0, "1.1.0": median_us}
            for _ in range(2):
                await telling.period()
            number = await found.roll_out(
                "1.1.0",
                strategy="split",
                split={"for_s": 5 * PERIOD_S, "by": "requests", "same": "back"},
                gates=[{"metric": "latency", "harm": 0.4}],
                period_s=PERIOD_S,
                stages=[{"share": 1.0, "soak_s": 5 * PERIOD_S}],
            )
            telling.beside = "1.1.0"
            for _ in range(8):
                await telling.period()
                shown = await found.show(number)
                if shown["state"] in ("halted", "reverted", "returning"):
                    break
            said = gate_of(shown, "latency")
            assert abs(said["numbers"]["estimate"] - (median_us / 1_000 - 1)) < 0.1
            assert shown["reason"] == reason
            await found.until(number, "halted" if median_us > 1_000 else "reverted")
            assert {device.running for device in devices} == {manifest_of("1.0.0")}

    run(work())
