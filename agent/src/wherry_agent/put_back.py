"""What follows when the home of this device was put back as it once was: a card written again, a disk exchanged by a thief. Pure.

Seals and marks cannot show it, since all of them are old together; only who heard this device speak can. An acknowledgement
of a report that this device has not made yet is that proof: it made it in the life that was taken away. The numbers from here
to there are known to the server, which would take the next reports for repeated ones. So a new stream begins, with what is
owed, and says of each model what really runs. What else the lost life knew comes back from the server: the offer by its number,
trust by the next refresh.
"""

from __future__ import annotations

from wherry_agent.state import Acked, Compared, Idle, renumbered
from wherry_agent.turn import Turn
from wherry_shared import reasons


def noticed(turn: Turn, event: Acked) -> None:
    """Begin anew if the server has more of this stream than this device ever said."""
    known = turn.state.seq
    if not event.fresh or event.stream != turn.state.stream or event.seq < known:
        return
    turn.state = renumbered(turn.state, event.fresh)
    serial = turn.state.offer.serial if turn.state.offer is not None else 0
    words = f"the server has report {event.seq} of this device, which has made {known - 1}"
    for name, slot in tuple(turn.state.models.items()):
        if slot.incumbent is not None and isinstance(slot.phase, Idle | Compared):
            turn.report(
                name,
                "confirmed_idle" if slot.incumbent.idle else "confirmed",
                offered=slot.incumbent.offered,
                serial=serial,
                reason=reasons.PUT_BACK,
                detail=words,
            )
        elif slot.told is not None:
            turn.report(name, slot.told.state, serial=serial, reason=reasons.PUT_BACK, detail=words)
