"""Which bundles there are: accepted once, after everything that can be checked was checked, and never changed.

A bundle is accepted when its manifest and config parse and agree, every blob is here with its declared size, and a bin
at threshold names this very manifest. From then on the devices that are meant to have it may read its blobs (`reading`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import audit, content_keys, uploads
from wherry_server.db.tables import BlobEncoding, BlobOwner, Bundle, DeviceModel, table
from wherry_server.services import Services
from wherry_server.times import now_us
from wherry_shared.bundle import (
    ANNOTATION_ENCRYPTION,
    ASSETS_TYPE,
    WEIGHT_TYPE,
    Config,
    Manifest,
    parse_config,
    parse_manifest,
)
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError
from wherry_shared.ids import parse_version, target_path
from wherry_shared.image_layout import check_layers
from wherry_shared.limits import CONFIG_BYTES_MAX, MANIFEST_BYTES_MAX
from wherry_shared.wire import SealedKey

MISSING_LISTED_MAX = 20
BUNDLES_LISTED_MAX = 10_000

_bundles = table(Bundle)
_owners = table(BlobOwner)
_encodings = table(BlobEncoding)
_device_models = table(DeviceModel)


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of `publish`."""

    manifest: str
    created: bool
    """False if this very bundle had been accepted before."""
    weights: list[str]
    """Digests of what may be encoded."""


async def publish(
    services: Services,
    actor: str,
    model: str,
    version: str,
    manifest_digest: str,
    keys: Sequence[SealedKey] = (),
) -> Accepted:
    """Accept a bundle whose blobs were uploaded and whose bin was signed.

    Raises:
        RefusedError: `manifest_*`, `config_*`, `bundle_mismatch`, `blob_missing`, `unsigned`, `version_taken`,
            `content_keys_missing` or `content_key_invalid`.
    """
    path = target_path(model, version)
    check_digest(manifest_digest)
    manifest, config, manifest_bytes = await _read(services, manifest_digest)
    if (config.model, config.version) != (model, version):
        raise RefusedError(
            "bundle_mismatch",
            f"the config says {config.model}/{config.version}, not {path}",
            consequence="the bundle was not accepted",
            next_step="push it under the name and version that it was built with",
        )
    await _check_blobs(services, manifest_digest, manifest)
    await _check_signed(services, model, version, manifest_digest)
    blobs: dict[str, tuple[int, str]] = {manifest_digest: (manifest_bytes, "manifest")}
    for descriptor in (manifest.config, *manifest.layers):
        raw = ANNOTATION_ENCRYPTION not in descriptor.annotations  # ciphertext does not get smaller
        kind = "weights" if raw and descriptor.media_type in (WEIGHT_TYPE, ASSETS_TYPE) else "other"
        blobs.setdefault(descriptor.digest, (descriptor.size, kind))
    async with services.database.write() as connection:
        standing = await connection.scalar(
            select(_bundles.c.manifest).where(
                _bundles.c.project_id == services.project, _bundles.c.model == model, _bundles.c.version == version
            )
        )
        if standing is not None and standing != manifest_digest:
            raise RefusedError(
                "version_taken",
                f"{path} is bound to another manifest for ever",
                consequence="nothing was changed",
                next_step="build it under a new version",
            )
        await content_keys.store(connection, services.project, manifest_digest, manifest, keys)
        if standing is None:
            await connection.execute(
                insert(Bundle).values(
                    project_id=services.project,
                    model=model,
                    version=version,
                    manifest=manifest_digest,
                    manifest_bytes=manifest_bytes,
                    config=msgspec.to_builtins(config),
                    total_bytes=sum(size for size, _ in blobs.values()),
                    created_at=now_us(),
                    created_by=actor,
                )
            )
            await _own(connection, services.project, blobs)
            await audit.append(
                connection, services.project, actor, "bundle.publish", path, manifest=manifest_digest, blobs=len(blobs)
            )
    weights = [digest for digest, (_, kind) in blobs.items() if kind == "weights"]
    return Accepted(manifest=manifest_digest, created=standing is None, weights=weights)


async def _read(services: Services, digest: str) -> tuple[Manifest, Config, int]:
    data = await _get(services, digest, MANIFEST_BYTES_MAX)
    manifest = parse_manifest(data)
    config = parse_config(await _get(services, manifest.config.digest, CONFIG_BYTES_MAX))
    check_layers(manifest, config)
    return manifest, config, len(data)


async def _get(services: Services, digest: str, bytes_max: int) -> bytes:
    try:
        return await services.blobs.get(digest, bytes_max=bytes_max)
    except RefusedError as error:
        if error.code != "blob_unknown":
            raise
        raise _missing([digest]) from error


async def _check_blobs(services: Services, digest: str, manifest: Manifest) -> None:
    descriptors = (manifest.config, *manifest.layers)
    named = [digest, *(one.digest for one in descriptors)]
    async with services.database.read() as connection:
        here = await uploads.here(connection, services.blobs, named, services.settings.uploads_days, now_s=time.time())
    missing = [digest] if digest not in here else []
    for descriptor in descriptors:
        found = here.get(descriptor.digest)
        if found is None:
            missing.append(descriptor.digest)
        elif found.bytes != descriptor.size:
            raise RefusedError(
                "manifest_invalid",
                f"the manifest says {descriptor.size} bytes for {descriptor.digest}, which has {found.bytes}",
                consequence="the bundle was not accepted",
                next_step="build the bundle again",
            )
    if missing:
        raise _missing(missing)


def _missing(digests: list[str]) -> RefusedError:
    shown = ", ".join(digests[:MISSING_LISTED_MAX])
    more = f" and {len(digests) - MISSING_LISTED_MAX} more" if len(digests) > MISSING_LISTED_MAX else ""
    return RefusedError(
        "blob_missing",
        f"not uploaded: {shown}{more}",
        consequence="the bundle was not accepted",
        next_step="upload the blobs, then publish again (wherry bundle push does both)",
    )


async def _check_signed(services: Services, model: str, version: str, manifest_digest: str) -> None:
    signed = await asyncio.to_thread(services.trust.target, model, version)
    if signed != manifest_digest:
        detail = "no signed bin names it" if signed is None else f"the signed bin names {signed}"
        raise RefusedError(
            "unsigned",
            f"{model}/{version} with manifest {manifest_digest} is not signed: {detail}",
            consequence="the bundle was not accepted, and no device would run it",
            next_step="sign it with a publisher's key (wherry-optimizer sign PATH), then push it again",
        )


async def _own(connection: AsyncConnection, project: str, blobs: dict[str, tuple[int, str]]) -> None:
    known = set(
        await connection.scalars(
            select(_owners.c.digest).where(_owners.c.project_id == project, _owners.c.digest.in_(list(blobs)))
        )
    )
    now = now_us()
    fresh = [
        {"project_id": project, "digest": digest, "bytes": size, "created_at": now, "kind": kind}
        for digest, (size, kind) in blobs.items()
        if digest not in known
    ]
    if fresh:
        await connection.execute(insert(BlobOwner), fresh)


# --- reading ------------------------------------------------------------------------------------


async def list_bundles(connection: AsyncConnection, project: str, model: str | None) -> list[dict[str, Any]]:
    """Return summaries, model by model, the newest version first."""
    query = select(_bundles).where(_bundles.c.project_id == project).limit(BUNDLES_LISTED_MAX)
    if model is not None:
        query = query.where(_bundles.c.model == model)
    rows = (await connection.execute(query.order_by(_bundles.c.id.desc()))).all()
    downloads = await _downloads(connection, project)
    found = [_summary(row, downloads) for row in rows]
    found.sort(key=lambda bundle: parse_version(bundle["version"]).key, reverse=True)
    found.sort(key=lambda bundle: str(bundle["model"]))
    return found


async def show_bundle(connection: AsyncConnection, project: str, model: str, version: str) -> dict[str, Any]:
    """Return a bundle with its config.

    Raises:
        RefusedError: `bundle_unknown`.
    """
    row = (
        await connection.execute(
            select(_bundles).where(
                _bundles.c.project_id == project, _bundles.c.model == model, _bundles.c.version == version
            )
        )
    ).one_or_none()
    if row is None:
        raise RefusedError(
            "bundle_unknown",
            f"there is no bundle {model[:80]}/{version[:80]}",
            next_step="see which there are: wherry bundle list",
        )
    return {**_summary(row, await _downloads(connection, project)), "config": row.config}


async def list_models(connection: AsyncConnection, project: str) -> list[dict[str, Any]]:
    """Return every model with its versions and how many devices run something of it."""
    rows = (
        await connection.execute(
            select(_bundles.c.model, _bundles.c.version, _bundles.c.created_at).where(_bundles.c.project_id == project)
        )
    ).all()
    counted = await connection.execute(
        select(_device_models.c.model, func.count().label("devices"))
        .where(_device_models.c.project_id == project, _device_models.c.running != "")
        .group_by(_device_models.c.model)
    )
    running = {row.model: row.devices for row in counted}
    versions: dict[str, list[str]] = {}
    newest: dict[str, int] = {}
    for row in rows:
        versions.setdefault(row.model, []).append(row.version)
        newest[row.model] = max(newest.get(row.model, 0), row.created_at)
    return [
        {
            "name": name,
            "versions": sorted(versions[name], key=lambda version: parse_version(version).key, reverse=True),
            "devices": running.get(name, 0),
            "published_at": newest[name],
        }
        for name in sorted(versions)
    ]


async def _downloads(connection: AsyncConnection, project: str) -> dict[str, int]:
    rows = await connection.execute(
        select(_encodings.c.digest, _encodings.c.bytes).where(_encodings.c.project_id == project)
    )
    return {row.digest: row.bytes for row in rows}


def _summary(row: Any, downloads: dict[str, int]) -> dict[str, Any]:
    config = row.config
    return {
        "model": row.model,
        "version": row.version,
        "manifest": row.manifest,
        "total_bytes": row.total_bytes,
        "created_at": row.created_at,
        "created_by": row.created_by,
        "description": config.get("description", ""),
        "licence": config["licence"]["expression"],
        "variants": list(_variants(config, downloads)),
    }


def _variants(config: dict[str, Any], downloads: dict[str, int]) -> Iterable[dict[str, Any]]:
    for variant in config["variants"]:
        yield {
            "id": variant["id"],
            "digest": variant["digest"],
            "format": variant["format"],
            "precision": variant["precision"],
            "engines": [engine["name"] for engine in variant["engines"]],
            "bytes": variant["bytes"],
            "download_bytes": downloads.get(variant["digest"], variant["bytes"]),
            "accuracy": variant.get("accuracy"),
            "figures": variant.get("figures", {}),
        }
