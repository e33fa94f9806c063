"""`wherry-agent tuf init|refresh|download`: the device's TUF client by itself, for the public conformance suite.

The arguments are those of the suite's client protocol (theupdateframework/tuf-conformance, CLIENT-CLI.md). What verifies
here is what verifies on a device (`trust`); what differs is the layout on disk: one folder with the names of the TUF
specification, believed as it stands, because the suite looks into it. A device believes sets that its journal names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from tuf.api import exceptions
from tuf.api.metadata import Root, TargetFile
from tuf.ngclient import UpdaterConfig

from wherry_agent.courier_http import Http, Response
from wherry_agent.disk import Disk, device_error
from wherry_agent.trust import Online, border, open_updater
from wherry_shared import limits, reasons
from wherry_shared.errors import RefusedError, UnreachableError

ANCHOR = "trusted-root"
"""The root that `init` was given, in the metadata folder: the only anchor, never replaced."""
CONFIG = UpdaterConfig(
    root_max_length=limits.TUF_ROOT_BYTES_MAX,
    snapshot_max_length=limits.TUF_METADATA_BYTES_MAX,
    targets_max_length=limits.TUF_METADATA_BYTES_MAX,
)
"""Bounds on bytes as on a device; roots and delegations to follow as the suite expects, which tries deep graphs."""
URL_SAFE = "/%!$&'()*+,;=:@~"
"""A target path is a URL path already (TUF 4.5); only what no URL may hold is quoted."""
TRIES_MAX = 5
"""How often a download that broke off is taken up again."""


def init(metadata: Path, trusted_root: Path) -> None:
    """Trust a root; nothing is asked of anybody.

    Raises:
        RefusedError: `trust_invalid`, if it is no root.
        DeviceError: `disk` or `disk_full`.
    """
    try:
        with trusted_root.open("rb") as file:
            data = file.read(limits.TUF_ROOT_BYTES_MAX + 1)
    except OSError as error:
        raise device_error(error, str(trusted_root)) from error
    if len(data) > limits.TUF_ROOT_BYTES_MAX:
        raise RefusedError(reasons.TRUST_INVALID, f"a root has at most {limits.TUF_ROOT_BYTES_MAX} bytes")
    metadata.mkdir(parents=True, exist_ok=True)
    with border():
        open_updater(metadata, "http://127.0.0.1/", Online(Http(), metadata), data, CONFIG)
    Disk().write_atomic(metadata / ANCHOR, data)


def refresh(metadata: Path, url: str) -> None:
    """Update the top-level metadata.

    Raises:
        RefusedError: `trust_expired`, `trust_rollback` or `trust_invalid`.
        UnreachableError: `network`.
    """
    with border():
        open_updater(metadata, url, Online(Http(), metadata), _anchor(metadata), CONFIG).refresh()


def download(metadata: Path, url: str, name: str, base: str, folder: Path) -> bool:
    """Have a target in `folder`; False if it was there already.

    Raises:
        RefusedError: `trust_*`, `trust_unsigned` if no role names the target, `digest_mismatch`.
        UnreachableError: `network`; what came is kept, and the next call goes on from there.
        DeviceError: `disk` or `disk_full`.
    """
    http = Http()
    with border():
        updater = open_updater(metadata, url, Online(http, metadata), _anchor(metadata), CONFIG)
        target = updater.get_targetinfo(name)
    if target is None:
        raise RefusedError(reasons.TRUST_UNSIGNED, f"no role names {name[:200]}")
    root = updater.verified()[Root.type]
    assert isinstance(root, Root)
    final = folder / quote(name, safe="")
    if _matches(target, final):
        return False
    path = name
    if root.consistent_snapshot:
        parent, slash, last = name.rpartition("/")
        path = f"{parent}{slash}{next(iter(target.hashes.values()))}.{last}"
    source = f"{base.rstrip('/')}/{quote(path, safe=URL_SAFE)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _bring(http, source, target, final)
    except OSError as error:
        raise device_error(error, str(folder)) from error
    return True


def _bring(http: Http, source: str, target: TargetFile, final: Path) -> None:
    """Download into a hidden file beside `final`, going on where an earlier try ended; it becomes `final` once verified."""
    partial = final.with_name(f".{next(iter(target.hashes.values()))[:64]}.part")
    trouble = ""
    for _ in range(TRIES_MAX):
        have = partial.stat().st_size if partial.exists() else 0
        if have < target.length:
            try:
                _append(http, source, partial, have, target.length)
            except UnreachableError as error:
                trouble = error.message
        if partial.exists() and partial.stat().st_size >= target.length:
            break
    else:
        raise UnreachableError(reasons.NETWORK, trouble or f"{source} has fewer than {target.length} bytes")
    if not _matches(target, partial):
        partial.unlink()
        raise RefusedError(reasons.DIGEST_MISMATCH, f"{source} is not what its metadata say")
    disk = Disk()
    disk.sync_file(partial)
    disk.rename(partial, final)


def _append(http: Http, source: str, partial: Path, have: int, length: int) -> None:
    headers = {"Range": f"bytes={have}-"} if have else {}
    with http.request("GET", source, headers=headers) as answer, _opened(answer, partial, have) as file:
        left = length - file.tell()
        for chunk in answer.chunks():
            if len(chunk) > left:
                partial.unlink()  # more than was promised: none of it is believed
                raise RefusedError(reasons.DIGEST_MISMATCH, f"{source} has more than {length} bytes")
            file.write(chunk)
            left -= len(chunk)


@contextlib.contextmanager
def _opened(answer: Response, partial: Path, have: int) -> Iterator[BinaryIO]:
    """Open the partial file where the answer goes on: at `have` if the source obeyed the range, else at the start."""
    if answer.status not in (200, 206):
        raise UnreachableError(reasons.NETWORK, f"{answer.url}: {answer.status}")
    resumed = answer.status == 206 and answer.header("Content-Range").startswith(f"bytes {have}-")
    if answer.status == 206 and not resumed:
        raise UnreachableError(reasons.NETWORK, f"{answer.url} answered another range than was asked for")
    with partial.open("r+b" if resumed else "wb") as file:
        file.seek(have if resumed else 0)
        yield file


def _matches(target: TargetFile, path: Path) -> bool:
    try:
        with path.open("rb") as file:
            target.verify_length_and_hashes(file)
    except (FileNotFoundError, exceptions.LengthOrHashMismatchError):
        return False
    return True


def _anchor(metadata: Path) -> bytes:
    try:
        return (metadata / ANCHOR).read_bytes()
    except FileNotFoundError as error:
        raise RefusedError(
            reasons.TRUST_INVALID,
            f"{metadata} has no trusted root",
            next_step="begin with: wherry-agent tuf --metadata-dir DIR init ROOT.json",
        ) from error
