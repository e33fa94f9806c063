"""Who is on the other end of a local connection: the user that owns the socket.

A unix socket says so itself. For TCP over loopback the kernel's table names the owner of the client's own socket. The
answer is about this machine only: over loopback there is no other.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_TABLE = Path("/proc/net/tcp")


def user_of(sock: socket.socket) -> int | None:
    """Return the user id of the process that opened the other end; None if the system does not say."""
    if sock.family == socket.AF_UNIX:
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(uid)
    if sock.family != socket.AF_INET:
        return None
    return user_of_tcp(sock.getpeername(), sock.getsockname())


def user_of_tcp(peer: tuple[str, int], own: tuple[str, int] | None = None) -> int | None:
    """Return the owner of the IPv4 socket that is bound to `peer` and connected to `own` (None: to anything)."""
    local = _entry(peer)
    remote = None if own is None else _entry(own)
    try:
        lines = _TABLE.read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # not mounted, or hidden from this process
        return None
    for line in lines:
        fields = line.split(maxsplit=8)
        if fields[1] == local and (remote is None or fields[2] == remote):
            return int(fields[7])
    return None


def _entry(address: tuple[str, int]) -> str:
    """Write an address as the kernel's table does: a 32-bit word in the machine's order, hexadecimal."""
    (word,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{word:08X}:{address[1]:04X}"


def may_use(uid: int | None, owner: int) -> bool:
    """Tell whether a peer may use what belongs to `owner`: its own things, or everything for root and this process."""
    return uid is not None and uid in (owner, 0, os.geteuid())
