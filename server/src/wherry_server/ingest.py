"""Stores what devices say, once, in order, and acknowledges it after the commit.

One call takes a batch, one transaction stores it: log rows (deduplicated by stream number), the current row per device and
model where the report is newer, outcomes of assignments, measurement windows, hellos. Whatever is wrong with a message
is counted under its code and stops nobody else's. Acknowledgements are per stream, up to where it has no gap.

The same class serves the MQTT consumer (through `collector`) and the HTTP fall-back, also at the same time in two
processes: what is new is decided inside the write transaction.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import asyncpg
import msgspec
from sqlalchemy import Table, bindparam, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import clones, fleet, outcomes
from wherry_server import hellos as hello_rules
from wherry_server.db import bulk
from wherry_server.db.database import Database
from wherry_server.db.tables import (
    Device,
    DeviceModel,
    ReportLog,
    Stream,
    TelemetryLog,
    TelemetryMetric,
    TelemetryWindow,
    table,
)
from wherry_server.streams import SEQ_MAX, Position
from wherry_server.times import now_us
from wherry_shared import frames, reasons, wire
from wherry_shared.errors import RefusedError
from wherry_shared.ids import is_device_id
from wherry_shared.limits import (
    METRIC_NAME,
    METRICS_PER_WINDOW_MAX,
    REPORT_DETAIL_CHARS_MAX,
    SAMPLE_BYTES_MAX,
    SAMPLES_PER_WINDOW_MAX,
)

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["hello", "report", "telemetry"]
KINDS: tuple[Kind, ...] = ("hello", "report", "telemetry")
Frame: TypeAlias = tuple[str, bytes]
"""(device by topic or by authentication, frame)."""
KEYS_CACHED_MAX = 200_000
SEEN_EVERY_US = 10_000_000
"""New reports and telemetry refresh `last_seen_at` at most this often; new hellos always do. What was stored before says
nothing about now: anybody may send it again."""
LOGS_FOR_US = 600 * 1_000_000
"""An open request for logs is repeated for this long; then the operator has to ask again."""
LOG_EVERY_US = 10_000_000
"""One log line per code of refusal in this time; all are counted."""
PUT_BACK_EVERY_US = 3600 * 1_000_000
"""A device that says again and again that its home was put back is written down this often."""
_DEVICE = table(Device)
WINDOWS_MAX = 200
"""Windows of one telemetry message."""


class Behind(NamedTuple):
    """A device whose hello named another offer than the current one."""

    device: str
    epoch: int
    serial: int


@dataclass(slots=True)
class Stored:
    """What became of a batch."""

    acks: list[Frame] = field(default_factory=list)
    """(device, sealed `Ack`), one per stream that was spoken of."""
    moved: bool = False
    """Whether an assignment, a device or a model row changed, so that rollouts may go on."""
    hellos: list[Behind] = field(default_factory=list)
    new: int = 0
    """Messages that were not stored before."""
    left: list[str] = field(default_factory=list)
    """Devices that left the fleet for good, of which the broker still has a hello."""


_Insert: TypeAlias = Callable[[AsyncConnection, Table, Sequence[str], Sequence[tuple[Any, ...]]], Awaitable[None]]


class _Parsed(NamedTuple):
    device: str
    message: Any
    payload: bytes


class Ingest:
    """Stores batches of frames of one project."""

    def __init__(self, database: Database, master_key: bytes, project: str) -> None:
        self._database = database
        self._master = master_key
        self._project = project
        self._keys: dict[str, bytes] = {}
        self._seen: dict[str, int] = {}
        self._logged: dict[str, int] = {}
        self._put_back: dict[str, int] = {}
        self.refused: Counter[str] = Counter()
        """Messages that were not stored, by code."""
        self.lost = 0
        """Messages that devices had to give up before they were stored."""

    async def store(self, kind: Kind, received: Sequence[Frame]) -> list[Frame]:
        """Store frames of one kind and return the acknowledgement frames: (device, frame)."""
        return (await self.store_batch({kind: received})).acks

    async def store_batch(self, received: Mapping[Kind, Sequence[Frame]]) -> Stored:
        """Store frames of all kinds in one transaction."""
        now = now_us()
        hellos = self._open("hello", wire.Hello, received.get("hello", ()), now)
        reports = self._open("report", wire.Report, received.get("report", ()), now)
        telemetry = self._open("telemetry", wire.Telemetry, received.get("telemetry", ()), now)
        if not (hellos or reports or telemetry):
            return Stored()
        try:
            return await self._store(hellos, reports, telemetry, now, bulk.insert_fresh)
        except asyncpg.UniqueViolationError:  # another process stored some of it since this one looked
            return await self._store(hellos, reports, telemetry, now, bulk.insert_new)

    async def _store(
        self, hellos: list[_Parsed], reports: list[_Parsed], telemetry: list[_Parsed], now: int, insert: _Insert
    ) -> Stored:
        result = Stored()
        async with self._database.write() as connection:
            spoken = {parsed.device for part in (hellos, reports, telemetry) for parsed in part}
            known = await self._active(connection, spoken)
            if known != spoken:
                result.left = await self._left(connection, {parsed.device for parsed in hellos} - known)
                hellos, reports, telemetry = (self._of_known(part, known, now) for part in (hellos, reports, telemetry))
            positions = await self._streams(connection, reports, telemetry, now)
            reached = {key: position.highest for key, position in positions.items()}
            fresh_reports = self._new(reports, "report", positions, now)
            fresh_telemetry = self._new(telemetry, "telemetry", positions, now)
            late = [p for p in fresh_reports if p.message.seq < reached[p.device, "report", p.message.epoch]]
            await self._store_reports(connection, fresh_reports, late, positions, now, insert)
            await self._store_telemetry(connection, fresh_telemetry, now, insert)
            await self._save_streams(connection, positions, now)
            hellos, places = await self._news(connection, hellos, now)
            await self._store_hellos(connection, hellos, places, now)
            fresh = {parsed.device for parsed in (*fresh_reports, *fresh_telemetry)}
            await self._touch(connection, fresh - {hello.device for hello in hellos}, now)
            wanted = await self._log_requests(connection, {device for device, _, _ in positions}, now)
        result.new = len(fresh_reports) + len(fresh_telemetry)
        result.moved = bool(fresh_reports or hellos)
        result.hellos = [Behind(p.device, p.message.offer_epoch, p.message.offer_serial) for p in hellos]
        result.acks = [
            (device, self._ack(device, stream, epoch, position.contiguous, wanted.get(device, 0)))
            for (device, stream, epoch), position in positions.items()
        ]
        return result

    def behind(self, received: Sequence[Frame]) -> list[Behind]:
        """Open hellos that another process stores, and return which offers they name."""
        opened = self._open("hello", wire.Hello, received, now_us())
        return [Behind(p.device, p.message.offer_epoch, p.message.offer_serial) for p in opened]

    def ack(self, device: str, stream: wire.StreamName, epoch: str, seq: int, logs: int) -> bytes:
        """Return a sealed acknowledgement, also one that only carries a request for logs."""
        return self._ack(device, stream, epoch, seq, logs)

    async def suspect(self, device: str, detail: str) -> None:
        """Shut a device out that sends without end."""
        async with self._database.write() as connection:
            if await fleet.suspect(connection, self._project, device, "flooding", detail):
                log.warning("%s is in quarantine: %s", device, detail)

    def refuse(self, code: str, now: int, detail: str = "") -> None:
        """Count a message that cannot be stored; log at a bounded rate."""
        self.refused[code] += 1
        if now - self._logged.get(code, 0) >= LOG_EVERY_US:
            self._logged[code] = now
            log.warning("refused messages: %s, %d so far: %s", code, self.refused[code], detail)

    # --- opening --------------------------------------------------------------------------------

    def _key(self, device: str) -> bytes:
        key = self._keys.get(device)
        if key is None:
            if len(self._keys) >= KEYS_CACHED_MAX:
                self._keys.clear()
            key = self._keys[device] = frames.device_key(self._master, device)
        return key

    def _open(self, kind: Kind, message_type: type[Any], received: Iterable[Frame], now: int) -> list[_Parsed]:
        opened: list[_Parsed] = []
        for device, frame in received:
            if kind == "hello" and not frame:
                continue  # by this a broker forgets the last one
            try:
                if not is_device_id(device):
                    raise RefusedError("bad_topic", "no device id")
                payload = frames.unseal(self._key(device), kind, device, frame)
                message = wire.parse(message_type, payload)
                if message.device != device:
                    raise RefusedError("message_foreign", f"{kind} of {message.device[:40]!r} came from {device}")
                _check_numbers(message)
            except RefusedError as error:
                self.refuse(error.code, now, error.message)
                continue
            opened.append(_Parsed(device, message, payload))
        return opened

    def _of_known(self, part: list[_Parsed], known: set[str], now: int) -> list[_Parsed]:
        for parsed in part:
            if parsed.device not in known:
                self.refuse("device_unknown", now, f"{parsed.device} is not an active device here")
        return [parsed for parsed in part if parsed.device in known]

    async def _active(self, connection: AsyncConnection, devices: set[str]) -> set[str]:
        rows = await bulk.select_in(connection, _ACTIVE, sorted(devices), project=self._project)
        return {row[0] for row in rows}

    async def _left(self, connection: AsyncConnection, devices: set[str]) -> list[str]:
        rows = await bulk.select_in(connection, _LEFT, sorted(devices), project=self._project)
        return [row[0] for row in rows]

    # --- streams --------------------------------------------------------------------------------

    async def _streams(
        self, connection: AsyncConnection, reports: list[_Parsed], telemetry: list[_Parsed], now: int
    ) -> dict[tuple[str, wire.StreamName, str], Position]:
        """Return the position of every stream spoken of, and of the report streams of other epochs (see `_newer`)."""
        found: dict[tuple[str, wire.StreamName, str], Position] = {}
        streams: tuple[tuple[wire.StreamName, list[_Parsed]], ...] = (("report", reports), ("telemetry", telemetry))
        for stream, part in streams:
            if not part:
                continue
            spoken = {(parsed.device, parsed.message.epoch) for parsed in part}
            named = sorted({device for device, _ in spoken})
            rows = await bulk.select_in(connection, _STREAMS, named, stream=stream)
            stored = {(row.device_id, row.epoch): row for row in rows}
            last: dict[str, int] = {}
            for (device, _), one in stored.items():
                last[device] = max(last.get(device, 0), one.opened_at)
            gaps: list[str] = []
            for device, epoch in spoken:
                row = stored.get((device, epoch))
                if row is None:
                    position = Position(opened_at=max(now, last.get(device, 0) + 1))
                else:
                    position = Position(row.contiguous, row.highest, row.lost, row.opened_at)
                    if row.highest > row.contiguous:
                        gaps.append(device)
                found[device, stream, epoch] = position
            if gaps:
                for row in await bulk.select_in(connection, _AHEAD[stream], sorted(set(gaps)), stream=stream):
                    held = found.get((row.device_id, stream, row.epoch))
                    if held is not None and row.seq > held.contiguous:
                        held.ahead.add(row.seq)
        return found

    def _new(
        self,
        part: list[_Parsed],
        stream: wire.StreamName,
        positions: dict[tuple[str, wire.StreamName, str], Position],
        now: int,
    ) -> list[_Parsed]:
        new: list[_Parsed] = []
        for parsed in part:
            message = parsed.message
            position = positions[parsed.device, stream, message.epoch]
            before = position.lost
            try:
                if position.accept(message.seq, message.first) == "new":
                    new.append(parsed)
            except RefusedError as error:
                self.refuse(error.code, now, error.message)
            self.lost += position.lost - before
        return new

    async def _save_streams(
        self, connection: AsyncConnection, positions: dict[tuple[str, wire.StreamName, str], Position], now: int
    ) -> None:
        rows = [
            (device, stream, epoch, self._project, p.contiguous, p.highest, p.lost, p.opened_at, now)
            for (device, stream, epoch), p in positions.items()
            if p.changed
        ]
        await bulk.upsert(
            connection,
            table(Stream),
            ("device_id", "stream", "epoch", "project_id", "contiguous", "highest", "lost", "opened_at", "updated_at"),
            rows,
            update=("contiguous", "highest", "lost", "updated_at"),
        )

    # --- reports --------------------------------------------------------------------------------

    async def _store_reports(
        self,
        connection: AsyncConnection,
        fresh: list[_Parsed],
        late: list[_Parsed],
        positions: dict[tuple[str, wire.StreamName, str], Position],
        now: int,
        insert: _Insert,
    ) -> None:
        if not fresh:
            return
        log_rows = []
        for parsed in fresh:
            report: wire.Report = parsed.message
            log_rows.append(
                (
                    parsed.device,
                    report.epoch,
                    report.seq,
                    self._project,
                    report.model,
                    report.state,
                    report.reason,
                    parsed.payload,
                    now,
                )
            )
        await insert(connection, table(ReportLog), _REPORT_COLUMNS, log_rows)
        current = await self._newest(connection, fresh, positions)
        await bulk.upsert(
            connection,
            table(DeviceModel),
            _MODEL_COLUMNS,
            [_model_row(self._project, parsed, now) for parsed in current],
            update=_MODEL_COLUMNS[3:],
        )
        await self._settle(connection, fresh, await self._overtaken(connection, late), now)
        put_back = {p.device: p.message.detail for p in fresh if p.message.reason == reasons.PUT_BACK}
        for device, detail in put_back.items():
            if now - self._put_back.get(device, 0) >= PUT_BACK_EVERY_US:
                self._put_back[device] = now
                await fleet.note_put_back(connection, self._project, device, detail)

    async def _newest(
        self,
        connection: AsyncConnection,
        fresh: list[_Parsed],
        positions: dict[tuple[str, wire.StreamName, str], Position],
    ) -> list[_Parsed]:
        """Return, per device and model, the report that replaces the current row, if one does.

        Of two epochs the one that opened later is newer; within one epoch the higher number is.
        """
        devices = sorted({parsed.device for parsed in fresh})
        standing: dict[tuple[str, str], tuple[int, int]] = {}
        for row in await bulk.select_in(connection, _CURRENT, devices):
            standing[row.device_id, row.model] = (row.opened_at or 0, row.seq)
        newest: dict[tuple[str, str], _Parsed] = {}
        for parsed in fresh:
            report: wire.Report = parsed.message
            rank = (positions[parsed.device, "report", report.epoch].opened_at, report.seq)
            key = (parsed.device, report.model)
            if rank > standing.get(key, (-1, -1)):
                standing[key] = rank
                newest[key] = parsed
        return list(newest.values())

    async def _overtaken(self, connection: AsyncConnection, late: list[_Parsed]) -> set[tuple[str, str, int]]:
        """Return which late reports are older than what the device already said of the same rollout: (device, epoch, seq).

        A report that was lost on its way comes again after its successors, and must not undo what they say.
        """
        found: set[tuple[str, str, int]] = set()
        for device, epoch in {(parsed.device, parsed.message.epoch) for parsed in late}:
            own = [p.message for p in late if (p.device, p.message.epoch) == (device, epoch) and p.message.rollout]
            if not own:
                continue
            since = {"device": device, "epoch": epoch, "seq": min(report.seq for report in own)}
            last: dict[tuple[str, str], int] = {}
            for row in await connection.execute(_SINCE, since):
                later = wire.parse(wire.Report, row.body)
                last[later.rollout, later.model] = row.seq
            found |= {(device, epoch, r.seq) for r in own if r.seq < last.get((r.rollout, r.model), 0)}
        return found

    async def _settle(
        self, connection: AsyncConnection, fresh: list[_Parsed], overtaken: set[tuple[str, str, int]], now: int
    ) -> None:
        """Carry reports into the assignments that they speak of, oldest first."""
        speaking = [parsed for parsed in fresh if parsed.message.rollout]
        if not speaking:
            return
        rows = await connection.execute(
            _ASSIGNED,
            {
                "rollouts": sorted({parsed.message.rollout for parsed in speaking}),
                "devices": sorted({parsed.device for parsed in speaking}),
            },
        )
        standing = {
            (row.rollout_id, row.device_id, row.model): outcomes.Assigned(
                row.rollout_id, row.attempt, row.from_manifest, row.to_manifest, row.outcome, bool(row.tried)
            )
            for row in rows
        }
        changes: dict[tuple[str, str, str], dict[str, Any]] = {}
        learned: dict[tuple[str, str, str], str] = {}
        for parsed in sorted(speaking, key=lambda one: one.message.seq):
            report: wire.Report = parsed.message
            key = (report.rollout, parsed.device, report.model)
            assigned = standing.get(key)
            if assigned is None:
                continue
            if not assigned.from_manifest and report.incumbent not in ("", assigned.to_manifest):
                assigned = assigned._replace(from_manifest=report.incumbent)
                learned[key] = report.incumbent
            late = (parsed.device, report.epoch, report.seq) in overtaken
            change = None if late else outcomes.judge(assigned, report)
            if change is None:
                standing[key] = assigned
                continue
            standing[key] = assigned._replace(outcome=change.outcome)
            changes[key] = {
                "rollout": key[0],
                "device": key[1],
                "model": key[2],
                "outcome": change.outcome,
                "reason": change.reason[:80],
                "detail": report.detail[:REPORT_DETAIL_CHARS_MAX],
                "now": now,
                "settled_at": now if change.settled else 0,
                "requests": report.requests,
                "errors": report.errors,
                "latency_ratio": report.latency_ratio,
                "compared": report.compared,
                "agreed": report.agreed,
                "skipped": report.skipped,
            }
        if changes:
            await connection.execute(_CHANGE, list(changes.values()))
        if learned:
            await connection.execute(
                _LEARN,
                [
                    {"rollout": r, "device": d, "model": m, "manifest": manifest}
                    for (r, d, m), manifest in learned.items()
                ],
            )

    # --- telemetry ------------------------------------------------------------------------------

    async def _store_telemetry(
        self, connection: AsyncConnection, fresh: list[_Parsed], now: int, insert: _Insert
    ) -> None:
        if not fresh:
            return
        encode = msgspec.json.Encoder().encode
        project = self._project
        logs, windows, metrics = [], [], []
        for device, message, _ in fresh:
            epoch, seq = message.epoch, message.seq
            logs.append(
                (
                    device,
                    epoch,
                    seq,
                    project,
                    message.at,
                    message.memory_available_bytes,
                    message.disk_free_bytes,
                    message.dropped,
                    now,
                )
            )
            for position, said in enumerate(message.windows):
                window = self._bounded(said, device, now)
                windows.append(
                    (
                        device,
                        epoch,
                        seq,
                        position,
                        project,
                        window.model,
                        window.manifest,
                        window.variant,
                        window.arm,
                        window.rollout,
                        window.attempt,
                        window.start,
                        window.duration_us,
                        window.requests,
                        window.errors,
                        window.fallbacks,
                        window.crashes,
                        encode(window),
                    )
                )
                for name, told in window.metrics.items():
                    metrics.append(
                        (
                            device,
                            epoch,
                            seq,
                            position,
                            name,
                            project,
                            window.model,
                            window.manifest,
                            window.arm,
                            window.start,
                            told.count,
                            told.total,
                        )
                    )
        await insert(connection, table(TelemetryLog), _TELEMETRY_COLUMNS, logs)
        await insert(connection, table(TelemetryWindow), _WINDOW_COLUMNS, windows)
        if metrics:
            await insert(connection, table(TelemetryMetric), _METRIC_COLUMNS, metrics)

    def _bounded(self, window: wire.Window, device: str, now: int) -> wire.Window:
        """Return a window without samples or metrics that no device may send; its counts are as good as ever."""
        if window.metrics and not _allowed(window.metrics):
            self.refuse("metrics_invalid", now, f"{len(window.metrics)} metrics in a window of {device}")
            window = msgspec.structs.replace(window, metrics={})
        sizes = [sample.bytes for sample in window.samples]
        if len(sizes) <= SAMPLES_PER_WINDOW_MAX and max(sizes, default=0) <= SAMPLE_BYTES_MAX:
            return window
        self.refuse("samples_too_large", now, f"{len(sizes)} samples of {sum(sizes)} bytes in a window of {device}")
        left_out = window.samples_left_out + len(sizes)
        return msgspec.structs.replace(window, samples=[], samples_left_out=left_out)

    # --- hello ----------------------------------------------------------------------------------

    async def _news(
        self, connection: AsyncConnection, hellos: list[_Parsed], now: int
    ) -> tuple[list[_Parsed], dict[str, clones.Places]]:
        """Return the newest hello of each device that has one which was not said before the last accepted one, and places."""
        if not hellos:
            return [], {}
        rows = await bulk.select_in(connection, _SAID, sorted({parsed.device for parsed in hellos}))
        standing = {
            row.id: hello_rules.Standing(row.hello_at, row.boot, _nexts.decode(row.hello_streams or "{}"))
            for row in rows
        }
        places = {row.id: _places.decode(row.places or "[]") for row in rows}
        news: dict[str, _Parsed] = {}
        for parsed in hellos:
            said = hello_rules.standing(parsed.message)
            if said == standing[parsed.device]:
                continue  # the broker keeps the last one for whoever subscribes
            if hello_rules.is_news(parsed.message, standing[parsed.device]):
                was, here = standing[parsed.device], places[parsed.device]
                later = hello_rules.is_later(parsed.message, was)
                places[parsed.device], cloned = clones.judge(here, parsed.message, later=later)
                if cloned:
                    detail = f"now in {places[parsed.device].now}, again"
                    await fleet.suspect(connection, self._project, parsed.device, "cloned", detail)
                standing[parsed.device] = said
                news[parsed.device] = parsed
            else:
                self.refuse("hello_old", now, f"{parsed.device} said a later one already")
        return list(news.values()), places

    async def _store_hellos(
        self, connection: AsyncConnection, hellos: list[_Parsed], places: dict[str, clones.Places], now: int
    ) -> None:
        if not hellos:
            return
        newest = {parsed.device: parsed.message for parsed in hellos}
        for with_facts in (True, False):
            rows: list[dict[str, Any]] = [
                {
                    "b_device": device,
                    "last_seen_at": now,
                    "offer_epoch": hello.offer_epoch,
                    "offer_serial": hello.offer_serial,
                    "boot": hello.boot[: hello_rules.BOOT_CHARS_MAX],
                    "hello_at": hello.at,
                    "hello_streams": hello_rules.nexts(hello),
                    "places": list(places[device]),
                    "trust_version": hello.trust_version,
                    "trust_state": hello.trust_state,
                    **({"facts": hello_rules.facts_to_keep(hello.facts)} if with_facts else {}),
                }
                for device, hello in newest.items()
                if (hello.facts is not None) is with_facts
            ]
            if rows:
                await connection.execute(update(_DEVICE).where(_DEVICE.c.id == bindparam("b_device")), rows)
        running = [
            {
                "device": device,
                "project": self._project,
                "model": model,
                "running": manifest,
                "epoch": hello.streams["report"][0] if "report" in hello.streams else "",
                "next": hello.streams["report"][2] if "report" in hello.streams else 0,
                "now": now,
            }
            for device, hello in newest.items()
            for model, manifest in hello.running.items()
        ]
        if running:
            await connection.execute(_RUNNING, running)
        # A device that knows the current offer and runs what it is to return to is back, whatever report is on its way.
        await bulk.execute_in(connection, _BACK, sorted(newest), now=now)
        for device in newest:
            self._seen[device] = now

    async def _touch(self, connection: AsyncConnection, devices: set[str], now: int) -> None:
        due = [device for device in devices if now - self._seen.get(device, 0) >= SEEN_EVERY_US]
        if not due:
            return
        if len(self._seen) > KEYS_CACHED_MAX:
            self._seen.clear()
        await bulk.execute_in(connection, _TOUCH, sorted(due), now=now)
        for device in due:
            self._seen[device] = now

    async def _log_requests(self, connection: AsyncConnection, devices: set[str], now: int) -> dict[str, int]:
        if not devices:
            return {}
        since = now - LOGS_FOR_US
        rows = await bulk.select_in(connection, _LOGS_WANTED, sorted(devices), project=self._project, since=since)
        return {row.device_id: row.requested_at for row in rows}

    def _ack(self, device: str, stream: wire.StreamName, epoch: str, seq: int, logs: int) -> bytes:
        ack = wire.Ack(format=wire.FORMAT, device=device, stream=stream, epoch=epoch, seq=seq, logs=logs)
        return frames.seal(self._key(device), "ack", device, wire.encode(ack))


def _allowed(metrics: dict[str, wire.Sum]) -> bool:
    """Tell whether an application may have told this."""
    return len(metrics) <= METRICS_PER_WINDOW_MAX and all(
        METRIC_NAME.fullmatch(name) and 0 < told.count <= SEQ_MAX and math.isfinite(told.total)
        for name, told in metrics.items()
    )


def _check_numbers(message: wire.Hello | wire.Report | wire.Telemetry) -> None:
    """Refuse numbers and lengths that no table holds.

    Raises:
        RefusedError: `message_invalid`.
    """
    if isinstance(message, wire.Hello):
        numbers: tuple[int, ...] = (message.at, message.offer_epoch, message.offer_serial, message.trust_version)
        texts: tuple[str, ...] = (*message.running, *message.running.values(), message.trust_state)
        for epoch, first, following in message.streams.values():
            numbers += (first, following)
            texts += (epoch,)
        if len(message.running) > WINDOWS_MAX:
            raise RefusedError("message_invalid", f"hello names {len(message.running)} models")
    elif isinstance(message, wire.Report):
        numbers = (message.at, message.requests, message.errors, message.fallbacks, message.serial, message.attempt)
        numbers += (message.compared, message.agreed, message.skipped)
        texts = (message.epoch, message.model, message.target, message.manifest, message.running, message.reason)
    else:
        if len(message.windows) > WINDOWS_MAX:
            raise RefusedError("message_invalid", f"telemetry has {len(message.windows)} windows")
        numbers = (message.at, message.memory_available_bytes, message.disk_free_bytes, message.dropped)
        texts = (message.epoch,)
        for window in message.windows:
            numbers += (window.start, window.duration_us, window.requests, window.errors, window.fallbacks)
            numbers += (window.attempt, window.samples_left_out, window.crashes)
            texts += (window.model, window.manifest, window.variant, window.rollout)
    for number in numbers:
        if not 0 <= number <= SEQ_MAX:
            raise RefusedError("message_invalid", f"{type(message).__name__} has a number that cannot be: {number}")
    for one in texts:
        if len(one) > 200:
            raise RefusedError("message_invalid", f"{type(message).__name__} has a name of {len(one)} characters")


def _model_row(project: str, parsed: _Parsed, now: int) -> tuple[Any, ...]:
    report: wire.Report = parsed.message
    return (
        parsed.device,
        report.model,
        project,
        report.state,
        report.target,
        report.manifest,
        report.running,
        report.running_variant,
        report.rollout,
        report.attempt,
        report.reason,
        report.detail[:REPORT_DETAIL_CHARS_MAX],
        report.requests,
        report.errors,
        report.latency_ratio,
        report.trial_end,
        parsed.payload.decode(),
        report.epoch,
        report.seq,
        now,
    )


_REPORT_COLUMNS = ("device_id", "epoch", "seq", "project_id", "model", "state", "reason", "body", "received_at")
_MODEL_COLUMNS = (
    "device_id",
    "model",
    "project_id",
    "state",
    "target",
    "manifest",
    "running",
    "running_variant",
    "rollout_id",
    "attempt",
    "reason",
    "detail",
    "requests",
    "errors",
    "latency_ratio",
    "trial_end",
    "body",
    "stream_epoch",
    "seq",
    "updated_at",
)
_TELEMETRY_COLUMNS = (
    "device_id",
    "epoch",
    "seq",
    "project_id",
    "at",
    "memory_available_bytes",
    "disk_free_bytes",
    "dropped",
    "received_at",
)
_WINDOW_COLUMNS = (
    "device_id",
    "epoch",
    "seq",
    "position",
    "project_id",
    "model",
    "manifest",
    "variant",
    "arm",
    "rollout_id",
    "attempt",
    "start",
    "duration_us",
    "requests",
    "errors",
    "fallbacks",
    "crashes",
    "body",
)
_METRIC_COLUMNS = (
    "device_id",
    "epoch",
    "seq",
    "position",
    "name",
    "project_id",
    "model",
    "manifest",
    "arm",
    "start",
    "count",
    "total",
)


_ACTIVE = "SELECT id FROM device WHERE id IN :keys AND project_id = :project AND state = 'active'"
_LEFT = "SELECT id FROM device WHERE id IN :keys AND project_id = :project AND state = 'decommissioned'"
_SAID = "SELECT id, boot, hello_at, CAST(hello_streams AS TEXT) AS hello_streams, CAST(places AS TEXT) AS places FROM device WHERE id IN :keys"
_nexts = msgspec.json.Decoder(hello_rules.Nexts)
_places = msgspec.json.Decoder(clones.Places)
_STREAMS = (
    "SELECT device_id, epoch, contiguous, highest, lost, opened_at FROM stream"
    " WHERE device_id IN :keys AND stream = :stream"
)
_LOGS: dict[wire.StreamName, str] = {"report": "report_log", "telemetry": "telemetry_log"}
_AHEAD: dict[wire.StreamName, Any] = {
    name: (
        f"SELECT l.device_id, l.epoch, l.seq FROM {source} l JOIN stream s ON s.device_id = l.device_id"  # noqa: S608
        " AND s.epoch = l.epoch AND s.stream = :stream WHERE l.device_id IN :keys AND l.seq > s.contiguous"
    )
    for name, source in _LOGS.items()
}
_CURRENT = (
    "SELECT m.device_id, m.model, m.seq, s.opened_at FROM device_model m LEFT JOIN stream s"
    " ON s.device_id = m.device_id AND s.stream = 'report' AND s.epoch = m.stream_epoch WHERE m.device_id IN :keys"
)
_SINCE = text(
    "SELECT seq, body FROM report_log WHERE device_id = :device AND epoch = :epoch AND seq > :seq ORDER BY seq"
)
_ASSIGNED = text(
    "SELECT rollout_id, device_id, model, attempt, from_manifest, to_manifest, outcome, tried FROM assignment"
    " WHERE rollout_id IN :rollouts AND device_id IN :devices"
).bindparams(bindparam("rollouts", expanding=True), bindparam("devices", expanding=True))
_CHANGE = text(
    # why the bundle was taken back from it stays said
    "UPDATE assignment SET outcome = :outcome, reason = CASE WHEN outcome IN ('withdrawn', 'revert_pending')"
    " AND reason = 'known_bad' THEN reason ELSE :reason END, detail = :detail, settled_at = :settled_at,"
    " noticed_at = CASE WHEN noticed_at = 0 THEN :now ELSE noticed_at END, requests = :requests, errors = :errors, latency_ratio = :latency_ratio,"
    " compared = CASE WHEN tried THEN :compared ELSE compared END, agreed = CASE WHEN tried THEN :agreed ELSE agreed END,"
    " skipped = CASE WHEN tried THEN :skipped ELSE skipped END"
    " WHERE rollout_id = :rollout AND device_id = :device AND model = :model"
)
_LEARN = text(
    "UPDATE assignment SET from_manifest = CAST(:manifest AS VARCHAR(80)), from_target = COALESCE((SELECT b.model || '/' || b.version"
    " FROM bundle b WHERE b.manifest = CAST(:manifest AS VARCHAR(80)) AND b.project_id = assignment.project_id), '')"
    " WHERE rollout_id = :rollout AND device_id = :device AND model = :model"
)
_RUNNING = text(
    "INSERT INTO device_model (device_id, model, project_id, state, target, manifest, running, running_variant, rollout_id,"
    " attempt, reason, detail, requests, errors, latency_ratio, trial_end, body, stream_epoch, seq, updated_at)"
    " VALUES (:device, :model, :project, 'confirmed', '', :running, :running, '', '', 0, 'hello', '', 0, 0, 0, '', '{}',"
    " :epoch, 0, :now) ON CONFLICT (device_id, model) DO UPDATE SET running = excluded.running, updated_at = :now"
    " WHERE device_model.running <> excluded.running AND device_model.stream_epoch = :epoch AND device_model.seq < :next"
)
_BACK = (
    "UPDATE assignment SET outcome = 'reverted', settled_at = :now WHERE outcome = 'revert_pending'"
    " AND device_id IN :keys"
    " AND EXISTS (SELECT 1 FROM device d JOIN offer o ON o.device_id = d.id WHERE d.id = assignment.device_id"
    " AND d.offer_epoch = o.epoch AND d.offer_serial = o.serial)"
    " AND COALESCE((SELECT m.running FROM device_model m WHERE m.device_id = assignment.device_id"
    " AND m.model = assignment.model), '') = assignment.from_manifest"
)
_TOUCH = "UPDATE device SET last_seen_at = :now WHERE id IN :keys"
_LOGS_WANTED = (
    "SELECT device_id, requested_at FROM device_log WHERE device_id IN :keys AND project_id = :project"
    " AND requested_at > received_at AND requested_at > :since"
)
