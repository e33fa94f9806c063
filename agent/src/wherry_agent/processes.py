"""The supervisor's children: started, fed, read and awaited, each by a thread of its own. Nothing here decides.

`Short` is a courier or a canary: one task in, one answer out. `WorkerProcess` is the worker: it lives, and when it dies
another is started at once, slower only if it keeps dying young. When it is to be replaced while it lives, the next one
loads beside it, and then the old one answers what it holds and passes its open connections on. What children write on
standard error goes to the log.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeVar

import msgspec

from wherry_agent import cgroups, in_flight, leash, readings
from wherry_agent.answering.memory import HEADROOM
from wherry_agent.canary_exit import GRACE_S, child_environment, classify_exit, peak_of, status_bytes
from wherry_agent.children import (
    CourierAnswer,
    CourierTask,
    Failed,
    Grpc,
    Judge,
    Judged,
    Progress,
    Ran,
    Ready,
    Serve,
    Serving,
    Stats,
    Stop,
    WorkerCommand,
    WorkerEvent,
    encode_line,
)
from wherry_agent.lines import LineWriter, read_lines
from wherry_agent.sealing import Seal
from wherry_agent.serving.passing import channel as passing_channel
from wherry_agent.socket_name import SocketName
from wherry_shared import reasons
from wherry_shared.errors import DeviceError, RefusedError

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 16 * 1024 * 1024
SEND_SECONDS_MAX = 10.0
PEAK_EVERY_S = 0.1
YOUNG_S = 5.0
"""A worker that dies within this time of its start makes the next one wait, up to RESTART_WAIT_MAX_S."""
RESTART_WAIT_MIN_S = 0.1
RESTART_WAIT_MAX_S = 5.0
ORDERED_CODES = frozenset({0, -signal.SIGKILL})
"""How a worker ends that was told to end, or was killed here; every other end is its own."""
FROM_OUTSIDE_CODES = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})
"""Ends that say nothing of what ran: the kernel takes the largest process when memory is short, whoever needs it."""
RAN_KNOWN_MAX = 512
"""Versions that this process remembers to have named to a worker; a mark of any other stays without a name."""
GONE_ERRNOS = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})
"""What writing to a worker says when it ended, or closed its end."""
STOP_S = 12.0
"""A worker that was told to end answers what is in flight within this time, or is killed."""
HAND_OVER_SECONDS_MAX = 180.0
"""From the start of a worker that takes over until it answers for every model."""
LOOK_S = 15.0
"""Between two looks at the pulse of the worker."""
SILENT_LOOKS = 8
"""A worker whose pulse stood still for so many looks in a row hangs. Looks are counted, not seconds: a device that slept
looks once when it wakes."""
HELD_SECONDS_MAX = 300.0
"""A worker in which no run ended for so long, although others waited for one to end, hangs in its engine; where the terms
of a model give a request more than half of it, twice what they give."""
ABORT_S = 5.0
"""A worker that hangs is ended by SIGABRT, which says what it ran; after this time by SIGKILL."""
SPARE_AFTER_S = 10.0
"""After a worker served what it was told; a start at once would compete with it."""
SPARE_MEMORY_BYTES_MIN = 512 * 1024 * 1024
"""With less memory available, `warm_start = "auto"` makes no spare worker (it takes about 30 MB)."""
WarmStart = Literal["off", "auto", "on"]
GRPC_OWED = "/grpc"
"""Among the models that a worker about to take over has not answered for: that it did what it could about gRPC."""
LOG_LINE_CHARS_MAX = 1000

A = TypeVar("A")
_answers: msgspec.json.Decoder[CourierAnswer] = msgspec.json.Decoder(CourierAnswer)
_judged: msgspec.json.Decoder[Judged] = msgspec.json.Decoder(Judged)
_events: msgspec.json.Decoder[WorkerEvent] = msgspec.json.Decoder(WorkerEvent)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line of a child that dies with this process."""
    return [sys.executable, "-m", "wherry_agent.leash", module, *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child (allocator settings as contracts.md §6)."""
    return {**child_environment(), leash.PARENT: str(os.getpid()), **(extra or {})}


class Short:
    """A child with one task. `cancel` ends it; then `done` is not called."""

    def __init__(
        self, name: str, run: Callable[[Short], Callable[[], None]], lost: Callable[[str], Callable[[], None]]
    ) -> None:
        """Begin; `run` and `lost` (given what went wrong) return what tells of the end."""
        self._name = name
        self._run = run
        self._lost = lost
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be had in this moment: whoever waits tries again
            log.error("%s: %s", name, error)
            lost(f"{name}: {error}")()

    def cancel(self) -> None:
        """Kill the child; its answer is dropped."""
        with self._lock:
            self._cancelled = True
            if self._child is not None and self._child.poll() is None:
                self._child.kill()

    def join(self, timeout_s: float) -> None:
        """Wait for the child's end."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def start(self, argv: Sequence[str]) -> subprocess.Popen[bytes] | None:
        """Start the child with piped ends; None if it was cancelled before."""
        with self._lock:
            if self._cancelled:
                return None
            self._child = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
            )
        assert self._child.stderr is not None
        drain(self._child.stderr, self._name)
        return self._child

    def _main(self) -> None:
        try:
            done = self._run(self)
        except Exception as error:  # the thread's border: somebody waits for its end
            log.exception("%s", self._name)
            with self._lock:
                if self._child is not None:
                    self._child.kill()
            done = self._lost(f"{self._name}: {error}")
        with self._lock:
            if self._cancelled:
                return
        done()


def courier(
    task: CourierTask,
    done: Callable[[CourierAnswer], None],
    on_progress: Callable[[Progress], None] | None = None,
    *,
    seal: Seal | None = None,
) -> Short:
    """Run a courier; `done` gets its last answer, or `Failed(child_failed)` if it died without one."""

    def run(short: Short) -> Callable[[], None]:
        answer: CourierAnswer = Failed(
            reason=reasons.CHILD_FAILED, detail="the courier gave no answer", retry_after_s=0
        )
        child = None
        try:
            child = short.start(command("wherry_agent.courier"))
            if child is None:
                return lambda: None
            assert child.stdout is not None
            _feed(child, encode_line(task) + (seal.line() if seal is not None else b""))
            for line in child.stdout:
                message = _answers.decode(line)
                if isinstance(message, Progress):
                    if on_progress is not None:
                        on_progress(message)
                else:
                    answer = message
        except (OSError, msgspec.DecodeError) as error:
            answer = Failed(reason=reasons.CHILD_FAILED, detail=f"courier: {error}", retry_after_s=0)
        code = _ended(child)
        if isinstance(answer, Failed) and answer.detail == "the courier gave no answer":
            answer = msgspec.structs.replace(answer, detail=f"the courier ended with {code} and no answer")
        return lambda: done(answer)

    def lost(detail: str) -> Callable[[], None]:
        return lambda: done(Failed(reason=reasons.CHILD_FAILED, detail=detail, retry_after_s=0))

    return Short("courier", run, lost)


def canary(task: Judge, done: Callable[[Judged], None], groups: Path | None = None) -> Short:
    """Run a canary; `done` gets its verdict, or what its death means.

    Args:
        task: what it has to judge.
        done: called in another thread.
        groups: the control group below which its memory is limited (`cgroups.delegated`), if there is one.
    """

    def run(short: Short) -> Callable[[], None]:
        verdict: Judged | None = None
        limit = 0
        peak = 0
        timed_out = threading.Event()
        child = cage = None
        try:
            child = short.start(command("wherry_agent.canary"))
            if child is None:
                return lambda: None
            assert child.stdout is not None
            limit = task.memory_bytes_max
            cage = cgroups.Cage.make(groups, f"canary-{child.pid}", limit)
            if cage is not None:
                cage.add(child.pid)  # before it hears what to load
            watch = threading.Thread(
                target=_watch_canary, args=(child, task.seconds_max + GRACE_S, timed_out), daemon=True
            )
            watch.start()
            _feed(child, encode_line(task))
            for line in child.stdout:
                verdict = _judged.decode(line)
            watch.join()
            peak = int(getattr(watch, "peak", 0))
        except OSError as error:
            # it could not be started or fed: trouble of this machine, not of the model
            if cage is not None:
                cage.remove()
            failed = Judged(passed=False, reason=reasons.CHILD_FAILED, detail=f"canary: {error}")
            return lambda: done(failed)
        except msgspec.DecodeError as error:
            log.warning("canary: its last line is no verdict: %s", error)
        code = _ended(child)
        killed = cage is not None and cage.out_of_memory()
        if cage is not None:
            cage.remove()
        if verdict is None:
            reason, detail = classify_exit(code, peak, limit, timed_out=timed_out.is_set(), out_of_memory=killed)
            verdict = Judged(passed=False, reason=reason, detail=detail, peak_memory_bytes=peak)
        result = verdict
        return lambda: done(result)

    def lost(detail: str) -> Callable[[], None]:
        return lambda: done(Judged(passed=False, reason=reasons.CHILD_FAILED, detail=detail))

    return Short("canary", run, lost)


def _watch_canary(child: subprocess.Popen[bytes], seconds: float, timed_out: threading.Event) -> None:
    """Sample the canary's peak memory, and kill it when it overruns."""
    end = time.monotonic() + seconds
    thread = threading.current_thread()
    while child.poll() is None:
        thread.peak = max(getattr(thread, "peak", 0), peak_of(child.pid))  # type: ignore[attr-defined]
        if time.monotonic() > end:
            timed_out.set()
            child.kill()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PEAK_EVERY_S)


def _feed(child: subprocess.Popen[bytes], task: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died before it read: its end says how
        child.stdin.write(task)
        child.stdin.close()


def _ended(child: subprocess.Popen[bytes] | None) -> int:
    """Wait for a child that closed its output, and end one that does not go."""
    if child is None:
        return 0
    try:
        code = child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        code = child.wait()
    if child.stdout is not None:
        child.stdout.close()
    return code


def drain(stream: IO[bytes], name: str) -> None:
    """Pass what a child writes on standard error to the log, in a thread."""

    def run() -> None:
        with stream:
            for line in stream:
                log.info("%s: %s", name, line.decode(errors="replace").rstrip()[:LOG_LINE_CHARS_MAX])

    try:
        threading.Thread(target=run, name=f"{name}-log", daemon=True).start()
    except (
        RuntimeError
    ) as error:  # no thread can be had in this moment; a pipe that nobody reads would hold the child up
        log.error("what %s writes is not in the log: %s", name, error)
        stream.close()


class _Seat:
    """A thread, and the worker that it started and waits for: the kernel ends a child with its starter's thread."""

    def __init__(self, main: Callable[[_Seat], None], prepare: str = "") -> None:
        self.prepare = prepare
        """Engines that its worker imports before it is ready."""
        self.began = 0.0
        """When its worker began to answer (monotonic seconds)."""
        self.child: subprocess.Popen[bytes] | None = None
        self.writer: LineWriter | None = None
        self.ordered = False
        """Its worker was alive when it was told to end, or ended here."""
        self.ready = False
        self.answered = False
        """Its worker is, or was, the one that answers."""
        self.owes: set[str] = set()
        """Models that a worker about to take over has not answered for."""
        self.answers: dict[str, Serving] = {}
        self.page = -1
        """Where its worker notes what it runs."""
        self.grpc_socket: Path | None = None
        """Where its worker opens gRPC's unix socket."""
        self.grpc_said = self.grpc_open = False
        """Its worker has said what became of gRPC; and that this socket is open."""
        self.loading: set[str] = set()
        """Models for which its worker has not answered yet: who waits for them has limits of its own."""
        self.pulse = self.silent = 0
        """Beats at the last look; how many looks in a row found no more."""
        self.hangs = ""
        """Why its worker is being ended."""
        self.thread = threading.Thread(target=main, args=(self,), name="worker", daemon=True)

    @property
    def pid(self) -> int:
        """Process id, 0 between two."""
        return self.child.pid if self.child is not None else 0

    @property
    def alive(self) -> bool:
        """Tell whether there is a process, and it has not ended by itself."""
        return self.child is not None and self.child.poll() is None

    def kill(self) -> None:
        """End the process, if there is one."""
        if self.child is not None and self.alive:
            self.child.kill()


@dataclass(slots=True)
class _Peer:
    """The end at which the open connections of a worker that makes way come out; the next workers inherit it."""

    end: socket.socket
    over: bool = False
    """Its worker has ended: nothing more is put in."""


class WorkerProcess:
    """The worker: one that answers, followed by another when it dies, and for moments a second that takes over."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        *,
        on_event: Callable[[WorkerEvent, int], None],
        on_death: Callable[[str, bool, tuple[Ran, ...]], None],
        on_gone: Callable[[int], None],
        memory_reserve_bytes: int,
        grpc_port: int = 0,
        grpc_socket: SocketName | None = None,
        warm_start: WarmStart = "off",
        argv: Sequence[str] | None = None,
        available_bytes: Callable[[], int] = lambda: readings.memory_bytes("MemAvailable"),
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            listeners: inherited by every worker.
            on_event: gets what a worker says, and its process id.
            on_death: gets how the worker ended that was to go on, whether `restart` ended it, and what it was running
                (empty if that cannot be told).
            on_gone: gets the process id of every worker that answered and has ended, after its last event.
            memory_reserve_bytes: what a second worker leaves free.
            grpc_port: loopback port that each worker opens for gRPC when it can have it; 0: none.
            grpc_socket: name of the unix socket that leads to the worker that answers, with `grpc_port`.
            warm_start: whether a spare worker waits with its engines imported; `auto`: where there is memory for it.
            argv: another command line.
            available_bytes: memory of this machine for new processes.
        """
        self._listeners = list(listeners)
        self._on_event = on_event
        self._on_death = on_death
        self._on_gone = on_gone
        self._argv = list(argv or command("wherry_agent.workers"))
        self._reserve = memory_reserve_bytes
        self._grpc_port = grpc_port
        self._grpc_socket = grpc_socket
        self._regions = os.memfd_create("wherry-regions")
        """What clients registered as shared memory, for the worker that follows."""
        self._available_bytes = available_bytes
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._told: Serve | None = None
        self._known: dict[int, Ran] = {}
        """Mark → version, of all that a worker was told to serve."""
        self._peers: list[_Peer] = []
        self._seat = _Seat(self._life)
        self._seat.answered = True
        self._next: _Seat | None = None
        self._warm_start = warm_start
        self._spare: _Seat | None = None
        self._spare_planned = False
        self._leaving: list[_Seat] = []
        self._done: Callable[[str], None] | None = None
        """Called with the trouble (empty: none) when a hand-over has ended."""

    def start(self) -> None:
        """Start the first worker."""
        self._seat.thread.start()
        threading.Thread(target=self._watch, name="worker-pulse", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the worker, 0 between two."""
        with self._lock:
            return self._seat.pid

    @property
    def spare_pid(self) -> int:
        """Process id of the spare worker that is ready, 0 if there is none."""
        with self._lock:
            return self._spare.pid if self._spare is not None and self._spare.ready else 0

    def running(self) -> tuple[Ran, ...]:
        """Return what the worker is loading or running at this moment."""
        return self._running(self._seat)

    def send(self, message: WorkerCommand) -> None:
        """Tell the worker something. One that is gone or does not listen hears it again when the next is ready."""
        with self._lock:
            seat, follower = self._seat, self._next
            if isinstance(message, Serve):
                self._told = message
                self._know(message)
                seat.loading = {model.name for model in message.models}
        self._write(seat, message)
        if isinstance(message, Serve) and follower is not None and follower.ready:
            self._tell(follower, message)

    def restart(self) -> None:
        """End this worker; another follows."""
        with self._lock:
            self._seat.ordered = self._seat.alive
            self._seat.kill()

    def hand_over(self, done: Callable[[str], None]) -> None:
        """Let another worker take over without a failed request, beside this one if there is memory for both.

        Args:
            done: gets an empty text when the other answers, else why this one goes on.
        """
        with self._lock:
            if self._done is not None or self._stopping.is_set():
                done("a hand-over is under way, or the agent stops")
                return
            self._done = done
            self.renew_spare()  # it has the engines of the past in memory
            needed = int(self._needed() * HEADROOM) + self._reserve
            available = self._available_bytes()
            if available >= needed:
                self._next = _Seat(self._life)
                try:
                    self._next.thread.start()
                except RuntimeError as error:  # no thread can be had in this moment
                    self._give_up(self._next, f"no other worker can be started: {error}")
                    return
                self._after(HAND_OVER_SECONDS_MAX, self._next, "it did not serve within its time")
                return
            log.info("hand-over: %d bytes are available, %d would be needed for two workers", available, needed)
            seat = self._seat
            seat.ordered = seat.alive
            self._after(STOP_S, seat)
        self._write(seat, Stop(hand_over=True))

    def stop(self, message: WorkerCommand) -> None:
        """Let the worker answer what is in flight and exit; no other follows."""
        self._stopping.set()
        with self._lock:
            others = [one for one in (self._next, self._spare) if one is not None]
            seats = [self._seat, *self._leaving, *others]
        for seat in others:
            seat.kill()
        self.send(message)
        for seat in seats:
            if seat.thread.is_alive():
                seat.thread.join(STOP_S)
                seat.kill()
                seat.thread.join(STOP_S)
        with self._lock:
            for peer in self._peers:
                peer.end.close()
            self._peers.clear()
            if self._grpc_socket is not None:
                with contextlib.suppress(OSError):  # looked for again at the next start
                    self._grpc_socket.close()
            if self._regions >= 0:
                os.close(self._regions)
                self._regions = -1

    # -- inside ----------------------------------------------------------------------------------

    def _life(self, seat: _Seat) -> None:
        """Start a worker and wait for its end, again and again as long as this seat is the one that answers."""
        wait_s = 0.0
        while not self._stopping.is_set():
            seat.began = time.monotonic()
            detail, code, ran = self._one(seat)
            with self._lock:
                spare = self._take_spare(seat)
                pid = seat.pid
                # what a crash ends a moment before our order would is a crash
                ordered, seat.ordered = seat.ordered and code in ORDERED_CODES, False
                seat.child = seat.writer = None
                current = seat is self._seat or spare is not None
                if seat in self._leaving:
                    self._leaving.remove(seat)
            if not seat.answered and seat is self._spare:
                self._spare = None
                log.warning("the spare worker ended with %s", detail)
                return
            if not seat.answered:
                self._give_up(seat, f"the new worker ended with {detail}")
                return
            self._on_gone(pid)
            if not current or self._stopping.is_set():
                return
            log.warning("worker is gone: %s", detail)
            self._on_death(detail, ordered, ran)
            if spare is not None:
                log.info("worker %d was ready and takes its place", spare.pid)
                self._on_event(Ready(pid=spare.pid), spare.pid)
                return
            young = time.monotonic() - seat.began < YOUNG_S
            self._stopping.wait(wait_s)
            wait_s = min(max(wait_s * 2, RESTART_WAIT_MIN_S), RESTART_WAIT_MAX_S) if young else 0.0

    def _one(self, seat: _Seat) -> tuple[str, int | None, tuple[Ran, ...]]:
        """Run one worker to its end; say how it ended, with which code (None: it did not begin), and what it ran then."""
        with self._lock:
            seat.page = in_flight.make_page()
        try:
            detail, code = self._live(seat, seat.page)
            if seat.hangs:
                detail, seat.hangs = f"{detail}, being ended since {seat.hangs}", ""
            ran = () if code is None or code in FROM_OUTSIDE_CODES else self._running(seat)
        finally:
            with self._lock:
                os.close(seat.page)
                seat.page = -1
        while_running = ", ".join(f"{one.model} ({one.variant})" for one in ran if one.model)
        return detail + (f" while it ran {while_running}" if while_running else ""), code, ran

    def _live(self, seat: _Seat, page: int) -> tuple[str, int | None]:
        ours, theirs = socket.socketpair()
        giving, taking = passing_channel()
        with ours, giving:
            with theirs:
                try:
                    child, peer = self._start(theirs, giving, taking, seat, page)
                except OSError as error:
                    taking.close()
                    return f"it could not be started: {error}", None
            giving.close()
            assert child.stderr is not None
            drain(child.stderr, "worker")
            # only our writes are bounded; it may be silent for ever
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_SECONDS_MAX), 0))
            with self._lock:
                seat.child, seat.writer = child, LineWriter(ours)
                seat.ready = False
                seat.pulse = seat.silent = 0
                if self._stopping.is_set() or seat not in (self._seat, self._next, self._spare):
                    child.kill()  # it is not wanted any more
            try:
                for line in read_lines(ours, line_bytes_max=LINE_BYTES_MAX):
                    self._heard(seat, _events.decode(line))
            except (OSError, RefusedError, msgspec.DecodeError) as error:
                log.error("worker speaks nonsense: %s", error)
                child.kill()
            try:
                code = child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
            with self._lock:
                peer.over = True
                if self._grpc_socket is not None and seat.grpc_socket is not None:
                    self._grpc_socket.forget(seat.grpc_socket)
                if seat is not self._seat:  # who follows has its end already, or there is nothing in it
                    self._forget_peers()
        return (f"signal {-code}" if code < 0 else f"exit code {code}"), code

    def _start(
        self, control: socket.socket, giving: socket.socket, taking: socket.socket, seat: _Seat, page: int
    ) -> tuple[subprocess.Popen[bytes], _Peer]:
        with self._lock:
            descriptors = [listener.fileno() for listener in self._listeners]
            inherited = [peer.end.fileno() for peer in self._peers]
            seat.grpc_said = seat.grpc_open = False
            seat.grpc_socket = self._grpc_socket.fresh() if self._grpc_socket is not None else None
            extra = {
                "WHERRY_CONTROL_FD": str(control.fileno()),
                "WHERRY_LISTEN_FDS": ",".join(map(str, descriptors)),
                "WHERRY_MEMORY_RESERVE_BYTES": str(self._reserve),
                "WHERRY_PREPARE": seat.prepare,
                "WHERRY_PASS_FD": str(giving.fileno()),
                "WHERRY_TAKE_FDS": ",".join(map(str, inherited)),
                "WHERRY_GRPC_PORT": str(self._grpc_port),
                "WHERRY_GRPC_SOCKET": str(seat.grpc_socket or ""),
                "WHERRY_REGIONS_FD": str(self._regions),
                "WHERRY_IN_FLIGHT_FD": str(page),
            }
            child = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(extra),
                pass_fds=[control.fileno(), giving.fileno(), self._regions, page, *descriptors, *inherited],
            )
            self._forget_peers()
            peer = _Peer(taking)
            self._peers.append(peer)
        return child, peer

    def _running(self, seat: _Seat) -> tuple[Ran, ...]:
        with self._lock:
            return in_flight.read_page(seat.page, self._known) if seat.page >= 0 else ()

    def _know(self, serve: Serve) -> None:
        for model in serve.models:
            for one in (model.active, model.incumbent):
                if one is not None:
                    mark = in_flight.mark_of(one)
                    self._known.pop(mark, None)  # the one that was told last is forgotten last
                    self._known[mark] = Ran(one.model, one.manifest, one.variant)
        while len(self._known) > RAN_KNOWN_MAX:
            del self._known[next(iter(self._known))]

    def _forget_peers(self) -> None:
        for peer in [peer for peer in self._peers if peer.over]:
            peer.end.close()
            self._peers.remove(peer)

    def _write(self, seat: _Seat, message: WorkerCommand) -> None:
        writer = seat.writer
        if writer is None:
            return
        try:
            writer.write(encode_line(message))
        except OSError as error:
            gone = error.errno in GONE_ERRNOS
            log.warning("worker %s: %s", "is gone or closed its end" if gone else "does not listen", error)
            with self._lock:
                # an end that is closed is the worker's own doing: it counts as a crash
                seat.ordered = seat.ordered or (not gone and seat.alive)
                seat.kill()

    # -- the pulse -------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End a worker that lives and does nothing: nobody else would notice, as long as nothing new is asked of it."""
        while not self._stopping.wait(LOOK_S):
            with self._lock:
                seat = self._seat
                seat.hangs = seat.hangs or self._hangs(seat)
                child = seat.child if seat.hangs and seat.alive else None
            if child is None:
                continue
            log.error("worker %d is ended: %s", child.pid, seat.hangs)
            child.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(ABORT_S)
                continue
            child.kill()

    def _hangs(self, seat: _Seat) -> str:
        """Say why a worker hangs; empty if it does not, or if somebody waits for what it loads. The lock is held."""
        if seat.page < 0 or not seat.ready or seat.loading or not seat.alive:
            seat.silent = 0
            return ""
        beats, held_ms = in_flight.read_pulse(seat.page)
        seat.silent = seat.silent + 1 if beats and beats == seat.pulse else 0
        seat.pulse = beats
        if seat.silent >= SILENT_LOOKS:
            return f"it showed no sign of life for {seat.silent * LOOK_S:.0f} s"
        deadline_ms = (
            max((model.deadline_ms for model in self._told.models), default=0) if self._told is not None else 0
        )
        if held_ms >= max(HELD_SECONDS_MAX * 1000, 2 * deadline_ms):
            return f"no run ended for {held_ms / 1000:.0f} s although others waited"
        return ""

    # -- hand-over -------------------------------------------------------------------------------

    def _needed(self) -> int:
        """Return what a second worker is expected to take: what this one has, or what the canary measured if more."""
        told = self._told.models if self._told is not None else []
        loadables = [one for model in told for one in (model.active, model.incumbent) if one is not None]
        return max(resident_bytes(self._seat.pid), sum(one.peak_memory_bytes for one in loadables))

    def _heard(self, seat: _Seat, event: WorkerEvent) -> None:
        with self._lock:
            follows = seat is self._next
            answers = seat is self._seat
            if isinstance(event, Ready):
                seat.ready = True
                told = self._told
                # after a cold hand-over: there was no moment with two
                finished = self._finish() if answers and self._next is None else None
            if isinstance(event, Serving) and self._told is not None and event.revision == self._told.revision:
                seat.loading.discard(event.model)
            if isinstance(event, Grpc):
                seat.grpc_said, seat.grpc_open = True, not event.socket
                if answers:
                    self._lead_grpc_to(seat)
        if follows:
            if isinstance(event, Grpc) and event.doing == "served":  # its answers come from there already
                self._on_event(event, seat.pid)
            self._weigh(seat, event)
        elif answers or isinstance(event, Stats):  # one that leaves has only its last counts to say
            self._on_event(event, seat.pid)
        if answers and isinstance(event, Serving):
            self._plan_spare()
        if isinstance(event, Ready):
            if follows and told is not None:
                self._tell(seat, told)
            elif follows:
                self._give_up(seat, "nothing was served yet")
            elif finished is not None:
                finished("")

    def _tell(self, seat: _Seat, serve: Serve) -> None:
        with self._lock:
            if serve is not self._told:
                return  # it hears the newer one
            seat.owes = {model.name for model in serve.models}
            nothing = not serve.models
            if self._grpc_port and not seat.grpc_said:
                seat.owes.add(GRPC_OWED)
        self._write(seat, serve)
        if nothing:
            self._promote(seat)

    def _weigh(self, seat: _Seat, event: WorkerEvent) -> None:
        """Take over when the new worker answered for every model of the newest serving set, and for gRPC if it is on."""
        if not isinstance(event, Serving | Grpc):
            return
        with self._lock:
            if self._told is None or (isinstance(event, Serving) and event.revision != self._told.revision):
                return
            if isinstance(event, Serving):
                seat.owes.discard(event.model)
                seat.answers[event.model] = event
            else:
                seat.owes.discard(GRPC_OWED)
            complete = not seat.owes
        if isinstance(event, Serving) and not event.ok:
            self._give_up(seat, f"the new worker cannot serve {event.model}: {event.reason} {event.detail}")
        elif complete:
            self._promote(seat)

    def _promote(self, seat: _Seat) -> None:
        with self._lock:
            if seat is not self._next:
                return
            old, self._seat, self._next = self._seat, seat, None
            seat.answered = True
            self._lead_grpc_to(seat)  # before the old one sends its clients away
            self._leaving.append(old)
            finished = self._finish()
            self._after(STOP_S, old)
        log.info("worker %d takes over from %d", seat.pid, old.pid)
        self._write(old, Stop(hand_over=True))
        for answer in seat.answers.values():
            self._on_event(answer, seat.pid)
        if finished is not None:
            finished("")
        self._plan_spare()

    def _lead_grpc_to(self, seat: _Seat) -> None:
        """Let clients of gRPC's unix socket find the worker of a seat, if it has opened one."""
        if self._grpc_socket is None or seat.grpc_socket is None or not seat.grpc_open:
            return
        try:
            self._grpc_socket.lead_to(seat.grpc_socket)
        except (OSError, DeviceError) as error:
            log.error("%s does not lead to worker %d: %s", self._grpc_socket.path, seat.pid, error)

    def _give_up(self, seat: _Seat, trouble: str) -> None:
        with self._lock:
            if seat is not self._next:
                return
            self._next = None
            seat.kill()
            finished = self._finish()
        log.warning("hand-over: %s", trouble)
        if finished is not None:
            finished(trouble)

    # -- the spare -------------------------------------------------------------------------------

    def renew_spare(self) -> None:
        """Let the spare go, since engines changed; another is made in a while."""
        with self._lock:
            spare, self._spare = self._spare, None
            if spare is not None:
                spare.kill()
        if spare is not None:
            self._plan_spare()

    def _take_spare(self, seat: _Seat) -> _Seat | None:
        """Let the spare answer in place of a worker that has just ended."""
        spare = self._spare
        if seat is not self._seat or spare is None or not spare.ready or self._stopping.is_set():
            return None
        self._seat, self._spare = spare, None
        spare.answered, spare.began = True, time.monotonic()
        return spare

    def _plan_spare(self) -> None:
        """Make a spare when this worker has settled."""
        with self._lock:
            if self._warm_start == "off" or self._spare is not None or self._spare_planned:
                return
            self._spare_planned = True
        if not _begin(threading.Timer(SPARE_AFTER_S, self._make_spare)):
            with self._lock:
                self._spare_planned = False

    def _make_spare(self) -> None:
        with self._lock:
            self._spare_planned = False
            if self._stopping.is_set() or self._spare is not None or self._next is not None or self._told is None:
                return
            if self._warm_start == "auto" and self._available_bytes() < SPARE_MEMORY_BYTES_MIN + self._reserve:
                return
            engines = sorted({model.active.engine for model in self._told.models})
            self._spare = _Seat(self._life, ",".join(engines))
            self._spare.thread.start()

    def _finish(self) -> Callable[[str], None] | None:
        done, self._done = self._done, None
        return done

    def _after(self, seconds: float, seat: _Seat, trouble: str = "") -> None:
        """End a process that is not done with what it was told by then."""
        child = seat.child

        def end() -> None:
            if trouble:
                self._give_up(seat, trouble)
            elif child is not None and child.poll() is None and child is seat.child:
                log.warning("worker %d did not make way in %.0f s", child.pid, seconds)
                child.kill()

        _begin(threading.Timer(seconds, end))


def _begin(timer: threading.Timer) -> bool:
    """Start a timer; False if no thread can be had in this moment, which must not end who wanted it."""
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as error:
        log.error("a worker is not watched over: %s", error)
        return False
    return True


def resident_bytes(pid: int) -> int:
    """Return what a living process holds in memory (VmRSS), 0 if it is gone."""
    return status_bytes(pid, "VmRSS")
