"""Accepting connections on inherited sockets: one thread accepts for all of them, one per connection answers.

The listening sockets belong to the supervisor and outlive this process, so they are never shut down here: a connection
that this process does not accept any more waits in the queue for the next one. What this process still holds when it
makes way is answered, and then passed on to that one as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence

from wherry_agent.accepting import ACCEPT_PAUSE_SECONDS
from wherry_agent.serving import passing
from wherry_agent.serving.http import BadRequest, Connection
from wherry_agent.serving.protocol import Protocol, failure

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
"""More wait in the listening queue until one ends."""
IDLE_SECONDS_WHEN_FULL = 5.0
"""With others waiting, a connection that was idle for so long makes room."""
LINGER_SECONDS = 1.0
LINGER_BYTES_MAX = 1 << 22
FULL_POLL_MS = 250
STAY_SECONDS = 2.0
"""A connection that could not be passed on is served for one more request, if that begins within this time."""


class _Client:
    """A connection, its thread, and whether it is between two requests."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.connection = Connection(sock)
        self.waiting = True
        self.leaving = False
        """It is answered once more, if it asks at once, and then closed."""
        self.since = time.monotonic()
        """When it began to wait."""

    def hang_up(self) -> None:
        """Let the thread of an idle connection see its end; what the client sent in this moment is still answered."""
        with contextlib.suppress(OSError):  # closed in this moment by its client
            self.socket.shutdown(socket.SHUT_RD)


class HttpServer:
    """Serves a protocol on listening sockets."""

    def __init__(
        self,
        listeners: list[socket.socket],
        protocol: Protocol,
        *,
        pass_on: socket.socket | None = None,
        take_over: Sequence[socket.socket] = (),
    ) -> None:
        self._listeners = listeners
        self._protocol = protocol
        self._pass_on = pass_on
        """Where connections go that are open when this process makes way."""
        self._take_over = list(take_over)
        """Where those of the process before come from."""
        self._lock = threading.Condition()
        self._clients: set[_Client] = set()
        self._draining = False
        self._passing = False
        self._stop_read, self._stop_write = os.pipe()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._acceptor = threading.Thread(target=self._accept, name="accept", daemon=True)

    def start(self) -> None:
        """Begin to accept and to take over, unless it is being drained already."""
        with self._lock:
            if self._draining:
                return
            self._acceptor.start()
        for end in self._take_over:
            threading.Thread(target=self._take_from, args=(end,), name="take-over", daemon=True).start()

    def drain(self, deadline: float, *, pass_on: bool = False) -> None:
        """Stop accepting, let go of idle connections, and wait until `deadline` (monotonic) for those with a request.

        Args:
            deadline: when to stop waiting.
            pass_on: open connections go to the process that follows, instead of being closed.
        """
        with self._lock:
            self._passing = pass_on and self._pass_on is not None
            self._draining = True
            started = self._acceptor.is_alive()
        os.write(self._stop_write, b"x")  # never read: every thread that waits for a request sees it
        self._wake()
        if started:
            self._acceptor.join()
        with self._lock:
            while self._clients and (left := deadline - time.monotonic()) > 0:
                self._lock.wait(left)

    # -- inside ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        by_fd = {listener.fileno(): listener for listener in self._listeners}
        for listener in self._listeners:
            listener.setblocking(False)
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        full = True
        while not self._draining:
            was_full, full = full, len(self._clients) >= CONNECTIONS_MAX
            if was_full != full:
                for fd in by_fd:
                    if full:
                        poll.unregister(fd)
                    else:
                        poll.register(fd, select.POLLIN)
            ready = poll.poll(FULL_POLL_MS if full else None)
            if not ready:
                self._make_room()
            for fd, _ in ready:
                if fd == self._wake_read:
                    os.read(fd, 4096)
                elif len(self._clients) < CONNECTIONS_MAX:
                    self._take(by_fd[fd])
        for listener in self._listeners:
            listener.close()

    def _make_room(self) -> None:
        """All connections are taken: if somebody waits in a queue, hang up on the one that was idle longest."""
        poll = select.poll()
        for queue in self._listeners:
            poll.register(queue, select.POLLIN)
        if not poll.poll(0):
            return
        with self._lock:
            idle = [client for client in self._clients if client.waiting and client.connection.idle]
        longest = min(idle, key=lambda client: client.since, default=None)
        if longest is not None and time.monotonic() - longest.since >= IDLE_SECONDS_WHEN_FULL:
            longest.hang_up()

    def _take(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was faster, or the client is gone
            return
        except OSError as error:
            log.error("accept failed: %s", error)
            time.sleep(ACCEPT_PAUSE_SECONDS)
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._begin(sock)

    def _take_from(self, end: socket.socket) -> None:
        with end:
            for sock in passing.taken(end):
                self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        client = _Client(sock)
        with self._lock:
            self._clients.add(client)
        try:
            threading.Thread(target=self._serve, args=(client,), name="http", daemon=True).start()
        except RuntimeError as error:  # no thread can be had in this moment: its client comes again, others as well
            log.error("a connection is closed unserved: %s", error)
            self._let_go(client)
            time.sleep(ACCEPT_PAUSE_SECONDS)

    def _serve(self, client: _Client) -> None:
        try:
            while self._next(client):
                request = client.connection.read()
                client.waiting = False
                if request is None:
                    break
                response = self._protocol.respond(request)
                keep_alive = request.keep_alive and not self._closes(client)
                client.connection.write(response, keep_alive=keep_alive, request=request)
                del request, response  # they hold tensors, which must not outlive their request
                client.connection.release()
                if not keep_alive:
                    break
        except BadRequest as error:
            self._refuse(client, error)
        except OSError as error:
            log.debug("a client is gone: %s", error)
        finally:
            self._let_go(client)
            self._wake()

    def _let_go(self, client: _Client) -> None:
        client.socket.close()
        with self._lock:
            self._clients.discard(client)
            self._lock.notify_all()

    def _next(self, client: _Client) -> bool:
        """Wait for the next request of a client; False if there is none, or somebody else answers it."""
        client.since = time.monotonic()
        client.waiting = True
        if not client.connection.idle:
            return True
        if not client.leaving:
            if not self._draining and client.connection.take_up():
                return True
            if client.connection.wait(self._stop_read):
                return True
            if not self._draining:
                return False  # idle for too long
            if self._passing and self._pass_on is not None and passing.give(self._pass_on, client.socket):
                return False
            client.leaving = True
        # what the client sent in this moment is still answered
        return client.connection.wait(-1, STAY_SECONDS if self._passing else 0.0)

    def _closes(self, client: _Client) -> bool:
        """Tell whether the answer being made is the last on its connection."""
        return client.leaving or (self._draining and not self._passing and client.connection.idle)

    def _refuse(self, client: _Client, error: BadRequest) -> None:
        """Answer and close, but read on for a moment: closing with unread bytes would reset the answer away."""
        try:
            client.connection.write(failure(error.status, error.message), keep_alive=False)
            client.socket.shutdown(socket.SHUT_WR)
            client.socket.settimeout(LINGER_SECONDS)
            read = 0
            while read < LINGER_BYTES_MAX and (chunk := client.socket.recv(1 << 16)):
                read += len(chunk)
        except OSError as gone:
            log.debug("a client did not wait for its refusal: %s", gone)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_write, b"x")
