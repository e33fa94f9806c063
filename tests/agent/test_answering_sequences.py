"""Models with state: one sequence is one version's, whatever is swapped meanwhile, and nothing is kept for ever."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.agent.serving_kit import loadable, until
from tests.shared.engines import models
from wherry_agent.answering import sequences as limits
from wherry_agent.answering.arms import Counter, Loaded, load_variant
from wherry_agent.answering.ask import Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Answer, Published
from wherry_agent.answering.registry import Registry
from wherry_agent.answering.route import Route
from wherry_agent.answering.sequences import SEQUENCE_SECONDS, Sequences
from wherry_agent.answering.shadow import Shadow, ShadowRunner
from wherry_agent.children import Loadable, Serve, ServeModel, Serving
from wherry_agent.workers.loader import Loader
from wherry_shared.engines.errors import BadInput, EngineFault


def rows(value: float, count: int = 1) -> np.ndarray:
    return np.full((count, 4), value, np.float32)


class Kit:
    """A model with state, its versions, and what is published of it now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = [0.0]
        self.sequences = Sequences(lambda: self.now[0])
        self.gate, self.helpers = RunGate(4), Helpers()
        self.published: Published

    def version(self, factor: int, state_id: str | None = None, *, picky: bool = False) -> Loaded:
        path = models.tally(self.folder / f"{factor}-{state_id}-{picky}.onnx", float(factor), picky=picky)
        return load_variant(loadable(path, f"1.{factor}.0", model="tally", interface=models.tally_interface(state_id)))

    def publish(self, active: Loaded, incumbent: Loaded | None = None, **more: Any) -> None:
        trial = "t" if incumbent is not None else ""
        self.published = Published(
            active=active,
            counter=Counter(active.loadable, "candidate" if trial else "incumbent", trial),
            incumbent=incumbent,
            incumbent_counter=Counter(incumbent.loadable, "incumbent") if incumbent is not None else None,
            trial=trial,
            sequences=self.sequences,
            **more,
        )
        self.settle()

    def settle(self) -> None:
        self.published.settle()

    def tell(self, sequence: str, value: float, **more: Any) -> Answer:
        ask = Ask(sequence_id=sequence, sequence_start=more.pop("start", False), sequence_end=more.pop("end", False))
        inputs = {"x": rows(value), **more.pop("inputs", {})}
        return self.published.answer(self.gate, self.helpers, inputs, more.pop("outputs", None), ask=ask)

    def add(self, sequence: str, value: float, **more: Any) -> float:
        return float(self.tell(sequence, value, **more).outputs["y"][0, 0])


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(tmp_path)
    yield kit
    kit.helpers.close()


def test_a_sequence_goes_on_from_its_last_answer_and_is_nobody_elses(kit: Kit):
    kit.publish(kit.version(1))
    assert [kit.add("a", value) for value in (1, 2, 3)] == [1, 3, 6]
    assert [kit.add("b", value) for value in (10, 1)] == [10, 11]
    assert kit.add("a", 1) == 7
    assert set(kit.tell("a", 0).outputs) == {"y"}, "state is the worker's business"
    assert set(kit.tell("a", 0, outputs=["total"]).outputs) == {"total"}, "unless it is asked for"
    assert kit.add("a", 1, outputs=["y"]) == 8
    assert kit.published.counter.stats().requests == 9


def test_the_state_that_a_caller_changes_is_its_own(kit: Kit):
    kit.publish(kit.version(1))
    total = kit.tell("a", 1, outputs=["total", "y"]).outputs["total"]
    total[:] = 100
    assert kit.add("a", 1) == 2


def test_start_begins_anew_and_end_forgets(kit: Kit):
    kit.publish(kit.version(1))
    assert kit.add("a", 5, start=True) == 5
    assert kit.add("a", 1) == 6
    assert kit.add("a", 1, start=True) == 1
    assert kit.add("a", 1, end=True) == 2
    assert len(kit.sequences) == 0
    assert kit.add("a", 4) == 4, "a sequence that ended is not missed"
    assert kit.add("b", 4, start=True, end=True) == 4
    assert len(kit.sequences) == 1


def test_a_first_state_has_the_shape_of_the_request_or_is_the_callers(kit: Kit):
    kit.publish(kit.version(1))
    ask = Ask(sequence_id="wide")
    for total in (1, 2):
        answer = kit.published.answer(kit.gate, kit.helpers, {"x": rows(1, 3)}, ask=ask)
        assert answer.outputs["y"].tolist() == rows(total, 3).tolist()
    assert kit.add("a", 1, inputs={"total_in": rows(40)}) == 41
    assert kit.add("a", 1) == 42


def test_without_a_sequence_state_is_an_ordinary_input(kit: Kit):
    kit.publish(kit.version(1))
    with pytest.raises(BadInput, match="total_in"):
        kit.published.answer(kit.gate, kit.helpers, {"x": rows(1)})
    answer = kit.published.answer(kit.gate, kit.helpers, {"x": rows(1), "total_in": rows(2)})
    assert sorted(answer.outputs) == ["total", "y"]
    assert len(kit.sequences) == 0


def test_a_refused_request_neither_begins_nor_moves_a_sequence(kit: Kit):
    kit.publish(kit.version(1))
    with pytest.raises(BadInput):
        kit.tell("a", 1, inputs={"y": rows(1)})
    assert len(kit.sequences) == 0
    kit.add("a", 1)
    with pytest.raises(BadInput):
        kit.tell("a", 1, inputs={"z": rows(1)})
    assert kit.add("a", 1) == 2
    with pytest.raises(BadInput, match="characters"):
        kit.tell("a" * 1000, 1)


def test_requests_of_one_sequence_take_turns(kit: Kit):
    kit.publish(kit.version(1))
    answers: list[float] = []

    def ask() -> None:
        answers.extend(kit.add("a", 1) for _ in range(25))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(1, 101))


def test_a_sequence_stays_with_the_version_that_began_it(kit: Kit):
    first, second = kit.version(1), kit.version(10)
    kit.publish(first)
    assert kit.add("old", 1) == 1
    kit.publish(second, first)
    assert kit.add("old", 1) == 2, "the incumbent goes on"
    assert kit.add("new", 1) == 10
    kit.publish(second)
    assert [kit.add("old", 1), kit.add("new", 1)] == [3, 20], "also when it is no incumbent any more"
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is not None
    assert kit.add("old", 1, end=True) == 4
    gc.collect()
    assert gone() is None


def test_a_version_that_left_is_held_no_longer_than_the_limit_and_the_sequence_is_told_once(kit: Kit):
    first, second = kit.version(1), kit.version(10)
    kit.publish(first)
    kit.add("busy", 1)
    kit.add("idle", 1)
    kit.publish(second)
    gone = weakref.ref(first)
    del first
    for _ in range(4):
        kit.now[0] += SEQUENCE_SECONDS / 4
        kit.settle()
        kit.add("busy", 1)
    assert gone() is not None
    kit.now[0] += 1
    kit.settle()
    gc.collect()
    assert gone() is None
    for name in ("busy", "idle"):
        with pytest.raises(BadInput, match="let go"):
            kit.add(name, 1)
        assert kit.add(name, 1) == 10


def test_an_idle_sequence_is_let_go(kit: Kit):
    kit.publish(kit.version(1))
    kit.add("a", 1)
    kit.now[0] += SEQUENCE_SECONDS - 1
    kit.settle()
    assert kit.add("a", 1) == 2
    kit.now[0] += SEQUENCE_SECONDS + 1
    kit.settle()
    assert len(kit.sequences) == 0
    with pytest.raises(BadInput, match="idle"):
        kit.add("a", 1)
    assert kit.add("a", 1) == 1


def test_bundles_that_share_their_state_hand_over_in_the_middle(kit: Kit):
    first, second = kit.version(1, "sum"), kit.version(10, "sum")
    kit.publish(first)
    kit.add("a", 1)
    gone = weakref.ref(first)
    kit.publish(second, first)
    assert kit.add("a", 1) == 20
    kit.publish(second)
    del first
    gc.collect()
    assert gone() is None, "nothing holds on to the version before"
    assert kit.add("a", 1) == 30


@pytest.mark.parametrize("limit", ["number", "bytes"])
def test_what_is_kept_has_a_limit_and_who_lost_its_place_is_told(kit: Kit, monkeypatch, limit: str):
    if limit == "number":
        monkeypatch.setattr(limits, "SEQUENCES_MAX", 3)
    else:
        monkeypatch.setattr(limits, "SEQUENCE_BYTES_MAX", 3 * rows(0).nbytes)
    kit.publish(kit.version(1))
    for name in ("a", "b", "c"):
        kit.add(name, 1)
    kit.add("a", 1)
    kit.add("d", 1)
    assert len(kit.sequences) == 3
    with pytest.raises(BadInput, match="room"):
        kit.add("b", 1)
    assert [kit.add(name, 1) for name in ("a", "c", "d")] == [3, 2, 2]
    assert kit.add("b", 1, start=True) == 1


def test_what_a_candidate_fails_is_answered_by_an_incumbent_that_understands_the_state(kit: Kit):
    old, new = kit.version(1, "sum"), kit.version(10, "sum", picky=True)
    kit.publish(new, old)
    assert kit.add("a", 1) == 10
    answer = kit.tell("a", 7)
    assert (answer.fallback, answer.outputs["y"][0, 0]) == (True, 8)
    assert kit.add("a", 1) == 90, "and the candidate goes on from there"


def test_an_incumbent_with_another_state_takes_over_only_at_the_beginning(kit: Kit):
    old, new = kit.version(1), kit.version(10, picky=True)
    kit.publish(new, old)
    answer = kit.tell("a", 7)
    assert (answer.fallback, answer.outputs["y"][0, 0]) == (True, 7)
    assert kit.add("a", 1) == 8, "and keeps it"
    assert kit.add("b", 1) == 10
    with pytest.raises(EngineFault):
        kit.add("b", 7)
    assert kit.add("b", 1) == 20, "the failed request did not move it"
    assert kit.published.counter.stats().errors == 2


def test_a_named_version_keeps_its_own_sequences(kit: Kit):
    old, new = kit.version(1), kit.version(10)
    kit.publish(new, old)
    ask = Ask(sequence_id="a")
    for total in (1, 2):
        answer = kit.published.answer_by(old, kit.gate, {"x": rows(1)}, ask=ask)
        assert float(answer.outputs["y"][0, 0]) == total
        assert kit.add("a", 1) == 10 * total
    assert kit.published.counter.stats().requests == 2


def test_a_shadow_keeps_the_candidates_own_state(kit: Kit):
    old, new = kit.version(1), kit.version(2)
    runner = ShadowRunner()
    counter = Counter(new.loadable, "shadow", "t")
    shadow = Shadow(new, counter, runner, 1.0, 10.0, lambda: None)
    kit.publish(old)
    kit.add("early", 1)
    kit.publish(new, old, route=Route("shadow", 1.0, "s"), shadow=shadow)
    for value in (1, 2):
        assert kit.add("a", value, outputs=["y"]) == {1: 1, 2: 3}[value]
        assert runner.idle(20)
    assert (counter.stats().compared, counter.stats().skipped) == (2, 0)
    assert shadow._states["a"][1]["total_in"].tolist() == rows(3).tolist()
    assert kit.add("early", 1) == 2, "a sequence that began before it"
    assert runner.idle(20)
    assert (counter.stats().compared, counter.stats().skipped) == (2, 1)
    kit.add("a", 1, end=True)
    assert runner.idle(20)
    assert (counter.stats().compared, len(shadow._states)) == (3, 0)
    runner.close()


def test_a_cold_swap_lets_go_of_sequences_that_hold_the_old_version(tmp_path: Path):
    def version(factor: int, state_id: str | None, **more: int) -> Loadable:
        path = models.tally(tmp_path / f"{factor}.onnx", float(factor))
        interface = models.tally_interface(state_id)
        return loadable(path, f"1.{factor}.0", model="tally", interface=interface, **more)

    for state_id in ("sum", None):
        registry, said, gate, helpers = Registry(), list[Serving](), RunGate(2), Helpers()
        loader = Loader(registry, said.append, on_candidate_error=lambda: None, on_first=lambda: None)

        def ask(registry: Registry = registry, gate: RunGate = gate, helpers: Helpers = helpers) -> float:
            published = registry.get("tally")
            assert published is not None
            answer = published.answer(gate, helpers, {"x": rows(1)}, ask=Ask(sequence_id="a"))
            return float(answer.outputs["y"][0, 0])

        loader.want(Serve(revision=1, models=[ServeModel(name="tally", active=version(1, state_id))]))
        until(lambda said=said: len(said) == 1, "the first version serves")
        assert ask() == 1
        big = version(10, state_id, peak_memory_bytes=1 << 50)
        loader.want(Serve(revision=2, models=[ServeModel(name="tally", active=big)]))
        until(
            lambda said=said: len(said) == 2, "the second version serves", 9.0
        )  # less than it would wait for a caller
        if state_id:
            assert ask() == 20
        else:
            with pytest.raises(BadInput, match="memory"):
                ask()
            assert ask() == 10
        loader.settle()
        loader.stop()
        helpers.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans(), st.booleans()),
            st.sampled_from(["swap", "settle"]),
        ),
        max_size=40,
    )
)
def test_whatever_is_swapped_in_between_each_answer_is_that_of_one_version_over_its_sequence(kit: Kit, turns: Any):
    versions = _versions(kit)
    kit.sequences = Sequences(lambda: 0.0)
    current = 0
    kit.publish(versions[0])
    expected: dict[str, tuple[int, int]] = {}
    for turn in turns:
        if turn == "swap":
            current = 1 - current
            kit.publish(versions[current], versions[1 - current])
            kit.publish(versions[current])
        elif turn == "settle":
            kit.settle()
        else:
            name, value, start, end = turn
            if start or name not in expected:
                expected[name] = (current, 0)
            version, total = expected[name]
            expected[name] = (version, total + value)
            assert kit.add(name, value, start=start, end=end) == (total + value) * (1, 10)[version]
            if end:
                del expected[name]
    assert len(kit.sequences) == len(expected)


def _versions(kit: Kit) -> list[Loaded]:
    found = getattr(kit, "made", None)
    if found is None:
        found = kit.made = [kit.version(1), kit.version(10)]  # type: ignore[attr-defined]
    return found


def test_what_a_candidate_began_ends_when_it_is_taken_back_and_not_when_it_is_confirmed(kit: Kit):
    old, new, newer = kit.version(1), kit.version(10), kit.version(100)
    kit.publish(new, old)
    kit.add("a", 1)
    kit.publish(old)
    gone = weakref.ref(new)
    del new
    gc.collect()
    assert gone() is None
    with pytest.raises(BadInput, match="taken back"):
        kit.add("a", 1)
    assert kit.add("a", 1) == 1
    kit.publish(newer, old)
    kit.add("b", 1)
    kit.publish(newer)
    kit.publish(old)
    assert kit.add("b", 1) == 200


def test_a_version_that_left_and_fails_ends_the_sequence(kit: Kit):
    first, second = kit.version(1, picky=True), kit.version(10)
    kit.publish(first)
    kit.add("a", 1)
    kit.publish(second)
    assert kit.add("a", 1) == 2
    with pytest.raises(EngineFault):
        kit.add("a", 7)
    assert kit.add("a", 1) == 10, "who was told so begins anew"


def test_under_swaps_and_shadows_every_request_is_answered_by_one_version_and_counted_once(tmp_path: Path):
    """Callers of a model with and of one without state, while the loader goes through every mode as fast as it can."""

    def tally(factor: int) -> Loadable:
        path = models.tally(tmp_path / f"tally-{factor}.onnx", float(factor))
        return loadable(path, f"1.{factor}.0", model="tally", interface=models.tally_interface())

    def scale(factor: int) -> Loadable:
        return loadable(models.scale(tmp_path / f"scale-{factor}.onnx", float(factor)), f"1.{factor}.0")

    old, new = [tally(1), scale(2)], [tally(10), scale(20)]
    registry, said, gate, helpers = Registry(), list[Serving](), RunGate(2), Helpers()
    loader = Loader(registry, said.append, on_candidate_error=lambda: None, on_first=lambda: None)
    answered, wrong, stop = [0] * 4, list[object](), threading.Event()

    def serve(revision: int, **terms: Any) -> None:
        wanted = [
            ServeModel(name=one.model, active=two, incumbent=one, trial="t", group="both", salt="s", **terms)
            for one, two in zip(old, new, strict=True)
        ]
        loader.want(Serve(revision=revision, models=wanted))
        until(lambda: sum(one.revision == revision for one in said) == 2, f"answers to {terms}")

    def call(index: int) -> None:
        number, total, factor = 0, 0, 0.0
        while not stop.is_set():
            number += 1
            begins, ends = number % 7 == 1, number % 7 == 0
            published = registry.get("tally" if index % 2 else "scale")
            assert published is not None
            ask = Ask(request_id=f"{index}-{number}")
            if index % 2:
                ask = Ask(sequence_id=f"{index}", sequence_start=begins, sequence_end=ends)
            try:
                answer = published.answer(gate, helpers, {"x": rows(1)}, ask=ask)
            except BadInput as error:
                if "taken back" not in str(error):
                    wrong.append(error)
                number = 0
                continue
            except Exception as error:
                wrong.append(error)
                return
            answered[index] += 1
            value = float(answer.outputs["y"][0, 0])
            own = float(answer.loaded.version.split(".")[1])
            total = 1 if begins or not index % 2 else total + 1
            factor = own if begins or not index % 2 else factor
            if (value, own) != (total * factor, factor) or answer.fallback:
                wrong.append((index, number, value, own, total, factor))

    serve(1, mode="blue_green", share=0.0)
    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    ways: list[dict[str, Any]] = [
        {"mode": "shadow"},
        {"mode": "split", "share": 0.5},
        {"mode": "replace"},
        {"mode": "blue_green", "share": 0.0},
    ]
    for revision in range(2, 26):
        before = sum(answered)
        serve(revision, **ways[revision % len(ways)])
        until(lambda before=before: wrong or sum(answered) > before + 8, "callers are answered")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    counts = [counter.stats() for counter in loader.counters()]
    assert sum(one.requests for one in counts if one.arm != "shadow") == sum(answered)
    assert {one.arm for one in counts if one.requests + one.skipped} == {"candidate", "incumbent", "shadow"}
    loader.stop()
    helpers.close()
