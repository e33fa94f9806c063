"""Rollouts: create, command, show. Deciding is the director's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Response
from pydantic import BaseModel, Field

from wherry_server import explaining, rollouts, scopes, standing
from wherry_server.answers import (
    DecisionShown,
    Explained,
    Forecast,
    RolloutDetail,
    RolloutDevice,
    RolloutSummary,
    shaped,
)
from wherry_server.api import etags
from wherry_server.api.again import Again
from wherry_server.api.pages import CursorId, Paging, check_text
from wherry_server.auth import ScopedApprover, ScopedOperator, ServicesDep, Viewer
from wherry_server.outcomes import Standing
from wherry_server.rollout import State

router = APIRouter(prefix="/api/v1", tags=["rollouts"], route_class=Again)
Number = Annotated[int, Path(ge=1, le=1 << 53)]


class ApprovalWish(BaseModel):
    """The stage that may begin, from 1, and in which round."""

    stage: Annotated[int, Field(ge=1, le=1000)] = 1
    round: Annotated[int, Field(ge=1, le=2)] = 1


class Rollback(BaseModel):
    """Bring a model back to what ran before, on one device or where its newest rollout reached."""

    model: str
    device: str | None = None


@router.get("/rollouts")
async def list_rollouts(
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    model: Annotated[str | None, Query(max_length=160, description="a model, or flag:NAME")] = None,
    state: Annotated[State | None, Query(description="in which it is")] = None,
) -> list[RolloutSummary]:
    """List the newest rollouts, newest first."""
    async with services.database.read() as connection:
        found = await rollouts.every(
            connection, services.project, model, state, before=page.behind(CursorId), limit=page.limit + 1
        )
    return [shaped(RolloutSummary, one) for one in page.full(found, lambda one: one["number"])]


@router.post("/rollouts", status_code=201)
async def create_rollout(
    wish: Annotated[dict[str, Any], Body(description="fields of a plan, see docs/formats/plan.md")],
    services: ServicesDep,
    operator: ScopedOperator,
) -> RolloutDetail:
    """Create a rollout; a plan that does not parse is not stored."""
    async with services.database.read() as connection:
        operator.check("operate", await scopes.of_wish(connection, operator, wish))
    made = await rollouts.create(services.database, services.project, operator.actor, wish)
    return shaped(RolloutDetail, made)


@router.get("/rollouts/{number}")
async def show_rollout(number: Number, response: Response, services: ServicesDep, _viewer: Viewer) -> RolloutDetail:
    """Show a rollout: counts per stage, reasons, and why it is not further yet."""
    async with services.database.read() as connection:
        found = await rollouts.show(connection, services.project, number)
    response.headers["ETag"] = _etag(found["revision"])
    return shaped(RolloutDetail, found)


@router.get("/rollouts/{number}/decisions")
async def list_decisions(
    number: Number,
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    after: Annotated[int, Query(ge=0, le=1 << 53)] = 0,
) -> list[DecisionShown]:
    """List what was decided and on what evidence, oldest first, behind revision `after`."""
    async with services.database.read() as connection:
        found = await rollouts.decisions(
            connection, services.project, number, max(after, page.behind(CursorId) or 0), page.limit + 1
        )
    return [shaped(DecisionShown, one) for one in page.full(found, lambda one: one["revision"])]


@router.get("/rollouts/{number}/devices")
async def list_rollout_devices(
    number: Number,
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    state: Annotated[Standing | None, Query(description="as the engine counts it")] = None,
    stage: Annotated[int | None, Query(ge=1, le=1000, description="the stage that exposed it, from 1")] = None,
) -> list[RolloutDevice]:
    """List the devices that a rollout exposed, and where each one stands."""
    after = page.behind(str) or ""
    check_text(after)
    async with services.database.read() as connection:
        found = await standing.devices(
            connection, services.project, number, state=state, stage=stage, after=after, limit=page.limit + 1
        )
    return [shaped(RolloutDevice, one) for one in page.full(found, lambda one: one["device"])]


@router.get("/rollouts/{number}/explain")
async def explain_rollout(
    number: Number, services: ServicesDep, _viewer: Viewer, device: Annotated[str, Query(max_length=128)] = ""
) -> Explained:
    """Explain where a rollout, and a device in it, is, and replay what was decided."""
    async with services.database.read() as connection:
        found = await explaining.explain(connection, services.project, number, device)
    return shaped(Explained, found)


@router.post("/forecasts")
async def simulate_rollout(
    wish: Annotated[dict[str, Any], Body(description="plan, devices, outcomes, runs: see docs/rollouts.md")],
    services: ServicesDep,
    _viewer: Viewer,
) -> Forecast:
    """Forecast a plan over the fleet as it stands, or over a synthetic one; nothing is stored."""
    async with services.database.read() as connection:
        return shaped(Forecast, await explaining.simulate(connection, services.project, wish))


@router.post("/rollouts/{number}/approvals", status_code=202)
async def approve_rollout(
    number: Number, wish: ApprovalWish, services: ServicesDep, approver: ScopedApprover
) -> RolloutDetail:
    """Agree that a stage begins; how many people have to is the plan's."""
    async with services.database.read() as connection:
        approver.check("approve", await scopes.of_rollout(connection, approver, number))
    found = await rollouts.approve(services.database, services.project, approver.actor, number, wish.stage, wish.round)
    return shaped(RolloutDetail, found)


@router.post("/rollouts/{number}/{command}", status_code=202)
async def command_rollout(
    number: Number,
    command: Literal["start", "pause", "resume", "abort", "revert", "retry", "retry_failed"],
    response: Response,
    services: ServicesDep,
    operator: ScopedOperator,
    if_match: etags.IfMatch = "",
) -> RolloutDetail:
    """Write a command down; the director applies it in its next turn, within about a second."""
    async with services.database.read() as connection:
        operator.check("operate", await scopes.of_rollout(connection, operator, number))
    actor = operator.actor

    def unchanged(revision: int) -> None:
        etags.check(if_match, _etag(revision), "rollout_changed", f"rollout {number}")

    found = await rollouts.command(services.database, services.project, actor, number, command, check=unchanged)
    response.headers["ETag"] = _etag(found["revision"])
    return shaped(RolloutDetail, found)


def _etag(revision: int) -> str:
    return f'"{revision}"'


@router.post("/rollbacks", status_code=202)
async def roll_back(wish: Rollback, services: ServicesDep, operator: ScopedOperator) -> RolloutDetail:
    """Bring a model back to what ran before, and return the rollout that does it."""
    async with services.database.read() as connection:
        operator.check("operate", await scopes.of_rollback(connection, operator, wish.model, wish.device))
    actor = operator.actor
    return shaped(
        RolloutDetail, await rollouts.roll_back(services.database, services.project, actor, wish.model, wish.device)
    )
