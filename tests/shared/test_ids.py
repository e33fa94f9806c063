"""Names, versions and share keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_shared import ids, topics
from wherry_shared.errors import RefusedError


def test_a_minted_device_id_has_the_shape_of_one() -> None:
    minted = {ids.new_device_id() for _ in range(100)}
    assert len(minted) == 100
    assert all(ids.is_device_id(device) for device in minted)


@pytest.mark.parametrize("text", ["", "a" * 21, "a" * 23, "a" * 21 + ".", "a" * 21 + "/", "a" * 21 + "\n", "é" * 22])
def test_what_is_not_a_device_id(text: str) -> None:
    assert not ids.is_device_id(text)


@pytest.mark.parametrize("name", ["a", "defect-detector", "x1", "0", "a" * 64])
def test_names_that_are_allowed(name: str) -> None:
    assert ids.check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a/b", "..", "a" * 65, "a\n", "ä"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        ids.check_name(name)
    assert caught.value.code == "bad_name"


def test_versions_are_ordered_as_semver_says() -> None:
    # the example of SemVer 2.0.0, clause 11.4.4, with neighbours
    ordered = [
        "0.9.9",
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "1.0.1",
        "1.10.0",
        "2.0.0",
    ]
    shuffled = ordered[6:] + ordered[:6]
    assert sorted(shuffled, key=lambda text: ids.parse_version(text).key) == ordered


@pytest.mark.parametrize(
    "text", ["", "1", "1.0", "01.0.0", "1.0.0+build", "1.0.0-", "1.0.0-01", "v1.0.0", "1.0.0 ", "9" * 70]
)
def test_versions_that_are_refused(text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        ids.parse_version(text)
    assert caught.value.code == "bad_version"


@pytest.mark.parametrize("path", ["a", "a/1.0.0/x", "/1.0.0", "a/", "../1.0.0", "a/policy"])
def test_target_paths_that_are_refused(path: str) -> None:
    with pytest.raises(RefusedError):
        ids.split_target(path)


@given(st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True), st.integers(0, 999), st.integers(0, 999), st.integers(0, 999))
def test_a_target_path_comes_apart_as_it_was_made(model: str, major: int, minor: int, patch: int) -> None:
    version = f"{major}.{minor}.{patch}"
    assert ids.split_target(ids.target_path(model, version)) == (model, version)


def test_share_keys_are_uniform_and_independent_between_salts() -> None:
    devices = [f"device-{number}" for number in range(20_000)]
    low = {device for device in devices if ids.share_key("rollout-a", device) < 2**64 // 4}
    other = {device for device in devices if ids.share_key("rollout-b", device) < 2**64 // 4}
    # binomial(20000, 1/4): five standard deviations are 306; of the intersection, expected 1250, five are 171
    assert abs(len(low) - 5_000) < 306
    assert abs(len(low & other) - 1_250) < 171


def test_topics_come_apart_as_they_were_made() -> None:
    device = ids.new_device_id()
    assert topics.parse_up(topics.up(device, "report")) == (device, "report")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "w1",
        "w1/00/x/report",
        "w2/00/{d}/report",
        "w1/{s}/{d}/offer",
        "w1/{s}/{d}/report/x",
        "w1/zz/{d}/report",
        "w1/{s}/+/report",
    ],
)
def test_topics_that_are_refused(topic: str) -> None:
    device = "A" * 22
    with pytest.raises(RefusedError) as caught:
        topics.parse_up(topic.format(d=device, s=ids.shard(device)))
    assert caught.value.code == "bad_topic"


@given(st.text())
def test_parsing_a_topic_never_does_anything_but_parse_or_refuse(text: str) -> None:
    try:
        device, kind = topics.parse_up(text)
    except RefusedError:
        return
    assert topics.up(device, kind) == text
