"""How a device becomes known: a token that a person made, a key that never leaves the device, one transaction.

Its certificate is short-lived: the device renews it over a new key, by what it got when it became known.

Three ways in: a token, for one device or many; a token of which a person accepts each device by its key; a key that a person
named before the device came, which needs no secret.

An enrolment that is repeated with the same key, because the answer got lost, gives the same device again and uses
nothing up; another key under a name that is taken is refused. A key is one device's: it lets in nobody under another name, and
that a person named it lets in once. A device that was shut out does not come back by the key that it came with.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, revocation
from wherry_server import enrolment_requests as requests
from wherry_server.content_keys import checked_public
from wherry_server.db.tables import Device, EnrolmentToken, table
from wherry_server.hellos import facts_to_keep
from wherry_server.identity import Issued, Request, check_request
from wherry_server.secrets_kept import hash_secret
from wherry_server.services import Services
from wherry_server.times import DAY_US, now_us
from wherry_shared import wire
from wherry_shared.errors import RefusedError
from wherry_shared.frames import device_key
from wherry_shared.ids import new_device_id

if TYPE_CHECKING:
    from wherry_server.auth import DeviceIdentity

TOKEN_PREFIX = "wherry1"  # noqa: S105  # names the form of the token
BY_KEY = "by-the-key-of-this-device"
"""In the place of a token's secret, where the key is known: it only names the root of trust."""
USES_MAX = 1_000_000
DAYS_MAX = 365
LABELS_MAX = 32
LABEL_CHARS_MAX = 128
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,62}[A-Za-z0-9])?")

_tokens = table(EnrolmentToken)
_devices = table(Device)


async def create_token(
    connection: AsyncConnection,
    services: Services,
    actor: str,
    *,
    uses: int,
    days: int,
    labels: Mapping[str, str],
    hold: bool = False,
) -> str:
    """Store a token by which `uses` devices may enrol within `days`, and return the text to paste; shown this once.

    With `hold` each of them waits until a person accepts its key.

    Raises:
        RefusedError: `labels_invalid`.
    """
    check_labels(labels)
    secret = secrets.token_urlsafe(24)
    now = now_us()
    hashed = hash_secret(secret)
    await connection.execute(
        insert(EnrolmentToken).values(
            token_hash=hashed,
            project_id=services.project,
            uses_left=uses,
            expires_at=now + days * DAY_US,
            labels=dict(labels),
            hold=hold,
            created_at=now,
            created_by=actor,
        )
    )
    await audit.append(
        connection,
        services.project,
        actor,
        "enrolment_token.create",
        hashed[:12],
        uses=uses,
        days=days,
        labels=labels,
        hold=hold,
    )
    return f"{TOKEN_PREFIX}.{secret}.{services.trust.root_digest}"


def token_by_key(services: Services) -> str:
    """Return what is pasted on a device whose key is known: no secret, it names the root of trust."""
    return f"{TOKEN_PREFIX}.{BY_KEY}.{services.trust.root_digest}"


def check_labels(labels: Mapping[str, Any]) -> None:
    """Check labels of a device.

    Raises:
        RefusedError: `labels_invalid`.
    """
    if len(labels) > LABELS_MAX:
        raise RefusedError("labels_invalid", f"{len(labels)} labels, at most {LABELS_MAX}")
    for key, value in labels.items():
        fits = isinstance(value, str) and len(value) <= LABEL_CHARS_MAX and "\0" not in value
        if _LABEL.fullmatch(key) is None or not fits:
            raise RefusedError(
                "labels_invalid",
                f"label {key[:80]!r}: keys are 1 to 64 of [A-Za-z0-9._/-], values at most {LABEL_CHARS_MAX} characters without NUL",
                next_step="write labels as site=north",
            )


async def enrol(services: Services, request: wire.EnrolRequest) -> wire.EnrolAnswer:
    """Enrol a device.

    Raises:
        RefusedError: `enrolment_refused` (token or key), `csr_invalid`, `content_key_invalid`, `bad_name`, `labels_invalid`, `name_taken` or `key_taken`.
        UnreachableError: `enrolment_pending`, a person has to accept it first; `certificates_too_many`.
    """
    if _NAME.fullmatch(request.name) is None:
        raise RefusedError(
            "bad_name",
            f"device name {request.name[:80]!r} is not 1 to 64 letters, digits and inner dots, dashes, underscores",
            consequence="the device was not enrolled",
            next_step="give it a name such as press-07",
        )
    check_labels(request.labels)
    token_hash = _token_hash(request.token)
    key = check_request(request.csr_pem)
    content_key = checked_public(request.content_key)
    bearer = secrets.token_urlsafe(32)
    async with services.database.write(audited=True) as connection:
        way = await _way_in(connection, services.project, token_hash, key.key_digest)
        labels = {**request.labels, **way.labels}  # what the operator said counts more
        name = way.name or request.name
        known = (
            await connection.execute(
                select(_devices.c.id, _devices.c.key_digest, _devices.c.state).where(
                    _devices.c.project_id == services.project, _devices.c.name == name
                )
            )
        ).one_or_none()
        again = known is not None and known.key_digest == key.key_digest and known.state == "active"
        if known is not None and again:
            device = known.id
            issued = services.authority.issue(key, device, services.project)
            await connection.execute(
                update(_devices)
                .where(_devices.c.id == device)
                .values(
                    bearer_hash=hash_secret(bearer),
                    certificate_serial=issued.serial,
                    certificate_expires_at=issued.expires_at,
                    **({"content_key": content_key} if content_key else {}),
                )
            )
        elif known is not None:
            raise RefusedError(
                "name_taken",
                f"a device named {name!r} is enrolled already",
                consequence="this device was not enrolled",
                next_step=f"give it another name (wherry-agent run --name), or: wherry device decommission {name}",
            )
        elif way.again_only:
            raise _refused("its key let a device in already, and the token is not known here")
        elif way.hold:
            await _check_key(connection, services.project, key.key_digest)
            if await requests.file(connection, services.project, request, key.key_digest, labels):
                await _use(connection, token_hash)
            device = ""
        else:
            await _check_key(connection, services.project, key.key_digest)
            if way.by_key:
                await requests.used(connection, services.project, key.key_digest)
            else:
                await _use(connection, token_hash)
            device = new_device_id()
            issued = services.authority.issue(key, device, services.project)
            await _insert(
                connection,
                services,
                request,
                name=name,
                device=device,
                labels=labels,
                key=key,
                issued=issued,
                bearer=bearer,
            )
        if device:
            await revocation.note(connection, services.project, device, issued)
            await audit.append(
                connection,
                services.project,
                f"device:{device}",
                "device.enrol",
                name,
                certificate=issued.serial,
                again=again,
            )
    if not device:
        raise requests.is_waiting(key.key_digest)
    return wire.EnrolAnswer(
        format=wire.FORMAT,
        device=device,
        project=services.project,
        certificate_pem=issued.pem,
        ca_pem=services.authority.ca_pem,
        bearer=bearer,
        mac_key=base64.b64encode(device_key(services.master_key, device)).decode(),
        broker_host=services.settings.broker_host,
        broker_port=services.settings.broker_port,
        broker_tls=services.settings.broker_tls,
        broker_tokens=services.settings.broker_tokens,
        tuf_path=f"/tuf/{services.project}",
    )


async def renew(services: Services, device: DeviceIdentity, request: wire.RenewRequest) -> wire.RenewAnswer:
    """Give a device its next certificate, over the key of its request; bearer and frame key stay.

    One that was away for long renews by its bearer, too, until `certificate_grace_days` after its certificate expired.

    A device whose answer got lost asks again with another key: the newest certificate is the one on record.

    Raises:
        RefusedError: `csr_invalid`, or `device_revoked` if it was revoked a moment ago.
        UnreachableError: `certificates_too_many`.
    """
    key = check_request(request.csr_pem)
    content_key = checked_public(request.content_key)
    if key.names != (device.id,):
        raise RefusedError(
            "csr_invalid",
            "the certificate request does not name the device that asks, and only it",
            consequence="no certificate was issued",
            next_step=f"make a request whose common name is {device.id}",
        )
    async with services.database.write(audited=True) as connection:
        issued = services.authority.issue(key, device.id, device.project)
        kept = await connection.execute(
            update(_devices)
            .where(_devices.c.id == device.id, _devices.c.project_id == device.project, _devices.c.state == "active")
            .values(
                key_digest=key.key_digest,
                certificate_serial=issued.serial,
                certificate_expires_at=issued.expires_at,
                **({"content_key": content_key} if content_key else {}),
            )
        )
        if kept.rowcount != 1:
            raise RefusedError(
                "device_revoked",
                f"device {device.name!r} is not active any more",
                consequence="no certificate was issued",
                next_step="enrol it again with a new token",
            )
        await revocation.note(connection, services.project, device.id, issued)
        await audit.append(
            connection,
            services.project,
            f"device:{device.id}",
            "device.renew",
            device.name,
            certificate=issued.serial,
        )
    return wire.RenewAnswer(format=wire.FORMAT, certificate_pem=issued.pem)


class _Way(NamedTuple):
    """How a device may come in."""

    labels: dict[str, str]
    name: str = ""
    """Under which it has to come; empty: its own."""
    by_key: bool = False
    hold: bool = False
    again_only: bool = False
    """Only the device that came in by this key, whose answer got lost."""


async def _way_in(connection: AsyncConnection, project: str, token_hash: str, key: str) -> _Way:
    asked = await requests.find(connection, project, key)
    if asked is not None and asked.state == "expected":
        return _Way(asked.labels, asked.name, by_key=True)
    if asked is not None and asked.state == "refused":
        raise _refused("an operator refused the key of this device")
    try:
        return await _by_token(connection, project, token_hash)
    except RefusedError:
        if asked is not None and asked.state == "enrolled":
            return _Way(asked.labels, asked.name, again_only=True)
        raise


async def _by_token(connection: AsyncConnection, project: str, token_hash: str) -> _Way:
    token = (
        await connection.execute(
            select(_tokens.c.expires_at, _tokens.c.labels, _tokens.c.hold).where(
                _tokens.c.token_hash == token_hash, _tokens.c.project_id == project
            )
        )
    ).one_or_none()
    if token is None:
        raise _refused("the token is not known here")
    if token.expires_at <= now_us():
        raise _refused("the token has expired")
    return _Way(token.labels, hold=bool(token.hold))


async def _check_key(connection: AsyncConnection, project: str, key: str) -> None:
    """See that a key is no device's; of those that left for good only the copied ones count.

    Raises:
        RefusedError: `key_taken`.
    """
    cloned = _devices.c.state_reason == "cloned"
    taken = await connection.scalar(
        select(_devices.c.name)
        .where(
            _devices.c.project_id == project,
            _devices.c.key_digest == key,
            or_(_devices.c.state != "decommissioned", cloned),
        )
        .limit(1)
    )
    if taken is not None:
        raise RefusedError(
            "key_taken",
            f"the key of this device is, or was, that of {taken!r}",
            consequence="this device was not enrolled",
            next_step="remove the folder identity of its home, so that it makes a key of its own, and enrol it again",
        )


def _token_hash(token: str) -> str:
    parts = token.split(".")
    if len(parts) != 3 or parts[0] != TOKEN_PREFIX:
        raise _refused("it is not an enrolment token")
    return hash_secret(parts[1])


def _refused(why: str) -> RefusedError:
    return RefusedError(
        "enrolment_refused",
        f"enrolment refused: {why}",
        consequence="the device was not enrolled",
        next_step="have an operator make a new token: wherry token create",
    )


async def _use(connection: AsyncConnection, token_hash: str) -> None:
    used = await connection.execute(
        update(_tokens)
        .where(_tokens.c.token_hash == token_hash, _tokens.c.uses_left > 0)
        .values(uses_left=_tokens.c.uses_left - 1)
    )
    if used.rowcount != 1:
        raise _refused("the token is used up")


async def _insert(
    connection: AsyncConnection,
    services: Services,
    request: wire.EnrolRequest,
    *,
    name: str,
    device: str,
    labels: dict[str, str],
    key: Request,
    issued: Issued,
    bearer: str,
) -> None:
    now = now_us()
    await connection.execute(
        insert(Device).values(
            id=device,
            project_id=services.project,
            name=name,
            labels=labels,
            facts=facts_to_keep(request.facts) if request.facts is not None else {},
            bearer_hash=hash_secret(bearer),
            key_digest=key.key_digest,
            certificate_serial=issued.serial,
            certificate_expires_at=issued.expires_at,
            enrolled_at=now,
            last_seen_at=now,
            simulated=labels.get("simulated") == "true",
            content_key=checked_public(request.content_key),
        )
    )
