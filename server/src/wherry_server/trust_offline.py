"""What the offline roles, root and targets, may say next: judged without a disk, a private key or a clock.

The people of a ceremony and the server ask the same questions here, so that nobody signs what the server would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, Key, Metadata, Root, Targets, VerificationResult

from wherry_server import trust_rules as rules
from wherry_shared import ids, key_files
from wherry_shared.errors import RefusedError

OFFLINE_LIFE = timedelta(days=365)
DIRECTOR_TARGET = "director.json"
DIRECTOR_KEYS_MAX = 16
"""As many as a device reads."""
MODELS_MAX = 1000
PUBLISHERS_MAX = 128
_BIN_LIKE = re.compile(r".*-[0-9a-f]{1,2}")


@dataclass(frozen=True)
class Need:
    """Signatures that one set of keys owes a document."""

    role: str
    by: str
    """Whose keys: `root`, `targets`, or `root before` for the keys that the new root replaces."""
    threshold: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether enough have signed."""
        return len(self.signed) >= self.threshold


def needs(root: Metadata[Root] | None, before: Root | None, targets: Metadata[Targets] | None) -> list[Need]:
    """Return who has signed a pending root and pending targets, and who has not.

    Args:
        root: the root that is to hold, or that holds.
        before: the root that it replaces; None: it replaces none, or nothing changes.
        targets: targets that are to hold.
    """
    found: list[Need] = []
    if root is not None and before is not None and root.signed.version != before.version:
        result = before.get_verification_result(Root.type, root.signed_bytes, root.signatures)
        found.append(_need(Root.type, "root before", result))
    if root is not None and (before is None or root.signed.version != before.version):
        result = root.signed.get_verification_result(Root.type, root.signed_bytes, root.signatures)
        found.append(_need(Root.type, Root.type, result))
    keeper = root.signed if root is not None else before
    if targets is not None and keeper is not None:
        result = keeper.get_verification_result(Targets.type, targets.signed_bytes, targets.signatures)
        found.append(_need(Targets.type, Targets.type, result))
    return found


def check_signed(found: Sequence[Need]) -> None:
    """Refuse what too few have signed.

    Raises:
        RefusedError: `signatures_missing`.
    """
    for need in found:
        if not need.met:
            raise RefusedError(
                "signatures_missing",
                f"{need.role} has {len(need.signed)} of {need.threshold} signatures of the {need.by} keys",
                consequence="nothing was changed",
                next_step="have it signed by another holder: wherry trust sign FOLDER --key FILE",
            )


def check_root(before: Root | None, root: Root, now: datetime) -> None:
    """Check what a root says.

    Raises:
        RefusedError: `root_version`, `root_life` or `root_invalid`.
    """
    version = before.version if before is not None else 0
    if root.version != version + 1:
        raise RefusedError("root_version", f"root version {root.version}, version {version + 1} is next")
    _check_life(Root.type, root.expires, now)
    if not root.consistent_snapshot:
        raise RefusedError("root_invalid", "a root without consistent snapshots")
    for name, role in root.roles.items():
        if not 1 <= role.threshold <= len(role.keyids):
            raise RefusedError(
                "root_invalid", f"{name} has {len(role.keyids)} keys and a threshold of {role.threshold}"
            )
    online = {keyid for name in ("snapshot", "timestamp") for keyid in root.roles[name].keyids}
    offline = {keyid for name in (Root.type, Targets.type) for keyid in root.roles[name].keyids}
    if online & offline and root.roles[Root.type].threshold > 1:
        raise RefusedError("root_invalid", "a key that the server holds would sign root or targets")


def check_targets(before: Targets | None, targets: Targets, now: datetime) -> None:
    """Check what the targets role says: a director, and publishers that do not get into each other's way.

    Raises:
        RefusedError: `targets_version`, `targets_life`, `targets_invalid`, `model_taken`, `bins_exhausted`, …
    """
    version = before.version if before is not None else 0
    if not version < targets.version <= version + rules.VERSION_STEP_MAX:
        raise RefusedError("targets_version", f"targets version {targets.version}, version {version + 1} is next")
    _check_life(Targets.type, targets.expires, now)
    if set(targets.targets) != {DIRECTOR_TARGET}:
        raise RefusedError("targets_invalid", f"the targets role names {DIRECTOR_TARGET} and nothing else")
    keys = director_keys(targets)
    if not 1 <= len(keys) <= DIRECTOR_KEYS_MAX:
        raise RefusedError("targets_invalid", f"{len(keys)} director keys, expected 1 to {DIRECTOR_KEYS_MAX}")
    for keyid, pem in keys.items():
        key = key_files.parse_public(pem)
        if key.keytype != "ed25519" or key.keyid != keyid:
            raise RefusedError("targets_invalid", f"director key {keyid[:64]} is not what it is called")
    taken: dict[str, str] = {}
    bins = 0
    for publisher in publishers(targets):
        for model in publisher.models:
            if model in taken:
                raise RefusedError("model_taken", f"{model} is published by {taken[model]} and by {publisher.name}")
            taken[model] = publisher.name
        bins += publisher.bins
    if bins > rules.BINS_PER_PROJECT:
        raise RefusedError("bins_exhausted", f"publishers would have {bins} bins, at most {rules.BINS_PER_PROJECT}")


def publishers(targets: Targets) -> list[rules.Publisher]:
    """Return whom targets delegate to, each checked by itself.

    Raises:
        RefusedError: `targets_invalid`, `bad_name`, `bad_threshold` or `models_too_many`.
    """
    return list(_publishers(targets))


def _publishers(targets: Targets) -> Iterator[rules.Publisher]:
    delegations = targets.delegations
    if delegations is None:
        return
    if delegations.succinct_roles is not None or len(delegations.roles or {}) > PUBLISHERS_MAX:
        raise RefusedError("targets_invalid", f"targets delegate to at most {PUBLISHERS_MAX} publishers by name")
    for name, role in (delegations.roles or {}).items():
        paths = role.paths or []
        if not all(isinstance(text, str) for text in (name, *paths, *role.keyids)):
            raise RefusedError("targets_invalid", f"{name!r} is delegated to by something that is no text")
        check_publisher_name(name)
        if not role.terminating or not paths or not all(path.endswith("/*") for path in paths):
            raise RefusedError("targets_invalid", f"{name} must be terminating, with paths MODEL/*")
        for path in paths:
            ids.check_name(path.removesuffix("/*"), "model")
        if len(paths) > MODELS_MAX:
            raise RefusedError("models_too_many", f"{len(paths)} models, at most {MODELS_MAX} for a publisher")
        if not 1 <= role.threshold <= len(role.keyids):
            raise RefusedError("bad_threshold", f"threshold {role.threshold} with {len(role.keyids)} keys")
        own = role.unrecognized_fields.get("wherry", {})
        bits = own.get("bits") if isinstance(own, dict) else None
        if not isinstance(bits, int) or not 1 <= bits <= rules.BITS_MAX:
            raise RefusedError("targets_invalid", f"{name} must have 2^1 to 2^{rules.BITS_MAX} bins")
        yield rules.publisher_of(role)


def check_publisher_name(name: str) -> None:
    """Refuse what would be mistaken for another role.

    Raises:
        RefusedError: `bad_name`.
    """
    ids.check_name(name, "publisher")
    if name in TOP_LEVEL_ROLE_NAMES or _BIN_LIKE.fullmatch(name):
        raise RefusedError("bad_name", f"publisher {name!r} would be mistaken for another role")


def director_keys(targets: Targets) -> dict[str, str]:
    """Return key id → PEM of the keys that may sign offers.

    Raises:
        RefusedError: `targets_invalid`.
    """
    target = targets.targets.get(DIRECTOR_TARGET)
    own: Any = target.unrecognized_fields.get("custom", {}) if target is not None else {}
    own = own.get("wherry") if isinstance(own, dict) else None
    keys = own.get("keys") if isinstance(own, dict) and own.get("format") == rules.FORMAT else None
    if not isinstance(keys, dict) or not all(isinstance(pem, str) for pem in keys.values()):
        raise RefusedError("targets_invalid", f"{DIRECTOR_TARGET} names no director keys")
    return keys


def name_of(key: Key) -> str:
    """Return a key for people: kind and the beginning of its id."""
    return f"{key.keytype} {key.keyid[:12]}"


def _need(role: str, by: str, result: VerificationResult) -> Need:
    return Need(role, by, result.threshold, tuple(sorted(result.signed)), tuple(sorted(result.unsigned)))


def _check_life(role: str, expires: datetime, now: datetime) -> None:
    if expires <= now:
        raise RefusedError(f"{role}_life", f"{role} expired at {expires}", next_step="prepare it again")
    if expires > now + OFFLINE_LIFE + rules.LIFE_SLACK:
        raise RefusedError(f"{role}_life", f"{role} would live until {expires}, at most {OFFLINE_LIFE.days} days")
