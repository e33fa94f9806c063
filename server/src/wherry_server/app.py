"""The API as one ASGI application: routers, problems, limits, and the services they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute

from wherry_server import __version__, access, problems
from wherry_server.api import (
    audit,
    blobs,
    bundles,
    cohorts,
    description,
    device,
    devices,
    events,
    flags,
    health,
    install,
    login,
    messages,
    quarantine,
    queries,
    rollouts,
    tokens,
    trust,
    tuf,
    webhooks,
)
from wherry_server.border import DOCS, Asgi, Headers, Message, Receive, Scope, Send, Strangers
from wherry_server.encodings import Encoder
from wherry_server.pulse import Pulse
from wherry_server.rates import Rates
from wherry_server.reading import Readers
from wherry_server.services import Services
from wherry_shared.errors import RefusedError
from wherry_shared.limits import BLOB_BYTES_MAX, MIB

ROUTERS = (
    bundles,
    blobs,
    trust,
    devices,
    cohorts,
    rollouts,
    flags,
    quarantine,
    events,
    webhooks,
    tokens,
    login,
    audit,
    health,
    device,
    messages,
    tuf,
    install,
)
"""In the order in which the description of the API shows them."""
BODY_BYTES_MAX = 4 * MIB
"""Any request body but a blob: room for TUF metadata (2 MiB) and for twenty frames of 100 KB."""


class BodyLimit:
    """Refuses a body at its first byte too many, declared or not."""

    def __init__(self, app: Asgi) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = scope["method"] == "PUT" and scope["path"].startswith("/api/v1/blobs/")
        limit = BLOB_BYTES_MAX if upload else BODY_BYTES_MAX
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > limit:
            await problems.problem(_too_large(limit))(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, counted, send)


def _too_large(limit: int) -> RefusedError:
    return RefusedError("body_too_large", f"the body has more than {limit} bytes", consequence="nothing was done")


def _operation_id(route: APIRoute) -> str:
    return route.name


def create_app(services: Services) -> FastAPI:
    """Return the application over open services, which it closes at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if services.settings.encode_blobs:
            app.state.encoder = Encoder(services.database, services.blobs, services.project)
            await app.state.encoder.start()
        try:
            yield
        finally:
            if app.state.encoder is not None:
                await app.state.encoder.close()
            await services.close()

    # the scripts of these pages come from elsewhere: not where browsers are let in
    docs_url, redoc_url = (None, None) if services.settings.oidc else DOCS
    app = FastAPI(
        title="Wherry",
        version=__version__,
        summary="Carries machine-learning models to fleets of edge devices: small, signed, staged, reversible.",
        lifespan=lifespan,
        dependencies=[Depends(queries.check)],
        docs_url=docs_url,
        redoc_url=redoc_url,
        generate_unique_id_function=_operation_id,
        responses={"4XX": {"description": "Problem", "content": {problems.MEDIA_TYPE: {"schema": problems.SCHEMA}}}},
    )
    app.state.services = services
    settings = services.settings
    app.state.rates = Rates(
        settings.api_reads_per_s,
        settings.api_changes_per_s,
        device_requests_per_s=settings.device_requests_per_s,
        public_per_s=settings.public_per_s,
        refused_per_s=settings.refused_per_s,
    )
    app.state.streams = []
    app.state.encoder = None
    app.state.readers = Readers(services.blobs)
    app.state.pulse = Pulse(services.blobs)
    problems.install(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(Strangers, rates=app.state.rates)
    app.add_middleware(Headers, https=settings.oidc is not None and settings.oidc.public_url.startswith("https:"))
    access.operations(module.router for module in ROUTERS)
    for module in ROUTERS:
        app.include_router(module.router)
    description.install(app)
    return app
