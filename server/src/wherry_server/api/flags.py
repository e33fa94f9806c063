"""Feature flags: typed values for applications on devices, by rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from wherry_server import flag_book
from wherry_server.answers import FlagDetail, FlagExplained, FlagPreview, FlagShown, flag_tag, shaped
from wherry_server.api import etags
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Operator, ServicesDep, Viewer

router = APIRouter(prefix="/api/v1", tags=["flags"], route_class=Again)
Name = Annotated[str, Path(max_length=128)]


class RuleWish(BaseModel, extra="forbid"):
    """Who gets a variant: a selector, and the share of those whom it takes, by stable hash."""

    when: str = Field(default="all", max_length=4_000)
    share: float = Field(default=1.0, gt=0, le=1)
    variant: str = Field(max_length=64)


class DefinitionWish(BaseModel, extra="forbid"):
    """What a flag is: docs/flags.md."""

    type: Literal["boolean", "string", "number", "object"]
    description: str = Field(default="", max_length=400)
    variants: dict[str, Any] = Field(description="name of a variant → its value, of the flag's type")
    default: str = Field(max_length=64, description="variant of whoever no rule and no rollout takes")
    rules: list[RuleWish] = Field(default=[], max_length=32)


class FlagWish(DefinitionWish):
    """A flag to make."""

    name: str = Field(max_length=128)


@router.get("/flags")
async def list_flags(
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    name: Annotated[str, Query(max_length=128, description="part of the name")] = "",
) -> list[FlagShown]:
    """List the flags by name."""
    async with services.database.read() as connection:
        found = await flag_book.every(connection, services.project)
    taken = page.cut([one for one in found if name in one["name"]], lambda one: [one["name"]])
    return [shaped(FlagShown, one) for one in taken]


@router.post("/flags", status_code=201)
async def create_flag(wish: FlagWish, response: Response, services: ServicesDep, operator: Operator) -> FlagShown:
    """Make a flag; within seconds every device that is connected has it."""
    actor = operator.actor
    saved = await flag_book.save(services.database, services.project, actor, wish.model_dump(), replace=False)
    return _shown(saved, response)


@router.post("/flags/preview")
async def preview_flag(wish: FlagWish, services: ServicesDep, _viewer: Viewer) -> FlagPreview:
    """Say who would have which variant, and for how many devices that is new; nothing is saved."""
    async with services.database.read() as connection:
        found = await flag_book.preview(connection, services.project, wish.model_dump())
    return shaped(FlagPreview, found)


@router.get("/flags/{flag}")
async def show_flag(flag: Name, response: Response, services: ServicesDep, _viewer: Viewer) -> FlagDetail:
    """Show a flag, and how many devices should have which variant by what."""
    async with services.database.read() as connection:
        found = await flag_book.find(connection, services.project, flag)
        spread = await flag_book.spread(connection, services.project, flag)
    response.headers["ETag"] = flag_tag(found)
    return shaped(FlagDetail, {**found, "spread": spread})


@router.put("/flags/{flag}")
async def change_flag(
    flag: Name,
    wish: DefinitionWish,
    response: Response,
    services: ServicesDep,
    operator: Operator,
    if_match: etags.IfMatch = "",
) -> FlagShown:
    """Give a flag another definition; what rollouts gave to devices stays above it."""
    actor = operator.actor
    saved = await flag_book.save(
        services.database,
        services.project,
        actor,
        {**wish.model_dump(), "name": flag},
        replace=True,
        check=_unchanged(flag, if_match),
    )
    return _shown(saved, response)


@router.delete("/flags/{flag}", status_code=204)
async def delete_flag(flag: Name, services: ServicesDep, operator: Operator, if_match: etags.IfMatch = "") -> None:
    """Delete a flag that no rollout gives: devices have it no more, and applications get their own defaults."""
    actor = operator.actor
    await flag_book.remove(services.database, services.project, actor, flag, check=_unchanged(flag, if_match))


@router.get("/flags/{flag}/devices/{device}")
async def explain_flag(
    flag: Name, device: Annotated[str, Path(max_length=128)], services: ServicesDep, _viewer: Viewer
) -> FlagExplained:
    """Say which variant a device should have and why, what its offer says, and whether it knows that offer."""
    async with services.database.read() as connection:
        return shaped(FlagExplained, await flag_book.explain(connection, services.project, flag, device))


def _shown(saved: dict[str, Any], response: Response) -> FlagShown:
    response.headers["ETag"] = flag_tag(saved)
    return shaped(FlagShown, saved)


def _unchanged(name: str, if_match: str) -> Callable[[dict[str, Any]], None]:
    return lambda now: etags.check(if_match, flag_tag(now), "flag_changed", f"flag {name}")
