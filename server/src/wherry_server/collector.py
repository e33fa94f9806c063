"""Gathers messages into batches for `ingest`, and sends the acknowledgements once a batch is committed.

Back-pressure is end to end: a device keeps at most 20 messages on the way and drops none before its acknowledgement, so
what does not fit into the queue here is left out, counted, and comes again. A batch that the database does not take now
waits and is tried again; one that it will never take is divided until the one bad message stands alone.

A device that sends without end takes its own share only, by its name in the topic, which a guarded broker vouches for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable

from wherry_server.db.database import DATABASE_ERRORS, transient
from wherry_server.ingest import Frame, Ingest, Kind, Stored
from wherry_server.times import now_us
from wherry_shared import topics
from wherry_shared.errors import RefusedError
from wherry_shared.ids import is_device_id

log = logging.getLogger(__name__)

BATCH_MAX = 2_000
BATCH_S = 0.025
"""How long the first message of a batch waits for others."""
QUEUE_MAX = 50_000
DEVICE_WINDOW_S = 10.0
DEVICE_MESSAGES_MAX = 2_000
"""Of one device in that time; what is beyond is left out, and comes again."""
FLOOD_MESSAGES = 20_000
"""In that time nobody has as much to say, with 20 on the way and an acknowledgement for each: the device is shut out."""
STRAYS_MAX = 100
"""Messages of one device in that time on topics that nobody uses, where a broker would keep them: as good as a flood."""
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0

Message = tuple[Kind, str, bytes]


class Collector:
    """A bounded queue in front of `Ingest`."""

    def __init__(
        self,
        ingest: Ingest,
        acknowledge: Callable[[str, bytes], None],
        stored: Callable[[Stored], None],
        clear: Callable[[str], None] = lambda _topic: None,
        *,
        guarded: bool = False,
    ) -> None:
        """Prepare.

        Args:
            ingest: stores.
            acknowledge: sends, by topic.
            stored: hears what became of a batch.
            clear: is told topics that nobody uses any more, where the broker may keep something.
            guarded: whether the broker vouches for names of devices in topics, so that who floods can be shut out.
        """
        self._ingest = ingest
        self._acknowledge = acknowledge
        self._stored = stored
        self._queue: deque[Message] = deque()
        self._clear = clear
        self._filled = asyncio.Event()
        self._guarded = guarded
        self._sent: Counter[str] = Counter()
        self._strays: Counter[str] = Counter()
        self._floods: set[str] = set()
        self._window_s = time.monotonic()

    def received(self, topic: str, payload: bytes) -> None:
        """Take a message from the broker; never raises."""
        if len(self._queue) >= QUEUE_MAX:
            self._ingest.refuse("overload", now_us(), f"{QUEUE_MAX} messages wait already; devices send again")
            return
        try:
            device, kind = topics.parse_up(topic)
        except RefusedError as error:
            self._ingest.refuse(error.code, now_us(), error.message)
            if payload:  # an empty one is what clears
                self._clear(topic)
                self._stray(topic)
            return
        if not self._within_share(device):
            self._ingest.refuse("device_rate", now_us(), f"{device} sends more than anybody has to say")
            return
        self._queue.append((kind, device, payload))
        self._filled.set()

    def _within_share(self, device: str) -> bool:
        self._turn()
        self._sent[device] += 1
        if self._sent[device] == FLOOD_MESSAGES:
            self._flood(device)
        return self._sent[device] <= DEVICE_MESSAGES_MAX

    def _stray(self, topic: str) -> None:
        self._turn()
        parts = topic.split("/")
        # only the third level is what the broker vouches for: whoever writes chooses the second, and may put another's id there
        device = parts[2] if len(parts) > 2 else ""
        if is_device_id(device):
            self._strays[device] += 1
            if self._strays[device] == STRAYS_MAX:
                self._flood(device)

    def _turn(self) -> None:
        now = time.monotonic()
        if now - self._window_s >= DEVICE_WINDOW_S:
            self._sent.clear()
            self._strays.clear()
            self._window_s = now

    def _flood(self, device: str) -> None:
        if self._guarded:
            self._floods.add(device)
            self._filled.set()

    async def run(self) -> None:
        """Store batches until cancelled."""
        while True:
            await self._filled.wait()
            if len(self._queue) < BATCH_MAX:
                await asyncio.sleep(BATCH_S)
            batch = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
            if not self._queue:
                self._filled.clear()
            await self._suspect()
            if batch:
                await self._store(batch)

    async def _suspect(self) -> None:
        for device in list(self._floods):
            try:
                await self._ingest.suspect(device, f"more than {FLOOD_MESSAGES} messages in {DEVICE_WINDOW_S:.0f} s")
            except DATABASE_ERRORS as error:
                log.warning("%s floods and is not shut out yet: %s", device, error)
                return  # the next turn tries again
            self._floods.discard(device)

    async def _store(self, batch: list[Message]) -> None:
        wait = RETRY_MIN_S
        while True:
            try:
                result = await self._ingest.store_batch(_by_kind(batch))
            except (*DATABASE_ERRORS, ValueError, TypeError, OverflowError) as error:
                if transient(error):
                    log.warning("the database does not take messages now, trying again: %s", error)
                    await asyncio.sleep(wait)
                    wait = min(wait * 2, RETRY_MAX_S)
                    continue
                if len(batch) == 1:
                    self._ingest.refuse("store_failed", now_us(), f"{batch[0][0]} of {batch[0][1]}: {error}")
                    return
                middle = len(batch) // 2
                await self._store(batch[:middle])
                await self._store(batch[middle:])
                return
            break
        for device, frame in result.acks:
            self._acknowledge(topics.down(device, "ack"), frame)
        for device in result.left:
            for topic in topics.kept(device):
                self._clear(topic)
        self._stored(result)


def _by_kind(batch: list[Message]) -> dict[Kind, list[Frame]]:
    kinds: dict[Kind, list[Frame]] = {"hello": [], "report": [], "telemetry": []}
    for kind, device, frame in batch:
        kinds[kind].append((device, frame))
    return kinds
