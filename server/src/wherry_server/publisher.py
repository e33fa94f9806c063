"""Publishing as a process of its own, of which there may be any number: it takes offers from their rows to the broker.

The director only writes them. A stage of a whole fleet uses two cores so, where deciding, composing and storing would otherwise wait
for the broker's acknowledgements in the same loop. A row that two publishers see at once is published twice, which changes nothing for
a device.
"""

from __future__ import annotations

import asyncio
import logging

import uvloop

from wherry_server.broker_link import open_link
from wherry_server.jobs import collect_rarely, every, for_ever, stop_on_signals, until_stopped
from wherry_server.outbox import Outbox
from wherry_server.services import open_services
from wherry_server.settings import Settings
from wherry_shared.errors import RefusedError

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often it looks whether an offer waits: nobody wakes it."""


def run(settings: Settings) -> None:
    """Publish the offers of a project until told to stop. It may be killed at any moment and started again.

    Raises:
        RefusedError: `publisher_not_separate`, where the director does it.
    """
    if settings.publisher != "separate":
        raise RefusedError(
            "publisher_not_separate",
            "here the director publishes offers",
            consequence="nothing was started",
            next_step="make the publisher separate: wherry init --separate-publisher, then start the director again",
        )
    services = open_services(settings)

    async def main() -> None:
        stopping, came_back = asyncio.Event(), asyncio.Event()
        stop_on_signals(stopping)
        link = open_link(settings, "publisher", [])
        link.on_connect = came_back.set
        outbox = Outbox(services.database, services.project, link, idle_s=LOOK_S)

        async def publish_again() -> None:
            await came_back.wait()
            came_back.clear()
            await outbox.again()

        jobs = {"link": for_ever(link.run), "outbox": for_ever(outbox.run), "again": every(0, publish_again)}
        log.info("publishing for project %s", services.project)
        try:
            await until_stopped(jobs, stopping)
        finally:
            await services.close()

    collect_rarely()
    uvloop.run(main())
