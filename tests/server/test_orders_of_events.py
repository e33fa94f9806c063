"""What holds of rollouts over the rows, offers and devices of a whole server, in whatever order things happen.

`test_rollout.py` has the engine alone, over every kind of plan. Here the director, ingest and the database are real: devices
are away, newcomers come, devices are shut out, reports arrive late, twice and out of order, the director starts anew, operators
order this and that, and a second rollout takes devices over.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest

from tests.server.fleet_kit import PROJECT, FakeDevice, Fleet, fleet, manifest_of, run
from wherry_server import evidence, explaining, rollouts
from wherry_server import fleet as devices_of
from wherry_server.plan import Plan, parse_plan
from wherry_server.rollout import FINAL, Progress, reach
from wherry_server.targeting import exposed, key_of
from wherry_shared.errors import RefusedError

VERSIONS = ("1.1.0", "1.2.0")
STEPS, CALM_TURNS = 24, 60
STAGE_MAX_S, REVERT_S = 400, 120
SEEDS = range(3)
COMMANDS = ("pause", "resume", "abort", "revert", "retry", "retry_failed")
BEHAVIOURS = ("good", "good", "good", "good", "idle", "bad", "stuck", "mute", "floor")


def wish(chance: random.Random) -> dict[str, Any]:
    """A plan that fits the fleet."""
    how: dict[str, Any] = chance.choice(
        [
            {"stages": [{"share": 0.25, "confirmed_min": 0}, {"share": 1.0, "confirmed_min": 0}]},
            {"stages": [{"count": 3, "confirmed_min": 0}, {"share": 0.6, "confirmed_min": 0}]},
            {"strategy": "all_at_once", "stages": [{"share": 1.0, "confirmed_min": 0}]},
            {"strategy": "adaptive", "stages": [{"share": 1.0, "confirmed_min": 0}], "harmed_max": 3},
            {
                "strategy": "blue_green",
                "stages": [{"share": 0.5, "confirmed_min": 0}, {"share": 1.0, "confirmed_min": 0}],
            },
        ]
    )
    return {
        "trial": {"max_s": 30},
        "late_s": 60,
        "silent_s": 60,
        "stage_max_s": STAGE_MAX_S,
        "revert_s": REVERT_S,
        "failure": chance.choice([{"share": 0.3, "sample_min": 4}, {"count": 0}, {"count": 30}]),
        "on_halt": "revert_all" if how.get("strategy") == "blue_green" else chance.choice(["hold", "revert_all"]),
        "settled_share": chance.choice([0.5, 1.0]),
        **how,
    }


class Watch:
    """The rules, checked after every step."""

    def __init__(self, found: Fleet, chance: random.Random) -> None:
        self.found, self.chance = found, chance
        self.numbers: dict[int, str] = {}
        self.states: dict[int, str] = {}
        self.assigned: dict[int, set[str]] = {}
        self.reverting: set[int] = set()
        """Rollouts that an operator ordered back from a final state."""

    async def row(self, number: int) -> tuple[Any, Plan, Progress]:
        async with self.found.database.read() as connection:
            row = await rollouts.find(connection, PROJECT, number)
        return row, parse_plan(row.plan), evidence.load_progress(row.progress)

    async def look(self) -> None:
        """Check what holds at every moment."""
        offered: dict[str, set[str]] = {}
        for one in await self.found.rows("SELECT device_id, models FROM offer"):
            offered[one.device_id] = {v for v in VERSIONS if manifest_of(v) in one.models}
        allowed: dict[str, set[str]] = {}
        for number, version in self.numbers.items():
            row, plan, progress = await self.row(number)
            rows = await self.found.rows("SELECT device_id, stratum FROM assignment WHERE rollout_id = :r", r=row.id)
            now = {one.device_id for one in rows}
            for one in rows:
                allowed.setdefault(one.device_id, set()).add(version)
                key = key_of(row.salt, one.device_id)
                assert exposed(key, one.stratum, progress.cut_offs, reach(plan, progress)), "above the stored cut-off"
            before = self.states.get(number, "created")
            if before in ("paused", "returning", "halted", "aborted", "reverted"):
                resumed = before == "paused" and row.state != "paused"
                assert resumed or now == self.assigned[number], f"it widened while it was {before}"
            if before in FINAL:
                assert row.state == before or number in self.reverting, f"{before} was not final, but {row.state}"
            self.states[number], self.assigned[number] = row.state, now
        for device, versions in offered.items():
            assert versions <= allowed.get(device, set()), "offered without an assignment at or below the cut-off"

    async def order(self, number: int, command: Any) -> None:
        """Give an order that may make no sense now."""
        with contextlib.suppress(RefusedError):
            await self.found.command(number, command)
        if (await self.row(number))[0].wanted == "revert":
            self.reverting.add(number)

    async def deliver(self, *, all_of_it: bool) -> None:
        """Offers reach devices that are there; of what devices owe some is heard, in any order, some of it twice."""
        envelopes = {
            row.device_id: row.envelope for row in await self.found.rows("SELECT device_id, envelope FROM offer")
        }
        spoken: list[tuple[str, bytes]] = []
        for device in self.found.devices.values():
            if not device.online:
                continue
            if device.id in envelopes and (all_of_it or self.chance.random() < 0.8):
                device.take_offer(bytes(envelopes[device.id]))
            owed = device.owed_frames()
            if not all_of_it:
                owed = self.chance.choices(owed, k=self.chance.randint(0, 2 * len(owed))) if owed else []
            spoken += [(device.id, frame) for frame in owed]
        self.chance.shuffle(spoken)
        result = await self.found.ingest.store_batch({"report": spoken})
        for name, frame in result.acks:
            if all_of_it or self.chance.random() < 0.9:
                self.found.devices[name].take_ack(frame)
        self.found.conductor.stored(result)

    async def turn(self, seconds: float) -> None:
        self.found.seconds += seconds
        for known in self.found.conductor._known.values():
            known.scanned_at = known.condemn_at = -1e9
        await self.found.conductor.reconcile()
        await self.found.conductor.turn()


async def through(found: Fleet, chance: random.Random) -> None:
    await found.publish("1.0.0", *VERSIONS)
    watch = Watch(found, chance)

    async def join(count: int) -> None:
        for device in await found.enrol(count, version="1.0.0"):
            for version in VERSIONS:
                device.behaviours[version] = chance.choice(BEHAVIOURS)  # type: ignore[assignment]
            device.online = chance.random() < 0.9

    await join(12)
    watch.numbers[await found.roll_out(VERSIONS[0], **wish(chance))] = VERSIONS[0]
    second_at = chance.randrange(4, 20)
    gone: set[str] = set()
    for step in range(STEPS):
        if step == second_at:
            how = chance.choice([{"priority": 1}, {"supersede": True}, {}])
            watch.numbers[await found.roll_out(VERSIONS[1], **how, **wish(chance))] = VERSIONS[1]
        match chance.randrange(8):
            case 0:
                await join(1)
            case 1 | 2:
                await watch.order(chance.choice(list(watch.numbers)), chance.choice(COMMANDS))
            case 3:
                device = chance.choice(list(found.devices.values()))
                device.online = not device.online
                if device.online:
                    await found.say_hello([device])
            case 4:
                found.conductor._known.clear()  # another director took over
            case 5 if len(gone) < 2:
                lost = chance.choice(list(found.devices.values()))
                async with found.database.write() as connection:
                    await devices_of.end_device(connection, PROJECT, lost.id, "decommissioned")
                gone.add(found.devices.pop(lost.id).id)
            case _:
                pass
        await watch.turn(chance.choice([1, 5, 30]))
        await watch.look()
        if chance.random() < 0.3:  # deciding twice is harmless
            before = await found.rows("SELECT rollout_id, device_id, outcome, attempt FROM assignment ORDER BY 1, 2")
            await watch.turn(0)
            after = await found.rows("SELECT rollout_id, device_id, outcome, attempt FROM assignment ORDER BY 1, 2")
            assert {tuple(one[:2]) for one in before} <= {tuple(one[:2]) for one in after}
            await watch.look()
        await watch.deliver(all_of_it=False)
    await calm(found, watch)
    await ended(found, watch)


async def calm(found: Fleet, watch: Watch) -> None:
    """Everybody is there and heard; what is paused goes on. Every rollout ends."""
    for device in found.devices.values():
        device.online = True
    await found.say_hello(found.devices.values())
    for _ in range(CALM_TURNS):
        for number, state in watch.states.items():
            if state == "paused":
                await watch.order(number, "resume")
        await watch.turn(60)
        await watch.look()
        await watch.deliver(all_of_it=True)
        wanted = await found.rows("SELECT wanted FROM rollout WHERE wanted <> ''")
        if all(state in FINAL for state in watch.states.values()) and not wanted:
            break
    else:
        raise AssertionError([(await found.show(number))["why_not_yet"] for number in watch.numbers])
    for _ in range(3):
        await watch.turn(1)
        await watch.deliver(all_of_it=True)


def obeys(device: FakeDevice) -> bool:
    """Tell whether a device does what it is told at all."""
    return "mute" not in device.behaviours.values()


async def ended(found: Fleet, watch: Watch) -> None:
    """Nobody has what was reverted; nobody is left on trial; what was decided follows from what was known."""
    for number, version in watch.numbers.items():
        shown = await found.show(number)
        runs = [device.id for device in found.devices.values() if device.running == manifest_of(version)]
        offers = await found.rows("SELECT device_id, models FROM offer")
        told = {one.device_id for one in offers if manifest_of(version) in one.models} & set(found.devices)
        back = shown["plan"]["on_halt"] == "revert_all" and "_bound" in shown["reason"]
        if shown["state"] == "reverted" or (shown["state"] == "halted" and back):
            assert not told, "it is still offered what was taken back"
            assert not [one for one in runs if obeys(found.devices[one])], "a device that changed was not brought back"
        if shown["state"] in ("halted", "aborted", "reverted"):
            counts = shown["counts"]["real"]
            assert counts["pending"] == 0, "somebody was left on trial"
            assert counts["revert_pending"] == 0 or not all(obeys(one) for one in found.devices.values())
        async with found.database.read() as connection:
            assert (await explaining.explain(connection, PROJECT, number, ""))["differing"] == []


@pytest.mark.parametrize("seed", [*SEEDS, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(100, 160))])
def test_whatever_the_order_of_events(tmp_path: Path, seed: int):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await through(found, random.Random(seed))

    run(work())
