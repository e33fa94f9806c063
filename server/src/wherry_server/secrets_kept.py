"""What is kept of a secret that is shown once."""

from __future__ import annotations

import hashlib


def hash_secret(secret: str) -> str:
    """Return what is stored of a secret. Secrets are random and long, so that a plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()
