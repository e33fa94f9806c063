"""Cohorts: saved selectors."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from wherry_server import cohorts
from wherry_server.api.again import Again
from wherry_server.auth import Operator, ServicesDep, Viewer

router = APIRouter(prefix="/api/v1", tags=["cohorts"], route_class=Again)
PREVIEW_MAX = 50
Name = Annotated[str, Path(max_length=64)]


class CohortShown(BaseModel):
    """A saved selector."""

    name: str
    selector: str
    created_at: int
    created_by: str


class SelectorWish(BaseModel):
    """A selector, in the language of docs/formats/plan.md."""

    selector: str = Field(max_length=4_000)


class CohortWish(SelectorWish):
    """A cohort to save."""

    name: str = Field(max_length=64)


class Preview(BaseModel):
    """Whom a selector takes now; the first names only."""

    selector: str
    devices: int
    simulated: int
    names: list[str]


class CohortDetail(CohortShown):
    """A cohort and whom it takes now."""

    devices: int
    simulated: int
    names: list[str]


@router.get("/cohorts")
async def list_cohorts(services: ServicesDep, _viewer: Viewer) -> list[CohortShown]:
    """List the saved cohorts."""
    async with services.database.read() as connection:
        return [CohortShown.model_validate(one) for one in await cohorts.every(connection, services.project)]


@router.post("/cohorts", status_code=201)
async def create_cohort(wish: CohortWish, services: ServicesDep, operator: Operator) -> CohortShown:
    """Save a cohort under a new name."""
    return await _save(services, f"token:{operator.name}", wish.name, wish.selector, replace=False)


@router.post("/cohorts/preview")
async def preview_cohort(wish: SelectorWish, services: ServicesDep, _viewer: Viewer) -> Preview:
    """Say whom a selector takes now, without saving it."""
    async with services.database.read() as connection:
        found = await cohorts.preview(connection, services.project, wish.selector, PREVIEW_MAX)
    return Preview.model_validate(found)


@router.get("/cohorts/{name}")
async def show_cohort(name: Name, services: ServicesDep, _viewer: Viewer) -> CohortDetail:
    """Show a cohort and whom it takes now."""
    async with services.database.read() as connection:
        found = await cohorts.find(connection, services.project, name)
        taken = await cohorts.preview(connection, services.project, found["selector"], PREVIEW_MAX)
    return CohortDetail.model_validate({**found, **taken})


@router.put("/cohorts/{name}")
async def change_cohort(name: Name, wish: SelectorWish, services: ServicesDep, operator: Operator) -> CohortShown:
    """Give a cohort another selector; rollouts that are there keep the one they were created with."""
    return await _save(services, f"token:{operator.name}", name, wish.selector, replace=True)


@router.delete("/cohorts/{name}", status_code=204)
async def delete_cohort(name: Name, services: ServicesDep, operator: Operator) -> None:
    """Forget a cohort; rollouts that are there keep its selector."""
    await cohorts.remove(services.database, services.project, f"token:{operator.name}", name)


async def _save(services: ServicesDep, actor: str, name: str, selector: str, *, replace: bool) -> CohortShown:
    saved = await cohorts.save(services.database, services.project, actor, name, selector, replace=replace)
    return CohortShown.model_validate(saved)
