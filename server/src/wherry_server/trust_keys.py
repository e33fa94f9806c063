"""The private keys of a trust folder, one file per role.

Which files are there says what this machine may do: `targets` and `root` belong offline, `snapshot`, `timestamp` and
`director` to the director role. In development all five are on one machine.
"""

from __future__ import annotations

from pathlib import Path

from securesystemslib.signer import CryptoSigner

from wherry_shared import key_files
from wherry_shared.errors import RefusedError

ROLES = ("root", "targets", "snapshot", "timestamp", "director")


class Keys:
    """The keys of a folder, read when they are first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signers: dict[str, CryptoSigner] = {}

    def create(self) -> None:
        """Generate what is not there yet."""
        for role in ROLES:
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
        signer = self._signers.get(role)
        if signer is None:
            try:
                signer = self._signers[role] = key_files.load(self.file(role))
            except FileNotFoundError as error:
                raise RefusedError(
                    "key_absent", f"the {role} key is not on this machine", next_step="run this where the key is kept"
                ) from error
        return signer
