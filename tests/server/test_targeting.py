"""Shares by stable hash, and the selector language."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_server.targeting import (
    KEY_MAX,
    Compare,
    cut_offs,
    exposed,
    in_turns,
    key_of,
    matches,
    parse_selector,
    share_count,
    signed,
)
from wherry_shared.errors import RefusedError

VIEW = {
    "id": "Zk3x_0-9aQ2mP7rT1vW8bA",
    "name": "line-7",
    "simulated": "false",
    "arch": "x86_64",
    "agent": "0.10.2",
    "cores": 4,
    "memory_bytes": 4_000_000_000,
    "engine": ["onnxruntime", "ai-edge-litert"],
    "engine.onnxruntime": "1.32.0",
    "cpu_feature": [],
    "label.site": "new york",
    "label.floor": "3",
    "runs.file-type": "1.1.0",
    "last_seen": 90,
}

TAKEN = [
    "all",
    "name = line-7",
    'name = "line-7"',
    "name = line-*",
    "name = *7",
    "name = *i*e*",
    "name != lab-*",
    "name in (line-6, line-7)",
    "name IN (x, line-*)",
    'label.site = "new york"',
    "label.floor >= 2 and label.floor < 10",
    "label.absent != x",
    "not label.absent = *",
    "arch = aarch64 or arch = x86_64",
    "arch = aarch64 or arch = x86_64 and cores >= 4",
    "(arch = aarch64 or arch = x86_64) and not cores > 4",
    "agent >= 0.9.0",
    "agent > 0.10.1 and agent <= 0.10.2",
    "engine = onnxruntime",
    "engine.onnxruntime >= 1.32",
    "engine != tflite-runtime",
    "cpu_feature != avx2",
    "memory_bytes >= 2G",
    "memory_bytes = 4000M",
    "cores = 4",
    "last_seen < 2m",
    "last_seen >= 90s",
    "runs.file-type = 1.1.*",
    "NOT NOT all",
]
NOT_TAKEN = [
    "not all",
    "name = line",
    "name = LINE-7",
    "name = lab-*",
    "label.absent = *",
    "label.absent > 3",
    "label.absent < 3",
    "agent >= 0.11",
    "engine.tflite-runtime >= 1",
    "engine != onnxruntime",
    "cpu_feature = avx2",
    "memory_bytes > 4G",
    "last_seen < 1m",
    "enrolled < 400d",
    "label.site > 3",
    "runs.pitch != * and all and not all",
]
REFUSED = [
    "",
    "   ",
    "nonsense",
    "name",
    "name =",
    "name = ",
    "= x",
    "name == x",
    "name = x y",
    "colour = red",
    "label. = x",
    "runs = x",
    "name in ()",
    "name in (a",
    "name in (a,)",
    "(all",
    "all)",
    "all all",
    "not",
    "and",
    "all and",
    "or all",
    "name = and",
    'name = "x',
    "name ~ x",
    "cores > many",
    "cores > 2h",
    "last_seen < 5",
    "last_seen < 5y",
    "last_seen = 5parsec",
    "memory_bytes > 2X",
    "arch > x86",
    "name = \x00",
    'name = "\ud800"',
    "(" * 100 + "all" + ")" * 100,
    "not " * 100 + "all",
    " or ".join(["all"] * 1000),
    "x" * 5000,
]


@pytest.mark.parametrize("selector", TAKEN)
def test_a_selector_takes_the_device(selector: str):
    assert matches(parse_selector(selector), VIEW)


@pytest.mark.parametrize("selector", NOT_TAKEN)
def test_a_selector_leaves_the_device_out(selector: str):
    assert not matches(parse_selector(selector), VIEW)


@pytest.mark.parametrize("selector", REFUSED)
def test_a_selector_that_cannot_be_read_is_refused_with_its_place(selector: str):
    with pytest.raises(RefusedError) as caught:
        parse_selector(selector)
    assert caught.value.code == "bad_selector"


def test_and_binds_closer_than_or_and_not_closest():
    loose = parse_selector("not name = a or name = b and name = c")
    assert matches(loose, {"name": "x"})
    assert not matches(loose, {"name": "a"})
    assert parse_selector("name = b") == Compare(field="name", operator="=", values=("b",))


def test_a_backslash_in_quotes_takes_the_next_character_as_it_is():
    assert matches(parse_selector(r'name = "a\"b\\"'), {"name": 'a"b\\'})


WORDS = ["all", "and", "or", "not", "in", "(", ")", ",", "=", "!=", "<", ">=", "name", "label.x", "cores", "last_seen"]
WORDS += ["3", "2G", "5m", '"q"', '"', "\\", "*", "é", "\n", "engine.", ".", "~"]


@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)))
def test_parsing_either_gives_a_selector_that_evaluates_or_refuses(text: str):
    try:
        selector = parse_selector(text)
    except RefusedError:
        return
    assert matches(selector, VIEW) in (True, False)
    assert matches(selector, {}) in (True, False)


@given(st.text(alphabet="ab*", max_size=12), st.text(alphabet="ab", max_size=12))
def test_a_wildcard_matches_as_the_regular_expression_does(pattern: str, text: str):
    wanted = re.fullmatch(".*".join(re.escape(piece) for piece in pattern.split("*")), text) is not None
    assert matches(Compare(field="name", operator="=", values=(pattern,)), {"name": text}) is wanted


# --- shares -------------------------------------------------------------------------------------

shares = st.sampled_from([0.001, 0.01, 0.05, 0.07, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999])
keys = st.lists(st.integers(0, KEY_MAX), min_size=1, max_size=60, unique=True)


def test_a_share_becomes_the_count_that_a_person_expects():
    assert share_count(0.07, 100) == 7  # in binary fractions 0.07 × 100 is above 7
    assert share_count(0.05, 204) == 11
    assert share_count(0.05, 1) == 1
    assert share_count(1.0, 7) == 7
    assert share_count(0.5, 0) == 0


@given(keys, shares)
def test_a_stage_exposes_exactly_the_ceiling_of_its_share(population: list[int], share: float):
    stored = cut_offs({"": population}, share)
    taken = [key for key in population if exposed(key, "", stored, share)]
    assert len(taken) == share_count(share, len(population))
    assert len(taken) in (math.floor(share * len(population)), math.ceil(share * len(population)), 1)
    assert sorted(taken) == sorted(population)[: len(taken)]


@given(st.lists(keys, min_size=2, max_size=5), st.lists(shares, min_size=2, max_size=5))
def test_a_cut_off_never_falls_whatever_becomes_of_the_members(populations: list[list[int]], asked: list[float]):
    stored: dict[str, int] = {}
    for population, share in zip(populations, asked, strict=False):
        following = cut_offs({"": population}, share, stored)
        assert all(following[name] >= at for name, at in stored.items())
        stored = following


@given(keys, keys)
def test_each_stratum_has_a_share_of_its_own(left: list[int], right: list[int]):
    stored = cut_offs({"left": left, "right": right}, 0.25)
    assert sum(exposed(key, "left", stored, 0.25) for key in left) == share_count(0.25, len(left))
    assert sum(exposed(key, "right", stored, 0.25) for key in right) == share_count(0.25, len(right))


def test_at_the_whole_share_newcomers_of_any_key_belong():
    stored = cut_offs({"": [5, 7]}, 1.0)
    assert exposed(KEY_MAX, "", stored, 1.0)


def test_a_stratum_that_was_empty_when_the_stage_began_is_taken_by_the_key_space():
    stored = cut_offs({"old": [1, 2, 3]}, 0.5)
    assert exposed(KEY_MAX // 2, "new", stored, 0.5)
    assert not exposed(KEY_MAX // 2 + 2, "new", stored, 0.5)


def test_keys_are_independent_between_rollouts_and_keep_their_order_when_signed():
    first = [key_of("salt-1", f"device-{number}") for number in range(2000)]
    second = [key_of("salt-2", f"device-{number}") for number in range(2000)]
    both = sum(a < KEY_MAX // 20 and b < KEY_MAX // 20 for a, b in zip(first, second, strict=True))
    assert both < 20  # 5 % of 5 % of 2000 is 5
    assert sorted(first) == sorted(first, key=signed)
    assert all(-(1 << 63) <= signed(key) < 1 << 63 for key in first)


@given(st.lists(st.sampled_from("aab"), max_size=12))
def test_every_stratum_has_its_first_before_any_has_its_second(strata: list[str]):
    ranked = list(enumerate(strata))
    found = in_turns(ranked, lambda one: one[1])
    assert sorted(found) == ranked, "nobody is lost"
    for name in set(strata):
        assert [one for one in found if one[1] == name] == [one for one in ranked if one[1] == name]
    seen = [sum(other == name for _, other in found[:place]) for place, (_, name) in enumerate(found)]
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("site = berlin", "label.site"),
        ("aagent >= 1.0.0", "agent"),
        ("lable.site = berlin", "label.site"),
        ("label = berlin", "label.KEY"),
        ("last-seen < 2h", "last_seen"),
    ],
)
def test_a_field_with_a_typo_is_answered_with_what_may_be_meant(text: str, meant: str):
    with pytest.raises(RefusedError, match=f"is it {re.escape(meant)}[?]"):
        parse_selector(text)
