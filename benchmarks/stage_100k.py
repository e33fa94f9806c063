"""Seconds to put a stage of 100,000 devices into SQLite: members found, assignments written, offers signed and stored.

From the start command to the last offer in the database, by the director's own turns (each judges first, then exposes up
to `EXPOSED_PER_TURN` devices in one transaction, synchronous=FULL).

    python benchmarks/stage_100k.py [--devices 100000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from sqlalchemy import insert, text

from wherry_server import rollouts
from wherry_server.conductor import Conductor
from wherry_server.db import bulk
from wherry_server.db.tables import Bundle, Device, table
from wherry_server.lease import Lease
from wherry_server.offers import Composer
from wherry_server.services import Services, open_services, prepare
from wherry_server.settings import Settings
from wherry_shared import ids

OUT = Path(__file__).parents[1] / "build" / "bench" / "stage_100k.json"
MANIFEST = "sha256:" + "a" * 64
FACTS = json.dumps(
    {"arch": "x86_64", "cores": 4, "engines": [{"name": "onnxruntime", "version": "1.32.0", "formats": ["onnx"]}]}
)
COLUMNS = {
    "state": "active",
    "labels": "{}",
    "facts": FACTS,
    "bearer_hash": "",
    "certificate_serial": "",
    "certificate_expires_at": 0,
    "enrolled_at": 1,
    "last_seen_at": 1,
    "offer_epoch": 0,
    "offer_serial": 0,
    "boot": "",
    "simulated": False,
    "hello_at": 0,
    "trust_version": 0,
    "trust_state": "",
}


async def fill(services: Services, count: int) -> None:
    """Enrol the fleet and accept a bundle."""
    async with services.database.write() as connection:
        names = [ids.new_device_id() for _ in range(count)]
        await bulk.insert_new(
            connection,
            table(Device),
            ("id", "project_id", "name", "key_digest", *COLUMNS),
            [(one, services.project, one, one, *COLUMNS.values()) for one in names],
        )
        await connection.execute(
            insert(Bundle),
            [
                {
                    "project_id": services.project,
                    "model": "file-type",
                    "version": "1.1.0",
                    "manifest": MANIFEST,
                    "manifest_bytes": 1,
                    "config": {"licence": {"expression": "Apache-2.0"}, "variants": []},
                    "total_bytes": 1,
                    "created_at": 1,
                    "created_by": "bench",
                }
            ],
        )


async def measure(services: Services, count: int) -> float:
    """Return the seconds that the stage took."""
    await fill(services, count)
    lease = Lease(services.database, services.project, "director")
    trust = services.trust
    composer = Composer(services.project, *trust.director)
    conductor = Conductor(services, lease, composer)
    wish = {
        "models": [{"model": "file-type", "version": "1.1.0"}],
        "selector": "all",
        "stages": [{"share": 1.0}],
        "start": True,
    }
    await rollouts.create(services.database, services.project, "bench", wish)
    started = time.perf_counter()
    while True:
        await lease.hold()
        if not await conductor.turn():
            break
    seconds = time.perf_counter() - started
    async with services.database.read() as connection:
        assigned = await connection.scalar(text("SELECT count(*) FROM assignment WHERE outcome = 'exposed'"))
        offered = await connection.scalar(text("SELECT count(*) FROM offer WHERE serial = 1"))
    if not assigned == offered == count:
        raise SystemExit(f"{assigned} assigned and {offered} offered of {count}")
    composer.close()
    await services.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=100_000)
    count = parser.parse_args().devices
    with tempfile.TemporaryDirectory(prefix="wherry-bench-") as name:
        settings = Settings.load(Path(name) / "data")
        prepare(settings)
        seconds = asyncio.run(measure(open_services(settings), count))
    print(f"{count} devices assigned, their offers signed and stored, in {seconds:.2f} s")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"stage_100k_s": round(seconds, 2), "devices": count}) + "\n")


if __name__ == "__main__":
    main()
