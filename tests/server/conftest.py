"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.harness import Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that the tests of one module share; each uses names of its own."""
    with running(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No access given by the environment or the home folder of who runs the tests."""
    for name in ("WHERRY_SERVER", "WHERRY_TOKEN", "WHERRY_DATA", "WHERRY_PUBLISHER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
