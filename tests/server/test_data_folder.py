"""The data folder: settings, keys, schema."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from alembic import command

from tests.server.harness import in_database
from wherry_server.db import migrate
from wherry_server.db.tables import Project, table
from wherry_server.services import open_services, prepare
from wherry_server.settings import Settings
from wherry_shared.errors import DeviceError, RefusedError


@pytest.mark.backends
def test_migrations_make_the_tables_that_the_code_uses(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'new.sqlite'}"
    if request.getfixturevalue("backend") == "postgres":
        url = request.getfixturevalue("postgres").empty()
    migrate.upgrade(url)
    command.check(migrate.config(url))  # raises if a migration is missing


def test_preparing_again_changes_no_key_and_no_row(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "data")
    prepare(settings)
    before = {path: path.read_bytes() for path in settings.keys_folder.iterdir()}
    metadata = sorted(path.name for path in (settings.trust_folder / "metadata").iterdir())
    prepare(settings)
    assert {path: path.read_bytes() for path in settings.keys_folder.iterdir()} == before
    assert sorted(path.name for path in (settings.trust_folder / "metadata").iterdir()) == metadata

    async def projects(connection: object) -> int:
        return len((await connection.execute(table(Project).select())).all())  # type: ignore[attr-defined]

    assert in_database(settings, projects) == 1


def test_nobody_else_reads_the_keys(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "data")
    prepare(settings)
    assert stat.S_IMODE(settings.data.stat().st_mode) == 0o700
    assert stat.S_IMODE(settings.keys_folder.stat().st_mode) == 0o700
    for path in settings.keys_folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_folder_that_was_never_prepared_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        open_services(Settings.load(tmp_path))
    assert caught.value.code == "not_prepared"


def test_settings_come_from_arguments_then_the_file_then_defaults(tmp_path: Path) -> None:
    Settings.load(tmp_path, port=9000, broker_port=9001).save()
    again = Settings.load(tmp_path, broker_port=9002, host=None)
    assert (again.port, again.broker_port, again.host, again.project) == (9000, 9002, "127.0.0.1", "default")
    assert again.database_url == f"sqlite+aiosqlite:///{tmp_path}/wherry.sqlite"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "settings_invalid"),
        ("[]", "settings_invalid"),
        ('{"port": "x"}', "settings_invalid"),
        ('{"prot": 1}', "settings_invalid"),
        ('{"project": "No Name"}', "bad_name"),
    ],
)
def test_settings_that_do_not_parse_are_refused(tmp_path: Path, content: str, code: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(RefusedError) as caught:
        Settings.load(tmp_path)
    assert caught.value.code == code
