"""Quarantine: where a bundle is not offered again, why, and letting it be offered once more."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from wherry_server import quarantine, scopes
from wherry_server.answers import KnownBad, Quarantined, Released, shaped
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging, check_text
from wherry_server.auth import Operator, ScopedOperator, ServicesDep, Viewer

router = APIRouter(prefix="/api/v1", tags=["quarantine"], route_class=Again)
Filter = Annotated[str, Query(max_length=128)]


class ReleaseWish(BaseModel):
    """A device, by id or name, and the model for which it is let out."""

    device: Annotated[str, Field(max_length=128)]
    model: Annotated[str, Field(max_length=64)]


class ClearWish(BaseModel):
    """A bundle and a hardware class, as the list names them."""

    manifest: Annotated[str, Field(max_length=128)]
    hardware_class: Annotated[str, Field(max_length=512)]


@router.get("/quarantine")
async def list_quarantine(
    services: ServicesDep, _viewer: Viewer, page: Paging, model: Filter = "", reason: Filter = "", device: Filter = ""
) -> list[Quarantined]:
    """List the devices in quarantine, with the reason."""
    after = page.behind(tuple[str, str, str]) or quarantine.FIRST
    for part in after:
        check_text(part)
    wanted = {"model": model, "reason": reason, "device": device}
    async with services.database.read() as connection:
        found = await quarantine.devices(connection, services.project, **wanted, after=after, limit=page.limit + 1)
    taken = page.full(found, lambda one: [one["device"], one["model"], one["manifest"]])
    return [shaped(Quarantined, one) for one in taken]


@router.post("/quarantine/release")
async def release_device(wish: ReleaseWish, services: ServicesDep, operator: ScopedOperator) -> Released:
    """Let a device out of quarantine; nothing is offered until a rollout does so."""
    async with services.database.read() as connection:
        operator.check("operate", await scopes.of_device(connection, operator, wish.device, frozenset({wish.model})))
    actor = operator.actor
    done = await quarantine.release(services.database, services.project, actor, wish.device, wish.model)
    return shaped(Released, done)


@router.get("/quarantine/hardware")
async def list_hardware(services: ServicesDep, _viewer: Viewer, page: Paging) -> list[KnownBad]:
    """List the bundles that are known to be bad, by hardware class."""
    async with services.database.read() as connection:
        found = await quarantine.hardware(connection, services.project)
    taken = page.cut(found, lambda one: [one["manifest"], one["hardware_class"]])
    return [shaped(KnownBad, one) for one in taken]


@router.post("/quarantine/hardware/clear", status_code=204)
async def clear_hardware(wish: ClearWish, services: ServicesDep, operator: Operator) -> None:
    """Forget that a bundle is bad on a hardware class."""
    actor = operator.actor
    await quarantine.clear(services.database, services.project, actor, wish.manifest, wish.hardware_class)
