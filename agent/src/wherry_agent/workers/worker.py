"""One worker process: commands in, events out, models served in between.

Three kinds of threads: this one reads commands, the loader loads, a ticker sends statistics once a second (at once
after a candidate's error) and gives memory back. Requests come in on the serving side's own threads, which accept
nobody before the first desired state is reached: after a crash, callers wait in the queue instead of being told 404.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from wherry_agent.answering import memory
from wherry_agent.answering.arms import Loaded, read_golden, reason_of
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.intact import Unlocking
from wherry_agent.answering.registry import Registry
from wherry_agent.children import (
    GoldenDone,
    Grpc,
    GrpcDoing,
    Ready,
    RunGolden,
    Serve,
    Stats,
    Stop,
    WorkerCommand,
    encode_line,
)
from wherry_agent.in_flight import UNREAD, Page
from wherry_agent.lines import LineWriter, read_lines
from wherry_agent.serving.flags import Flags
from wherry_agent.serving.http import buffers
from wherry_agent.serving.ledger import Ledger
from wherry_agent.serving.listener import HttpServer
from wherry_agent.serving.protocol import Protocol
from wherry_agent.serving.regions import Regions
from wherry_agent.serving.samples import Samples
from wherry_agent.workers.loader import Loader
from wherry_shared import golden, reasons
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import WherryError

if TYPE_CHECKING:
    from wherry_agent.serving.grpc_server import GrpcServer

log = logging.getLogger(__name__)

COMMAND_BYTES_MAX = 16 * 1024 * 1024
"""One command: a `Serve` holds the interface of every model with its label lists."""
STATS_SECONDS = 1.0
STATS_SECONDS_MIN = 0.02
DRAIN_SECONDS_MAX = 10.0
GRPC_GRACE_SECONDS = 5.0
"""Calls over gRPC that take longer end with the worker."""
GRPC_MISSING: GrpcDoing = "not served: its packages are missing"

_commands: msgspec.json.Decoder[WorkerCommand] = msgspec.json.Decoder(WorkerCommand)


class Worker:
    """Serves on `listeners` what comes over `control`."""

    def __init__(
        self,
        control: socket.socket,
        listeners: list[socket.socket],
        *,
        reserve_bytes: int = memory.RESERVE_BYTES_DEFAULT,
        pass_on: socket.socket | None = None,
        take_over: Sequence[socket.socket] = (),
        grpc_port: int = 0,
        grpc_socket: str = "",
        ledger: Ledger | None = None,
        page: Page = UNREAD,
    ) -> None:
        self._control = control
        self._writer = LineWriter(control)
        self._tick = threading.Condition()
        self._urgent = False
        self._stopping = False
        self.registry = Registry()
        self._gate = RunGate()
        self._page = page
        self._left = -1
        self._left_at = time.monotonic()
        """When a run had ended, or nobody waited, for the last time that somebody looked."""
        self._helpers = Helpers()
        self._flags = Flags()
        self._regions = Regions(ledger)
        self._samples = Samples()
        protocol = Protocol(self.registry, self._gate, self._helpers, self._flags, self._regions, self._samples)
        self._http = HttpServer(listeners, protocol, pass_on=pass_on, take_over=take_over)
        self._grpc_port = grpc_port
        self._grpc = _grpc(grpc_port, grpc_socket, protocol, self.say) if grpc_port else None
        self._loader = Loader(
            self.registry,
            self.say,
            on_candidate_error=self._hurry,
            on_first=self._start,
            reserve_bytes=reserve_bytes,
            page=page,
        )
        self._ticker = threading.Thread(target=self._tell, name="stats", daemon=True)

    def run(self) -> None:
        """Serve until `Stop`, or until the supervisor is gone."""
        self._page.beat(0)
        self._ticker.start()
        self.say(Ready(pid=os.getpid()))
        hand_over = False
        try:
            for line in read_lines(self._control, line_bytes_max=COMMAND_BYTES_MAX):
                command = _parsed(line)
                if isinstance(command, Stop):
                    hand_over = command.hand_over
                    break
                if command is not None:
                    self._do(command)
        except OSError as error:
            log.warning("the supervisor is gone: %s", error)
        self._stop(hand_over=hand_over)

    def say(self, message: msgspec.Struct) -> None:
        """Send an event; a supervisor that is gone is noticed by the reading side."""
        try:
            self._writer.write(encode_line(message))
        except OSError as error:
            log.warning("an event could not be sent: %s", error)

    # -- inside ----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._http.start()
        if self._grpc is not None:
            self._grpc.start()
        elif self._grpc_port:
            self.say(Grpc(doing=GRPC_MISSING, socket=GRPC_MISSING))

    def _do(self, command: Serve | RunGolden) -> None:
        match command:
            case Serve():
                self._flags.set(command.flags)
                self._samples.want(command.samples)
                Unlocking.password = command.unlock
                self._loader.want(command)
            case RunGolden():
                threading.Thread(target=self._run_golden, args=(command,), name="golden", daemon=True).start()

    def _run_golden(self, command: RunGolden) -> None:
        published = self.registry.get(command.model)
        loaded = next(
            (one for one in (published.loaded() if published else []) if one.loadable.digest == command.digest), None
        )
        reason, detail = (reasons.CHILD_FAILED, "this variant is not loaded") if loaded is None else self._prove(loaded)
        self.say(
            GoldenDone(
                model=command.model,
                digest=command.digest,
                trial=command.trial,
                passed=not reason,
                reason=reason,
                detail=detail[:500],
            )
        )

    def _prove(self, loaded: Loaded) -> tuple[str, str]:
        """Run the golden vectors of a loaded variant, each through the run gate; return (reason, detail) if it fails."""

        def run(inputs: dict[str, golden.Array]) -> dict[str, golden.Array]:
            with self._gate:
                slot = loaded.page.begin(loaded.mark)
                try:
                    return loaded.bound.run(inputs)
                finally:
                    loaded.page.end(slot)

        try:
            misses = golden.check(read_golden(loaded.loadable), run)
        except EngineFault as error:
            return reasons.HEALTH_GOLDEN, str(error)
        except WherryError as error:  # the vectors could not be used: no word about the variant
            return reason_of(error), str(error)
        return reasons.HEALTH_GOLDEN if misses else "", "; ".join(str(miss) for miss in misses[:5])

    def _hurry(self) -> None:
        with self._tick:
            self._urgent = True
            self._tick.notify()

    def _tell(self) -> None:
        busy = False
        while not self._stopping:
            with self._tick:
                if not self._urgent:
                    self._tick.wait(STATS_SECONDS)
                self._urgent = False
            self._page.beat(self._held_ms())
            before, busy = busy, self._send_stats()
            self._regions.reclaim()
            if before and not busy:  # it may be quiet for long: what only speed needs goes back to the device
                buffers.clear()
                self._loader.freed.set()
            time.sleep(STATS_SECONDS_MIN)  # a candidate that fails every request must not flood the supervisor
            if self._loader.freed.is_set():
                self._loader.freed.clear()
                memory.trim()

    def _held_ms(self) -> int:
        """Return for how long no run ended although others waited."""
        gate, now = self._gate, time.monotonic()
        if not gate.waiting or gate.left != self._left:
            self._left, self._left_at = gate.left, now
        return int((now - self._left_at) * 1000)

    def _send_stats(self) -> bool:
        """Report what was answered since the last time; tell whether anything was."""
        arms = [stats for counter in self._loader.counters() if (stats := counter.news()) is not None]
        if arms:
            self.say(Stats(arms=arms))
        for sampled in self._samples.drain():
            self.say(sampled)
        self._loader.settle()
        return bool(arms)

    def _stop(self, *, hand_over: bool) -> None:
        self._stopping = True
        self._loader.stop()
        # first, since the worker that follows waits for the port
        over = self._grpc.stop(GRPC_GRACE_SECONDS) if self._grpc is not None else []
        self._http.drain(time.monotonic() + DRAIN_SECONDS_MAX, pass_on=hand_over)
        for calls in over:
            calls.wait(GRPC_GRACE_SECONDS)
        self._hurry()
        self._ticker.join(STATS_SECONDS)
        self._send_stats()
        self._helpers.close()


def _grpc(port: int, socket_path: str, protocol: Protocol, say: Callable[[Grpc], None]) -> GrpcServer | None:
    """Return a gRPC server; without its packages REST is served all the same, and `wherry-agent doctor` says why."""
    try:
        from wherry_agent.serving.grpc_server import GrpcServer
    except ImportError as error:
        log.error("gRPC is not served: %s; install wherry-agent[grpc]", error)
        return None
    return GrpcServer(port, socket_path, protocol.inference, say)


def _parsed(line: bytes) -> WorkerCommand | None:
    try:
        return _commands.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # a newer supervisor may know commands that this worker does not; what is served does not suffer from it
        log.error("a command that this worker does not understand: %s", error)
        return None
