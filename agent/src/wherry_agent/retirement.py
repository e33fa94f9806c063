"""The end of a device: its server said that it left the fleet, so what was asked for is removed, as far as the owner allows.

The order comes as a frame of the server's, under the key that only this device and the server have. It is written down first:
power may go at any moment, and the next start goes on removing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec

from wherry_agent.disk import Disk

Wipe = Literal["nothing", "models", "all"]
"""In order: each removes what those before it remove."""
FILE = "retired.json"
KEPT: dict[Wipe, frozenset[str]] = {
    "models": frozenset({FILE, "identity", "agent.toml", "run"}),
    "all": frozenset({FILE, "agent.toml", "run"}),
}
"""What stays in the agent's home: the owner's settings always do."""
EXIT = 78
"""Exit status (EX_CONFIG) after which systemd does not start the agent again."""


class Retired(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `HOME/retired.json`."""

    wipe: Wipe


def bounded(asked: Wipe, allowed: Wipe) -> Wipe:
    """Return what is removed: no more than the owner of the device allows."""
    order = get_args(Wipe)
    return asked if order.index(asked) <= order.index(allowed) else allowed


def note(home: Path, wipe: Wipe, disk: Disk) -> None:
    """Write down that this device has retired."""
    disk.write_atomic(home / FILE, msgspec.json.encode(Retired(wipe=wipe)))


def noted(home: Path) -> Retired | None:
    """Return what was written down, None if this device has not retired."""
    try:
        return msgspec.json.decode((home / FILE).read_bytes(), type=Retired)
    except FileNotFoundError:
        return None


def finish(home: Path, retired: Retired, disk: Disk) -> None:
    """Remove what is to be removed; repeating it changes nothing."""
    if retired.wipe == "nothing":
        return
    for path in sorted(home.iterdir()):
        if path.name in KEPT[retired.wipe]:
            continue
        if path.is_dir() and not path.is_symlink():
            disk.remove_tree(path)
        else:
            disk.unlink(path)
    disk.sync_folder(home)
