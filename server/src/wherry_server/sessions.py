"""People who are logged in: a session is a secret whose hash is stored, with an end, and what its person's groups are granted.

A browser sends its session as a cookie, so a change needs a second word that only a page of this server can read: the CSRF token,
derived from the secret. The command line sends it as a bearer token, as no foreign page can.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from typing import Any, Literal

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import Session, table
from wherry_server.grants import Grant
from wherry_server.secrets_kept import hash_secret
from wherry_server.settings import Oidc
from wherry_server.times import now_us

PREFIX = "wherrysession_"
CODE_PREFIX = "wherrycode_"
CODE_S = 120
"""How long the command line may take to fetch its session."""
COOKIE, COOKIE_SECURE = "wherry_session", "__Host-wherry_session"
"""The second over HTTPS: a browser then takes it from no other host and over no other scheme."""
LOGIN_COOKIE, LOGIN_COOKIE_SECURE = "wherry_login", "__Host-wherry_login"
"""Likewise: a host beside this one could else begin a login here for somebody, who then acts as whom it likes."""
CSRF_HEADER = "x-csrf-token"
HOUR_US = 3_600 * 1_000_000

Kind = Literal["browser", "cli", "code"]
_sessions = table(Session)


def csrf_token(secret: str) -> str:
    """Return the word that a change needs beside the cookie."""
    return hmac.digest(secret.encode(), b"csrf", "sha256").hex()


def granted(oidc: Oidc | None, groups: Iterable[str]) -> tuple[Grant, ...]:
    """Return what groups are granted by the settings as they are now; nothing where people cannot log in."""
    if oidc is None:
        return ()
    return tuple(
        Grant(role=one.role, models=tuple(one.models), cohorts=tuple(one.cohorts))
        for group in groups
        for one in oidc.groups.get(group, [])
    )


async def create(
    connection: AsyncConnection,
    project: str,
    kind: Kind,
    subject: str,
    name: str,
    groups: Iterable[str],
    ends_at: int,
    *,
    challenge: str = "",
) -> str:
    """Store a session, or the code for one, and return its secret; sessions that have ended go."""
    secret = (CODE_PREFIX if kind == "code" else PREFIX) + secrets.token_urlsafe(32)
    now = now_us()
    await connection.execute(delete(_sessions).where(_sessions.c.project_id == project, _sessions.c.expires_at <= now))
    await connection.execute(
        insert(Session).values(
            session_hash=hash_secret(secret),
            project_id=project,
            kind=kind,
            subject=subject,
            name=name,
            groups=list(groups),
            challenge=challenge,
            created_at=now,
            expires_at=ends_at,
        )
    )
    return secret


async def find(connection: AsyncConnection, project: str, secret: str, kind: Kind) -> Any | None:
    """Return the row of a session that has not ended."""
    return (
        await connection.execute(
            select(_sessions).where(
                _sessions.c.session_hash == hash_secret(secret),
                _sessions.c.project_id == project,
                _sessions.c.kind == kind,
                _sessions.c.expires_at > now_us(),
            )
        )
    ).one_or_none()


async def lasts(connection: AsyncConnection, project: str, session_hash: str) -> bool:
    """Tell whether a session has not ended."""
    wanted = select(_sessions.c.session_hash).where(
        _sessions.c.project_id == project,
        _sessions.c.session_hash == session_hash,
        _sessions.c.expires_at > now_us(),
    )
    return await connection.scalar(wanted) is not None


async def end(connection: AsyncConnection, project: str, session_hash: str) -> bool:
    """End a session; tell whether there was one."""
    gone = await connection.execute(
        delete(_sessions).where(_sessions.c.project_id == project, _sessions.c.session_hash == session_hash)
    )
    return gone.rowcount == 1


async def every(connection: AsyncConnection, project: str) -> list[Any]:
    """Return the sessions that have not ended."""
    rows = await connection.execute(
        select(_sessions).where(
            _sessions.c.project_id == project, _sessions.c.expires_at > now_us(), _sessions.c.kind != "code"
        )
    )
    return list(rows)
