"""Whether a device speaks from two places at once, as a copied identity does. Pure.

A place is a boot of a machine and a journal (the name of its report stream). A device moves from place to place and never
comes back: boot ids and stream names are made anew. So a hello from a place that it had left is a return, if it was said
after everything heard before, by its clock or by its streams (`hellos.is_later`); one that somebody repeats is not. A hello
that was held back on its way can look like a return, on a device whose clock was set back between; so only the third
return counts as proof. A copy of the keys alone, which begins a journal of its own and sets its clock back, is not found
here: it is the older one for ever, and nothing that it says in its hellos is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from wherry_shared.wire import Hello

RETURNS_MAX = 3
PLACES_MAX = 8
"""Places that are remembered, the latest ones."""


class Places(NamedTuple):
    """Where a device was."""

    left: tuple[str, ...] = ()
    """Places that it left, the latest last."""
    now: str = ""
    returns: int = 0


def place(hello: Hello) -> str:
    """Return the place from which a hello comes."""
    return f"{hello.boot[:64]}/{hello.streams.get('report', ('', 0, 0))[0][:64]}"


def judge(before: Places, hello: Hello, *, later: bool) -> tuple[Places, bool]:
    """Take in a hello that was accepted; true if the identity is in two places.

    Args:
        before: what is known.
        hello: accepted as news.
        later: whether it was certainly said after the one before it.
    """
    here = place(hello)
    if here == before.now or not later:
        return before, False
    returned = here in before.left
    left = tuple(one for one in (*before.left, before.now) if one and one != here)[-PLACES_MAX:]
    after = Places(left, here, before.returns + returned)
    return after, after.returns >= RETURNS_MAX
