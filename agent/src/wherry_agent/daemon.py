"""The supervisor: threads around one queue, and one loop that takes a turn at a time.

A turn: take an event, let `machine.step` decide, write the new state durably, then run the effects; `_run` is the one
table that does, and decides nothing. Whatever happens elsewhere (broker, server, children, applications, timers) comes
in through the queue, so nothing here needs a lock but what other threads look at.

Engines, numpy, TUF and cryptography live in children: a native crash is a dead child, never a dead agent.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import functools
import logging
import os
import queue
import random
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import msgspec

from wherry_agent import (
    __version__,
    cgroups,
    children,
    identity,
    machine,
    readings,
    retirement,
    revoking,
    sampling,
    shelter,
    status,
    timestamp,
    turn,
)
from wherry_agent import state as s
from wherry_agent.children import ArmStats, Ran, arm_of
from wherry_agent.contracts import contract_of
from wherry_agent.disk import Disk, device_error, disk_of
from wherry_agent.downloads import Downloads
from wherry_agent.envelopes import Envelopes
from wherry_agent.handle_server import HandleCrash, HandleServer, HandleVerdict, group_id
from wherry_agent.identity import Identity
from wherry_agent.journal import Journal
from wherry_agent.link import Callbacks, Link
from wherry_agent.log_ring import LogRing
from wherry_agent.marks import Marks
from wherry_agent.notify import Notifier
from wherry_agent.outbox import Outbox
from wherry_agent.platform_key import seal_of
from wherry_agent.processes import Short, WorkerProcess, canary, courier
from wherry_agent.renewal import Around, Renewal
from wherry_agent.settings import MIB, Settings
from wherry_agent.sharing import Sharing
from wherry_agent.socket_name import SocketName
from wherry_agent.space import Space
from wherry_agent.telemetry import HANDLES, Buffer, Context, Windows, crash_window
from wherry_agent.turn import flags_of
from wherry_shared import dsse, reasons, topics, wire
from wherry_shared.bundle import Contract
from wherry_shared.clock import MICROSECONDS, Now
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError, WherryError
from wherry_shared.facts import DeviceFacts
from wherry_shared.limits import STREAM_IN_FLIGHT_MAX

log = logging.getLogger(__name__)

TURN_SECONDS_MAX = 60.0
"""The loop wakes at least this often."""
TICK_MIN_S = 0.05
JITTER = 0.1
JITTER_MAX_S = 60.0
"""Waits of the machine are stretched by up to a tenth, so that a fleet does not come back in step."""
HANDLES_EVERY_S = 1.0
HANDLES_SECONDS_MAX = 10.0
"""How long a swap waits for handles that do not say what they did; well below the machine's own deadlines."""
ENROL_WAIT_MAX_S = 60.0
JOURNAL_AGAIN_S = 5.0
SCRUB_FIRST_S = 900.0
"""After a start: what serves was just read by the worker."""
SCRUB_AGAIN_S = 900.0
"""After a version could not be brought again."""
MEND_WAIT_S = 30.0
MENDS = "!mend"
"""Names the courier that brings a version again; like those that bring a new one it holds tidying off."""
EVENTS_KEPT_MAX = 1000
HEARTBEAT_S = 300.0
"""Telemetry without windows is sent this often: memory, disk and temperature."""
BALLAST_BYTES = 512 * 1024
"""A file that gives way when the disk is full, so that the journal can still be written."""
ENGINES_EVERY_S = 3600.0
"""How often it is looked whether an engine was replaced on disk; SIGHUP does it at once."""
HELLO_SOON_S = 1.0
HELLO_EVERY_S = 600.0
"""A hello that nobody heard (the server was away, the broker was not) is made good by the next."""
BACKLOG = 128
READY_S = 60.0
"""An agent whose worker does not come up says after this long that it is there: it still reports."""
_OF_DISK = (reasons.DISK_FULL, reasons.READ_ONLY, reasons.DISK)
_TRIED = (s.Swapping, s.OnTrial, s.Proving, s.Compared, s.Returning)
"""Phases in which counts of a candidate may still come in, for the rollout that brought it."""


class Daemon:
    """One agent on one home folder."""

    def __init__(self, settings: Settings, *, disk: Disk | None = None) -> None:
        self._settings = settings
        self._home = Path(settings.home)
        self._disk = disk or disk_of("supervisor", seal_of(settings.at_rest_key, settings.at_rest))
        self._queue: queue.SimpleQueue[s.Event | Callable[[], None]] = queue.SimpleQueue()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._jitter = random.random() * JITTER  # noqa: S311 - spreads a fleet, guards nothing
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._stopping = False
        self._started_s = time.monotonic()
        self._marks = Marks(self._home, self._disk)
        self._journal = Journal(self._disk, self._home / "journal.json", self._marks)
        self._kept: deque[s.Event] = deque(maxlen=EVENTS_KEPT_MAX)
        self._stuck = ""
        """Why the journal cannot be written; empty if it can."""
        self._unverified = ""
        """What of the disk keeps the courier from verifying trust or an offer; empty if nothing does."""
        self._unresumed: s.State | None = None
        """What the journal holds, if its continuation could not be written at start."""
        self._withheld = False
        """Candidates do not serve, since nothing can be remembered of their trials."""
        self._shorts: dict[str, Short] = {}
        self._trusting: deque[tuple[str, Callable[[], None]]] = deque()
        self._trust_busy = ""
        self._collect = False
        self._envelopes = Envelopes()
        self._facts: DeviceFacts | None = None
        self._groups: Path | None = None
        self._engines_seen = ""
        """What was installed when the engines were probed last."""
        self._served: set[str] = set()
        self._unsettled: dict[str, s.Served] = {}
        self._grpc_doing = self._grpc_socket_doing = "not served yet"
        """What the worker serves and some application's handle does not yet."""
        self._etag = ""
        self._courier_until_us = 0
        self._logs_sent = 0
        self._space = Space(
            self._home,
            self._disk,
            reserve_bytes=settings.disk_reserve_mb * MIB,
            budget_bytes=settings.disk_budget_mb * MIB,
        )
        self._report_box = Outbox()
        self._telemetry_box = Outbox()
        self._windows = Windows()
        self._spoke_s = 0.0
        """By the monotonic clock: when the last telemetry message was made."""
        self._ring = LogRing()
        self._lock_file: int | None = None
        self._downloads = Downloads(
            settings.conditions,
            one_at_a_time=settings.download_bytes_per_s_max > 0,
            start=self._start_download,
            stop=self._stop_download,
            refuse=self._refuse_download,
            clock_set=self._clock_is_set,
            windows=self._hours_of,
        )

    # --- start and end ---

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code.

        Raises:
            DeviceError: `already_running`, `port_busy`, `socket_path` and other trouble of this machine.
            RefusedError: `not_enrolled`, `enrol_refused`, `identity_invalid`.
        """
        readings.use_one_arena()
        self._notifier = Notifier.from_environment()
        self._groups = cgroups.delegated()
        logging.getLogger().addHandler(self._ring)
        os.umask(0o077)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._queue.put(self._stop))
        signal.signal(signal.SIGHUP, lambda *_: self._queue.put(self._look_again))
        signal.signal(signal.SIGUSR1, lambda *_: self._queue.put(s.HandOverAsked("the operator asked for it")))
        effects = self._take_up()
        try:
            self._begin(effects)
        except Exception:
            self._turn(s.Stopping())  # what keeps the agent from starting is not what it tries
            raise
        log.info("agent %s of device %s serves on port %d", __version__, self._identity.device, self.http_port)
        try:
            self._loop()
        finally:
            self._end()
        return 0

    def _begin(self, effects: tuple[s.Effect, ...]) -> None:
        """Start everything that the loop watches."""
        self._buffer = Buffer(
            self._home / "telemetry.db",
            self._settings.telemetry_mb * MIB,
            lambda model: model in self._sampled(),
            seal=self._disk.seal,
            marks=self._marks if self._disk.seal is not None else None,
        )
        self._listen()
        self._handles.publish_flags(dict(flags_of(self._state)))
        self._link = Link(
            self._home,
            self._identity,
            self._server,
            self._callbacks(),
            password=identity.password(self._disk.seal),
        )
        self._renewal = Renewal(
            Around(
                wall_s=time.time,
                later=lambda seconds, what: self._later("renew", seconds, what),
                courier=self._renew,
            ),
            self._identity.not_before,
            self._identity.not_after,
        )
        self._worker.start()
        for effect in effects:
            self._run(effect)
        self._look_again()
        self._status = status.Server(
            self._run_folder / status.SOCKET,
            {"status": lambda: self._ask(self.snapshot), "modules": lambda: {"modules": readings.modules()}},
        )
        self._link.start()
        self._bring_in_line()
        self._declare_settings()
        self._later("scrub", min(SCRUB_FIRST_S, self._settings.scrub_every_s), self._scrub)
        self._later("window", self._settings.window_s, self._cut_windows)
        if self._downloads.conditional:
            self._later("conditions", self._settings.conditions.check_s, self._watch_conditions)
        if self._notifier.watched:
            self._beat()
        self._later("ready", READY_S, self._notifier.ready)

    def _take_up(self) -> tuple[s.Effect, ...]:
        """Take the home, find out who this device is and where it was; return the effects to repeat."""
        self._run_folder = self._find_run_folder()
        self._lock()
        try:
            self._disk.sweep(self._home)
        except DeviceError as error:
            log.warning("%s", error)
        self._add_ballast()
        self._identity = self._enrolled()
        self._server = (self._settings.server or self._identity.server).rstrip("/")
        known = self._read_journal()
        self._set_clock(known)
        return self._resume(known)

    def _find_run_folder(self) -> Path:
        """Return where sockets may be made: `run` in the home, elsewhere if that disk takes no writes."""
        folder = self._home / "run"
        try:
            self._disk.mkdir(folder)
        except DeviceError as error:
            if error.code != reasons.READ_ONLY:
                raise
        if os.access(folder, os.W_OK):
            return folder
        elsewhere = shelter.make(self._home)
        log.error("%s takes no writes: the agent's sockets are in %s", folder, elsewhere)
        return elsewhere

    def _resume(self, known: s.State) -> tuple[s.Effect, ...]:
        """Go on where the journal stands; if that cannot be written, serve what is trusted and begin nothing."""
        self._state = known
        state, effects = machine.resume(known, self._now())
        try:
            self._commit(state, always=True)
        except DeviceError as error:
            self._cannot_write(error)
            self._unresumed = known
            self._state = machine.sheltered(known)
            return ()
        self._unresumed = None
        return effects

    def _loop(self) -> None:
        while not self._stopping:
            try:
                item = self._queue.get(timeout=self._wait_s())
            except queue.Empty:
                self._run_timers()
                if self._tick_in_s() <= 0 and not self._stuck:
                    self._turn(s.Tick())
                continue
            if callable(item):
                item()
            else:
                self._turn(item)
            self._run_timers()

    def _stop(self) -> None:
        self._turn(s.Stopping())
        self._stopping = True

    def _beat(self) -> None:
        """Tell systemd that the loop turns; called by it alone."""
        self._later("watchdog", self._notifier.beat_s, self._beat)
        doing = ", ".join(
            f"{name} {slot.incumbent.loadable.target.partition('/')[2] if slot.incumbent is not None else 'none'}"
            for name, slot in sorted(self._state.models.items())
        )
        self._notifier.alive(f"serves {doing or 'nothing yet'}; server by {self._link.way}")

    def _end(self) -> None:
        log.info("agent stops")
        self._notifier.stopping()
        for short in self._shorts.values():
            short.cancel()
        self._cut_windows()
        self._link.stop()
        self._worker.stop(children.Stop())
        self._handles.close()
        self._status.close()
        for listener in self._listeners:
            listener.close()
        self._buffer.close()
        logging.getLogger().removeHandler(self._ring)

    def _lock(self) -> None:
        path = self._home / "run" / "lock"
        try:
            self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise device_error(error, str(path)) from error
            self._lock_file = os.open(path if path.exists() else self._home, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DeviceError(
                "already_running",
                f"another agent runs on {self._home}",
                consequence="this one does not start",
                next_step="stop it, or choose another --home",
            ) from error

    def _enrolled(self) -> Identity:
        """Return the identity, enrolling first if there is none yet; an unreachable server is asked again."""
        wait_s = 1.0
        while True:
            known = identity.load(self._home, self._disk.seal)
            if known is not None:
                return known
            settings = self._settings
            if not settings.token or not settings.server:
                raise RefusedError(
                    "not_enrolled",
                    f"{self._home} holds no identity",
                    consequence="the agent does not know its server",
                    next_step="run with --server URL --token TOKEN once",
                )
            self._check_sockets()
            task = children.Enrol(
                home=settings.home,
                server=settings.server,
                token=settings.token,
                name=settings.name or socket.gethostname(),
                labels=settings.labels,
                ca=settings.ca,
            )
            box: queue.SimpleQueue[children.CourierAnswer] = queue.SimpleQueue()
            courier(task, box.put, seal=self._disk.seal)
            answer = box.get()
            if isinstance(answer, children.Enrolled):
                log.info("enrolled as %s in project %s", answer.device, answer.project)
                continue
            detail = answer.detail if isinstance(answer, children.Failed) else "an answer to another question"
            if isinstance(answer, children.Failed) and answer.retry_after_s is None:
                raise RefusedError(
                    "enrol_refused",
                    f"the server did not take this device: {detail}",
                    consequence="it gets no models",
                    next_step="do as the server says, or make a new token with wherry token create",
                )
            log.warning("enrolment: %s; trying again in %.0f s", detail, wait_s)
            self._notifier.ready()  # as far as it gets without a server
            self._notifier.alive(f"not enrolled yet: {detail}")
            if self._signalled(wait_s):
                raise RefusedError("not_enrolled", "stopped before the device was enrolled")
            wait_s = min(wait_s * 2, ENROL_WAIT_MAX_S)

    def _signalled(self, seconds: float) -> bool:
        """Wait until time is over or a signal comes; tell whether it was one to stop."""
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            return False
        if item == self._stop:
            self._stopping = True  # no model is there yet that would have to be told
        return self._stopping

    def _read_journal(self) -> s.State:
        state, problems = self._journal.read(lambda: secrets.token_urlsafe(12))
        for problem in problems:
            log.error("%s", problem.diagnostics())
        device, project = self._identity.device, self._identity.project
        if state is not None and (state.device, state.project) == (device, project):
            return state
        if state is not None:
            log.error("the journal is of device %s, this is %s: begun anew", state.device, device)
        return machine.initial(device=device, project=project, stream=secrets.token_urlsafe(12))

    def _set_clock(self, state: s.State) -> None:
        """A clock before a time that was verified is wrong: set it forward, where that is allowed."""
        floor_us = state.trust.time_floor_us if state.trust is not None else 0
        if not self._settings.set_clock or time.time() * MICROSECONDS >= floor_us:
            return
        try:
            time.clock_settime(time.CLOCK_REALTIME, floor_us / MICROSECONDS)
            log.warning("the clock was behind a verified time and is set forward to it")
        except OSError as error:
            log.warning("the clock is behind a verified time and cannot be set: %s", error)

    def _bound_tcp(self) -> socket.socket:
        """Take the port; it is looked for before a token is used up, too.

        Raises:
            DeviceError: `port_busy`.
        """
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tcp.bind(("127.0.0.1", self._settings.http_port))
        except OSError as error:
            tcp.close()
            raise DeviceError(
                "port_busy",
                f"port {self._settings.http_port} of 127.0.0.1 cannot be used: {error.strerror}",
                consequence="applications could not reach their models",
                next_step="choose another with --http-port",
            ) from error
        return tcp

    def _check_sockets(self) -> None:
        """Find out whether this agent could serve, before it asks the server for anything.

        Raises:
            DeviceError: `port_busy` or `socket_path`.
        """
        self._bound_tcp().close()
        path = self._run_folder / "worker.sock"
        local = _bound_local(path)
        local.close()
        path.unlink(missing_ok=True)

    def _listen(self) -> None:
        """Open the sockets on which models are served; the supervisor owns them, so a dead worker refuses nobody."""
        tcp = self._bound_tcp()
        self.http_port: int = tcp.getsockname()[1]
        sharing = Sharing(self._home, group_id(self._settings.handle_group), self._disk)
        sharing.open_folders(self._run_folder)
        path = self._run_folder / "worker.sock"
        local = _bound_local(path)
        sharing.open_socket(path)
        self._sharing = sharing
        self._grpc_name = self._name_grpc_socket()
        self._listeners = [tcp, local]
        for listener in self._listeners:
            listener.listen(BACKLOG)
        self._worker = WorkerProcess(
            self._listeners,
            on_event=lambda event, pid: self._queue.put(lambda: self._worker_event(event, pid)),
            on_death=lambda detail, ordered, ran: self._queue.put(
                lambda: self._worker_died(detail, ordered=ordered, ran=ran)
            ),
            on_gone=lambda pid: self._queue.put(lambda: self._worker_gone(pid)),
            memory_reserve_bytes=self._settings.memory_reserve_mb * MIB,
            grpc_port=self._settings.grpc_port,
            grpc_socket=self._grpc_name,
            warm_start=self._settings.warm_start,
        )
        self._handles = HandleServer(
            self._run_folder / "handle.sock",
            self._settings.handle_group,
            worker_socket=str(path),
            on_crash=self._handle_crashed,
            on_verdict=self._handle_judged,
            on_settled=lambda name: self._queue.put(lambda: self._handles_settled(name)),
            on_contract=lambda model, contract: self._queue.put(s.Declares(model, contract, "application")),
        )

    def _name_grpc_socket(self) -> SocketName | None:
        """Take the name of gRPC's unix socket over, if gRPC is on."""
        if not self._settings.grpc_port:
            return None
        path = self._run_folder / "grpc.sock"
        try:
            return SocketName(path, self._sharing.open_socket)
        except OSError as error:
            log.error("gRPC has no unix socket: %s: %s", path, error.strerror)
            return None

    def _declare_settings(self) -> None:
        """Let the machine know what the settings say that applications rely on, or say no more."""
        gone = {name for name, said in self._state.contracts.items() if said.by == "settings"}
        for name in sorted(gone | set(self._settings.contracts)):
            self._queue.put(s.Declares(name, self._settings.contracts.get(name), "settings"))

    def _look_at_device(self) -> None:
        """Find out the facts in a thread: engines take seconds to probe, and what is installed serves meanwhile."""
        try:
            self._engines_seen = readings.ask_installed_engines()
            found = readings.ask_facts(self._home, self._settings.engines, self._settings.labels)
        except DeviceError as error:
            log.error("%s", error.diagnostics())
            self._queue.put(lambda: self._later("facts", ENROL_WAIT_MAX_S, self._look_again))
            return
        self._queue.put(lambda: self._know(found))

    def _look_again(self) -> None:
        self._in_thread("facts", self._look_at_device, lambda: self._later("facts", ENROL_WAIT_MAX_S, self._look_again))

    def _in_thread(self, name: str, what: Callable[[], None], otherwise: Callable[[], None] = lambda: None) -> None:
        """Do something beside the loop; `otherwise`: what is done where no thread can be had in this moment."""
        try:
            threading.Thread(target=what, name=name, daemon=True).start()
        except RuntimeError as error:
            log.error("%s: %s", name, error)
            otherwise()

    def _look_at_engines(self) -> None:
        """Probe the engines again if what is installed is not what it was at the last probe."""
        self._later("engines", ENGINES_EVERY_S * (1 + self._jitter), self._look_at_engines)

        def ask() -> None:
            installed = readings.ask_installed_engines()
            if installed != self._engines_seen:
                self._look_at_device()

        self._in_thread("facts", ask)

    def _know(self, found: DeviceFacts) -> None:
        if self._facts is not None and self._facts.engines != found.engines:
            self._worker.renew_spare()
        self._facts = found
        readings.give_back_memory()
        log.info("engines: %s", ", ".join(f"{e.name} {e.version}" for e in found.engines) or "none")
        self._later("engines", ENGINES_EVERY_S * (1 + self._jitter), self._look_at_engines)
        self._turn(s.EnginesProbed({engine.name: engine.version for engine in found.engines}))
        self._say_hello()
        self._next_trusting()

    # --- turns ---

    def _now(self) -> Now:
        return Now(self._boot, int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000), time.time())

    def _turn(self, event: s.Event) -> None:
        before = self._state
        state, effects = machine.step(before, event, self._now())
        if self._unresumed is not None and not machine.may_wait(before, state):
            self._keep(event)  # the journal's own continuation comes first
            return
        try:
            self._commit(state)
        except DeviceError as error:
            # nothing was done: the old state stands, and the event is taken again when there is room
            self._cannot_write(error)
            self._keep(event)
            self._withhold()
            return
        _tell_story(before, state)
        if state.contracts is not before.contracts:
            self._later("hello", HELLO_SOON_S, self._say_hello)  # contracts are facts
        elif state.offer is not before.offer and (flags_of(before) or flags_of(state)):
            self._later("hello", HELLO_SOON_S, self._say_hello)  # no report tells that an offer's flags are here
        for effect in effects:
            self._run(self._serving() if self._withheld and isinstance(effect, s.Serve) else effect)

    def _commit(self, state: s.State, *, always: bool = False) -> None:
        """Make a state durable and current; what a restart would not miss may wait, unless `always`.

        Raises:
            DeviceError: `disk_full`, `read_only` or `disk`.
        """
        if not always and state is not self._state and machine.may_wait(self._state, state):
            self._state = state
            return
        try:
            self._journal.write(state)
        except DeviceError as error:
            ballast = self._home / "ballast"
            if error.code != reasons.DISK_FULL or not ballast.exists():
                raise
            self._disk.unlink(ballast)
            self._later("ballast", 600.0, self._add_ballast)
            self._journal.write(state)
        self._state = state
        if self._stuck:
            log.info("the journal can be written again")
            self._stuck = ""
            self._later("hello", 0.0, self._say_hello)

    def _cannot_write(self, error: DeviceError) -> None:
        """Note that nothing can be remembered, say so once, and try again later."""
        if error.code != self._stuck:
            log.error("%s", error.diagnostics())
            self._stuck = error.code
            self._later("hello", 0.0, self._say_hello)
        self._later("journal", JOURNAL_AGAIN_S, self._write_again)

    def _keep(self, event: s.Event) -> None:
        """Keep an event until it can be remembered; what comes again by itself is not kept.

        Neither is a worker's death outside trials: deaths of a day would come as one loop of crashes.
        """
        on_trial = self._is_on_trial() and not self._withheld
        if not isinstance(event, s.Tick | s.Measured) and (on_trial or not isinstance(event, s.WorkerDied)):
            self._kept.append(event)

    def _is_on_trial(self) -> bool:
        return any(isinstance(slot.phase, s.Swapping | s.OnTrial | s.Proving) for slot in self._state.models.values())

    def _withhold(self) -> None:
        """Let candidates serve nobody: what may have condemned one cannot be acted on while nothing is remembered."""
        if not self._withheld and self._is_on_trial():
            log.warning("what is on trial does not serve until the journal can be written again")
            self._withheld = True
            self._run(self._serving())

    def _serving(self) -> s.Serve:
        """Return what the worker is to serve now: what is trusted alone, while candidates are withheld."""
        state = machine.sheltered(self._state) if self._withheld else self._state
        return s.Serve(self._state.revision, machine.serving(state), flags_of(self._state))

    def _go_on_with_trials(self) -> None:
        """Serve candidates again, which begin as after the end of a worker that was ordered: nothing is held against them."""
        self._withheld = False
        if self._is_on_trial():
            self._turn(s.WorkerDied("the journal could not be written for a while", ordered=True))
        self._run(self._serving())

    def _write_again(self) -> None:
        """Take what was kept, if it can be remembered by now."""
        if self._unresumed is not None:
            effects = self._resume(self._unresumed)
            if self._unresumed is not None:
                return
            self._turn(s.WorkerReady())  # it was told less than the journal says
            for effect in effects:
                self._run(effect)
        else:
            try:
                self._commit(self._state, always=True)
            except DeviceError as error:
                self._cannot_write(error)
                return
        events = list(self._kept)
        self._kept.clear()
        for event in events:
            self._turn(event)
        if self._withheld and not self._stuck:
            self._go_on_with_trials()
        elif not events:
            self._turn(s.Tick())

    def _add_ballast(self) -> None:
        ballast = self._home / "ballast"
        try:
            if not ballast.exists() and self._disk.free_bytes(self._home) > 8 * BALLAST_BYTES:
                self._disk.write_atomic(ballast, bytes(BALLAST_BYTES))
        except DeviceError as error:
            log.warning("no ballast: %s", error)
        if not ballast.exists():
            self._later("ballast", 600.0, self._add_ballast)

    def _run(self, effect: s.Effect) -> None:
        """Do what an effect says; every one may be repeated."""
        match effect:
            case s.Resolve():
                self._trust_task(effect.model, lambda: self._resolve(effect))
            case s.Fetch():
                self._fetch(effect)
            case s.Judge():
                self._judge(effect)
            case s.Cancel():
                self._cancel(effect.model)
            case s.Serve():
                self._serve(effect)
            case s.RunGolden():
                self._worker.send(children.RunGolden(model=effect.model, digest=effect.digest, trial=effect.trial))
            case s.RestartWorker():
                log.warning("worker is restarted: %s", effect.why)
                self._worker.restart()
            case s.Rejudge():
                self._rejudge(effect)
            case s.HandOver():
                log.info("another worker is to take over: %s", effect.why)
                self._worker.hand_over(lambda trouble: self._queue.put(s.HandedOver(trouble)))
            case s.Refresh():
                self._refresh()
            case s.SendReports():
                self._send_reports()
            case s.Collect():
                self._collect = True
                self._collect_now()
            case s.Mend():
                self._mend(effect)
            case _:
                assert_never(effect)

    # --- timers ---

    def _later(self, name: str, seconds: float, what: Callable[[], None]) -> None:
        self._timers[name] = (time.monotonic() + seconds, what)

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        for name in [name for name, (due_s, _) in self._timers.items() if due_s <= now_s]:
            _, what = self._timers.pop(name)
            what()

    def _tick_in_s(self) -> float:
        return machine.next_deadline_ms(self._state, self._now()) / 1000

    def _wait_s(self) -> float:
        tick_s = JOURNAL_AGAIN_S if self._stuck else self._tick_in_s()  # then `_write_again` is what comes next
        tick_s += min(tick_s * self._jitter, JITTER_MAX_S)
        now_s = time.monotonic()
        timers_s = min((due_s - now_s for due_s, _ in self._timers.values()), default=TURN_SECONDS_MAX)
        return min(TURN_SECONDS_MAX, max(TICK_MIN_S, min(tick_s, timers_s)))

    def _ask(self, question: Callable[[], object]) -> object:
        """Answer a question of another thread in a turn of its own.

        Raises:
            UnreachableError: `busy`, the loop did not get to it.
        """
        box: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._queue.put(lambda: box.put(question()))
        try:
            return box.get(timeout=10.0)
        except queue.Empty as error:
            raise UnreachableError("busy", "the agent is busy", next_step="try again") from error

    # --- courier and canary ---

    def _trust_task(self, key: str, start: Callable[[], None]) -> None:
        """Queue a courier that reads and may replace the trusted set: one at a time, each from what the last found."""
        self._trusting = deque((name, run) for name, run in self._trusting if name != key)
        self._trusting.append((key, start))
        self._next_trusting()

    def _next_trusting(self) -> None:
        if self._trust_busy:
            return
        for index, (key, start) in enumerate(self._trusting):
            if key in ("!verify", "!refresh") or self._facts is not None:
                del self._trusting[index]
                self._trust_busy = key
                start()
                return

    def _trust_done(self, key: str) -> None:
        self._shorts.pop(key, None)
        self._trust_busy = ""
        self._next_trusting()
        self._collect_now()

    def _known(self) -> tuple[int, dict[str, int], int]:
        trust = self._state.trust
        return (trust.current, trust.floors, trust.time_floor_us) if trust is not None else (0, {}, 0)

    def _courier(
        self,
        key: str,
        task: children.CourierTask,
        done: Callable[[children.CourierAnswer], None],
        on_progress: Callable[[children.Progress], None] = lambda _: None,
    ) -> None:
        self._shorts[key] = courier(
            task,
            lambda answer: self._queue.put(lambda: done(answer)),
            lambda progress: self._queue.put(lambda: on_progress(progress)),
            seal=self._disk.seal,
        )

    def _resolve(self, effect: s.Resolve) -> None:
        current, floors, time_floor_us = self._known()
        offered = effect.offered
        assert self._facts is not None
        task = children.Resolve(
            home=self._settings.home,
            server=self._server,
            mirrors=self._settings.mirrors,
            model=effect.model,
            offered=offered,
            time_floor_us=time_floor_us,
            floors=floors,
            current=current,
            contract=effect.contract,
            contract_preprocess=effect.contract_preprocess,
            contract_declared=isinstance(effect.contract, Contract),
            facts=msgspec.to_builtins(self._facts),
        )

        def done(answer: children.CourierAnswer) -> None:
            if isinstance(answer, children.Resolved):
                self._turn(
                    s.Resolved(
                        effect.model,
                        answer.manifest,
                        offered.attempt,
                        tuple(answer.candidates),
                        tuple(answer.passed_over),
                        answer.preprocess_id,
                        answer.trust,
                    )
                )
            else:
                self._turn(_failed(effect.model, offered.manifest, offered.attempt, "resolve", answer))
            self._trust_done(effect.model)

        self._courier(effect.model, task, done)

    def _fetch(self, effect: s.Fetch) -> None:
        idle = not self._shorts and not self._trust_busy  # else a courier brings in what no state names yet
        trouble = self._space.trouble(self._bytes_to_fetch(effect), self._needed if idle else None)
        if trouble is not None:
            self._refuse_download(effect, trouble)
        else:
            self._downloads.wanted(effect)
            if self._hours_of(effect.model) and "conditions" not in self._timers:
                self._later("conditions", self._settings.conditions.check_s, self._watch_conditions)

    def _hours_of(self, model: str) -> Sequence[str]:
        """Return the hours in which the rollout that is under way for a model may bring it."""
        slot = self._state.models.get(model)
        phase = slot.phase if slot is not None else None
        return phase.job.offered.windows if isinstance(phase, s.Fetching | s.Waiting) else ()

    def _refuse_download(self, effect: s.Fetch, why: children.Failed) -> None:
        # through the queue: an effect that fails must not begin a turn inside the one that it belongs to
        failed = _failed(effect.model, effect.manifest, effect.attempt, "fetch", why)
        self._queue.put(lambda: self._turn(failed))

    def _fetch_task(self, manifest: str, variant: str) -> children.Fetch:
        return children.Fetch(
            home=self._settings.home,
            server=self._server,
            mirrors=self._settings.mirrors,
            manifest=manifest,
            variant=variant,
            bytes_per_s_max=self._settings.download_bytes_per_s_max,
            reserve_bytes=self._settings.disk_reserve_mb * MIB,
        )

    def _start_download(self, effect: s.Fetch) -> None:
        task = self._fetch_task(effect.manifest, effect.variant)

        def done(answer: children.CourierAnswer) -> None:
            self._shorts.pop(effect.model, None)
            self._downloads.ended(effect.model)
            if isinstance(answer, children.Fetched):
                self._turn(s.Fetched(effect.model, answer.manifest, effect.attempt, answer.variant))
            else:
                self._turn(_failed(effect.model, effect.manifest, effect.attempt, "fetch", answer))

        self._courier(effect.model, task, done, lambda progress: self._downloads.progressed(effect.model, progress))

    def _stop_download(self, model: str) -> None:
        short = self._shorts.pop(model, None)
        if short is not None:
            short.cancel()

    def _watch_conditions(self) -> None:
        """Interrupt downloads that may not go on, and wake those that waited for the conditions."""
        wait = self._downloads.check()
        phases = {name: slot.phase for name, slot in self._state.models.items()}
        waiting = [name for name, p in phases.items() if isinstance(p, s.Waiting) and p.reason == reasons.CONDITIONS]
        if any(self._downloads.wait(name) is None for name in waiting):
            self._turn(s.Connected())
        check_s = self._settings.conditions.check_s
        if self._downloads.conditional or any(self._hours_of(name) for name in phases):
            again_s = check_s if wait is None else min(check_s, wait.retry_after_s)
            self._later("conditions", again_s, self._watch_conditions)

    def _clock_is_set(self) -> bool:
        trust = self._state.trust
        return trust is None or self._now().wall_us >= trust.time_floor_us

    def _bytes_to_fetch(self, effect: s.Fetch) -> int:
        phase = self._state.models[effect.model].phase
        if not isinstance(phase, s.Fetching):
            return 0
        return next((c.bytes for c in phase.job.candidates if c.loadable.variant == effect.variant), 0)

    def _judge(self, effect: s.Judge) -> None:
        budget = (
            effect.memory_bytes_max
            or self._settings.canary_memory_mb * MIB
            or readings.memory_bytes("MemAvailable") // 2
        )
        task = children.Judge(
            unlock=identity.content_password(self._disk.seal),
            candidate=effect.candidate,
            incumbent=effect.incumbent,
            memory_bytes_max=budget,
            seconds_max=effect.seconds_max,
            latency_ratio_max=effect.latency_ratio_max,
        )
        loadable = effect.candidate

        def done(result: children.Judged) -> None:
            self._shorts.pop(effect.model, None)
            self._turn(s.CanaryDone(effect.model, loadable.manifest, effect.attempt, loadable.digest, result))

        self._shorts[effect.model] = canary(task, lambda result: self._queue.put(lambda: done(result)), self._groups)

    def _rejudge(self, effect: s.Rejudge) -> None:
        """Let the canary run what serves, with the engine that is on disk now."""
        task = children.Judge(
            unlock=identity.content_password(self._disk.seal),
            candidate=effect.candidate,
            memory_bytes_max=self._settings.canary_memory_mb * MIB or readings.memory_bytes("MemAvailable") // 2,
            seconds_max=effect.seconds_max,
            latency_ratio_max=0,
        )
        loadable = effect.candidate
        key = f"!rejudge {effect.model}"

        def done(result: children.Judged) -> None:
            self._shorts.pop(key, None)
            log.info(
                "%s with %s %s: %s", effect.model, loadable.engine, loadable.engine_version, result.reason or "good"
            )
            self._turn(s.Rejudged(effect.model, loadable.digest, loadable.engine_version, result))

        self._shorts[key] = canary(task, lambda result: self._queue.put(lambda: done(result)), self._groups)

    def _cancel(self, key: str) -> None:
        self._trusting = deque((name, run) for name, run in self._trusting if name != key)
        self._stop_download(key)
        self._downloads.ended(key)
        if self._trust_busy == key:
            self._trust_done(key)

    def _collect_now(self) -> None:
        """Delete blobs that nothing needs; not while a courier brings some in: no state may name them yet."""
        brings = any(key == MENDS or not key.startswith("!") for key in self._shorts)
        if not self._collect or brings or self._trust_busy:
            return
        self._collect = False
        try:
            freed = self._space.tidy(self._needed())
        except DeviceError as error:
            log.warning("the store could not be tidied: %s", error)
            return
        readings.give_back_memory()  # a version has come or gone, and what that took with it
        if freed:
            log.info("%d bytes of blobs that nothing needs are gone", freed)

    def _needed(self) -> set[str]:
        """Return the digests that something needs now: more may be than when tidying was asked for."""
        keep = {digest for loadable in machine.kept(self._state) for digest in loadable.digests}
        return keep | self._handles.leases()

    # --- scrub ---

    def _scrub(self) -> None:
        """Let a courier read again what is trusted; one that waits for others comes later."""
        self._later("scrub", self._settings.scrub_every_s * (1 + self._jitter), self._scrub)
        slots = self._state.models.values()
        trusted = [one.loadable for slot in slots for one in (slot.incumbent, slot.last_good) if one is not None]
        if not trusted or "!scrub" in self._shorts:
            return

        def done(answer: children.CourierAnswer) -> None:
            self._shorts.pop("!scrub", None)
            if not isinstance(answer, children.Scrubbed):
                log.warning("scrub: %s", _failure(answer).detail)
                return
            log.info("scrub: %d bytes read, %d versions altered", answer.bytes, len(answer.altered))
            for one in answer.altered:
                log.error("%s %s is not what was verified: %s", one.model, one.variant, one.detail)
                self._turn(s.Altered(one.model, one.manifest, one.variant, one.detail))

        self._courier("!scrub", children.Scrub(home=self._settings.home, versions=trusted), done)

    def _mend(self, effect: s.Mend) -> None:
        """Bring a version again, when nothing else is being brought and the conditions allow."""
        name = f"mend {effect.manifest}"
        if self._shorts or self._trust_busy or self._downloads.wait() is not None:
            self._later(name, MEND_WAIT_S, lambda: self._mend(effect))
            return
        task = self._fetch_task(effect.manifest, effect.variant)

        def done(answer: children.CourierAnswer) -> None:
            self._shorts.pop(MENDS, None)
            failed = None if isinstance(answer, children.Fetched) else _failure(answer)
            reason, detail = (failed.reason, failed.detail) if failed is not None else ("", "")
            self._turn(s.Mended(effect.model, effect.manifest, effect.variant, reason, detail))
            if failed is not None:
                self._later("scrub", min(SCRUB_AGAIN_S, self._settings.scrub_every_s), self._scrub)
            self._collect = True
            self._collect_now()

        self._courier(MENDS, task, done)

    # --- certificate ---

    def _bring_in_line(self) -> None:
        """Have identity and private key lie on the disk as the settings wish; only then are they renewed."""
        if identity.is_in_line(self._home, self._identity, self._disk.seal):
            self._renewal.start()
            return

        def done(answer: children.CourierAnswer) -> None:
            self._shorts.pop("!reseal", None)
            if isinstance(answer, children.Failed):
                log.error("the identity could not be written again, sealed or not: %s", answer.detail)
            self._renewal.start()

        self._courier("!reseal", children.Reseal(home=self._settings.home), done)

    def _renew(self, only_look: bool, answered: Callable[[children.CourierAnswer], None]) -> None:
        def done(answer: children.CourierAnswer) -> None:
            self._shorts.pop("!renew", None)
            self._use_newest_pair()
            answered(answer)

        task = children.Renew(home=self._settings.home, server=self._server, only_look=only_look)
        self._courier("!renew", task, done)

    def _use_newest_pair(self) -> None:
        """Take the pair that `device.json` names, also if the courier died before it could tell of it."""
        try:
            newest = identity.load(self._home, self._disk.seal)
        except (OSError, RefusedError, DeviceError) as error:
            log.error("the newest certificate is not used before the next start: %s", error)
            return
        if newest is not None and newest.pair != self._identity.pair:
            self._identity = newest
            self._link.renew(newest)

    # --- trust and offers ---

    def _refresh(self) -> None:
        """Bring trust up to date: ask for timestamp.json, start the courier only on change or at half of its life."""
        trust, until_us, etag = self._state.trust, self._courier_until_us, self._etag

        def ask() -> None:
            password = identity.password(self._disk.seal)
            said = timestamp.ask_by_child(timestamp.question(self._home, self._identity, self._server, etag, password))
            if said.trouble:
                self._queue.put(s.RefreshFailed(reasons.NETWORK, said.trouble))
                return
            unchanged, new = said.unchanged, said.etag
            if unchanged and trust is not None and time.time() * 1e6 < until_us:
                self._queue.put(s.Refreshed(trust))
                return
            self._queue.put(lambda: self._trust_task("!refresh", lambda: self._refresh_by_courier(new)))

        failed = s.RefreshFailed(reasons.CHILD_FAILED, "no thread can be had")
        self._in_thread("timestamp", ask, lambda: self._queue.put(failed))

    def _refresh_by_courier(self, etag: str) -> None:
        current, floors, time_floor_us = self._known()
        task = children.Refresh(
            home=self._settings.home,
            server=self._server,
            time_floor_us=time_floor_us,
            floors=floors,
            current=current,
            watched=revoking.watched(self._state),
        )

        def done(answer: children.CourierAnswer) -> None:
            self._tell_of_disk(answer)
            if isinstance(answer, children.Refreshed):
                revoked = tuple(s.Revocation(one.model, one.manifest, one.effect) for one in answer.revoked)
                now_us = self._now().wall_us
                self._etag = etag
                self._courier_until_us = now_us + (answer.trust.expires_at - now_us) // 2
                self._turn(s.Refreshed(answer.trust, revoked))
                if answer.trust.changed:
                    self._say_hello()  # an offer that could not be verified before comes again
            else:
                failed = _failure(answer)
                log.warning("trust: %s", failed.detail)
                self._turn(s.RefreshFailed(failed.reason, failed.detail))
            self._trust_done("!refresh")

        self._courier("!refresh", task, done)

    def _tell_of_disk(self, answer: children.CourierAnswer) -> None:
        """Say in a hello that the disk keeps the courier from verifying what came, or does so no more."""
        reason = answer.reason if isinstance(answer, children.Failed) and answer.reason in _OF_DISK else ""
        if reason != self._unverified:
            self._unverified = reason
            self._later("hello", HELLO_SOON_S, self._say_hello)

    def _offer(self, data: bytes, *, from_server: bool) -> None:
        """Bytes that claim to be an offer: let the courier verify them, unless they are the ones accepted already."""
        known = self._state.offer
        try:
            _, payload, _ = dsse.open_envelope(data)
            offer = wire.parse(wire.Offer, payload)
        except RefusedError as error:
            log.warning("an offer is ignored: %s", error)
            return
        if known is not None and (offer.epoch, offer.serial) <= (known.epoch, known.serial):
            # old or repeated; a forged number costs nothing, since a newer one is verified
            if (offer.epoch, offer.serial) < (known.epoch, known.serial):
                log.info("offer %d.%d is older than the one that stands: ignored", offer.epoch, offer.serial)
            return
        number = (offer.epoch, offer.serial)
        self._envelopes.add(data, number, random.random(), from_server=from_server)  # noqa: S311 - spreads what is lost
        self._verify_next()

    def _verify_next(self) -> None:
        """Queue the courier if an envelope is due; else come back when one is."""
        if self._envelopes.crowded():
            log.warning("more claims to be an offer than can be looked at: the server is asked for the real one")
            self._link.ask_offer()
        wait_s = self._envelopes.next_s(time.monotonic())
        if wait_s == 0.0:
            self._trust_task("!verify", self._verify)
        elif wait_s is not None:
            self._later("verify", wait_s * (1 + self._jitter), self._verify_next)

    def _verify(self) -> None:
        data = self._envelopes.take(time.monotonic())
        if data is None:
            self._trust_done("!verify")
            self._verify_next()
            return
        current, floors, time_floor_us = self._known()
        task = children.Verify(
            home=self._settings.home,
            server=self._server,
            device=self._identity.device,
            project=self._identity.project,
            envelope=base64.b64encode(data).decode(),
            time_floor_us=time_floor_us,
            floors=floors,
            current=current,
        )

        def done(answer: children.CourierAnswer) -> None:
            self._tell_of_disk(answer)
            if isinstance(answer, children.Verified):
                self._envelopes.settle(data)
                self._envelopes.accepted((answer.offer.epoch, answer.offer.serial))
                log.info("offer %d.%d is the director's", answer.offer.epoch, answer.offer.serial)
                self._turn(s.Offered(answer.offer, answer.digest, answer.trust))
            else:
                failed = _failure(answer)
                log.warning("an offer is not acted on: %s (%s)", failed.detail, failed.reason)
                if failed.retry_after_s is None:
                    self._envelopes.settle(data)
                else:
                    trouble = f"{failed.detail} ({failed.reason})"
                    self._envelopes.again(data, time.monotonic(), failed.retry_after_s, trouble)
            self._trust_done("!verify")
            self._verify_next()

        self._courier("!verify", task, done)

    # --- worker and handles ---

    def _serve(self, effect: s.Serve) -> None:
        self._look()
        self._cut_windows()
        flags = dict(effect.flags)
        self._worker.send(
            children.Serve(
                revision=effect.revision,
                models=list(effect.models),
                flags=flags,
                unlock=identity.content_password(self._disk.seal),
                samples=self._sampled(),
            )
        )
        self._handles.publish_flags(flags)
        wanted = {model.name: turn.for_handles(model) for model in effect.models}
        for model in effect.models:
            for loadable in (model.active, model.incumbent):
                self._share(loadable)
        for name in self._served | set(wanted):
            self._handles.publish(name, wanted.get(name))
        self._served = set(wanted)

    def _sampled(self) -> dict[str, float]:
        """Return of which models inputs may leave this device: the offer asks, and the settings consent."""
        return sampling.shares(flags_of(self._state), self._settings.samples_consent)

    def _share(self, loadable: children.Loadable | None) -> None:
        try:
            if loadable is not None:
                self._sharing.open_files(loadable)
        except DeviceError as error:  # the worker serves it all the same; a handle that cannot load it says so
            log.error("%s", error)

    def _worker_event(self, event: children.WorkerEvent, pid: int) -> None:
        match event:
            case children.Ready():
                log.info("worker %d is ready", event.pid)
                self._turn(s.WorkerReady())
                self._notifier.ready()
            case children.Serving():
                if event.ok and event.load_ms:
                    log.info("worker serves %s: %s, loaded in %.0f ms", event.model, event.digest, event.load_ms)
                if not event.ok:
                    log.warning("worker cannot serve %s: %s %s", event.model, event.reason, event.detail)
                served = s.Served(event.model, event.digest, event.revision, event.ok, event.reason, event.detail)
                self._worker_served(
                    replace(served, incumbent_loaded=event.incumbent_loaded, engine_version=event.engine_version)
                )
                self._compare_engine(event)
            case children.GoldenDone():
                self._turn(
                    s.GoldenChecked(event.model, event.digest, event.trial, event.passed, event.detail, event.reason)
                )
            case children.Stats():
                self._look(event.arms, pid)
            case children.Sampled():
                if event.model in self._sampled():
                    self._windows.sample(f"worker {pid}", event)
            case children.Grpc():
                if event.doing != "served":
                    log.warning("gRPC on port %d: %s", self._settings.grpc_port, event.doing)
                self._grpc_doing = event.doing
                self._grpc_socket_doing = event.socket or "served"
            case _:
                assert_never(event)

    def _compare_engine(self, event: children.Serving) -> None:
        """A worker that has another engine than the last probe found, or misses it: look at once, not in an hour."""
        if event.reason == reasons.ENGINE_MISSING:
            self._look_again()
            return
        active = next((one.active for one in machine.serving(self._state) if one.name == event.model), None)
        if active is None or self._facts is None or not event.engine_version or not self._state.engines.barred:
            return
        found = self._facts.engine(active.engine)
        if found is not None and found.version != event.engine_version:
            self._look_again()

    def _worker_gone(self, pid: int) -> None:
        self._cut_windows()
        self._windows.restart(f"worker {pid}")

    def _worker_served(self, served: s.Served) -> None:
        """A swap counts as done when all live handles acted on it too, or their time is over (contracts.md §9)."""
        if served.ok and not self._handles.settled(served.model):
            self._unsettled[served.model] = served
            self._later(f"handles {served.model}", HANDLES_SECONDS_MAX, lambda: self._handles_late(served.model))
            return
        self._unsettled.pop(served.model, None)
        self._turn(served)

    def _handles_settled(self, name: str) -> None:
        served = self._unsettled.get(name)
        if served is not None:
            self._worker_served(served)

    def _handles_late(self, name: str) -> None:
        served = self._unsettled.pop(name, None)
        if served is not None:
            late = [one["pid"] for one in self._handles.describe() if one["model"] == name and not one["settled"]]
            log.warning("%s: the handles of processes %s do not answer; the swap goes on without them", name, late)
            self._turn(served)

    def _worker_died(self, detail: str, *, ordered: bool, ran: tuple[Ran, ...] = ()) -> None:
        self._unsettled.clear()  # what it served is gone with it
        self._grpc_doing = self._grpc_socket_doing = "not served yet"
        if not ordered:
            self._count_crash(ran)
        self._turn(s.WorkerDied(f"the worker ended with {detail}", ordered, ran))

    def _count_crash(self, ran: tuple[Ran, ...]) -> None:
        """Note which versions a dead worker ran; where nobody knows, each version that answered first."""
        at_us = self._now().wall_us
        for model in machine.serving(self._state):
            for loadable, its in ((model.active, arm_of(model)), (model.incumbent, "incumbent")):
                known = loadable is not None and Ran(loadable.model, loadable.manifest, loadable.variant) in ran
                if loadable is None or not (known if ran else loadable is model.active):
                    continue
                stats = ArmStats(
                    model=loadable.model,
                    manifest=loadable.manifest,
                    variant=loadable.variant,
                    digest=loadable.digest,
                    arm=its,
                )
                self._windows.crashed(crash_window(stats, at_us, self._context(stats)))

    def _look(self, arms: list[ArmStats] | None = None, pid: int = 0) -> None:
        """Take the newest counts of worker and handles, and let the machine weigh those of candidates."""
        at_us = self._now().wall_us
        handles = self._handles.drain_stats()
        self._windows.look(f"worker {pid}", arms or [], at_us)
        self._windows.look(HANDLES, handles, at_us)
        news = {(stats.model, stats.digest, stats.trial) for stats in (*(arms or []), *handles)}
        for name, slot in self._state.models.items():
            phase = slot.phase
            if not isinstance(phase, s.OnTrial | s.Proving):
                continue
            digest = phase.job.loadable.digest
            arm = "shadow" if phase.job.offered.mode == "shadow" else "candidate"
            candidate = self._windows.total(name, digest, arm, phase.trial)
            if candidate is None or (name, digest, phase.trial) not in news:
                continue
            incumbent = slot.incumbent.loadable.digest if slot.incumbent is not None else ""
            # through the queue: an effect that looks must not begin a turn inside the one that it belongs to
            self._queue.put(s.Measured(name, phase.trial, candidate, self._windows.baseline(name, incumbent)))
        if self._handles.leases():
            self._later("handles", HANDLES_EVERY_S, self._look)

    def _handle_crashed(self, crash: HandleCrash) -> None:
        detail = f"process {crash.pid} ended without goodbye while it ran the candidate"
        self._queue.put(s.Condemned(crash.model, crash.digest, crash.trial, reasons.CRASH, detail))

    def _handle_judged(self, verdict: HandleVerdict) -> None:
        detail = f"process {verdict.pid}: {verdict.reason}"
        self._queue.put(s.Condemned(verdict.model, verdict.digest, verdict.trial, reasons.APPLICATION, detail))

    # --- the server ---

    def _callbacks(self) -> Callbacks:
        return Callbacks(
            up=lambda: self._queue.put(self._is_up),
            down=lambda: self._queue.put(lambda: log.info("the broker is gone")),
            offer=lambda data, from_server: self._queue.put(lambda: self._offer(data, from_server=from_server)),
            ack=lambda frame: self._queue.put(lambda: self._acked(frame)),
            reached=lambda: self._queue.put(s.Connected()),
            outgoing=self._outgoing,
            retire=lambda frame: self._queue.put(lambda: self._retire(frame)),
        )

    def _retire(self, frame: bytes) -> None:
        """The server says that this device has left the fleet: stop, and remove what may be removed."""
        try:
            order = wire.parse(wire.Retire, self._link.unseal("retire", frame))
        except RefusedError as error:
            log.warning("an order to end is ignored: %s", error)
            return
        wipe = retirement.bounded(order.wipe, self._settings.wipe_allowed)
        log.warning("this device has left the fleet: it stops, and removes %s", wipe)
        try:
            retirement.note(self._home, wipe, self._disk)
        except DeviceError as error:
            log.error("%s", error.diagnostics())
            return  # and is told again
        self._stop()

    def _is_up(self) -> None:
        log.info("connected to the broker")
        self._say_hello()
        self._report_box.forget()
        self._telemetry_box.forget()
        self._turn(s.Connected())
        self._send_reports()
        self._send_telemetry()

    def _hello(self) -> bytes:
        state = self._state
        return wire.encode(
            wire.Hello(
                format=wire.FORMAT,
                device=self._identity.device,
                at=self._now().wall_us,
                boot=self._boot,
                agent=__version__,
                offer_epoch=state.offer.epoch if state.offer is not None else 0,
                offer_serial=state.offer.serial if state.offer is not None else 0,
                facts=self._known_facts(),
                running=machine.running(state),
                streams={
                    "report": (state.stream, state.owed[0].seq if state.owed else state.seq, state.seq),
                    "telemetry": (self._buffer.epoch, self._buffer.first, self._buffer.next),
                },
                trust_version=state.trust.current if state.trust is not None else 0,
                trust_state=self._stuck or self._unverified or machine.trust_state(state, self._now()),
            )
        )

    def _known_facts(self) -> DeviceFacts | None:
        """Return the facts with what applications here rely on, by model."""
        if self._facts is None:
            return None
        contracts = {
            name: of_bytes(msgspec.json.encode(contract, order="deterministic"))
            for name in sorted({*self._state.models, *self._state.contracts})
            if (contract := contract_of(self._state, name)) is not None
        }
        return msgspec.structs.replace(self._facts, contracts=contracts)

    def _say_hello(self) -> None:
        self._later("hello", HELLO_EVERY_S * (1 + self._jitter), self._say_hello)
        self._link.publish("hello", self._hello())

    def _send_reports(self) -> None:
        if not self._link.is_up:
            if self._state.owed:
                self._link.nudge()
            return
        reports = {report.seq: report for report in machine.outgoing(self._state)}
        self._send("report", self._report_box, list(reports), lambda seq: reports[seq], self._send_reports)

    def _send_telemetry(self) -> None:
        if not self._link.is_up:
            return
        held = self._buffer.held(STREAM_IN_FLIGHT_MAX)
        self._send("telemetry", self._telemetry_box, held, self._buffer.message, self._send_telemetry)

    def _send(
        self,
        kind: topics.Up,
        box: Outbox,
        held: list[int],
        message: Callable[[int], msgspec.Struct | None],
        again: Callable[[], None],
    ) -> None:
        now_s = time.monotonic()
        for seq in box.due(held, now_s, random.random()):  # noqa: S311 - jitter
            found = message(seq)
            if found is not None:
                self._link.publish(kind, wire.encode(found))
        next_s = box.next_s(now_s)
        if next_s is not None:
            self._later(f"send {kind}", max(next_s, TICK_MIN_S), again)

    def _outgoing(self, kind: topics.Up) -> list[bytes]:
        """Return what HTTP should post now (asked by the link's thread)."""

        def answer() -> list[bytes]:
            match kind:
                case "hello":
                    return [self._hello()]
                case "report":
                    return [wire.encode(r) for r in machine.outgoing(self._state)[:STREAM_IN_FLIGHT_MAX]]
                case "telemetry":
                    found = [self._buffer.message(seq) for seq in self._buffer.held(STREAM_IN_FLIGHT_MAX)]
                    return [wire.encode(message) for message in found if message is not None]
                case _:
                    assert_never(kind)

        payloads = self._ask(answer)
        assert isinstance(payloads, list)
        return payloads

    def _acked(self, frame: bytes) -> None:
        try:
            ack = wire.parse(wire.Ack, self._link.unseal("ack", frame))
        except RefusedError as error:
            log.warning("an acknowledgement is ignored: %s", error)
            return
        if ack.device != self._identity.device:
            return
        if ack.stream == "report":
            self._turn(s.Acked(ack.epoch, ack.seq, fresh=secrets.token_urlsafe(12)))
            self._send_reports()
        else:
            self._buffer.acknowledge(ack.epoch, ack.seq)
            self._send_telemetry()
        if ack.logs and ack.logs != self._logs_sent:
            self._logs_sent = ack.logs
            self._in_thread("logs", functools.partial(self._post_logs, ack.logs))

    def _post_logs(self, asked: int) -> None:
        try:
            self._link.post_logs(msgspec.json.encode(self._ring.lines()))
        except WherryError as error:
            log.warning("log lines could not be sent: %s", error)
            self._queue.put(lambda: self._logs_again(asked))

    def _logs_again(self, asked: int) -> None:
        if self._logs_sent == asked:
            self._logs_sent = 0  # the next acknowledgement asks again

    # --- telemetry ---

    def _context(self, stats: ArmStats) -> Context:
        slot = self._state.models.get(stats.model)
        if slot is not None:
            phase = slot.phase
            if isinstance(phase, _TRIED) and phase.job.loadable.digest == stats.digest:
                return Context(phase.job.offered.rollout, phase.job.offered.attempt)
            for version in (slot.incumbent, slot.last_good):
                if version is not None and version.loadable.digest == stats.digest:
                    return Context(version.offered.rollout, version.offered.attempt)
        return Context("", 0)

    def _cut_windows(self) -> None:
        """Turn what was counted since the last cut into a message; also called before the serving set changes."""
        self._later("window", self._settings.window_s, self._cut_windows)
        now = self._now()
        windows = self._windows.cut(now.wall_us, self._context)
        serving = machine.serving(self._state)
        self._windows.keep_only(
            {model.active.digest for model in serving}
            | {model.incumbent.digest for model in serving if model.incumbent is not None}
        )
        if len(self._buffer.held(STREAM_IN_FLIGHT_MAX)) == STREAM_IN_FLIGHT_MAX:
            # a device that nobody hears keeps its measurements, and not what was asked of it
            windows = [msgspec.structs.replace(window, samples=[]) for window in windows]
        quiet_s = now.monotonic_ms / 1000 - self._spoke_s
        if not windows and quiet_s < HEARTBEAT_S:
            return
        self._spoke_s = now.monotonic_ms / 1000
        try:
            disk_free = self._disk.free_bytes(self._home)
        except DeviceError as error:
            log.warning("%s", error)
            disk_free = 0
        self._buffer.add(
            wire.Telemetry(
                format=wire.FORMAT,
                device=self._identity.device,
                epoch="",
                seq=0,
                first=0,
                at=now.wall_us,
                windows=windows,
                memory_available_bytes=readings.memory_bytes("MemAvailable"),
                disk_free_bytes=disk_free,
                temperature_c=readings.temperature_c(self._settings.conditions.sys),
                downloaded_bytes=self._downloads.drain_bytes(),
                load_1m=round(os.getloadavg()[0], 2),
            )
        )
        self._send_telemetry()

    # --- what is seen from outside ---

    def _at_rest(self) -> dict[str, str]:
        """Return how what lies on the disk is sealed, for `status` and `doctor`; empty: not at all."""
        seal = self._disk.seal
        return {} if seal is None else {"mode": seal.mode, "key": seal.id, "source": seal.source}

    def snapshot(self) -> dict[str, object]:
        """Return what `wherry-agent status` shows."""
        return {
            "agent": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_s, 1),
            "server": self._server,
            "connected": self._link.way,
            "certificate": self._renewal.describe(),
            "at_rest": self._at_rest(),
            "http": f"http://127.0.0.1:{self.http_port}",
            "grpc": f"127.0.0.1:{self._settings.grpc_port}" if self._settings.grpc_port else "",
            "grpc_doing": self._grpc_doing if self._settings.grpc_port else "",
            "grpc_socket": str(self._grpc_name.path) if self._grpc_name is not None else "",
            "grpc_socket_doing": self._grpc_socket_doing if self._grpc_name is not None else "",
            "samples": sampling.words(flags_of(self._state), self._settings.samples_consent),
            "worker_pid": self._worker.pid,
            "worker_running": sorted(f"{one.model} {one.variant}" for one in self._worker.running()),
            "handles": self._handles.describe(),
            "engines": [f"{e.name} {e.version}" for e in self._facts.engines] if self._facts is not None else [],
            "engines_probed": self._facts is not None,
            "process": readings.process(),
            "downloads": self._downloads.describe(),
            "offers_not_verified": self._envelopes.troubles(),
            **status.describe(self._state, self._now(), name=self._identity.name),
        }


def _bound_local(path: Path) -> socket.socket:
    """Return a socket bound to a name in the file system.

    Raises:
        DeviceError: `socket_path`.
    """
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        local.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        local.close()
        raise DeviceError(
            "socket_path",
            f"cannot listen on {path}: {error}",
            consequence="applications could not reach their models",
            next_step="choose a --home with a shorter path that this user may write",
        ) from error
    return local


def _tell_story(before: s.State, after: s.State) -> None:
    """Log what a turn changed for each model, and what is reported of it: one line each."""
    for name in sorted({*before.models, *after.models}):
        old, new = before.models.get(name, s.Slot()).phase, after.models.get(name, s.Slot()).phase
        if type(old) is not type(new):
            job = getattr(new, "job", None) or getattr(old, "job", None)
            target = job.offered.target if job is not None else ""
            reason, detail = getattr(new, "reason", ""), getattr(new, "detail", "")
            step = (f"{status.phase_words(old)} → {status.phase_words(new)}", target, reason, detail)
            log.info("%s: %s", name, " · ".join(word for word in step if word))
    for report in after.owed:
        if report.seq >= before.seq:
            ratio = f"{report.latency_ratio:.2f}" if report.latency_ratio else "not known"
            figures = (
                f"{report.requests} requests, {report.errors} failed, {report.fallbacks} answered by the incumbent,"
                f" latency ratio {ratio}"
                if report.trial_end
                else ""
            )
            words = (report.model, report.state, report.target, report.reason, report.detail, figures)
            log.info("%s", " · ".join(word for word in words if word))


def _failure(answer: children.CourierAnswer) -> children.Failed:
    if isinstance(answer, children.Failed):
        return answer
    detail = f"the courier answered {type(answer).__name__}"
    return children.Failed(reason=reasons.CHILD_FAILED, detail=detail, retry_after_s=0.0)


def _failed(model: str, manifest: str, attempt: int, task: s.Task, answer: children.CourierAnswer) -> s.TaskFailed:
    failed = _failure(answer)
    return s.TaskFailed(model, manifest, attempt, task, failed.reason, failed.detail, failed.retry_after_s)


EXIT_DONE = 0


def main(settings: Settings) -> int:
    """Run an agent; errors of the WherryError family are told to the person and end it."""
    home = Path(settings.home)
    try:
        status = EXIT_DONE if retirement.noted(home) is not None else Daemon(settings).run()
        retired = retirement.noted(home)
        if retired is None:
            return status
        retirement.finish(home, retired, Disk())
        log.warning("%s: this device has left its fleet; remove %s to enrol it again", home, home / retirement.FILE)
        return retirement.EXIT
    except WherryError as error:
        print(error.diagnostics(), file=sys.stderr)  # noqa: T201
        return 1
