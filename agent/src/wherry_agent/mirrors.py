"""Which mirrors to ask: in the order of the settings, without those that lied lately.

A mirror that sent wrong bytes is left out of every download for `LEFT_OUT_S`, also by the couriers that come after: the
server has the blob too. Written through the disk seam, but nothing depends on it: a lost record costs one more lie.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from wherry_agent.disk import Disk
from wherry_shared.errors import DeviceError

log = logging.getLogger(__name__)

FILE = "mirrors.json"
LEFT_OUT_S = 6 * 3600.0
MIRRORS_MAX = 64


class Mirrors:
    """The mirrors of a device."""

    def __init__(self, home: Path, disk: Disk, bases: list[str], wall_s: float) -> None:
        self._path = home / FILE
        self._disk = disk
        self._bases = [base.rstrip("/") for base in bases]
        self._wall_s = wall_s
        self._until = self._read()

    def usable(self) -> list[str]:
        """Return those to ask, in order."""
        return [base for base in self._bases if base not in self._until]

    def left_out(self) -> dict[str, float]:
        """Return those that lied, and until when each is left out (wall time, seconds)."""
        return {base: until for base, until in self._until.items() if base in self._bases}

    def lied(self, base: str) -> None:
        """Leave a mirror out for a while."""
        if base not in self._bases:
            return  # the server itself: there is nobody else to ask
        self._until[base] = self._wall_s + LEFT_OUT_S
        kept = dict(sorted(self._until.items(), key=lambda item: -item[1])[:MIRRORS_MAX])
        log.warning("mirror %s sent wrong bytes and is left out for %.0f hours", base, LEFT_OUT_S / 3600)
        try:
            self._disk.write_atomic(self._path, msgspec.json.encode(kept))
        except DeviceError as error:
            log.warning("that cannot be remembered: %s", error)

    def _read(self) -> dict[str, float]:
        try:
            data = self._disk.read(self._path)
            known = msgspec.json.decode(data, type=dict[str, float]) if data else {}
        except (DeviceError, msgspec.DecodeError) as error:
            log.warning("%s: %s", self._path, error)
            return {}
        # a clock that was set back must not leave a mirror out for years
        return {base: until for base, until in known.items() if 0 < until - self._wall_s <= LEFT_OUT_S}
