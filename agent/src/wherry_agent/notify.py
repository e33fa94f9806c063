"""Tells systemd how the agent is: ready, alive, stopping, in words. A datagram on a socket, as sd_notify(3) says; else nothing.

Being alive is said from the supervisor's loop and nowhere else: a loop that hangs is silent, and systemd starts another.
The variables are taken out of the environment, so that no child speaks for the agent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

SOCKET = "NOTIFY_SOCKET"
WATCHDOG_US = "WATCHDOG_USEC"
WATCHDOG_PID = "WATCHDOG_PID"
BEATS_PER_PERIOD = 3
"""A beat may be late by two thirds of the period."""


class Notifier:
    """The line to systemd, if there is one."""

    def __init__(self, address: str, period_s: float) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._period_s = period_s
        self._ready = False
        self._said = ""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] | None = None) -> Notifier:
        """Take over what systemd set for this process."""
        found = os.environ if environment is None else environment
        address = found.pop(SOCKET, "")
        microseconds, pid = found.pop(WATCHDOG_US, ""), found.pop(WATCHDOG_PID, "")
        ours = microseconds.isdigit() and pid in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if ours else 0.0)

    @property
    def beat_s(self) -> float:
        """How often to say that the agent is alive, in seconds; 0 if nobody waits for it."""
        return self._period_s / BEATS_PER_PERIOD if self._address else 0.0

    @property
    def watched(self) -> bool:
        """Whether systemd waits for beats."""
        return self.beat_s > 0

    def ready(self) -> None:
        """The agent has begun to serve; said once."""
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def alive(self, status: str) -> None:
        """The loop turns; `status` is for people."""
        words = ["WATCHDOG=1"] if self._period_s else []
        if status != self._said:
            self._said = status
            words.append(f"STATUS={status.replace(chr(10), ' ')[:200]}")
        if words:
            self._send("\n".join(words))

    def stopping(self) -> None:
        """The agent ends in order."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # who started us does not listen any more: nothing depends on it
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as line,
        ):
            line.sendto(text.encode(), self._address)
