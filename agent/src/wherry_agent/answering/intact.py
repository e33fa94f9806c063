"""Bytes are hashed where they are about to be used: what the courier verified once, the disk may have altered since.

A file that is not what its digest says is refused with `digest_mismatch`: trouble of this device's disk, never evidence
against the variant. Weights are hashed once per process and file; a file that was written to since has another key.
What changes a file between this look and the engine's own can change the engine as well: that is not guarded against.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from wherry_agent.children import Loadable
from wherry_shared import reasons
from wherry_shared.digest import is_digest, of_bytes
from wherry_shared.engines.canonical import Bound, open_bound
from wherry_shared.engines.session import EngineLimits
from wherry_shared.errors import DeviceError, RefusedError


class Unlocking:
    """What this process got from the supervisor to open the device's own keys with, for what is encrypted."""

    password = ""


_known: set[tuple[str, int, int, int, int, int]] = set()
"""(digest, device, inode, mtime, ctime, size) of files that this process found to be what they should be."""


def open_variant(loadable: Loadable, limits: EngineLimits | None = None) -> Bound:
    """Load a variant whose file was looked at (`check_weights`); one that is encrypted is decrypted in memory only.

    Raises:
        DeviceError: `key_missing`, or `disk`.
        RefusedError: `tiles_invalid`, it was encrypted wrongly.
        WherryError: see `open_bound`.
    """
    if not loadable.at_rest:
        return open_bound(loadable, limits)
    from wherry_agent.device_keys import open_blob  # what is not encrypted needs no cryptography

    return open_bound(
        loadable, limits, data=open_blob(Path(loadable.path), loadable.digest, password=Unlocking.password)
    )


def check_weights(loadable: Loadable) -> None:
    """Make sure that the file of a variant still is what was verified.

    Raises:
        DeviceError: `digest_mismatch`, or `disk` if it cannot be read.
    """
    try:
        with Path(loadable.path).open("rb") as file:
            found = os.fstat(file.fileno())
            key = (loadable.stored, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
            if key in _known:
                return
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(f"the weights {loadable.stored}", error) from error
    if digest != loadable.stored:
        raise _altered("weights", loadable.stored, digest)
    _known.add(key)


def read_golden_bytes(loadable: Loadable, bytes_max: int) -> bytes:
    """Read the golden vectors of a variant; the store names their file by their digest.

    Raises:
        DeviceError: `digest_mismatch`, `disk` if they cannot be read, or `key_missing` if they are encrypted.
        RefusedError: `golden_too_large`, `tiles_invalid`.
    """
    path = Path(loadable.golden_path)
    wanted = f"sha256:{path.name}"
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise _unreadable("golden vectors", error) from error
    if len(data) > bytes_max:
        raise RefusedError("golden_too_large", f"golden vectors have more than {bytes_max} bytes")
    if not is_digest(wanted) or of_bytes(data) != wanted:
        raise _altered("golden vectors", wanted, of_bytes(data))
    if loadable.golden_plain:
        from wherry_agent.device_keys import open_blob

        return open_blob(path, loadable.golden_plain, bytes_max, password=Unlocking.password)
    return data


def _altered(what: str, wanted: str, found: str) -> DeviceError:
    return DeviceError(
        reasons.DIGEST_MISMATCH,
        f"{what} were altered on this device: expected {wanted}, found {found}",
        consequence="they are not used",
        next_step="check the disk, and who may write to the store",
    )


def _unreadable(what: str, error: OSError) -> DeviceError:
    return DeviceError(
        reasons.DISK,
        f"{what} cannot be read: {error.strerror or error}",
        consequence="they are not used",
        next_step="check the disk",
    )
