"""A source that lets its answer drip, byte by byte, is as good as dead: it holds up no download for longer than its time."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trust_kit import blob_answer, little_server
from wherry_agent import courier_http
from wherry_agent.courier_blobs import Blobs
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk
from wherry_agent.store import Store
from wherry_shared.digest import of_bytes
from wherry_shared.errors import UnreachableError

PATIENCE_S = 0.4
DRIP_S = 0.02
DATA = os.urandom(50_000)
DIGEST = of_bytes(DATA)

HEAD = b"HTTP/1.1 200 OK\r\nX-Drip: " + b"x" * 60_000
CHUNK_SIZE = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n"


class Dripper:
    """Says `at_once` at once, and then a zero every now and then, without end."""

    def __init__(self, at_once: bytes, then: bytes = b"0") -> None:
        self.asked = 0
        self._at_once, self._then = at_once, then
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.asked += 1
                threading.Thread(target=self._drip, args=(client,), daemon=True).start()

    def _drip(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # it hung up
            client.sendall(self._at_once)
            while True:
                client.sendall(self._then)
                time.sleep(DRIP_S)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_http, "HEAD_SECONDS_MAX", PATIENCE_S)
    monkeypatch.setattr(courier_http, "SLOW_WINDOW_S", PATIENCE_S)


@contextlib.contextmanager
def dripper(at_once: bytes) -> Iterator[Dripper]:
    made = Dripper(at_once)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("at_once", "scheme", "words"),
    [
        (b"", "http", "did not answer within"),
        (HEAD[:30], "http", "did not answer within"),
        (b"\x16\x03\x03\x30\x00", "https", "did not answer within"),  # a TLS record that announces 12 KB of handshake
        (CHUNK_SIZE, "http", "lets its answer drip"),
        (BODY, "http", "sends less than"),
    ],
    ids=["nothing", "head", "handshake", "size of a chunk", "body"],
)
def test_what_drips_ends(at_once: bytes, scheme: str, words: str) -> None:
    with (
        dripper(at_once) as source,
        pytest.raises(UnreachableError, match=words) as caught,
        Http().request("GET", f"{scheme}://127.0.0.1:{source.port}/x") as answer,
    ):
        answer.read(1 << 20)
    assert caught.value.code == "network"
    names = [thread.name for thread in threading.enumerate()]
    deadline = time.monotonic() + 10
    while "http-watch" in names and time.monotonic() < deadline:
        names = [thread.name for thread in threading.enumerate()]
    assert "http-watch" not in names


@pytest.mark.usefixtures("impatient")
def test_a_mirror_that_drips_keeps_nobody_from_the_server(tmp_path: Path) -> None:
    with (
        dripper(CHUNK_SIZE) as mirror,
        little_server(lambda _path, headers: blob_answer(DATA, f'"{DIGEST}"', headers)) as server,
    ):
        blobs = Blobs(
            store=Store(tmp_path, Disk()),
            disk=Disk(),
            http=Http(server=server.url),
            server=server.url,
            mirrors=[mirror.url],
            tries_max=3,
            sleep=lambda _seconds: None,
        )
        blobs.bring(DIGEST, len(DATA), encoded=False)
        assert blobs.store.read(DIGEST, len(DATA)) == DATA
        assert mirror.asked == 1


@pytest.mark.usefixtures("impatient")
def test_whoever_takes_an_answer_may_take_its_time() -> None:
    found = b""
    with (
        little_server(lambda _path, headers: blob_answer(DATA, '"x"', headers)) as server,
        Http().request("GET", f"{server.url}/x") as answer,
    ):
        time.sleep(2 * PATIENCE_S)
        for chunk in answer.chunks(20_000):
            time.sleep(1.2 * PATIENCE_S)
            found += chunk
    assert found == DATA
