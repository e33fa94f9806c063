"""Answering on inherited sockets: one thread leads, the others follow (Schmidt et al., POSA 2, "Leader/Followers").

The leader waits for all idle connections at once, and answers itself what is short: eight busy clients of a small model are
answered by one thread, where eight would fight over one interpreter. Before what may last (a request that is not whole yet, a
model that takes longer, a client that does not read) it stands aside: the next thread leads, and the long request
keeps its own to the end. So whatever a client or a model does holds up nobody else.

The listening sockets belong to the supervisor and outlive this process, so they are never shut down here: a connection
that this process does not accept any more waits in the queue for the next one. What this process still holds when it
makes way is answered, and then passed on to that one as well.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Sequence

from wherry_agent.accepting import ACCEPT_PAUSE_SECONDS
from wherry_agent.serving import passing
from wherry_agent.serving.http import IDLE_SECONDS_MAX, BadRequest, Connection
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
SWEEP_SECONDS = 15.0
"""Between two looks for connections that nobody uses: up to this much later than their time they are closed."""
FOLLOWERS_MAX = 8
"""Threads that wait for their turn to lead; more end, and are started again when they are needed."""
SHORT_SECONDS = 200e-6
"""What a leader answers itself: from here on, running on several cores gains more than changing the thread costs."""
ALONE_SECONDS = 2e-3
"""The same while there is one connection: only one that is about to be made would wait."""
READY_MAX = 16
"""Connections that a leader hears of at once."""


class _Client:
    """A connection, and what is happening to it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.connection = Connection(sock)
        self.waiting = True
        """It is between two requests."""
        self.aside = False
        """A thread of its own answers it: the leader does not look at it."""
        self.leaving = False
        """It is answered once more, if it asks at once, and then closed."""
        self.since = time.monotonic()
        """When it began to wait."""

    def hang_up(self) -> None:
        """Let the leader see the end of an idle connection; what the client sent in this moment is still answered."""
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
        self._idle: dict[int, _Client] = {}
        """Whom the leader listens to, by descriptor."""
        self._poll = select.epoll()
        self._baton = threading.Lock()
        """Held by the thread that leads."""
        self._followers = 0
        self._sweep_at = 0.0
        self._draining = False
        self._passing = False
        self._stop_read, self._stop_write = os.pipe()
        self._poll.register(self._stop_read, select.EPOLLIN)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._acceptor = threading.Thread(target=self._accept, name="accept", daemon=True)

    def start(self) -> None:
        """Begin to accept and to take over, unless it is being drained already."""
        with self._lock:
            if self._draining:
                return
            self._acceptor.start()
        threading.Thread(target=self._work, name="http", daemon=True).start()
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
        os.write(self._stop_write, b"x")  # never read: whoever leads sees it
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
        client.connection.stand_aside = functools.partial(self._stand_aside, client)
        with self._lock:
            self._clients.add(client)
            if not self._draining:
                self._listen(client)
                return
        self._see_off([client])

    def _listen(self, client: _Client) -> None:
        """Let the leader look at a connection; the lock is held."""
        client.aside = False
        client.waiting = True
        client.since = time.monotonic()
        self._idle[client.fd] = client
        self._poll.register(client.fd, select.EPOLLIN)

    def _ignore(self, client: _Client) -> None:
        del self._idle[client.fd]
        self._poll.unregister(client.fd)

    # -- leading ---------------------------------------------------------------------------------

    def _work(self) -> None:
        """Lead whenever nobody else does, until the end, or until there are more threads than can be of use."""
        while True:
            with self._lock:
                if self._followers >= FOLLOWERS_MAX:
                    return
                self._followers += 1
            self._baton.acquire()
            with self._lock:
                self._followers -= 1
            if not self._lead():
                return

    def _lead(self) -> bool:
        """Answer what comes; True after a request that another thread had to lead for meanwhile, False at the end."""
        while True:
            ready = self._poll.poll(SWEEP_SECONDS, READY_MAX)
            if self._draining:
                with self._lock:
                    idle = list(self._idle.values())
                    for one in idle:
                        self._ignore(one)
                self._baton.release()  # to the next, which ends as well
                self._see_off(idle)
                return False
            now = time.monotonic()
            for fd, _ in ready:
                client = self._idle.get(fd)
                if client is not None and not self._turn(client, now):
                    return True
            if now >= self._sweep_at:
                self._sweep(now)

    def _turn(self, client: _Client, now: float) -> bool:
        """Answer a connection that may have a request; False if this thread does not lead any more."""
        connection = client.connection
        if not connection.take_up():
            return True
        client.waiting = False
        client.since = now
        over = self._answer(client)
        if not over and not connection.idle:  # more requests came with it, whose number is the client's to choose
            self._stand_aside(client)
        if client.aside:
            self._finish(client, over=over)
            return False
        while not over and not connection.idle:  # there is no thread to be had
            over = self._answer(client)
        if over:
            with self._lock:
                self._ignore(client)
            self._let_go(client)
        else:
            client.waiting = True
        return True

    def _stand_aside(self, client: _Client, seconds: float = math.inf) -> None:
        """Let another thread lead, before this one does for `client` what may last for `seconds`."""
        if client.aside or seconds <= (SHORT_SECONDS if len(self._clients) > 1 else ALONE_SECONDS):
            return
        with self._lock:
            if not self._followers:
                try:
                    threading.Thread(target=self._work, name="http", daemon=True).start()
                except RuntimeError as error:  # no thread can be had in this moment: everybody waits for this one
                    log.error("a request holds up others: %s", error)
                    return
            client.aside = True
            self._ignore(client)
        self._baton.release()

    def _finish(self, client: _Client, *, over: bool) -> None:
        """Do the rest for a connection in a thread of its own, and give it back to whoever leads."""
        while not over and not client.connection.idle:
            over = self._answer(client)
        if over:
            self._let_go(client)
            return
        with self._lock:
            if not self._draining:
                self._listen(client)
                return
        self._leave(client)

    def _answer(self, client: _Client) -> bool:
        """Answer one request; True if that was the last one of its connection."""
        try:
            request = client.connection.read()
            if request is None:
                return True
            response = self._protocol.respond(request)
            keep_alive = request.keep_alive and not self._closes(client)
            client.connection.write(response, keep_alive=keep_alive, request=request)
            del request, response  # they hold tensors, which must not outlive their request
            client.connection.release()
        except BadRequest as error:
            self._stand_aside(client)
            self._refuse(client, error)
            return True
        except OSError as error:
            log.debug("a client is gone: %s", error)
            return True
        return not keep_alive

    def _sweep(self, now: float) -> None:
        """Close connections that were not used for too long."""
        self._sweep_at = now + SWEEP_SECONDS
        with self._lock:
            old = [client for client in self._idle.values() if now - client.since >= IDLE_SECONDS_MAX]
            for client in old:
                self._ignore(client)
        for client in old:
            self._let_go(client)

    def _let_go(self, client: _Client) -> None:
        client.socket.close()
        with self._lock:
            self._clients.discard(client)
            self._lock.notify_all()
        self._wake()

    # -- leaving ---------------------------------------------------------------------------------

    def _see_off(self, clients: list[_Client]) -> None:
        """Pass connections on, or let each ask once more what it was about to ask."""
        for client in clients:
            client.aside = True
            if self._passed(client) or not (self._passing or client.connection.wait(0.0)):
                self._let_go(client)
                continue
            try:
                threading.Thread(target=self._leave, args=(client, False), name="http", daemon=True).start()
            except RuntimeError as error:  # no thread can be had in this moment
                log.error("a connection is closed unasked: %s", error)
                self._let_go(client)

    def _leave(self, client: _Client, passing_on: bool = True) -> None:
        if not (passing_on and self._passed(client)):
            client.leaving = True
            # what the client sent in this moment is still answered
            if client.connection.wait(STAY_SECONDS if self._passing else 0.0):
                client.waiting = False
                self._answer(client)
        self._let_go(client)

    def _passed(self, client: _Client) -> bool:
        return self._passing and self._pass_on is not None and passing.give(self._pass_on, client.socket)

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
