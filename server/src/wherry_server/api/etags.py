"""What a thing is now, as an entity tag, and changes that hold only while it is still that (RFC 9110, If-Match)."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from fastapi import Header

from wherry_shared.errors import RefusedError

IfMatch = Annotated[
    str,
    Header(max_length=400, description="the ETag that the change is meant for; what is something else by now stays"),
]


def etag(state: Any) -> str:
    """Return the tag of a state, any JSON value."""
    return f'"{hashlib.sha256(msgspec.json.encode(state, order="sorted")).hexdigest()[:32]}"'


def check(if_match: str, now: str, code: str, what: str) -> None:
    """Let a change pass if it is meant for what is there now, or for whatever is there.

    Raises:
        RefusedError: `code`.
    """
    if not if_match or if_match.strip() == "*":
        return
    if now not in {tag.strip() for tag in if_match.split(",")}:
        raise RefusedError(
            code,
            f"{what} is not what it was",
            consequence="nothing was changed",
            next_step="read it again, and send the ETag of that answer as If-Match",
        )
