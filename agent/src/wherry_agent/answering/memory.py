"""Memory of this process and this machine: whether two versions fit, and giving back what an old one held."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

log = logging.getLogger(__name__)

HEADROOM = 1.2
"""A swap keeps the old version loaded only with this factor of the new one's measured peak to spare (contracts.md §6)."""
RESERVE_BYTES_DEFAULT = 64 * 1024 * 1024


def available_bytes() -> int:
    """Return MemAvailable of this machine; 0 if the kernel does not say."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def fits_beside(peak_bytes: int, reserve_bytes: int, available: int) -> bool:
    """Tell whether a version that was measured to need `peak_bytes` may be loaded beside what is loaded now.

    A version that was never measured (0) is taken to fit: its canary ran on this device a moment ago.
    """
    return peak_bytes == 0 or available >= peak_bytes * HEADROOM + reserve_bytes


def trim() -> None:
    """Give freed memory back to the system; where the C library has no `malloc_trim`, it does so by itself or never."""
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        log.debug("this C library has no malloc_trim")
        return
    malloc_trim.argtypes = [ctypes.c_size_t]
    malloc_trim.restype = ctypes.c_int
    malloc_trim(0)
