"""Cohorts: saved selectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from wherry_server import cohorts
from wherry_server.answers import CohortDetail, CohortShown, Preview, shaped
from wherry_server.api import etags
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Operator, ServicesDep, Viewer

router = APIRouter(prefix="/api/v1", tags=["cohorts"], route_class=Again)
PREVIEW_MAX = 50
Name = Annotated[str, Path(max_length=64)]


class SelectorWish(BaseModel):
    """A selector, in the language of docs/formats/plan.md."""

    selector: str = Field(max_length=4_000)


class MembershipWish(SelectorWish):
    """Whom a cohort takes."""

    static: bool = False
    """Keep whom the selector takes now, whatever becomes of them; else membership is live."""


class CohortWish(MembershipWish):
    """A cohort to save."""

    name: str = Field(max_length=64)


@router.get("/cohorts")
async def list_cohorts(
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    name: Annotated[str, Query(max_length=64, description="part of the name")] = "",
) -> list[CohortShown]:
    """List the saved cohorts."""
    async with services.database.read() as connection:
        found = await cohorts.every(connection, services.project)
    taken = page.cut([one for one in found if name in one["name"]], lambda one: [one["name"]])
    return [shaped(CohortShown, one) for one in taken]


@router.post("/cohorts", status_code=201)
async def create_cohort(wish: CohortWish, response: Response, services: ServicesDep, operator: Operator) -> CohortShown:
    """Save a cohort under a new name."""
    actor = operator.actor
    saved = await cohorts.save(
        services.database, services.project, actor, wish.name, wish.selector, replace=False, static=wish.static
    )
    response.headers["ETag"] = etags.etag(saved)
    return shaped(CohortShown, saved)


@router.post("/cohorts/preview")
async def preview_cohort(wish: SelectorWish, services: ServicesDep, _viewer: Viewer) -> Preview:
    """Say whom a selector takes now, without saving it."""
    async with services.database.read() as connection:
        found = await cohorts.preview(connection, services.project, wish.selector, PREVIEW_MAX)
    return shaped(Preview, found)


@router.get("/cohorts/{name}")
async def show_cohort(name: Name, response: Response, services: ServicesDep, _viewer: Viewer) -> CohortDetail:
    """Show a cohort and whom it takes now."""
    async with services.database.read() as connection:
        found = await cohorts.find(connection, services.project, name)
        taken = await cohorts.preview(connection, services.project, found["selector"], PREVIEW_MAX)
    response.headers["ETag"] = etags.etag(found)
    return shaped(CohortDetail, {**found, **taken})


@router.put("/cohorts/{name}")
async def change_cohort(
    name: Name,
    wish: MembershipWish,
    response: Response,
    services: ServicesDep,
    operator: Operator,
    if_match: etags.IfMatch = "",
) -> CohortShown:
    """Give a cohort another selector; rollouts that are there keep the one they were created with."""
    actor = operator.actor
    saved = await cohorts.save(
        services.database,
        services.project,
        actor,
        name,
        wish.selector,
        replace=True,
        static=wish.static,
        check=_unchanged(name, if_match),
    )
    response.headers["ETag"] = etags.etag(saved)
    return shaped(CohortShown, saved)


@router.delete("/cohorts/{name}", status_code=204)
async def delete_cohort(name: Name, services: ServicesDep, operator: Operator, if_match: etags.IfMatch = "") -> None:
    """Forget a cohort; rollouts that are there keep its selector."""
    actor = operator.actor
    await cohorts.remove(services.database, services.project, actor, name, check=_unchanged(name, if_match))


def _unchanged(name: str, if_match: str) -> Callable[[dict[str, Any]], None]:
    return lambda now: etags.check(if_match, etags.etag(now), "cohort_changed", f"cohort {name}")
