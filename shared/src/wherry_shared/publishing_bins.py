"""A publisher's roles as a server has them, checked with the publisher's key before anything is signed on top of them.

The server is trusted with nothing: a role that it altered, took back or made up is noticed here and refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Delegations, Metadata, SuccinctRoles, TargetFile, Targets

from wherry_shared import key_files
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError
from wherry_shared.key_holders import PREFIX, open_key, using
from wherry_shared.publishing_remote import Remote
from wherry_shared.signed_files import parse_targets

LIFE = timedelta(days=90)
"""Life of publisher roles and bins (contracts.md §2); `publishing.renew` signs them anew."""
KEY_VARIABLE = "WHERRY_PUBLISHER_KEY"
KEY_DEFAULT = Path("~/.config/wherry/publisher.pem")


class _Partners(msgspec.Struct, frozen=True):
    threshold: int
    pems: list[str]


class PublisherKey:
    """The key of a publisher, on the publisher's machine, and what it signed last for each role.

    The memory of signed roles, `signed/ROOT/ROLE.json` beside the key, shows a server that fell back, and is what
    `repair` hands in again.
    """

    def __init__(self, path: Path, signer: Signer) -> None:
        self.path = path
        self.signer = signer

    @classmethod
    def find(cls, path: Path | None = None) -> PublisherKey | None:
        """Read the key at `path`, else WHERRY_PUBLISHER_KEY, else the default place; None if there is none.

        Raises:
            RefusedError: `key_invalid`.
            DeviceError: `key_exposed`.
        """
        named = str(path or os.environ.get(KEY_VARIABLE) or KEY_DEFAULT)
        if named.startswith(PREFIX):
            return cls(KEY_DEFAULT.expanduser(), open_key(named))  # only what it signed is kept beside that path
        place = Path(named).expanduser()
        try:
            return cls(place, key_files.load(place))
        except FileNotFoundError:
            return None

    @classmethod
    def open(cls, path: Path | None = None) -> PublisherKey:
        """Like `find`, but make the key on first use."""
        found = cls.find(path)
        if found is None:
            place = (path or Path(os.environ.get(KEY_VARIABLE) or KEY_DEFAULT)).expanduser()
            found = cls(place, key_files.create(place))
        return found

    @property
    def keyid(self) -> str:
        """TUF key id."""
        return self.signer.public_key.keyid

    @property
    def public_pem(self) -> str:
        """The public half."""
        return key_files.public_pem(self.signer)

    def remember(self, root_digest: str, role: str, data: bytes) -> None:
        """Keep the newest bytes of a role that the server accepted."""
        key_files.keep(self._memory(root_digest) / f"{role}.json", data)

    def remembered(self, root_digest: str) -> dict[str, bytes]:
        """Return what `remember` kept for a project, by role."""
        return {path.stem: path.read_bytes() for path in sorted(self._memory(root_digest).glob("*.json"))}

    def keep_partners(self, root_digest: str, publisher: str, partners: Sequence[Key], threshold: int) -> None:
        """Keep who signs with this key for a publisher, as a person said it."""
        pems = [key_files.pem_of(key) for key in partners]
        key_files.keep(
            self._memory(root_digest) / f"{publisher}.partners", msgspec.json.encode(_Partners(threshold, pems))
        )

    def partners(self, root_digest: str, publisher: str) -> tuple[list[Key], int]:
        """Return what `keep_partners` kept, without any: nobody, 1."""
        try:
            data = (self._memory(root_digest) / f"{publisher}.partners").read_bytes()
        except FileNotFoundError:
            return [], 1
        found = msgspec.json.decode(data, type=_Partners)
        return [key_files.parse_public(pem) for pem in found.pems], found.threshold

    def _memory(self, root_digest: str) -> Path:
        return self.path.parent / "signed" / check_digest(f"sha256:{root_digest}")[7:23]


@dataclass(frozen=True)
class Bin:
    """A bin of a publisher, verified."""

    publisher: str
    role: str
    version: int
    """0: nobody signed it yet."""
    targets: dict[str, TargetFile]


class Session:
    """One publisher's key at one server, with the state that the server had at the start."""

    def __init__(self, remote: Remote, key: PublisherKey) -> None:
        self.remote = remote
        self.key = key
        self.state = remote.state()

    def publisher(self, model: str, wanted: str | None = None, *, register: bool = True) -> str:
        """Return under which publisher name this key publishes `model`, registering it where that can be done.

        Raises:
            RefusedError: `model_taken`, `publisher_unknown`, or what the server refused.
        """
        for known in self.state.publishers:
            if model not in known.models:
                continue
            if self.key.keyid not in known.keyids or wanted not in (None, known.name):
                raise RefusedError(
                    "model_taken",
                    f"{model} is published by {known.name}, whose key this is not",
                    consequence="nothing was signed",
                    next_step=f"sign with the key of {known.name} ({KEY_VARIABLE}), or choose another model name",
                )
            return known.name
        if not register:
            raise RefusedError(
                "publisher_unknown",
                f"this key does not publish {model}",
                consequence="nothing was signed",
                next_step=f"use the key that publishes it ({KEY_VARIABLE}); a new model is registered by `wherry-optimizer sign`",
            )
        mine = [known.name for known in self.state.publishers if self.key.keyid in known.keyids]
        name = wanted or (mine[0] if mine else f"publisher-{self.key.keyid[:8]}")
        self.remote.register(name, self.key.public_pem, [model])
        self.state = self.remote.state()
        return name

    def role(self, name: str) -> tuple[int, Targets]:
        """Return (version, content) of a publisher's own role; version 0 with a first content if it has to be made.

        Raises:
            RefusedError: `bin_foreign` (not what this key signed), `bin_rolled_back` or `ceremony_needed`.
        """
        _, version, data = self.remote.role(name)
        self._check_memory(name, version)
        if version == 0:
            return 0, self._first_role(name)
        metadata = parse_targets(data)
        partners, threshold = self.key.partners(self.state.root_digest, name)
        own = signatures_of(metadata, [self.key.signer.public_key])
        if not own and (not partners or signatures_of(metadata, partners) < threshold):
            raise _foreign(name, "is not what this key signed, nor enough of those who sign with it")
        if metadata.signed.version != version:
            raise _foreign(name, f"has version {metadata.signed.version} and was announced as {version}")
        return version, metadata.signed

    def _first_role(self, name: str) -> Targets:
        known = next((item for item in self.state.publishers if item.name == name), None)
        if known is None or known.keyids != [self.key.keyid]:
            raise RefusedError(
                "ceremony_needed",
                f"the first role of {name} has to be signed by all its keys together",
                consequence="nothing was signed",
                next_step=f"say who signs with you: wherry trust adopt {name} --with FILE.pub",
            )
        bins = SuccinctRoles([self.key.keyid], known.threshold, known.bits, name)
        delegations = Delegations({self.key.keyid: self.key.signer.public_key}, succinct_roles=bins)
        return Targets(version=1, expires=expiry(), delegations=delegations)

    def submit_role(self, name: str, content: Targets, replaces: int) -> str:
        """Sign `content` as the next version of a publisher's role and hand it in; return what became of it, as `submit`."""
        fresh = Targets(
            version=replaces + 1, expires=expiry(), targets=content.targets, delegations=content.delegations
        )
        return self.submit(name, signed_bytes(self.key, fresh), replaces)

    def submit(self, role: str, data: bytes, replaces: int) -> str:
        """Hand in signed bytes: `accepted`, which is remembered beside the key, or `proposed` until others of its keys signed."""
        outcome = self.remote.put(role, data, replaces)
        if outcome == "accepted":
            self.key.remember(self.state.root_digest, role, data)
        return outcome

    def bin(self, name: str, target: str) -> Bin:
        """Return the bin of a target; the publisher's role is made first if it is not there.

        Raises:
            RefusedError: `bin_foreign`, `bin_rolled_back` or `ceremony_needed`.
        """
        version, parent = self.role(name)
        if version == 0:
            self.submit_role(name, parent, 0)
        found = self.verified(name, parent, self.remote.bin(target))
        assert parent.delegations is not None
        assert parent.delegations.succinct_roles is not None
        if found.role != parent.delegations.succinct_roles.get_role_for_target(target):
            raise _foreign(found.role, f"is where {target} does not belong")
        return found

    def verified(self, name: str, parent: Targets, answer: tuple[str, int, bytes]) -> Bin:
        """Check a bin that the server sent against the publisher's role.

        Raises:
            RefusedError: `bin_foreign` or `bin_rolled_back`.
        """
        role, version, data = answer
        self._check_memory(role, version)
        if version == 0:
            return Bin(name, role, 0, {})
        metadata = parse_targets(data)
        try:
            parent.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise _foreign(role, f"is not signed by {name}: {error}") from error
        if metadata.signed.version != version:
            raise _foreign(role, f"has version {metadata.signed.version} and was announced as {version}")
        return Bin(name, role, version, dict(metadata.signed.targets))

    def _check_memory(self, role: str, version: int) -> None:
        """Notice a server that fell behind what this key signed: signing over it would fork the role."""
        data = self.key.remembered(self.state.root_digest).get(role)
        if data is not None and parse_targets(data).signed.version > version:
            raise RefusedError(
                "bin_rolled_back",
                f"the server has version {version} of {role}, this key signed {parse_targets(data).signed.version}",
                consequence="nothing was signed: devices would refuse the result",
                next_step="if the server was restored from a backup: wherry trust repair",
            )


def signatures_of(metadata: Metadata[Targets], keys: Sequence[Key]) -> int:
    """Return how many of `keys` signed these bytes."""
    good = set()
    for key in keys:
        signature = metadata.signatures.get(key.keyid)
        if signature is not None:
            with contextlib.suppress(UnverifiedSignatureError):
                key.verify_signature(signature, metadata.signed_bytes)
                good.add(key.keyid)
    return len(good)


def signed_bytes(key: PublisherKey, content: Targets) -> bytes:
    """Sign `content` with a publisher's key alone."""
    metadata = Metadata(content)
    with using(key.signer):
        metadata.sign(key.signer)
    return metadata.to_bytes()


def expiry() -> datetime:
    """Return when a role that is signed now expires."""
    return (datetime.now(UTC) + LIFE).replace(microsecond=0)


def _foreign(role: str, why: str) -> RefusedError:
    return RefusedError(
        "bin_foreign",
        f"{role} as the server has it {why}",
        consequence="nothing was signed: the server may have been tampered with",
        next_step="look into the server's audit log",
    )
