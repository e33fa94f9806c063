"""Dates, people, rates and maintenance windows: pure, then over a database."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tests.server.fleet_kit import MODEL, PROJECT, FakeDevice, Fleet, fleet, manifest_of, run
from wherry_agent import conditions
from wherry_server import evidence, explaining, offers, quarantine, rollouts, standing
from wherry_server.pacing import DAYS, Rate, Window, start_us
from wherry_server.plan import parse_plan
from wherry_server.targeting import counted_cut_offs
from wherry_shared import wire
from wherry_shared.errors import RefusedError

GOOD: dict[str, Any] = {
    "models": [{"model": "m", "version": "1.0.0", "manifest": "sha256:" + "a" * 64}],
    "selector": "all",
    "stages": [{"share": 0.5}, {"share": 1.0}],
}
BAD = [
    ("plan_rate", {"rate": {"per_minute": 0}}),
    ("plan_rate", {"rate": {"per_minute": 5, "ramp_to": 50}}),
    ("plan_rate", {"rate": {"per_minute": 5, "ramp_s": 50}}),
    ("plan_window", {"window": {"from": "22:00", "until": "25:00"}}),
    ("plan_window", {"window": {"from": "9", "until": "10:00"}}),
    ("plan_window", {"window": {"from": "09:00", "until": "09:05"}}),
    ("plan_window", {"window": {"from": "09:00", "until": "10:00", "days": []}}),
    ("plan_invalid", {"window": {"from": "09:00", "until": "10:00", "days": ["someday"]}}),
    ("plan_date", {"start_at": "tomorrow"}),
    ("plan_date", {"start_at": "2026-12-01T22:00:00"}),
    ("plan_approval", {"approval": {"approvers": 0}}),
    ("plan_approval", {"approval": {"stages": [3]}}),
    ("plan_approval", {"approval": {"approvers": 2, "names": ["eve"]}}),
    ("plan_stages", {"stages": [{"share": 0.1}, {"count": 5}]}),
    ("plan_stages", {"stages": [{"count": 5}, {"count": 5}]}),
    ("plan_stages", {"stages": [{"count": 5, "share": 0.1}]}),
    ("plan_stages", {"stages": [{"count": 5, "per_stratum": True}]}),
    ("plan_stages", {"stages": [{"count": 5}], "strategy": "adaptive"}),
]


@pytest.mark.parametrize(("code", "change"), BAD)
def test_what_cannot_be_kept_to_is_not_stored(code: str, change: dict[str, Any]):
    with pytest.raises(RefusedError) as caught:
        parse_plan({**GOOD, **change})
    assert caught.value.code == code


def at(text_: str) -> int:
    return int(datetime.fromisoformat(text_).replace(tzinfo=UTC).timestamp() * 1e6)


WINDOWS = [
    ("22:00", "05:00", DAYS, "2026-01-05T22:00", "UTC", True),
    ("22:00", "05:00", DAYS, "2026-01-06T04:59", "UTC", True),
    ("22:00", "05:00", DAYS, "2026-01-06T05:00", "UTC", False),
    ("22:00", "05:00", DAYS, "2026-01-05T21:00", "Europe/Berlin", True),
    ("22:00", "05:00", DAYS, "2026-07-05T20:00", "Europe/Berlin", True),  # in summer it is two hours
    ("22:00", "05:00", DAYS, "2026-07-05T19:59", "Europe/Berlin", False),
    ("22:00", "05:00", ["mon"], "2026-01-06T04:00", "UTC", True),  # Tuesday, of the window that Monday opened
    ("22:00", "05:00", ["mon"], "2026-01-06T23:00", "UTC", False),
    ("09:00", "17:00", DAYS, "2026-01-05T12:00", "Not/AZone", True),
]


@pytest.mark.parametrize(("opens", "until", "days", "moment", "zone", "is_open"), WINDOWS)
def test_a_window_is_read_on_the_devices_own_clock(
    opens: str, until: str, days: Any, moment: str, zone: str, is_open: bool
):
    assert Window(from_=opens, until=until, days=list(days)).open_at(at(moment), zone) is is_open


_clocks = st.integers(0, 24 * 60 - 1).map(lambda minute: f"{minute // 60:02}:{minute % 60:02}")


@given(_clocks, _clocks, st.sets(st.sampled_from(DAYS), min_size=1), st.integers(0, 8 * 86_400))
def test_devices_read_a_window_as_the_server_does(opens: str, until: str, days: set[Any], second: int):
    window = Window(from_=opens, until=until, days=sorted(days))
    local = datetime.fromtimestamp(1_767_225_600 + second, UTC)
    read = [conditions.parse_window(text) for text in window.told]
    here = any(one.holds(local.weekday(), local.hour * 60 + local.minute) for one in read)
    assert here is window.open_at(round(local.timestamp()) * 1_000_000, "UTC")


def test_an_offer_says_when_and_one_that_takes_back_never_waits():
    plan = parse_plan({**GOOD, "window": {"from": "22:00", "until": "05:00", "days": ["mon", "tue"]}})
    (offered,) = offers.forwards(plan, "r1").values()
    assert offered.windows == ["mon,tue 22:00-05:00"]
    assert offers.backwards(plan, "r1", "m/0.9.0", "sha256:" + "b" * 64).windows == []
    (plain,) = offers.forwards(parse_plan(GOOD), "r1").values()
    assert plain.windows == []


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.integers(1, 5_000), st.floats(0, 1e5), st.floats(0, 1e4))
def test_a_rate_never_gives_back_and_never_gives_faster_than_its_fastest(
    first: float, last: float, ramp_s: int, waited_s: float, more_s: float
):
    rate = Rate(per_minute=first, ramp_to=last, ramp_s=ramp_s)
    now, then = rate.within(waited_s), rate.within(waited_s + more_s)
    assert now <= then <= now + 1 + max(first, last) / 60 * more_s + 1e-6
    assert rate.within(0) == 1
    even = 1 + (first + last) / 120 * ramp_s
    assert even - 1 <= rate.within(ramp_s) <= even + 1e-6


@given(st.lists(st.integers(1, 1 << 63), min_size=1, max_size=40, unique=True), st.integers(1, 50), st.booleans())
def test_a_count_is_a_count(keys: list[int], count: int, each: bool):
    split = {"a": keys[::2], "b": keys[1::2]}
    found = counted_cut_offs(split, count, each=each, most=1.0)
    taken = {name: sum(key <= found.get(name, 0) for key in members) for name, members in split.items()}
    if each:
        assert taken == {name: min(count, len(members)) for name, members in split.items()}
    else:
        assert min(count, len(keys)) <= sum(taken.values()) <= min(count, len(keys)) + 1
        assert all(taken[name] for name, members in split.items() if members)


def test_a_date_has_a_zone():
    assert start_us("2026-12-01T22:00:00+01:00") == at("2026-12-01T21:00:00")
    assert start_us("") == 0


# --- over a database -----------------------------------------------------------------------------


@pytest.mark.backends
def test_a_stage_of_so_many_devices_then_a_rate(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(20, version="1.0.0")
            number = await found.roll_out(
                "1.1.0", stages=[{"count": 3}, {"share": 1.0}], rate={"per_minute": 60}, late_s=60, trial={"max_s": 30}
            )
            sizes = []
            for _ in range(30):
                await found.turn()
                sizes.append(len(await found.rows("SELECT 1 FROM assignment")))
                if (await found.show(number))["state"] == "done":
                    break
            assert (await found.show(number))["state"] == "done"
            assert sizes[:3] == [1, 2, 3]
            assert all(after - before <= 2 for before, after in itertools.pairwise(sizes))
            assert sizes[-1] == 20

    run(work())


async def set_timezones(found: Fleet, devices: list[FakeDevice], zone: str) -> None:
    async with found.database.write() as connection:
        for device in devices:
            facts = json.dumps({"arch": "x86_64", "timezone": zone, "engines": []})
            await connection.execute(
                text("UPDATE device SET facts = :facts WHERE id = :id"), {"facts": facts, "id": device.id}
            )


def test_a_device_is_exposed_in_its_own_night_and_nothing_is_late_meanwhile(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            found.conductor.moment = lambda: at("2026-01-05T00:00") + int(found.seconds * 1e6)
            await found.publish("1.0.0", "1.1.0")
            berlin = await found.enrol(4, version="1.0.0")
            tokyo = await found.enrol(4, version="1.0.0")
            await set_timezones(found, berlin, "Europe/Berlin")
            await set_timezones(found, tokyo, "Asia/Tokyo")
            number = await found.roll_out(
                "1.1.0",
                window={"from": "01:00", "until": "04:00"},
                stage_max_s=3600,
                late_s=600,
                silent_s=600,
                trial={"max_s": 60},
            )
            await found.turn()
            await found.turn()
            assert {one.running for one in berlin} == {manifest_of("1.1.0")}  # 01:00 there, 09:00 in Tokyo
            assert {one.running for one in tokyo} == {manifest_of("1.0.0")}
            await found.turn(seconds=10 * 3600)
            await found.turn()
            (row,) = await found.rows("SELECT state, reason FROM rollout WHERE number = :n", n=number)
            assert tuple(row) == ("running", ""), "the stage's deadline does not run while windows are shut"
            await found.turn(seconds=6 * 3600)
            await found.turn()
            await found.turn()
            assert {one.running for one in tokyo} == {manifest_of("1.1.0")}
            assert (await found.show(number))["state"] == "done"

    run(work())


@given(
    st.sampled_from(["00:00", "01:00", "09:30", "22:00"]),
    st.sampled_from(["00:00", "02:00", "10:00", "05:15"]),
    st.sets(st.sampled_from(DAYS), min_size=1),
    st.integers(0, 5 * 24 * 60),
    st.integers(0, 3 * 24 * 60),
    st.sampled_from(["UTC", "Asia/Tokyo", "nowhere"]),
)
@settings(max_examples=40, deadline=None)
def test_the_time_in_which_a_window_was_open_is_that_of_its_minutes(
    opens: str, until: str, days: set[Any], since_min: int, for_min: int, zone: str
):
    window = Window(from_=opens, until=until, days=sorted(days))
    since = at("2026-01-05T00:00") + since_min * 60_000_000
    minutes = sum(window.open_at(since + minute * 60_000_000, zone) for minute in range(for_min))
    end = since + for_min * 60_000_000
    assert window.open_for(minutes * 60, since, end, zone)
    assert not window.open_for(minutes * 60 + 1, since, end, zone)


def test_a_device_is_late_only_by_the_time_in_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two devices say that they know and then nothing: the night of one is over before it has had its time."""

    async def work() -> None:
        async with fleet(tmp_path) as found:
            found.conductor.moment = lambda: at("2026-01-05T00:00") + int(found.seconds * 1e6)
            await found.publish("1.0.0", "1.1.0")
            berlin, helsinki = await found.enrol(1, version="1.0.0"), await found.enrol(1, version="1.0.0")
            await set_timezones(found, berlin, "Europe/Berlin")  # 01:00
            await set_timezones(found, helsinki, "Europe/Helsinki")  # 02:00
            for device in (*berlin, *helsinki):
                device.behaviours["1.1.0"] = "stuck"
            number = await found.roll_out(
                "1.1.0",
                window={"from": "00:00", "until": "03:00"},
                late_s=5_400,
                late={"count": 5},
                silent={"count": 5},
                trial={"max_s": 60},
            )
            for _ in range(3):
                await found.turn()

            async with found.database.write() as connection:  # ingest reads its own clock
                noticed = {"at": at("2026-01-05T00:00")}
                await connection.execute(text("UPDATE assignment SET noticed_at = :at WHERE noticed_at > 0"), noticed)
                await connection.execute(text("UPDATE device SET last_seen_at = :at"), {"at": at("2027-01-01T00:00")})

            async def stands() -> dict[str, int]:
                async with found.database.read() as connection:
                    row = await rollouts.find(connection, PROJECT, number)
                    plan = parse_plan(row.plan)
                    tallied = await evidence.tally(connection, row.id, plan, found.conductor.moment())
                (stage,) = evidence.counts(plan, tallied)
                return {name: getattr(stage, name) for name in stage.__struct_fields__ if getattr(stage, name)}

            assert await stands() == {"pending": 2}
            await found.turn(seconds=6_000)
            await found.turn()
            assert await stands() == {"pending": 1, "late": 1}, (
                "Berlin has had its hour and a half, Helsinki's night was over before"
            )
            await found.turn(seconds=12 * 3600)
            await found.turn()
            assert await stands() == {"pending": 1, "late": 1}, "outside of its window nobody is late"
            moment = found.conductor.moment()
            monkeypatch.setattr(standing, "now_us", lambda: moment)
            async with found.database.read() as connection:
                for state, whom in (("pending", helsinki), ("late", berlin)):
                    listed = await standing.devices(connection, PROJECT, number, state=state, limit=1)  # type: ignore[arg-type]
                    assert [one["device"] for one in listed] == [whom[0].id]
                row = await rollouts.find(connection, PROJECT, number)
                told = await standing.device(connection, row, parse_plan(row.plan), helsinki[0].id)
                assert (told["code"], "late_in_s" in told) == ("pending", False)
            await found.turn(seconds=9 * 3600)
            await found.turn()
            assert await stands() == {"late": 2}, "its next window has begun, and half an hour of it is over"

    run(work())


def test_a_stage_waits_for_its_date_and_for_other_people(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(4, version="1.0.0")
            soon = datetime.fromtimestamp(1_700_000_000 + 100, UTC).isoformat()
            number = await found.roll_out(
                "1.1.0",
                start_at=soon,
                stages=[{"share": 0.5}, {"share": 1.0}],
                approval={"approvers": 2, "stages": [2], "names": ["ann", "bob", "cy"]},
            )
            await found.turn()
            shown = await found.show(number)
            assert (shown["state"], shown["stage"]) == ("running", -1)
            await found.turn(seconds=100)
            for _ in range(4):
                await found.turn()
            shown = await found.show(number)
            assert shown["stage"] == 0
            assert shown["why_not_yet"] == [{"code": "approval", "have": 0, "need": 2, "unit": "people"}]
            for who, code in (("test", "approval_refused"), ("token:eve", "approval_refused")):
                with pytest.raises(RefusedError) as caught:
                    await rollouts.approve(found.database, PROJECT, who, number, 2)
                assert caught.value.code == code
            for who in ("token:ann", "token:ann"):
                await rollouts.approve(found.database, PROJECT, who, number, 2)
            await found.turn(seconds=10 * 86_400)
            assert (await found.show(number))["stage"] == 0, "twice by one is once, and no deadline runs"
            await rollouts.approve(found.database, PROJECT, "token:bob", number, 2)
            assert (await found.until(number, "done"))["counts"]["real"]["confirmed"] == 4
            actors = await found.rows("SELECT actor FROM audit_entry WHERE action = 'rollout.approve' ORDER BY id")
            assert [one.actor for one in actors] == ["token:ann", "token:bob"]

    run(work())


@pytest.mark.backends
def test_devices_that_failed_are_in_quarantine_until_they_are_released(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(10, version="1.0.0")
            bad, floor = devices[0], devices[1]
            bad.behaviours["1.1.0"], floor.behaviours["1.1.0"] = "bad", "floor"
            wide = {"failure": {"share": 0.9}, "excused": {"share": 0.9}}
            number = await found.roll_out("1.1.0", **wide)
            await found.until(number, "done")
            async with found.database.read() as connection:
                listed = await quarantine.devices(connection, PROJECT, model=MODEL, limit=10)
                assert await quarantine.devices(connection, PROJECT, reason="crash", limit=10) == []
                behind = (bad.id, MODEL, listed[0]["manifest"])
                assert await quarantine.devices(connection, PROJECT, after=behind, limit=10) == []
                assert await quarantine.devices(connection, PROJECT, after=(bad.id, MODEL, ""), limit=1) == listed
            assert [(one["device"], one["reason"]) for one in listed] == [(bad.id, "health_errors")]

            # who ended without a verdict tries again alone; who failed only on explicit order
            floor.behaviours.clear()
            offered = dict(bad.offered)
            await found.command(number, "retry")
            await found.turn()
            await found.turn()
            assert floor.running == manifest_of("1.1.0")
            assert bad.offered == offered
            attempts = await found.rows("SELECT device_id FROM assignment WHERE attempt = 2")
            assert [one.device_id for one in attempts] == [floor.id]

            # another rollout of the same bundle leaves it alone, until it is released
            again = await found.roll_out("1.1.0", **wide)
            await found.until(again, "done")
            counts = (await found.show(again))["counts"]["real"]
            assert (counts["exposed"], bad.offered) == (9, offered)
            bad.behaviours.clear()
            await quarantine.release(found.database, PROJECT, "test", bad.id, MODEL)
            await found.turn()
            await found.turn()
            assert bad.running == manifest_of("1.1.0")
            with pytest.raises(RefusedError) as caught:
                await quarantine.release(found.database, PROJECT, "test", bad.id, MODEL)
            assert caught.value.code == "not_quarantined"

    run(work())


def test_hardware_that_was_condemned_is_cleared_by_an_order_only(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(10, version="1.0.0")
            for device in devices[:5]:
                device.behaviours["1.1.0"] = "bad"
            await found.until(await found.roll_out("1.1.0"), "halted")
            async with found.database.read() as connection:
                (known,) = await quarantine.hardware(connection, PROJECT)
            assert known["target"] == f"{MODEL}/1.1.0"
            await quarantine.clear(found.database, PROJECT, "test", known["manifest"], known["hardware_class"])
            with pytest.raises(RefusedError) as caught:
                await quarantine.clear(found.database, PROJECT, "test", known["manifest"], known["hardware_class"])
            assert caught.value.code == "not_known_bad"
            number = await found.roll_out("1.1.0")
            await found.until(number, "done")
            assert (await found.show(number))["counts"]["real"]["confirmed"] == 5  # the others are in quarantine

    run(work())


def test_hardware_on_which_a_bundle_fails_gets_it_no_more_though_the_rollout_goes_on(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(60)
            boards = await found.enrol(12, arch="armv7l")
            for device in boards:
                device.behaviours["1.1.0"] = "bad"
            number = await found.roll_out(
                "1.1.0",
                strata=["arch"],
                stages=[{"share": 0.5}, {"share": 1.0, "soak_s": 1000}],
                failure={"share": 0.2, "sample_min": 5},
            )
            for _ in range(5):
                await found.turn()
            shown = await found.show(number)
            assert (shown["state"], shown["stage"]) == ("running", 1), "six of thirty-six are not too many"
            assert sum(device.offered != {} for device in boards) == 6, "half of them, and no more"
            assert shown["held"] == 6
            async with found.database.read() as connection:
                (known,) = await quarantine.hardware(connection, PROJECT)
            assert (known["hardware_class"].split("/")[0], known["devices"]) == ("armv7l", 6)
            (told,) = await found.rows("SELECT subject FROM audit_entry WHERE action = 'known_bad.condemn'")
            assert told.subject == known["manifest"]
            # an operator's word counts until it fails there once more, also for a director that starts anew
            await quarantine.clear(found.database, PROJECT, "test", known["manifest"], known["hardware_class"])
            found.conductor._known.clear()
            await found.conductor.turn()
            await found.conductor.turn()
            assert await found.rows("SELECT 1 FROM known_bad") == []
            await found.turn()
            assert sum(device.offered != {} for device in boards) == 12
            await found.turn()
            (again,) = await found.rows("SELECT devices FROM known_bad")
            assert again.devices == 12

    run(work())


def test_a_new_attempt_on_condemned_hardware_ends_where_it_fails_there_again(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(60)
            boards = await found.enrol(12, arch="armv7l")
            for device in boards:
                device.behaviours["1.1.0"] = "bad"
            wish = {"strata": ["arch"], "failure": {"share": 0.2, "sample_min": 5}}
            stages = [{"share": 0.5}, {"share": 1.0, "soak_s": 1000}]
            first = await found.roll_out("1.1.0", stages=stages, **wish)
            for _ in range(4):
                await found.turn()
            await found.command(first, "abort")
            await found.until(first, "aborted")
            once = {device.id for device in boards if device.offered}
            assert len(once) == 6
            again = await found.roll_out("1.1.0", stages=stages, attempt=2, **wish)
            for _ in range(5):
                await found.turn()
            shown = await found.show(again)
            assert (shown["state"], shown["stage"], shown["held"]) == ("running", 1, 6)
            ((rollout,),) = await found.rows("SELECT id FROM rollout WHERE number = :number", number=again)
            tried = await found.rows(
                "SELECT device_id FROM assignment WHERE rollout_id = :rollout AND outcome = 'returned'", rollout=rollout
            )
            assert len(tried) == 6, "as many as its first stage has of that hardware, and no more"

    run(work())


def offered(rollout: str) -> wire.OfferedModel:
    """What a rollout of 1.2.0 offers."""
    return wire.OfferedModel(target=f"{MODEL}/1.2.0", manifest=manifest_of("1.2.0"), attempt=1, rollout=rollout)


async def offered_to(found: Fleet) -> set[str]:
    """Devices whose offer names the bundle."""
    rows = await found.rows("SELECT device_id, models FROM offer")
    return {one.device_id for one in rows if manifest_of("1.1.0") in one.models}


def test_what_fails_on_hardware_is_taken_back_from_who_did_not_confirm_it_there(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            others = await found.enrol(40, version="1.0.0")
            boards = await found.enrol(16, version="1.0.0", arch="armv7l")
            good, idle, away, slow, bad = boards[0], boards[1], boards[2:5], boards[5:7], boards[7:]
            idle.behaviours["1.1.0"] = "idle"
            for device in slow:
                device.behaviours["1.1.0"] = "stuck"
            for device in bad:
                device.behaviours["1.1.0"] = "bad"
            for device in away:
                device.online = False
            number = await found.roll_out(
                "1.1.0", strategy="all_at_once", failure={"share": 0.3, "sample_min": 5}, settled_share=1.0
            )
            await found.turn()
            assert len(await offered_to(found)) == 56
            await found.turn()
            shown = await found.show(number)
            assert (shown["state"], shown["counts"]["real"]["returned"]) == ("running", 9), "9 of 51 are not too many"
            rows = await found.rows("SELECT device_id, outcome, reason FROM assignment")
            now = {one.device_id: (one.outcome, one.reason) for one in rows}
            assert {now[one.id][0] for one in (good, *others)} == {"confirmed"}
            assert now[idle.id][0] == "confirmed_idle"
            assert {now[one.id] for one in away + slow} == {("withdrawn", "known_bad")}
            assert {now[one.id] for one in bad} == {("returned", "health_errors")}
            assert await offered_to(found) == {one.id for one in (good, idle, *others)}
            # nobody is offered it there again, whoever is back and whatever is ordered, until somebody clears the hardware
            for device in boards:
                device.online, device.behaviours = True, {}
            await found.command(number, "retry_failed")
            await found.until(number, "done")
            assert {one.running for one in away + slow + bad} == {manifest_of("1.0.0")}
            assert not any(manifest_of("1.1.0") in one.offered for one in away)
            async with found.database.read() as connection:
                (known,) = await quarantine.hardware(connection, PROJECT)
                told = await explaining.explain(connection, PROJECT, number, away[0].id)
            assert (told["device"]["code"], told["device"]["reason"]) == ("withdrawn", "known_bad")
            assert [{"decision": "withdraw", "scope": "recalled", "stage": 0}] in [
                one["decisions"] for one in told["decided"]
            ]
            assert (told["differing"], told["replayed"]) == ([], len(told["decided"]))
            await quarantine.clear(found.database, PROJECT, "test", known["manifest"], known["hardware_class"])
            await found.command(number, "retry")
            for _ in range(3):
                await found.turn()
            assert {one.running for one in away + slow} == {manifest_of("1.1.0")}
            assert {one.running for one in bad} == {manifest_of("1.0.0")}

    run(work())


def test_hardware_that_one_rollout_condemned_is_left_by_the_others_of_its_bundle(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            north = await found.enrol(6, version="1.0.0", site="north")
            south = await found.enrol(6, version="1.0.0", site="south")
            for device in north[1:]:
                device.online = False
            for device in south:
                device.behaviours["1.1.0"] = "bad"
            wide: dict[str, Any] = {"strategy": "all_at_once", "settled_share": 1.0}
            first = await found.roll_out("1.1.0", selector="label.site = north", **wide)
            await found.turn()
            assert await offered_to(found) == {one.id for one in north}
            await found.command(first, "pause")
            second = await found.roll_out("1.1.0", selector="label.site = south", **wide)
            await found.until(second, "halted")
            await found.turn()
            assert await offered_to(found) == {north[0].id}, "it is confirmed there, and the rollout goes on"
            assert (await found.show(first))["counts"]["real"]["withdrawn"] == 5
            await found.command(first, "revert")
            await found.until(first, "reverted")
            assert await offered_to(found) == set()

    run(work())


def test_who_goes_back_by_itself_to_what_was_reverted_meanwhile_is_recalled_from_there(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            devices = await found.enrol(6, version="1.0.0")
            wide: dict[str, Any] = {"strategy": "all_at_once", "failure": {"count": 5}, "settled_share": 0.5}
            first = await found.roll_out("1.1.0", **wide)
            await found.until(first, "done")
            late = devices[0]
            late.behaviours["1.2.0"] = "stuck"
            second = await found.roll_out("1.2.0", **wide)
            await found.until(second, "done")
            assert late.running == manifest_of("1.1.0")
            await found.command(first, "revert")
            await found.until(first, "reverted")
            (tried,) = await found.rows(
                "SELECT rollout_id FROM assignment WHERE device_id = :d AND outcome = 'exposed'", d=late.id
            )
            late.report("returned", offered(tried.rollout_id), reason="health_errors", incumbent=late.running)
            for _ in range(3):
                await found.turn()
            assert late.running == manifest_of("1.0.0")
            assert {one.running for one in devices[1:]} == {manifest_of("1.2.0")}

    run(work())
