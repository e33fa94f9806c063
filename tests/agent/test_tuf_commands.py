"""`wherry-agent tuf`, driven as the public tuf-conformance suite drives a client: by arguments, exit codes and files.

The suite itself is not in any package registry and needs its own simulator; these rows are the situations that it
plays, against a repository that Wherry's server did not make.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

from tests.trust_kit import Answer, LittleServer
from wherry_agent import cli

TOP = ("root", "targets", "snapshot", "timestamp")


class Repository:
    """A TUF repository in memory; every change is free to be wrong."""

    def __init__(self) -> None:
        later = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.root = Root(1, expires=later, consistent_snapshot=True)
        self.targets: dict[str, Targets] = {"targets": Targets(1, expires=later)}
        self.snapshot = Snapshot(1, expires=later)
        self.timestamp = Timestamp(1, expires=later)
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, bytes] = {}
        self.cut_after: int | None = None
        for role in TOP:
            self.rotate(role)
        self.publish_root()
        self.publish()
        self.web = LittleServer(self._answer)

    def rotate(self, role: str, keys: int = 1, threshold: int = 1) -> None:
        """Give a top-level role other keys; what they sign next is the caller's business."""
        for keyid in list(self.root.roles[role].keyids):
            self.root.revoke_key(keyid, role)
        self.signers[role] = [CryptoSigner.generate_ed25519() for _ in range(keys)]
        for signer in self.signers[role]:
            self.root.add_key(signer.public_key, role)
        self.root.roles[role].threshold = threshold

    def publish_root(self, *also: CryptoSigner) -> None:
        metadata = Metadata(copy.deepcopy(self.root))
        for signer in (*self.signers["root"], *also):
            metadata.sign(signer, append=True)
        self.files[f"{self.root.version}.root.json"] = metadata.to_bytes()

    def sign(self, role: str, content) -> bytes:
        metadata = Metadata(copy.deepcopy(content))
        for signer in self.signers[role]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def publish(self) -> None:
        """Sign targets roles, snapshot and timestamp with their next versions."""
        for role, content in self.targets.items():
            self.files[f"{content.version}.{role}.json"] = self.sign(role, content)
            self.snapshot.meta[f"{role}.json"] = MetaFile(content.version)
        data = self.sign("snapshot", self.snapshot)
        self.files[f"{self.snapshot.version}.snapshot.json"] = data
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, data, ["sha256"])
        self.files["timestamp.json"] = self.sign("timestamp", self.timestamp)

    def next(self) -> None:
        self.targets["targets"].version += 1
        self.snapshot.version += 1
        self.timestamp.version += 1

    def add(self, name: str, data: bytes, role: str = "targets") -> None:
        target = TargetFile.from_data(name, data, ["sha256"])
        self.targets[role].targets[name] = target
        parent, slash, last = name.rpartition("/")
        self.artifacts[f"{parent}{slash}{target.hashes['sha256']}.{last}"] = data

    def delegate(self, role: DelegatedRole) -> None:
        signer = CryptoSigner.generate_ed25519()
        self.signers[role.name] = [signer]
        role.keyids = [signer.public_key.keyid]
        top = self.targets["targets"]
        top.delegations = top.delegations or Delegations({}, roles={})
        assert top.delegations.roles is not None
        top.delegations.keys[signer.public_key.keyid] = signer.public_key
        top.delegations.roles[role.name] = role
        self.targets[role.name] = Targets(1, expires=top.expires)

    def _answer(self, path: str, headers: dict[str, str]) -> Answer:
        kind, _, name = path.lstrip("/").partition("/")
        data = (self.files if kind == "metadata" else self.artifacts).get(unquote(name))
        if data is None:
            return Answer(404)
        if kind == "metadata":
            return Answer(200, data)
        wanted = headers.get("range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        said = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        cut, self.cut_after = self.cut_after, None
        return Answer(206 if wanted else 200, data[start:], said, cut)


class Client:
    """The command, and the folders that it is given."""

    def __init__(self, folder: Path, repository: Repository) -> None:
        self.folder = folder
        self.metadata = folder / "metadata"
        self.downloads = folder / "targets"
        self.repository = repository
        self.downloads.mkdir(parents=True)

    def init(self) -> int:
        root = self.folder / "initial_root.json"
        root.write_bytes(self.repository.files["1.root.json"])
        return cli.main(["tuf", "--metadata-dir", str(self.metadata), "init", str(root)])

    def refresh(self) -> int:
        url = f"{self.repository.web.url}/metadata"
        return cli.main(["tuf", "--metadata-url", url, "--metadata-dir", str(self.metadata), "refresh"])

    def download(self, name: str) -> int:
        web = self.repository.web.url
        options = ["--metadata-url", f"{web}/metadata", "--metadata-dir", str(self.metadata), "--target-name", name]
        options += ["--target-dir", str(self.downloads), "--target-base-url", f"{web}/targets"]
        return cli.main(["tuf", *options, "download"])

    def version(self, role: str) -> int:
        return Metadata.from_file(str(self.metadata / f"{role}.json")).signed.version

    def have(self) -> list[bytes]:
        """Return the files that count: a hidden one is a download that goes on later."""
        return [path.read_bytes() for path in self.downloads.glob("[!.]*")]


@pytest.fixture
def repository() -> Iterator[Repository]:
    made = Repository()
    yield made
    made.web.close()


@pytest.fixture
def client(tmp_path: Path, repository: Repository) -> Client:
    made = Client(tmp_path / "client", repository)
    assert made.init() == 0
    assert repository.web.asked == []
    return made


def test_init_then_refresh_leaves_the_four_roles_under_their_names(client: Client):
    assert client.version("root") == 1
    assert client.refresh() == 0
    assert [client.version(role) for role in TOP] == [1, 1, 1, 1]


def test_without_init_and_without_a_url_it_says_what_is_missing(tmp_path: Path, repository: Repository, capsys):
    stranger = Client(tmp_path / "stranger", repository)
    assert stranger.refresh() == 1
    assert "init" in capsys.readouterr().err
    assert cli.main(["tuf", "--metadata-dir", str(tmp_path), "refresh"]) == 1
    assert "--metadata-url" in capsys.readouterr().err


def _root_rotation(repository: Repository) -> None:
    old = repository.signers["root"]
    repository.rotate("root", keys=3, threshold=2)
    repository.root.version = 2
    repository.publish_root(*old)


def _root_without_old_keys(repository: Repository) -> None:
    repository.rotate("root")
    repository.root.version = 2
    repository.publish_root()


def _root_below_its_own_threshold(repository: Repository) -> None:
    old = repository.signers["root"]
    repository.rotate("root", keys=3, threshold=2)
    repository.signers["root"] = repository.signers["root"][:1]
    repository.root.version = 2
    repository.publish_root(*old)


def _root_that_skips_a_version(repository: Repository) -> None:
    repository.root.version = 3
    repository.publish_root()
    repository.files["2.root.json"] = repository.files["3.root.json"]


def _older_timestamp(repository: Repository) -> None:
    repository.timestamp.version = 1
    repository.publish()


def _older_snapshot(repository: Repository) -> None:
    repository.snapshot.version = 1
    repository.timestamp.version += 1
    repository.publish()


def _targets_removed_from_snapshot(repository: Repository) -> None:
    repository.publish()
    del repository.snapshot.meta["targets.json"]
    _sign_online(repository)


def _older_targets(repository: Repository) -> None:
    repository.targets["targets"].version = 1
    repository.snapshot.version += 1
    repository.timestamp.version += 1
    repository.publish()


def _expired(role: str) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        past = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
        content = {"timestamp": repository.timestamp, "snapshot": repository.snapshot, **repository.targets}[role]
        content.expires = past
        repository.next()
        repository.publish()

    return change


def _forged(role: str) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.signers[role] = [CryptoSigner.generate_ed25519()]
        repository.next()
        repository.publish()

    return change


def _snapshot_other_than_the_timestamp_says(repository: Repository) -> None:
    repository.next()
    repository.publish()
    repository.files[f"{repository.snapshot.version}.snapshot.json"] += b" "


def _sign_online(repository: Repository) -> None:
    repository.snapshot.version += 1
    repository.timestamp.version += 1
    data = repository.sign("snapshot", repository.snapshot)
    repository.files[f"{repository.snapshot.version}.snapshot.json"] = data
    repository.timestamp.snapshot_meta = MetaFile.from_data(repository.snapshot.version, data, ["sha256"])
    repository.files["timestamp.json"] = repository.sign("timestamp", repository.timestamp)


SITUATIONS: list[tuple[str, Callable[[Repository], None], bool]] = [
    ("root rotates to three keys at threshold two", _root_rotation, True),
    ("a root that the old keys did not sign", _root_without_old_keys, False),
    ("a root that its own keys did not sign at threshold", _root_below_its_own_threshold, False),
    ("a root whose version is not the next", _root_that_skips_a_version, False),
    ("an older timestamp", _older_timestamp, False),
    ("an older snapshot", _older_snapshot, False),
    ("older targets", _older_targets, False),
    ("targets vanish from the snapshot", _targets_removed_from_snapshot, False),
    ("an expired timestamp", _expired("timestamp"), False),
    ("an expired snapshot", _expired("snapshot"), False),
    ("expired targets", _expired("targets"), False),
    ("a forged timestamp", _forged("timestamp"), False),
    ("a forged snapshot", _forged("snapshot"), False),
    ("forged targets", _forged("targets"), False),
    ("another snapshot than the timestamp names", _snapshot_other_than_the_timestamp_says, False),
]


@pytest.mark.parametrize(("change", "good"), [row[1:] for row in SITUATIONS], ids=[row[0] for row in SITUATIONS])
def test_a_refresh_takes_what_is_right_and_keeps_what_it_had(
    client: Client, repository: Repository, change: Callable[[Repository], None], good: bool
):
    repository.next()
    repository.publish()
    assert client.refresh() == 0
    had = {role: client.version(role) for role in TOP}
    change(repository)
    assert client.refresh() == (0 if good else 1)
    assert all(client.version(role) >= had[role] for role in TOP)
    if good:
        assert client.version("root") == 2


def test_a_rotated_root_is_kept_although_the_rest_of_the_refresh_failed(client: Client, repository: Repository):
    assert client.refresh() == 0
    old = repository.signers["timestamp"]
    repository.rotate("timestamp")
    repository.root.version = 2
    repository.publish_root()
    repository.files["timestamp.json"] = b"{}"
    assert client.refresh() == 1
    assert client.version("root") == 2
    del repository.files["2.root.json"]  # a thief hides it and has the revoked key
    repository.signers["timestamp"] = old
    repository.next()
    repository.publish()
    assert client.refresh() == 1


def test_a_target_is_downloaded_once_and_replaced_under_the_same_name(client: Client, repository: Repository):
    name = "path/to/a file.bin"
    for version, data in enumerate((b"one" * 100, b"two" * 70)):
        repository.add(name, data)
        if version:
            repository.next()
        repository.publish()
        assert client.download(name) == 0
        assert client.have() == [data]
        asked = len([path for path, _ in repository.web.asked if path.startswith("/targets/")])
        assert client.download(name) == 0
        assert len([path for path, _ in repository.web.asked if path.startswith("/targets/")]) == asked


def test_a_target_with_other_bytes_or_unknown_to_all_roles_is_not_stored(client: Client, repository: Repository):
    repository.add("good.bin", b"good")
    repository.publish()
    assert client.download("unknown.bin") == 1
    for bad in (b"evil", b"evil and longer", b"ev"):
        repository.artifacts = dict.fromkeys(repository.artifacts, bad)
        assert client.download("good.bin") == 1
        assert client.have() == []
        for path in client.downloads.iterdir():
            path.unlink()


def test_a_broken_download_goes_on_where_it_stopped(client: Client, repository: Repository):
    data = bytes(range(256)) * 500
    repository.add("large.bin", data)
    repository.publish()
    repository.cut_after = 40_000
    assert client.download("large.bin") == 0
    assert client.have() == [data]
    ranges = [headers.get("range") for path, headers in repository.web.asked if path.startswith("/targets/")]
    assert ranges == [None, "bytes=40000-"]


def test_delegations_are_followed_in_order_and_end_where_they_are_terminating(client: Client, repository: Repository):
    repository.delegate(DelegatedRole("first", [], 1, terminating=False, paths=["*.a"]))
    repository.delegate(DelegatedRole("last", [], 1, terminating=True, paths=["*.a"]))
    repository.delegate(DelegatedRole("never", [], 1, terminating=False, paths=["*.a"]))
    repository.add("in-last.a", b"last", "last")
    repository.add("in-never.a", b"never", "never")
    repository.publish()
    assert client.download("in-last.a") == 0
    assert client.download("in-never.a") == 1
    names = [path.rpartition("/")[2] for path, _ in repository.web.asked]
    assert "1.never.json" not in names
    assert client.have() == [b"last"]


def test_succinct_hash_bins_hold_a_target(client: Client, repository: Repository):
    signer = CryptoSigner.generate_ed25519()
    bins = SuccinctRoles([signer.public_key.keyid], 1, 4, "bin")
    top = repository.targets["targets"]
    top.delegations = Delegations({signer.public_key.keyid: signer.public_key}, succinct_roles=bins)
    role = bins.get_role_for_target("in-bin")
    repository.signers[role] = [signer]
    repository.targets[role] = Targets(1, expires=top.expires)
    repository.add("in-bin", b"bin", role)
    repository.publish()
    assert client.download("in-bin") == 0
    assert hashlib.sha256(client.have()[0]).hexdigest() == hashlib.sha256(b"bin").hexdigest()
