"""A mirror of the server that can be told to lie about one blob: what a device meets on a hostile network.

It forwards every request to the real server and, for the digests it was told about, flips a byte in the middle of
what comes back. Lengths, ranges and ETags stay right, so only a digest can notice.
"""

from __future__ import annotations

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host", "content-length"})
TIMEOUT_S = 30.0
BODY_BYTES_MAX = 64 * 1024 * 1024
"""The demo's blobs are small; a mirror that holds them in memory is enough for it."""


class Mirror:
    """A reverse proxy on a free loopback port, in a thread of its own."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"{upstream!r} has no host and port")
        self._upstream = (parts.hostname, parts.port)
        self._lies: set[str] = set()
        self.lied = 0
        self.forwarded = 0
        handler = type("Handler", (_Handler,), {"mirror": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="mirror", daemon=True)

    @property
    def address(self) -> str:
        """Where devices reach it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> Mirror:
        """Begin to answer."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def lie_about(self, *digests: str) -> None:
        """Alter these blobs from now on."""
        self._lies.update(digests)

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Ask the real server; return status, headers and the (perhaps altered) body."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            data = answer.read(BODY_BYTES_MAX)
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        finally:
            connection.close()
        self.forwarded += 1
        lying = any(digest in path for digest in self._lies)
        if lying and path.endswith("/info"):
            # other encodings of the same blob are other objects: lie about those as well
            self._lies.update(one["digest"] for one in json.loads(data).get("encodings", ()))
        elif lying and answer.status in (200, 206) and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]
            self.lied += 1
        return answer.status, kept, data


class _Handler(BaseHTTPRequestHandler):
    mirror: Mirror
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(min(length, BODY_BYTES_MAX))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        try:
            status, kept, data = self.mirror.forward(self.command, self.path, headers, body)
        except (OSError, http.client.HTTPException):
            self.send_error(502)
            return
        self.send_response_only(status)
        for name, value in kept:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 — the names that the base class looks up

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay quiet: the demo prints its own story."""
