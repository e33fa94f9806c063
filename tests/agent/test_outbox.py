"""When a numbered message is sent, and sent again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wherry_agent.outbox import RESEND_MAX_S, RESEND_MIN_S, Outbox
from wherry_shared.limits import STREAM_IN_FLIGHT_MAX


def test_at_most_twenty_are_on_the_way_and_an_acknowledgement_makes_room() -> None:
    box = Outbox()
    held = list(range(1, 101))
    assert box.due(held, 0.0, 0.0) == held[:STREAM_IN_FLIGHT_MAX]
    assert box.due(held, 1.0, 0.0) == []
    assert box.due(held[5:], 1.0, 0.0) == held[20:25]


def test_what_is_not_acknowledged_is_sent_again_ever_more_rarely() -> None:
    box, now_s, times = Outbox(), 0.0, []
    for _ in range(8):
        assert box.due([1], now_s, 0.0) == [1]
        next_s = box.next_s(now_s)
        assert next_s is not None
        times.append(next_s)
        now_s += next_s
    assert times[0] == RESEND_MIN_S
    assert times == sorted(times)
    assert times[-1] == RESEND_MAX_S


def test_a_new_connection_sends_everything_again() -> None:
    box = Outbox()
    box.due([1, 2], 0.0, 0.0)
    box.forget()
    assert box.due([1, 2], 0.1, 0.0) == [1, 2]


def test_nothing_held_means_nothing_due() -> None:
    box = Outbox()
    box.due([1], 0.0, 0.0)
    assert box.due([], 9.0, 0.0) == []
    assert box.next_s(9.0) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 100), st.floats(0, 0.999)), max_size=30))
def test_every_held_number_is_sent_in_the_end(steps: list[tuple[int, float, float]]) -> None:
    box, now_s, acknowledged = Outbox(), 0.0, 0
    for acked, wait_s, jitter in steps:
        now_s += wait_s
        acknowledged = max(acknowledged, acked)
        held = list(range(acknowledged + 1, 61))
        due = box.due(held, now_s, jitter)
        assert due == sorted(due)
        assert set(due) <= set(held[:STREAM_IN_FLIGHT_MAX])
    sent: set[int] = set()
    held = list(range(acknowledged + 1, 61))
    for _ in range(100):
        now_s += RESEND_MAX_S * 2
        sent |= set(box.due(held, now_s, 0.0))
        held = [number for number in held if number not in sent]
    assert held == []
