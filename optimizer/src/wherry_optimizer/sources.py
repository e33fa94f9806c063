"""Where files of installed distributions are, without importing the package that they belong to."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from wherry_shared.errors import RefusedError


def locate(path: str, *, distribution: str, version: str, folder: Path, what: str) -> Path:
    """Return the file `path`: relative to `folder`, or to the place where `distribution` is installed.

    Raises:
        RefusedError: `source_missing` (with how to install it) or `source_version`.
    """
    if not distribution:
        return folder / path
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        wanted = f"{distribution}=={version}" if version else distribution
        raise RefusedError(
            "source_missing", f"{what} comes with {distribution}, which is not installed", next_step=f"install {wanted}"
        ) from error
    if version and found.version != version:
        raise RefusedError(
            "source_version",
            f"{what} was chosen from {distribution} {version}, installed is {found.version}",
            next_step=f"install {distribution}=={version}, or check the recipe against the new model",
        )
    for file in found.files or []:
        if str(file) == path or (Path(path).name == path and file.name == path):
            return Path(str(file.locate()))
    raise RefusedError(
        "source_missing",
        f"{distribution} {found.version} has no file {path}",
        consequence="nothing was built",
        next_step="correct sources.<name>.path, or install the version of the distribution that has it",
    )
