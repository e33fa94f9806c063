"""What follows from a file of a trusted version that is not what it was: it is brought again, and said so. Pure.

A scrub found it; what the worker has in memory serves on meanwhile. Nothing of it is remembered: a mending that a restart
cut short is found again by the next scrub.
"""

from __future__ import annotations

from wherry_agent.state import Altered, Compared, Idle, Installed, Mend, Mended
from wherry_agent.turn import Turn
from wherry_shared import reasons
from wherry_shared.wire import ModelState


def altered(turn: Turn, event: Altered) -> None:
    """A scrub found a version altered on the disk."""
    if _version(turn, event) is None:
        return  # it gave way meanwhile
    turn.effects.append(Mend(event.model, event.manifest, event.variant))
    _report(turn, event, reasons.DIGEST_MISMATCH, f"altered on the disk, fetched again: {event.detail}")


def mended(turn: Turn, event: Mended) -> None:
    """The courier brought it again, or could not."""
    if event.reason:
        _report(turn, event, event.reason, f"altered on the disk, not fetched again yet: {event.detail}")
    else:
        _report(turn, event, "", "what was altered on the disk was fetched again")


def _version(turn: Turn, event: Altered | Mended) -> Installed | None:
    slot = turn.state.models.get(event.model)
    for version in (slot.incumbent, slot.last_good) if slot is not None else ():
        if version is not None and (version.manifest, version.loadable.variant) == (event.manifest, event.variant):
            return version
    return None


def _report(turn: Turn, event: Altered | Mended, reason: str, detail: str) -> None:
    """Tell the server, unless another version of the model is on its way: then that one's reports come first."""
    slot, version = turn.state.models.get(event.model), _version(turn, event)
    if slot is None or slot.incumbent is None or version is None or not isinstance(slot.phase, Idle | Compared):
        return
    incumbent = slot.incumbent
    words = detail if version is incumbent else f"{version.loadable.target}, the last good version: {detail}"
    serial = turn.state.offer.serial if turn.state.offer is not None else 0
    state: ModelState = "confirmed_idle" if incumbent.idle else "confirmed"
    turn.report(event.model, state, offered=incumbent.offered, serial=serial, reason=reason, detail=words)
