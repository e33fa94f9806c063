"""Publishing: a bundle becomes a release when its publisher's key, on the publisher's machine, says so.

A release is a target `MODEL/VERSION` in one hash bin of the publisher's role. To add it, fetch that bin, check that it
is what this publisher signed before (`publishing_bins`), add the target, sign the next version, keep a copy beside the
bundle, and hand it in with `If-Match`. Used by `wherry-optimizer sign` and `wherry bundle push`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from tuf.api.metadata import TargetFile, Targets

from wherry_shared import ids, key_files, wire
from wherry_shared.bundle import Descriptor
from wherry_shared.digest import check_digest, of_bytes
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import SEALED, SIGNED, Layout
from wherry_shared.key_holders import using
from wherry_shared.publishing_bins import Bin, PublisherKey, Session, expiry, signed_bytes
from wherry_shared.publishing_remote import Remote
from wherry_shared.signed_files import parse_targets

__all__ = ["PublisherKey", "Pushed", "Remote", "Signed", "push", "renew", "repair", "set_policy", "sign"]

FORMAT = 1
CHAIN = "chain"
"""Folder beside the signed bins of a bundle, with all that signs it."""
SIGN_TRIES = 5
"""How often `push` signs again when other releases come between."""

Progress = Callable[[int, int], None]
"""Called with (bytes sent, bytes in all)."""


@dataclass(frozen=True)
class Signed:
    """What `sign` did."""

    target: str
    manifest: str
    publisher: str
    role: str
    version: int
    outcome: Literal["signed", "already", "cosigned"]
    kept: Path
    """The signed bin, beside the bundle."""


@dataclass(frozen=True)
class Pushed:
    """What `push` did."""

    target: str
    manifest: str
    uploaded_bytes: int
    blobs: int
    """Blobs that were not there yet."""
    outcome: Literal["released", "proposed"]
    """`proposed`: the bin needs more signatures before the server takes the bundle."""


@dataclass(frozen=True)
class SignedPolicy:
    """What a publisher says of a model's versions."""

    version: int
    """Of the publisher's role that says so."""
    floor: str
    revoked: dict[str, str]
    """Manifest digest → effect."""
    outcome: Literal["accepted", "proposed"]
    """`proposed`: it holds once enough of the publisher's keys signed it."""


@dataclass(frozen=True)
class _Bundle:
    path: Path
    model: str
    version: str
    manifest: str
    manifest_bytes: int

    @property
    def target(self) -> str:
        return ids.target_path(self.model, self.version)


def sign(bundle: Path, remote: Remote, key: PublisherKey, *, publisher: str | None = None) -> Signed:
    """Sign a bundle as a release; nothing of the bundle is uploaded and the bin is not handed in yet.

    In development the publisher is registered and its role signed on first use.

    Raises:
        RefusedError: `target_rebound` (the version means other bytes), `ceremony_needed`, `bin_proposed`,
            `bin_rolled_back`, `bin_foreign`, or what reading the bundle or the server refused.
        UnreachableError: `server_unreachable`.
    """
    release = _read(bundle)
    session = Session(remote, key)
    return _sign(release, session, session.bin(session.publisher(release.model, publisher), release.target))


def push(bundle: Path, remote: Remote, key: PublisherKey | None = None, *, progress: Progress | None = None) -> Pushed:
    """Upload what the server lacks, hand in the signed bin, release the bundle.

    Where another release came between, the bin is signed again if the key is here.

    Raises:
        RefusedError: `unsigned` (by the server: nobody signed this bundle), `bin_changed` (sign again where the key
            is), or what the bundle, the bin or the server refused.
        UnreachableError: `server_unreachable`.
    """
    release = _read(bundle)
    sent, blobs = _upload(Layout(bundle), remote, progress)
    outcome = _hand_in(release, remote, key)
    if outcome == "proposed":
        return Pushed(release.target, release.manifest, sent, blobs, "proposed")
    remote.add_bundle(release.model, release.version, release.manifest, _sealed_keys(bundle))
    _keep_chain(release, remote)
    return Pushed(release.target, release.manifest, sent, blobs, "released")


def set_policy(
    remote: Remote,
    key: PublisherKey,
    model: str,
    *,
    floor: str | None = None,
    revoked: Mapping[str, str] | None = None,
    allowed: Collection[str] = (),
) -> SignedPolicy:
    """Change the policy of a model; what is not named stays, so that revoking one version does not bring another back.

    Args:
        remote: the server.
        key: the publisher's.
        model: whose policy.
        floor: lowest version that devices may run; empty for none, None leaves it.
        revoked: further manifest digests → `replace` (nobody installs it) or `stop` (nobody serves it any more either).
        allowed: manifest digests whose revocation is taken back.

    Returns:
        The whole policy.

    Raises:
        RefusedError: `publisher_unknown`, `bad_version`, `bad_digest`, `not_revoked`, or what the server refused.
    """
    ids.check_name(model, "model")
    if floor:
        ids.parse_version(floor)
    session = Session(remote, key)
    name = session.publisher(model, register=False)
    version, role = session.role(name)
    before = role.targets.get(f"{model}/policy")
    own: dict[str, Any] = dict(before.unrecognized_fields["custom"]["wherry"]) if before is not None else {}
    known = {str(entry["digest"]): str(entry["effect"]) for entry in own.get("revoked", [])}
    strange = sorted(set(allowed) - set(known))
    if strange:
        raise RefusedError(
            "not_revoked",
            f"{strange[0][:80]} is not revoked for {model}",
            consequence="nothing was signed",
            next_step="name a manifest digest that wherry trust role shows among the revoked",
        )
    known |= {check_digest(digest): effect for digest, effect in (revoked or {}).items()}
    known = {digest: effect for digest, effect in sorted(known.items()) if digest not in allowed}
    own["format"], own["floor"] = FORMAT, own.get("floor", "") if floor is None else floor
    own["revoked"] = [{"digest": digest, "effect": effect} for digest, effect in known.items()]
    target = TargetFile.from_data(f"{model}/policy", msgspec.json.encode(own), ["sha256"])
    target.unrecognized_fields["custom"] = {"wherry": own}
    role.targets[target.path] = target
    outcome = session.submit_role(name, role, version)
    return SignedPolicy(version + 1, own["floor"], known, "accepted" if outcome == "accepted" else "proposed")


def renew(remote: Remote, key: PublisherKey) -> dict[str, str]:
    """Sign the roles and bins of this key's publishers anew, so that they live on; due every 90 days.

    Returns:
        The roles that were signed, and what became of each: `accepted`, or `proposed` until others of its keys signed too.
    """
    session = Session(remote, key)
    done: dict[str, str] = {}
    for known in session.state.publishers:
        if key.keyid not in known.keyids or not known.version:
            continue
        version, parent = session.role(known.name)
        done[known.name] = session.submit_role(known.name, parent, version)
        for role in sorted(known.bins):
            current = session.verified(known.name, parent, remote.role(role))
            done[role] = session.submit(role, _next_bin(key, current, current.targets), current.version)
    return done


def repair(remote: Remote, key: PublisherKey) -> dict[str, str]:
    """Hand in again what this key signed and the server, restored from a backup, no longer has.

    Returns:
        The roles that the server took, and what became of each.
    """
    state = remote.state()
    done: dict[str, str] = {}
    for role, data in key.remembered(state.root_digest).items():  # a publisher sorts before its bins
        _, version, _ = remote.role(role)
        if parse_targets(data).signed.version > version:
            done[role] = remote.put(role, data, version)
    return done


# --- the bundle ---------------------------------------------------------------------------------


def _read(bundle: Path) -> _Bundle:
    """Read a bundle, every byte checked: also what the server has already, for nobody signs or releases altered weights."""
    layout = Layout(bundle)
    data, _, config = layout.bundle()
    layout.verify_all()
    return _Bundle(bundle, config.model, config.version, of_bytes(data), len(data))


def _upload(layout: Layout, remote: Remote, progress: Progress | None) -> tuple[int, int]:
    """Upload manifest, config and layers that the server lacks; every byte is checked on its way out."""
    _, manifest, _ = layout.bundle()
    wanted = {item.digest: item for item in (*manifest.layers, manifest.config, layout.descriptor())}
    missing = [item for item in wanted.values() if not remote.has_blob(item.digest)]
    total = sum(item.size for item in missing)
    sent = 0
    for item in missing:
        remote.put_blob(item.digest, _counted(layout, item, sent, total, progress), item.size)
        sent += item.size
    return sent, len(missing)


def _counted(layout: Layout, item: Descriptor, done: int, total: int, progress: Progress | None) -> Iterator[bytes]:
    for chunk in layout.chunks(item):
        yield chunk
        done += len(chunk)
        if progress is not None:
            progress(done, total)


def _hand_in(release: _Bundle, remote: Remote, key: PublisherKey | None) -> Literal["accepted", "proposed", "none"]:
    """Give the server the bin that names this bundle, unless it has one that does; `none` if nobody signed it."""
    kept = _newest_kept(release)
    if kept is None:
        return "none"
    role, data = kept
    for _ in range(SIGN_TRIES):
        try:
            _, version, bytes_there = remote.role(role)
        except RefusedError as error:
            if error.code != "role_unknown":
                raise
            if key is None:
                raise RefusedError(
                    "signed_elsewhere",
                    f"{release.target} was signed for another server: {role} is unknown here",
                    consequence="the blobs are there, the bundle is not released",
                    next_step=f"sign for this server: wherry-optimizer sign {release.path}",
                ) from error
            again = sign(release.path, remote, key)
            role, data = again.role, again.kept.read_bytes()
            continue
        there = parse_targets(bytes_there).signed.targets.get(release.target) if bytes_there else None
        if there is not None and _manifest(there) == release.manifest:
            return "accepted"
        if parse_targets(data).signed.version == version + 1:
            try:
                outcome = (
                    remote.put(role, data, version) if key is None else Session(remote, key).submit(role, data, version)
                )
                return "accepted" if outcome == "accepted" else "proposed"
            except RefusedError as error:
                if error.code != "bin_changed":
                    raise
        if key is None:
            break
        again = sign(release.path, remote, key)
        role, data = again.role, again.kept.read_bytes()
    raise RefusedError(
        "bin_changed",
        f"other releases came into {role} after {release.target} was signed",
        consequence="the blobs are there, the bundle is not released",
        next_step=f"sign again where the publisher's key is: wherry-optimizer sign {release.path}",
    )


def _sealed_keys(bundle: Path) -> list[wire.SealedKey]:
    """Return the sealed content keys that an encrypted bundle carries (`encrypting`)."""
    paths = sorted((bundle / SEALED).glob("*.json"))
    return [wire.parse(wire.SealedKey, path.read_bytes()) for path in paths]


def _keep_chain(release: _Bundle, remote: Remote) -> None:
    """Keep beside the bundle what signs it, from the first root on, so that it can be verified without any server."""
    role, _, data = remote.bin(release.target)
    publisher = role.rpartition("-")[0]
    roots, targets = remote.offline()
    files = {f"{number}.root.json": root for number, root in enumerate(roots, 1)}
    files |= {"targets.json": targets, f"{publisher}.json": remote.role(publisher)[2], f"{role}.json": data}
    folder = release.path / SIGNED / CHAIN
    for path in folder.glob("*.json"):
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        key_files.keep(folder / name, content)


def _newest_kept(release: _Bundle) -> tuple[str, bytes] | None:
    """Return (role, bytes) of the newest kept bin that names this very bundle."""
    found: tuple[int, str, bytes] | None = None
    for path in (release.path / SIGNED).glob("*.json"):
        role, _, version = path.stem.rpartition(".")
        data = path.read_bytes()
        target = parse_targets(data).signed.targets.get(release.target)
        if target is None or _manifest(target) != release.manifest or not version.isdigit():
            continue
        if found is None or int(version) > found[0]:
            found = (int(version), role, data)
    return None if found is None else found[1:]


# --- signing ------------------------------------------------------------------------------------


def _sign(release: _Bundle, session: Session, current: Bin) -> Signed:
    there = current.targets.get(release.target)
    if there is not None:
        if _manifest(there) != release.manifest:
            raise RefusedError(
                "target_rebound",
                f"{release.target} is released as {_manifest(there)}, this bundle is {release.manifest}",
                consequence="nothing was signed: a version means the same bytes for ever",
                next_step="build it under a new version",
            )
        _, version, data = session.remote.role(current.role)
        return _keep_signed(release, current, version, data, "already")
    target = _target(release)
    proposed = session.remote.proposal(current.role)
    if proposed is not None:
        metadata = parse_targets(proposed)
        if metadata.signed.version > current.version and metadata.signed.targets == {
            **current.targets,
            target.path: target,
        }:
            with using(session.key.signer):
                metadata.sign(session.key.signer, append=True)
            data = metadata.to_bytes()
            return _keep_signed(release, current, metadata.signed.version, data, "cosigned")
        raise RefusedError(
            "bin_proposed",
            f"another change of {current.role} waits for signatures",
            consequence="nothing was signed",
            next_step="have it signed or withdrawn, then sign again",
        )
    data = _next_bin(session.key, current, {**current.targets, target.path: target})
    return _keep_signed(release, current, current.version + 1, data, "signed")


def _keep_signed(
    release: _Bundle,
    current: Bin,
    version: int,
    data: bytes,
    outcome: Literal["signed", "already", "cosigned"],
) -> Signed:
    kept = release.path / SIGNED / f"{current.role}.{version}.json"
    key_files.keep(kept, data)
    return Signed(release.target, release.manifest, current.publisher, current.role, version, outcome, kept)


def _target(release: _Bundle) -> TargetFile:
    custom = {"wherry": {"format": FORMAT, "manifest": release.manifest}}
    return TargetFile(release.manifest_bytes, {"sha256": release.manifest[7:]}, release.target, {"custom": custom})


def _manifest(target: TargetFile) -> str:
    return "sha256:" + target.hashes.get("sha256", "")


def _next_bin(key: PublisherKey, current: Bin, targets: dict[str, TargetFile]) -> bytes:
    return signed_bytes(
        key, Targets(version=current.version + 1, expires=expiry(), targets=dict(sorted(targets.items())))
    )
