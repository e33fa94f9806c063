"""Whether this process can answer: no token needed, nothing about the fleet told."""

from __future__ import annotations

from fastapi import APIRouter, Request
from sqlalchemy import text

from wherry_server import __version__
from wherry_server.answers import Health
from wherry_server.auth import ServicesDep
from wherry_server.pulse import OK, Pulse

router = APIRouter(prefix="/api/v1", tags=["server"])


@router.get("/health")
async def health(request: Request, services: ServicesDep) -> Health:
    """Tell whether the server, its database and what keeps its blobs answer.

    Without blobs it is degraded and not gone: offers, reports and telemetry need none.
    """
    async with services.database.read() as connection:
        await connection.execute(text("SELECT 1"))
    pulse: Pulse = request.app.state.pulse
    blobs = await pulse.feel()
    return Health(
        status="ok" if blobs == OK else "degraded", version=__version__, project=services.project, blobs=blobs
    )
