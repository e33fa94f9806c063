"""TUF metadata out of foreign bytes: what publishers, people of a ceremony and server, who do not trust each other, all read first."""

from __future__ import annotations

from typing import TypeVar

from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError, SerializationError

from wherry_shared import limits
from wherry_shared.errors import RefusedError

S = TypeVar("S", Root, Snapshot, Targets, Timestamp)


def parse(kind: type[S], data: bytes) -> Metadata[S]:
    """Parse untrusted bytes as metadata of one kind; their signatures are for the caller to check.

    Raises:
        RefusedError: `metadata_too_large` or `metadata_invalid`.
    """
    bytes_max = limits.TUF_ROOT_BYTES_MAX if kind is Root else limits.TUF_METADATA_BYTES_MAX
    if len(data) > bytes_max:
        raise RefusedError("metadata_too_large", f"{len(data)} bytes of {kind.type}, at most {bytes_max}")
    try:
        metadata = Metadata[S].from_bytes(data)
        _ = metadata.signed_bytes  # what has no canonical form (a float) cannot have been signed
    except (DeserializationError, SerializationError, RecursionError) as error:
        raise RefusedError("metadata_invalid", f"not TUF metadata: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise RefusedError("metadata_invalid", f"{metadata.signed.type} metadata where {kind.type} was expected")
    return metadata


def parse_targets(data: bytes) -> Metadata[Targets]:
    """Parse untrusted bytes as a bin, a publisher's role or the targets role.

    Raises:
        RefusedError: `metadata_too_large` or `metadata_invalid`.
    """
    return parse(Targets, data)
