"""Webhooks: whom to tell what happens, what has not arrived, and sending it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from wherry_server import webhooks
from wherry_server.answers import Delivery, Redelivered, WebhookMade, WebhookShown, shaped
from wherry_server.api import etags
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Admin, Identity, Operator, ServicesDep, Viewer

router = APIRouter(prefix="/api/v1/webhooks", tags=["webhooks"], route_class=Again)
Name = Annotated[str, Path(max_length=64, pattern="^[a-z0-9][a-z0-9._-]*$")]
EVENT_MAX = 2**31 - 1


class ReceiverWish(BaseModel):
    """Where events are sent, and which."""

    model_config = ConfigDict(extra="forbid")
    url: str = Field(max_length=webhooks.URL_CHARS_MAX)
    types: list[str] = Field(default=["*"], max_length=webhooks.TYPES_MAX)


class WebhookWish(ReceiverWish):
    """A webhook to make."""

    name: str = Field(max_length=64)


@router.get("")
async def list_webhooks(services: ServicesDep, viewer: Viewer, page: Paging) -> list[WebhookShown]:
    """List the webhooks; who may not change them is told scheme and host of their addresses."""
    async with services.database.read() as connection:
        found = await webhooks.every(connection, services.project)
    return [_for(viewer, one) for one in page.cut(found, lambda one: [one["name"]])]


@router.post("", status_code=201)
async def create_webhook(wish: WebhookWish, response: Response, services: ServicesDep, admin: Admin) -> WebhookMade:
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
    response.headers["ETag"] = etags.etag(webhooks.definition(made))
    return shaped(WebhookMade, made)


@router.get("/{name}")
async def show_webhook(name: Name, response: Response, services: ServicesDep, viewer: Viewer) -> WebhookShown:
    """Show a webhook, how many events have not arrived, and how its receiver fares; the whole address to who may change it."""
    async with services.database.read() as connection:
        found = await webhooks.find(connection, services.project, name)
    response.headers["ETag"] = etags.etag(webhooks.definition(found))
    return _for(viewer, found)


@router.put("/{name}")
async def change_webhook(
    name: Name,
    wish: ReceiverWish,
    response: Response,
    services: ServicesDep,
    admin: Admin,
    if_match: etags.IfMatch = "",
) -> WebhookShown:
    """Give a webhook another address and other types; its secret stays, and what is due to it goes to the new address."""
    found = await webhooks.change(
        services.database,
        services.project,
        admin.actor,
        name,
        wish.url,
        wish.types,
        check=_unchanged(name, if_match),
    )
    response.headers["ETag"] = etags.etag(webhooks.definition(found))
    return shaped(WebhookShown, found)


@router.delete("/{name}", status_code=204)
async def delete_webhook(name: Name, services: ServicesDep, admin: Admin, if_match: etags.IfMatch = "") -> None:
    """Forget a webhook and what was due to it."""
    await webhooks.remove(services.database, services.project, admin.actor, name, check=_unchanged(name, if_match))


def _for(viewer: Identity, webhook: dict[str, Any]) -> WebhookShown:
    """Return what a caller may see of a webhook."""
    shown = shaped(WebhookShown, webhook)
    return shown if viewer.has("administer", scoped=False) else replace(shown, url=webhooks.without_secrets(shown.url))


def _unchanged(name: str, if_match: str) -> Callable[[dict[str, Any]], None]:
    return lambda now: etags.check(if_match, etags.etag(webhooks.definition(now)), "webhook_changed", f"webhook {name}")


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
