"""The server at the size of a fleet, on SQLite and on PostgreSQL, every role a process of its own, everything on this machine.

For each database:
- telemetry end to end, as `telemetry_per_s` measures it: devices → mosquitto → ingest → committed and acknowledged;
- a stage of 100,000 devices from the start command to the last offer signed, published to the broker and marked;
- a flag by a rule over a fact and a share, from the command to the last offer with it published and marked; and what the director
  takes of a core meanwhile and afterwards, while nothing changes, without a flag and with it;
- p50 and p99 of ten common calls of the API at that many devices and a million telemetry windows, one caller at a time;
- memory of each role (RSS and PSS) after all of that.

Both keep what they acknowledge: SQLite with `synchronous=FULL`, PostgreSQL as it is installed.

Run: `make bench NAME=server`. Writes `build/bench/server.json`. Needs mosquitto and PostgreSQL (Debian packages of these names).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import uvloop
from sqlalchemy import text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import stage_100k  # noqa: E402 - the path has to be set first
import telemetry_per_s  # noqa: E402
from tests.postgres import Postgres  # noqa: E402

from wherry_server import dev, flag_book, rollouts  # noqa: E402
from wherry_server.db import bulk  # noqa: E402
from wherry_server.db.database import Database  # noqa: E402
from wherry_server.db.tables import TelemetryWindow, table  # noqa: E402
from wherry_server.services import open_services  # noqa: E402
from wherry_server.settings import Settings  # noqa: E402

OUT = ROOT / "build" / "bench" / "server.json"
TELEMETRY_S_MAX = 120.0
STAGE_S_MAX = 300.0
START_S_MAX = 180.0
_PUBLISHED = "SELECT CASE WHEN EXISTS (SELECT 1 FROM unpublished) THEN 0 ELSE (SELECT count(*) FROM offer) END"
"""Offers that the broker has, once it has all of them: counting them meanwhile would cost what is measured."""
ROWS = 20_000
"""Rows of one transaction that fills a table."""
COLUMNS = ("device_id", "epoch", "seq", "position", "project_id", "model", "manifest", "variant", "arm", "rollout_id",
           "attempt", "start", "duration_us", "requests", "errors", "fallbacks", "body")  # fmt: skip


@contextlib.contextmanager
def role(name: str, settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Run a role of the server as a process of its own."""
    command = [sys.executable, "-m", "wherry_server.cli", "serve", name, "--data", str(settings.data)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def broker(settings: Settings, folder: Path) -> Iterator[str]:
    """Run a broker; gives its name."""
    kind, process = telemetry_per_s.start_broker(settings, folder)
    try:
        yield kind
    finally:
        process.kill()
        process.wait()


def made(folder: Path, url: str, publisher: str = "director") -> Settings:
    """Make a server's data folder ready."""
    port = telemetry_per_s.free_port()
    broker_port = telemetry_per_s.free_port()
    settings = Settings.load(folder, database=url, port=port, broker_port=broker_port, publisher=publisher)
    dev.init(settings)
    return settings


async def kept_bytes(settings: Settings) -> int:
    """Return how large the database is."""
    database = Database.open(settings.database_url)
    try:
        if not database.is_sqlite:
            return await scalar(database, "SELECT pg_database_size(current_database())")
        return await scalar(database, "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
    finally:
        await database.close()


def telemetry(folder: Path, url: str, devices: int, messages: int) -> tuple[int, str, int]:
    """Return messages per second, through which broker, and what one takes in the database in bytes."""
    settings = made(folder / "telemetry", url)
    before = asyncio.run(kept_bytes(settings))
    with broker(settings, folder) as kind, role("director", settings):
        measuring = asyncio.wait_for(telemetry_per_s.measure(settings, devices, messages), TELEMETRY_S_MAX)
        seconds, stored = uvloop.run(measuring)
    taken = asyncio.run(kept_bytes(settings)) - before
    return round(stored / seconds), kind, round(taken / (devices * messages))


async def scalar(database: Database, sql: str) -> int:
    """Return one number."""
    async with database.read() as connection:
        return int(await connection.scalar(text(sql)) or 0)


async def fill(settings: Settings, devices: int, windows: int) -> None:
    """Enrol a fleet and give it a past."""
    services = open_services(settings)
    await stage_100k.fill(services, devices)
    async with services.database.read() as connection:
        names = [row[0] for row in await connection.execute(text("SELECT id FROM device"))]
    minute = 60_000_000
    for first in range(0, windows, ROWS):
        rows = []
        for number in range(first, min(first + ROWS, windows)):
            seq = number // devices + 1
            start = 1_700_000_000_000_000 + seq * minute
            key = (names[number % devices], "bench", seq, 0, services.project)
            what = ("file-type", stage_100k.MANIFEST, "int8", "incumbent", "", 0)
            rows.append((*key, *what, start, minute, 120, 0, 0, b"{}"))
        async with services.database.write() as connection:
            await bulk.insert_new(connection, table(TelemetryWindow), COLUMNS, rows)
    if not services.database.is_sqlite:  # what its autovacuum does within minutes of such a change
        async with services.database.write() as connection:
            await connection.execute(text("ANALYZE"))
    await services.close()


def answers(settings: Settings) -> None:
    """Wait until the API answers."""
    deadline = time.monotonic() + START_S_MAX
    with httpx.Client(base_url=settings.url, timeout=START_S_MAX, trust_env=False) as http:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if http.get("/api/v1/health").is_success:
                    return
            if time.monotonic() > deadline:
                raise SystemExit("the API does not start")
            time.sleep(0.05)


async def stage(settings: Settings, devices: int, roles: Mapping[str, subprocess.Popen[bytes]]) -> Taken:
    """Return the seconds from the start command to the last offer that the broker has and that is marked.

    Every role has started by then: what a process takes to import its modules is no part of a stage.
    """
    database = Database.open(settings.database_url)
    deadline = time.monotonic() + START_S_MAX
    while not await scalar(database, "SELECT count(*) FROM lease WHERE epoch > 0"):
        if time.monotonic() > deadline:
            raise SystemExit("the director does not start")
        await asyncio.sleep(0.05)
    await rested(roles, deadline)
    before = {name: cpu_s(process) for name, process in roles.items()}
    wish = {
        "models": [{"model": "file-type", "version": "1.1.0"}],
        "selector": "all",
        "stages": [{"share": 1.0}],
        "start": True,
    }
    started = time.perf_counter()
    await rollouts.create(database, settings.project, "bench", wish)
    while await scalar(database, _PUBLISHED) < devices:
        if time.perf_counter() - started > STAGE_S_MAX:
            raise SystemExit("the stage does not end")
        await asyncio.sleep(0.25)
    seconds = time.perf_counter() - started
    await database.close()
    return Taken(seconds, {name: round(cpu_s(process) - before[name], 2) for name, process in roles.items()})


class Taken(NamedTuple):
    """What a stage took."""

    seconds: float
    cpu_s: dict[str, float]
    """Of each role, in seconds of a processor; the director's has its signing process with it."""


async def rested(roles: Mapping[str, subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait until the roles have started and have nothing to do."""
    while True:
        before = sum(map(cpu_s, roles.values()))
        await asyncio.sleep(RESTED_S)
        if sum(map(cpu_s, roles.values())) - before < RESTED_CORES_MAX * RESTED_S:
            return
        if time.monotonic() > deadline:
            raise SystemExit("the roles do not come to rest")


FLAG = {
    "name": "bench",
    "type": "boolean",
    "variants": {"on": True, "off": False},
    "default": "off",
    "rules": [{"when": "arch = x86_64", "share": 0.5, "variant": "on"}],
}
_FLAGGED = (
    "SELECT CASE WHEN EXISTS (SELECT 1 FROM unpublished) THEN 0 ELSE"
    " (SELECT count(*) FROM offer WHERE CAST(flags AS TEXT) <> '{}') END"
)
RESTED_S = 1.0
RESTED_CORES_MAX = 0.3
"""A second in which all roles together take less than this of a core is one of rest."""
IDLE_S = 20.0
"""So long the director's share of a core is measured."""


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Return the processor seconds that a process and its children have taken."""
    ticks = 0
    for pid in (process.pid, *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def idle(director: subprocess.Popen[bytes]) -> float:
    """Return what share of a core the director takes while nothing changes."""
    before, started = cpu_s(director), time.perf_counter()
    time.sleep(IDLE_S)
    return round((cpu_s(director) - before) / (time.perf_counter() - started), 3)


async def flag(settings: Settings, devices: int) -> float:
    """Return the seconds from making a flag to the last offer with it that the broker has and that is marked."""
    database = Database.open(settings.database_url)
    started = time.perf_counter()
    await flag_book.save(database, settings.project, "bench", FLAG, replace=False)
    while await scalar(database, _FLAGGED) < devices:
        if time.perf_counter() - started > STAGE_S_MAX:
            raise SystemExit("the flag does not arrive")
        await asyncio.sleep(0.25)
    seconds = time.perf_counter() - started
    await database.close()
    return seconds


def flags(settings: Settings, devices: int, director: subprocess.Popen[bytes]) -> dict[str, float]:
    """Measure what a flag costs."""
    without = idle(director)
    before = cpu_s(director)
    seconds = asyncio.run(flag(settings, devices))
    taken = cpu_s(director) - before
    return {
        "brought_s": round(seconds, 2),
        "brought_cpu_s": round(taken, 2),
        "idle_cores_without": without,
        "idle_cores_with": idle(director),
    }


def calls(device: str) -> dict[str, tuple[str, str, Any]]:
    """The ten calls: what operators, consoles and scripts ask most."""
    return {
        "fleet": ("GET", "/api/v1/fleet", None),
        "devices, a page of 100": ("GET", "/api/v1/devices?limit=100", None),
        "devices that match a selector": ("GET", "/api/v1/devices?limit=100&selector=arch%20%3D%20x86_64", None),
        "one device": ("GET", f"/api/v1/devices/{device}", None),
        "rollouts": ("GET", "/api/v1/rollouts", None),
        "one rollout": ("GET", "/api/v1/rollouts/1", None),
        "preview of a cohort": ("POST", "/api/v1/cohorts/preview", {"selector": "arch = x86_64 and cores >= 4"}),
        "bundles": ("GET", "/api/v1/bundles", None),
        "models": ("GET", "/api/v1/models", None),
        "audit": ("GET", "/api/v1/audit", None),
    }


def ask(settings: Settings, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return p50 and p99 in ms of each call, in turns."""
    token = json.loads(settings.client_file.read_text())["token"]
    taken: dict[str, list[float]] = {}
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=settings.url, headers=headers, timeout=120, trust_env=False) as http:
        for number in range(rounds + 1):
            for name, (method, path, body) in calls(device).items():
                started = time.perf_counter()
                answer = http.request(method, path, json=body)
                if number:  # the first round warms
                    taken.setdefault(name, []).append((time.perf_counter() - started) * 1000)
                if not answer.is_success:
                    raise SystemExit(f"{name}: {answer.text[:300]}")
    return {
        name: {"p50": round(statistics.median(times), 1), "p99": round(sorted(times)[int(0.99 * len(times))], 1)}
        for name, times in taken.items()
    }


def memory(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Return resident and proportional set in MB."""
    found = {}
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            found[name.lower()] = round(int(rest.split()[0]) / 1024, 1)
    return found


def measure(folder: Path, urls: tuple[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one database: `urls` of an empty one for telemetry and of another for everything else."""
    rate, kind, size = telemetry(folder, urls[0], options.senders, options.messages)
    print(f"  telemetry: {rate} messages per second through {kind}, {size} bytes each in the database", flush=True)
    settings = made(folder / "fleet", urls[1], options.publisher)
    asyncio.run(fill(settings, options.devices, options.windows))
    with contextlib.ExitStack() as stack:
        stack.enter_context(broker(settings, folder))
        processes = {name: stack.enter_context(role(name, settings)) for name in settings.roles}
        answers(settings)
        seconds, taken = asyncio.run(stage(settings, options.devices, processes))
        print(
            f"  stage of {options.devices}: {seconds:.1f} s to the last offer published and marked, cpu {taken}",
            flush=True,
        )

        async def any_device() -> str:
            database = Database.open(settings.database_url)
            async with database.read() as connection:
                found = str(await connection.scalar(text("SELECT max(id) FROM device")))
            await database.close()
            return found

        answered = ask(settings, asyncio.run(any_device()), options.rounds)
        for name, times in answered.items():
            print(f"  {name}: p50 {times['p50']} ms, p99 {times['p99']} ms", flush=True)
        flagged = flags(settings, options.devices, processes["director"])
        print(f"  a flag for {options.devices}: {flagged}", flush=True)
        rss = {name: memory(process) for name, process in processes.items()}
        print(f"  memory: {rss}", flush=True)
    return {
        "telemetry_per_s": rate,
        "telemetry_bytes": size,
        "broker": kind,
        "stage_s": round(seconds, 2),
        "stage_cpu_s": taken,
        "flags": flagged,
        "calls_ms": answered,
        "memory_mb": rss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=100_000)
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--senders", type=int, default=200, help="devices that send telemetry")
    parser.add_argument("--messages", type=int, default=300, help="of each of them")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each kind")
    parser.add_argument(
        "--publisher", choices=("director", "separate"), default="separate", help="who takes offers to the broker"
    )
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix=f"wherry-bench-{secrets.token_hex(2)}-") as name:
        for backend in ("sqlite", "postgres"):
            print(f"{backend}:", flush=True)
            folder = Path(name) / backend
            folder.mkdir()
            with contextlib.ExitStack() as stack:
                urls = ("", "")
                if backend == "postgres":
                    server = Postgres(durable=True)
                    stack.callback(server.close)
                    urls = (server.empty(), server.empty())
                found[backend] = measure(folder, urls, options)
    result = {
        **{f"telemetry_per_s_{key}": one["telemetry_per_s"] for key, one in found.items()},
        **{f"stage_100k_s_{key}": one["stage_s"] for key, one in found.items()},
        **{f"flag_100k_s_{key}": one["flags"]["brought_s"] for key, one in found.items()},
        "api_p99_ms": max(times["p99"] for one in found.values() for times in one["calls_ms"].values()),
        "rss_mb": {key: {role: used["rss"] for role, used in one["memory_mb"].items()} for key, one in found.items()},
        "devices": options.devices,
        "publisher": options.publisher,
        "windows": options.windows,
        **found,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
