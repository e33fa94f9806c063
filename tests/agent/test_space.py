"""Room for models: the budget and the reserve, and what gives way for a download."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wherry_agent.disk import Disk
from wherry_agent.space import Space, short_words
from wherry_agent.store import Store
from wherry_shared.digest import of_bytes

BLOBS = [bytes([number]) * 100 for number in range(4)]
DIGESTS = [of_bytes(blob) for blob in BLOBS]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path, Disk())
    for age, (digest, blob) in enumerate(zip(DIGESTS, BLOBS, strict=True)):
        made.add(digest, blob)
        os.utime(made.path_of(digest), (age, age))
    return made


def space(folder: Path, budget: int = 0, reserve: int = 0) -> Space:
    return Space(folder, Disk(), reserve_bytes=reserve, budget_bytes=budget)


def here(store: Store) -> list[int]:
    return [number for number, digest in enumerate(DIGESTS) if store.has(digest, 100)]


def test_without_a_budget_nothing_stays_that_is_not_needed(tmp_path: Path, store: Store) -> None:
    assert space(tmp_path).tidy({DIGESTS[0]}) == 300
    assert here(store) == [0]


def test_within_a_budget_older_versions_stay(tmp_path: Path, store: Store) -> None:
    assert space(tmp_path, 300).tidy({DIGESTS[0]}) == 100
    assert here(store) == [0, 2, 3]


def test_a_download_that_does_not_fit_the_budget_costs_the_oldest_first(tmp_path: Path, store: Store) -> None:
    assert space(tmp_path, 500).trouble(150, lambda: {DIGESTS[0]}) is None
    assert here(store) == [0, 2, 3]


def test_what_is_needed_stays_and_the_download_waits_with_its_figures(tmp_path: Path, store: Store) -> None:
    trouble = space(tmp_path, 500).trouble(350, lambda: {DIGESTS[0], DIGESTS[1]})
    assert trouble is not None
    assert (trouble.reason, here(store)) == ("disk_full", [0, 1])
    assert "350 bytes" in trouble.detail
    assert "300 left" in trouble.detail
    assert trouble.retry_after_s


def test_while_a_courier_is_at_work_nothing_is_removed(tmp_path: Path, store: Store) -> None:
    trouble = space(tmp_path, 500).trouble(150, None)
    assert trouble is not None
    assert trouble.reason == "disk_full"
    assert here(store) == [0, 1, 2, 3]


def test_a_disk_that_is_short_costs_the_whole_cache(tmp_path: Path, store: Store) -> None:
    trouble = space(tmp_path, 1 << 20, reserve=1 << 60).trouble(1, lambda: {DIGESTS[0]})
    assert trouble is not None
    assert (trouble.reason, here(store)) == ("disk_full", [0])
    assert trouble.detail.endswith(f"of which {1 << 60} have to stay so"), trouble.detail


@pytest.mark.parametrize(("free", "said"), [(150, False), (149, True)])
def test_a_download_that_would_touch_the_reserve_is_short_by_a_byte(free: int, said: bool) -> None:
    words = short_words(100, free, 50)
    assert words == (
        f"100 bytes are to be downloaded, {free} bytes are free, of which 50 have to stay so" if said else ""
    )
