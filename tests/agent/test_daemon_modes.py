"""Shadows, blue-green and groups among real processes: what an application sees, and what the server is told."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.agent.daemon_kit import MODEL, Agent, Site, agent, site
from tests.agent.serving_kit import infer_body
from tests.offering import offer
from tests.shared.engines import models
from wherry_agent import identity
from wherry_server.settings import Settings
from wherry_shared import wire

pytestmark = pytest.mark.services

OTHER = "twin"
LONG = wire.Trial(min_requests=5, max_s=1800)
SHORT = wire.Trial(min_requests=5, max_s=2)


class Lab:
    """One device, and what its server offers it."""

    def __init__(self, server: Site, device: Agent) -> None:
        self.server = server
        self.device = device
        self.manifests: dict[str, str] = {}
        self.desired: dict[str, wire.OfferedModel] = {}
        known = identity.load(device.home)
        assert known is not None
        self._id = known.device

    def release(self, version: str, factor: float, *, model: str = MODEL, spoil: bool = False) -> None:
        if f"{model}/{version}" in self.manifests:
            return
        weights = models.scale(self.server.folder / f"{model}-{version}.onnx", factor)
        self.manifests[f"{model}/{version}"] = self.server.release(version, weights, model=model, spoil=spoil)

    def offer(self, version: str, *, model: str = MODEL, send: bool = True, **terms: Any) -> None:
        target = f"{model}/{version}"
        terms = {"trial": LONG, "rollout": "lab", **terms}
        self.desired[model] = wire.OfferedModel(target=target, manifest=self.manifests[target], **terms)
        if send:
            offer(Settings(data=self.server.data), self._id, self.desired, {})

    def begin(self, *versions: str, other: str = "") -> None:
        """Release versions of the model, and let the device run the first of them (and of the other model `other`)."""
        for number, version in enumerate(versions):
            self.release(version, 2.0 + number // 2)
        self.desired.clear()
        self.offer(versions[0], trial=SHORT, send=not other)
        if other:
            self.release(other, 2.0, model=OTHER)
            self.offer(other, model=OTHER, trial=SHORT)
            self.device.until(f"{OTHER} is there", lambda shown: self._serves(shown, OTHER, other))
        self.device.until_serves(versions[0])

    @staticmethod
    def _serves(shown: dict[str, Any], model: str, version: str) -> bool:
        one = shown["models"].get(model, {})
        return bool(one.get("doing") == "idle" and one.get("serves", {}).get("target") == f"{model}/{version}")

    def until_said(self, state: str, model: str = MODEL, **fields: str) -> dict[str, Any]:
        def said(shown: dict[str, Any]) -> bool:
            last = shown["models"].get(model, {}).get("last_report", {})
            return bool(last.get("state") == state and all(last.get(key) == value for key, value in fields.items()))

        return self.device.until(f"{model} reported {state} {fields}", said)

    def versions(self, count: int, model: str = MODEL) -> set[str]:
        """Ask `count` times; every answer has to be good. Return the versions that gave them."""
        found = set()
        for _ in range(count):
            connection = http.client.HTTPConnection("127.0.0.1", self.device.port, timeout=20)
            body = json.dumps(infer_body([[1.0, 1.0, 2.0, 3.0]]))
            connection.request("POST", f"/v2/models/{model}/infer", body)
            answer = connection.getresponse()
            shown = json.loads(answer.read())
            connection.close()
            assert answer.status == 200, shown
            found.add(shown["model_version"])
        return found

    def downloads(self, target: str) -> int:
        return self.device.log.read_text().count(f"→ downloading · {target}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with site(tmp_path_factory.mktemp("site")) as server, agent(server, "lab-1") as device:
        device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        yield Lab(server, device)


def test_a_shadow_answers_nobody_is_compared_and_is_promoted_without_a_second_download(lab: Lab) -> None:
    lab.begin("1.0.0", "1.1.0")
    terms = wire.Trial(min_requests=5, max_s=1800, shadow_cpu_share_max=1.0)
    lab.offer("1.1.0", mode="shadow", trial=terms)
    lab.device.until_doing("running as a shadow")

    def compared(shown: dict[str, Any]) -> bool:
        assert lab.versions(3) == {"1.0.0"}
        return bool(shown["models"][MODEL]["trial"]["compared"] >= 5)

    shown = lab.device.until("answers were compared", compared)["models"][MODEL]
    trial = shown["trial"]
    assert (trial["mode"], trial["share"], trial["agreed"]) == ("shadow", 1.0, trial["compared"])
    assert shown["serves"]["target"] == f"{MODEL}/1.0.0"

    lab.offer("1.1.0", trial=SHORT)
    lab.device.until_serves("1.1.0")
    assert lab.versions(3) == {"1.1.0"}
    assert lab.downloads(f"{MODEL}/1.1.0") == 1
    lab.device.until("every report is acknowledged", lambda now: now["reports_owed"] == 0)


def test_a_standby_takes_over_at_once_and_stands_by_again(lab: Lab) -> None:
    lab.begin("1.3.0", "1.2.0")
    lab.offer("1.2.0", mode="blue_green", share=0.0)
    lab.until_said("standby", target=f"{MODEL}/1.2.0")
    assert lab.device.until_doing("standing by")["serves"]["target"] == f"{MODEL}/1.3.0"
    assert lab.versions(5) == {"1.3.0"}

    loads = lab.device.log.read_text().count("loaded in")
    lab.offer("1.2.0", mode="blue_green", share=1.0, trial=wire.Trial(min_requests=10_000, max_s=1800))
    lab.device.until_doing("on trial")
    assert lab.versions(5) == {"1.2.0"}

    lab.offer("1.2.0", mode="blue_green", share=0.0)
    lab.device.until_doing("standing by")
    assert lab.versions(5) == {"1.3.0"}
    assert lab.device.log.read_text().count("loaded in") == loads, "both stayed in memory"

    lab.offer("1.3.0")
    lab.device.until_serves("1.3.0")


@pytest.mark.slow
def test_a_group_of_which_one_misses_its_golden_vectors_leaves_both_and_a_good_one_brings_both(lab: Lab) -> None:
    lab.begin("1.4.0", "2.0.0", other="1.0.0")
    lab.release("2.0.0", 5.0, model=OTHER, spoil=True)

    lab.offer("2.0.0", group="pair", send=False)
    lab.offer("2.0.0", model=OTHER, group="pair")
    lab.until_said("failed", OTHER, reason="golden_miss")
    lab.until_said("failed", MODEL, reason="group")
    assert lab.versions(3) == {"1.4.0"}
    assert lab.versions(3, OTHER) == {"1.0.0"}
    shown = lab.device.status()
    assert len(shown["known_bad"]) == 1, "the one that came to nothing for the other's sake is not bad"

    lab.release("2.1.0", 6.0)
    lab.release("2.1.0", 6.0, model=OTHER)
    lab.offer("2.1.0", group="pair", trial=SHORT, send=False)
    lab.offer("2.1.0", model=OTHER, group="pair", trial=SHORT)
    lab.device.until_serves("2.1.0")
    lab.until_said("confirmed_idle", OTHER, target=f"{OTHER}/2.1.0")
    assert lab.versions(3) == {"2.1.0"}
    assert lab.versions(3, OTHER) == {"2.1.0"}
    lab.device.until("every report is acknowledged", lambda now: now["reports_owed"] == 0)
