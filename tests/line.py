"""What lies between a device and its server, for tests that need it bad: a line that stalls or breaks, a man in the middle."""

from __future__ import annotations

import contextlib
import socket
import threading

from wherry_simulators.demo.mirror import Mirror

CHUNK_BYTES = 64 * 1024


class Line:
    """A TCP forwarder on a loopback port of its own."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream = ("127.0.0.1", upstream_port)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._limit = 0
        self.answered_bytes = 0
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stall_after(self, count: int) -> None:
        """Let connections made from now on answer so many bytes and then no more, until `flow` or `cut`."""
        self._limit = count
        self._flowing.clear()

    def flow(self) -> None:
        self._limit = 0
        self._flowing.set()

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        with self._lock:
            self._close(self._listener)
            for end in self._open:
                self._close(end)
            self._open.clear()
        self.flow()

    def mend(self) -> None:
        """Take connections again, on the same port."""
        self._listener = self._listen(self.port)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return  # cut
            try:
                far = socket.create_connection(self._upstream, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            limit = self._limit
            threading.Thread(target=self._pump, args=(near, far, 0), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, limit), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int) -> None:
        passed = 0
        answering = limit or source.getpeername() == self._upstream
        with contextlib.suppress(OSError):  # either end is gone: so is the other
            while chunk := source.recv(min(CHUNK_BYTES, limit - passed) if limit else CHUNK_BYTES):
                sink.sendall(chunk)
                passed += len(chunk)
                if answering:
                    self.answered_bytes += len(chunk)
                if limit and passed >= limit:
                    self._flowing.wait()
                    limit = 0
        with self._lock:
            for end in (source, sink):
                self._close(end)
                self._open.discard(end)

    @staticmethod
    def _close(end: socket.socket) -> None:
        with contextlib.suppress(OSError):  # not connected any more
            end.shutdown(socket.SHUT_RDWR)
        end.close()


class Between(Mirror):
    """A proxy that gives answers of its own to some requests, and forwards (or alters) the rest."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.own: dict[str, bytes] = {}
        """Path → body that is answered instead of the server's."""
        self.gave: list[str] = []

    def honest(self) -> None:
        """Lie no more."""
        self.own.clear()
        self._lies.clear()

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        own = self.own.get(path)
        if own is None:
            return super().forward(method, path, headers, body)
        self.gave.append(path)
        return 200, [("Content-Type", "application/json"), ("ETag", f'"own-{len(self.gave)}"')], own
