"""Tokens: for people and machines that operate, and for devices that enrol. Each is shown once, when it is made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import api_tokens, audit, enrolment
from wherry_server import enrolment_requests as requests
from wherry_server.answers import EnrolmentShown, Expected, TokenMade, TokenSummary, shaped
from wherry_server.api import etags
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import Admin, Operator, ServicesDep
from wherry_server.db.tables import ApiToken, table
from wherry_server.grants import SCOPE_MAX, Role
from wherry_server.secrets_kept import hash_secret
from wherry_shared.errors import RefusedError

router = APIRouter(prefix="/api/v1", tags=["access"], route_class=Again)

_tokens = table(ApiToken)
ScopeName = Annotated[str, Field(pattern="^[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?$")]


class TokenRequest(BaseModel):
    """An API token to make."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern="^[a-zA-Z0-9][a-zA-Z0-9._@-]{0,63}$")
    role: Role
    days: int = Field(default=90, ge=1, le=api_tokens.TOKEN_DAYS_MAX)
    models: list[ScopeName] = Field(default=[], max_length=SCOPE_MAX, description="narrows what it may change to these")
    cohorts: list[ScopeName] = Field(
        default=[], max_length=SCOPE_MAX, description="narrows what it may change to these"
    )


class EnrolmentTokenRequest(BaseModel):
    """A token by which devices enrol; `labels` are put on each of them."""

    model_config = ConfigDict(extra="forbid")
    uses: int = Field(default=1, ge=1, le=enrolment.USES_MAX)
    days: int = Field(default=7, ge=1, le=enrolment.DAYS_MAX)
    labels: dict[str, str] = Field(default_factory=dict)
    hold: bool = Field(default=False, description="whether a person has to accept each device")


class ExpectedDevice(BaseModel):
    """A device that may enrol by its key: `public_key` is PEM, or the digest that the device prints."""

    model_config = ConfigDict(extra="forbid")
    public_key: str = Field(min_length=1, max_length=2000)
    name: str = Field(default="", pattern="^([A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?)?$")
    labels: dict[str, str] = Field(default_factory=dict)
    days: int = Field(default=30, ge=1, le=enrolment.DAYS_MAX)


@router.post("/tokens", status_code=201)
async def create_token(body: TokenRequest, services: ServicesDep, admin: Admin) -> TokenMade:
    """Make an API token."""
    async with services.database.write() as connection:
        token = await api_tokens.create(
            connection,
            services.project,
            body.name,
            body.role,
            body.days,
            models=body.models,
            cohorts=body.cohorts,
        )
        await audit.append(
            connection,
            services.project,
            admin.actor,
            "token.create",
            body.name,
            id=hash_secret(token)[:12],
            role=body.role,
            days=body.days,
            models=body.models,
            cohorts=body.cohorts,
        )
    return TokenMade(token=token)


@router.get("/tokens")
async def list_tokens(
    services: ServicesDep,
    _admin: Admin,
    page: Paging,
    name: Annotated[str, Query(max_length=64, description="part of the name")] = "",
    role: Annotated[Role | None, Query()] = None,
) -> list[TokenSummary]:
    """List API tokens, the oldest first."""
    async with services.database.read() as connection:
        rows = await connection.execute(
            select(_tokens).where(_tokens.c.project_id == services.project).order_by(_tokens.c.created_at)
        )
        found = [_summary(row) for row in rows if name in row.name and role in (None, row.role)]
    return page.cut(found, lambda one: [one.created_at, one.id])


@router.get("/tokens/{token_id}")
async def show_token(token_id: str, response: Response, services: ServicesDep, _admin: Admin) -> TokenSummary:
    """Show an API token by the id that the list shows."""
    async with services.database.read() as connection:
        found = _summary(await _find(connection, services.project, token_id))
    response.headers["ETag"] = etags.etag(asdict(found))
    return found


@router.delete("/tokens/{token_id}", status_code=204)
async def revoke_token(token_id: str, services: ServicesDep, admin: Admin, if_match: etags.IfMatch = "") -> None:
    """Revoke an API token by the id that the list shows; from then on it opens nothing."""
    async with services.database.write() as connection:
        row = await _find(connection, services.project, token_id)
        etags.check(if_match, etags.etag(asdict(_summary(row))), "token_changed", f"token {token_id[:80]}")
        await connection.execute(delete(_tokens).where(_tokens.c.token_hash == row.token_hash))
        was = {"name": row.name, "role": row.role, "models": row.models, "cohorts": row.cohorts}
        await audit.append(connection, services.project, admin.actor, "token.revoke", row.token_hash[:12], before=was)


async def _find(connection: AsyncConnection, project: str, token_id: str) -> Any:
    rows = await connection.execute(select(_tokens).where(_tokens.c.project_id == project))
    found = [row for row in rows if len(token_id) >= 12 and row.token_hash.startswith(token_id)]
    if len(found) != 1:
        raise RefusedError(
            "token_unknown", f"there is no token {token_id[:80]!r}", next_step="see the ids: wherry token list"
        )
    return found[0]


def _summary(row: Any) -> TokenSummary:
    return TokenSummary(
        id=row.token_hash[:12],
        name=row.name,
        role=row.role,
        models=row.models,
        cohorts=row.cohorts,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


@router.post("/enrolment-tokens", status_code=201)
async def create_enrolment_token(body: EnrolmentTokenRequest, services: ServicesDep, operator: Operator) -> TokenMade:
    """Make a token by which devices enrol."""
    async with services.database.write() as connection:
        token = await enrolment.create_token(
            connection,
            services,
            operator.actor,
            uses=body.uses,
            days=body.days,
            labels=body.labels,
            hold=body.hold,
        )
    return TokenMade(token=token)


@router.get("/enrolment-requests")
async def list_enrolment_requests(services: ServicesDep, _operator: Operator, page: Paging) -> list[EnrolmentShown]:
    """List the keys that wait for a person, may enrol, or were refused."""
    async with services.database.read() as connection:
        found = await requests.waiting(connection, services.project, page.limit)
    return [shaped(EnrolmentShown, one) for one in found]


@router.post("/enrolment-requests", status_code=201)
async def expect_device(body: ExpectedDevice, services: ServicesDep, operator: Operator) -> Expected:
    """Let the device with a key in when it comes, without a secret."""
    enrolment.check_labels(body.labels)
    key = requests.key_of(body.public_key)
    actor = operator.actor
    async with services.database.write() as connection:
        await requests.expect(
            connection, services.project, actor, key=key, name=body.name, labels=body.labels, days=body.days
        )
        await audit.append(connection, services.project, actor, "enrolment.expect", key, name=body.name)
    return Expected(key=key, token=enrolment.token_by_key(services))


@router.post("/enrolment-requests/{key}/{verdict}")
async def settle_enrolment(
    key: str, verdict: Literal["accept", "refuse"], services: ServicesDep, operator: Operator
) -> EnrolmentShown:
    """Accept or refuse a key that waits, named by its first twelve digits, or by the name under which it asks."""
    state = {"accept": "expected", "refuse": "refused"}[verdict]
    async with services.database.write() as connection:
        row = await requests.settle(connection, services.project, key, state)
        await audit.append(
            connection,
            services.project,
            operator.actor,
            f"enrolment.{verdict}",
            row.key_digest,
            name=row.name,
        )
        found = await requests.waiting(connection, services.project, requests.EXPECTED_MAX)
    return shaped(EnrolmentShown, next(one for one in found if one["key"] == row.key_digest))
