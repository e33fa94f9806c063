"""Accepting connections for as long as a socket is open: a moment without descriptors ends, and callers come again."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

ACCEPT_PAUSE_SECONDS = 0.1
"""After a failed accept: out of descriptors or threads, trying at once again would only burn the core."""


def accepted(listener: socket.socket, closed: Callable[[], bool]) -> Iterator[socket.socket]:
    """Yield connections until `closed` says that the end is meant; `shutdown` of the listener wakes it to look."""
    while not closed():
        try:
            connection, _ = listener.accept()
        except ConnectionAbortedError:  # the client is gone already
            continue
        except OSError as error:
            if closed():
                return
            log.error("accept failed: %s", error)
            time.sleep(ACCEPT_PAUSE_SECONDS)
            continue
        yield connection
