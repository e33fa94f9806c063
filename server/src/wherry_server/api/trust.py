"""Publishing: who may publish what, and the signed bins in which publishers say so.

The server keeps and checks what publishers sign and never signs for them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from wherry_server import audit
from wherry_server.api.again import Again
from wherry_server.auth import Admin, Identity, Publisher, ScopedPublisher, ServicesDep, Viewer
from wherry_server.services import Services
from wherry_server.trust_offline import MODELS_MAX
from wherry_shared.errors import RefusedError
from wherry_shared.limits import TUF_METADATA_BYTES_MAX

router = APIRouter(prefix="/api/v1/trust", tags=["trust"], route_class=Again)
_ETAG = re.compile(r'"(0|[1-9][0-9]{0,14})"')
KEYS_MAX = 16
ROOTS_MAX = 64
"""As many as a device follows at once."""


class NewPublisher(BaseModel):
    """Whom to trust for which models."""

    name: str
    public_key_pem: str = ""
    public_keys_pem: list[str] = Field(default=[], max_length=KEYS_MAX)
    """Several keys, with a threshold."""
    threshold: int = 1
    models: list[str] = Field(min_length=1, max_length=MODELS_MAX)


@router.get("")
async def trust_state(services: ServicesDep, _who: Viewer) -> dict[str, Any]:
    """Roles, versions, publishers and their bins, the director's key id."""
    return await run_in_threadpool(services.trust.public_state)


@router.post("/publishers")
async def add_publisher(body: NewPublisher, services: ServicesDep, who: Admin) -> dict[str, Any]:
    """Delegate models to a publisher; where the targets key is offline this needs a ceremony."""
    pems = [*body.public_keys_pem, *([body.public_key_pem] if body.public_key_pem else [])]
    publisher = await run_in_threadpool(
        services.trust.add_publisher, body.name, pems, body.models, threshold=body.threshold
    )
    await _record(services, who, "publisher.add", publisher.name, models=body.models, keys=list(publisher.keyids))
    return {
        "name": publisher.name,
        "models": list(publisher.models),
        "threshold": publisher.threshold,
        "keyids": list(publisher.keyids),
        "bits": publisher.bits,
    }


class Offline(BaseModel):
    """What a ceremony signed: metadata files as text, byte for byte."""

    roots: list[str] = Field(default=[], max_length=ROOTS_MAX)
    """From the first root on; those that are here already may be left out."""
    targets: str = Field(default="", max_length=TUF_METADATA_BYTES_MAX)


@router.get("/offline")
async def offline_metadata(services: ServicesDep, _who: Viewer) -> dict[str, Any]:
    """Every root from the first, and the targets metadata: what a ceremony begins from."""
    roots, targets = await run_in_threadpool(services.trust.offline)
    return {"roots": [root.decode() for root in roots], "targets": targets.decode()}


@router.put("/offline")
async def put_offline(body: Offline, services: ServicesDep, who: Admin) -> dict[str, int]:
    """Take roots and targets that a ceremony signed, all of it or nothing; again it changes nothing."""
    roots = [root.encode() for root in body.roots]
    targets = body.targets.encode() if body.targets else None
    now = await run_in_threadpool(services.trust.accept_offline, roots, targets)
    await _record(services, who, "trust.offline", "root", **now)
    return now


@router.get("/bins", response_class=Response)
async def bin_of_target(target: str, services: ServicesDep, _who: Viewer) -> Response:
    """The bin into which MODEL/VERSION falls; empty at version 0 if nobody signed it yet."""
    return _answer(*await run_in_threadpool(services.trust.bin_for, target))


@router.get("/bins/{role}", response_class=Response)
async def bin_by_role(role: str, services: ServicesDep, _who: Viewer) -> Response:
    """The current bytes of a bin or publisher role."""
    return _answer(*await run_in_threadpool(services.trust.role_bytes, role))


@router.put("/bins/{role}")
async def put_bin(
    role: str,
    request: Request,
    response: Response,
    services: ServicesDep,
    who: ScopedPublisher,
    if_match: Annotated[str, Header()] = "",
) -> dict[str, Any]:
    """Replace a bin or publisher role by its next version, signed by its publisher; whose key it is decides about models."""
    expected = _ETAG.fullmatch(if_match)
    if expected is None:
        raise RefusedError(
            "precondition_missing",
            "If-Match with the version that this replaces is required",
            next_step='send If-Match: "VERSION", "0" for the first',
        )
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > TUF_METADATA_BYTES_MAX:
            raise RefusedError("metadata_too_large", f"more than {TUF_METADATA_BYTES_MAX} bytes")
    state = await run_in_threadpool(services.trust.accept_bin, role, bytes(data), int(expected[1]))
    await _record(services, who, "bin.put", role, replaces=int(expected[1]), state=state)
    if state == "proposed":
        response.status_code = 202
    return {"role": role, "state": state}


@router.get("/proposals/{role}", response_class=Response)
async def proposal(role: str, services: ServicesDep, _who: Viewer) -> Response:
    """What stands as proposed for a bin until enough publishers signed it."""
    return Response(await run_in_threadpool(services.trust.proposal, role), media_type="application/json")


@router.delete("/proposals/{role}", status_code=204)
async def withdraw_proposal(role: str, services: ServicesDep, who: Publisher) -> None:
    """Drop a proposal, so that another can be made."""
    await run_in_threadpool(services.trust.withdraw, role)
    await _record(services, who, "bin.withdraw", role)


async def _record(services: Services, who: Identity, action: str, subject: str, **details: Any) -> None:
    """Write into the audit chain what happened to trust; the metadata themselves are create-only and say it too."""
    async with services.database.write() as connection:
        await audit.append(connection, services.project, who.actor, action, subject, **details)


def _answer(role: str, version: int, data: bytes) -> Response:
    return Response(data, media_type="application/json", headers={"ETag": f'"{version}"', "Wherry-Role": role})
