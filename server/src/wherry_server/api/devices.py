"""Devices as operators see them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response

from wherry_server import audit, cohorts, fleet, scopes
from wherry_server.answers import (
    DeviceDetail,
    DeviceList,
    DeviceLogs,
    Ended,
    FleetState,
    LogsRequested,
    Readmitted,
    shaped,
)
from wherry_server.api import etags
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Operator, ScopedOperator, ServicesDep, Viewer
from wherry_server.targeting import SELECTOR_CHARS_MAX, And, parse_selector

router = APIRouter(prefix="/api/v1", tags=["fleet"], route_class=Again)


@router.get("/devices")
async def list_devices(
    *,
    services: ServicesDep,
    _viewer: Viewer,
    name: Annotated[str, Query(description="part of the name", max_length=64)] = "",
    state: Annotated[fleet.AnyState | None, Query(description="of the device, or of a model on it")] = None,
    model: Annotated[str, Query(description="has said something about it", max_length=64)] = "",
    cohort: Annotated[str, Query(description="members of this cohort", max_length=64)] = "",
    selector: Annotated[str, Query(description="active devices that it takes", max_length=SELECTOR_CHARS_MAX)] = "",
    after: Annotated[str, Query(description="names behind this one", max_length=64)] = "",
    page: Paging,
) -> DeviceList:
    """List devices by name."""
    async with services.database.read() as connection:
        both = [selector] if selector else []
        if cohort:
            both.append((await cohorts.find(connection, services.project, cohort))["selector"])
        whom = And(parts=tuple(parse_selector(one) for one in both)) if both else None
        after = max(after, page.behind(str) or "")
        limit = min(page.limit, fleet.LISTED_MAX)
        wanted = fleet.Filter(name=name, state=state or "", model=model, selector=whom, after=after, limit=limit)
        rows, following = await fleet.list_devices(connection, services.project, wanted)
    if following:
        page.end(following)
    return shaped(DeviceList, {"devices": rows, "next": following})


@router.get("/devices/{device}")
async def show_device(device: str, response: Response, services: ServicesDep, _viewer: Viewer) -> DeviceDetail:
    """Show a device by id or name: what runs and why, what it should have, latency, memory, last reason."""
    async with services.database.read() as connection:
        found = await fleet.show_device(connection, services.project, device)
    response.headers["ETag"] = etags.etag(fleet.identity_of(found))
    return shaped(DeviceDetail, found)


@router.get("/devices/{device}/logs")
async def show_logs(device: str, services: ServicesDep, _viewer: Viewer) -> DeviceLogs:
    """Show the last log lines that a device sent."""
    async with services.database.read() as connection:
        found = await fleet.show_device(connection, services.project, device)
    return shaped(DeviceLogs, found["logs"] or {"requested_at": 0, "received_at": 0, "lines": []})


@router.post("/devices/{device}/logs", status_code=202)
async def request_logs(device: str, services: ServicesDep, operator: ScopedOperator) -> LogsRequested:
    """Ask a device for its last log lines."""
    async with services.database.write() as connection:
        operator.check("operate", await scopes.of_device(connection, operator, device))
        row = await fleet.find_device(connection, services.project, device)
        requested_at = await fleet.request_logs(connection, services.project, row.id)
        await audit.append(connection, services.project, operator.actor, "device.logs", row.name)
    return LogsRequested(device=row.id, requested_at=requested_at)


@router.post("/devices/{device}/readmit")
async def readmit_device(device: str, services: ServicesDep, operator: Operator) -> Readmitted:
    """Let a device in again: one that was revoked, in quarantine for flooding, or away for longer than it may be."""
    async with services.database.write() as connection:
        row = await fleet.readmit(connection, services.project, device)
        await audit.append(
            connection,
            services.project,
            operator.actor,
            "device.readmit",
            row.name,
            id=row.id,
            was=row.state,
            why=row.state_reason,
        )
    return Readmitted(device=row.id, state="active")


@router.post("/devices/{device}/{ending}")
async def end_device(
    device: str,
    ending: Literal["revoke", "decommission"],
    services: ServicesDep,
    operator: ScopedOperator,
    wipe: Annotated[
        Literal["", "nothing", "models", "all"],
        Query(description="of decommission: what the device is asked to remove"),
    ] = "",
    if_match: etags.IfMatch = "",
) -> Ended:
    """Shut a device out: revoke it (its name stays taken) or decommission it (its name is free again)."""
    state: fleet.Ending = "revoked" if ending == "revoke" else "decommissioned"

    def unchanged(now: dict[str, Any]) -> None:
        etags.check(if_match, etags.etag(now), "device_changed", f"device {device[:80]}")

    async with services.database.write() as connection:
        operator.check("operate", await scopes.of_device(connection, operator, device))
        row = await fleet.end_device(connection, services.project, device, state, unchanged, wipe=wipe)
        await audit.append(
            connection,
            services.project,
            operator.actor,
            f"device.{ending}",
            row.name,
            id=row.id,
            was=row.state,
            wipe=wipe,
        )
    return Ended(device=row.id, state=state)


@router.get("/fleet")
async def fleet_state(services: ServicesDep, _viewer: Viewer) -> FleetState:
    """Count devices by model, version and state."""
    async with services.database.read() as connection:
        return shaped(FleetState, await fleet.fleet_state(connection, services.project))
