"""A whole development server and whole agents, each in processes of their own, for tests of the supervisor."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.agent.serving_kit import infer_body, loadable, until
from tests.shared.engines import models
from wherry_agent import status
from wherry_server.settings import Settings
from wherry_shared.bundle import (
    ANNOTATION_VARIANT,
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    GOLDEN_TYPE,
    MANIFEST_TYPE,
    WEIGHT_TYPE,
    Config,
    EngineName,
    EngineRange,
    Format,
    GoldenIndex,
    Interface,
    Licence,
    Manifest,
    Provenance,
    Variant,
    encode_config,
)
from wherry_shared.errors import WherryError
from wherry_shared.image_layout import LayoutWriter
from wherry_shared.publishing import PublisherKey, Remote, push, sign

MODEL = "scale"
START_S = 190.0


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def write_bundle(
    root: Path, version: str, weights: Path, *, spoil: bool = False, model: str = MODEL, **changes: Any
) -> str:
    """Write a bundle of one ONNX file with golden vectors that fit it (unless `spoil`); return its manifest digest.

    `changes` are fields of its config, whether they fit the file or not.
    """
    return write_pieces(root, version, [Piece("float", weights, spoil=spoil)], model=model, changes=changes)


@dataclass(frozen=True)
class Piece:
    """One variant of a bundle made here."""

    id: str
    weights: Path
    spoil: bool = False
    """Its golden vectors do not fit it."""
    engine: EngineName = "onnxruntime"
    format: Format = "onnx"


def write_pieces(
    root: Path,
    version: str,
    pieces: Sequence[Piece],
    *,
    model: str = MODEL,
    interface: Interface | None = None,
    changes: Mapping[str, Any] | None = None,
) -> str:
    """Write a bundle of several variants; return its manifest digest.

    `changes` are fields of its config, whether they fit the files or not; `interface` is what the files have.
    """
    interface = interface or models.interface()
    writer = LayoutWriter(root)
    layers, variants = [], []
    for piece in pieces:
        item = loadable(
            piece.weights,
            version,
            model=model,
            spoil=piece.spoil,
            engine=piece.engine,
            format_=piece.format,
            interface=interface,
        )
        named = {ANNOTATION_VARIANT: piece.id}
        layer = writer.add_bytes(piece.weights.read_bytes(), WEIGHT_TYPE, named)
        golden = writer.add_bytes(Path(item.golden_path).read_bytes(), GOLDEN_TYPE, named)
        layers += [layer, golden]
        variants.append(
            Variant(
                id=piece.id,
                digest=layer.digest,
                bytes=layer.size,
                format=piece.format,
                precision="float32",
                engines=[EngineRange(name=piece.engine, minimum="1.0")],
                golden=GoldenIndex(digest=golden.digest, bytes=golden.size, vectors=1, synthetic=True),
            )
        )
    config = Config(
        format=1,
        model=model,
        version=version,
        interface=interface,
        variants=variants,
        licence=Licence(expression="Apache-2.0", source="made by a test", attribution="Wherry"),
        provenance=Provenance(source_digests={}),
    )
    config = msgspec.structs.replace(config, **(changes or {}))
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=writer.add_bytes(encode_config(config), CONFIG_TYPE),
        layers=layers,
    )
    return writer.finish(manifest, version).digest


class Site:
    """`wherry dev` on free ports, and a publisher."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.data = folder / "server"
        if settings:
            Settings(data=self.data, **settings).save()
        self.port, self.broker_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.dev = self._start()
        self.token = json.loads((self.data / "client.json").read_text())["token"]
        self.enrolment = (self.data / "keys" / "enrolment.token").read_text().strip()
        self.key = PublisherKey.open(folder / "publisher.pem")

    def _start(self) -> subprocess.Popen[bytes]:
        ports = ["--port", str(self.port), "--broker-port", str(self.broker_port)]
        argv = [sys.executable, "-m", "wherry_server.cli", "dev", "--data", str(self.data), "--quiet", *ports]
        log = (self.folder / "dev.log").open("ab")
        child = subprocess.Popen(argv, stdout=log, stderr=log)
        log.close()
        until(lambda: child.poll() is not None or self._answers(), "the server answers", START_S)
        assert child.poll() is None, (self.folder / "dev.log").read_text()
        return child

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, WherryError, KeyError, ValueError):
            with socket.create_connection(("127.0.0.1", self.broker_port), 1):
                pass
            return self.call("GET", "/api/v1/health", token="")[0] == 200
        return False

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        data = json.dumps(body) if body is not None else None
        connection.request(method, path, data, {**headers, "Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if text else None

    def release(self, version: str, weights: Path, *, spoil: bool = False, model: str = MODEL, **changes: Any) -> str:
        """Write, sign and push a bundle."""
        root = self.folder / f"{model}-{version}"
        digest = write_bundle(root, version, weights, spoil=spoil, model=model, **changes)
        self.push(root)
        return digest

    def push(self, root: Path) -> None:
        """Sign and push a bundle that was written."""
        with Remote(self.url, self.token) as remote:
            sign(root, remote, self.key)
            push(root, remote, self.key)

    def deploy(self, version: str, device: str, *, trial_s: int = 1800, attempt: int = 1, model: str = MODEL) -> None:
        argv = [sys.executable, "-m", "wherry_server.cli", "--server", self.url, "--token", self.token, "deploy"]
        terms = ["--device", device, "--trial", str(trial_s), "--attempt", str(attempt), "--supersede"]
        done = subprocess.run([*argv, f"{model}:{version}", *terms], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        self.dev.send_signal(signal.SIGTERM)
        self.dev.wait(30)

    def start_again(self) -> None:
        self.dev = self._start()


class Agent:
    """One `wherry-agent run`."""

    def __init__(self, site: Site, name: str, *flags: str) -> None:
        self.site = site
        self.name = name
        self.home = site.folder / name
        self.flags = flags
        self.log = site.folder / f"{name}.log"
        self.port = free_ports(1)[0]
        self.child = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(self.home), "--name", self.name]
        more = ["--http-port", str(self.port), "--server", self.site.url, "--token", self.site.enrolment, *self.flags]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen([*argv, *more], stderr=log, stdout=log)
        return self.child

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(WherryError):
            return status.ask(self.home)
        return {"running": False, "models": {}}

    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.status()["models"].get(MODEL, {"doing": ""})
        return found

    def until(self, what: str, condition: Any, deadline_s: float = 60.0) -> dict[str, Any]:
        """Poll the status until `condition(status)`."""

        def check() -> Any:
            assert self.child.poll() is None, f"the agent ended: {self.tail()}"
            shown = self.status()
            time.sleep(0.05)
            return shown if shown["running"] and condition(shown) else None

        try:
            found: dict[str, Any] = until(check, what, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}\n{self.status()}") from error
        return found

    def until_doing(self, doing: str, **more: Any) -> dict[str, Any]:
        shown = self.until(doing, lambda s: s["models"].get(MODEL, {}).get("doing") == doing, **more)
        found: dict[str, Any] = shown["models"][MODEL]
        return found

    def until_serves(self, version: str, **more: Any) -> dict[str, Any]:
        def check(shown: dict[str, Any]) -> bool:
            model = shown["models"].get(MODEL, {})
            return model.get("doing") == "idle" and model.get("serves", {}).get("target") == f"{MODEL}/{version}"

        shown = self.until(f"{version} is confirmed", check, **more)
        found: dict[str, Any] = shown["models"][MODEL]
        return found

    def infer(self, first: float = 1.0, model: str = MODEL) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST", f"/v2/models/{model}/infer", json.dumps(infer_body([[first, 1.0, 2.0, 3.0]])))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def ask(self, count: int, first: float = 1.0) -> list[str]:
        """Ask `count` times; return the versions that answered; every answer has to be good."""
        versions = []
        for _ in range(count):
            code, body = self.infer(first)
            assert code == 200, body
            versions.append(body["model_version"])
        return versions

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(10)

    def stop(self) -> int:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        return self.child.wait(30)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def site(folder: Path, **settings: Any) -> Iterator[Site]:
    made = Site(folder, **settings)
    try:
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def agent(of: Site, name: str, *flags: str) -> Iterator[Agent]:
    made = Agent(of, name, *flags)
    try:
        yield made
    finally:
        if made.child.poll() is None:
            made.child.kill()
            made.child.wait(10)


def children_of(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
