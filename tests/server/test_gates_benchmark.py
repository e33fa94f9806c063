"""The claims of `benchmarks/gates.py` in short form: fixed seeds, so a failure is a change and never bad luck."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gates

NULL = [gates.World(seed, 1.0, devices=500, hours=24) for seed in range(40)]
BAD = {
    factor: [gates.World(1_000 + seed, factor, devices=1_000, hours=24) for seed in range(8)] for factor in (5.0, 20.0)
}


@pytest.mark.parametrize("run", [gates.adaptive, gates.staged, gates.watched])
def test_looking_every_hour_halts_hardly_any_equal_candidate(run: gates.Runner):
    assert gates.halt_rate([run(world) for world in NULL]) <= gates.ALPHA


@pytest.mark.parametrize("kind", [gates.CrashWorld, gates.AgreedWorld])
def test_gates_on_crashes_and_on_what_is_told_halt_hardly_any_equal_candidate(kind: type[gates.World]):
    fleets = [kind(seed, 1.0, devices=400, hours=24) for seed in range(25)]
    for run in gates.RUNNERS.values():
        assert gates.halt_rate([run(world) for world in fleets]) <= gates.ALPHA
    halted = [gates.adaptive(kind(1_000 + seed, 20.0, devices=1_000, hours=24)) for seed in range(4)]
    assert all(run.halted for run in halted)


def test_pooled_requests_would_halt_many_of_the_same_fleets():
    """What the unit of evidence is for: the same fleets, the same looks, a test that forgets whose requests they are."""
    halted = 0
    for world in NULL:
        split = len(world.incumbent) // 20
        errors = [0.0, 0.0]
        asked = [0.0, 0.0]
        crossed = False
        for hour in range(24):
            for side, part in enumerate((slice(0, split), slice(split, None))):
                errors[side] += float((world.incumbent * world.requests)[part, hour].sum())
                asked[side] += float(world.requests[part, hour].sum())
            pooled = sum(errors) / sum(asked)
            deviation = math.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / asked[0] + 1 / asked[1]))
            crossed = crossed or (errors[0] / asked[0] - errors[1] / asked[1]) / deviation > 1.645
        halted += crossed
    assert halted / len(NULL) > 0.3


@pytest.mark.parametrize("factor", [5.0, 20.0])
def test_a_bad_model_is_halted_on_few_devices(factor: float):
    runs = [gates.adaptive(world) for world in BAD[factor]]
    others = [gates.hawkbit(world, (gates.DEVICE_LIMITS[2], gates.equal(10), 0.3)) for world in BAD[factor]]
    assert all(run.halted for run in runs)
    assert gates.mean_exposed(runs) <= gates.mean_exposed(others) / 2


def test_tuning_takes_the_fair_setting_that_exposes_least():
    setting, rate, fair = gates.tune(gates.fleetml, [0.0, 0.99, 0.2], NULL[:5], {20.0: BAD[20.0][:3]})
    assert fair
    assert rate <= gates.ALPHA
    assert setting == 0.2
