"""The scrub: are the files of trusted versions still what was verified? Read at a bounded rate, and set aside if not.

A file that is set aside keeps its bytes under another name until the right ones are here again, for a person to look at;
nobody loads it. What is missing counts as altered, and so does a content key of what is encrypted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from wherry_agent import identity
from wherry_agent.children import Loadable, Scrub, Scrubbed, ScrubbedVersion
from wherry_agent.device_keys import DeviceKeys
from wherry_agent.disk import Disk
from wherry_agent.rate import Bucket
from wherry_agent.store import Store
from wherry_shared import limits
from wherry_shared.bundle import Config, parse_config
from wherry_shared.digest import CHUNK_BYTES, hex_of, of_bytes
from wherry_shared.errors import WherryError

SCRUB_BYTES_PER_S = 8 * limits.MIB
"""Slow enough for an SD card that something else is read from."""

Sleep = Callable[[float], None]


def scrub(task: Scrub, disk: Disk, *, sleep: Sleep = time.sleep) -> Scrubbed:
    """Look at every file of the versions in `task`.

    Raises:
        DeviceError: `disk` or `read_only`, what was altered could not be set aside.
    """
    store = Store(Path(task.home), disk)
    keys = DeviceKeys(Path(task.home), identity.content_password(disk.seal))
    bucket = Bucket(SCRUB_BYTES_PER_S, time.monotonic())
    found: dict[str, str] = {}
    """Digest → what is wrong with its file, empty if nothing is."""
    total = 0
    altered: list[ScrubbedVersion] = []
    for loadable in task.versions:
        details = []
        for digest in sorted(loadable.digests):
            if digest not in found:
                path = store.path_of(digest)
                found[digest], count = _look(path, digest, bucket, sleep)
                total += count
                if found[digest] and path.exists():
                    store.set_aside(digest)
            if found[digest]:
                details.append(found[digest])
        if not details and loadable.encrypted:
            details = [f"there is no content key for {blob}" for blob in sorted(_closed(keys, loadable))]
        if not details and loadable.assets_path:
            folder, details = altered_assets(store, loadable)
            if folder and details:
                store.spoil_assets(folder)
        if details:
            altered.append(
                ScrubbedVersion(
                    model=loadable.model,
                    manifest=loadable.manifest,
                    variant=loadable.variant,
                    detail="; ".join(details)[: limits.REPORT_DETAIL_CHARS_MAX],
                )
            )
    return Scrubbed(bytes=total, altered=altered)


def _closed(keys: DeviceKeys, loadable: Loadable) -> set[str]:
    """Return the encrypted blobs of a version that this device could not open the next time it loads them."""
    named = {loadable.at_rest} if loadable.at_rest else set()
    if loadable.golden_plain:
        named.add(f"sha256:{Path(loadable.golden_path).name}")
    return {blob for blob in named if not keys.opens(blob)}


def _look(path: Path, digest: str, bucket: Bucket, sleep: Sleep) -> tuple[str, int]:
    """Return (what is wrong, bytes read)."""
    sha, count = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha.update(chunk)
                count += len(chunk)
                sleep(bucket.take(len(chunk), time.monotonic()))
    except FileNotFoundError:
        return f"{digest} is missing", count
    except OSError as error:
        return f"{digest} cannot be read: {error.strerror or error}", count
    return ("" if sha.hexdigest() == hex_of(digest) else f"{digest} has other bytes"), count


def altered_assets(store: Store, loadable: Loadable) -> tuple[str, list[str]]:
    """Compare unpacked assets with what the config declares; return the digest that names their folder, and what is wrong."""
    try:
        config: Config = parse_config(Path(loadable.config_path).read_bytes())
    except (OSError, WherryError) as error:
        return "", [f"the config cannot be read: {error}"]
    if config.assets is None:
        return "", []
    folder = store.assets_of(config.assets.digest)
    wrong = []
    for asset in config.assets.files:
        try:
            if of_bytes((folder / asset.path).read_bytes()) != asset.digest:
                wrong.append(f"asset {asset.path} has other bytes")
        except OSError as error:
            wrong.append(f"asset {asset.path} cannot be read: {error.strerror or error}")
    return config.assets.digest, wrong
