"""A candidate beside the incumbent: what it is compared by, what it may cost, and that no caller notices it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.serving_kit import instead, loadable, until
from tests.shared.engines import models
from wherry_agent.answering.arms import Counter, Loaded, load_variant
from wherry_agent.answering.ask import Ask
from wherry_agent.answering.budget import BURST_SECONDS, CpuBudget
from wherry_agent.answering.comparison import DISTANCE_MAX, compare
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import NICE_MAX, Helpers
from wherry_agent.answering.published import Published
from wherry_agent.answering.route import Route
from wherry_agent.answering.shadow import SHADOW_NICE, SHADOW_QUEUE_MAX, Case, Clock, Shadow, ShadowRunner
from wherry_shared.bundle import Interface, StatePair, TensorSpec
from wherry_shared.engines.errors import EngineFault
from wherry_shared.ids import in_share
from wherry_shared.sketch import RELATIVE_ERROR, Sketch

ONES = {"x": np.ones((1, 4), np.float32)}
WAIT_S = 20


class Fake:
    """An engine that does what a test says."""

    def __init__(self, act: Callable[[np.ndarray], np.ndarray]) -> None:
        self.act = act
        self.ran = 0

    def check(self, inputs: Any) -> int:
        return int(inputs["x"].size).bit_length() - 1

    def short_way(self) -> Callable[..., int]:
        def run(results: dict[str, Any], inputs: Any, outputs: Any) -> int:
            self.run_into(results, inputs, outputs)
            return self.check(inputs)

        return run

    def run_into(self, results: dict[str, Any], inputs: Any, outputs: Any, interrupt: Any = None) -> None:
        self.ran += 1
        results["y"] = self.act(inputs["x"])


class Kit:
    """A published shadow: the incumbent gives 2 · x."""

    def __init__(self, folder: Path, act: Callable[[np.ndarray], np.ndarray] | None = None, **terms: Any) -> None:
        old = loadable(models.scale(folder / "old.onnx", 2.0))
        new = terms.pop("candidate", None) or loadable(models.scale(folder / "new.onnx", 2.01), "1.1.0")
        self.runner = ShadowRunner(terms.pop("clock", None))
        self.errors: list[int] = []
        self.gate, self.helpers = RunGate(1), Helpers()
        counter = Counter(new, "shadow", "t")
        loaded = load_variant(new) if act is None else Loaded(new, Fake(act), 0.0)  # type: ignore[arg-type]
        share = terms.pop("share", 1.0)
        self.shadow = Shadow(
            loaded,
            counter,
            self.runner,
            terms.pop("cpu_share_max", 1.0),
            terms.pop("deadline_s", 10.0),
            lambda: self.errors.append(1),
        )
        self.published = Published(
            active=loaded,
            counter=counter,
            incumbent=load_variant(old),
            incumbent_counter=Counter(old, "incumbent"),
            trial="t",
            route=Route("shadow", share, "salt"),
            shadow=self.shadow,
        )

    def ask(self, inputs: dict[str, np.ndarray] = ONES, **ask: Any) -> float:
        answer = self.published.answer(self.gate, self.helpers, inputs, ask=Ask(**ask))
        assert answer.loaded is self.published.incumbent
        return float(answer.outputs["y"][0, 0])

    def stats(self) -> Any:
        assert self.runner.idle(WAIT_S)
        return self.published.counter.stats()


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Callable[..., Kit]]:
    made: list[Kit] = []

    def make(*arguments: Any, **terms: Any) -> Kit:
        made.append(Kit(tmp_path, *arguments, **terms))
        return made[-1]

    yield make
    for one in made:
        one.runner.close()
        one.helpers.close()


def test_the_incumbent_answers_and_the_candidate_is_compared_on_its_share(kit: Callable[..., Kit]):
    one = kit(share=0.4)
    for number in range(30):
        assert one.ask(request_id=str(number)) == 2.0
        assert one.runner.idle(WAIT_S)
    picked = sum(in_share("salt", str(number), 0.4) for number in range(30))
    stats = one.stats()
    assert (stats.arm, stats.requests, stats.compared, stats.agreed) == ("shadow", picked, picked, picked)
    assert stats.skipped == 0
    assert sum(stats.latency_us["2"].values()) == picked - 10
    distance = Sketch.from_wire(stats.distance)
    assert distance.quantile(0.5) == pytest.approx(0.01 / 2, rel=2 * RELATIVE_ERROR)
    assert one.published.incumbent_counter is not None
    assert one.published.incumbent_counter.stats().requests == 30


def test_a_candidate_that_answers_otherwise_does_not_agree(kit: Callable[..., Kit]):
    rising = {"x": np.arange(4, dtype=np.float32)[None]}
    one = kit(lambda x: -2 * x)
    one.ask(rising)
    stats = one.stats()
    assert (stats.compared, stats.agreed) == (1, 0)
    assert Sketch.from_wire(stats.distance).quantile(1) == pytest.approx(2, rel=2 * RELATIVE_ERROR)


def test_callers_wait_neither_for_a_shadow_nor_for_its_queue(kit: Callable[..., Kit]):
    release = threading.Event()

    def hold(x: np.ndarray) -> np.ndarray:
        release.wait(WAIT_S)
        return 2 * x

    one = kit(hold, cpu_share_max=1.0)
    for _ in range(SHADOW_QUEUE_MAX + 5):
        assert one.ask() == 2.0  # the shadow holds still until all are answered
    assert one.published.counter.stats().skipped >= 4
    release.set()
    stats = one.stats()
    assert stats.requests + stats.skipped == SHADOW_QUEUE_MAX + 5
    assert stats.requests == stats.compared >= 1


def test_a_shadow_sees_the_request_as_it_was(kit: Callable[..., Kit]):
    go = threading.Event()
    one = kit(lambda x: (go.wait(WAIT_S), 2 * x)[1])
    inputs = {"x": np.arange(4, dtype=np.float32)[None]}
    answer = one.published.answer(one.gate, one.helpers, inputs)
    inputs["x"][:] = 100  # an application that uses its arrays again
    answer.outputs["y"][:] = -100
    go.set()
    stats = one.stats()
    assert (stats.compared, stats.agreed, stats.distance) == (1, 1, {"z": 1})


def test_what_a_shadow_fails_is_told_at_once_and_no_caller_notices(kit: Callable[..., Kit]):
    def fail(_: np.ndarray) -> np.ndarray:
        raise EngineFault("run_failed", "no luck")

    one = kit(fail)
    assert one.ask() == 2.0
    stats = one.stats()
    assert (stats.requests, stats.errors, stats.fallbacks, stats.compared) == (1, 1, 0, 0)
    assert "no luck" in stats.last_error
    assert one.errors == [1]


def test_an_endless_shadow_is_left_behind_and_one_that_got_no_core_is_only_skipped(
    kit: Callable[..., Kit], tmp_path: Path
):
    quick = loadable(models.slow(tmp_path / "quick.onnx", 2.0, turns=1), "1.1.0")
    endless = instead(quick, models.slow(tmp_path / "endless.onnx", 2.0, turns=10**12))
    one = kit(candidate=endless, deadline_s=0.5)
    one.ask()
    stats = one.stats()
    if stats.skipped:  # this machine gave it less than half a core: not slow, starved
        assert stats.errors == 0
    else:
        assert (stats.errors, one.errors) == (1, [1])
        assert "deadline" in stats.last_error
    until(lambda: one.runner.helpers.stuck == 0, "the engine gives up the call")

    starved = kit(lambda x: (time.sleep(1.0), 2 * x)[1], deadline_s=0.05)
    starved.ask()
    stats = starved.stats()
    assert (stats.requests, stats.errors, stats.skipped) == (0, 0, 1)
    assert starved.errors == []


def test_a_shadow_takes_no_permit_and_waits_while_callers_do(kit: Callable[..., Kit]):
    one = kit(lambda x: 2 * x)
    one.gate.enter()
    waiting = threading.Thread(target=one.gate.enter, daemon=True)
    waiting.start()
    until(lambda: one.gate.waiting == 1, "somebody waits for a core")
    case_gate = RunGate(1)
    one.published.answer(case_gate, one.helpers, ONES)  # with a free gate it runs
    assert one.stats().requests == 1
    one.gate.leave()
    waiting.join(WAIT_S)
    # now the gate of the case is taken, and somebody waits for it
    waiting = threading.Thread(target=lambda: (one.gate.enter(), one.gate.leave()), daemon=True)
    waiting.start()
    until(lambda: one.gate.waiting == 1, "somebody waits again")
    one.shadow.beside(_case_of(one), one.gate, unshared=True)
    stats = one.stats()
    assert (stats.requests, stats.skipped) == (1, 1)
    one.gate.leave()
    waiting.join(WAIT_S)


def _case_of(one: Kit) -> Case:
    assert one.published.incumbent is not None
    return Case(one.published.incumbent.loadable, ONES, None, {"y": 2 * ONES["x"]})


def test_the_engine_of_a_shadow_runs_at_low_priority(kit: Callable[..., Kit]):
    found: list[int] = []

    def look(x: np.ndarray) -> np.ndarray:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return 2 * x

    one = kit(look)
    one.ask()
    one.stats()
    assert found == [min(os.getpriority(os.PRIO_PROCESS, 0) + SHADOW_NICE, NICE_MAX)]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25])
def test_the_cpu_budget_is_obeyed_over_a_stretch(kit: Callable[..., Kit], share: float):
    """A counting clock: each run takes 90 ms of a core, requests come every 40 ms for 60 s."""
    now, cpu = [0.0], [0]

    def work(x: np.ndarray) -> np.ndarray:
        cpu[0] += 90_000_000
        return 2 * x

    one = kit(work, cpu_share_max=share, clock=Clock(lambda: now[0], lambda: cpu[0]))
    for _ in range(1500):
        now[0] += 0.04
        one.ask(unshared=True)
        assert one.runner.idle(WAIT_S)
    stats = one.stats()
    assert stats.requests + stats.skipped == 1500
    used_s = cpu[0] / 1e9
    assert used_s <= share * 60 + share * BURST_SECONDS + 0.091
    assert used_s >= share * 60 * 0.95, "what it may use it can use"


@given(
    share=st.floats(0, 1),
    events=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 2)), max_size=60),
    retuned=st.floats(0, 1),
)
def test_a_bucket_gives_no_more_than_its_share_one_bucket_and_one_run(
    share: float, events: list[tuple[float, float]], retuned: float
):
    budget = CpuBudget(share, 0.0)
    now = 0.0
    began: list[tuple[float, float]] = []
    for wait, cost in events:
        now += wait
        if budget.allows(now):
            budget.pay(cost, now)
            began.append((now, cost))
    for index, (start, _) in enumerate(began):
        for stop in range(index, len(began)):
            used = sum(cost for _, cost in began[index : stop + 1])
            last = began[stop][1]
            assert used <= share * (began[stop][0] - start) + share * BURST_SECONDS + last + 1e-9
    budget.retune(retuned, now)
    if budget.allows(now):
        assert retuned > 0


def interface(*outputs: TensorSpec, state: list[StatePair] | None = None) -> Interface:
    return Interface(inputs=[], outputs=list(outputs), state=state or [])


SCORES = TensorSpec(name="y", datatype="FP32", shape=[2, 3], labels=["a", "b", "c"])
BOXES = TensorSpec(name="y", datatype="FP32", shape=[2, 3])
LABELLED = TensorSpec(name="y", datatype="FP32", shape=[3], labels=["a", "b", "c"])
IMAGE = TensorSpec(name="y", datatype="FP32", shape=[1, 2, 3])
WORDS = TensorSpec(name="y", datatype="BYTES", shape=[2])
COUNTS = TensorSpec(name="y", datatype="INT64", shape=[3])


@pytest.mark.parametrize(
    ("what", "spec", "one", "other", "agreed", "distance"),
    [
        ("same top class of every row", SCORES, [[1, 2, 3], [3, 0, 0]], [[0, 0, 9], [3, 2, 1]], True, 2.0),
        ("another top class of one row", SCORES, [[1, 2, 3], [3, 0, 0]], [[1, 2, 3], [0, 3, 0]], False, 1.0),
        ("labels without a batch", LABELLED, [0.1, 0.7, 0.2], [0.3, 0.4, 0.3], True, 0.5),
        (
            "rows without labels, the largest where it was",
            BOXES,
            [[1, 2, 3], [3, 0, 0]],
            [[0, 0, 9], [3, 2, 1]],
            False,
            2.0,
        ),
        (
            "rows without labels, within the tolerance",
            BOXES,
            [[1, 1.01, 0], [3, 0, 0]],
            [[1.01, 1, 0], [3, 0, 0]],
            True,
            0.01 / 3,
        ),
        ("an image within the tolerance", IMAGE, [[[0, 1, 2], [3, 4, 10]]], [[[0.1, 1, 2], [3, 4, 10]]], True, 0.01),
        ("an image beyond it in one place", IMAGE, [[[0, 1, 2], [3, 4, 10]]], [[[0.5, 1, 2], [3, 4, 10]]], False, 0.05),
        ("equal words", WORDS, [b"a", b"b"], [b"a", b"b"], True, None),
        ("unequal words", WORDS, [b"a", b"b"], [b"a", b"c"], False, None),
        ("whole numbers have to be equal", COUNTS, [1, 2, 11], [1, 2, 12], False, 0.1),
        ("another shape", IMAGE, [[[1, 2, 3], [1, 2, 3]]], [[[1, 2, 3]]], False, None),
        ("constant values", IMAGE, [[[5, 5, 5], [5, 5, 5]]], [[[5, 5, 5], [5, 5, 6]]], False, 0.2),
        ("NaN where it is allowed", IMAGE, [[[np.nan, 0, 1], [0, 0, 0]]], [[[np.nan, 0, 1], [0, 0, 0]]], True, 0.0),
        ("Inf against a number", IMAGE, [[[0, 0, 1], [0, 0, 0]]], [[[np.inf, 0, 1], [0, 0, 0]]], False, DISTANCE_MAX),
    ],
)
def test_answers_agree_where(what: str, spec: TensorSpec, one: Any, other: Any, agreed: bool, distance: float | None):
    dtype = {"BYTES": object, "INT64": np.int64}.get(spec.datatype, np.float32)
    found = compare(interface(spec), {"y": np.array(one, dtype)}, {"y": np.array(other, dtype)})
    assert found.agreed == agreed, what
    assert found.distance == (None if distance is None else pytest.approx(distance, rel=1e-5))


def test_labels_decide_where_there_are_any_and_states_never():
    more = TensorSpec(name="z", datatype="FP32", shape=[1, 1, 1])
    both = interface(LABELLED, more, state=[StatePair(output="h", input="h_in")])
    answer = {"y": np.array([0, 1, 0], np.float32), "z": np.ones((1, 1, 1), np.float32), "h": np.zeros(2, np.float32)}
    other = {**answer, "z": np.full((1, 1, 1), 9, np.float32), "h": np.ones(2, np.float32)}
    assert compare(both, answer, other) == (True, 8.0)
