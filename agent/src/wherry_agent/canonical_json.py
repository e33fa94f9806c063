"""Canonical JSON for signatures without walking every value in Python: that was a quarter of the CPU of a poll.

python-tuf asks securesystemslib 17 times in a poll, and offers no place for another. What msgspec writes with sorted keys is the same
text once characters are put back that JSON escapes and canonical JSON does not (line ends of keys in PEM). Where a value may be
something that canonical JSON does not know (a float, of which `null` may come), securesystemslib itself is asked.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from securesystemslib.formats import encode_canonical
from tuf.api.serialization import json as of_tuf

_FLOAT = re.compile(r"[\[:,]-?[0-9]+[.eE]")
"""A float, or text in a string that looks like one: then it only takes longer."""
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_CHARACTERS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_encoder = msgspec.json.Encoder(order="sorted")


def encode(value: Any) -> str:
    """Return what `securesystemslib.formats.encode_canonical` does.

    Raises:
        securesystemslib.exceptions.FormatError: it has no canonical form.
    """
    try:
        text = _encoder.encode(value).decode()
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        return str(encode_canonical(value))
    if not isinstance(value, dict | list) or "null" in text or _FLOAT.search(text) is not None:
        return str(encode_canonical(value))
    return _ESCAPE.sub(_raw, text) if "\\" in text else text


def _raw(found: re.Match[str]) -> str:
    """Return what an escape stands for; a quote and a backslash stay escaped."""
    code, letter = found.groups()
    return chr(int(code, 16)) if code else _CHARACTERS.get(letter, found[0])


def use() -> None:
    """Let python-tuf encode so in this process: a courier, or another that only verifies."""
    vars(of_tuf)["encode_canonical"] = encode
