"""One offer per device: composed from all its rollouts, numbered, signed, kept as the row that publishing is drained from.

Numbers: a device obeys only a higher (epoch, serial), or the same one with the same bytes. The next offer is above the
stored row *and* above what the device last said it knows, so a server restored from a backup goes on above what it has
forgotten. The epoch is the device's, else the row's, else 1; it is raised by nobody in normal work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import asyncpg
import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.db import bulk
from wherry_server.db.tables import Offer, Unpublished, table
from wherry_server.plan import Plan
from wherry_server.signing import Signer
from wherry_shared import dsse, wire
from wherry_shared import flags as device_flags
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX

LIFE_US = 14 * 86_400 * 1_000_000
"""An offer that expired starts nothing and undoes nothing."""
HALF_LIFE_US = LIFE_US // 2
"""After this the director signs it anew."""
DEVICES_PER_READ = 5_000


class Number(NamedTuple):
    """What orders the offers of a device."""

    epoch: int
    serial: int


NOTHING = Number(0, 0)
"""Before a device's first offer."""


class Current(NamedTuple):
    """What a device has been offered, and what it said it knows."""

    number: Number
    known: Number
    models: dict[str, wire.OfferedModel]
    flags: Mapping[str, Any] = MappingProxyType({})


class Composed(NamedTuple):
    """A signed offer, ready to be stored."""

    device: str
    number: Number
    over: Number
    """The stored number that it was composed from: it replaces this one or nothing."""
    envelope: bytes
    models: str
    flags: str
    issued_at: int
    expires_at: int


_models = msgspec.json.Decoder(dict[str, wire.OfferedModel])
_encoder = msgspec.json.Encoder()


def next_number(stored: Number, known: Number) -> Number:
    """Return the number of the next offer."""
    top = max(stored, known)
    return Number(max(top.epoch, 1), top.serial + 1)


def forwards(plan: Plan, rollout: str, attempt: int = 0, *, tried: bool = False) -> dict[str, wire.OfferedModel]:
    """Return what a rollout offers to the devices that it exposes, with the plan's attempt or a later one.

    `tried`: beside the incumbent, or standing by, as the first of two rounds has it.
    """
    share, trial = plan.tried if tried else (1.0, plan.trial)
    mode: wire.Mode = plan.tries if tried else "blue_green" if plan.strategy == "blue_green" else "replace"
    return {
        planned.model: wire.OfferedModel(
            target=planned.target,
            manifest=planned.manifest,
            attempt=attempt or plan.attempt,
            rollout=rollout,
            mode=mode,
            share=share,
            trial=trial,
            windows=plan.window.told if plan.window is not None else [],
        )
        for planned in plan.models
    }


def with_flag(plan: Plan, known: Mapping[str, Current]) -> dict[str, Mapping[str, Any]]:
    """Return the flags of the devices that a flag's rollout exposes; of nobody where a plan is of models."""
    return {device: {**one.flags, plan.flag: plan.value} for device, one in known.items()} if plan.flag else {}


def backwards(plan: Plan, rollout: str, from_target: str, from_manifest: str) -> wire.OfferedModel:
    """Return what a withdrawn device is offered: what it came from, or nothing at all where it had nothing."""
    if not from_manifest:
        return wire.OfferedModel(target="", manifest="", mode="none", rollout=rollout, attempt=plan.attempt)
    return wire.OfferedModel(
        target=from_target, manifest=from_manifest, attempt=plan.attempt, rollout=rollout, trial=plan.trial
    )


class Wanted(NamedTuple):
    """What a device is to be offered next."""

    device: str
    current: Current
    models: Mapping[str, wire.OfferedModel]
    flags: Mapping[str, Any] | None = None
    """None: those of the current offer."""

    @property
    def carried(self) -> Mapping[str, Any]:
        """The flags that the next offer carries."""
        return self.current.flags if self.flags is None else self.flags


class Composer:
    """Makes signed offers of one project; large batches are signed in another process where `key_file` is given."""

    def __init__(self, project: str, keyid: str, sign: Callable[[bytes], bytes], key_file: Path | None = None) -> None:
        self._project = project
        self._signer = Signer(dsse.OFFER_TYPE, keyid, sign, key_file)

    @property
    def keyid(self) -> str:
        """Which key signs."""
        return self._signer.keyid

    def use(self, keyid: str, sign: Callable[[bytes], bytes], key_file: Path | None = None) -> None:
        """Sign with another key from now on."""
        before, self._signer = self._signer, Signer(dsse.OFFER_TYPE, keyid, sign, key_file)
        before.close()

    def close(self) -> None:
        """End the signing process if there is one."""
        self._signer.close()

    def compose(
        self,
        device: str,
        current: Current,
        models: Mapping[str, wire.OfferedModel],
        now: int,
        flags: Mapping[str, Any] | None = None,
    ) -> Composed:
        """Return the next offer of a device; without `flags` it carries those of the current one.

        Raises:
            RefusedError: `offer_too_large`, if a device has more models than one message can carry.
        """
        made, refused = self.compose_all([Wanted(device, current, models, flags)], now)
        if refused:
            raise refused[0]
        return made[0]

    def compose_all(self, wanted: Sequence[Wanted], now: int) -> tuple[list[Composed], list[RefusedError]]:
        """Return the next offers, and why some devices get none (`offer_too_large`), which stops nobody else's.

        Signs, so call it outside of the event loop's thread.
        """
        expires = now + LIFE_US
        numbers = [next_number(one.current.number, one.current.known) for one in wanted]
        payloads = [
            _encoder.encode(
                wire.Offer(
                    format=wire.FORMAT,
                    device=one.device,
                    project=self._project,
                    epoch=number.epoch,
                    serial=number.serial,
                    issued_at=now,
                    expires_at=expires,
                    models=dict(one.models),
                    flags=dict(one.carried),
                )
            )
            for one, number in zip(wanted, numbers, strict=True)
        ]
        made: list[Composed] = []
        refused: list[RefusedError] = []
        for one, number, envelope in zip(wanted, numbers, self._signer.envelopes(payloads), strict=True):
            if len(envelope) > MQTT_PAYLOAD_BYTES_MAX:
                refused.append(_too_large(one.device, len(envelope)))
                continue
            models, flags = _encoder.encode(one.models).decode(), device_flags.encode(one.carried).decode()
            made.append(Composed(one.device, number, one.current.number, envelope, models, flags, now, expires))
        return made, refused


def _too_large(device: str, size: int) -> RefusedError:
    return RefusedError(
        "offer_too_large",
        f"the offer of {device} has {size} bytes, at most {MQTT_PAYLOAD_BYTES_MAX}",
        consequence="this device gets no new offer",
        next_step="give it fewer models, or smaller flags",
    )


async def current(connection: AsyncConnection, devices: Sequence[str]) -> dict[str, Current]:
    """Return what the devices have been offered; a device that does not exist is left out."""
    found: dict[str, Current] = {}
    for at in range(0, len(devices), DEVICES_PER_READ):
        rows: Sequence[Any] = await bulk.select_in(connection, _CURRENT, devices[at : at + DEVICES_PER_READ])
        for device, known_epoch, known_serial, epoch, serial, models, flags in rows:
            found[device] = Current(
                Number(epoch, serial),
                Number(known_epoch, known_serial),
                _models.decode(models) if models else {},
                msgspec.json.decode(flags) if flags else {},
            )
    return found


async def write(connection: AsyncConnection, project: str, composed: Sequence[Composed]) -> None:
    """Store offers as the current ones, to be published: all, or none if one was composed from what is no longer so.

    A read inside the write transaction decides: SQLite has one writer, PostgreSQL refuses the upsert of a row that changed
    since the transaction's snapshot.

    Raises:
        UnreachableError: `offer_changed`: compose again.
    """
    await _check_unchanged(connection, composed)
    composed = sorted(composed, key=attrgetter("device"))  # as their index has them, and as they are published
    first = [one for one in composed if one.over == NOTHING]
    try:
        await bulk.insert_fresh(connection, table(Offer), _COLUMNS, [_offer(project, one) for one in first])
        await bulk.insert_fresh(connection, table(Unpublished), _WAITING, [_waiting(project, one) for one in first])
    except asyncpg.UniqueViolationError as error:
        raise _changed([one.device for one in first]) from error
    others = [one for one in composed if one.over != NOTHING]
    await bulk.upsert(
        connection,
        table(Offer),
        _COLUMNS,
        [_offer(project, one) for one in others],
        update=_COLUMNS[2:],
        guard="excluded.epoch > offer.epoch OR (excluded.epoch = offer.epoch AND excluded.serial > offer.serial)",
    )
    await bulk.upsert(
        connection,
        table(Unpublished),
        _WAITING,
        [_waiting(project, one) for one in others],
        update=("epoch", "serial"),
    )


def _offer(project: str, one: Composed) -> tuple[Any, ...]:
    return one.device, project, *one.number, one.envelope, one.models, one.flags, one.issued_at, one.expires_at


def _waiting(project: str, one: Composed) -> tuple[Any, ...]:
    return one.device, project, *one.number


async def _check_unchanged(connection: AsyncConnection, composed: Sequence[Composed]) -> None:
    stored: dict[str, Number] = {}
    devices = [one.device for one in composed]
    for at in range(0, len(devices), DEVICES_PER_READ):
        rows: Sequence[Any] = await bulk.select_in(connection, _NUMBERS, devices[at : at + DEVICES_PER_READ])
        stored.update({device: Number(epoch, serial) for device, epoch, serial in rows})
    changed = [one.device for one in composed if stored.get(one.device, NOTHING) != one.over]
    if changed:
        raise _changed(changed)


def _changed(devices: Sequence[str]) -> UnreachableError:
    return UnreachableError(
        "offer_changed",
        f"{len(devices)} offers changed while they were composed anew, such as of {devices[0]}",
        consequence="nothing was written",
        next_step="compose again from what is stored",
    )


async def stored(connection: AsyncConnection, device: str) -> Any:
    """Return the row (epoch, serial, envelope, expires_at) of a device's offer, None if there is none."""
    return (
        await connection.execute(
            text("SELECT epoch, serial, envelope, expires_at FROM offer WHERE device_id = :device"), {"device": device}
        )
    ).one_or_none()


_WAITING = ("device_id", "project_id", "epoch", "serial")
_COLUMNS = (
    "device_id",
    "project_id",
    "epoch",
    "serial",
    "envelope",
    "models",
    "flags",
    "issued_at",
    "expires_at",
)
_NUMBERS = "SELECT device_id, epoch, serial FROM offer WHERE device_id IN :keys"
_CURRENT = (
    "SELECT d.id, d.offer_epoch AS known_epoch, d.offer_serial AS known_serial, COALESCE(o.epoch, 0) AS epoch,"
    " COALESCE(o.serial, 0) AS serial, CAST(o.models AS TEXT) AS models, CAST(o.flags AS TEXT) AS flags"
    " FROM device d LEFT JOIN offer o ON o.device_id = d.id WHERE d.id IN :keys"
)
