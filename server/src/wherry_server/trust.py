"""The TUF repository of one project: who may say what a bundle is, and how fresh that word is.

    root ─┬─ targets (offline) ── director.json
          │     └─ PUBLISHER  MODEL/*, terminating   ── MODEL/policy
          │           └─ PUBLISHER-00 … hash bins     ── MODEL/VERSION → manifest digest
          ├─ snapshot  (online) the version of every role
          └─ timestamp (online) the version of the snapshot

Publisher roles and bins are signed on workstations only: what is signed here is snapshot and timestamp (and, where
`wherry dev` keeps the offline keys on the machine, root and targets). Every file is a create-only object, so the state
is what the folder holds: the api and the director process read it at every call and write it under one lock. A bin is
verified before it becomes an object and again whenever it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

from wherry_server import trust_offline
from wherry_server import trust_rules as rules
from wherry_server.trust_keys import ONLINE, Keys
from wherry_server.trust_objects import Objects, replace_file, split_name
from wherry_server.trust_offline import DIRECTOR_TARGET, MODELS_MAX, OFFLINE_LIFE
from wherry_shared import ids, key_files
from wherry_shared.errors import RefusedError, WherryError
from wherry_shared.signed_files import parse, parse_targets

SNAPSHOT_LIFE = timedelta(days=7)
TIMESTAMP_LIFE = timedelta(days=1)
SIGNED_AT = "x-wherry-signed-at"
"""Field of the signed timestamp: when it was signed, µs UTC. Devices raise their time floor from it."""

S = TypeVar("S", Root, Snapshot, Targets, Timestamp)


class Trust:
    """One project's trust. Open it with `open` or `create_dev`; methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._objects = Objects(folder / "metadata")
        self._keys = Keys(folder / "keys")
        self._proposed = folder / "proposed"
        self._cache: dict[tuple[str, int, int], Metadata[Targets]] = {}
        """Verified metadata by role, version and version of who delegated; one entry a role."""
        self._root_cache: Metadata[Root] | None = None

    # --- opening --------------------------------------------------------------------------------

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Tell whether `folder` holds a whole repository."""
        metadata = folder / "metadata"
        return metadata.is_dir() and any(metadata.glob("*.timestamp.json"))

    @classmethod
    def open(cls, folder: Path) -> Trust:
        """Open a repository.

        Raises:
            RefusedError: `trust_missing`.
        """
        if not cls.exists(folder):
            raise RefusedError(
                "trust_missing", f"there is no TUF repository in {folder}", next_step="start `wherry dev` once"
            )
        return cls(folder)

    @classmethod
    def create_dev(cls, folder: Path, *, now: float | None = None) -> Trust:
        """Make a repository whose keys are all on this machine: for development, and said so by `public_state`.

        Creation that was cut short is finished; an existing repository is only opened.
        """
        _prepare(folder)
        trust = cls(folder)
        moment = _moment(now)
        with trust._objects.locked():
            highest = trust._objects.highest()
            if "root" not in highest:
                trust._keys.create()
                trust._sign_root(1, moment)
            if "targets" not in highest:
                trust._sign_targets(Targets(version=1, expires=_expiry(moment, OFFLINE_LIFE)), moment)
            trust._publish(moment)
        return trust

    @classmethod
    def found(cls, folder: Path, roots: Sequence[bytes], targets: bytes, *, now: float | None = None) -> Trust:
        """Begin a repository whose offline roles a ceremony signed; the online keys are in the folder already.

        Raises:
            RefusedError: `trust_taken`, or as `accept_offline`.
        """
        if cls.exists(folder):
            raise RefusedError(
                "trust_taken",
                f"there is a TUF repository in {folder}",
                consequence="nothing was changed",
                next_step="hand in a change of it: wherry trust submit FOLDER",
            )
        _prepare(folder)
        trust = cls(folder)
        trust.accept_offline(roots, targets, now=now)
        return trust

    @classmethod
    def online_keys(cls, folder: Path, roles: Sequence[str] = ONLINE) -> dict[str, str]:
        """Return role → public key (PEM) with which roles that the server signs are to go on; made if they must be.

        Raises:
            RefusedError: `bad_role` or `key_invalid`.
        """
        for role in roles:
            if role not in ONLINE:
                raise RefusedError("bad_role", f"{role[:40]!r} is not one of {', '.join(ONLINE)}")
        _prepare(folder)
        trust = cls(folder)
        with trust._objects.locked():
            return {role: key_files.public_pem(trust._keys.prepare(role)) for role in roles}

    # --- reading --------------------------------------------------------------------------------

    def metadata(self, name: str) -> bytes:
        """Return the file `timestamp.json` or `N.ROLE.json` as clients fetch it.

        Raises:
            RefusedError: `metadata_unknown`.
        """
        if name == "timestamp.json":
            return self._objects.get(self._objects.highest().get("timestamp", 0), "timestamp")
        parts = split_name(name)
        if parts is None:
            raise RefusedError("metadata_unknown", f"{name[:120]!r} is not a metadata file")
        return self._objects.get(*parts)

    @property
    def root_digest(self) -> str:
        """SHA-256 of `1.root.json` in hex: the third part of enrolment tokens."""
        return hashlib.sha256(self._objects.get(1, "root")).hexdigest()

    @property
    def director_keyid(self) -> str:
        """Id of the key that signs offers."""
        return self._keys.signer("director").public_key.keyid

    @property
    def director(self) -> tuple[str, Callable[[bytes], bytes], Path]:
        """That key as one thing: id, what signs with it whatever comes after it, and its file.

        Raises:
            RefusedError: `key_absent`.
        """
        signer = self._keys.signer("director")
        return (
            signer.public_key.keyid,
            lambda data: bytes.fromhex(signer.sign(data).signature),
            self._keys.file("director"),
        )

    def director_sign(self, data: bytes) -> bytes:
        """Sign `data` (Ed25519) with the director key.

        Raises:
            RefusedError: `key_absent`.
        """
        return self.director[1](data)

    @property
    def director_since_us(self) -> int:
        """Since when that key signs, µs UTC: offers that were signed before it may carry another's signature."""
        return self._keys.file("director").stat().st_mtime_ns // 1000

    def offline(self) -> tuple[list[bytes], bytes]:
        """Return every root from the first and the targets metadata: what a ceremony begins from."""
        versions = range(1, self._version("root") + 1)
        return [self._objects.get(version, "root") for version in versions], self._objects.get(
            self._version("targets"), "targets"
        )

    @property
    def publishers(self) -> list[rules.Publisher]:
        """Everybody to whom the targets role delegates, in its order."""
        delegations = self._targets().signed.delegations
        return [rules.publisher_of(role) for role in (delegations.roles or {}).values()] if delegations else []

    def target(self, model: str, version: str) -> str | None:
        """Return the manifest digest to which a bin at threshold binds (model, version), or None.

        Raises:
            RefusedError: `bad_name`, `bad_version`, or as for altered metadata on disk.
        """
        path = ids.target_path(model, version)
        publisher = self._publisher_of(model)
        if publisher is None or self._version(publisher.name) == 0:
            return None
        role = self._role_of(publisher, path)
        if self._version(role) == 0:
            return None
        found = self._bin(publisher, role).signed.targets.get(path)
        return None if found is None else rules.manifest_of(found)

    def bin_for(self, target: str) -> tuple[str, int, bytes]:
        """Return (role, version, bytes) of the bin into which MODEL/VERSION falls; version 0 and no bytes if it is new.

        Raises:
            RefusedError: `publisher_unknown` (nobody publishes this model), `publisher_unsigned`, or a bad target.
        """
        model, version = ids.split_target(target)
        if version in ids.RESERVED_VERSIONS:
            raise RefusedError("bad_target", f"{target} stands in the publisher role")
        publisher = self._publisher_of(model)
        if publisher is None:
            raise RefusedError(
                "publisher_unknown",
                f"no publisher is trusted for model {model}",
                next_step="register one: wherry-optimizer sign does it in development",
            )
        if self._version(publisher.name) == 0:
            raise RefusedError("publisher_unsigned", f"{publisher.name} has not signed its role yet")
        role = self._role_of(publisher, target)
        return self.role_bytes(role)

    def role_bytes(self, role: str) -> tuple[str, int, bytes]:
        """Return (role, version, bytes) of a publisher role or bin; version 0 and no bytes if nobody signed it yet.

        Raises:
            RefusedError: `role_unknown`.
        """
        self._owner(role)
        version = self._version(role)
        return role, version, self._objects.get(version, role) if version else b""

    def proposal(self, role: str) -> bytes:
        """Return the bytes that stand as proposed, below threshold.

        Raises:
            RefusedError: `role_unknown` or `proposal_unknown`.
        """
        self._owner(role)
        data = self._open_proposal(role)
        if data is None:
            raise RefusedError("proposal_unknown", f"nothing is proposed for {role}")
        return data

    def public_state(self) -> dict[str, Any]:
        """Everything that anybody may know: versions, expiries, publishers, the director's key."""
        root = self._root().signed
        targets = self._targets().signed
        highest = self._objects.highest()
        roles: dict[str, Any] = {
            "root": _described(root, root.roles["root"].threshold),
            "targets": _described(targets, root.roles["targets"].threshold),
            "snapshot": _described(self._top(Snapshot).signed, root.roles["snapshot"].threshold),
            "timestamp": _described(self._top(Timestamp).signed, root.roles["timestamp"].threshold),
        }
        publishers = []
        for publisher in self.publishers:
            publishers.append(
                {
                    "name": publisher.name,
                    "models": list(publisher.models),
                    "threshold": publisher.threshold,
                    "keyids": list(publisher.keyids),
                    "bits": publisher.bits,
                    "version": highest.get(publisher.name, 0),
                    "bins": self._bins(publisher),
                    "unsigned": self._unsigned(publisher),
                    "expires_at": self._expires(publisher),
                    "proposed": self._proposals(publisher),
                }
            )
        return {
            "root_digest": self.root_digest,
            "roles": roles,
            "publishers": publishers,
            "director_keyids": sorted(trust_offline.director_keys(targets)),
            "development": self._signs("root") or self._signs("targets"),
        }

    # --- writing --------------------------------------------------------------------------------

    def add_publisher(
        self,
        name: str,
        public_key_pem: str | Sequence[str],
        models: Sequence[str],
        *,
        threshold: int = 1,
        now: float | None = None,
    ) -> rules.Publisher:
        """Delegate `models` to a publisher; said again with more models it gains them.

        Raises:
            RefusedError: `ceremony_needed` (the targets key is not on this machine), `publisher_taken` (other keys),
                `model_taken`, `bins_exhausted`, `bad_name`, `bad_threshold` or `key_invalid`.
        """
        trust_offline.check_publisher_name(name)
        for model in models:
            ids.check_name(model, "model")
        pems = [public_key_pem] if isinstance(public_key_pem, str) else public_key_pem
        keys = {key.keyid: key for key in map(key_files.parse_public, pems)}
        if not 1 <= threshold <= len(keys):
            raise RefusedError("bad_threshold", f"threshold {threshold} with {len(keys)} keys")
        moment = _moment(now)
        with self._objects.locked():
            self._require_ceremony()
            current = self._targets().signed
            known = {publisher.name: publisher for publisher in self.publishers}
            for other in known.values():
                taken = set(other.models) & set(models)
                if other.name != name and taken:
                    raise RefusedError("model_taken", f"{', '.join(sorted(taken))} is published by {other.name}")
            before = known.get(name)
            if before is not None and set(before.keyids) != set(keys):
                raise RefusedError(
                    "publisher_taken",
                    f"publisher {name} has other keys",
                    next_step="choose another publisher name, or use the key with which it was registered",
                )
            wanted = sorted({*models, *(before.models if before else ())})
            if len(wanted) > MODELS_MAX:
                raise RefusedError("models_too_many", f"{len(wanted)} models, at most {MODELS_MAX} for a publisher")
            if before is not None and wanted == sorted(before.models):
                return before
            role = DelegatedRole(
                name=name,
                keyids=sorted(keys),
                threshold=before.threshold if before else threshold,
                terminating=True,
                paths=[f"{model}/*" for model in wanted],
                unrecognized_fields={"wherry": {"bits": before.bits if before else self._free_bits(known.values())}},
            )
            self._sign_targets(_with_delegation(current, role, keys, moment), moment)
            self._publish(moment)
        return rules.publisher_of(role)

    def accept_offline(
        self, roots: Sequence[bytes], targets: bytes | None = None, *, now: float | None = None
    ) -> dict[str, int]:
        """Take what a ceremony signed: roots that are not here yet, and targets; all of it or nothing.

        Returns:
            role → version that holds now. Doing it again changes nothing.

        Raises:
            RefusedError: `signatures_missing`, `root_*`, `targets_*`, `online_key_absent` (the root or the targets name
                online keys that this server does not have), `metadata_taken`, or as the checks of `trust_offline`.
        """
        moment = _moment(now)
        with self._objects.locked():
            root = self._root() if self._version("root") else None
            fresh: list[tuple[Metadata[Root], bytes]] = []
            for data in roots:
                metadata = parse(Root, data)
                version = metadata.signed.version
                if version <= self._version("root"):
                    self._objects.put(version, "root", data)  # the same bytes, or refused
                    continue
                before = root.signed if root is not None else None
                trust_offline.check_root(before, metadata.signed, moment)
                trust_offline.check_signed(trust_offline.needs(metadata, before, None))
                fresh.append((metadata, data))
                root = metadata
            if root is None:
                raise RefusedError("root_invalid", "a repository begins with a root")
            named = self._check_offline_targets(root, targets, moment)
            self._check_online_keys(root.signed, named)
            for metadata, data in fresh:
                self._objects.put(metadata.signed.version, "root", data)
            if targets is not None:
                self._objects.put(named.version, "targets", targets)
            self._settle_keys(root.signed, named)
            self._publish(moment)
            return {"root": root.signed.version, "targets": named.version}

    def _check_offline_targets(self, root: Metadata[Root], data: bytes | None, moment: datetime) -> Targets:
        """Return the targets that hold under `root`: those handed in, or those here."""
        here = self._version("targets")
        if data is None:
            if not here:
                raise RefusedError("targets_invalid", "a repository begins with targets")
            data = self._objects.get(here, "targets")
        metadata = parse(Targets, data)
        trust_offline.check_signed(trust_offline.needs(root, root.signed, metadata))
        if metadata.signed.version == here:
            if data != self._objects.get(here, "targets"):
                raise RefusedError("metadata_taken", f"targets version {here} is already bound to other bytes")
        else:
            before = parse(Targets, self._objects.get(here, "targets")).signed if here else None
            trust_offline.check_targets(before, metadata.signed, moment)
        return metadata.signed

    def _check_online_keys(self, root: Root, targets: Targets) -> None:
        named = {"snapshot": root.roles["snapshot"].keyids, "timestamp": root.roles["timestamp"].keyids}
        named["director"] = list(trust_offline.director_keys(targets))
        for role, keyids in named.items():
            mine = [self._keys.signer(role)] if self._keys.has(role) else []
            waiting = self._keys.waiting(role)
            if not any(key.public_key.keyid in keyids for key in (*mine, *([waiting] if waiting else []))):
                raise RefusedError(
                    "online_key_absent",
                    f"this server has no {role} key that is named: {', '.join(keyid[:12] for keyid in keyids)}",
                    consequence="nothing was changed",
                    next_step="prepare it with the keys that `wherry trust online-keys` printed on this server",
                )

    def _settle_keys(self, root: Root, targets: Targets) -> None:
        """Let waiting keys that are named take their place, where the old ones are named no more or both are."""
        named = {"snapshot": root.roles["snapshot"].keyids, "timestamp": root.roles["timestamp"].keyids}
        named["director"] = list(trust_offline.director_keys(targets))
        for role, keyids in named.items():
            waiting = self._keys.waiting(role)
            if waiting is not None and waiting.public_key.keyid in keyids:
                self._keys.promote(role)

    def accept_bin(self, role: str, data: bytes, if_match: int, *, now: float | None = None) -> str:
        """Take the next version of a bin (or publisher role), signed elsewhere.

        Returns:
            `accepted`, or `proposed` while more signatures are needed.

        Raises:
            RefusedError: `bin_changed` (sign again), `bin_proposed` (another proposal is open), `signature_bad` (no
                key of the publisher signed), `role_unknown`, `publisher_unsigned`, or as the checks of `trust_rules`.
        """
        moment = _moment(now)
        with self._objects.locked():
            publisher = self._owner(role)
            if role != publisher.name and self._version(publisher.name) == 0:
                raise RefusedError("publisher_unsigned", f"{publisher.name} has not signed its role yet")
            version = self._version(role)
            if version != if_match:
                raise RefusedError("bin_changed", f"{role} is at version {version}", next_step="sign again")
            proposed = parse_targets(data)
            current = self._load_replaced(publisher, role) if version else None
            rules.check_next(role, current, proposed.signed, moment)
            parent = self._check_content(publisher, role, current, proposed.signed)
            merged, data = self._merge(role, proposed, data)
            result = parent.get_verification_result(role, merged.signed_bytes, merged.signatures)
            if not result.signed:
                raise RefusedError("signature_bad", f"no key of {publisher.name} signed {role}")
            if not result:
                replace_file(self._proposed / f"{role}.json", data, mode=0o644)
                return "proposed"
            self._objects.put(proposed.signed.version, role, data)
            (self._proposed / f"{role}.json").unlink(missing_ok=True)
            if self._keys.has("snapshot"):
                self._publish(moment)
        return "accepted"

    def withdraw(self, role: str) -> None:
        """Drop what stands as proposed for a bin.

        Raises:
            RefusedError: `role_unknown` or `proposal_unknown`.
        """
        with self._objects.locked():
            self.proposal(role)
            (self._proposed / f"{role}.json").unlink()

    def refresh_online(self, now: float | None = None) -> bool:
        """Bring snapshot and timestamp up to date; sign them anew at half of their life.

        Returns:
            Whether anything was signed.

        Raises:
            RefusedError: `key_absent`, where the online keys are not on this machine.
        """
        moment = _moment(now)
        with self._objects.locked():
            self._settle_keys(self._root().signed, self._targets().signed)
            renewed = self._renew_offline(moment)
            return self._publish(moment) or renewed

    # --- verified loading -----------------------------------------------------------------------

    def _version(self, role: str) -> int:
        return self._objects.highest().get(role, 0)

    def _root(self) -> Metadata[Root]:
        version = self._version("root")
        known = self._root_cache
        if known is not None and known.signed.version == version:
            return known
        root = self._parse(Root, version)
        _verified(lambda: root.signed.verify_delegate("root", root.signed_bytes, root.signatures))
        self._root_cache = root
        return root

    def _targets(self) -> Metadata[Targets]:
        root = self._root()
        return self._verified_targets("targets", root.signed.version, root.signed.verify_delegate)

    def _verified_targets(self, role: str, parent_version: int, verify: Callable[..., None]) -> Metadata[Targets]:
        version = self._version(role)
        key = (role, version, parent_version)
        found = self._cache.get(key)
        if found is None:
            found = parse_targets(self._objects.get(version, role))
            metadata = found
            _verified(lambda: verify(role, metadata.signed_bytes, metadata.signatures))
            for stale in [known for known in tuple(self._cache) if known[0] == role]:
                self._cache.pop(stale, None)
            self._cache[key] = found
        return found

    def _publisher_role(self, publisher: rules.Publisher) -> Metadata[Targets]:
        targets = self._targets().signed
        with _rekeyed(publisher.name, lambda: self._was_signed_by_others("targets", publisher.name, publisher.keyids)):
            return self._verified_targets(publisher.name, targets.version, targets.verify_delegate)

    def _bin(self, publisher: rules.Publisher, role: str) -> Metadata[Targets]:
        parent = self._publisher_role(publisher).signed
        keyids = self._succinct(publisher).keyids
        with _rekeyed(publisher.name, lambda: self._was_signed_by_others(publisher.name, role, keyids)):
            return self._verified_targets(role, parent.version, parent.verify_delegate)

    def _load(self, publisher: rules.Publisher, role: str) -> Metadata[Targets]:
        return self._publisher_role(publisher) if role == publisher.name else self._bin(publisher, role)

    def _load_replaced(self, publisher: rules.Publisher, role: str) -> Targets:
        """Return what a proposal replaces; what the publisher's former keys signed only bounds what may be proposed."""
        try:
            return self._load(publisher, role).signed
        except RefusedError as error:
            if error.code != "publisher_unsigned":
                raise
            return parse_targets(self._objects.get(self._version(role), role)).signed

    def _was_signed_by_others(self, parent: str, role: str, keyids: Sequence[str]) -> bool:
        """Tell whether an earlier version of `parent` delegated `role` to other keys than these."""
        for version in range(self._version(parent) - 1, 0, -1):
            try:
                delegations = parse_targets(self._objects.get(version, parent)).signed.delegations
            except RefusedError as error:
                if error.code != "metadata_unknown":  # after a repair numbers may be missing
                    raise
                continue
            if delegations is None:
                continue
            named = delegations.succinct_roles or (delegations.roles or {}).get(role)
            if named is not None and set(named.keyids) != set(keyids):
                return True
        return False

    def _is_current(self, publisher: rules.Publisher, role: str) -> bool:
        """Tell whether a role is signed by the keys that it has now."""
        try:
            self._load(publisher, role)
        except RefusedError as error:
            if error.code != "publisher_unsigned":
                raise
            return False
        return True

    def _top(self, kind: type[S]) -> Metadata[S]:
        """Return the newest snapshot or timestamp, signed by the keys of this root or of the one before it."""
        metadata = self._parse(kind, self._version(kind.type))
        root = self._root().signed
        if not self._by_current_key(metadata) and root.version > 1:
            root = self._parse(Root, root.version - 1).signed
        _verified(lambda: root.verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures))
        return metadata

    def _by_current_key(self, metadata: Metadata[S]) -> bool:
        result = self._root().signed.get_verification_result(
            metadata.signed.type, metadata.signed_bytes, metadata.signatures
        )
        return bool(result)

    def _parse(self, kind: type[S], version: int) -> Metadata[S]:
        return parse(kind, self._objects.get(version, kind.type))

    # --- roles ----------------------------------------------------------------------------------

    def _publisher_of(self, model: str) -> rules.Publisher | None:
        return next((publisher for publisher in self.publishers if model in publisher.models), None)

    def _role_of(self, publisher: rules.Publisher, target: str) -> str:
        return self._succinct(publisher).get_role_for_target(target)

    def _bins(self, publisher: rules.Publisher) -> dict[str, int]:
        """Return the versions of the bins of a publisher that hold something, by name."""
        highest = self._objects.highest()
        if not highest.get(publisher.name):
            return {}
        named = re.compile(re.escape(publisher.name) + "-[0-9a-f]{1,2}")
        return {name: version for name, version in sorted(highest.items()) if named.fullmatch(name)}

    def _proposals(self, publisher: rules.Publisher) -> list[str]:
        """Return the roles of a publisher for which something stands as proposed."""
        named = re.compile(re.escape(publisher.name) + "(-[0-9a-f]{1,2})?")
        found = [path.stem for path in sorted(self._proposed.glob("*.json")) if named.fullmatch(path.stem)]
        return [role for role in found if self._open_proposal(role) is not None]

    def _unsigned(self, publisher: rules.Publisher) -> list[str]:
        """Return the roles of a publisher that its present keys have not signed yet, since others did."""
        roles = [publisher.name] if self._version(publisher.name) else []
        if not roles or not self._is_current(publisher, publisher.name):
            return [*roles, *self._bins(publisher)]
        return [name for name in self._bins(publisher) if not self._is_current(publisher, name)]

    def _expires(self, publisher: rules.Publisher) -> int:
        """Return when the first of a publisher's roles that hold now expires, µs UTC; 0 if none does."""
        roles = [publisher.name, *self._bins(publisher)] if self._version(publisher.name) else []
        held = [self._load(publisher, role) for role in roles if self._is_current(publisher, role)]
        return min((_expires_us(role.signed) for role in held), default=0)

    def _is_bin(self, publisher: rules.Publisher, role: str) -> bool:
        if self._version(publisher.name) == 0:
            return False
        return role == role.lower() and self._succinct(publisher).is_delegated_role(role)

    def _succinct(self, publisher: rules.Publisher) -> SuccinctRoles:
        delegations = self._publisher_role(publisher).signed.delegations
        assert delegations is not None
        assert delegations.succinct_roles is not None
        return delegations.succinct_roles

    def _owner(self, role: str) -> rules.Publisher:
        for publisher in self.publishers:
            if role == publisher.name or (role.startswith(f"{publisher.name}-") and self._is_bin(publisher, role)):
                return publisher
        raise RefusedError("role_unknown", f"{role[:120]!r} is neither a publisher nor a bin")

    def _check_content(
        self, publisher: rules.Publisher, role: str, current: Targets | None, proposed: Targets
    ) -> Targets:
        targets = self._targets().signed
        if role == publisher.name:
            assert targets.delegations is not None
            assert targets.delegations.roles is not None
            rules.check_publisher_role(targets.delegations.roles[role], publisher, proposed)
            return targets
        parent = self._publisher_role(publisher).signed
        rules.check_bin(role, parent, publisher, current, proposed)
        return parent

    def _open_proposal(self, role: str) -> bytes | None:
        try:
            data = (self._proposed / f"{role}.json").read_bytes()
        except FileNotFoundError:
            return None
        stands = parse_targets(data).signed.version > self._version(role)
        return data if stands else None

    def _merge(self, role: str, proposed: Metadata[Targets], data: bytes) -> tuple[Metadata[Targets], bytes]:
        """Join the signatures of an open proposal for the same signed bytes."""
        standing = self._open_proposal(role)
        if standing is None:
            return proposed, data
        before = parse_targets(standing)
        if before.signed_bytes != proposed.signed_bytes:
            raise RefusedError(
                "bin_proposed",
                f"version {before.signed.version} of {role} already waits for signatures",
                next_step="add your signature to it, or withdraw it and sign again",
            )
        before.signatures.update(proposed.signatures)
        return before, before.to_bytes()

    # --- signing --------------------------------------------------------------------------------

    def _signs(self, role: str) -> bool:
        """Tell whether an offline role is signed on this machine alone, which is for development."""
        if not self._keys.has(role):
            return False
        named = self._root().signed.roles[role]
        return named.threshold == 1 and self._keys.signer(role).public_key.keyid in named.keyids

    def _require_ceremony(self) -> None:
        if not self._signs("targets"):
            raise RefusedError(
                "ceremony_needed",
                "the targets key is not on this machine",
                next_step="delegate at a signing ceremony: wherry trust publisher add --ceremony FOLDER",
            )

    def _free_bits(self, known: Any) -> int:
        free = rules.BINS_PER_PROJECT - sum(publisher.bins for publisher in known)
        bits = min(rules.BITS_DEFAULT, free.bit_length() - 1) if free > 0 else 0
        if bits < 1:
            raise RefusedError("bins_exhausted", f"publishers have all {rules.BINS_PER_PROJECT} bins of the project")
        return bits

    def _put(self, metadata: Metadata[Any], signer: CryptoSigner) -> None:
        metadata.sign(signer)
        self._objects.put(metadata.signed.version, metadata.signed.type, metadata.to_bytes())

    def _sign_root(self, version: int, moment: datetime) -> None:
        root = Root(version=version, expires=_expiry(moment, OFFLINE_LIFE), consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            root.add_key(self._keys.signer(role).public_key, role)
        self._put(Metadata(root), self._keys.signer("root"))

    def _sign_targets(self, targets: Targets, moment: datetime) -> None:
        targets.targets = director_target([key_files.public_pem(self._keys.signer("director"))])
        targets.expires = _expiry(moment, OFFLINE_LIFE)
        self._put(Metadata(targets), self._keys.signer("targets"))

    def _renew_offline(self, moment: datetime) -> bool:
        """Where development keeps the offline keys here, sign root and targets anew at half of their life."""
        renewed = False
        if self._signs("root") and _half_gone(self._root().signed, OFFLINE_LIFE, moment):
            self._sign_root(self._version("root") + 1, moment)
            renewed = True
        if self._signs("targets") and _half_gone(self._targets().signed, OFFLINE_LIFE, moment):
            targets = self._targets().signed
            again = Targets(version=targets.version + 1, delegations=targets.delegations)
            self._sign_targets(again, moment)
            renewed = True
        return renewed

    def _publish(self, moment: datetime) -> bool:
        """Sign a snapshot of the highest versions and a timestamp of it, where that is due. Call it under the lock."""
        highest = self._objects.highest()
        top = self._top(Snapshot) if "snapshot" in highest else None
        snapshot = top.signed if top is not None else None
        # What a snapshot once listed stays listed, or devices refuse it: also roles of a publisher that was revoked,
        # and those that its new keys have not signed yet.
        listed = {name: meta.version for name, meta in snapshot.meta.items()} if snapshot is not None else {}
        wanted = {**listed, "targets.json": highest["targets"]}
        for publisher in self.publishers:
            if highest.get(publisher.name) and self._is_current(publisher, publisher.name):
                wanted[f"{publisher.name}.json"] = highest[publisher.name]
                for name, version in self._bins(publisher).items():
                    if self._is_current(publisher, name):
                        wanted[f"{name}.json"] = version
        seconds = int(moment.timestamp())
        changed = False
        if (
            top is None
            or snapshot is None
            or not self._by_current_key(top)
            or _half_gone(snapshot, SNAPSHOT_LIFE, moment)
            or wanted != listed
        ):
            snapshot = Snapshot(
                version=max((snapshot.version if snapshot else 0) + 1, seconds),
                expires=_expiry(moment, SNAPSHOT_LIFE),
                meta={name: MetaFile(version=version) for name, version in sorted(wanted.items())},
            )
            self._put(Metadata(snapshot), self._keys.signer("snapshot"))
            changed = True
        stamp = self._top(Timestamp) if "timestamp" in highest else None
        timestamp = stamp.signed if stamp is not None else None
        if (
            stamp is None
            or timestamp is None
            or not self._by_current_key(stamp)
            or _half_gone(timestamp, TIMESTAMP_LIFE, moment)
            or timestamp.snapshot_meta.version != snapshot.version
        ):
            data = self._objects.get(snapshot.version, "snapshot")
            fresh = Timestamp(
                version=max((timestamp.version if timestamp else 0) + 1, seconds),
                expires=_expiry(moment, TIMESTAMP_LIFE),
                snapshot_meta=MetaFile.from_data(snapshot.version, data, ["sha256"]),
                unrecognized_fields={SIGNED_AT: int(moment.timestamp() * 1_000_000)},
            )
            self._put(Metadata(fresh), self._keys.signer("timestamp"))
            changed = True
        return changed


def director_target(pems: Sequence[str]) -> dict[str, TargetFile]:
    """Return the one target of the targets role: who may sign offers."""
    keys = {key_files.parse_public(pem).keyid: pem for pem in pems}
    custom = {"wherry": {"format": rules.FORMAT, "keys": dict(sorted(keys.items()))}}
    target = TargetFile.from_data(DIRECTOR_TARGET, json.dumps(custom, sort_keys=True).encode(), ["sha256"])
    target.unrecognized_fields["custom"] = custom
    return {DIRECTOR_TARGET: target}


def _prepare(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("metadata", "proposed"):
        (folder / name).mkdir(exist_ok=True)


def _with_delegation(current: Targets, role: DelegatedRole, keys: dict[str, SSlibKey], moment: datetime) -> Targets:
    delegations = current.delegations
    roles = dict(delegations.roles or {}) if delegations else {}
    roles[role.name] = role
    known = {**(delegations.keys if delegations else {}), **keys}
    return Targets(
        version=current.version + 1,
        expires=_expiry(moment, OFFLINE_LIFE),
        delegations=Delegations(keys=known, roles=roles),
    )


def _moment(now: float | None) -> datetime:
    return datetime.fromtimestamp(time.time() if now is None else now, UTC)


def _expiry(moment: datetime, life: timedelta) -> datetime:
    return (moment + life).replace(microsecond=0)


def _half_gone(signed: Root | Snapshot | Targets | Timestamp, life: timedelta, moment: datetime) -> bool:
    return bool(signed.expires - moment < life / 2)


def _described(signed: Root | Snapshot | Targets | Timestamp, threshold: int) -> dict[str, Any]:
    return {"version": signed.version, "expires_at": _expires_us(signed), "threshold": threshold}


def _expires_us(signed: Root | Snapshot | Targets | Timestamp) -> int:
    return int(signed.expires.timestamp() * 1_000_000)


@contextlib.contextmanager
def _rekeyed(publisher: str, replaced: Callable[[], bool]) -> Iterator[None]:
    """Tell metadata that the publisher's former keys signed from metadata that somebody altered."""
    try:
        yield
    except WherryError as error:
        if error.code != "metadata_altered" or not replaced():
            raise
        raise RefusedError(
            "publisher_unsigned",
            f"{publisher} has other keys now, and has not signed its roles with them",
            consequence="nothing of it is installed until it has; what serves goes on",
            next_step="where the new keys are: wherry trust adopt",
        ) from error


def _verified(check: Callable[[], None]) -> None:
    try:
        check()
    except (RepositoryError, ValueError) as error:
        raise WherryError(
            "metadata_altered",
            f"metadata on this server's disk do not verify: {error}",
            consequence="nothing is read from them",
            next_step="restore the trust folder from a backup",
        ) from error
