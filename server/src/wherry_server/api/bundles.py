"""Models and bundles: publish, list, show."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from wherry_server import catalogue
from wherry_server.answers import BundleDetail, BundleSummary, ModelSummary, shaped
from wherry_server.api.again import Again
from wherry_server.api.pages import Paging
from wherry_server.auth import ScopedPublisher, ServicesDep, Viewer
from wherry_server.encodings import Encoder
from wherry_server.grants import Subject
from wherry_shared.limits import VARIANTS_MAX
from wherry_shared.wire import SealedKey

DIGEST = "^sha256:[0-9a-f]{64}$"
SEALED_CHARS_MAX = 200
"""HPKE's encapsulated key (32 bytes), a content key (32) and its tag (16), in base64, and room for a longer way to seal."""

router = APIRouter(prefix="/api/v1", tags=["bundles"], route_class=Again)


class SealedKeyBody(BaseModel):
    """The content key of an encrypted blob, sealed for the keys role: docs/formats/encryption.md."""

    model_config = ConfigDict(extra="forbid")
    format: int
    model: str = Field(max_length=64)
    plain: str = Field(pattern=DIGEST)
    blob: str = Field(pattern=DIGEST)
    recipient: str = Field(pattern=DIGEST)
    sealed: str = Field(max_length=SEALED_CHARS_MAX)


class PublishRequest(BaseModel):
    """Which manifest a version is, after its blobs were uploaded and its bin was signed."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(max_length=64)
    version: str = Field(max_length=64)
    manifest: str = Field(max_length=71)
    keys: list[SealedKeyBody] = Field(default=[], max_length=2 * VARIANTS_MAX)
    """Of a bundle that is encrypted: one for each encrypted blob."""


@router.post(
    "/bundles", status_code=201, responses={200: {"model": BundleDetail, "description": "It was here already"}}
)
async def publish_bundle(
    body: PublishRequest, request: Request, response: Response, services: ServicesDep, publisher: ScopedPublisher
) -> BundleDetail:
    """Accept a bundle: everything is here, it parses and agrees, and a signed bin names it."""
    publisher.check("publish", Subject(models=frozenset({body.model})))
    keys = [SealedKey(**key.model_dump()) for key in body.keys]
    accepted = await catalogue.publish(services, publisher.actor, body.model, body.version, body.manifest, keys)
    encoder: Encoder | None = request.app.state.encoder
    if accepted.created and encoder is not None:
        encoder.add(accepted.weights)
    response.status_code = 201 if accepted.created else 200
    return await show_bundle(body.model, body.version, services, publisher)


@router.get("/bundles")
async def list_bundles(
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    model: Annotated[str | None, Query(max_length=64)] = None,
) -> list[BundleSummary]:
    """List bundles, the newest version of each model first."""
    async with services.database.read() as connection:
        found = await catalogue.list_bundles(connection, services.project, model)
    return [shaped(BundleSummary, one) for one in page.listed(found, lambda one: [one["model"], one["version"]])]


@router.get("/bundles/{model}/{version}")
async def show_bundle(model: str, version: str, services: ServicesDep, _viewer: Viewer) -> BundleDetail:
    """Show a bundle with its signed config."""
    async with services.database.read() as connection:
        found = await catalogue.show_bundle(connection, services.project, model, version)
    return shaped(BundleDetail, found)


@router.get("/models")
async def list_models(
    services: ServicesDep,
    _viewer: Viewer,
    page: Paging,
    name: Annotated[str, Query(max_length=64, description="part of the name")] = "",
) -> list[ModelSummary]:
    """List models."""
    async with services.database.read() as connection:
        found = await catalogue.list_models(connection, services.project)
    taken = page.cut([one for one in found if name in one["name"]], lambda one: [one["name"]])
    return [shaped(ModelSummary, one) for one in taken]
