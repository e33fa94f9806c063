"""Tokens of people and machines that operate. Making one needs no web framework; `auth` asks what it opens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import ApiToken
from wherry_server.grants import Role
from wherry_server.secrets_kept import hash_secret
from wherry_server.times import DAY_US, now_us

TOKEN_PREFIX = "wherryapi_"  # noqa: S105  # what leaked tokens are found by, not a secret
TOKEN_DAYS_MAX = 3650


async def create(
    connection: AsyncConnection,
    project: str,
    name: str,
    role: Role,
    days: int,
    *,
    models: Sequence[str] = (),
    cohorts: Sequence[str] = (),
) -> str:
    """Store a new API token and return it; it is shown this once. `models` and `cohorts` narrow what it may change."""
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    now = now_us()
    await connection.execute(
        insert(ApiToken).values(
            token_hash=hash_secret(secret),
            project_id=project,
            name=name,
            role=role,
            models=list(models),
            cohorts=list(cohorts),
            expires_at=now + days * DAY_US,
            created_at=now,
        )
    )
    return secret
