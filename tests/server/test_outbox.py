"""Publishing: every waiting offer once, in windows, and marked exactly where the broker has it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.server.fleet_kit import PROJECT, fleet, run
from wherry_server import offers, outbox
from wherry_server.mqtt import Acknowledged
from wherry_server.offers import Composer, Current, Number, Wanted
from wherry_server.outbox import Outbox
from wherry_server.times import now_us
from wherry_shared.errors import UnreachableError

pytestmark = pytest.mark.backends

NONE = Current(Number(0, 0), Number(0, 0), {})


class FakeLink:
    """A connection that carries what it is told to."""

    def __init__(self, most: int = 1_000_000, silent: frozenset[str] = frozenset()) -> None:
        self.connected = asyncio.Event()
        self.sent: list[str] = []
        self.most, self.silent = most, silent

    def publish_retained(self, topic: str, _payload: bytes, acknowledged: Acknowledged, position: int) -> None:
        if len(self.sent) >= self.most:
            raise UnreachableError("broker_unreachable", "gone")
        device = topic.split("/")[1]
        self.sent.append(device)
        acknowledged.expect()
        if device not in self.silent:
            acknowledged.got(position)


async def offered(found: Any, count: int) -> list[str]:
    devices = [device.id for device in await found.enrol(count)]
    composer = Composer(PROJECT, "kid", lambda data: data[:64])
    made, _ = composer.compose_all([Wanted(device, NONE, {}) for device in devices], now_us())
    async with found.database.write() as connection:
        await offers.write(connection, PROJECT, made)
    return devices


def test_everything_that_waits_is_published_once_and_what_nobody_may_have_stands_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            devices = sorted(await offered(found, 12))
            async with found.database.write() as connection:
                for device in devices[:5]:  # more than a window of them, in front of everybody else
                    gone = "UPDATE device SET state = 'revoked' WHERE id = :device"
                    await connection.execute(text(gone), {"device": device})
            link = FakeLink()
            box = Outbox(found.database, PROJECT, link)  # type: ignore[arg-type]
            assert await box.drain() == 7
            assert sorted(link.sent) == devices[5:]
            assert await box.drain() == 0
            left = await found.rows("SELECT device_id FROM unpublished")
            assert sorted(row.device_id for row in left) == devices[:5]
            await box.again(devices[6:8])
            assert await box.drain() == 2
            await box.again()
            assert await box.drain() == 7

    monkeypatch.setattr(outbox, "WINDOW", 4)
    run(work())


def test_what_the_broker_did_not_acknowledge_is_not_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await offered(found, 9)
            lost = FakeLink(most=6)
            assert await Outbox(found.database, PROJECT, lost).drain() == 6  # type: ignore[arg-type]
            waiting = await found.rows("SELECT device_id FROM unpublished")
            mute = waiting[1].device_id
            silent = FakeLink(silent=frozenset({mute}))
            assert await Outbox(found.database, PROJECT, silent).drain() == 2  # type: ignore[arg-type]
            assert [row.device_id for row in await found.rows("SELECT device_id FROM unpublished")] == [mute]

    monkeypatch.setattr(outbox, "WINDOW", 4)
    monkeypatch.setattr(outbox, "ACKNOWLEDGED_S", 0.1)
    run(work())


def test_an_offer_that_changed_on_its_way_waits_again(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await offered(found, 1)
            link = FakeLink()
            box = Outbox(found.database, PROJECT, link)  # type: ignore[arg-type]
            publish = link.publish_retained

            def changed(topic: str, payload: bytes, acknowledged: Acknowledged, position: int) -> None:
                if not link.sent:
                    found.elsewhere("UPDATE offer SET serial = serial + 1")
                    found.elsewhere("UPDATE unpublished SET serial = serial + 1")
                publish(topic, payload, acknowledged, position)

            link.publish_retained = changed  # type: ignore[method-assign]
            await box.drain()
            assert len(await found.rows("SELECT 1 FROM unpublished")) == 1
            assert await box.drain() == 1
            assert link.sent == [device, device]

    run(work())
