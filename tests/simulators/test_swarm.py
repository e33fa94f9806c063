from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tests.trust_kit import write_bundle
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.publishing import PublisherKey, Remote, push, sign
from wherry_simulators.models import Behaviour, Behaviours, VariantBehaviour
from wherry_simulators.swarm import Options, Swarm

DEADLINE_S = 60.0
DEVICES = 40


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")


class Dev:
    """A real `wherry dev` on free ports, killed at the end."""

    def __init__(self, data):
        self.data = data
        self.port, self.broker_port = free_port(), free_port()
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "wherry_server.cli", "dev", "--data", str(self.data), "--quiet"]
        command += ["--port", str(self.port), "--broker-port", str(self.broker_port)]
        log = (self.data.parent / "dev.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ, start_new_session=True)
        wait_for(self.answers, f"wherry dev answers:\n{(self.data.parent / 'dev.log').read_text()}")

    def answers(self):
        assert self.process.poll() is None, (self.data.parent / "dev.log").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/api/v1/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(DEADLINE_S)

    @property
    def access(self):
        return json.loads((self.data / "client.json").read_text())

    @property
    def token(self):
        return (self.data / "keys" / "enrolment.token").read_text().strip()

    def publish(self, version):
        bundle = self.data.parent / version
        manifest = write_bundle(bundle, version, weights=version.encode() * 1000)
        key = PublisherKey.open(self.data.parent / "publisher.key")
        remote = Remote(self.access["server"], self.access["token"])
        sign(bundle, remote, key)
        assert push(bundle, remote, key).outcome == "released"
        return manifest

    def api(self):
        access = self.access
        return httpx.Client(base_url=access["server"], headers={"Authorization": f"Bearer {access['token']}"})

    def roll_out(self, version, stages):
        wish = {"selector": "all", "models": [{"model": "thing", "version": version}], "stages": stages}
        with self.api() as api:
            answer = api.post("/api/v1/rollouts", json={**wish, "trial": {"max_s": 60}, "start": True})
            assert answer.status_code == 201, answer.text
            number = answer.json()["number"]

            def ended():
                found = api.get(f"/api/v1/rollouts/{number}").json()
                return found if found["state"] in {"done", "halted", "aborted", "reverted"} else None

            return wait_for(ended, f"the rollout of {version} ends")


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    server = Dev(tmp_path_factory.mktemp("swarm") / "data")
    server.start()
    yield server
    server.stop()


@pytest.mark.services
def test_a_swarm_confirms_a_good_release_and_returns_from_a_bad_one(dev):
    failing = Behaviour(variants=[VariantBehaviour(error_rate=0.3)])
    dev.publish("1.0.0")
    bad = dev.publish("1.1.0")
    with Swarm(Options(dev.access["server"], dev.token, devices=DEVICES), Behaviours({bad: failing})) as swarm:
        assert (swarm.counts().connected, swarm.counts().simulated) == (DEVICES, True)

        done = dev.roll_out("1.0.0", [{"share": 0.25}, {"share": 1.0}])
        assert done["state"] == "done"
        assert done["counts"]["simulated"]["confirmed"] >= 0.95 * DEVICES, "what a plan asks for by default"
        assert done["counts"]["real"]["confirmed"] == 0
        wait_for(lambda: swarm.counts().phases == {"idle": DEVICES}, "the last ones are confirmed too")

        halted = dev.roll_out("1.1.0", [{"share": 0.25}, {"share": 1.0}])
        assert halted["state"] == "halted"
        wait_for(lambda: swarm.counts().running == {"thing": {"thing/1.0.0": DEVICES}}, "everyone runs the good one")
        wait_for(lambda: swarm.counts().owed_reports == 0, "every report is acknowledged")
        counts = swarm.counts()
        assert counts.requests_failed == 0
        assert counts.offers_refused == 0


@pytest.mark.slow
@pytest.mark.services
def test_a_swarm_comes_back_after_its_server_was_killed(dev):
    with Swarm(Options(dev.access["server"], dev.token, devices=10, name="back"), Behaviours()) as swarm:
        dev.stop(signal.SIGKILL)
        wait_for(lambda: swarm.counts().connected == 0, "devices notice")
        dev.start()
        wait_for(lambda: swarm.counts().connected == 10, "devices are back")
        assert swarm.counts().connections_lost >= 10


@pytest.mark.services
def test_the_same_swarm_started_again_is_the_same_devices(dev):
    found = []
    for _ in range(2):
        with Swarm(Options(dev.access["server"], dev.token, devices=3, seed=9, name="same"), Behaviours()) as swarm:
            found.append(swarm.device_ids())
    assert found[0] == found[1]


@pytest.mark.services
def test_a_swarm_with_a_wrong_token_says_what_the_server_said(dev):
    wrong = f"wherry1.wrong.{dev.token.split('.')[2]}"
    with pytest.raises(RefusedError) as caught:
        Swarm(Options(dev.access["server"], wrong, devices=2), Behaviours()).start()
    assert caught.value.code == "enrolment_refused"


@pytest.mark.services
def test_a_swarm_with_the_token_of_another_server_believes_nothing(dev):
    parts = dev.token.split(".")
    foreign = f"wherry1.{parts[1]}.{'0' * 64}"
    with pytest.raises(RefusedError, match="root version 1") as caught:
        Swarm(Options(dev.access["server"], foreign, devices=1, name="foreign"), Behaviours()).start()
    assert caught.value.code == "trust_invalid"


def test_a_swarm_without_a_server_says_that_it_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("wherry_simulators.enrolment.ENROL_TRIES_MAX", 1)
    with pytest.raises(UnreachableError) as caught:
        Swarm(Options(f"http://127.0.0.1:{free_port()}", "wherry1.a.b", devices=1), Behaviours()).start()
    assert caught.value.code == "server_unreachable"


@pytest.mark.parametrize("wrong", [{"devices": 0}, {"devices": 50_000}, {"speed": 0.0}, {"requests_per_s": -1.0}])
def test_impossible_swarms_are_refused(wrong):
    with pytest.raises(RefusedError) as caught:
        Swarm(Options("http://127.0.0.1:1", "wherry1.a.b", **wrong))
    assert caught.value.code == "options_invalid"
