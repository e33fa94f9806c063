"""Tables of scenarios: each row's name is a sentence that a run has to make true."""

from __future__ import annotations

from wherry_shared.errors import RefusedError
from wherry_simulators.scenario import Scenario
from wherry_simulators.scenarios import behaviours, downs, engines, groups, modes, rollouts, trouble, wear

ALL: tuple[Scenario, ...] = (
    *behaviours.TABLE,
    *trouble.TABLE,
    *rollouts.TABLE,
    *engines.TABLE,
    *modes.TABLE,
    *groups.TABLE,
    *downs.TABLE,
    *wear.TABLE,
)


def find(name: str) -> Scenario:
    """Return the one scenario whose name contains `name`.

    Raises:
        RefusedError: `scenario_unknown`.
    """
    found = [row for row in ALL if name in row.name]
    exact = [row for row in found if row.name == name]
    if len(exact or found) != 1:
        raise RefusedError(
            "scenario_unknown",
            f"{len(found)} scenarios have {name!r} in their name",
            next_step="wherry-sim world --list shows them all",
        )
    return (exact or found)[0]


def matching(name: str) -> tuple[Scenario, ...]:
    """Return all scenarios whose name contains `name`.

    Raises:
        RefusedError: `scenario_unknown`, if there is none.
    """
    found = tuple(row for row in ALL if name in row.name)
    if not found:
        raise RefusedError(
            "scenario_unknown",
            f"no scenario has {name!r} in its name",
            next_step="wherry-sim world --list shows them all",
        )
    return found
