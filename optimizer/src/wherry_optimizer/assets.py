"""The assets layer: files that belong to exactly one version (thresholds, anchors, notes), as one reproducible tar.

The same files give the same bytes: names in order, no times, no owners.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from wherry_shared import digest, limits
from wherry_shared.bundle import Asset, Assets
from wherry_shared.errors import RefusedError


def named(texts: list[str]) -> dict[str, Path]:
    """Return name → file from `FILE` (under its own name) or `NAME=FILE`.

    Raises:
        RefusedError: `assets_invalid`, a name appears twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        name, file = (name, Path(path)) if equals else (Path(text).name, Path(text))
        if name in found:
            raise _invalid(f"two assets are called {name!r}")
        found[name] = file
    return found


def layer(files: Mapping[str, Path]) -> tuple[Assets, bytes]:
    """Return the description of an assets layer, and its bytes.

    Raises:
        RefusedError: `assets_invalid`: a file is missing or is called what no device would unpack, or it is all too much.
    """
    if len(files) > limits.ASSETS_FILES_MAX:
        raise _invalid(f"{len(files)} assets, at most {limits.ASSETS_FILES_MAX}")
    listed: list[Asset] = []
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            _check_name(name)
            try:
                data = files[name].read_bytes()
            except OSError as error:
                raise _invalid(f"asset {name!r}: {files[name]}: {error.strerror}") from error
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
            listed.append(Asset(path=name, digest=digest.of_bytes(data), bytes=len(data)))
            if out.tell() > limits.ASSETS_BYTES_MAX:
                raise _invalid(f"assets of more than {limits.ASSETS_BYTES_MAX} bytes")
    packed = out.getvalue()
    return Assets(digest=digest.of_bytes(packed), bytes=len(packed), files=listed), packed


def _check_name(name: str) -> None:
    if (
        not name
        or len(name) > limits.ASSET_PATH_CHARS_MAX
        or any(part in ("", ".", "..") for part in name.split("/"))
        or name.startswith(".complete")
        or "\\" in name
        or not name.isprintable()
    ):
        raise _invalid(f"an asset cannot be called {name[:120]!r}")


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "assets_invalid", why, consequence="nothing was packed", next_step="name other files by --asset"
    )
