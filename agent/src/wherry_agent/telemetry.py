"""Measurements on their way to the server: windows cut from running counts, kept in a bounded buffer, numbered.

The worker counts and never resets; a window is the difference of two looks at a counter. All counters are looked at
whenever the serving set changes, so that no window straddles a swap. The buffer is SQLite and may lose whole windows (a
power cut, no space, too long offline); every loss that is known is counted in `dropped`.

With a key at rest (`wherry_agent.sealing`) each message is sealed for its number, and a proof beside them says how many there
are: what was exchanged, put back or taken away is found, and counted as lost.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from wherry_agent import sampling
from wherry_agent.children import ArmStats, Sampled
from wherry_agent.handle_server import merged
from wherry_agent.marks import Marks
from wherry_agent.sealing import Seal, close, is_sealed, opened
from wherry_shared import wire
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.limits import SAMPLE_BYTES_MAX, SAMPLES_PER_WINDOW_MAX
from wherry_shared.sketch import since
from wherry_shared.wire import IN_PROCESS, Arm, Sample, Sum, Telemetry, Window

log = logging.getLogger(__name__)

WINDOWS_MAX = 64
"""Windows in one message; more go into the next."""
MESSAGE_BYTES_MAX = 60_000
MESSAGES_MAX = 10_000
ARMS_MAX = 256
"""Counters looked at between two cuts, and counters of variants that left; more belong to variants that are long gone."""

PLACE = "telemetry"
STREAM_PLACE = "telemetry-stream"
"""Where sealed messages belong, and what is sealed of all of them."""
_HELD = "SELECT count(*), coalesce(sum(windows), 0) FROM message"

HANDLES = "handle"
"""The source of what applications count in their own processes."""

_Key = tuple[str, str, str, str, str]
"""(source, model, digest, arm, trial): a handle and the worker may count the same arm side by side."""


@dataclass(frozen=True, slots=True)
class Context:
    """Under which rollout a candidate's window falls."""

    rollout: str
    attempt: int


class Windows:
    """Cuts windows out of counters."""

    def __init__(self) -> None:
        self._latest: dict[_Key, ArmStats] = {}
        self._cut: dict[_Key, ArmStats] = {}
        self._since_us: dict[_Key, int] = {}
        self._baselines: dict[tuple[str, str, bool], ArmStats] = {}
        self._samples: dict[_Key, list[Sample]] = {}
        self._left_out: dict[_Key, int] = {}
        self._crashes: dict[tuple[str, str, str, str], Window] = {}

    def look(self, source: str, arms: Iterable[ArmStats], at_us: int) -> None:
        """Take the newest counts of a source."""
        inside = source == HANDLES
        for told in arms:
            stats = _in_process(told) if inside else told
            key = (source, stats.model, stats.digest, stats.arm, stats.trial)
            before = self._latest.get(key) or self._cut.get(key)
            if before is not None and (stats.life != before.life or stats.requests < before.requests):
                self._cut.pop(key, None)  # another process, or another life of this variant, counts from nothing
            if key not in self._latest:
                self._since_us[key] = at_us
            self._latest[key] = stats
            if stats.arm == "incumbent":
                known = self._baselines.get((stats.model, stats.digest, inside))
                if known is None or stats.requests >= known.requests:
                    self._baselines[stats.model, stats.digest, inside] = stats
        while len(self._latest) > ARMS_MAX:
            self._drop(next(iter(self._latest)))

    def sample(self, source: str, sampled: Sampled) -> None:
        """Take inputs that a source sampled for the window under way, as many as one may have."""
        key = (source, sampled.model, sampled.digest, sampled.arm, sampled.trial)
        if key not in self._latest:
            return  # it is not served any more
        held = self._samples.setdefault(key, [])
        fitting = [one for one in sampled.samples if one.bytes <= SAMPLE_BYTES_MAX]
        taken = fitting[: SAMPLES_PER_WINDOW_MAX - len(held)]
        held += taken
        self._left_out[key] = self._left_out.get(key, 0) + sampled.left_out + len(sampled.samples) - len(taken)

    def crashed(self, window: Window) -> None:
        """Take a window that says only that the worker died; those of the same version and arm are one."""
        key = (window.model, window.manifest, window.variant, window.arm)
        known = self._crashes.get(key)
        if known is not None:
            window = msgspec.structs.replace(known, crashes=known.crashes + window.crashes)
        if known is not None or len(self._crashes) < ARMS_MAX:
            self._crashes[key] = window

    def baseline(self, model: str, digest: str) -> ArmStats | None:
        """Return the fullest counts of an incumbent in this life of the agent, by the worker and by applications."""
        found = [self._baselines.get((model, digest, inside)) for inside in (False, True)]
        return functools.reduce(merged, kept) if (kept := [stats for stats in found if stats is not None]) else None

    def total(self, model: str, digest: str, arm: str, trial: str) -> ArmStats | None:
        """Return the newest counts of an arm over all sources."""
        found = [stats for key, stats in self._latest.items() if key[1:] == (model, digest, arm, trial)]
        return functools.reduce(merged, found) if found else None

    def cut(self, at_us: int, context: Callable[[ArmStats], Context]) -> list[Window]:
        """Return what was counted since the last cut."""
        windows = list(self._crashes.values())
        self._crashes.clear()
        for key, stats in self._latest.items():
            before = self._cut.get(key)
            requests = stats.requests - (before.requests if before is not None else 0)
            fallbacks = stats.fallbacks - (before.fallbacks if before is not None else 0)
            skipped = stats.skipped - (before.skipped if before is not None else 0)
            told = bool(_told_since(stats.metrics, before.metrics if before is not None else {}))
            if requests > 0 or fallbacks > 0 or skipped > 0 or told:
                window = _window(stats, before, self._since_us[key], at_us, context(stats))
                samples, left_out = self._samples.pop(key, []), self._left_out.pop(key, 0)
                windows.append(msgspec.structs.replace(window, samples=samples, samples_left_out=left_out))
            self._cut[key] = stats
            self._since_us[key] = at_us
        return windows

    def keep_only(self, digests: set[str]) -> None:
        """Forget counters of variants that are not served any more; call after a cut.

        What was cut of them is remembered: a handle tells its last counts a moment later, and they are cumulative.
        """
        for key in [key for key in self._latest if key[2] not in digests]:
            del self._latest[key], self._since_us[key]
        left = [key for key in self._cut if key not in self._latest]
        for key in left[: max(0, len(left) - ARMS_MAX)]:
            del self._cut[key]
        self._baselines = {key: stats for key, stats in self._baselines.items() if key[1] in digests}

    def restart(self, source: str) -> None:
        """The process that counted is gone; call after a cut."""
        for key in [key for key in {**self._latest, **self._cut} if key[0] == source]:
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        for table in (self._latest, self._cut, self._since_us, self._samples, self._left_out):
            table.pop(key, None)


def _in_process(stats: ArmStats) -> ArmStats:
    marked = {f"{IN_PROCESS}{bucket}": bins for bucket, bins in stats.latency_us.items()}
    return msgspec.structs.replace(stats, latency_us=marked)


def crash_window(stats: ArmStats, at_us: int, context: Context) -> Window:
    """Return the window of a death of the worker while it held this version."""
    return Window(
        model=stats.model,
        manifest=stats.manifest,
        variant=stats.variant,
        arm=_arm(stats),
        start=at_us,
        duration_us=0,
        rollout=context.rollout,
        attempt=context.attempt,
        crashes=1,
    )


def _arm(stats: ArmStats) -> Arm:
    return "candidate" if stats.arm == "candidate" else "shadow" if stats.arm == "shadow" else "incumbent"


def _window(stats: ArmStats, before: ArmStats | None, start_us: int, at_us: int, context: Context) -> Window:
    old = before or msgspec.structs.replace(
        stats,
        requests=0,
        errors=0,
        fallbacks=0,
        latency_us={},
        wait_us={},
        classes={},
        confidence={},
        compared=0,
        agreed=0,
        skipped=0,
        distance={},
        metrics={},
    )
    latency = {
        bucket: bins for bucket, now in stats.latency_us.items() if (bins := since(now, old.latency_us.get(bucket, {})))
    }
    return Window(
        model=stats.model,
        manifest=stats.manifest,
        variant=stats.variant,
        arm=_arm(stats),
        start=start_us,
        duration_us=max(0, at_us - start_us),
        rollout=context.rollout,
        attempt=context.attempt,
        requests=max(0, stats.requests - old.requests),
        errors=max(0, stats.errors - old.errors),
        fallbacks=max(0, stats.fallbacks - old.fallbacks),
        latency_us=latency,
        wait_us=since(stats.wait_us, old.wait_us),
        classes=_less(stats.classes, old.classes),
        confidence=since(stats.confidence, old.confidence),
        compared=max(0, stats.compared - old.compared),
        agreed=max(0, stats.agreed - old.agreed),
        skipped=max(0, stats.skipped - old.skipped),
        distance=since(stats.distance, old.distance),
        metrics=_told_since(stats.metrics, old.metrics),
    )


def _told_since(now: dict[str, Sum], before: dict[str, Sum]) -> dict[str, Sum]:
    """Subtract sums; one whose count fell (an application that left) counts as new."""
    found = {}
    for name, told in now.items():
        known = before.get(name)
        if known is not None and known.count <= told.count:
            told = Sum(count=told.count - known.count, total=told.total - known.total)  # noqa: PLW2901
        if told.count:
            found[name] = told
    return found


def _less(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Subtract counts; a key whose count fell counts as new."""
    found = {}
    for key, count in now.items():
        left = count - before.get(key, 0)
        if left < 0:
            left = count
        if left:
            found[key] = left
    return found


class Buffer:
    """Messages that the server did not acknowledge yet."""

    def __init__(
        self,
        path: Path,
        bytes_max: int,
        may_sample: Callable[[str], bool] = lambda _: False,
        *,
        seal: Seal | None = None,
        marks: Marks | None = None,
    ) -> None:
        """Open the buffer, or begin it.

        Args:
            path: of the file.
            bytes_max: what messages may take.
            may_sample: tells of a model whether its inputs may leave the device; asked again at each sending.
            seal: what the messages are sealed with.
            marks: how far their numbers had come, if they are sealed.
        """
        self._seal = seal
        self._marks = marks
        self._path = path
        self._may_sample = may_sample
        self._bytes_max = bytes_max
        self._database = self._open()
        self.epoch: str
        self._next: int
        self._dropped: int
        self._waiting = 0
        """Windows of the messages held, as far as they could be counted."""
        self._take_up()
        self._settle()

    @property
    def next(self) -> int:
        """Number of the next message."""
        return self._next

    @property
    def first(self) -> int:
        """Oldest number still held, `next` if none is."""
        rows = self._rows("SELECT min(seq) FROM message")
        return int(rows[0][0]) if rows and rows[0][0] is not None else self._next

    @property
    def untold(self) -> int:
        """Windows that were dropped and that no message tells of yet; the next one will."""
        return self._dropped

    def held(self, count: int) -> list[int]:
        """Return the oldest `count` numbers that are not acknowledged."""
        return [int(row[0]) for row in self._rows("SELECT seq FROM message ORDER BY seq LIMIT ?", count)]

    def message(self, seq: int) -> Telemetry | None:
        """Return a message as it is to be sent now."""
        rows = self._rows("SELECT body, windows FROM message WHERE seq = ?", seq)
        if not rows:
            return None
        try:
            told = wire.parse(Telemetry, self._unsealed(seq, rows[0][0]))
        except (RefusedError, TypeError) as error:  # not what was written: the disk altered it
            log.warning("telemetry: message %d is lost: %s", seq, error)
            self._lose(seq, rows[0][1])
            return None
        return msgspec.structs.replace(sampling.without(told, self._may_sample), first=self.first)

    def add(self, message: Telemetry) -> None:
        """Number and keep messages with the windows of `message`, split to fit; the oldest give way.

        Nothing is raised: what cannot be kept is dropped and counted.
        """
        for windows in _split(message.windows):
            try:
                self._add(msgspec.structs.replace(message, windows=windows))
                message = msgspec.structs.replace(message, downloaded_bytes=0)  # told once
            except sqlite3.Error as error:
                self._dropped += len(windows)
                log.warning("telemetry: %d windows dropped: %s", len(windows), error)
                self._mind(error)

    def acknowledge(self, epoch: str, seq: int) -> None:
        """Drop what the server has; if it has more than this file ever numbered, the file was put back as it once was (`put_back`)."""
        if epoch != self.epoch:
            return
        if seq >= self._next:
            self._begin_anew(f"the server has message {seq}, and the next one here is {self._next}")
            return
        try:
            with self._database:
                self._database.execute("DELETE FROM message WHERE seq <= ?", (seq,))
                self._prove(self._next, self._dropped)
            self._count()
        except sqlite3.Error as error:  # it is sent again, and the server knows it already
            log.warning("telemetry: an acknowledgement could not be noted: %s", error)
            self._mind(error)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _add(self, message: Telemetry) -> None:
        seq = self._next
        body = wire.encode(msgspec.structs.replace(message, epoch=self.epoch, seq=seq, first=0, dropped=self._dropped))
        with self._database:
            insert = "INSERT INTO message (seq, windows, size, body) VALUES (?, ?, ?, ?)"
            self._database.execute(insert, (seq, len(message.windows), len(body), self._sealed(seq, body)))
            lost = self._make_room()
            self._prove(seq + 1, lost)
        self._next, self._dropped = seq + 1, lost
        self._reach()
        self._waiting += len(message.windows) - lost

    def _sealed(self, seq: int, body: bytes) -> bytes:
        return close(self._seal, f"{PLACE}:{self.epoch}", body, seq)

    def _unsealed(self, seq: int, body: object) -> bytes:
        """Return a message as it was made.

        Raises:
            RefusedError: it is not what was sealed for this number.
        """
        found = opened(self._seal, f"{PLACE}:{self.epoch}", body if isinstance(body, bytes) else b"")
        if found.sealed and found.number != seq:
            raise RefusedError("record_altered", f"message {seq} stands where {found.number} belongs")
        return found.data

    def _prove(self, following: int, dropped: int) -> None:
        """Say within a transaction where the stream stands, and seal that together with how much there is."""
        proof = None
        if self._seal is not None and self._seal.writes:
            told = [self.epoch, following, dropped, *self._database.execute(_HELD).fetchone()]
            proof = self._seal.close(STREAM_PLACE, msgspec.json.encode(told), following)
        self._database.execute("UPDATE stream SET next = ?, dropped = ?, proof = ?", (following, dropped, proof))

    def _reach(self) -> None:
        if self._marks is not None:
            self._marks.reach(f"{PLACE} {self.epoch}", self._next, instead_of=PLACE)

    def _settle(self) -> None:
        """Hold what the file says against its proof, and bring it to the settings: sealed or not."""
        if self._seal is None and self._database.execute("SELECT proof FROM stream").fetchone()[0] is None:
            return
        try:
            trouble, lost = self._unproved()
            if trouble:
                self._begin_anew(trouble, lost)
            elif lost:
                log.error("telemetry: somebody removed messages with %d windows", lost)
                self._dropped += lost
            self._rewrite()
            self._reach()
            if self._marks is not None and self._database.execute("PRAGMA database_list").fetchone()[2]:
                self._marks.note()
        except (sqlite3.Error, DeviceError) as error:
            log.warning("telemetry: the buffer could not be sealed or opened: %s", error)

    def _unproved(self) -> tuple[str, int]:
        """Return why the file is not to be believed, or how many windows were taken away."""
        (proof,) = self._database.execute("SELECT proof FROM stream").fetchone()
        count, windows = self._database.execute(_HELD).fetchone()
        known = self._marks.read() if self._marks is not None else {}
        marked = {name: number for name, number in known.items() if name.startswith(PLACE)}
        if proof is None:
            strict = self._seal is not None and self._seal.mode == "on"
            return ("it is not sealed, and at_rest is on" if strict and (count or self._next > 1) else ""), 0
        try:
            told = msgspec.json.decode(
                opened(self._seal, STREAM_PLACE, proof).data, type=tuple[str, int, int, int, int]
            )
        except (RefusedError, msgspec.DecodeError) as error:
            return str(error), 0
        if told[:3] != (self.epoch, self._next, self._dropped):
            return "its numbers were altered", 0
        if marked and self._next < marked.get(f"{PLACE} {self.epoch}", self._next + 1):
            return "it is older than it was already", 0
        return ("messages were added" if count > told[3] else ""), max(0, told[4] - windows)

    def _rewrite(self) -> None:
        """Seal what is clear, or open what is sealed; without a trace of the other where the file system keeps none."""
        wished = self._seal is not None and self._seal.writes
        rows = self._database.execute("SELECT seq, body FROM message").fetchall()
        others = [(seq, body) for seq, body in rows if isinstance(body, bytes) and is_sealed(body) != wished]
        self._database.execute("PRAGMA secure_delete = ON")
        with self._database:
            for seq, body in others:
                with contextlib.suppress(RefusedError):  # it is found, and counted, when its turn comes
                    data = self._sealed(seq, self._unsealed(seq, body))
                    self._database.execute("UPDATE message SET body = ? WHERE seq = ?", (data, seq))
            self._prove(self._next, self._dropped)
        if others:
            self._database.execute("VACUUM")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _take_up(self) -> None:
        """Go on where the file stands."""
        row = self._database.execute("SELECT epoch, next, dropped FROM stream").fetchone()
        self.epoch, self._next, self._dropped = str(row[0]), int(row[1]), int(row[2])
        with contextlib.suppress(sqlite3.Error):  # then nobody knows how many are lost with it
            self._count()

    def _count(self) -> None:
        (self._waiting,) = self._database.execute("SELECT coalesce(sum(windows), 0) FROM message").fetchone()

    def _rows(self, query: str, *values: int) -> list[tuple[Any, ...]]:
        """Return what the file has; nothing where it cannot be read: telemetry is not worth the agent's life."""
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            log.warning("telemetry: the buffer cannot be read: %s", error)
            self._mind(error)
            return []

    def _mind(self, error: sqlite3.Error) -> None:
        """Begin anew where the file is not what was written; other trouble may pass."""
        if type(error) is sqlite3.DatabaseError:
            self._begin_anew("the disk altered it")

    def _begin_anew(self, why: str, lost: int = 0) -> None:
        """Leave what is held, counted with `lost` as windows that were dropped, for a stream under a new name."""
        lost += self._dropped + self._waiting
        log.error("telemetry: %s: the buffer begins anew, and %d windows are lost", why, lost)
        self._database.close()
        self._database = self._anew()
        self._take_up()
        self._dropped = lost

    def _lose(self, seq: int, windows: object) -> None:
        try:
            with self._database:
                self._database.execute("DELETE FROM message WHERE seq = ?", (seq,))
                self._dropped += windows if isinstance(windows, int) else 0
                self._prove(self._next, self._dropped)
            self._count()
        except sqlite3.Error as error:
            self._mind(error)

    def _make_room(self) -> int:
        """Drop the oldest messages over the bound; return how many windows went with them."""
        lost = 0
        count, size = self._database.execute("SELECT count(*), coalesce(sum(size), 0) FROM message").fetchone()
        while count > 1 and (count > MESSAGES_MAX or size > self._bytes_max):
            row = self._database.execute("SELECT seq, windows, size, body FROM message ORDER BY seq LIMIT 1").fetchone()
            self._database.execute("DELETE FROM message WHERE seq = ?", (row[0],))
            # what it would have told of earlier losses is told by a later one
            count, size, lost = count - 1, size - row[2], lost + row[1] + self._told_lost(row[0], row[3])
        return lost

    def _told_lost(self, seq: int, body: object) -> int:
        """Return of how many lost windows a message would have told."""
        try:
            return wire.parse(Telemetry, self._unsealed(seq, body)).dropped
        except RefusedError:
            return 0  # the disk altered it

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect(self._path)
        except sqlite3.OperationalError as error:  # no room, or a disk that takes no writes
            log.warning("telemetry: kept in memory only: %s", error)
        except sqlite3.DatabaseError as error:
            log.warning("telemetry: the buffer could not be read and begins anew: %s", error)
            return self._anew()
        return self._connect(":memory:")

    def _anew(self) -> sqlite3.Connection:
        """Leave the file that is there, and begin another; in memory where that cannot be."""
        try:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            return self._connect(self._path)
        except (OSError, sqlite3.Error) as error:
            log.warning("telemetry: kept in memory only: %s", error)
        return self._connect(":memory:")

    def _connect(self, path: Path | str) -> sqlite3.Connection:
        if isinstance(path, Path):
            with contextlib.suppress(OSError):  # a disk that takes no writes: SQLite says so
                path.touch(0o600)
                path.chmod(0o600)  # of an older release; its journal is opened with the same mode
        database = sqlite3.connect(path, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            # a number that was sent must not be given again after a power cut: the server would take it for known
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA cache_size = -256")
            with database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS stream (epoch TEXT, next INTEGER, dropped INTEGER, proof BLOB)"
                )
                if len(database.execute("SELECT * FROM stream LIMIT 0").description) == 3:  # of an older release
                    database.execute("ALTER TABLE stream ADD COLUMN proof BLOB")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS message"
                    " (seq INTEGER PRIMARY KEY, windows INTEGER, size INTEGER, body BLOB)"
                )
                if database.execute("SELECT count(*) FROM stream").fetchone()[0] == 0:
                    database.execute("INSERT INTO stream VALUES (?, 1, 0, NULL)", (secrets.token_urlsafe(12),))
            database.execute("BEGIN IMMEDIATE")  # fails where it could not be written to later
            database.rollback()
        except sqlite3.Error:
            database.close()
            raise
        return database


def _split(windows: list[Window]) -> list[list[Window]]:
    """Divide windows into messages that fit; a window alone too large for one loses its samples, then its sketches."""
    found: list[list[Window]] = [[]]
    size = 0
    for whole in windows:
        window, length = whole, len(wire.encode(whole))
        if length > MESSAGE_BYTES_MAX and window.samples:
            left_out = window.samples_left_out + len(window.samples)
            window = msgspec.structs.replace(window, samples=[], samples_left_out=left_out)
            length = len(wire.encode(window))
        if length > MESSAGE_BYTES_MAX:
            window = msgspec.structs.replace(window, latency_us={}, wait_us={}, classes={}, confidence={}, distance={})
            length = len(wire.encode(window))
        if found[-1] and (size + length > MESSAGE_BYTES_MAX or len(found[-1]) >= WINDOWS_MAX):
            found.append([])
            size = 0
        found[-1].append(window)
        size += length
    return found
