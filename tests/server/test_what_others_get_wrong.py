"""What users of other update servers complain of, one scenario for each complaint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.server.fleet_kit import PROJECT, FakeDevice, Fleet, fleet, manifest_of, run
from wherry_server import standing
from wherry_server.targeting import key_of
from wherry_shared.errors import RefusedError

STAGES = [{"share": 0.5}, {"share": 1.0}]


async def begun(found: Fleet, count: int, behaviour: Any = "good", **wish: Any) -> tuple[int, list[FakeDevice]]:
    """A fleet on 1.0.0 of which some have 1.1.0 in the first stage."""
    await found.publish("1.0.0", "1.1.0")
    devices = await found.enrol(count, version="1.0.0")
    for device in devices:
        device.behaviours["1.1.0"] = behaviour
    number = await found.roll_out("1.1.0", **{"stages": STAGES, **wish})
    await found.turn()
    return number, devices


def has(devices: list[FakeDevice], version: str = "1.1.0") -> int:
    return sum(device.running == manifest_of(version) for device in devices)


def told(devices: list[FakeDevice]) -> int:
    return sum(bool(device.offered) for device in devices)


async def downloaded_is_not_success(found: Fleet) -> None:
    number, devices = await begun(found, 10, "stuck", stage_max_s=4000, silent={"share": 0.9}, late={"share": 0.9})
    for _ in range(3):
        await found.turn()
    shown = await found.show(number)
    assert (shown["state"], shown["stage"], told(devices)) == ("running", 0, 5)
    await found.turn(seconds=4001)
    shown = await found.until(number, "halted")
    assert (shown["reason"], told(devices)) == ("stage_deadline:sample", 5)


async def one_failed_device_in_a_group_of_one_is_not_100_percent(found: Fleet) -> None:
    number, devices = await begun(found, 20, "bad", stages=[{"count": 1}, {"share": 1.0}])
    for _ in range(3):
        await found.turn()
    shown = await found.show(number)
    assert (shown["state"], told(devices)) == ("running", 1), "it neither halted nor went on"
    assert shown["why_not_yet"][0] == {"code": "too_few", "have": 1, "need": 5, "unit": "devices"}


async def that_all_have_ended_is_not_success(found: Fleet) -> None:
    number, devices = await begun(found, 12, "bad")
    assert (await found.until(number, "halted"))["reason"] == "failure_bound"
    assert told(devices) == 6


async def who_cancels_starts_no_further_group(found: Fleet) -> None:
    number, devices = await begun(found, 10)
    await found.command(number, "abort")
    await found.until(number, "aborted")
    for _ in range(3):
        await found.turn()
    assert told(devices) == 5


async def who_is_offline_blocks_nobody_for_ever(found: Fleet) -> None:
    await found.publish("1.0.0", "1.1.0")
    devices = await found.enrol(20, version="1.0.0")
    devices[0].online = False
    number = await found.roll_out("1.1.0", stages=[{"share": 1.0}], settled_share=1.0)
    await found.turn()
    await found.turn()
    assert (await found.show(number))["state"] == "running"
    async with found.database.write() as connection:  # an hour later
        await connection.execute(text("UPDATE assignment SET exposed_at = exposed_at - 3600000000"))
    shown = await found.until(number, "done")
    assert shown["stages"][0]["counts"]["silent"] == 1
    assert (await listed(found, number, "silent")) == [devices[0].id], "and it is named"


async def who_is_offline_in_a_small_stage_does_not_either(found: Fleet) -> None:
    """Fewer than the sample of `failure` are left to answer: those that did are all that there are to ask."""
    await found.publish("1.0.0", "1.1.0")
    devices = await found.enrol(12, version="1.0.0")
    for device in devices:
        device.online = False
    number = await found.roll_out("1.1.0", stages=[{"count": 6}, {"share": 1.0}])
    await found.turn()
    away = {row.device_id for row in (await found.rows("SELECT device_id FROM assignment"))[:2]}
    for device in devices:
        device.online = device.id not in away
    await found.turn()
    await found.turn()
    assert (await found.show(number))["stage"] == 0
    async with found.database.write() as connection:  # an hour later
        await connection.execute(text("UPDATE assignment SET exposed_at = exposed_at - 3600000000"))
    await found.turn()
    await found.turn()
    assert (await found.show(number))["stage"] == 1


async def who_resumes_starts_no_further_group(found: Fleet) -> None:
    number, devices = await begun(found, 10, "stuck")
    await found.command(number, "pause")
    await found.turn()
    await found.command(number, "resume")
    await found.turn()
    await found.turn()
    shown = await found.show(number)
    assert (shown["state"], shown["stage"], told(devices)) == ("running", 0, 5)
    for device in devices:
        device.online = False
    await found.command(number, "abort")
    await found.turn()
    with pytest.raises(RefusedError, match="resume is not possible"):
        await found.command(number, "resume")


async def who_has_changed_goes_back(found: Fleet) -> None:
    number, devices = await begun(found, 12)
    assert has(devices) == 6
    for device in devices:
        if not device.offered:
            device.behaviours["1.1.0"] = "bad"
    await found.until(number, "halted")
    assert has(devices) == 0
    assert has(devices, "1.0.0") == 12


async def what_is_stuck_says_why(found: Fleet) -> None:
    number, devices = await begun(found, 6, "disk", stages=[{"share": 1.0}])
    await found.turn()
    assert [why["code"] for why in (await found.show(number))["why_not_yet"]][:2] == ["sample", "in_flight"]
    async with found.database.read() as connection:
        every = await standing.devices(connection, PROJECT, number, limit=10)
    assert [(one["state"], one["reason"]) for one in every] == [("pending", "disk_full")] * len(devices)


async def a_bad_update_is_not_tried_for_ever(found: Fleet) -> None:
    number, devices = await begun(found, 10, stages=[{"share": 1.0}], failure={"share": 0.5})
    bad = devices[0]
    bad.behaviours["1.2.0"] = "bad"
    await found.publish("1.2.0")
    await found.until(number, "done")
    for _ in range(3):
        number = await found.roll_out("1.2.0", stages=[{"share": 1.0}], failure={"share": 0.5}, supersede=True)
        for _ in range(3):
            await found.say_hello([bad])
            await found.turn()
    assert bad.offered[manifest_of("1.2.0")] == 1
    assert await found.conductor.resign() == 0
    async with found.database.read() as connection:
        codes = [one["state"] for one in await standing.devices(connection, PROJECT, number, limit=20)]
    assert codes.count("returned") == 0, "a later rollout does not even count it"


async def who_joins_later_is_neither_missed_nor_gets_everything_at_once(found: Fleet) -> None:
    number, early = await begun(found, 10, stages=[{"share": 0.5, "soak_s": 100}, {"share": 1.0}])
    assert has(early) == 5
    ((salt,),) = await found.rows("SELECT salt FROM rollout WHERE number = :number", number=number)
    last = max(key_of(salt, device.id) for device in early if has([device]))
    late = await found.enrol(40, version="1.0.0")
    for _ in range(2):
        await found.turn()
    belong = [device for device in late if key_of(salt, device.id) <= last]
    assert has(late) == has(belong) == len(belong), "by their keys, in the stage that it is in"
    await found.turn(seconds=101)
    await found.until(number, "done")
    (newest,) = await found.enrol(1, version="1.0.0")
    for _ in range(3):
        await found.turn()
    assert has([*late, newest]) == 41


async def listed(found: Fleet, number: int, state: Any) -> list[str]:
    async with found.database.read() as connection:
        return [one["device"] for one in await standing.devices(connection, PROJECT, number, state=state, limit=100)]


@pytest.mark.parametrize(
    "scenario",
    [
        downloaded_is_not_success,
        one_failed_device_in_a_group_of_one_is_not_100_percent,
        that_all_have_ended_is_not_success,
        who_cancels_starts_no_further_group,
        who_is_offline_blocks_nobody_for_ever,
        who_is_offline_in_a_small_stage_does_not_either,
        who_resumes_starts_no_further_group,
        who_has_changed_goes_back,
        what_is_stuck_says_why,
        a_bad_update_is_not_tried_for_ever,
        who_joins_later_is_neither_missed_nor_gets_everything_at_once,
    ],
)
def test_a_complaint_that_nobody_has_to_make_here(tmp_path: Path, scenario: Any):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await scenario(found)

    run(work())
