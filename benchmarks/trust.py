"""What trust costs a device: bytes and CPU of a poll among 10,000 releases of 1, 4 and 10 publishers; and enrolments per minute.

A real server's repository is filled with 10,000 signed targets, then something is published, again and again. The device's own code
(`wherry_agent.trust`, what the courier runs) refreshes and looks a release and its policy up through a relay that counts every byte
in both directions, HTTP heads included:

- cold: a device that knows the first root only;
- warm: one that was up to date before the publish;
- idle: nothing new, what `wherry_agent.timestamp` asks every five minutes.

CPU is that of the device's thread alone, without process start; starting a courier until its first answer is reported apart. Enrolments go
to a whole `wherry serve api` on SQLite with `synchronous=FULL`, with a key and a CSR of its own for each.

Run: `make bench NAME=trust`; smaller: `python benchmarks/trust.py --targets 500 --rounds 2 --enrolments 50`.
Writes `build/bench/trust.json`. Aims: warm 20 KB, cold 30 KB, idle 1 KB, 25 ms of CPU, 1,000 enrolments per minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.trust_kit import FACTS, RunningServer, Workstation, digest, release, running_server  # noqa: E402
from tuf.api.metadata import Metadata, Targets  # noqa: E402

from wherry_agent import processes, timestamp  # noqa: E402
from wherry_agent.children import Trust as Word  # noqa: E402
from wherry_agent.courier_http import Http  # noqa: E402
from wherry_agent.disk import Disk  # noqa: E402
from wherry_agent.trust import Keeper, Known  # noqa: E402
from wherry_server.ceremony import Ceremony  # noqa: E402
from wherry_shared import key_files  # noqa: E402
from wherry_simulators.enrolment import Enroller  # noqa: E402

OUT = ROOT / "build" / "bench" / "trust.json"
LAYOUTS = ((1, 8), (4, 6), (10, 4))
"""Publishers, and bits of each: as many bins as a project's 256 allow."""
TARGETS = 10_000
ROUNDS = 7
ENROLMENTS = 500
TOGETHER = 16
"""Enrolments under way at one time."""
S = 1_000_000


class Relay:
    """Passes TCP on and counts what goes through."""

    def __init__(self, port: int) -> None:
        self.bytes = 0
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(near,), daemon=True).start()

    def _pass(self, near: socket.socket) -> None:
        with near, socket.create_connection(self._to) as far:
            other = {near: far, far: near}
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(65_536)
                    if not data:
                        return
                    self.bytes += len(data)
                    other[ready].sendall(data)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


class Device:
    """The trust folder of one device."""

    def __init__(self, home: Path, server: RunningServer, relay: Relay) -> None:
        self.home = home
        self.relay = relay
        self.digest = server.trust.root_digest
        self.word = Word(current=0, floors={}, time_floor_us=0, expires_at=0)
        (home / "trust").mkdir(parents=True)
        (home / "trust" / "root.json").write_bytes(server.trust.metadata("1.root.json"))

    def poll(self, target: str) -> Poll:
        """Refresh and look a release up; return what that took."""
        before, began = self.relay.bytes, time.thread_time()
        keeper = Keeper(
            self.home,
            Disk(),
            root_digest=self.digest,
            metadata_url=f"{self.relay.url}/tuf/default",
            http=Http(),
            known=Known(self.word.current, dict(self.word.floors), self.word.time_floor_us),
            wall_us=int(time.time() * S),
        )
        with keeper.online() as session:
            session.director_keys()
            assert session.manifest_of(target) is not None
            session.policy(target.partition("/")[0])
            self.word = keeper.commit(session)
        took_ms = 1000 * (time.thread_time() - began)
        time.sleep(0.05)  # the relay has counted what was answered last
        return Poll(self.relay.bytes - before, took_ms)


class Poll(NamedTuple):
    """What a refresh with a look-up took."""

    bytes: int
    cpu_ms: float


def fill(server: RunningServer, folder: Path, publishers: int, bits: int, targets: int) -> list[Workstation]:
    """Delegate to publishers and let them release `targets` in all, each bin signed once."""
    held = Ceremony(folder / "ceremony")
    offline = key_files.load(server.settings.trust_folder / "keys" / "targets.pem")
    made = []
    for number in range(publishers):
        workstation = Workstation(f"publisher{number}")
        now = datetime.now(UTC)
        roots, current = server.trust.offline()
        held.load(roots, current, server.trust.root_digest)
        keys = [signer.public_key for signer in workstation.signers]
        held.publisher(now, workstation.name, keys, [f"model{number}"], 1, bits)
        held.sign(offline, now)
        server.trust.accept_offline(*held.whole(now))
        held.hold()
        assert server.trust.accept_bin(workstation.name, workstation.role(bits=bits), 0) == "accepted"
        paths = [f"model{number}/1.{index}.0" for index in range(targets // publishers)]
        bins: dict[str, dict[str, str]] = {}
        succinct = Metadata[Targets].from_bytes(workstation.role(bits=bits)).signed.delegations.succinct_roles
        for path in paths:
            bins.setdefault(succinct.get_role_for_target(path), {})[path] = digest(path)
        for role, releases in sorted(bins.items()):
            assert server.trust.accept_bin(role, workstation.bin(1, releases), 0) == "accepted"
        made.append(workstation)
    return made


def publish(server: RunningServer, workstation: Workstation, target: str) -> None:
    """Release one more version."""
    role, version, data = server.trust.bin_for(target)
    content = Metadata[Targets].from_bytes(data).signed
    content.targets[target] = release(target, digest(target))
    content.version = version + 1
    assert server.trust.accept_bin(role, workstation.sign(content), version) == "accepted"


def polls(folder: Path, publishers: int, bits: int, targets: int, rounds: int) -> dict[str, Any]:
    """Measure one layout."""
    with running_server(folder / "data") as server:
        workstations = fill(server, folder, publishers, bits, targets)
        relay = Relay(server.settings.port)
        cold, warm, idle = [], [], []
        old = Device(folder / "old", server, relay)
        old.poll("model0/1.0.0")
        for number in range(rounds):
            target = f"model{number % publishers}/2.{number}.0"
            publish(server, workstations[number % publishers], target)
            warm.append(old.poll(target))
            cold.append(Device(folder / f"new{number}", server, relay).poll(target))
            before = relay.bytes
            etag = f'"{httpx.get(f"{server.url}/tuf/default/timestamp.json").headers["ETag"].strip(chr(34))}"'
            assert timestamp.ask(old.home, relay.url, "/tuf/default", etag).unchanged
            time.sleep(0.05)
            idle.append(relay.bytes - before)
        relay.close()
    return {
        "publishers": publishers,
        "bins_each": 2**bits,
        "warm_bytes": round(statistics.median(poll.bytes for poll in warm)),
        "cold_bytes": round(statistics.median(poll.bytes for poll in cold)),
        "idle_bytes": max(idle),
        "warm_cpu_ms": round(statistics.median(poll.cpu_ms for poll in warm), 1),
        "cold_cpu_ms": round(statistics.median(poll.cpu_ms for poll in cold), 1),
    }


def child_start_ms(rounds: int) -> float:
    """Return how long a courier takes from its start to an answer that needs nothing done."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        command = processes.command("wherry_agent.courier")
        subprocess.run(command, input=b"{}", env=processes.environment(), check=True, stdout=subprocess.DEVNULL)
        took.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(took), 1)


def enrolments_per_min(folder: Path, count: int) -> float:
    """Enrol devices at a whole server, and return how many a minute holds."""
    with running_server(folder / "data") as server:
        pass  # it made the folder, the tokens and the schema
    command = [sys.executable, "-m", "wherry_server.cli", "serve", "api", "--data", str(server.settings.data)]
    api = subprocess.Popen([*command, "--port", str(server.settings.port)])
    try:
        answers(server.url)
        return asyncio.run(_enrol(server.url, server.enrolment_token, count))
    finally:
        api.kill()
        api.wait()


def answers(url: str) -> None:
    """Wait until a server does."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/api/v1/health").is_success:
                return
        except httpx.HTTPError:
            assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.1)


async def _enrol(url: str, token: str, count: int) -> float:
    gate = asyncio.Semaphore(TOGETHER)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        enroller = Enroller(client, token, "bench")

        async def one(number: int) -> None:
            async with gate:
                await enroller.enrol(f"bench-{number}", {}, FACTS)

        await one(-1)
        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(count)))
        return round(60 * count / (time.perf_counter() - began), 1)


def measured(folder: Path, targets: int, rounds: int, enrolments: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything."""
    layouts = []
    for publishers, bits in LAYOUTS:
        layouts.append(polls(folder / f"of-{publishers}", publishers, bits, targets, rounds))
        tell(json.dumps(layouts[-1]))
    return {
        "targets": targets,
        "poll_bytes_10k_targets": max(one["warm_bytes"] for one in layouts),
        "poll_cold_bytes_10k_targets": max(one["cold_bytes"] for one in layouts),
        "poll_idle_bytes": max(one["idle_bytes"] for one in layouts),
        "poll_cpu_ms_10k_targets": max(one["warm_cpu_ms"] for one in layouts),
        "poll_cold_cpu_ms_10k_targets": max(one["cold_cpu_ms"] for one in layouts),
        "poll_child_start_ms": child_start_ms(rounds),
        "enrolments_per_min": enrolments_per_min(folder / "enrolling", enrolments),
        "layouts": layouts,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=TARGETS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--enrolments", type=int, default=ENROLMENTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), asked.targets, asked.rounds, asked.enrolments, print)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
