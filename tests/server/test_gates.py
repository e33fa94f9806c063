"""Fixed thresholds over counts of devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_server.gates import Bound, check_bound, threshold
from wherry_shared.errors import RefusedError

ROWS = [
    # bound, bad, judged, population, verdict
    (Bound(count=0), 1, 1, 50, "breach"),
    (Bound(count=0), 0, 1, 50, "pass"),
    (Bound(count=2), 2, 9, 50, "pass"),
    (Bound(count=2), 3, 3, 50, "breach"),
    (Bound(count=2, sample_min=9), 0, 8, 50, "unknown"),
    (Bound(share=0.1, sample_min=5), 4, 4, 50, "unknown"),
    (Bound(share=0.1, sample_min=5), 1, 5, 50, "breach"),
    (Bound(share=0.1, sample_min=5), 1, 10, 50, "pass"),
    (Bound(share=0.1, sample_min=5), 2, 19, 50, "breach"),
    (Bound(share=0.1, sample_min=5), 1, 1, 1, "breach"),
    (Bound(share=0.1, sample_min=5), 0, 2, 2, "pass"),
    (Bound(share=0.1, sample_min=5), 0, 0, 0, "unknown"),
    (Bound(share=0.07), 7, 100, 100, "pass"),
    (Bound(share=0.07), 8, 100, 100, "breach"),
    (Bound(count=1, share=0.5, sample_min=10), 2, 2, 50, "breach"),
]


@pytest.mark.parametrize(("bound", "bad", "judged", "population", "outcome"), ROWS)
def test_a_bound_gives_the_verdict_of_its_table(bound: Bound, bad: int, judged: int, population: int, outcome: str):
    verdict = threshold("failure", bound, bad=bad, judged=judged, population=population)
    assert verdict.outcome == outcome


FEW = [
    # bad, judged, population, cohort, verdict, needed, why
    (1, 1, 1, 20, "unknown", 5, "one failed device in a stage of one is not 100 %"),
    (1, 1, 1, 1, "breach", 1, "unless there is no other"),
    (1, 3, 3, 3, "breach", 3, "or no others"),
    (1, 3, 3, 20, "unknown", 5, "one of three may be a broken board"),
    (2, 2, 2, 20, "breach", 2, "two of two are not"),
    (1, 5, 5, 20, "breach", 5, "and five are the sample that was asked for"),
    (0, 1, 1, 20, "pass", 1, "one that is well lets the next stage begin"),
]


@pytest.mark.parametrize(("bad", "judged", "population", "cohort", "outcome", "needed", "why"), FEW)
def test_a_share_of_few_devices_is_no_verdict(
    bad: int, judged: int, population: int, cohort: int, outcome: str, needed: int, why: str
):
    bound = Bound(share=0.1, sample_min=5)
    verdict = threshold("failure", bound, bad=bad, judged=judged, population=population, cohort=cohort)
    assert (verdict.outcome, verdict.needed) == (outcome, needed), why
    at_once = Bound(share=0.1, count=0, sample_min=5)
    assert (
        bad == 0
        or threshold("g", at_once, bad=bad, judged=judged, population=population, cohort=cohort).outcome == "breach"
    )


@given(
    st.builds(
        Bound,
        count=st.none() | st.integers(0, 5),
        share=st.none() | st.floats(0, 0.99),
        sample_min=st.integers(1, 10),
    ),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 30),
)
def test_more_failures_never_turn_a_breach_into_a_pass(bound: Bound, bad: int, good: int, rest: int, cohort: int):
    seen = {"judged": bad + good, "population": bad + good + rest}
    before = threshold("g", bound, bad=bad, cohort=cohort, **seen)
    after = threshold("g", bound, bad=bad + 1, cohort=cohort, **{name: number + 1 for name, number in seen.items()})
    if before.outcome == "breach":
        assert after.outcome == "breach"


@given(st.integers(0, 20), st.integers(0, 20))
def test_no_data_is_never_a_pass(population: int, sample: int):
    bound = Bound(share=0.5, count=3, sample_min=max(sample, 1))
    assert threshold("g", bound, bad=0, judged=0, population=population).outcome == "unknown"


def test_a_bound_that_bounds_nothing_is_refused():
    with pytest.raises(RefusedError) as caught:
        check_bound(Bound(), "failure")
    assert caught.value.code == "plan_bound"
