"""What the handle group may reach below the agent's home: the two sockets, and the files of models that are served.

Everything in the home belongs to the agent's user alone. For applications of another user, folders on the way to sockets
and blobs become passable (not listable) for the group, and the files that an assignment names readable; identity, trust,
journal, telemetry and downloads stay closed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from wherry_agent.children import Loadable
from wherry_agent.disk import Disk
from wherry_shared.errors import DeviceError

PASS = stat.S_IXGRP
READ = stat.S_IRGRP
LIST = stat.S_IRGRP | stat.S_IXGRP
TALK = stat.S_IRGRP | stat.S_IWGRP


class Sharing:
    """Opens paths of one home to a group; without a group it opens nothing."""

    def __init__(self, home: Path, group: int | None, disk: Disk) -> None:
        self._home = home
        self._group = group
        self._disk = disk

    def open_folders(self, run: Path) -> None:
        """Make the ways to sockets (they are in `run`) and files passable.

        Raises:
            DeviceError: `group_denied`.
        """
        if self._group is None:
            return
        store = self._home / "store"
        for folder in (self._home, run, store, store / "blobs", store / "blobs" / "sha256"):
            self._disk.mkdir(folder)
            self._open(folder, PASS)
        self._disk.mkdir(store / "assets")
        self._open(store / "assets", PASS)

    def open_socket(self, path: Path) -> None:
        """Let the group connect.

        Raises:
            DeviceError: `group_denied`.
        """
        if self._group is not None:
            self._open(path, TALK)

    def open_files(self, loadable: Loadable) -> None:
        """Let the group read what a handle loads of a variant.

        Raises:
            DeviceError: `group_denied`.
        """
        if self._group is not None:
            for path, bits in _needed(loadable):
                self._open(path, bits)

    def _open(self, path: Path, bits: int) -> None:
        assert self._group is not None
        try:
            found = path.stat()
            if found.st_gid != self._group:
                os.chown(path, -1, self._group)
            if found.st_mode & bits != bits or found.st_gid != self._group:
                path.chmod(stat.S_IMODE(found.st_mode) | bits)
        except OSError as error:
            raise DeviceError(
                "group_denied",
                f"{path} cannot be opened to the handle group: {error.strerror or error}",
                consequence="applications of other users cannot use models in their own process",
                next_step="run the agent as root or as a member of that group, or set no handle_group",
            ) from error


def _needed(loadable: Loadable) -> Iterator[tuple[Path, int]]:
    yield Path(loadable.path), READ
    if loadable.golden_path:
        yield Path(loadable.golden_path), READ
    if loadable.assets_path and (folder := Path(loadable.assets_path)).is_dir():
        yield folder, LIST
        for path in folder.rglob("*"):
            yield path, LIST if path.is_dir() else READ
