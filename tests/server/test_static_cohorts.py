"""A static cohort is a stored list that selectors name: any number of devices, the same to previews, rollouts and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.fleet_kit import PROJECT, fleet, manifest_of, run
from wherry_server import cohorts, flag_values
from wherry_server.cohorts import STATIC_MAX
from wherry_server.flags import parse_flag, ready
from wherry_server.fleet import Filter, list_devices
from wherry_server.targeting import parse_selector
from wherry_shared.errors import RefusedError

NORTH = "label.site = north"


@pytest.mark.backends
def test_a_static_cohort_keeps_whom_it_took(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            first = await found.enrol(120, version="1.0.0", site="north")
            await found.enrol(5, version="1.0.0", site="south")
            made = await cohorts.save(found.database, PROJECT, "us", "kept", NORTH, replace=False, static=True)
            assert (made["kept"], made["kept_from"]) == (120, NORTH)
            await found.enrol(3, version="1.0.0", site="north")
            await cohorts.save(found.database, PROJECT, "us", "live", NORTH, replace=False)
            kept, named = {one.id for one in first}, made["selector"]
            async with found.database.read() as connection:
                assert {one.id for one in await cohorts.members(connection, PROJECT, parse_selector(named))} == kept
                shown = await cohorts.preview(connection, PROJECT, named, 5)
                assert (shown["devices"], len(shown["names"])) == (120, 5)
                assert (await cohorts.preview(connection, PROJECT, f"not {named}", 50))["devices"] == 8
                assert await cohorts.count(connection, PROJECT, parse_selector(f"{named} and {NORTH}")) == 120
                few = [first[0].id, next(one for one in found.devices if one not in kept)]
                seen = await cohorts.members(connection, PROJECT, parse_selector(named), devices=few)
                assert [one.id for one in seen] == few[:1]
                rows, _ = await list_devices(
                    connection, PROJECT, Filter(selector=parse_selector(f"{named} and label.site = north"), limit=200)
                )
                assert {row["id"] for row in rows} == kept
                wish = {"name": "f", "type": "boolean", "variants": {"on": True, "off": False}, "default": "off"}
                flag = ready(parse_flag({**wish, "rules": [{"when": named, "variant": "on"}]}), "salt")
                given = await flag_values.sources(connection, PROJECT, [flag])
                assert {device for device, mine in given.items() if mine["f"].variant == "on"} == kept
            # a rollout keeps the list, whatever becomes of the cohort
            number = await found.roll_out("1.1.0", selector="", cohort="kept", stages=[{"share": 1.0}])
            await cohorts.remove(found.database, PROJECT, "us", "kept")
            await found.until(number, "done")
            assert {one.id for one in found.devices.values() if one.running == manifest_of("1.1.0")} == kept

    run(work())


def test_a_static_cohort_can_be_made_live_again_and_anew(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.enrol(3, site="north")
            first = await cohorts.save(found.database, PROJECT, "us", "kept", NORTH, replace=False, static=True)
            await found.enrol(1, site="north")
            again = await cohorts.save(found.database, PROJECT, "us", "kept", NORTH, replace=True, static=True)
            assert (first["kept"], again["kept"]) == (3, 4)
            assert first["selector"] != again["selector"], "a list never changes: rollouts have its name"
            live = await cohorts.save(found.database, PROJECT, "us", "kept", NORTH, replace=True)
            assert (live["selector"], live["kept"], live["kept_from"]) == (NORTH, 0, "")

    run(work())


def test_a_static_cohort_of_nobody_or_of_too_many_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert STATIC_MAX >= 100_000

    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.enrol(3, site="north")
            monkeypatch.setattr(cohorts, "STATIC_MAX", 2)
            for refused in (NORTH, "label.site = south"):
                with pytest.raises(RefusedError) as caught:
                    await cohorts.save(found.database, PROJECT, "us", "kept", refused, replace=False, static=True)
                assert caught.value.code == "cohort_static"
            assert await found.rows("SELECT 1 FROM kept_member") == []
            assert await found.rows("SELECT 1 FROM cohort") == []

    run(work())
