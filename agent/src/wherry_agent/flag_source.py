"""The device's feature flags inside an application's process: pushed by the supervisor, kept when it is gone.

    flags = FlagSource()
    flags.start()
    flags.wait(5.0)
    flags.values.get("night-mode")

One thread stays connected to the supervisor's handle socket. Readers take one reference and no lock. `openfeature` puts
the OpenFeature interface on top.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wherry_agent import handle_messages as messages
from wherry_agent import shelter
from wherry_agent.lines import LineWriter, read_lines
from wherry_shared import flags as device_flags
from wherry_shared.errors import RefusedError, UnreachableError, WherryError

log = logging.getLogger(__name__)

RECONNECT_SECONDS_MIN = 0.1
RECONNECT_SECONDS_MAX = 5.0
CLOSE_SECONDS_MAX = 2.0


class FlagSource:
    """All flags of this device, and whether somebody still keeps them up to date."""

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        on_change: Callable[[list[str]], None] | None = None,
        on_link: Callable[[bool], None] | None = None,
    ) -> None:
        """Prepare; `start` connects.

        Args:
            socket: the supervisor's unix socket; default as in `handle_messages.socket_path`.
            on_change: told which keys changed, from the source's thread, after the first values.
            on_link: told when the supervisor is there (True) and when it went (False), from the source's thread.
        """
        self.path = messages.socket_path(socket)
        self.values: Mapping[str, Any] = {}
        self.live = False
        """A supervisor is connected; else `values` are the last known ones."""
        self._on_change = on_change
        self._on_link = on_link
        self._known = False
        self._first = threading.Event()
        self._closed = threading.Event()
        self._connection: sockets.socket | None = None
        self._thread: threading.Thread | None = None
        self._trouble: WherryError | None = None

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._thread = threading.Thread(target=self._listen, name="flags", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for the first values.

        Raises:
            UnreachableError: `supervisor_unreachable`, nobody answered in time.
            RefusedError: the supervisor does not talk to this process.
        """
        self._first.wait(timeout_s)
        if self._known:
            return
        raise self._trouble or UnreachableError(
            "supervisor_unreachable",
            f"no supervisor answers on {self.path}",
            consequence="flags have their defaults until one does",
            next_step="start wherry-agent, or name its socket",
        )

    def close(self) -> None:
        """Let go of the supervisor; `values` stay as they are."""
        self._closed.set()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(sockets.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS_MAX)

    # -- inside ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        wait_s = RECONNECT_SECONDS_MIN
        while not self._closed.is_set():
            connection = sockets.socket(sockets.AF_UNIX)
            try:
                shelter.connect(connection, Path(self.path))
                self._connection = connection
                if self._closed.is_set():
                    return  # closed in this moment: nobody would shut this connection down
                hello = messages.WatchFlags(format=messages.FORMAT, pid=os.getpid())
                LineWriter(connection).write(messages.encode(hello))
                for line in read_lines(connection, line_bytes_max=messages.LINE_BYTES_MAX):
                    wait_s = RECONNECT_SECONDS_MIN
                    message = messages.parse_to_handle(line)
                    if isinstance(message, messages.Refusal):
                        self._trouble = RefusedError(message.code, message.message)
                        self._first.set()
                        return
                    if isinstance(message, messages.Flags):
                        self._take(message.flags)
            except (OSError, RefusedError) as error:
                log.debug("flags: %s", error)
            finally:
                self._connection = None
                connection.close()
                self._lost()
            self._closed.wait(wait_s)
            wait_s = min(2 * wait_s, RECONNECT_SECONDS_MAX)

    def _take(self, flags: Mapping[str, Any]) -> None:
        changed = device_flags.changed(self.values, flags)
        known, back = self._known, not self.live
        self.values, self.live, self._known = flags, True, True
        self._first.set()
        if back and self._on_link is not None:
            self._on_link(True)
        if known and changed and self._on_change is not None:
            self._on_change(changed)

    def _lost(self) -> None:
        if not self.live:
            return
        self.live = False
        if self._on_link is not None and not self._closed.is_set():
            self._on_link(False)
