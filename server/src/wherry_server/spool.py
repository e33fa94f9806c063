"""Files of this machine for work that needs files, while the blobs themselves are elsewhere: bounded, and gone afterwards.

Whoever wants one says how long it may become and waits until there is room. What a killed process left is removed when the
next one opens the folder and it is old.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

from wherry_shared.errors import DeviceError
from wherry_shared.limits import BLOB_BYTES_MAX

SPOOL_BYTES_MAX = 2 * BLOB_BYTES_MAX
"""All files of one process together: one blob of the largest size with what it is made into."""
LEFT_S = 86_400.0
"""A file that nobody wrote to for so long is nobody's any more."""


class Spool:
    """A folder of short-lived files."""

    def __init__(self, folder: Path, bytes_max: int = SPOOL_BYTES_MAX) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._taken = 0
        self._freed = asyncio.Condition()
        self.sweep()

    @contextlib.asynccontextmanager
    async def file(self, bytes_max: int) -> AsyncIterator[Path]:
        """Give the name of a file that is not there yet and may become so long; it goes with the block.

        Raises:
            DeviceError: `spool_small`, if it never fits.
        """
        if bytes_max > self._bytes_max:
            raise DeviceError(
                "spool_small",
                f"{bytes_max} bytes are more than the {self._bytes_max} that {self._folder} may hold",
                consequence="the file was not made; devices fetch the blob as it is",
            )
        async with self._freed:
            await self._freed.wait_for(lambda: self._taken + bytes_max <= self._bytes_max)
            self._taken += bytes_max
        path = self._folder / secrets.token_hex(16)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield path
        finally:
            path.unlink(missing_ok=True)
            async with self._freed:
                self._taken -= bytes_max
                self._freed.notify_all()

    def sweep(self) -> int:
        """Remove what killed processes left; return how many files."""
        removed = 0
        for left in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # its owner was quicker
                if left.stat().st_mtime < time.time() - LEFT_S:
                    left.unlink()
                    removed += 1
        return removed
