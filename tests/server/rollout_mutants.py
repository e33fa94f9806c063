"""Deliberate bugs of the rollout engine, its gates, its targeting and its plans; some property has to notice each.

A property that no bug can break proves nothing. Every row names a function, what it says there and what somebody could have written
instead; `put_in` compiles it so and puts it wherever the real one is used. Add one for every bug that was found elsewhere.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from tests.server import test_gates, test_plan, test_rollout, test_targeting
from wherry_server import gates, plan, rollout, targeting

WORLDS_MAX = 200
"""Random rollouts that a bug of the engine may survive."""
QUICK = settings(
    max_examples=WORLDS_MAX,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def worlds() -> None:
    """Run random rollouts from start to end."""
    inner = test_rollout.test_whatever_happens_a_rollout_is_bounded_final_and_ends.hypothesis.inner_test  # type: ignore[attr-defined]

    def world(plan: Any, members: Any, orders: Any, seed: Any, chunk: Any, reboots: Any) -> None:
        inner(plan, members, orders, seed, chunk, reboots)

    QUICK(given(*test_rollout.WORLDS)(world))()


def _shares() -> None:
    keys, shares = test_targeting.keys, test_targeting.shares
    for test, strategies in (
        (test_targeting.test_a_stage_exposes_exactly_the_ceiling_of_its_share, (keys, shares)),
        (
            test_targeting.test_a_cut_off_never_falls_whatever_becomes_of_the_members,
            (st.lists(keys, min_size=2, max_size=5), st.lists(shares, min_size=2, max_size=5)),
        ),
        (test_targeting.test_each_stratum_has_a_share_of_its_own, (keys, keys)),
    ):
        QUICK(given(*strategies)(test.hypothesis.inner_test))()  # type: ignore[attr-defined]


def _bounds() -> None:
    for row in test_gates.ROWS:
        test_gates.test_a_bound_gives_the_verdict_of_its_table(*row)
    small = st.integers(0, 20)
    QUICK(given(small, small)(test_gates.test_no_data_is_never_a_pass.hypothesis.inner_test))()  # type: ignore[attr-defined]


def _wrong_plans() -> None:
    for row in test_plan.BAD:
        test_plan.test_a_plan_with_a_fault_is_refused_by_its_code(*row)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug."""

    name: str
    where: ModuleType
    function: str
    was: str
    becomes: str
    noticed_by: Callable[[], None] = worlds


ALL = (
    Mutant("it widens though a bound is breached", rollout, "_under_way", "if breached:", "if False:"),
    Mutant("a pause pauses nothing", rollout, "_under_way", 'progress.state == "paused"', "not progress.state"),
    Mutant("a halt leaves who is confirmed", rollout, "_under_way", "_SCOPES[plan.on_halt]", '"unconfirmed"'),
    Mutant("a revert leaves who is confirmed", rollout, "_under_way", '"operator", "all"', '"operator", "unconfirmed"'),
    Mutant("a stage begins unapproved", rollout, "_entry", "agreed < needed", "agreed < 0"),
    Mutant("a second round begins unapproved", rollout, "_second_round", "if _entry(plan", "if not _entry(plan"),
    Mutant("a rollout begins before its date", rollout, "_entry", "index == 0 and", "index == 1 and"),
    Mutant("a stage has no deadline", rollout, "_running", "_elapsed_s(progress.entered, now) >=", "-1 >="),
    Mutant("a return has no deadline", rollout, "_returning", ">= plan.revert_s", ">= 10**9"),
    Mutant(
        "what was halted takes newcomers",
        rollout,
        "_final",
        'progress.state == "done" and evidence.unexposed',
        "evidence.unexposed",
    ),
    Mutant("a rate forgets what it let through", rollout, "_pace", "plan.rate.within(waited_s) - ever", "10**6 - ever"),
    Mutant(
        "a share is rounded down",
        targeting,
        "share_count",
        "-(-(exact(share) * population) // 1)",
        "int(exact(share) * population)",
        _shares,
    ),
    Mutant("who is at the cut-off is left out", targeting, "exposed", "key <=", "key <", _shares),
    Mutant("a stored cut-off is forgotten", targeting, "cut_offs", "max(at, result.get(stratum, 0))", "at", _shares),
    Mutant("no data passes", gates, "threshold", "judged < max(needed, 1)", "judged < needed", _bounds),
    Mutant("a count bounds one too few", gates, "threshold", "bad > bound.count", "bad >= bound.count", _bounds),
    Mutant(
        "a share is compared as a fraction of the population", gates, "threshold", "* judged:", "* population:", _bounds
    ),
    Mutant("stages need not ascend", plan, "_check", "not before < stage.share <= 1", "stage.share > 1", _wrong_plans),
    Mutant(
        "late may be before a trial ends",
        plan,
        "_check",
        "plan.late_s <= plan.trial.max_s",
        "plan.late_s < 0",
        _wrong_plans,
    ),
    Mutant("adaptive takes stages", plan, "_check", "len(plan.stages) != 1:", "len(plan.stages) > 99:", _wrong_plans),
)


@contextlib.contextmanager
def put_in(mutant: Mutant) -> Iterator[None]:
    """Have everybody use the function as the mutant has it.

    Raises:
        LookupError: the function does not say (once) what the mutant changes: adapt the row.
    """
    real: Any = getattr(mutant.where, mutant.function)
    source = inspect.getsource(real)
    if source.count(mutant.was) != 1:
        raise LookupError(f"{mutant.name}: {mutant.function} says {mutant.was!r} {source.count(mutant.was)} times")
    made: dict[str, Any] = {}
    code = compile(
        f"from __future__ import annotations\n{source.replace(mutant.was, mutant.becomes)}", "mutant", "exec"
    )
    names = vars(mutant.where)
    exec(code, names, made)  # our own source
    users = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name.startswith(("wherry_server", "tests.server")) and vars(module).get(mutant.function) is real
    ]
    try:
        for user in users:
            user[mutant.function] = made[mutant.function]
        yield
    finally:
        for user in users:
            user[mutant.function] = real


def survives(mutant: Mutant) -> bool:
    """Tell whether nobody notices."""
    with put_in(mutant):
        try:
            mutant.noticed_by()
        except HypothesisException:  # the property could not be asked at all
            raise
        except (Exception, pytest.fail.Exception):  # a bug may show as anything
            return False
    return True
