"""The supervisor's children: started, fed, read and awaited, each by a thread of its own. Nothing here decides.

`Short` is a courier or a canary: one task in, one answer out. `WorkerProcess` is the worker: it lives, and when it dies
another is started at once, slower only if it keeps dying young. What children write on standard error goes to the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TypeVar

import msgspec

from wherry_agent import leash
from wherry_agent.canary_exit import GRACE_S, child_environment, classify_exit, peak_of
from wherry_agent.children import (
    CourierAnswer,
    CourierTask,
    Failed,
    Judge,
    Judged,
    Progress,
    WorkerCommand,
    WorkerEvent,
    encode_line,
)
from wherry_agent.lines import LineWriter, read_lines
from wherry_shared import reasons
from wherry_shared.errors import RefusedError

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 16 * 1024 * 1024
SEND_SECONDS_MAX = 10.0
PEAK_EVERY_S = 0.1
YOUNG_S = 5.0
"""A worker that dies within this time of its start makes the next one wait, up to RESTART_WAIT_MAX_S."""
RESTART_WAIT_MIN_S = 0.1
RESTART_WAIT_MAX_S = 5.0
STOP_S = 12.0
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

    def __init__(self, name: str, run: Callable[[Short], Callable[[], None]]) -> None:
        self._name = name
        self._run = run
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Kill the child; its answer is dropped."""
        with self._lock:
            self._cancelled = True
            if self._child is not None and self._child.poll() is None:
                self._child.kill()

    def join(self, timeout_s: float) -> None:
        """Wait for the child's end."""
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
        done = self._run(self)
        with self._lock:
            if self._cancelled:
                return
        done()


def courier(
    task: CourierTask, done: Callable[[CourierAnswer], None], on_progress: Callable[[Progress], None] | None = None
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
            _feed(child, encode_line(task))
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

    return Short("courier", run)


def canary(task: Judge, done: Callable[[Judged], None]) -> Short:
    """Run a canary; `done` gets its verdict, or what its death means."""

    def run(short: Short) -> Callable[[], None]:
        verdict: Judged | None = None
        limit = 0
        peak = 0
        timed_out = threading.Event()
        child = None
        try:
            child = short.start(command("wherry_agent.canary"))
            if child is None:
                return lambda: None
            assert child.stdout is not None
            limit = task.memory_bytes_max
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
            failed = Judged(passed=False, reason=reasons.CHILD_FAILED, detail=f"canary: {error}")
            return lambda: done(failed)
        except msgspec.DecodeError as error:
            log.warning("canary: its last line is no verdict: %s", error)
        code = _ended(child)
        if verdict is None:
            reason, detail = classify_exit(code, peak, limit, timed_out=timed_out.is_set())
            verdict = Judged(passed=False, reason=reason, detail=detail, peak_memory_bytes=peak)
        result = verdict
        return lambda: done(result)

    return Short("canary", run)


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

    threading.Thread(target=run, name=f"{name}-log", daemon=True).start()


class WorkerProcess:
    """The worker, always one: a dead one is followed by the next."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        *,
        on_event: Callable[[WorkerEvent], None],
        on_death: Callable[[str, bool], None],
        memory_reserve_bytes: int,
        argv: Sequence[str] | None = None,
    ) -> None:
        self._listeners = list(listeners)
        self._on_event = on_event
        self._on_death = on_death
        self._argv = list(argv or command("wherry_agent.workers"))
        self._reserve = memory_reserve_bytes
        self._lock = threading.Lock()
        self._writer: LineWriter | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._ordered = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="worker", daemon=True)

    def start(self) -> None:
        """Start the first worker."""
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id of the worker, 0 between two."""
        with self._lock:
            return self._child.pid if self._child is not None else 0

    def send(self, message: WorkerCommand) -> None:
        """Tell the worker something. One that is gone or does not listen hears it again when the next is ready."""
        with self._lock:
            writer = self._writer
        if writer is None:
            return
        try:
            writer.write(encode_line(message))
        except OSError as error:
            log.warning("worker does not listen: %s", error)
            self.restart()

    def restart(self) -> None:
        """End this worker; another follows."""
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                self._ordered = True
                self._child.kill()

    def stop(self, message: WorkerCommand) -> None:
        """Let the worker answer what is in flight and exit; no other follows."""
        self._stopping.set()
        self.send(message)
        self._thread.join(STOP_S)
        self.restart()
        self._thread.join(STOP_S)

    def _main(self) -> None:
        wait_s = 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            detail = self._one()
            with self._lock:
                ordered, self._ordered = self._ordered, False
                self._child = self._writer = None
            if self._stopping.is_set():
                return
            log.warning("worker is gone: %s", detail)
            self._on_death(detail, ordered)
            young = time.monotonic() - began < YOUNG_S
            self._stopping.wait(wait_s)
            wait_s = min(max(wait_s * 2, RESTART_WAIT_MIN_S), RESTART_WAIT_MAX_S) if young else 0.0

    def _one(self) -> str:
        """Run one worker to its end; say how it ended."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                descriptors = [listener.fileno() for listener in self._listeners]
                extra = {
                    "WHERRY_CONTROL_FD": str(theirs.fileno()),
                    "WHERRY_LISTEN_FDS": ",".join(map(str, descriptors)),
                    "WHERRY_MEMORY_RESERVE_BYTES": str(self._reserve),
                }
                try:
                    child = subprocess.Popen(
                        self._argv,
                        stdin=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        env=environment(extra),
                        pass_fds=[theirs.fileno(), *descriptors],
                    )
                except OSError as error:
                    return f"it could not be started: {error}"
            assert child.stderr is not None
            drain(child.stderr, "worker")
            # only our writes are bounded; it may be silent for ever
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_SECONDS_MAX), 0))
            with self._lock:
                self._child, self._writer = child, LineWriter(ours)
            try:
                for line in read_lines(ours, line_bytes_max=LINE_BYTES_MAX):
                    self._on_event(_events.decode(line))
            except (OSError, RefusedError, msgspec.DecodeError) as error:
                log.error("worker speaks nonsense: %s", error)
                child.kill()
            try:
                code = child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"
