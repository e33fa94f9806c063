"""Wheels of what a device installs, made from what is installed beside this server: nothing to build, nothing to upload.

A device gets `wherry-agent` and `wherry-shared` of the very release that its server runs. Their metadata are those of this
installation, in which a sibling may stand by its folder: in the wheel it stands by its version. Other wheels come from the folder
`wheels` of the data folder, for devices without a package index.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
import zipfile
from importlib import metadata
from pathlib import Path

from wherry_shared.errors import DeviceError

MEMBERS = ("wherry-shared", "wherry-agent")
NAME = re.compile(r"[A-Za-z0-9_.+!-]{1,200}\.whl")
_SIBLING = re.compile(r"^(Requires-Dist: (wherry-[a-z]+)) @ [^;\n]*?((?: ;[^\n]*)?)$", re.MULTILINE)
_DATE = (2020, 1, 1, 0, 0, 0)
"""Of every file in a wheel, so that the same release gives the same bytes."""


@functools.cache
def own() -> dict[str, bytes]:
    """Return the wheels of the members that a device installs: name → bytes.

    Raises:
        DeviceError: `wheels_missing`, if they are not installed beside this server.
    """
    return dict(_member(name) for name in MEMBERS)


def offered(folder: Path) -> dict[str, str]:
    """Return all wheels: name → SHA-256 in hex."""
    found = {name: hashlib.sha256(data).hexdigest() for name, data in own().items()}
    for path in sorted(folder.glob("*.whl")) if folder.is_dir() else []:
        with path.open("rb") as file:
            found.setdefault(path.name, hashlib.file_digest(file, "sha256").hexdigest())
    return found


def _member(name: str) -> tuple[str, bytes]:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise _missing(name) from error
    module, version = name.replace("-", "_"), distribution.version
    folder = _package(distribution, module)
    info = f"{module}-{version}.dist-info"
    text = distribution.read_text("METADATA") or ""
    files = {
        f"{module}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files[f"{info}/METADATA"] = _SIBLING.sub(rf"\1=={version}\3", text).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: wherry\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    return f"{module}-{version}-py3-none-any.whl", pack(files, info)


def _package(distribution: metadata.Distribution, module: str) -> Path:
    """Find the folder of a package, which an editable installation names in a `.pth` file."""
    beside = Path(str(distribution.locate_file(module)))
    places = [beside]
    for file in distribution.files or []:
        if file.suffix == ".pth":
            lines = Path(str(distribution.locate_file(file))).read_text().splitlines()
            places += [Path(line) / module for line in lines if line.startswith("/")]
    for place in places:
        if (place / "__init__.py").is_file():
            return place
    raise _missing(distribution.name)


def pack(files: dict[str, bytes], info: str) -> bytes:
    """Put files into a wheel, with the record of their digests (binary distribution format, PyPA)."""
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    files = {**files, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,", ""]).encode()}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data)
    return written.getvalue()


def _missing(name: str) -> DeviceError:
    return DeviceError(
        "wheels_missing",
        f"{name} is not installed beside this server, so it has no wheels to give",
        consequence="devices cannot be invited by one line",
        next_step=f"install {name} where the server runs, or install the agent by hand (docs/device.md)",
    )
