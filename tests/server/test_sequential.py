"""Tests that are valid at every look: exact error probabilities, and the rules that keep a comparison honest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_server.sequential import (
    CONTROLS_MAX,
    LANES_MAX,
    SHARE_STEPS,
    STEPS,
    Pairs,
    bounded,
    bounded_mean,
    bounded_needed,
    compare,
    draw,
    expected_harm,
    harm_rate_bound,
    lane_of,
    lane_share,
    log_above,
    log_below,
    lower_bound,
    may_expose,
    merge,
    outcome,
    pair_up,
    sample_needed,
    upper_bound,
)

ALPHA = BETA = 0.05
shares = st.floats(0, 1)
differences = st.dictionaries(st.integers(-STEPS, STEPS), st.integers(1, 30), max_size=6).map(
    lambda found: tuple(sorted(found.items()))
)


# --- exact probabilities ------------------------------------------------------------------------


def ever_crosses(steps: int, chance: float, crossed: Callable[[int, int], bool]) -> float:
    """Probability that `crossed(bad, good)` is true at one look at least, of one after each of `steps` devices."""
    alive, gone = {0: 1.0}, 0.0
    for judged in range(1, steps + 1):
        following: dict[int, float] = {}
        for bad, mass in alive.items():
            following[bad] = following.get(bad, 0.0) + mass * (1 - chance)
            following[bad + 1] = following.get(bad + 1, 0.0) + mass * chance
        alive = {}
        for bad, mass in following.items():
            if crossed(bad, judged - bad):
                gone += mass
            else:
                alive[bad] = mass
    return gone


@pytest.mark.parametrize(("tolerated", "harm"), [(0.02, 0.08), (0.1, 0.1), (0.3, 0.2)])
def test_looking_after_every_device_halts_a_tolerable_bundle_in_at_most_alpha(tolerated: float, harm: float):
    def breach(bad: int, good: int) -> bool:
        return log_above([(1.0, bad), (0.0, good)], tolerated, 0.0) >= -math.log(ALPHA)

    def passed(bad: int, good: int) -> bool:
        return log_below([(1.0, bad), (0.0, good)], tolerated + harm) >= -math.log(BETA)

    steps = 150
    false_halt = ever_crosses(steps, tolerated, breach)
    false_pass = ever_crosses(steps, tolerated + harm, passed)
    assert 0 < false_halt <= ALPHA
    assert 0 < false_pass <= BETA
    assert ever_crosses(steps, tolerated + 3 * harm, breach) > 0.9


def test_looking_after_every_pair_halts_an_equal_candidate_in_at_most_alpha():
    """Failures of one in five on both sides: a difference is −1, 0 or 1, and 0 says nothing."""

    def breach(worse: int, better: int) -> bool:
        return log_above([(1.0, worse), (-1.0, better)], 0.0, -1.0) >= -math.log(ALPHA)

    assert 0 < ever_crosses(200, 0.5, breach) <= ALPHA


# --- by hand ------------------------------------------------------------------------------------

PARTS = (
    (Fraction(4, 100), Fraction(10, 100)),
    (Fraction(12, 100), Fraction(15, 100)),
    (Fraction(30, 100), Fraction(20, 100)),
    (Fraction(60, 100), Fraction(25, 100)),
    (Fraction(95, 100), Fraction(30, 100)),
)
"""(what is put at risk, part of the first wealth): written here once more, so that nobody changes them unawares."""


def wealth(gains: Iterable[Fraction]) -> Fraction:
    """The capital process of Waudby-Smith and Ramdas (2024) for fixed bets, mixed: one factor a value, exactly."""
    values = list(gains)
    return sum((part * math.prod(1 + bet * gain for gain in values) for bet, part in PARTS), Fraction(0))


@pytest.mark.parametrize(("bad", "verdict"), [(2, "unknown"), (3, "breach")])
def test_the_evidence_of_a_bound_is_what_a_gambler_has_by_hand(bad: int, verdict: str):
    """Tolerated 2 %, harm 8 %: a failure pays (1 - 0.02) / 0.02 = 49 on the stake, a success costs it."""
    found = bounded(bad=bad, good=5, under_way=0, tolerated=0.02, harm=0.08, alpha=ALPHA, beta=BETA)
    halting = wealth([Fraction(49)] * bad + [Fraction(-1)] * 5)
    passing = wealth([Fraction(1, 9)] * 5 + [Fraction(-1)] * bad)  # (0.1 - 0) / 0.9 and (0.1 - 1) / 0.9
    assert found.e_halt == pytest.approx(float(halting))
    assert found.e_pass == pytest.approx(float(passing))
    assert found.outcome == verdict
    assert (halting >= 20) is (verdict == "breach"), "1 / alpha"


def test_the_evidence_of_a_comparison_is_what_a_gambler_has_by_hand():
    """Three pairs in the first lane, of which half of the wealth counts, and one in the second, with a quarter."""
    lanes = [((-64, 1), (128, 2)), ((256, 1),)]
    found = compare(lanes, 0.25, ALPHA, BETA)
    first = [
        Fraction(-1, 4),
        Fraction(1, 2),
        Fraction(1, 2),
    ]  # against "the mean is 0 or less" a difference is its own gain
    assert found.e_halt == pytest.approx(float(max(wealth(first) / 2, wealth([Fraction(1)]) / 4)))
    step = Fraction(1, STEPS)  # against "it is a quarter or more", rounded up to whole steps, 1 at most
    low = [(Fraction(1, 4) - min(one + step, Fraction(1))) / (1 - Fraction(1, 4)) for one in first]
    assert found.e_pass == pytest.approx(float(max(wealth(low) / 2, wealth([Fraction(-1)]) / 4)))
    assert found.estimate == pytest.approx((-0.25 + 0.5 + 0.5 + 1) / 4)


def test_a_fair_game_leaves_the_gambler_what_he_had():
    """Where the mean is what is bet against, wealth after one more value is, on average, wealth before it: why alpha holds."""
    tolerated, before = Fraction(1, 50), [Fraction(49), Fraction(-1), Fraction(-1)]
    after = tolerated * wealth([*before, Fraction(49)]) + (1 - tolerated) * wealth([*before, Fraction(-1)])
    assert after == wealth(before)


# --- wealth and intervals -----------------------------------------------------------------------


@given(differences, st.floats(-0.99, 0.99), st.floats(-0.99, 0.99))
def test_wealth_falls_with_what_it_is_bet_against(pairs: Pairs, one: float, other: float):
    values = [(step / STEPS, count) for step, count in pairs]
    low, high = sorted((one, other))
    assert log_above(values, low, -1.0) >= log_above(values, high, -1.0) - 1e-9
    assert log_below(values, low) <= log_below(values, high) + 1e-9


@given(differences.filter(bool), st.floats(0.001, 0.5))
def test_an_interval_holds_the_mean_and_grows_with_certainty(pairs: Pairs, error: float):
    values = [(step / STEPS, count) for step, count in pairs]
    mean = sum(value * count for value, count in values) / sum(count for _, count in values)
    low, high = lower_bound(values, -1.0, error), upper_bound(values, -1.0, error)
    assert -1 <= low <= mean + 1e-5
    assert mean - 1e-5 <= high <= 1
    assert lower_bound(values, -1.0, error / 2) <= low + 1e-5
    assert upper_bound(values, -1.0, error / 2) >= high - 1e-5


@given(st.lists(differences, max_size=4), st.floats(0.01, 0.9))
def test_a_verdict_is_what_its_interval_says(lanes: list[Pairs], harm: float):
    found = compare(lanes, harm, ALPHA, BETA)
    assert found.outcome == outcome(lanes, harm, ALPHA, BETA)
    if found.outcome == "breach":
        assert found.low >= -1e-5
        assert found.e_halt >= 1 / ALPHA * (1 - 1e-9)
    elif found.outcome == "pass":
        assert found.high <= harm + 1e-5
        assert found.e_pass >= 1 / BETA * (1 - 1e-9)
    else:
        assert found.low <= 1e-5
        assert found.high >= harm - 1e-5


@pytest.mark.parametrize("lanes", [[], [()], [()] * LANES_MAX])
def test_no_data_decide_nothing(lanes: list[Pairs]):
    found = compare(lanes, 0.2, ALPHA, BETA)
    assert (found.outcome, found.sample, found.low, found.high) == ("unknown", 0, -1.0, 1.0)
    assert found.e_halt == found.e_pass == 1


# --- pairs and lanes ----------------------------------------------------------------------------


def test_lanes_double_in_length():
    assert [lane_of(age) for age in range(9)] == [0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert sum(lane_share(lane) for lane in range(LANES_MAX)) < 1


@given(st.lists(shares, max_size=20), st.lists(shares, max_size=20))
def test_no_more_pairs_than_devices_on_the_smaller_side(candidates: list[float], controls: list[float]):
    pairs = pair_up(candidates, controls)
    assert sum(count for _, count in pairs) == min(len(candidates), len(controls))
    assert all(-STEPS <= step <= STEPS for step, _ in pairs)


@given(st.lists(shares, min_size=1, max_size=10), st.integers(1, CONTROLS_MAX + 2))
def test_a_candidate_that_equals_its_control_differs_by_nothing(values: list[float], width: int):
    constant = [values[0]] * len(values)
    assert pair_up(constant, constant * width) == ((0, len(values)),)


def test_each_device_is_in_one_difference():
    assert pair_up([1, 0], [0, 0, 1, 1, 1, 1, 0, 0]) == ((-STEPS // 2, 1), (STEPS // 2, 1))
    assert pair_up([1, 1, 0, 0], [0, 1]) == ((-STEPS, 1), (STEPS, 1))
    assert pair_up([1, 1, 0], [0]) == ((math.floor(2 / 3 * STEPS), 1),)
    assert pair_up([0.5], [0.25] * 100) == ((STEPS // 4, 1),)


WAVES = [
    # ranks of candidates, of controls, what is spent before, ranks used as controls, why
    ([1, 2], range(10, 30), 100, range(22, 30), "four controls for each, the highest ranks"),
    ([1, 2], range(10, 16), 100, [14, 15], "one for each, where more would leave few for later waves"),
    ([1, 2], [10], 100, [10], "one for both, where there is one"),
    ([1, 2], range(10, 30), 22, range(16, 22), "nobody twice"),
    ([1, 25], range(10, 20), 22, range(16, 20), "who was a control is no candidate"),
    ([25], range(10, 20), 22, [], "so a wave may have nobody"),
    ([1], range(30, 40), 22, [], "or no control"),
    ([1, 2], [-3, -2, -1], 10, [-1, -2], "who is held back comes last"),
]


@pytest.mark.parametrize(("candidates", "controls", "spent", "used", "why"), WAVES)
def test_a_wave_takes_fresh_controls_and_leaves_some(
    candidates: list[int], controls: Iterable[int], spent: int, used: Iterable[int], why: str
):
    pairs, after = draw([(rank, 1.0) for rank in candidates], [(rank, 0.0) for rank in controls], spent)
    assert after == min([spent, *used]), why
    assert sum(count for _, count in pairs) == min(len([one for one in candidates if one < spent]), len(list(used)))


@given(st.lists(differences, max_size=5))
def test_parts_add_up(parts: list[Pairs]):
    total = merge(parts)
    assert sum(count for _, count in total) == sum(count for part in parts for _, count in part)
    assert outcome([total], 0.2, ALPHA, BETA) == outcome([merge(reversed(parts))], 0.2, ALPHA, BETA)


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [0.02, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("spread", [0.05, 0.25, 0.4])
def test_the_sample_that_is_said_to_be_needed_decides(harm: float, spread: float):
    needed = sample_needed(harm, ALPHA, BETA, spread)
    for mean, expected in ((harm, "breach"), (0.0, "pass")):
        low, high = (math.floor((mean + side * spread) * STEPS) for side in (-1, 1))
        half = needed // 2 + 1
        pairs = tuple(sorted({max(low, -STEPS): half, min(high, STEPS): half}.items()))
        mean_held = sum(step * count for step, count in pairs) / (2 * half * STEPS)
        found = compare([pairs], harm, ALPHA, BETA)
        assert found.outcome in (expected, "unknown")
        if harm >= 0.1:  # a step is no small part of less
            assert found.outcome == expected, (needed, mean_held, found)


def test_a_smaller_harm_and_smaller_errors_need_more():
    assert sample_needed(0.1, 0.05, 0.05) > sample_needed(0.2, 0.05, 0.05)
    assert sample_needed(0.2, 0.01, 0.05) >= sample_needed(0.2, 0.05, 0.05)
    assert bounded_needed(0.02, 0.02, 0.05, 0.05) > bounded_needed(0.02, 0.08, 0.05, 0.05)
    assert sample_needed(0.001, 0.05, 0.05) > 10_000


# --- absolute bounds ----------------------------------------------------------------------------

BOUNDED = [
    # bad, good, under way, outcome, what it says
    (0, 0, 0, "unknown", "nothing is known"),
    (0, 0, 500, "unknown", "nobody has ended"),
    (3, 0, 0, "breach", "the first three fail"),
    (3, 0, 500, "unknown", "failures are heard before successes, and five hundred are under way"),
    (60, 0, 440, "breach", "however the others end, these are too many"),
    (0, 100, 0, "pass", "a hundred ended well"),
    (0, 100, 100, "unknown", "as many are still under way"),
    (10, 490, 0, "pass", "two in a hundred fail, as is tolerated"),
    (100, 900, 0, "breach", "ten in a hundred fail"),
]


@pytest.mark.parametrize(("bad", "good", "under_way", "expected", "why"), BOUNDED)
def test_a_share_without_control_is_held_to_its_bound(bad: int, good: int, under_way: int, expected: str, why: str):
    found = bounded(bad=bad, good=good, under_way=under_way, tolerated=0.02, harm=0.08, alpha=ALPHA, beta=BETA)
    assert found.outcome == expected, why


@given(st.integers(0, 30), st.integers(0, 200), st.integers(0, 200))
def test_devices_under_way_argue_for_neither_side(bad: int, good: int, under_way: int):
    def e(**counts: int) -> tuple[float, float]:
        found = bounded(**counts, tolerated=0.05, harm=0.1, alpha=ALPHA, beta=BETA)
        return found.e_halt, found.e_pass

    now = e(bad=bad, good=good, under_way=under_way)
    assert now[0] <= e(bad=bad + under_way, good=good, under_way=0)[0] * (1 + 1e-9)
    assert now[1] <= e(bad=bad, good=good + under_way, under_way=0)[1] * (1 + 1e-9)


# --- pace ---------------------------------------------------------------------------------------


@given(st.floats(0.5, 50), st.integers(0, 2_000), st.integers(0, 300), st.integers(0, 2_000))
def test_what_may_be_exposed_keeps_the_expected_harm_bounded(bound: float, under_way: int, bad: int, good: int):
    exposed = under_way + bad + good
    more = may_expose(bound=bound, exposed=exposed, bad=bad, good=good, error=BETA)
    if more:
        assert expected_harm(exposed=exposed + more, bad=bad, good=good, error=BETA) <= bound + 1e-6
    assert expected_harm(exposed=exposed + more + 1, bad=bad, good=good, error=BETA) > bound - 1e-6


def test_without_data_every_exposed_device_counts_as_harmed():
    assert harm_rate_bound(0, 0, BETA) == 1
    assert may_expose(bound=5, exposed=0, bad=0, good=0, error=BETA) == 5
    assert may_expose(bound=5, exposed=5, bad=0, good=0, error=BETA) == 0


def test_good_news_doubles_the_pace_and_bad_news_stops_it():
    exposed, rounds = 5, 0
    while exposed < 10_000:
        exposed += may_expose(bound=5, exposed=exposed, bad=0, good=exposed, error=BETA)
        rounds += 1
    assert rounds <= 12
    assert may_expose(bound=5, exposed=100, bad=50, good=40, error=BETA) == 0


# --- one value a device ---------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [1.0, 0.2])
def test_looking_after_every_shadow_halts_a_tolerated_disagreement_no_more_often_than_alpha(odd: float):
    """Devices disagree in no run or in a share `odd` of them, so that the mean is just what is tolerated."""
    tolerated, harm = 0.05, 0.1

    def halted(bad: int, good: int) -> bool:
        values = ((0, good), (int(odd * SHARE_STEPS), bad))
        found = bounded_mean(values, under_way=0, quiet=0, tolerated=tolerated, harm=harm, alpha=ALPHA, beta=BETA)
        return found.outcome == "breach"

    assert ever_crosses(60, tolerated / odd, halted) <= ALPHA


def test_devices_under_way_argue_neither_for_halting_a_shadow_nor_for_passing_it():
    stated = {"quiet": 0, "tolerated": 0.05, "harm": 0.15, "alpha": ALPHA, "beta": BETA}
    agree, differ = ((0, 40),), ((SHARE_STEPS // 2, 12),)
    assert bounded_mean(agree, under_way=0, **stated).outcome == "pass"
    assert bounded_mean(agree, under_way=40, **stated).outcome == "unknown"
    assert bounded_mean(differ, under_way=0, **stated).outcome == "breach"
    assert bounded_mean(differ, under_way=200, **stated).outcome == "unknown"
    assert bounded_mean((), under_way=0, **stated).outcome == "unknown"
