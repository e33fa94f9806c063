"""Feature flags on the server: what a definition may say, who has what, and offers that carry it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.fleet_kit import PROJECT, FakeDevice, Fleet, fleet, run
from wherry_server import flag_book, flag_values
from wherry_server.flags import parse_flag, ready
from wherry_shared import dsse, ids, wire
from wherry_shared.errors import RefusedError

THRESHOLD: dict[str, Any] = {
    "name": "new-threshold",
    "type": "number",
    "variants": {"old": 0.8, "new": 0.65},
    "default": "old",
}
SWITCH: dict[str, Any] = {"name": "night", "type": "boolean", "variants": {"on": True, "off": False}, "default": "off"}


# --- definitions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"default": "none"}, "none of its variants"),
        ({"variants": {"old": "0.8"}}, "is a string, the flag is a number"),
        ({"variants": {"old": True}}, "is a boolean, the flag is a number"),
        ({"variants": {"old": None}}, "is a nothing"),
        ({"variants": {"old": float("inf")}}, "finite"),
        ({"variants": {"old": 2**63}}, "64 bits"),
        ({"variants": {}}, "0 variants"),
        ({"variants": {"old": 1, "a b": 2}}, "A-Z a-z"),
        ({"type": "list"}, "type"),
        ({"name": "no spaces"}, "a key has"),
        ({"rules": [{"variant": "newest"}]}, "rule 1 is 'newest'"),
        ({"rules": [{"variant": "new", "share": 0}]}, "share 0"),
        ({"rules": [{"variant": "new", "when": "label.site == x"}]}, "selector"),
        ({"rules": [{"variant": "new", "unless": "x"}]}, "unless"),
        ({"enabled": True}, "enabled"),
    ],
    ids=lambda one: json.dumps(one) if isinstance(one, dict) else "",
)
def test_a_definition_that_says_what_nobody_could_obey_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        parse_flag({**THRESHOLD, **wrong})


def test_the_first_rule_that_takes_a_device_gives_it_its_variant() -> None:
    rules = [{"when": "label.site = berlin", "variant": "new"}, {"when": "label.site = b*", "variant": "old"}]
    asked = ready(parse_flag({**THRESHOLD, "default": "new", "rules": rules}), "salt")
    by_site = {site: asked.ruled("d", {"label.site": site}) for site in ("berlin", "bonn", "york")}
    assert {site: (found.variant, found.by, found.number) for site, found in by_site.items()} == {
        "berlin": ("new", "rule", 1),
        "bonn": ("old", "rule", 2),
        "york": ("new", "default", 0),
    }


def test_shares_nest_and_are_as_large_as_they_say() -> None:
    devices = [ids.new_device_id() for _ in range(2_000)]

    def having(share: float) -> set[str]:
        asked = ready(parse_flag({**THRESHOLD, "rules": [{"share": share, "variant": "new"}]}), "salt")
        return {device for device in devices if asked.ruled(device, {}).variant == "new"}

    small, middle, whole = having(0.05), having(0.25), having(1.0)
    assert small < middle < whole == set(devices)
    assert 0.03 < len(small) / len(devices) < 0.07
    assert 0.21 < len(middle) / len(devices) < 0.29
    split = ready(
        parse_flag({**THRESHOLD, "rules": [{"share": 0.05, "variant": "new"}, {"share": 0.25, "variant": "old"}]}),
        "salt",
    )
    numbers = {device: split.ruled(device, {}).number for device in devices}
    assert {device for device, number in numbers.items() if number == 2} == middle - small


# --- offers --------------------------------------------------------------------------------------


async def save(found: Fleet, wish: dict[str, Any], *, replace: bool = False) -> None:
    await flag_book.save(found.database, PROJECT, "test", wish, replace=replace)


async def offered(found: Fleet, device: FakeDevice) -> dict[str, Any]:
    """What the signed offer of a device carries."""
    rows = await found.rows("SELECT envelope FROM offer WHERE device_id = :d", d=device.id)
    if not rows:
        return {}
    return wire.parse(wire.Offer, dsse.open_envelope(bytes(rows[0].envelope))[1]).flags


async def bear(found: Fleet) -> int:
    """Have the director look at every device."""
    bearer = found.conductor._bearer
    if bearer is not None:
        bearer._look_at = 0.0
    return await found.conductor.bear_flags()


@pytest.mark.backends
def test_every_device_gets_its_flags_in_a_new_offer_and_only_where_they_changed(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            berlin = await found.enrol(3, version="1.0.0", site="berlin")
            york = await found.enrol(2)
            assert await bear(found) == 0
            assert await found.rows("SELECT 1 FROM offer") == []
            await save(found, {**THRESHOLD, "rules": [{"when": "label.site = berlin", "variant": "new"}]})
            assert await found.conductor.bear_flags() == 5, "a change is noticed in the next turn"
            assert [await offered(found, one) for one in (*berlin, *york)] == [{"new-threshold": 0.65}] * 3 + [
                {"new-threshold": 0.8}
            ] * 2
            assert await bear(found) == 0
            # a rollout of a model keeps them, and flags keep its model
            await found.until(await found.roll_out("1.0.0"), "done")
            assert await offered(found, york[0]) == {"new-threshold": 0.8}
            await save(found, THRESHOLD, replace=True)
            assert await bear(found) == 3
            assert await offered(found, berlin[0]) == {"new-threshold": 0.8}
            rows = await found.rows("SELECT models, serial FROM offer WHERE device_id = :d", d=berlin[0].id)
            assert ("sha256:" in rows[0].models, rows[0].serial) == (True, 3)
            late = await found.enrol(1)
            assert await bear(found) == 1
            assert await offered(found, late[0]) == {"new-threshold": 0.8}
            await flag_book.remove(found.database, PROJECT, "test", "new-threshold")
            assert await bear(found) == 6
            assert await offered(found, late[0]) == {}
            assert await bear(found) == 0
            actions = [row.action for row in await found.rows("SELECT action FROM audit_entry ORDER BY id")]
            assert [one for one in actions if one.startswith("flag.")] == ["flag.create", "flag.change", "flag.delete"]

    run(work())


def test_a_restarted_director_goes_on_where_the_other_stopped(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            devices = await found.enrol(2)
            await save(found, SWITCH)
            await bear(found)
            await save(found, {**SWITCH, "default": "on"}, replace=True)
            found.conductor._bearer = None
            assert await found.conductor.bear_flags() == 2
            assert await offered(found, devices[0]) == {"night": True}

    run(work())


def test_flags_that_no_offer_could_carry_are_refused_when_they_are_saved(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            large = {"type": "string", "variants": {"long": "x" * 20_000, "short": ""}, "default": "short"}
            await save(found, {"name": "one", **large})
            with pytest.raises(RefusedError) as refused:
                await save(found, {"name": "two", **large})
            assert refused.value.code == "flags_too_large"
            async with found.database.read() as connection:
                assert len((await flag_values.definitions(connection, PROJECT)).flags) == 1

    run(work())
