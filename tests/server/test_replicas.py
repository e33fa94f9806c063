"""Two of every role at once on PostgreSQL and mosquitto, and any of them killed: nothing is lost, nothing decided twice."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.test_mosquitto import mosquitto
from tests.postgres import Postgres
from tests.server.fleet_kit import MODEL, PROJECT, manifest_of
from tests.server.harness import free_port, until
from tests.server.test_director_process import DEVICES, Fleet, role, rows, show, stocked
from wherry_server import dev
from wherry_server.ingest_process import SHARDS, Part
from wherry_server.settings import Settings
from wherry_shared import ids, topics
from wherry_shared.access import find_access
from wherry_shared.errors import RefusedError, UnreachableError

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
