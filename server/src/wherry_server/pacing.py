"""When a stage may begin, and how fast and at which hours it may expose. Pure.

Three things besides evidence hold a rollout back: a date (`start_at`), people (`approval`), and inside a stage a rate and
the maintenance window of each device. None of them is evidence, so no deadline runs while they are all that is missing.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from wherry_shared.clock import MICROSECONDS
from wherry_shared.errors import RefusedError

MINUTE_S = 60
DAY_MINUTES = 24 * 60
RATE_MIN, RATE_MAX = 0.01, 10_000_000.0
"""Devices per minute."""
RAMP_S_MAX = 30 * 86_400
WINDOW_MINUTES_MIN = 10
"""A shorter window would open and shut between two looks."""
APPROVERS_MAX = 20
UTC_NAME = "UTC"

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a plan says: an unknown field is a wish that nobody would obey, so it is refused."""


class Rate(_Strict, frozen=True, kw_only=True):
    """How many devices a stage exposes per minute; with `ramp_s` it grows evenly from `per_minute` to `ramp_to`."""

    per_minute: float
    ramp_to: float | None = None
    ramp_s: int = 0

    def within(self, elapsed_s: float) -> int:
        """Return how many devices may be exposed by then; one at the first moment."""
        first = self.per_minute / MINUTE_S
        last = (self.per_minute if self.ramp_to is None else self.ramp_to) / MINUTE_S
        ramping = min(elapsed_s, self.ramp_s)
        area = first * ramping + ((last - first) * ramping * ramping / (2 * self.ramp_s) if self.ramp_s else 0.0)
        return 1 + int(area + last * (elapsed_s - ramping) + 1e-9)


class Window(_Strict, frozen=True, kw_only=True):
    """Hours of the device's own time zone in which it may be exposed; `until` at or before `from_` is on the next day."""

    from_: str = msgspec.field(name="from")
    until: str
    days: list[Day] = msgspec.field(default_factory=lambda: list(DAYS))
    """Days on which it opens."""

    @property
    def told(self) -> list[str]:
        """What devices read (`wire.OfferedModel.windows`); one that opens at the same time every day is two there."""
        days = "" if set(self.days) == set(DAYS) else ",".join(self.days) + " "
        if self.from_ != self.until:
            return [f"{days}{self.from_}-{self.until}"]
        following = ",".join(DAYS[(DAYS.index(day) + 1) % 7] for day in self.days)
        found = [f"{days}{self.from_}-24:00"]
        return found if self.until == "00:00" else [*found, f"{following} 00:00-{self.until}"]

    def open_at(self, moment_us: int, timezone: str) -> bool:
        """Tell whether it is open on a device of `timezone`; one that cannot be read counts as UTC."""
        local = datetime.fromtimestamp(moment_us / MICROSECONDS, _zone(timezone))
        minute = local.hour * 60 + local.minute
        opens, shuts = _minute(self.from_), _minute(self.until)
        today, yesterday = DAYS[local.weekday()], DAYS[(local.weekday() - 1) % 7]
        if opens < shuts:
            return today in self.days and opens <= minute < shuts
        return (today in self.days and minute >= opens) or (yesterday in self.days and minute < shuts)

    def open_for(self, seconds: int, since_us: int, until_us: int, timezone: str) -> bool:
        """Tell whether it was open for so long in all between two moments, on a device of `timezone`."""
        zone, left = _zone(timezone), seconds * MICROSECONDS
        opens, shuts = _clock(self.from_), _clock(self.until)
        day = datetime.fromtimestamp(since_us / MICROSECONDS, zone).date() - timedelta(days=1)
        last = datetime.fromtimestamp(until_us / MICROSECONDS, zone).date()
        while left > 0 and day <= last:
            if DAYS[day.weekday()] in self.days:
                following = day + timedelta(days=1) if shuts <= opens else day
                begun = round(datetime.combine(day, opens, zone).timestamp()) * MICROSECONDS
                ended = round(datetime.combine(following, shuts, zone).timestamp()) * MICROSECONDS
                left -= max(min(ended, until_us) - max(begun, since_us), 0)
            day += timedelta(days=1)
        return left <= 0


class Approval(_Strict, frozen=True, kw_only=True):
    """Who has to agree before a stage begins: so many different people."""

    approvers: int = 1
    stages: list[int] = msgspec.field(default_factory=lambda: [1])
    """Numbers of the stages that wait for it, from 1."""
    rounds: list[int] = msgspec.field(default_factory=lambda: [1])
    """In which of two rounds they do."""
    creator: bool = False
    """Whether the one who made the rollout may be one of them."""
    names: list[str] = []
    """Names of the tokens and people that may approve; any approver where none is given."""


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # what a device says of itself is no ground to stop
        return ZoneInfo(UTC_NAME)


def _clock(text: str) -> clock_time:
    hours, _, minutes = text.partition(":")
    return clock_time(int(hours), int(minutes))


def _minute(clock: str) -> int:
    hours, _, minutes = clock.partition(":")
    return int(hours) * 60 + int(minutes)


def start_us(text: str) -> int:
    """Return the microseconds UTC of a date with a zone, 0 of none.

    Raises:
        RefusedError: `plan_date`.
    """
    if not text:
        return 0
    try:
        read = datetime.fromisoformat(text)
        if read.tzinfo is not None:
            return round((read - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))
    except (ValueError, OverflowError):
        pass
    raise RefusedError(
        "plan_date", f"start_at {text[:40]!r} is no date with a zone", next_step="such as 2026-12-01T22:00:00+01:00"
    )


def check(
    rate: Rate | None, window: Window | None, approval: Approval | None, start_at: str, stages: int, rounds: int
) -> None:
    """Check what a plan says of pace.

    Raises:
        RefusedError: `plan_rate`, `plan_window`, `plan_approval` or `plan_date`.
    """
    start_us(start_at)
    if rate is not None:
        _check_rate(rate)
    if window is not None:
        _check_window(window)
    if approval is None:
        return
    if not 1 <= approval.approvers <= APPROVERS_MAX:
        raise RefusedError("plan_approval", f"{approval.approvers} approvers, expected 1 to {APPROVERS_MAX}")
    if not approval.stages or not all(1 <= stage <= stages for stage in approval.stages):
        raise RefusedError("plan_approval", f"approval names stages {approval.stages}, the plan has {stages}")
    if not approval.rounds or not all(1 <= one <= rounds for one in approval.rounds):
        raise RefusedError("plan_approval", f"approval names rounds {approval.rounds}, the plan has {rounds}")
    if approval.names and len(set(approval.names)) < approval.approvers:
        raise RefusedError("plan_approval", f"{approval.approvers} approvers of {len(set(approval.names))} named ones")


def _check_rate(rate: Rate) -> None:
    for name, value in (("per_minute", rate.per_minute), ("ramp_to", rate.ramp_to)):
        if value is not None and not RATE_MIN <= value <= RATE_MAX:
            raise RefusedError("plan_rate", f"{name} is {value}, expected {RATE_MIN} to {RATE_MAX:.0f}")
    if (rate.ramp_to is None) != (rate.ramp_s == 0) or not 0 <= rate.ramp_s <= RAMP_S_MAX:
        raise RefusedError("plan_rate", f"a ramp has both ramp_to and ramp_s (1 to {RAMP_S_MAX})")


def _check_window(window: Window) -> None:
    for text in (window.from_, window.until):
        hours, colon, minutes = text.partition(":")
        two = len(hours) == len(minutes) == 2 and (hours + minutes).isdecimal() and (hours + minutes).isascii()
        if not colon or not two or int(hours) > 23 or int(minutes) > 59:
            raise RefusedError("plan_window", f"{text[:20]!r} is no time of day", next_step="such as 22:00")
    length = (_minute(window.until) - _minute(window.from_)) % DAY_MINUTES or DAY_MINUTES
    if not window.days or length < WINDOW_MINUTES_MIN:
        raise RefusedError(
            "plan_window", f"a window opens on one day at least, for {WINDOW_MINUTES_MIN} minutes at least"
        )
