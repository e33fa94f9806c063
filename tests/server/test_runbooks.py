"""The runbooks of trust, typed line by line as they stand, with a device that watches.

Each `NAME$ command` of a runbook is run here as that person would; only names in capitals are filled in.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click.testing import CliRunner
from tuf.api.metadata import Metadata, Root, Targets

from tests.trust_kit import RunningServer, manifest_bytes, write_bundle
from wherry_agent.children import Trust as Word
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk
from wherry_agent.trust import Keeper, Known
from wherry_optimizer.cli import app as optimizer
from wherry_server.cli.common import GLOBALS
from wherry_server.cli.everything import app as wherry
from wherry_server.services import prepare
from wherry_server.settings import Settings
from wherry_shared import key_files
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError, WherryError

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
COMMANDS = {"wherry": typer.main.get_command(wherry), "wherry-optimizer": typer.main.get_command(optimizer)}
LINE = re.compile(r"^(\w+)\$ (wherry|wherry-optimizer) (.+)$")
S = 1_000_000


def lines_of(runbook: str, section: str = "") -> list[str]:
    """Return the commands of a runbook, or of the part of it that begins with the text `section`."""
    text = (RUNBOOKS / f"{runbook}.md").read_text(encoding="utf-8")
    if section:
        assert section in text
        text = text[text.index(section) :]
        text = text[: text.index("```", text.index("```console") + 10)]
    found = [line for line in text.splitlines() if LINE.match(line)]
    assert found
    return found


class Desk:
    """One table at which everybody sits: a folder, a server, the commands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._set = monkeypatch.setenv
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("WHERRY_KEY_PASSWORD", "correct horse")
        monkeypatch.setenv("WHERRY_DATA", str(folder / "data"))
        monkeypatch.delenv("WHERRY_PUBLISHER_KEY", raising=False)

    def follow(self, runbook: str, section: str = "", **names: str) -> str:
        """Type every command; return what was printed."""
        return "".join(self.type(line, **names) for line in lines_of(runbook, section))

    def type(self, line: str, **names: str) -> str:
        found = LINE.match(line)
        assert found is not None
        arguments = re.sub(r"\b[A-Z]{2,}\b", lambda word: names.get(word[0], word[0]), found[3]).split()
        GLOBALS.server = GLOBALS.token = None
        run = CliRunner().invoke(COMMANDS[found[2]], arguments, input="y\n" * 9)
        if isinstance(run.exception, WherryError):
            raise run.exception
        assert run.exception is None, f"{line}\n{run.output}\n{run.exception!r}"
        return run.output

    def refused(self, line: str) -> str:
        """Type a command that is refused; return the code."""
        with pytest.raises(RefusedError) as caught:
            self.type(line)
        return caught.value.code

    def serve(self) -> RunningServer:
        server = RunningServer(self.folder / "data")
        self._set("WHERRY_SERVER", server.url)
        self._set("WHERRY_TOKEN", server.token)
        return server


class Device:
    """A device enrolled when the server was new: it knows root v1 and what it has seen since."""

    def __init__(self, home: Path, server: RunningServer) -> None:
        self.home = home
        self.server = server
        self.word = Word(current=0, floors={}, time_floor_us=0, expires_at=0)
        self.digest = server.trust.root_digest
        (home / "trust").mkdir(parents=True)
        (home / "trust" / "root.json").write_bytes(server.trust.metadata("1.root.json"))

    def manifest(self, target: str = "") -> str | None:
        """Refresh, and return what is signed under a target."""
        keeper = Keeper(
            self.home,
            Disk(),
            root_digest=self.digest,
            metadata_url=f"{self.server.url}/tuf/default",
            http=Http(),
            known=Known(self.word.current, dict(self.word.floors), self.word.time_floor_us),
            wall_us=int(time.time() * S),
        )
        with keeper.online() as session:
            self.keys = set(session.director_keys())
            found = session.manifest_of(target) if target else None
            self.revoked = session.policy(target.partition("/")[0]).revoked if target else frozenset()
            self.word = keeper.commit(session)
        return found[0] if found else None


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path / "desk", monkeypatch)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the desk once alice, bob and carol have begun."""
    folder = tmp_path_factory.mktemp("founded")
    with pytest.MonkeyPatch.context() as patch:
        desk = Desk(folder / "desk", patch)
        desk.follow("ceremonies", "## Begin")
        prepare(Settings(data=folder / "desk" / "data"))
    return folder / "desk"


@pytest.fixture
def begun(desk: Desk, founded: Path) -> Iterator[tuple[Desk, RunningServer]]:
    """A server whose root alice, bob and carol hold."""
    shutil.copytree(founded, desk.folder, dirs_exist_ok=True)
    server = desk.serve()
    yield desk, server
    server.close()


def newest_root(server: RunningServer) -> Root:
    return Metadata[Root].from_bytes(server.trust.offline()[0][-1]).signed


def test_a_repository_begins_offline_and_two_people_release(begun: tuple[Desk, RunningServer], tmp_path: Path):
    desk, server = begun
    state = server.trust.public_state()
    assert state["development"] is False
    assert [state["roles"][role]["threshold"] for role in ("root", "targets")] == [2, 2]
    assert sorted(path.stem for path in (desk.folder / "data" / "trust" / "keys").glob("*.pem")) == [
        "director",
        "snapshot",
        "timestamp",
    ]
    assert b"ENCRYPTED" in (desk.folder / "alice.pem").read_bytes()
    device = Device(tmp_path / "device", server)
    desk.follow("ceremonies", "## A publisher comes")
    write_bundle(desk.folder / "bundle", "1.0.0")
    manifest = of_bytes(manifest_bytes(desk.folder / "bundle"))
    said = [desk.type(line) for line in lines_of("ceremonies", "## A release by two people")]
    assert "proposed" in said[1]
    assert "released" in said[3]
    assert device.manifest("thing/1.0.0") == manifest
    before = newest_root(server)
    desk.follow("ceremonies", "## Every year")
    assert newest_root(server).version == before.version + 1
    assert device.manifest("thing/1.0.0") == manifest


def test_outside_development_nothing_is_made_ready_before_people_signed(desk: Desk):
    assert desk.refused("server$ wherry init --data fresh") == "ceremony_needed"
    assert not (desk.folder / "fresh" / "trust").exists()
    desk.type("server$ wherry trust online-keys online --data fresh")
    assert desk.refused("server$ wherry init --data fresh") == "ceremony_needed", "keys of the server are no root"


def test_a_publishers_key_without_a_password_is_made_in_development_only(begun: tuple[Desk, RunningServer]):
    desk, _ = begun
    write_bundle(desk.folder / "bundle", "1.0.0")
    assert desk.refused("dora$ wherry-optimizer sign bundle --key none.pem") == "key_absent"
    assert not (desk.folder / "none.pem").exists()


def test_one_holder_is_not_enough_and_the_server_notices_too(begun: tuple[Desk, RunningServer]):
    desk, server = begun
    desk.type("alice$ wherry trust root renew ceremony")
    desk.type("alice$ wherry trust sign ceremony --key alice.pem")
    assert desk.refused("alice$ wherry trust submit ceremony") == "signatures_missing"
    root = (desk.folder / "ceremony" / "next" / "root.json").read_bytes()
    with pytest.raises(RefusedError) as caught:
        server.trust.accept_offline([root])
    assert caught.value.code == "signatures_missing"
    assert newest_root(server).version == 1


def test_root_rotation(begun: tuple[Desk, RunningServer], tmp_path: Path):
    desk, server = begun
    device, late = Device(tmp_path / "device", server), Device(tmp_path / "late", server)
    device.manifest()
    bob = key_files.load(desk.folder / "bob.pem").public_key.keyid
    online = set(newest_root(server).roles["snapshot"].keyids)
    desk.follow("root-rotation", "A holder's key is lost", BOB=bob[:10])
    root = newest_root(server)
    assert (root.version, bob in root.keys, len(root.roles["root"].keyids)) == (2, False, 3)
    device.manifest()
    assert device.word.floors["root"] == 2
    desk.follow("root-rotation", "The server's snapshot and timestamp keys")
    root = newest_root(server)
    assert not online & set(root.roles["snapshot"].keyids)
    for one in (device, late):
        one.manifest()
        assert one.word.floors["root"] == 3
    desk.type("alice$ wherry trust root renew ceremony")
    assert desk.refused("bob$ wherry trust sign ceremony --key bob.pem") == "key_foreign"


def test_a_fleet_leaves_development_by_a_rotation(desk: Desk, tmp_path: Path):
    server = desk.serve()
    try:
        device = Device(tmp_path / "device", server)
        device.manifest()
        for name in ("alice", "bob", "carol"):
            desk.type(f"{name}$ wherry trust key {name}.pem")
        desk.type(f"alice$ wherry trust fetch ceremony --root-digest {server.trust.root_digest}")
        keys = desk.folder / "data" / "trust" / "keys"
        gone = [key_files.load(keys / f"{role}.pem").public_key.keyid for role in ("root", "targets")]
        add = " ".join(f"--add {name}.pem.pub" for name in ("alice", "bob", "carol"))
        remove = " ".join(f"--remove {keyid}" for keyid in gone)
        desk.type(f"alice$ wherry trust root rotate ceremony {add} {remove} --threshold 2")
        for key in (keys / "root.pem", Path("alice.pem"), Path("bob.pem")):
            desk.type(f"all$ wherry trust sign ceremony --key {key}")
        desk.type("bob$ wherry trust submit ceremony")
        assert server.trust.public_state()["development"] is False
        device.manifest()
        assert device.word.floors["root"] == 2
        with pytest.raises(RefusedError) as caught:
            server.trust.add_publisher("acme", key_files.public_pem(key_files.load(keys / "root.pem")), ["thing"])
        assert caught.value.code == "ceremony_needed"
    finally:
        server.close()


def with_solo(desk: Desk, server: RunningServer) -> str:
    """Let a publisher with one key release a bundle; return its manifest."""
    for line in (
        "old$ wherry trust key old.pem",
        "alice$ wherry trust publisher add solo --ceremony ceremony --key old.pem.pub --model solo-model",
        "alice$ wherry trust sign ceremony --key alice.pem",
        "bob$ wherry trust sign ceremony --key bob.pem",
        "bob$ wherry trust submit ceremony",
        "old$ wherry-optimizer sign bundle --key old.pem",
        "old$ wherry bundle push bundle --key old.pem",
    ):
        if "optimizer" in line:
            write_bundle(desk.folder / "bundle", "1.0.0", model="solo-model")
        desk.type(line)
    return of_bytes(manifest_bytes(desk.folder / "bundle"))


def test_publisher_key_loss(begun: tuple[Desk, RunningServer], tmp_path: Path):
    desk, server = begun
    manifest = with_solo(desk, server)
    device = Device(tmp_path / "device", server)
    assert device.manifest("solo-model/1.0.0") == manifest
    lines = lines_of("publisher-key-loss", "# Runbook")
    for line in lines[:-1]:
        desk.type(line)
    assert server.trust.public_state()["publishers"][0]["unsigned"]
    with pytest.raises(RefusedError) as caught:
        device.manifest("solo-model/1.0.0")
    assert caught.value.code == "trust_invalid"
    unasked = "gina$ wherry trust adopt solo --key gina.pem"
    assert desk.refused(unasked) == "bin_foreign"
    desk.type(lines[-1])
    assert server.trust.public_state()["publishers"][0]["unsigned"] == []
    assert device.manifest("solo-model/1.0.0") == manifest
    assert desk.refused("old$ wherry trust policy solo-model --key old.pem") == "model_taken"
    desk.follow("publisher-key-loss", "**If the key was stolen**", DIGEST=manifest)
    device.manifest("solo-model/1.0.0")
    assert device.revoked == {manifest}


def test_a_revoked_publisher_is_believed_no_more(begun: tuple[Desk, RunningServer], tmp_path: Path):
    desk, server = begun
    with_solo(desk, server)
    device = Device(tmp_path / "device", server)
    device.manifest("solo-model/1.0.0")
    for line in (
        "alice$ wherry trust publisher revoke ceremony solo",
        "alice$ wherry trust sign ceremony --key alice.pem",
        "bob$ wherry trust sign ceremony --key bob.pem",
        "bob$ wherry trust submit ceremony",
    ):
        desk.type(line)
    assert device.manifest("solo-model/1.0.0") is None
    with pytest.raises(RefusedError):
        server.trust.bin_for("solo-model/1.0.1")


def test_director_key_theft(begun: tuple[Desk, RunningServer], tmp_path: Path):
    desk, server = begun
    device = Device(tmp_path / "device", server)
    device.manifest()
    stolen = server.trust.director_keyid
    since = server.trust.director_since_us
    assert device.keys == {stolen}
    desk.follow("director-key-theft")
    device.manifest()
    assert device.keys == {server.trust.director_keyid}
    assert stolen not in device.keys
    assert server.trust.director_since_us > since


def test_a_server_restored_from_an_old_backup(begun: tuple[Desk, RunningServer], tmp_path: Path):
    desk, server = begun
    desk.follow("ceremonies", "## A publisher comes")
    server.close()
    shutil.copytree(desk.folder / "data", desk.folder / "backup")
    server = desk.serve()
    desk.follow("ceremonies", "## Every year")
    write_bundle(desk.folder / "bundle", "1.0.0")
    desk.follow("ceremonies", "## A release by two people")
    device = Device(tmp_path / "device", server)
    manifest = device.manifest("thing/1.0.0")
    assert manifest
    server.close()
    shutil.rmtree(desk.folder / "data")
    (desk.folder / "backup").rename(desk.folder / "data")
    server = device.server = desk.serve()
    try:
        with pytest.raises(RefusedError) as caught:
            device.manifest("thing/1.0.0")
        assert caught.value.code in {"trust_rollback", "trust_invalid"}
        desk.follow("old-backup")
        desk.type("erik$ wherry trust repair --key erik.pem")
        assert device.manifest("thing/1.0.0") == manifest
        targets = Metadata[Targets].from_bytes(server.trust.offline()[1]).signed
        assert targets.version == device.word.floors["targets"]
    finally:
        server.close()
