"""HTTP as the courier needs it: one request, one connection, everything bounded, nobody trusted.

The device's secret goes to its own server only: not to mirrors, not along redirects to other origins. An address that a
redirect names may be signed and is as good as a secret: only its origin is ever told. Every foreign exception becomes
`UnreachableError` here. `of_device` makes the client of an enrolled device, the same wherever one is needed.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from wherry_agent import identity as identities
from wherry_agent.identity import Identity
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.limits import KIB
from wherry_shared.reasons import NETWORK

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
"""Silence for this long ends a request."""
SLOW_WINDOW_S = 60.0
SLOW_BYTES_MIN = 16 * KIB
"""Fewer bytes than this in a window is as good as silence: a source that trickles must not hold the courier."""
HEAD_SECONDS_MAX = 60.0
"""From the first try to connect to the end of an answer's head. Silence alone says too little: one byte now and then is none."""
CHUNK_BYTES = 64 * KIB
REDIRECTS_MAX = 3
ERROR_BODY_BYTES_MAX = 16 * KIB
OF_ONE_ORIGIN = ("if-range", "if-none-match")
"""Headers with an entity tag of who was asked first; a store that is asked instead has tags of its own."""


class _Secure(http.client.HTTPSConnection):
    """One whose handshake can be hung up on as well: the socket is known before it begins."""

    def __init__(self, host: str, port: int | None, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=CONNECT_TIMEOUT_S, context=context)
        self._tls = context

    def connect(self) -> None:
        """Connect in two steps."""
        http.client.HTTPConnection.connect(self)
        secure = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = secure
        secure.do_handshake()


class _Watch:
    """Hangs up on a source that lets a part of its answer last too long, however many bytes drip meanwhile."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._until = math.inf
        self.hung_up = False
        threading.Thread(target=self._main, name="http-watch", daemon=True).start()

    def within(self, seconds: float) -> None:
        """From now on, hang up after so many seconds; infinity ends the watch for a while."""
        with self._changed:
            self._until = time.monotonic() + seconds
            self._changed.notify()

    def end(self) -> None:
        """Watch no more."""
        self.within(-math.inf)

    def _main(self) -> None:
        with self._changed:
            while self._until > -math.inf:
                left = self._until - time.monotonic()
                if left <= 0:
                    self.hung_up = True
                    sock = self._connection.sock
                    if sock is not None:
                        with contextlib.suppress(OSError):  # it ended in this moment
                            socket.socket.shutdown(sock, socket.SHUT_RDWR)
                    return
                self._changed.wait(None if left == math.inf else left)


class Response:
    """An answer whose body has not been read yet."""

    def __init__(self, url: str, raw: http.client.HTTPResponse, watch: _Watch) -> None:
        self._watch = watch
        self.url = url
        self.status = raw.status
        self.headers = raw.headers
        self._raw = raw

    def header(self, name: str) -> str:
        """Return a header, empty if it is absent."""
        return str(self.headers.get(name, ""))

    @property
    def length(self) -> int | None:
        """Declared length of the body."""
        text = self.header("Content-Length")
        return int(text) if text.isdigit() and len(text) < 16 else None

    def chunks(self, bytes_max: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Pass on the body as it arrives, at most `bytes_max` at a time; it may end early without an error, so count.

        Raises:
            UnreachableError: `network`.
        """
        waited_s, window_bytes = 0.0, 0
        while True:
            began = time.monotonic()
            self._watch.within(SLOW_WINDOW_S)
            try:
                chunk = self._raw.read1(bytes_max)
            except http.client.IncompleteRead:
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _unreachable(self.url, error) from error
            finally:
                self._watch.within(math.inf)  # whoever takes the chunk may take its time
            if self._watch.hung_up:
                raise UnreachableError(NETWORK, f"{origin(self.url)} lets its answer drip")
            if not chunk:
                return
            waited_s += time.monotonic() - began  # for the source only: the disk and a bounded rate are not its doing
            yield chunk
            window_bytes += len(chunk)
            if waited_s >= SLOW_WINDOW_S:
                if window_bytes < SLOW_BYTES_MIN:
                    raise UnreachableError(
                        NETWORK, f"{origin(self.url)} sends less than {SLOW_BYTES_MIN} bytes a minute"
                    )
                waited_s, window_bytes = 0.0, 0

    def read(self, bytes_max: int) -> bytes:
        """Return the whole body.

        Raises:
            RefusedError: `answer_too_large`.
            UnreachableError: `network`, also when it ended before its declared length.
        """
        data = bytearray()
        for chunk in self.chunks():
            data += chunk
            if len(data) > bytes_max:
                raise RefusedError("answer_too_large", f"{origin(self.url)} answered more than {bytes_max} bytes")
        if self.length is not None and len(data) != self.length:
            raise UnreachableError(NETWORK, f"{origin(self.url)} stopped after {len(data)} of {self.length} bytes")
        return bytes(data)


class Http:
    """A client for one device."""

    def __init__(
        self,
        *,
        ca: Path | None = None,
        server: str = "",
        authorization: str = "",
        pair: tuple[Path, Path] | None = None,
        password: str = "",
    ) -> None:
        """Prepare; `authorization` and the certificate and key (with its password) of `pair` are for `server` only."""
        self._ca = ca
        self._pair = pair
        self._password = password
        self._home = origin(server) if server else ""
        self._authorization = authorization
        self._contexts: dict[bool, ssl.SSLContext] = {}

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Iterator[Response]:
        """Send a request and yield the answer, following a few redirects of GET; the connection ends with the block.

        Raises:
            RefusedError: `bad_url`.
            UnreachableError: `network`.
        """
        sent = dict(headers or {})
        for _ in range(REDIRECTS_MAX + 1):
            connection = self._connection(url)
            try:
                watch = _Watch(connection)
            except RuntimeError as error:  # no thread can be had in this moment
                raise _unreachable(url, error) from error
            try:
                raw = self._send(connection, watch, method, url, dict(sent), body)
                target = (
                    raw.getheader("Location") if method == "GET" and raw.status in (301, 302, 303, 307, 308) else None
                )
                if not target:
                    yield Response(url, raw, watch)
                    return
            finally:
                watch.end()
                connection.close()
            following = urljoin(url, target)
            if urlsplit(url).scheme == "https" and urlsplit(following).scheme != "https":
                raise UnreachableError(NETWORK, f"{origin(url)} redirects from https to {urlsplit(following).scheme}")
            if origin(following) != origin(url):
                sent = {name: value for name, value in sent.items() if name.lower() not in OF_ONE_ORIGIN}
            url = following
        raise UnreachableError(NETWORK, f"more than {REDIRECTS_MAX} redirects")

    def _send(
        self,
        connection: http.client.HTTPConnection,
        watch: _Watch,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None,
    ) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers.setdefault("Accept-Encoding", "identity")
        headers.setdefault("Connection", "close")
        if self._authorization and origin(url) == self._home:
            headers["Authorization"] = self._authorization
        watch.within(HEAD_SECONDS_MAX)
        try:
            connection.connect()
            connection.sock.settimeout(READ_TIMEOUT_S)
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            if watch.hung_up:  # a head that ends there passes for a whole one
                raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = TimeoutError(f"it did not answer within {HEAD_SECONDS_MAX:.0f} s")
            raise _unreachable(url, late if watch.hung_up else error) from error
        watch.within(math.inf)
        return answer

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise _bad_url(url) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise _bad_url(url)
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, port, timeout=CONNECT_TIMEOUT_S)
        return _Secure(parts.hostname, port, self._tls(url, home=origin(url) == self._home))

    def _tls(self, url: str, *, home: bool) -> ssl.SSLContext:
        """Return whom to believe, and what to show: at home the server's own authority only, elsewhere those of this machine as well.

        Raises:
            UnreachableError: `network`; a file is gone, the disk altered it, or the key has another password.
        """
        if home in self._contexts:
            return self._contexts[home]
        try:
            context = ssl.create_default_context(cafile=str(self._ca) if self._ca and home else None)
            if self._ca and not home:
                context.load_verify_locations(str(self._ca))
        except (OSError, ValueError) as error:
            raise UnreachableError(
                NETWORK,
                f"{origin(url)}: {self._ca} is no certificate authority: {error}",
                consequence="the server cannot be told from another",
                next_step="put the file back, or enrol again",
            ) from error
        if self._pair and home:
            try:
                context.load_cert_chain(*self._pair, password=self._password)
            except (OSError, ValueError) as error:
                raise UnreachableError(
                    NETWORK,
                    f"{origin(url)}: the certificate of this device, or its key, cannot be used: {_of_pair(self._pair, error)}",
                    consequence="this device cannot show the server who it is",
                    next_step="see wherry-agent doctor; with a key at rest, whether it is the one that the key was encrypted with",
                ) from error
        self._contexts[home] = context
        return context


def of_device(
    home: Path, known: Identity | None, server: str, *, password: str, wall_s: float, says: bool = True
) -> Http:
    """Return a client that believes, and shows to `server`, what the device under `home` has.

    Args:
        home: the agent's folder.
        known: the device; None while it is not enrolled.
        server: address of its server.
        password: of the device's key on the disk.
        wall_s: the time, by which an expired certificate is not shown.
        says: whether it sends its secret, too.
    """
    return Http(
        ca=identities.authority(home) if server.startswith("https:") else None,
        server=server,
        authorization=known.authorization if known is not None and says else "",
        pair=identities.shown_pair(home, known, wall_s) if known is not None else None,
        password=password,
    )


def _of_pair(pair: tuple[Path, Path], error: Exception) -> str:
    """Say which of the two it is, as far as their files tell."""
    for path in pair:
        try:
            path.read_bytes()
        except OSError as trouble:
            return f"{path}: {trouble.strerror}"
    return f"{pair[0].parent}: {error}"


def origin(url: str) -> str:
    """Return scheme, host and port of a URL: what a secret belongs to, and what a log names."""
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise _bad_url(url) from error
    return f"{parts.scheme}://{parts.hostname}:{port}"


def _bad_url(url: str) -> RefusedError:
    return RefusedError("bad_url", f"{url.partition('?')[0][:200]!r} is not an http or https address")


def _unreachable(url: str, error: Exception) -> UnreachableError:
    why = str(error).partition("?")[0] or type(error).__name__  # the library quotes an address that it cannot send
    return UnreachableError(NETWORK, f"{origin(url)}: {why}", next_step="check the address and the network")
