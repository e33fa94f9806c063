"""The pieces under worker and handle: helpers that can be left behind, counters, the registry, cold swaps."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import instead, loadable, until
from tests.shared.engines import models
from wherry_agent.answering import memory
from wherry_agent.answering.arms import CLASSES_MAX, CONFIDENCE_ROWS_MAX, Counter, load_variant
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers, Overrun
from wherry_agent.answering.published import Published
from wherry_agent.answering.registry import Registry
from wherry_agent.children import Serve, ServeModel, Serving
from wherry_agent.workers.loader import Loader
from wherry_shared import reasons
from wherry_shared.bundle import TensorSpec
from wherry_shared.engines.errors import EngineFault
from wherry_shared.sketch import Sketch


def test_a_helper_returns_results_and_raises_what_was_raised():
    helpers = Helpers()
    assert helpers.run(lambda: 42, 5) == 42
    with pytest.raises(ZeroDivisionError):
        helpers.run(lambda: 1 // 0, 5)
    helpers.close()


def test_helpers_are_used_again():
    helpers = Helpers()
    names = {helpers.run(lambda: threading.current_thread().ident, 5) for _ in range(20)}
    assert len(names) <= 2  # a helper may still be on its way back when the next call begins
    helpers.close()


def test_a_call_that_overruns_is_left_behind_and_its_result_dropped():
    helpers = Helpers(stuck_max=2)
    release = threading.Event()
    ended: list[int] = []

    def slow() -> int:
        release.wait(20)
        ended.append(1)
        return 1

    for _ in range(2):
        with pytest.raises(Overrun):
            helpers.run(slow, 0.01)
    with pytest.raises(Overrun, match="still running"):
        helpers.run(lambda: 3, 5)
    release.set()
    until(lambda: len(ended) == 2, "both calls end")

    def again() -> bool:
        try:
            return helpers.run(lambda: 3, 5) == 3
        except Overrun:
            return False

    until(again, "helpers are free again")
    helpers.close()


def test_an_endless_candidate_is_asked_to_stop_when_nobody_waits_for_it(tmp_path: Path):
    """A call left behind would burn a core for ever, and slow down the incumbent that answers instead."""
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    quick = loadable(models.slow(tmp_path / "quick.onnx", 3.0, turns=1), "1.1.0")
    endless = instead(quick, models.slow(tmp_path / "endless.onnx", 3.0, turns=10**12))
    helpers = Helpers()
    published = Published(
        active=load_variant(endless),
        counter=Counter(endless, "candidate", "t"),
        incumbent=load_variant(good),
        incumbent_counter=Counter(good, "incumbent"),
        trial="t",
        deadline_s=0.05,
    )
    answer = published.answer(RunGate(1), helpers, {"x": np.ones((1, 4), np.float32)})
    assert (answer.fallback, answer.outputs["y"][0, 0]) == (True, 2.0)
    until(lambda: helpers.stuck == 0, "the engine gives up the call")
    assert published.counter.stats().errors == 1
    helpers.close()


def test_the_gate_lets_so_many_in_and_measures_the_wait():
    gate = RunGate(1)
    assert gate.enter() == 0
    waited: list[int] = []
    thread = threading.Thread(target=lambda: waited.append(gate.enter()))
    thread.start()
    started = time.perf_counter()
    until(lambda: time.perf_counter() - started > 0.02, "20 ms pass")
    assert waited == []
    gate.leave()
    thread.join(20)
    assert waited[0] > 10_000_000
    gate.leave()


def test_classes_are_counted_by_label_and_bounded(tmp_path: Path):
    labels = [f"class-{n}" for n in range(CLASSES_MAX + 10)]
    interface = models.interface(width=len(labels))
    interface = msgspec.structs.replace(
        interface, outputs=[msgspec.structs.replace(interface.outputs[0], labels=labels)]
    )
    one = loadable(models.scale(tmp_path / "a.onnx", 1.0, width=len(labels)), interface=interface)
    loaded = load_variant(one)
    counter = Counter(one, "incumbent")
    rows = np.eye(len(labels), dtype=np.float32)
    counter.answered(loaded, 5, 1000, 0, {"y": rows})
    counter.answered(loaded, 5, 1000, 0, {"y": rows[:2]})
    classes = counter.stats().classes
    assert classes["class-0"] == 2
    assert classes["other"] == 10
    assert len(classes) == CLASSES_MAX + 1
    assert sum(classes.values()) == len(labels) + 2


def test_text_is_counted_only_where_the_bundle_names_it_as_a_class(tmp_path: Path):
    text = TensorSpec(name="y", datatype="BYTES", shape=["n"], labels=["cat", "dog"])
    one = loadable(models.scale(tmp_path / "a.onnx", 1.0))
    loaded = load_variant(one)
    interface = msgspec.structs.replace(one.interface, outputs=[text])
    counter = Counter(msgspec.structs.replace(one, interface=interface), "incumbent")
    counter.answered(loaded, 2, 1000, 0, {"y": np.array(["cat", "my secret", "cat", "dog"], object)})
    counter.answered(loaded, 2, 1000, 0, {"y": np.array(["dog", "d"], object)})
    stats = counter.stats()
    assert stats.classes == {"cat": 2, "dog": 2, "other": 2}
    assert Sketch.from_wire(stats.confidence).count == 0


def test_the_top_class_is_counted_with_its_value(tmp_path: Path):
    interface = models.interface()
    labels = ["a", "b", "c", "d"]
    interface = msgspec.structs.replace(
        interface, outputs=[msgspec.structs.replace(interface.outputs[0], labels=labels, finite=False)]
    )
    one = loadable(models.scale(tmp_path / "a.onnx", 1.0), interface=interface)
    loaded = load_variant(one)
    counter = Counter(one, "incumbent")
    counter.answered(loaded, 2, 1000, 0, {"y": np.array([[0.1, 0.8, 0.1, 0.0]], np.float32)})
    counter.answered(loaded, 2, 1000, 0, {"y": np.array([[-1, -3, -2, -9], [np.inf, 0, 0, 0]], np.float32)})
    counter.answered(loaded, 2, 1000, 0, {"z": np.zeros((1, 4), np.float32)})
    stats = counter.stats()
    assert stats.classes == {"a": 2, "b": 1}
    sketch = Sketch.from_wire(stats.confidence)
    assert (sketch.count, sketch.zeros) == (2, 1)
    assert sketch.quantile(1) == pytest.approx(0.8, rel=0.01)
    # a map of classes: all of its points are counted, a few of their values looked at
    points = np.zeros((100, 100, 4), np.float32)
    points[..., 3] = 0.5
    counter.answered(loaded, 15, 1000, 0, {"y": points})
    stats = counter.stats()
    assert stats.classes["d"] == 10_000
    assert Sketch.from_wire(stats.confidence).count <= 2 + CONFIDENCE_ROWS_MAX


def test_news_are_told_once(tmp_path: Path):
    one = loadable(models.scale(tmp_path / "a.onnx", 1.0))
    counter = Counter(one, "candidate", "t")
    assert counter.news() is None
    counter.failed("x" * 10_000, fallback=True)
    stats = counter.news()
    assert stats is not None
    assert (stats.requests, stats.errors, stats.fallbacks, len(stats.last_error)) == (1, 1, 1, 500)
    assert counter.news() is None


def test_a_variant_that_fails_its_warm_up_is_not_loaded(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "a.onnx", 1.0))
    broken = instead(good, models.save_gather_out_of_range(tmp_path / "b.onnx"))
    with pytest.raises(EngineFault, match="run_failed"):
        load_variant(broken)


def test_memory_is_compared_with_headroom_and_reserve():
    assert memory.fits_beside(0, 10**12, 0)
    assert memory.fits_beside(100, 20, 140)
    assert not memory.fits_beside(100, 21, 140)
    assert memory.available_bytes() > 0


def test_who_asks_during_a_cold_swap_waits_for_the_new_version():
    registry = Registry()
    registry.go_cold("m")
    assert registry.names() == ["m"]
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(registry.get("m")))
    thread.start()
    assert registry.peek("m") is None
    registry.publish("m", "anything")  # type: ignore[arg-type]
    thread.join(20)
    assert found == ["anything"]
    registry.withdraw("m")
    assert registry.get("m") is None


def test_a_cold_swap_that_fails_brings_the_old_version_back(tmp_path: Path):
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    (tmp_path / "junk").write_bytes(b"junk")
    broken = msgspec.structs.replace(
        instead(old, tmp_path / "junk"), manifest="sha256:" + "2" * 64, peak_memory_bytes=1 << 50
    )
    said: list[Serving] = []
    registry = Registry()
    loader = Loader(registry, said.append, on_candidate_error=lambda: None, on_first=lambda: None)
    loader.want(Serve(revision=1, models=[ServeModel(name="scale", active=old)]))
    until(lambda: len(said) == 1, "the old version serves")
    loader.want(Serve(revision=2, models=[ServeModel(name="scale", active=broken, incumbent=old, trial="t")]))
    until(lambda: len(said) == 2, "the new one is refused")
    assert (said[1].ok, said[1].reason) == (False, reasons.LOAD_FAILED)
    published = registry.get("scale")
    assert published is not None
    assert published.active.version == "1.0.0"
    assert published.trial == ""
    loader.stop()


def test_old_versions_are_let_go_when_their_last_caller_leaves(tmp_path: Path):
    registry = Registry()
    said: list[Serving] = []
    loader = Loader(registry, said.append, on_candidate_error=lambda: None, on_first=lambda: None)
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    loader.want(Serve(revision=1, models=[ServeModel(name="scale", active=old)]))
    until(lambda: len(said) == 1, "the old version serves")
    caller = registry.get("scale")
    loader.want(Serve(revision=2, models=[ServeModel(name="scale", active=new)]))
    until(lambda: len(said) == 2, "the new version serves")
    assert not loader.freed.is_set()
    assert caller is not None
    assert caller.active.bound.run({"x": np.ones((1, 4), np.float32)})["y"][0, 0] == 2.0
    del caller
    until(loader.freed.is_set, "the old version is freed")
    loader.stop()
