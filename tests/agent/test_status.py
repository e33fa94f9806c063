"""The socket that `wherry-agent status` asks: it answers for as long as the agent runs."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from wherry_agent import status


def test_what_goes_wrong_once_is_not_the_end_of_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.accept
    failed: list[int] = []

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if listener is server._socket and len(failed) < 2:
            failed.append(errno.EMFILE)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(listener)

    def broken() -> object:
        raise ZeroDivisionError

    (tmp_path / "run").mkdir()
    server = status.Server(tmp_path / "run" / status.SOCKET, {"status": lambda: {"fine": True}, "broken": broken})
    try:
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert status.question(tmp_path, "status") == {"fine": True}, "the accept that waited already"
        assert status.question(tmp_path, "broken") is None
        assert status.question(tmp_path, "status") == {"fine": True}
        assert len(failed) == 2
    finally:
        server.close()
    server._thread.join(20)
    assert not server._thread.is_alive(), "closing ends the thread"
