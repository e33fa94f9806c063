"""The keys role: who gets a key wrapped and when, in the database, by the command line and as the process that it is."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy import insert, update
from sqlalchemy.exc import DBAPIError
from typer.main import get_command

from tests.postgres import Postgres
from tests.server.harness import Running, csr, enrol, in_database, running, until, write_bundle
from wherry_server.cli.common import GLOBALS
from wherry_server.cli.everything import app
from wherry_server.db.database import Database
from wherry_server.db.tables import Assignment, ContentKey, table
from wherry_server.keys_role import KeysRole
from wherry_shared import content_keys, key_files, wire
from wherry_shared.bundle import encrypted_layers
from wherry_shared.encrypting import encrypt
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout
from wherry_shared.key_ring import KeyRing
from wherry_shared.publishing import PublisherKey, push, sign

T = TypeVar("T")
MODEL = "had"
_assignments = table(Assignment)
_sealed = table(ContentKey)


class Device:
    """A device with an X25519 key of its own."""

    def __init__(self, server: Running, name: str, *, with_key: bool = True) -> None:
        self.server = server
        self.private = X25519PrivateKey.generate()
        text = content_keys.text_of(self.private.public_key()) if with_key else ""
        answer = enrol(server, server.enrolment_token(), name, content_key=text)
        assert answer.status_code == 200, answer.text
        self.enrolled = wire.parse(wire.EnrolAnswer, answer.content)
        self.id = self.enrolled.device

    def keys(self, manifest: str) -> list[bytes]:
        """Ask for the keys of a bundle and open them."""
        with self.server.as_device(self.enrolled) as http:
            answer = http.get(f"/device/v1/keys/{manifest}")
        if answer.status_code == 404:
            return []
        found = wire.parse(wire.SealedKeys, answer.content)
        assert found.missing == 2 - len(found.keys)
        return [content_keys.unseal(record, self.private) for record in found.keys]

    def renew(self) -> None:
        self.private = X25519PrivateKey.generate()
        asked = wire.RenewRequest(
            format=1, csr_pem=csr(None, self.id), content_key=content_keys.text_of(self.private.public_key())
        )
        with self.server.as_device(self.enrolled) as http:
            answer = http.post("/device/v1/renew", content=wire.encode(asked))
        assert answer.status_code == 200, answer.text

    def assigned(self, manifest: str, outcome: str = "exposed") -> Device:
        row = {
            "rollout_id": "a-rollout",
            "device_id": self.id,
            "model": MODEL,
            "project_id": self.server.settings.project,
            "stage": 0,
            "share_key": 0,
            "to_manifest": manifest,
            "to_target": f"{MODEL}/1.0.0",
            "exposed_at": 1,
            "outcome": outcome,
        }
        in_database(self.server.settings, lambda connection: connection.execute(insert(Assignment).values(**row)))
        return self


def keys_role(server: Running, ring: KeyRing, work: Callable[[KeysRole], Awaitable[T]]) -> T:
    async def run() -> T:
        database = Database.open(server.settings.database_url)
        try:
            return await work(KeysRole(database, server.settings.project, ring))
        finally:
            await database.close()

    return asyncio.run(run())


def encrypted(server: Running, folder: Path, ring: KeyRing, version: str = "1.0.0") -> str:
    """Release an encrypted bundle; return its manifest."""
    publisher = KeyRing(folder / "publisher")
    publisher.add()
    write_bundle(folder / "plain", MODEL, version)
    made = encrypt(folder / "plain", folder / "dark", ring.current(), publisher)
    key = PublisherKey.open(server.settings.data.parent / f"{server.settings.data.name}-publisher.pem")
    with server.remote() as remote:
        sign(folder / "dark", remote, key, publisher="lab")
        push(folder / "dark", remote, key)
    return made.manifest


@pytest.mark.backends
def test_devices_that_are_to_run_a_bundle_get_its_keys_and_no_others(server: Running, tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "role")
    ring.add()
    manifest = encrypted(server, tmp_path, ring)
    exposed, confirmed = (Device(server, name).assigned(manifest, name) for name in ("exposed", "confirmed"))
    withdrawn, none = Device(server, "withdrawn").assigned(manifest, "withdrawn"), Device(server, "none")
    old = Device(server, "old", with_key=False).assigned(manifest)
    assert exposed.keys(manifest) == [], "the role is off: nobody has one yet"

    def wrap() -> int:
        return keys_role(server, ring, lambda role: role.wrap())

    assert wrap() == 4
    assert wrap() == 0
    opened = exposed.keys(manifest)
    assert len(set(opened)) == 2
    assert sorted(confirmed.keys(manifest)) == sorted(opened)
    assert withdrawn.keys(manifest) == none.keys(manifest) == old.keys(manifest) == []
    exposed.renew()
    with pytest.raises(RefusedError, match="another key"):
        exposed.keys(manifest)
    assert wrap() == 2
    assert sorted(exposed.keys(manifest)) == sorted(opened)
    again = update(_assignments).where(_assignments.c.device_id == withdrawn.id).values(outcome="exposed")
    in_database(server.settings, lambda connection: connection.execute(again))
    stranger = KeyRing(tmp_path / "stranger")
    stranger.add()
    assert keys_role(server, stranger, lambda role: role.wrap()) == 0, "another role's keys open nothing"
    assert wrap() == 2
    with server.http() as http:
        made = http.post("/api/v1/cohorts", json={"name": "few", "selector": "name = none"})
        assert made.status_code == 201, made.text
    assert keys_role(server, ring, lambda role: role.wrap_bundle(f"{MODEL}/1.0.0", "few")) == 2
    assert none.keys(manifest) == [], "wrapped ahead, and given when the bundle is"
    assert len(none.assigned(manifest).keys(manifest)) == 2


def test_a_sealed_key_that_does_not_open_keeps_nobody_from_theirs(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(tmp_path / "role")
    ring.add()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    broken, good = (
        encrypted(server, tmp_path / name, ring, version) for name, version in (("one", "5.0.0"), ("two", "5.1.0"))
    )
    spoil = update(_sealed).where(_sealed.c.manifest == broken).values(sealed="A" * 108)
    in_database(server.settings, lambda connection: connection.execute(spoil))
    device = Device(server, "behind-a-broken-key").assigned(broken)
    other = Device(server, "beside-it").assigned(good)
    monkeypatch.setattr("wherry_server.keys_role.AT_ONCE", 1)
    assert keys_role(server, ring, lambda role: role.wrap()) == 2
    assert (len(device.keys(broken)), len(other.keys(good))) == (0, 2)


def wherry(*arguments: str) -> Any:
    """Run a command in this process; return what it prints, or the code of its refusal."""
    done = CliRunner().invoke(get_command(app), ["--json", *arguments])
    if isinstance(done.exception, RefusedError):
        return done.exception.code
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_runbook_of_content_keys(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERRY_KEY_PASSWORD", "eight chars")
    monkeypatch.setattr(GLOBALS, "as_json", False)
    role, data = str(tmp_path / "keys"), str(server.settings.data)
    first = wherry("keys", "init", role)["key"]
    assert wherry("keys", "init", role) == "keys_exist"
    assert all(path.stat().st_mode & 0o77 == 0 for path in Path(role).glob("?" * 64 + ".pem"))
    assert b"ENCRYPTED" in next(Path(role).glob("?" * 64 + ".pem")).read_bytes()
    manifest = encrypted(server, tmp_path, KeyRing(Path(role)), "2.0.0")
    device = Device(server, "of-the-runbook").assigned(manifest)
    with monkeypatch.context() as other:
        other.setenv("WHERRY_KEY_PASSWORD", "not this one")
        assert wherry("keys", "wrap", role, "--data", data) == "password_wrong"
    command = [sys.executable, "-m", "wherry_server.cli", "serve", "keys", "--keys", role, "--data", data]
    process = subprocess.Popen(command)
    try:
        until(lambda: len(device.keys(manifest)) == 2, 60)
    finally:
        process.terminate()
        assert process.wait(20) == 0
    second = wherry("keys", "rotate", role, "--data", data)["key"]
    here = {row["key"] for row in wherry("keys", "status", role, "--data", data) if row["here"]}
    assert here == {first, second}, "keys of others may be there, and are not ours"
    assert wherry("keys", "prune", role, "--data", data)["removed"] == [first]
    late = Device(server, "after-the-rotation").assigned(manifest)
    assert wherry("keys", "wrap", role, "--data", data)["wrapped"] == 2
    assert sorted(late.keys(manifest)) == sorted(device.keys(manifest))


def test_the_role_as_a_database_user_of_its_own_does_its_work_and_writes_nothing_else(
    postgres: Postgres, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "runbooks" / "content-keys.md").read_text(encoding="utf-8")
    (statements,) = re.findall(r"```sql\n(.*?)```", page, flags=re.DOTALL)
    ring = KeyRing(tmp_path / "role")
    ring.add()
    with running(tmp_path / "data", database=postgres.database()) as server:
        manifest = encrypted(server, tmp_path, ring)
        device = Device(server, "by-its-own-user").assigned(manifest)
        for statement in statements.strip().split(";\n"):
            in_database(server.settings, lambda c, one=statement: c.exec_driver_sql(one))
        url = server.settings.database_url.replace("//wherry@", "//wherry_keys@")

        async def work() -> tuple[int, int, set[tuple[str, str]]]:
            database = Database.open(url)
            try:
                role = KeysRole(database, server.settings.project, ring)
                wrapped = await role.wrap()
                ring.add()
                resealed = await role.reseal()
                with pytest.raises(DBAPIError, match="permission denied"):
                    async with database.write() as connection:
                        await connection.execute(update(_assignments).values(outcome="confirmed"))
                with pytest.raises(DBAPIError, match="permission denied"):
                    async with database.write() as connection:
                        await connection.execute(update(_sealed).values(manifest="another"))
                async with database.read() as connection:
                    rows = await connection.exec_driver_sql(
                        "SELECT table_name, privilege_type FROM information_schema.role_table_grants"
                        " WHERE grantee = 'wherry_keys' AND privilege_type <> 'SELECT'"
                    )
                    return wrapped, resealed, {(row[0], row[1]) for row in rows}
            finally:
                await database.close()

        assert asyncio.run(work()) == (2, 2, {("wrapped_key", "INSERT"), ("wrapped_key", "DELETE")})
        assert len(device.keys(manifest)) == 2


def test_ciphertext_is_neither_encoded_nor_read_as_weights(server: Running, tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "role")
    ring.add()
    encrypted(server, tmp_path, ring, "3.0.0")
    _, manifest, config = Layout(tmp_path / "dark").bundle()
    found = encrypted_layers(manifest)
    assert set(found) == {config.variants[0].digest, config.variants[0].golden.digest}
    assert all(layer.digest not in found for layer in manifest.layers)
    assert found[config.variants[0].digest].size < config.variants[0].bytes / 10, "a frame that was encrypted"


def test_the_role_has_nothing_that_signs(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERRY_KEY_PASSWORD", "eight chars")
    monkeypatch.setattr(GLOBALS, "as_json", False)
    ring, alone = KeyRing(tmp_path / "role"), tmp_path / "alone"
    ring.add("eight chars")
    manifest = encrypted(server, tmp_path, ring, "4.0.0")
    device = Device(server, "far-from-the-role").assigned(manifest)
    alone.mkdir()
    (alone / "settings.json").write_text(json.dumps({"database": server.settings.database_url}))
    assert wherry("keys", "wrap", str(ring.folder), "--data", str(alone))["wrapped"] == 2
    assert len(device.keys(manifest)) == 2
    assert [path.name for path in alone.iterdir()] == ["settings.json"]
    for path in ring.folder.glob("*.pem"):
        if path.name != "public.pem":
            with pytest.raises(RefusedError, match="Ed25519"):
                key_files.load(path)
