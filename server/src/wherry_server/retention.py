"""What devices said is kept for a named time (`Settings.telemetry_days`, `Settings.reports_days`), then deleted in small steps.

Only what lies below a stream's acknowledgement goes: a row above a gap still tells a repeated message from a new one. The
current row per device and model, assignments, decisions and the audit log are not touched.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from wherry_server.db.database import Database
from wherry_server.settings import Settings
from wherry_server.times import now_us

DAY_US = 86_400 * 1_000_000
MESSAGES_PER_STEP = 2_000
"""Messages of one deleting transaction, so that nobody waits long for the writer."""
STEPS_MAX = 50
"""Steps of one round; what is left waits for the next one."""


async def forget(database: Database, project: str, settings: Settings) -> int:
    """Delete what is older than its time, at most so much as one round takes; return how many messages went."""
    now, gone = now_us(), 0
    for table, days in (("telemetry_log", settings.telemetry_days), ("report_log", settings.reports_days)):
        for _ in range(STEPS_MAX):
            count = await _step(database, table, {"project": project, "before": now - days * DAY_US})
            gone += count
            if count < MESSAGES_PER_STEP:
                break
    return gone


async def _step(database: Database, table: str, named: dict[str, Any]) -> int:
    async with database.write() as connection:
        rows = (await connection.execute(_OLD[table], {**named, "limit": MESSAGES_PER_STEP})).all()
        keys = [{"device": row.device_id, "epoch": row.epoch, "seq": row.seq} for row in rows]
        if keys:
            if table == "telemetry_log":
                await connection.execute(_DELETE["telemetry_metric"], keys)
                await connection.execute(_DELETE["telemetry_window"], keys)
            await connection.execute(_DELETE[table], keys)
    return len(keys)


_STREAM_OF = {"telemetry_log": "telemetry", "report_log": "report"}
_OLD = {
    table: text(
        f"SELECT l.device_id, l.epoch, l.seq FROM {table} l JOIN stream s ON s.device_id = l.device_id"  # noqa: S608  # our own names
        f" AND s.stream = '{stream}' AND s.epoch = l.epoch AND s.contiguous >= l.seq"
        " WHERE l.project_id = :project AND l.received_at < :before LIMIT :limit"
    )
    for table, stream in _STREAM_OF.items()
}
_DELETE = {
    table: text(f"DELETE FROM {table} WHERE device_id = :device AND epoch = :epoch AND seq = :seq")  # noqa: S608  # our own names
    for table in (*_STREAM_OF, "telemetry_window", "telemetry_metric")
}
