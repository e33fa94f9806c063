"""What follows from a publisher's word that a version is bad, after it came here: out of service, or out of the way. Pure.

`replace`: what serves goes on until another version runs; nothing comes or comes back that is revoked. `stop`: it serves no
more, also where nothing is left to serve then; that is the one exception to "never none".
"""

from __future__ import annotations

from dataclasses import replace

from wherry_agent.state import (
    Cancel,
    Collect,
    Fetching,
    Judging,
    OnTrial,
    Proving,
    Queued,
    Refreshed,
    Resolving,
    Revocation,
    Safe,
    State,
    Swapping,
    Waiting,
)
from wherry_agent.turn import Turn, kept
from wherry_shared import reasons


def watched(state: State) -> dict[str, list[str]]:
    """Return model → manifests that this device has or is about to have: what to ask the publisher's policy about."""
    found: dict[str, list[str]] = {}
    for name, slot in state.models.items():
        job = getattr(slot.phase, "job", None)
        held = slot.held.version if slot.held is not None else None
        manifests = {version.manifest for version in (slot.incumbent, slot.last_good, held) if version is not None}
        if job is not None:
            manifests.add(job.offered.manifest)
        if manifests - {""}:
            found[name] = sorted(manifests - {""})
    return found


def revoked(turn: Turn, event: Refreshed) -> None:
    """Obey what the policies of the publishers say of versions that are here."""
    for word in event.revoked:
        _candidate(turn, word)
        _former(turn, word)
    for word in event.revoked:  # once all that one could go back to were looked at
        slot = turn.state.models.get(word.model)
        incumbent = slot.incumbent if slot is not None else None
        if slot is not None and incumbent is not None and incumbent.manifest == word.manifest and word.effect == "stop":
            detail = f"{incumbent.loadable.target} was revoked by its publisher, and serves no more"
            turn.give_up(word.model, slot, reasons.REVOKED, detail)


def _candidate(turn: Turn, word: Revocation) -> None:
    slot = turn.state.models.get(word.model)
    if slot is None:
        return
    phase = slot.phase
    detail = "it was revoked by its publisher meanwhile"
    match phase:
        case Resolving(job) | Fetching(job) | Judging(job) | Queued(job) | Waiting(job):
            if job.offered.manifest == word.manifest:
                turn.effects.append(Cancel(word.model))
                turn.refuse(word.model, slot, job, reasons.REVOKED, detail)
        case Swapping(job) | OnTrial(job) | Proving(job):
            if job.offered.manifest == word.manifest and (slot.incumbent is not None or word.effect == "stop"):
                turn.go_back(word.model, slot, job, reasons.REVOKED, detail, phase.counts)
        case _:
            pass  # no candidate, or one that does not answer


def _former(turn: Turn, word: Revocation) -> None:
    """Leave nothing revoked where this device could go back to, or try again by itself."""
    slot = turn.state.models.get(word.model)
    if slot is None:
        return
    if slot.last_good is not None and slot.last_good.manifest == word.manifest and word.effect == "stop":
        slot = replace(slot, last_good=None)
    if slot.held is not None and slot.held.version.manifest == word.manifest and isinstance(slot.phase, Safe):
        slot = replace(slot, held=None)
    if slot is not turn.state.models[word.model]:
        turn.put(word.model, slot)
        turn.effects.append(Collect(kept(turn.state)))
