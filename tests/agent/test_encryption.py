"""Encrypted bundles from the publisher's folder to an answer: ciphertext everywhere but in memory, keys for one device each."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.agent.serving_kit import loadable, worker
from tests.agent.test_courier import Device, manifest_of, publish, reason
from tests.agent.test_handle import ONES, Supervisor
from tests.offering import give
from tests.shared.engines import models
from tests.trust_kit import RunningServer, running_server, write_bundle
from wherry_agent import identity
from wherry_agent.answering.arms import load_variant, reason_of
from wherry_agent.answering.intact import Unlocking
from wherry_agent.canary import judge
from wherry_agent.children import Fetched, Judge, Loadable, Renew, Renewed, Resolved, Scrub, Serve, ServeModel, Serving
from wherry_agent.courier import run
from wherry_agent.courier_scrub import scrub
from wherry_agent.device_keys import DeviceKeys, open_blob
from wherry_agent.disk import Disk
from wherry_agent.sealing import Seal
from wherry_agent.store import Store
from wherry_server.db.database import Database
from wherry_server.keys_role import KeysRole
from wherry_shared import content_keys, reasons, tiles, wire
from wherry_shared.bundle import ANNOTATION_PLAIN_DIGEST
from wherry_shared.digest import of_bytes
from wherry_shared.encrypting import encrypt
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.image_layout import Layout
from wherry_shared.key_ring import KeyRing
from wherry_shared.publishing import PublisherKey, push, sign

T = TypeVar("T")
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

    def role(self, work: Callable[[KeysRole], Awaitable[T]]) -> T:
        """Do something as the keys role, which has the database and its own folder."""

        async def run_it() -> T:
            database = Database.open(self.server.settings.database_url)
            try:
                return await work(KeysRole(database, "default", KeyRing(self.role_ring.folder)))
            finally:
                await database.close()

        return asyncio.run(run_it())

    def wrap(self, manifest: str, *devices: str) -> int:
        return self.role(lambda role: role.wrap_ahead(manifest, devices))

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


def test_without_its_key_a_device_waits_before_weights_and_blames_nobody(site, bundle, tmp_path):
    device, manifest = site.device(tmp_path / "device"), manifest_of(bundle)
    answer = device.resolve("thing/1.0.0", manifest)
    assert reason(answer) == reasons.KEY_MISSING
    assert reasons.KEY_MISSING in reasons.NEUTRAL
    assert answer.retry_after_s
    layers = Layout(bundle).bundle()[1].layers
    weights = next(layer for layer in layers if ANNOTATION_PLAIN_DIGEST in layer.annotations)
    assert not Path(device.home, "store", "blobs", "sha256", weights.digest[7:]).exists()
    assert reason(device.fetch(manifest)) == reasons.KEY_MISSING
    assert site.wrap(manifest, device.id) == 2
    assert site.wrap(manifest, device.id) == 0, "what is wrapped is not wrapped again"
    installed(device, bundle)


def test_a_device_of_an_older_release_gets_its_key_with_its_next_certificate(site, bundle, tmp_path):
    device, manifest = site.device(tmp_path / "device"), manifest_of(bundle)
    known = identity.load(device.home)
    identity.write(device.home, Disk(), msgspec.structs.replace(known, content_key=""))
    next((device.home / "identity").glob("content-*.pem")).unlink()
    site.wrap(manifest, device.id)
    answer = device.resolve("thing/1.0.0", manifest)
    assert reason(answer) == reasons.KEY_MISSING
    assert "renews its certificate" in answer.detail
    assert isinstance(run(Renew(home=str(device.home), server=""), print), Renewed)
    assert site.wrap(manifest, device.id) == 2, "the key on the server is another one now"
    installed(device, bundle)


def test_a_device_gets_its_own_keys_only_and_no_other_device_could_open_them(site, bundle, tmp_path):
    manifest = manifest_of(bundle)
    one, other, stranger = (site.device(tmp_path / name) for name in ("one", "other", "stranger"))
    site.wrap(manifest, one.id, other.id, stranger.id)
    for device in (one, other):
        give(site.server.settings, device.id, manifest)
    mine, theirs = asked(site, one, manifest), asked(site, other, manifest)
    assert {record.device for record in mine} == {one.id}
    assert {record.device for record in theirs} == {other.id}
    assert asked(site, stranger, manifest) == [], "nor one to whom nobody gave the bundle"
    for record in theirs:
        with pytest.raises(RefusedError, match="not on this device"):
            DeviceKeys(one.home).keep(record, Disk())
        own = msgspec.structs.replace(record, recipient=mine[0].recipient, device=one.id)
        with pytest.raises(RefusedError, match="does not open"):
            DeviceKeys(one.home).keep(own, Disk())


def asked(site: Site, device: Device, manifest: str) -> list[wire.SealedKey]:
    known = identity.load(device.home)
    assert known is not None
    with httpx.Client(base_url=site.server.url, trust_env=False) as http:
        answer = http.get(f"/device/v1/keys/{manifest}", headers={"Authorization": known.authorization})
    return wire.parse(wire.SealedKeys, answer.content).keys if answer.status_code == 200 else []


def test_a_revoked_device_loses_its_wraps_and_gets_no_more(site, bundle, tmp_path):
    device, manifest = site.device(tmp_path / "device"), manifest_of(bundle)
    assert site.wrap(manifest, device.id) == 2
    with httpx.Client(base_url=site.server.url, trust_env=False) as http:
        answer = http.post(
            f"/api/v1/devices/{device.id}/revoke", headers={"Authorization": f"Bearer {site.server.token}"}
        )
        assert answer.status_code < 300, answer.text
    assert site.wrap(manifest, device.id) == 0
    with sqlite3.connect(site.folder / "server" / "wherry.sqlite") as database:
        left = database.execute("SELECT count(*) FROM wrapped_key WHERE device_id = ?", (device.id,)).fetchone()
    assert left == (0,)


def test_the_server_without_its_keys_role_opens_nothing(site, bundle, tmp_path):
    device, manifest = site.device(tmp_path / "device"), manifest_of(bundle)
    site.wrap(manifest, device.id)
    plain = {layer.annotations.get(ANNOTATION_PLAIN_DIGEST) for layer in Layout(bundle).bundle()[1].layers} - {None}
    keys = [site.publisher.content_key("thing", digest) for digest in plain]
    assert len(keys) == 2
    for path in (site.folder / "server").rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        for key in keys:
            assert key not in data, path
            assert key.hex().encode() not in data, path
            assert base64.b64encode(key)[:-1] not in data, path
        if path.suffix in (".pem", ".key"):
            assert b"X25519" not in data
    with sqlite3.connect(site.folder / "server" / "wherry.sqlite") as database:
        recipients = {
            row[0]
            for row in database.execute("SELECT recipient FROM content_key UNION SELECT recipient FROM wrapped_key")
        }
    assert content_keys.fingerprint(site.role_ring.current()) in recipients
    kept = [load_private(path) for path in (site.folder / "server").rglob("*.pem")]
    here = {content_keys.fingerprint(key.public_key()) for key in kept if isinstance(key, X25519PrivateKey)}
    assert not recipients & here, "no key on the server opens a row of it"


def load_private(path: Path) -> object:
    try:
        return load_pem_private_key(path.read_bytes(), None)
    except ValueError:
        return None


def test_a_download_that_was_killed_resumes_and_an_altered_file_is_fetched_again(site, bundle, tmp_path):
    device, manifest = site.device(tmp_path / "device"), manifest_of(bundle)
    site.wrap(manifest, device.id)
    found = device.resolve("thing/1.0.0", manifest)
    assert isinstance(found, Resolved)
    loadable = found.candidates[0].loadable
    at_rest = (bundle / "blobs" / "sha256" / loadable.at_rest[7:]).read_bytes()
    store = Store(device.home, Disk())
    with store.part(loadable.at_rest, len(at_rest)) as part:
        part.write(at_rest[:300_000], site.server.url)
        part.sync()
    fetched = device.fetch(manifest)
    assert isinstance(fetched, Fetched)
    assert fetched.bytes < len(at_rest) - 300_000 + 10_000, "the rest of the ciphertext, and the golden vectors"
    path = Path(loadable.path)
    path.write_bytes(at_rest[:1000] + bytes([at_rest[1000] ^ 1]) + at_rest[1001:])
    scrubbed = scrub(Scrub(home=str(device.home), versions=[loadable]), Disk(), sleep=lambda _s: None)
    assert [one.variant for one in scrubbed.altered] == ["float"]
    assert not path.exists()
    assert isinstance(device.fetch(manifest), Fetched)
    assert open_blob(path, loadable.digest) == WEIGHTS
    (device.home / "store" / "keys" / f"{loadable.at_rest[7:]}.json").write_bytes(b"{")
    scrubbed = scrub(Scrub(home=str(device.home), versions=[loadable]), Disk(), sleep=lambda _s: None)
    assert "no content key" in scrubbed.altered[0].detail
    assert isinstance(device.fetch(manifest), Fetched)
    assert open_blob(path, loadable.digest) == WEIGHTS


def test_a_renewal_seals_what_the_device_has_for_its_next_key(site, bundle, tmp_path):
    device = site.device(tmp_path / "device")
    site.wrap(manifest_of(bundle), device.id)
    loadable = installed(device, bundle).candidates[0].loadable
    before = next((device.home / "identity").glob("content-*.pem"))
    assert isinstance(run(Renew(home=str(device.home), server=""), print), Renewed)
    (after,) = (device.home / "identity").glob("content-*.pem")
    assert after != before
    assert stat.S_IMODE(after.stat().st_mode) == 0o600
    assert open_blob(Path(loadable.path), loadable.digest) == WEIGHTS


def test_a_renewal_of_the_key_that_power_ends_anywhere_loses_nothing(tmp_path):
    blob = of_bytes(b"at rest")
    for at in itertools.count():
        home = tmp_path / str(at)
        (home / "identity").mkdir(parents=True)
        keys = DeviceKeys(home)
        first = keys.make(Disk())
        record = content_keys.seal(b"k" * 32, first, model="thing", plain=of_bytes(b"p"), blob=blob, device="d")
        (home / "store").mkdir()
        keys.keep(record, Disk())
        steps = itertools.count()

        def hook(step: str, path: Path, steps: Iterator[int] = steps, at: int = at) -> None:
            if next(steps) == at:
                raise DeviceError("disk", "the power is gone")

        disk = Disk(hook=hook)
        try:
            second = keys.make(disk)
            keys.tidy(content_keys.fingerprint(second), disk)
        except DeviceError:
            assert keys.content_key(blob) == b"k" * 32
            continue
        assert keys.content_key(blob) == b"k" * 32
        assert at > 5, "it was cut short that often"
        return


def test_the_role_gets_another_key_and_older_bundles_reach_new_devices(site, bundle, tmp_path):
    device, manifest = site.device(tmp_path / "device"), manifest_of(bundle)
    old = content_keys.fingerprint(site.role_ring.current())
    site.role_ring.add()
    assert site.role(lambda role: role.reseal()) >= 2
    assert old not in site.role(lambda role: role.state())
    site.role_ring.drop(old)
    assert site.wrap(manifest, device.id) == 2
    installed(device, bundle)


def test_a_key_is_kept_for_the_same_plaintext_and_made_anew_on_demand(site, bundle, tmp_path):
    again, fresh = site.encrypted("1.1.0"), site.encrypted("1.2.0", fresh=True)
    device = site.device(tmp_path / "device")
    for path in (bundle, again, fresh):
        site.wrap(manifest_of(path), device.id)
    first = installed(device, bundle).candidates[0].loadable
    same = device.resolve("thing/1.1.0", manifest_of(again))
    assert same.candidates[0].bytes == 0, "the very same blobs"
    rotated = installed(device, fresh, "1.2.0").candidates[0].loadable
    assert (rotated.digest, rotated.golden_plain) == (first.digest, first.golden_plain)
    assert rotated.at_rest != first.at_rest
    old = DeviceKeys(device.home).content_key(first.at_rest)
    with pytest.raises(RefusedError, match="does not open"):
        tiles.open_all(io.BytesIO(Path(rotated.path).read_bytes()), old, first.digest)
    assert open_blob(Path(rotated.path), rotated.digest) == WEIGHTS


def test_an_encrypted_bundle_without_sealed_keys_is_not_accepted(site, tmp_path):
    write_bundle(tmp_path / "plain", "9.0.0", weights=WEIGHTS)
    encrypt(tmp_path / "plain", tmp_path / "dark", site.role_ring.current(), site.publisher)
    for path in (tmp_path / "dark" / ".wherry" / "keys").glob("*.json"):
        path.unlink()
    with site.server.remote() as remote:
        sign(tmp_path / "dark", remote, site.key)
        with pytest.raises(RefusedError, match="have no content key"):
            push(tmp_path / "dark", remote, site.key)


# --- in memory ------------------------------------------------------------------------------------


def at_rest(home: Path, item: Loadable, seal: Seal | None = None) -> Loadable:
    """Put a model into a device's store as an encrypted bundle leaves it there."""
    store, keys = Store(home, Disk()), DeviceKeys(home, identity.content_password(seal))
    (home / "identity").mkdir(exist_ok=True)
    public = keys.any_or_make(Disk(seal=seal))
    found = {}
    for path in (Path(item.path), Path(item.golden_path)):
        plain, key = path.read_bytes(), os.urandom(32)
        header = tiles.Header(len(plain), of_bytes(plain), len(plain), of_bytes(plain))
        sealed = b"".join(tiles.seal(path.open("rb"), header, key))
        store.add(of_bytes(sealed), sealed)
        record = content_keys.seal(key, public, model=item.model, plain=of_bytes(plain), blob=of_bytes(sealed))
        keys.keep(record, Disk())
        found[path] = of_bytes(sealed)
        path.unlink()
    return msgspec.structs.replace(
        item,
        path=str(store.path_of(found[Path(item.path)])),
        at_rest=found[Path(item.path)],
        golden_path=str(store.path_of(found[Path(item.golden_path)])),
        golden_plain="sha256:" + Path(item.golden_path).name,
    )


def test_canary_worker_and_handle_run_what_is_encrypted(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    item = at_rest(home, loadable(models.scale(tmp_path / "a.onnx", 3.0)))
    verdict = judge(Judge(candidate=item))
    assert verdict.passed, verdict
    with worker(tmp_path) as running:
        running.serve(ServeModel(name="scale", active=item))
        status, answer = running.infer([[1.0, 1.0, 1.0, 1.0]])
        assert (status, answer["outputs"][0]["data"]) == (200, [3.0] * 4)
        monkeypatch.setattr("wherry_agent.handle.load_variant", lambda *_: pytest.fail("no application has the keys"))
        supervisor = Supervisor(tmp_path, str(running.unix_path))
        supervisor.publish(item)
        with supervisor.model() as model:
            assert (model.run(ONES)["y"] == 3.0).all()
        supervisor.server.close()


def test_with_a_key_at_rest_the_whole_disk_opens_nothing(tmp_path, monkeypatch):
    seal = Seal(bytes(32), "on", "file:/key")
    home = tmp_path / "home"
    home.mkdir()
    item = at_rest(home, loadable(models.scale(tmp_path / "a.onnx", 3.0)), seal)
    (pem,) = (home / "identity").glob("content-*.pem")
    assert pem.read_bytes().startswith(identity.ENCRYPTED_KEY)
    with pytest.raises(DeviceError) as caught:
        load_variant(item)
    assert caught.value.code == reasons.KEY_MISSING
    monkeypatch.setattr(Unlocking, "password", seal.content_password)
    load_variant(item).bound.close()
    with worker(tmp_path) as running:
        running.send(Serve(revision=1, models=[ServeModel(name="scale", active=item)], unlock=seal.content_password))
        assert running.event(Serving).ok
    DeviceKeys(home, seal.content_password).bring_in_line(Disk(seal=Seal(bytes(32), "off", "file:/key")))
    assert not pem.read_bytes().startswith(identity.ENCRYPTED_KEY)


@pytest.mark.parametrize("wrong", ["no key", "another key"])
def test_a_key_that_is_lost_is_trouble_of_the_device(tmp_path, wrong):
    item = at_rest(tmp_path, loadable(models.scale(tmp_path / "a.onnx", 3.0)))
    record = tmp_path / "store" / "keys" / f"{item.at_rest[7:]}.json"
    if wrong == "no key":
        record.unlink()
    else:
        public = DeviceKeys(tmp_path).any_or_make(Disk())
        DeviceKeys(tmp_path).keep(
            content_keys.seal(bytes(32), public, model="scale", plain=item.digest, blob=item.at_rest), Disk()
        )
    verdict = judge(Judge(candidate=item))
    assert (verdict.passed, verdict.reason) == (False, reasons.KEY_MISSING)
    with pytest.raises(DeviceError) as caught:
        load_variant(item)
    assert reason_of(caught.value) == reasons.KEY_MISSING
    altered = Path(item.path)
    altered.write_bytes(altered.read_bytes() + b"x")
    with pytest.raises(DeviceError) as caught:
        load_variant(item)
    assert reason_of(caught.value) == reasons.DIGEST_MISMATCH
