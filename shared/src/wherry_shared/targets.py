"""Targets metadata out of foreign bytes: what publisher and server, who do not trust each other, both read first."""

from __future__ import annotations

from tuf.api.metadata import Metadata, Targets
from tuf.api.serialization import DeserializationError, SerializationError

from wherry_shared import limits
from wherry_shared.errors import RefusedError


def parse_targets(data: bytes) -> Metadata[Targets]:
    """Parse untrusted bytes as targets metadata; their signatures are for the caller to check.

    Raises:
        RefusedError: `bin_too_large` or `bin_invalid`.
    """
    if len(data) > limits.TUF_METADATA_BYTES_MAX:
        raise RefusedError("bin_too_large", f"{len(data)} bytes, at most {limits.TUF_METADATA_BYTES_MAX}")
    try:
        metadata = Metadata[Targets].from_bytes(data)
        _ = metadata.signed_bytes  # what has no canonical form (a float) cannot have been signed
    except (DeserializationError, SerializationError, RecursionError) as error:
        raise RefusedError("bin_invalid", f"not TUF metadata: {error}") from error
    if not isinstance(metadata.signed, Targets):
        raise RefusedError("bin_invalid", f"{metadata.signed.type} metadata where targets metadata were expected")
    return metadata
