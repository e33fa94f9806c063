"""What every part of a server process shares, opened once: settings, database, blobs, trust, keys.

`prepare` makes a data folder usable and may be repeated; `open_services` only opens what is there.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import insert, select

from wherry_server import audit
from wherry_server.blob_folder import FolderBlobs
from wherry_server.blobs import Blobs
from wherry_server.db import migrate
from wherry_server.db.database import Database
from wherry_server.db.tables import Project, table
from wherry_server.identity import DeviceAuthority
from wherry_server.secret_files import write_secret
from wherry_server.settings import Settings
from wherry_server.spool import Spool
from wherry_server.times import now_us
from wherry_server.trust import Trust
from wherry_shared.errors import DeviceError
from wherry_shared.frames import KEY_BYTES


@dataclass(frozen=True, slots=True)
class Services:
    """The open parts of one server process."""

    settings: Settings
    database: Database
    blobs: Blobs
    trust: Trust
    authority: DeviceAuthority
    project: str
    proxy_secret: str
    """What a proxy that ends TLS says to be believed; empty: there is none."""
    master_key: bytes
    """Frame keys of devices are derived from it: `wherry_shared.frames.device_key`."""

    async def close(self) -> None:
        """Close what holds files and connections."""
        await self.database.close()


def prepare(settings: Settings) -> None:
    """Make the data folder ready: keys, development trust, schema, project. Repeating it changes nothing."""
    settings.data.mkdir(parents=True, exist_ok=True)
    settings.data.chmod(0o700)
    settings.keys_folder.mkdir(exist_ok=True)
    settings.keys_folder.chmod(0o700)
    if not settings.master_key_file.exists():
        write_secret(settings.master_key_file, secrets.token_bytes(KEY_BYTES))
    DeviceAuthority.create(settings.keys_folder, settings.project)
    Trust.create_dev(settings.trust_folder)
    before = migrate.upgrade(settings.database_url)
    asyncio.run(_ensure_project(settings, before))


async def _ensure_project(settings: Settings, before: str) -> None:
    """Have the project in the database, whose schema was `before`."""
    key = audit.seal_key(settings.master_key_file.read_bytes())
    database = Database.open(settings.database_url, audit_key=key)
    projects = table(Project)
    try:
        async with database.write() as connection:
            found = await connection.scalar(
                select(projects.c.project_id).where(projects.c.project_id == settings.project)
            )
            if found is None:
                await connection.execute(insert(Project).values(project_id=settings.project, created_at=now_us()))
                await audit.begin(connection, settings.project)
            elif before < migrate.SEALS:
                await audit.seal_head(connection, settings.project)
    finally:
        await database.close()


def open_blobs(settings: Settings) -> Blobs:
    """Open where blobs are; a bucket is asked nothing yet.

    Raises:
        RefusedError: `settings_invalid`.
        DeviceError: `disk`.
    """
    folder = settings.blobs_folder
    if folder is not None:
        return FolderBlobs(folder)
    from wherry_server.blob_bucket import BucketBlobs, Credentials

    return BucketBlobs(
        settings.blobs,
        Spool(settings.spool_folder),
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        public_endpoint=settings.s3_public_endpoint,
        credentials=Credentials.load(settings.s3_key_file),
    )


def open_services(settings: Settings) -> Services:
    """Open a prepared data folder.

    Raises:
        DeviceError: `not_prepared`, if the folder has no keys yet.
    """
    try:
        master_key = settings.master_key_file.read_bytes()
    except FileNotFoundError as error:
        raise DeviceError(
            "not_prepared",
            f"{settings.data} is not the data folder of a Wherry server",
            consequence="nothing was started",
            next_step="start it once with: wherry dev",
        ) from error
    return Services(
        settings=settings,
        database=Database.open(settings.database_url, audit_key=audit.seal_key(master_key)),
        blobs=open_blobs(settings),
        trust=Trust.open(settings.trust_folder),
        authority=DeviceAuthority.open(settings.keys_folder, days=settings.certificate_days),
        project=settings.project,
        proxy_secret=_read_secret(settings.proxy_secret_file),
        master_key=master_key,
    )


def _read_secret(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
