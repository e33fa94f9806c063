"""Measures candidates and controls over the same periods: from telemetry windows to differences, a lane of a wave at a time.

A lane of a wave is taken when `lanes.due` says so. What was taken is in the rollout's progress, so a lane is never taken
twice, and a decision can be replayed from its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import TextClause, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server.evidence import SECOND_US, Scan
from wherry_server.gates import APP, QUANTILES, Gate
from wherry_server.lanes import Due, due
from wherry_server.plan import Plan
from wherry_server.rollout import Lane, Progress, Taken, with_taken
from wherry_server.sequential import CONTROLS_MAX, Pairs, draw, merge, pair_up
from wherry_server.targeting import KEY_MAX, control_rank, unsigned
from wherry_shared.sketch import Sketch

BASELINE_PERIODS = 4
"""Whole periods before a wave by which latency with the incumbent is known."""
LATENCY_DEVICES_MAX = 100
"""Candidates of a wave whose latency is measured, and CONTROLS_MAX times as many controls: sketches are bulky."""
LATENCY_REQUESTS_MIN = 30
"""Requests that a shape bucket needs before and after (contracts.md §4), whatever the quantile."""
TAIL_REQUESTS_MIN = 3
"""Of those, beyond the quantile: fewer, and it is the slowest request that is compared."""


async def take(
    connection: AsyncConnection, row: Any, plan: Plan, progress: Progress, scan: Scan, moment: int
) -> list[Taken]:
    """Measure the lanes that have ended. Controls are members that nobody has exposed to the rollout."""
    length = plan.period_s * SECOND_US
    asked = {"rollout": row.id, "length": length, "tried": plan.paired}
    waves = [one.wave for one in await connection.execute(_WAVES, asked)]
    compared, taken = progress.compared, []
    for one in due(plan, compared, waves, moment):
        since = one.wave * length
        members = (await connection.execute(_WAVE, {**asked, "begin": since, "end": since + length})).all()
        lanes: dict[str, Lane] = {}
        for gate in plan.compared:
            known = compared.of(gate.metric)[one.lane]
            if gate.metric in QUANTILES:
                devices = _measurable(plan, known, members, scan)
                measured = await latencies(connection, row, plan, gate, one, devices)
            else:
                measured = await values(connection, row, plan, gate, one)
            if plan.paired:
                lanes[gate.metric] = Lane(pairs=own_pairs(members, *measured))
            else:
                lanes[gate.metric] = lane_of(plan, known, members, scan, *measured)
        taken.append(Taken(wave=one.wave, lane=one.lane, lanes=lanes))
        compared = with_taken(compared, taken[-1:])
    return taken


def own_pairs(members: Sequence[Any], candidates: dict[str, float], controls: dict[str, float]) -> Pairs:
    """Return one difference of each device that answers some requests with the candidate, the others as before.

    Which requests those are is decided by a hash, so where the bundle does no harm the difference is expected to be 0; of latency
    both are over what the device took before, so that neither side is the other's denominator.
    """
    parts = [
        pair_up([candidates[member.device_id]], [controls[member.device_id]])
        for member in members
        if member.device_id in candidates and member.device_id in controls
    ]
    return merge(parts)


def lane_of(
    plan: Plan,
    known: Lane,
    members: Sequence[Any],
    scan: Scan,
    candidates: dict[str, float],
    controls: dict[str, float],
) -> Lane:
    """Return what a wave adds to a lane: differences within each stratum, of devices that were measured."""
    mine: dict[str, list[tuple[int, float]]] = {}
    for member in members:
        value = candidates.get(member.device_id)
        if value is not None:
            mine.setdefault(member.stratum, []).append(
                (control_rank(unsigned(member.share_key), plan.held_back), value)
            )
    theirs: dict[str, list[tuple[int, float]]] = {}
    for one in (*scan.free, *scan.held):
        value = controls.get(one.device)
        if value is not None:
            theirs.setdefault(one.stratum, []).append((control_rank(one.key, plan.held_back), value))
    parts: list[Pairs] = []
    spent: dict[str, int] = {}
    for stratum, wave in mine.items():
        pairs, after = draw(wave, theirs.get(stratum, []), known.spent.get(stratum, KEY_MAX + 1))
        if pairs:
            parts.append(pairs)
            spent[stratum] = after
    return Lane(pairs=merge(parts), spent=spent)


async def values(
    connection: AsyncConnection, row: Any, plan: Plan, gate: Gate, one: Due
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the value of each device that answered: with the candidate, and with anything else."""
    named = {**_meant(row, plan), "begin": one.begin, "end": one.end, "length": plan.period_s * SECOND_US}
    if gate.metric == "crash_rate":
        rows = await connection.execute(_CRASHES.of(plan), named)
        cap = gate.caps(plan.period_s)[one.lane]
        return _sides(rows, lambda found: min(float(found.crashes) * 3600 / (found.periods * plan.period_s) / cap, 1.0))
    if gate.metric.startswith(APP):
        told = {**named, "name": gate.metric.removeprefix(APP), "least": gate.floor, "cap": gate.most}
        return _sides(await connection.execute(_TOLD.of(plan), told), lambda found: gate.part(float(found.value)))
    return _sides(
        await connection.execute(_ERRORS.of(plan), {**named, "cap": gate.unit}), lambda found: float(found.value)
    )


def _sides(rows: Iterable[Any], value: Callable[[Any], float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the value of each device by what it ran: the candidate, anything else."""
    candidates: dict[str, float] = {}
    controls: dict[str, float] = {}
    for found in rows:
        (candidates if found.candidate else controls)[found.device_id] = value(found)
    return candidates, controls


def _measurable(plan: Plan, known: Lane, members: Sequence[Any], scan: Scan) -> list[str]:
    """Return the candidates and unused controls whose latency is worth reading, by the order of keys."""
    wave = sorted(members, key=lambda member: int(member.share_key))[:LATENCY_DEVICES_MAX]
    if plan.paired:
        return [member.device_id for member in wave]
    ranked = (
        (control_rank(one.key, plan.held_back), known.spent.get(one.stratum, KEY_MAX + 1), one.device)
        for one in (*scan.free, *scan.held)
    )
    fresh = sorted(((rank, device) for rank, spent, device in ranked if rank < spent), reverse=True)
    return [
        *(member.device_id for member in wave),
        *(device for _, device in fresh[: LATENCY_DEVICES_MAX * CONTROLS_MAX]),
    ]


async def latencies(
    connection: AsyncConnection, row: Any, plan: Plan, gate: Gate, one: Due, devices: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the latency of each device over its own before the wave: with the candidate, and with anything else."""
    length = plan.period_s * SECOND_US
    spans = {
        "before": ((one.wave - BASELINE_PERIODS) * length, one.wave * length),
        "after": (one.begin, one.end),
    }
    sketches: dict[tuple[str, str, bool], dict[str, Sketch]] = {}
    for span, (begin, end) in spans.items():
        named = {**_meant(row, plan), "devices": devices, "begin": begin, "end": end}
        for found in await connection.execute(_BODIES.of(plan), named):
            merged = sketches.setdefault((found.device_id, span, bool(found.candidate)), {})
            for bucket, bins in _timed.decode(found.body).latency_us.items():
                sketch = sketch_of(bins)
                if sketch is not None:
                    merged.setdefault(f"{found.model} {bucket}", Sketch()).merge(sketch)
    sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for device in devices:
        before = sketches.get((device, "before", False), {})
        for side, candidate in zip(sides, (True, False), strict=True):
            ratio = ratio_of(before, sketches.get((device, "after", candidate), {}), QUANTILES[gate.metric])
            if ratio is not None:
                side[device] = min(ratio / gate.unit, 1.0)
    return sides


def _meant(row: Any, plan: Plan) -> dict[str, Any]:
    """Return the parameters by which `_Asked` knows what is rolled out."""
    if plan.flag:
        return {"project": row.project_id, "rollout": row.id, "model": plan.measure}
    (planned,) = plan.models
    return {"project": row.project_id, "model": planned.model, "manifest": planned.manifest}


def sketch_of(bins: dict[str, int]) -> Sketch | None:
    """Return what a device sent as a sketch, None if it is none: what one device says must not stop a rollout."""
    try:
        sketch = Sketch.from_wire(bins)
        sketch.quantile(1.0)
    except (ValueError, OverflowError):
        return None
    return sketch


def requests_min(quantile: float) -> int:
    """Return the requests that a shape bucket needs on both sides for a quantile to be told from chance."""
    return max(LATENCY_REQUESTS_MIN, round(TAIL_REQUESTS_MIN / (1 - quantile)))


def ratio_of(before: dict[str, Sketch], after: dict[str, Sketch], quantile: float) -> float | None:
    """Return the mean ratio of quantiles over the shape buckets with enough requests on both sides, None without one."""
    needed = requests_min(quantile)
    ratios = [
        (after[bucket].quantile(quantile) or 0.0) / former
        for bucket, known in before.items()
        if bucket in after and min(known.count, after[bucket].count) >= needed and (former := known.quantile(quantile))
    ]
    return sum(ratios) / len(ratios) if ratios else None


class _Timed(msgspec.Struct):
    latency_us: dict[str, dict[str, int]] = {}


_timed = msgspec.json.Decoder(_Timed)
# Whose windows are the candidate's: of a bundle by its manifest, of a flag by when the device had the variant.
_OF_BUNDLE = {
    "candidate": "CASE WHEN w.manifest = :manifest THEN 1 ELSE 0 END",
    "assigned": "",
    "measured": "w.model = :model",
}
_OF_FLAG = {
    "candidate": "CASE WHEN a.noticed_at > 0 AND w.start >= a.noticed_at"
    " AND NOT (a.outcome = 'returned' AND w.start >= a.settled_at) THEN 1 ELSE 0 END",
    "assigned": " LEFT JOIN assignment a ON a.rollout_id = :rollout AND a.device_id = w.device_id",
    "measured": "(:model = '' OR w.model = :model)",
}


class _Asked(NamedTuple):
    """A question about windows, of a bundle and of a flag."""

    bundle: TextClause
    flag: TextClause

    def of(self, plan: Plan) -> TextClause:
        return self.flag if plan.flag else self.bundle


def _asked(question: str) -> _Asked:
    """Fill in whose windows are the candidate's, and which windows of alias `w` are meant."""
    windows = (
        "{assigned} WHERE w.project_id = :project AND {measured} AND w.start >= :begin AND w.start < :end"
        " AND w.arm <> 'shadow'"
    )
    whole = question.replace("{windows}", windows)
    return _Asked(text(whole.format_map(_OF_BUNDLE)), text(whole.format_map(_OF_FLAG)))


_BODIES = _Asked(
    *(
        one.bindparams(bindparam("devices", expanding=True))
        for one in _asked(
            "SELECT w.device_id, {candidate} AS candidate, w.model, w.body FROM telemetry_window w{windows}"
            " AND w.requests > 0 AND w.device_id IN :devices"
        )
    )
)
_WAVES = text(
    "SELECT DISTINCT exposed_at / :length AS wave FROM assignment WHERE rollout_id = :rollout AND tried = :tried"
)
_WAVE = text(
    "SELECT device_id, stratum, share_key FROM assignment WHERE rollout_id = :rollout"
    " AND exposed_at >= :begin AND exposed_at < :end AND tried = :tried AND outcome <> 'superseded'"
)
# One value per device: the mean over its periods of the share of failed requests, none above the cap.
_ERRORS = _asked(
    "SELECT device_id, candidate, avg(CASE WHEN errors >= requests * CAST(:cap AS DOUBLE PRECISION) THEN 1.0"
    " ELSE errors / (requests * CAST(:cap AS DOUBLE PRECISION)) END) AS value"
    " FROM (SELECT w.device_id, {candidate} AS candidate, w.start / :length AS period, sum(w.requests) AS requests,"
    " sum(w.errors) AS errors FROM telemetry_window w{windows} AND w.requests > 0"
    " GROUP BY w.device_id, candidate, period) AS periods GROUP BY device_id, candidate"
)
# One row per device: crashes of its worker, and the periods in which it served at all.
_CRASHES = _asked(
    "SELECT w.device_id, {candidate} AS candidate, sum(w.crashes) AS crashes, count(DISTINCT w.start / :length) AS periods"
    " FROM telemetry_window w{windows} AND (w.requests > 0 OR w.crashes > 0) GROUP BY w.device_id, candidate"
)
# One value per device: the mean over its periods of the mean of what was told, none below the least or above the cap.
_TOLD = _asked(
    "SELECT device_id, candidate, avg(CASE WHEN value < CAST(:least AS DOUBLE PRECISION) THEN"
    " CAST(:least AS DOUBLE PRECISION) WHEN value > CAST(:cap AS DOUBLE PRECISION) THEN CAST(:cap AS DOUBLE PRECISION)"
    " ELSE value END) AS value"
    " FROM (SELECT w.device_id, {candidate} AS candidate, w.start / :length AS period, sum(w.total) / sum(w.count) AS value"
    " FROM telemetry_metric w{windows} AND w.name = :name"
    " GROUP BY w.device_id, candidate, period) AS periods GROUP BY device_id, candidate"
)
