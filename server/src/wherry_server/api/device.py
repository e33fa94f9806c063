"""What devices ask over HTTP: enrolment, renewal, blobs, logs. Messages and offers are in `messages`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security.utils import get_authorization_scheme_param

from wherry_server import content_keys, enrolment, fleet, ranges
from wherry_server.api.again import Again
from wherry_server.auth import CurrentDevice, ServicesDep
from wherry_server.broker_tokens import Issuer
from wherry_server.reading import Readers
from wherry_server.secrets_kept import hash_secret
from wherry_shared import frames, wire
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError
from wherry_shared.limits import LOG_LINES_MAX

router = APIRouter(prefix="/device/v1", tags=["device"], route_class=Again)

JSON = "application/json"
LOG_LINE_CHARS_MAX = 2000
IMMUTABLE = "private, max-age=31536000, immutable"
DigestPath = Annotated[str, Path(pattern="^sha256:[0-9a-f]{64}$")]


def _readers(request: Request) -> Readers:
    found: Readers = request.app.state.readers
    return found


def _json_body(description: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "description": description, "content": {JSON: {"schema": {}}}}}


@router.post("/enrol", openapi_extra=_json_body("EnrolRequest, see docs/formats/protocol.md"))
async def enrol(request: Request, services: ServicesDep) -> Response:
    """Make a device known: a token and a certificate request come in, its identity goes out."""
    answer = await enrolment.enrol(services, wire.parse(wire.EnrolRequest, await request.body()))
    return Response(wire.encode(answer), media_type=JSON)


@router.post("/renew", openapi_extra=_json_body("RenewRequest, see docs/formats/protocol.md"))
async def renew(request: Request, services: ServicesDep, device: CurrentDevice) -> Response:
    """Give the device that asks its next certificate."""
    answer = await enrolment.renew(services, device, wire.parse(wire.RenewRequest, await request.body()))
    return Response(wire.encode(answer), media_type=JSON)


@router.get("/retirement")
async def retirement(request: Request, services: ServicesDep) -> Response:
    """Tell a device that left the fleet what to remove, under the key that only it and this server have."""
    _, value = get_authorization_scheme_param(request.headers.get("authorization"))
    device, _, secret = value.partition(":")
    async with services.database.read() as connection:
        wipe = await fleet.wipe_of(connection, services.project, device[:64], hash_secret(secret))
    if not wipe:
        raise RefusedError("retirement_unknown", "no device of this secret has left the fleet with something to remove")
    order = wire.Retire(format=wire.FORMAT, device=device, wipe=wipe)  # type: ignore[arg-type]  # as the column has it
    frame = frames.seal(frames.device_key(services.master_key, device), "retire", device, wire.encode(order))
    return Response(frame, media_type="application/octet-stream")


@router.post("/broker-token")
async def broker_token(services: ServicesDep, device: CurrentDevice) -> Response:
    """Give the device that asks its password for a broker that checks tokens."""
    token = Issuer.ensure(services.settings.keys_folder, services.project).issue(device.id)
    answer = wire.BrokerToken(format=wire.FORMAT, token=token.text, expires_at=token.expires_at)
    return Response(wire.encode(answer), media_type=JSON)


@router.api_route("/blobs/{digest}", methods=["GET"], responses={206: {}, 304: {}, 307: {}, 416: {}})
async def get_blob(digest: DigestPath, request: Request, services: ServicesDep, device: CurrentDevice) -> Response:
    """Send a blob of a bundle that the device was given, whole or one range of it, or where to fetch it for a while."""
    async with services.database.read() as connection:
        size = await _readers(request).size(connection, device, check_digest(digest))
    etag = f'"{digest}"'
    answer = ranges.answer(size, etag, request.headers)
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": IMMUTABLE}
    if answer.status == 304:
        return Response(status_code=304, headers=headers)
    if answer.status == 416:
        headers["Content-Range"] = f"bytes */{size}"
        return Response(status_code=416, headers=headers)
    address = await services.blobs.address(digest, services.settings.presign_s) if services.settings.presign_s else None
    if address is not None:
        # never kept: whoever repeats the request gets an address of its own
        return Response(status_code=307, headers={"Location": address, "Cache-Control": "no-store"})
    if answer.status == 206:
        headers["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{size}"
    headers["Content-Length"] = str(answer.length)
    return StreamingResponse(
        await _begun(services.blobs.read(digest, answer.start, answer.stop)),
        status_code=answer.status,
        headers=headers,
        media_type="application/octet-stream",
    )


async def _begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Return a stream whose first piece is at hand: a store that does not answer is a problem, not a broken body."""
    first = await anext(pieces, b"")

    async def whole() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return whole()


@router.get("/blobs/{digest}/info")
async def blob_info(digest: DigestPath, request: Request, services: ServicesDep, device: CurrentDevice) -> Response:
    """Tell length and encodings of a blob."""
    async with services.database.read() as connection:
        size, encodings = await _readers(request).info(connection, device, digest)
    info = wire.BlobInfo(
        digest=digest,
        bytes=size,
        encodings=[
            wire.Encoding(encoding="zstd", digest=encoded, bytes=length)
            for encoding, encoded, length in encodings
            if encoding == "zstd"
        ],
    )
    return Response(wire.encode(info), media_type=JSON)


@router.get("/keys/{digest}")
async def content_keys_of(
    digest: DigestPath, request: Request, services: ServicesDep, device: CurrentDevice
) -> Response:
    """Give the device that asks the content keys of a bundle that it was given: those wrapped for it, and no others."""
    async with services.database.read() as connection:
        await _readers(request).size(connection, device, digest)
        found = await content_keys.of_device(connection, device, digest)
    return Response(wire.encode(found), media_type=JSON, headers={"Cache-Control": "no-store"})


@router.post("/logs", status_code=204, openapi_extra=_json_body("list of lines"))
async def send_logs(request: Request, services: ServicesDep, device: CurrentDevice) -> None:
    """Take the last log lines, after an acknowledgement asked for them."""
    try:
        lines = msgspec.json.decode(await request.body(), type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError("message_invalid", f"not a JSON list of lines: {error}") from error
    kept = [line[:LOG_LINE_CHARS_MAX] for line in lines[-LOG_LINES_MAX:]]
    async with services.database.write() as connection:
        await fleet.store_logs(connection, device.project, device.id, kept)
