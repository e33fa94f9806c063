"""What decides on a simulated device: the functions of the real machine, as values that a mutant may wrap.

Nobody patches modules: a world is given a `Brain`, and `REAL` is exactly `wherry_agent.machine`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wherry_agent import machine
from wherry_agent.state import Effect, Event, State
from wherry_shared.clock import Now
from wherry_shared.wire import Report

Turn = tuple[State, tuple[Effect, ...]]


@dataclass(frozen=True, slots=True)
class Brain:
    """The pure functions that a daemon calls, and the one rule that it keeps itself."""

    step: Callable[[State, Event, Now], Turn] = machine.step
    resume: Callable[[State, Now], Turn] = machine.resume
    next_deadline_ms: Callable[[State, Now], int | None] = machine.next_deadline_ms
    outgoing: Callable[[State], tuple[Report, ...]] = machine.outgoing
    may_wait: Callable[[State, State], bool] = machine.may_wait
    journal_first: bool = True
    """State is made durable before its effects run; only a mutant says otherwise."""


REAL = Brain()
