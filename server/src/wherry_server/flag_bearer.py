"""Brings every device the flags it should have: compares what offers carry with what they should, and composes anew.

Level-triggered: it forgets nothing that a restart would miss. A change of a definition is noticed in the next turn; facts,
labels and newcomers are looked at again after `LOOK_S`, or 20 times what a look took. What rollouts expose and withdraw is
in the offers of their own transactions (`assignments`); a look finds the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import flag_values, offers
from wherry_server.db import bulk
from wherry_server.flag_values import Definitions
from wherry_server.jobs import begun
from wherry_server.lease import Lease
from wherry_server.offers import Composer, Number
from wherry_server.outbox import Outbox
from wherry_server.services import Services
from wherry_server.times import now_us
from wherry_shared import flags as device_flags
from wherry_shared.errors import UnreachableError

log = logging.getLogger(__name__)

LOOK_S = 2.0
LOOK_SHARE = 20
"""A look at every device is repeated at the earliest after this many times what it took: at most 5 % of a core."""
CARRIED_S = 600.0
"""Where no flag is defined and no offer carried one, offers are read through again after this."""
DEVICES_PER_TURN = 10_000
"""Offers composed for flags in one turn, as many as a stage exposes."""


class _Found(NamedTuple):
    """What a look found of a device whose offer does not carry its flags."""

    number: Number
    """Of that offer."""
    flags: Mapping[str, Any]


_Due = dict[str, _Found | None]
NONE = b"{}", Number(0, 0)
"""What a device without an offer carries."""


@dataclass(slots=True)
class Bearer:
    """What the director's process remembers of flags: when it looked, and at what."""

    services: Services
    lease: Lease
    composer: Composer
    outbox: Outbox | None = None
    _known: tuple[tuple[str, int], ...] | None = None
    _look_at: float = 0.0
    _ahead: tuple[str, _Due, asyncio.Task[list[offers.Composed]]] | None = None
    """Offers composed for the next devices, with the key that signs them and what was due."""
    _bare: tuple[int, float] = (0, 0.0)
    """Epoch of the lease in which no offer carried a flag, and until when that is believed: who leads writes the offers."""
    more: bool = False
    """Whether more devices wait than the last turn could take."""
    _due: _Due = field(default_factory=dict)
    """Devices whose flags are, or may be, not as they should be, with what a look found of them."""

    def owe(self, devices: set[str]) -> None:
        """Have these devices looked at in the next turn."""
        self._due |= dict.fromkeys(devices)

    def look_soon(self) -> None:
        """Have every device looked at in the next turn."""
        self._look_at = 0.0

    async def turn(self) -> int:
        """Look whose flags are not as they should be, if it is time, and compose the offers of as many as fit; return how many."""
        async with self.services.database.read() as connection:
            known = await flag_values.revisions(connection, self.services.project)
            if known != self._known or time.monotonic() >= self._look_at:
                await self._look(connection)
        waiting = sorted(self._due)
        batch = {device: self._due.pop(device) for device in waiting[:DEVICES_PER_TURN]}
        following = {device: self._due[device] for device in waiting[DEVICES_PER_TURN : 2 * DEVICES_PER_TURN]}
        self.more = False
        if not batch:
            return 0
        try:
            done = await self._bring(batch, following)
        except BaseException as error:
            self._due = batch | self._due
            if isinstance(error, UnreachableError):
                log.info("flags: %s", error.message)  # the next turn composes from what is stored then
                return 0
            raise
        self.more = bool(self._due)
        return done

    async def _bring(self, batch: _Due, following: _Due) -> int:
        """Store the offers of a batch, while those of the next one are composed and signed; return how many."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (self.composer.keyid, batch):
            composed = await ahead[2]
        else:
            composed = await self._made(batch)
        if following:
            self._ahead = self.composer.keyid, following, begun(self._made(following), "flags ahead")
        if composed:
            async with self.services.database.write() as connection:
                await self.lease.check(connection)
                await offers.write(connection, self.services.project, composed)
            if self.outbox is not None:
                self.outbox.wake()
            log.info("flags: %d offers", len(composed))
        return len(composed)

    async def _made(self, batch: _Due) -> list[offers.Composed]:
        """Return offers with the flags that devices lack.

        What a look found stands while the device's offer is the one that it saw: whatever a rollout gives or takes is in an
        offer of its own. Of the others it is worked out again.
        """
        async with self.services.database.read() as connection:
            current = await offers.current(connection, list(batch))
            wanted: dict[str, Mapping[str, Any]] = {}
            again: list[str] = []
            for device, found in batch.items():
                standing = current.get(device)
                if found is not None and standing is not None and standing.number == found.number:
                    wanted[device] = found.flags
                else:
                    again.append(device)
            if again:
                definitions = await flag_values.definitions(connection, self.services.project)
                lacking = await self._wanted(connection, definitions, again)
                wanted |= {device: found.flags for device, found in lacking.items()}
        changed = {device: one for device, one in current.items() if device in wanted}
        return await asyncio.to_thread(self._compose, wanted, changed, now_us()) if changed else []

    async def _look(self, connection: AsyncConnection) -> None:
        """Find every device whose flags are not as they should be."""
        started = time.monotonic()
        self._ahead = None  # its offers may be of definitions that are no more
        found = await flag_values.definitions(connection, self.services.project)
        if found.flags:
            self._bare = (0, 0.0)
        if found.flags or await self._any(connection):
            self._due = dict.fromkeys(self._due) | dict(await self._wanted(connection, found, None))
        ended = time.monotonic()
        self._known, self._look_at = found.revisions, ended + max(LOOK_S, LOOK_SHARE * (ended - started))

    async def _any(self, connection: AsyncConnection) -> bool:
        """Tell whether any offer still carries a flag.

        Finding none reads every offer, so it is remembered: while nothing is defined, whoever holds the lease composes none.
        """
        epoch, until = self._bare
        if epoch == self.lease.epoch and time.monotonic() < until:
            return False
        found = await connection.execute(_CARRIED, {"project": self.services.project})
        if found.one_or_none() is not None:
            return True
        self._bare = (self.lease.epoch, time.monotonic() + CARRIED_S)
        return False

    async def _wanted(
        self, connection: AsyncConnection, found: Definitions, only: list[str] | None
    ) -> dict[str, _Found]:
        """Return the flags of the devices whose offers do not carry them."""
        sources = await flag_values.sources(connection, self.services.project, found.flags, only)
        carried: dict[str, tuple[bytes, Number]] = {}
        if only is None:
            rows = (await connection.execute(text(_CARRY + _OF_PROJECT), {"project": self.services.project})).all()
        else:
            rows = list(await bulk.select_in(connection, _CARRY + _NAMED, only))
        for row in rows:
            carried[row.device_id] = (row.flags or "{}").encode(), Number(row.epoch, row.serial)
        encoded: dict[tuple[str, ...], tuple[dict[str, Any], bytes]] = {}
        wanted: dict[str, _Found] = {}
        for device, mine in sources.items():
            key = tuple(source.variant for source in mine.values())
            if key not in encoded:
                values = found.values(mine)
                encoded[key] = (values, device_flags.encode(values))
            values, as_carried = encoded[key]
            standing, number = carried.get(device, NONE)
            if standing != as_carried:
                wanted[device] = _Found(number, values)
        return wanted

    def _compose(
        self, wanted: Mapping[str, Mapping[str, Any]], current: Mapping[str, offers.Current], moment: int
    ) -> list[offers.Composed]:
        changed = [offers.Wanted(device, found, found.models, wanted[device]) for device, found in current.items()]
        composed, refused = self.composer.compose_all(changed, moment)
        for error in refused:
            log.error("%s", error)
        return composed


_CARRY = "SELECT device_id, epoch, serial, CAST(flags AS TEXT) AS flags FROM offer WHERE"
_OF_PROJECT, _NAMED = " project_id = :project", " device_id IN :keys"
_CARRIED = text("SELECT 1 FROM offer WHERE project_id = :project AND CAST(flags AS TEXT) <> '{}' LIMIT 1")
