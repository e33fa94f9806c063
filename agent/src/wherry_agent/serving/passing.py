"""Open connections on their way from one worker process to the next, so that no client sees the change.

Closing an idle keep-alive connection races the request that its client is about to send. So it is not closed: its
descriptor goes over a socket pair (SCM_RIGHTS) to the worker that follows. Bytes that the kernel holds travel with it;
bytes that were read already do not, so only a connection of which nothing was read beyond its last request is passed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator

log = logging.getLogger(__name__)

PASS_SECONDS_MAX = 2.0
"""How long a connection may wait for room in the channel; its worker serves it on if there is none."""
BUFFER_BYTES = 1 << 20
"""Room for every connection of a worker, also while nobody reads (one takes under 3 kB)."""
_TAG = b"connection/1"
_FDS_MAX = 8


def channel() -> tuple[socket.socket, socket.socket]:
    """Return two ends: connections put in at the first come out at the second, also when the first is closed by then."""
    giving, taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    giving.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return giving, taking


def give(end: socket.socket, connection: socket.socket) -> bool:
    """Pass a connection on; False if nobody can take it. The caller closes its own descriptor either way."""
    try:
        socket.send_fds(end, [_TAG], [connection.fileno()])
    except OSError as error:
        log.warning("a connection could not be passed on: %s", error)
        return False
    return True


def taken(end: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that come, until the giving end is closed everywhere."""
    while True:
        try:
            tag, descriptors, _, _ = socket.recv_fds(end, len(_TAG), _FDS_MAX)
        except OSError as error:
            log.warning("no more connections can be taken over: %s", error)
            return
        if not tag and not descriptors:
            return
        for descriptor in descriptors:
            try:
                yield socket.socket(fileno=descriptor)
            except OSError as error:
                log.warning("what was passed on is no connection: %s", error)
                os.close(descriptor)
