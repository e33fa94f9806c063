"""Names and numbers by which things are known: device ids, model names, versions, share keys."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import NamedTuple

from wherry_shared.errors import RefusedError

_DEVICE = re.compile(r"[A-Za-z0-9_-]{22}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_SEMVER = re.compile(
    r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})"
    r"(?:-((?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*)(?:\.(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*))*))?"
)
_KEYS = 1 << 64
RESERVED_VERSIONS = frozenset({"policy"})


def new_device_id() -> str:
    """Mint a device id: 22 characters of `[A-Za-z0-9_-]`, 128 random bits."""
    return secrets.token_urlsafe(16)


def is_device_id(text: str) -> bool:
    """Tell whether `text` has the shape of a device id."""
    return _DEVICE.fullmatch(text) is not None


def check_name(text: str, what: str = "name") -> str:
    """Return `text` if it may name a model, project, cohort or variant.

    Raises:
        RefusedError: `bad_name`, unless it is 1 to 64 of `[a-z0-9-]`, not starting or ending with a dash.
    """
    if _NAME.fullmatch(text) is None:
        raise RefusedError(
            "bad_name",
            f"{what} {text[:80]!r} is not 1 to 64 lower-case letters, digits and inner dashes",
            next_step="choose a name such as defect-detector",
        )
    return text


class Version(NamedTuple):
    """A SemVer version, ordered by SemVer's precedence (clause 11). Build metadata is refused: it has no order."""

    major: int
    minor: int
    patch: int
    prerelease: tuple[tuple[int, int, str], ...]
    """Empty for a release; then it sorts after every pre-release, see `key`."""

    @property
    def key(self) -> tuple[int, int, int, bool, tuple[tuple[int, int, str], ...]]:
        """A sort key: compare versions by this."""
        return (self.major, self.minor, self.patch, not self.prerelease, self.prerelease)


def parse_version(text: str) -> Version:
    """Parse a SemVer version such as `1.4.0` or `2.0.0-rc.1`.

    Raises:
        RefusedError: `bad_version`.
    """
    match = _SEMVER.fullmatch(text)
    if match is None or len(text) > 64:
        raise RefusedError(
            "bad_version", f"version {text[:80]!r} is not SemVer", next_step="write it as MAJOR.MINOR.PATCH, e.g. 1.4.0"
        )
    parts: list[tuple[int, int, str]] = []
    for part in (match[4] or "").split(".") if match[4] else []:
        parts.append((0, int(part), "") if part.isdigit() else (1, 0, part))
    return Version(int(match[1]), int(match[2]), int(match[3]), tuple(parts))


def target_path(model: str, version: str) -> str:
    """Return the TUF target path of a bundle: exactly two parts, since TUF patterns match one level.

    Raises:
        RefusedError: `bad_name` or `bad_version`.
    """
    check_name(model, "model")
    parse_version(version)
    return f"{model}/{version}"


def split_target(path: str) -> tuple[str, str]:
    """Return (model, version) of a target path.

    Raises:
        RefusedError: `bad_target`, `bad_name` or `bad_version`.
    """
    parts = path.split("/")
    if len(parts) != 2:
        raise RefusedError("bad_target", f"target {path[:120]!r} is not MODEL/VERSION")
    check_name(parts[0], "model")
    parse_version(parts[1])
    return parts[0], parts[1]


def share_key(salt: str, unit: str) -> int:
    """Return the 64-bit key by which `unit` (a device, a request) falls into shares of `salt` (a rollout).

    The key is uniform over [0, 2**64) and independent between salts, so shares nest (5 % is inside 25 %) and two
    rollouts do not burden the same devices first.
    """
    digest = hashlib.blake2b(unit.encode(), digest_size=8, key=hashlib.sha256(salt.encode()).digest()).digest()
    return int.from_bytes(digest, "big")


def in_share(salt: str, unit: str, share: float) -> bool:
    """Tell whether `unit` is among the share (0 to 1) of all units that `salt` picks first: the same units each time."""
    return share_key(salt, unit) < share * _KEYS


def shard(device: str) -> str:
    """Return the topic shard of a device: two hex digits of its hash."""
    return hashlib.sha256(device.encode()).hexdigest()[:2]
