"""The private keys of a trust folder, one file per role.

Which files are there says what this machine may do: `targets` and `root` belong offline, `snapshot`, `timestamp` and
`director` to the director role. In development all five are on one machine. A key that is to replace another waits in
`next/` until a ceremony has named it, and then takes the place of the old one.
"""

from __future__ import annotations

import os
from pathlib import Path

from securesystemslib.signer import CryptoSigner

from wherry_shared import key_files
from wherry_shared.errors import RefusedError

ROLES = ("root", "targets", "snapshot", "timestamp", "director")
ONLINE = ("snapshot", "timestamp", "director")
"""Roles whose keys the server holds; the others are held by people."""


class Keys:
    """The keys of a folder, read when they are first used and again when their file was replaced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signers: dict[Path, tuple[tuple[int, int], CryptoSigner]] = {}

    def create(self, roles: tuple[str, ...] = ROLES) -> None:
        """Generate what is not there yet."""
        for role in roles:
            if not self.has(role):
                key_files.create(self.file(role))

    def file(self, role: str) -> Path:
        """Return where the key of `role` is, if it is on this machine."""
        return self._folder / f"{role}.pem"

    def has(self, role: str) -> bool:
        """Tell whether the key of `role` is on this machine."""
        return self.file(role).exists()

    def signer(self, role: str) -> CryptoSigner:
        """Return the key of `role`.

        Raises:
            RefusedError: `key_absent` (not on this machine) or `key_invalid`.
            DeviceError: `key_exposed`, if others can read the file.
        """
        signer = self._load(self.file(role))
        if signer is None:
            raise RefusedError(
                "key_absent", f"the {role} key is not on this machine", next_step="run this where the key is kept"
            )
        return signer

    def waiting(self, role: str) -> CryptoSigner | None:
        """Return the key that waits to replace the one of `role`."""
        return self._load(self._folder / "next" / f"{role}.pem")

    def prepare(self, role: str) -> CryptoSigner:
        """Return the key with which `role` is to go on: its first, or one that waits; made if there is none.

        Raises:
            RefusedError: `key_invalid`.
        """
        if not self.has(role):
            return key_files.create(self.file(role))
        return self.waiting(role) or key_files.create(self._folder / "next" / f"{role}.pem")

    def promote(self, role: str) -> None:
        """Let the key that waits take the place of the old one, which is gone then; its file says since when."""
        waiting = self._folder / "next" / f"{role}.pem"
        os.utime(waiting)
        waiting.replace(self.file(role))
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _load(self, path: Path) -> CryptoSigner | None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        stamp = (status.st_ino, status.st_mtime_ns)
        known = self._signers.get(path)
        if known is None or known[0] != stamp:
            known = self._signers[path] = (stamp, key_files.load(path))
        return known[1]
