"""TUF metadata over HTTP, for anybody: they are signed, so nothing here needs to be secret or trusted.

Versioned files never change and may be cached for ever; `timestamp.json` is asked for again and again, so it answers
304 by its digest. A snapshot of 256 bins is one line 256 times: who takes gzip gets a tenth of it.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
from typing import Annotated

from fastapi import APIRouter, Header, Response
from starlette.concurrency import run_in_threadpool

from wherry_server.auth import ServicesDep
from wherry_shared.errors import RefusedError

router = APIRouter(prefix="/tuf", tags=["tuf"])
FOREVER = "public, max-age=31536000, immutable"
PACKED_BYTES_MIN = 600
"""Smaller ones gain less than the words about it cost."""
PACKED_KEPT = 128


@router.get("/{project}/{name}", response_class=Response)
async def tuf_metadata(
    project: str,
    name: str,
    services: ServicesDep,
    if_none_match: Annotated[str, Header()] = "",
    accept_encoding: Annotated[str, Header()] = "",
) -> Response:
    """A metadata file: `timestamp.json` or `N.ROLE.json`."""
    if project != services.project:
        raise RefusedError("metadata_unknown", f"project {project[:80]!r} is not here")
    data = await run_in_threadpool(services.trust.metadata, name)
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache" if name == "timestamp.json" else FOREVER}
    if etag in {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}:
        return Response(status_code=304, headers=headers)
    if name != "timestamp.json" and len(data) >= PACKED_BYTES_MIN:
        headers["Vary"] = "Accept-Encoding"
        if "gzip" in accept_encoding and "gzip;q=0" not in accept_encoding.replace(" ", ""):
            headers |= {"Content-Encoding": "gzip", "ETag": f"W/{etag}"}
            return Response(_packed(data), media_type="application/json", headers=headers)
    return Response(data, media_type="application/json", headers=headers)


@functools.lru_cache(PACKED_KEPT)
def _packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
