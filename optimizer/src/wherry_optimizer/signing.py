"""What `wherry-optimizer sign` does: the publisher's key, which never leaves this machine, signs a bundle as a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wherry_shared.errors import RefusedError
from wherry_shared.publishing import PublisherKey, Signed, sign
from wherry_shared.publishing_remote import Remote

OUTCOMES = {
    "signed": "signed",
    "already": "already signed, and the server knows it",
    "cosigned": "added a signature to what stands as proposed",
}


def sign_bundle(
    bundle: Path,
    *,
    server: str | None = None,
    token: str | None = None,
    key: Path | None = None,
    publisher: str | None = None,
) -> tuple[Signed, PublisherKey, bool]:
    """Sign a bundle.

    Args:
        bundle: folder of an OCI image layout.
        server: address; otherwise WHERRY_SERVER or the `client.json` of `wherry dev`.
        token: API token; otherwise WHERRY_TOKEN or `client.json`.
        key: the publisher's key; otherwise WHERRY_PUBLISHER_KEY or ~/.config/wherry/publisher.pem. A server in development
            lets it be made on first use, without a password.
        publisher: name under which to publish; otherwise the one that the key has, or one made from the key.

    Returns:
        What was signed, the key, and whether the key was made just now.

    Raises:
        WherryError: as `publishing.sign`; `key_absent`, there is none and the server is not in development.
    """
    with Remote.find(server, token) as remote:
        made = PublisherKey.find(key) is None
        if made and not remote.state().development:
            raise RefusedError(
                "key_absent",
                "there is no publisher's key here, and only a server in development lets one be made on the way",
                consequence="nothing was signed",
                next_step="name yours with --key; a new one: wherry trust key FILE, which encrypts it, then a ceremony"
                " (docs/runbooks/ceremonies.md)",
            )
        opened = PublisherKey.open(key)
        return sign(bundle, remote, opened, publisher=publisher), opened, made


def describe(signed: Signed, key: PublisherKey, made: bool) -> str:
    """Return what the command prints."""
    lines = []
    if made:
        lines.append(f"made a publisher key: {key.path} (keep it safe, keep a copy; it never leaves this machine)")
    lines += [
        f"{signed.target}  {OUTCOMES[signed.outcome]}",
        f"  manifest   {signed.manifest}",
        f"  publisher  {signed.publisher} (key {key.keyid[:16]})",
        f"  bin        {signed.role} version {signed.version}, kept as {signed.kept}",
        f"next: wherry bundle push {signed.kept.parent.parent.parent}",
    ]
    return "\n".join(lines)


def as_json(signed: Signed, key: PublisherKey) -> dict[str, Any]:
    """Return what the command prints with `--json`."""
    return {
        "target": signed.target,
        "manifest": signed.manifest,
        "publisher": signed.publisher,
        "keyid": key.keyid,
        "bin": signed.role,
        "version": signed.version,
        "outcome": signed.outcome,
        "kept": str(signed.kept),
    }
