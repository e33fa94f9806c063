"""What the fleet is and runs, as operators see it: read from the current-state rows, real and simulated apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, and_, case, exists, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, cohorts, revocation
from wherry_server.db.tables import (
    Assignment,
    Bundle,
    Device,
    DeviceModel,
    LogRequest,
    Offer,
    TelemetryWindow,
    Unpublished,
    table,
)
from wherry_server.targeting import Selector, matches
from wherry_server.times import now_us
from wherry_server.views import Seen, lists, looks
from wherry_shared.errors import RefusedError
from wherry_shared.sketch import Sketch
from wherry_shared.wire import ModelState, Window

Ending = Literal["revoked", "decommissioned"]
Wipe = Literal["", "nothing", "models", "all"]
"""What a device that leaves the fleet is asked to remove; empty: it is told nothing."""
Suspicion = Literal["cloned", "flooding"]
SEEN_RECENTLY_US = 15 * 60 * 1_000_000
"""A device heard of within this time counts as reachable: three heartbeats of one that has nothing else to say."""
LISTED_MAX = 1000
WINDOWS_SHOWN = 20

_devices = table(Device)
_models = table(DeviceModel)
_bundles = table(Bundle)
_offers = table(Offer)
_unpublished = table(Unpublished)
_logs = table(LogRequest)
_windows = table(TelemetryWindow)
_assignments = table(Assignment)
AWAITED = ("exposed", "proved", "revert_pending")
"""Outcomes of assignments that a rollout still waits for."""

AnyState = Literal[ModelState, "active", "revoked", "quarantined", "decommissioned"]
"""A state of a model on a device, or of the device."""


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices to list; everything that is set must hold."""

    name: str = ""
    """Part of the name."""
    state: str = ""
    """One of `AnyState`."""
    model: str = ""
    selector: Selector | None = None
    """Only the active devices that it takes; None: all."""
    after: str = ""
    """Only names behind this one: the next page."""
    limit: int = LISTED_MAX


async def list_devices(connection: AsyncConnection, project: str, wanted: Filter) -> tuple[list[dict[str, Any]], str]:
    """Return devices by name, and the name after which the next page begins (empty at the end)."""
    conditions = _conditions(project, wanted)
    versions = await _versions(connection, project)
    rows: list[Any] = []
    after, size = wanted.after, wanted.limit + 1
    while len(rows) <= wanted.limit:
        query = select(_devices).where(*conditions, _devices.c.name > after).order_by(_devices.c.name)
        batch = (await connection.execute(query.limit(size))).all()
        rows += await _taken(connection, wanted.selector, batch, versions)
        if len(batch) < size:
            break
        after, size = batch[-1].name, LISTED_MAX
    more = rows[wanted.limit - 1].name if len(rows) > wanted.limit else ""
    rows = rows[: wanted.limit]
    running = await _running(connection, [row.id for row in rows], versions)
    return [{**_device(row), "models": running.get(row.id, [])} for row in rows], more


async def _taken(
    connection: AsyncConnection, selector: Selector | None, rows: Sequence[Any], versions: Mapping[str, str]
) -> Sequence[Any]:
    """Return those of some devices that a selector takes."""
    if selector is None:
        return rows
    runs: dict[str, dict[str, str]] = {}
    if any(field.startswith("runs.") for field in looks(selector)):
        query = select(_models.c.device_id, _models.c.model, _models.c.running)
        for run in await connection.execute(query.where(_models.c.device_id.in_([row.id for row in rows]))):
            if run.running in versions:
                runs.setdefault(run.device_id, {})[run.model] = versions[run.running]
    kept = await cohorts.keeping(connection, lists(looks(selector)), [row.id for row in rows])
    now = now_us()
    seen = ((row, Seen(row, runs.get(row.id, {}), now, kept.get(row.id, ()))) for row in rows if row.state == "active")
    return [row for row, view in seen if matches(selector, view)]


def _conditions(project: str, wanted: Filter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [_devices.c.project_id == project]
    if wanted.name:
        found.append(_devices.c.name.contains(wanted.name, autoescape=True))
    on_device = _models.c.device_id == _devices.c.id
    if wanted.model:
        on_device = and_(on_device, _models.c.model == wanted.model)
        found.append(exists().where(on_device))
    if wanted.state:
        found.append(
            or_(_devices.c.state == wanted.state, exists().where(and_(on_device, _models.c.state == wanted.state)))
        )
    return found


async def find_device(connection: AsyncConnection, project: str, name: str) -> Any:
    """Return the row of a device by id or name.

    Raises:
        RefusedError: `device_unknown`.
    """
    rows = (
        await connection.execute(
            select(_devices).where(
                _devices.c.project_id == project, or_(_devices.c.id == name, _devices.c.name == name)
            )
        )
    ).all()
    if not rows:
        raise RefusedError(
            "device_unknown",
            f"there is no device {name[:80]!r}",
            next_step="see which there are: wherry device list",
        )
    return next((row for row in rows if row.id == name), rows[0])


async def show_device(connection: AsyncConnection, project: str, name: str) -> dict[str, Any]:
    """Return all that is known about a device: facts, what runs and why, what it should have, latency, memory.

    Raises:
        RefusedError: `device_unknown`.
    """
    row = await find_device(connection, project, name)
    versions = await _versions(connection, project)
    models = (
        await connection.execute(select(_models).where(_models.c.device_id == row.id).order_by(_models.c.model))
    ).all()
    offer = await offer_of(connection, row.id)
    waiting = await connection.scalar(select(_unpublished.c.serial).where(_unpublished.c.device_id == row.id))
    logs = (await connection.execute(select(_logs).where(_logs.c.device_id == row.id))).one_or_none()
    latency = {model.model: await _latency(connection, row.id, model.model, model.running) for model in models}
    return {
        **_device(row),
        "facts": row.facts,
        "certificate_expires_at": row.certificate_expires_at,
        "trust_version": row.trust_version,
        "trust_state": row.trust_state,
        "offer": None
        if offer is None
        else {
            "epoch": offer.epoch,
            "serial": offer.serial,
            "known_serial": _known_serial(row, offer, models),
            "published": waiting is None,
            "expires_at": offer.expires_at,
            "models": offer.models,
            "flags": offer.flags,
        },
        "models": [_model(model, versions, latency[model.model]) for model in models],
        "logs": None
        if logs is None
        else {"requested_at": logs.requested_at, "received_at": logs.received_at, "lines": logs.lines},
    }


async def offer_of(connection: AsyncConnection, device: str) -> Any:
    """Return the row of a device's current offer, None before its first."""
    return (await connection.execute(select(_offers).where(_offers.c.device_id == device))).one_or_none()


def _known_serial(device: Any, offer: Any, models: Sequence[Any]) -> int:
    """Return the serial of this epoch's offers that the device has spoken of, in its hello or in a report."""
    said = [device.offer_serial] if device.offer_epoch == offer.epoch else []
    said += [model.body.get("serial", 0) for model in models if model.updated_at >= offer.issued_at]
    return max(said, default=0)


async def _latency(connection: AsyncConnection, device: str, model: str, running: str) -> dict[str, Any] | None:
    rows = (
        await connection.execute(
            select(_windows.c.body, _windows.c.requests, _windows.c.errors, _windows.c.start)
            .where(
                _windows.c.device_id == device,
                _windows.c.model == model,
                _windows.c.manifest == running,
                _windows.c.arm != "shadow",
            )
            .order_by(_windows.c.start.desc())
            .limit(WINDOWS_SHOWN)
        )
    ).all()
    if not rows:
        return None
    merged = Sketch()
    for row in rows:
        for counts in msgspec.json.decode(row.body, type=Window).latency_us.values():
            merged.merge(Sketch.from_wire(counts))
    return {
        "requests": sum(row.requests for row in rows),
        "errors": sum(row.errors for row in rows),
        "since": min(row.start for row in rows),
        "p50_us": merged.quantile(0.5),
        "p99_us": merged.quantile(0.99),
    }


async def fleet_state(connection: AsyncConnection, project: str) -> dict[str, Any]:
    """Return counts: devices, and per model versions and states; real and simulated apart."""
    since = now_us() - SEEN_RECENTLY_US
    recent = func.sum(case((_devices.c.last_seen_at >= since, 1), else_=0))
    devices = (
        await connection.execute(
            select(_devices.c.simulated, _devices.c.state, func.count().label("count"), recent.label("seen"))
            .where(_devices.c.project_id == project)
            .group_by(_devices.c.simulated, _devices.c.state)
        )
    ).all()
    models = (
        await connection.execute(
            select(
                _models.c.model, _models.c.running, _models.c.state, _devices.c.simulated, func.count().label("count")
            )
            .join(_devices, _devices.c.id == _models.c.device_id)
            .where(_models.c.project_id == project, _devices.c.state == "active")
            .group_by(_models.c.model, _models.c.running, _models.c.state, _devices.c.simulated)
        )
    ).all()
    versions = await _versions(connection, project)
    state: dict[str, Any] = {"devices": {"real": _no_devices(), "simulated": _no_devices()}, "models": {}}
    for row in devices:
        counts = state["devices"][_kind(row)]
        counts[row.state] = counts.get(row.state, 0) + row.count
        if row.state == "active":
            counts["seen_recently"] += row.seen or 0
    for row in models:
        model = state["models"].setdefault(row.model, {"versions": {}, "states": {}})
        version = versions.get(row.running, row.running[:19]) if row.running else "none"
        for name, key in (("versions", version), ("states", row.state)):
            counts = model[name].setdefault(key, {"real": 0, "simulated": 0})
            counts[_kind(row)] += row.count
    return state


def _no_devices() -> dict[str, int]:
    return {"active": 0, "seen_recently": 0}


def _kind(row: Any) -> str:
    return "simulated" if row.simulated else "real"


def identity_of(device: Mapping[str, Any]) -> dict[str, Any]:
    """Return what operators know a device by, and change: another one that enrolled under its name is another."""
    return {name: device[name] for name in ("id", "name", "state", "labels")}


async def end_device(
    connection: AsyncConnection,
    project: str,
    name: str,
    state: Ending,
    check: Callable[[Any], None] = lambda _: None,
    *,
    wipe: Wipe = "",
) -> Any:
    """Shut a device out, and return its row as it was; one that is decommissioned is told when it asks, and what to remove.

    `revoked` keeps the name, so that nobody enrols under it by mistake; `decommissioned` gives it free for a new
    enrolment, and the old entry is kept under the name with the device's id behind it. Rollouts wait for it no more: what
    it had not settled, or not given back, is withdrawn; what it had said of a bundle stays said.

    Raises:
        RefusedError: `device_unknown`, or what `check` raises of `identity_of` the device.
    """
    row = await find_device(connection, project, name)
    check(identity_of(_device(row)))
    values: dict[str, str] = {"state": state}
    if state == "decommissioned" and row.state != "decommissioned":
        values["name"] = f"{row.name}~{row.id}"
    if state == "decommissioned":
        values["wipe"] = wipe
    await connection.execute(update(_devices).where(_devices.c.id == row.id).values(values))
    await _shut_out(connection, project, row.id, f"device_{state}")
    return row


async def wipe_of(connection: AsyncConnection, project: str, device: str, bearer_hash: str) -> str:
    """Return what a decommissioned device with this secret is asked to remove, empty if there is no such device."""
    found = await connection.scalar(
        select(_devices.c.wipe).where(
            _devices.c.id == device,
            _devices.c.project_id == project,
            _devices.c.bearer_hash == bearer_hash,
            _devices.c.state == "decommissioned",
        )
    )
    return found or ""


async def suspect(connection: AsyncConnection, project: str, device: str, why: Suspicion, detail: str) -> bool:
    """Put a device into quarantine: it is shut out until a person has looked. False if it was shut out already."""
    changed = await connection.execute(
        update(_devices)
        .where(_devices.c.id == device, _devices.c.project_id == project, _devices.c.state == "active")
        .values(state="quarantined", state_reason=why)
    )
    if changed.rowcount != 1:
        return False
    await _shut_out(connection, project, device, f"device_{why}")
    await audit.append(connection, project, "server:ingest", "device.quarantine", device, why=why, detail=detail[:200])
    return True


async def note_put_back(connection: AsyncConnection, project: str, device: str, detail: str) -> None:
    """Write down that the home of a device was put back as it once was: by somebody who wrote its card again, or by a thief."""
    await audit.append(connection, project, "server:ingest", "device.put_back", device, detail=detail[:200])


async def readmit(connection: AsyncConnection, project: str, name: str) -> Any:
    """Let a device in again that was revoked, in quarantine, or away for too long; return its row as it was.

    Raises:
        RefusedError: `device_unknown`, or `device_cloned`: its secrets are in other hands, so it has to enrol anew.
    """
    row = await find_device(connection, project, name)
    if row.state == "decommissioned" or row.state_reason == "cloned":
        raise RefusedError(
            "device_cloned" if row.state_reason == "cloned" else "device_unknown",
            f"{row.name} cannot be let in again: "
            + ("somebody else has its secrets" if row.state_reason == "cloned" else "it left the fleet"),
            consequence="nothing was changed",
            next_step=f"wherry device decommission {row.name}, remove its identity folder and enrol it again",
        )
    now = now_us()
    await connection.execute(
        update(_devices)
        .where(_devices.c.id == row.id)
        .values(
            state="active",
            state_reason="",
            certificate_expires_at=case(
                (_devices.c.certificate_expires_at < now, now), else_=_devices.c.certificate_expires_at
            ),
        )
    )
    await revocation.let_in(connection, row.id)
    return row


async def _shut_out(connection: AsyncConnection, project: str, device: str, why: str) -> None:
    await revocation.shut_out(connection, project, device)
    await connection.execute(
        update(_assignments)
        .where(_assignments.c.device_id == device, _assignments.c.outcome.in_(AWAITED))
        .values(outcome="withdrawn", reason=why, settled_at=now_us())
    )


# --- logs ---------------------------------------------------------------------------------------


async def request_logs(connection: AsyncConnection, project: str, device: str) -> int:
    """Note that an operator wants the last log lines; the next acknowledgement tells the device. Returns when."""
    now = now_us()
    changed = await connection.execute(update(_logs).where(_logs.c.device_id == device).values(requested_at=now))
    if changed.rowcount == 0:
        await connection.execute(
            insert(LogRequest).values(device_id=device, project_id=project, requested_at=now, received_at=0, lines=[])
        )
    return now


async def store_logs(connection: AsyncConnection, project: str, device: str, lines: list[str]) -> None:
    """Keep the log lines that a device sent; they replace the ones before."""
    now = now_us()
    changed = await connection.execute(
        update(_logs).where(_logs.c.device_id == device).values(lines=lines, received_at=now)
    )
    if changed.rowcount == 0:
        await connection.execute(
            insert(LogRequest).values(
                device_id=device, project_id=project, requested_at=0, received_at=now, lines=lines
            )
        )


# --- pieces -------------------------------------------------------------------------------------


async def _versions(connection: AsyncConnection, project: str) -> Mapping[str, str]:
    rows = await connection.execute(
        select(_bundles.c.manifest, _bundles.c.version).where(_bundles.c.project_id == project)
    )
    return {row.manifest: row.version for row in rows}


async def _running(
    connection: AsyncConnection, devices: list[str], versions: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    rows = await connection.execute(
        select(
            _models.c.device_id,
            _models.c.model,
            _models.c.running,
            _models.c.running_variant,
            _models.c.state,
            _models.c.reason,
        )
        .where(_models.c.device_id.in_(devices))
        .order_by(_models.c.model)
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.device_id, []).append(
            {
                "model": row.model,
                "version": versions.get(row.running, ""),
                "variant": row.running_variant,
                "state": row.state,
                "reason": row.reason,
            }
        )
    return found


def _device(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "state_reason": row.state_reason,
        "simulated": bool(row.simulated),
        "labels": row.labels,
        "arch": row.facts.get("arch", ""),
        "agent": row.facts.get("agent", ""),
        "engines": [f"{engine['name']} {engine['version']}" for engine in row.facts.get("engines", [])],
        "enrolled_at": row.enrolled_at,
        "last_seen_at": row.last_seen_at,
    }


def _model(row: Any, versions: Mapping[str, str], latency: dict[str, Any] | None) -> dict[str, Any]:
    tried = row.body.get("variants", [])
    own = tried if row.manifest == row.running else []  # a candidate's variants say nothing of what serves in its place
    beside = row.body.get("serving")
    own = own if beside is None else [beside]
    serving = next((variant for variant in own if variant["id"] == row.running_variant), None)
    return {
        "model": row.model,
        "state": row.state,
        "target": row.target,
        "manifest": row.manifest,
        "running": row.running,
        "version": versions.get(row.running, ""),
        "variant": row.running_variant,
        "why": "" if serving is None else serving.get("why", ""),
        "engine": "" if serving is None else serving.get("engine", ""),
        "peak_memory_bytes": 0 if serving is None else serving.get("peak_memory_bytes", 0),
        "canary_p50_us": 0.0 if serving is None else serving.get("latency_p50_us", 0.0),
        "canary_p99_us": 0.0 if serving is None else serving.get("latency_p99_us", 0.0),
        "latency": latency,
        "latency_ratio": row.latency_ratio,
        "reason": row.reason,
        "detail": row.detail,
        "trial_end": row.trial_end,
        "attempt": row.attempt,
        "rollout": row.rollout_id,
        "requests": row.requests,
        "errors": row.errors,
        "variants": tried,
        "updated_at": row.updated_at,
    }
