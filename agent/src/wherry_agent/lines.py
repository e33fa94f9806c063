"""Lines over a stream socket, bounded: what the worker's control channel and the handles speak."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

from wherry_shared.errors import RefusedError

CHUNK_BYTES = 1 << 16


def read_lines(connection: socket.socket, *, line_bytes_max: int) -> Iterator[bytes]:
    """Yield complete lines without their end until end of file; a last line without an end is dropped.

    Raises:
        RefusedError: `line_too_long`.
        OSError: the connection broke.
    """
    buffer = bytearray()
    while chunk := connection.recv(CHUNK_BYTES):
        start = len(buffer)
        buffer += chunk
        while (end := buffer.find(b"\n", start)) >= 0:
            yield bytes(buffer[:end])
            del buffer[: end + 1]
            start = 0
        if len(buffer) > line_bytes_max:
            raise RefusedError("line_too_long", f"a line of more than {line_bytes_max} bytes")


class LineWriter:
    """Writes whole lines from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Send one line.

        Raises:
            OSError: the connection broke, or its peer does not read.
        """
        with self._lock:
            self._connection.sendall(line)
