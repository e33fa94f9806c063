"""HTTP/1.1 as far as a local inference endpoint needs it: read one bounded request, write one response.

RFC 9112, without what makes parsers disagree: no folded or repeated framing headers, no length beside chunks, no bare line
feeds; each is refused by name. Whoever serves a connection reads from a blocking socket with a deadline, and is told before it
would block (`stand_aside`): the hop to another thread would cost more than a small model.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from wherry_agent.serving.buffers import ALIGNMENT, Buffer, Buffers, aligned_start
from wherry_agent.serving.peers import user_of
from wherry_shared.limits import REQUEST_BYTES_MAX

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 16 * 1024
HEADERS_MAX = 64
IDLE_SECONDS_MAX = 75.0
REQUEST_SECONDS_MAX = 30.0
"""From the first byte of a request to its last."""
LIMIT_SECONDS_OFF = 1.0
"""How far the kernel's limit may be from the deadline, so that it is not set again for every piece of a body."""
RECEIVE_BYTES = 1 << 16
JOINED_BYTES_MAX = 1 << 16
"""Smaller responses are joined and sent at once; the pieces of larger ones are gathered by the kernel."""
CHUNKED = 1 << 62
"""In place of the length of a body that comes in chunks: longer than anything that was received, so that only the way for bodies
that are not here yet has to ask."""
CHUNK_LINE_BYTES_MAX = 256
"""Size of a chunk with its extensions, which nobody here reads."""
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n\0]*)?")
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")

buffers = Buffers()
"""Receive buffers of all connections."""

REASONS = {
    200: "OK",
    304: "Not Modified",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
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


Part = bytes | memoryview
"""A piece of a response that is sent as it is."""


@dataclass(slots=True)
class Head:
    """Request line and headers, parsed once for as long as a client sends the same bytes again."""

    method: str
    path: tuple[str, ...]
    headers: dict[str, str]
    keep_alive: bool
    old: bool
    length: int
    """Bytes of the body, or `CHUNKED`."""
    binary_start: int
    """Where in the body the raw tensors begin, so that they can be received aligned; 0 if nothing says so."""


@dataclass(slots=True)
class Request:
    """One request; `path` is decoded and without its query, header names are lower case."""

    method: str
    path: tuple[str, ...]
    headers: dict[str, str]
    body: bytes | memoryview
    keep_alive: bool
    connection: Connection | None = None
    old: bool = False
    """HTTP/1.0, where a connection ends unless the answer says that it stays."""


@dataclass(slots=True)
class Response:
    """One response: a body, JSON unless `headers` say otherwise, and raw parts that follow it."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    head: bytes = b""
    """Status line and headers as `written_head` writes them on a connection that stays, where that was done before."""


class Connection:
    """Requests from a socket, one after another; bytes beyond one request wait for the next.

    The socket blocks and the kernel holds the deadlines: a timeout of Python's own would double the system calls.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._rest = b""
        self._begun = False
        self._head_bytes = b""
        self._head: Head | None = None
        self._buffers: list[Buffer] = []
        self._user: int | None = None
        self._user_known = False
        self._receive_limit = 0.0
        self.stand_aside: Callable[..., None] = _stay
        """Called before anything that may last, with its expected seconds if they are known; more than once in a request."""
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(REQUEST_SECONDS_MAX))

    @property
    def idle(self) -> bool:
        """Whether nothing of a next request has been read."""
        return not self._begun

    def take_up(self) -> bool:
        """Read what is there of the next request, without waiting; False if nothing is."""
        if not self._begun:
            try:
                self._rest = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:  # as if the client had closed
                log.debug("a client is gone: %s", error)
                self._rest = b""
            self._begun = True
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for the next request to begin; False if none does in `seconds`."""
        if self._begun:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000)) and self.take_up()

    def user(self) -> int | None:
        """Return the user id of the client; None if the system does not say."""
        if not self._user_known:
            self._user = user_of(self._socket)
            self._user_known = True
        return self._user

    def read(self) -> Request | None:
        """Read the request that `take_up` found the beginning of; None if the client closed instead.

        Raises:
            BadRequest: what came is not a request.
            OSError: the connection broke.
        """
        data = self._rest
        if not data:
            return None
        end = data.find(b"\r\n\r\n")
        deadline = 0.0
        if end < 0:
            self.stand_aside()
            deadline = time.monotonic() + REQUEST_SECONDS_MAX
            data, end = self._rest_of_head(data, deadline)
        if end > HEAD_BYTES_MAX:
            raise BadRequest(431, f"the request's head has more than {HEAD_BYTES_MAX} bytes")
        head = self._parsed(data[:end])
        start = end + 4
        stop = start + head.length
        if stop <= len(data):
            body: bytes | memoryview = data[start:stop]
            self._rest = data[stop:] if stop < len(data) else b""
        else:
            self.stand_aside()
            if head.headers.get("expect", "").lower() == "100-continue":
                self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._rest = b""
            deadline = deadline or time.monotonic() + REQUEST_SECONDS_MAX
            if head.length == CHUNKED:
                body, self._rest = read_chunks(data[start:], lambda: self._receive(deadline, "its chunks"))
            else:
                body = self._rest_of_body(head, data[start:], deadline)
        self._begun = bool(self._rest)
        return Request(head.method, head.path, head.headers, body, head.keep_alive, self, head.old)

    def write(self, response: Response, *, keep_alive: bool, request: Request | None = None) -> None:
        """Write a response to a request; to HEAD only what is said of its body (RFC 9110 §9.3.2).

        Raises:
            OSError: the connection broke, or the client does not read.
        """
        body, parts = response.body, response.parts
        length = len(body)
        for part in parts:
            length += len(part)
        if not keep_alive:
            head = written_head(response, length, "Connection: close\r\n")
        elif request is not None and request.old:
            head = written_head(response, length, "Connection: keep-alive\r\n")
        else:
            head = response.head or written_head(response, length)
        if request is not None and request.method == "HEAD":
            self._send_at_once(head)
        elif length <= JOINED_BYTES_MAX:
            self._send_at_once(b"".join([head, body, *parts]))
        else:
            self.stand_aside()
            self._send([head, body, *parts])

    def take(self, length: int) -> Buffer:
        """Return a buffer that belongs to the request read last."""
        buffer = buffers.take(length)
        self._buffers.append(buffer)
        return buffer

    def release(self) -> None:
        """Say that the request read last is over: its buffers may serve another one."""
        while self._buffers:
            buffers.give(self._buffers.pop())

    def _send_at_once(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.stand_aside()
            self._send([data[sent:]])

    def _send(self, parts: list[Part]) -> None:
        deadline = time.monotonic() + REQUEST_SECONDS_MAX
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            sent = self._socket.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]
            if views and time.monotonic() > deadline:
                raise TimeoutError("the client does not read its answer")

    def _parsed(self, data: bytes) -> Head:
        if data == self._head_bytes and self._head is not None:
            return self._head
        method, path, headers, keep_alive = parse_head(data)
        length = body_length(headers)
        old = data.partition(b"\r\n")[0].endswith(b" HTTP/1.0")
        if old and length == CHUNKED:
            raise BadRequest(400, "HTTP/1.0 has no chunks: send Content-Length")
        binary_start = headers.get("inference-header-content-length", "")
        head = Head(
            method,
            path,
            headers,
            keep_alive,
            old,
            length,
            int(binary_start) if binary_start.isascii() and binary_start.isdigit() and len(binary_start) < 12 else 0,
        )
        self._head_bytes, self._head = data, head
        return head

    def _rest_of_head(self, data: bytes, deadline: float) -> tuple[bytes, int]:
        whole = bytearray(data)
        while (end := whole.find(b"\r\n\r\n", max(0, len(whole) - RECEIVE_BYTES - 3))) < 0:
            if len(whole) > HEAD_BYTES_MAX:
                raise BadRequest(431, f"the request's head has more than {HEAD_BYTES_MAX} bytes")
            whole += self._receive(deadline)
        return bytes(whole), end

    def _rest_of_body(self, head: Head, first: bytes, deadline: float) -> memoryview:
        length = head.length
        buffer = self.take(length + ALIGNMENT)
        start = aligned_start(buffer, head.binary_start)
        view = buffer.data[start : start + length]
        filled = len(first)
        view[:filled] = first
        while filled < length:
            self._limit_until(deadline)
            try:
                count = self._socket.recv_into(view[filled:])
            except BlockingIOError as error:
                raise BadRequest(408, "the request's body did not arrive in time") from error
            if not count:
                raise BadRequest(400, f"the request's body ended after {filled} of {length} bytes")
            filled += count
        return view

    def _receive(self, deadline: float, within: str = "its head") -> bytes:
        self._limit_until(deadline)
        try:
            chunk = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError as error:
            raise BadRequest(408, "the request did not arrive in time") from error
        if not chunk:
            raise BadRequest(400, f"the request ended within {within}")
        return chunk

    def _limit_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise BadRequest(408, "the request did not arrive in time")
        if abs(left - self._receive_limit) > LIMIT_SECONDS_OFF:
            self._limit(left)

    def _limit(self, seconds: float) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
        self._receive_limit = seconds


def _stay(seconds: float = 0.0) -> None:
    """Do nothing: nobody else waits for this thread."""


def written_head(response: Response, length: int, last: str = "") -> bytes:
    """Return the status line and headers of a response whose body has `length` bytes."""
    head = f"HTTP/1.1 {response.status} {REASONS[response.status]}\r\nContent-Length: {length}\r\n"
    if "Content-Type" not in response.headers:
        head += "Content-Type: application/json\r\n"
    for name, value in response.headers.items():
        head += f"{name}: {value}\r\n"
    return f"{head}{last}\r\n".encode("latin-1")


def _timeval(seconds: float) -> bytes:
    """Return a `struct timeval`; the older option number takes the machine's own longs."""
    return struct.pack("ll" if socket.SO_RCVTIMEO == 20 else "qq", int(seconds), int(seconds % 1 * 1e6) or 1)


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
        if (key == "content-length" and headers.get(key, text) != text) or (
            key == "transfer-encoding" and key in headers  # the same twice is chunks in chunks
        ):
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


def body_length(headers: dict[str, str]) -> int:
    """Return the length of the body that follows, or `CHUNKED`; without a length there is none (RFC 9112 §6.3).

    Raises:
        BadRequest: 400, 413 or 501.
    """
    text = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if text is not None:  # whoever stands between may have believed the other one
            raise BadRequest(400, "Content-Length beside Transfer-Encoding: send one of them")
        if coding.lower() != "chunked":
            raise BadRequest(
                501, f"Transfer-Encoding {coding[:40]!r} is not supported: send Content-Length, or chunked"
            )
        return CHUNKED
    if text is None:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadRequest(400, "Content-Length is not a number")
    length = int(text)
    if length > REQUEST_BYTES_MAX:
        raise BadRequest(413, f"the body has {length} bytes, at most {REQUEST_BYTES_MAX}")
    return length


def read_chunks(data: bytes, receive: Callable[[], bytes]) -> tuple[memoryview, bytes]:
    """Read a body in chunks, of which `data` are the first bytes; return it, and what came behind it.

    Extensions and trailers are bounded and ignored: nothing that arrives behind a body may change what was asked.

    Raises:
        BadRequest: 400, 413 or 431, and what `receive` raises.
    """
    body = bytearray()
    came = bytearray(data)
    at = 0

    def line(bytes_max: int) -> bytes:
        nonlocal at
        while (end := came.find(b"\r\n", at, at + bytes_max + 2)) < 0:
            if len(came) - at > bytes_max + 1:
                raise BadRequest(431, f"a line of more than {bytes_max} bytes between or behind the chunks")
            fill()
        found, at = bytes(came[at:end]), end + 2
        return found

    def fill() -> None:
        nonlocal at
        del came[:at]
        at = 0
        came.extend(receive())

    while True:
        said = _CHUNK_LINE.fullmatch(line(CHUNK_LINE_BYTES_MAX))
        if said is None:
            raise BadRequest(400, "a chunk does not begin with its size in hexadecimal digits")
        size = int(said[1], 16)
        if not size:
            break
        if len(body) + size > REQUEST_BYTES_MAX:
            raise BadRequest(413, f"the body has more than {REQUEST_BYTES_MAX} bytes")
        while size:
            if at == len(came):
                fill()
            part = came[at : at + size]
            body += part
            at += len(part)
            size -= len(part)
        while len(came) - at < 2:
            fill()
        if came[at : at + 2] != b"\r\n":
            raise BadRequest(400, "a chunk is not as long as it says")
        at += 2
    left = HEAD_BYTES_MAX
    while trailer := line(left):
        if b"\n" in trailer or b"\r" in trailer or b"\0" in trailer:
            raise BadRequest(400, "lines end with CR LF")
        left = max(left - len(trailer) - 2, 0)
    return memoryview(body), bytes(came[at:])
