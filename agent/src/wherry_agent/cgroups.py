"""A second limit around a canary: memory of a control group (v2), where systemd delegates the service's group.

RLIMIT_DATA, which the canary sets for itself, does not count mapped files, shared memory or processes that native code
starts; a control group does, and its kernel counter tells a death by memory from any other. With `Delegate=memory` in
the unit the service may make groups below its own. The kernel gives controllers only to groups beside which no process
lives, so the supervisor first moves into a group of its own. Where nothing is delegated there is only the first limit.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
SUPERVISOR = "supervisor"
SLACK_BYTES = 96 * 1024 * 1024
"""What a canary takes before it loads anything (an engine and its libraries), on top of what the candidate may have."""


def _marked(folder: Path) -> bool:
    """Tell whether systemd says that it leaves this group to the service; root may write in any group, but should not."""
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def delegated(root: Path = ROOT, own: Path = OWN, is_delegated: Callable[[Path], bool] = _marked) -> Path | None:
    """Return the group below which this process may limit memory, ready for it; None if there is none.

    Call it before any child is started: they inherit the group in which they are born.
    """
    try:
        line = next((one for one in own.read_text(encoding="utf-8").splitlines() if one.startswith("0::/")), "")
        folder = root / line.removeprefix("0::/")
        if folder.name == SUPERVISOR:  # moved already
            folder = folder.parent
        if not line or not is_delegated(folder):
            return None
        if "memory" not in (folder / "cgroup.controllers").read_text(encoding="ascii").split():
            return None
        (folder / SUPERVISOR).mkdir(exist_ok=True)
        (folder / SUPERVISOR / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        (folder / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
    except OSError as error:
        log.info("memory is not limited by a control group: %s", error)
        return None
    return folder


class Cage:
    """A group with a memory limit, for one process and what it starts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def make(cls, parent: Path | None, name: str, memory_bytes_max: int) -> Cage | None:
        """Make a group below `parent`; None if there is none, or it cannot be."""
        if parent is None or not memory_bytes_max:
            return None
        folder = parent / name
        try:
            folder.mkdir(exist_ok=True)
            (folder / "memory.max").write_text(str(memory_bytes_max + SLACK_BYTES), encoding="ascii")
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0", encoding="ascii")
        except OSError as error:
            log.info("no control group for %s: %s", name, error)
            return None
        return cls(folder)

    def add(self, pid: int) -> None:
        """Move a process in; it must not have begun what is to be limited."""
        try:
            (self._folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:  # dead already, which its parent notices
            log.info("process %d is not in its control group: %s", pid, error)

    def out_of_memory(self) -> bool:
        """Tell whether the kernel ended a process in it for its memory."""
        try:
            lines = (self._folder / "memory.events").read_text(encoding="ascii").splitlines()
        except OSError:
            return False
        return any(line.startswith("oom_kill ") and int(line.split()[1]) > 0 for line in lines)

    def remove(self) -> None:
        """Remove the group; its processes have ended."""
        try:
            self._folder.rmdir()
        except OSError as error:
            log.info("a control group stays: %s", error)
