"""Shutting devices out of the API, at once, and noting what the broker has to be told.

The API asks the database who is active. The broker asks a list of revoked certificates, so every certificate is known
until it expires; `doorkeeper` writes the list and ends sessions that are open.
"""

from __future__ import annotations

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import DeviceCertificate, SessionCut, WrappedKey, table
from wherry_server.identity import Issued
from wherry_server.times import now_us
from wherry_shared.errors import UnreachableError

DAY_US = 86_400 * 1_000_000
CERTIFICATES_PER_DAY_MAX = 100
"""Of one device. Each is kept until it expires, and stands in the broker's list if the device is revoked: nobody fills that."""

_certificates = table(DeviceCertificate)
_cuts = table(SessionCut)
_wrapped = table(WrappedKey)


async def note(connection: AsyncConnection, project: str, device: str, issued: Issued) -> None:
    """Remember a certificate that was issued.

    Raises:
        UnreachableError: `certificates_too_many`, for today.
    """
    count = await connection.scalar(
        select(func.count())
        .select_from(_certificates)
        .where(_certificates.c.device_id == device, _certificates.c.issued_at > now_us() - DAY_US)
    )
    if (count or 0) >= CERTIFICATES_PER_DAY_MAX:
        raise UnreachableError(
            "certificates_too_many",
            f"{count} certificates were issued to this device within a day",
            consequence="it gets no other one now",
            next_step="keep what was issued and ask again tomorrow; see whether two machines share this identity",
        )
    await connection.execute(
        insert(_certificates).values(
            serial=issued.serial,
            project_id=project,
            device_id=device,
            issued_at=now_us(),
            expires_at=issued.expires_at,
            revoked_at=0,
        )
    )


async def shut_out(connection: AsyncConnection, project: str, device: str) -> None:
    """Revoke all certificates of a device, withdraw its content keys and have its session at the broker ended."""
    now = now_us()
    await connection.execute(delete(_wrapped).where(_wrapped.c.device_id == device))
    await connection.execute(
        update(_certificates)
        .where(_certificates.c.device_id == device, _certificates.c.expires_at > now, _certificates.c.revoked_at == 0)
        .values(revoked_at=now)
    )
    await connection.execute(delete(_cuts).where(_cuts.c.device_id == device))
    await connection.execute(insert(_cuts).values(device_id=device, project_id=project, asked_at=now))


async def let_in(connection: AsyncConnection, device: str) -> None:
    """Take back what `shut_out` did."""
    await connection.execute(update(_certificates).where(_certificates.c.device_id == device).values(revoked_at=0))
    await connection.execute(delete(_cuts).where(_cuts.c.device_id == device))


async def is_revoked(connection: AsyncConnection, serial: str, device: str) -> bool:
    """Tell whether a certificate is not good any more, or was never issued to this device."""
    found = await connection.scalar(
        select(_certificates.c.revoked_at).where(_certificates.c.serial == serial, _certificates.c.device_id == device)
    )
    return found is None or found > 0


async def revoked(connection: AsyncConnection) -> list[tuple[str, int]]:
    """Return the certificates that would still be good if they were not revoked: (serial, when), of all projects."""
    rows = await connection.execute(
        select(_certificates.c.serial, _certificates.c.revoked_at)
        .where(_certificates.c.revoked_at > 0, _certificates.c.expires_at > now_us())
        .order_by(_certificates.c.serial)
    )
    return [(row.serial, row.revoked_at) for row in rows]


async def forget(connection: AsyncConnection) -> None:
    """Forget certificates that expired."""
    await connection.execute(delete(_certificates).where(_certificates.c.expires_at < now_us() - DAY_US))
