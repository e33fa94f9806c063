"""Which bytes a conditional or ranged GET of an immutable object is to be answered with (RFC 9110 §13, §14). Pure.

One range is honoured; several, other units and malformed ranges are ignored, as the standard allows, and the whole
object is the answer. An object's ETag is strong and never changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """A status with the bytes [start, stop) that go with it: 200, 206, 304 or 416."""

    status: int
    start: int = 0
    stop: int = 0

    @property
    def length(self) -> int:
        """How many bytes follow."""
        return self.stop - self.start


def answer(size: int, etag: str, headers: Mapping[str, str]) -> Answer:
    """Decide how to answer a GET or HEAD of an object.

    Args:
        size: of the object, in bytes.
        etag: with its quotes.
        headers: of the request, found by lower-case name.
    """
    if _none_match(headers.get("if-none-match"), etag):
        return Answer(304)
    whole = Answer(200, 0, size)
    wanted = headers.get("range")
    condition = headers.get("if-range")
    if wanted is None or (condition is not None and condition.strip() != etag):
        return whole
    match = _RANGE.fullmatch(wanted.strip())
    if match is None or match[1] == match[2] == "":
        return whole
    if match[1] == "":
        count = int(match[2])
        return Answer(206, max(0, size - count), size) if count and size else Answer(416)
    first = int(match[1])
    last = int(match[2]) if match[2] else size - 1
    if match[2] and last < first:
        return whole  # not a valid range: ignored
    if first >= size:
        return Answer(416)
    return Answer(206, first, min(last + 1, size))


def _none_match(condition: str | None, etag: str) -> bool:
    if condition is None:
        return False
    names = [name.strip() for name in condition.split(",")]
    return "*" in names or any(name.removeprefix("W/") == etag for name in names)
