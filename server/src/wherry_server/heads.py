"""uvicorn's HTTP with an end to what comes before a request can be refused: its head.

httptools keeps a head, and what follows a chunked body, until it is complete, however long that is and takes. Bodies are bounded
where they are read (`app.BodyLimit`).
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 64 * 1024
"""Of a head, or behind a body; as much again may come with the last piece that is read of a connection."""
HEAD_S = 20.0
"""Between a connection, or the first byte of a request, and the end of its head."""


class HeadLimit(HttpToolsProtocol):
    """Hangs up where a head does not end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._unread = 0
        self._moved = False
        self._in_head = True
        self._late: asyncio.TimerHandle | None = self.loop.call_later(HEAD_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, as long as it leads somewhere."""
        self._moved = False
        super().data_received(data)
        self._unread = 0 if self._moved else self._unread + len(data)
        if self._unread > HEAD_BYTES_MAX:
            if self._in_head:
                self.send_400_response(f"The head of the request has more than {HEAD_BYTES_MAX} bytes.")
            else:
                self.transport.abort()
        if not self._in_head:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """End a head."""
        self._in_head, self._moved = False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._moved = True
        super().on_message_complete()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
