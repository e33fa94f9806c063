"""The simulator is software under test: it has to notice every deliberate bug, and to leave the real machine alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from wherry_simulators import mutants
from wherry_simulators.scenarios import behaviours

SEEDS = 2
SHORT = 10
"""One mutant in so many is tried by `make test`; `make mutants`, which CI runs as well, tries all."""


def _row(number, mutant):
    return pytest.param(mutant, id=mutant.name, marks=[pytest.mark.soak] if number % SHORT else [])


@pytest.mark.parametrize("mutant", [_row(number, mutant) for number, mutant in enumerate(mutants.ALL)])
def test_somebody_notices_that(mutant):
    fate = mutants.fate(mutant, SEEDS)
    assert fate.caught, f"{mutant.name}: {fate.runs} runs and nobody noticed"
    assert fate.rule


@pytest.mark.parametrize(
    "seeds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(SEEDS, marks=pytest.mark.soak)]
)
def test_the_machine_as_it_is_breaks_no_rule_in_the_same_worlds(seeds):
    fate = mutants.fate(mutants.CONTROL, seeds)
    assert not fate.caught, fate


def test_there_are_enough_of_them_with_names_of_their_own():
    names = [mutant.name for mutant in mutants.ALL]
    assert len(names) == len(set(names)) >= 20


def test_the_command_fails_when_one_survives(monkeypatch, capsys):
    from wherry_simulators import cli

    monkeypatch.setattr(mutants, "ALL", (mutants.CONTROL, mutants.ALL[3]))
    monkeypatch.setattr(mutants, "HUNTED", behaviours.TABLE[:3])
    with pytest.raises(SystemExit) as caught:
        cli.main(["mutants", "--seeds", "1"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "SURVIVED the machine as it is" in out
    assert "1 of 2 deliberate bugs survived" in out


def test_the_world_command_says_what_ran_and_how_fast():
    command = [sys.executable, "-m", "wherry_simulators.cli", "world", "--scenario", "a good candidate", "--seeds", "2"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "2 runs, 0 violated" in said
    assert "steps at" in said
    command += ["--json"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


def test_an_unknown_scenario_is_refused_with_a_next_step():
    command = [sys.executable, "-m", "wherry_simulators.cli", "world", "--scenario", "no such thing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "scenario_unknown" in done.stderr
    assert "--list" in done.stderr
