"""What `wherry-optimizer encrypt` does: content keys are made and kept on this machine, and sealed for the server's `keys` role."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wherry_shared import content_keys, key_files
from wherry_shared.encrypting import Encrypted, encrypt
from wherry_shared.errors import RefusedError
from wherry_shared.key_ring import KeyRing

RING_VARIABLE = "WHERRY_CONTENT_KEYS"
DEFAULT_RING = Path("~/.config/wherry/content-keys")


def encrypt_bundle(
    bundle: Path, output: Path, recipient: Path, ring: Path | None = None, *, fresh: bool = False
) -> Encrypted:
    """Encrypt a bundle.

    Args:
        bundle: folder of an OCI image layout.
        output: folder that is made.
        recipient: file with the public key of the `keys` role.
        ring: folder of this publisher's content keys; otherwise WHERRY_CONTENT_KEYS or ~/.config/wherry/content-keys. Its own
            key is made on first use, under the password that WHERRY_KEY_PASSWORD_FILE holds or somebody types.
        fresh: make new content keys.

    Raises:
        WherryError: as `encrypting.encrypt`; `recipient_missing`, `password_missing`.
    """
    try:
        role = content_keys.parse_public_pem(recipient.read_bytes())
    except OSError as error:
        raise RefusedError(
            "recipient_missing",
            f"{recipient}: {error.strerror}",
            consequence="nothing was encrypted",
            next_step="ask the keeper of the server's keys role for its public.pem (wherry keys init)",
        ) from error
    keys = KeyRing((ring or Path(os.environ.get(RING_VARIABLE) or DEFAULT_RING)).expanduser())
    if not keys.names():
        keys.add(key_files.password_of(f"the new content keys in {keys.folder}", fresh=True))
    return encrypt(bundle, output, role, keys, fresh=fresh)


def as_json(done: Encrypted, output: Path) -> dict[str, Any]:
    """Return what was done as plain values."""
    return {"path": str(output), **asdict(done)}


def describe(done: Encrypted, output: Path) -> str:
    """Say what was done, and what comes next."""
    reused = f", {done.reused} under the content key that it had before" if done.reused else ""
    return (
        f"{output} ({done.manifest}): {done.blobs} files encrypted{reused}, {done.bytes} bytes at rest for"
        f" {done.plain_bytes} of plaintext\nNext: wherry-optimizer sign {output}, then wherry bundle push {output}"
    )
