"""The quick canonical JSON is the same text as securesystemslib's, or nothing where that has none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from tuf.api.metadata import Metadata, Snapshot

from wherry_agent import canonical_json, trust

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(VALUES)
def test_it_is_the_same_text(value: Any) -> None:
    try:
        expected = encode_canonical(value)
    except FormatError:
        with pytest.raises(FormatError):
            canonical_json.encode(value)
        return
    assert canonical_json.encode(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"b": 1, "a": [True, None, "x"]},
        'quote " and \\ and \n and \t and \x00 and \x7f and é and 😀',
        {"é": 1, "e": 2, "z": 3, "\uffff": 4, "😀": 5},
        {"null": None, "a": [False, 2**63, 2**64, -(2**63) - 1]},
        ["1.5", ":1.5", ",2e3", "[NaN", 10**40, -1],
        {"": {}},
        [],
    ],
)
def test_so_are_the_corners(value: Any) -> None:
    assert canonical_json.encode(value) == encode_canonical(value)


@pytest.mark.parametrize("value", [1.5, [0.1], {"a": float("nan")}, {"a": [1, -float("inf")]}, 1e300, object(), {1}])
def test_what_has_no_canonical_form_has_none_here(value: Any) -> None:
    with pytest.raises(FormatError):
        canonical_json.encode(value)


def test_the_courier_verifies_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Asked:
        def encode(self, value: object) -> bytes:
            asked.append(value)
            return b"{}"

    monkeypatch.setattr(canonical_json, "_encoder", Asked())
    assert trust.Online
    assert Metadata(Snapshot()).signed_bytes == b"{}"
    assert asked
