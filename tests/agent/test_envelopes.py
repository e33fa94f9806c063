"""Forged offers: however many come, the real one is looked at."""

from __future__ import annotations

import random

from wherry_agent.envelopes import FROM_BROKER_MAX, MINUTE_S, STARTS_PER_MINUTE_MAX, WAIT_MIN_S, Envelopes

REAL = b"the director's"


def forge(box: Envelopes, count: int, seed: int = 0) -> None:
    draws = random.Random(seed)
    for serial in range(count):
        box.add(b"forged %d %d" % (seed, serial), (9, serial), draws.random(), from_server=False)


def test_the_same_bytes_wait_once_and_are_forgotten_when_settled() -> None:
    box = Envelopes()
    for _ in range(3):
        box.add(REAL, (1, 1), 0.0, from_server=False)
    assert box.take(0.0) == REAL
    box.settle(REAL)
    assert (len(box), box.take(0.0), box.next_s(0.0)) == (0, None, None)


def test_no_number_of_forgeries_displaces_an_offer_that_waits_to_be_looked_at_again() -> None:
    box = Envelopes()
    box.add(REAL, (1, 1), 0.0, from_server=False)
    assert box.take(0.0) == REAL
    box.again(REAL, 0.0, 0.0, "disk full")
    forge(box, 1000)
    assert len(box) == FROM_BROKER_MAX
    taken = [box.take(WAIT_MIN_S) for _ in range(2)]
    assert REAL in taken, "they take turns with the newcomers"


def test_what_could_not_be_verified_is_told_until_it_is_settled() -> None:
    box = Envelopes()
    box.add(REAL, (1, 7), 0.0, from_server=False)
    assert box.troubles() == [], "nobody looked yet"
    box.again(REAL, 0.0, 0.0, "no space left (disk_full)")
    assert box.troubles() == ["1.7: no space left (disk_full)"]
    box.accepted((1, 7))
    assert box.troubles() == []


def test_a_stream_of_forgeries_starts_a_bounded_number_of_couriers_a_minute() -> None:
    box, starts = Envelopes(), []
    for second in range(600):
        forge(box, 20, seed=second)
        while (data := box.take(float(second))) is not None:
            starts.append(second)
            box.settle(data)
    assert (
        max(sum(1 for at in starts if first <= at < first + MINUTE_S) for first in range(540)) <= STARTS_PER_MINUTE_MAX
    )
    assert len(starts) >= 9 * STARTS_PER_MINUTE_MAX, "the rate is used"
    assert box.crowded()
    assert not box.crowded(), "told once"


def test_what_the_server_itself_gives_is_looked_at_in_a_stream_of_forgeries() -> None:
    box, taken = Envelopes(), []
    forge(box, 100)
    box.add(REAL, (1, 1), 0.5, from_server=True)
    forge(box, 100, seed=1)
    while (data := box.take(0.0)) is not None:
        taken.append(data)
        box.settle(data)
    assert taken[0] == REAL


def test_after_an_acceptance_older_claims_are_dropped() -> None:
    box = Envelopes()
    for serial in range(1, 5):
        box.add(b"%d" % serial, (1, serial), 0.0, from_server=False)
    box.accepted((1, 3))
    assert (len(box), box.take(0.0)) == (1, b"4")


def test_looking_again_backs_off() -> None:
    box = Envelopes()
    box.add(REAL, (1, 1), 0.0, from_server=False)
    now_s, waits = 0.0, []
    for _ in range(5):
        assert box.take(now_s) == REAL
        box.again(REAL, now_s, 0.0, "disk full")
        wait_s = box.next_s(now_s)
        assert wait_s is not None
        waits.append(wait_s)
        now_s += wait_s
    assert waits == [WAIT_MIN_S * 2**tries for tries in range(5)]
