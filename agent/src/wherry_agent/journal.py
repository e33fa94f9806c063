"""The device's state on disk: one record, replaced atomically, under names that the code does not share.

A record is one line `wherry-journal FORMAT SHA256` and a JSON body. The names in `NAMES` and `PHASES` are the format:
fields and classes may be renamed in the code at will, a name on disk never changes its meaning, and
`tests/agent/journals/` keeps a recording of each release that is read for ever. Wire types (offers, reports, interfaces)
are stored in their wire form, which has the same promise.

The record before the last one is kept beside it. If the newest cannot be read (a disk that lies, bits that rotted),
the one before serves; if neither can, or a newer agent wrote it, the file is set aside and the device begins anew: it
then serves nothing until its next offer, but never something that nobody vouched for.

With a key set the record is sealed (`wherry_agent.sealing`) and numbered: one whose number is lower than that of the record
beside it, or than the mark, was put back by somebody, and is treated like one that rotted.
"""

from __future__ import annotations

import hashlib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from wherry_agent import state as s
from wherry_agent.children import Candidate, Loadable, Trust
from wherry_agent.disk import Disk
from wherry_agent.marks import Marks
from wherry_agent.sealing import STOPS, close, opened
from wherry_shared.clock import Since
from wherry_shared.errors import DeviceError, RefusedError, WherryError

FORMAT = 1
MAGIC = b"wherry-journal"
BYTES_MAX = 32 * 1024 * 1024
PLACE = "journal"
"""Where its sealed records belong, and the name of its mark."""

NAMES: dict[type[Any], dict[str, str]] = {
    s.State: {
        "device": "device",
        "project": "project",
        "stream": "report_epoch",
        "models": "models",
        "known_bad": "known_bad",
        "owed": "owed_reports",
        "seq": "next_report",
        "offer": "offer",
        "trust": "trust",
        "watch": "trust_watch",
        "revision": "serving_revision",
        "confirmations": "confirmations",
        "crashes": "worker_crashes",
        "downs": "machine_downs",
        "falls": "machine_falls",
        "stopped": "stopped",
        "told": "worker_told",
        "contracts": "contracts",
        "engines": "engines",
    },
    s.Engines: {
        "installed": "installed",
        "loaded": "in_worker",
        "judging": "judging",
        "handing_over": "handing_over",
        "wanted": "hand_over_wanted",
        "barred": "hand_over_barred",
        "again": "judge_again",
        "hand_over_again": "hand_over_again",
        "denied": "denied",
    },
    s.Denied: {
        "version": "version",
        "digest": "file",
        "since": "since",
        "wait_ms": "wait_ms",
        "troubles": "troubles",
        "found": "found",
    },
    s.Rejudging: {
        "digest": "file",
        "engine_version": "engine_version",
        "running": "running",
        "downs": "downs",
        "shared": "shared",
    },
    s.Falls: {"model": "model", "since": "since", "count": "count", "lasted": "lasted"},
    s.Again: {"since": "since", "wait_ms": "wait_ms", "troubles": "troubles"},
    s.Slot: {
        "incumbent": "incumbent",
        "last_good": "last_good",
        "phase": "phase",
        "contract": "contract",
        "contract_preprocess": "contract_preprocess",
        "ends": "ended",
        "unfit": "ended_without_engine",
        "settled": "settled",
        "faults": "load_faults",
        "told": "last_report",
        "rejudging": "judged_again",
        "held": "held",
    },
    s.Installed: {
        "offered": "terms",
        "loadable": "file",
        "order": "order",
        "idle": "idle",
        "tried": "tried",
        "generation": "generation",
    },
    s.End: {"manifest": "manifest", "rollout": "rollout", "attempt": "attempt", "mode": "mode"},
    s.Job: {
        "offered": "terms",
        "serial": "serial",
        "candidates": "candidates",
        "tried": "tried",
        "canaries": "canaries",
        "troubles": "troubles",
        "restarts": "restarts",
        "downs": "downs",
        "downs_shared": "downs_shared",
        "preprocess_id": "preprocess",
        "reported": "reported_trouble",
        "proved": "proved",
        "again": "again",
    },
    s.Counts: {
        "requests": "requests",
        "errors": "errors",
        "fallbacks": "fallbacks",
        "latency_ratio": "latency_ratio",
        "earlier_requests": "requests_before",
        "earlier_errors": "errors_before",
        "earlier_fallbacks": "fallbacks_before",
        "compared": "compared",
        "agreed": "agreed",
        "skipped": "skipped",
        "earlier_compared": "compared_before",
        "earlier_agreed": "agreed_before",
        "earlier_skipped": "skipped_before",
    },
    s.KnownBad: {
        "digest": "digest",
        "engine": "engine",
        "engine_version": "engine_version",
        "reason": "reason",
        "attempt": "attempt",
        "manifest": "bundle",
    },
    s.Accepted: {
        "epoch": "epoch",
        "serial": "serial",
        "digest": "digest",
        "expires_at": "expires_at",
        "models": "models",
        "unsupported": "unsupported",
        "groups": "groups",
        "flags": "flags",
    },
    s.Declared: {"contract": "contract", "by": "by"},
    s.TrustWatch: {
        "since": "since",
        "wait_ms": "wait_ms",
        "running": "running",
        "troubles": "troubles",
        "reason": "reason",
    },
    s.Crashes: {"since": "since", "count": "count", "rebooted": "rebooted", "running": "while_running"},
    s.Downs: {"since": "since", "count": "count"},
    s.Told: {"since": "since", "waiting": "waiting"},
    s.Idle: {},
    s.Resolving: {"job": "job", "since": "since"},
    s.Fetching: {"job": "job", "since": "since"},
    s.Judging: {"job": "job", "since": "since"},
    s.Queued: {"job": "job", "since": "since"},
    s.Swapping: {
        "job": "job",
        "since": "since",
        "trial": "trial",
        "crashes": "crashes",
        "began": "began",
        "counts": "counts",
    },
    s.OnTrial: {
        "job": "job",
        "since": "since",
        "trial": "trial",
        "crashes": "crashes",
        "counts": "counts",
        "passed": "passed",
    },
    s.Proving: {
        "job": "job",
        "since": "since",
        "trial": "trial",
        "began": "began",
        "crashes": "crashes",
        "counts": "counts",
        "enough": "enough",
    },
    s.Compared: {"job": "job", "counts": "counts"},
    s.Returning: {
        "job": "job",
        "since": "since",
        "reason": "reason",
        "detail": "detail",
        "tries": "tries",
        "counts": "counts",
    },
    s.Waiting: {
        "job": "job",
        "since": "since",
        "reason": "reason",
        "detail": "detail",
        "wait_ms": "wait_ms",
        "then": "then",
    },
    s.Held: {"version": "version", "since": "since", "wait_ms": "wait_ms"},
    s.Safe: {"reason": "reason", "detail": "detail"},
    Since: {"boot": "boot", "monotonic_ms": "ms"},
    Trust: {
        "current": "set",
        "floors": "floors",
        "time_floor_us": "time_floor",
        "expires_at": "expires_at",
        "changed": "changed",
    },
    Candidate: {"loadable": "file", "bytes": "bytes", "why": "why"},
    Loadable: {
        "model": "model",
        "target": "target",
        "manifest": "manifest",
        "variant": "variant",
        "digest": "digest",
        "engine": "engine",
        "engine_version": "engine_version",
        "format": "format",
        "path": "path",
        "golden_path": "golden",
        "at_rest": "at_rest",
        "golden_plain": "golden_plain",
        "config_path": "config",
        "interface": "interface",
        "assets_path": "assets",
        "tensors": "tensors",
        "options": "options",
        "batch": "batch",
        "preprocess": "preprocess",
        "postprocess": "postprocess",
        "peak_memory_bytes": "peak_bytes",
    },
}
"""Class → field → name on disk, for everything that is not a wire type."""

PHASES: dict[type[Any], str] = {
    s.Idle: "idle",
    s.Resolving: "resolving",
    s.Fetching: "fetching",
    s.Judging: "judging",
    s.Queued: "queued",
    s.Swapping: "swapping",
    s.OnTrial: "trial",
    s.Proving: "proving",
    s.Compared: "compared",
    s.Returning: "returning",
    s.Waiting: "waiting",
    s.Safe: "safe",
}
_PHASE_OF = {tag: kind for kind, tag in PHASES.items()}


class Journal:
    """Where the state is kept."""

    def __init__(self, disk: Disk, path: Path, marks: Marks | None = None) -> None:
        self._disk = disk
        self._path = path
        self._before = path.with_name(path.name + ".before")
        self._marks = marks or Marks(path.parent, disk)
        self._number = -1
        """Of the newest record on disk; -1: not looked at yet."""
        self._since_mark = -1
        """Records since the last mark; -1: none was made in this life."""

    def write(self, state: s.State) -> None:
        """Make `state` durable; the effects that belong to it may run afterwards.

        Raises:
            DeviceError: `disk_full`, `disk` or `cipher_missing`; then the old state stands.
            RefusedError: `at_rest_key_missing`, `at_rest_key_other`.
        """
        if self._disk.seal is not None:
            self._mark()
        record = close(self._disk.seal, PLACE, encode(state), self._number + 1)
        self._disk.keep(self._path, self._before)
        self._disk.write_atomic(self._path, record)
        self._number += 1
        self._since_mark += 1

    def read(self, new_stream: Callable[[], str]) -> tuple[s.State | None, list[WherryError]]:
        """Return the state and what was wrong with the record; None if there is nothing to go on with.

        Args:
            new_stream: makes a new epoch for the report stream, which an older state needs: its numbers may have been
                given to other reports since.

        Raises:
            DeviceError: `disk`, the disk cannot be read at all; `cipher_missing`.
            RefusedError: `at_rest_key_missing`, `at_rest_key_other` or `record_clear`: nothing is touched.
        """
        problems: list[WherryError] = []
        floor = self._floor()
        for path in (self._path, self._before):
            data = self._disk.read(path)
            if data is None:
                continue
            try:
                number, state = self._opened(data, floor)
            except RefusedError as error:
                if error.code in STOPS:
                    raise
                problems.append(error)
                self._set_aside(path, problems)
                continue
            self._number = max(self._number, number, floor)
            if problems:
                state = s.renumbered(state, new_stream())
            return state, problems
        self._number = max(self._number, floor)
        if floor and not problems:
            problems.append(
                RefusedError(
                    "journal_missing",
                    f"there is no journal, and there was one with {floor} records",
                    consequence="the device serves nothing until its next offer",
                    next_step="see who had this disk",
                )
            )
        return None, problems

    def _opened(self, data: bytes, floor: int) -> tuple[int, s.State]:
        found = opened(self._disk.seal, PLACE, data)
        if found.sealed and found.number < floor:
            raise _bad("journal_replayed", f"the journal is record {found.number}, and there were {floor} already")
        seal = self._disk.seal
        if found.sealed and seal is not None and seal.mode == "on" and not self._marks.known:
            raise _bad("journal_replayed", "the marks that say how old the journal may be were removed")
        return found.number, decode(found.data)

    def _floor(self) -> int:
        """Return the lowest number that a record may have: of the mark, and of the record before the newest."""
        floor = self._marks.read().get(PLACE, 0)
        before = self._disk.read(self._before)
        if self._disk.seal is None or before is None:
            return floor
        try:
            return max(floor, opened(self._disk.seal, PLACE, before).number)
        except RefusedError:
            return floor

    def _mark(self) -> None:
        """Note, now and then, how far the order had come."""
        if self._number < 0:
            self._number = self._on_disk()
        if 0 <= self._since_mark < Marks.EVERY:
            return
        self._marks.reach(PLACE, max(self._number - 1, 0))
        self._marks.note()
        self._since_mark = 0

    def _on_disk(self) -> int:
        numbers = [self._floor()]
        data = self._disk.read(self._path)
        if data is not None:
            try:
                numbers.append(opened(self._disk.seal, PLACE, data).number)
            except RefusedError as error:
                if error.code in STOPS:
                    raise
        return max(numbers)

    def _set_aside(self, path: Path, problems: list[WherryError]) -> None:
        """Keep a bad record for a person to look at; a disk that takes no writes keeps it where it is."""
        try:
            self._disk.rename(path, path.with_name(path.name + ".bad"))
        except DeviceError as error:
            problems.append(error)


def encode(state: s.State) -> bytes:
    """Return the record of a state."""
    body = msgspec.json.encode(_to_disk(state))
    return b"%b %d %b\n%b" % (MAGIC, FORMAT, hashlib.sha256(body).hexdigest().encode(), body)


def decode(data: bytes) -> s.State:
    """Read a record.

    Raises:
        RefusedError: `journal_foreign` (not a journal), `journal_format` (of a newer agent), `journal_torn` (bytes are
            missing or altered) or `journal_invalid` (whole, but not a state).
    """
    head, _, body = data.partition(b"\n")
    parts = head.split(b" ")
    if len(parts) != 3 or parts[0] != MAGIC or len(data) > BYTES_MAX:
        raise _bad("journal_foreign", "the journal does not begin like one")
    if parts[1] != b"%d" % FORMAT:
        raise _bad("journal_format", f"journal format {parts[1][:20]!r}, this agent reads {FORMAT}")
    if hashlib.sha256(body).hexdigest().encode() != parts[2]:
        raise _bad("journal_torn", "the journal's bytes are not those that were written")
    try:
        state = _from_disk(s.State, msgspec.json.decode(body))
    except (msgspec.MsgspecError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _bad("journal_invalid", f"the journal holds no state: {error}") from error
    assert isinstance(state, s.State)
    return state


def _bad(code: str, message: str) -> RefusedError:
    return RefusedError(
        code,
        message,
        consequence="the record before it is used; without one the device serves nothing until its next offer",
        next_step="the bad file is kept as journal.json.bad",
    )


def _to_disk(value: Any) -> Any:
    names = NAMES.get(type(value))
    if names is not None:
        record = {disk: _to_disk(getattr(value, name)) for name, disk in names.items()}
        tag = PHASES.get(type(value))
        return record if tag is None else {"at": tag, **record}
    if isinstance(value, tuple | list):
        return [_to_disk(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _to_disk(item) for key, item in value.items()}
    return msgspec.to_builtins(value)


_hints: dict[type[Any], dict[str, Any]] = {}


def _from_disk(kind: Any, value: Any) -> Any:
    """Read `value` as `kind`, a class of `NAMES`, a container of such, or anything that msgspec converts."""
    if kind == s.Phase:
        kind = _PHASE_OF[value["at"]]
    if kind in NAMES:
        return _from_record(kind, value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and type(None) in arguments:
        return None if value is None else _from_disk(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return tuple(_from_disk(arguments[0], item) for item in value)
    if origin is Mapping:
        return {str(key): _from_disk(arguments[1], item) for key, item in value.items()}
    return msgspec.convert(value, kind)


def _from_record(kind: Any, record: Any) -> Any:
    """Make a value of `kind`; unknown names are ignored, absent ones take the field's default."""
    if kind not in _hints:
        _hints[kind] = typing.get_type_hints(kind)
    hints = _hints[kind]
    fields = {name: _from_disk(hints[name], record[disk]) for name, disk in NAMES[kind].items() if disk in record}
    return kind(**fields)
