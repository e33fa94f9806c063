"""What the loader publishes together: groups all or none, modes that need both versions, what goes on when one fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import instead, loadable, until
from tests.shared.engines import models
from wherry_agent.answering import memory
from wherry_agent.answering.arms import load_variant
from wherry_agent.answering.ask import Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.registry import Registry
from wherry_agent.children import Loadable, Serve, ServeModel, Serving
from wherry_agent.workers import loader
from wherry_agent.workers.loader import Loader
from wherry_shared import reasons

ONES = {"x": np.ones((1, 4), np.float32)}


class Kit:
    """A loader without a process around it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry()
        self.said: list[Serving] = []
        self.available = 1 << 40
        self.loader = Loader(
            self.registry,
            self.said.append,
            on_candidate_error=lambda: None,
            on_first=lambda: None,
            available_bytes=lambda: self.available,
        )
        self._revision = 0

    def serve(self, *wanted: ServeModel) -> list[Serving]:
        self._revision += 1
        self.loader.want(Serve(revision=self._revision, models=list(wanted)))

        def answers() -> list[Serving]:
            mine = [one for one in self.said if one.revision == self._revision]
            return mine if len(mine) == len(wanted) else []

        return until(answers, f"answers to revision {self._revision}") if wanted else []

    def version(self, model: str, number: int, **more: int) -> Loadable:
        path = models.scale(self.folder / f"{model}-{number}.onnx", float(number))
        return loadable(path, f"1.{number}.0", model=model, **more)

    def answer(self, model: str, **ask: str) -> float:
        published = self.registry.get(model)
        assert published is not None
        helpers = Helpers()
        value = published.answer(RunGate(2), helpers, ONES, ask=Ask(**ask)).outputs["y"][0, 0]
        helpers.close()
        return float(value)

    def arms(self) -> dict[tuple[str, str], int]:
        return {(one.loadable.target, one.arm): one.stats().requests for one in self.loader.counters()}


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(tmp_path)
    yield kit
    kit.loader.stop()


def broken(item: Loadable, folder: Path) -> Loadable:
    (folder / "junk").write_bytes(b"junk")
    other = msgspec.structs.replace(item, manifest="sha256:" + "9" * 64, target=f"{item.model}/9.0.0")
    return instead(other, folder / "junk")


def test_a_group_is_never_seen_half_swapped(kit: Kit):
    versions = {name: [kit.version(name, number) for number in (1, 2, 3)] for name in ("left", "right")}
    kit.serve(*(ServeModel(name=name, active=versions[name][0], group="pair") for name in versions))
    stop = threading.Event()
    seen: set[tuple[str, str]] = set()
    mixed: list[object] = []

    def look() -> None:
        while not stop.is_set():
            snapshot = kit.registry.snapshot()
            left, right = snapshot["left"], snapshot["right"]
            seen.add((left.active.version, right.active.version))
            if left.active.version != right.active.version or left.generation != right.generation:
                mixed.append((left, right))

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in (1, 2, 1, 2, 0):
        wanted = [
            ServeModel(name=name, active=versions[name][turn], incumbent=versions[name][0], trial="t", group="pair")
            for name in versions
        ]
        assert all(one.ok for one in kit.serve(*wanted))
        pair = (f"1.{turn + 1}.0",) * 2
        until(lambda pair=pair: pair in seen, "readers see the new generation")
    stop.set()
    for reader in readers:
        reader.join()
    assert mixed == []


def test_a_group_of_which_one_model_does_not_load_stays_as_it_was(kit: Kit):
    left, right = kit.version("left", 1), kit.version("right", 1)
    kit.serve(*(ServeModel(name=one.model, active=one, group="pair") for one in (left, right)))
    before = kit.registry.snapshot()
    good, bad = kit.version("left", 2), broken(right, kit.folder)
    answers = kit.serve(
        ServeModel(name="left", active=good, incumbent=left, trial="t", group="pair"),
        ServeModel(name="right", active=bad, incumbent=right, trial="t", group="pair"),
    )
    assert [(one.model, one.ok, one.reason) for one in answers] == [
        ("left", False, reasons.GROUP),
        ("right", False, reasons.LOAD_FAILED),
    ]
    assert "right" in answers[0].detail
    assert kit.registry.snapshot() == before
    # models outside the group do not suffer from it
    alone = kit.version("alone", 4)
    answers = kit.serve(
        ServeModel(name="left", active=good, incumbent=left, trial="t", group="pair"),
        ServeModel(name="alone", active=alone),
        ServeModel(name="right", active=bad, incumbent=right, trial="t", group="pair"),
    )
    assert {one.model: one.ok for one in answers} == {"left": False, "right": False, "alone": True}
    assert (kit.answer("left"), kit.answer("right"), kit.answer("alone")) == (1.0, 1.0, 4.0)


def test_a_group_without_memory_for_two_versions_is_swapped_cold_as_a_whole_or_comes_back_as_a_whole(kit: Kit):
    left, right = kit.version("left", 1), kit.version("right", 1)
    kit.serve(*(ServeModel(name=one.model, active=one, group="pair") for one in (left, right)))
    kit.available = 1 << 20
    wide = kit.version("right", 2, peak_memory_bytes=1 << 30)
    small = kit.version("left", 2)
    bad = ServeModel(name="left", active=broken(left, kit.folder), incumbent=left, trial="t", group="pair")
    big = ServeModel(name="right", active=wide, incumbent=right, trial="t", group="pair")
    answers = kit.serve(big, bad)
    assert {one.model: one.reason for one in answers} == {"left": reasons.LOAD_FAILED, "right": reasons.GROUP}
    assert (kit.answer("left"), kit.answer("right")) == (1.0, 1.0)
    answers = kit.serve(msgspec.structs.replace(bad, active=small), big)
    assert [(one.ok, one.incumbent_loaded) for one in answers] == [(True, False)] * 2
    assert (kit.answer("left"), kit.answer("right")) == (2.0, 2.0)


def test_a_cold_swap_gives_memory_back_before_it_loads(kit: Kit, monkeypatch: pytest.MonkeyPatch):
    old = kit.version("one", 1)
    kit.serve(ServeModel(name="one", active=old))
    kit.available = 1 << 20
    said: list[str] = []
    monkeypatch.setattr(memory, "trim", lambda: said.append("trimmed"))
    monkeypatch.setattr(loader, "load_variant", lambda *a, **k: (said.append("loaded"), load_variant(*a, **k))[1])
    kit.serve(ServeModel(name="one", active=kit.version("one", 2, peak_memory_bytes=1 << 30), incumbent=old, trial="t"))
    assert said[:2] == ["trimmed", "loaded"]


def test_standing_by_and_taking_over_load_nothing_and_go_on_counting(kit: Kit):
    old, new = kit.version("scale", 2), kit.version("scale", 3)
    kit.serve(ServeModel(name="scale", active=old))
    wait = ServeModel(name="scale", active=new, incumbent=old, trial="t", mode="blue_green", share=0.0)
    (serving,) = kit.serve(wait)
    assert (serving.ok, serving.incumbent_loaded) == (True, True)
    assert serving.load_ms > 0
    loaded = kit.registry.snapshot()["scale"].loaded()
    assert kit.answer("scale") == 2.0
    for _ in range(2):
        (serving,) = kit.serve(msgspec.structs.replace(wait, share=1.0))
        assert (serving.ok, serving.incumbent_loaded, serving.load_ms) == (True, True, 0.0)
        assert kit.answer("scale") == 3.0
        (serving,) = kit.serve(wait)
        assert (serving.load_ms, kit.answer("scale")) == (0.0, 2.0)
        assert all(one is other for one, other in zip(kit.registry.snapshot()["scale"].loaded(), loaded, strict=True))
    assert kit.arms() == {("scale/1.2.0", "incumbent"): 3, ("scale/1.3.0", "candidate"): 2}


def test_repeating_a_desired_state_keeps_the_generation(kit: Kit):
    old, new = kit.version("scale", 2), kit.version("scale", 3)
    kit.serve(ServeModel(name="scale", active=old))
    trial = ServeModel(name="scale", active=new, incumbent=old, trial="t")
    kit.serve(trial)
    generation = kit.registry.snapshot()["scale"].generation
    kit.serve(trial)
    assert kit.registry.snapshot()["scale"].generation == generation
    kit.serve(ServeModel(name="scale", active=new))
    assert kit.registry.snapshot()["scale"].generation != generation


@pytest.mark.parametrize("mode", ["shadow", "split", "blue_green"])
def test_a_mode_that_needs_both_versions_is_refused_where_memory_has_room_for_one(kit: Kit, mode: str):
    old = kit.version("scale", 2)
    new = kit.version("scale", 3, peak_memory_bytes=1 << 30)
    kit.available = 1 << 20
    wanted = ServeModel(name="scale", active=new, incumbent=old, trial="t", mode=mode, share=0.5)
    for _ in range(2):  # in a worker that has just begun, and in one that serves
        (serving,) = kit.serve(wanted)
        assert (serving.ok, serving.reason) == (False, reasons.MEMORY_SHORT)
        assert kit.answer("scale") == 2.0
    kit.available = 1 << 40
    (serving,) = kit.serve(wanted)
    assert (serving.ok, serving.incumbent_loaded) == (True, True)


def test_trouble_with_the_incumbent_says_nothing_against_a_shadow(kit: Kit):
    new = kit.version("scale", 3)
    wanted = ServeModel(name="scale", active=new, incumbent=broken(new, kit.folder), trial="t", mode="shadow")
    (serving,) = kit.serve(wanted)
    assert (serving.ok, serving.reason) == (False, reasons.CHILD_FAILED)
    assert "incumbent" in serving.detail
    (serving,) = kit.serve(msgspec.structs.replace(wanted, incumbent=None))
    assert (serving.ok, serving.reason) == (False, reasons.UNSUPPORTED)


def test_a_worker_that_begins_with_a_candidate_that_does_not_load_serves_the_incumbent(kit: Kit):
    old = kit.version("scale", 2)
    (serving,) = kit.serve(ServeModel(name="scale", active=broken(old, kit.folder), incumbent=old, trial="t"))
    assert (serving.ok, serving.reason) == (False, reasons.LOAD_FAILED)
    assert kit.answer("scale") == 2.0


@pytest.mark.parametrize("end", ["promoted", "dropped", "withdrawn"])
def test_nothing_keeps_a_version_in_memory_after_its_shadow_ended(kit: Kit, end: str):
    old, new = kit.version("scale", 2), kit.version("scale", 3)
    kit.serve(ServeModel(name="scale", active=old))
    kit.serve(ServeModel(name="scale", active=new, incumbent=old, trial="t", mode="shadow", shadow_cpu_share_max=1.0))
    for _ in range(5):
        assert kit.answer("scale") == 2.0
    until(lambda: any(one.stats().compared for one in kit.loader.counters()), "the shadow ran")
    held = {one.version: weakref.ref(one) for one in kit.registry.snapshot()["scale"].loaded()}
    match end:
        case "promoted":
            kit.serve(ServeModel(name="scale", active=new))
            gone = ["1.2.0"]
        case "dropped":
            kit.serve(ServeModel(name="scale", active=old))
            gone = ["1.3.0"]
        case _:
            kit.serve()
            until(lambda: kit.registry.get("scale") is None, "the model is withdrawn")
            gone = ["1.2.0", "1.3.0"]
    until(lambda: all(held[version]() is None for version in gone), f"{gone} leave memory")
    assert all(held[version]() is not None for version in held if version not in gone)
    assert kit.loader.freed.is_set()


def test_a_shadow_goes_on_under_new_terms_without_new_credit(kit: Kit):
    old, new = kit.version("scale", 2), kit.version("scale", 3)
    wanted = ServeModel(name="scale", active=new, incumbent=old, trial="t", mode="shadow", shadow_cpu_share_max=0.5)
    kit.serve(wanted)
    first = kit.registry.snapshot()["scale"].shadow
    kit.serve(msgspec.structs.replace(wanted, shadow_cpu_share_max=0.1, share=0.5))
    second = kit.registry.snapshot()["scale"].shadow
    assert first is second
    assert second is not None
    assert second.cpu_share_max == 0.1
    kit.serve(msgspec.structs.replace(wanted, trial="u"))
    third = kit.registry.snapshot()["scale"].shadow
    assert third is not second
    assert third is not None
    assert (third.loaded, third.counter.trial) == (second.loaded, "u")


class Between(dict[str, threading.Event]):
    """What is being swapped cold, and something that happens just before it is looked up."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__()
        self._happens = happens

    def get(self, name: str, default: Any = None) -> Any:
        self._happens()
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self._happens()
        return super().__iter__()


def test_a_cold_swap_that_ends_between_two_looks_is_seen(kit: Kit) -> None:
    kit.serve(ServeModel(name="scale", active=kit.version("scale", 1)))
    one = kit.registry.peek("scale")
    assert one is not None

    def ends() -> None:
        if kit.registry.peek("scale") is None:
            kit.registry.publish("scale", one)

    for ask in (lambda: kit.registry.get("scale"), lambda: kit.registry.names() == ["scale"]):
        kit.registry._cold = Between(ends)
        kit.registry.go_cold("scale")
        assert ask()
