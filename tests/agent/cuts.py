"""The real agent with the power switch in a test's hand: every durable step of every process, one after the other.

`Grid` is the outside world: a TUF repository with three releases over real HTTP. `Cut` is the real `Daemon` on a home, with
the courier's real functions in a forked process, the real journal, store and trust; only what holds no durable state is
played: the broker, the engine (which still hashes what it is told to serve), and the canary. `python -m tests.agent.cuts`
is a fork server, so that imports are paid once: for each point it restores a home, runs a scenario until the named step,
kills, and lets a new process take up what is left, look at it, and go on to the scenario's end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import pickle
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from tests.agent.builders import arm
from wherry_agent import children, courier, courier_blobs, identity, journal, machine, store
from wherry_agent import state as s
from wherry_agent.answering.intact import check_weights, read_golden_bytes
from wherry_agent.daemon import Daemon
from wherry_agent.disk import Disk, Step
from wherry_agent.identity import Identity
from wherry_agent.sealing import Seal, opened
from wherry_agent.settings import Settings
from wherry_shared import reasons, wire
from wherry_shared.bundle import parse_config, parse_manifest
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, WherryError
from wherry_shared.facts import DeviceFacts, EngineFacts
from wherry_shared.wire import Offer, OfferedModel, Report, Trial
from wherry_simulators.disk import Loss, Recorder, Taken, tries

MODEL = "thing"
DEVICE = "d" * 22
FACTS = DeviceFacts(arch="x86_64", engines=[EngineFacts(name="onnxruntime", version="1.32.0", formats=["onnx"])])
POINT_S = 60.0
"""A child that takes longer on a busy machine hangs."""
HANGS = -1
SEALS: list[Seal] = []
"""With what every disk here seals its records; empty: it does not."""
LOSS_CUTS = 1
"""Cuts of a scenario in the short form of `losses`."""
LOSS_TORN = 2
DRIVE_S = 45.0


def disk_with(hook: Callable[[Step, Path], None] | None = None) -> Disk:
    """Return a disk that seals if that is asked for."""
    return Disk(hook, SEALS[0] if SEALS else None)


def state_in(record: bytes) -> s.State:
    """Return the state that a journal's file holds."""
    return journal.decode(opened(SEALS[0] if SEALS else None, journal.PLACE, record).data)


# --- the world outside ----------------------------------------------------------------------------


class Grid:
    """Three releases of one model on a static server; release k is the newest below `/k`. Needs the server's packages."""

    def __init__(self, folder: Path) -> None:
        import zstandard

        from tests.trust_kit import Workstation, assets_of, little_server, with_publisher, write_bundle
        from wherry_server.trust import Trust
        from wherry_shared import dsse

        self.folder = folder
        self.trust = Trust.create_dev(folder / "trust")
        self._sign = dsse.sign
        self._offer_type = dsse.OFFER_TYPE
        workstation = with_publisher(self.trust, Workstation())
        self.manifests: list[str] = []
        self._metadata: list[dict[str, bytes]] = []
        self.resumed = 0
        """Answers that began in the middle of a blob."""
        self._blobs: dict[str, bytes] = {}
        self._infos: dict[str, bytes] = {}
        noise = random.Random(0)
        for number in (1, 2, 3):
            weights = noise.randbytes(90_000)
            if number == 2:  # compresses, so that it comes as an encoded object
                weights = noise.randbytes(700) * 200
            assets = assets_of({"labels.txt": b"cat\ndog\n" * number, "tables/mel.bin": noise.randbytes(3000)})
            root = folder / f"v{number}"
            manifest = write_bundle(root, f"{number}.0.0", model=MODEL, weights=weights, assets=assets)
            self.manifests.append(manifest)
            blobs = {path.name: path.read_bytes() for path in (root / "blobs" / "sha256").iterdir()}
            length = len(blobs[manifest[7:]])
            workstation.publish(self.trust, f"{MODEL}/{number}.0.0", manifest, length=length)
            self._blobs |= blobs
            packed = zstandard.ZstdCompressor().compress(weights)
            encodings = []
            if len(packed) < len(weights):
                self._blobs[of_bytes(packed)[7:]] = packed
                encodings = [wire.Encoding(encoding="zstd", digest=of_bytes(packed), bytes=len(packed))]
            info = wire.BlobInfo(digest=of_bytes(weights), bytes=len(weights), encodings=encodings)
            self._infos[of_bytes(weights)[7:]] = wire.encode(info)
            names = {path.name for path in (folder / "trust" / "metadata").glob("*.json")} | {"timestamp.json"}
            self._metadata.append({name: self.trust.metadata(name) for name in names})
        self._stack = contextlib.ExitStack()
        self.url = self._stack.enter_context(little_server(self._answer)).url

    def _answer(self, path: str, headers: dict[str, str]) -> Any:
        from tests.trust_kit import Answer, blob_answer

        release, _, rest = path[1:].partition("/")
        name = rest.rpartition("/")[2]
        if rest.startswith("tuf/"):
            data = self._metadata[int(release) - 1].get(name)
            if data is None:
                return Answer(404)
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            return Answer(304 if headers.get("if-none-match") == tag else 200, data, {"ETag": tag})
        digest = rest.removeprefix("device/v1/blobs/").removesuffix("/info").removeprefix("sha256:")
        if rest.endswith("/info"):
            info = self._infos.get(digest)
            return Answer(404) if info is None else Answer(200, info)
        blob = self._blobs.get(digest)
        self.resumed += blob is not None and headers.get("range", "bytes=0-") != "bytes=0-"
        return Answer(404) if blob is None else blob_answer(blob, f'"sha256:{digest}"', headers)

    def offer(self, serial: int, version: int) -> bytes:
        """Return an envelope that offers a release; version 0 removes the model."""
        now = int(time.time() * 1e6)
        terms = Trial(min_requests=5, max_s=600, restarts_max=9)  # recoveries are cut too
        model = OfferedModel(target="", manifest="", mode="none", rollout=f"r{serial}")
        if version:
            model = OfferedModel(
                target=f"{MODEL}/{version}.0.0",
                manifest=self.manifests[version - 1],
                rollout=f"r{serial}",
                trial=terms,
            )
        offer = Offer(
            format=1,
            device=DEVICE,
            project="default",
            epoch=1,
            serial=serial,
            issued_at=now,
            expires_at=now + 3600 * 1_000_000,
            models={MODEL: model},
        )
        return self._sign(self._offer_type, wire.encode(offer), self.trust.director_keyid, self.trust.director_sign)

    def describe(self) -> dict[str, Any]:
        """Return what the fork server has to know, as JSON values."""
        return {
            "url": self.url,
            "manifests": self.manifests,
            "root": self.trust.metadata("1.root.json").decode(),
            "root_digest": self.trust.root_digest,
            "offers": {
                str(version): self.offer(serial, version).decode() for serial, version in ((1, 1), (2, 2), (3, 3))
            },
            "remove": self.offer(9, 0).decode(),
        }

    def close(self) -> None:
        self._stack.close()


# --- an agent ---------------------------------------------------------------------------------------


class Counted:
    """Counts the steps of all processes of one agent, in memory that they share, and ends them before one of them."""

    TEXT = 16

    def __init__(self, *, at: int = -1, only: str = "") -> None:
        self._shared = mmap.mmap(-1, 4096)
        self._at = at
        self._only = only
        self.names: list[str] = []
        """Steps of this process; only whole in a run without forked couriers."""

    @property
    def count(self) -> int:
        """Steps so far."""
        return int(struct.unpack_from("q", self._shared)[0])

    @property
    def cut(self) -> str:
        """Role, step and file at which it was cut; empty if it was not."""
        return self._shared[self.TEXT :].rstrip(b"\0").decode() if self._shared[8] else ""

    def hook(self, role: str) -> Callable[[Step, Path], None]:
        def before(step: Step, path: Path) -> None:
            if self._only and role != self._only:
                return
            number = self.count
            if number == self._at and not self._shared[8]:
                text = f"{role} {step} {name_of(path)}".encode()[:4000]
                self._shared[self.TEXT : self.TEXT + len(text)] = text
                self._shared[8] = 1
                if self._only:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.killpg(0, signal.SIGKILL)
            struct.pack_into("q", self._shared, 0, number + 1)

        return before


class Worker:
    """The engine's part: reads and hashes every file that it is told to serve, as the real one does, and runs nothing."""

    def __init__(self, say: Callable[[s.Event], None]) -> None:
        self._say = say
        self.serving: dict[str, children.ServeModel] = {}
        self.pid = 0

    def start(self) -> None:
        self._say(s.WorkerReady())

    def restart(self) -> None:
        self.serving = {}
        self._say(s.WorkerReady())

    def send(self, message: children.WorkerCommand) -> None:
        if isinstance(message, children.Serve):
            before, self.serving = self.serving, {}
            for model in message.models:
                reason = detail = ""
                try:
                    whole(model.active)
                    self.serving[model.name] = model
                except WherryError as error:
                    reason, detail = error.code, str(error)
                    if model.name in before:
                        self.serving[model.name] = before[model.name]
                self._say(s.Served(model.name, model.active.digest, message.revision, not reason, reason, detail))
        elif isinstance(message, children.RunGolden):
            self._say(s.GoldenChecked(message.model, message.digest, message.trial, passed=True))


def whole(loadable: children.Loadable) -> None:
    """Check every byte that belongs to a version, and that all of it is of one bundle: never a mixture.

    Raises:
        WherryError: something is missing, altered, or of another bundle.
    """
    check_weights(loadable)
    read_golden_bytes(loadable, 1 << 20)
    blobs = Path(loadable.path).parent
    manifest_data = _blob(blobs, loadable.manifest)
    manifest = parse_manifest(manifest_data)
    config = parse_config(_blob(blobs, manifest.config.digest))
    variant = next(item for item in config.variants if item.id == loadable.variant)
    ours = (Path(loadable.config_path).name, loadable.digest[7:], Path(loadable.golden_path).name)
    theirs = (manifest.config.digest[7:], variant.digest[7:], variant.golden.digest[7:])
    if ours != theirs or f"{config.model}/{config.version}" != loadable.target:
        raise DeviceError("mixed", f"{loadable.target} is made of {ours}, its bundle of {theirs}")
    if config.assets is not None:
        folder = Path(loadable.assets_path)
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        found.pop(".complete")
        if {name: of_bytes(data) for name, data in found.items()} != {a.path: a.digest for a in config.assets.files}:
            raise DeviceError("mixed", f"the assets of {loadable.target} are {sorted(found)}")


def _blob(folder: Path, digest: str) -> bytes:
    data = (folder / digest[7:]).read_bytes()
    if of_bytes(data) != digest:
        raise DeviceError(reasons.DIGEST_MISMATCH, f"{digest} is altered")
    return data


class Link:
    """The way to a server that stores reports in a file and acknowledges them, in order, as the real one does."""

    def __init__(self, heard: Path, acked: Callable[[str, int], None]) -> None:
        self._heard = heard
        self._acked = acked
        self.is_up = True
        self.way = "test"
        self.hellos: list[wire.Hello] = []

    def publish(self, kind: str, payload: bytes) -> None:
        if kind == "hello":
            self.hellos.append(wire.parse(wire.Hello, payload))
        if kind == "report":
            report = wire.parse(wire.Report, payload)
            with self._heard.open("ab") as file:
                file.write(payload + b"\n")
            self._acked(report.epoch, report.seq)

    def nudge(self) -> None:
        pass

    def ask_offer(self) -> None:
        pass


class NoTelemetry:
    """Telemetry has its own tests; it may lose whole windows."""

    epoch, first, next = "t", 1, 1

    def add(self, message: wire.Telemetry) -> None:
        pass

    def held(self, count: int) -> list[int]:
        return []

    def message(self, seq: int) -> None:
        pass


class NoHandles:
    """No application uses models in its own process."""

    def leases(self) -> set[str]:
        return set()


class Cut(Daemon):
    """The real supervisor without sockets, threads and waiting."""

    def __init__(self, world: World, version: int, disk_of: Callable[[str], Disk], *, inline: bool = False) -> None:
        url = f"{world.url}/{version}"
        super().__init__(Settings(home=str(world.home), server=url), disk=disk_of("supervisor"))
        self.world = world
        self._disk_of = disk_of
        self._inline = inline
        self._facts = FACTS
        self.link = Link(world.heard, lambda epoch, seq: self._queue.put(s.Acked(epoch, seq)))
        self.worker = Worker(self._queue.put)
        self._link = self.link  # type: ignore[assignment]
        self._worker = self.worker  # type: ignore[assignment]
        self._buffer = NoTelemetry()  # type: ignore[assignment]
        self._handles = NoHandles()  # type: ignore[assignment]

    def boot(self) -> None:
        """What `run` does, without what listens."""
        effects = self._take_up()
        self._worker.start()
        for effect in effects:
            self._run(effect)
        self._say_hello()

    def _courier(
        self, key: str, task: children.CourierTask, done: Callable[[children.CourierAnswer], None], *_: Any
    ) -> None:
        def run() -> children.CourierAnswer:
            if not self._inline:
                os.close(self._lock_file or -1)  # a real courier inherits no descriptors
            return courier.run(task, lambda _: None, disk=self._disk_of("courier"))

        answer = run() if self._inline else forked(run)
        self._queue.put(lambda: done(answer))

    def _serve(self, effect: s.Serve) -> None:
        self._worker.send(children.Serve(revision=effect.revision, models=list(effect.models)))

    def _refresh(self) -> None:
        self._trust_task("!refresh", lambda: self._refresh_by_courier(""))

    def _judge(self, effect: s.Judge) -> None:
        item = effect.candidate
        try:
            whole(item)
            result = children.Judged(passed=True, vectors=1)
        except WherryError as error:
            result = children.Judged(passed=False, reason=error.code, detail=str(error))
        done = s.CanaryDone(effect.model, item.manifest, effect.attempt, item.digest, result)
        self._queue.put(done)

    # --- what tests look at ---

    @property
    def slot(self) -> s.Slot:
        return self._state.models.get(MODEL, s.Slot())

    @property
    def running(self) -> str:
        """Manifest of what the worker serves."""
        serving = self.worker.serving.get(MODEL)
        return serving.active.manifest if serving is not None else ""

    def drive(self, until: Callable[[], bool], nudge: Callable[[], None] = lambda: None) -> None:
        """Take turns until `until`; waits of the machine are skipped."""
        deadline = time.monotonic() + DRIVE_S
        while not (until() and self._queue.empty()):
            assert time.monotonic() < deadline, f"no end in sight: {self.slot.phase}"
            if not self._queue.empty():
                item = self._queue.get()
                if callable(item):
                    item()
                else:
                    self._turn(item)
                continue
            for name in ("journal", "verify"):
                if name in self._timers:
                    self._timers.pop(name)[1]()
            if isinstance(self.slot.phase, s.Waiting):
                self._skip_wait()
            else:
                nudge()
            if self._queue.empty():
                self._turn(s.Tick())

    def _skip_wait(self) -> None:
        phase = self.slot.phase
        assert isinstance(phase, s.Waiting)
        assert phase.reason in (reasons.CHILD_FAILED, reasons.NETWORK), phase
        slot = replace(self.slot, phase=replace(phase, wait_ms=0))
        self._state = replace(self._state, models={**self._state.models, MODEL: slot})

    def settle(self) -> None:
        """Let everything that is known be done, until the worker answered for all that it serves."""
        self.drive(lambda: self._state.told is None and not self._state.owed)

    def measure(self) -> None:
        """Let the candidate have answered enough requests."""
        phase = self.slot.phase
        if isinstance(phase, s.OnTrial):
            item = phase.job.loadable
            counts = arm("1.0.0", model=MODEL, requests=50)
            stats = msgspec.structs.replace(counts, manifest=item.manifest, digest=item.digest, trial=phase.trial)
            self._turn(s.Measured(MODEL, phase.trial, stats, None))

    def condemn(self) -> None:
        """Let the application call the candidate wrong."""
        phase = self.slot.phase
        if isinstance(phase, s.OnTrial):
            digest = phase.job.loadable.digest
            self._turn(s.Condemned(MODEL, digest, phase.trial, reasons.APPLICATION, "wrong answers"))


def forked(run: Callable[[], children.CourierAnswer]) -> children.CourierAnswer:
    """Run a courier's task in a process of its own; one that dies gives no answer."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            data = children.encode_line(run())
            while data:
                data = data[os.write(writer, data) :]
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    if not data:
        return children.Failed(reason=reasons.CHILD_FAILED, detail="the courier ended", retry_after_s=0)
    return msgspec.json.decode(data, type=children.CourierAnswer)


# --- scenarios --------------------------------------------------------------------------------------


@dataclass
class World:
    """A home in a workbench, and what the server beside it knows."""

    bench: Path
    url: str
    manifests: list[str]
    root: str
    root_digest: str
    offers: dict[str, str]
    remove: str

    @property
    def home(self) -> Path:
        return self.bench / "home"

    @property
    def heard(self) -> Path:
        """Every report that reached the server, one a line."""
        return self.bench / "heard"

    def enrol(self) -> None:
        """Make a home as enrolment leaves it."""
        disk = disk_with()
        shutil.rmtree(self.home, ignore_errors=True)
        self.heard.unlink(missing_ok=True)
        for folder in (identity.folder(self.home), self.home / "trust"):
            disk.mkdir(folder)
        disk.write_atomic(self.home / "trust" / "root.json", self.root.encode())
        known = Identity(
            format=1,
            device=DEVICE,
            project="default",
            name="lamp",
            server=self.url,
            root_digest=self.root_digest,
            tuf_path="/tuf/default",
            bearer="b",
            mac_key="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            broker_host="127.0.0.1",
            broker_port=1,
        )
        identity.write(self.home, disk, known)

    def save(self, name: str) -> None:
        """Keep home and server as they are now.

        How often the machine fell while the home was made is forgotten: two more cuts of a point would be held against
        what it trusts (ADR 17), and that is not what is asked here.
        """
        target = self.bench / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.home, target / "home", symlinks=True)
        record = target / "home" / "journal.json"
        if record.exists():
            kept = record.read_bytes()
            data = journal.encode(replace(state_in(kept), falls=None))
            record.write_bytes(
                SEALS[0].close(journal.PLACE, data, SEALS[0].open(journal.PLACE, kept).number) if SEALS else data
            )
        if self.heard.exists():
            shutil.copyfile(self.heard, target / "heard")

    def restore(self, name: str) -> None:
        """Put back what `save` kept."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.heard.unlink(missing_ok=True)
        shutil.copytree(self.bench / name / "home", self.home, symlinks=True)
        if (self.bench / name / "heard").exists():
            shutil.copyfile(self.bench / name / "heard", self.heard)

    def reports(self) -> list[Report]:
        """Return what the server heard."""
        if not self.heard.exists():
            return []
        return [wire.parse(wire.Report, line) for line in self.heard.read_bytes().splitlines()]


@dataclass(frozen=True)
class Scenario:
    """A stretch of an agent's life that is cut everywhere."""

    name: str
    start: str
    """Which kept home it begins on."""
    version: int
    """The newest release on the server."""
    run: Callable[[Cut], None]
    allowed: tuple[int, ...]
    """Releases that may serve after a cut; 0 stands for none."""
    ends: int
    """The release that serves in the end; 0: none."""
    end: Callable[[Cut], None]
    """Go on to the end from wherever a cut left it."""
    known_bad: bool = False


def offered(agent: Cut, version: int) -> None:
    """Hand in the offer of a release, as a server does that hears a hello without it."""
    envelope = agent.world.offers[str(version)] if version else agent.world.remove
    known = agent._state.offer
    if known is None or known.serial < (version or 9):
        agent._offer(envelope.encode(), from_server=True)


def to_trial(agent: Cut, version: int) -> None:
    manifest = agent.world.manifests[version - 1]
    offered(agent, version)

    def there() -> bool:
        slot = agent.slot
        confirmed = slot.incumbent is not None and slot.incumbent.manifest == manifest
        return isinstance(slot.phase, s.OnTrial) or confirmed

    agent.drive(lambda: there() and not agent._state.owed, lambda: offered(agent, version))


def to_confirmed(agent: Cut, version: int) -> None:
    manifest = agent.world.manifests[version - 1]
    to_trial(agent, version)

    def done() -> bool:
        incumbent = agent.slot.incumbent
        confirmed = incumbent is not None and incumbent.manifest == manifest and isinstance(agent.slot.phase, s.Idle)
        return confirmed and agent._state.told is None and not agent._state.owed and not agent._collect

    agent.measure()
    agent.drive(done, agent.measure)


def to_returned(agent: Cut) -> None:
    def done() -> bool:
        state = agent._state
        return isinstance(agent.slot.phase, s.Idle) and bool(state.known_bad) and state.told is None and not state.owed

    offered(agent, 2)
    agent.drive(lambda: done() or isinstance(agent.slot.phase, s.OnTrial), lambda: offered(agent, 2))
    agent.condemn()
    agent.drive(done, agent.condemn)


def to_removed(agent: Cut) -> None:
    def done() -> bool:
        gone = agent.slot.incumbent is None and isinstance(agent.slot.phase, s.Idle)
        return gone and agent._state.told is None and not agent._state.owed and not agent._collect

    offered(agent, 0)
    agent.drive(done, lambda: offered(agent, 0))


def tidy(agent: Cut) -> None:
    agent.drive(lambda: agent._state.told is None and not agent._state.owed and not agent._collect)


SCENARIOS = (
    Scenario("first install", "enrolled", 1, lambda a: to_trial(a, 1), (0, 1), 1, lambda a: to_confirmed(a, 1)),
    Scenario("install", "one", 2, lambda a: to_trial(a, 2), (1, 2), 2, lambda a: to_confirmed(a, 2)),
    Scenario("confirm", "trial", 2, lambda a: to_confirmed(a, 2), (1, 2), 2, lambda a: to_confirmed(a, 2)),
    Scenario("return", "trial", 2, to_returned, (1, 2), 1, to_returned, known_bad=True),
    Scenario("collect", "third", 3, lambda a: to_confirmed(a, 3), (2, 3), 3, lambda a: to_confirmed(a, 3)),
    Scenario("resume", "partial", 3, lambda a: to_trial(a, 3), (2, 3), 3, lambda a: to_confirmed(a, 3)),
    Scenario("decode again", "decoding", 2, lambda a: to_trial(a, 2), (1, 2), 2, lambda a: to_confirmed(a, 2)),
    Scenario("remove", "one", 1, to_removed, (0, 1), 0, to_removed),
)


def prepare(world: World) -> None:
    """Make the homes on which scenarios begin, each by the agent itself."""
    plain = lambda _role: disk_with()  # noqa: E731
    world.enrol()
    world.save("enrolled")
    for name, version, run in (
        ("one", 1, lambda a: to_confirmed(a, 1)),
        ("trial", 2, lambda a: to_trial(a, 2)),
        ("two", 2, lambda a: to_confirmed(a, 2)),
        ("third", 3, lambda a: to_trial(a, 3)),
    ):
        agent = Cut(world, version, plain)
        agent.boot()
        run(agent)
        os.close(agent._lock_file or -1)
        world.save(name)
    litter(world.bench / "third" / "home")
    interrupted(world, "two", 3, "partial")
    interrupted(world, "one", 2, "decoding")


def interrupted(world: World, start: str, version: int, name: str) -> None:
    """Make a home whose courier died when a file that grows was synced for the first time."""
    world.restore(start)

    class Stopped(BaseException):
        pass

    def stop(step: Step, path: Path) -> None:
        if step == "fsync_folder" and any(path.glob("*.part.json")):
            raise Stopped

    def install() -> None:
        agent = Cut(world, version, lambda role: disk_with(stop if role == "courier" else None))
        agent.boot()
        offered(agent, version)
        agent.drive(lambda: isinstance(agent.slot.phase, s.Waiting))

    code = in_child(install, world.bench / "notes")
    assert code == 0, f"no partial download: {code}"
    (record,) = (world.home / "store/blobs/sha256").glob("*.part.json")
    kept = msgspec.json.decode(record.read_bytes())
    assert 0 < kept["synced"] <= kept["length"]
    assert (kept["sources"] == ["zstd"]) == (name == "decoding"), kept
    assert (kept["synced"] == kept["length"]) == (name == "decoding"), kept
    world.save(name)


def litter(home: Path) -> None:
    """Leave behind what killed processes of earlier lives leave."""
    blobs = home / "store" / "blobs" / "sha256"
    for name in ("a" * 64, "b" * 64 + ".part", "b" * 64 + ".part.json", "." + "c" * 64 + ".77.tmp"):
        (blobs / name).write_bytes(b"left over")
    folder = home / "store" / "assets" / ("e" * 64)
    (folder / "sub").mkdir(parents=True)
    for name in (".complete", "x", "sub/y"):
        (folder / name).write_bytes(b"left over")
    for path in (home / ".journal.json.77.tmp", home / "trust" / ".unknown-key.77.tmp"):
        path.write_bytes(b"left over")
    (home / "trust" / ".scratch").mkdir()
    (home / "trust" / ".scratch" / "timestamp.json").write_bytes(b"torn")


# --- one point --------------------------------------------------------------------------------------


def in_child(run: Callable[[], None], output: Path) -> int:
    """Run something in a process group of its own and wait until all of it is gone; return the wait status."""
    alive, held = os.pipe()  # ends when the last process of the group does
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(alive)
            os.setpgid(0, 0)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(held)
    hangs = not select.select([alive], [], [], POINT_S)[0]
    if hangs:
        os.killpg(pid, signal.SIGKILL)
    os.close(alive)
    status = os.waitpid(pid, 0)[1]
    return HANGS if hangs else status


def check(agent: Cut, before: s.State, scenario: Scenario) -> None:
    """What holds right after a start: a verified model of those allowed, and true words about it."""
    world = agent.world
    agent.drive(lambda: agent._state.told is None)
    manifests = {0: "", **dict(enumerate(world.manifests, start=1))}
    allowed = {manifests[number] for number in scenario.allowed}
    assert agent.running in allowed, f"serves {agent.running or 'nothing'} after the cut"
    truthful(agent, before)


def truthful(agent: Cut, before: s.State) -> None:
    """Compare what the agent says with what is."""
    for served in agent.worker.serving.values():
        whole(served.active)
    running = {name: served.active.manifest for name, served in agent.worker.serving.items()}
    assert machine.running(agent._state) == running
    hello = wire.parse(wire.Hello, agent._hello())
    assert hello.running == running
    said: dict[tuple[str, int], Report] = {}
    for report in (*agent.world.reports(), *agent._state.owed):
        plain = msgspec.structs.replace(report, first=0)
        assert said.setdefault((report.epoch, report.seq), plain) == plain, f"two reports {report.seq}"
    stream, count = agent._state.stream, agent._state.seq - 1
    assert {seq for epoch, seq in said if epoch == stream} == set(range(1, count + 1)), "a report is missing"
    assert agent._state.stream == before.stream
    for report in before.owed:
        assert (report.epoch, report.seq) in said, f"report {report.seq} was owed and is lost"


def after(world: World, scenario: Scenario, disk_of: Callable[[str], Disk]) -> None:
    """Take up what a cut left."""
    record = (world.home / "journal.json").read_bytes() if (world.home / "journal.json").exists() else None
    before = state_in(record) if record is not None else None
    agent = Cut(world, scenario.version, disk_of)
    agent.boot()
    check(agent, before or agent._state, scenario)
    scenario.end(agent)
    at_the_end(agent, before or agent._state, scenario)


def at_the_end(agent: Cut, before: s.State, scenario: Scenario) -> None:
    """What holds at a scenario's end, whatever happened on the way."""
    world = agent.world
    wanted = world.manifests[scenario.ends - 1] if scenario.ends else ""
    assert agent.running == wanted
    assert isinstance(agent.slot.phase, s.Idle)
    truthful(agent, before)
    bad = [item.reason for item in agent._state.known_bad]
    assert bad == (["application"] if scenario.known_bad else []), bad
    told = agent.slot.told
    if told is not None:
        assert told.running == agent.running
    for _ in range(2):  # the first may be the one that is cut
        agent._refresh()
        agent.drive(lambda: not agent._trust_busy)
    agent._collect = True
    agent._collect_now()
    left = sorted(str(path.relative_to(world.home)) for path in world.home.rglob("*"))
    litter = [name for name in left if ".tmp" in name or ".part" in name or ".scratch" in name or name.endswith(".bad")]
    assert not litter, litter
    keep = {digest[7:] for digest in agent._needed()}
    for folder in ("store/blobs/sha256", "store/assets"):
        extra = {path.name for path in (world.home / folder).glob("*")} - keep
        assert not extra, f"nobody needs {sorted(extra)}"


MODES = ("power", "courier")
"""Everything dies at once, or the courier alone and the supervisor goes on."""


@dataclass(frozen=True)
class Outcome:
    """What became of one point."""

    scenario: str
    mode: str
    at: int
    cut: str = ""
    """Role, step and file at which it was cut; empty: the run had no such step."""
    error: str = ""


def point(world: World, scenario: Scenario, at: int, mode: str, again: int = -1) -> Outcome:
    """Cut one run before step `at`, then see what a new process makes of it; with `again` that one is cut as well."""
    world.restore(scenario.start)
    notes = world.bench / "notes"
    only = "courier" if mode == "courier" else ""
    counted = Counted(at=at, only=only)

    def run() -> None:
        agent = Cut(world, scenario.version, lambda role: disk_with(counted.hook(role)))
        agent.boot()
        scenario.run(agent)
        if only:
            scenario.end(agent)
            at_the_end(agent, agent._state, scenario)

    status = in_child(run, notes)
    expected = 0 if only or not counted.cut else signal.SIGKILL
    if status != expected:
        return Outcome(scenario.name, mode, at, counted.cut, f"status {status}\n{notes.read_text(errors='replace')}")
    if only or not counted.cut:
        return Outcome(scenario.name, mode, at, counted.cut)
    if again >= 0:
        second = Counted(at=again)
        in_child(lambda: after(world, scenario, lambda role: disk_with(second.hook(role))), notes)
    status = in_child(lambda: after(world, scenario, lambda _role: disk_with()), notes)
    error = "" if status == 0 else f"status {status}\n{notes.read_text(errors='replace')}"
    return Outcome(scenario.name, mode, at, counted.cut, error)


def steps_of(world: World, scenario: Scenario) -> list[str]:
    """Return the steps of an uncut run, in order: role, step and kind of file."""
    world.restore(scenario.start)
    steps, notes = world.bench / "steps", world.bench / "notes"
    steps.unlink(missing_ok=True)

    def hook(role: str) -> Callable[[Step, Path], None]:
        def note(step: Step, path: Path) -> None:
            with steps.open("a", encoding="utf-8") as file:
                file.write(f"{role} {step} {name_of(path)}\n")

        return note

    def run() -> None:
        agent = Cut(world, scenario.version, lambda role: disk_with(hook(role)))
        agent.boot()
        scenario.run(agent)

    status = in_child(run, notes)
    assert status == 0, f"{scenario.name} does not run uncut: {notes.read_text(errors='replace')}"
    return steps.read_text(encoding="utf-8").splitlines()


def sample(steps: list[str], mode: str, source: random.Random) -> list[int]:
    """Choose one step of each kind (create, fsync, rename …) at random; where only the courier dies, one in all."""
    if mode == "courier":
        return [source.randrange(len(steps))] if steps else []
    kinds: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        kinds.setdefault(step.split()[1], []).append(number)
    return sorted(source.choice(numbers) for numbers in kinds.values())


def record(world: World, scenario: Scenario) -> tuple[list[Taken], list[int]]:
    """Return the steps of an uncut run, and how much the server had heard before each.

    Of a process that is gone afterwards, as the one is that a power cut ended: files that bear its number have no owner.
    """
    notes, taken = world.bench / "notes", world.bench / "taken"

    def run() -> None:
        recorder = Recorder(world.home, lambda: world.heard.stat().st_size if world.heard.exists() else 0)
        recorder.seal = SEALS[0] if SEALS else None
        agent = Cut(world, scenario.version, lambda _role: recorder, inline=True)
        agent.boot()
        scenario.run(agent)
        taken.write_bytes(pickle.dumps((recorder.steps, recorder.marks)))

    status = in_child(run, notes)
    assert status == 0, f"{scenario.name} does not run uncut: {notes.read_text(errors='replace')}"
    steps, marks = pickle.loads(taken.read_bytes())
    return steps, marks


def losses(world: World, scenario: Scenario, extent: str) -> Iterator[Outcome]:
    """Let a disk keep what it may at every cut of a run (or at some, if `extent` is a seed), and take it up."""
    world.restore(scenario.start)
    before = world.bench / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(world.home, before, symlinks=True)
    steps, marks = record(world, scenario)
    heard = world.heard.read_bytes() if world.heard.exists() else b""
    seen: set[str] = set()
    source = random.Random(f"{extent}/{scenario.name}")
    whole_run = extent == "whole"
    some = range(len(steps)) if whole_run else sorted(source.sample(range(len(steps)), LOSS_CUTS))
    for cut in some:
        taken = steps[cut]
        loss = Loss(before, world.home, steps, cut)
        for variant, chance in tries(steps, cut, torn=LOSS_TORN if whole_run else 1, seed=scenario.name):
            loss.materialise(world.home, variant, chance)
            known = heard[: marks[cut]]
            look = fingerprint(world.home) + hashlib.sha256(known).hexdigest()
            if look in seen:
                continue
            seen.add(look)
            world.heard.write_bytes(known)
            notes = world.bench / "notes"
            status = in_child(lambda: after(world, scenario, lambda _role: disk_with()), notes)
            error = "" if status == 0 else f"status {status}\n{notes.read_text(errors='replace')}"
            yield Outcome(scenario.name, variant.name, cut, f"agent {taken.step} {name_of(taken.path)}", error)


def fingerprint(home: Path) -> str:
    """Return what tells two homes apart."""
    sha = hashlib.sha256()
    for path in sorted(home.rglob("*")):
        data = path.read_bytes() if path.is_file() else b"folder"
        sha.update(f"{path.relative_to(home)} {hashlib.sha256(data).hexdigest()}\n".encode())
    return sha.hexdigest()


def name_of(path: Path) -> str:
    """Return the kind of a file, for counting: digests and numbers differ from run to run."""
    name = path.name
    for suffix in (".part.json", ".part", ".tmp"):
        if name.endswith(suffix):
            return f"{path.parent.name}/*{suffix}"
    if len(name) == 64:
        return f"{path.parent.name}/*"
    return name


# --- all of them ------------------------------------------------------------------------------------


def main() -> None:
    """Fork server: BENCH (with `world.json`), `whole` or a seed, `kills` or `losses`, `sealed` or not; a JSON line per point."""
    bench, extent, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if sys.argv[4:] == ["sealed"]:
        SEALS.append(Seal(bytes(range(32)), "on"))
    store.SYNC_BYTES = 32 * 1024  # so that a small download is synced on its way as a large one is
    courier_blobs.CHUNK_BYTES = 16 * 1024
    world = World(bench=bench, **json.loads((bench / "world.json").read_bytes()))
    prepare(world)
    for scenario in SCENARIOS:
        for outcome in (losses if kind == "losses" else kills)(world, scenario, extent):
            sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
            sys.stdout.flush()


def kills(world: World, scenario: Scenario, extent: str) -> Iterator[Outcome]:
    """Kill a run before every step, or before one of each kind if `extent` is a seed."""
    source = random.Random(f"{extent}/{scenario.name}")
    steps = steps_of(world, scenario)
    for mode in MODES:
        ours = [step for step in steps if mode == "power" or step.startswith("courier")]
        numbers = list(range(len(ours))) if extent == "whole" else sample(ours, mode, source)
        for number in numbers:
            again = source.randrange(len(steps)) if extent == "whole" and mode == "power" else -1
            yield point(world, scenario, number, mode, again)


def run_points(bench: Path, extent: str, *, losses: bool = False, sealed: bool = False) -> Iterator[Outcome]:
    """Try points in a fork server of its own; `extent` is `whole` or the seed of a sample; `sealed`: with a key at rest."""
    grid = Grid(bench / "grid")
    try:
        (bench / "world.json").write_text(json.dumps(grid.describe()), encoding="utf-8")
        argv = [sys.executable, "-m", "tests.agent.cuts", str(bench), extent, "losses" if losses else "kills"]
        argv += ["sealed"] if sealed else []
        with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as server:
            assert server.stdout is not None
            for line in server.stdout:
                yield Outcome(**json.loads(line))
        assert server.returncode == 0, "the fork server failed"
        assert grid.resumed, "no download went on where it was interrupted"
    finally:
        grid.close()


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return points and failures, in all and by scenario."""
    tried = [outcome for outcome in outcomes if outcome.cut or outcome.error]
    by = {
        name: {
            "points": sum(outcome.scenario == name for outcome in tried),
            "failed": sum(outcome.scenario == name and bool(outcome.error) for outcome in tried),
        }
        for name in dict.fromkeys(outcome.scenario for outcome in tried)
    }
    steps = Counter(outcome.cut.split()[1] for outcome in tried if outcome.cut)
    failed = sum(bool(outcome.error) for outcome in tried)
    return {"points": len(tried), "failed": failed, "by_scenario": by, "by_step": dict(sorted(steps.items()))}


if __name__ == "__main__":
    main()
