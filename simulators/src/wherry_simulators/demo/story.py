"""The story that the demo tells, step by step; every step checks what it claims."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

from wherry_shared import publishing, reasons
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.image_layout import Layout
from wherry_shared.publishing import PublisherKey
from wherry_shared.publishing_remote import Remote
from wherry_simulators.demo.bundles import FAULTS, MODEL, PITCH, Release, Releases
from wherry_simulators.demo.files import requests
from wherry_simulators.demo.mirror import Mirror
from wherry_simulators.demo.outcome import Outcome, data_lines, variants_table
from wherry_simulators.demo.traffic import Traffic
from wherry_simulators.fleet import Agent, Server, SwarmChild, write_json
from wherry_simulators.processes import Child, wait_for

SWARM_DEVICES = 200
REQUESTS_PER_S = 20.0
"""By the client of each real camera."""
SWARM_REQUESTS_PER_S = 80.0
"""On each simulated device, where requests cost next to nothing: its trials are over soon."""
STEP_S = 90.0
"""What one step of the story may take before it counts as stuck."""
DROP_MAX = 0.015
SAMPLES_MIN = 200
FINAL = ("done", "halted", "aborted", "reverted")
TRIAL = {"min_requests": 40, "max_s": 30, "latency_tail_ratio_max": 8.0, "canary_latency_ratio_max": 20.0}
"""Terms of the demo's trials: shorter than the defaults, and lenient with a machine on which everything runs at once.

Everybody but the pitch device is asked all the time, so a trial ends by its requests; a slow machine gets the time for them."""
IDLE_TRIAL_S = 3
"""The same for the device that nobody asks: its trial ends by golden vectors, after so long."""
PLAN: dict[str, Any] = {
    "trial": TRIAL,
    "failure": {"count": 20, "share": 0.1, "sample_min": 5},
    "silent_s": 60,
    "late_s": 60,
    "settled_share": 0.95,
    "revert_s": 45,
}
PILOT = "pilot"
"""The cohort that gets a release first."""
PILOT_MEMBERS = 'label.ring = "pilot" or name = swarm-1-000*'
"""Both real pilot agents, and ten of the simulated devices."""
PILOT_DEVICES = 12
CAMERAS = 'label.role = "camera"'


class Demo:
    """Everything that runs, and what came out so far."""

    def __init__(self, folder: Path, console: Console, *, swarm: int = SWARM_DEVICES) -> None:
        self.folder = folder
        self.console = console
        self.outcome = Outcome(swarm=swarm)
        self.server = Server(folder / "server", folder / "logs")
        self.agents: dict[str, Agent] = {}
        self.swarm: SwarmChild | None = None
        self.mirror: Mirror | None = None
        self.traffic: list[Traffic] = []
        self.releases: dict[str, Release] = {}
        self.pitch: Release | None = None
        self.special: tuple[int, str] = (0, "")
        self._key = folder / "publisher.pem"
        self._beside = ThreadPoolExecutor(1)
        self._starting: Future[None] | None = None

    # --- the steps ------------------------------------------------------------------------------

    def run(self) -> None:
        """Tell the whole story."""
        self._fresh()
        with self._step("build", "Bundles from two real models: file-type on real files, pitch on synthesised notes"):
            self._build()
        with self._step("start", f"wherry dev, 4 real agents, {self.outcome.swarm} simulated devices"):
            self._start()
        with self._step("first", f"{MODEL} 1.0.0 to every camera, {PITCH} 1.0.0 to the TFLite device"):
            self._first()
        with self._step("second", f"{MODEL} 1.1.0: pilot, then 5 % → 25 % → 100 %"):
            self._second()
        with self._step("faulty", f"two releases that pass their golden vectors and fail on {self.special[1]}"):
            self._faulty()
        with self._step("altered", "weights altered after signing"):
            self._altered()
        with self._step("end", "The end"):
            self._end()

    def stop(self) -> None:
        """End every process that was started."""
        if self._starting is not None:
            failed = self._starting.exception()  # once it ended
            if failed is not None:
                self.console.print(f"  [red]server and agents did not start: {failed}[/]")
        self._beside.shutdown()
        for traffic in self.traffic:
            traffic.stop()
        for agent in self.agents.values():
            if agent.child is not None:
                agent.child.stop()
        if self.swarm is not None and self.swarm.child is not None:
            self.swarm.child.stop()
        if self.mirror is not None:
            self.mirror.stop()
        if self.server.child is not None:
            self.server.child.stop()

    def _fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _build(self) -> None:
        makes = Releases(self.folder / "bundles", lambda line: self.console.print(f"  [dim]{line}[/]"))
        # the other model is built beside, by the command that a user would type
        beside = ["wherry_optimizer.cli", "build", f"{PITCH}-1.0.0", "--output", str(makes.folder)]
        builder = Child("build of pitch", beside, self.folder / "logs" / "build-pitch.log").start()
        self.releases["1.0.0"] = makes.build(f"{MODEL}-1.0.0")
        self._starting = self._beside.submit(self._start_server_and_agents)
        self.releases["1.1.0"] = makes.build(f"{MODEL}-1.1.0")
        wait_for("pitch to be built", lambda: not builder.alive(), STEP_S)
        self.pitch = makes.read(makes.folder / f"{PITCH}-1.0.0")
        honest = [*self.releases.values(), self.pitch]
        self.outcome.releases = honest
        self.outcome.kept_out = [
            {"bundle": release.name, **refused.as_dict()} for release in honest for refused in release.refused
        ]
        self.special = makes.uncovered_class(self.releases["1.1.0"])
        for version, fault in FAULTS.items():
            self.releases[version] = makes.change(self.releases["1.1.0"], version, fault, self.special[0])
        self.releases["1.4.0"] = makes.stamp(self.releases["1.1.0"], "1.4.0")
        self.console.print(variants_table(honest))
        for line in data_lines(honest):
            self.console.print(f"  {line}")
        for row in self.outcome.kept_out:
            self.console.print(f"  kept out of {row['bundle']}: {row['id']}: {row['why']}")
        formats = {variant.format for variant in self.pitch.config.variants}
        small = {variant.id: variant for variant in self.releases["1.1.0"].config.variants}
        made = {step for variant in small.values() for step in variant.passes}
        judged = [variant.accuracy for variant in small.values() if variant.accuracy is not None]
        self.outcome.check(
            f"1.1.0 has {', '.join(small)}: each within {100 * DROP_MAX:.1f} points on {SAMPLES_MIN} files or more",
            any("prune" in step for step in made)
            and any("quantize" in step for step in made)
            and len(judged) == len(small) >= 3
            and all(found.drop <= DROP_MAX and found.samples >= SAMPLES_MIN for found in judged),
        )
        self.outcome.check("pitch has variants for both engines", formats == {"onnx", "tflite"})

    def _start_server_and_agents(self) -> None:
        """Start what needs no bundle, while the last one is built: by far the most of it is waiting for processes."""
        self.server.start()
        self.mirror = Mirror(self.server.address).start()
        with self.server.client() as client:
            client.post("/api/v1/cohorts", {"name": PILOT, "selector": PILOT_MEMBERS})
        token = self.server.token(8)
        self._agent("cam-1", token, {"role": "camera", "ring": "pilot"}, ["onnxruntime"])
        self._agent("cam-2", token, {"role": "camera", "ring": "pilot"}, ["onnxruntime"])
        self._agent("cam-3", token, {"role": "camera", "ring": "wide"}, ["onnxruntime"], server=self.mirror.address)
        self._agent("mic-1", token, {"role": "microphone", "ring": "wide"}, ["ai-edge-litert"])

    def _start(self) -> None:
        assert self._starting is not None
        self._starting.result()
        self.console.print(f"  API {self.server.address}, broker on port {self.server.broker_port}")
        self.console.print(f"  cohort {PILOT}: {PILOT_MEMBERS}")
        table = write_json(self.folder / "behaviours.json", self._behaviours())
        if self.outcome.swarm:
            token = self.server.token(self.outcome.swarm, {"role": "camera", "ring": "wide"})
            logs = self.folder / "logs"
            self.swarm = SwarmChild(
                self.server.address, token, self.outcome.swarm, table, logs, requests_per_s=SWARM_REQUESTS_PER_S
            ).start()
        for release in (self.releases["1.0.0"], self.pitch):  # while devices start
            assert release is not None
            self._publish(release)
        expected = {"real": len(self.agents), "simulated": self.outcome.swarm}
        wait_for("all devices to enrol", lambda: self._counts() == expected, STEP_S, every_s=0.5)
        self.outcome.real = expected["real"]
        self.console.print(
            f"  {expected['real']} real agents (processes), {expected['simulated']} simulated devices "
            "(real MQTT and machine, model behaviour from a table)"
        )
        self.console.print(f"  trials of the demo: {TRIAL}; the defaults are longer and stricter")
        self.outcome.check("4 real agents and all simulated devices enrolled", expected["real"] >= 4)

    def _first(self) -> None:
        with (
            self._rollout(MODEL, "1.0.0", CAMERAS, [1.0]) as shown,
            self._rollout(
                PITCH, "1.0.0", 'name = "mic-1"', [1.0], confirmed_min=0, trial={**TRIAL, "max_s": IDLE_TRIAL_S}
            ) as pitch,
        ):
            bodies = requests(self.special[0])
            waiting = {name: self.agents[name].http_port for name in ("cam-1", "cam-2", "cam-3")}

            def greet() -> bool:
                for name, port in list(waiting.items()):
                    if _ready(port, MODEL):
                        self.traffic.append(Traffic(name, port, MODEL, bodies, REQUESTS_PER_S).start())
                        del waiting[name]
                return not waiting

            wait_for("the cameras to serve", greet, STEP_S)
            done = self._follow(shown)
            heard = self._follow(pitch)
            wait_for("the last cameras to confirm 1.0.0", lambda: self._all_run("1.0.0"), STEP_S)
        self.outcome.check("1.0.0 reached every camera", done["state"] == "done")
        self.outcome.check(
            "the TFLite device serves pitch", heard["state"] == "done" and _ready(self.agents["mic-1"].http_port, PITCH)
        )

    def _second(self) -> None:
        self._publish(self.releases["1.1.0"])
        with self._rollout(MODEL, "1.1.0", PILOT, [1.0], confirmed_min=2) as shown:
            pilot = self._follow(shown)
        self.outcome.check(
            "1.1.0 was confirmed by both pilot agents under traffic", pilot["counts"]["real"]["confirmed"] >= 2
        )
        with self._rollout(MODEL, "1.1.0", CAMERAS, [0.05, 0.25, 1.0]) as shown:
            wide = self._follow(shown)
            wait_for("the last cameras to confirm 1.1.0", lambda: self._all_run("1.1.0"), STEP_S)
        self.outcome.check("1.1.0 reached every camera in stages", wide["state"] == "done")

    def _faulty(self) -> None:
        # every device of the pilot has its own trial; the rollout halts when all have said what they found
        bound = {"share": 0.1, "sample_min": PILOT_DEVICES}
        for version, reason in (("1.2.0", reasons.HEALTH_ERRORS), ("1.3.0", reasons.HEALTH_LATENCY)):
            self._publish(self.releases[version])
            with self._rollout(MODEL, version, PILOT, [1.0], failure=bound) as shown:
                end = self._follow(shown)
            own = [found for found in end["outcomes"] if not found["simulated"] and found["reason"] == reason]
            self.outcome.check(
                f"{version}: halted; both real pilots went back by themselves ({reason})",
                end["state"] == "halted" and sum(found["devices"] for found in own) == 2,
            )
            if version == "1.3.0" and self.outcome.swarm:
                taken = sum(
                    found["devices"]
                    for found in end["outcomes"]
                    if found["outcome"] == "reverted" and found["reason"] != reason
                )
                self.outcome.check(f"1.3.0: {taken} devices that had confirmed it were taken back", taken > 0)
            wait_for("everyone to run 1.1.0", lambda: self._all_run("1.1.0"), STEP_S)
        self.outcome.check("after both, everyone runs 1.1.0 again", self._all_run("1.1.0"))

    def _altered(self) -> None:
        assert self.mirror is not None
        honest = self.releases["1.4.0"]
        with self._remote() as remote:
            publishing.sign(honest.path, remote, PublisherKey.open(self._key))
            makes = Releases(self.folder / "bundles", self.console.print)
            altered = makes.alter_weights(honest)
            # past the publisher's own check, straight to the server: other bytes under a signed digest …
            variant = altered.config.variants[0]
            weights = Layout(altered.path).path(variant.digest).read_bytes()
            self._refused(lambda: remote.put_blob(variant.digest, iter([weights]), len(weights)), "digest_mismatch")
            # … and a whole bundle made anew around other weights, under the version that was signed
            forged = makes.change(honest, honest.version, _flipped, 0, folder="forged")
            layout = Layout(forged.path)
            for path in (forged.path / "blobs" / "sha256").iterdir():
                data = path.read_bytes()
                remote.put_blob(f"sha256:{path.name}", iter([data]), len(data))
            self._refused(
                lambda: remote.add_bundle(forged.model, forged.version, layout.descriptor().digest), "unsigned"
            )
            publishing.push(honest.path, remote, PublisherKey.open(self._key))
        self.outcome.check(
            "the server refused altered weights, and a bundle made anew around them",
            self.outcome.refused_by_server == 2,
        )
        self.mirror.lie_about(*(variant.digest for variant in honest.config.variants))
        with self._rollout(MODEL, "1.4.0", 'name = "cam-3"', [1.0], confirmed_min=0) as shown:
            refused = wait_for("cam-3 to refuse", lambda: self._refusal("cam-3"), STEP_S)
            self.console.print(f"  cam-3, behind a mirror that lies, refuses: {refused}")
            self.outcome.refused_by_agent += self.mirror.lied > 0
            with self.server.client() as client:
                client.post(f"/api/v1/rollouts/{shown['number']}/abort")
            self._follow(shown)
        answers = _versions(self.agents["cam-3"].http_port, MODEL)
        self.outcome.check(
            f"the agent refused what the lying mirror served ({self.mirror.lied} times), and still runs 1.1.0",
            self.outcome.refused_by_agent == 1 and answers == ["1.1.0"],
        )

    def _end(self) -> None:
        for traffic in self.traffic:
            tally = traffic.stop()
            self.outcome.answered += tally.answered
            self.outcome.failed += tally.failed
            self.outcome.fallbacks += tally.fallbacks
            versions = ", ".join(f"{version}: {count}" for version, count in sorted(tally.versions.items()))
            self.console.print(
                f"  {traffic.name} answered {tally.answered} requests ({versions}), {tally.failed} failed"
            )
            for error in tally.errors:
                self.console.print(f"    [red]{error}[/]")
        self.outcome.check(
            "no request failed, the bad class included", self.outcome.failed == 0 and self.outcome.answered > 100
        )
        self.outcome.check("the incumbent answered what a candidate could not", self.outcome.fallbacks > 0)

    # --- helpers --------------------------------------------------------------------------------

    def _refused(self, call: Callable[[], object], code: str) -> None:
        """Count a call that the server refuses with `code`."""
        try:
            call()
        except RefusedError as error:
            self.console.print(f"  the server refuses: {error}")
            self.outcome.refused_by_server += error.code == code

    @contextmanager
    def _step(self, key: str, words: str) -> Iterator[None]:
        self.console.print(f"\n[bold]{len(self.outcome.seconds) + 1}. {words}[/]")
        began = time.monotonic()
        try:
            yield
        finally:
            self.outcome.seconds[key] = time.monotonic() - began
            self.console.print(f"  [dim]{self.outcome.seconds[key]:.1f} s[/]")

    def _agent(
        self, name: str, token: str, labels: dict[str, str], engines: list[str], *, server: str | None = None
    ) -> None:
        home = self.folder / "devices" / name
        self.agents[name] = Agent(
            name, home, self.folder / "logs", server or self.server.address, token, labels, engines
        ).start()

    def _remote(self) -> Remote:
        with self.server.client() as client:
            token = client.http.headers["Authorization"].removeprefix("Bearer ")
        return Remote(self.server.address, token)

    def _publish(self, release: Release) -> None:
        with self._remote() as remote:
            publishing.sign(release.path, remote, PublisherKey.open(self._key))
            publishing.push(release.path, remote, PublisherKey.open(self._key))
        self.console.print(f"  signed and pushed {release.name} ({release.manifest[:19]}…)")

    def _behaviours(self) -> dict[str, Any]:
        slow, failing = self.releases["1.3.0"].manifest, self.releases["1.2.0"].manifest
        variants = [variant.id for variant in self.releases["1.1.0"].config.variants]
        return {
            "format": 1,
            "models": {
                failing: {"variants": [{"id": name, "error_rate": 0.25} for name in variants]},
                slow: {
                    "affected": 0.5,
                    "variants": [{"id": name, "latency_us": 90_000} for name in variants],
                },
            },
        }

    def _counts(self) -> dict[str, int]:
        with self.server.client() as client:
            devices = client.get("/api/v1/fleet")["devices"]
        return {"real": int(devices["real"]["active"]), "simulated": int(devices["simulated"]["active"])}

    @contextmanager
    def _rollout(
        self, model: str, version: str, whom: str, shares: list[float], *, confirmed_min: int = 1, **changes: Any
    ) -> Iterator[dict[str, Any]]:
        """Create and start a rollout to the cohort `PILOT` or to a selector; at the end keep what the server says of it."""
        began = time.monotonic()
        stages = [{"share": share, "confirmed_min": confirmed_min} for share in shares]
        wish = {
            **PLAN,
            "models": [{"model": model, "version": version}],
            "cohort" if whom == PILOT else "selector": whom,
            "stages": stages,
            "supersede": True,
            "start": True,
            **changes,
        }
        with self.server.client() as client:
            shown: dict[str, Any] = client.post("/api/v1/rollouts", wish)
            self.console.print(f"  rollout {shown['number']}: {model} {version} to {whom}")
            yield shown
            self.outcome.add_rollout(client.get(f"/api/v1/rollouts/{shown['number']}"), time.monotonic() - began)

    def _follow(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Print progress until the rollout has ended, and return it as the server shows it then."""
        last = ""
        with self.server.client() as client:

            def look() -> dict[str, Any] | None:
                nonlocal last
                shown: dict[str, Any] = client.get(f"/api/v1/rollouts/{rollout['number']}")
                line = _progress(shown)
                if line != last:
                    self.console.print(f"  {line}")
                    last = line
                return shown if shown["state"] in FINAL else None

            try:
                return wait_for(f"rollout {rollout['number']} to end", look, STEP_S, every_s=0.3)
            except UnreachableError:
                shown = client.get(f"/api/v1/rollouts/{rollout['number']}")
                self.console.print(f"  [red]stuck: {shown['why_not_yet']}[/]")
                raise

    def _all_run(self, version: str) -> bool:
        """Tell whether every camera says that it runs `version`."""
        with self.server.client() as client:
            model = client.get("/api/v1/fleet")["models"].get(MODEL, {"versions": {}})
        return bool(model["versions"] == {version: {"real": 3, "simulated": self.outcome.swarm}})

    def _model_of(self, name: str) -> dict[str, Any]:
        with self.server.client() as client:
            shown = client.get(f"/api/v1/devices/{name}")
        found: dict[str, Any] = next((model for model in shown["models"] if model["model"] == MODEL), {})
        return found

    def _refusal(self, name: str) -> str:
        model = self._model_of(name)
        return str(model.get("detail")) if model.get("reason") == reasons.DIGEST_MISMATCH else ""


def _ask(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _ready(port: int, model: str) -> bool:
    return _ask(port, f"/v2/models/{model}/ready")[0] == 200


def _versions(port: int, model: str) -> list[str]:
    status, body = _ask(port, f"/v2/models/{model}")
    return list(json.loads(body)["versions"]) if status == 200 else []


def _flipped(model: onnx.ModelProto, _value: int) -> onnx.ModelProto:
    """Return a copy with other bytes and the same answers: not even golden vectors would notice."""
    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    edited.doc_string = "not what was signed"
    return edited


def _progress(shown: dict[str, Any]) -> str:
    real, simulated = shown["counts"]["real"], shown["counts"]["simulated"]

    def both(*names: str) -> str:
        return f"{sum(real.get(name, 0) for name in names)} real + {sum(simulated.get(name, 0) for name in names)} simulated"

    stage = shown["stage"]
    share = f"stage {stage + 1} of {shown['stages_total']}" if stage >= 0 else "not started"
    if 0 <= stage < len(shown["stages"]):
        share += f" ({100 * shown['stages'][stage]['share']:g} %)"
    line = f"{shown['state']:<9} {share}: exposed {both('exposed')}, confirmed {both('confirmed', 'confirmed_idle')}"
    failed = sum(real.get(name, 0) + simulated.get(name, 0) for name in ("returned", "failed", "refused"))
    if failed or shown["state"] not in ("running", "done"):
        line += f", went back {both('returned', 'failed', 'reverted', 'withdrawn')}"
    return line + (f" — {shown['reason']}" if shown["reason"] else "")


def tell(folder: Path, console: Console, *, swarm: int = SWARM_DEVICES, keep: bool = False) -> bool:
    """Run the demo; return whether everything came out. With `keep` the processes stay."""
    demo = Demo(folder, console, swarm=swarm)
    finished = False
    try:
        demo.run()
        finished = True
    finally:
        demo.outcome.check("the story was told to its end", finished)
        demo.outcome.write(folder / "report.json")
        console.print()
        demo.outcome.show(console)
        console.print(f"report: {folder / 'report.json'}")
        if not (keep and finished):
            demo.stop()
    if keep:
        _look_around(demo, console)
    return demo.outcome.good


def _look_around(demo: Demo, console: Console) -> None:
    data = os.path.relpath(demo.server.folder)
    agent = demo.agents["cam-1"]
    console.print(f"""
Everything goes on running. Look around:
  source {os.path.relpath(Path(sys.prefix) / "bin" / "activate")}
  export WHERRY_DATA={data}
  wherry fleet; wherry rollout list; wherry device show cam-1
  wherry-agent status --home {os.path.relpath(agent.home)}
  curl -s localhost:{agent.http_port}/v2/models/{MODEL}
Press Ctrl-C to end it.""")
    try:
        while demo.server.child is not None and demo.server.child.alive():
            time.sleep(1)
    except KeyboardInterrupt:
        console.print("ending")
    finally:
        demo.stop()
