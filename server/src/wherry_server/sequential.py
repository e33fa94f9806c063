"""Tests that stay valid however often one looks: bets on one value per device, whose wealth is the evidence. Pure.

**The bet.** A gambler who claims that a mean is above `theta` starts with 1 and multiplies, for each value `x` in
[low, 1], by `1 + bet · (x − theta) / (theta − low)`. As long as the mean is at most `theta`, wealth is expected not to
grow, and by Ville's inequality the probability that it *ever* reaches 1/error is at most `error`: at every look, without
a plan for looks, without a distribution. The mirror image bets that a mean is below `theta`. `bet` is not known to be
good in advance, so wealth is split among `BETS`, and the sum counts. All bets are fixed, so the order of values
does not matter and a histogram of them is all that has to be kept.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 86 (2024), for the
capital process and the intervals that come of inverting it; Shekhar and Ramdas, "Nonparametric two-sample testing by
betting", IEEE Trans. Inf. Theory 70 (2023), for betting on differences between two samples; Fan, Grama and Liu,
"Exponential inequalities for martingales", EJP 20 (2015), for the bound on growth in `sample_needed`.

**What keeps a comparison honest** (`pair_up`, `compare`):

1. Devices differ, and one device's values resemble each other. So within one *lane* a device is used once, on either
   side: a candidate is compared with control devices that no other comparison of the lane uses. Which devices are
   candidates is decided by a hash, so next candidate and next controls are exchangeable, whatever was seen before, and the
   expected difference is 0 where the bundle does no harm.
2. The hour moves all devices. So both sides of a pair are measured over the same periods, and the drift that they
   share cancels in the difference.
3. A wave of devices goes on being measured. Lane 0 holds the first period after the change, lane 1 the next two, lane 2
   the next four: in each a device has one value, its mean. Lanes are *not* independent, so they share the error
   (`lane_share`: a half, a quarter, …) instead of multiplying their evidence.

**What keeps an absolute bound honest** (`bounded`): failures are reported sooner than successes. So a device under way
counts as good where the question is whether to halt, and as bad where it is whether to pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

STEPS = 256
"""A difference is kept as a whole number of 1/STEPS, rounded to the disadvantage of whoever bets on it."""
SHARE_STEPS = 10_000
"""A share of what a device did is kept as a whole number of 1/SHARE_STEPS."""
LANES_MAX = 7
"""Lanes of a comparison: the last one ends 2**7 − 1 periods after the change."""
CONTROLS_MAX = 4
"""Control devices of one candidate; more would hardly make the difference less noisy."""
BETS: tuple[tuple[float, float], ...] = ((0.04, 0.1), (0.12, 0.15), (0.3, 0.2), (0.6, 0.25), (0.95, 0.3))
"""(share of wealth put at risk, share of the first wealth that is bet so)."""
SPREAD_ASSUMED = 0.25
"""Standard deviation of a difference between devices (1: the cap of the metric), until `SPREAD_PAIRS_MIN` were seen."""
SPREAD_PAIRS_MIN = 8
ALIKE = (1.0,) * LANES_MAX
"""Caps of lanes in whose units the differences are themselves."""
E_SHOWN_MAX = 1e12
_BISECTIONS = 20
_LOG_MAX = 700.0

Pairs: TypeAlias = tuple[tuple[int, int], ...]
"""Histogram of differences: (whole STEPS, how often), ascending."""
Outcome: TypeAlias = Literal["pass", "breach", "unknown"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What the evidence says, in numbers that hold at every look."""

    outcome: Outcome
    estimate: float
    low: float
    """Above this, unless an event of probability alpha happened: where it is above the tolerated, the outcome is `breach`."""
    high: float
    """Below this, unless an event of probability beta happened: where it is below the harm that matters, `pass`."""
    e_halt: float
    """Evidence for harm; `breach` from 1/alpha on."""
    e_pass: float
    """Evidence against harm that matters; `pass` from 1/beta on."""
    sample: int
    needed: int
    """The sample with which a decision is expected, if the devices spread as they did so far."""


# --- one mean -----------------------------------------------------------------------------------


def log_above(values: Iterable[tuple[float, int]], theta: float, low: float) -> float:
    """Return the logarithm of the wealth of who bets that the mean of values in [low, 1] is above `theta`."""
    if theta <= low:
        return 0.0
    return _log_wealth([((value - theta) / (theta - low), count) for value, count in values])


def log_below(values: Iterable[tuple[float, int]], theta: float) -> float:
    """Return the logarithm of the wealth of who bets that the mean of values of at most 1 is below `theta`."""
    if theta >= 1:
        return 0.0
    return _log_wealth([((theta - value) / (1 - theta), count) for value, count in values])


def _log_wealth(gains: list[tuple[float, int]]) -> float:
    logs = [math.log(share) + sum(count * math.log1p(bet * gain) for gain, count in gains) for bet, share in BETS]
    top = max(logs)
    return top + math.log(sum(math.exp(one - top) for one in logs))


def lower_bound(values: Sequence[tuple[float, int]], low: float, error: float) -> float:
    """Return what the mean of values in [low, 1] is above, at every look at once, but for `error`."""
    need = -math.log(error)
    below, above = low, 1.0
    for _ in range(_BISECTIONS):  # wealth falls as theta rises
        middle = (below + above) / 2
        if log_above(values, middle, low) >= need:
            below = middle
        else:
            above = middle
    return below


def upper_bound(values: Sequence[tuple[float, int]], low: float, error: float) -> float:
    """Return what the mean of values in [low, 1] is below, at every look at once, but for `error`."""
    need = -math.log(error)
    below, above = low, 1.0
    for _ in range(_BISECTIONS):  # wealth rises with theta
        middle = (below + above) / 2
        if log_below(values, middle) >= need:
            above = middle
        else:
            below = middle
    return above


# --- a candidate and its control ----------------------------------------------------------------


def lane_of(age: int) -> int:
    """Return the lane (0, 1, 1, 2, 2, 2, 2, 3, …) of a period by its number since the change, 0 for the first whole one."""
    return (age + 1).bit_length() - 1


def lane_share(lane: int) -> float:
    """Return the share of the error probabilities that a lane may use; all shares together are below 1."""
    return 0.5 ** (lane + 1)


def pair_up(candidates: Sequence[float], controls: Sequence[float]) -> Pairs:
    """Return the differences between candidates and fresh controls that were measured over the same periods.

    Each device is in exactly one difference or in none. How many controls a candidate gets (or, where controls are few,
    how many candidates share one) follows from the two numbers alone, never from values.

    Args:
        candidates: one value in [0, 1] per device, in an order that does not depend on values.
        controls: the same of devices that were not used in this lane.
    """
    if not candidates or not controls:
        return ()
    pairs = min(len(candidates), len(controls))
    width = min(len(controls) // pairs, CONTROLS_MAX)
    found: Counter[int] = Counter()
    for at in range(pairs):
        mine = candidates[at * len(candidates) // pairs : (at + 1) * len(candidates) // pairs]
        theirs = controls[at * width : (at + 1) * width]
        difference = sum(mine) / len(mine) - sum(theirs) / len(theirs)
        found[math.floor(round(difference * STEPS, 6))] += 1
    return tuple(sorted(found.items()))


def draw(
    candidates: Sequence[tuple[int, float]], controls: Sequence[tuple[int, float]], spent: int
) -> tuple[Pairs, int]:
    """Compare a wave with controls that its lane has not used, those with the highest ranks first.

    A candidate gets several controls only from the upper half of those that are left: later waves need some too.

    Args:
        candidates: (rank, value) of the wave.
        controls: (rank, value) of devices that keep the incumbent, over the same periods.
        spent: the lowest rank that the lane has used as a control. Whoever is at or above it is used.

    Returns:
        The differences, and what is spent then.
    """
    mine = [value for rank, value in sorted(candidates) if rank < spent]
    fresh = sorted((one for one in controls if one[0] < spent), reverse=True)
    if not mine or not fresh:
        return (), spent
    width = min(max(len(fresh) // 2 // len(mine), 1), CONTROLS_MAX)
    used = fresh[: len(mine) * width]
    return pair_up(mine, [value for _, value in used]), used[-1][0]


def merge(parts: Iterable[Pairs]) -> Pairs:
    """Return the histogram of all parts together."""
    found: Counter[int] = Counter()
    for part in parts:
        for step, count in part:
            found[step] += count
    return tuple(sorted(found.items()))


def compare(
    lanes: Sequence[Pairs], harm: float, alpha: float, beta: float, caps: Sequence[float] = ALIKE, needed: int = 0
) -> Finding:
    """Judge differences between a candidate and its control.

    Args:
        lanes: differences by lane, each in units of the lane's cap.
        harm: the smallest mean difference that matters, above 0 and below every cap.
        alpha: bound on the probability of ever halting a candidate that is not worse.
        beta: bound on the probability of ever passing one that is worse by `harm` or more.
        caps: what a device's value is at most, by lane.
        needed: the sample that is expected to decide; 0: by how the devices spread so far.
    """
    halt, passed = _wealths(lanes, harm, caps)
    widest = max(caps)
    lows, highs, sums, sample = [-widest], [widest], 0.0, 0
    for lane, (pairs, cap) in enumerate(zip(lanes, caps, strict=False)):
        if pairs:
            share = lane_share(lane)
            lows.append(cap * lower_bound(_floors(pairs), -1.0, alpha * share))
            highs.append(cap * upper_bound(_ceilings(pairs), -1.0, beta * share))
            sums += cap / STEPS * sum(step * count for step, count in pairs)
            sample += sum(count for _, count in pairs)
    if not needed:
        _, spread = _moments(merge(lanes[:LANES_MAX]), sample)
        spread = spread if sample >= SPREAD_PAIRS_MIN else SPREAD_ASSUMED
        needed = sample_needed(harm / caps[0], alpha, beta, spread)
    return Finding(
        outcome=_outcome(halt, passed, alpha, beta),
        estimate=sums / sample if sample else 0.0,
        low=max(lows),
        high=min(highs),
        e_halt=_shown(halt),
        e_pass=_shown(passed),
        sample=sample,
        needed=needed,
    )


def outcome(lanes: Sequence[Pairs], harm: float, alpha: float, beta: float, caps: Sequence[float] = ALIKE) -> Outcome:
    """Return what `compare` decides, without the interval, which costs a hundred times as much."""
    return _outcome(*_wealths(lanes, harm, caps), alpha, beta)


def _wealths(lanes: Sequence[Pairs], harm: float, caps: Sequence[float]) -> tuple[float, float]:
    """Return the logarithms of the largest wealth of a lane against `no harm` and against `harm`, each times its share."""
    halts: list[float] = []
    passes: list[float] = []
    for lane, (pairs, cap) in enumerate(zip(lanes, caps, strict=False)):
        if pairs:
            halts.append(log_above(_floors(pairs), 0.0, -1.0) + math.log(lane_share(lane)))
            passes.append(log_below(_ceilings(pairs), harm / cap) + math.log(lane_share(lane)))
    return max(halts, default=0.0), max(passes, default=0.0)


def _floors(pairs: Pairs) -> list[tuple[float, int]]:
    return [(step / STEPS, count) for step, count in pairs]


def _ceilings(pairs: Pairs) -> list[tuple[float, int]]:
    return [(min((step + 1) / STEPS, 1.0), count) for step, count in pairs]


def sample_needed(
    harm: float, alpha: float, beta: float, spread: float = SPREAD_ASSUMED, lane: int = 0, rounding: float = 0.0
) -> int:
    """Return the number of differences with which both a harm of `harm` and none at all are expected to be told.

    Args:
        harm: in units of the metric's cap.
        alpha: probability of a false halt.
        beta: probability of a false pass.
        spread: standard deviation of a difference, in the same units.
        lane: whose share of the errors it may use.
        rounding: by how much differences are rounded up where it is whether to pass; below `harm`.
    """
    squares = spread * spread + harm * harm
    halting = _steps_until(alpha * lane_share(lane), harm, squares)
    passing = _steps_until(beta * lane_share(lane), (harm - rounding) / (1 - harm), squares / (1 - harm) ** 2)
    return max(halting, passing)


def _steps_until(error: float, mean: float, squares: float) -> int:
    """Bound the sample from log(1 + bet·x) ≥ bet·x + (log(1 − bet) + bet)·x², which holds for x ≥ −1."""
    best = math.inf
    for bet, share in BETS:
        growth = bet * mean + (math.log1p(-bet) + bet) * squares
        if growth > 0:
            best = min(best, -math.log(error * share) / growth)
    if math.isinf(best):  # a harm too small for the smallest bet: its own, as if it were among them
        bet = mean / (2 * squares)
        best = -math.log(error * BETS[0][1]) / (bet * mean / 2)
    return math.ceil(best)


# --- an absolute bound --------------------------------------------------------------------------


def bounded(
    *, bad: int, good: int, under_way: int, quiet: int = 0, tolerated: float, harm: float, alpha: float, beta: float
) -> Finding:
    """Judge a share of devices that has no control against a tolerated share.

    Args:
        bad: devices to which it happened.
        good: devices that ended without it.
        under_way: devices that may still come to either.
        quiet: devices of which nobody waits to hear: no evidence for passing, and good where it is whether to halt.
        tolerated: a share up to which a halt would be false, above 0.
        harm: how much more than `tolerated` matters; together below 1.
        alpha: bound on the probability of ever halting a bundle with a share of at most `tolerated`.
        beta: bound on the probability of ever passing one with a share of `tolerated + harm` or more.
    """
    halting = [(1.0, bad), (0.0, good + under_way + quiet)]
    passing = [(1.0, bad + under_way), (0.0, good)]
    judged = bad + good
    halt = log_above(halting, tolerated, 0.0)
    passed = log_below(passing, tolerated + harm)
    return Finding(
        outcome=_outcome(halt, passed, alpha, beta) if judged else "unknown",
        estimate=bad / judged if judged else 0.0,
        low=lower_bound(halting, 0.0, alpha),
        high=upper_bound(passing, 0.0, beta),
        e_halt=_shown(halt),
        e_pass=_shown(passed),
        sample=judged,
        needed=bounded_needed(tolerated, harm, alpha, beta),
    )


def bounded_mean(
    values: Pairs, *, under_way: int, quiet: int, tolerated: float, harm: float, alpha: float, beta: float
) -> Finding:
    """Judge the mean over devices of one value in [0, 1] each against a tolerated mean, at every look.

    The bets and the intervals are those of `bounded`, which is the case of values 0 and 1 (Waudby-Smith and Ramdas 2024,
    theorem 3: the capital process of a bounded mean). A device has one value, which no longer changes when it is counted;
    until then it counts as 0 where the question is whether to halt, and as 1 where it is whether to pass.

    Args:
        values: histogram in SHARE_STEPS, rounded down.
        under_way: devices whose value is not known yet.
        quiet: devices that will have none.
        tolerated: a mean up to which a halt would be false, above 0.
        harm: how much more matters; together below 1.
        alpha: bound on the probability of ever halting at a mean of at most `tolerated`.
        beta: bound on the probability of ever passing at one of `tolerated + harm` or more.
    """
    halting = [*((step / SHARE_STEPS, count) for step, count in values), (0.0, under_way + quiet)]
    passing = [*((min((step + 1) / SHARE_STEPS, 1.0), count) for step, count in values), (1.0, under_way)]
    sample = sum(count for _, count in values)
    halt = log_above(halting, tolerated, 0.0)
    passed = log_below(passing, tolerated + harm)
    return Finding(
        outcome=_outcome(halt, passed, alpha, beta) if sample else "unknown",
        estimate=sum(step * count for step, count in values) / sample / SHARE_STEPS if sample else 0.0,
        low=lower_bound(halting, 0.0, alpha),
        high=upper_bound(passing, 0.0, beta),
        e_halt=_shown(halt),
        e_pass=_shown(passed),
        sample=sample,
        needed=bounded_needed(tolerated, harm, alpha, beta),
    )


def bounded_needed(tolerated: float, harm: float, alpha: float, beta: float) -> int:
    """Return the number of devices with which a share of `tolerated + harm`, and one of half of `tolerated`, are told."""
    worst, usual = tolerated + harm, tolerated / 2
    halting = _bernoulli_steps(alpha, worst, (1 - tolerated) / tolerated, -1.0)
    passing = _bernoulli_steps(beta, usual, -1.0, worst / (1 - worst))
    return max(halting, passing)


def _bernoulli_steps(error: float, share_bad: float, gain_bad: float, gain_good: float) -> int:
    best = math.inf
    for bet, share in BETS:
        growth = share_bad * math.log1p(bet * gain_bad) + (1 - share_bad) * math.log1p(bet * gain_good)
        if growth > 0:
            best = min(best, -math.log(error * share) / growth)
    if math.isinf(best):
        mean = share_bad * gain_bad + (1 - share_bad) * gain_good
        squares = share_bad * gain_bad**2 + (1 - share_bad) * gain_good**2
        best = -math.log(error * BETS[0][1]) * 2 * squares / mean**2
    return math.ceil(best)


# --- how fast to widen --------------------------------------------------------------------------


def harm_rate_bound(bad: int, good: int, error: float) -> float:
    """Return what the share of harmed devices is below, at every look, but for `error`; 1 until there are data."""
    return upper_bound([(1.0, bad), (0.0, good)], 0.0, error)


def expected_harm(*, exposed: int, bad: int, good: int, error: float) -> float:
    """Return how many of the devices that nothing is known of yet are harmed at most: (exposed − judged) × bound."""
    return max(exposed - bad - good, 0) * harm_rate_bound(bad, good, error)


def may_expose(*, bound: float, exposed: int, bad: int, good: int, error: float) -> int:
    """Return how many more devices may be exposed now so that `expected_harm` stays at or below `bound`."""
    most = math.floor(bound / harm_rate_bound(bad, good, error) + 1e-9)
    return max(most - max(exposed - bad - good, 0), 0)


# --- parts --------------------------------------------------------------------------------------


def _outcome(halt: float, passed: float, alpha: float, beta: float) -> Outcome:
    if halt >= -math.log(alpha):
        return "breach"
    return "pass" if passed >= -math.log(beta) else "unknown"


def _moments(pairs: Pairs, sample: int) -> tuple[float, float]:
    if not sample:
        return 0.0, SPREAD_ASSUMED
    mean = sum(step * count for step, count in pairs) / sample
    variance = sum((step - mean) ** 2 * count for step, count in pairs) / max(sample - 1, 1)
    return mean / STEPS, math.sqrt(variance) / STEPS


def _shown(log_e: float) -> float:
    return min(math.exp(min(log_e, _LOG_MAX)), E_SHOWN_MAX)
