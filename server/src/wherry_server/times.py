"""The server's one wall clock: integer microseconds UTC, as every table and message has it."""

from __future__ import annotations

import time

DAY_US = 86_400 * 1_000_000


def now_us() -> int:
    """Return the time now in microseconds since 1970, UTC."""
    return time.time_ns() // 1000
