"""The world of virtual time: many devices that run the real machine, one server, one bad network.

A run is a function of (scenario, seed): the trace of every durable turn goes into one hash. Faults stop at a time, and
from then on nobody helps: no restart, no operator, only what devices and server do by themselves within a bound.
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from wherry_agent.children import ServeModel
from wherry_server.plan import Plan, PlannedModel
from wherry_server.rollout import FINAL
from wherry_shared.clock import Now
from wherry_shared.wire import Ack, Hello, OfferedModel, Report
from wherry_simulators.brain import REAL, Brain
from wherry_simulators.campaign import Campaign
from wherry_simulators.checkers import Checkers, Violation
from wherry_simulators.clock import Agenda
from wherry_simulators.device import EPOCH_WALL_S, Device
from wherry_simulators.faults import NONE, Faults
from wherry_simulators.hands import Hands
from wherry_simulators.meter import Meter
from wherry_simulators.models import Behaviours
from wherry_simulators.network import Network
from wherry_simulators.scenario import MODEL, Release, Scenario
from wherry_simulators.server import Server

TURN_MS = 20_000
"""Between two turns of the director."""
QUIET_TURNS = 10
"""Turns in a row in which everything has to be settled before a run ends early."""
START_SPREAD_MS = 60_000


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    scenario: str
    seed: int
    devices: int
    steps: int
    crashes: int
    reports: int
    virtual_s: float
    seconds: float
    trace: str
    """Hash over every durable turn."""
    violations: list[Violation] = field(default_factory=list)
    violation_count: int = 0
    running: dict[str, int] = field(default_factory=dict)
    """Version → devices that run it at the end."""
    states: dict[str, str] = field(default_factory=dict)
    """Version → state in which its rollout ended."""
    messages_sent: int = 0
    messages_lost: int = 0

    @property
    def steps_per_s(self) -> float:
        """Steps of the machine per second of real time."""
        return self.steps / self.seconds if self.seconds else 0.0


def names(devices: int) -> list[str]:
    """Return what so many devices are called."""
    return [f"device-{number:015d}" for number in range(devices)]


class World:
    """One run."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        brain: Brain = REAL,
        devices: int | None = None,
        until_violated: bool = False,
    ) -> None:
        self._until_violated = until_violated
        self.scenario = scenario
        self.seed = seed
        self.agenda: Agenda[Callable[[], None]] = Agenda()
        self.requests_per_s = scenario.requests_per_s
        self._random = random.Random(f"{scenario.name}/{seed}")
        self._calm = replace(NONE, boot_ms=scenario.faults.boot_ms, weather=scenario.faults.weather_after)
        called = names(devices or scenario.devices)
        self._server = Server(called, scenario.offer_life_s)
        self._network = Network(random.Random(self._random.getrandbits(64)))
        self._checkers = Checkers(self._server)
        behaviours = Behaviours({release.manifest: release.behaviour for release in scenario.releases})
        self.devices = {}
        for name in called:
            source = random.Random(self._random.getrandbits(64))
            self.devices[name] = Device(self, name, brain, Hands(name, behaviours, source), source)
        self._meters = {
            release.version: Meter(
                release.plan,
                behaviours,
                self.requests_per_s,
                random.Random(f"{scenario.name}/{seed}/{release.version}"),
            )
            for release in scenario.releases
            if release.plan is not None and release.plan.compared
        }
        self._versions = {one.manifest: one.version for one in scenario.releases if one.model == MODEL}
        self.campaigns: dict[str, Campaign] = {}
        self._waiting = sorted(scenario.releases, key=lambda release: release.at_ms)
        self._silent = False
        self._behaviours = behaviours
        self._quiet_from_ms = max(
            scenario.faults.until_ms,
            scenario.restore_at_ms,
            scenario.rot_at_ms,
            *(max(release.at_ms, release.later_ms) for release in scenario.releases),
            *(at_ms for at_ms, _ in scenario.engines),
            *scenario.power_cuts,
            *scenario.worker_ends,
        )
        self._end_ms = self._quiet_from_ms + scenario.settle_ms
        self._settled_turns = 0
        self._restored = scenario.restore_at_ms == 0

    def run(self) -> Result:
        """Run to the end and return what came of it."""
        began = time.perf_counter()
        for device in self.devices.values():
            self.agenda.at(self._random.randrange(START_SPREAD_MS), lambda one=device: one.boot(power=True))  # type: ignore[misc]
        self.agenda.at(0, self._turn)
        self._plan_ahead()
        collecting = gc.isenabled()
        gc.disable()  # frozen values make no cycles, and looking for some in ten thousand devices takes half of a run
        try:
            self._take_until_the_end()
        finally:
            if collecting:
                gc.enable()
        self._checkers.finish(self.devices.values())
        self._check_ends()
        return self._result(time.perf_counter() - began)

    def _plan_ahead(self) -> None:
        """Put down what happens to every device at a time of its own, whatever the seed."""
        scenario = self.scenario
        for at_ms, version in scenario.engines:
            self.agenda.at(at_ms, lambda one=version: self._replace_engines(one))  # type: ignore[misc]
        for release in scenario.releases:
            if release.later is not None:
                changes = {release.manifest: release.later}
                self.agenda.at(release.later_ms, lambda new=changes: self._behaviours.update(new))  # type: ignore[misc]
        for at_ms in scenario.power_cuts:
            self.agenda.at(at_ms, lambda: self._each(lambda device: device.cut_power()))
        for at_ms in scenario.worker_ends:
            self.agenda.at(at_ms, lambda: self._each(lambda device: device.lose_worker("simulated end of the worker")))
        if scenario.rot_at_ms:
            self.agenda.at(scenario.rot_at_ms, lambda: self._each(lambda device: device.rot()))

    def _each(self, act: Callable[[Device], None]) -> None:
        for device in self.devices.values():
            act(device)

    def _replace_engines(self, version: str) -> None:
        for device in self.devices.values():
            device.hands.files.engine = version
            device.probe()

    @property
    def engines_change(self) -> bool:
        """Whether engines are replaced in this world, so that devices look."""
        return bool(self.scenario.engines)

    @property
    def disks_rot(self) -> bool:
        """Whether disks alter what they hold in this world, so that devices look."""
        return self.scenario.rot_at_ms > 0

    def _take_until_the_end(self) -> None:
        agenda = self.agenda
        while (due_ms := agenda.due_ms) is not None and due_ms <= self._end_ms and self._settled_turns < QUIET_TURNS:
            agenda.take()()
            if self._until_violated and self._checkers.count:
                return

    @property
    def watcher(self) -> Checkers:
        """Who looks on."""
        return self._checkers

    def faults(self) -> Faults:
        """Return what may go wrong now."""
        faults = self.scenario.faults
        return faults if faults.from_ms <= self.agenda.now_ms < faults.until_ms else self._calm

    # --- server -----------------------------------------------------------------------------------

    def _now(self) -> Now:
        return Now("server", self.agenda.now_ms, EPOCH_WALL_S + self.agenda.now_ms / 1000)

    def _turn(self) -> None:
        """One turn of the director; a silent server does nothing in it."""
        self._network.weather = self.faults().weather
        self._silent = self._random.random() < self.faults().server_silent
        if not self._restored and self.agenda.now_ms >= self.scenario.restore_at_ms:
            self._restored = True
            for name, record in self._server.records.items():
                self._server.restore(name, max(0, record.serial - 2))
        for meter in self._meters.values():
            meter.look(self._serving, self._now().wall_us, TURN_MS / 1000)
        if not self._silent:
            self._release()
            for device, envelope in self._server.renew(self._now().wall_us):
                self._downlink_offer(device, envelope)
            for campaign in self.campaigns.values():
                for device, offered in campaign.turn(self._now()):
                    self._desire(device, campaign.model, offered)
        if self.agenda.now_ms >= self._quiet_from_ms and not self._waiting and self._settled():
            self._settled_turns += 1
        else:
            self._settled_turns = 0
        self.agenda.after(TURN_MS, self._turn)

    @property
    def _serving(self) -> dict[str, Mapping[str, ServeModel]]:
        """What every device serves now; of one that is down or silent, nothing."""
        workers = {name: device.hands.worker for name, device in self.devices.items() if not self._cut_off(name)}
        return {name: worker.commands for name, worker in workers.items() if worker is not None}

    def _release(self) -> None:
        """Begin the releases whose time has come; a rollout waits for the one before it."""
        while self._waiting and self._waiting[0].at_ms <= self.agenda.now_ms:
            if any(campaign.progress.state not in FINAL for campaign in self.campaigns.values()):
                return
            release = self._waiting.pop(0)
            if release.stages:
                rollout = f"r{len(self.campaigns) + 1}-{self.seed}"
                self.campaigns[release.version] = Campaign(
                    self._server,
                    release.plan or _plan(release),
                    rollout,
                    members=release.members,
                    meter=self._meters.get(release.version),
                )
            else:
                together = [release, *(other for other in self._waiting if _belongs(other, release))]
                self._waiting = [other for other in self._waiting if other not in together]
                models = {one.model: _offered(one) for one in together}
                for device in self.devices:
                    self._downlink_offer(device, self._server.desire_all(device, models, self._now().wall_us))

    def _desire(self, device: str, model: str, offered: OfferedModel) -> None:
        self._downlink_offer(device, self._server.desire(device, model, offered, self._now().wall_us))

    def _cut_off(self, device: str) -> bool:
        """Tell whether nothing passes between a device and the server now."""
        if device not in self.scenario.silent or self.agenda.now_ms < self.scenario.silent_from_ms:
            return False
        return bool(self._waiting) or any(one.progress.state not in FINAL for one in self.campaigns.values())

    def _downlink_offer(self, device: str, envelope: bytes) -> None:
        for delay_ms in self._network.arrivals():
            self.agenda.after(delay_ms, lambda: self._bring(device, envelope))

    def _bring(self, device: str, envelope: bytes) -> None:
        if not self._cut_off(device):
            self.devices[device].on_offer(envelope)

    def uplink(self, device: str, message: Hello | Report) -> None:
        """Send a device's message on its way."""
        if self._cut_off(device):
            return
        for delay_ms in self._network.arrivals():
            self.agenda.after(delay_ms, lambda: self._hear(device, message))

    def _hear(self, device: str, message: Hello | Report) -> None:
        if self._silent:
            return
        for running in self.campaigns.values():
            running.heard(device, self.agenda.now_ms)
        match message:
            case Hello():
                envelope = self._server.on_hello(device, message, self._now().wall_us)
                if envelope is not None:
                    self._downlink_offer(device, envelope)
            case Report():
                self._checkers.heard(self.devices[device], message)
                ack, new = self._server.on_report(device, message)
                for campaign in self.campaigns.values():
                    if new:
                        campaign.on_report(device, message)
                for delay_ms in self._network.arrivals():
                    self.agenda.after(delay_ms, lambda: self._acknowledge(device, ack))

    def _acknowledge(self, device: str, ack: Ack) -> None:
        if not self._cut_off(device):
            self.devices[device].on_ack(ack)

    # --- the end ----------------------------------------------------------------------------------

    def _settled(self) -> bool:
        if any(campaign.progress.state not in FINAL for campaign in self.campaigns.values()):
            return False
        return not any(self._checkers.not_settled(device) for device in self.devices.values())

    def _version_on(self, device: Device) -> str:
        """Return the version of `MODEL` that a device runs; empty if none."""
        worker = device.hands.worker
        loadable = worker.serving.get(MODEL) if worker is not None else None
        return self._versions.get(loadable.manifest, "?") if loadable is not None else ""

    def _running(self) -> dict[str, int]:
        found = Counter(self._version_on(device) for device in self.devices.values())
        return dict(sorted(found.items()))

    def _check_ends(self) -> None:
        first = next(iter(self.devices.values()))
        for release in self.scenario.releases:
            campaign = self.campaigns.get(release.version)
            if release.stages and campaign is None:
                self._checkers.object("every rollout ends", first, f"{release.version} never began")
            elif campaign is not None:
                state = campaign.progress.state
                if state not in (release.ends or FINAL):
                    self._checkers.object("every rollout ends as it should", first, f"{release.version} is {state}")
        records = self._server.records.values()
        said = {
            word
            for one in records
            for r in one.log
            for word in (r.state, f"{r.state} {r.reason}", f"{r.state} {r.mode}")
        }
        for word in sorted(self.scenario.said - said):
            self._checkers.object("devices say what they should", first, f"none said {word}")
        for word in sorted(self.scenario.unsaid & said):
            self._checkers.object("devices say nothing that they should not", first, f"one said {word}")
        if self.scenario.ends_on:
            for device in self.devices.values():
                version = self._version_on(device)
                if version not in self.scenario.ends_on:
                    self._checkers.object("devices end on what they should", device, f"it runs {version or 'nothing'}")

    def _result(self, seconds: float) -> Result:
        return Result(
            scenario=self.scenario.name,
            seed=self.seed,
            devices=len(self.devices),
            steps=sum(device.steps for device in self.devices.values()),
            crashes=sum(device.crashes for device in self.devices.values()),
            reports=self._checkers.reports,
            virtual_s=self.agenda.now_ms / 1000,
            seconds=seconds,
            trace=self._checkers.trace.hexdigest(),
            violations=self._checkers.violations,
            violation_count=self._checkers.count,
            running=self._running(),
            states={version: campaign.progress.state for version, campaign in self.campaigns.items()},
            messages_sent=self._network.sent,
            messages_lost=self._network.lost,
        )


def _belongs(other: Release, release: Release) -> bool:
    return bool(release.group) and (other.group, other.at_ms) == (release.group, release.at_ms)


def _offered(release: Release) -> OfferedModel:
    return OfferedModel(
        target=release.target,
        manifest=release.manifest,
        mode=release.mode,
        share=release.share,
        attempt=release.attempt,
        rollout=release.rollout or f"to-all-{release.model}-{release.version}",
        group=release.group,
        trial=release.trial,
    )


def _plan(release: Release) -> Plan:
    """Return the plan of a staged release; bounds on silence are wide, since the simulated weather is the subject."""
    return Plan(
        models=[PlannedModel(model=release.model, version=release.version, manifest=release.manifest)],
        selector="all",
        stages=list(release.stages),
        failure=release.failure,
        gates=list(release.gates),
        strategy=release.strategy,
        trial=release.trial,
        attempt=release.attempt,
        silent_s=4 * 3600,
        late_s=6 * 3600,
        stage_max_s=86_400,
        revert_s=43_200,
    )
