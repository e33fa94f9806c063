"""Logging in and out: the way to the OpenID provider and back, and sessions."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from html import escape
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, oidc, sessions
from wherry_server.answers import GrantShown, LoggedIn, Me, SessionShown
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Admin, ServicesDep, Viewer
from wherry_server.services import Services
from wherry_server.settings import Oidc
from wherry_server.times import now_us
from wherry_shared.access import LOOPBACK
from wherry_shared.errors import RefusedError

router = APIRouter(tags=["access"], route_class=Again)
FORM_BYTES_MAX = 8_000
SESSION = (sessions.COOKIE, sessions.COOKIE_SECURE)
LOGIN = (sessions.LOGIN_COOKIE, sessions.LOGIN_COOKIE_SECURE)
_FOLLOWING = re.compile(r"/(?:[A-Za-z0-9._~-]+(?:/[A-Za-z0-9._~-]+)*/?)?")
_GONE: dict[int | str, dict[str, Any]] = {303: {"description": "See elsewhere"}}
PAGE_CSP = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
"""Of the page on which a person agrees. Without `form-action`: browsers apply that to where the form leads on to, too."""
PAGE_REFERRER = "same-origin"
"""Of that page. With `no-referrer`, as everywhere else, browsers send its form with `Origin: null` (Fetch, "append a request Origin
header"), which is refused."""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Wherry: command line</title>
<style>body{{font:1.1rem system-ui;max-width:34rem;margin:4rem auto;padding:0 1rem}}button{{font:inherit;padding:.4rem 1.2rem}}</style>
<h1>Let the command line act as you?</h1><p>You are <strong>{name}</strong>. A <code>wherry login</code> on this computer
(port {port}) asks to act as you for {hours:g} hours. If you did not start it, close this page.</p>
<form method="post" action="/auth/allow"><input type="hidden" name="ticket" value="{ticket}"><button>Allow</button></form></html>
"""


class CodeRequest(BaseModel):
    """What the command line was led back with, and the verifier of the challenge that it began with."""

    model_config = ConfigDict(extra="forbid")
    code: str = Field(max_length=128)
    verifier: str = Field(min_length=43, max_length=128)


def _settings(services: Services) -> Oidc:
    found = services.settings.oidc
    if found is None:
        raise RefusedError(
            "login_off",
            "people cannot log in here: no OpenID provider is set",
            next_step="set oidc in settings.json (docs/access.md), or use an API token",
        )
    return found


def _public_url(services: Services) -> str:
    return (_settings(services).public_url or services.settings.url).rstrip("/")


def _provider(request: Request, services: Services) -> oidc.Provider:
    """Return the provider as this application knows it."""
    settings, url = _settings(services), _public_url(services)
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise RefusedError(
            "login_insecure",
            f"{url} is not https: a session sent there could be read on the way",
            consequence="nobody can log in",
            next_step="serve the API by https and set oidc.public_url in settings.json",
        )
    found: oidc.Provider | None = getattr(request.app.state, "provider", None)
    if found is None:
        file = services.settings.keys_folder / "oidc.secret"
        secret = file.read_text().strip() if file.exists() else ""
        found = request.app.state.provider = oidc.Provider(settings, secret, f"{url}/auth/callback")
    return found


def _cookie(services: Services, names: tuple[str, str]) -> str:
    """Return the name of a cookie: the second of two over https."""
    return names[_public_url(services).startswith("https:")]


def _set_cookie(answer: Response, services: Services, names: tuple[str, str], value: str, seconds: int) -> None:
    """Give a browser a cookie; with 0 seconds take it away.

    Taking away says all that giving says: a browser obeys nothing else about a cookie whose name begins with `__Host-`.
    """
    answer.set_cookie(
        _cookie(services, names),
        value,
        max_age=seconds,
        path="/",
        secure=_public_url(services).startswith("https:"),
        httponly=True,
        samesite="lax",
    )


@router.get("/auth/login", status_code=303, response_class=RedirectResponse, responses=_GONE)
async def login(
    request: Request,
    services: ServicesDep,
    following: Annotated[str, Query(alias="next", max_length=400, description="a path of this server")] = "/api/v1/me",
    port: Annotated[int, Query(ge=0, le=65535, description="where a command line listens; 0: none")] = 0,
    challenge: Annotated[str, Query(max_length=128, description="S256 challenge of the command line")] = "",
) -> Response:
    """Begin to log in: leads to the OpenID provider."""
    provider = _provider(request, services)
    if _FOLLOWING.fullmatch(following) is None or bool(port) is not (len(challenge) == 43):
        raise RefusedError("login_refused", "next is no path of this server, or port and challenge do not go together")
    pending = oidc.Pending(
        state=secrets.token_urlsafe(32),
        nonce=secrets.token_urlsafe(32),
        verifier=secrets.token_urlsafe(48),
        ends_at=time.time() + oidc.LOGIN_S,
        following=following,
        port=port,
        challenge=challenge,
    )
    answer = RedirectResponse(await provider.begin(pending), 303)
    _set_cookie(answer, services, LOGIN, oidc.seal(services.master_key, pending), oidc.LOGIN_S)
    return answer


@router.get(
    "/auth/callback",
    status_code=303,
    response_class=RedirectResponse,
    responses={**_GONE, 200: {"description": "A page that asks", "content": {"text/html": {}}}},
)
async def login_callback(
    request: Request,
    services: ServicesDep,
    state: Annotated[str, Query(max_length=128)] = "",
    code: Annotated[str, Query(max_length=4_000)] = "",
    error: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """End a login with what the provider says."""
    provider = _provider(request, services)
    begun = request.cookies.get(_cookie(services, LOGIN), "")
    pending = oidc.unseal(services.master_key, begun, oidc.Pending)
    if (
        pending is None
        or pending.ends_at < time.time()
        or not hmac.compare_digest(pending.state.encode(), state.encode())
    ):
        raise oidc.refused("this browser has begun no such login, or too long ago")
    if error or not code:
        raise oidc.refused(f"the provider says {error[:80]!r}")
    person = await provider.end(pending, code)
    settings = _settings(services)
    if not sessions.granted(settings, person.groups):
        raise RefusedError(
            "login_without_role",
            f"{person.name!r} is in no group that was granted a role here",
            consequence="nobody is logged in",
            next_step="have an admin map one of the groups: oidc.groups in settings.json",
        )
    answer: Response
    if pending.port:
        agreed = oidc.Agreed(
            person.subject,
            person.name,
            list(person.groups),
            pending.port,
            pending.challenge,
            time.time() + oidc.LOGIN_S,
        )
        ticket = oidc.seal(services.master_key, agreed)
        answer = HTMLResponse(
            PAGE.format(name=escape(person.name), port=pending.port, hours=settings.session_hours, ticket=ticket),
            headers={
                "Content-Security-Policy": PAGE_CSP,
                "Referrer-Policy": PAGE_REFERRER,
                "Cache-Control": "no-store",
            },
        )
    else:
        ends_at = _ends_at(settings)
        async with services.database.write() as connection:
            secret = await sessions.create(
                connection, services.project, "browser", person.subject, person.name, person.groups, ends_at
            )
            await _record(connection, services, person.name, "browser", person.subject)
        answer = RedirectResponse(pending.following, 303)
        _set_cookie(answer, services, SESSION, secret, int(settings.session_hours * 3_600))
    _set_cookie(answer, services, LOGIN, "", 0)
    return answer


@router.post(
    "/auth/allow",
    status_code=303,
    response_class=RedirectResponse,
    responses=_GONE,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": {"type": "object"}}},
        }
    },
)
async def allow_command_line(request: Request, services: ServicesDep) -> Response:
    """Let the command line act as a person, who agreed to it on a page of this server."""
    body = await request.body()
    given = parse_qs(body.decode(errors="replace")) if len(body) <= FORM_BYTES_MAX else {}
    agreed = oidc.unseal(services.master_key, (given.get("ticket") or [""])[0], oidc.Agreed)
    origin = request.headers.get("origin", "")
    foreign = services.settings.oidc is not None and origin not in ("", _public_url(services))
    if agreed is None or agreed.ends_at < time.time() or foreign:
        raise oidc.refused("nobody agreed to this, or too long ago")
    ends_at = now_us() + sessions.CODE_S * 1_000_000
    async with services.database.write() as connection:
        code = await sessions.create(
            connection,
            services.project,
            "code",
            agreed.subject,
            agreed.name,
            agreed.groups,
            ends_at,
            challenge=agreed.challenge,
        )
    return RedirectResponse(f"http://127.0.0.1:{agreed.port}/?{urlencode({'code': code})}", 303)


@router.post("/auth/token")
async def fetch_session(body: CodeRequest, services: ServicesDep) -> LoggedIn:
    """Give the command line its session: for a code, once, and the verifier of its challenge."""
    settings = _settings(services)
    async with services.database.write() as connection:
        row = await sessions.find(connection, services.project, body.code, "code")
        good = row is not None and hmac.compare_digest(row.challenge, oidc.challenge_of(body.verifier))
        if row is None or not good or not await sessions.end(connection, services.project, row.session_hash):
            raise oidc.refused("this code is not good, or was used")
        ends_at = _ends_at(settings)
        secret = await sessions.create(connection, services.project, "cli", row.subject, row.name, row.groups, ends_at)
        await _record(connection, services, row.name, "cli", row.subject)
    return LoggedIn(token=secret, name=row.name, expires_at=ends_at)


@router.post("/auth/logout", status_code=204)
async def logout(response: Response, services: ServicesDep, who: Viewer) -> None:
    """End the session with which this is asked."""
    if who.kind != "person":
        raise RefusedError("not_logged_in", "an API token is no session", next_step="wherry token revoke ID ends it")
    async with services.database.write() as connection:
        await sessions.end(connection, services.project, who.id)
        await audit.append(connection, services.project, who.actor, "session.end", who.id[:12])
    _set_cookie(response, services, SESSION, "", 0)


@router.get("/api/v1/me")
async def show_me(services: ServicesDep, who: Viewer) -> Me:
    """Show who asks, what was granted to them, and for a browser the CSRF token that its changes need."""
    return Me(
        name=who.name,
        kind=who.kind,
        project=services.project,
        grants=[GrantShown(role=one.role, models=list(one.models), cohorts=list(one.cohorts)) for one in who.grants],
        csrf_token=who.csrf_token,
    )


@router.get("/api/v1/sessions")
async def list_sessions(services: ServicesDep, _admin: Admin, page: Paging) -> list[SessionShown]:
    """List who is logged in, the oldest session first."""
    async with services.database.read() as connection:
        rows = await sessions.every(connection, services.project)
    found = [
        SessionShown(
            id=row.session_hash[:12],
            name=row.name,
            subject=row.subject,
            kind=row.kind,
            groups=row.groups,
            created_at=row.created_at,
            expires_at=row.expires_at,
        )
        for row in rows
    ]
    return page.cut(found, lambda one: [one.created_at, one.id])


@router.delete("/api/v1/sessions/{session}", status_code=204)
async def revoke_session(session: str, services: ServicesDep, admin: Admin) -> None:
    """End somebody's session, by the id that the list shows; from then on it opens nothing."""
    async with services.database.write() as connection:
        rows = await sessions.every(connection, services.project)
        found = [row for row in rows if len(session) >= 12 and row.session_hash.startswith(session)]
        if len(found) != 1:
            raise RefusedError(
                "session_unknown", f"there is no session {session[:80]!r}", next_step="see wherry session list"
            )
        await sessions.end(connection, services.project, found[0].session_hash)
        before = {"name": found[0].name, "kind": found[0].kind}
        await audit.append(connection, services.project, admin.actor, "session.revoke", session[:12], before=before)


def _ends_at(settings: Oidc) -> int:
    return now_us() + int(settings.session_hours * sessions.HOUR_US)


async def _record(connection: AsyncConnection, services: Services, name: str, kind: str, subject: str) -> None:
    await audit.append(connection, services.project, f"person:{name}", "session.begin", kind, who=subject)
