"""The outermost layers of the API: what every answer says to browsers, and how much one address may ask before it is known.

Whoever is known is counted by token, session or device (`rates`). Here addresses are counted: what they ask of the operations that need
nobody to be known, and how often they are not let in. An address that was refused too often is told to wait before anything is looked
up; whom it let in before is still let in, so that one bad device does not shut out those that share its address.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from wherry_server import problems
from wherry_server.rates import KNOWN, Rates, TooManyError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

HSTS = (b"strict-transport-security", b"max-age=31536000; includeSubDomains")
DOCS_CSP = (
    b"default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net;"
    b" img-src data: https://fastapi.tiangolo.com; connect-src 'self'; frame-ancestors 'none'"
)
"""Of the page that shows the description: it is there only where people do not log in, since its scripts come from elsewhere."""
DOCS = ("/docs", "/redoc")
PUBLIC = (
    "/auth/",
    "/device/v1/enrol",
    "/device/v1/retirement",
    "/install/",
    "/tuf/",
    "/api/v1/health",
    "/openapi.json",
    *DOCS,
)
"""Where nobody needs to be known."""
REFUSED_AT = frozenset({"/device/v1/enrol", "/auth/token", "/auth/callback", "/auth/allow"})
"""Where a 403 is a refusal of a secret."""
UNASKED = frozenset({400, 404, 405, 413, 422})
"""How a request ends before anybody asks who sent it: no such path, a body that is none."""
KNOWN_MAX = 10_000
"""Credentials that were good here lately, as hashes."""


class Headers:
    """Says to browsers what they may do with an answer, unless the answer says it itself."""

    def __init__(self, app: Asgi, *, https: bool) -> None:
        self._app = app
        self._https = https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        common = [(name.lower().encode(), value.encode()) for name, value in problems.HEADERS.items()]
        if scope["path"].startswith(DOCS):
            common = [(name, DOCS_CSP if name == b"content-security-policy" else value) for name, value in common]
        if self._https or scope.get("scheme") == "https":
            common.append(HSTS)

        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message.get("headers", [])}
                message["headers"] = [*message.get("headers", []), *(one for one in common if one[0] not in there)]
            await send(message)

        await self._app(scope, receive, said)


class Strangers:
    """Counts what addresses ask before they are known, and how often they are refused."""

    def __init__(self, app: Asgi, *, rates: Rates) -> None:
        self._app = app
        self._rates = rates
        self._known: OrderedDict[bytes, None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or tell who asks too much to wait."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = str((scope.get("client") or ("",))[0])
        state = scope.setdefault("state", {})
        credential, public = _credential(scope), scope["path"].startswith(PUBLIC)
        try:
            if public:
                self._rates.count("public_per_s", address)
            if credential is None or credential not in self._known:
                self._rates.look("refused_per_s", address)
        except TooManyError as error:
            await problems.problem(error)(scope, receive, send)
            return

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                if state.get(KNOWN):
                    if credential is not None:
                        self._remember(credential)
                elif status == 401 or (status == 403 and scope["path"] in REFUSED_AT):
                    self._rates.spend("refused_per_s", address)
                    if credential is not None:
                        self._known.pop(credential, None)
                elif status in UNASKED and not public and credential not in self._known:
                    self._rates.spend("refused_per_s", address)
            await send(message)

        await self._app(scope, receive, seen)

    def _remember(self, credential: bytes) -> None:
        self._known[credential] = None
        self._known.move_to_end(credential)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)


def _credential(scope: Scope) -> bytes | None:
    """Return what stands for the credential of a request, None if it has none."""
    given = [value for name, value in scope["headers"] if name in (b"authorization", b"cookie")]
    return hashlib.sha256(b"\n".join(given)).digest() if given else None
