"""Publishing by several people: who signs together, signing what another proposed, and going on with new keys.

What a person says about the others (their public keys, the threshold) counts, never what the server says about them: a
server that could name the keys of a bin could publish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from securesystemslib.signer import Key
from tuf.api.metadata import Delegations, Metadata, SuccinctRoles, Targets

from wherry_shared.errors import RefusedError
from wherry_shared.key_holders import using
from wherry_shared.publishing_bins import PublisherKey, Session, expiry, signatures_of, signed_bytes
from wherry_shared.publishing_remote import Remote
from wherry_shared.signed_files import parse_targets

Outcome = Literal["accepted", "proposed"]


@dataclass(frozen=True)
class Adopted:
    """One role that was signed."""

    role: str
    version: int
    outcome: Outcome


@dataclass(frozen=True)
class Proposal:
    """What another of a publisher's keys signed and waits for more."""

    publisher: str
    role: str
    replaces: int
    metadata: Metadata[Targets]
    changes: tuple[str, ...]
    """Line by line, for the person who is asked to sign."""


def adopt(
    remote: Remote,
    key: PublisherKey,
    name: str,
    *,
    partners: Sequence[Key] = (),
    threshold: int = 1,
    former: Sequence[Key] = (),
    former_threshold: int = 1,
) -> list[Adopted]:
    """Sign a publisher's roles with the keys that it has now: the first time, or after keys were replaced.

    Everything that former keys released stays released, since a version means the same bytes for ever. Where others
    have to sign too, they co-sign the publisher's role first; said again then, this goes on with the bins.

    Args:
        remote: the server.
        key: one of the publisher's keys.
        name: the publisher.
        partners: the other keys, as their holders gave them.
        threshold: how many sign together.
        former: keys that signed before; without them nothing that exists is taken over.
        former_threshold: how many of them signed together.

    Raises:
        RefusedError: `publisher_unknown`, `keys_differ` (the delegation names other keys), `bin_foreign`, or what the
            server refused.
    """
    session = Session(remote, key)
    known = next((one for one in session.state.publishers if one.name == name), None)
    if known is None:
        raise RefusedError("publisher_unknown", f"{name[:80]} is not a publisher here")
    mine = {one.keyid: one for one in (key.signer.public_key, *partners)}
    if set(known.keyids) != set(mine) or known.threshold != threshold:
        raise RefusedError(
            "keys_differ",
            f"{name} is delegated to {known.threshold} of {', '.join(keyid[:12] for keyid in known.keyids)}; "
            f"you said {threshold} of {', '.join(keyid[:12] for keyid in mine)}",
            consequence="nothing was signed",
            next_step="name exactly the other holders with --with, or find out who changed the delegation",
        )
    key.keep_partners(session.state.root_digest, name, list(mine.values()), threshold)
    done: list[Adopted] = []
    current = _taken_over(remote, name, list(mine.values()), threshold, former, former_threshold)
    if current is None or signatures_of(current, list(mine.values())) < threshold:
        if remote.proposal(name) is not None:
            return done  # another began: that is to be co-signed
        version = current.signed.version if current is not None else 0
        bins = SuccinctRoles(sorted(mine), threshold, known.bits, name)
        content = Targets(
            version=version + 1,
            expires=expiry(),
            targets=current.signed.targets if current is not None else {},
            delegations=Delegations(mine, succinct_roles=bins),
        )
        outcome = _submit(session, name, content, version)
        done.append(Adopted(name, version + 1, outcome))
        if outcome == "proposed":
            return done
    for role in sorted(set(known.unsigned) - {name}):
        old = _taken_over(remote, role, list(mine.values()), threshold, former, former_threshold)
        if old is None or signatures_of(old, list(mine.values())) >= threshold:
            continue
        content = Targets(version=old.signed.version + 1, expires=expiry(), targets=old.signed.targets)
        done.append(Adopted(role, content.version, _submit(session, role, content, old.signed.version)))
    return done


def proposals(remote: Remote, key: PublisherKey) -> Iterator[Proposal]:
    """Find what waits for the signature of this key.

    Raises:
        RefusedError: `bin_foreign`, `metadata_invalid`, or what the server refused.
    """
    session = Session(remote, key)
    for known in session.state.publishers:
        if key.keyid not in known.keyids:
            continue
        for role in known.proposed:
            found = _proposal(session, remote, known.name, role)
            if found is not None and key.keyid not in found.metadata.signatures:
                yield found


def cosign(remote: Remote, key: PublisherKey, proposal: Proposal) -> Outcome:
    """Add this key's signature to a proposal, and hand it in.

    Raises:
        RefusedError: what the server refused.
    """
    metadata = proposal.metadata
    with using(key.signer):
        metadata.sign(key.signer, append=True)
    outcome = Session(remote, key).submit(proposal.role, metadata.to_bytes(), proposal.replaces)
    return "accepted" if outcome == "accepted" else "proposed"


def _proposal(session: Session, remote: Remote, name: str, role: str) -> Proposal | None:
    try:
        data = remote.proposal(role)
    except RefusedError as error:
        if error.code in ("role_unknown", "publisher_unsigned"):
            return None
        raise
    if data is None:
        return None
    metadata = parse_targets(data)
    partners, threshold = session.key.partners(session.state.root_digest, name)
    _, version, there = remote.role(role)
    before = parse_targets(there).signed if version else None
    return Proposal(
        name, role, version, metadata, tuple(_changes(role == name, before, metadata.signed, partners, threshold))
    )


def _changes(
    is_role: bool, before: Targets | None, after: Targets, partners: Sequence[Key], threshold: int
) -> Iterator[str]:
    yield f"version {after.version}, good until {after.expires:%Y-%m-%d}"
    old = dict(before.targets) if before is not None else {}
    for path, target in after.targets.items():
        if path not in old or old[path].hashes != target.hashes:
            yield f"  + {path} sha256:{target.hashes.get('sha256', '?')}"
    yield from (f"  - {path}" for path in old if path not in after.targets)
    if is_role:
        bins = after.delegations.succinct_roles if after.delegations is not None else None
        if bins is None or set(bins.keyids) != {key.keyid for key in partners} or bins.threshold != threshold:
            raise RefusedError(
                "keys_differ",
                "the proposal delegates bins to other keys than those that you know to sign with you",
                consequence="nothing was signed",
                next_step="say who signs with you: wherry trust adopt NAME --with FILE.pub --threshold N",
            )
        yield f"  bins: {bins.threshold} of {', '.join(keyid[:12] for keyid in bins.keyids)} sign"


def _taken_over(
    remote: Remote, role: str, mine: Sequence[Key], threshold: int, former: Sequence[Key], former_threshold: int
) -> Metadata[Targets] | None:
    """Return what stands in a role, if present or former keys signed it; None if nobody did yet."""
    _, version, data = remote.role(role)
    if version == 0:
        return None
    metadata = parse_targets(data)
    now, then = signatures_of(metadata, mine), signatures_of(metadata, former)
    if metadata.signed.version != version or (now < threshold and (not former or then < former_threshold)):
        raise RefusedError(
            "bin_foreign",
            f"{role} as the server has it is signed neither by the publisher's keys nor by those named as former",
            consequence="nothing was signed: the server may have been tampered with",
            next_step="name the keys that were replaced: --former FILE.pub",
        )
    return metadata


def _submit(session: Session, role: str, content: Targets, replaces: int) -> Outcome:
    outcome = session.submit(role, signed_bytes(session.key, content), replaces)
    return "accepted" if outcome == "accepted" else "proposed"
