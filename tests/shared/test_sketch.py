"""The sketch keeps its stated relative error, merges exactly, and survives foreign bins."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_shared.sketch import BINS_MAX, RELATIVE_ERROR, Sketch, since

VALUES = st.lists(st.floats(0.01, 1e7), min_size=1, max_size=200)


def filled(values: list[float]) -> Sketch:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    return sketch


@given(VALUES, st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_within_the_stated_relative_error(values: list[float], q: float) -> None:
    exact = sorted(values)[math.floor(q * (len(values) - 1))]
    estimate = filled(values).quantile(q)
    assert estimate is not None
    assert abs(estimate - exact) <= RELATIVE_ERROR * exact * (1 + 1e-9)


@given(VALUES, VALUES)
def test_merging_is_the_same_as_counting_together(one: list[float], other: list[float]) -> None:
    merged = filled(one)
    merged.merge(filled(other))
    together = filled(one + other)
    assert (merged.bins, merged.count) == (together.bins, together.count)


@given(VALUES)
def test_a_sketch_comes_back_from_the_wire(values: list[float]) -> None:
    sketch = filled([*values, 0.0])
    back = Sketch.from_wire(sketch.to_wire())
    assert (back.bins, back.zeros, back.count) == (sketch.bins, sketch.zeros, sketch.count)


def test_memory_is_bounded_and_upper_quantiles_keep_their_error() -> None:
    sketch = filled([1.03**power for power in range(900)])
    assert len(sketch.bins) == BINS_MAX
    exact = 1.03 ** math.floor(0.99 * 899)
    estimate = sketch.quantile(0.99)
    assert estimate is not None
    assert abs(estimate - exact) <= RELATIVE_ERROR * exact * (1 + 1e-9)


@pytest.mark.parametrize("wire", [{"x": 1}, {"1": -1}, {"99999999": 1}, {"1.5": 1}])
def test_foreign_bins_are_refused(wire: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Sketch.from_wire(wire)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_what_was_counted_between_two_looks_is_counted_once_also_when_bins_were_merged(seed: int, looks: int) -> None:
    random = Random(seed)
    whole, before = Sketch(), dict[str, int]()
    for _ in range(looks):
        values = [1.02 ** random.uniform(-400, 400) for _ in range(400)] + [0.0] * random.randrange(3)
        for value in values:
            whole.add(value)
        fresh, found = filled(values), Sketch.from_wire(since(whole.to_wire(), before))
        assert (found.count, found.zeros) == (fresh.count, fresh.zeros)
        lowest = min(whole.bins)
        assert {i: n for i, n in found.bins.items() if i > lowest} == {
            i: n for i, n in fresh.bins.items() if i > lowest
        }
        before = whole.to_wire()
    assert looks < 4 or len(whole.bins) == BINS_MAX, "it merged"


def test_counts_of_another_sketch_are_all_new() -> None:
    assert since({"5": 3, "z": 1}, {"5": 9, "z": 4}) == {"5": 3, "z": 1}
    assert since({}, {"5": 9}) == {}


def test_an_empty_sketch_has_no_quantile() -> None:
    assert Sketch().quantile(0.5) is None
    assert Sketch().mean is None
