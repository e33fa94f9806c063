"""Feature flags on the server: what a definition may say, who has what, and offers that carry it."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from typer.testing import CliRunner

from tests.server.fleet_kit import MODEL, PROJECT, FakeDevice, Fleet, fleet, manifest_of, run
from tests.server.harness import Running
from tests.server.test_comparison import PERIOD_S, Telling, gate_of
from tests.server.test_conductor import nobody_above_the_cut_off
from wherry_server import flag_bearer, flag_book, flag_trials, flag_values, quarantine
from wherry_server.cli.everything import app
from wherry_server.cli.flag import parse_rule, parse_variants
from wherry_server.flags import parse_flag, ready
from wherry_server.times import now_us
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


def test_where_there_are_no_flags_offers_are_not_read_again_and_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            devices = await found.enrol(3, version="1.0.0")
            await found.until(await found.roll_out("1.0.0"), "done")
            asked = list[str]()

            @event.listens_for(found.database.engine.sync_engine, "before_cursor_execute")
            def before(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
                asked.append(statement)

            def scans() -> int:
                return sum("CAST(flags AS TEXT) <>" in one for one in asked)

            for _ in range(4):
                assert await bear(found) == 0
            known = scans()
            assert known <= 1
            await save(found, THRESHOLD)
            assert await bear(found) == 3
            await flag_book.remove(found.database, PROJECT, "test", "new-threshold")
            assert await bear(found) == 3, "what offers still carry is found and taken out"
            assert await offered(found, devices[0]) == {}
            for _ in range(4):
                assert await bear(found) == 0
            assert scans() == known + 2, "once while they carried it, once when none did"

    run(work())


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
            await found.conductor.reconcile()
            assert await found.conductor.bear_flags() == 1, "a newcomer does not wait for the next look"
            assert await offered(found, late[0]) == {"new-threshold": 0.8}
            await flag_book.remove(found.database, PROJECT, "test", "new-threshold")
            assert await bear(found) == 6
            assert await offered(found, late[0]) == {}
            assert await bear(found) == 0
            actions = [row.action for row in await found.rows("SELECT action FROM audit_entry ORDER BY id")]
            assert [one for one in actions if one.startswith("flag.")] == ["flag.create", "flag.change", "flag.delete"]

    run(work())


def test_many_devices_are_brought_their_flags_in_batches_and_a_rollout_in_between_is_not_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_bearer, "DEVICES_PER_TURN", 4)

    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.enrol(10)
            await save(found, THRESHOLD)
            assert await found.conductor.bear_flags() == 4
            await roll_out_flag(found)
            await found.conductor.turn()
            assert await having(found, 0.65) == set(found.devices)
            assert [await found.conductor.bear_flags() for _ in range(3)] == [0, 0, 0]
            assert await having(found, 0.65) == set(found.devices)

    run(work())


def test_a_rule_over_versions_follows_what_a_device_runs(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            (device,) = await found.enrol(1, version="1.0.0")
            rules = [{"when": f"runs.{MODEL} >= 1.1.0 and engine.onnxruntime >= 1.30", "variant": "new"}]
            await save(found, {**THRESHOLD, "rules": rules})
            await bear(found)
            assert await offered(found, device) == {"new-threshold": 0.8}
            await found.until(await found.roll_out("1.1.0"), "done")
            await bear(found)
            assert await offered(found, device) == {"new-threshold": 0.65}

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


# --- rollouts ------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"trial": {"min_requests": 10, "max_s": 30}, "late_s": 60, "silent_s": 60, "stage_max_s": 600}
AT_ONCE: dict[str, Any] = {**QUICK, "trial": {"min_requests": 0, "max_s": 30}}
"""A device is confirmed as soon as it says that it has the variant."""


def window(manifest: str, requests: int, errors: int, start: int, arm: wire.Arm) -> wire.Window:
    return wire.Window(
        model=MODEL,
        manifest=manifest,
        variant="v",
        arm=arm,
        start=start,
        duration_us=1_000_000,
        requests=requests,
        errors=errors,
    )


async def roll_out_flag(found: Fleet, variant: str = "new", **wish: Any) -> int:
    return await found.roll_out("", **{"models": [], "flag": "new-threshold", "variant": variant, **AT_ONCE, **wish})


async def measure(
    found: Fleet, device: FakeDevice, requests: int, errors: int, *, start: int = 0, arm: wire.Arm = "incumbent"
) -> None:
    """Have a device measure requests since now, or since `start`."""
    device.measured += 1
    message = wire.Telemetry(
        format=1,
        device=device.id,
        epoch="t1",
        seq=device.measured,
        first=1,
        at=1,
        windows=[window(device.running, requests, errors, start or now_us(), arm)],
    )
    await found.ingest.store_batch({"telemetry": [(device.id, device.frame("telemetry", message))]})


async def step(found: Fleet) -> None:
    """The director takes a turn, devices take their offers and say so."""
    for known in found.conductor._known.values():
        known.judge_at = 0.0
    await bear(found)
    await found.turn()
    await found.say_hello([device for device in found.devices.values() if device.online])


async def until(found: Fleet, number: int, *states: str, turns: int = 12) -> dict[str, Any]:
    for _ in range(turns):
        shown = await found.show(number)
        if shown["state"] in states and not shown["wanted"]:
            return shown
        await step(found)
    raise AssertionError(f"{shown['state']} {shown['reason']} {shown['why_not_yet']} {shown['outcomes']}")


async def having(found: Fleet, value: Any) -> set[str]:
    """The devices whose offer carries a value of the flag."""
    return {one.id for one in found.devices.values() if (await offered(found, one)).get("new-threshold") == value}


@pytest.mark.backends
def test_a_variant_goes_through_its_stages_and_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            await found.enrol(10, version="1.0.0")
            await save(found, THRESHOLD)
            await step(found)
            number = await roll_out_flag(found, stages=[{"share": 0.2}, {"share": 1.0}])
            sizes = []
            for _ in range(8):
                await step(found)
                await nobody_above_the_cut_off(found, number)
                sizes.append(len(await having(found, 0.65)))
                assigned = {row.device_id for row in await found.rows("SELECT device_id FROM assignment")}
                assert await having(found, 0.65) == assigned, "nobody has it but by the rollout"
            shown = await found.show(number)
            assert (shown["state"], shown["model"], shown["version"]) == ("done", "flag:new-threshold", "new")
            assert shown["counts"]["real"]["confirmed"] == 10
            assert sorted(set(sizes)) == [2, 10]
            (late,) = await found.enrol(1)
            await step(found)
            await step(found)
            assert await offered(found, late) == {"new-threshold": 0.65}, "a newcomer joins what is done"
            # what it gave stands above rules and default, and its value is nobody's to change under it
            await save(found, {**THRESHOLD, "rules": [{"variant": "old"}]}, replace=True)
            await step(found)
            assert len(await having(found, 0.65)) == 11
            for wrong in ({"variants": {"old": 0.8, "new": 0.7}}, {"variants": {"old": 0.8}}):
                with pytest.raises(RefusedError, match=rf"rollouts give it: {number}") as refused:
                    await save(found, {**THRESHOLD, **wrong}, replace=True)
                assert refused.value.code == "flag_in_use"
            with pytest.raises(RefusedError, match="cannot be deleted"):
                await flag_book.remove(found.database, PROJECT, "test", "new-threshold")
            await found.command(number, "revert")
            shown = await until(found, number, "reverted")
            assert len(await having(found, 0.8)) == 11
            assert shown["counts"]["real"]["reverted"] == 11
            await flag_book.remove(found.database, PROJECT, "test", "new-threshold")
            stages = [row.action for row in await found.rows("SELECT action FROM audit_entry ORDER BY id")]
            assert {"rollout.create", "rollout.done", "rollout.revert", "rollout.reverted"} <= set(stages)

    run(work())


@pytest.mark.backends
def test_devices_that_fail_more_go_back_and_the_rollout_halts(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            devices = await found.enrol(8, version="1.0.0")
            await save(found, THRESHOLD)
            number = await roll_out_flag(found, **QUICK, failure={"count": 1})
            await step(found)
            await step(found)
            assert await having(found, 0.65) == {one.id for one in devices}
            for device in devices[:5]:
                await measure(found, device, 20, 9, start=1)  # from before it had the variant: says nothing
                await measure(found, device, 20, 9, arm="shadow")  # nor does what answered nobody
                await measure(found, device, 20, 0)
            await measure(found, devices[5], 20, 9)
            await step(found)
            counts = (await found.show(number))["counts"]["real"]
            assert (counts["confirmed"], counts["returned"], counts["pending"]) == (5, 1, 2)
            await step(found)
            assert await offered(found, devices[5]) == {"new-threshold": 0.8}, "it went back alone"
            devices[7].online = False
            await measure(found, devices[6], 20, 9)
            shown = await until(found, number, "returning")
            assert shown["reason"] == "failure_bound"
            assert await having(found, 0.65) == set()
            assert (await found.show(number))["counts"]["real"]["revert_pending"] == 1
            devices[7].online = True
            await found.exchange()
            shown = await until(found, number, "halted")
            counts = shown["counts"]["real"]
            assert (counts["returned"], counts["reverted"], counts["revert_pending"]) == (2, 6, 0)
            # who failed is in quarantine for that value, and so is their hardware; another value is another thing
            again = await roll_out_flag(found)
            await step(found)
            assert (await found.show(again))["why_not_yet"][0]["code"] == "held"
            async with found.database.read() as connection:
                (bad,) = await quarantine.hardware(connection, PROJECT)
                left_out = await quarantine.devices(connection, PROJECT, model="flag:new-threshold", limit=10)
            assert bad["target"] == "flag:new-threshold/new"
            assert {one["device"] for one in left_out} == {devices[5].id, devices[6].id}
            await found.command(again, "abort")
            await until(found, again, "aborted")
            await save(found, {**THRESHOLD, "variants": {"old": 0.8, "new": 0.7}}, replace=True)
            better = await roll_out_flag(found)
            await until(found, better, "done")
            assert len(await having(found, 0.7)) == 8

    run(work())


GATES: list[dict[str, Any]] = [
    {"metric": "errors", "harm": 0.1},
    {"metric": "latency", "harm": 0.4},
    {"metric": "crash_rate", "harm": 10.0},
    {"metric": "app:agreed", "better": "higher", "harm": 0.2},
]


@pytest.mark.backends
def test_gates_compare_devices_that_have_the_variant_with_those_that_do_not(tmp_path: Path) -> None:
    check_gates(tmp_path, "app:agreed", GATES)


@pytest.mark.parametrize("metric", ["errors", "latency", ""])
def test_a_variant_is_halted_for_what_it_does_and_goes_on_if_it_does_no_harm(tmp_path: Path, metric: str) -> None:
    gates = [gate for gate in GATES if gate["metric"] == metric] or GATES[:2]
    check_gates(tmp_path, metric, gates)


def check_gates(tmp_path: Path, metric: str, gates: list[dict[str, Any]]) -> None:
    """A variant that is worse in one way is halted by the gate on that; one that is no worse goes on."""

    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            await found.enrol(80, version="1.0.0")
            telling = Telling(found, {"old": 0.02, "new": 0.4 if metric == "errors" else 0.02})
            telling.what = lambda device: manifest_of("new" if device.flags.get("new-threshold") == 0.65 else "old")
            telling.medians_us = {"old": 1_000.0, "new": 1_600.0 if metric == "latency" else 1_000.0}
            telling.crash_shares = {"old": 0.02, "new": 0.9 if metric == "crash_rate" else 0.02}
            telling.agreed = {"old": 0.8, "new": 0.3 if metric == "app:agreed" else 0.8}
            await save(found, THRESHOLD)
            await step(found)
            for _ in range(2):
                await telling.period()
            stages = [{"share": 0.5}, {"share": 1.0}]
            number = await roll_out_flag(
                found, measure=MODEL, stages=stages, gates=gates, period_s=PERIOD_S, stage_max_s=7_200
            )
            for _ in range(3):
                await step(found)
            assert len(await having(found, 0.65)) == 40
            for _ in range(6):
                await telling.period()
                shown = await found.show(number)
                if shown["state"] != "running" or shown["stage"] == 1:
                    break
            outcomes = {gate["metric"]: gate_of(shown, gate["metric"])["outcome"] for gate in gates}
            if not metric:
                assert (shown["stage"], outcomes) == (1, {"errors": "pass", "latency": "pass"})
                return
            assert outcomes.pop(metric) == "breach"
            assert "breach" not in outcomes.values()
            shown = await until(found, number, "halted")
            assert shown["reason"] == f"{metric}_bound"
            assert await having(found, 0.65) == set()

    run(work())


@pytest.mark.parametrize("seed", range(2))
def test_what_transactions_write_is_what_a_look_finds(tmp_path: Path, seed: int) -> None:
    """Whatever operators and devices do: the offers of exposing and withdrawing carry what rules and rollouts give."""
    chance = random.Random(seed)

    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            devices = await found.enrol(8, version="1.0.0")
            wish: dict[str, Any] = {**THRESHOLD, "variants": {"old": 0.8, "new": 0.65, "newer": 0.5}}
            await save(found, wish)
            await step(found)
            numbers = [await roll_out_flag(found, **QUICK)]
            for _ in range(30):
                match chance.choice(("roll out", "order", "order", "fail", "rule", "away", "turn", "turn")):
                    case "roll out":
                        variant, share = chance.choice(("new", "newer")), chance.choice((0.3, 1.0))
                        more = {"supersede": chance.random() < 0.5, "attempt": 1 + len(numbers)}
                        terms = {**QUICK, "failure": {"count": 3}, "on_halt": chance.choice(("hold", "revert_all"))}
                        stages = [{"share": share, "confirmed_min": 0}]
                        numbers.append(await roll_out_flag(found, variant, stages=stages, **terms, **more))
                    case "order":
                        order = chance.choice(("pause", "resume", "abort", "revert", "retry_failed"))
                        with suppress(RefusedError):
                            await found.command(chance.choice(numbers), order)
                    case "fail":
                        await measure(found, chance.choice(devices), 20, chance.choice((0, 9)))
                    case "rule":
                        rules = [{"share": chance.choice((0.3, 0.7)), "variant": chance.choice(("old", "newer"))}]
                        await save(found, {**wish, "rules": rules}, replace=True)
                    case "away":
                        device = chance.choice(devices)
                        device.online = not device.online
                    case _:
                        await found.say_hello([device for device in devices if device.online])
                for known in found.conductor._known.values():
                    known.judge_at = 0.0
                await found.conductor.bear_flags()  # what changed by definition
                await found.turn()
                states = [(await found.show(number))["state"] for number in numbers]
                left = await found.rows("SELECT device_id FROM assignment WHERE outcome = 'superseded'")
                later = {*found.conductor._bear()._due, *(row.device_id for row in left)}
                async with found.database.read() as connection:
                    flags = await flag_values.definitions(connection, PROJECT)
                    told = await flag_values.sources(connection, PROJECT, flags.flags)
                for one in devices:
                    if one.id not in later:
                        assert await offered(found, one) == flags.values(told[one.id]), (one.id, states)
                await found.conductor.bear_flags()  # who went back, or was given back to an older rollout
                assert await bear(found) == 0, states
            assert len(await found.rows("SELECT 1 FROM assignment")) > 3

    run(work())


def test_a_device_that_went_back_tries_again_when_it_is_told_to(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            devices = await found.enrol(4, version="1.0.0")
            await save(found, THRESHOLD)
            number = await roll_out_flag(found, **QUICK, failure={"count": 2})
            await step(found)
            await step(found)
            await measure(found, devices[0], 20, 9)
            await step(found)
            await step(found)
            assert await offered(found, devices[0]) == {"new-threshold": 0.8}
            await found.command(number, "retry_failed")
            await step(found)
            assert await offered(found, devices[0]) == {"new-threshold": 0.65}
            await step(found)
            counts = (await found.show(number))["counts"]["real"]
            assert (counts["returned"], counts["pending"]) == (0, 4), "what failed before counts no more"
            for device in devices:
                await measure(found, device, 20, 0)
            await until(found, number, "done")
            (row,) = await found.rows("SELECT attempt FROM assignment WHERE device_id = :d", d=devices[0].id)
            assert row.attempt == 2

    run(work())


def test_a_device_that_says_nothing_is_no_success(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            devices = await found.enrol(2)
            await save(found, THRESHOLD)
            number = await roll_out_flag(found, **QUICK)
            await step(found)
            await step(found)
            devices[1].online = False
            async with found.database.write() as connection:
                await connection.execute(text("UPDATE assignment SET noticed_at = noticed_at - 40000000"))
            async with found.database.write() as connection:
                await connection.execute(
                    text("UPDATE device SET last_seen_at = last_seen_at - 30000000 WHERE id = :d"), {"d": devices[1].id}
                )
            await step(found)
            counts = (await found.show(number))["counts"]["real"]
            assert (counts["confirmed_idle"], counts["confirmed"], counts["pending"]) == (1, 0, 1)

    run(work())


def test_a_newer_rollout_takes_devices_over_and_gives_them_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.enrol(4)
            await save(found, {**THRESHOLD, "variants": {"old": 0.8, "new": 0.65, "newer": 0.5}})
            first = await roll_out_flag(found)
            await until(found, first, "done")
            second = await roll_out_flag(found, "newer")
            await until(found, second, "done")
            assert len(await having(found, 0.5)) == 4
            await found.command(second, "revert")
            await until(found, second, "reverted")
            assert len(await having(found, 0.65)) == 4, "each has what it had before"
            await found.command(first, "revert")
            await until(found, first, "reverted")
            assert len(await having(found, 0.8)) == 4
            third = await roll_out_flag(found, "newer", stages=[{"share": 0.5}, {"share": 1.0, "soak_s": 500}])
            await step(found)
            await step(found)
            await found.command(third, "abort")
            await until(found, third, "aborted")
            assert len(await having(found, 0.5)) == 2, "who is confirmed stays"
            with pytest.raises(RefusedError, match=rf"rollouts give it: {third} \(aborted\)"):
                await flag_book.remove(found.database, PROJECT, "test", "new-threshold")

    run(work())


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"variant": "newest"}, "plan_flag"),
        ({"flag": "nope"}, "flag_unknown"),
        ({"flag": ""}, "plan_flag"),
        ({"models": [{"model": MODEL, "version": "1.0.0"}]}, "plan_flag"),
        ({"value": 7}, "plan_invalid"),
        ({"trial": {"latency_ratio_max": 3.0}}, "plan_flag"),
        ({"gates": [{"metric": "crashed", "tolerated": 0.1, "harm": 0.2}]}, "plan_flag"),
    ],
    ids=lambda one: json.dumps(one) if isinstance(one, dict) else "",
)
def test_a_plan_that_no_flag_can_follow_is_refused(tmp_path: Path, wish: dict[str, Any], code: str) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0")
            await save(found, THRESHOLD)
            with pytest.raises(RefusedError) as refused:
                await roll_out_flag(found, **wish)
            assert refused.value.code == code

    run(work())


@pytest.mark.parametrize(
    ("requests", "errors", "waited_s", "heard_s", "outcome"),
    [
        (9, 0, 10, 10, ""),
        (10, 0, 0, 0, "confirmed"),
        (200, 4, 0, 0, "confirmed"),
        (200, 5, 0, 0, "returned"),
        (2, 2, 0, 0, ""),
        (3, 3, 0, 0, "returned"),
        (9, 0, 30, 29, ""),
        (9, 0, 30, 30, "confirmed_idle"),
    ],
)
def test_the_verdict_of_a_trial(requests: int, errors: int, waited_s: int, heard_s: int, outcome: str) -> None:
    terms = wire.Trial(min_requests=10, max_s=30, error_rate_max=0.02, errors_min=3)
    found = flag_trials.verdict(
        terms, requests=requests, errors=errors, waited_us=waited_s * 1_000_000, heard_us=heard_s * 1_000_000
    )
    assert found == outcome


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("on", {"variant": "on", "share": 1.0, "when": "all"}),
        ("on 2.5%", {"variant": "on", "share": 0.025, "when": "all"}),
        ("on 25 % if label.site = berlin", {"variant": "on", "share": 0.25, "when": "label.site = berlin"}),
        ("if-needed if not arch = x86_64", {"variant": "if-needed", "share": 1.0, "when": "not arch = x86_64"}),
        ("on 2.5.1%", None),
        ("on for all", None),
        ("", None),
    ],
)
def test_a_rule_is_written_as_it_is_shown(text: str, rule: dict[str, Any] | None) -> None:
    if rule is None:
        with pytest.raises(RefusedError, match="not"):
            parse_rule(text)
    else:
        assert parse_rule(text) == rule


def test_values_of_variants_are_json_and_words_are_words_of_a_string() -> None:
    assert parse_variants(["a=1", "b=1.0", "c=true"], "number") == {"a": 1, "b": 1.0, "c": True}
    assert parse_variants(["a=blue", 'b="7"', "c=7", "d="], "string") == {"a": "blue", "b": "7", "c": "7", "d": ""}
    for kind, wrong in (("number", "a=blue"), ("string", "blue")):
        with pytest.raises(RefusedError):
            parse_variants([wrong], kind)


def test_flags_are_made_shown_changed_rolled_out_and_deleted_by_command(server: Running) -> None:
    runner = CliRunner(env={"WHERRY_SERVER": server.url, "WHERRY_TOKEN": server.admin, "COLUMNS": "120"})
    device = server.device("flagged")

    def do(*arguments: str, answer: str = "") -> str:
        done = runner.invoke(app, ["flag", *arguments], input=answer)
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    made = do("create", "by-hand", "--rule", "on 50% if name = flagged-*", "--rule", "on if name = flagged")
    assert "rule 1: on 50% if name = flagged-*" in made
    assert "off = false  (default)" in made
    assert "by-hand boolean off 2" in " ".join(do("list").split())
    assert "(on, by rule 2)" in do("show", "by-hand", "--device", "flagged")
    assert "its offer does not carry the flag yet" in do("show", "by-hand", "--device", device.device)
    assert "1 of 1 devices get another value" in do("preview", "by-hand", "--rule", "off")
    asked = do("set", "by-hand", "--no-rules", answer="y\n")
    assert "1 of 1 devices get another value" in asked
    assert '- rules = [{"when": "name = flagged-*", "share": 0.5, "variant": "on"}' in asked
    assert "default" not in asked.split("do that?")[0], "only what differs"
    shown = json.loads(do("show", "by-hand", "--json"))
    assert (shown["rules"], shown["revision"], shown["spread"][0]["devices"]) == ([], 2, 1)
    planned = do("rollout", "by-hand", "on", "--selector", "all", "--stages", "50,100", "--min-requests", "0")
    assert "flag:by-hand:on for all" in planned
    with pytest.raises(RefusedError, match="cannot be deleted"):
        runner.invoke(app, ["flag", "delete", "by-hand"], catch_exceptions=False)
    do("create", "colour", "--type", "string", "--variant", "a=blue", "--variant", "b=red")
    assert "colour is deleted" in do("delete", "colour")
