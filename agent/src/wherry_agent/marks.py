"""How far the order of sealed records had come, so that older ones that somebody put back are found."""

from __future__ import annotations

from pathlib import Path

import msgspec

from wherry_agent.disk import Disk
from wherry_agent.sealing import STOPS, is_sealed, opened
from wherry_shared.errors import RefusedError

FILE = "marks"
COPY = "marks.copy"


class Marks:
    """How far the order of records had come: what is older was put back by somebody.

    A mark is behind by a record, since the one before the last may be read, and by what was written since it was made: it is
    renewed at each start and every `EVERY` records. Marks that are put back together with all else are believed: only
    hardware that counts could tell. Kept twice, so that a spot of rot is not taken for a thief.
    """

    EVERY = 64

    def __init__(self, home: Path, disk: Disk) -> None:
        self._files = home / FILE, home / COPY
        self._disk = disk
        self._seal = disk.seal
        self._kept: dict[str, int] = {}
        self.known: bool = False
        """Whether there are any."""

    def read(self) -> dict[str, int]:
        """Return the marks; what neither file tells is 0.

        Raises:
            RefusedError: `at_rest_key_missing`, `at_rest_key_other`.
            DeviceError: `disk`, `cipher_missing`.
        """
        for file in self._files:
            record = self._disk.read(file)
            if record is None or not is_sealed(record):
                continue
            try:
                found = msgspec.json.decode(opened(self._seal, FILE, record).data, type=dict[str, int])
            except (RefusedError, msgspec.DecodeError) as error:
                if isinstance(error, RefusedError) and error.code in STOPS:
                    raise
                continue
            self.known = True
            self._kept = {name: max(found.get(name, 0), self._kept.get(name, 0)) for name in {**found, **self._kept}}
        return dict(self._kept)

    def reach(self, name: str, number: int, *, instead_of: str = "") -> None:
        """Take a mark that the next `note` makes durable; those whose names begin with `instead_of` are forgotten."""
        if instead_of:
            self._kept = {key: value for key, value in self._kept.items() if not key.startswith(instead_of)}
        self._kept[name] = number

    def note(self) -> None:
        """Make marks durable; without sealing there are none.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`; `cipher_missing`.
        """
        if self._seal is None:
            return
        if not self._seal.writes:
            for file in self._files:
                self._disk.unlink(file)
            self.known = False
            return
        record = self._seal.close(FILE, msgspec.json.encode(self._kept))
        for file in self._files:
            self._disk.write_atomic(file, record)
        self.known = True
