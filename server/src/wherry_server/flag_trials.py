"""How devices on which a rollout put a flag's variant settle: the server judges, since a device tries no flag by itself.

A device has the variant once its hello names the offer that is its current one. From then on (`noticed_at`) the requests that its
models answer are its trial, by the terms of the plan: `trial.min_requests` with a bearable share of errors confirm it,
`trial.max_s` with fewer do so without traffic, provided that it was heard of since, and too many errors send it back
(`returned`). One that returned, or was withdrawn, is no longer given the variant by `flag_values`, and its next offer says so.

Requests are those of the model that the plan measures, or of all. Telemetry does not say which code path asked; it says what
happened on the device. Windows count from their start, by the device's clock, so that none straddles the change;
`comparison` counts the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.plan import Plan
from wherry_server.targeting import exact
from wherry_shared import reasons
from wherry_shared.wire import Trial

SECOND_US = 1_000_000
TRIED = frozenset({"running", "paused", "done"})
"""States of a rollout in which devices settle."""


@dataclass(slots=True)
class Settled:
    """What became of devices since the last look."""

    noticed: list[str] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Of assignments, for `write`."""

    @property
    def returned(self) -> set[str]:
        """Devices that go back."""
        return {one["device"] for one in self.changes if one["outcome"] == "returned"}

    def __bool__(self) -> bool:
        """Tell whether there is anything to write."""
        return bool(self.noticed or self.changes)


def verdict(trial: Trial, *, requests: int, errors: int, waited_us: int, heard_us: int) -> str:
    """Return what a device's trial comes to: an outcome, or nothing yet. Pure.

    Args:
        trial: its terms.
        requests: answered since the device has the variant.
        errors: of those, failed.
        waited_us: since it has it.
        heard_us: from then until it was last heard of.
    """
    judged = max(requests, trial.min_requests)
    if errors and errors >= trial.errors_min and errors > exact(trial.error_rate_max) * judged:
        return "returned"
    if requests >= trial.min_requests:
        return "confirmed"
    if waited_us >= trial.max_s * SECOND_US and heard_us >= trial.max_s * SECOND_US:
        return "confirmed_idle"
    return ""


async def look(connection: AsyncConnection, row: Any, plan: Plan, now: int) -> Settled:
    """Return what is known of the devices under way that is not written yet."""
    found = Settled()
    found.noticed = [one.device_id for one in await connection.execute(_KNOWS, {"rollout": row.id})]
    tried = await connection.execute(_TRIED, {"rollout": row.id, "project": row.project_id, "measure": plan.measure})
    for one in tried:
        requests, errors = int(one.requests), int(one.errors)
        outcome = verdict(
            plan.trial,
            requests=requests,
            errors=errors,
            waited_us=now - one.noticed_at,
            heard_us=one.last_seen_at - one.noticed_at,
        )
        if outcome:
            reason = reasons.HEALTH_ERRORS if outcome == "returned" else ""
            found.changes.append(
                {
                    "rollout": row.id,
                    "device": one.device_id,
                    "outcome": outcome,
                    "reason": reason,
                    "detail": f"{errors} of {requests} requests failed" if reason else "",
                    "now": now,
                    "requests": requests,
                    "errors": errors,
                }
            )
    return found


async def write(connection: AsyncConnection, row: Any, settled: Settled, now: int) -> None:
    """Write what `look` returned, where it still holds."""
    if settled.noticed:
        await connection.execute(_NOTICE, {"rollout": row.id, "devices": settled.noticed, "now": now})
    if settled.changes:
        await connection.execute(_SETTLE, settled.changes)


_KNOWS = text(
    "SELECT a.device_id FROM assignment a JOIN device d ON d.id = a.device_id JOIN offer o ON o.device_id = a.device_id"
    " WHERE a.rollout_id = :rollout AND a.outcome = 'exposed' AND a.noticed_at = 0"
    " AND d.offer_epoch = o.epoch AND d.offer_serial = o.serial"
)
_TRIED = text(
    "SELECT a.device_id, a.noticed_at, d.last_seen_at, COALESCE(sum(w.requests), 0) AS requests,"
    " COALESCE(sum(w.errors), 0) AS errors FROM assignment a JOIN device d ON d.id = a.device_id"
    " LEFT JOIN telemetry_window w ON w.device_id = a.device_id AND w.project_id = :project AND w.start >= a.noticed_at"
    " AND w.arm <> 'shadow' AND (:measure = '' OR w.model = :measure)"
    " WHERE a.rollout_id = :rollout AND a.outcome = 'exposed' AND a.noticed_at > 0"
    " GROUP BY a.device_id, a.noticed_at, d.last_seen_at"
)
_NOTICE = text(
    "UPDATE assignment SET noticed_at = :now WHERE rollout_id = :rollout AND device_id IN :devices"
    " AND outcome = 'exposed' AND noticed_at = 0"
).bindparams(bindparam("devices", expanding=True))
_SETTLE = text(
    "UPDATE assignment SET outcome = :outcome, reason = :reason, detail = :detail, settled_at = :now, requests = :requests,"
    " errors = :errors WHERE rollout_id = :rollout AND device_id = :device AND outcome = 'exposed'"
)
