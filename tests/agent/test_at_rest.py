"""Encryption at rest: what lies on the disk says nothing without its key, and what was changed there is found and named."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.agent.builders import confirmed
from tests.agent.serving_kit import until
from tests.agent.test_telemetry import message
from tests.services import needs
from tests.tpm_kit import software_tpm
from tests.trust_kit import running_server
from wherry_agent import cipher, identity, marks, platform_key, sealing, status
from wherry_agent.courier_enrol import bring_in_line, device_key
from wherry_agent.disk import Disk
from wherry_agent.journal import Journal
from wherry_agent.marks import Marks
from wherry_agent.sealing import Seal
from wherry_agent.telemetry import Buffer
from wherry_shared.errors import RefusedError, WherryError

ROOT = Path(__file__).parents[2]
KEY = bytes(range(32))
OTHER = bytes(range(1, 33))


def seal(mode: sealing.Mode = "on", key: bytes = KEY) -> Seal:
    return Seal(key, mode, "file:/key")


# --- the cipher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 70_001])
@pytest.mark.parametrize("beside", [b"", b"a line"])
def test_the_systems_library_says_what_another_implementation_says(size: int, beside: bytes) -> None:
    key, nonce, data = os.urandom(32), os.urandom(12), os.urandom(size)
    sealed = AESGCM(key).encrypt(nonce, data, beside)
    assert cipher.encrypt(key, nonce, data, beside) == sealed
    assert cipher.decrypt(key, nonce, sealed, beside) == data
    with pytest.raises(cipher.ForgedError):
        cipher.decrypt(key, nonce, sealed, beside + b"x")
    with pytest.raises(InvalidTag):
        AESGCM(key).decrypt(nonce, sealed, beside + b"x")


def test_a_record_opens_at_its_place_only_and_with_every_byte_as_it_was() -> None:
    record = seal().close("journal", b"state", 7)
    assert b"state" not in record
    assert seal().open("journal", record) == sealing.Opened(b"state", 7, sealed=True)
    for at in range(len(record)):
        with pytest.raises(RefusedError) as caught:
            sealing.opened(seal(), "journal", record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :])
        assert caught.value.code in ("record_altered", "at_rest_key_other", "record_clear")
    for length in range(len(record)):
        with pytest.raises(RefusedError) as caught:
            sealing.opened(seal(), "journal", record[:length])
        assert caught.value.code in ("record_altered", "record_clear", "at_rest_key_other")
    with pytest.raises(RefusedError, match="record_altered"):
        seal().open("identity", record)
    moved = record.replace(b" journal ", b" identity ", 1)
    with pytest.raises(RefusedError, match="record_altered"):
        seal().open("identity", moved)


# --- the journal ----------------------------------------------------------------------------------


def kept(home: Path, mode: sealing.Mode = "on", key: bytes = KEY) -> Journal:
    return Journal(Disk(seal=seal(mode, key)), home / "journal.json")


def read(found: Journal) -> tuple[int | None, list[str]]:
    state, problems = found.read(lambda: "new-stream")
    return (state.revision if state is not None else None), [problem.code for problem in problems]


def written(home: Path, count: int, mode: sealing.Mode = "on") -> None:
    found = kept(home, mode)
    found.read(lambda: "x")
    for number in range(count):
        found.write(replace(confirmed(), revision=number))


def put_back(home: Path, *names: str) -> Callable[[], None]:
    """Copy files away, and return what puts them back."""
    aside = home.parent / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in names:
        if (home / name).exists():
            shutil.copyfile(home / name, aside / name)

    def back() -> None:
        for name in names:
            (home / name).unlink(missing_ok=True)
            if (aside / name).exists():
                shutil.copyfile(aside / name, home / name)

    return back


BOTH = ("journal.json", "journal.json.before")


def test_a_journal_says_nothing_without_its_key(tmp_path: Path) -> None:
    written(tmp_path, 3)
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"d" * 22 not in everything
    assert b"models" not in everything
    assert read(kept(tmp_path)) == (2, [])


def exchange(home: Path) -> None:
    first, second = (home / name for name in BOTH)
    one, two = first.read_bytes(), second.read_bytes()
    first.unlink()
    first.write_bytes(two)
    second.write_bytes(one)


def test_records_that_changed_places_are_found(tmp_path: Path) -> None:
    written(tmp_path, 3)
    exchange(tmp_path)
    assert read(kept(tmp_path)) == (2, ["journal_replayed"])


def test_an_older_record_in_the_place_of_the_newest_is_found(tmp_path: Path) -> None:
    written(tmp_path, 3)
    back = put_back(tmp_path, "journal.json")
    written(tmp_path, 3)
    back()
    assert read(kept(tmp_path)) == (1, ["journal_replayed"]), "the record before the newest is as good as ever"


def test_both_records_of_an_earlier_life_are_found(tmp_path: Path) -> None:
    written(tmp_path, 3)
    back = put_back(tmp_path, *BOTH)
    written(tmp_path, 3)
    written(tmp_path, 1)
    back()
    assert read(kept(tmp_path)) == (None, ["journal_replayed", "journal_replayed"])


def test_in_a_long_life_the_marks_follow(tmp_path: Path) -> None:
    written(tmp_path, 3)
    back = put_back(tmp_path, *BOTH)
    written(tmp_path, 2 * Marks.EVERY)
    back()
    assert read(kept(tmp_path)) == (None, ["journal_replayed", "journal_replayed"])


def test_without_the_marks_nothing_that_is_sealed_is_believed(tmp_path: Path) -> None:
    written(tmp_path, 3)
    back = put_back(tmp_path, *BOTH)
    written(tmp_path, 3)
    back()
    for name in (marks.FILE, marks.COPY):
        (tmp_path / name).unlink()
    assert read(kept(tmp_path)) == (None, ["journal_replayed", "journal_replayed"])


def test_a_mark_that_rotted_has_a_copy(tmp_path: Path) -> None:
    written(tmp_path, 3)
    (tmp_path / marks.FILE).write_bytes(b"rotten")
    assert read(kept(tmp_path)) == (2, [])


def test_a_journal_that_was_removed_is_told(tmp_path: Path) -> None:
    written(tmp_path, 3)
    written(tmp_path, 1)
    for name in BOTH:
        (tmp_path / name).unlink()
    assert read(kept(tmp_path)) == (None, ["journal_missing"])
    written(tmp_path, 1)
    assert read(kept(tmp_path)) == (0, []), "and it goes on from there"


def test_a_torn_record_gives_way_to_the_one_before(tmp_path: Path) -> None:
    written(tmp_path, 3)
    data = (tmp_path / "journal.json").read_bytes()
    (tmp_path / "journal.json").unlink()
    (tmp_path / "journal.json").write_bytes(data[: len(data) // 2])
    assert read(kept(tmp_path)) == (1, ["record_altered"])


MIX_UPS: list[tuple[str, sealing.Mode | None, sealing.Mode | None, bytes, str]] = [
    ("the key is not set any more", "on", None, KEY, "at_rest_key_missing"),
    ("another key is set", "on", "on", OTHER, "at_rest_key_other"),
    ("another key is set for going back", "on", "off", OTHER, "at_rest_key_other"),
    ("a clear journal where all is sealed", None, "on", KEY, "record_clear"),
]


@pytest.mark.parametrize(("sentence", "before", "now", "key", "code"), MIX_UPS, ids=[row[0] for row in MIX_UPS])
def test_a_mix_up_of_key_and_record_stops_and_touches_nothing(
    tmp_path: Path, sentence: str, before: sealing.Mode | None, now: sealing.Mode | None, key: bytes, code: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    written(home, 3, before or "off")
    if before is None:
        assert not (home / marks.FILE).exists()
    looks = {path.name: path.read_bytes() for path in home.iterdir()}
    found = Journal(Disk(seal=seal(now, key) if now else None), home / "journal.json")
    with pytest.raises(RefusedError) as caught:
        found.read(lambda: "x")
    assert caught.value.code == code
    assert caught.value.consequence
    assert caught.value.next_step
    assert {path.name: path.read_bytes() for path in home.iterdir()} == looks


def test_a_device_gets_a_key_and_gives_it_up_without_losing_anything(tmp_path: Path) -> None:
    written(tmp_path, 2, "off")
    assert b"models" in (tmp_path / "journal.json").read_bytes()
    assert read(kept(tmp_path, "migrate")) == (1, [])
    written(tmp_path, 2, "migrate")
    assert b"models" not in b"".join((tmp_path / name).read_bytes() for name in BOTH)
    assert read(kept(tmp_path, "on")) == (1, [])
    written(tmp_path, 2, "off")
    assert b"models" in (tmp_path / "journal.json").read_bytes()
    assert not (tmp_path / marks.FILE).exists()
    assert read(Journal(Disk(), tmp_path / "journal.json")) == (1, [])


# --- identity -------------------------------------------------------------------------------------


def known(home: Path, disk: Disk) -> identity.Identity:
    disk.mkdir(identity.folder(home))
    device_key(identity.folder(home) / identity.KEY_FILE, disk)
    found = identity.Identity(
        format=1,
        device="d" * 22,
        project="default",
        name="lamp",
        server="http://localhost",
        root_digest="0" * 64,
        tuf_path="/tuf/default",
        bearer="the-secret-of-the-device",
        mac_key="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        broker_host="localhost",
        broker_port=1883,
    )
    identity.write(home, disk, found)
    return found


def test_identity_and_private_key_follow_the_settings_both_ways(tmp_path: Path) -> None:
    found = known(tmp_path, Disk())
    key = identity.folder(tmp_path) / identity.KEY_FILE
    public = device_key(key, Disk()).public_key()
    assert not identity.is_in_line(tmp_path, found, seal("migrate"))
    assert bring_in_line(tmp_path, Disk(seal=seal("migrate"))) == found
    everything = b"".join(path.read_bytes() for path in identity.folder(tmp_path).iterdir())
    assert found.bearer.encode() not in everything
    assert b"BEGIN PRIVATE KEY" not in everything
    with pytest.raises(TypeError, match=r"[Pp]assword"):
        load_pem_private_key(key.read_bytes(), None)
    assert device_key(key, Disk(seal=seal())).public_key() == public
    assert identity.load(tmp_path, seal()) == found
    with pytest.raises(RefusedError, match="at_rest_key_missing"):
        identity.load(tmp_path)
    with pytest.raises(RefusedError, match="at_rest_key_other"):
        identity.load(tmp_path, seal(key=OTHER))

    assert bring_in_line(tmp_path, Disk(seal=seal("off"))) == found
    assert identity.load(tmp_path) == found
    assert device_key(key, Disk()).public_key() == public
    with pytest.raises(RefusedError, match="record_clear"):
        identity.load(tmp_path, seal("on"))


# --- telemetry ------------------------------------------------------------------------------------


def buffer(home: Path, mode: sealing.Mode = "on", key: bytes = KEY) -> Buffer:
    disk = Disk(seal=seal(mode, key))
    return Buffer(home / "telemetry.db", 1 << 20, seal=disk.seal, marks=Marks(home, disk))


def told(found: Buffer) -> list[str]:
    messages = [found.message(seq) for seq in found.held(100)]
    found_models = [window.model for message in messages if message is not None for window in message.windows]
    found.close()
    return found_models


def fill(found: Buffer, *models: str) -> None:
    for model in models:
        (window,) = message().windows
        found.add(msgspec.structs.replace(message(), windows=[msgspec.structs.replace(window, model=model)]))


def test_what_waits_for_the_server_says_nothing_without_its_key(tmp_path: Path) -> None:
    found = buffer(tmp_path)
    fill(found, "secret-model", "other-model")
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"secret-model" not in everything
    assert told(found) == ["secret-model", "other-model"]
    assert told(buffer(tmp_path)) == ["secret-model", "other-model"]


def change(home: Path, *statements: str) -> None:
    with sqlite3.connect(home / "telemetry.db") as database:
        for statement in statements:
            database.execute(statement)
    database.close()


THEFTS = [
    ("two messages exchanged", ["UPDATE message SET seq = -seq WHERE seq < 3", "UPDATE message SET seq = 3 + seq WHERE seq < 0"], ["c"], 2),
    ("the newest taken away", ["DELETE FROM message WHERE seq = 3"], ["a", "b"], 1),
    ("the oldest taken away", ["DELETE FROM message WHERE seq = 1"], ["b", "c"], 1),
    ("a message altered", ["UPDATE message SET body = zeroblob(100) WHERE seq = 2"], ["a", "c"], 1),
    ("a message twice", ["INSERT INTO message SELECT 9, windows, size, body FROM message WHERE seq = 1"], [], 4),
    ("numbers set back", ["UPDATE stream SET next = 2"], [], 3),
    ("the proof removed", ["UPDATE stream SET proof = NULL"], [], 3),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "statements", "left", "lost"), THEFTS, ids=[row[0] for row in THEFTS])
def test_messages_that_were_changed_are_found_and_counted(
    tmp_path: Path, sentence: str, statements: list[str], left: list[str], lost: int
) -> None:
    found = buffer(tmp_path)
    fill(found, "a", "b", "c")
    found.close()
    change(tmp_path, *statements)
    after = buffer(tmp_path)
    messages = [after.message(seq) for seq in after.held(10)]
    assert [window.model for message in messages if message is not None for window in message.windows] == left
    assert after.untold == lost
    fill(after, "d")
    assert told(after)[-1] == "d"
    assert told(buffer(tmp_path))[-1:] == ["d"], "and it goes on from there"


def test_an_older_buffer_that_was_put_back_begins_anew(tmp_path: Path) -> None:
    """Its numbers were given to other messages since: the server would take the new ones for known."""
    home = tmp_path / "home"
    home.mkdir()
    found = buffer(home)
    fill(found, "a")
    epoch = found.epoch
    found.close()
    back = put_back(home, "telemetry.db", "telemetry.db-wal", "telemetry.db-shm")
    found = buffer(home)
    fill(found, "b", "c")
    found.close()
    buffer(home).close()
    back()
    after = buffer(home)
    assert after.epoch != epoch
    assert after.held(10) == []
    after.close()


def test_messages_are_sealed_and_opened_where_they_lie(tmp_path: Path) -> None:
    found = Buffer(tmp_path / "telemetry.db", 1 << 20)
    fill(found, "secret-model")
    found.close()
    found = buffer(tmp_path, "migrate")
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"secret-model" not in everything, "not in pages that are free now, either"
    assert told(found) == ["secret-model"]
    found = buffer(tmp_path, "off")
    found.close()
    assert told(Buffer(tmp_path / "telemetry.db", 1 << 20)) == ["secret-model"]


def test_a_buffer_of_another_key_begins_anew(tmp_path: Path) -> None:
    fill(found := buffer(tmp_path), "a")
    found.close()
    for name in (marks.FILE, marks.COPY):
        (tmp_path / name).unlink()
    after = buffer(tmp_path, key=OTHER)
    assert after.held(10) == []
    assert after.untold == 1
    after.close()


# --- where the key is from ------------------------------------------------------------------------


def refused(source: str) -> WherryError:
    with pytest.raises(WherryError) as caught:
        platform_key.seal_of(source, "on")
    assert caught.value.consequence
    assert caught.value.next_step
    return caught.value


def test_a_key_is_read_from_a_file_that_nobody_else_reads(tmp_path: Path) -> None:
    file = tmp_path / "key"
    source = f"file:{file}"
    assert refused(source).code == "at_rest_key_unavailable"
    file.write_bytes(KEY)
    file.chmod(0o600)
    found = platform_key.seal_of(source, "on")
    assert found is not None
    assert found.id == seal().id
    file.write_text(KEY.hex() + "\n", encoding="ascii")
    found = platform_key.seal_of(source, "on")
    assert found is not None
    assert found.id == seal().id
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        assert refused(source).code == "at_rest_key_open"
    file.chmod(0o600)
    for data in (b"", KEY[:-1], KEY + b"x", b"g" * 64, b"0" * 129):
        file.write_bytes(data)
        error = refused(source)
        assert error.code == "at_rest_key_invalid"
        assert data[:8].decode(errors="replace") not in error.message or not data
    assert platform_key.seal_of("", "off") is None


def test_a_key_is_a_credential_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("credential:wherry").code == "at_rest_key_unavailable"
    monkeypatch.setenv(platform_key.CREDENTIALS, str(tmp_path))
    assert refused("credential:wherry").code == "at_rest_key_unavailable"
    (tmp_path / "wherry").write_bytes(KEY)
    found = platform_key.seal_of("credential:wherry", "on")
    assert found is not None
    assert found.id == seal().id


def test_systemd_seals_a_credential_to_this_machine_and_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/device.md says; what the service manager does for the unit, `decrypt` does here, since none is running."""
    needs("systemd-creds", "systemd-analyze")
    (tmp_path / "key").write_bytes(KEY)
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "host"))

    def creds(*arguments: str) -> bytes:
        return subprocess.run(["systemd-creds", *arguments], cwd=tmp_path, capture_output=True, timeout=30).stdout

    creds("encrypt", "--with-key=host", "key", "wherry")
    assert KEY not in (tmp_path / "wherry").read_bytes()
    given = tmp_path / "given"
    given.mkdir()
    (given / "wherry").write_bytes(creds("decrypt", "wherry", "-"))
    monkeypatch.setenv(platform_key.CREDENTIALS, str(given))
    found = platform_key.seal_of("credential:wherry", "on")
    assert found is not None
    assert found.id == seal().id
    assert creds("decrypt", "--name=another", "wherry", "-") == b"", "it is for this name only"
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "another-host"))
    creds("setup")
    assert creds("decrypt", "wherry", "-") == b""

    unit = tmp_path / "wherry-agent.service"
    shutil.copy(Path(sealing.__file__).with_name("systemd") / unit.name, unit)
    drop_in = tmp_path / f"{unit.name}.d" / "key.conf"
    drop_in.parent.mkdir()
    line = re.search(r"`(LoadCredentialEncrypted=\S+)`", (ROOT / "docs" / "device.md").read_text(encoding="utf-8"))
    assert line is not None
    for text, taken in ((line[1], True), (f"{line[1].replace(':', ':not/absolute')}", False)):
        drop_in.write_text(f"[Service]\n{text}\n", encoding="utf-8")
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
        )
        assert ("key.conf" not in checked.stdout + checked.stderr) is taken, checked.stderr


@pytest.mark.parametrize("source", ["key", "file:key", "file:", "credential:a/b", "tpm2:x", "tpm2:0x12", "http://a"])
def test_a_source_that_is_none_is_refused(source: str) -> None:
    assert platform_key.check_source(source).startswith("at_rest_key")


def test_a_tpm_gives_out_the_key_and_no_other_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """swtpm, with the commands of docs/device.md; another TPM with the same files does not open it."""
    needs("swtpm", "tpm2_unseal", "tpm2_create")
    key = tmp_path / "key"
    key.write_bytes(KEY)
    with software_tpm(tmp_path / "one") as tcti:
        monkeypatch.setenv("TPM2TOOLS_TCTI", tcti)
        folder = tmp_path / "sealed"
        folder.mkdir()
        for command in (
            "tpm2_createprimary -Q -C o -c primary.ctx",
            f"tpm2_create -Q -C primary.ctx -i {key} -u key.pub -r key.priv",
            "tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx",
            "tpm2_evictcontrol -Q -C o -c key.ctx 0x81010001",
        ):
            subprocess.run(command.split(), cwd=folder, check=True, timeout=30)
            subprocess.run(["tpm2_flushcontext", "-t"], check=True, timeout=30)  # /dev/tpmrm0 does this by itself
        found = platform_key.seal_of("tpm2:0x81010001", "on")
        assert found is not None
        assert found.id == seal().id
        assert refused("tpm2:0x81010002").code == "at_rest_key_unavailable"
    with software_tpm(tmp_path / "two") as tcti:
        monkeypatch.setenv("TPM2TOOLS_TCTI", tcti)
        assert refused("tpm2:0x81010001").code == "at_rest_key_unavailable"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "tpm2-tools" in refused("tpm2:0x81010001").next_step


# --- the whole agent ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_agent_gets_a_key_keeps_it_and_gives_it_up(tmp_path: Path) -> None:
    """Its courier brings identity and private key in line, while it serves; the next life reads what this one wrote."""
    home, key, config = tmp_path / "home", tmp_path / "key", tmp_path / "agent.toml"
    key.write_bytes(KEY)
    key.chmod(0o600)
    names = ("journal.json", "identity/device.json", "identity/device.copy.json", "identity/key.pem")
    with running_server(tmp_path / "server") as server:
        argv = [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(home), "--config", str(config)]
        argv += ["--server", server.url, "--token", server.enrolment_token, "--name", "lamp", "--http-port", "0"]
        for mode in ("", "migrate", "on", "off", ""):
            at_rest = f'at_rest_key = "file:{key}"\nat_rest = "{mode}"\n' if mode else ""
            config.write_text(at_rest, encoding="utf-8")
            wished = mode in ("migrate", "on")

            def in_line(wished: bool = wished, mode: str = mode) -> bool:
                shown = status.question(home, "status")
                if shown is None or shown["at_rest"].get("mode", "") != mode:
                    return False
                records = [(home / name).read_bytes() for name in names]
                sealed = [sealing.is_sealed(record) or record.startswith(identity.ENCRYPTED_KEY) for record in records]
                return sealed == [wished] * len(names)

            with (tmp_path / "log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as agent:
                try:
                    until(in_line, f"it runs with at_rest = {mode!r} and its records lie so", 120)
                finally:
                    agent.terminate()
            assert agent.returncode == 0, (tmp_path / "log").read_text()
        config.write_text(f'at_rest_key = "file:{key}"\nat_rest = "on"\n', encoding="utf-8")
        refused = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1
        assert "record_clear" in refused.stderr
