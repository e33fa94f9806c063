"""A whole Wherry for tests: `wherry dev` and real agents as child processes, and models that are told apart by what they answer.

Version N.0.0 answers N to everything, so an answer says by itself which model gave it, whatever it claims.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.line import Between, Line
from wherry_agent import identity, journal
from wherry_optimizer.pack import pack_model
from wherry_shared import publishing
from wherry_shared.errors import UnreachableError
from wherry_shared.publishing import PublisherKey, Remote
from wherry_simulators.fleet import Agent, Server
from wherry_simulators.processes import wait_for

MODEL = "constant"
WAIT_S = 120.0
"""How long anything may take on a busy machine; on a quiet one nothing takes a tenth of it."""
REQUEST_S = 15.0
PAUSE_S = 0.04
TRIAL: dict[str, Any] = {
    "min_requests": 30,
    "max_s": 6,
    "latency_ratio_max": 100.0,
    "latency_tail_ratio_max": 100.0,
    "canary_latency_ratio_max": 100.0,
}
"""Short, and about answers rather than speed: these machines are busy with the tests themselves."""
PLAN: dict[str, Any] = {
    "stages": [{"share": 0.5, "confirmed_min": 0}, {"share": 1.0, "confirmed_min": 0}],
    "silent_s": 90,
    "late_s": 90,
    "revert_s": 60,
}
FINAL = ("done", "halted", "aborted", "reverted")


def constant_model(path: Path, value: float, *, ballast_bytes: int = 0) -> Path:
    """Write a model that answers `value` for every element of x: float32, (batch, 4); ballast does not compress."""
    stock = np.random.default_rng(int(value)).integers(0, 256, max(1, ballast_bytes), np.uint8)
    constants = {"zero": np.float32(0), "value": np.float32(value), "first": np.int64(0)}
    nodes = [
        helper.make_node("Gather", ["stock", "first"], ["byte"]),
        helper.make_node("Cast", ["byte"], ["grain"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "grain"], ["moved"]),
        helper.make_node("Mul", ["moved", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "value"], ["y"]),
    ]
    shape = ["batch", 4]
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            *(numpy_helper.from_array(np.array(number), name) for name, number in constants.items()),
            numpy_helper.from_array(stock, "stock"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def infer(port: int, model: str = MODEL, rows: list[list[float]] | None = None) -> tuple[int, dict[str, Any]]:
    """Ask an agent over the Open Inference Protocol; return (status, answer)."""
    rows = rows or [[1.0, 2.0, 3.0, 4.0]]
    shape = [len(rows), len(rows[0])]
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "data": [cell for row in rows for cell in row]}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_S)
    try:
        body = json.dumps({"inputs": [tensor]})
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


class Client:
    """An application that keeps asking one agent, each request on a connection of its own, nothing asked twice."""

    def __init__(self, agent: Agent) -> None:
        self._port = agent.http_port
        self._stop = threading.Event()
        self.answers: Counter[tuple[str, float]] = Counter()
        """(version that the answer claims, what it says) → how often."""
        self.refused = 0
        """Connections that nobody took."""
        self.cut = 0
        """Connections that ended in the middle of a request."""
        self.odd: list[str] = []
        """Everything else that an application should not see."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(REQUEST_S + 5)
        assert not self._thread.is_alive()

    @property
    def count(self) -> int:
        return sum(self.answers.values())

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            try:
                status, answer = infer(self._port)
            except ConnectionRefusedError:
                self.refused += 1
            except (ConnectionError, http.client.HTTPException):
                self.cut += 1
            except (OSError, ValueError) as error:
                self.odd.append(repr(error))
            else:
                if status != 200:
                    self.odd.append(f"{status} {answer}")
                    continue
                for value in set(answer["outputs"][0]["data"]):
                    self.answers[answer["model_version"], value] += 1


class Site:
    """A server, two agents (`near` asks the server itself, `far` through a line and a man in the middle) and a publisher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = Server(folder / "server", folder / "logs")
        self.key = PublisherKey.open(folder / "publisher.pem")
        self.agents: dict[str, Agent] = {}
        self.line: Line | None = None
        self.between: Between | None = None
        self.number = 0
        """Of the newest release."""

    # --- start and end ---

    def start(self) -> Site:
        self.server.start()
        self.between = Between(self.server.address)
        self.between.start()
        self.line = Line(int(self.between.address.rpartition(":")[2]))
        self.add("near", self.server.address)
        self.add("far", self.line.address)
        self.install()
        return self

    def install(self, *names: str) -> str:
        """Bring a new version to the named agents or to all, without an application that asks; return it."""
        version = self.release()
        stages = [{"share": 1.0, "confirmed_min": 0}]
        found = self.end(self.begin(version, *names, trial={"max_s": 1}, stages=stages))
        assert found["state"] == "done", found
        self.wait_settled(version, *names)
        return version

    def add(self, name: str, server: str | None = None, **settings: Any) -> Agent:
        """Start an agent; `settings` go into its agent.toml."""
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)
        (home / "agent.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        logs, token = self.folder / "logs", self.server.token(1)
        agent = Agent(name, home, logs, server or self.server.address, token, {}, ["onnxruntime"])
        self.agents[name] = agent.start()

        def enrolled() -> bool:
            assert agent.child is not None
            if not agent.child.alive():
                raise AssertionError(f"{name} ended by itself:\n{agent.child.tail(40)}")
            with self.server.client() as client:
                return any(one["name"] == name for one in client.get("/api/v1/devices", name=name)["devices"])

        try:
            wait_for(f"{name} to enrol", enrolled, WAIT_S)
        except UnreachableError as error:
            assert agent.child is not None
            raise AssertionError(f"{error}\n{agent.child.tail(40)}") from error
        return agent

    def remove(self, name: str) -> None:
        """Stop an agent, and take the device out of the fleet."""
        agent = self.agents.pop(name)
        assert agent.child is not None
        agent.child.stop()
        with self.server.client() as client:
            client.post(f"/api/v1/devices/{name}/decommission")

    def stop(self) -> None:
        for agent in self.agents.values():
            assert agent.child is not None
            agent.child.stop()
        if self.line is not None:
            self.line.cut()
        if self.between is not None:
            self.between.stop()
        if self.server.child is not None:
            self.server.child.stop()

    # --- releases and rollouts ---

    @property
    def current(self) -> str:
        return f"{self.number}.0.0"

    def release(self, *, ballast_bytes: int = 0, model: str = MODEL) -> str:
        """Pack, sign and push the next version; return it."""
        self.number += 1
        version = self.current
        source = constant_model(self.folder / f"{model}-{version}.onnx", self.number, ballast_bytes=ballast_bytes)
        bundle = self.folder / f"{model}-{version}"
        pack_model(
            source,
            name=model,
            version=version,
            licence="Apache-2.0",
            attribution="tests",
            source="tests",
            output=bundle,
        )
        with self.remote() as remote:
            publishing.sign(bundle, remote, self.key)
            publishing.push(bundle, remote, self.key)
        return version

    def remote(self) -> Remote:
        return Remote.find(data=self.server.folder)

    def begin(self, version: str, *devices: str, trial: Mapping[str, Any] | None = None, **changes: Any) -> int:
        """Create and start a rollout, to the named devices or to all; return its number."""
        selector = " or ".join(f'name = "{name}"' for name in devices) or "all"
        wish = {
            **PLAN,
            "models": [{"model": MODEL, "version": version}],
            "selector": selector,
            "trial": {**TRIAL, **(trial or {})},
            "supersede": True,
            "start": True,
            **changes,
        }
        with self.server.client() as client:
            return int(client.post("/api/v1/rollouts", wish)["number"])

    def rollout(self, number: int) -> dict[str, Any]:
        with self.server.client() as client:
            found: dict[str, Any] = client.get(f"/api/v1/rollouts/{number}")
            return found

    def abort(self, number: int) -> None:
        with self.server.client() as client:
            client.post(f"/api/v1/rollouts/{number}/abort")
        self.end(number)

    def end(self, number: int) -> dict[str, Any]:
        """Wait for the end of a rollout."""
        last: dict[str, Any] = {}

        def ended() -> dict[str, Any] | None:
            last.update(self.rollout(number))
            return last if last["state"] in FINAL else None

        try:
            return wait_for(f"rollout {number} to end", ended, WAIT_S)
        except Exception as error:
            raise AssertionError(
                f"{error}: {last.get('state')} {last.get('why_not_yet')} {last.get('counts')}"
            ) from error

    # --- what devices do ---

    def device_id(self, name: str) -> str:
        known = identity.load(self.agents[name].home)
        assert known is not None
        return known.device

    def slot(self, name: str) -> dict[str, Any]:
        """What `wherry-agent status` says of the model."""
        found: dict[str, Any] = self.agents[name].status()["models"].get(MODEL, {})
        return found

    def until(self, name: str, doing: str, *, version: str = "") -> dict[str, Any]:
        """Wait until an agent does something (words of `wherry-agent status`)."""

        def look() -> dict[str, Any] | None:
            found = self.slot(name)
            wanted = not version or found.get("candidate", {}).get("target") == f"{MODEL}/{version}"
            return found if found.get("doing") == doing and wanted else None

        return wait_for(f"{name} to be {doing}", look, WAIT_S, every_s=0.02)

    def first(self, doing: str) -> str:
        """Wait until some agent does something; return its name."""

        def look() -> str:
            return next((name for name in self.agents if self.slot(name).get("doing") == doing), "")

        return wait_for(f"an agent to be {doing}", look, WAIT_S, every_s=0.02)

    def serves(self, name: str) -> str:
        """Return the version that an agent trusts."""
        target = str(self.slot(name).get("serves", {}).get("target", ""))
        return target.rpartition("/")[2]

    def versions(self) -> set[str]:
        """Return the versions that agents trust."""
        return {self.serves(name) for name in self.agents}

    def settled(self, version: str, *names: str) -> bool:
        """Tell whether agents trust a version, do nothing else and owe no report."""
        for name in names or self.agents:
            shown = self.agents[name].status()
            slot = shown["models"].get(MODEL, {})
            good = (slot.get("doing"), slot.get("serves", {}).get("target")) == ("idle", f"{MODEL}/{version}")
            if not (shown["running"] and good and shown["reports_owed"] == 0):
                return False
        return True

    def wait_settled(self, version: str, *names: str) -> None:
        wait_for(f"everyone to run {version}", lambda: self.settled(version, *names), WAIT_S)

    def log(self, name: str) -> str:
        """The whole log of an agent."""
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    def log_mark(self, name: str) -> Callable[[], str]:
        """Return a function that returns what was logged since now."""
        start = len(self.log(name))
        return lambda: self.log(name)[start:]

    def downloaded(self, name: str) -> int:
        """Return how much of what an agent is downloading would survive a kill."""
        records = (self.agents[name].home / "store/blobs/sha256").glob("*.part.json")
        return sum(int(json.loads(record.read_bytes())["synced"]) for record in records)

    # --- what is stored ---

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read the server's database, beside it."""
        connection = sqlite3.connect(f"file:{self.server.folder / 'wherry.sqlite'}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()

    def acknowledged(self, name: str) -> tuple[str, set[int]]:
        """Return the reports of a device that it was told are stored: (epoch of the stream, numbers)."""
        state = journal.decode((self.agents[name].home / "journal.json").read_bytes())
        return state.stream, set(range(1, state.seq)) - {report.seq for report in state.owed}

    def stored(self, name: str, epoch: str) -> set[int]:
        """Return the reports of a device that the server has."""
        query = "SELECT seq FROM report_log WHERE device_id = ? AND epoch = ?"
        return {seq for (seq,) in self.rows(query, self.device_id(name), epoch)}

    def check_acknowledged(self) -> None:
        """Nothing that a device was told is stored is missing."""
        for name in self.agents:
            epoch, told = self.acknowledged(name)
            assert told <= self.stored(name, epoch), f"{name} was told that {told} are stored"

    def check_streams(self) -> None:
        """Every report of every device arrived: once, without a gap, none given up as lost."""
        for name in self.agents:
            epoch, told = self.acknowledged(name)
            assert told == self.stored(name, epoch) == set(range(1, len(told) + 1)), name
            query = "SELECT contiguous, lost FROM stream WHERE device_id = ? AND epoch = ? AND stream = 'report'"
            assert self.rows(query, self.device_id(name), epoch) == [(len(told), 0)], name
            lost = self.rows("SELECT sum(lost) FROM stream WHERE device_id = ?", self.device_id(name))
            assert lost == [(0,)], name


def is_well(site: Site) -> bool:
    """Tell whether a site may serve another test: everything lives, and every agent is at rest."""
    try:
        if site.server.child is None or not site.server.child.alive():
            return False
        with site.server.client() as client:
            client.get("/api/v1/health")
        return all(site.settled(site.serves(name), name) for name in site.agents)
    except Exception:
        return False


@contextmanager
def asking(site: Site, *names: str) -> Iterator[dict[str, Client]]:
    """Ask agents all the while."""
    clients = {name: Client(site.agents[name]) for name in names or site.agents}
    try:
        yield clients
    finally:
        for client in clients.values():
            client.stop()


def check_answers(clients: Mapping[str, Client], *versions: str) -> None:
    """Every answer came from one of `versions`, and says so truthfully."""
    allowed = {(version, float(version.partition(".")[0])) for version in versions}
    for name, client in clients.items():
        assert not client.odd, f"{name}: {client.odd[:3]}"
        assert set(client.answers) <= allowed, f"{name}: {client.answers}"
        assert client.count > 0, name


def check_nobody_noticed(clients: Mapping[str, Client]) -> None:
    """No connection was refused or broken."""
    for name, client in clients.items():
        assert (client.refused, client.cut) == (0, 0), name


# --- processes ----------------------------------------------------------------------------------


def children(parent: int) -> dict[int, str]:
    """Return living children: process id → command line."""
    found: dict[int, str] = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command:  # a zombie has none
            found[int(pid)] = command
    return found


def role(site: Site, name: str) -> int:
    """Return the process id of a child of `wherry dev`, 0 while there is none."""
    assert site.server.child is not None
    found = children(site.server.child.pid)
    return next((pid for pid in found if _name(pid) == f"wherry {name}"), 0)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except FileNotFoundError:
        return ""


def kill(pid: int) -> None:
    """SIGKILL a process that a test started, and see it gone."""
    os.kill(pid, signal.SIGKILL)
    wait_for(f"{pid} to be gone", lambda: is_gone(pid), WAIT_S, every_s=0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
