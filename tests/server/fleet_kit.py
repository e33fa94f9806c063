"""A fleet for tests of director and ingest: a database, keys, and devices that speak frames and obey offers.

The devices keep to the wire (streams, frames, offers) but take a bundle's behaviour from a table; what a real agent does
is tested where real agents are.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import namedtuple
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import insert, text
from sqlmodel import SQLModel

from wherry_server import rollouts
from wherry_server.blob_folder import FolderBlobs
from wherry_server.conductor import Conductor
from wherry_server.db.database import Database
from wherry_server.db.tables import Bundle, Device
from wherry_server.ingest import Ingest
from wherry_server.lease import Lease
from wherry_server.offers import Composer
from wherry_server.services import Services
from wherry_server.settings import Settings
from wherry_shared import dsse, frames, ids, wire
from wherry_shared.clock import Now

PROJECT = "default"
MODEL = "file-type"
Behaviour = Literal["good", "idle", "bad", "mute", "stuck", "disk", "floor"]


def manifest_of(version: str) -> str:
    """The manifest digest that tests give a version."""
    return "sha256:" + version.replace(".", "").ljust(64, "0")


@dataclass
class FakeDevice:
    """A device: streams, what runs, and what it does with each bundle."""

    id: str
    key: bytes
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    """By version; `good` where nothing is said."""
    running: str = ""
    epoch: str = "e1"
    seq: int = 0
    acked: int = 0
    owed: list[wire.Report] = field(default_factory=list)
    known: tuple[int, int] = (0, 0)
    offered: dict[str, int] = field(default_factory=dict)
    """Manifest → how many different offers named it."""
    online: bool = True
    clock: int = 0
    flags: dict[str, Any] = field(default_factory=dict)
    agrees: float = 1.0
    """Share of a shadow's runs."""
    flips: bool = True
    """Whether a blue-green that stood by also answers."""
    measured: int = 0
    """Messages of telemetry."""

    def frame(self, kind: str, message: msgspec.Struct) -> bytes:
        return frames.seal(self.key, kind, self.id, wire.encode(message))

    def hello(self) -> bytes:
        running = {MODEL: self.running} if self.running else {}
        return self.frame(
            "hello",
            wire.Hello(
                format=1,
                device=self.id,
                at=self.tick(),
                boot="b",
                agent="0.1.0",
                offer_epoch=self.known[0],
                offer_serial=self.known[1],
                running=running,
                streams={"report": (self.epoch, self.first, self.seq + 1)},
            ),
        )

    def tick(self) -> int:
        """Its clock, which no two hellos read alike."""
        self.clock += 1
        return self.clock

    @property
    def first(self) -> int:
        return self.owed[0].seq if self.owed else self.seq + 1

    def report(self, state: str, offered: wire.OfferedModel, **more: Any) -> None:
        """Owe a report."""
        self.seq += 1
        self.owed.append(
            wire.Report(
                format=1,
                device=self.id,
                epoch=self.epoch,
                seq=self.seq,
                first=1,
                at=1,
                model=MODEL,
                state=state,  # type: ignore[arg-type]
                target=offered.target,
                manifest=offered.manifest,
                running=self.running,
                rollout=offered.rollout,
                attempt=offered.attempt,
                serial=self.known[1],
                **more,
            )
        )

    def owed_frames(self) -> list[bytes]:
        first = self.first
        return [self.frame("report", msgspec.structs.replace(report, first=first)) for report in self.owed]

    def take_ack(self, frame: bytes) -> None:
        """Forget what is acknowledged, of this epoch only."""
        ack = wire.parse(wire.Ack, frames.unseal(self.key, "ack", self.id, frame))
        if ack.stream == "report" and ack.epoch == self.epoch:
            self.acked = max(self.acked, ack.seq)
            self.owed = [report for report in self.owed if report.seq > ack.seq]

    def take_offer(self, envelope: bytes) -> bool:
        """Obey an offer if it is newer; tell whether it was."""
        offer = wire.parse(wire.Offer, dsse.open_envelope(envelope)[1])
        assert offer.device == self.id
        if (offer.epoch, offer.serial) <= self.known:
            return False
        self.known = (offer.epoch, offer.serial)
        self.flags = offer.flags
        offered = offer.models.get(MODEL)
        if offered is None:
            return True
        self.offered[offered.manifest] = self.offered.get(offered.manifest, 0) + 1
        if offered.mode == "none":
            self.running = ""
            self.report("removed", offered)
        elif offered.manifest == self.running:
            self.report("confirmed", offered)
        else:
            self.try_out(offered)
        return True

    def try_out(self, offered: wire.OfferedModel) -> None:
        before = self.running
        behaviour = self.behaviours.get(offered.target.split("/")[1], "good")
        match behaviour:
            case "mute":
                return
            case "stuck":
                self.report("fetching", offered, incumbent=before)
            case "disk":
                self.report("refused", offered, reason="disk_full", incumbent=before)
            case "floor":
                self.report("refused", offered, reason="below_floor", incumbent=before)
            case "good" if offered.mode == "blue_green" and offered.share == 1 and not self.flips:
                self.report("returned", offered, reason="health_errors", incumbent=before, errors=5)
            case "bad":
                self.running = offered.manifest
                self.report("trial", offered, incumbent=before)
                self.running = before
                self.report("returned", offered, reason="health_errors", incumbent=before, errors=5)
            case "good" | "idle" if offered.mode in ("shadow", "split"):
                self.report("trial", offered, incumbent=before)
                runs = {"compared": 100, "agreed": round(100 * self.agrees)} if offered.mode == "shadow" else {}
                self.report("compared", offered, incumbent=before, mode=offered.mode, trial_end="time", **runs)
            case "good" | "idle" if offered.mode == "blue_green" and offered.share == 0:
                self.report("standby", offered, incumbent=before, mode=offered.mode)
            case "good" | "idle":
                self.running = offered.manifest
                self.report("trial", offered, incumbent=before)
                state = "confirmed" if behaviour == "good" else "confirmed_idle"
                self.report(state, offered, incumbent=before, requests=25)


@dataclass
class Fleet:
    """A server side without processes: the conductor's turns are taken by hand, at times that the test says."""

    services: Services
    conductor: Conductor
    ingest: Ingest
    devices: dict[str, FakeDevice]
    seconds: float = 0.0

    @property
    def database(self) -> Database:
        return self.services.database

    async def enrol(
        self, count: int, *, version: str = "", simulated: bool = False, arch: str = "x86_64", **labels: str
    ) -> list[FakeDevice]:
        """Enrol devices, which run `version` already if one is given."""
        made = []
        for _ in range(count):
            device = ids.new_device_id()
            found = FakeDevice(device, frames.device_key(self.services.master_key, device))
            found.running = manifest_of(version) if version else ""
            made.append(found)
        await enrol_rows(self.database, [one.id for one in made], labels=labels, simulated=simulated, arch=arch)
        self.devices.update({one.id: one for one in made})
        await self.say_hello(made)
        return made

    async def say_hello(self, devices: Iterable[FakeDevice]) -> None:
        result = await self.ingest.store_batch({"hello": [(one.id, one.hello()) for one in devices]})
        self.conductor.stored(result)

    async def publish(self, *versions: str) -> None:
        """Accept bundles, without their blobs."""
        async with self.database.write() as connection:
            await connection.execute(
                insert(Bundle),
                [
                    {
                        "project_id": PROJECT,
                        "model": MODEL,
                        "version": version,
                        "manifest": manifest_of(version),
                        "manifest_bytes": 1,
                        "config": {},
                        "total_bytes": 1,
                        "created_at": 1,
                        "created_by": "test",
                    }
                    for version in versions
                ],
            )

    async def roll_out(self, version: str, **wish: Any) -> int:
        """Create and start a rollout; return its number."""
        whom = {} if {"device", "cohort", "selector"} & set(wish) else {"selector": "all"}
        made = await rollouts.create(
            self.database,
            PROJECT,
            "test",
            {
                "models": [{"model": MODEL, "version": version}],
                "stages": [{"share": 1.0}],
                "start": True,
                **whom,
                **wish,
            },
        )
        number: int = made["number"]
        return number

    async def show(self, number: int) -> dict[str, Any]:
        async with self.database.read() as connection:
            return await rollouts.show(connection, PROJECT, number, fresh_s=0)

    async def command(self, number: int, command: Any) -> None:
        await rollouts.command(self.database, PROJECT, "test", number, command)

    async def rows(self, sql: str, **named: Any) -> list[Any]:
        """Read; JSON is text, as SQLite keeps it."""
        async with self.database.read() as connection:
            result = await connection.execute(text(sql), named)
            kind = namedtuple("Row", result.keys(), rename=True)  # type: ignore[misc]  # noqa: PYI024 - known only now
            return [kind(*(_text(value) for value in row)) for row in result]

    def elsewhere(self, sql: str, **named: Any) -> None:
        """Write as another process would, while this one is in the middle of something."""

        async def write() -> None:
            other = Database.open(self.services.settings.database_url)
            try:
                async with other.write() as connection:
                    await connection.execute(text(sql), named)
            finally:
                await other.close()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: asyncio.run(write())).result()

    async def turn(self, seconds: float = 1.0) -> None:
        """Let time pass, the director take a turn, and every device that is online obey and report."""
        self.seconds += seconds
        for known in self.conductor._known.values():
            known.scanned_at = known.condemn_at = -1e9  # what a scan may cost is not what these tests are about
        await self.conductor.reconcile()
        await self.conductor.turn()
        await self.exchange()

    async def exchange(self) -> None:
        """Deliver offers and reports of the devices that are online."""
        envelopes = {row.device_id: row.envelope for row in await self.rows("SELECT device_id, envelope FROM offer")}
        spoken = []
        for device in self.devices.values():
            if device.online:
                if device.id in envelopes:
                    device.take_offer(bytes(envelopes[device.id]))
                spoken += [(device.id, frame) for frame in device.owed_frames()]
        result = await self.ingest.store_batch({"report": spoken})
        for name, frame in result.acks:
            self.devices[name].take_ack(frame)
        self.conductor.stored(result)

    async def until(self, number: int, *states: str, turns: int = 40) -> dict[str, Any]:
        """Take turns until a rollout is in one of `states`."""
        for _ in range(turns):
            found = await self.show(number)
            if found["state"] in states and not found["wanted"]:
                return found
            await self.turn()
        raise AssertionError(f"after {turns} turns: {found['state']} {found['reason']} {found['why_not_yet']}")


def _text(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict | list) else value


async def enrol_rows(
    database: Database,
    devices: list[str],
    *,
    labels: dict[str, str] | None = None,
    simulated: bool = False,
    arch: str = "x86_64",
) -> None:
    """Insert device rows as enrolment does."""
    facts = {
        "arch": arch,
        "engines": [{"name": "onnxruntime", "version": "1.32.0", "formats": ["onnx"]}],
    }
    async with database.write() as connection:
        await connection.execute(
            insert(Device),
            [
                {
                    "id": one,
                    "project_id": PROJECT,
                    "name": f"d-{one}",
                    "labels": labels or {},
                    "facts": facts,
                    "bearer_hash": "",
                    "key_digest": one,
                    "enrolled_at": 1,
                    "simulated": simulated,
                }
                for one in devices
            ],
        )


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    """A fleet on a new or used database in `folder`."""
    settings = Settings.load(folder, project=PROJECT)
    folder.mkdir(parents=True, exist_ok=True)
    database = Database.open(settings.database_url)
    async with database.engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    services = Services(
        settings=settings,
        database=database,
        blobs=FolderBlobs(settings.blobs_folder),
        trust=cast("Any", SimpleNamespace(director_keyid="key", director_since_us=0)),
        authority=cast("Any", None),
        project=PROJECT,
        master_key=secrets.token_bytes(32),
        proxy_secret="",
    )
    signer = Ed25519PrivateKey.generate()
    lease = Lease(database, PROJECT, "director")
    assert await lease.hold()
    conductor = Conductor(services, lease, Composer(PROJECT, "key", signer.sign))
    made = Fleet(services, conductor, Ingest(database, services.master_key, PROJECT), {})
    conductor.clock = lambda: Now("boot", 10_000_000 + int(made.seconds * 1000), 1_700_000_000 + made.seconds)
    try:
        yield made
    finally:
        await database.close()


def run(work: Any) -> Any:
    """Run a coroutine function's work in a loop of its own."""
    return asyncio.run(work)
