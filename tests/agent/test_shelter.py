"""Sockets of an agent whose home takes no writes are found by the home alone, and nobody else's are."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from wherry_agent import shelter


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home, and a temporary folder of this test's own; their paths are short enough for names of sockets."""
    with tempfile.TemporaryDirectory() as made:
        for name in ("home", "tmp", "run"):
            (Path(made) / name).mkdir()
        monkeypatch.setattr("tempfile.tempdir", f"{made}/tmp")
        monkeypatch.setattr(shelter, "RUNTIME", Path(made) / "run")
        monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
        yield Path(made) / "home"


def reaches(home: Path, folder: Path) -> bool:
    """Tell whether a client that knows the home comes to who listens in the folder."""
    path = folder / "agent.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        try:
            shelter.connect(client, home / "run" / "agent.sock")
        except OSError:
            return False
        return True


@pytest.mark.parametrize("unit", [True, False])
def test_a_client_that_knows_the_home_finds_the_agent(home: Path, monkeypatch: pytest.MonkeyPatch, unit: bool) -> None:
    if unit:
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(shelter.RUNTIME))
    folder = shelter.make(home)
    assert folder.parent.name == ("run" if unit else "tmp")
    assert folder == shelter.make(home), "every start has the same one"
    assert folder != shelter.make(home.parent / "another")
    assert reaches(home, folder)
    (home / "run").mkdir()
    assert reaches(home, home / "run"), "the home comes first"


def test_without_an_agent_there_is_the_error_of_the_home(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        shelter.connect(client, home / "run" / "agent.sock")


def test_a_folder_that_somebody_else_made_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = shelter.make(home)
    user = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: user + 1)
    assert shelter.make(home) != taken
    taken.rmdir()
    elsewhere = home.parent / "elsewhere"
    elsewhere.mkdir()
    taken.symlink_to(elsewhere)
    assert shelter.make(home) != taken
    assert not reaches(home, elsewhere), "a link leads nowhere"
