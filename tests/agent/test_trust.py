"""The device's TUF sets: what a thief of the network, the server or the power can and cannot make it believe."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api import exceptions
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from tests.trust_kit import (
    MODEL,
    Answer,
    LittleServer,
    Workstation,
    digest,
    expires,
    little_server,
    release,
    with_publisher,
)
from wherry_agent.children import Trust as Word
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk
from wherry_agent.trust import Keeper, Known, Online, Policy
from wherry_server.trust import Trust
from wherry_shared import key_files
from wherry_shared.errors import RefusedError, UnreachableError

ONE, TWO = digest("one"), digest("two")
TARGET = f"{MODEL}/1.0.0"
DAY_S = 86_400
S = 1_000_000


class PowerCutError(BaseException):
    """The power went."""


class Repository:
    """A server's repository over HTTP, with answers that a thief may replace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trust = Trust.create_dev(folder)
        self.acme = with_publisher(self.trust, Workstation())
        self.replaced: dict[str, bytes | int] = {}
        self.web = LittleServer(self._answer)

    def _answer(self, path: str, headers: dict[str, str]) -> Answer:
        name = path.rpartition("/")[2]
        said = self.replaced.get(name)
        if isinstance(said, int):
            return Answer(said)
        try:
            data = said if said is not None else self.trust.metadata(name)
        except RefusedError:
            return Answer(404)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return Answer(304 if headers.get("if-none-match") == etag else 200, data, {"ETag": etag})

    def copy(self) -> dict[str, bytes]:
        """Everything that a client could fetch now."""
        files = {path.name: path.read_bytes() for path in (self.folder / "metadata").glob("*.json")}
        return {**files, "timestamp.json": self.trust.metadata("timestamp.json")}

    def key(self, role: str) -> CryptoSigner:
        return key_files.load(self.folder / "keys" / f"{role}.pem")

    def publish(self, version: str = "1.0.0", manifest: str = ONE) -> None:
        self.acme.publish(self.trust, f"{MODEL}/{version}", manifest)

    def sign_online(self, meta: dict[str, int], *, version: int, life: float = 1, key: str = "") -> None:
        """What a thief of the online keys may say: any snapshot and timestamp."""
        snapshot = Metadata(
            Snapshot(version, None, expires(life), {name: MetaFile(number) for name, number in meta.items()})
        )
        snapshot.sign(CryptoSigner.generate_ed25519() if key == "forged" else self.key("snapshot"))
        data = snapshot.to_bytes()
        stamp = Metadata(Timestamp(version, None, expires(life), MetaFile.from_data(version, data, ["sha256"])))
        stamp.sign(CryptoSigner.generate_ed25519() if key == "forged" else self.key("timestamp"))
        self.replaced = {f"{version}.snapshot.json": data, "timestamp.json": stamp.to_bytes()}


class Device:
    """A device's trust folder and journal; `wall_s` is what its clock shows."""

    def __init__(self, home: Path, repository: Repository) -> None:
        self.home = home
        self.repository = repository
        self.word = Word(current=0, floors={}, time_floor_us=0, expires_at=0)
        self.wall_s = time.time()
        (home / "trust").mkdir(parents=True)
        (home / "trust" / "root.json").write_bytes(repository.trust.metadata("1.root.json"))

    def keeper(self, disk: Disk | None = None) -> Keeper:
        return Keeper(
            self.home,
            disk or Disk(),
            root_digest=self.repository.trust.root_digest,
            metadata_url=f"{self.repository.web.url}/tuf/default",
            http=Http(),
            known=Known(self.word.current, dict(self.word.floors), self.word.time_floor_us),
            wall_us=int(self.wall_s * S),
        )

    def refresh(self, target: str | None = None, disk: Disk | None = None) -> str | None:
        """Refresh, ask for a target's manifest if one is named, keep the result; return the manifest."""
        keeper = self.keeper(disk)
        with keeper.online() as session:
            session.director_keys()
            found = session.manifest_of(target) if target else None
            self.word = keeper.commit(session)
        return found[0] if found else None

    @property
    def set(self) -> Path:
        return self.home / "trust" / str(self.word.current)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = Repository(tmp_path / "server")
    yield made
    made.web.close()


@pytest.fixture
def device(tmp_path: Path, repository: Repository) -> Device:
    return Device(tmp_path / "device", repository)


def refused(call) -> str:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def test_a_first_refresh_makes_a_set_and_an_idle_one_keeps_it(device: Device, repository: Repository):
    repository.publish()
    assert device.refresh(TARGET) == ONE
    assert device.word.current == 1
    assert device.word.changed
    role = repository.trust.bin_for(TARGET)[0]
    assert set(device.word.floors) == {"root", "timestamp", "snapshot", "targets", "acme", role}
    repository.web.asked.clear()
    assert device.refresh() is None
    assert (device.word.current, device.word.changed) == (1, False)
    paths = [path.rpartition("/")[2] for path, _ in repository.web.asked]
    assert paths == ["2.root.json", "timestamp.json"]
    assert "if-none-match" in repository.web.asked[1][1]


def test_a_set_holds_no_links_and_old_sets_are_removed(device: Device, repository: Repository):
    for number in range(3):
        repository.publish(f"1.{number}.0")
        device.refresh(f"{MODEL}/1.{number}.0")
    assert device.word.current == 3
    assert sorted(path.name for path in (device.home / "trust").iterdir() if path.is_dir()) == ["2", "3"]
    assert not [path for path in (device.home / "trust").rglob("*") if path.is_symlink()]


def test_what_nobody_signed_has_no_manifest(device: Device, repository: Repository):
    assert device.refresh(TARGET) is None  # its bin does not exist
    repository.publish()
    assert device.refresh(f"{MODEL}/9.9.9") is None
    assert device.refresh("unknown-model/1.0.0") is None
    repository.trust.add_publisher("late", Workstation("late").pems(), ["late"])
    assert device.refresh("late/1.0.0") is None  # delegated, and its publisher signed nothing yet


def test_the_policy_of_a_model_is_read_from_the_publisher_role(device: Device, repository: Repository):
    keeper = device.keeper()
    with keeper.online() as session:
        assert session.policy(MODEL) == Policy()
    role = repository.acme.role(
        2, policy={MODEL: {"floor": "1.2.0", "revoked": [{"digest": ONE, "effect": "replace"}]}}
    )
    repository.trust.accept_bin("acme", role, 1)
    with device.keeper().online() as session:
        assert session.policy(MODEL) == Policy("1.2.0", frozenset({ONE}))


def test_the_director_key_comes_from_the_targets_role(device: Device, repository: Repository):
    with device.keeper().online() as session:
        assert set(session.director_keys()) == {repository.trust.director_keyid}


def test_an_expired_timestamp_is_refused(device: Device):
    device.refresh()
    device.wall_s += 1.1 * DAY_S
    assert refused(device.refresh) == "trust_expired"
    assert device.word.current == 1


def test_a_clock_that_went_back_does_not_bring_expired_metadata_to_life(device: Device, repository: Repository):
    device.refresh()
    device.word = Word(
        current=1, floors=device.word.floors, time_floor_us=int((time.time() + 2 * DAY_S) * S), expires_at=0
    )
    device.wall_s = 0
    assert refused(device.refresh) == "trust_expired"


def test_a_device_whose_clock_is_unset_takes_its_time_from_signed_times(device: Device):
    device.wall_s = 1000
    device.refresh()
    assert abs(device.word.time_floor_us / S - time.time()) < 60
    assert abs(device.word.expires_at / S - time.time() - DAY_S) < 60


def test_the_time_floor_stays_below_the_expiry_of_offline_roles(device: Device, repository: Repository):
    keeper = device.keeper()
    with keeper.online() as session:
        word = keeper.commit(session, signed_us=int((time.time() + 10_000 * DAY_S) * S))
    root = Metadata[Root].from_bytes(repository.trust.metadata("1.root.json")).signed
    assert word.time_floor_us <= int(root.expires.timestamp()) * S


def test_a_rolled_back_timestamp_is_refused(device: Device, repository: Repository):
    old = repository.copy()
    repository.publish()
    device.refresh(TARGET)
    repository.replaced = dict(old)
    assert refused(device.refresh) == "trust_rollback"


def test_an_older_state_is_refused_also_after_the_set_was_damaged(device: Device, repository: Repository):
    repository.publish()
    old = repository.copy()
    repository.publish("2.0.0", TWO)
    device.refresh(f"{MODEL}/2.0.0")
    for name in ("snapshot.json", "timestamp.json"):
        (device.set / name).write_bytes(b"\0" * 400)
    repository.replaced = dict(old)
    assert refused(device.refresh) == "trust_rollback"
    shutil.rmtree(device.set)  # and when it is gone altogether
    assert refused(device.refresh) == "trust_rollback"
    repository.replaced = {}
    assert device.refresh(f"{MODEL}/2.0.0") == TWO


def test_a_thief_of_the_online_keys_cannot_show_an_older_bin(device: Device, repository: Repository):
    repository.publish()
    repository.publish("1.0.1", ONE)
    role = repository.trust.bin_for(TARGET)[0]
    repository.trust.accept_bin(role, repository.acme.bin(2, {TARGET: ONE}), 1)
    device.refresh(TARGET)
    (device.set / "snapshot.json").write_bytes(b"")
    versions = {
        "targets.json": repository.trust.public_state()["roles"]["targets"]["version"],
        "acme.json": 1,
        f"{role}.json": 1,
    }
    repository.sign_online(versions, version=int(time.time()) + 100)
    assert refused(lambda: device.refresh(TARGET)) == "trust_rollback"
    del versions[f"{role}.json"]
    repository.sign_online(versions, version=int(time.time()) + 101)
    assert refused(lambda: device.refresh(TARGET)) == "trust_rollback"


def test_a_thief_of_the_online_keys_cannot_publish(device: Device, repository: Repository):
    device.refresh()
    role = repository.trust.bin_for(TARGET)[0]
    forged = repository.acme.bin(1, {TARGET: TWO}, signers=[repository.key("snapshot")])
    versions = {
        "targets.json": repository.trust.public_state()["roles"]["targets"]["version"],
        "acme.json": 1,
        f"{role}.json": 1,
    }
    repository.sign_online(versions, version=int(time.time()) + 100)
    repository.replaced[f"1.{role}.json"] = forged
    assert refused(lambda: device.refresh(TARGET)) == "trust_invalid"


def test_one_key_of_two_does_not_publish(tmp_path: Path, repository: Repository):
    pair = with_publisher(repository.trust, Workstation("pair", keys=2, threshold=2), ["paired"])
    device = Device(tmp_path / "other", repository)
    role = repository.trust.bin_for("paired/1.0.0")[0]
    half = pair.bin(1, {"paired/1.0.0": ONE}, signers=pair.signers[:1])
    state = repository.trust.public_state()["roles"]
    repository.sign_online(
        {"targets.json": state["targets"]["version"], "acme.json": 1, "pair.json": 1, f"{role}.json": 1},
        version=int(time.time()) + 100,
    )
    repository.replaced[f"1.{role}.json"] = half
    assert refused(lambda: device.refresh("paired/1.0.0")) == "trust_invalid"
    repository.replaced[f"1.{role}.json"] = pair.bin(1, {"paired/1.0.0": ONE})
    assert device.refresh("paired/1.0.0") == ONE


def test_online_roles_signed_by_others_are_refused(device: Device, repository: Repository):
    repository.sign_online({"targets.json": 1}, version=int(time.time()) + 100, key="forged")
    assert refused(device.refresh) == "trust_invalid"


def test_metadata_that_grow_without_end_are_cut_off(device: Device, repository: Repository):
    repository.replaced = {"timestamp.json": b" " * 100_000}
    assert refused(device.refresh) == "trust_invalid"


def test_a_server_in_trouble_is_no_trust_trouble(device: Device, repository: Repository):
    for status in (500, 503, 404):
        repository.replaced = {"timestamp.json": status}
        with pytest.raises(UnreachableError):
            device.refresh()
    repository.web.close()
    with pytest.raises(UnreachableError):
        device.refresh()
    assert not (device.home / "trust" / ".scratch").exists()


@pytest.mark.parametrize("altered", [b"", b"garbage", None])
def test_a_first_root_that_the_disk_altered_is_asked_for_again(
    device: Device, repository: Repository, altered: bytes | None
):
    repository.publish()
    path = device.home / "trust" / "root.json"
    whole = path.read_bytes()
    path.unlink() if altered is None else path.write_bytes(altered)
    assert device.refresh(TARGET) == ONE
    assert path.read_bytes() == whole
    assert repository.web.asked[0][0].endswith("/1.root.json")


def test_another_first_root_is_not_believed_whoever_gives_it(device: Device, repository: Repository):
    path = device.home / "trust" / "root.json"
    path.write_bytes(path.read_bytes() + b" ")
    for said in (path.read_bytes(), b"", 404):
        repository.replaced = {"1.root.json": said}
        assert refused(device.refresh) == "trust_invalid"
    assert {asked.rpartition("/")[2] for asked, _ in repository.web.asked} == {"1.root.json"}, "nothing else is asked"
    repository.web.close()
    assert refused(device.refresh) == "trust_invalid"


def test_root_rotates_and_new_online_keys_may_count_from_anew(device: Device, repository: Repository):
    repository.publish()
    far = int(time.time()) + 10_000_000
    state = repository.trust.public_state()["roles"]
    role = repository.trust.bin_for(TARGET)[0]
    versions = {"targets.json": state["targets"]["version"], "acme.json": 1, f"{role}.json": 1}
    repository.sign_online(versions, version=far)  # a thief ran ahead with the versions
    device.refresh(TARGET)
    assert device.word.floors["timestamp"] == far
    keys = repository.folder / "keys"
    root = Metadata[Root].from_bytes(repository.trust.metadata("1.root.json"))
    for name in ("snapshot", "timestamp"):
        (keys / f"{name}.pem").unlink()
        fresh = key_files.create(keys / f"{name}.pem")
        root.signed.revoke_key(root.signed.roles[name].keyids[0], name)
        root.signed.add_key(fresh.public_key, name)
    root.signed.version = 2
    root.sign(repository.key("root"))
    repository.replaced = {"2.root.json": root.to_bytes()}
    repository.sign_online(versions, version=7)
    repository.replaced["2.root.json"] = root.to_bytes()
    assert device.refresh(TARGET) == ONE
    assert (device.word.floors["timestamp"], device.word.floors["root"]) == (7, 2)


def test_offline_the_set_answers_what_it_holds(device: Device, repository: Repository):
    with pytest.raises(UnreachableError), device.keeper().offline():
        pass
    repository.publish()
    device.refresh(TARGET)
    repository.web.close()
    with device.keeper().offline() as session:
        assert session.manifest_of(TARGET) == (ONE, 1000)
        assert session.director_keys()
    device.wall_s += 2 * DAY_S
    with pytest.raises(RefusedError, match="expired"), device.keeper().offline():
        pass


def test_power_cuts_at_every_step_leave_a_set_that_works(tmp_path: Path, repository: Repository):
    repository.publish()
    steps: list[str] = []
    Device(tmp_path / "count", repository).refresh(TARGET, Disk(lambda step, _path: steps.append(step)))
    assert "fsync" in steps
    assert "rename" in steps
    for cut in range(len(steps)):
        device = Device(tmp_path / str(cut), repository)
        left = iter(range(cut + 1))

        def hook(_step, _path, left=left, cut=cut):
            if next(left, cut) == cut:
                raise PowerCutError

        with pytest.raises(PowerCutError):
            device.refresh(TARGET, Disk(hook))
        assert device.refresh(TARGET) == ONE
        assert device.refresh() is None


def test_a_manifest_that_the_target_does_not_spell_out_is_refused(device: Device, repository: Repository):
    role = repository.trust.bin_for(TARGET)[0]
    target = release(TARGET, ONE)
    target.hashes["sha256"] = TWO[7:]
    content = Targets(1, None, expires(90), {TARGET: target})
    versions = {
        "targets.json": repository.trust.public_state()["roles"]["targets"]["version"],
        "acme.json": 1,
        f"{role}.json": 1,
    }
    repository.sign_online(versions, version=int(time.time()) + 100)
    repository.replaced[f"1.{role}.json"] = repository.acme.sign(content)
    assert refused(lambda: device.refresh(TARGET)) == "trust_invalid"


@pytest.mark.parametrize("version", [True, 1 << 60])
def test_a_version_that_none_can_reach_is_refused_and_no_floor(
    device: Device, repository: Repository, version: int | bool
):
    repository.sign_online({"targets.json": 2, "acme.json": 1}, version=version)
    assert refused(device.refresh) == "trust_invalid"
    assert device.word.floors == {}


def test_what_is_signed_and_makes_no_sense_is_refused(device: Device, repository: Repository):
    """python-tuf takes a number where a role's name belongs, and stumbles when it asks for it."""
    content = json.loads(repository.trust.offline()[1])["signed"]
    content["delegations"]["roles"][0]["name"] = 7
    content["version"] = version = content["version"] + 1
    targets = Metadata.from_dict({"signed": content, "signatures": []})
    targets.sign(repository.key("targets"))
    repository.sign_online({"targets.json": version, "7.json": 1}, version=int(time.time()) + 100)
    repository.replaced[f"{version}.targets.json"] = targets.to_bytes()
    assert refused(lambda: device.refresh(TARGET)) == "trust_invalid"


def test_the_reference_time_reaches_the_updater(device: Device):
    """python-tuf has no argument for it; should it rename what we set, this fails first."""
    with device.keeper().online() as session:
        moment = datetime.fromtimestamp(device.wall_s, UTC)
        assert abs(session._updater._trusted_set.reference_time - moment) < timedelta(seconds=1)


# --- compressed metadata --------------------------------------------------------------------------


def fetched(body: bytes, encoding: str = "gzip", bound: int = 1_000_000) -> bytes:
    """Fetch one file from a server that answers so; python-tuf counts what comes against `bound`."""
    with little_server(lambda _path, _headers: Answer(200, body, {"Content-Encoding": encoding})) as web:
        return Online(Http(), Path()).download_bytes(f"{web.url}/1.snapshot.json", bound)


@pytest.mark.parametrize("size", [0, 1, 9_000, 64 * 1024, 64 * 1024 + 1, 500_000])
def test_metadata_come_compressed(size: int) -> None:
    text = (b'"publisher0-7f.json":{"version":1},' * (size // 30 + 1))[:size]
    assert fetched(gzip.compress(text)) == text
    assert fetched(text, "identity") == text


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (gzip.compress(b"x" * 1000)[:-9], exceptions.DownloadError),
        (b"not gzip at all", exceptions.DownloadError),
        (gzip.compress(bytes(200_000_000)), exceptions.DownloadLengthMismatchError),
    ],
    ids=["cut short", "something else", "a bomb"],
)
def test_what_is_badly_compressed_is_refused_in_bounds(body: bytes, error: type[Exception]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(error):
            fetched(body)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
