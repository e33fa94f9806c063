"""Whole programs as child processes: a development server, real agents, a swarm; each with a home and a log of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wherry_server.client import Client
from wherry_shared.access import find_access
from wherry_simulators.processes import Child, free_port, wait_for

START_S = 60.0
"""How long a server or an agent may take until it answers, on a busy machine."""


@dataclass
class Server:
    """`wherry dev` in a folder of its own."""

    folder: Path
    logs: Path
    port: int = field(default_factory=free_port)
    broker_port: int = field(default_factory=free_port)
    child: Child | None = None

    @property
    def address(self) -> str:
        """Where the API answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        """Start, and wait until the API and the broker answer."""
        arguments = ["wherry_server.cli", "dev", "--data", str(self.folder), "--port", str(self.port)]
        arguments += ["--broker-port", str(self.broker_port), "--quiet"]
        self.child = Child("server", arguments, self.logs / "server.log").start()
        wait_for("the server", self._healthy, START_S)
        return self

    def client(self) -> Client:
        """Return a client with the token that the server wrote for this machine."""
        return Client(find_access(data=self.folder))

    def token(self, uses: int, labels: Mapping[str, str] | None = None) -> str:
        """Make an enrolment token."""
        with self.client() as client:
            made = client.post("/api/v1/enrolment-tokens", {"uses": uses, "labels": dict(labels or {})})
        return str(made["token"])

    def _healthy(self) -> bool:
        if self.child is not None and not self.child.alive():
            raise RuntimeError(f"the server ended by itself:\n{self.child.tail()}")
        if not (self.folder / "client.json").exists():
            return False
        with self.client() as client:
            return bool(client.get("/api/v1/health"))


@dataclass
class Agent:
    """A real `wherry-agent run`: supervisor, courier, canary, worker."""

    name: str
    home: Path
    logs: Path
    server: str
    token: str
    labels: Mapping[str, str]
    engines: Sequence[str] = ()
    http_port: int = field(default_factory=free_port)
    child: Child | None = None

    def start(self) -> Agent:
        """Start it; it enrols by itself the first time."""
        arguments = [
            "wherry_agent.cli",
            "run",
            "--server",
            self.server,
            "--token",
            self.token,
            "--home",
            str(self.home),
        ]
        arguments += ["--name", self.name, "--http-port", str(self.http_port)]
        for name, value in self.labels.items():
            arguments += ["--label", f"{name}={value}"]
        if self.engines:
            arguments += ["--engines", ",".join(self.engines)]
        self.child = Child(self.name, arguments, self.logs / f"{self.name}.log").start()
        return self

    def status(self) -> dict[str, Any]:
        """Return what `wherry-agent status --json` says, asked of the agent."""
        from wherry_agent import status

        return status.ask(self.home)


@dataclass
class SwarmChild:
    """`wherry-sim swarm` as a process of its own: light devices, real MQTT, behaviour from a table."""

    server: str
    token: str
    devices: int
    behaviours: Path
    logs: Path
    seed: int = 1
    requests_per_s: float = 20.0
    child: Child | None = None

    def start(self) -> SwarmChild:
        """Start it; devices enrol over HTTP."""
        arguments = ["wherry_simulators.cli", "swarm", "--server", self.server, "--token", self.token]
        arguments += ["--devices", str(self.devices), "--behaviours", str(self.behaviours), "--seed", str(self.seed)]
        arguments += ["--requests-per-s", str(self.requests_per_s)]
        self.child = Child("swarm", arguments, self.logs / "swarm.log").start()
        return self


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file for a child to read: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    return temporary.replace(path)
