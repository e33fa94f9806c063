"""Who directs now. A lease saves work; what makes two directors harmless is that every write compares its epoch.

The holder's name tells its machine's boot and its process id, so a director that was killed and started again on the same
machine need not wait for its own lease to run out. Where that guess is wrong (containers share a boot id), the epoch that
rises with every change of holder still refuses the loser's writes.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.database import Database
from wherry_server.times import now_us
from wherry_shared.errors import UnreachableError

TTL_US = 6_000_000
RENEW_S = 2.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Return an id of this boot of this machine; where the system has none, one of this process."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return _PROCESS_BOOT


_PROCESS_BOOT = secrets.token_hex(8)


class Lease:
    """The lease of one role of one project."""

    def __init__(self, database: Database, project: str, role: str) -> None:
        self._database = database
        self._project = project
        self._role = f"{role}/{project}"
        self.holder = f"{boot_id()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.epoch = 0
        """Epoch under which this process may write; 0 while it holds nothing."""

    async def hold(self) -> bool:
        """Take or renew the lease; tell whether this process holds it now."""
        now = now_us()
        async with self._database.write() as connection:
            row = (
                await connection.execute(
                    text("SELECT holder, epoch, expires_at FROM lease WHERE role = :role"), {"role": self._role}
                )
            ).one_or_none()
            named = {
                "role": self._role,
                "project": self._project,
                "holder": self.holder,
                "expires": now + TTL_US,
                "epoch": 1,
            }
            if row is None:
                await connection.execute(
                    text(
                        "INSERT INTO lease (role, project_id, holder, epoch, expires_at)"
                        " VALUES (:role, :project, :holder, :epoch, :expires)"
                    ),
                    named,
                )
            elif row.holder == self.holder or row.expires_at <= now or _is_dead(row.holder):
                named["epoch"] = row.epoch if row.holder == self.holder else row.epoch + 1
                await connection.execute(
                    text("UPDATE lease SET holder = :holder, epoch = :epoch, expires_at = :expires WHERE role = :role"),
                    named,
                )
            else:
                self.epoch = 0
                return False
        self.epoch = int(str(named["epoch"]))
        return True

    async def check(self, connection: AsyncConnection) -> None:
        """Compare inside a write transaction.

        Raises:
            UnreachableError: `lease_lost`.
        """
        found = await connection.scalar(
            text("SELECT epoch FROM lease WHERE role = :role AND holder = :holder"),
            {"role": self._role, "holder": self.holder},
        )
        if self.epoch == 0 or found != self.epoch:
            self.epoch = 0
            raise UnreachableError("lease_lost", "another director has taken over", consequence="nothing was written")

    async def release(self) -> None:
        """Give the lease up, so that the next director need not wait."""
        async with self._database.write() as connection:
            await connection.execute(
                text("UPDATE lease SET expires_at = 0 WHERE role = :role AND holder = :holder"),
                {"role": self._role, "holder": self.holder},
            )
        self.epoch = 0


def _is_dead(holder: str) -> bool:
    """Tell whether the holder was a process of this boot of this machine that is gone."""
    boot, _, rest = holder.partition(":")
    pid = rest.partition(":")[0]
    return boot == boot_id() and pid.isdigit() and int(pid) != os.getpid() and not Path(f"/proc/{pid}").exists()
