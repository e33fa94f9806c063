"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres
from tests.s3 import S3
from tests.server.harness import Running, running
from wherry_server.settings import Settings


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that the tests of one module share; each uses names of its own. With the mark `backends`, on PostgreSQL too."""
    postgres = getattr(request, "param", "sqlite") == "postgres"
    database = request.getfixturevalue("postgres").database() if postgres else ""
    with running(tmp_path_factory.mktemp("server"), database=database) as started:
        yield started


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No access given by the environment or the home folder of who runs the tests."""
    for name in ("WHERRY_SERVER", "WHERRY_TOKEN", "WHERRY_DATA", "WHERRY_PUBLISHER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server that the tests of one process share."""
    started = Postgres()
    yield started
    started.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server that the tests of one process share."""
    started = S3()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the test keeps its data: SQLite, and with the mark `backends` PostgreSQL as well."""
    found: str = getattr(request, "param", "sqlite")
    if found == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        monkeypatch.setattr(Settings, "database_url", property(lambda settings: server.of(settings.data)))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked `backends` on both: with the server of its module, or with data folders of its own."""
    if metafunc.definition.get_closest_marker("backends"):
        both = ["sqlite", "postgres"]
        if "server" in metafunc.fixturenames:
            metafunc.parametrize("server", both, indirect=True, scope="module")
        else:
            metafunc.parametrize("backend", both, indirect=True)
