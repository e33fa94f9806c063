"""Who asks: people and machines by API token and role, devices by their own bearer secret.

Secrets are random and long, so their SHA-256 is stored and looked up; nothing that the database holds opens a door.
Roles are a ladder: each may do what those below it may.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from fastapi import Depends, Request
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db.tables import ApiToken, Device, table
from wherry_server.rates import Rates
from wherry_server.services import Services
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError
from wherry_shared.ids import is_device_id

Role = Literal["viewer", "operator", "publisher", "admin"]
"""Ascending: read; operate rollouts and devices; also publish bundles; also tokens, publishers and settings."""
RANK: dict[str, int] = {role: rank for rank, role in enumerate(get_args(Role))}
TOKEN_PREFIX = "wherryapi_"  # noqa: S105  # what leaked tokens are found by, not a secret
TOKEN_DAYS_MAX = 3650
DAY_US = 86_400 * 1_000_000

_tokens = table(ApiToken)
_devices = table(Device)


@dataclass(frozen=True, slots=True)
class Identity:
    """A person or machine that operates."""

    name: str
    role: Role
    project: str
    id: str
    """Of the token: its hash."""


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """An enrolled device: the authenticated principal, never what a message claims."""

    id: str
    name: str
    project: str


def hash_secret(secret: str) -> str:
    """Return what is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


async def create_token(connection: AsyncConnection, project: str, name: str, role: Role, days: int) -> str:
    """Store a new API token and return it; it is shown this once."""
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    now = now_us()
    await connection.execute(
        insert(ApiToken).values(
            token_hash=hash_secret(secret),
            project_id=project,
            name=name,
            role=role,
            expires_at=now + days * DAY_US,
            created_at=now,
        )
    )
    return secret


def get_services(request: Request) -> Services:
    """The open services of this process."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


def _bearer(request: Request) -> str:
    scheme, value = get_authorization_scheme_param(request.headers.get("authorization"))
    if scheme.lower() != "bearer" or not value:
        raise RefusedError(
            "unauthenticated",
            "no bearer token",
            consequence="nothing was done",
            next_step="send Authorization: Bearer TOKEN (wherry --token, or WHERRY_TOKEN)",
        )
    return value


async def identify(request: Request, services: ServicesDep) -> Identity:
    """Return who holds the API token of a request.

    Raises:
        RefusedError: `unauthenticated` or `token_expired`.
        TooManyError: `rate_limited`.
    """
    known: Identity | None = getattr(request.state, "identity", None)
    if known is not None:
        return known
    secret = _bearer(request)
    async with services.database.read() as connection:
        row = (
            await connection.execute(
                select(_tokens.c.name, _tokens.c.role, _tokens.c.expires_at).where(
                    _tokens.c.token_hash == hash_secret(secret), _tokens.c.project_id == services.project
                )
            )
        ).one_or_none()
    if row is None:
        raise RefusedError(
            "unauthenticated",
            "this token is not known here",
            consequence="nothing was done",
            next_step="use a token of this server: wherry token api NAME, or client.json of its data folder",
        )
    if row.expires_at <= now_us():
        raise RefusedError(
            "token_expired",
            f"the token {row.name!r} has expired",
            consequence="nothing was done",
            next_step="have an admin make a new one: wherry token api NAME",
        )
    hashed = hash_secret(secret)
    rates: Rates = request.app.state.rates
    rates.take(hashed, request.method)
    request.state.identity = Identity(name=row.name, role=row.role, project=services.project, id=hashed)
    return request.state.identity  # type: ignore[no-any-return]  # just set


def require(role: Role) -> Callable[[Identity], Awaitable[Identity]]:
    """Return a dependency that lets `role` and those above pass: `Annotated[Identity, Depends(require("operator"))]`."""

    async def check(identity: Annotated[Identity, Depends(identify)]) -> Identity:
        if RANK[identity.role] < RANK[role]:
            raise RefusedError(
                "role_missing",
                f"{identity.name!r} is {identity.role}, this needs {role}",
                consequence="nothing was done",
                next_step=f"use a token with the role {role}",
            )
        return identity

    return check


Viewer = Annotated[Identity, Depends(require("viewer"))]
Operator = Annotated[Identity, Depends(require("operator"))]
Publisher = Annotated[Identity, Depends(require("publisher"))]
Admin = Annotated[Identity, Depends(require("admin"))]


async def identify_device(request: Request, services: ServicesDep) -> DeviceIdentity:
    """Return the device that `Authorization: Bearer DEVICE:SECRET` proves.

    Raises:
        RefusedError: `unauthenticated` or `device_revoked`.
    """
    device, _, secret = _bearer(request).partition(":")
    row = None
    if is_device_id(device):
        async with services.database.read() as connection:
            row = (
                await connection.execute(
                    select(_devices.c.name, _devices.c.bearer_hash, _devices.c.state).where(
                        _devices.c.id == device, _devices.c.project_id == services.project
                    )
                )
            ).one_or_none()
    if row is None or not hmac.compare_digest(row.bearer_hash, hash_secret(secret)):
        raise RefusedError(
            "unauthenticated",
            "no device of this server has this secret",
            consequence="nothing was done",
            next_step="enrol the device again",
        )
    if row.state != "active":
        raise RefusedError(
            "device_revoked",
            f"device {row.name!r} is {row.state}",
            consequence="it gets nothing more from this server",
            next_step="enrol it again with a new token",
        )
    return DeviceIdentity(id=device, name=row.name, project=services.project)


CurrentDevice = Annotated[DeviceIdentity, Depends(identify_device)]
