"""The page of actions says what the engine does now."""

from __future__ import annotations

from typing import get_args

import pytest

from tests.server import rollouts_page
from wherry_server.rollout import Command, State
from wherry_server.rollouts import ALLOWED


def test_the_page_is_what_the_engine_does() -> None:
    shown = rollouts_page.PAGE.read_text(encoding="utf-8")
    assert shown == rollouts_page.page(), "run python -m tests.server.rollouts_page"


def test_each_state_and_each_action_is_on_it() -> None:
    assert {progress.state for progress in rollouts_page.states().values()} == set(get_args(State))
    assert set(ALLOWED) == {command for command in get_args(Command) if command}


@pytest.mark.parametrize("command", [command for command in get_args(Command) if command])
def test_what_is_allowed_does_something(command: Command) -> None:
    said = [rollouts_page.outcome(progress, command) for progress in rollouts_page.states().values()]
    said += [
        rollouts_page.outcome(progress, command, plan, known)
        for plan, progress, known in rollouts_page.rounds().values()
    ]
    assert "" not in said
    assert set(said) - {"·"}
