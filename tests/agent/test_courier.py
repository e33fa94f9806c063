"""The courier against the real server, and against servers that lie, break off, or are not what they say."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Targets

from tests.offering import give
from tests.tls_front import TlsFront, server_certificate
from tests.trust_kit import (
    FACTS,
    MODEL,
    Answer,
    LittleServer,
    RunningServer,
    assets_of,
    blob_answer,
    digest,
    expires,
    little_server,
    release,
    running_server,
    tar_of,
    write_bundle,
)
from wherry_agent import courier_blobs, identity
from wherry_agent.children import (
    CourierAnswer,
    Enrol,
    Enrolled,
    Failed,
    Fetch,
    Fetched,
    Progress,
    Refresh,
    Refreshed,
    Resolve,
    Resolved,
    Trust,
    Verified,
    Verify,
)
from wherry_agent.courier import run
from wherry_agent.courier_blobs import Blobs
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk
from wherry_agent.mirrors import LEFT_OUT_S, Mirrors
from wherry_agent.rate import BURST_S, Bucket
from wherry_agent.store import Store
from wherry_server.identity import DeviceAuthority
from wherry_server.trust import Trust as ServerTrust
from wherry_shared import dsse, key_files, reasons, wire
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError
from wherry_shared.image_layout import Layout
from wherry_shared.publishing import PublisherKey, push, set_policy, sign

S = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> PublisherKey:
    return PublisherKey.open(tmp_path_factory.mktemp("workstation") / "publisher.pem")


@pytest.fixture(scope="module")
def bundle(server: RunningServer, key: PublisherKey, tmp_path_factory) -> Path:
    """A released bundle with assets and weights that compress."""
    folder = tmp_path_factory.mktemp("bundles") / "thing"
    files = {"labels.txt": b"cat\ndog\n"}
    write_bundle(folder, "1.0.0", weights=os.urandom(1000) * 400, assets=assets_of(files))
    return publish(server, key, folder)


def publish(server: RunningServer, key: PublisherKey, folder: Path) -> Path:
    with server.remote() as remote:
        sign(folder, remote, key)
        push(folder, remote, key)
    return folder


class Device:
    """A device's home, and the words that its supervisor would keep."""

    def __init__(self, home: Path, running: RunningServer, name: str) -> None:
        self.home = home
        self.running = running
        server, token = running.url, running.enrolment_token
        self.server = server
        self.trust = Trust(current=0, floors={}, time_floor_us=0, expires_at=0)
        self.said: list[CourierAnswer] = []
        answer = self.run(Enrol(home=str(home), server=server, token=token, name=name, labels={"line": "a"}))
        self.enrolled = answer
        known = identity.load(home)
        self.id = known.device if known else ""

    def run(self, task, **arguments) -> CourierAnswer:
        answer = run(task, self.said.append, **arguments)
        word = getattr(answer, "trust", None)
        if word is not None:
            self.trust = word
        return answer

    def common(self) -> dict:
        return {
            "home": str(self.home),
            "server": self.server,
            "time_floor_us": self.trust.time_floor_us,
            "floors": self.trust.floors,
            "current": self.trust.current,
        }

    def refresh(self, *, watched: dict[str, list[str]] | None = None, **arguments) -> CourierAnswer:
        return self.run(Refresh(**self.common(), watched=watched or {}), **arguments)

    def verify(self, envelope: bytes, **arguments) -> CourierAnswer:
        task = Verify(**self.common(), device=self.id, project="default", envelope=base64.b64encode(envelope).decode())
        return self.run(task, **arguments)

    def resolve(self, target: str, manifest: str, *, facts=FACTS, **arguments) -> CourierAnswer:
        give(self.running.settings, self.id, manifest)
        fields = {"mode": arguments.pop("mode", "replace")}
        task = Resolve(
            **self.common(),
            model=arguments.pop("model", MODEL),
            offered=wire.OfferedModel(target=target, manifest=manifest, **fields),
            facts=msgspec.to_builtins(facts),
            contract=arguments.pop("contract", None),
        )
        return self.run(task, **arguments)

    def fetch(self, manifest: str, **arguments) -> CourierAnswer:
        task = Fetch(
            home=str(self.home),
            server=self.server,
            manifest=manifest,
            variant=arguments.pop("variant", "float"),
            mirrors=arguments.pop("mirrors", []),
            tries_max=2,
            reserve_bytes=arguments.pop("reserve_bytes", 0),
        )
        return self.run(task, **arguments)


_names = iter(range(1000))


@pytest.fixture
def device(server: RunningServer, tmp_path: Path) -> Device:
    return Device(tmp_path / "device", server, f"press-{next(_names)}")


def reason(answer: CourierAnswer) -> str:
    assert isinstance(answer, Failed), answer
    return answer.reason


def manifest_of(bundle: Path) -> str:
    return of_bytes(Layout(bundle).manifest_bytes())


def variant_of(bundle: Path):
    return Layout(bundle).bundle()[2].variants[0]


def offer(server: RunningServer, to: Device, **changes) -> bytes:
    now = int(time.time() * S)
    fields = {"device": to.id, "project": "default", "epoch": 1, "serial": 1, "issued_at": now}
    value = wire.Offer(**{"format": 1, "expires_at": now + 3600 * S, **fields, **changes})
    return dsse.sign(dsse.OFFER_TYPE, wire.encode(value), server.trust.director_keyid, server.trust.director_sign)


# --- enrolment ----------------------------------------------------------------------------------


def test_a_device_enrols_and_its_identity_is_private(device: Device, server: RunningServer):
    assert isinstance(device.enrolled, Enrolled)
    known = identity.load(device.home)
    assert known is not None
    assert (known.server, known.root_digest, known.tuf_path) == (server.url, server.trust.root_digest, "/tuf/default")
    assert len(known.frame_key) == 32
    for path in (device.home / "identity").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (device.home / "trust" / "root.json").read_bytes() == server.trust.metadata("1.root.json")


def test_enrolling_again_is_the_same_device(device: Device, server: RunningServer):
    task = Enrol(home=str(device.home), server=server.url, token=server.enrolment_token, name="other")
    assert device.run(task) == device.enrolled


def test_a_token_may_come_by_standard_input(server: RunningServer, tmp_path: Path):
    words = ["enrol", "--home", str(tmp_path), "--server", server.url, "--name", f"told-{next(_names)}", "--token", "-"]
    command = [sys.executable, "-m", "wherry_agent.cli", *words]
    refused = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "--token" in refused.stderr
    done = subprocess.run(command, input=server.enrolment_token + "\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert identity.load(tmp_path) is not None


def test_a_refused_enrolment_says_what_the_server_advises(server: RunningServer, tmp_path: Path):
    for number in range(2):
        home = tmp_path / str(number)
        home.mkdir()
        task = Enrol(home=str(home), server=server.url, token=server.enrolment_token, name="twice")
        answer = run(task, print)
    assert isinstance(answer, Failed)
    assert "enrolled already" in answer.detail
    assert "--name" in answer.detail


def test_an_enrolment_that_was_cut_short_goes_on_with_the_same_key(server: RunningServer, tmp_path: Path):
    def hook(step, path):
        if step == "rename" and path.name == "device.json":
            raise DeviceError("disk_full", "no space left")

    task = Enrol(home=str(tmp_path), server=server.url, token=server.enrolment_token, name=f"cut-{next(_names)}")
    assert reason(run(task, print, disk=Disk(hook))) == reasons.DISK_FULL
    assert identity.load(tmp_path) is None
    before = (tmp_path / "identity" / "key.pem").read_bytes()
    assert isinstance(run(task, print), Enrolled)
    assert (tmp_path / "identity" / "key.pem").read_bytes() == before


def test_a_root_that_the_token_does_not_name_enrols_nobody(server: RunningServer, tmp_path: Path):
    token = server.enrolment_token.rpartition(".")[0] + "." + "0" * 64
    refused = run(Enrol(home=str(tmp_path), server=server.url, token=token, name=f"wary-{next(_names)}"), print)
    assert reason(refused) == reasons.TRUST_INVALID
    assert identity.load(tmp_path) is None


@pytest.mark.parametrize("token", ["", "wherry1.short", "wherry2.AAAAAAAAAAAAAAAAAAAAAAAA." + "0" * 64])
def test_what_is_no_token_is_not_sent_anywhere(tmp_path: Path, token: str):
    assert reason(run(Enrol(home=str(tmp_path), server="http://127.0.0.1:1", token=token, name="x"), print)) == (
        reasons.ENROL_REFUSED
    )
    assert not (tmp_path / "identity").exists()


def test_a_token_that_the_server_does_not_know_is_refused(server: RunningServer, tmp_path: Path):
    token = "wherry1." + "A" * 32 + "." + server.trust.root_digest
    assert reason(run(Enrol(home=str(tmp_path), server=server.url, token=token, name="x"), print)) == (
        reasons.ENROL_REFUSED
    )


def test_a_server_that_is_away_can_be_asked_again(tmp_path: Path):
    token = "wherry1." + "A" * 32 + "." + "0" * 64
    answer = run(Enrol(home=str(tmp_path), server="http://127.0.0.1:1", token=token, name="x"), print)
    assert reason(answer) == reasons.NETWORK
    assert answer.retry_after_s


# --- offers -------------------------------------------------------------------------------------


def test_an_offer_of_the_director_is_verified_and_then_without_network(device: Device, server: RunningServer):
    answer = device.verify(offer(server, device))
    assert isinstance(answer, Verified)
    assert answer.offer.device == device.id
    assert answer.trust.current == 1
    device.server = "http://127.0.0.1:1"
    again = device.verify(offer(server, device, serial=2))
    assert isinstance(again, Verified)
    assert (again.trust.current, again.trust.changed) == (1, False)
    assert again.trust.time_floor_us >= answer.trust.time_floor_us > 0


def test_an_altered_offer_is_refused(device: Device, server: RunningServer):
    envelope = json.loads(offer(server, device))
    payload = base64.b64decode(envelope["payload"]).replace(b'"serial":1', b'"serial":9')
    envelope["payload"] = base64.b64encode(payload).decode()
    assert reason(device.verify(json.dumps(envelope).encode())) == reasons.OFFER_INVALID


@pytest.mark.parametrize("changes", [{"device": "z" * 22}, {"project": "other"}])
def test_an_offer_for_somebody_else_is_refused(device: Device, server: RunningServer, changes):
    assert reason(device.verify(offer(server, device, **changes))) == reasons.OFFER_FOREIGN


def test_an_expired_offer_is_refused_by_wall_time_and_by_the_time_floor(device: Device, server: RunningServer):
    now = int(time.time() * S)
    assert reason(device.verify(offer(server, device, expires_at=now - S))) == reasons.OFFER_EXPIRED
    device.refresh()
    assert reason(device.verify(offer(server, device, expires_at=now - 60 * S), wall_s=1000.0)) == (
        reasons.OFFER_EXPIRED
    )


def test_an_unknown_key_causes_one_refresh_and_is_refused(device: Device, server: RunningServer):
    device.refresh()
    thief = Ed25519PrivateKey.generate()
    payload = base64.b64decode(json.loads(offer(server, device))["payload"])
    forged = dsse.sign(dsse.OFFER_TYPE, payload, "thief", thief.sign)
    asked: list[str] = []

    def count(path: str, headers: dict[str, str]) -> Answer:
        asked.append(path)
        return Answer(503)

    with little_server(count) as proxy:
        device.server = proxy.url
        assert reason(device.verify(forged)) == reasons.NETWORK
        assert len(asked) == 1
        assert reason(device.verify(forged)) == reasons.OFFER_INVALID  # asked a moment ago
        assert len(asked) == 1
    device.server = server.url
    later = time.time() + 61
    assert reason(device.verify(forged, wall_s=later)) == reasons.OFFER_INVALID


def test_a_new_director_key_is_learnt_from_the_targets_role(tmp_path: Path):
    with running_server(tmp_path / "server") as own:
        device = Device(tmp_path / "device", own, "rotates")
        old = offer(own, device)
        assert isinstance(device.verify(old), Verified)
        folder = own.settings.trust_folder
        (folder / "keys" / "director.pem").unlink()
        key_files.create(folder / "keys" / "director.pem")
        ceremony = ServerTrust.open(folder)
        with ceremony._objects.locked():
            content = Targets(version=2, delegations=ceremony._targets().signed.delegations)
            ceremony._sign_targets(content, datetime.now(UTC))
            ceremony._publish(datetime.now(UTC))
        own.trust = ceremony
        fresh = device.verify(offer(own, device, serial=2))
        assert isinstance(fresh, Verified), fresh
        assert fresh.trust.changed
        assert reason(device.verify(old, wall_s=time.time() + 61)) == reasons.OFFER_INVALID


def test_the_directors_name_under_a_thiefs_signature_is_refused(device: Device, server: RunningServer):
    thief = Ed25519PrivateKey.generate()
    payload = base64.b64decode(json.loads(offer(server, device))["payload"])
    forged = dsse.sign(dsse.OFFER_TYPE, payload, server.trust.director_keyid, thief.sign)
    assert reason(device.verify(forged)) == reasons.OFFER_INVALID


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"payload": "%", "keyid": "", "sig": ""}', b"x" * 200_000])
def test_bytes_that_are_no_offer_are_refused(device: Device, data: bytes):
    assert reason(device.verify(data)) == reasons.OFFER_INVALID


# --- resolving and fetching ---------------------------------------------------------------------


def test_a_release_is_resolved_and_fetched(device: Device, server: RunningServer, bundle: Path):
    manifest, variant = manifest_of(bundle), variant_of(bundle)
    answer = device.resolve(f"{MODEL}/1.0.0", manifest)
    assert isinstance(answer, Resolved), answer
    (candidate,) = answer.candidates
    loadable = candidate.loadable
    assert (loadable.variant, loadable.engine, loadable.engine_version) == ("float", "onnxruntime", "1.32.0")
    assert candidate.bytes >= variant.bytes
    assert not Path(loadable.path).exists()
    assert not Path(loadable.golden_path).exists()
    assert isinstance(device.fetch(manifest), Fetched)
    assert of_bytes(Path(loadable.path).read_bytes()) == variant.digest
    assert of_bytes(Path(loadable.golden_path).read_bytes()) == variant.golden.digest
    assert (Path(loadable.assets_path) / "labels.txt").read_bytes() == b"cat\ndog\n"
    again = device.resolve(f"{MODEL}/1.0.0", manifest)
    assert isinstance(again, Resolved)
    assert again.candidates[0].bytes == 0
    fetched = device.fetch(manifest)
    assert isinstance(fetched, Fetched)
    assert fetched.bytes == 0


def test_weights_come_in_the_smaller_encoding(device: Device, server: RunningServer, bundle: Path):
    manifest, variant = manifest_of(bundle), variant_of(bundle)
    give(server.settings, device.id, manifest)
    known = identity.load(device.home)
    assert known is not None
    http = Http(server=server.url, authorization=known.authorization)
    deadline = time.monotonic() + 20
    while True:  # the server encodes after it accepted
        with http.request("GET", f"{server.url}/device/v1/blobs/{variant.digest}/info") as response:
            info = wire.parse(wire.BlobInfo, response.read(10_000))
        if info.encodings:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    fetched = device.fetch(manifest)
    assert isinstance(fetched, Fetched)
    assert fetched.bytes < variant.bytes / 10
    store = Store(device.home, Disk())
    assert store.has(variant.digest, variant.bytes)
    assert not [path for path in store.path_of(variant.digest).parent.iterdir() if "." in path.name]


def test_without_network_a_known_release_resolves_from_what_is_here(device: Device, bundle: Path):
    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    device.server = "http://127.0.0.1:1"
    assert isinstance(device.resolve(f"{MODEL}/1.0.0", manifest), Resolved)
    assert reason(device.resolve(f"{MODEL}/1.0.0", manifest, wall_s=time.time() + 2 * 86400)) == reasons.NETWORK


def test_what_nobody_signed_and_what_is_signed_otherwise_are_refused(device: Device, bundle: Path):
    assert reason(device.resolve(f"{MODEL}/99.0.0", digest("x"))) == reasons.TRUST_UNSIGNED
    assert reason(device.resolve(f"{MODEL}/1.0.0", digest("x"))) == reasons.TRUST_UNSIGNED


def test_a_mode_that_brings_nothing_is_refused_by_name(device: Device, bundle: Path):
    assert reason(device.resolve(f"{MODEL}/1.0.0", manifest_of(bundle), mode="none")) == reasons.UNSUPPORTED


@pytest.mark.parametrize("mode", ["shadow", "split", "blue_green"])
def test_a_bundle_is_resolved_in_every_mode_that_brings_one(device: Device, bundle: Path, mode: str):
    assert isinstance(device.resolve(f"{MODEL}/1.0.0", manifest_of(bundle), mode=mode), Resolved)


@pytest.mark.parametrize("target", ["other/1.0.0", "thing", "thing/newest", "../thing/1.0.0"])
def test_a_target_that_is_not_of_the_model_is_refused(device: Device, target: str):
    assert reason(device.resolve(target, digest("x"))) == reasons.OFFER_INVALID


def test_a_bundle_that_says_it_is_another_version_is_refused(device, server, key, tmp_path: Path):
    """The server and the publishing code refuse it too, so it is signed past both."""
    write_bundle(tmp_path / "b", "1.0.0", model="liar", claims="2.0.0")
    layout = Layout(tmp_path / "b")
    data = layout.manifest_bytes()
    write_bundle(tmp_path / "honest", "2.0.0", model="liar")
    publish(server, key, tmp_path / "honest")
    role, version, current = server.trust.bin_for("liar/1.0.0")
    targets = dict(Metadata[Targets].from_bytes(current).signed.targets) if current else {}
    targets["liar/1.0.0"] = release("liar/1.0.0", of_bytes(data), len(data))
    metadata = Metadata(Targets(version + 1, None, expires(80), targets))
    metadata.sign(key.signer)
    server.trust.accept_bin(role, metadata.to_bytes(), version)

    def mirror(path: str, headers: dict[str, str]) -> Answer:
        blob = layout.path(path.rpartition("/")[2]).read_bytes()
        return blob_answer(blob, '"x"', headers)

    with little_server(mirror) as lying:
        task = Resolve(
            **device.common(),
            mirrors=[lying.url],
            model="liar",
            offered=wire.OfferedModel(target="liar/1.0.0", manifest=of_bytes(data)),
            facts=msgspec.to_builtins(FACTS),
        )
        assert reason(device.run(task)) == reasons.BUNDLE_INVALID


def test_a_bundle_that_breaks_the_applications_contract_is_refused_naming_the_field(device: Device, bundle: Path):
    tensor = TensorSpec(name="x", datatype="FP32", shape=[7])
    contract = Interface(inputs=[tensor], outputs=[tensor])
    answer = device.resolve(f"{MODEL}/1.0.0", manifest_of(bundle), contract=contract)
    assert reason(answer) == reasons.CONTRACT_BROKEN
    assert "inputs.x.shape[0]" in answer.detail
    variant = variant_of(bundle)
    assert not Store(device.home, Disk()).has(variant.digest, variant.bytes), "before its weights are downloaded"


def test_a_bundle_without_a_fitting_variant_says_why(device, server, key, tmp_path: Path):
    write_bundle(tmp_path / "b", "1.0.0", model="foreign", arch=("riscv64",))
    publish(server, key, tmp_path / "b")
    answer = device.resolve("foreign/1.0.0", manifest_of(tmp_path / "b"), model="foreign")
    assert reason(answer) == reasons.NO_VARIANT
    assert "riscv64" in answer.detail


def test_floor_and_revocation_of_the_publisher_are_obeyed(device, server, key, tmp_path: Path):
    manifests = {}
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        manifests[version] = write_bundle(tmp_path / version, version, model="guarded", weights=version.encode())
        publish(server, key, tmp_path / version)
    with server.remote() as remote:
        set_policy(remote, key, "guarded", floor="1.1.0", revoked={manifests["1.1.0"]: "replace"})

    def said(version: str) -> CourierAnswer:
        return device.resolve(f"guarded/{version}", manifests[version], model="guarded")

    assert reason(said("1.0.0")) == reasons.BELOW_FLOOR
    assert reason(said("1.1.0")) == reasons.REVOKED
    assert isinstance(said("1.2.0"), Resolved)
    with server.remote() as remote:
        set_policy(remote, key, "guarded", revoked={manifests["1.0.0"]: "stop", manifests["1.1.0"]: "replace"})
    answer = device.refresh(watched={"guarded": list(manifests.values()), MODEL: [manifests["1.0.0"]], "unknown": []})
    assert isinstance(answer, Refreshed)
    assert {(one.model, one.manifest, one.effect) for one in answer.revoked} == {
        ("guarded", manifests["1.0.0"], "stop"),
        ("guarded", manifests["1.1.0"], "replace"),
    }


def test_a_mirror_that_lies_is_dropped_and_the_server_asked(device: Device, server: RunningServer, bundle: Path):
    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)

    def lie(path: str, headers: dict[str, str]) -> Answer:
        blob = bytearray(server.blob(path.rpartition("/")[2]))
        blob[len(blob) // 2] ^= 1
        return Answer(200, bytes(blob))

    with little_server(lie) as mirror:
        assert isinstance(device.fetch(manifest, mirrors=[mirror.url]), Fetched)
        assert mirror.asked
        assert not any("authorization" in headers for _, headers in mirror.asked)
        assert len({path for path, _ in mirror.asked}) == len(mirror.asked)  # never asked twice for one blob
    variant = variant_of(bundle)
    assert Store(device.home, Disk()).read(variant.golden.digest, 1000)


def test_when_the_only_bytes_are_a_liars_nothing_is_kept(device, server, key, tmp_path: Path):
    """A release whose weights the server does not have, served altered by a mirror."""
    folder = tmp_path / "b"
    manifest = write_bundle(folder, "1.0.0", model="altered", weights=os.urandom(200_000))
    variant = variant_of(folder)
    publish(server, key, folder)
    assert isinstance(device.resolve("altered/1.0.0", manifest, model="altered"), Resolved)
    altered = bytearray(server.blob(variant.digest))
    altered[100] ^= 1
    honest = server.services.blobs.path(variant.digest)
    honest.rename(tmp_path / "away")

    def lie(path: str, headers: dict[str, str]) -> Answer:
        return Answer(200, bytes(altered)) if path.endswith(variant.digest) else Answer(404)

    try:
        with little_server(lie) as mirror, little_server(lie) as second:
            task = Fetch(
                home=str(device.home),
                server=second.url,
                mirrors=[mirror.url],
                manifest=manifest,
                variant="float",
                tries_max=2,
            )
            fetch_golden = device.fetch(manifest, variant="float")  # the server has everything but the weights
            assert isinstance(fetch_golden, Failed)
            assert reason(device.run(task)) == reasons.DIGEST_MISMATCH
    finally:
        (tmp_path / "away").rename(honest)
    store = Store(device.home, Disk())
    assert not store.has(variant.digest, variant.bytes)
    assert isinstance(device.fetch(manifest), Fetched)


@pytest.mark.parametrize("which", ["weights", "config", "manifest"])
def test_a_blob_that_the_disk_changed_is_fetched_again(device: Device, bundle: Path, which: str):
    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    device.fetch(manifest)
    layout = Layout(bundle)
    digests = {
        "weights": variant_of(bundle).digest,
        "config": layout.bundle()[1].config.digest,
        "manifest": manifest,
    }
    path = Store(device.home, Disk()).path_of(digests[which])
    right = path.read_bytes()
    path.write_bytes(bytes([right[0] ^ 1]) + right[1:])
    assert isinstance(device.fetch(manifest), Fetched)
    assert path.read_bytes() == right


def test_progress_is_told(device: Device, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wherry_agent.courier.PROGRESS_EVERY_S", 0.0)
    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    device.fetch(manifest)
    told = [item for item in device.said if isinstance(item, Progress)]
    assert told
    assert all(0 < item.done_bytes <= item.total_bytes for item in told)


def test_a_disk_that_is_full_is_said_so_and_resumes(device: Device, bundle: Path):
    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)

    def full(step, path):
        if step == "write" and ".part" in path.name:
            raise DeviceError("disk_full", "no space left") from OSError(errno.ENOSPC, "full")

    answer = device.fetch(manifest, disk=Disk(full))
    assert reason(answer) == reasons.DISK_FULL
    assert answer.retry_after_s
    assert isinstance(device.fetch(manifest), Fetched)


def test_too_little_space_is_seen_before_the_download(device: Device, bundle: Path):
    free = courier_blobs.DISK_RESERVE_BYTES + 10

    class Small(Disk):
        def free_bytes(self, path: Path) -> int:
            return free

    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    answer = device.fetch(manifest, disk=Small())
    assert reason(answer) == reasons.DISK_FULL
    assert answer.retry_after_s == 60
    free = 2 * courier_blobs.DISK_RESERVE_BYTES
    assert reason(device.fetch(manifest, disk=Small(), reserve_bytes=free)) == reasons.DISK_FULL
    assert isinstance(device.fetch(manifest, disk=Small()), Fetched)


def test_an_archive_that_reaches_outside_is_refused(device, server, key, tmp_path: Path):
    files = {"labels.txt": b"cat"}
    tar = tar_of({**files, "../../../escape": b"x"})
    manifest = write_bundle(tmp_path / "b", "1.0.0", model="escaping", assets=assets_of(files, tar))
    publish(server, key, tmp_path / "b")
    assert isinstance(device.resolve("escaping/1.0.0", manifest, model="escaping"), Resolved)
    assert reason(device.fetch(manifest)) == reasons.BUNDLE_INVALID
    assert not list(tmp_path.rglob("escape"))


def test_trust_is_refreshed_and_stays_when_nothing_changed(device: Device):
    first = device.refresh()
    assert isinstance(first, Refreshed)
    second = device.refresh()
    assert isinstance(second, Refreshed)
    assert second.trust.current == first.trust.current


def test_a_device_that_is_not_enrolled_says_so(tmp_path: Path):
    task = Refresh(home=str(tmp_path), server="http://127.0.0.1:1", time_floor_us=0)
    assert reason(run(task, print)) == reasons.TRUST_INVALID


# --- the process --------------------------------------------------------------------------------


def courier(data: bytes, *, file_bytes_max: int = resource.RLIM_INFINITY) -> tuple[int, list[dict]]:
    """Run a courier; no file that it writes can grow beyond `file_bytes_max`, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_max, file_bytes_max))

    done = subprocess.run(
        [sys.executable, "-B", "-m", "wherry_agent.courier"],
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
        preexec_fn=limit,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_process_takes_a_task_and_says_a_result(device: Device):
    code, lines = courier(msgspec.json.encode(Refresh(**device.common())))
    assert code == 0
    assert lines[-1]["kind"] == "refreshed"
    assert lines[-1]["trust"]["current"] == 1


@pytest.mark.parametrize("data", [b"", b"nonsense", b'{"kind": "unknown"}'])
def test_the_process_exits_cleanly_from_what_is_no_task(data: bytes):
    code, lines = courier(data)
    assert (code, lines[-1]["kind"], lines[-1]["reason"]) == (0, "failed", reasons.CHILD_FAILED)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("room", [0, 300, 1500])
def test_without_room_for_trust_the_process_says_so_and_keeps_what_was(device: Device, room: int, known: bool):
    device.refresh()
    before = sorted(path.name for path in (device.home / "trust").iterdir())
    task = Refresh(**(device.common() if known else {**device.common(), "current": 0}))
    code, lines = courier(msgspec.json.encode(task), file_bytes_max=room)
    assert (code, lines[-1].get("reason")) == (0, reasons.DISK_FULL)
    assert sorted(path.name for path in (device.home / "trust").iterdir()) == before
    assert isinstance(device.refresh(), Refreshed)


def test_a_disk_that_fills_up_in_a_download_is_said_so_and_the_rest_resumes(device: Device, bundle: Path):
    manifest, variant = manifest_of(bundle), variant_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    task = Fetch(home=str(device.home), server=device.server, manifest=manifest, variant="float", tries_max=2)
    code, lines = courier(msgspec.json.encode(task), file_bytes_max=variant.bytes // 2)
    assert (code, lines[-1].get("reason")) == (0, reasons.DISK_FULL)
    assert not Store(device.home, Disk()).has(variant.digest, variant.bytes)
    assert isinstance(device.fetch(manifest), Fetched)


# --- downloads, one source at a time --------------------------------------------------------------

DATA = os.urandom(300_000)
DIGEST = of_bytes(DATA)


def blobs(home: Path, server: LittleServer, mirrors: list[LittleServer] | None = None, tries: int = 3) -> Blobs:
    return Blobs(
        store=Store(home, Disk()),
        disk=Disk(),
        http=Http(server=server.url, authorization="Bearer secret"),
        server=server.url,
        mirrors=[mirror.url for mirror in mirrors or []],
        tries_max=tries,
        sleep=lambda _seconds: None,
    )


def honest(cuts: list[int], data: bytes = DATA):
    """Serve the blob, hanging up after so many bytes of each answer while `cuts` lasts."""

    def answer(path: str, headers: dict[str, str]) -> Answer:
        if path.endswith("/info"):
            return Answer(404)
        return blob_answer(data, f'"{of_bytes(data)}"', headers, cut=cuts.pop(0) if cuts else None)

    return answer


def test_a_download_that_is_cut_short_resumes_with_a_range(tmp_path: Path):
    with little_server(honest([100_000, 100_000])) as server:
        bring = blobs(tmp_path, server)
        bring.bring(DIGEST, len(DATA))
        assert bring.wire_bytes == len(DATA)
        ranges = [headers.get("range") for path, headers in server.asked if not path.endswith("/info")]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert bring.store.read(DIGEST, len(DATA)) == DATA


def test_a_download_goes_on_in_the_next_courier(tmp_path: Path):
    with little_server(honest([120_000] + [0] * 9)) as server, pytest.raises(UnreachableError):
        blobs(tmp_path, server, tries=2).bring(DIGEST, len(DATA))
    with little_server(honest([])) as server:
        again = blobs(tmp_path, server)
        again.bring(DIGEST, len(DATA))
        assert again.wire_bytes == len(DATA) - 120_000
        assert server.asked[-1][1]["if-range"] == f'"{DIGEST}"'
    assert again.store.read(DIGEST, len(DATA)) == DATA


def test_tries_without_progress_are_bounded(tmp_path: Path):
    with little_server(lambda _path, _headers: Answer(503)) as server:
        with pytest.raises(UnreachableError, match="503"):
            blobs(tmp_path, server, tries=3).bring(DIGEST, len(DATA), encoded=False)
        assert len(server.asked) == 3


def test_a_source_without_ranges_sends_it_all_again(tmp_path: Path):
    cuts = [150_000]

    def answer(path: str, _headers: dict[str, str]) -> Answer:
        return Answer(404) if path.endswith("/info") else Answer(200, DATA, cut=cuts.pop(0) if cuts else None)

    with little_server(answer) as server:
        bring = blobs(tmp_path, server)
        bring.bring(DIGEST, len(DATA))
    assert bring.wire_bytes == len(DATA) + 150_000


def test_a_lie_in_one_half_convicts_nobody_until_one_source_sent_it_all(tmp_path: Path):
    wrong = bytearray(DATA)
    wrong[10] ^= 1
    with (
        little_server(honest([150_000] + [0] * 20, bytes(wrong))) as mirror,
        little_server(honest([])) as server,
    ):
        bring = blobs(tmp_path, server, [mirror])
        bring.bring(DIGEST, len(DATA))
    assert bring.store.read(DIGEST, len(DATA)) == DATA


@pytest.mark.parametrize("length", [len(DATA) - 1, len(DATA) + 1, 0])
def test_a_source_with_another_length_never_makes_the_blob(tmp_path: Path, length: int):
    data = (DATA + b"xx")[:length]
    with little_server(honest([], data)) as server, pytest.raises((RefusedError, UnreachableError)):
        blobs(tmp_path, server).bring(DIGEST, len(DATA), encoded=False)
    assert not Store(tmp_path, Disk()).has(DIGEST, len(DATA))


def test_a_range_that_is_not_the_one_asked_for_is_not_appended(tmp_path: Path):
    cuts = [100_000]

    def answer(path: str, headers: dict[str, str]) -> Answer:
        said = honest(cuts)(path, headers)
        if said.status == 206:
            return Answer(206, DATA[5:], {"Content-Range": f"bytes 5-{len(DATA) - 1}/{len(DATA)}"})
        return said

    with little_server(answer) as server, pytest.raises(UnreachableError):
        blobs(tmp_path, server).bring(DIGEST, len(DATA), encoded=False)


@pytest.mark.parametrize(
    "encoded",
    [
        zstandard.compress(os.urandom(len(DATA))),
        zstandard.compress(bytes(50_000_000)),
        b"not zstd at all",
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
        ).compress(bytes(1000)),
    ],
    ids=["other bytes", "bomb", "garbage", "window"],
)
def test_an_encoding_that_is_not_the_blob_falls_back_to_the_blob(tmp_path: Path, encoded: bytes):
    info = wire.BlobInfo(
        digest=DIGEST,
        bytes=len(DATA),
        encodings=[wire.Encoding(encoding="zstd", digest=of_bytes(encoded), bytes=min(len(encoded), len(DATA) - 1))],
    )

    def answer(path: str, headers: dict[str, str]) -> Answer:
        if path.endswith("/info"):
            return Answer(200, wire.encode(info))
        wanted = encoded if path.endswith(of_bytes(encoded)) else DATA
        return blob_answer(wanted, f'"{of_bytes(wanted)}"', headers)

    with little_server(answer) as server:
        bring = blobs(tmp_path, server)
        bring.bring(DIGEST, len(DATA))
    assert bring.store.read(DIGEST, len(DATA)) == DATA
    assert [path.name for path in bring.store.path_of(DIGEST).parent.iterdir()] == [DIGEST[7:]]


def test_an_encoding_of_a_later_release_is_passed_over(tmp_path: Path):
    data = bytes(range(256)) * 1000
    small, alien = zstandard.compress(data), b"a delta, smaller still"
    info = wire.BlobInfo(
        digest=of_bytes(data),
        bytes=len(data),
        encodings=[
            wire.Encoding(encoding="wdelta", digest=of_bytes(alien), bytes=len(alien)),
            wire.Encoding(encoding="zstd", digest=of_bytes(small), bytes=len(small)),
        ],
    )

    def answer(path: str, headers: dict[str, str]) -> Answer:
        if path.endswith("/info"):
            return Answer(200, wire.encode(info))
        return blob_answer(small, f'"{of_bytes(small)}"', headers) if path.endswith(of_bytes(small)) else Answer(404)

    with little_server(answer) as server:
        bring = blobs(tmp_path, server)
        bring.bring(of_bytes(data), len(data))
        assert not [path for path, _ in server.asked if path.endswith(of_bytes(alien))]
    assert bring.store.read(of_bytes(data), len(data)) == data


def test_secrets_stay_with_the_server_along_redirects(tmp_path: Path):
    with little_server(honest([])) as elsewhere:

        def redirect(path: str, _headers: dict[str, str]) -> Answer:
            return Answer(404) if path.endswith("/info") else Answer(307, b"", {"Location": elsewhere.url + path})

        with little_server(redirect) as server:
            blobs(tmp_path, server).bring(DIGEST, len(DATA))
            assert all(headers["authorization"] == "Bearer secret" for _, headers in server.asked)
        assert elsewhere.asked
        assert not any("authorization" in headers for _, headers in elsewhere.asked)


@contextlib.contextmanager
def by_https(folder: Path, upstream: LittleServer) -> Iterator[tuple[str, Path]]:
    """Put TLS with an authority of its own before a server; its address and the authority."""
    folder.mkdir()
    DeviceAuthority.create(folder, folder.name)
    front = TlsFront(int(upstream.url.rpartition(":")[2]), *server_certificate(folder, folder))
    yield f"https://127.0.0.1:{front.port}", folder / "devices-ca.pem"
    front.close()


def test_a_redirect_leads_to_whom_this_machine_believes_and_never_out_of_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At home only the server's own authority counts; a store elsewhere may have its certificate from anybody known."""
    location = [""]
    body = Answer(200, DATA)
    with (
        little_server(lambda _path, _headers: body) as store,
        little_server(lambda _path, _headers: Answer(307, b"", {"Location": location[0]})) as server,
        by_https(tmp_path / "elsewhere", store) as (there, their_ca),
        by_https(tmp_path / "home", server) as (home, our_ca),
    ):
        http = Http(ca=our_ca, server=home, authorization="Bearer secret")

        def fetch(url: str) -> bytes:
            with http.request("GET", url) as answer:
                return answer.read(len(DATA))

        location[0] = f"{there}/blob?X-Amz-Signature=of-one-blob"
        with pytest.raises(UnreachableError, match="certificate") as caught:
            fetch(home)
        assert "of-one-blob" not in caught.value.diagnostics()
        monkeypatch.setenv("SSL_CERT_FILE", str(their_ca))  # this machine's authorities
        http = Http(ca=our_ca, server=home, authorization="Bearer secret")
        assert fetch(home) == DATA
        assert "authorization" not in store.asked[-1][1]
        with pytest.raises(UnreachableError, match="certificate"), Http(ca=our_ca, server=there).request("GET", there):
            pytest.fail("a server's name is not enough at home")
        asked = len(store.asked)
        location[0] = f"{store.url}/blob?X-Amz-Signature=of-one-blob"
        with pytest.raises(UnreachableError, match="from https to http") as caught:
            fetch(home)
        assert "of-one-blob" not in caught.value.diagnostics()
        assert len(store.asked) == asked


def test_a_host_that_refuses_an_address_is_asked_by_a_new_one_and_not_for_ever(tmp_path: Path):
    """Addresses expire: 403 of the host to which the server sent us is no word of the server's."""
    with little_server(lambda _path, _headers: Answer(403)) as store:
        sent: list[str] = []

        def redirect(path: str, _headers: dict[str, str]) -> Answer:
            sent.append(f"{store.url}{path}?X-Amz-Signature={len(sent)}")
            return Answer(307, b"", {"Location": sent[-1]})

        with little_server(redirect) as server, pytest.raises(UnreachableError, match="403") as caught:
            blobs(tmp_path, server, tries=3).bring(DIGEST, len(DATA), encoded=False)
        assert [store.url + path for path, _ in store.asked] == sent
        assert len(set(sent)) == 3
    assert "Signature" not in caught.value.diagnostics()
    with little_server(lambda _path, _headers: Answer(403)) as server, pytest.raises(UnreachableError, match="403"):
        blobs(tmp_path, server, tries=3).bring(DIGEST, len(DATA), encoded=False)
    assert len(server.asked) == 1, "the server's own refusal stands"


def test_an_address_that_cannot_be_sent_is_not_quoted(tmp_path: Path):
    where = "http://127.0.0.1:9/blob?X-Amz-Signature=of one blob"
    with (
        little_server(lambda _path, _headers: Answer(302, b"", {"Location": where})) as server,
        pytest.raises(UnreachableError) as caught,
    ):
        blobs(tmp_path, server, tries=1).bring(DIGEST, len(DATA), encoded=False)
    assert "Signature" not in caught.value.diagnostics()


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://user:pass@127.0.0.1/", "gopher://x/"])
def test_redirects_to_strange_places_are_not_followed(tmp_path: Path, location: str):
    with (
        little_server(lambda _path, _headers: Answer(302, b"", {"Location": location})) as server,
        pytest.raises((UnreachableError, RefusedError)),
    ):
        blobs(tmp_path, server).bring(DIGEST, len(DATA), encoded=False)


def test_redirects_in_a_circle_end(tmp_path: Path):
    with (
        little_server(lambda path, _headers: Answer(302, b"", {"Location": path})) as server,
        pytest.raises(UnreachableError, match="redirects"),
    ):
        blobs(tmp_path, server, tries=1).bring(DIGEST, len(DATA), encoded=False)


def test_a_copy_by_another_name_is_sent_whole(tmp_path: Path):
    """The server's entity tag is another now: `If-Range` makes it send all, and none of the old bytes stay."""
    other = b"x" * 120_000

    def changed(path: str, headers: dict[str, str]) -> Answer:
        if path.endswith("/info"):
            return Answer(404)
        if "if-range" in headers and headers["if-range"] != '"renewed"':
            headers = {name: value for name, value in headers.items() if name != "range"}
        return blob_answer(DATA, '"renewed"', headers)

    store = Store(tmp_path, Disk())
    with store.part(DIGEST, len(DATA)) as part:
        part.write(other, "another source")
        part.sync()
    with little_server(changed) as server:
        bring = blobs(tmp_path, server)
        bring.bring(DIGEST, len(DATA))
        assert (bring.wire_bytes, server.asked[-1][1]["range"]) == (len(DATA), "bytes=120000-")
    assert bring.store.read(DIGEST, len(DATA)) == DATA


def test_a_bounded_rate_is_kept(tmp_path: Path):
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    with little_server(honest([])) as server:
        bring = blobs(tmp_path, server)
        bring.bucket, bring.clock, bring.sleep = Bucket(10_000, 0.0), lambda: clock[0], sleep
        bring.bring(DIGEST, len(DATA))
    assert clock[0] >= len(DATA) / 10_000 - BURST_S


def test_a_mirror_that_lied_is_left_out_for_a_while_and_the_others_keep_their_order(tmp_path: Path):
    bases = ["http://one/", "http://two", "http://three"]
    mirrors = Mirrors(tmp_path, Disk(), bases, 1000.0)
    mirrors.lied("http://two")
    mirrors.lied("http://server")  # nobody else has the blob when everybody lies
    assert Mirrors(tmp_path, Disk(), bases, 1000.0 + LEFT_OUT_S - 1).usable() == ["http://one", "http://three"]
    assert Mirrors(tmp_path, Disk(), bases, 1000.0 + LEFT_OUT_S + 1).usable() == [
        "http://one",
        "http://two",
        "http://three",
    ]
    assert not Mirrors(tmp_path, Disk(), bases, 0.0).left_out(), "a clock that was set back leaves nobody out for ever"
    (tmp_path / "mirrors.json").write_text("{")
    assert len(Mirrors(tmp_path, Disk(), bases, 1000.0).usable()) == 3


def test_the_next_courier_does_not_ask_the_liar(device: Device, server: RunningServer, bundle: Path):
    def lie(path: str, headers: dict[str, str]) -> Answer:
        return Answer(404) if path.endswith("/info") else Answer(200, b"lies" * 2000)

    manifest = manifest_of(bundle)
    device.resolve(f"{MODEL}/1.0.0", manifest)
    with little_server(lie) as liar:
        assert isinstance(device.fetch(manifest, mirrors=[liar.url]), Fetched)
        assert len(liar.asked) == 1, "one lie is enough, also for the other blobs"
        Store(device.home, Disk()).forget(Store(device.home, Disk()).path_of(variant_of(bundle).digest))
        assert isinstance(device.fetch(manifest, mirrors=[liar.url]), Fetched)
        assert len(liar.asked) == 1
