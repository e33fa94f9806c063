"""Who asks: people and machines by what was granted to them, devices by their own bearer secret.

Secrets are random and long, so their SHA-256 is stored and looked up; nothing that the database holds opens a door.
What a role may and how far a grant reaches is in `grants`; here a route says what it needs, and a route that says nothing
keeps the server from starting (`access`).
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import peer, revocation, sessions
from wherry_server.db.tables import ApiToken, Device, table
from wherry_server.grants import Grant, Permission, Subject, roles_with
from wherry_server.rates import KNOWN, READING, Rates
from wherry_server.secrets_kept import hash_secret
from wherry_server.services import Services
from wherry_server.times import DAY_US, now_us
from wherry_shared.errors import RefusedError
from wherry_shared.ids import is_device_id

RENEW_PATH = "/device/v1/renew"
_tokens = table(ApiToken)
_devices = table(Device)


@dataclass(frozen=True, slots=True)
class Identity:
    """A person or machine that operates."""

    name: str
    grants: tuple[Grant, ...]
    project: str
    id: str
    """Of the token or session: its hash."""
    kind: str = "token"
    """`token` or `person`"""
    csrf_token: str = ""
    """That a change needs beside the cookie; empty where there is no cookie."""

    @property
    def actor(self) -> str:
        """Who it is in the audit log."""
        return f"{self.kind}:{self.name}"

    def has(self, permission: Permission, *, scoped: bool) -> bool:
        """Tell whether it may do something: everywhere, or with `scoped` at least somewhere."""
        return any(grant.allows(permission) and (scoped or grant.everywhere) for grant in self.grants)

    def check(self, permission: Permission, subject: Subject) -> None:
        """Let pass what a grant reaches.

        Raises:
            RefusedError: `scope_missing`.
        """
        if not any(grant.allows(permission) and grant.covers(subject) for grant in self.grants):
            raise RefusedError(
                "scope_missing",
                f"what was granted to {self.name!r} does not reach {subject.said()}",
                consequence="nothing was done",
                next_step="ask somebody whose role reaches it, or an admin for a wider grant",
            )


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """An enrolled device: the authenticated principal, never what a message claims."""

    id: str
    name: str
    project: str


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
    """Return who holds the API token or the session of a request.

    Raises:
        RefusedError: `unauthenticated`, `token_expired` or `csrf_missing`.
        TooManyError: `rate_limited`.
    """
    known: Identity | None = getattr(request.state, "identity", None)
    if known is not None:
        return known
    cookie = _session_cookie(request, services)
    if cookie:
        found = await _person(services, cookie, "browser")
        _check_csrf(request, services, found)
    else:
        secret = _bearer(request)
        if secret.startswith(sessions.PREFIX):
            found = await _person(services, secret, "cli")
        else:
            found = await _token(services, secret)
    rates: Rates = request.app.state.rates
    setattr(request.state, KNOWN, True)
    rates.take(found.id, request.method)
    request.state.identity = found
    return found


def _session_cookie(request: Request, services: Services) -> str:
    """Return the session that a browser sent; whoever says who asks in words means that."""
    if services.settings.oidc is None or "authorization" in request.headers:
        return ""
    secure = (services.settings.oidc.public_url or services.settings.url).startswith("https:")
    return request.cookies.get(sessions.COOKIE_SECURE if secure else sessions.COOKIE, "")


def _check_csrf(request: Request, services: Services, person: Identity) -> None:
    """Refuse a change that a foreign page may have had the browser ask for.

    Raises:
        RefusedError: `csrf_missing`.
    """
    if request.method in READING:
        return
    given = request.headers.get(sessions.CSRF_HEADER, "")
    oidc = services.settings.oidc
    own = ("", ((oidc.public_url if oidc else "") or services.settings.url).rstrip("/"))
    if (
        not hmac.compare_digest(given.encode(), person.csrf_token.encode())
        or request.headers.get("origin", "") not in own
    ):
        raise RefusedError(
            "csrf_missing",
            "a change by a browser needs the header X-CSRF-Token, and comes from a page of this server",
            consequence="nothing was done",
            next_step="read csrf_token of GET /api/v1/me and send it along",
        )


async def _person(services: Services, secret: str, kind: sessions.Kind) -> Identity:
    async with services.database.read() as connection:
        row = await sessions.find(connection, services.project, secret, kind)
    if row is None:
        raise RefusedError(
            "unauthenticated",
            "this session is not known here, or has ended",
            consequence="nothing was done",
            next_step="log in again: wherry login, or /auth/login in a browser",
        )
    return Identity(
        name=row.name,
        grants=sessions.granted(services.settings.oidc, row.groups),
        project=services.project,
        id=row.session_hash,
        kind="person",
        csrf_token=sessions.csrf_token(secret) if kind == "browser" else "",
    )


async def _token(services: Services, secret: str) -> Identity:
    hashed = hash_secret(secret)
    async with services.database.read() as connection:
        row = (
            await connection.execute(
                select(_tokens.c.name, _tokens.c.role, _tokens.c.models, _tokens.c.cohorts, _tokens.c.expires_at).where(
                    _tokens.c.token_hash == hashed, _tokens.c.project_id == services.project
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
    grant = Grant(role=row.role, models=tuple(row.models), cohorts=tuple(row.cohorts))
    return Identity(name=row.name, grants=(grant,), project=services.project, id=hashed)


async def still_good(connection: AsyncConnection, identity: Identity) -> bool:
    """Tell whether the token or session that opened something lasting was neither revoked nor has ended."""
    if identity.kind == "person":
        return await sessions.lasts(connection, identity.project, identity.id)
    wanted = select(_tokens.c.token_hash).where(
        _tokens.c.token_hash == identity.id, _tokens.c.project_id == identity.project, _tokens.c.expires_at > now_us()
    )
    return await connection.scalar(wanted) is not None


class Need:
    """A dependency that lets pass whom a permission was granted.

    Args:
        permission: what the route does.
        scoped: whether a grant with a scope is enough; the handler then asks `Identity.check` about what is touched.
    """

    def __init__(self, permission: Permission, *, scoped: bool = False) -> None:
        self.permission = permission
        self.scoped = scoped

    async def __call__(self, identity: Annotated[Identity, Depends(identify)]) -> Identity:
        """Return who asks.

        Raises:
            RefusedError: `role_missing` or `scope_missing`.
        """
        if identity.has(self.permission, scoped=self.scoped):
            return identity
        if identity.has(self.permission, scoped=True):
            identity.check(self.permission, Subject.everything())
        roles = " or ".join(roles_with(self.permission))
        raise RefusedError(
            "role_missing",
            f"{identity.name!r} is {', '.join(grant.role for grant in identity.grants) or 'nobody'}, this needs {roles}",
            consequence="nothing was done",
            next_step=f"use a token with the role {roles}",
        )


Viewer = Annotated[Identity, Depends(Need("read", scoped=True))]
Operator = Annotated[Identity, Depends(Need("operate"))]
ScopedOperator = Annotated[Identity, Depends(Need("operate", scoped=True))]
ScopedApprover = Annotated[Identity, Depends(Need("approve", scoped=True))]
Publisher = Annotated[Identity, Depends(Need("publish"))]
ScopedPublisher = Annotated[Identity, Depends(Need("publish", scoped=True))]
Admin = Annotated[Identity, Depends(Need("administer"))]


async def identify_device(request: Request, services: ServicesDep) -> DeviceIdentity:
    """Return the device that `Authorization: Bearer DEVICE:SECRET` proves, or its certificate, or both.

    Raises:
        RefusedError: `unauthenticated`, `device_revoked`, `certificate_invalid`, `certificate_missing` or `certificate_lapsed`.
        TooManyError: `rate_limited`.
    """
    rule = services.settings.device_certificates
    shown = peer.certificate(request, services) if rule != "off" else None
    device, secret = shown.device if shown is not None else "", ""
    if shown is None or "authorization" in request.headers:
        device, _, secret = _bearer(request).partition(":")
    row = None
    if is_device_id(device):
        async with services.database.read() as connection:
            row = (
                await connection.execute(
                    select(
                        _devices.c.name,
                        _devices.c.bearer_hash,
                        _devices.c.state,
                        _devices.c.state_reason,
                        _devices.c.certificate_expires_at,
                    ).where(_devices.c.id == device, _devices.c.project_id == services.project)
                )
            ).one_or_none()
            revoked = shown is not None and await revocation.is_revoked(connection, shown.serial, shown.device)
    known = row is not None and (
        (shown is not None and not secret) or hmac.compare_digest(row.bearer_hash, hash_secret(secret))
    )
    if row is None or not known or (shown is not None and shown.device != device):
        raise RefusedError(
            "unauthenticated",
            "no device of this server has this secret",
            consequence="nothing was done",
            next_step="enrol the device again",
        )
    if row.state != "active" or revoked:
        raise RefusedError(
            "device_revoked",
            f"device {row.name!r} is {row.state}{f' ({row.state_reason})' if row.state_reason else ''}",
            consequence="it gets nothing more from this server",
            next_step="enrol it again with a new token",
        )
    now = now_us()
    if row.certificate_expires_at + services.settings.certificate_grace_days * DAY_US < now:
        raise RefusedError(
            "certificate_lapsed",
            f"the certificate of device {row.name!r} expired too long ago to be renewed without a person",
            consequence="it gets nothing from this server",
            next_step=f"if the device is still in good hands: wherry device readmit {row.name}",
        )
    renews_late = request.url.path == RENEW_PATH and row.certificate_expires_at < now
    if rule == "required" and shown is None and not renews_late:
        raise RefusedError(
            "certificate_missing",
            f"device {row.name!r} has to show its certificate here",
            consequence="nothing was done",
            next_step="connect by HTTPS with the certificate and key of its identity",
        )
    rates: Rates = request.app.state.rates
    setattr(request.state, KNOWN, True)
    rates.count("device_requests_per_s", device)
    return DeviceIdentity(id=device, name=row.name, project=services.project)


CurrentDevice = Annotated[DeviceIdentity, Depends(identify_device)]
