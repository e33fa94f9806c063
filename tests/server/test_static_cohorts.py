"""A static cohort is a stored list that selectors name: any number of devices, the same to previews, rollouts and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.fleet_kit import PROJECT, fleet, manifest_of, run
from wherry_server import cohorts, flag_book, flag_values, kept_lists
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


@pytest.mark.backends
def test_a_list_goes_when_two_looks_in_a_row_find_nothing_that_refers_to_it(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            await found.enrol(3, version="1.0.0", site="north")

            async def keep(name: str) -> str:
                made = await cohorts.save(found.database, PROJECT, "us", name, NORTH, replace=False, static=True)
                return str(made["selector"])

            async def left() -> set[str]:
                rows = await found.rows("SELECT DISTINCT list_id FROM kept_member")
                return {name for name, named in made.items() if named in {f"kept.{row.list_id} = true" for row in rows}}

            made = {name: await keep(name) for name in ("cohort", "flag", "rollout", "nobody")}
            wish = {"name": "f", "type": "boolean", "variants": {"on": True, "off": False}, "default": "off"}
            wish["rules"] = [{"when": f"not ({made['flag']})", "variant": "on"}]
            await flag_book.save(found.database, PROJECT, "us", wish, replace=False)
            number = await found.roll_out("1.1.0", selector="", cohort="rollout", start=False, stages=[{"share": 1.0}])
            for name in ("flag", "rollout", "nobody"):
                await cohorts.remove(found.database, PROJECT, "us", name)

            suspects = await kept_lists.collect(found.database, PROJECT, frozenset())
            assert [f"kept.{one} = true" for one in suspects] == [made["nobody"]]
            assert await left() == set(made), "one look is not enough"
            assert await kept_lists.collect(found.database, PROJECT, suspects) == frozenset()
            assert await left() == {"cohort", "flag", "rollout"}
            (told,) = await found.rows("SELECT subject FROM audit_entry WHERE action = 'cohort.collect'")
            assert f"kept.{told.subject} = true" == made["nobody"]

            async def looks(times: int) -> set[str]:
                suspects: frozenset[str] = frozenset()
                for _ in range(times):
                    suspects = await kept_lists.collect(found.database, PROJECT, suspects)
                return await left()

            await found.command(number, "start")
            await found.until(number, "done")
            assert await looks(3) == {"cohort", "flag", "rollout"}, "a release that is done takes newcomers"
            await found.command(number, "revert")
            await found.until(number, "reverted")
            assert await looks(2) == {"cohort", "flag"}
            await flag_book.remove(found.database, PROJECT, "us", "f")
            suspects = await kept_lists.collect(found.database, PROJECT, frozenset())
            again = made["flag"]  # somebody names it meanwhile
            await cohorts.save(found.database, PROJECT, "us", "again", again, replace=False)
            assert await kept_lists.collect(found.database, PROJECT, suspects) == frozenset()
            assert await left() == {"cohort", "flag"}

    run(work())
