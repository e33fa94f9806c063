"""Create-only objects in a folder: a name is written once, durably, and never means other bytes afterwards.

Several processes share the folder. Writers hold `locked()`; readers need no lock, since an object appears whole (hard
link of a synced file) or not at all. Every writer ends by changing the token in `generation`, so that a reader knows by
one small read whether its index of highest versions still holds. The token need not survive a power cut: no index does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from wherry_shared.errors import RefusedError

_VERSIONED = re.compile(r"([1-9][0-9]{0,14})\.([a-z0-9][a-z0-9-]{0,70})\.json")
_KEPT = {"timestamp": 16, "snapshot": 256}
"""Superseded versions of online roles that stay, for clients in the middle of a refresh; other roles keep all."""


def split_name(name: str) -> tuple[int, str] | None:
    """Return (version, role) of `N.ROLE.json`, or None if that is not what `name` is."""
    match = _VERSIONED.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


class Objects:
    """Versioned metadata files of one TUF repository."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock_path = folder.parent / "lock"
        self._generation_path = folder.parent / "generation"
        self._known: tuple[bytes, dict[str, int]] | None = None
        self._writer = 0
        self._held: dict[str, int] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out, in this process and in others; not reentrant."""
        with self._lock_path.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._held = self._scan()
            before = dict(self._held)
            self._writer = threading.get_ident()
            try:
                yield
            finally:
                self._writer = 0
                if self._held != before:
                    self._prune(self._held)
                    scratch = self._generation_path.with_name(f".generation.{secrets.token_hex(6)}")
                    scratch.write_bytes(secrets.token_bytes(16))
                    scratch.replace(self._generation_path)

    def highest(self) -> dict[str, int]:
        """Return the highest version of each role."""
        if self._writer == threading.get_ident():
            return self._held
        try:
            generation = self._generation_path.read_bytes()
        except FileNotFoundError:
            return self._scan()
        known = self._known
        if known is None or known[0] != generation:
            known = self._known = (generation, self._scan())
        return known[1]

    def _scan(self) -> dict[str, int]:
        highest: dict[str, int] = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                parts = split_name(entry.name)
                if parts is not None:
                    highest[parts[1]] = max(highest.get(parts[1], 0), parts[0])
        return highest

    def _prune(self, highest: dict[str, int]) -> None:
        for role, kept in _KEPT.items():
            versions = sorted(
                parts[0] for path in self._folder.glob(f"*.{role}.json") if (parts := split_name(path.name)) is not None
            )
            for version in versions[:-kept]:
                assert version < highest[role]
                (self._folder / f"{version}.{role}.json").unlink()

    def get(self, version: int, role: str) -> bytes:
        """Return an object.

        Raises:
            RefusedError: `metadata_unknown`.
        """
        try:
            return (self._folder / f"{version}.{role}.json").read_bytes()
        except FileNotFoundError as error:
            raise RefusedError("metadata_unknown", f"there is no version {version} of {role}") from error

    def put(self, version: int, role: str, data: bytes) -> None:
        """Create an object, durably. Call it inside `locked()`.

        Raises:
            RefusedError: `metadata_taken`, if the name already means other bytes.
        """
        name = f"{version}.{role}.json"
        if split_name(name) is None:
            raise RefusedError("metadata_unknown", f"{name[:120]!r} cannot name metadata")
        final = self._folder / name
        try:
            create_file(final, data, mode=0o644)
        except FileExistsError as error:
            if final.read_bytes() != data:
                raise RefusedError("metadata_taken", f"{name} is already bound to other bytes") from error
        self._held[role] = max(self._held.get(role, 0), version)


def create_file(path: Path, data: bytes, *, mode: int) -> None:
    """Create a file that is either whole and synced or not there.

    Raises:
        FileExistsError: it is there already.
    """
    scratch = write_scratch(path, data, mode)
    try:
        os.link(scratch, path)
    finally:
        scratch.unlink()
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes, *, mode: int) -> None:
    """Replace a file atomically and durably."""
    write_scratch(path, data, mode).replace(path)
    sync_folder(path.parent)


def write_scratch(path: Path, data: bytes, mode: int) -> Path:
    """Write and sync `data` beside `path` under a hidden name of its own."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        scratch.unlink()
        raise
    return scratch


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
