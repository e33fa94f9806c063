"""Where an agent's sockets are while its home takes no writes: a folder that whoever knows the home finds.

It is below the unit's `RuntimeDirectory` (the unit's `/tmp` is its own), else below the temporary folder, where anybody may
have taken the name: the agent uses it, and others look into it, only if it belongs to whom it should.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import tempfile
from pathlib import Path

RUNTIME = Path("/run/wherry-agent")
"""What the unit's `RuntimeDirectory` is; systemd names it to the agent, nobody to its clients."""


def make(home: Path) -> Path:
    """Return a folder for the sockets of an agent on `home` that only its user enters."""
    folder = Path(os.environ.get("RUNTIME_DIRECTORY") or tempfile.gettempdir()) / _name(home)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if _is_of(folder, os.geteuid()):
        return folder
    return Path(tempfile.mkdtemp(prefix="wherry-"))


def connect(connection: socket.socket, path: Path) -> None:
    """Connect to a socket in an agent's `run` folder, or in what stands in for that.

    Raises:
        OSError: nobody listens at either.
    """
    try:
        connection.connect(str(path))
    except OSError:
        home = path.parent.parent
        for base in (RUNTIME, Path(tempfile.gettempdir())):
            folder = base / _name(home)
            if _is_of(folder, home.stat().st_uid):
                connection.connect(str(folder / path.name))
                return
        raise


def _name(home: Path) -> str:
    return f"wherry-{hashlib.sha256(os.fsencode(home.absolute())).hexdigest()[:16]}"


def _is_of(folder: Path, user: int) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user
