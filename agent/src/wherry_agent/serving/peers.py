"""Who is on the other end of a local connection: the user that owns the socket.

A unix socket says so itself. For TCP over loopback the kernel's table names the owner of the client's own socket. The
answer is about this machine only: over loopback there is no other.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_TABLES = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}


def user_of(sock: socket.socket) -> int | None:
    """Return the user id of the process that opened the other end; None if the system does not say."""
    if sock.family == socket.AF_UNIX:
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(uid)
    table = _TABLES.get(socket.AddressFamily(sock.family))
    if table is None:
        return None
    peer, own = sock.getpeername(), sock.getsockname()
    return user_of_tcp((peer[0], peer[1]), (own[0], own[1]))


def user_of_tcp(peer: tuple[str, int], own: tuple[str, int] | None = None) -> int | None:
    """Return the owner of the socket that is bound to `peer` and connected to `own` (None: to anything)."""
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    local = _entry(family, peer)
    remote = None if own is None else _entry(family, own)
    try:
        lines = Path(_TABLES[family]).read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # not mounted, or hidden from this process
        return None
    for line in lines:
        fields = line.split(maxsplit=8)
        if fields[1] == local and (remote is None or fields[2] == remote):
            return int(fields[7])
    return None


def _entry(family: socket.AddressFamily, address: tuple[str, int]) -> str:
    """Write an address as the kernel's table does: 32-bit words in the machine's order, hexadecimal."""
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


def may_use(uid: int | None, owner: int) -> bool:
    """Tell whether a peer may use what belongs to `owner`: its own things, or everything for root and this process."""
    return uid is not None and uid in (owner, 0, os.geteuid())
