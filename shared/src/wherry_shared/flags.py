"""Feature flags of one device: which values an offer may carry, and when two sets are the same. Pure.

A flag has a key and a value of one of five types: bool, int (64 bits), float (finite), str, or an object (any JSON below
it). The server decides who gets which value; a device only keeps what its offer says and answers with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

FLAGS_MAX = 256
FLAGS_BYTES_MAX = 32 * 1024
"""All flags of one device as JSON: an offer has to fit an MQTT message beside them."""
KEY_CHARS_MAX = 128
DEPTH_MAX = 8
"""Levels of lists and objects below a flag's value."""

_KEY = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{KEY_CHARS_MAX - 1}}}")
_encoder = msgspec.json.Encoder(order="deterministic")


def trouble(flags: Mapping[str, Any]) -> str:
    """Say what is wrong with the flags of an offer, naming the flag; empty if nothing is."""
    if len(flags) > FLAGS_MAX:
        return f"{len(flags)} flags, at most {FLAGS_MAX}"
    for key, value in sorted(flags.items()):
        if not _KEY.fullmatch(key):
            return f"flag {key[:80]!r}: a key has 1 to {KEY_CHARS_MAX} of A-Z a-z 0-9 . _ - and begins with a letter or digit"
        if value is None or isinstance(value, list):
            what = "null" if value is None else "a list"
            return f"flag {key!r}: {what} is none of bool, int, float, str, object"
        why = _unfit(value, DEPTH_MAX)
        if why:
            return f"flag {key!r}: {why}"
    size = len(encode(flags))
    return f"flags of {size} bytes, at most {FLAGS_BYTES_MAX}" if size > FLAGS_BYTES_MAX else ""


def encode(flags: Mapping[str, Any]) -> bytes:
    """Return flags as JSON; equal flags give equal bytes, and 1, 1.0 and true differ."""
    return _encoder.encode(dict(flags))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two sets are the same, types included."""
    return one is other or (one.keys() == other.keys() and encode(one) == encode(other))


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys that came, went, or have another value or type."""
    kept = old.keys() & new.keys()
    return sorted(
        (old.keys() ^ new.keys()) | {key for key in kept if _encoder.encode(old[key]) != _encoder.encode(new[key])}
    )


def _unfit(value: Any, depth: int) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return ""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**63 else "an int has 64 bits"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a float is finite"
    if not isinstance(value, list | dict):
        return f"{type(value).__name__} is not JSON"
    if depth == 0:
        return f"nested more than {DEPTH_MAX} deep"
    for item in value.values() if isinstance(value, dict) else value:
        why = _unfit(item, depth - 1)
        if why:
            return why
    return ""
