"""When weights may be downloaded: every condition by itself, and hours through the nights when clocks are changed."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent.builders import MODEL, fresh, offer, offered, resolved, run
from tests.agent.serving_kit import until
from wherry_agent import readings
from wherry_agent.children import Progress
from wherry_agent.conditions import DAYS, Conditions, Readings, decide, parse_window
from wherry_agent.downloads import Downloads
from wherry_agent.rate import BURST_S, Bucket
from wherry_agent.state import Connected, Fetch, State, TaskFailed, Waiting
from wherry_shared import reasons

BERLIN = ZoneInfo("Europe/Berlin")


def berlin(wall_s: float) -> tuple[int, int]:
    local = datetime.fromtimestamp(wall_s, BERLIN)
    return local.weekday(), local.hour * 60 + local.minute


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


NOON = at("2026-06-03T12:00")  # a Wednesday


def why(asked: Conditions, *, running: bool = False, now_s: float = NOON, **found) -> str:
    wait = decide(asked, Readings(berlin, **found), now_s, running=running)
    return wait.detail if wait is not None else ""


BATTERY = {"battery": True, "mains": False}


@pytest.mark.parametrize(
    ("asked", "found", "part"),
    [
        ({}, {"metered": True, "temperature_c": 99.0, **BATTERY, "battery_percent": 1}, ""),
        ({"allow_metered": False}, {"metered": True}, "metered"),
        ({"allow_metered": False}, {"metered": False}, ""),
        ({"allow_metered": False}, {"metered": None}, ""),
        ({"mains": True}, BATTERY, "on battery"),
        ({"mains": True}, {"battery": True, "mains": True}, ""),
        ({"mains": True}, {}, ""),  # no battery: it is on mains, whatever says so
        ({"battery_percent_min": 50}, {**BATTERY, "battery_percent": 49}, "49 %"),
        ({"battery_percent_min": 50}, {**BATTERY, "battery_percent": 52}, "53"),
        ({"battery_percent_min": 50}, {**BATTERY, "battery_percent": 53}, ""),
        ({"battery_percent_min": 50}, {**BATTERY, "battery_percent": None}, "does not say"),
        ({"battery_percent_min": 50}, {"battery": True, "mains": True, "battery_percent": 5}, ""),
        ({"temperature_c_max": 70.0}, {"temperature_c": 68.0}, "68 °C, 67"),
        ({"temperature_c_max": 70.0}, {"temperature_c": 67.0}, ""),
        ({"temperature_c_max": 70.0}, {"temperature_c": None}, ""),
        ({"windows": ["02:00-05:00"]}, {}, "opens thu 02:00"),
        ({"windows": ["wed 11:00-13:00"]}, {}, ""),
        ({"windows": ["wed 13:00-11:00"]}, {}, "opens wed 13:00"),
        ({"windows": ["tue 13:00-12:01"]}, {}, ""),  # Tuesday's, over midnight
        ({"windows": ["mon,fri 00:00-24:00", "sat-sun 10:00-11:00"]}, {}, "opens fri 00:00"),
        ({"windows": ["fri-mon 12:00-13:00"]}, {}, "opens fri 12:00"),
        ({"windows": ["00:00-24:00"]}, {"clock_set": False}, "clock is not set"),
    ],
)
def test_each_condition(asked: dict, found: dict, part: str) -> None:
    said = why(Conditions(**asked), **found)
    assert (part in said) if part else not said, said


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"battery_percent_min": 50}, {**BATTERY, "battery_percent": 50}),
        ({"temperature_c_max": 70.0}, {"temperature_c": 70.0}),
    ],
)
def test_what_runs_goes_on_up_to_the_limit_itself(asked: dict, found: dict) -> None:
    assert why(Conditions(**asked), **found)
    assert not why(Conditions(**asked), running=True, **found)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("25:00-26:00", "time of day"),
        ("02:00-02:60", "time of day"),
        ("02:00-02:00", "no time"),
        ("24:00-02:00", "no time"),
        ("moo 02:00-03:00", "no day"),
        ("2:00-3:00", "DAYS HH:MM"),
        ("always", "DAYS HH:MM"),
        ("mon - fri 02:00-03:00", "DAYS HH:MM"),
    ],
)
def test_a_window_that_is_none_is_named(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parse_window(text)


def test_hours_in_the_nights_when_clocks_are_changed() -> None:
    asked = Conditions(windows=["02:15-02:45"])
    # 29 March 2026: 02:00 to 03:00 does not happen, so the next is Monday's
    wait = decide(asked, Readings(berlin), at("2026-03-29T01:00"), running=False)
    assert wait is not None
    assert at("2026-03-29T01:00") + wait.retry_after_s == at("2026-03-30T02:15")
    # 25 October 2026: it happens twice
    first = at("2026-10-25T02:15")
    assert not why(asked, now_s=first)
    assert why(asked, now_s=first + 45 * 60)
    assert not why(asked, now_s=first + 3600)


times = st.integers(0, 24 * 60 - 1).map(lambda minute: f"{minute // 60:02}:{minute % 60:02}")
windows = st.builds(
    lambda days, start, end: f"{','.join(sorted(days))} {start}-{end}",
    st.sets(st.sampled_from(DAYS), min_size=1),
    times,
    times,
).filter(lambda text: text[-11:-6] != text[-5:])


@settings(max_examples=40, deadline=None)
@given(st.lists(windows, min_size=1, max_size=3), st.integers(0, 366 * 86_400))
def test_the_wait_ends_exactly_when_a_window_opens(texts: list[str], offset_s: int) -> None:
    asked = Conditions(windows=texts)
    now_s = at("2026-01-01T00:00") + offset_s
    wait = decide(asked, Readings(berlin), now_s, running=False)
    if wait is None or "within a week" in wait.detail:
        return
    assert not why(asked, now_s=now_s + wait.retry_after_s)
    for part in range(1, 20):  # nowhere in between
        local = berlin(now_s + wait.retry_after_s * part / 20 - 0.001)
        assert not any(parse_window(text).holds(*local) for text in texts)


def supply(sys: Path, name: str, **files: str) -> None:
    folder = sys / "class/power_supply" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, (None, False, None)),
        ({"AC": {"type": "Mains", "online": "1"}}, (True, False, None)),
        (
            {"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery", "capacity": "40"}},
            (False, True, 40),
        ),
        ({"BAT0": {"type": "Battery", "status": "Discharging", "capacity": "40"}}, (False, True, 40)),
        ({"BAT0": {"type": "Battery", "status": "Charging", "capacity": "junk"}}, (True, True, None)),
        ({"mouse": {"type": "Battery", "scope": "Device", "capacity": "5"}}, (None, False, None)),
        (
            {
                "usb": {"type": "USB", "online": "1"},
                "b1": {"type": "Battery", "capacity": "80"},
                "b2": {"type": "Battery", "capacity": "30"},
            },
            (True, True, 30),
        ),
    ],
)
def test_power_supplies_are_read_as_the_kernel_shows_them(tmp_path: Path, supplies: dict, expected: tuple) -> None:
    for name, files in supplies.items():
        supply(tmp_path, name, **files)
    power = readings.power(str(tmp_path))
    assert (power.mains, power.battery, power.percent) == expected


def test_the_hottest_zone_counts_and_a_broken_one_does_not(tmp_path: Path) -> None:
    assert readings.temperature_c(str(tmp_path)) is None
    for number, text in enumerate(("41000", "67500", "broken")):
        folder = tmp_path / f"class/thermal/thermal_zone{number}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(text)
    assert readings.temperature_c(str(tmp_path)) == 67.5


@pytest.mark.parametrize(("text", "known"), [("yes\n", True), ("No", False), ("perhaps", None), (None, None)])
def test_a_file_may_say_whether_the_network_is_metered(tmp_path: Path, text: str | None, known: bool | None) -> None:
    file = tmp_path / "metered"
    if text is not None:
        file.write_text(text)
    assert readings.Metered(Conditions(metered_file=str(file))).known is known


def test_what_the_operator_says_of_the_network_is_believed() -> None:
    assert readings.Metered(Conditions(metered="yes")).known is True
    assert readings.Metered(Conditions(metered="no")).known is False


@given(
    st.integers(1, 1 << 24),
    st.lists(st.tuples(st.integers(1, 1 << 16), st.floats(0, 5)), min_size=1, max_size=50),
)
def test_bytes_never_come_faster_than_allowed(rate: int, steps: list[tuple[int, float]]) -> None:
    now_s = 100.0
    bucket = Bucket(rate, now_s)
    taken = 0
    for count, idle_s in steps:
        now_s += idle_s
        taken += count
        now_s += bucket.take(count, now_s)  # who obeys pauses before the next
        assert taken <= rate * (now_s - 100.0 + BURST_S) * 1.0001 + 1


def test_without_a_rate_nobody_pauses() -> None:
    assert Bucket(0, 0.0).take(1 << 40, 0.0) == 0.0


# --- what comes of it: the machine waits, and downloads take turns ---


def fetching(model: str = MODEL) -> State:
    state, effects = run(fresh(), offer(1, {model: offered(model=model)}), resolved(model=model))
    assert any(isinstance(effect, Fetch) for effect in effects)
    return state


def forbidden(after_s: float) -> TaskFailed:
    manifest = offered().manifest
    return TaskFailed(MODEL, manifest, 1, "fetch", reasons.CONDITIONS, "the network is metered", after_s)


def test_waiting_for_conditions_is_no_trouble_and_ends_as_soon_as_they_hold() -> None:
    state = fetching()
    for round_ in range(5):
        state, _ = run(state, forbidden(600.0), ms=round_ * 100_000)
        phase = state.models[MODEL].phase
        assert isinstance(phase, Waiting)
        assert (phase.reason, phase.wait_ms, phase.job.troubles) == (reasons.CONDITIONS, 600_000, 0), (
            "no back-off grows"
        )
        state, effects = run(state, Connected(), ms=round_ * 100_000 + 6_000)
        assert any(isinstance(effect, Fetch) for effect in effects)
    assert [report.reason for report in state.owed].count(reasons.CONDITIONS) == 1, "told once"


class Taken:
    """Downloads, and what they began, ended and refused."""

    def __init__(self, asked: Conditions, *, alone: bool) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []
        self.windows: dict[str, list[str]] = {}
        """Model → hours that its rollout says."""
        self.refused: list[tuple[str, str]] = []
        self.downloads = Downloads(
            asked,
            one_at_a_time=alone,
            start=lambda effect: self.began.append(effect.model),
            stop=self.ended.append,
            refuse=lambda effect, failed: self.refused.append((effect.model, failed.reason)),
            clock_set=lambda: True,
            windows=lambda model: self.windows.get(model, []),
        )


def hours_from_now(begin: int, end: int) -> str:
    """Return a window on the clock of this machine, so many hours from now."""
    _, minute = readings.local(time.time())
    return "-".join(f"{(minute // 60 + hours) % 24:02}:{minute % 60:02}" for hours in (begin, end))


def test_a_rollouts_window_holds_up_its_own_model_only_and_stops_it_when_it_shuts() -> None:
    taken = Taken(Conditions(), alone=False)
    taken.windows = {"a": [hours_from_now(2, 4)], "b": [hours_from_now(-2, 2)]}
    for model in ("a", "b", "c"):
        taken.downloads.wanted(Fetch(model, "m", 1, "float"))
    assert (taken.began, taken.refused) == (["b", "c"], [("a", reasons.CONDITIONS)])
    assert not taken.downloads.conditional
    wait = taken.downloads.wait("a")
    assert wait is not None
    assert 3600 < wait.retry_after_s <= 2 * 3600, "it is known when to try again"
    assert taken.downloads.check() is None
    taken.windows["b"] = taken.windows["a"]
    assert taken.downloads.check() is None, "others may go on"
    assert (taken.ended, taken.refused[1:]) == (["b"], [("b", reasons.CONDITIONS)])
    taken.windows = {}
    taken.downloads.wanted(Fetch("a", "m", 1, "float"))
    assert taken.began == ["b", "c", "a"]


def test_one_that_may_not_begin_does_not_keep_others_from_their_turn() -> None:
    taken = Taken(Conditions(), alone=True)
    for model in ("a", "b", "c"):
        taken.downloads.wanted(Fetch(model, "m", 1, "float"))
    taken.windows["b"] = [hours_from_now(2, 4)]
    taken.downloads.ended("a")
    assert (taken.began, taken.refused) == (["a", "c"], [("b", reasons.CONDITIONS)])


def test_what_this_agent_cannot_read_is_no_hour() -> None:
    taken = Taken(Conditions(), alone=False)
    taken.windows["a"] = ["when the moon is full"]
    taken.downloads.wanted(Fetch("a", "m", 1, "float"))
    assert (taken.began, taken.refused) == ([], [("a", reasons.CONDITIONS)])
    wait = taken.downloads.wait("a")
    assert wait is not None
    assert "moon" in wait.detail


def test_an_offer_with_a_window_waits() -> None:
    windowed = msgspec.structs.replace(offered(), windows=["mon-fri 22:00-06:00"])
    state, effects = run(fresh(), offer(1, {MODEL: windowed}), resolved(model=MODEL))
    assert any(isinstance(effect, Fetch) for effect in effects), "whether now is the hour is the daemon's to say"
    state, _ = run(state, forbidden(7_200.0))
    phase = state.models[MODEL].phase
    assert isinstance(phase, Waiting)
    assert phase.job.offered.windows == ["mon-fri 22:00-06:00"]


def test_with_a_bounded_rate_one_model_comes_after_the_other() -> None:
    taken = Taken(Conditions(), alone=True)
    for model in ("a", "b", "c"):
        taken.downloads.wanted(Fetch(model, "m", 1, "float"))
    assert taken.began == ["a"]
    taken.downloads.ended("b")  # withdrawn while it waited
    taken.downloads.ended("a")
    assert taken.began == ["a", "c"]
    together = Taken(Conditions(), alone=False)
    for model in ("a", "b"):
        together.downloads.wanted(Fetch(model, "m", 1, "float"))
    assert together.began == ["a", "b"]


def test_when_conditions_end_what_runs_stops_and_what_waits_is_refused(tmp_path: Path) -> None:
    metered = tmp_path / "metered"
    metered.write_text("no")
    taken = Taken(Conditions(allow_metered=False, metered_file=str(metered), check_s=0.001), alone=True)
    for model in ("a", "b"):
        taken.downloads.wanted(Fetch(model, "m", 1, "float"))
    taken.downloads.progressed("a", Progress(done_bytes=100, total_bytes=200))
    assert taken.downloads.check() is None
    metered.write_text("yes")
    until(lambda: taken.downloads.check() is not None, "the network is found to be metered", 20)
    assert taken.ended == ["a"]
    assert taken.refused == [("a", reasons.CONDITIONS), ("b", reasons.CONDITIONS)]
    assert taken.downloads.drain_bytes() == 100
    assert taken.downloads.drain_bytes() == 0
    taken.downloads.wanted(Fetch("a", "m", 1, "float"))
    assert taken.began == ["a"]
    metered.write_text("no")
    until(lambda: taken.downloads.check() is None, "the network is found to be free again", 20)
    taken.downloads.wanted(Fetch("a", "m", 1, "float"))
    assert taken.began == ["a", "a"]
