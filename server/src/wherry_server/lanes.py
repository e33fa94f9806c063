"""When the lanes of a comparison end. Pure.

A wave is whom a rollout exposed in one period. Its lanes end after 1, 3, 7, … whole periods more (`sequential.lane_of`); a
lane is taken once, `GRACE_S` after its end, and what arrives later is no evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

from wherry_server.plan import GRACE_S, Plan
from wherry_server.rollout import Compared
from wherry_server.sequential import LANES_MAX
from wherry_shared.clock import MICROSECONDS

LANES_PER_TURN = 20
"""Lanes taken in one turn; more, after a long silence of the director, take more turns."""


@dataclass(frozen=True, slots=True)
class Due:
    """A lane of a wave that has ended."""

    wave: int
    lane: int
    begin: int
    end: int
    """Microseconds: where its periods begin and end."""


def period(plan: Plan, moment: int) -> int:
    """Return the number of the period that a moment, in microseconds, is in."""
    return moment // (plan.period_s * MICROSECONDS)


def ended(plan: Plan, moment: int) -> int:
    """Return the number of the first period that may not be used yet."""
    return period(plan, moment - GRACE_S * MICROSECONDS)


def due(plan: Plan, compared: Compared, waves: list[int], moment: int) -> list[Due]:
    """Return the lanes that can be taken now, in the order of waves and lanes."""
    length, usable = plan.period_s * MICROSECONDS, ended(plan, moment)
    found = []
    for wave in sorted(waves):
        for lane in range(compared.waves.get(str(wave), 0), LANES_MAX):
            first = wave + (1 << lane)
            after = wave + (1 << (lane + 1))
            if after > usable:
                break
            found.append(Due(wave, lane, first * length, after * length))
    return found[:LANES_PER_TURN]
