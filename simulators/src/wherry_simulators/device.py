"""A device of the world: the daemon's loop in virtual time, with the power cut at every seam.

One turn is: the machine decides, the new state becomes durable, the effects run. What survives is `durable`, the state
that the journal holds; a boot decodes it with the real journal. Everything else (memory, worker, children, timers) is
lost with the power or with the process, while messages on the network and answers that come late are not: they arrive
in whatever boot there is then.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal, Protocol

from wherry_agent import journal, machine, turn
from wherry_agent import state as s
from wherry_shared import reasons, wire
from wherry_shared.clock import Now
from wherry_shared.errors import RefusedError
from wherry_shared.limits import STREAM_IN_FLIGHT_MAX
from wherry_shared.wire import Ack, Hello, Offer, Report
from wherry_simulators import server
from wherry_simulators.brain import Brain
from wherry_simulators.clock import Agenda
from wherry_simulators.faults import Faults
from wherry_simulators.hands import Hands, Trouble, Work
from wherry_simulators.worker import MachineDownError

EPOCH_WALL_S = 1_800_000_000.0
"""Wall time at virtual millisecond 0."""
HELLO_MS = 600_000
"""How often a device connects anew, and says what it has."""
RESEND_MS = 30_000
POUR_MS = 5_000
"""Between two looks at the worker's counts while a candidate is on trial."""
VERIFY_MS = 200
PROBE_MS = 3_000
PROBE_EVERY_MS = 3_600_000
SCRUB_EVERY_MS = 600_000
REPEAT_MS = 60_000
"""How much later a repeated answer may come."""
WRONG_CLOCK_S = 10 * 365 * 86_400
CLOCK_FIXED_MS = 900_000
"""How long a wrong wall clock stays wrong."""


class Watcher(Protocol):
    """Who looks on and may object: the checkers."""

    def wrote(self, device: Device, before: s.State, event: s.Event | None, after: s.State) -> None:
        """The machine decided (event None: at a boot) and the new state holds; its effects have not run yet."""

    def ordered(self, device: Device, effect: s.Effect) -> None:
        """An effect is about to run."""

    def went_down(self, device: Device, held: s.State) -> None:
        """The agent starts on what its journal held, after an end that nobody had ordered."""

    def taken_down(self, device: Device) -> None:
        """What is tried on a device takes the whole machine down."""

    def happened(self, device: Device, events: tuple[s.Event, ...]) -> None:
        """A child or the worker did something, and says so."""


class World(Protocol):
    """What a device has around it."""

    agenda: Agenda[Callable[[], None]]
    requests_per_s: float

    @property
    def engines_change(self) -> bool:
        """Whether engines are replaced in this world, so that devices look."""

    @property
    def disks_rot(self) -> bool:
        """Whether disks alter what they hold in this world, so that devices look."""

    @property
    def watcher(self) -> Watcher:
        """Who looks on."""

    def faults(self) -> Faults:
        """What may go wrong now."""

    def uplink(self, device: str, message: Hello | Report) -> None:
        """Send a message to the server; it may be lost, late or repeated."""


class Device:
    """One simulated agent."""

    def __init__(self, world: World, name: str, brain: Brain, hands: Hands, source: random.Random) -> None:
        self.world = world
        self.name = name
        self.brain = brain
        self.hands = hands
        self._random = source
        self.durable = machine.initial(
            device=name, project=server.PROJECT, stream=f"stream-{source.getrandbits(32):08x}"
        )
        self.memory = self.durable
        self.up = False
        self.life = 0
        """Number of the process; whatever belongs to an earlier one is gone."""
        self.boots = 0
        self._went_down = False
        """The last life ended without an order."""
        self._boot_began_ms = 0
        self._wrong_until_ms = 0
        self._timer = 0
        self._resending = False
        self._pouring = False
        self.steps = 0
        self.crashes = 0

    # --- time -------------------------------------------------------------------------------------

    def now(self) -> Now:
        """Return this device's own idea of the time."""
        now_ms = self.world.agenda.now_ms
        wall_s = EPOCH_WALL_S + now_ms / 1000
        if now_ms < self._wrong_until_ms:
            wall_s -= WRONG_CLOCK_S
        return Now(f"{self.name}-{self.boots}", now_ms - self._boot_began_ms, wall_s)

    def _later(self, wait_ms: int, act: Callable[[], None]) -> None:
        """Do something later unless this process is gone by then."""
        life = self.life

        def due() -> None:
            if self.life == life and self.up:
                act()

        self.world.agenda.after(wait_ms, due)

    # --- life -------------------------------------------------------------------------------------

    def boot(self, *, power: bool) -> None:
        """Start the agent on what the journal holds; `power` says that the machine itself had been off."""
        now_ms = self.world.agenda.now_ms
        if power:
            self.boots += 1
            self._boot_began_ms = now_ms
            wrong = self._random.random() < self.world.faults().wall_clock_wrong
            self._wrong_until_ms = now_ms + CLOCK_FIXED_MS if wrong else 0
        self.life += 1
        self.up = True
        self._resending = self._pouring = False
        before = self.memory = journal.decode(journal.encode(self.durable))
        if self._went_down:
            self._went_down = False
            self.world.watcher.went_down(self, before)
        after, effects = self.brain.resume(before, self.now())
        self.steps += 1
        if self._commit(before, None, after, effects):
            self._schedule(self.hands.start_worker())
            self._connect()
            if self.world.engines_change:
                self._later(PROBE_MS, self._probe_again)
            if self.world.disks_rot:
                self._later(self._random.randrange(SCRUB_EVERY_MS), self._scrub_again)

    def crash(self, *, power: bool) -> None:
        """Lose memory, worker and children; the agent starts again after `boot_ms`."""
        self.crashes += 1
        self._went_down = True
        self._end(power=power)

    def cut_power(self) -> None:
        """Lose the power, whatever is going on."""
        if self.up:
            self.crash(power=True)

    def stop(self) -> None:
        """Be told to end: that becomes durable, and nothing after it."""
        before, event = self.memory, s.Stopping()
        after, _ = self.brain.step(before, event, self.now())
        self.steps += 1
        self.durable = self.memory = after
        self.world.watcher.wrote(self, before, event, after)
        self._end(power=self._random.random() < 0.5)

    def _end(self, *, power: bool) -> None:
        self.up = False
        self.life += 1
        self.hands.crash()
        self.world.agenda.after(
            self.world.faults().boot_ms + self._random.randrange(2_000), lambda: self.boot(power=power)
        )

    def probe(self) -> None:
        """Find out which engine is there now."""
        self.turn(s.EnginesProbed({"onnxruntime": self.hands.files.engine}))

    def _probe_again(self) -> None:
        life = self.life
        self.probe()
        if self.up and self.life == life:
            self._later(PROBE_EVERY_MS, self._probe_again)

    def rot(self) -> None:
        """Let the disk alter the files of what is trusted."""
        incumbents = (slot.incumbent for slot in self.durable.models.values())
        self.hands.files.altered |= {one.loadable.digest for one in incumbents if one is not None}

    def _scrub_again(self) -> None:
        """Read again what is trusted."""
        life = self.life
        for name, slot in self.memory.models.items():
            for one in (slot.incumbent, slot.last_good):
                if one is not None and one.loadable.digest in self.hands.files.altered and self.life == life:
                    self.turn(s.Altered(name, one.manifest, one.loadable.variant, "simulated rot"))
        if self.up and self.life == life:
            self._later(self._random.randrange(SCRUB_EVERY_MS), self._scrub_again)

    def _unlucky(self, share: float) -> bool:
        """Draw a crash; True if the device is down now."""
        if share and self._random.random() < share:
            self.crash(power=self._random.random() < 0.5)
            return True
        return False

    # --- turns ------------------------------------------------------------------------------------

    def turn(self, event: s.Event) -> None:
        """Let the machine decide about an event, write, act. A device that is down hears nothing."""
        if not self.up or self._unlucky(self.world.faults().crash_between_events):
            return
        stopped = self.world.faults().stopped
        if stopped and self._random.random() < stopped:
            self.stop()
            return
        before = self.memory
        after, effects = self.brain.step(before, event, self.now())
        self.steps += 1
        self._commit(before, event, after, effects)

    def _commit(self, before: s.State, event: s.Event | None, after: s.State, effects: tuple[s.Effect, ...]) -> bool:
        """Write the state, then run the effects, with the power cut anywhere; False if the device went down."""
        faults = self.world.faults()
        write = event is None or not self.brain.may_wait(self.durable, after)
        if self.brain.journal_first and write:
            kept = self._random.random() < faults.unsynced_kept
            if self._unlucky(faults.crash_before_journal):
                if kept:
                    self.durable = after
                    self.world.watcher.wrote(self, before, event, after)
                return False
            self.durable = after
        self.memory = after
        self.world.watcher.wrote(self, before, event, after)
        if self._unlucky(faults.crash_after_journal):
            return False
        for effect in effects:
            self.world.watcher.ordered(self, effect)
            self._run(effect)
            if not self.up or self._unlucky(faults.crash_between_effects):
                return False
        if not self.brain.journal_first and write:
            self.durable = after
        self._arm()
        return True

    def _arm(self) -> None:
        """Set the one timer to what the machine waits for next."""
        wait_ms = self.brain.next_deadline_ms(self.memory, self.now())
        self._timer += 1
        if wait_ms is None:
            return
        timer = self._timer

        def due() -> None:
            if self._timer == timer:
                self.turn(s.Tick())

        self._later(wait_ms + 1, due)

    # --- effects ----------------------------------------------------------------------------------

    def _run(self, effect: s.Effect) -> None:
        match effect:
            case s.SendReports():
                self._send_reports()
            case s.Resolve() | s.Fetch() | s.Refresh() | s.Mend():
                self._start(effect, self._trouble())
            case s.Serve(_, models):
                self._start(effect, None)
                if not self._pouring and any(model.trial for model in models):
                    self._pouring = True
                    self._later(POUR_MS, self._pour)
            case _:
                self._start(effect, None)

    def _start(self, effect: s.Effect, trouble: Trouble | None) -> None:
        for work in self.hands.take(effect, self.now(), trouble):
            self._schedule(work)

    def _trouble(self) -> Trouble | None:
        if self._random.random() < self.world.faults().fetch_trouble:
            return Trouble(self._random.choice((reasons.NETWORK, reasons.DISK_FULL, reasons.CHILD_FAILED)))
        return None

    def _schedule(self, work: Work) -> None:
        self._later(work.wait_ms, lambda: self._done(work))

    def _done(self, work: Work) -> None:
        if not self.hands.wanted(work):
            return
        faults = self.world.faults()
        if work.loads and self._random.random() < faults.worker_silent:
            self.hands.hang()
            return
        try:
            events = work.act()
        except MachineDownError:
            self.world.watcher.taken_down(self)
            self.crash(power=True)
            return
        for more in self.hands.more():
            self._schedule(more)
        self.world.watcher.happened(self, events)
        for event in events:
            if work.model and self._random.random() < faults.child_lost:
                self._lose(event)
                continue
            if work.model and self._random.random() < faults.answer_late:
                # a child's word may lie in a queue until after a reboot: no guard against another life
                self.world.agenda.after(self._random.randrange(faults.answer_late_ms), lambda e=event: self._hear(e))  # type: ignore[misc]
                continue
            if self._random.random() < faults.answer_repeated and not isinstance(event, s.WorkerDied):
                self._repeat(event, stays=bool(work.model))
            self.turn(event)

    def _lose(self, event: s.Event) -> None:
        """A child dies without a word: the daemon mostly sees that a courier is gone, and now and then nothing at all."""
        match event:
            case s.Resolved(model=model, manifest=manifest, attempt=attempt) if self._random.random() < 0.8:
                task: Literal["resolve", "fetch"] = "resolve"
            case s.Fetched(model=model, manifest=manifest, attempt=attempt) if self._random.random() < 0.8:
                task = "fetch"
            case _:
                return
        self.turn(s.TaskFailed(model, manifest, attempt, task, reasons.CHILD_FAILED, "it died without an answer"))

    def _repeat(self, event: s.Event, *, stays: bool) -> None:
        if stays:
            self.world.agenda.after(self._random.randrange(REPEAT_MS), lambda: self._hear(event))
        else:
            self._again_in_this_worker(event, REPEAT_MS)

    def _again_in_this_worker(self, event: s.Event, within_ms: int) -> None:
        """Say it once more, as long as the same worker lives: nobody reads from a process that is gone."""
        process = self.hands.process

        def again() -> None:
            if self.hands.process == process:
                self.turn(event)

        self._later(self._random.randrange(within_ms), again)

    def _hear(self, event: s.Event) -> None:
        """Hear a late word, unless what it says has become untrue meanwhile (a file that was collected)."""
        if isinstance(event, s.Fetched) and not self.hands.has(event.manifest, event.variant):
            return
        self.turn(event)

    # --- traffic ----------------------------------------------------------------------------------

    def _pour(self) -> None:
        """Let callers use the served models for a while, as long as a candidate is on trial."""
        faults = self.world.faults()
        if self.hands.worker is not None and self._random.random() < faults.worker_crash_per_s * POUR_MS / 1000:
            self.lose_worker("simulated death of the worker")
        try:
            poured = self.hands.pour(self._requests())
        except MachineDownError:
            self.world.watcher.taken_down(self)
            self.crash(power=True)
            return
        if poured.start is not None:
            self._schedule(poured.start)
        life = self.life
        for event in poured.events:
            if self._random.random() < faults.answer_late and isinstance(event, s.Measured):
                self._again_in_this_worker(event, faults.answer_late_ms)
            self.turn(event)
        if not self.up or self.life != life:
            return
        if any(model.trial for model in turn.serving(self.memory)):
            self._later(POUR_MS, self._pour)
        else:
            self._pouring = False

    def _requests(self) -> int:
        expected = self.world.requests_per_s * POUR_MS / 1000
        return int(expected) + (self._random.random() < expected % 1)

    def lose_worker(self, detail: str) -> None:
        """The worker dies; the daemon hears of it and starts another."""
        if not self.up:
            return
        died, start = self.hands.kill_worker(detail)
        self._schedule(start)
        self.turn(died)

    # --- link -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Say hello, now and again; what is owed goes out again too."""
        state = self.memory
        owed = self.brain.outgoing(state)
        offer = state.offer
        self.world.uplink(
            self.name,
            Hello(
                format=wire.FORMAT,
                device=self.name,
                at=self.now().wall_us,
                boot=self.now().boot,
                agent="simulated",
                offer_epoch=offer.epoch if offer is not None else 0,
                offer_serial=offer.serial if offer is not None else 0,
                running=machine.running(state),
                streams={"report": (state.stream, owed[0].seq if owed else state.seq, state.seq)},
            ),
        )
        self._later(HELLO_MS // 2 + self._random.randrange(HELLO_MS), self._reconnect)

    def _reconnect(self) -> None:
        life = self.life
        self.turn(s.Connected())
        if self.up and self.life == life:
            self._connect()

    def _send_reports(self) -> None:
        owed = self.brain.outgoing(self.memory)
        for report in owed[:STREAM_IN_FLIGHT_MAX]:
            self.world.uplink(self.name, report)
        if owed and not self._resending:
            self._resending = True
            self._later(RESEND_MS + self._random.randrange(RESEND_MS), self._resend)

    def _resend(self) -> None:
        self._resending = False
        self._send_reports()

    def on_offer(self, envelope: bytes) -> None:
        """An envelope arrived: the courier verifies it, then the machine hears of it."""
        if not self.up:
            return

        def act() -> tuple[s.Event, ...]:
            try:
                payload = server.verify(envelope)
                offer = wire.parse(Offer, payload)
            except RefusedError:
                return ()  # forged or broken: a courier answers `Failed`, and nothing reaches the machine
            digest = "sha256:" + hashlib.sha256(payload).hexdigest()
            return (s.Offered(offer, digest, self.hands.trust(self.now())),)

        self._schedule(Work(VERIFY_MS, act))

    def on_ack(self, ack: Ack) -> None:
        """An acknowledgement arrived."""
        if ack.stream == "report":
            self.turn(s.Acked(ack.epoch, ack.seq))
