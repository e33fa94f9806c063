"""Whether what keeps blobs answers, asked seldom however often somebody asks for it: health is open to everybody."""

from __future__ import annotations

import asyncio
import logging
import time

from wherry_server.blobs import Blobs
from wherry_shared.errors import WherryError

log = logging.getLogger(__name__)

KEPT_S = 10.0
WAIT_S = 3.0
"""A store that needs longer is as good as away for who asks; the next one is told how it went."""
OK = "ok"
LATE = "late"


class Pulse:
    """What was found last."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._found = OK
        self._until = 0.0
        self._asking: asyncio.Task[str] | None = None

    async def feel(self) -> str:
        """Return `ok`, `late`, or the code of what is wrong."""
        if time.monotonic() >= self._until or self._asking is not None:
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask(), name="pulse")
            done, _ = await asyncio.wait({self._asking}, timeout=WAIT_S)
            if not done:
                return LATE
        return self._found

    async def _ask(self) -> str:
        try:
            await self._blobs.check()
        except WherryError as error:
            if error.code != self._found:
                log.warning("blobs: %s", error)
            self._found = error.code
        else:
            self._found = OK
        finally:
            self._until = time.monotonic() + KEPT_S
            self._asking = None
        return self._found
