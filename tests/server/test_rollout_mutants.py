"""The properties of the rollout engine are under test as well: each deliberate bug has to be noticed."""

from __future__ import annotations

import pytest

from tests.server import rollout_mutants
from tests.server.rollout_mutants import ALL, Mutant

QUICK = {"a second round begins unapproved", "a rate forgets what it let through", "a return has no deadline"}
"""Bugs of the engine that show in few worlds: `make test` tries these and all that no world is needed for, `make mutants` all."""


def _row(mutant: Mutant) -> object:
    slow = mutant.noticed_by is rollout_mutants.worlds and mutant.name not in QUICK
    return pytest.param(mutant, id=mutant.name, marks=[pytest.mark.soak] if slow else [])


@pytest.mark.parametrize("mutant", [_row(mutant) for mutant in ALL])
def test_some_property_notices_that(mutant: Mutant) -> None:
    assert not rollout_mutants.survives(mutant), f"{mutant.name}: nobody noticed"


@pytest.mark.soak
@pytest.mark.parametrize("notice", sorted({mutant.noticed_by for mutant in ALL}, key=lambda one: one.__name__))
def test_the_engine_as_it_is_is_left_alone(notice: object) -> None:
    assert callable(notice)
    notice()


def test_every_mutant_changes_something_that_the_code_says() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL) >= 18
    for mutant in ALL:
        with rollout_mutants.put_in(mutant):
            assert getattr(mutant.where, mutant.function).__code__.co_filename == "mutant"
        assert getattr(mutant.where, mutant.function).__code__.co_filename != "mutant"
