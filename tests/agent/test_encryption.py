"""Encrypted bundles from the publisher's folder to an answer: ciphertext everywhere but in memory, keys for one device each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.test_courier import Device, manifest_of, publish
from tests.trust_kit import RunningServer, running_server, write_bundle
from wherry_agent.children import Fetched, Resolved
from wherry_agent.device_keys import open_blob
from wherry_server.db.database import Database
from wherry_server.keys_role import KeysRole
from wherry_shared.digest import of_bytes
from wherry_shared.encrypting import encrypt
from wherry_shared.key_ring import KeyRing
from wherry_shared.publishing import PublisherKey

SECRET = os.urandom(48)
WEIGHTS = os.urandom(400_000) + SECRET * 40
"""A run of it is looked for where only ciphertext may be."""
_names = iter(range(1000))


class Site:
    """A server, its keys role in a folder of its own, and a publisher."""

    def __init__(self, folder: Path, server: RunningServer) -> None:
        self.folder = folder
        self.server = server
        self.role_ring = KeyRing(folder / "role")
        self.role_ring.add()
        self.publisher = KeyRing(folder / "publisher")
        self.publisher.add()
        self.key = PublisherKey.open(folder / "workstation" / "publisher.pem")

    def encrypted(self, version: str, *, fresh: bool = False, weights: bytes = WEIGHTS) -> Path:
        plain, target = self.folder / f"plain-{version}", self.folder / f"thing-{version}"
        write_bundle(plain, version, weights=weights)
        encrypt(plain, target, self.role_ring.current(), self.publisher, fresh=fresh)
        return publish(self.server, self.key, target)

    def wrap(self, manifest: str, *devices: str) -> int:
        async def work() -> int:
            database = Database.open(self.server.settings.database_url)
            try:
                role = KeysRole(database, "default", KeyRing(self.role_ring.folder))
                return await role.wrap_ahead(manifest, devices)
            finally:
                await database.close()

        return asyncio.run(work())

    def device(self, home: Path) -> Device:
        return Device(home, self.server, f"dark-{next(_names)}")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with running_server(folder / "server") as server:
        yield Site(folder, server)


@pytest.fixture(scope="module")
def bundle(site: Site) -> Path:
    return site.encrypted("1.0.0")


def holds_secret(*folders: Path) -> list[Path]:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in files if SECRET in path.read_bytes() or SECRET[:32].hex().encode() in path.read_bytes()]


def installed(device: Device, bundle: Path, version: str = "1.0.0") -> Resolved:
    manifest = manifest_of(bundle)
    found = device.resolve(f"thing/{version}", manifest)
    assert isinstance(found, Resolved), found
    assert isinstance(device.fetch(manifest), Fetched)
    return found


def test_weights_are_ciphertext_on_server_mirror_and_device_and_plain_in_memory(site, bundle, tmp_path):
    device = site.device(tmp_path / "device")
    site.wrap(manifest_of(bundle), device.id)
    loadable = installed(device, bundle).candidates[0].loadable
    assert loadable.digest == of_bytes(WEIGHTS)
    assert loadable.encrypted
    assert open_blob(Path(loadable.path), loadable.digest) == WEIGHTS
    assert open_blob(Path(loadable.golden_path), loadable.golden_plain) == b"golden" + WEIGHTS[:32]
    assert holds_secret(site.folder / "plain-1.0.0"), "or the search finds nothing anywhere"
    assert not holds_secret(bundle, site.folder / "server", device.home)
