"""Uploading blobs. They are inert until a signed bundle names them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.requests import ClientDisconnect

from wherry_server import uploads
from wherry_server.answers import Uploaded
from wherry_server.auth import ScopedPublisher, ServicesDep, Viewer
from wherry_server.blobs import unknown
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError

router = APIRouter(prefix="/api/v1/blobs", tags=["bundles"])

SILENCE_S = 60.0
"""A sender that sends nothing for so long keeps others from uploading: few may at a time."""

Digest = Annotated[str, Path(pattern="^sha256:[0-9a-f]{64}$")]


async def body_chunks(request: Request) -> AsyncIterator[bytes]:
    """Yield the body as it arrives.

    Raises:
        RefusedError: `length_mismatch`, if the sender went away or stands still.
    """
    pieces = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(pieces, None)
        except (ClientDisconnect, TimeoutError) as error:
            raise RefusedError(
                "length_mismatch",
                "the upload was cut short" if isinstance(error, ClientDisconnect) else "the upload stood still",
                consequence="nothing of it was kept",
                next_step="upload it again",
            ) from error
        if chunk is None:
            return
        yield chunk


@router.put(
    "/{digest}",
    status_code=201,
    responses={200: {"model": Uploaded, "description": "It was here already"}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_blob(
    digest: Digest, request: Request, response: Response, services: ServicesDep, _publisher: ScopedPublisher
) -> Uploaded:
    """Store a blob, streamed; nothing is kept of one that does not have this digest."""
    declared = request.headers.get("content-length")
    length = int(declared) if declared is not None else None
    chunks = body_chunks(request)
    created = await services.blobs.put(digest, chunks, length=length)
    async for _ in chunks:  # not read if it was here; the sender may not read an answer before it has sent all
        pass
    response.status_code = 201 if created else 200
    return Uploaded(digest=digest, bytes=await services.blobs.size(digest) or 0)


@router.head("/{digest}", responses={404: {"description": "It is not here"}})
async def has_blob(digest: Digest, services: ServicesDep, _viewer: Viewer) -> Response:
    """Tell whether a blob is here, and how long it is."""
    async with services.database.read() as connection:
        here = await uploads.here(
            connection, services.blobs, [check_digest(digest)], services.settings.uploads_days, now_s=time.time()
        )
    if digest not in here:
        raise unknown(digest)
    return Response(headers={"Wherry-Bytes": str(here[digest].bytes), "ETag": f'"{digest}"'})
