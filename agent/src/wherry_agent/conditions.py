"""Whether weights may be downloaded now: network, power, temperature and hours that the device's settings ask for.

Pure: what the device reads comes in as `Readings`, local time as a function, so that daylight saving is the system's
business and a window is searched in real minutes instead of being computed. What cannot be read counts for the device
where there is nothing to protect (no battery, no sensor), and against it where there is (a battery that does not say).
Never evidence against a model: a download that has to wait waits, one that is running is interrupted and resumes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

AGAIN_S = 3600.0
"""Where nobody knows how long it lasts; readings are looked at every `check_s` all the while."""
MARGIN_C = 3.0
MARGIN_PERCENT = 3
"""A download that waits begins only this far on the right side of a limit, so that it does not stop at once."""
DAY_MINUTES = 24 * 60
SEARCH_MINUTES = 8 * DAY_MINUTES
"""Every window opens within a week; daylight saving may swallow it once."""
WINDOWS_MAX = 32

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(
    r"(?:(?P<days>[a-z]{3}(?:-[a-z]{3})?(?:,[a-z]{3}(?:-[a-z]{3})?)*) )?(?P<from>\d\d:\d\d)-(?P<to>\d\d:\d\d)"
)

Local = Callable[[float], tuple[int, int]]
"""Wall time in seconds → (weekday, 0 for Monday; minute of the day), by the device's own clock and zone."""


class Conditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[conditions]` of the settings; as it is by default, it asks for nothing."""

    allow_metered: bool = True
    """Download over a network that costs by volume."""
    metered: Literal["auto", "yes", "no"] = "auto"
    """Whether it does; `auto` asks NetworkManager, and takes what cannot be found out as no."""
    metered_file: str = ""
    """With `auto`, a file that says `yes` or `no` instead (a modem's script may write it)."""
    mains: bool = False
    """Download only on mains power."""
    battery_percent_min: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    """On battery, download only while it holds at least this much."""
    temperature_c_max: Annotated[float, msgspec.Meta(ge=0, le=150)] = 0.0
    """Download only while no thermal zone is hotter; 0 for any temperature."""
    windows: Annotated[list[str], msgspec.Meta(max_length=WINDOWS_MAX)] = []
    """Download only within one of these, in the device's own time: `02:00-05:00`, `sat,sun 00:00-24:00`, `mon-fri 22:00-06:00`."""
    check_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    """The device is looked at again after this long, also while something is downloaded."""
    sys: str = "/sys"
    """Where the kernel shows power supplies and thermal zones."""


@dataclass(frozen=True, slots=True)
class Window:
    """Hours of some days; one that ends before it starts goes on into the next day."""

    days: frozenset[int]
    start: int
    end: int

    def holds(self, weekday: int, minute: int) -> bool:
        """Tell whether a time is within."""
        if self.start < self.end:
            return weekday in self.days and self.start <= minute < self.end
        return (weekday in self.days and minute >= self.start) or ((weekday - 1) % 7 in self.days and minute < self.end)


@dataclass(frozen=True, slots=True)
class Readings:
    """What the device is like now; None is unknown."""

    local: Local
    metered: bool | None = None
    mains: bool | None = None
    battery: bool = False
    """Whether there is one."""
    battery_percent: int | None = None
    temperature_c: float | None = None
    clock_set: bool = True
    """False for a clock that is behind a verified time."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now."""

    detail: str
    retry_after_s: float


def parse_window(text: str) -> Window:
    """Read a window.

    Raises:
        ValueError: saying what is wrong.
    """
    found = _WINDOW.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not DAYS HH:MM-HH:MM, as in 'mon-fri 22:00-06:00' or '02:00-05:00'")
    start, end = _minute(found["from"], text), _minute(found["to"], text)
    if start in (end, DAY_MINUTES):
        raise ValueError(f"{text!r} is no time at all; all day is 00:00-24:00")
    return Window(_days(found["days"], text), start, end)


def decide(settings: Conditions, readings: Readings, now_s: float, *, running: bool) -> Wait | None:
    """Say why nothing may be downloaded now and when to look again; None if it may.

    Args:
        settings: what the operator asks for.
        readings: what the device is like.
        now_s: wall time.
        running: a download is under way, and stops only when a limit is really crossed.
    """
    if readings.metered and not settings.allow_metered:
        return Wait("the network is metered", AGAIN_S)
    for wait in (_power(settings, readings, running=running), _heat(settings, readings, running=running)):
        if wait is not None:
            return wait
    return hours(settings.windows, readings, now_s)


def _power(settings: Conditions, readings: Readings, *, running: bool) -> Wait | None:
    on_battery = readings.battery and not readings.mains
    if not on_battery:
        return None
    if settings.mains:
        return Wait("the device runs on battery", AGAIN_S)
    least = settings.battery_percent_min
    if not least:
        return None
    if readings.battery_percent is None:
        return Wait(f"the battery does not say whether it holds {least} %", AGAIN_S)
    wanted = least if running else min(100, least + MARGIN_PERCENT)
    if readings.battery_percent < wanted:
        return Wait(f"the battery is at {readings.battery_percent} %, {wanted} are asked for", AGAIN_S)
    return None


def _heat(settings: Conditions, readings: Readings, *, running: bool) -> Wait | None:
    if not settings.temperature_c_max or readings.temperature_c is None:
        return None
    most = settings.temperature_c_max if running else settings.temperature_c_max - MARGIN_C
    if readings.temperature_c <= most:
        return None
    return Wait(f"the device is at {readings.temperature_c:.0f} °C, {most:.0f} are allowed", AGAIN_S)


def hours(texts: Sequence[str], readings: Readings, now_s: float) -> Wait | None:
    """Say how long until one of these windows opens; None where one is open, or there are none."""
    if not texts:
        return None
    if not readings.clock_set:
        return Wait("the clock is not set, so nobody knows whether this is a maintenance window", AGAIN_S)
    windows = [parse_window(text) for text in texts]
    if _open(windows, readings.local(now_s)):
        return None
    minute_s = now_s - now_s % 60
    for step in range(1, SEARCH_MINUTES):
        weekday, minute = readings.local(minute_s + 60 * step)
        if _open(windows, (weekday, minute)):
            opens = f"{DAYS[weekday]} {minute // 60:02}:{minute % 60:02}"
            detail = f"outside of the maintenance windows; the next opens {opens}, local time"
            return Wait(detail, minute_s + 60 * step - now_s)
    return Wait("no maintenance window opens within a week", 60.0 * DAY_MINUTES)


def _open(windows: Sequence[Window], local: tuple[int, int]) -> bool:
    return any(window.holds(*local) for window in windows)


def _minute(text: str, whole: str) -> int:
    hour, minute = int(text[:2]), int(text[3:])
    if hour > 24 or minute > 59 or (hour == 24 and minute):
        raise ValueError(f"{whole!r}: {text} is no time of day")
    return hour * 60 + minute


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        for name in (first, last or first):
            if name not in DAYS:
                raise ValueError(f"{whole!r}: {name} is no day; there are {', '.join(DAYS)}")
        start, end = DAYS.index(first), DAYS.index(last or first)
        found |= {(start + step) % 7 for step in range((end - start) % 7 + 1)}
    return frozenset(found)
