"""Keeps devices that were shut out away from the broker, at their next connection and in the one that is open.

The broker reads a list of revoked certificates, which the director writes and has it read again; a session that is open is
ended by taking it over, with a certificate that names the device and lives for minutes. What is to be ended stands in a
table until it was done: a director that dies leaves nothing open. A device comes back within milliseconds, and the broker looks at
certificates only when a connection begins: so each session is ended a second time, and again as long as the broker could not
be told of the list. Of a device that left the fleet for good the broker forgets what it keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, select

from wherry_server import broker_config
from wherry_server.broker_link import client_context
from wherry_server.db.tables import Device, SessionCut, table
from wherry_server.identity import REVOCATIONS_DAYS
from wherry_server.revocation import revoked
from wherry_server.services import Services
from wherry_server.settings import Settings
from wherry_server.times import now_us
from wherry_shared import topics
from wherry_shared.clock import MICROSECONDS
from wherry_shared.errors import UnreachableError

log = logging.getLogger(__name__)

DAY_S = 86_400
WRITE_AGAIN_S = REVOCATIONS_DAYS * DAY_S / 7
"""A list that says nothing new is signed again after this long, a seventh of its life."""
RELOAD_S = 10.0
SETTLE_S = 0.3
"""Between telling the broker to read its list and ending sessions: who is cut must not get in again by the old list."""
CUT_S = 5.0
CUTS_MAX = 200
"""Sessions ended in one turn."""
CUT_AGAIN_S = 15.0
"""From one end of a session to the next: whoever came back in between came by the list of before."""
CUT_FOR_S = 3600.0
"""How long sessions are ended again and again where the broker cannot be told of its list."""
DOUBLE_LIFE = timedelta(minutes=5)

_cuts = table(SessionCut)
_devices = table(Device)


class Doorkeeper:
    """Keeps the broker's list up to date, and ends sessions of devices that were shut out."""

    def __init__(self, services: Services, clear: Callable[[str], None]) -> None:
        """Prepare; `clear` has the broker forget a topic."""
        self._services = services
        self._clear = clear
        self._written = ""
        self._again_at = 0.0
        self._cut_again: dict[tuple[str, int], float] = {}
        """Device and when its end was asked for → monotonic time of the next one."""

    async def turn(self, *, leading: bool) -> None:
        """Look once. Every director writes the list of the broker beside it; the leading one ends sessions."""
        async with self._services.database.read() as connection:
            serials = await revoked(connection)
            cuts: list[tuple[str, int]] = []
            left: Sequence[str] = []
            if leading:
                asked = select(_cuts.c.device_id, _cuts.c.asked_at).order_by(_cuts.c.asked_at)
                rows = await connection.execute(asked.limit(CUTS_MAX + len(self._cut_again)))
                cuts = [(row.device_id, row.asked_at) for row in rows]
            self._cut_again = {cut: at for cut, at in self._cut_again.items() if cut in cuts}
            cuts = [cut for cut in cuts if self._cut_again.get(cut, 0.0) <= time.monotonic()]
            if cuts:
                ids = [device for device, _ in cuts]
                gone = select(_devices.c.id).where(_devices.c.id.in_(ids), _devices.c.state == "decommissioned")
                left = (await connection.scalars(gone)).all()
        in_force = await self._write(serials)
        if cuts:
            await asyncio.sleep(SETTLE_S)
        for cut in cuts:
            if await self._cut(cut[0]):
                await self._was_cut(cut, in_force=in_force)
                if cut[0] in left:
                    for topic in topics.kept(cut[0]):
                        self._clear(topic)

    async def _write(self, serials: list[tuple[str, int]]) -> bool:
        """Bring the list of the broker here up to date; False if the broker could not be told."""
        settings = self._services.settings
        digest = hashlib.sha256(repr(serials).encode()).hexdigest()
        if not settings.broker_folder.exists() or (digest == self._written and time.monotonic() < self._again_at):
            return True
        pem = await asyncio.to_thread(self._services.authority.revocations, serials)
        broker_config.replace(settings.broker_folder / broker_config.REVOKED, pem)
        if not await reload(settings):
            return False  # and try again in the next turn
        self._written, self._again_at = digest, time.monotonic() + WRITE_AGAIN_S
        log.info("%d certificates are revoked", len(serials))
        return True

    async def _was_cut(self, cut: tuple[str, int], *, in_force: bool) -> None:
        """Plan the next end of a session, or forget it after the last."""
        device, asked_at = cut
        late = now_us() - asked_at > CUT_FOR_S * MICROSECONDS
        if (cut not in self._cut_again or not in_force) and not late:
            self._cut_again[cut] = time.monotonic() + CUT_AGAIN_S
            return
        if not in_force:
            log.error(
                "%s is revoked and may be connected: the broker was not told of its list; see broker_reload", device
            )
        async with self._services.database.write() as connection:
            done = (_cuts.c.device_id == device, _cuts.c.asked_at == asked_at)
            await connection.execute(delete(_cuts).where(*done))

    async def _cut(self, device: str) -> bool:
        pair = self._services.authority.issue_double(device, DOUBLE_LIFE)
        settings = self._services.settings
        try:
            context = await asyncio.to_thread(client_context, settings, pair)
            await take_over(settings.broker_host, settings.broker_port, device, context)
        except (OSError, TimeoutError, UnreachableError) as error:
            log.warning("the session of %s at the broker is not ended yet: %s", device, error)
            return False
        log.info("the session of %s at the broker is ended", device)
        return True


async def take_over(host: str, port: int, device: str, context: ssl.SSLContext) -> None:
    """Be a device at the broker for a moment: MQTT 3.1.1 §3.1.4, a second client of the same id ends the first.

    Raises:
        UnreachableError: `broker_unreachable`, it did not let us in.
        OSError, TimeoutError: it could not be reached.
    """
    name = device.encode()
    variable = struct.pack(">H", 4) + b"MQTT" + bytes([4, 0x02]) + struct.pack(">H", 10)
    body = variable + struct.pack(">H", len(name)) + name
    async with asyncio.timeout(CUT_S):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        try:
            writer.write(bytes([0x10, len(body)]) + body)
            answer = await reader.readexactly(4)
            if answer[0] != 0x20 or answer[3] != 0:
                raise UnreachableError("broker_unreachable", f"the broker refused the takeover with code {answer[3]}")
            writer.write(b"\xe0\x00")
            await writer.drain()
        except asyncio.IncompleteReadError as error:
            raise UnreachableError("broker_unreachable", "the broker closed the connection at once") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def reload(settings: Settings) -> bool:
    """Have the broker read its list again; False if nobody could be told."""
    if settings.broker_reload:
        process = await asyncio.create_subprocess_exec(*settings.broker_reload)
        try:
            async with asyncio.timeout(RELOAD_S):
                code = await process.wait()
        except TimeoutError:
            process.kill()
            code = -1
        if code:
            log.warning(
                "the broker was not told to read its list again: %s ended with %d", settings.broker_reload, code
            )
        return code == 0
    try:
        file = settings.broker_folder / broker_config.PID
        if not file.exists():
            file = settings.broker_folder / broker_config.PID_BEFORE
        pid = int(file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() != "mosquitto":
            raise ProcessLookupError(f"process {pid} is no mosquitto")
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError) as error:
        log.info("no broker here to tell of revoked certificates: %s", error)
        return False
    return True
