"""Whether this process can answer: no token needed, nothing about the fleet told."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import text

from wherry_server import __version__
from wherry_server.answers import Health
from wherry_server.auth import ServicesDep

router = APIRouter(prefix="/api/v1", tags=["server"])


@router.get("/health")
async def health(services: ServicesDep) -> Health:
    """Tell whether the server and its database answer."""
    async with services.database.read() as connection:
        await connection.execute(text("SELECT 1"))
    return Health(status="ok", version=__version__, project=services.project)
