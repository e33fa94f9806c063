"""A signing ceremony: a folder in which people prepare, read, sign and hand in the next root and targets metadata.

    FOLDER/now/N.root.json, targets.json    what holds, verified from the first root on
    FOLDER/next/root.json, targets.json     what is to hold; signatures gather in these files

The folder holds no secret and travels between the holders of keys (a stick, a git repository). Whoever signs sees what
changes (`changes`), for a signature says that its holder wants exactly this. Preparing anew drops signatures.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets

from wherry_server import trust_offline as offline
from wherry_server.trust import director_target
from wherry_server.trust_objects import replace_file
from wherry_shared import key_files, signed_files
from wherry_shared.errors import RefusedError

THRESHOLD_DEFAULT = 2
KEYS_MIN = 3
OFFLINE = (Root.type, Targets.type)


class Ceremony:
    """One folder. Everything that changes it begins from what holds now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- what holds now -------------------------------------------------------------------------

    def load(self, roots: Sequence[bytes], targets: bytes, root_digest: str = "") -> None:
        """Take what holds on a server into the folder, verified.

        Args:
            roots: every root from the first.
            targets: the targets metadata.
            root_digest: SHA-256 of the first root; not needed where the folder has roots already.

        Raises:
            RefusedError: `root_foreign` (another repository, or a server that lies), `ceremony_behind` (the server is
                behind this folder), or as the checks of `trust_offline`.
        """
        mine = self.roots()
        if not mine and not root_digest:
            raise RefusedError(
                "root_digest_missing",
                "this folder knows no root yet",
                next_step="give --root-digest, as `wherry trust status` printed it when the server was new",
            )
        if mine:
            if list(roots[: len(mine)]) != mine:
                raise RefusedError(
                    "root_foreign",
                    f"the server does not have the {len(mine)} roots that {self.folder} has",
                    consequence="nothing was changed",
                    next_step="if it was restored from an old backup: wherry trust submit --again, else find out who changed it",
                )
        elif not roots or hashlib.sha256(roots[0]).hexdigest() != root_digest.removeprefix("sha256:"):
            raise RefusedError("root_foreign", "the server's first root is not the one of this digest")
        root: Metadata[Root] | None = None
        for data in roots:
            metadata = signed_files.parse(Root, data)
            before = root.signed if root is not None else None
            if metadata.signed.version != (before.version if before is not None else 0) + 1:
                raise RefusedError("root_foreign", "the server's roots do not follow each other")
            offline.check_signed(offline.needs(metadata, before, None))
            root = metadata
        assert root is not None
        fresh = signed_files.parse(Targets, targets)
        offline.check_signed(offline.needs(root, root.signed, fresh))
        held = self.targets()
        if held is not None and fresh.signed.version < held.signed.version:
            raise RefusedError(
                "ceremony_behind",
                f"the server has targets version {fresh.signed.version}, {self.folder} has {held.signed.version}",
                consequence="nothing was changed",
                next_step="if it was restored from an old backup: wherry trust submit --again",
            )
        self._hold(roots, targets)

    def roots(self) -> list[bytes]:
        """Return the roots that hold, from the first."""
        found: list[bytes] = []
        while (path := self.folder / "now" / f"{len(found) + 1}.root.json").exists():
            found.append(path.read_bytes())
        return found

    def root(self) -> Metadata[Root] | None:
        """Return the root that holds."""
        roots = self.roots()
        return signed_files.parse(Root, roots[-1]) if roots else None

    def targets(self) -> Metadata[Targets] | None:
        """Return the targets that hold."""
        path = self.folder / "now" / "targets.json"
        return signed_files.parse(Targets, path.read_bytes()) if path.exists() else None

    # --- what is to hold ------------------------------------------------------------------------

    def begin(self, holders: Sequence[Key], threshold: int, online: Mapping[str, Key], now: datetime) -> None:
        """Prepare the first root and targets.

        Args:
            holders: the people's keys, for root and targets alike.
            threshold: how many of them have to sign.
            online: the server's keys: snapshot, timestamp, director.
            now: when.

        Raises:
            RefusedError: `ceremony_begun`, `keys_few`, `online_keys_missing`.
        """
        if self.roots():
            raise RefusedError("ceremony_begun", f"{self.folder} holds a repository already")
        _check_holders(holders, threshold)
        _check_online(online)
        root = Root(version=1, expires=_expiry(now), consistent_snapshot=True)
        for key in holders:
            for role in OFFLINE:
                root.add_key(key, role)
        for role in OFFLINE:
            root.roles[role].threshold = threshold
        for role in ("snapshot", "timestamp"):
            root.add_key(online[role], role)
        targets = Targets(
            version=1, expires=_expiry(now), targets=director_target([key_files.pem_of(online["director"])])
        )
        self._propose(Metadata(root), Metadata(targets))

    def rotate(
        self,
        now: datetime,
        *,
        add: Sequence[Key] = (),
        remove: Sequence[str] = (),
        threshold: int | None = None,
        online: Mapping[str, Key] | None = None,
    ) -> None:
        """Prepare the next root, with other holders, another threshold or other online keys; without any, a later expiry.

        Args:
            now: when.
            add: holders who come.
            remove: key ids, or beginnings of them, of holders who go.
            threshold: how many have to sign from now on; as before by default.
            online: new keys of snapshot and timestamp, each replacing the one before; `director` goes into the targets.

        Raises:
            RefusedError: `keys_few`, `key_unknown`, `ceremony_empty`.
        """
        root, targets = self._now()
        fresh = copy.deepcopy(root.signed)
        fresh.version += 1
        fresh.expires = _expiry(now)
        going = {_find(begun, {keyid for role in OFFLINE for keyid in fresh.roles[role].keyids}) for begun in remove}
        for role in OFFLINE:
            for keyid in going.intersection(fresh.roles[role].keyids):
                fresh.revoke_key(keyid, role)
            for key in add:
                fresh.add_key(key, role)
            if threshold is not None:
                fresh.roles[role].threshold = threshold
        for role, key in (online or {}).items():
            if role in ("snapshot", "timestamp"):
                for keyid in list(fresh.roles[role].keyids):
                    fresh.revoke_key(keyid, role)
                fresh.add_key(key, role)
        for role in OFFLINE:
            named = fresh.roles[role]
            _check_holders([fresh.keys[keyid] for keyid in named.keyids], named.threshold, keys_min=named.threshold)
        next_targets = copy.deepcopy(targets.signed)
        if "director" in (online or {}):
            assert online is not None
            next_targets.targets = director_target([key_files.pem_of(online["director"])])
        changed = "director" in (online or {}) or bool(add or remove or threshold is not None)
        self._propose(Metadata(fresh), self._successor(next_targets, now) if changed else None)

    def renew(self, now: datetime) -> None:
        """Prepare root and targets that say the same and live for another year."""
        _, targets = self._now()
        self.rotate(now)
        self._propose(self.next_root(), self._successor(copy.deepcopy(targets.signed), now))

    def replace_director(self, now: datetime, director: Key, *, keep: bool = False) -> None:
        """Prepare targets that name another director key.

        Args:
            now: when.
            director: the server's new key.
            keep: whether offers of the old key stay good, for a change without haste; never after a theft.
        """
        _, targets = self._now()
        pems = [*(offline.director_keys(targets.signed).values() if keep else ()), key_files.pem_of(director)]
        fresh = copy.deepcopy(targets.signed)
        fresh.targets = director_target(pems)
        self._propose(None, self._successor(fresh, now))

    def publisher(
        self, now: datetime, name: str, keys: Sequence[Key], models: Sequence[str], threshold: int, bits: int
    ) -> None:
        """Prepare targets that delegate models to a publisher; one of this name gets these keys instead of its own.

        Raises:
            RefusedError: as `trust_offline.check_targets`, `bits_fixed` (a publisher's bins never change in number).
        """
        offline.check_publisher_name(name)
        _, targets = self._now()
        fresh = copy.deepcopy(targets.signed)
        known = {one.name: one for one in offline.publishers(fresh)}
        if name in known and known[name].bits != bits:
            raise RefusedError("bits_fixed", f"{name} has 2^{known[name].bits} bins; that never changes")
        roles = dict(fresh.delegations.roles or {}) if fresh.delegations else {}
        roles[name] = DelegatedRole(
            name=name,
            keyids=sorted(key.keyid for key in keys),
            threshold=threshold,
            terminating=True,
            paths=[f"{model}/*" for model in sorted(set(models) or (known[name].models if name in known else set()))],
            unrecognized_fields={"wherry": {"bits": bits}},
        )
        before = fresh.delegations.keys if fresh.delegations else {}
        fresh.delegations = _delegations({**before, **{key.keyid: key for key in keys}}, roles)
        self._propose(None, self._successor(fresh, now))

    def revoke_publisher(self, now: datetime, name: str) -> None:
        """Prepare targets without a publisher: nothing that it signed is installed any more.

        Raises:
            RefusedError: `publisher_unknown`.
        """
        _, targets = self._now()
        fresh = copy.deepcopy(targets.signed)
        roles = dict(fresh.delegations.roles or {}) if fresh.delegations else {}
        if roles.pop(name, None) is None:
            raise RefusedError("publisher_unknown", f"nobody is delegated to as {name[:80]}")
        assert fresh.delegations is not None
        fresh.delegations = _delegations(fresh.delegations.keys, roles)
        self._propose(None, self._successor(fresh, now))

    # --- signing --------------------------------------------------------------------------------

    def next_root(self) -> Metadata[Root] | None:
        """Return the root that is to hold, if one is prepared."""
        path = self.folder / "next" / "root.json"
        return signed_files.parse(Root, path.read_bytes()) if path.exists() else None

    def next_targets(self) -> Metadata[Targets] | None:
        """Return the targets that are to hold, if they are prepared."""
        path = self.folder / "next" / "targets.json"
        return signed_files.parse(Targets, path.read_bytes()) if path.exists() else None

    def needs(self) -> list[offline.Need]:
        """Return who has signed and who has not."""
        now = self.root()
        return offline.needs(self.next_root() or now, now.signed if now else None, self.next_targets())

    def check(self, now: datetime) -> None:
        """Refuse what a server would refuse, signatures apart.

        Raises:
            RefusedError: `ceremony_empty`, or as the checks of `trust_offline`.
        """
        root, targets = self.next_root(), self.next_targets()
        if root is None and targets is None:
            raise RefusedError(
                "ceremony_empty",
                f"nothing is prepared in {self.folder}",
                next_step="prepare it: wherry trust init, root rotate, publisher add, …",
            )
        holds, held = self.root(), self.targets()
        if root is not None:
            offline.check_root(holds.signed if holds else None, root.signed, now)
        if targets is not None:
            offline.check_targets(held.signed if held else None, targets.signed, now)

    def sign(self, signer: Signer, now: datetime) -> list[str]:
        """Sign what is prepared and this key may sign; return the roles.

        Raises:
            RefusedError: `key_foreign`, or as `check`.
        """
        self.check(now)
        root, targets = self.next_root(), self.next_targets()
        wanted = {(need.role, keyid) for need in self.needs() for keyid in (*need.unsigned, *need.signed)}
        done = []
        for document in (root, targets):
            if document is not None and (document.signed.type, signer.public_key.keyid) in wanted:
                document.sign(signer, append=True)
                done.append(document.signed.type)
        if not done:
            raise RefusedError(
                "key_foreign",
                f"nothing here waits for the key {signer.public_key.keyid[:12]}",
                consequence="nothing was signed",
                next_step="see whose signatures are missing: wherry trust show FOLDER",
            )
        self._propose(root, targets)
        return done

    def whole(self, now: datetime) -> tuple[list[bytes], bytes]:
        """Return what a server takes: every root, and the targets.

        Raises:
            RefusedError: `signatures_missing`, or as `check`.
        """
        self.check(now)
        offline.check_signed(self.needs())
        return self._after()

    def holding(self) -> tuple[list[bytes], bytes]:
        """Return what holds: every root, and the targets.

        Raises:
            RefusedError: `ceremony_unknown`.
        """
        self._now()
        return self.roots(), (self.folder / "now" / "targets.json").read_bytes()

    def hold(self) -> None:
        """Let what was prepared and handed in be what holds."""
        self._hold(*self._after())
        for name in ("root.json", "targets.json"):
            (self.folder / "next" / name).unlink(missing_ok=True)

    # --- for people -----------------------------------------------------------------------------

    def holds(self) -> Iterator[str]:
        """Say line by line what holds, in the same words as `changes`."""
        root, targets = self.root(), self.targets()
        if root is not None and targets is not None:
            yield "holds now:"
            yield from _root_changes(None, root.signed)
            yield from _targets_changes(None, targets.signed)

    def changes(self) -> Iterator[str]:
        """Say line by line what would be otherwise."""
        holds, root = self.root(), self.next_root()
        if root is not None:
            yield from _root_changes(holds.signed if holds else None, root.signed)
        held, targets = self.targets(), self.next_targets()
        if targets is not None:
            yield from _targets_changes(held.signed if held else None, targets.signed)

    # --- files ----------------------------------------------------------------------------------

    def _now(self) -> tuple[Metadata[Root], Metadata[Targets]]:
        root, targets = self.root(), self.targets()
        if root is None or targets is None:
            raise RefusedError(
                "ceremony_unknown",
                f"{self.folder} does not hold what the server has",
                next_step="fetch it: wherry trust fetch FOLDER --root-digest …",
            )
        return root, targets

    def _successor(self, targets: Targets, now: datetime) -> Metadata[Targets]:
        held = self.targets()
        targets.version = (held.signed.version if held else 0) + 1
        targets.expires = _expiry(now)
        return Metadata(targets)

    def _propose(self, root: Metadata[Root] | None, targets: Metadata[Targets] | None) -> None:
        folder = self.folder / "next"
        folder.mkdir(parents=True, exist_ok=True)
        for name, document in (("root.json", root), ("targets.json", targets)):
            if document is None:
                (folder / name).unlink(missing_ok=True)
            else:
                replace_file(folder / name, document.to_bytes(), mode=0o644)

    def _after(self) -> tuple[list[bytes], bytes]:
        roots = self.roots()
        if (root := self.folder / "next" / "root.json").exists():
            roots.append(root.read_bytes())
        targets = self.folder / "next" / "targets.json"
        if not targets.exists():
            targets = self.folder / "now" / "targets.json"
        return roots, targets.read_bytes()

    def _hold(self, roots: Sequence[bytes], targets: bytes) -> None:
        folder = self.folder / "now"
        folder.mkdir(parents=True, exist_ok=True)
        for version, data in enumerate(roots, 1):
            replace_file(folder / f"{version}.root.json", data, mode=0o644)
        replace_file(folder / "targets.json", targets, mode=0o644)


def _root_changes(before: Root | None, root: Root) -> Iterator[str]:
    yield f"root version {root.version}, good until {root.expires:%Y-%m-%d}"
    for name, role in root.roles.items():
        old = before.roles[name] if before is not None else None
        for keyid in role.keyids:
            if old is None or keyid not in old.keyids:
                yield f"  {name}: + {offline.name_of(root.keys[keyid])}"
        for keyid in old.keyids if old is not None and before is not None else []:
            if keyid not in role.keyids:
                assert before is not None
                yield f"  {name}: - {offline.name_of(before.keys[keyid])}"
        if old is None or old.threshold != role.threshold:
            yield f"  {name}: {role.threshold} of {len(role.keyids)} have to sign"


def _targets_changes(before: Targets | None, targets: Targets) -> Iterator[str]:
    yield f"targets version {targets.version}, good until {targets.expires:%Y-%m-%d}"
    old_keys = set(offline.director_keys(before)) if before is not None else set()
    keys = set(offline.director_keys(targets))
    yield from (f"  director: + {keyid[:12]}" for keyid in sorted(keys - old_keys))
    yield from (f"  director: - {keyid[:12]}" for keyid in sorted(old_keys - keys))
    old = {one.name: one for one in offline.publishers(before)} if before is not None else {}
    new = {one.name: one for one in offline.publishers(targets)}
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"  publisher {name}: revoked, with {', '.join(old[name].models)}"
        elif new[name] != old.get(name):
            one = new[name]
            keyids = ", ".join(keyid[:12] for keyid in one.keyids)
            yield f"  publisher {name}: {one.threshold} of {keyids} may release {', '.join(one.models)}"


def _check_holders(keys: Sequence[Key], threshold: int, *, keys_min: int = 0) -> None:
    wanted = max(keys_min, threshold)
    if threshold < 1 or len({key.keyid for key in keys}) < wanted:
        raise RefusedError(
            "keys_few",
            f"{len(keys)} keys for a threshold of {threshold}",
            consequence="nothing was prepared",
            next_step=f"name at least {wanted} keys of different people with --key",
        )


def _check_online(online: Mapping[str, Key]) -> None:
    missing = {"snapshot", "timestamp", "director"} - online.keys()
    if missing:
        raise RefusedError(
            "online_keys_missing",
            f"no public key for {', '.join(sorted(missing))}",
            next_step="on the server: wherry trust online-keys OUT; then give --online OUT",
        )


def _delegations(keys: dict[str, Key], roles: dict[str, DelegatedRole]) -> Delegations | None:
    used = {keyid for role in roles.values() for keyid in role.keyids}
    return Delegations({keyid: key for keyid, key in keys.items() if keyid in used}, roles=roles) if roles else None


def _find(begun: str, keyids: Collection[str]) -> str:
    found = [keyid for keyid in keyids if keyid.startswith(begun)]
    if len(found) != 1:
        raise RefusedError("key_unknown", f"{begun[:64]!r} begins {len(found)} key ids of this role, expected one")
    return found[0]


def _expiry(now: datetime) -> datetime:
    return (now + offline.OFFLINE_LIFE).astimezone(UTC).replace(microsecond=0)
