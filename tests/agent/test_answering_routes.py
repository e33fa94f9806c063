"""Who answers on trial: stable shares, standing by, and what the incumbent takes over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.serving_kit import loadable
from tests.shared.engines import models
from wherry_agent.answering.arms import Counter, load_variant
from wherry_agent.answering.ask import PLAIN, Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Published
from wherry_agent.answering.route import Route
from wherry_shared.ids import in_share

ONES = {"x": np.ones((1, 4), np.float32)}
UNITS = 2000


@given(
    salt=st.text(max_size=20),
    unit=st.text(max_size=40),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_who_is_in_a_share_stays_in_a_larger_one(salt: str, unit: str, shares: list[float]):
    small, large = shares
    if in_share(salt, unit, small):
        assert in_share(salt, unit, large)
    assert in_share(salt, unit, small) == in_share(salt, unit, small)
    assert in_share(salt, unit, 1.0)
    assert not in_share(salt, unit, 0.0)


@given(salt=st.text(max_size=20), share=st.floats(0.01, 0.99))
def test_a_share_of_many_units_is_close_to_what_was_asked(salt: str, share: float):
    picked = sum(in_share(salt, f"unit {number}", share) for number in range(UNITS))
    deviation = (UNITS * share * (1 - share)) ** 0.5
    assert abs(picked - UNITS * share) < 6 * deviation + 1


def test_a_sequence_goes_before_the_requests_own_id_and_both_before_nothing():
    route = Route("split", 0.5, "s")
    for number in range(200):
        sequence = Ask(sequence_id=f"s{number}")
        assert route.picks(Ask(request_id="r", sequence_id=f"s{number}")) == route.picks(sequence)
        assert route.picks(Ask(request_id=f"s{number}")) == route.picks(sequence)
    picked = sum(route.picks(PLAIN) for _ in range(UNITS))
    assert abs(picked - UNITS / 2) < 6 * (UNITS / 4) ** 0.5


@pytest.fixture
def pair(tmp_path: Path):
    """A published candidate (3 · x) beside its incumbent (2 · x), by route."""
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    candidate, incumbent = load_variant(new), load_variant(old)

    def published(route: Route) -> Published:
        return Published(
            active=candidate,
            counter=Counter(new, "candidate", "t"),
            incumbent=incumbent,
            incumbent_counter=Counter(old, "incumbent"),
            trial="t",
            route=route,
        )

    return published


def answers(published: Published, asks: list[Ask]) -> list[float]:
    helpers, gate = Helpers(), RunGate(2)
    found = [float(published.answer(gate, helpers, ONES, ask=ask).outputs["y"][0, 0]) for ask in asks]
    helpers.close()
    return found


def test_a_split_lets_the_candidate_answer_its_share_and_only_that(pair):
    asks = [Ask(request_id=str(number)) for number in range(60)]
    published = pair(Route("split", 0.3, "salt"))
    first = answers(published, asks)
    assert first == [3.0 if in_share("salt", ask.request_id, 0.3) else 2.0 for ask in asks]
    assert answers(published, asks) == first
    candidate, incumbent = published.counter.stats(), published.incumbent_counter.stats()
    assert (candidate.requests, incumbent.requests) == (2 * first.count(3.0), 2 * first.count(2.0))
    assert candidate.fallbacks == 0


def test_a_candidate_that_stands_by_answers_nobody_and_one_that_took_over_everybody(pair):
    asks = [Ask(request_id=str(number)) for number in range(10)]
    waiting = pair(Route("blue_green", 0.0, "salt"))
    assert answers(waiting, asks) == [2.0] * 10
    assert waiting.counter.stats().requests == 0
    assert answers(pair(Route("blue_green", 1.0, "salt")), asks) == [3.0] * 10
    assert answers(pair(Route("replace", 0.0, "salt")), asks) == [3.0] * 10
