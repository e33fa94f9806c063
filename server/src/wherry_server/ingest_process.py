"""Ingest as a process of its own, of which there may be any number: it stores what devices say and acknowledges it.

The topics of devices are divided into 256 shards (`ids.shard`), shards into parts; a process serves one part. Processes of
the same part share its reports and telemetry: a shared subscription (MQTT 5 §4.8.2, which brokers offer to 3.1.1 clients,
too) gives each message to one of them, and all to the others when one is gone. What was on its way to that one is not
acknowledged, so devices send it again. Hellos go to all: they are few, and retained messages reach no shared subscription.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import NamedTuple

import uvloop

from wherry_server.broker_link import open_link
from wherry_server.collector import Collector
from wherry_server.ingest import Ingest, Kind
from wherry_server.jobs import collect_rarely, for_ever, stop_on_signals, until_stopped
from wherry_server.services import open_services
from wherry_server.settings import Settings
from wherry_shared import topics
from wherry_shared.errors import RefusedError

log = logging.getLogger(__name__)

SHARDS = 256
SHARED: tuple[Kind, ...] = ("report", "telemetry")


class Part(NamedTuple):
    """Which of the shards: `number` (from 1) of `of` equal parts."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `2/4`.

        Raises:
            RefusedError: `bad_part`.
        """
        found = re.fullmatch(r"([0-9]{1,3})/([0-9]{1,3})", text)
        part = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= part.number <= part.of <= SHARDS:
            raise RefusedError(
                "bad_part",
                f"{text[:20]!r} is no part of the topics",
                consequence="nothing was started",
                next_step=f"say which of how many, as in --part 2/4; at most {SHARDS}",
            )
        return part

    def filters(self) -> list[str]:
        """Return what a process of this part subscribes to."""
        shards = ["+"] if self.of == 1 else [f"{n:02x}" for n in range(self.number - 1, SHARDS, self.of)]
        group = f"$share/wherry-ingest-{self.number}-of-{self.of}/"
        shared = [group + topics.ingest_filter(kind, shard) for kind in SHARED for shard in shards]
        return shared + [topics.ingest_filter("hello", shard) for shard in shards]


def run(settings: Settings, part: Part) -> None:
    """Store what the devices of a part say until told to stop. It may be killed at any moment and started again.

    Raises:
        RefusedError: `ingest_not_separate`, where the director does it.
    """
    if settings.ingest != "separate":
        raise RefusedError(
            "ingest_not_separate",
            "here the director stores what devices say",
            consequence="nothing was started",
            next_step="make ingest separate: wherry init --separate-ingest, then start the director again",
        )
    services = open_services(settings)

    async def main() -> None:
        stopping = asyncio.Event()
        stop_on_signals(stopping)
        link = open_link(settings, "ingest", part.filters())
        ingest = Ingest(services.database, services.master_key, services.project)
        collector = Collector(ingest, link.publish, lambda _stored: None, link.clear, guarded=settings.broker_tls)
        link.on_message = collector.received
        log.info("storing part %d of %d of project %s", part.number, part.of, services.project)
        try:
            await until_stopped({"link": for_ever(link.run), "ingest": for_ever(collector.run)}, stopping)
        finally:
            await services.close()

    collect_rarely()
    uvloop.run(main())
