"""Gates turn counts of devices into a verdict. Pure; integers only.

The unit is the device. A gate that has too little to go by says `unknown`, which never widens a rollout: no data is not
success. Gates that compare arms come later; these have absolute bounds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from wherry_server.targeting import exact
from wherry_shared.errors import RefusedError

COUNT_MAX = 10_000_000


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is too much: more than `count` devices at once, or more than `share` of at least `sample_min`.

    Where fewer than `sample_min` devices exist at all, all of them are the sample.
    """

    count: int | None = None
    share: float | None = None
    sample_min: int = 1


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate says, with the counts that decided."""

    gate: str
    outcome: Literal["pass", "breach", "unknown"]
    bad: int
    judged: int
    needed: int
    """The sample that the gate waits for."""


def check_bound(bound: Bound, what: str) -> None:
    """Refuse a bound that bounds nothing.

    Raises:
        RefusedError: `plan_bound`.
    """
    if bound.count is None and bound.share is None:
        raise RefusedError("plan_bound", f"{what} bounds neither a count nor a share", next_step="give one of the two")
    if bound.count is not None and not 0 <= bound.count <= COUNT_MAX:
        raise RefusedError("plan_bound", f"{what}.count {bound.count} is not 0 to {COUNT_MAX}")
    if bound.share is not None and not 0 <= bound.share < 1:
        raise RefusedError("plan_bound", f"{what}.share {bound.share} is not at least 0 and below 1")
    if not 1 <= bound.sample_min <= COUNT_MAX:
        raise RefusedError("plan_bound", f"{what}.sample_min {bound.sample_min} is not 1 to {COUNT_MAX}")


def threshold(gate: str, bound: Bound, *, bad: int, judged: int, population: int) -> Verdict:
    """Judge `bad` of `judged` devices, out of a `population` of which the others may still answer."""
    needed = min(bound.sample_min, population)
    outcome: Literal["pass", "breach", "unknown"]
    if bound.count is not None and bad > bound.count:
        outcome = "breach"
    elif judged < max(needed, 1):
        outcome = "unknown"
    elif bound.share is not None and bad > exact(bound.share) * judged:
        outcome = "breach"
    else:
        outcome = "pass"
    return Verdict(gate=gate, outcome=outcome, bad=bad, judged=judged, needed=needed)
