"""Rollouts carried on over a database, with devices that speak frames; the director's turns are taken by hand."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from tests.server.fleet_kit import MODEL, PROJECT, Fleet, fleet, manifest_of, run
from wherry_server import conductor as conducting
from wherry_server import fleet as devices_of
from wherry_server import rollouts
from wherry_server.ingest import Ingest
from wherry_server.lease import Lease
from wherry_server.offers import Composer
from wherry_server.targeting import exposed, key_of, signed
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError, UnreachableError

pytestmark = pytest.mark.backends

SHORT = {"trial": {"max_s": 30}, "late_s": 60, "silent_s": 60, "stage_max_s": 600}


async def nobody_above_the_cut_off(found: Fleet, number: int) -> None:
    """The property of stages, over the rows of a rollout."""
    (row,) = await found.rows("SELECT id, salt, progress FROM rollout WHERE number = :n", n=number)
    shown = await found.show(number)
    async with found.database.read() as connection:
        progress = conducting.evidence.load_progress((await rollouts.find(connection, PROJECT, number)).progress)
    share = shown["plan"]["stages"][progress.stage]["share"]
    assigned = await found.rows("SELECT device_id, share_key, stratum FROM assignment WHERE rollout_id = :r", r=row.id)
    for one in assigned:
        key = key_of(row.salt, one.device_id)
        assert one.share_key == signed(key)
        assert exposed(key, one.stratum, progress.cut_offs, share)


def test_what_was_ordered_is_not_said_to_wait_for_an_order(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            await found.enrol(1)
            idle = await found.roll_out("1.0.0", start=False)
            assert [why["code"] for why in (await found.show(idle))["why_not_yet"]] == ["not_started"]
            await found.command(idle, "start")
            assert [why["code"] for why in (await found.show(idle))["why_not_yet"]] == ["ordered"]
            await found.turn()
            assert "ordered" not in [why["code"] for why in (await found.show(idle))["why_not_yet"]]

    run(work())


def test_a_good_bundle_goes_through_its_stages_to_everybody(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(30, version="1.0.0")
            await found.enrol(10, version="1.0.0", simulated=True)
            number = await found.roll_out("1.1.0", stages=[{"share": 0.05}, {"share": 0.25}, {"share": 1.0}])
            sizes = []
            for _ in range(20):
                await found.turn()
                await nobody_above_the_cut_off(found, number)
                sizes.append(len(await found.rows("SELECT 1 FROM assignment")))
                if (await found.show(number))["state"] == "done":
                    break
            shown = await found.show(number)
            assert shown["state"] == "done"
            assert sorted(set(sizes)) == [2, 10, 40]
            assert (shown["counts"]["real"]["confirmed"], shown["counts"]["simulated"]["confirmed"]) == (30, 10)
            assert {device.running for device in found.devices.values()} == {manifest_of("1.1.0")}
            assert all(device.offered == {manifest_of("1.1.0"): 1} for device in found.devices.values())
            froms = await found.rows("SELECT DISTINCT from_manifest, from_target FROM assignment")
            assert [tuple(row) for row in froms] == [(manifest_of("1.0.0"), f"{MODEL}/1.0.0")]

    run(work())


def test_a_bad_bundle_halts_and_everybody_is_back(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(20, version="1.0.0")
            for device in devices[::2]:
                device.behaviours["1.1.0"] = "bad"
            number = await found.roll_out("1.1.0", stages=[{"share": 0.5}, {"share": 1.0}])
            shown = await found.until(number, "halted")
            assert shown["reason"] == "failure_bound"
            assert {device.running for device in devices} == {manifest_of("1.0.0")}
            counts = shown["counts"]["real"]
            assert counts["exposed"] == 10
            assert counts["returned"] + counts["reverted"] == 10
            assert counts["returned"] > 0
            assert counts["confirmed"] == counts["pending"] == counts["revert_pending"] == 0
            # nobody is offered it any more, also not by the same plan again: it is known bad on this hardware
            again = await found.roll_out("1.1.0")
            await found.turn()
            await found.turn()
            assert (await found.show(again))["why_not_yet"][0]["code"] == "held"
            # unless a person says so with another attempt
            await found.command(again, "abort")
            for device in devices:
                device.behaviours.clear()
            assert (await found.until(await found.roll_out("1.1.0", attempt=2), "done"))["state"] == "done"

    run(work())


def test_a_halt_writes_the_offer_of_every_assigned_device_in_its_own_transaction(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(10, version="1.0.0")
            for device in devices:
                device.behaviours["1.1.0"] = "stuck"
            for device in devices[:2]:
                device.behaviours["1.1.0"] = "bad"
            number = await found.roll_out("1.1.0", failure={"count": 1})
            await found.turn()
            for device in devices:
                device.online = False  # they hear nothing of the halt
            await found.turn()
            shown = await found.show(number)
            assert shown["reason"] == "failure_bound"
            offers = await found.rows("SELECT models, serial FROM offer")
            assert all(manifest_of("1.0.0") in row.models and row.serial == 2 for row in offers)
            assert shown["counts"]["real"]["withdrawn"] == 8

    run(work())


def test_a_device_that_is_away_is_reverted_at_its_next_hello(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(6, version="1.0.0")
            number = await found.roll_out("1.1.0", revert_s=100)
            await found.until(number, "done")
            devices[0].online = False
            await found.command(number, "revert")
            await found.turn()
            await found.turn()
            await found.turn()
            shown = await found.show(number)
            assert (shown["state"], shown["counts"]["real"]["revert_pending"]) == ("returning", 1)
            assert shown["why_not_yet"][0] == {"code": "revert_pending", "have": 5, "need": 6, "unit": "devices"}
            await found.turn(seconds=101)
            shown = await found.show(number)
            assert (shown["state"], shown["counts"]["real"]["revert_pending"]) == ("reverted", 1)
            devices[0].online = True
            await found.say_hello([devices[0]])
            await found.turn()
            await found.turn()
            assert devices[0].running == manifest_of("1.0.0")
            assert (await found.show(number))["counts"]["real"]["reverted"] == 6

    run(work())


def test_a_first_release_that_fails_leaves_devices_as_empty_as_they_were(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            devices = await found.enrol(4)
            for device in devices[:3]:
                device.behaviours["1.0.0"] = "bad"
            number = await found.roll_out("1.0.0", failure={"count": 1})
            await found.until(number, "halted")
            assert {device.running for device in devices} == {""}

    run(work())


def test_trouble_around_a_device_is_no_failure_of_the_bundle(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(4, version="1.0.0")
            devices[0].behaviours["1.1.0"] = "disk"
            number = await found.roll_out("1.1.0", failure={"count": 0})
            await found.turn()
            await found.turn()
            shown = await found.show(number)
            assert (shown["state"], shown["stages"][0]["counts"]["pending"]) == ("running", 1)
            assert ("exposed", "disk_full") in {(one["outcome"], one["reason"]) for one in shown["outcomes"]}
            assert shown["why_not_yet"][0]["code"] == "in_flight"

    run(work())


def test_a_device_that_ended_its_attempt_without_a_verdict_holds_up_nobody(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(6, version="1.0.0")
            devices[0].behaviours["1.1.0"] = "floor"
            number = await found.roll_out("1.1.0", failure={"count": 0})
            shown = await found.until(number, "done", turns=5)
            counts = shown["stages"][0]["counts"]
            assert (counts["excused"], counts["confirmed"], counts["failed"]) == (1, 5, 0)
            assert shown["counts"]["real"]["excused"] == 1
            assert ("excused", "below_floor") in {(one["outcome"], one["reason"]) for one in shown["outcomes"]}
            await found.command(number, "revert")
            await found.until(number, "reverted", turns=5)
            (row,) = await found.rows("SELECT models FROM offer WHERE device_id = :d", d=devices[0].id)
            assert manifest_of("1.0.0") in row.models  # it is no longer offered what it refused

    run(work())


def test_a_release_that_most_devices_cannot_judge_is_not_proved_by_the_rest(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            for device in (await found.enrol(6))[:4]:
                device.behaviours["1.1.0"] = "floor"
            shown = await found.until(await found.roll_out("1.1.0"), "halted", "done")
            assert (shown["state"], shown["reason"]) == ("halted", "excused_bound")

    run(work())


@pytest.mark.parametrize("ending", ["revoked", "decommissioned"])
def test_nobody_waits_for_a_device_that_was_shut_out(tmp_path: Path, ending: devices_of.Ending):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            quiet, proved, *_ = await found.enrol(6, version="1.0.0")
            quiet.behaviours["1.1.0"] = "mute"
            number = await found.roll_out("1.1.0", settled_share=1.0)
            await found.turn()
            await found.turn()
            assert (await found.show(number))["state"] == "running"
            for device in (quiet, proved):
                device.online = False
                async with found.database.write() as connection:
                    await devices_of.end_device(connection, PROJECT, device.id, ending)
            shown = await found.until(number, "done", turns=5)
            counts = shown["stages"][0]["counts"]
            assert (counts["withdrawn"], counts["confirmed"], counts["pending"]) == (1, 5, 0)
            assert ("withdrawn", f"device_{ending}") in {(one["outcome"], one["reason"]) for one in shown["outcomes"]}
            await found.command(number, "revert")
            shown = await found.until(number, "reverted", turns=5)  # not after revert_s
            counts = shown["stages"][0]["counts"]
            assert (counts["reverted"], counts["revert_pending"], counts["confirmed"]) == (4, 0, 1)

    run(work())


@pytest.mark.parametrize(("broken", "known"), [(1, 0), (2, 1)])
def test_one_broken_board_never_keeps_a_bundle_from_its_whole_class(tmp_path: Path, broken: int, known: int):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            for device in (await found.enrol(6))[:broken]:
                device.behaviours["1.1.0"] = "bad"
            await found.until(await found.roll_out("1.1.0", failure={"count": 0}), "halted")
            assert len(await found.rows("SELECT 1 FROM known_bad")) == known

    run(work())


def test_a_few_broken_boards_of_many_do_not_either(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            for device in (await found.enrol(30))[:2]:
                device.behaviours["1.1.0"] = "bad"
            await found.until(await found.roll_out("1.1.0", failure={"count": 1}), "halted")
            assert await found.rows("SELECT 1 FROM known_bad") == []

    run(work())


def test_who_watches_a_rollout_is_told_what_the_director_saw_and_counts_only_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(4)
            number = await found.roll_out("1.1.0", stages=[{"share": 1.0, "soak_s": 1000}])
            await found.turn()
            await found.conductor.turn()  # what the devices said meanwhile
            live = await found.show(number)
            counted = 0
            tally = conducting.evidence.tally

            async def counting(*arguments):
                nonlocal counted
                counted += 1
                return await tally(*arguments)

            monkeypatch.setattr(conducting.evidence, "tally", counting)

            async def told() -> dict[str, Any]:
                async with found.database.read() as connection:
                    return await rollouts.show(connection, PROJECT, number)

            assert [await told() for _ in range(5)] == [live] * 5
            assert live["stages"][0]["counts"]["confirmed"] == 4
            assert counted == 0
            await found.command(number, "pause")
            assert (await told())["why_not_yet"][0]["code"] == "ordered"
            await found.conductor.turn()
            before = counted
            assert (await told())["why_not_yet"][0]["code"] == "paused"
            assert counted == before
            async with found.database.write() as connection:  # a director that fell silent
                at = now_us() - int(rollouts.STATUS_FRESH_S * 1_000_000)
                await connection.execute(text("UPDATE rollout_status SET at = :at"), {"at": at})
            assert (await told())["members"] == 4
            assert counted == before + 1

    monkeypatch.setattr(conducting, "TELL_MIN_S", 0.0)
    run(work())


def test_an_idle_turn_counts_nobody_and_a_report_that_others_stored_is_counted_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counted: list[int] = []
    tally = conducting.evidence.tally

    async def counting(*arguments: Any) -> Any:
        made = await tally(*arguments)
        counted.append(made.devices)
        return made

    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(6, version="1.0.0")
            for device in devices:
                device.behaviours["1.1.0"] = "bad"
            number = await found.roll_out("1.1.0", failure={"count": 2})
            for _ in range(5):
                await found.conductor.turn()
            assert counted[-1] == 6
            counted.clear()
            for _ in range(5):
                await found.conductor.turn()
            assert counted == []
            elsewhere = Ingest(
                found.database, found.services.master_key, PROJECT
            )  # of another process: it tells nobody
            offers = {row.device_id: row.envelope for row in await found.rows("SELECT device_id, envelope FROM offer")}
            for device in devices[:3]:
                device.take_offer(bytes(offers[device.id]))
            spoken = [(device.id, frame) for device in devices[:3] for frame in device.owed_frames()]
            await elsewhere.store_batch({"report": spoken})
            await found.conductor.turn()
            assert counted[0] == 6
            assert (await found.show(number))["state"] == "returning"
            await found.until(number, "halted")

    monkeypatch.setattr(conducting.evidence, "tally", counting)
    monkeypatch.setattr(conducting, "COUNTED_ALWAYS", 0)
    monkeypatch.setattr(conducting, "QUIET_SHARE", 10**6)
    run(work())


def test_members_are_looked_at_less_often_while_nothing_is_seen_to_change(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(4, version="1.0.0")
            for device in devices:
                device.behaviours["1.1.0"] = "mute"
            await found.roll_out("1.1.0")
            shares = []
            for _ in range(8):
                await found.turn()
                (known,) = found.conductor._known.values()
                shares.append(known.scan_share)
            assert (shares[0], shares[-1]) == (conducting.SCAN_SHARE, conducting.QUIET_SHARE)
            assert shares == sorted(shares)
            await found.enrol(1)
            await found.turn()
            assert known.scan_share == conducting.SCAN_SHARE
            assert len(await found.rows("SELECT 1 FROM assignment")) == 5

    run(work())


def test_quiet_devices_are_counted_apart_after_their_deadline(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            devices = await found.enrol(10)
            devices[0].behaviours["1.1.0"] = "mute"
            devices[1].behaviours["1.1.0"] = "stuck"
            number = await found.roll_out("1.1.0", **SHORT)
            await found.turn()
            async with found.database.write() as connection:  # an hour ago
                hour = 3_600_000_000
                await connection.execute(
                    text(
                        "UPDATE assignment SET exposed_at = exposed_at - :h,"
                        " noticed_at = CASE WHEN noticed_at > :h THEN noticed_at - :h ELSE 0 END"
                    ),
                    {"h": hour},
                )
            shown = await found.until(number, "done")
            counts = shown["stages"][0]["counts"]
            assert (counts["silent"], counts["late"], counts["confirmed"]) == (1, 1, 8)

    run(work())


def test_newcomers_join_the_stage_that_their_key_gives_them(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(20)
            number = await found.roll_out("1.1.0", stages=[{"share": 0.5, "soak_s": 1000}, {"share": 1.0}])
            await found.turn()
            late = await found.enrol(30)
            for _ in range(3):
                await found.turn()
            await nobody_above_the_cut_off(found, number)
            running = sum(device.running != "" for device in late)
            assert 3 < running < 27
            assert (await found.show(number))["stage"] == 0

    run(work())


def test_a_release_that_is_done_reaches_newcomers_and_only_the_newest_does(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(5)
            first = await found.roll_out("1.0.0")
            await found.until(first, "done")
            second = await found.roll_out("1.1.0")
            await found.until(second, "done")
            (late,) = await found.enrol(1)
            for _ in range(3):
                await found.turn()
            assert late.offered == {manifest_of("1.1.0"): 1}
            assert (await found.show(second))["state"] == "done"

    run(work())


TAKEOVERS = [
    ({}, False),
    ({"supersede": True}, True),
    ({"priority": 1}, True),
    ({"priority": -1, "supersede": True}, False),
]


@pytest.mark.parametrize(("wish", "taken"), TAKEOVERS)
def test_a_device_of_an_active_rollout_is_taken_over_only_by_an_explicit_rule(tmp_path: Path, wish: dict, taken: bool):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(4)
            first = await found.roll_out("1.0.0", stages=[{"share": 1.0, "soak_s": 1000}])
            await found.turn()
            second = await found.roll_out("1.1.0", **wish)
            await found.turn()
            await found.turn()
            wanted = manifest_of("1.1.0") if taken else manifest_of("1.0.0")
            assert {device.running for device in devices} == {wanted}
            shown = await found.show(first)
            assert shown["counts"]["real"]["superseded"] == (4 if taken else 0)
            if taken:  # a revert of the older one leaves alone what it no longer has
                await found.until(second, "done")
                await found.command(first, "revert")
                await found.until(first, "reverted")
                assert {device.running for device in devices} == {wanted}
            else:
                assert (await found.show(second))["why_not_yet"][0]["code"] == "held"

    run(work())


def test_roll_back_on_one_device_brings_what_it_ran_before(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(3, version="1.0.0")
            await found.until(await found.roll_out("1.1.0"), "done")
            made = await rollouts.roll_back(found.database, PROJECT, "test", MODEL, devices[0].id)
            await found.until(made["number"], "done")
            assert [device.running for device in devices] == [
                manifest_of("1.0.0"),
                manifest_of("1.1.0"),
                manifest_of("1.1.0"),
            ]
            back = await rollouts.roll_back(found.database, PROJECT, "test", MODEL, None)
            assert back["number"] == made["number"] - 1  # the newest that took devices forward
            await found.until(back["number"], "reverted")
            assert {device.running for device in devices} == {manifest_of("1.0.0")}
            with pytest.raises(RefusedError) as caught:
                await rollouts.roll_back(found.database, PROJECT, "test", "pitch", None)
            assert caught.value.code == "nothing_to_roll_back"

    run(work())


def test_a_large_stage_takes_several_turns_each_of_which_judges_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            devices = await found.enrol(30)
            for device in devices:
                device.behaviours["1.1.0"] = "bad"
            number = await found.roll_out("1.1.0", failure={"count": 3})
            await found.until(number, "halted")
            assert 10 <= (await found.show(number))["counts"]["real"]["exposed"] <= 20

    monkeypatch.setattr(conducting, "EXPOSED_PER_TURN", 10)
    run(work())


class Counting(Composer):
    """Signs offers, and counts them."""

    def __init__(self, inner: Composer) -> None:
        self.inner, self.devices = inner, list[str]()

    @property
    def keyid(self) -> str:
        return self.inner.keyid

    def compose_all(self, wanted, *arguments):
        self.devices += [one.device for one in wanted]
        return self.inner.compose_all(wanted, *arguments)


@pytest.mark.parametrize("meanwhile", ["nothing", "abort", "another offer"])
def test_offers_signed_ahead_of_a_stage_are_used_once_and_only_if_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(30)
            await found.until(await found.roll_out("1.0.0"), "done")
            counting = found.conductor.composer = Counting(found.conductor.composer)
            number = await found.roll_out("1.1.0")
            exposed = "SELECT a.device_id FROM assignment a JOIN rollout r ON r.id = a.rollout_id WHERE r.number = :n"
            while not await found.rows(exposed, n=number):
                await found.conductor.turn()
            (ahead,) = [one.ahead for one in found.conductor._known.values() if one.ahead is not None]
            made = await ahead.task
            assert len(made.composed) == 10
            assert len(counting.devices) == 20
            if meanwhile == "abort":
                await found.command(number, "abort")
            if meanwhile == "another offer":
                device = made.composed[0].device
                found.elsewhere("UPDATE offer SET serial = serial + 1 WHERE device_id = :device", device=device)
            for _ in range(6):
                await found.conductor.turn()
            assert len(await found.rows(exposed, n=number)) == (10 if meanwhile == "abort" else 30)
            if meanwhile == "nothing":
                assert sorted(counting.devices) == sorted(found.devices)
            offered = await found.rows(
                "SELECT device_id FROM offer WHERE CAST(models AS TEXT) LIKE :m", m=f"%{manifest_of('1.1.0')}%"
            )
            assert {row.device_id for row in offered} == (set() if meanwhile == "abort" else set(found.devices))

    monkeypatch.setattr(conducting, "EXPOSED_PER_TURN", 10)
    run(work())


class Interrupting(Composer):
    """Signs offers, and at the first one somebody else aborts the rollout."""

    def __init__(self, found: Fleet, inner: Composer) -> None:
        self.found, self.inner, self.done = found, inner, False

    def compose_all(self, *arguments):
        if not self.done:
            self.done = True
            self.found.elsewhere("UPDATE rollout SET wanted = 'abort', revision = revision + 1")
        return self.inner.compose_all(*arguments)


def test_a_decision_made_on_what_is_no_longer_so_is_thrown_away(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(5)
            number = await found.roll_out("1.1.0")
            found.conductor.composer = Interrupting(found, found.conductor.composer)
            await found.conductor.turn()
            assert await found.rows("SELECT 1 FROM assignment") == []
            assert await found.rows("SELECT 1 FROM offer") == []
            assert (await found.until(number, "aborted"))["state"] == "aborted"

    run(work())


class Racing(Composer):
    """Signs offers, and after that somebody else has given the first device another."""

    def __init__(self, found: Fleet, inner: Composer) -> None:
        self.found, self.inner, self.done = found, inner, False

    @property
    def keyid(self) -> str:
        return self.inner.keyid

    def compose_all(self, wanted, *arguments):
        made = self.inner.compose_all(wanted, *arguments)
        if not self.done:
            self.done = True
            device = wanted[0].device
            self.found.elsewhere("UPDATE offer SET serial = serial + 1 WHERE device_id = :device", device=device)
        return made


def test_an_offer_that_changed_meanwhile_takes_the_assignment_back_and_both_come_again(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(5)
            await found.until(await found.roll_out("1.0.0"), "done")
            number = await found.roll_out("1.1.0")
            found.conductor.composer = Racing(found, found.conductor.composer)
            await found.conductor.turn()
            assigned = "SELECT 1 FROM assignment a JOIN rollout r ON r.id = a.rollout_id WHERE r.number = :n"
            assert await found.rows(assigned, n=number) == []
            await found.until(number, "done")
            assert len(await found.rows(assigned, n=number)) == 5
            assert {device.running for device in devices} == {manifest_of("1.1.0")}

    run(work())


def test_offers_signed_anew_are_composed_again_if_they_changed_meanwhile(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            await found.enrol(3)
            await found.until(await found.roll_out("1.0.0"), "done")
            async with found.database.write() as connection:
                await connection.execute(text("UPDATE offer SET issued_at = 1"))
            found.conductor.composer = Racing(found, found.conductor.composer)
            assert await found.conductor.resign() == 3
            rows = await found.rows("SELECT serial FROM offer ORDER BY serial")
            assert [row.serial for row in rows] == [2, 2, 3]

    run(work())


def test_running_takes_turns_and_signs_anew_one_after_the_other(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            await found.enrol(2)
            await found.until(await found.roll_out("1.0.0"), "done")
            async with found.database.write() as connection:
                await connection.execute(text("UPDATE offer SET issued_at = 1"))
            running = asyncio.create_task(found.conductor.run())
            serials: set[int] = set()
            for _ in range(1_000):
                serials = {row.serial for row in await found.rows("SELECT serial FROM offer")}
                if serials == {2}:
                    break
                await asyncio.sleep(0.01)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            assert serials == {2}

    run(work())


def test_only_the_holder_of_the_lease_writes(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(5)
            await found.roll_out("1.1.0")
            other = Lease(found.database, PROJECT, "director")
            assert not await other.hold()
            async with found.database.write() as connection:
                await connection.execute(text("UPDATE lease SET expires_at = 0"))
            assert await other.hold()
            await found.conductor.turn()
            assert await found.rows("SELECT 1 FROM assignment") == []
            async with found.database.write() as connection:
                await other.check(connection)
                with pytest.raises(UnreachableError) as caught:
                    await found.conductor.lease.check(connection)
            assert caught.value.code == "lease_lost"

    run(work())


def test_every_decision_is_recorded_with_its_evidence(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(5)
            number = await found.roll_out("1.1.0")
            await found.until(number, "done")
            async with found.database.read() as connection:
                decided = await rollouts.decisions(connection, PROJECT, number, 0)
            kinds = [[one["decision"] for one in row["decisions"]] for row in decided]
            assert kinds == [["moved", "expose"], ["moved"]]
            assert decided[-1]["evidence"]["stages"] == [{"confirmed": 5}]
            assert [row["revision"] for row in decided] == [2, 3]

    run(work())


def test_a_plan_with_strata_takes_its_share_of_each(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            await found.enrol(40, site="berlin")
            await found.enrol(8, site="oslo")
            wish = {"strata": ["label.site"], "stages": [{"share": 0.25, "soak_s": 1000}, {"share": 1.0}]}
            number = await found.roll_out("1.1.0", **wish)
            await found.turn()
            rows = await found.rows("SELECT stratum, count(*) AS devices FROM assignment GROUP BY stratum")
            assert {row.stratum: row.devices for row in rows} == {"berlin": 10, "oslo": 2}
            await nobody_above_the_cut_off(found, number)

    run(work())


def test_a_device_that_already_runs_the_bundle_goes_back_to_where_it_came_from(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            pilots = await found.enrol(2, version="1.0.0", pilot="yes")
            others = await found.enrol(2, version="1.0.0")
            await found.until(await found.roll_out("1.1.0", selector="label.pilot = yes"), "done")
            everyone = await found.roll_out("1.1.0")
            await found.until(everyone, "done")
            await found.command(everyone, "revert")
            await found.until(everyone, "reverted")
            assert {device.running for device in [*pilots, *others]} == {manifest_of("1.0.0")}

    run(work())


def test_a_revert_reaches_devices_that_a_later_rollout_tried_and_gave_back(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            devices = await found.enrol(12, version="1.0.0")
            for device in devices[:3]:
                device.behaviours["1.2.0"] = "bad"
            second = await found.roll_out("1.1.0")
            await found.until(second, "done")
            await found.until(await found.roll_out("1.2.0", failure={"count": 1}), "halted")
            assert {device.running for device in devices} == {manifest_of("1.1.0")}
            await found.command(second, "revert")
            shown = await found.until(second, "reverted")
            assert {device.running for device in devices} == {manifest_of("1.0.0")}
            assert shown["counts"]["real"]["reverted"] == 12

    run(work())


def test_a_revert_leaves_alone_what_a_newer_release_has(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            devices = await found.enrol(4, version="1.0.0")
            first = await found.roll_out("1.1.0")
            await found.until(first, "done")
            newer = await found.roll_out("1.2.0", device=devices[0].id)
            await found.until(newer, "done")
            await found.command(first, "revert")
            shown = await found.until(first, "reverted")
            running = [device.running for device in devices]
            assert running == [manifest_of("1.2.0"), *[manifest_of("1.0.0")] * 3]
            counts = shown["counts"]["real"]
            assert (counts["reverted"], counts["superseded"], counts["confirmed"]) == (3, 1, 0)
            # and what it has does not go back to what was taken back
            await found.command(newer, "revert")
            await found.until(newer, "reverted")
            assert {device.running for device in devices} == {manifest_of("1.0.0")}

    run(work())


@pytest.mark.parametrize("wish", [{}, {"soak_s": 1000}], ids=["done", "running"])
def test_a_revert_reaches_a_device_that_a_newer_release_failed_on(tmp_path: Path, wish: dict[str, Any]):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            devices = await found.enrol(8, version="1.0.0")
            first = await found.roll_out("1.1.0", stages=[{"share": 1.0, **wish}])
            await found.turn()
            await found.turn()
            devices[0].behaviours["1.2.0"] = "bad"
            newer = await found.roll_out("1.2.0", priority=1, failure={"share": 0.5})
            await found.until(newer, "done")
            assert devices[0].running == manifest_of("1.1.0")
            await found.command(first, "revert")
            await found.until(first, "reverted")
            assert [device.running for device in devices] == [manifest_of("1.0.0"), *[manifest_of("1.2.0")] * 7]

    run(work())


def test_a_device_taken_over_on_its_way_back_goes_back_to_what_it_had_before_that(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            (device,) = await found.enrol(1, version="1.0.0")
            first = await found.roll_out("1.1.0")
            await found.until(first, "done")
            device.online = False
            await found.command(first, "revert")
            await found.turn()
            newer = await found.roll_out("1.2.0", priority=1)
            await found.turn()
            device.online = True
            await found.until(newer, "done")
            assert device.running == manifest_of("1.2.0")
            await found.command(newer, "revert")
            await found.until(newer, "reverted")
            assert device.running == manifest_of("1.0.0")
            assert (await found.show(first))["state"] == "reverted"

    run(work())


def test_a_gate_with_stated_errors_halts_by_returns_and_says_why(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(20, version="1.0.0")
            for device in devices[::2]:
                device.behaviours["1.1.0"] = "bad"
            gate = {"metric": "returned", "tolerated": 0.02, "harm": 0.1}
            loose = {"failure": {"count": 1000}, "late": {"count": 1000}}
            number = await found.roll_out("1.1.0", stages=[{"share": 1.0}], gates=[gate], **loose)
            shown = await found.until(number, "halted")
            assert shown["reason"] == "returned_bound"
            assert {device.running for device in devices} == {manifest_of("1.0.0")}
            decided = [
                one
                for row in await found.rows("SELECT decisions FROM decision ORDER BY revision")
                for one in msgspec.json.decode(row.decisions)
                if one.get("reason") == "returned_bound"
            ]
            verdict = decided[0]["verdicts"][0]
            assert (verdict["gate"], verdict["bad"], verdict["judged"]) == ("returned", 10, 20)
            assert verdict["numbers"]["low"] > 0.02
            assert verdict["numbers"]["e_halt"] >= 20
            shares = {one["gate"]: one for one in shown["gates"]}
            assert shares["returned"]["numbers"]["needed"] > 20

    run(work())


def test_a_rollout_all_at_once_exposes_everybody_and_takes_everybody_back(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            devices = await found.enrol(40, version="1.0.0")
            number = await found.roll_out("1.1.0", strategy="all_at_once")
            exposed_by_turn: set[int] = set()
            while (await found.show(number))["state"] != "done":
                await found.turn()
                exposed_by_turn.add((await found.show(number))["counts"]["real"]["exposed"])
                assert len(exposed_by_turn) < 10
            assert exposed_by_turn <= {0, 40}
            assert {device.running for device in devices} == {manifest_of("1.1.0")}
            for device in devices[::2]:
                device.behaviours["1.2.0"] = "bad"
            halted = await found.until(await found.roll_out("1.2.0", strategy="all_at_once"), "halted")
            assert halted["reason"] == "failure_bound"
            assert halted["counts"]["real"]["exposed"] == 40
            assert {device.running for device in devices} == {manifest_of("1.1.0")}

    run(work())


def test_an_adaptive_rollout_starts_with_a_handful_and_doubles_while_all_is_well(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            number = await found.roll_out("1.1.0", strategy="adaptive", harmed_max=4)
            sizes = [0]
            while (await found.show(number))["state"] != "done":
                await found.turn()
                exposed_now = (await found.show(number))["counts"]["real"]["exposed"]
                if exposed_now > sizes[-1]:
                    sizes.append(exposed_now)
                assert len(sizes) < 10
            assert sizes[1] == 4
            steps = [after - before for before, after in itertools.pairwise(sizes)]
            assert steps[:-1] == sorted(steps[:-1]), "no step but the last is smaller than the one before"
            assert sizes[-1] == 60
            assert {device.running for device in devices} == {manifest_of("1.1.0")}

    run(work())


def test_an_adaptive_rollout_starts_in_every_stratum(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            for site, count in (("berlin", 50), ("oslo", 4), ("rome", 1)):
                await found.enrol(count, site=site)
            number = await found.roll_out("1.1.0", strategy="adaptive", strata=["label.site"])
            await found.turn()
            rows = await found.rows("SELECT stratum, count(*) AS devices FROM assignment GROUP BY stratum")
            assert {row.stratum: row.devices for row in rows} == {"berlin": 3, "oslo": 1, "rome": 1}
            await nobody_above_the_cut_off(found, number)

    run(work())


def test_an_adaptive_rollout_of_a_bad_version_reaches_a_handful(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            for device in devices:
                device.behaviours["1.1.0"] = "bad"
            gate = {"metric": "failed", "tolerated": 0.02, "harm": 0.1}
            number = await found.roll_out("1.1.0", strategy="adaptive", gates=[gate])
            shown = await found.until(number, "halted")
            assert shown["counts"]["real"]["exposed"] == 5
            assert {device.running for device in devices} == {manifest_of("1.0.0")}

    run(work())
