"""The director's process: rollouts, publishing, trust's online roles, and ingest unless that is separate, in one loop.

It may be killed at any moment and started again. Each job runs for ever and is begun again after a fault; none waits for
another. What a device says wakes the rollouts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

import httpx
import uvloop
from sqlalchemy import text

from wherry_server import kept_lists, retention, revocation
from wherry_server.broker_link import open_link
from wherry_server.collector import Collector
from wherry_server.conductor import Conductor
from wherry_server.db.database import DATABASE_ERRORS
from wherry_server.doorkeeper import Doorkeeper
from wherry_server.ingest import KINDS, LOGS_FOR_US, Ingest, Stored
from wherry_server.jobs import collect_rarely, every, for_ever, stop_on_signals, until_stopped
from wherry_server.lease import RENEW_S, Lease
from wherry_server.mqtt import Link
from wherry_server.offers import Composer
from wherry_server.outbox import Outbox
from wherry_server.postman import ANSWER_S, UNDER_WAY_MAX, Postman
from wherry_server.services import Services, open_services
from wherry_server.settings import Settings
from wherry_server.times import now_us
from wherry_shared import topics
from wherry_shared.errors import RefusedError

log = logging.getLogger(__name__)

TRUST_S = 600.0
FORGET_S = 600.0
"""Old telemetry and reports are looked for this often."""
WEBHOOKS_S = 1.0
"""What happened is looked for this often, to tell it."""
DOORS_S = 0.5
"""Devices that were shut out are looked for this often."""
LOGS_S = 2.0
"""An open request for logs is repeated this often to devices that have nothing to say."""


@dataclass(slots=True)
class Process:
    """Everything that runs in the director's process."""

    services: Services
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Run until `stopping` is set."""
        services, trust = self.services, self.services.trust
        separate = services.settings.ingest == "separate"
        ingest = Ingest(services.database, services.master_key, services.project)
        lease = Lease(services.database, services.project, "director")
        composer = Composer(services.project, *trust.director)
        conductor = Conductor(services, lease, composer)
        came_back = asyncio.Event()
        limits = httpx.Limits(max_connections=UNDER_WAY_MAX)
        http = httpx.AsyncClient(timeout=ANSWER_S, limits=limits, trust_env=False)
        postman = Postman(services.database, services.project, services.master_key, http)
        heard = [topics.ingest_filter(kind) for kind in (("hello",) if separate else KINDS)]
        link = open_link(services.settings, "director", heard)
        collector = Collector(ingest, link.publish, conductor.stored, link.clear, guarded=services.settings.broker_tls)

        def hello(topic: str, payload: bytes) -> None:
            """Answer a hello that others store."""
            with contextlib.suppress(RefusedError):  # whoever stores it counts it
                conductor.stored(Stored(hellos=ingest.behind([(topics.parse_up(topic).device, payload)])))

        link.on_message, link.on_connect = hello if separate else collector.received, came_back.set
        outbox = conductor.outbox = Outbox(services.database, services.project, link)

        async def hold() -> None:
            await lease.hold()

        async def publish_again() -> None:
            await came_back.wait()
            came_back.clear()
            await outbox.again()

        async def renew_trust() -> None:
            await asyncio.to_thread(trust.refresh_online)

        async def ask_logs() -> None:
            await _ask_logs(services, ingest, link)

        async def tell() -> None:
            while lease.epoch and await postman.turn():
                pass
            if not lease.epoch:
                await postman.rest()

        suspects: frozenset[str] = frozenset()

        async def forget() -> None:
            nonlocal suspects
            if lease.epoch:
                await retention.forget(services.database, services.project, services.settings)
                async with services.database.write() as connection:
                    await revocation.forget(connection)
                suspects = await kept_lists.collect(services.database, services.project, suspects)

        await every(0, hold, once=True)
        log.info("directing project %s", services.project)
        jobs = {
            "link": for_ever(link.run),
            "rollouts": for_ever(conductor.run),
            "lease": every(RENEW_S, hold),
            "trust": every(TRUST_S, renew_trust),
            "webhooks": every(WEBHOOKS_S, tell),
            "forget": every(FORGET_S, forget),
            "logs": every(LOGS_S, ask_logs),
        }
        if services.settings.publisher == "director":
            jobs |= {"outbox": for_ever(outbox.run), "again": every(0, publish_again)}
        if services.settings.broker_tls:
            doorkeeper = Doorkeeper(services, link.clear)

            async def watch_doors() -> None:
                await doorkeeper.turn(leading=bool(lease.epoch))

            jobs["doors"] = every(DOORS_S, watch_doors)
        if not separate:
            jobs["ingest"] = for_ever(collector.run)
        try:
            await until_stopped(jobs, self.stopping)
        finally:
            with contextlib.suppress(*DATABASE_ERRORS):
                await lease.release()
            await postman.rest()
            await http.aclose()
            composer.close()
            await services.close()


async def _ask_logs(services: Services, ingest: Ingest, link: Link) -> None:
    """Repeat open requests for logs in an acknowledgement of their own, for devices that have nothing to say now."""
    if not link.connected.is_set():
        return
    async with services.database.read() as connection:
        rows = (await connection.execute(_LOGS, {"project": services.project, "since": now_us() - LOGS_FOR_US})).all()
    for row in rows:
        frame = ingest.ack(row.device_id, "report", row.epoch or "", row.contiguous or 0, row.requested_at)
        link.publish(topics.down(row.device_id, "ack"), frame)


def run(settings: Settings) -> None:
    """Run the director's process until it is told to stop. It may be killed at any moment and started again."""
    services = open_services(settings)

    async def main() -> None:
        process = Process(services)
        stop_on_signals(process.stopping)
        await process.run()

    collect_rarely()
    uvloop.run(main())


_LOGS = text(
    "SELECT l.device_id, l.requested_at, s.epoch, s.contiguous FROM device_log l LEFT JOIN stream s"
    " ON s.device_id = l.device_id AND s.stream = 'report' AND s.opened_at = (SELECT max(t.opened_at) FROM stream t"
    " WHERE t.device_id = l.device_id AND t.stream = 'report')"
    " WHERE l.project_id = :project AND l.requested_at > l.received_at AND l.requested_at > :since LIMIT 200"
)
