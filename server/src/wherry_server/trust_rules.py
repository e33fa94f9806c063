"""What a publisher's metadata may say, judged without a disk, a key file or a clock.

A *bin* holds targets `MODEL/VERSION`; a *publisher role* holds `MODEL/policy` and delegates to its bins. Both are signed
by publishers only. Rules that are Wherry's own, on top of TUF's: the next version replaces exactly the current one, a
(model, version) never changes its digest and never disappears, every target stands where a device will look for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from tuf.api.metadata import DelegatedRole, TargetFile, Targets

from wherry_shared import ids, limits
from wherry_shared.digest import is_digest
from wherry_shared.errors import RefusedError

FORMAT = 1
PUBLISHER_LIFE = timedelta(days=90)
"""Publisher roles and bins (contracts.md §2)."""
LIFE_SLACK = timedelta(days=1)
"""A workstation's clock may run ahead of the server's by this much."""
BINS_PER_PROJECT = 256
"""A device downloads about one bin and the snapshot per look-up; both stay near 7 KB at 10,000 targets."""
BITS_DEFAULT = 5
"""32 bins for a publisher: 8 publishers fill a project. 2 publishers of 128, 4 of 64 or 16 of 16 do as well."""
BITS_MAX = 8
VERSION_STEP_MAX = 10_000
"""A publish steps by one; after a restore from a backup publishers submit again what they kept, which is further on."""
EFFECTS = frozenset({"replace", "stop"})
"""What a revocation does: nobody installs it any more; with `stop` nobody serves it any more either."""
REVOKED_MAX = 1000


@dataclass(frozen=True)
class Publisher:
    """A publisher as the targets role delegates to it."""

    name: str
    models: tuple[str, ...]
    threshold: int
    keyids: tuple[str, ...]
    bits: int

    @property
    def bins(self) -> int:
        """How many bins it may have."""
        return int(2**self.bits)


def publisher_of(role: DelegatedRole) -> Publisher:
    """Read a publisher out of its delegation."""
    own: dict[str, Any] = role.unrecognized_fields.get("wherry", {})
    return Publisher(
        name=role.name,
        models=tuple(path.removesuffix("/*") for path in role.paths or ()),
        threshold=role.threshold,
        keyids=tuple(role.keyids),
        bits=int(own.get("bits", BITS_DEFAULT)),
    )


def manifest_of(target: TargetFile) -> str:
    """Return the manifest digest that a target names.

    Raises:
        RefusedError: `target_invalid`.
    """
    own = target.unrecognized_fields.get("custom", {})
    own = own.get("wherry", {}) if isinstance(own, dict) else {}
    manifest = own.get("manifest", "") if isinstance(own, dict) else ""
    if not isinstance(manifest, str) or not is_digest(manifest) or own.get("format") != FORMAT:
        raise RefusedError("target_invalid", f"target {target.path} carries no manifest digest of format {FORMAT}")
    if target.hashes != {"sha256": manifest[7:]}:
        raise RefusedError("target_invalid", f"target {target.path} has hashes that are not its manifest's")
    if not 0 < target.length <= limits.MANIFEST_BYTES_MAX:
        raise RefusedError("target_invalid", f"target {target.path} claims a manifest of {target.length} bytes")
    return manifest


def check_next(role: str, current: Targets | None, proposed: Targets, now: datetime) -> None:
    """Check what holds for publisher roles and bins alike.

    Raises:
        RefusedError: `bin_version`, `bin_expired` or `bin_life`.
    """
    version = current.version if current else 0
    if not version < proposed.version <= version + VERSION_STEP_MAX:
        raise RefusedError(
            "bin_version",
            f"{role} version {proposed.version} was signed, version {version + 1} is next",
            next_step="sign again",
        )
    if proposed.is_expired(now):
        raise RefusedError("bin_expired", f"{role} expired at {proposed.expires}", next_step="sign again")
    if proposed.expires > now + PUBLISHER_LIFE + LIFE_SLACK:
        raise RefusedError(
            "bin_life", f"{role} would live until {proposed.expires}, at most {PUBLISHER_LIFE.days} days"
        )


def check_bin(role: str, parent: Targets, publisher: Publisher, current: Targets | None, proposed: Targets) -> None:
    """Check the targets of a bin.

    Raises:
        RefusedError: `bin_delegates`, `target_foreign`, `target_misplaced`, `target_rebound`, `target_removed`,
            `target_invalid`, `bad_target`, `bad_name` or `bad_version`.
    """
    if proposed.delegations is not None:
        raise RefusedError("bin_delegates", f"{role} is a bin and delegates to nobody")
    assert parent.delegations is not None
    assert parent.delegations.succinct_roles is not None
    for path, target in proposed.targets.items():
        model, version = ids.split_target(path)
        if model not in publisher.models or version in ids.RESERVED_VERSIONS:
            raise RefusedError("target_foreign", f"{publisher.name} does not publish {path}")
        home = parent.delegations.succinct_roles.get_role_for_target(path)
        if home != role:
            raise RefusedError("target_misplaced", f"target {path} belongs into {home}, not {role}")
        manifest_of(target)
    for path, target in (current.targets if current else {}).items():
        after = proposed.targets.get(path)
        if after is None:
            raise RefusedError(
                "target_removed", f"target {path} is gone", next_step="a release is revoked by policy, never removed"
            )
        if manifest_of(after) != manifest_of(target):
            raise RefusedError(
                "target_rebound",
                f"target {path} is {manifest_of(target)} and would become {manifest_of(after)}",
                consequence="a version means the same bytes for ever",
                next_step="publish under a new version",
            )


def check_publisher_role(role: DelegatedRole, publisher: Publisher, proposed: Targets) -> None:
    """Check a publisher role: its bins are as delegated, its targets are policies.

    Raises:
        RefusedError: `bins_invalid`, `target_foreign` or `policy_invalid`.
    """
    delegations = proposed.delegations
    succinct = delegations.succinct_roles if delegations else None
    if delegations is None or succinct is None:
        raise RefusedError("bins_invalid", f"{role.name} delegates to no bins")
    if succinct.name_prefix != role.name or succinct.bit_length != publisher.bits:
        raise RefusedError(
            "bins_invalid",
            f"{role.name} has 2^{succinct.bit_length} bins {succinct.name_prefix}-*, expected 2^{publisher.bits} {role.name}-*",
        )
    if not set(succinct.keyids) <= set(role.keyids) or succinct.threshold < role.threshold:
        raise RefusedError("bins_invalid", f"the bins of {role.name} would be signed by fewer or other keys than it")
    for path, target in proposed.targets.items():
        model, _, version = path.partition("/")
        if model not in publisher.models or version != "policy":
            raise RefusedError("target_foreign", f"{path} does not belong into the publisher role {role.name}")
        check_policy(path, target)


def check_policy(path: str, target: TargetFile) -> None:
    """Check the custom of `MODEL/policy`.

    Raises:
        RefusedError: `policy_invalid`.
    """
    own = target.unrecognized_fields.get("custom")
    own = own.get("wherry") if isinstance(own, dict) else None
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise RefusedError("policy_invalid", f"{path} is no policy of format {FORMAT}")
    floor = own.get("floor", "")
    revoked = own.get("revoked", [])
    if not isinstance(floor, str) or not isinstance(revoked, list) or len(revoked) > REVOKED_MAX:
        raise RefusedError("policy_invalid", f"{path} has a floor or a list of revocations that cannot be")
    if floor:
        ids.parse_version(floor)
    for entry in revoked:
        if (
            not isinstance(entry, dict)
            or not is_digest(str(entry.get("digest", "")))
            or str(entry.get("effect")) not in EFFECTS
        ):
            raise RefusedError("policy_invalid", f"{path} revokes something that is not a digest with an effect")
