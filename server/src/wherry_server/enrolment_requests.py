"""Keys that may enrol without a secret, since a person named them, and keys that wait until a person does.

Both are one row: an operator's `expect` writes it before the device comes, a token on hold writes it when the device came;
accepting the second makes it the first. The device asks again, with the same key, until it is in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import EnrolmentRequest, table
from wherry_server.hellos import facts_to_keep
from wherry_server.times import now_us
from wherry_shared import wire
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError, UnreachableError

DAY_US = 86_400 * 1_000_000
PENDING_MAX = 1_000
"""Keys of a project that wait for a person."""
PENDING_DAYS = 30
EXPECTED_MAX = 100_000
KEY_CHARS_MIN = 12
_KEY = re.compile(r"sha256:[0-9a-f]{64}")

_requests = table(EnrolmentRequest)


def key_of(public_key: str) -> str:
    """Return the digest of a public key, given as PEM or as the digest itself.

    Raises:
        RefusedError: `key_invalid`.
    """
    text = public_key.strip()
    if _KEY.fullmatch(text):
        return text
    try:
        key = serialization.load_pem_public_key(text.encode())
    except ValueError as error:
        raise _invalid(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _invalid("it is not on the curve P-256")
    return of_bytes(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "key_invalid",
        f"this is no public key of a device: {why}",
        consequence="nothing was changed",
        next_step="give what the device prints: wherry-agent key",
    )


async def find(connection: AsyncConnection, project: str, key_digest: str) -> Any:
    """Return the row of a key that has not expired, None if there is none."""
    return (
        await connection.execute(
            select(_requests).where(
                _requests.c.project_id == project,
                _requests.c.key_digest == key_digest,
                _requests.c.expires_at > now_us(),
            )
        )
    ).one_or_none()


async def expect(
    connection: AsyncConnection,
    project: str,
    actor: str,
    *,
    key: str,
    name: str,
    labels: Mapping[str, str],
    days: int,
) -> None:
    """Let the device with this key in when it comes.

    Raises:
        RefusedError: `requests_full`.
    """
    await _make_room(connection, project, "expected", EXPECTED_MAX)
    await connection.execute(delete(_requests).where(_requests.c.project_id == project, _requests.c.key_digest == key))
    await _write(connection, project, key, state="expected", name=name, labels=labels, days=days, actor=actor)


async def file(
    connection: AsyncConnection, project: str, request: wire.EnrolRequest, key: str, labels: Mapping[str, str]
) -> bool:
    """Note that a device waits for a person; true if that is new.

    Raises:
        RefusedError: `requests_full`.
    """
    asked = await find(connection, project, key)
    if asked is not None and asked.state == "pending":
        return False
    await _make_room(connection, project, "pending", PENDING_MAX)
    await connection.execute(delete(_requests).where(_requests.c.project_id == project, _requests.c.key_digest == key))
    facts = facts_to_keep(request.facts) if request.facts is not None else {}
    words = {"name": request.name, "labels": labels, "days": PENDING_DAYS, "facts": facts}
    await _write(connection, project, key, state="pending", actor=f"key:{key}", **words)  # type: ignore[arg-type]
    return True


async def settle(connection: AsyncConnection, project: str, key: str, state: str) -> Any:
    """Accept or refuse the key that begins so, or the only one that asks under this name; return its row as it was.

    Raises:
        RefusedError: `request_unknown`.
    """
    rows = (
        await connection.execute(
            select(_requests).where(
                _requests.c.project_id == project,
                _requests.c.expires_at > now_us(),
                _requests.c.state.in_(("pending", "expected", "refused")),
            )
        )
    ).all()
    bare = key.removeprefix("sha256:")
    found = [row for row in rows if len(bare) >= KEY_CHARS_MIN and row.key_digest.startswith(f"sha256:{bare}")]
    found = found or [row for row in rows if row.name == key and row.state == "pending"]
    if len(found) != 1:
        raise RefusedError(
            "request_unknown",
            f"{len(found) or 'no'} keys that wait fit {key[:80]!r}",
            consequence="nothing was changed",
            next_step="see them with: wherry device pending, and name one by its key",
        )
    await connection.execute(
        update(_requests)
        .where(_requests.c.project_id == project, _requests.c.key_digest == found[0].key_digest)
        .values(state=state, expires_at=now_us() + PENDING_DAYS * DAY_US)
    )
    return found[0]


async def used(connection: AsyncConnection, project: str, key: str) -> None:
    """The device with this key is in; until the row expires it, and nobody else, may repeat its enrolment, if the answer got lost."""
    await connection.execute(
        update(_requests)
        .where(_requests.c.project_id == project, _requests.c.key_digest == key)
        .values(state="enrolled")
    )


async def waiting(connection: AsyncConnection, project: str, limit: int) -> list[dict[str, Any]]:
    """Return keys that wait, may come or were refused, the latest first."""
    rows = await connection.execute(
        select(_requests)
        .where(_requests.c.project_id == project, _requests.c.state != "enrolled", _requests.c.expires_at > now_us())
        .order_by(_requests.c.created_at.desc(), _requests.c.key_digest)
        .limit(limit)
    )
    names = ("name", "state", "labels", "facts", "created_at", "expires_at", "created_by")
    return [{"key": row.key_digest, **{name: getattr(row, name) for name in names}} for row in rows]


def is_waiting(key: str) -> UnreachableError:
    """Return what a device is told that a person has to accept: to come again."""
    return UnreachableError(
        "enrolment_pending",
        f"this device waits until an operator accepts its key {key.removeprefix('sha256:')[:KEY_CHARS_MIN]}",
        consequence="it is not enrolled yet",
        next_step="leave it running; on the operator's side: wherry device pending, wherry device accept",
    )


async def _make_room(connection: AsyncConnection, project: str, state: str, most: int) -> None:
    await connection.execute(delete(_requests).where(_requests.c.expires_at <= now_us()))
    count = await connection.scalar(
        select(func.count()).select_from(_requests).where(_requests.c.project_id == project, _requests.c.state == state)
    )
    if (count or 0) >= most:
        raise RefusedError(
            "requests_full",
            f"{most} keys are {state} already",
            consequence="this one was not noted",
            next_step="accept or refuse those that wait: wherry device pending",
        )


async def _write(
    connection: AsyncConnection,
    project: str,
    key: str,
    *,
    state: str,
    name: str,
    labels: Mapping[str, str],
    days: int,
    actor: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    now = now_us()
    await connection.execute(
        insert(_requests).values(
            project_id=project,
            key_digest=key,
            state=state,
            name=name,
            labels=dict(labels),
            facts=dict(facts or {}),
            created_at=now,
            expires_at=now + days * DAY_US,
            created_by=actor,
        )
    )
