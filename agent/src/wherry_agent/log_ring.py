"""The last log lines, kept in memory for an operator who asks."""

from __future__ import annotations

import logging
from collections import deque

from wherry_shared.limits import LOG_LINES_MAX

LINE_CHARS_MAX = 500
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class LogRing(logging.Handler):
    """Keeps the newest lines."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append(self.format(record)[:LINE_CHARS_MAX])

    def lines(self) -> list[str]:
        """Return the lines, oldest first."""
        return list(self._lines)
