"""Two of every role at once on PostgreSQL and mosquitto, and any of them killed: nothing is lost, nothing decided twice."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.test_mosquitto import mosquitto
from tests.postgres import Postgres
from tests.server.fleet_kit import MODEL, PROJECT, manifest_of
from tests.server.harness import free_port, until
from tests.server.test_director_process import DEVICES, Fleet, asked, role, rows, show, stocked
from wherry_server import dev, explaining, lease, rollouts
from wherry_server.db.database import Database
from wherry_server.ingest_process import SHARDS, Part
from wherry_server.settings import Settings
from wherry_shared import ids, topics
from wherry_shared.access import find_access
from wherry_shared.errors import RefusedError, UnreachableError

PAUSE_S = 1.5
"""Between two kills: a process takes about as long to be there again."""
CHANGE_S = 60.0
"""How long a lease, a subscription or a process may take to change hands on a busy machine."""


def made(folder: Path, postgres: Postgres) -> Settings:
    settings = Settings.load(
        folder,
        database=postgres.empty(),
        broker_port=free_port(),
        project=PROJECT,
        ingest="separate",
        publisher="separate",
    )
    dev.init(settings)
    return Settings.load(folder)


def ask(port: int, token: str, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.request(
        method, f"http://127.0.0.1:{port}/api/v1{path}", headers=headers, trust_env=False, timeout=20, **more
    )
    assert answer.is_success, answer.text
    return answer.json()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/v1/health", trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


@pytest.mark.services
@pytest.mark.slow
def test_two_of_each_role_lose_one_of_each_in_the_middle_of_a_rollout(tmp_path: Path, postgres: Postgres) -> None:
    settings = made(tmp_path / "data", postgres)
    devices = stocked(settings)
    ports = free_port(), free_port()
    token = find_access(data=settings.data).token
    with ExitStack() as stack:
        stack.enter_context(mosquitto(tmp_path, settings.broker_port))
        first = {
            "api": stack.enter_context(role("api", settings, "--port", str(ports[0]))),
            "director": stack.enter_context(role("director", settings)),
            "ingest": stack.enter_context(role("ingest", settings)),
            "publisher": stack.enter_context(role("publisher", settings)),
        }
        until(lambda: rows(settings, "SELECT 1 FROM lease WHERE epoch = 1"), CHANGE_S)
        stack.enter_context(role("api", settings, "--port", str(ports[1])))
        stack.enter_context(role("director", settings))
        stack.enter_context(role("ingest", settings))
        stack.enter_context(role("publisher", settings))
        until(lambda: answers(ports[0]) and answers(ports[1]), CHANGE_S)
        fleet = Fleet(settings, devices)
        stack.callback(fleet.stop)
        fleet.held = {device.id for device in devices[::2]}  # the stage cannot end before they speak
        wish = {
            "models": [{"model": MODEL, "version": "1.1.0"}],
            "selector": "all",
            "stages": [{"share": 0.5}, {"share": 1.0}],
            "settled_share": 1.0,
            "start": True,
        }
        number = ask(ports[0], token, "POST", "/rollouts", json=wish)["number"]
        until(lambda: (fleet.send_again(), show(settings, number)["counts"]["real"]["confirmed"] > 0)[1], CHANGE_S)
        for one in first.values():
            one.kill()
            one.wait()
        acknowledged = set(fleet.acked)
        fleet.held = set()
        until(lambda: (fleet.send_again(), show(settings, number)["state"] == "done")[1], CHANGE_S)
        until(lambda: (fleet.send_again(), not any(device.owed for device in devices))[1], CHANGE_S)
        shown = ask(ports[1], token, "GET", f"/rollouts/{number}")
        assert shown["counts"]["real"]["confirmed"] == DEVICES
        stored = {(row[0], row[1]) for row in rows(settings, "SELECT device_id, seq FROM report_log")}
        assert acknowledged <= stored
        assert fleet.acked == stored
        assert len(stored) == sum(device.seq for device in devices)
        assert {device.running for device in devices} == {manifest_of("1.1.0")}
        assert all(serials == [1] for serials in fleet.serials.values()), "nobody was offered anything twice"
        ((epoch,),) = rows(settings, "SELECT epoch FROM lease")
        assert epoch == 2, "the second director took over"


class Replicas:
    """Two processes of every role, each of which may be killed, or stopped for a while, and is started anew."""

    def __init__(self, settings: Settings, stack: ExitStack, ports: tuple[int, int]) -> None:
        self.settings, self.stack, self.ports = settings, stack, ports
        self.running = {(name, place): self.start(name, place) for name in ROLES for place in (0, 1)}

    def start(self, name: str, place: int) -> Any:
        more = ("--port", str(self.ports[place])) if name == "api" else ()
        return self.stack.enter_context(role(name, self.settings, *more))

    def kill(self, name: str, place: int) -> None:
        victim = self.running[name, place]
        victim.kill()
        victim.wait()
        self.running[name, place] = self.start(name, place)

    def freeze(self, name: str, place: int, seconds: float) -> None:
        """Let a process lose its lease, and wake up as if it still had it."""
        victim = self.running[name, place]
        victim.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        victim.send_signal(signal.SIGCONT)


ROLES = ("api", "director", "ingest", "publisher")


def whoever_is_killed(settings: Settings, folder: Path, times: list[tuple[str, int]], *, freeze: bool) -> None:
    """Run one rollout after the other while roles are killed at moments that nothing has to do with what they do."""
    versions = [f"1.{number}.0" for number in range(100, 160)]
    devices = stocked(settings, *versions)
    token = find_access(data=settings.data).token
    ports = free_port(), free_port()
    with ExitStack() as stack:
        stack.enter_context(mosquitto(folder, settings.broker_port))
        site = Replicas(settings, stack, ports)
        until(lambda: answers(ports[0]) and answers(ports[1]), CHANGE_S)
        fleet = Fleet(settings, devices)
        stack.callback(fleet.stop)
        over = threading.Event()

        def kill() -> None:
            try:
                for name, place in times:
                    site.kill(name, place)
                    time.sleep(PAUSE_S)
                for place in (0, 1) if freeze else ():
                    site.freeze("director", place, lease.TTL_US / 1e6 + 2)
            finally:
                over.set()

        killer = threading.Thread(target=kill)
        killer.start()
        stack.callback(killer.join)
        numbers: list[int] = []
        while not over.is_set() or not numbers:
            wish = {
                "models": [{"model": MODEL, "version": versions[len(numbers)]}],
                "selector": "all",
                "stages": [{"share": 0.3}, {"share": 0.6}, {"share": 1.0}],
                "settled_share": 1.0,
                "start": True,
            }
            made = asked(settings, lambda database, wish=wish: rollouts.create(database, PROJECT, "test", wish))
            numbers.append(made["number"])
            until(lambda: (fleet.send_again(), show(settings, numbers[-1])["state"] == "done")[1], 2 * CHANGE_S)
        until(lambda: answers(ports[0]) or answers(ports[1]), CHANGE_S)
        assert len(ask(ports[0] if answers(ports[0]) else ports[1], token, "GET", "/rollouts")) == len(numbers)
        until(lambda: (fleet.send_again(), not any(device.owed for device in devices))[1], CHANGE_S)
        stored = {(row[0], row[1]) for row in rows(settings, "SELECT device_id, seq FROM report_log")}
        assert fleet.acked == stored
        assert len(stored) == sum(device.seq for device in devices)
        wanted = list(range(1, len(numbers) + 1))
        assert all(serials == wanted for serials in fleet.serials.values()), "each offer once, and in order"
        assert rows(settings, "SELECT 1 FROM assignment WHERE attempt <> 1 OR outcome NOT LIKE 'confirmed%'") == []
        for number in numbers:
            explained = asked(settings, lambda database, number=number: replayed(database, number))
            assert explained["differing"] == [], "what each director decided follows from what the one before left"
            said = [one for row in explained["decided"] for one in row["decisions"]]
            moves = [one["state"] for one in said if one["decision"] == "moved"]
            assert moves == ["running", "done"]
            assert [one["stage"] for one in said if one["decision"] == "expose"] == [0, 1, 2], (
                "nobody was exposed twice"
            )


async def replayed(database: Database, number: int) -> dict[str, Any]:
    async with database.read() as connection:
        return await explaining.explain(connection, PROJECT, number, "")


@pytest.mark.services
@pytest.mark.slow
def test_every_role_is_killed_while_rollouts_go_on(tmp_path: Path, postgres: Postgres) -> None:
    times = [(name, place) for place in (0, 1) for name in ("director", "ingest", "publisher")]
    whoever_is_killed(made(tmp_path / "data", postgres), tmp_path, times, freeze=True)


@pytest.mark.services
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_any_role_is_killed_at_any_time(tmp_path: Path, postgres: Postgres, seed: int) -> None:
    chance = random.Random(seed)
    times = [(chance.choice(ROLES), chance.randrange(2)) for _ in range(25)]
    whoever_is_killed(made(tmp_path / "data", postgres), tmp_path, times, freeze=True)


def test_every_shard_belongs_to_one_part() -> None:
    for of in (1, 2, 3, 16, SHARDS):
        parts = [Part(number, of).filters() for number in range(1, of + 1)]
        device = ids.new_device_id()
        for kind in ("report", "telemetry", "hello"):
            named = topics.up(device, kind).split("/")[1]  # type: ignore[arg-type]
            takes = [part for part in parts if any(f"w1/{at}/+/{kind}" in one for one in part for at in ("+", named))]
            assert len(takes) == 1


@pytest.mark.parametrize("text", ["", "1", "0/1", "2/1", "1/257", "1/2/3", "-1/2", "a/b"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="no part"):
        Part.parse(text)


def test_a_database_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "data", database=f"postgresql+asyncpg://wherry@/wherry?host={tmp_path}")
    with pytest.raises(UnreachableError) as caught:
        dev.init(settings)
    assert caught.value.code == "database_unreachable"
    assert not (tmp_path / "data" / "settings.json").exists()
