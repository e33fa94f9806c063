"""Canonical JSON for signatures at the speed of the standard library: half of the CPU of a poll went into spelling it out.

securesystemslib walks every value in Python, python-tuf asks it 17 times in a poll, and offers no place for another. What the C encoder
writes, with sorted keys and no spaces, is the same text once characters are put back that JSON escapes and canonical JSON does not
(line ends of keys in PEM). Where a value may be a float, which canonical JSON does not know, securesystemslib itself is asked.
"""

from __future__ import annotations

import json
import re
from typing import Any

from securesystemslib.formats import encode_canonical
from tuf.api.serialization import json as of_tuf

_FLOAT = re.compile(r"(?:^|[\[:,])-?(?:[0-9]+[.eE]|NaN|Infinity)")
"""A float, or text in a string that looks like one: then it only takes longer."""
_ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|(.))")
_CHARACTERS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def encode(value: Any) -> str:
    """Return what `securesystemslib.formats.encode_canonical` does.

    Raises:
        securesystemslib.exceptions.FormatError: it has no canonical form.
    """
    try:
        text = _encoder.encode(value)
    except (TypeError, ValueError):
        return str(encode_canonical(value))
    if _FLOAT.search(text) is not None:
        return str(encode_canonical(value))
    return _ESCAPE.sub(_raw, text) if "\\" in text else text


def _raw(found: re.Match[str]) -> str:
    """Return what an escape stands for; a quote and a backslash stay escaped."""
    code, letter = found.groups()
    return chr(int(code, 16)) if code else _CHARACTERS.get(letter, found[0])


def use() -> None:
    """Let python-tuf encode so in this process: a courier, or another that only verifies."""
    vars(of_tuf)["encode_canonical"] = encode
