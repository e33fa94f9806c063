"""The gate of a search: what passes, and by what the rest is kept out."""

from __future__ import annotations

import numpy as np
import pytest

from wherry_optimizer import gate, metrics
from wherry_shared.errors import RefusedError

MEAN = metrics.make(metrics.MetricOf(name="accuracy"))


def drop(value: float = 0.0, high: float | None = None, *, own: float = 0.9) -> gate.Drop:
    return gate.Drop(own, own + value, value, value - 0.01, value if high is None else high, 400)


@pytest.mark.parametrize(
    ("found", "error", "budget", "by"),
    [
        (drop(0.004), 0.1, gate.Budget(0.005), ""),
        (drop(-0.01), 0.1, gate.Budget(0.005), ""),
        (drop(0.006), 0.1, gate.Budget(0.005), "drop"),
        (drop(0.001, 0.011), 0.1, gate.Budget(0.005), "interval"),
        (drop(0.001, 0.011), 0.1, gate.Budget(0.005, upper_factor=3), ""),
        (drop(0.001, 0.006), 0.1, gate.Budget(0.005, upper_factor=1), "interval"),
        (drop(0.001), 0.6, gate.Budget(0.005), "error"),
        (drop(0.001, own=0.7), 0.1, gate.Budget(0.005, floor=0.8), "floor"),
        (drop(float("nan")), 0.1, gate.Budget(0.005), "no_number"),
        (drop(0.0), float("nan"), gate.Budget(0.005), "no_number"),
        (drop(0.0, float("nan")), 0.0, gate.Budget(1.0), "no_number"),
    ],
)
def test_a_candidate_is_kept_out_by_the_first_thing_that_it_misses(
    found: gate.Drop, error: float, budget: gate.Budget, by: str
) -> None:
    verdict = gate.hold(found, error, budget, "accuracy")
    assert (verdict.passed, verdict.by) == (not by, by)


@pytest.mark.parametrize(
    "terms",
    [
        {"drop_max": float("nan")},
        {"drop_max": float("inf")},
        {"drop_max": -0.1},
        {"drop_max": 0.1, "error_max": float("nan")},
        {"drop_max": 0.1, "error_max": -1.0},
        {"drop_max": 0.1, "floor": float("nan")},
        {"drop_max": 0.1, "upper_factor": float("nan")},
    ],
)
def test_a_limit_that_nothing_can_exceed_is_no_gate(terms: dict[str, float]) -> None:
    with pytest.raises(RefusedError) as caught:
        gate.Budget(**terms)
    assert caught.value.code == "budget_invalid"


def test_a_refusal_says_by_how_much() -> None:
    assert "over its budget of 0.0050 by 0.0150" in gate.hold(drop(0.02), 0.0, gate.Budget(0.005), "auc").why


def test_the_interval_of_a_paired_drop_is_that_of_theory() -> None:
    rng = np.random.default_rng(0)
    source = (rng.random(2000) < 0.9).astype(float)
    own = np.where(rng.random(2000) < 0.05, 1 - source, source)
    found = gate.compare(MEAN.value, own.tolist(), source.tolist())
    gaps = source - own
    width = 2 * 1.96 * gaps.std(ddof=1) / np.sqrt(2000)
    assert found.drop == pytest.approx(gaps.mean())
    assert found.high - found.low == pytest.approx(width, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        source = (rng.random(300) < 0.9).astype(float)
        own = np.where(rng.random(300) < 0.1, (rng.random(300) < 0.5).astype(float), source)  # loses 0.1 · (0.9 − 0.5)
        found = gate.compare(MEAN.value, own.tolist(), source.tolist(), seed=seed)
        covered += found.low <= 0.04 <= found.high
    assert covered >= 52


def test_intervals_of_few_samples_are_as_wide_as_they_have_to_be() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gaps = rng.normal(0.02, 0.05, 8)
        found = gate.compare(MEAN.value, (1 - gaps).tolist(), [1.0] * 8, seed=seed)
        covered += found.low <= 0.02 <= found.high
    assert covered >= 93  # by percentiles alone it is 90


def test_equal_answers_have_no_drop_and_no_width() -> None:
    found = gate.compare(MEAN.value, [1.0, 0.0] * 20, [1.0, 0.0] * 20)
    assert (found.drop, found.low, found.high) == (0, 0, 0)


def test_a_metric_that_is_no_mean_is_resampled_as_a_whole() -> None:
    rng = np.random.default_rng(3)
    metric = metrics.make(metrics.MetricOf(name="auc"))
    labels = rng.integers(0, 2, (60, 20))
    good = [metric.evidence({"p": row + rng.normal(0, 0.5, 20)}, row) for row in labels]
    bad = [metric.evidence({"p": row + rng.normal(0, 3.0, 20)}, row) for row in labels]
    found = gate.compare(metric.value, bad, good)
    assert 0.2 < found.low < found.drop < found.high < 0.5


def test_a_candidate_that_gives_nothing_but_nan_has_no_drop() -> None:
    found = gate.compare(MEAN.value, [float("nan")] * 20, [1.0] * 20)
    assert not gate.hold(found, 0.0, gate.Budget(1.0), "accuracy").passed


def test_confirming_again_is_paid_by_a_wider_interval() -> None:
    assert sum(gate.CONFIRMATION_RISKS) <= 0.2
    rng = np.random.default_rng(0)
    source = (rng.random(400) < 0.9).astype(float)
    own = np.where(rng.random(400) < 0.02, 1 - source, source)
    ends = [
        gate.compare(MEAN.value, own.tolist(), source.tolist(), confidence=gate.confidence_of(number)).high
        for number in range(len(gate.CONFIRMATION_RISKS))
    ]
    assert ends[0] < ends[1] <= ends[2]


@pytest.mark.parametrize("tries", [1, 3])
def test_bad_variants_are_let_through_no_more_often_than_the_risks_say(tries: int) -> None:
    """Short lists of variants whose drop is exactly at the limit, all on one test split."""
    budget, through, lists = gate.Budget(0.05, upper_factor=2.0), 0, 120
    for seed in range(lists):
        rng = np.random.default_rng(seed)
        source = np.ones(200)
        for number in range(tries):
            own = (rng.random(200) >= 0.1).astype(float)
            found = gate.compare(MEAN.value, own.tolist(), source.tolist(), confidence=gate.confidence_of(number))
            if gate.confirm(found, 0.1, budget, "accuracy").passed:
                through += 1
                break
    assert through / lists <= sum(gate.CONFIRMATION_RISKS[:tries])


def test_odds_fall_with_the_drop_and_with_what_is_not_known() -> None:
    budget = gate.Budget(0.005)

    def found(drop: float, width: float) -> gate.Drop:
        return gate.Drop(0.9, 0.9 + drop, drop, drop - width, drop + width, 400)

    assert gate.odds(found(0, 0), budget, 400) == 1.0
    assert gate.odds(found(-0.003, 0.004), budget, 400) == gate.odds(found(0, 0.004), budget, 400) > 0.9
    order = [
        gate.odds(found(*one), budget, 400) for one in ((0, 0.004), (0.002, 0.004), (0.002, 0.006), (0.005, 0.008))
    ]
    assert order == sorted(order, reverse=True)
    assert gate.odds(found(0.002, 0.006), budget, 100) < gate.odds(found(0.002, 0.006), budget, 4000)
    assert gate.odds(found(0.0, float("inf")), budget, 400) == 0.0


def test_a_paired_drop_has_a_smaller_error_than_two_separate_ones() -> None:
    rng = np.random.default_rng(0)
    source = (rng.random(500) < 0.8).astype(float)
    own = source.copy()
    own[:5] = 0
    found = gate.compare(MEAN.value, own.tolist(), source.tolist())
    assert found.error == pytest.approx((source - own).std() / np.sqrt(500), rel=0.15)
    assert found.value_error == pytest.approx(own.std() / np.sqrt(500), rel=0.1)
    assert found.error < found.value_error / 3


def test_one_sample_proves_nothing() -> None:
    found = gate.compare(MEAN.value, [1.0], [1.0])
    assert not gate.hold(found, 0.0, gate.Budget(1.0), "accuracy").passed
