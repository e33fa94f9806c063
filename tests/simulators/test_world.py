from __future__ import annotations

import pytest

from wherry_simulators import scenarios
from wherry_simulators.scenarios import behaviours, downs, engines, groups, modes, rollouts, trouble, wear
from wherry_simulators.world import World

SEEDS = 12
SEEDS_LONG = 40
FOUND = (
    # a canary of which nothing was heard was held against a good candidate; a storm kept the first version away
    ("a shadow becomes a split", 2),
    ("a shadow becomes a split", 5),
    ("a shadow becomes a split", 34),
    # a worker told the same twice, and then to drop it, still had in memory what was collected from the disk
    ("through a storm", 47),
)
"""Worlds in which something was found, part of the scenario's name and seed."""


def explain(result):
    return f"{result.scenario}, seed {result.seed}:\n" + "\n".join(str(violation) for violation in result.violations)


QUIET = (*behaviours.TABLE, *modes.TABLE, *groups.TABLE, *downs.TABLE, *wear.TABLE, *engines.MISSING)


@pytest.mark.parametrize("scenario", QUIET, ids=lambda row: row.name)
def test_with_nothing_going_wrong(scenario):
    for seed in range(2):
        result = World(scenario, seed).run()
        assert not result.violations, explain(result)


@pytest.mark.parametrize("scenario", trouble.TABLE[1:], ids=lambda row: row.name)
def test_through_trouble(scenario):
    for seed in range(2):
        result = World(scenario, seed).run()
        assert not result.violations, explain(result)


@pytest.mark.parametrize("scenario", engines.REPLACED, ids=lambda row: row.name)
def test_while_engines_come_and_go(scenario):
    result = World(scenario, 0).run()
    assert not result.violations, explain(result)


@pytest.mark.parametrize("scenario", rollouts.TABLE, ids=lambda row: row.name)
def test_in_stages_by_the_real_rollout_engine(scenario):
    result = World(scenario, 0).run()
    assert not result.violations, explain(result)


@pytest.mark.parametrize("seeds", [SEEDS, pytest.param(SEEDS_LONG, marks=pytest.mark.soak)])
def test_three_releases_on_fifty_devices_over_many_seeds(seeds):
    steps = crashes = 0
    for seed in range(seeds):
        result = World(trouble.THREE_RELEASES, seed).run()
        assert not result.violations, explain(result)
        assert result.devices == 50
        steps, crashes = steps + result.steps, crashes + result.crashes
    assert crashes > seeds * 20, "the world has to be worse than this"
    assert steps > seeds * 2_000


@pytest.mark.parametrize("name", ["through a storm", "staged releases end"])
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(name):
    scenario = scenarios.find(name)
    first, second, other = (World(scenario, seed).run() for seed in (7, 7, 8))
    assert (first.trace, first.steps, first.messages_sent) == (second.trace, second.steps, second.messages_sent)
    assert first.trace != other.trace


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_was_found_once_stays_mended(name, seed):
    result = World(scenarios.find(name), seed).run()
    assert not result.violations, explain(result)


def test_scenarios_have_names_of_their_own():
    names = [row.name for row in scenarios.ALL]
    assert len(names) == len(set(names))


@pytest.mark.soak
def test_ten_thousand_devices_take_three_releases():
    result = World(trouble.THREE_RELEASES, 1, devices=10_000).run()
    assert not result.violations, explain(result)
