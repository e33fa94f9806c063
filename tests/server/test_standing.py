"""Each device of a rollout says where it stands, and what keeps it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from sqlalchemy import text

from tests.server.fleet_kit import PROJECT, FakeDevice, Fleet, fleet, run
from wherry_server import quarantine, rollouts, standing
from wherry_server.cli.rollout import PLACES
from wherry_server.outcomes import Outcome, Standing
from wherry_server.plan import parse_plan

pytestmark = pytest.mark.backends
HOUR_US = 3_600_000_000


async def stands(found: Fleet, number: int, device: FakeDevice) -> dict[str, Any]:
    async with found.database.read() as connection:
        row = await rollouts.find(connection, PROJECT, number)
        return await standing.device(connection, row, parse_plan(row.plan), device.id)


def test_every_outcome_is_a_standing_and_every_standing_has_words() -> None:
    assert {*get_args(Outcome), "pending", "silent", "late"} - {"exposed"} == set(get_args(Standing))
    assert set(get_args(Standing)) <= set(PLACES)


def test_a_device_that_was_exposed_says_what_it_is_waited_for(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            good, away, stuck, bad, full, *_ = devices = await found.enrol(9, version="1.0.0")
            away.online = False
            stuck.behaviours["1.1.0"] = "stuck"
            bad.behaviours["1.1.0"] = "bad"
            full.behaviours["1.1.0"] = "disk"
            number = await found.roll_out("1.1.0", failure={"share": 0.5}, late={"share": 0.5})
            await found.turn()
            told = {device.id: await stands(found, number, device) for device in devices}
            assert told[good.id]["code"] == "confirmed"
            assert (told[away.id]["code"], told[away.id]["noticed_at"]) == ("pending", 0)
            assert 3590 <= told[away.id]["silent_in_s"] <= 3600
            assert (told[stuck.id]["code"], told[stuck.id]["reason"]) == ("pending", "fetching")
            assert 3590 <= told[stuck.id]["late_in_s"] <= 3600
            assert (told[bad.id]["code"], told[bad.id]["reason"]) == ("returned", "health_errors")
            assert (told[full.id]["code"], told[full.id]["reason"]) == ("pending", "disk_full")
            async with found.database.write() as connection:
                await connection.execute(
                    text(
                        "UPDATE assignment SET exposed_at = exposed_at - :h,"
                        " noticed_at = CASE WHEN noticed_at > :h THEN noticed_at - :h ELSE 0 END"
                    ),
                    {"h": HOUR_US},
                )
            assert (await stands(found, number, away))["code"] == "silent"
            assert (await stands(found, number, stuck))["code"] == "late"
            async with found.database.read() as connection:
                every = await standing.devices(connection, PROJECT, number, limit=100)
                assert [one["device"] for one in every] == sorted(found.devices)
                quiet = await standing.devices(connection, PROJECT, number, state="silent", stage=1, limit=100)
                assert [(one["device"], one["stage"], one["state"]) for one in quiet] == [(away.id, 1, "silent")]
                assert await standing.devices(connection, PROJECT, number, stage=2, limit=100) == []
                page = await standing.devices(connection, PROJECT, number, limit=2, after=every[3]["device"])
                assert page == every[4:6]

    run(work())


def test_a_device_that_was_not_exposed_says_what_keeps_it_out(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0", "1.2.0")
            bad, *_ = devices = await found.enrol(6)
            first = await found.roll_out("1.0.0", priority=5, stages=[{"share": 1.0, "soak_s": 1000}])
            await found.turn()
            second = await found.roll_out("1.1.0")
            await found.turn()
            told = await stands(found, second, bad)
            assert (told["code"], told["rollout"], told["priority"]) == ("held", first, 5)
            await found.command(first, "abort")
            await found.until(first, "aborted")
            await found.until(second, "done")
            third = await found.roll_out("1.2.0", failure={"share": 0.5})
            bad.behaviours["1.2.0"] = "bad"
            await found.until(third, "done")
            assert (await stands(found, second, bad))["code"] == "confirmed"
            fourth = await found.roll_out("1.2.0", supersede=True)
            told = await stands(found, fourth, bad)
            assert (told["code"], told["rollout"], told["reason"]) == ("quarantine", third, "health_errors")
            await found.command(fourth, "abort")
            # hardware is told apart from the device that failed on it
            for device in devices:
                device.behaviours["1.1.0"] = "bad"
            fifth = await found.roll_out("1.1.0", attempt=2, failure={"count": 1})
            await found.until(fifth, "halted")
            (late,) = await found.enrol(1)
            sixth = await found.roll_out("1.1.0")
            told = await stands(found, sixth, late)
            assert told["code"] == "known_bad"
            async with found.database.read() as connection:
                assert told["hardware_class"] in {
                    one["hardware_class"] for one in await quarantine.hardware(connection, PROJECT)
                }

    run(work())


def test_a_device_that_was_taken_over_names_the_rollout_that_has_it(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            (device,) = await found.enrol(1)
            first = await found.roll_out("1.0.0", stages=[{"share": 1.0, "soak_s": 1000}])
            await found.turn()
            second = await found.roll_out("1.1.0", priority=1)
            await found.turn()
            told = await stands(found, first, device)
            assert (told["code"], told["rollout"]) == ("superseded", second)

    run(work())
