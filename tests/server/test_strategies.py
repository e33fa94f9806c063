"""Shadow, blue-green and split on the director and a database, from the first offer to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.fleet_kit import PROJECT, fleet, manifest_of, run
from wherry_server import rollouts
from wherry_server.cli.rollout import _said
from wherry_server.explaining import explain
from wherry_server.fleet import end_device
from wherry_shared.errors import RefusedError

SHADOW = {
    "strategy": "shadow",
    "gates": [{"metric": "disagreed", "tolerated": 0.05, "harm": 0.15}],
    "stages": [{"share": 0.5}, {"share": 1.0}],
}
BLUE_GREEN = {"strategy": "blue_green", "stages": [{"share": 0.5}, {"share": 1.0}]}
OLD, NEW = manifest_of("1.0.0"), manifest_of("1.1.0")


@pytest.mark.parametrize("plan", [SHADOW, BLUE_GREEN])
def test_nothing_takes_over_before_everything_was_proved_beside_the_incumbent(tmp_path: Path, plan: dict[str, Any]):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            number = await found.roll_out("1.1.0", **plan)
            changed: list[int] = []
            while (shown := await found.show(number))["state"] != "done":
                await found.turn()
                now = sum(device.running == NEW for device in devices)
                if now and now not in changed:
                    assert shown["counts"]["real"]["exposed"] == 60
                    changed.append(now)
                assert len(changed) < 4
            assert changed == ([30, 60] if plan is SHADOW else [60]), "in stages, or together"
            assert all(device.offered[NEW] == 2 for device in devices), "once beside the incumbent, once to take over"
            async with found.database.read() as connection:
                explained = await explain(connection, PROJECT, number, "")
            assert not explained["differing"], "it does not follow from its evidence"
            said = [_said(decision) for one in explained["decided"] for decision in one["decisions"]]
            assert said.count("running: proved_beside") == 1
            assert "promote up to stage 2" in said

    run(work())


@pytest.mark.backends
def test_a_second_round_waits_for_its_own_approval_and_says_so(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            number = await found.roll_out("1.1.0", **SHADOW, approval={"stages": [1], "rounds": [2]})
            for _ in range(20):
                await found.turn()
            shown = await found.show(number)
            assert (shown["round"], shown["rounds_total"], shown["stage"]) == (1, 2, 1)
            assert shown["following"] == {"stage": 1, "round": 2, "approvers": 1}
            assert [why["code"] for why in shown["why_not_yet"]] == ["approval"]
            assert {device.running for device in devices} == {OLD}
            with pytest.raises(RefusedError) as caught:
                await rollouts.approve(found.database, PROJECT, "token:ann", number, 1)
            assert caught.value.code == "approval_pointless"
            await rollouts.approve(found.database, PROJECT, "token:ann", number, 1, 2)
            done = await found.until(number, "done")
            assert (done["round"], done["following"]) == (2, None)
            async with found.database.read() as connection:
                explained = await explain(connection, PROJECT, number, "")
            assert not explained["differing"]
            assert (explained["round"], {one["round"] for one in explained["decided"]}) == (2, {1, 2})

    run(work())


def test_a_shadow_that_disagrees_is_halted_by_its_gate_and_withdrawn_everywhere(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            for device in devices:
                device.agrees = 0.5
            halted = await found.until(await found.roll_out("1.1.0", **SHADOW), "halted")
            assert halted["reason"] == "disagreed_bound"
            assert {device.running for device in devices} == {OLD}
            assert halted["counts"]["real"]["exposed"] == 30

    run(work())


def test_a_shadow_that_is_only_to_be_watched_ends_as_everything_was(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(60, version="1.0.0")
            ended = await found.until(await found.roll_out("1.1.0", **SHADOW, on_success="end"), "reverted")
            assert ended["reason"] == "shadow_passed"
            assert {device.running for device in devices} == {OLD}

    run(work())


def test_devices_that_flipped_together_are_taken_back_together(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(20, version="1.0.0")
            for device in devices[:8]:
                device.flips = False
            halted = await found.until(await found.roll_out("1.1.0", **BLUE_GREEN), "halted")
            assert halted["reason"] == "failure_bound"
            assert {device.running for device in devices} == {OLD}

    run(work())


ENDS = [
    # what the split says of an undecided end, by what, state after, devices that run the new version
    ("keep", "devices", "done", 20),
    ("promote", "devices", "done", 40),
    ("back", "devices", "reverted", 0),
    ("promote", "requests", "done", 40),
    ("back", "requests", "reverted", 0),
]


@pytest.mark.parametrize(("then", "by", "state", "new"), ENDS)
def test_a_split_ends_after_its_time_as_the_plan_says(tmp_path: Path, then: str, by: str, state: str, new: int):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(40, version="1.0.0")
            split = {"for_s": 50, "by": by, "undecided": then}
            gates = [{"metric": "errors", "harm": 0.01}]
            number = await found.roll_out("1.1.0", strategy="split", split=split, gates=gates, period_s=10)
            ended = await found.until(number, state, turns=80)
            assert ended["reason"] in ("split_undecided", "")
            for _ in range(5):
                await found.turn()
            assert sum(device.running == NEW for device in devices) == new

    run(work())


def test_a_device_that_was_shut_out_while_it_stood_by_keeps_nobody_waiting(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(20, version="1.0.0")
            number = await found.roll_out("1.1.0", **{**BLUE_GREEN, "stages": [{"share": 1.0, "soak_s": 5}]})
            while (await found.show(number))["stages"][0]["counts"]["proved"] < 20:
                await found.turn()
            async with found.database.write() as connection:
                await end_device(connection, PROJECT, devices[0].id, "revoked")
            await found.until(number, "done")
            assert [device.running for device in devices].count(NEW) == 19

    run(work())
