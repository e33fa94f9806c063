"""Who is on the other end of a local connection: the user that owns the socket.

A unix socket says so itself. For TCP over loopback the kernel is asked for the owner of the client's own socket: by
NETLINK_SOCK_DIAG (sock_diag(7)), which finds one socket by its two addresses, or from its table where that is missing.
The answer is about this machine only: over loopback there is no other.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import TypeAlias

Address: TypeAlias = tuple[str, int]

_TABLE = Path("/proc/net/tcp")
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
_BEFORE_ADDRESSES = 4
_ADDRESSES_BYTES = 48
_BEFORE_USER = 12
"""Bytes of an answer: family to retransmits, the socket's addresses, and the counters before its user id."""
_ANY = 0xFFFFFFFF
_ANSWER_SECONDS_MAX = 1.0


def user_of(sock: socket.socket) -> int | None:
    """Return the user id of the process that opened the other end; None if the system does not say."""
    if sock.family == socket.AF_UNIX:
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(uid)
    if sock.family != socket.AF_INET:
        return None
    return user_of_tcp(sock.getpeername(), sock.getsockname())


def user_of_tcp(peer: Address, own: Address) -> int | None:
    """Return the owner of the IPv4 socket that is bound to `peer` and connected to `own`."""
    found = _asked(peer, own)
    return _listed(peer, own) if found is None else found


def may_use(uid: int | None, owner: int) -> bool:
    """Tell whether a peer may use what belongs to `owner`: its own things, or everything for root and this process."""
    return uid is not None and uid in (owner, 0, os.geteuid())


def _asked(peer: Address, own: Address) -> int | None:
    """Ask the kernel for one socket."""
    addresses = b"".join(
        [
            struct.pack("!HH", peer[1], own[1]),
            socket.inet_aton(peer[0]).ljust(16, b"\0"),
            socket.inet_aton(own[0]).ljust(16, b"\0"),
            struct.pack("=III", 0, _ANY, _ANY),  # any interface, no cookie
        ]
    )
    request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, _ANY) + addresses
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(_ANSWER_SECONDS_MAX)
            kernel.sendto(header + request, (0, 0))
            answer = kernel.recv(4096)
    except OSError:  # a kernel or a sandbox without it
        return None
    start = _HEADER.size + _BEFORE_ADDRESSES + _ADDRESSES_BYTES + _BEFORE_USER
    if len(answer) < start + 4 or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    return int(struct.unpack_from("=I", answer, start)[0])


def _listed(peer: Address, own: Address) -> int | None:
    """Look a socket up in the kernel's table, which is read in pieces and may miss one while others come and go."""
    local, remote = _entry(peer), _entry(own)
    try:
        lines = _TABLE.read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # not mounted, or hidden from this process
        return None
    for line in lines:
        fields = line.split(maxsplit=8)
        if fields[1:3] == [local, remote]:
            return int(fields[7])
    return None


def _entry(address: Address) -> str:
    """Write an address as the kernel's table does: a 32-bit word in the machine's order, hexadecimal."""
    (word,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{word:08X}:{address[1]:04X}"
