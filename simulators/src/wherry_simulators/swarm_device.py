"""One light device of a swarm: the real machine on a real connection, with hands that behave by the table.

Real are: the machine and its decisions, MQTT, the frames and their keys, the director's signature on every offer, the
streams with their numbers, resends and acknowledgements, and the cutting of telemetry windows. Simulated are: what
couriers, canaries and workers do, and the disk (it lasts as long as the process).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from wherry_agent import journal, machine, turn
from wherry_agent import state as s
from wherry_agent.children import ArmStats
from wherry_agent.outbox import Outbox
from wherry_agent.telemetry import Context, Windows
from wherry_shared import dsse, frames, topics, wire
from wherry_shared.clock import Now
from wherry_shared.errors import RefusedError
from wherry_shared.facts import DeviceFacts
from wherry_shared.wire import Ack, Hello, Offer, StreamName, Telemetry
from wherry_simulators.enrolment import Identity, Verifier
from wherry_simulators.hands import Hands, Work
from wherry_simulators.mqtt import Connection
from wherry_simulators.worker import MachineDownError

AGENT = "wherry-sim 0.1.0"
POUR_TRIAL_S = 0.5
"""Between two looks at the counts of a candidate."""
POUR_S = 5.0
"""Between two stretches of traffic on a device without a trial: enough for a baseline."""
TELEMETRY_S = 15.0
TELEMETRY_HELD_MAX = 40
"""Messages kept for the server; beyond it the oldest go, and `first` says so."""
RECONNECT_MIN_S = 0.5
RECONNECT_MAX_S = 30.0
CONNECT_S = 20.0


class Keys(Protocol):
    """Who knows the director's keys."""

    verifiers: dict[str, Verifier]

    def unknown(self) -> None:
        """An offer named a key that is not known: metadata may have to be refreshed."""


@dataclass(slots=True)
class Tally:
    """What all devices of a swarm did."""

    offers: int = 0
    offers_refused: int = 0
    acks_refused: int = 0
    reports_sent: int = 0
    telemetry_sent: int = 0
    connections: int = 0
    connections_lost: int = 0
    steps: int = 0


class SwarmDevice:
    """One simulated device. All methods run on the swarm's event loop."""

    def __init__(
        self,
        identity: Identity,
        hands: Hands,
        keys: Keys,
        tally: Tally,
        *,
        facts: DeviceFacts,
        source: random.Random,
        speed: float,
        requests_per_s: float,
        on_logs: Callable[[SwarmDevice], None],
    ) -> None:
        self.identity = identity
        self.hands = hands
        self.facts = facts
        self._keys = keys
        self._tally = tally
        self._random = source
        self._speed = speed
        self._requests_per_s = requests_per_s * speed
        self._on_logs = on_logs
        self.boot = secrets.token_hex(8)
        self.state = machine.initial(device=identity.device, project=identity.project, stream=secrets.token_hex(8))
        self.connection: Connection | None = None
        self._began_s = time.monotonic()
        self._deadline_s: float | None = None
        self._poured_s = self._began_s
        self._outboxes: dict[StreamName, Outbox] = {"report": Outbox(), "telemetry": Outbox()}
        self._windows = Windows()
        self._telemetry: dict[int, Telemetry] = {}
        self._telemetry_epoch = secrets.token_hex(8)
        self._telemetry_next = 1
        self._telemetry_at_s = self._began_s + TELEMETRY_S * source.random()
        self._logs_sent = 0

    # --- time -------------------------------------------------------------------------------------

    def now(self) -> Now:
        """Return the instant as the machine sees it: its monotonic clock runs `speed` times as fast."""
        elapsed_ms = int((time.monotonic() - self._began_s) * 1000 * self._speed)
        return Now(self.boot, elapsed_ms, time.time())

    def start(self) -> None:
        """Begin to live."""
        after, effects = machine.resume(self.state, self.now())
        self._commit(after, effects)
        self._schedule(self.hands.start_worker())

    def _restart(self) -> None:
        """A candidate took the machine down: all that was in memory is gone, the state is read from a journal."""
        self.hands.crash()
        self.boot = secrets.token_hex(8)
        self._windows = Windows()
        self.state = journal.decode(journal.encode(self.state))
        if self.connection is not None:
            self.connection.abort("the simulated machine went down")
        self.start()

    def beat(self, now_s: float) -> None:
        """Do what is due; called several times a second."""
        if self._deadline_s is not None and now_s >= self._deadline_s:
            self._deadline_s = None
            self.turn(s.Tick())
        every_s = POUR_TRIAL_S if self.on_trial else POUR_S
        if now_s - self._poured_s >= every_s:
            self._pour(now_s)
        if now_s >= self._telemetry_at_s:
            self._telemetry_at_s = now_s + TELEMETRY_S * (0.75 + self._random.random() / 2)
            self._cut()
        if self.state.owed or self._telemetry:
            self._send(now_s)

    # --- the machine ------------------------------------------------------------------------------

    def turn(self, event: s.Event) -> None:
        """Let the machine decide, and do what it says."""
        self._tally.steps += 1
        after, effects = machine.step(self.state, event, self.now())
        self._commit(after, effects)

    def _commit(self, after: s.State, effects: tuple[s.Effect, ...]) -> None:
        if turn.serving(after) != turn.serving(self.state):
            self._cut()
        before, self.state = self.state, after
        if after.offer is not before.offer and (turn.flags_of(before) or turn.flags_of(after)):
            self._publish("hello", wire.encode(self.hello()))  # as the daemon does
        now = self.now()
        for effect in effects:
            if isinstance(effect, s.SendReports):
                self._send(time.monotonic())
            for work in self.hands.take(effect, now):
                self._schedule(work)
        wait_ms = machine.next_deadline_ms(after, now)
        self._deadline_s = None if wait_ms is None else time.monotonic() + (wait_ms + 1) / 1000 / self._speed

    def _schedule(self, work: Work) -> None:
        asyncio.get_running_loop().call_later(work.wait_ms / 1000 / self._speed, self._done, work)

    def _done(self, work: Work) -> None:
        if not self.hands.wanted(work):
            return
        try:
            events = work.act()
        except MachineDownError:
            self._restart()
            return
        for more in self.hands.more():
            self._schedule(more)
        for event in events:
            self.turn(event)

    @property
    def on_trial(self) -> bool:
        """Whether a candidate answers requests now."""
        return any(isinstance(slot.phase, s.OnTrial | s.Proving) for slot in self.state.models.values())

    # --- traffic and telemetry --------------------------------------------------------------------

    def _pour(self, now_s: float) -> None:
        expected = (now_s - self._poured_s) * self._requests_per_s
        self._poured_s = now_s
        try:
            poured = self.hands.pour(int(expected) + (self._random.random() < expected % 1))
        except MachineDownError:
            self._restart()
            return
        if poured.start is not None:
            self._windows.restart("worker")
            self._schedule(poured.start)
        self._windows.look("worker", poured.arms, self.now().wall_us)
        for event in poured.events:
            self.turn(event)

    def _context(self, stats: ArmStats) -> Context:
        slot = self.state.models.get(stats.model)
        phase = slot.phase if slot is not None else None
        if stats.arm != "incumbent" and isinstance(phase, s.OnTrial | s.Proving):
            return Context(phase.job.offered.rollout, phase.job.offered.attempt)
        if slot is not None and slot.incumbent is not None:
            return Context(slot.incumbent.offered.rollout, slot.incumbent.offered.attempt)
        return Context("", 0)

    def _cut(self) -> None:
        """Owe the server what was measured since the last cut."""
        windows = self._windows.cut(self.now().wall_us, self._context)
        serving = self.hands.worker.commands if self.hands.worker is not None else {}
        loaded = [one for model in serving.values() for one in (model.active, model.incumbent)]
        self._windows.keep_only({loadable.digest for loadable in loaded if loadable is not None})
        if not windows:
            return
        number = self._telemetry_next
        self._telemetry_next += 1
        self._telemetry[number] = Telemetry(
            format=wire.FORMAT,
            device=self.identity.device,
            epoch=self._telemetry_epoch,
            seq=number,
            first=0,
            at=self.now().wall_us,
            windows=windows,
            memory_available_bytes=self.facts.memory_bytes // 2,
            disk_free_bytes=self.facts.disk_free_bytes,
        )
        while len(self._telemetry) > TELEMETRY_HELD_MAX:
            del self._telemetry[min(self._telemetry)]

    # --- link -------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Keep a connection until cancelled: back-off with jitter after each loss."""
        wait_s = RECONNECT_MIN_S
        while True:
            connection = await self._connect()
            if connection is not None:
                began_s = time.monotonic()
                self.connection = connection
                try:
                    await connection.closed
                finally:
                    self.connection = None
                    connection.close()
                self._tally.connections_lost += 1
                if time.monotonic() - began_s > RECONNECT_MAX_S:
                    wait_s = RECONNECT_MIN_S
            await asyncio.sleep(wait_s * (0.5 + self._random.random()))
            wait_s = min(RECONNECT_MAX_S, wait_s * 2)

    async def _connect(self) -> Connection | None:
        device = self.identity.device

        def make() -> Connection:
            return Connection(
                device,
                username=device,
                password="",
                filters={topics.down(device, "offer"): 1, topics.down(device, "ack"): 0},
                on_ready=self._ready,
                on_message=self._on_message,
            )

        with contextlib.suppress(OSError, TimeoutError):  # tried again by the caller, after a wait
            async with asyncio.timeout(CONNECT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    make, self.identity.broker_host, self.identity.broker_port
                )
            return connection
        return None

    def _ready(self) -> None:
        """The broker took the subscriptions: say hello, then what is owed."""
        self._tally.connections += 1
        for outbox in self._outboxes.values():
            outbox.forget()
        self._publish("hello", wire.encode(self.hello()))
        self.turn(s.Connected())
        self._send(time.monotonic())

    def hello(self) -> Hello:
        """Return what this device has and knows."""
        state, now = self.state, self.now()
        offer = state.offer
        return Hello(
            format=wire.FORMAT,
            device=self.identity.device,
            at=now.wall_us,
            boot=self.boot,
            agent=AGENT,
            offer_epoch=offer.epoch if offer is not None else 0,
            offer_serial=offer.serial if offer is not None else 0,
            facts=self.facts,
            running=machine.running(state),
            streams={
                "report": (state.stream, state.owed[0].seq if state.owed else state.seq, state.seq),
                "telemetry": (
                    self._telemetry_epoch,
                    min(self._telemetry, default=self._telemetry_next),
                    self._telemetry_next,
                ),
            },
        )

    def _publish(self, kind: topics.Up, payload: bytes) -> bool:
        connection, identity = self.connection, self.identity
        if connection is None:
            return False
        frame = frames.seal(identity.mac_key, kind, identity.device, payload)
        return connection.publish(topics.up(identity.device, kind), frame, qos=1)

    def _send(self, now_s: float) -> None:
        if self.connection is None or not self.connection.ready:
            return
        reports = {report.seq: report for report in machine.outgoing(self.state)}
        for number in self._outboxes["report"].due(reports, now_s, self._random.random()):
            self._tally.reports_sent += self._publish("report", wire.encode(reports[number]))
        if self._telemetry:
            first = min(self._telemetry)
            for number in self._outboxes["telemetry"].due(sorted(self._telemetry), now_s, self._random.random()):
                message = wire.encode(_with_first(self._telemetry[number], first))
                self._tally.telemetry_sent += self._publish("telemetry", message)

    def _on_message(self, topic: str, payload: bytes) -> None:
        """A message came down; one that is not what it claims is counted and changes nothing."""
        if topic == topics.down(self.identity.device, "offer"):
            self._on_offer(payload)
        else:
            self._on_ack(payload)

    def _on_offer(self, envelope: bytes) -> None:
        try:
            payload = dsse.verify(dsse.OFFER_TYPE, envelope, self._keys.verifiers)
            offer = wire.parse(Offer, payload)
        except RefusedError as error:
            self._tally.offers_refused += 1
            if error.code == "key_unknown":
                self._keys.unknown()
            return
        if offer.device != self.identity.device or offer.project != self.identity.project:
            self._tally.offers_refused += 1
            return
        self._tally.offers += 1
        digest = "sha256:" + hashlib.sha256(payload).hexdigest()
        self.turn(s.Offered(offer, digest, self.hands.trust(self.now())))

    def _on_ack(self, frame: bytes) -> None:
        try:
            payload = frames.unseal(self.identity.mac_key, "ack", self.identity.device, frame)
            ack = wire.parse(Ack, payload)
        except RefusedError:
            self._tally.acks_refused += 1
            return
        if ack.stream == "report":
            self.turn(s.Acked(ack.epoch, ack.seq))
        elif ack.epoch == self._telemetry_epoch:
            self._telemetry = {number: held for number, held in self._telemetry.items() if number > ack.seq}
        if ack.logs and ack.logs != self._logs_sent:
            self._logs_sent = ack.logs
            self._on_logs(self)


def _with_first(message: Telemetry, first: int) -> Telemetry:
    return Telemetry(
        **{name: getattr(message, name) for name in Telemetry.__struct_fields__ if name != "first"}, first=first
    )
