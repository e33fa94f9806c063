"""The supervisor's side of the handles: who holds which file, who runs what, whose process died on a candidate.

One thread accepts, one sends, one per connection reads. The peer is known by SO_PEERCRED and SO_PEERGROUPS, not by what
it says: root, this user, or a member of the group. Nothing here decides about a trial: crashes and verdicts are handed to
the owner's callbacks, which are called from connection threads and must return at once.
"""

from __future__ import annotations

import contextlib
import grp
import itertools
import logging
import os
import pwd
import socket
import struct
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from wherry_agent import handle_messages as messages
from wherry_agent.accepting import accepted
from wherry_agent.children import ArmStats, Loadable, ServeModel
from wherry_agent.lines import LineWriter, read_lines
from wherry_shared.bundle import Contract, check_interface
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.flags import same
from wherry_shared.ids import check_name
from wherry_shared.limits import METRIC_NAME, METRICS_PER_WINDOW_MAX
from wherry_shared.sketch import Sketch
from wherry_shared.wire import Sum

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
HI_SECONDS_MAX = 10.0
SEND_SECONDS_MAX = 5.0
CRASHES_REMEMBERED_MAX = 256
SO_PEERGROUPS = 59
"""unix(7), Linux 4.13; `socket` does not name it."""
GROUP_BYTES = 4
PEER_GROUPS_MAX = 256
"""What `getsockopt` of Python takes at once."""
ARMS_MAX = 16
"""Arms that one handle may count in one message: it holds at most a few variants at a time."""
COUNTS_MAX = 64
"""Arms of one handle whose counts are kept: those in use, and earlier ones until their last counts were taken."""
COUNTS_GONE_MAX = 256
"""Sums that are kept of handles which are gone."""


@dataclass(frozen=True, slots=True)
class HandleCrash:
    """An application's process ended without goodbye while it ran a candidate inside itself."""

    model: str
    digest: str
    trial: str
    pid: int


@dataclass(frozen=True, slots=True)
class HandleVerdict:
    """An application says that what a version answers is wrong."""

    model: str
    digest: str
    trial: str
    reason: str
    pid: int


@dataclass(slots=True, eq=False)
class _Peer:
    """One connected handle."""

    connection: socket.socket
    writer: LineWriter
    pid: int
    model: str = ""
    isolation: messages.Isolation = "worker"
    sent: dict[int, set[str]] = field(default_factory=dict)
    """Revision → digests that it may be loading, until it says what it holds."""
    holds: set[str] = field(default_factory=set)
    acknowledged: int = 0
    candidate: tuple[str, str] | None = None
    """(digest, trial) of the candidate that may run inside its process."""
    counts: dict[tuple[str, str, str], ArmStats] = field(default_factory=dict)
    watches_flags: bool = False
    said_goodbye: bool = False


class HandleServer:
    """Serves assignments to handles on a unix socket."""

    def __init__(
        self,
        path: Path,
        group: str = "",
        *,
        worker_socket: str = "",
        on_crash: Callable[[HandleCrash], None] | None = None,
        on_verdict: Callable[[HandleVerdict], None] | None = None,
        on_contract: Callable[[str, Contract], None] | None = None,
        on_settled: Callable[[str], None] | None = None,
    ) -> None:
        self._path = path
        self._worker_socket = worker_socket
        self._on_crash = on_crash
        self._on_verdict = on_verdict
        self._on_contract = on_contract
        self._on_settled = on_settled
        self._group = group_id(group)
        self._lock = threading.Lock()
        self._revision = 0
        self._serves: dict[str, ServeModel] = {}
        self._revisions: dict[str, int] = {}
        self._flags: messages.Flags | None = None
        self._peers: set[_Peer] = set()
        self._crashed: dict[tuple[str, str, str], None] = {}
        self._gone: dict[tuple[str, str, str, str], ArmStats] = {}
        self._drained: dict[tuple[str, str, str, str], ArmStats] = {}
        self._life = itertools.count(1)
        self._lives: dict[tuple[str, str, str, str], int] = {}
        """Of each sum of counts, for as long as there is one."""
        self._closed = False
        self._listener = self._listen()
        self._outgoing: SimpleQueue[_Peer | None] = SimpleQueue()
        self._acceptor = threading.Thread(target=self._accept, name="handles", daemon=True)
        self._sender = threading.Thread(target=self._send, name="handles-out", daemon=True)
        self._acceptor.start()
        self._sender.start()

    def publish(self, name: str, assignment: ServeModel | None) -> None:
        """Say what handles of model `name` should have from now on; None: nothing. Repeating it changes nothing."""
        with self._lock:
            if self._serves.get(name) == assignment:
                return
            self._revision += 1
            self._revisions[name] = self._revision
            if assignment is None:
                self._serves.pop(name, None)
            else:
                self._serves[name] = assignment
            for peer in self._peers:
                if peer.model == name:
                    self._outgoing.put(peer)

    def publish_flags(self, flags: Mapping[str, Any]) -> None:
        """Say what the feature flags of this device are from now on. Repeating it changes nothing."""
        with self._lock:
            if self._flags is not None and same(self._flags.flags, flags):
                return
            revision = self._flags.revision + 1 if self._flags is not None else 1
            self._flags = messages.Flags(revision=revision, flags=dict(flags))
            for peer in self._peers:
                if peer.watches_flags:
                    self._outgoing.put(peer)

    def leases(self) -> set[str]:
        """Return digests of files that a live handle holds or may be loading: garbage collection keeps them."""
        with self._lock:
            return {digest for peer in self._peers for held in (peer.holds, *peer.sent.values()) for digest in held}

    def settled(self, name: str) -> bool:
        """Tell whether every live handle of model `name` has acted on its newest assignment."""
        with self._lock:
            wanted = self._revisions.get(name, 0)
            return all(peer.acknowledged >= wanted for peer in self._peers if peer.model == name)

    def describe(self) -> list[dict[str, object]]:
        """Return who is connected, for `wherry-agent status`."""
        with self._lock:
            return [
                {
                    "pid": peer.pid,
                    "model": peer.model,
                    "isolation": peer.isolation,
                    "holds": sorted(peer.holds),
                    "settled": peer.acknowledged >= self._revisions.get(peer.model, 0),
                }
                for peer in sorted(self._peers, key=lambda peer: (peer.model, peer.pid))
                if peer.model
            ]

    def drain_stats(self) -> list[ArmStats]:
        """Return the counters that changed since the last call, summed over handles (gone ones too), cumulative."""
        with self._lock:
            totals = dict(self._gone)
            for peer in self._peers:
                for key, stats in peer.counts.items():
                    whole = (peer.model, *key)
                    totals[whole] = merged(totals[whole], stats) if whole in totals else stats
            for whole, stats in totals.items():  # a sum has a life of its own: from the first handle to the last
                life = self._lives.setdefault(whole, next(self._life))
                totals[whole] = msgspec.structs.replace(stats, life=life)
            changed = {key: stats for key, stats in totals.items() if self._drained.get(key) != stats}
            self._drained = totals
            self._forget(changed)
            return list(changed.values())

    def close(self) -> None:
        """Stop listening and close every connection; handles go on with what they have."""
        with self._lock:
            self._closed = True
            peers = list(self._peers)
        with contextlib.suppress(OSError):  # already shut down by the peer, or never connected
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        self._outgoing.put(None)
        self._sender.join()
        for peer in peers:
            with contextlib.suppress(OSError):  # gone in this moment
                peer.connection.shutdown(socket.SHUT_RDWR)
        self._path.unlink(missing_ok=True)

    # -- inside ----------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o660)
            if self._group is not None:
                os.chown(self._path, -1, self._group)
            listener.listen(CONNECTIONS_MAX)
        except OSError as error:
            listener.close()
            raise DeviceError(
                "handle_socket",
                f"cannot listen on {self._path}: {error}",
                consequence="applications cannot use models in their own process",
                next_step="check the folder's permissions, and that the path is shorter than 108 bytes",
            ) from error
        return listener

    def _accept(self) -> None:
        for connection in accepted(self._listener, lambda: self._closed):
            pid, uid, gid = peer_credentials(connection)
            connection.settimeout(HI_SECONDS_MAX)
            peer = _Peer(connection, LineWriter(connection), pid)
            with self._lock:
                full = len(self._peers) >= CONNECTIONS_MAX
                if not full:
                    self._peers.add(peer)
            if full:
                self._refuse(peer, "too_many_handles", f"{CONNECTIONS_MAX} handles are connected")
            elif not allowed(uid, {gid, *peer_groups(connection)}, self._group):
                with self._lock:
                    self._peers.discard(peer)
                self._refuse(peer, "not_allowed", f"user {uid} may not use models of this device")
            else:
                self._begin(peer)

    def _begin(self, peer: _Peer) -> None:
        try:
            threading.Thread(target=self._serve, args=(peer,), name=f"handle-{peer.pid}", daemon=True).start()
        except RuntimeError as error:  # no thread can be had in this moment
            log.error("handle of process %d is hung up on, it comes again: %s", peer.pid, error)
            peer.connection.close()
            self._gone_now(peer)

    def _refuse(self, peer: _Peer, code: str, message: str) -> None:
        log.warning("handle of process %d refused: %s", peer.pid, message)
        with contextlib.suppress(OSError):  # it may be gone before it hears why
            peer.writer.write(messages.encode(messages.Refusal(code=code, message=message)))
        peer.connection.close()

    def _serve(self, peer: _Peer) -> None:
        try:
            for line in read_lines(peer.connection, line_bytes_max=messages.LINE_BYTES_MAX):
                self._take(peer, messages.parse_from_handle(line))
                if peer.said_goodbye:
                    break
        except (OSError, RefusedError) as error:
            log.warning("handle of process %d: %s", peer.pid, error)
            if isinstance(error, RefusedError):
                peer.said_goodbye = True  # we hang up: its end is no crash
                self._refuse(peer, error.code, error.message)
        finally:
            peer.connection.close()
            self._gone_now(peer)

    def _take(self, peer: _Peer, message: messages.FromHandle) -> None:
        match message:
            case messages.Hi():
                self._welcome(peer, message.format)
                self._take_contract(message)
                with self._lock:
                    peer.model = message.model
                    peer.isolation = message.isolation
                self._assign(peer)
            case messages.WatchFlags():
                self._welcome(peer, message.format)
                with self._lock:
                    peer.watches_flags = True
                self._tell_flags(peer)
            case messages.Engaged():
                if not message.ok:
                    words = (peer.pid, peer.model, message.reason, message.detail[:500])
                    log.warning("process %d cannot use %s: %s (%s)", *words)
                with self._lock:
                    peer.holds = set(message.holds)
                    peer.acknowledged = max(peer.acknowledged, message.revision)
                    peer.sent = {rev: held for rev, held in peer.sent.items() if rev > message.revision}
                    serve = self._serves.get(peer.model)
                    inside = message.in_process and serve is not None and serve.active.digest == message.digest
                    if message.revision >= self._revisions.get(peer.model, 0):
                        trial = serve.trial if serve is not None and inside else ""
                        peer.candidate = (message.digest, trial) if trial else None
                self._tell_settled(peer.model)
            case messages.Counts():
                _check_sketches(message.arms)
                with self._lock:
                    for stats in message.arms[:ARMS_MAX]:
                        if stats.model == peer.model:
                            key = (stats.digest, stats.arm, stats.trial)
                            before = peer.counts.pop(key, None)
                            if before is not None and before.life != stats.life:
                                self._add_gone((peer.model, *key), before)
                            peer.counts[key] = stats  # the newest last: the oldest is forgotten first
                    while len(peer.counts) > COUNTS_MAX:
                        del peer.counts[next(iter(peer.counts))]
            case messages.BadReport():
                if self._on_verdict is not None:
                    self._on_verdict(
                        HandleVerdict(peer.model, message.digest, message.trial, message.reason[:500], peer.pid)
                    )
            case messages.Bye():
                peer.said_goodbye = True

    def _take_contract(self, hi: messages.Hi) -> None:
        if hi.contract is None or self._on_contract is None:
            return
        try:
            check_name(hi.model, "model")
            check_interface(hi.contract)
        except RefusedError as error:
            raise RefusedError("contract_invalid", f"the contract of {hi.model[:80]!r}: {error.message}") from error
        self._on_contract(hi.model, hi.contract)

    def _welcome(self, peer: _Peer, format_: int) -> None:
        """The first line came in time: the handle may be silent for ever now, only our writes are bounded."""
        if format_ != messages.FORMAT:
            raise RefusedError("message_format", f"handle speaks format {format_}, not {messages.FORMAT}")
        peer.connection.settimeout(None)
        timeout = struct.pack("ll", int(SEND_SECONDS_MAX), 0)
        peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def _send(self) -> None:
        """Tell handles what is new: a thread of its own, since an application that does not read must block nobody."""
        while (peer := self._outgoing.get()) is not None:
            if peer.watches_flags:
                self._tell_flags(peer)
            else:
                self._assign(peer)

    def _tell_flags(self, peer: _Peer) -> None:
        with self._lock:
            flags = self._flags
        if flags is not None:  # None: the agent is only starting, and tells in a moment
            self._write(peer, flags)

    def _assign(self, peer: _Peer) -> None:
        with self._lock:
            revision = self._revisions.get(peer.model, 0)
            serve = self._for_peer(peer)
            peer.sent[revision] = set(_digests(serve))
            if peer.isolation == "inline" and serve is not None and serve.trial:
                peer.candidate = (serve.active.digest, serve.trial)  # from here on it may be inside
        self._write(peer, messages.Assign(revision=revision, serve=serve, worker_socket=self._worker_socket))

    @staticmethod
    def _write(peer: _Peer, message: messages.ToHandle) -> None:
        try:
            peer.writer.write(messages.encode(message))
        except OSError as error:
            log.warning("handle of process %d does not listen: %s", peer.pid, error)
            with contextlib.suppress(OSError):  # the reading thread sees the end and clears up
                peer.connection.shutdown(socket.SHUT_RDWR)

    def _for_peer(self, peer: _Peer) -> ServeModel | None:
        """Inline handles get the incumbent after an application died on a candidate inside it (contracts.md §9).

        So they do in a split: only the worker sees all callers, and sends each to the same side every time.
        """
        serve = self._serves.get(peer.model)
        if serve is None or peer.isolation != "inline" or not serve.trial:
            return serve
        if serve.mode != "split" and (serve.name, serve.active.digest, serve.trial) not in self._crashed:
            return serve
        if serve.incumbent is None:
            return None
        return msgspec.structs.replace(serve, active=serve.incumbent, incumbent=None, trial="")

    def _tell_settled(self, name: str) -> None:
        if name and self._on_settled is not None and self.settled(name):
            self._on_settled(name)

    def _gone_now(self, peer: _Peer) -> None:
        with self._lock:
            self._peers.discard(peer)
            for key, stats in peer.counts.items():
                self._add_gone((peer.model, *key), stats)
            crash = None
            if peer.candidate is not None and not peer.said_goodbye and not self._closed:
                digest, trial = peer.candidate
                crash = HandleCrash(peer.model, digest, trial, peer.pid)
                self._crashed[peer.model, digest, trial] = None
                while len(self._crashed) > CRASHES_REMEMBERED_MAX:
                    del self._crashed[next(iter(self._crashed))]
        if crash is not None and self._on_crash is not None:
            log.warning("process %d ended without goodbye on candidate %s of %s", peer.pid, crash.digest, crash.model)
            self._on_crash(crash)
        self._tell_settled(peer.model)

    def _add_gone(self, whole: tuple[str, str, str, str], stats: ArmStats) -> None:
        """Keep the counts of a handle, or of a life of a variant in it, that has ended."""
        self._gone[whole] = merged(self._gone.pop(whole), stats) if whole in self._gone else stats
        while len(self._gone) > COUNTS_GONE_MAX:
            del self._gone[next(iter(self._gone))]

    def _forget(self, news: Container[tuple[str, str, str, str]]) -> None:
        """Drop counts of variants that no assignment names and no handle holds, once nothing new comes of them.

        All handles' counts of a variant go together: a sum that only shrinks would look like that of a new process.
        """
        used = {(serve.name, digest) for serve in self._serves.values() for digest in _digests(serve)}
        used |= {
            (peer.model, digest)
            for peer in self._peers
            for held in (peer.holds, *peer.sent.values())
            for digest in held
        }

        def kept(model: str, digest: str, arm: str, trial: str) -> bool:
            return (model, digest) in used or (model, digest, arm, trial) in news

        self._gone = {key: stats for key, stats in self._gone.items() if kept(*key)}
        for peer in self._peers:
            peer.counts = {key: stats for key, stats in peer.counts.items() if kept(peer.model, *key)}
        counted = {*self._gone, *((peer.model, *key) for peer in self._peers for key in peer.counts)}
        self._lives = {whole: life for whole, life in self._lives.items() if whole in counted}


def _digests(serve: ServeModel | None) -> list[str]:
    if serve is None:
        return []
    loadables: list[Loadable] = [serve.active, *([serve.incumbent] if serve.incumbent is not None else [])]
    return [digest for loadable in loadables for digest in loadable.leased]


def merged(one: ArmStats, other: ArmStats) -> ArmStats:
    """Add the counters of the same arm in two processes."""
    latency = {bucket: dict(wire) for bucket, wire in one.latency_us.items()}
    for bucket, wire in other.latency_us.items():
        latency[bucket] = _added(latency.get(bucket, {}), wire)
    classes = dict(one.classes)
    for name, times in other.classes.items():
        classes[name] = classes.get(name, 0) + times
    return msgspec.structs.replace(
        one,
        requests=one.requests + other.requests,
        errors=one.errors + other.errors,
        fallbacks=one.fallbacks + other.fallbacks,
        rejected=one.rejected + other.rejected,
        latency_us=latency,
        wait_us=_added(one.wait_us, other.wait_us),
        classes=classes,
        confidence=_added(one.confidence, other.confidence),
        compared=one.compared + other.compared,
        agreed=one.agreed + other.agreed,
        skipped=one.skipped + other.skipped,
        distance=_added(one.distance, other.distance),
        metrics=_summed(one.metrics, other.metrics),
        last_error=other.last_error or one.last_error,
    )


def _check_sketches(arms: list[ArmStats]) -> None:
    try:
        for stats in arms:
            for wire in (stats.wait_us, stats.confidence, stats.distance, *stats.latency_us.values()):
                Sketch.from_wire(wire)
    except ValueError as error:
        raise RefusedError("message_invalid", f"counts hold a sketch that is none: {error}") from error
    for stats in arms:
        if len(stats.metrics) > METRICS_PER_WINDOW_MAX or not all(
            METRIC_NAME.fullmatch(name) and isfinite(told.total) for name, told in stats.metrics.items()
        ):
            raise RefusedError("message_invalid", "counts hold metrics that no application may tell")


def _summed(one: dict[str, Sum], other: dict[str, Sum]) -> dict[str, Sum]:
    """Add what two processes told, of so many names as one may have."""
    found = dict(one)
    for name, told in other.items():
        known = found.get(name)
        if known is not None:
            found[name] = Sum(count=known.count + told.count, total=known.total + told.total)
        elif len(found) < METRICS_PER_WINDOW_MAX:
            found[name] = told
    return found


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    sketch = Sketch.from_wire(one)
    sketch.merge(Sketch.from_wire(other))
    return sketch.to_wire()


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process at the other end, as the kernel knows them."""
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid, gid


def peer_groups(connection: socket.socket) -> tuple[int, ...]:
    """Return the supplementary groups of the process at the other end, none where the kernel does not say them."""
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, PEER_GROUPS_MAX * GROUP_BYTES)
    except OSError as error:  # an older kernel, or more of them: the group file is asked all the same
        log.debug("groups of a peer are not known: %s", error)
        return ()
    return struct.unpack(f"{len(data) // GROUP_BYTES}I", data)


def allowed(uid: int, gids: Iterable[int], group: int | None) -> bool:
    """Tell whether a peer may connect: root, this process's user, or a member of the group.

    What its process was given counts (`gids`: a unit's SupplementaryGroups, `docker run --group-add`), and what the
    group file says of its user now.
    """
    if uid in (0, os.geteuid()):
        return True
    if group is None:
        return False
    if group in gids:
        return True
    try:
        return pwd.getpwuid(uid).pw_name in grp.getgrgid(group).gr_mem
    except KeyError:  # a user without a name is in no group by name
        return False


def group_id(group: str) -> int | None:
    """Return the id of a group, None for no name.

    Raises:
        DeviceError: `no_group`.
    """
    if not group:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise DeviceError(
            "no_group",
            f"there is no group {group!r}",
            consequence="no application of another user could use models in its own process",
            next_step=f"groupadd --system {group}, or name no group",
        ) from error
