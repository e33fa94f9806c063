"""Webhooks: whom to tell what happens, what has not arrived, and sending it again."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from wherry_server import webhooks
from wherry_server.answers import Delivery, Redelivered, WebhookMade, WebhookShown, shaped
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Admin, Operator, ServicesDep, Viewer

router = APIRouter(prefix="/api/v1/webhooks", tags=["webhooks"], route_class=Again)
Name = Annotated[str, Path(max_length=64, pattern="^[a-z0-9][a-z0-9._-]*$")]
EVENT_MAX = 2**31 - 1


class WebhookWish(BaseModel):
    """A webhook to make."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=64)
    url: str = Field(max_length=webhooks.URL_CHARS_MAX)
    types: list[str] = Field(default=["*"], max_length=webhooks.TYPES_MAX)


@router.get("")
async def list_webhooks(services: ServicesDep, _viewer: Viewer, page: Paging) -> list[WebhookShown]:
    """List the webhooks."""
    async with services.database.read() as connection:
        found = await webhooks.every(connection, services.project)
    return [shaped(WebhookShown, one) for one in page.cut(found, lambda one: [one["name"]])]


@router.post("", status_code=201)
async def create_webhook(wish: WebhookWish, services: ServicesDep, admin: Admin) -> WebhookMade:
    """Make a webhook; it is told what happens from now on."""
    made = await webhooks.create(
        services.database,
        services.project,
        services.master_key,
        admin.actor,
        wish.name,
        wish.url,
        wish.types,
    )
    return shaped(WebhookMade, made)


@router.delete("/{name}", status_code=204)
async def delete_webhook(name: Name, services: ServicesDep, admin: Admin) -> None:
    """Forget a webhook and what was due to it."""
    await webhooks.remove(services.database, services.project, admin.actor, name)


@router.get("/{name}/deliveries")
async def list_deliveries(
    name: Name,
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    state: Annotated[Literal["waiting", "dead"] | None, Query()] = None,
) -> list[Delivery]:
    """List what has not arrived, the oldest first."""
    async with services.database.read() as connection:
        found = await webhooks.deliveries(connection, services.project, name, state or "")
    return [shaped(Delivery, one) for one in page.cut(found, lambda one: [one["event"]])]


@router.post("/{name}/deliveries/{event}/redeliver", status_code=202)
async def redeliver_event(
    name: Name, event: Annotated[int, Path(ge=1, le=EVENT_MAX)], services: ServicesDep, operator: Operator
) -> Redelivered:
    """Send an event that has not arrived once more, now."""
    await webhooks.redeliver(services.database, services.project, operator.actor, name, event)
    return Redelivered(webhook=name, event=event)
