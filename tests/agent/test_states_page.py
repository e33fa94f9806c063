"""The page of states says what the machine does now."""

from __future__ import annotations

from tests.agent import states_page


def test_each_sample_is_in_the_phase_that_it_stands_for() -> None:
    for name, state in states_page.samples().items():
        assert type(state.models[states_page.MODEL].phase).__name__ == name.split(",")[0]


def test_the_page_is_what_the_machine_does() -> None:
    shown = states_page.PAGE.read_text(encoding="utf-8")
    assert shown == states_page.page(), "run python -m tests.agent.states_page"
