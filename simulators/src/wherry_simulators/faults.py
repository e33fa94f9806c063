"""What goes wrong, how often, and until when: one frozen table per scenario, drawn from the seed.

A crash takes the memory of a device at one of the seams that the daemon has (architecture.md §3.2): before the journal
is written, after it and before the effects, between two effects, and between two events. What it had promised and not
yet done is gone; what others promised it may still arrive after the boot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wherry_simulators.network import CALM, ROUGH, STORM, Weather


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities per opportunity. Outside its time nothing new goes wrong; what is under way still arrives."""

    until_ms: int = 0
    from_ms: int = 0
    crash_before_journal: float = 0.0
    """The state was decided and never became durable."""
    crash_after_journal: float = 0.0
    """Durable, and not one of its effects ran."""
    crash_between_effects: float = 0.0
    crash_between_events: float = 0.0
    stopped: float = 0.0
    """Share of events before which the agent is told to end; it is started again."""
    unsynced_kept: float = 0.5
    """At a crash in the middle of the journal write: share of cases in which the new bytes made it to the disk."""
    child_lost: float = 0.0
    """A courier or canary dies without an answer."""
    answer_late: float = 0.0
    """The answer of a child comes up to `answer_late_ms` late, possibly in the next boot or after its successor."""
    answer_late_ms: int = 900_000
    answer_repeated: float = 0.0
    worker_silent: float = 0.0
    """Share of commands that a worker never answers, because it hangs; it does nothing more until it is ended."""
    worker_crash_per_s: float = 0.0
    """The worker dies for reasons of its own, whatever it serves."""
    fetch_trouble: float = 0.0
    """A courier comes back with a network or disk reason."""
    server_silent: float = 0.0
    """Share of server turns (100 s) in which the server takes nothing in and sends nothing."""
    boot_ms: int = 3_000
    wall_clock_wrong: float = 0.0
    """Share of boots that begin with a wall clock years in the past."""
    weather: Weather = field(default=CALM)
    weather_after: Weather = field(default=CALM)


NONE = Faults()
"""Nothing goes wrong."""

MODERATE = Faults(
    until_ms=3 * 3_600_000,
    crash_before_journal=0.004,
    crash_after_journal=0.006,
    crash_between_effects=0.006,
    crash_between_events=0.004,
    child_lost=0.03,
    answer_late=0.03,
    answer_repeated=0.05,
    worker_crash_per_s=1 / 20_000,
    fetch_trouble=0.1,
    server_silent=0.1,
    weather=ROUGH,
)

HEAVY = Faults(
    until_ms=3 * 3_600_000,
    crash_before_journal=0.02,
    crash_after_journal=0.03,
    crash_between_effects=0.03,
    crash_between_events=0.02,
    child_lost=0.1,
    answer_late=0.12,
    answer_repeated=0.15,
    worker_crash_per_s=1 / 4_000,
    fetch_trouble=0.3,
    server_silent=0.3,
    wall_clock_wrong=0.1,
    weather=STORM,
)
