"""Verifies a bundle with nothing but its folder: bytes, statements, and the signatures from the first root down to the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets

from wherry_server import trust_offline, trust_rules
from wherry_shared import ids, signed_files, statements
from wherry_shared.bundle import encrypted_layers
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import SIGNED, Layout
from wherry_shared.publishing import CHAIN

ROOTS_MAX = 1000


@dataclass(frozen=True)
class Link:
    """One thing that was verified."""

    what: str
    detail: str


def verify(path: Path, now: datetime, *, root_digest: str = "", unsigned: bool = False) -> Iterator[Link]:
    """Verify a bundle link by link, from its bytes up to the root.

    Args:
        path: the bundle.
        now: when; what expired is said, since an archived bundle outlives its signatures.
        root_digest: SHA-256 of the first root, from an enrolment token; without it the root is whatever came with the bundle.
        unsigned: stop before signatures, of a bundle that was not pushed yet.

    Raises:
        RefusedError: what is wrong: `digest_mismatch`, `statement_invalid`, `chain_missing`, `root_foreign`,
            `signatures_missing`, `chain_broken`, `unsigned`, `below_floor`, `revoked`, …
    """
    layout = Layout(path)
    data, manifest, config = layout.bundle()
    layout.verify_all()
    blobs = {layer.digest for layer in manifest.layers}
    yield Link("bytes", f"{len(blobs) + 2} blobs have their digests, the manifest is {of_bytes(data)}")
    dark = encrypted_layers(manifest)
    if dark:
        yield Link(
            "encryption", f"{len(dark)} files are ciphertext; that they hold what the config names, devices find out"
        )
    checks = {statements.IN_TOTO_TYPE: statements.check_statement, statements.CYCLONEDX_TYPE: statements.check_bill}
    for layer in manifest.layers:
        check = checks.get(layer.media_type)
        if check is not None:
            check(layout.read(layer, statements.BYTES_MAX), config)
            yield Link("statement", f"{layer.media_type} speaks of exactly these files")
    if unsigned:
        return
    chain = path / SIGNED / CHAIN
    root, lines = _root(chain, root_digest)
    yield from lines
    yield from _release(chain, root, ids.target_path(config.model, config.version), of_bytes(data), len(data), now)


def _root(chain: Path, root_digest: str) -> tuple[Metadata[Root], list[Link]]:
    root: Metadata[Root] | None = None
    for number in range(1, ROOTS_MAX):
        path = chain / f"{number}.root.json"
        if not path.exists():
            break
        data = path.read_bytes()
        metadata = signed_files.parse(Root, data)
        if number == 1:
            digest = hashlib.sha256(data).hexdigest()
            if root_digest and digest != root_digest.removeprefix("sha256:"):
                raise RefusedError("root_foreign", f"this bundle hangs on another first root: {digest}")
        elif root is None or metadata.signed.version != root.signed.version + 1:
            raise RefusedError("chain_broken", f"root {number} does not follow the one before")
        trust_offline.check_signed(trust_offline.needs(metadata, root.signed if root is not None else None, None))
        root = metadata
    if root is None:
        raise RefusedError(
            "chain_missing",
            f"{chain} does not hold what signs this bundle",
            consequence="its bytes are whole, whose they are is not known",
            next_step="push it (wherry bundle push), which keeps the signatures beside it; --unsigned checks the rest",
        )
    pinned = "as you named it" if root_digest else f"sha256 {digest}, which nobody compared: give --root-digest"
    return root, [Link("root", f"version {root.signed.version}, chained from the first one, {pinned}")]


def _release(
    chain: Path, root: Metadata[Root], target: str, manifest: str, length: int, now: datetime
) -> Iterator[Link]:
    targets = _read(chain / "targets.json")
    trust_offline.check_signed(trust_offline.needs(root, root.signed, targets))
    yield Link("targets", _signed("targets", targets, root.signed.roles["targets"].threshold, now))
    model, version = ids.split_target(target)
    publisher = next((one for one in trust_offline.publishers(targets.signed) if model in one.models), None)
    if publisher is None:
        raise RefusedError("chain_broken", f"the targets role lets nobody release {model}")
    role = _read(chain / f"{publisher.name}.json")
    _delegated(targets.signed, publisher.name, role)
    yield Link("publisher", _signed(publisher.name, role, publisher.threshold, now))
    delegations = role.signed.delegations
    if delegations is None or delegations.succinct_roles is None:
        raise RefusedError("chain_broken", f"{publisher.name} delegates to no bins")
    name = delegations.succinct_roles.get_role_for_target(target)
    found = _read(chain / f"{name}.json")
    _delegated(role.signed, name, found)
    entry = found.signed.targets.get(target)
    if entry is None or trust_rules.manifest_of(entry) != manifest or entry.length != length:
        raise RefusedError("unsigned", f"{name} does not bind {target} to {manifest}")
    yield Link(
        "release", f"{target} is this manifest; {_signed(name, found, delegations.succinct_roles.threshold, now)}"
    )
    policy = role.signed.targets.get(f"{model}/policy")
    if policy is not None:
        trust_rules.check_policy(policy.path, policy)
        yield Link("policy", _policy(policy.unrecognized_fields["custom"]["wherry"], target, version, manifest))


def _policy(own: dict[str, Any], target: str, version: str, manifest: str) -> str:
    floor, revoked = own.get("floor", ""), own.get("revoked", [])
    if floor and ids.parse_version(version).key < ids.parse_version(floor).key:
        raise RefusedError("below_floor", f"{target} is below the publisher's floor {floor}")
    if any(entry.get("digest") == manifest for entry in revoked):
        raise RefusedError("revoked", f"{target} was revoked by its publisher")
    return f"not revoked, floor {floor or 'none'}"


def _read(path: Path) -> Metadata[Targets]:
    try:
        return signed_files.parse(Targets, path.read_bytes())
    except FileNotFoundError as error:
        raise RefusedError("chain_missing", f"{path.name} is not beside the bundle") from error


def _delegated(parent: Targets, name: str, metadata: Metadata[Targets]) -> None:
    try:
        parent.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise RefusedError("chain_broken", f"{name} is not signed by whom it is delegated to: {error}") from error


def _signed(name: str, metadata: Metadata[Targets], threshold: int, now: datetime) -> str:
    expires = f"{metadata.signed.expires:%Y-%m-%d}"
    life = f"expired {expires}" if metadata.signed.expires <= now else f"good until {expires}"
    keys = "1 key" if threshold == 1 else f"{threshold} keys"
    return f"{name} version {metadata.signed.version}, signed by {keys}, {life}"
