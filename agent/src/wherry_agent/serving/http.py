"""HTTP/1.1 as far as a local inference endpoint needs it: read one bounded request, write one response.

RFC 9112, without what makes parsers disagree: no chunked requests, no folded or repeated framing headers, no bare line
feeds; each is refused by name. A thread owns its connection and reads from a blocking socket with a deadline, since the
hop to another thread would cost more than a small model.
"""

from __future__ import annotations

import select
import socket
import time
from dataclasses import dataclass, field
from urllib.parse import unquote

from wherry_shared.limits import REQUEST_BYTES_MAX

HEAD_BYTES_MAX = 16 * 1024
HEADERS_MAX = 64
IDLE_SECONDS_MAX = 75.0
REQUEST_SECONDS_MAX = 30.0
"""From the first byte of a request to its last."""
RECEIVE_BYTES = 1 << 16
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")

REASONS = {
    200: "OK",
    304: "Not Modified",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class BadRequest(Exception):  # noqa: N818 - named after the response it becomes
    """What came is not a request that this server answers; the connection closes after the response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `path` is decoded and without its query, header names are lower case."""

    method: str
    path: tuple[str, ...]
    headers: dict[str, str]
    body: bytes | bytearray
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class Response:
    """One response; the body is JSON."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Connection:
    """Requests from a socket, one after another; bytes beyond one request wait for the next."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self._poll: select.poll | None = None
        self._stop = -1

    @property
    def idle(self) -> bool:
        """Whether nothing of a next request has been read."""
        return not self._buffer

    def wait(self, stop: int, seconds: float = IDLE_SECONDS_MAX) -> bool:
        """Wait for the next request to begin; False if none does in `seconds`, or `stop` becomes readable first."""
        if self._buffer:
            return True
        if self._poll is None or self._stop != stop:
            self._poll, self._stop = select.poll(), stop
            self._poll.register(self._socket, select.POLLIN)
            if stop >= 0:
                self._poll.register(stop, select.POLLIN)
        ready = self._poll.poll(seconds * 1000)
        return bool(ready) and all(descriptor != stop for descriptor, _ in ready)

    def read(self) -> Request | None:
        """Read the next request; None if the client closed, or stayed idle too long, between requests.

        Raises:
            BadRequest: what came is not a request.
            OSError: the connection broke.
        """
        if not self._buffer:
            self._socket.settimeout(IDLE_SECONDS_MAX)
            try:
                chunk = self._socket.recv(RECEIVE_BYTES)
            except TimeoutError:
                return None
            if not chunk:
                return None
            self._buffer += chunk
        deadline = time.monotonic() + REQUEST_SECONDS_MAX
        searched = 0
        while (end := self._buffer.find(b"\r\n\r\n", max(0, searched - 3))) < 0:
            searched = len(self._buffer)
            if searched > HEAD_BYTES_MAX:
                raise BadRequest(431, f"the request's head has more than {HEAD_BYTES_MAX} bytes")
            self._buffer += self._receive(deadline)
        if end > HEAD_BYTES_MAX:
            raise BadRequest(431, f"the request's head has more than {HEAD_BYTES_MAX} bytes")
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        method, path, headers, keep_alive = parse_head(head)
        length = body_length(method, headers)
        if length > len(self._buffer) and headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, path, headers, self._body(length, deadline), keep_alive)

    def write(self, response: Response, *, keep_alive: bool) -> None:
        """Write a response.

        Raises:
            OSError: the connection broke, or the client does not read.
        """
        lines = [
            f"HTTP/1.1 {response.status} {REASONS[response.status]}",
            "Content-Type: application/json",
            f"Content-Length: {len(response.body)}",
        ]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if not keep_alive:
            lines.append("Connection: close")
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        self._socket.settimeout(REQUEST_SECONDS_MAX)
        if len(response.body) < RECEIVE_BYTES:
            self._socket.sendall(head + response.body)
        else:
            self._socket.sendall(head)
            self._socket.sendall(response.body)

    def _body(self, length: int, deadline: float) -> bytes | bytearray:
        if length <= len(self._buffer):
            body = bytes(self._buffer[:length])
            del self._buffer[:length]
            return body
        whole = bytearray(length)
        filled = len(self._buffer)
        whole[:filled] = self._buffer
        self._buffer.clear()
        view = memoryview(whole)
        while filled < length:
            self._limit(deadline)
            try:
                count = self._socket.recv_into(view[filled:])
            except TimeoutError as error:
                raise BadRequest(408, "the request's body did not arrive in time") from error
            if not count:
                raise BadRequest(400, f"the request's body ended after {filled} of {length} bytes")
            filled += count
        return whole

    def _receive(self, deadline: float) -> bytes:
        self._limit(deadline)
        try:
            chunk = self._socket.recv(RECEIVE_BYTES)
        except TimeoutError as error:
            raise BadRequest(408, "the request did not arrive in time") from error
        if not chunk:
            raise BadRequest(400, "the request ended within its head")
        return chunk

    def _limit(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise BadRequest(408, "the request did not arrive in time")
        self._socket.settimeout(left)


def parse_head(head: bytes) -> tuple[str, tuple[str, ...], dict[str, str], bool]:
    """Parse request line and headers (without the empty line); return method, path, headers, keep-alive.

    Raises:
        BadRequest: 400, 431 or 505.
    """
    if b"\n" in head.replace(b"\r\n", b"") or b"\r" in head.replace(b"\r\n", b"") or b"\0" in head:
        raise BadRequest(400, "lines end with CR LF")
    lines = head.split(b"\r\n")
    parts = lines[0].split(b" ")
    if len(parts) != 3 or not parts[0] or not _TOKEN.issuperset(parts[0]):
        raise BadRequest(400, "the first line is not METHOD PATH HTTP/1.1")
    if parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadRequest(505, "this server speaks HTTP/1.1")
    if len(lines) - 1 > HEADERS_MAX:
        raise BadRequest(431, f"more than {HEADERS_MAX} headers")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not name or not _TOKEN.issuperset(name):
            raise BadRequest(400, "a header is not NAME: VALUE")
        key = name.decode("ascii").lower()
        text = value.strip(b" \t").decode("latin-1")
        if key in ("content-length", "transfer-encoding") and headers.get(key, text) != text:
            raise BadRequest(400, f"{key} is given twice")
        headers[key] = text
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection and (parts[2] == b"HTTP/1.1" or "keep-alive" in connection)
    return parts[0].decode("ascii"), parse_path(parts[1]), headers, keep_alive


def parse_path(target: bytes) -> tuple[str, ...]:
    """Return the decoded segments of a request target: `/v2/models/m` is ("v2", "models", "m").

    Raises:
        BadRequest: 400.
    """
    text = target.decode("latin-1")
    if text.startswith("http://"):
        text = "/" + text[7:].partition("/")[2]
    if not text.startswith("/"):
        raise BadRequest(400, "the path begins with a slash")
    path = text.partition("?")[0]
    return tuple(unquote(segment, errors="replace") for segment in path.strip("/").split("/"))


def body_length(method: str, headers: dict[str, str]) -> int:
    """Return the length of the body that follows.

    Raises:
        BadRequest: 400, 411, 413 or 501.
    """
    if "transfer-encoding" in headers:
        raise BadRequest(501, "chunked requests are not supported: send Content-Length")
    text = headers.get("content-length")
    if text is None:
        if method in ("POST", "PUT", "PATCH"):
            raise BadRequest(411, "send Content-Length")
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadRequest(400, "Content-Length is not a number")
    length = int(text)
    if length > REQUEST_BYTES_MAX:
        raise BadRequest(413, f"the body has {length} bytes, at most {REQUEST_BYTES_MAX}")
    return length
