"""What devices say and ask over HTTP: the fall-back for MQTT, with the same frames and the same `Ingest`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from wherry_server import offers
from wherry_server.api.again import Again
from wherry_server.auth import CurrentDevice, DeviceIdentity, ServicesDep
from wherry_server.ingest import Ingest, Kind
from wherry_server.services import Services
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError
from wherry_shared.limits import STREAM_IN_FLIGHT_MAX

router = APIRouter(prefix="/device/v1", tags=["device"], route_class=Again)
FRAMES = "application/vnd.wherry.frames"


def _frames_body(description: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "description": description, "content": {FRAMES: {"schema": {}}}}}


@router.post("/hello", status_code=204, openapi_extra=_frames_body("frame of Hello"))
async def hello(request: Request, services: ServicesDep, device: CurrentDevice) -> None:
    """Take what a device says on connect; the director answers with an offer if the device is behind."""
    await _store(request, services, device, "hello", 1)


@router.get("/offer", responses={204: {}, 304: {}})
async def offer(request: Request, services: ServicesDep, device: CurrentDevice) -> Response:
    """Send the current signed offer; 204 if there is none or it has expired."""
    async with services.database.read() as connection:
        row = await offers.stored(connection, device.id)
    if row is None or row.expires_at <= now_us():
        return Response(status_code=204)
    etag = f'"{row.epoch}-{row.serial}"'
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag in known:
        return Response(status_code=304, headers=headers)
    return Response(bytes(row.envelope), media_type="application/json", headers=headers)


@router.post("/reports", openapi_extra=_frames_body("frames of Report, one per line"))
async def reports(request: Request, services: ServicesDep, device: CurrentDevice) -> PlainTextResponse:
    """Store reports and acknowledge them: `Ack` frames, one per line."""
    return await _store(request, services, device, "report", STREAM_IN_FLIGHT_MAX)


@router.post("/telemetry", openapi_extra=_frames_body("frames of Telemetry, one per line"))
async def telemetry(request: Request, services: ServicesDep, device: CurrentDevice) -> PlainTextResponse:
    """Store measurements and acknowledge them: `Ack` frames, one per line."""
    return await _store(request, services, device, "telemetry", STREAM_IN_FLIGHT_MAX)


async def _store(
    request: Request, services: Services, device: DeviceIdentity, kind: Kind, frames_max: int
) -> PlainTextResponse:
    """Store the frames of a body. The device is the authenticated one; a frame of another is refused.

    Raises:
        RefusedError: `too_many_frames`, or `frames_refused` if none of them could be stored.
    """
    received = [line for line in (await request.body()).split(b"\n") if line]
    if not 1 <= len(received) <= frames_max:
        raise RefusedError("too_many_frames", f"{len(received)} frames, expected 1 to {frames_max}")
    ingest = _ingest(request, services)
    result = await ingest.store_batch({kind: [(device.id, frame) for frame in received]})
    if not result.acks and not result.hellos:
        raise RefusedError(
            "frames_refused",
            f"none of the {kind} frames is a whole, authentic message of {device.id}",
            consequence="nothing was stored",
            next_step="see the counts of refused messages in the log of the server",
        )
    return PlainTextResponse(b"\n".join(frame for _, frame in result.acks), media_type=FRAMES)


def _ingest(request: Request, services: Services) -> Ingest:
    """Return the one `Ingest` of this application."""
    found: Ingest | None = getattr(request.app.state, "ingest", None)
    if found is None:
        found = request.app.state.ingest = Ingest(services.database, services.master_key, services.project)
    return found
