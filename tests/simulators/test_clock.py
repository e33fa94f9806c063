from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wherry_simulators.clock import Agenda


@given(st.lists(st.integers(0, 50)))
def test_items_come_by_time_and_then_in_the_order_in_which_they_were_put_down(dues):
    agenda: Agenda[int] = Agenda()
    for index, due in enumerate(dues):
        agenda.at(due, index)
    taken = [(agenda.take(), agenda.now_ms) for _ in dues]
    assert [index for index, _ in taken] == sorted(range(len(dues)), key=lambda index: (dues[index], index))
    assert [now for _, now in taken] == sorted(dues)
    assert agenda.due_ms is None


def test_what_lies_in_the_past_is_due_now_and_time_never_runs_back():
    agenda: Agenda[str] = Agenda()
    agenda.at(100, "later")
    assert agenda.take() == "later"
    agenda.at(5, "past")
    agenda.after(1, "next")
    assert (agenda.take(), agenda.now_ms) == ("past", 100)
    assert (agenda.take(), agenda.now_ms) == ("next", 101)
