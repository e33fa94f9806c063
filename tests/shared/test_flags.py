"""Flags of an offer: what may stand there, and when two sets are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest

from wherry_shared import flags

GOOD: dict[str, Any] = {
    "night-mode": True,
    "retries": 3,
    "threshold": 0.5,
    "site.name": "Łódź",
    "camera": {"size": [640, 480], "flip": None, "crop": {"left": 1}},
}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def test_five_types_are_flags() -> None:
    assert flags.trouble({}) == ""
    assert flags.trouble(GOOD) == ""
    assert flags.trouble({"deep": deep(flags.DEPTH_MAX)}) == ""


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"a": None}, "'a': null"),
        ({"a": [1]}, "'a': a list"),
        ({"a": 2**63}, "'a': an int has 64 bits"),
        ({"a": {"b": [math.nan]}}, "'a': a float is finite"),
        ({"a": math.inf}, "'a': a float is finite"),
        ({"a": deep(flags.DEPTH_MAX + 1)}, "'a': nested more than"),
        ({"a": b"bytes"}, "'a': bytes is not JSON"),
        ({"": 1}, "flag ''"),
        ({"a b": 1}, "flag 'a b'"),
        ({"-a": 1}, "flag '-a'"),
        ({"k" * 129: 1}, "flag 'kkk"),
        ({f"f{n}": n for n in range(flags.FLAGS_MAX + 1)}, "257 flags, at most 256"),
        ({"a": "x" * flags.FLAGS_BYTES_MAX}, "bytes, at most 32768"),
    ],
)
def test_what_is_no_flag_is_named(bad: dict[str, Any], named: str) -> None:
    assert named in flags.trouble({"fine": True, **bad} if len(bad) == 1 else bad)


def test_types_count_when_flags_are_compared() -> None:
    assert flags.same({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1})
    for other in (True, 1.0, "1", {"a": 1}):
        assert not flags.same({"a": 1}, {"a": other})
    assert flags.changed({"same": 1, "typed": 1, "gone": 1}, {"same": 1, "typed": True, "new": 0}) == [
        "gone",
        "new",
        "typed",
    ]
