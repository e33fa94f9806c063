"""Room for models: what the disk has to leave free, and what the store may hold in all.

With a budget, versions that nothing needs any more stay as a cache as long as they fit, so that going back to one costs
no download; the oldest go first. What is needed (what serves, what it may go back to, what is under way, what an
application holds) is never removed, whatever the budget says: then a download waits, with the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from wherry_agent.children import Failed
from wherry_agent.disk import Disk
from wherry_shared import reasons
from wherry_shared.errors import DeviceError

if TYPE_CHECKING:
    from wherry_agent.store import Store

AGAIN_S = 60.0


class Space:
    """The room of one device's store."""

    def __init__(self, home: Path, disk: Disk, *, reserve_bytes: int, budget_bytes: int) -> None:
        self._home = home
        self._disk = disk
        self._reserve = reserve_bytes
        self._budget = budget_bytes
        """0: none, and nothing stays that is not needed."""

    def tidy(self, needed: set[str]) -> int:
        """Remove what nothing needs and the budget has no room for; return the bytes freed.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        return self._store().collect(needed, bytes_max=self._budget)

    def trouble(self, bytes_coming: int, needed: Callable[[], set[str]] | None) -> Failed | None:
        """Say why so many bytes cannot be downloaded, None if they can; makes room for them where it may.

        Args:
            bytes_coming: what the download adds to the store.
            needed: gives the digests that have to stay; None if nothing may be removed just now.
        """
        if bytes_coming == 0:
            return None
        try:
            if needed is not None and self._budget:
                short = bytes_coming > self._free()
                self._store().collect(needed(), bytes_max=0 if short else max(0, self._budget - bytes_coming))
            if self._budget:
                left = self._budget - self._store().used()
                if bytes_coming > left:
                    return _full(f"{bytes_coming} bytes are to be downloaded, the disk budget has {max(0, left)} left")
            free = self._disk.free_bytes(self._home)
        except DeviceError as error:
            return Failed(reason=error.code, detail=error.message, retry_after_s=AGAIN_S)
        words = short_words(bytes_coming, free, self._reserve)
        return _full(words) if words else None

    def _free(self) -> int:
        return self._disk.free_bytes(self._home) - self._reserve

    def _store(self) -> Store:
        from wherry_agent.store import Store

        return Store(self._home, self._disk)


def short_words(coming: int, free: int, reserve: int) -> str:
    """Say that a disk with so many bytes free has no room for a download, of whatever part of the agent; empty if it has."""
    if coming + reserve <= free:
        return ""
    return f"{coming} bytes are to be downloaded, {free} bytes are free, of which {reserve} have to stay so"


def _full(detail: str) -> Failed:
    return Failed(reason=reasons.DISK_FULL, detail=detail, retry_after_s=AGAIN_S)
