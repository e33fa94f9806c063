"""An encrypted bundle through a whole site: real server, keys role, agent; killed, restarted, without the role, and back again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.site_kit import MODEL, TRIAL, WAIT_S, Site, constant_model, infer
from wherry_optimizer.pack import pack_model
from wherry_shared import publishing, reasons
from wherry_shared.encrypting import encrypt
from wherry_shared.key_ring import KeyRing
from wherry_simulators.processes import Child, wait_for

pytestmark = pytest.mark.slow

BALLAST_BYTES = 3_000_000
TERMS = {"stages": [{"share": 1.0, "confirmed_min": 0}], "silent_s": 900, "late_s": 900}
"""On a busy machine no device is late: what is waited for is the key."""


class DarkSite(Site):
    """A site with one agent, whose bundles are encrypted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ring, self.publisher = KeyRing(folder / "role"), KeyRing(folder / "keys-of-publisher")
        self.ring.add()
        self.publisher.add()
        self.role: Child | None = None

    def start_role(self) -> None:
        arguments = ["wherry_server.cli", "serve", "keys", "--data", str(self.server.folder), "--keys"]
        self.role = Child("keys", [*arguments, str(self.ring.folder)], self.folder / "logs" / "keys.log").start()

    def stop_role(self) -> None:
        if self.role is not None:
            self.role.stop()
            self.role = None

    def release_dark(self) -> tuple[str, bytes]:
        """Release the next version encrypted; return it, and a run of its plaintext."""
        self.number += 1
        version = self.current
        source = constant_model(self.folder / f"plain-{version}.onnx", self.number, ballast_bytes=BALLAST_BYTES)
        words = {"licence": "Apache-2.0", "attribution": "tests", "source": "tests"}
        plain, bundle = self.folder / f"{MODEL}-{version}", self.folder / f"dark-{version}"
        pack_model(source, name=MODEL, version=version, output=plain, **words)
        encrypt(plain, bundle, self.ring.current(), self.publisher)
        with self.remote() as remote:
            publishing.sign(bundle, remote, self.key)
            publishing.push(bundle, remote, self.key)
        data = source.read_bytes()
        return version, data[len(data) // 2 :][:64]


@pytest.fixture
def dark(tmp_path: Path) -> Iterator[DarkSite]:
    site = DarkSite(tmp_path)
    try:
        site.server.start()
        site.add("near")
        yield site
    finally:
        site.stop_role()
        site.stop()


def test_a_fleet_runs_what_no_disk_can_read(dark: DarkSite) -> None:
    version, plain = dark.release_dark()
    number = dark.begin(version, trial={**TRIAL, "max_s": 1}, **TERMS)
    waiting = dark.until("near", "waiting to try again")
    assert waiting["trouble"]["reason"] == reasons.KEY_MISSING, "the role is off: no weights were asked for"
    assert dark.downloaded("near") == 0
    dark.start_role()
    wait_for("the download to begin", lambda: dark.downloaded("near") or dark.serves("near") == version, WAIT_S)
    agent = dark.agents["near"]
    assert agent.child is not None
    agent.child.kill()
    agent.start()
    assert dark.end(number)["state"] == "done"
    dark.wait_settled(version)
    assert infer(agent.http_port)[1]["outputs"][0]["data"] == [1.0] * 4

    dark.stop_role()  # what it wrapped is enough from here on
    assert agent.child is not None
    agent.child.stop()
    assert dark.server.child is not None
    dark.server.child.stop()
    agent.start()
    wait_for("the model to serve without server and role", lambda: answers(agent.http_port) == 1.0, WAIT_S)
    dark.server.start()

    second, _ = dark.release_dark()
    dark.start_role()
    number = dark.begin(second, trial={**TRIAL, "max_s": 1}, **TERMS)
    assert dark.end(number)["state"] == "done"
    dark.wait_settled(second)
    dark.stop_role()
    with dark.server.client() as client:
        client.post(f"/api/v1/rollouts/{number}/revert")
    wait_for("the version before to be back", lambda: dark.settled(version), WAIT_S)
    assert answers(agent.http_port) == 1.0
    kept = [
        *(dark.folder / "near").rglob("*"),
        *(dark.folder / "server").rglob("*"),
        *(dark.folder / "dark-1.0.0").rglob("*"),
    ]
    assert not [path for path in kept if path.is_file() and plain in path.read_bytes()]
    assert plain in (dark.folder / "plain-1.0.0.onnx").read_bytes()


def answers(port: int) -> float | None:
    """Return what a model answers, None while nobody does."""
    try:
        status, answer = infer(port)
    except (OSError, json.JSONDecodeError):
        return None
    return float(answer["outputs"][0]["data"][0]) if status == 200 else None
