"""Hundreds of simulated devices in one process, against a real server.

Every device enrols over HTTP, holds an MQTT connection of its own and is driven by the real machine (see
`swarm_device` for what is real and what is not). One thread with one event loop carries them all:

    with Swarm(Options(server="http://127.0.0.1:8400", token=token), Behaviours()) as swarm:
        swarm.counts()

Behaviour comes from a table by manifest digest or target; entries may be added while the swarm runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from wherry_agent import machine
from wherry_agent import state as s
from wherry_shared.errors import RefusedError, UnreachableError, WherryError
from wherry_shared.facts import DeviceFacts, EngineFacts
from wherry_simulators.enrolment import ENROL_AT_ONCE, Enroller, Verifier, director_keys
from wherry_simulators.hands import Hands
from wherry_simulators.models import Behaviour, Behaviours
from wherry_simulators.swarm_device import AGENT, SwarmDevice, Tally

BEAT_S = 0.25
START_S = 120.0
"""How long enrolling and connecting may take."""
STOP_S = 10.0
KEYS_REFRESH_S = 60.0
"""Unknown key ids cause at most one refresh in this time."""
DEVICES_MAX = 15_000
"""Open files end near 20,000 per process."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """What a swarm is."""

    server: str
    token: str
    devices: int = 200
    seed: int = 0
    speed: float = 1.0
    """How much faster than real time trials, waits and traffic run on the devices."""
    requests_per_s: float = 20.0
    """Simulated requests per device and model."""
    name: str = "swarm"
    """Devices are called NAME-SEED-NUMBER."""
    labels: dict[str, str] = field(default_factory=dict)
    """Added to `simulated=true` on every device."""

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            RefusedError: `options_invalid`.
        """
        if not 1 <= self.devices <= DEVICES_MAX:
            raise RefusedError("options_invalid", f"{self.devices} devices, expected 1 to {DEVICES_MAX}")
        if not 0.01 <= self.speed <= 1000 or not 0 <= self.requests_per_s <= 10_000:
            raise RefusedError("options_invalid", "speed is 0.01 to 1000, requests_per_s 0 to 10000")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """A swarm at one instant. Everything in it is about simulated devices."""

    simulated: bool = True
    devices: int
    connected: int
    phases: dict[str, int]
    """Phase of the machine → (device, model) pairs."""
    running: dict[str, dict[str, int]]
    """Model → target that answers requests → devices."""
    requests_answered: int
    requests_failed: int
    """Simulated requests that no variant answered."""
    owed_reports: int
    offers: int
    offers_refused: int
    reports_sent: int
    telemetry_sent: int
    connections_lost: int
    steps: int


class Swarm:
    """Simulated devices behind one start and one stop."""

    def __init__(self, options: Options, behaviours: Behaviours | None = None) -> None:
        options.check()
        self.options = options
        self.behaviours = behaviours or Behaviours()
        self.verifiers: dict[str, Verifier] = {}
        self._tally = Tally()
        self._devices: list[SwarmDevice] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._client: httpx.AsyncClient | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keys_asked_s = 0.0
        self._tuf_path = ""

    # --- from outside -----------------------------------------------------------------------------

    def start(self) -> None:
        """Enrol and connect every device; return when all are connected.

        Raises:
            WherryError: what kept the swarm from starting.
        """
        if self._thread is not None:
            raise RuntimeError("a swarm starts once")
        self._thread = threading.Thread(target=self._run, name="swarm", daemon=True)
        self._thread.start()
        if not self._started.wait(START_S):
            self.stop()
            raise UnreachableError(
                "swarm_not_started",
                f"{self._connected()} of {self.options.devices} devices connected within {START_S:.0f} s",
                next_step="look at the server's and the broker's logs",
            )
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self.stop()
            raise failure

    def stop(self) -> None:
        """End all devices; what they did not send is gone, as they keep nothing."""
        if self._loop is not None and self._stopping is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop closed by itself meanwhile
                self._loop.call_soon_threadsafe(self._stopping.set)
        if self._thread is not None:
            self._thread.join(STOP_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def counts(self) -> Counts:
        """Return where the devices are."""
        return self._ask(self._count())

    def behave(self, models: dict[str, Behaviour]) -> None:
        """Add or replace behaviours, by manifest digest or target."""

        async def add() -> None:
            self.behaviours.update(models)

        self._ask(add())

    def device_ids(self) -> list[str]:
        """Return the ids that the server gave."""
        return [device.identity.device for device in self._devices]

    def disconnect(self) -> None:
        """Cut every connection without a goodbye, as a network does; devices come back by themselves."""

        async def cut() -> None:
            for device in self._devices:
                if device.connection is not None:
                    device.connection.abort("cut on purpose")

        self._ask(cut())

    def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or self._loop.is_closed():
            question.close()
            raise RuntimeError("the swarm does not run")
        return asyncio.run_coroutine_threadsafe(question, self._loop).result(STOP_S)

    # --- on the loop ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # carried to whoever started the swarm
            self._failure = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        limits = httpx.Limits(max_connections=ENROL_AT_ONCE)
        async with httpx.AsyncClient(base_url=self.options.server, limits=limits) as client:
            self._client = client
            await self._enrol(client)
            lives = [asyncio.create_task(device.live()) for device in self._devices]
            try:
                await self._beat_until_stopped()
            finally:
                for task in (*lives, *self._tasks):
                    task.cancel()
                await asyncio.gather(*lives, *self._tasks, return_exceptions=True)

    async def _enrol(self, client: httpx.AsyncClient) -> None:
        options = self.options
        source = random.Random(f"swarm/{options.seed}")
        enroller = Enroller(client, options.token, f"{options.name}/{options.seed}")
        labels = {**options.labels, "simulated": "true"}
        names = [f"{options.name}-{options.seed}-{number:04d}" for number in range(options.devices)]
        facts = [_facts(source, labels) for _ in names]
        identities = await asyncio.gather(
            *(enroller.enrol(name, labels, one) for name, one in zip(names, facts, strict=True))
        )
        self._tuf_path = identities[0].tuf_path
        self.verifiers = await asyncio.to_thread(director_keys, options.server, self._tuf_path, options.token)
        for identity, one in zip(identities, facts, strict=True):
            own = random.Random(source.getrandbits(64))
            device = SwarmDevice(
                identity,
                Hands(identity.device, self.behaviours, own),
                self,
                self._tally,
                facts=one,
                source=own,
                speed=options.speed,
                requests_per_s=options.requests_per_s,
                on_logs=self._send_logs,
            )
            self._devices.append(device)
            device.start()

    async def _beat_until_stopped(self) -> None:
        assert self._stopping is not None
        while not self._stopping.is_set():
            now_s = time.monotonic()
            for device in self._devices:
                device.beat(now_s)
            if not self._started.is_set() and self._connected() == len(self._devices):
                self._started.set()
            with contextlib.suppress(TimeoutError):  # the beat
                await asyncio.wait_for(self._stopping.wait(), BEAT_S)

    def _connected(self) -> int:
        return sum(device.connection is not None and device.connection.ready for device in self._devices)

    def unknown(self) -> None:
        """An offer named an unknown key: refresh the metadata, rate-limited."""
        now_s = time.monotonic()
        if now_s - self._keys_asked_s >= KEYS_REFRESH_S:
            self._keys_asked_s = now_s
            self._keep(self._refresh_keys())

    async def _refresh_keys(self) -> None:
        with contextlib.suppress(WherryError):  # the keys known stay valid; the next unknown one asks again
            self.verifiers = await asyncio.to_thread(
                director_keys, self.options.server, self._tuf_path, self.options.token
            )

    def _send_logs(self, device: SwarmDevice) -> None:
        self._keep(self._post_logs(device))

    async def _post_logs(self, device: SwarmDevice) -> None:
        assert self._client is not None
        lines = [f"{AGENT}: a simulated device has no log; this is what its machine knows"]
        lines += [f"{name}: {type(slot.phase).__name__}" for name, slot in device.state.models.items()]
        identity = device.identity
        with contextlib.suppress(httpx.HTTPError):  # the operator asks again
            await self._client.post(
                "/device/v1/logs",
                content=msgspec.json.encode(lines),
                headers={"Authorization": f"Bearer {identity.device}:{identity.bearer}"},
            )

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _count(self) -> Counts:
        phases: Counter[str] = Counter()
        running: dict[str, Counter[str]] = {}
        for device in self._devices:
            for slot in device.state.models.values():
                phases[_phase(slot)] += 1
            worker = device.hands.worker
            for name, loadable in (worker.serving if worker is not None else {}).items():
                running.setdefault(name, Counter())[loadable.target] += 1
        tally = self._tally
        return Counts(
            devices=len(self._devices),
            connected=self._connected(),
            phases=dict(sorted(phases.items())),
            running={name: dict(sorted(counted.items())) for name, counted in sorted(running.items())},
            requests_answered=sum(device.hands.ledger.answered for device in self._devices),
            requests_failed=sum(device.hands.ledger.failed for device in self._devices),
            owed_reports=sum(len(machine.outgoing(device.state)) for device in self._devices),
            offers=tally.offers,
            offers_refused=tally.offers_refused,
            reports_sent=tally.reports_sent,
            telemetry_sent=tally.telemetry_sent,
            connections_lost=tally.connections_lost,
            steps=tally.steps,
        )


def _phase(slot: s.Slot) -> str:
    return type(slot.phase).__name__.lower()


def _facts(source: random.Random, labels: dict[str, str]) -> DeviceFacts:
    """Return facts of a plausible small device; hardware comes in a few kinds, so that strata mean something."""
    arch, cpu, features = source.choice(
        (
            ("aarch64", "simulated Cortex-A72", ["asimd"]),
            ("aarch64", "simulated Cortex-A76", ["asimd", "asimddp"]),
            ("x86_64", "simulated N100", ["avx2"]),
        )
    )
    return DeviceFacts(
        arch=arch,
        os="linux",
        python="3.11",
        agent=AGENT,
        cpu_model=cpu,
        cpu_features=features,
        cores=4,
        memory_bytes=source.choice((2, 4, 8)) * 1024**3,
        disk_free_bytes=8 * 1024**3,
        engines=[EngineFacts(name="onnxruntime", version="1.32.0", formats=["onnx"])],
        labels=labels,
    )
