"""A stable name for a unix socket that one process after another opens itself.

gRPC makes its listening sockets itself and unlinks them by name when it stops, so a process that makes way would take the
socket of its successor along if both used one name. Each therefore opens a name of its own, and what clients know is a
symbolic link to the one that answers, replaced by a rename: whoever connects finds the old process or the new one.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

MODE = 0o660
"""As of the other sockets: this user's and, where `share` says so, the handle group's."""
_UNIQUE_BYTES = 3


class SocketName:
    """One stable name. The processes that it leads to open what `fresh` gave them."""

    def __init__(self, path: Path, share: Callable[[Path], None] = lambda _: None) -> None:
        """Take the name over; what earlier processes left under it is removed.

        Args:
            path: what clients connect to.
            share: lets others than this user connect to a socket that was opened.

        Raises:
            OSError: the folder takes no changes.
        """
        self.path = path
        self._share = share
        self.close()

    def fresh(self) -> Path:
        """Return a name for the next process, that no other has."""
        return self.path.with_name(f"{self.path.stem}-{secrets.token_hex(_UNIQUE_BYTES)}{self.path.suffix}")

    def lead_to(self, opened: Path) -> None:
        """Let the stable name lead to a socket that its process has opened.

        Raises:
            OSError: the socket is gone, or the folder takes no changes.
            DeviceError: `share` failed.
        """
        opened.chmod(MODE)
        self._share(opened)
        link = opened.with_suffix(".link")
        link.symlink_to(opened.name)
        link.replace(self.path)

    def forget(self, opened: Path) -> None:
        """Remove what a process left that has ended."""
        with contextlib.suppress(OSError):  # looked for again at the next start
            opened.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the stable name, and every other that was made for it.

        Raises:
            OSError: the folder takes no changes.
        """
        self.path.unlink(missing_ok=True)
        for left in self.path.parent.glob(f"{self.path.stem}-*"):
            left.unlink(missing_ok=True)
