"""What a report makes of an assignment. Pure: one table, read by ingest inside its transaction.

A report speaks of an assignment only if it names its rollout; forwards it must also name the assigned bundle and attempt.
Backwards only one thing counts: what answers requests on the device now.

With a neutral reason (`reasons.NEUTRAL`) the device stays exposed until it settles or is late, or is excused. Any other
reason, also one that this release does not know, counts as a failure.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from wherry_shared import reasons
from wherry_shared.wire import Report

Outcome: TypeAlias = Literal[
    "exposed",
    "confirmed",
    "confirmed_idle",
    "proved",
    "returned",
    "failed",
    "refused",
    "excused",
    "withdrawn",
    "revert_pending",
    "reverted",
    "superseded",
]
Standing: TypeAlias = Literal[
    "pending",
    "silent",
    "late",
    "proved",
    "confirmed",
    "confirmed_idle",
    "returned",
    "failed",
    "refused",
    "excused",
    "withdrawn",
    "revert_pending",
    "reverted",
    "superseded",
]
"""Where a device stands: its outcome, or what it counts as until it has one."""
FAILURES = ("returned", "failed", "refused")
ENDED = (*FAILURES, "excused")
"""The device has ended the attempt and runs what it ran before."""
BACKWARDS = frozenset({"withdrawn", "revert_pending", "reverted"})
STANDING = ("exposed", "confirmed", "confirmed_idle", "proved")
"""`proved`: the first round of a shadow, a split or a blue-green went well; the incumbent answers."""
LIVE = (*STANDING, *ENDED)
"""Outcomes of devices that a halt or a revert still has to bring back."""

EXCUSES = frozenset(
    {
        reasons.BELOW_FLOOR,
        reasons.REVOKED,
        reasons.CHILD_FAILED,
        reasons.RESTARTS,
        reasons.GROUP,
        reasons.MEMORY_SHORT,
        reasons.ENGINE_MISSING,
    }
)
"""Neutral reasons with which a device ends an attempt for good: it will not try this one again, so nobody waits for it."""


class Assigned(NamedTuple):
    """What an assignment says, as far as reports are compared with it."""

    rollout: str
    attempt: int
    from_manifest: str
    to_manifest: str
    outcome: str
    tried: bool = False
    """Whether it is to run beside the incumbent, or to stand by, and not to take over."""


class Change(NamedTuple):
    """What becomes of it."""

    outcome: Outcome
    reason: str
    settled: bool
    """Whether this is an end, with a time of its own."""


def judge(assigned: Assigned, report: Report) -> Change | None:
    """Return what a report makes of an assignment, None if it does not speak of it or changes nothing."""
    if report.rollout != assigned.rollout or assigned.outcome == "superseded":
        return None
    if assigned.outcome in BACKWARDS:
        return _backwards(assigned, report)
    if report.manifest != assigned.to_manifest or report.attempt != assigned.attempt:
        return None
    match report.state:
        case "compared" | "standby" if assigned.tried and report.mode != "replace":
            return Change("proved", report.reason, settled=True)
        case "confirmed" | "confirmed_idle" if report.running == assigned.to_manifest:
            return Change(report.state, report.reason, settled=True)
        case "returned" | "failed" | "refused" if report.reason not in reasons.NEUTRAL:
            return Change(report.state, report.reason, settled=True)
        case "returned" | "failed" | "refused" if report.reason in EXCUSES:
            return Change("excused", report.reason, settled=True)
        case "safe":
            return Change("failed", report.reason or "safe", settled=True)
        case (
            "confirmed"
            | "confirmed_idle"
            | "returned"
            | "failed"
            | "refused"
            | "fetching"
            | "judging"
            | "trial"
            | "standby"
            | "compared"
            | "waiting"
            | "empty"
            | "removed"
        ):
            return Change("exposed", report.reason or report.state, settled=False)


def _backwards(assigned: Assigned, report: Report) -> Change | None:
    if report.running == assigned.from_manifest:
        if assigned.outcome == "revert_pending":
            return Change("reverted", report.reason, settled=True)
        return None
    if report.running == assigned.to_manifest and assigned.outcome != "revert_pending":
        return Change("revert_pending", report.reason, settled=False)  # it had changed after all
    return None
