"""Golden vectors tell variants apart where anything can, and say so where nothing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.optimizer.models import blobs, classifier, dictionary
from wherry_optimizer import interface
from wherry_optimizer.golden import (
    RunAll,
    Runnable,
    Runs,
    Wrong,
    _cover,
    _steadiest_first,
    _telling,
    budget,
    configurations,
    run_all,
    select,
    shortlist,
)
from wherry_optimizer.proof import count_broken
from wherry_optimizer.recipe import Hints
from wherry_shared import golden
from wherry_shared.errors import RefusedError
from wherry_shared.facts import EngineFacts

ORT = [EngineFacts(name="onnxruntime", version="1.32.0", formats=["onnx"])]


def runnable(id_: str, path: Path) -> Runnable:
    fitted = interface.derive(path, "onnx", {}, Hints())
    return Runnable(id_, path, "onnx", fitted.interface, {}, 0, {}, ("onnxruntime",))


def scaled(source: Path, target: Path, factor: float) -> Path:
    graph = onnx.load(source)
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "second")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), "second"))
    onnx.save(graph, target)
    return target


def candidates(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": point[None]} for point in blobs(count, seed=21)[0]]


def test_variants_that_differ_are_told_apart_and_twins_are_reported(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    variants = [
        runnable("a", path),
        runnable("b", scaled(path, tmp_path / "b.onnx", 1.05)),
        runnable("twin", scaled(path, tmp_path / "t.onnx", 1.0)),
    ]
    found = select(
        variants,
        candidates(12),
        ORT,
        vectors=4,
        sampled_above=4096,
        synthetic=False,
        budgets=dict.fromkeys("ab", 10**5) | {"twin": 10**5},
    )
    assert found.by_variant["a"].separates == ["b"]
    assert found.by_variant["b"].separates == ["a", "twin"]
    assert set(found.unseparated) == {("a", "twin"), ("twin", "a")}


def test_the_tolerance_is_at_least_a_share_of_the_range(tmp_path: Path) -> None:
    item = runnable("a", classifier(tmp_path / "m.onnx"))
    found = select([item], candidates(8), ORT, vectors=8, sampled_above=4096, synthetic=True, budgets={"a": 10**5})
    made = golden.decode(found.by_variant["a"].encoded)
    values = np.concatenate([vector.expected["p"].values for vector in made.vectors])
    assert made.tolerances["p"].atol >= 0.99e-4 * (values.max() - values.min())
    assert made.tolerances["p"].argmax_margin == made.tolerances["p"].atol


def test_vectors_stay_within_the_byte_budget_and_none_fitting_is_refused(tmp_path: Path) -> None:
    item = runnable("a", classifier(tmp_path / "m.onnx"))
    found = select([item], candidates(20), ORT, vectors=10, sampled_above=4096, synthetic=True, budgets={"a": 1600})
    assert len(found.by_variant["a"].encoded) <= 1600
    assert 1 <= found.by_variant["a"].vectors < 10
    with pytest.raises(RefusedError) as caught:
        select([item], candidates(4), ORT, vectors=4, sampled_above=4096, synthetic=True, budgets={"a": 100})
    assert caught.value.code == "golden_too_large"


def test_the_byte_budget_is_a_share_of_large_variants() -> None:
    assert budget(1000) == 256_000
    assert budget(10_000_000) == 1_000_000


def test_large_outputs_are_kept_as_samples(tmp_path: Path) -> None:
    item = runnable("a", classifier(tmp_path / "m.onnx"))
    found = select([item], candidates(4), ORT, vectors=2, sampled_above=3, synthetic=True, budgets={"a": 10**5})
    made = golden.decode(found.by_variant["a"].encoded)
    assert made.vectors[0].expected["p"].values.shape == (3,)
    assert golden.check(made, item.open().run) == []


def told(*, moved: list[float], differ: set[int], path: Path) -> tuple[list[Runnable], dict[str, Runs]]:
    """Two variants that differ by one at the candidates of `differ`, and move between configurations as said."""
    item = runnable("a", classifier(path))
    variants = [item, Runnable("b", item.path, "onnx", item.interface, {}, 0, {}, ("onnxruntime",))]
    same = [{"p": np.zeros((1, 6), np.float32)} for _ in moved]
    other = [{"p": np.full((1, 6), float(index in differ), np.float32)} for index in range(len(moved))]
    return variants, {
        "a": Runs(same, {"p": np.array(moved)}, ("onnxruntime",), {}),
        "b": Runs(other, {"p": np.array(moved)}, ("onnxruntime",), {}),
    }


def test_candidates_that_move_between_configurations_come_last() -> None:
    outputs = [{"y": np.array([float(index)])} for index in range(4)]
    runs = {"a": Runs(outputs, {"y": np.array([0.0, 0.5, 0.0, 0.9])}, ("onnxruntime",), {})}
    assert _steadiest_first(runs, 4) == [0, 2, 1, 3]


def test_a_candidate_whose_text_another_configuration_answers_otherwise_is_none(tmp_path: Path) -> None:
    item = runnable("a", dictionary(tmp_path / "m.onnx"))
    words = [{"word": np.array([[word]], object)} for word in ("cat", "Öl", "x")]

    def run(moved: list[float]) -> RunAll:
        def ran(subject: Runnable, inputs: Sequence[dict[str, np.ndarray]], available: Sequence[EngineFacts]) -> Runs:
            own = run_all(subject, inputs, available)
            return replace(own, moved={**own.moved, "kind": np.array(moved)})

        return ran

    terms: dict[str, Any] = {"vectors": 8, "sampled_above": 99, "synthetic": False, "budgets": {"a": 10**5}}
    found = select([item], words, ORT, run=run([1.0, 0.0, 1.0]), **terms)
    (vector,) = golden.decode(found.by_variant["a"].encoded).vectors
    assert vector.inputs["word"][0, 0] == "Öl"
    with pytest.raises(RefusedError) as caught:
        select([item], words, ORT, run=run([1.0, 1.0, 1.0]), **terms)
    assert caught.value.code == "golden_none"


def test_the_steadier_half_is_enough_where_it_tells_all_variants_apart(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 0.0, 1e-3, 1e-3], differ={1, 3}, path=tmp_path / "m.onnx")
    assert set(_telling(variants, runs, [0, 1, 2, 3])) == {0, 1}


def test_candidates_that_widen_nothing_are_welcome(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 0.0, 0.0, 0.0], differ={0, 1, 2, 3}, path=tmp_path / "m.onnx")
    assert set(_telling(variants, runs, [0, 1, 2, 3])) == {0, 1, 2, 3}


def test_candidates_that_move_are_let_in_where_the_steady_ones_tell_nothing_apart(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 0.0, 1e-3, 1e-2], differ={2, 3}, path=tmp_path / "m.onnx")
    tells = _telling(variants, runs, [0, 1, 2, 3])
    assert set(tells) == {0, 1, 2}
    assert tells[2] == {("a", "b"), ("b", "a")}


def test_candidates_are_not_let_in_where_their_tolerance_would_hide_what_they_tell(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 0.0, 0.0, 0.5], differ={3}, path=tmp_path / "m.onnx")
    assert set(_telling(variants, runs, [0, 1, 2, 3])) == {0, 1, 2}


def test_pairs_of_variants_are_covered_first_then_broken_files_then_what_tells_most() -> None:
    pairs = {("a", "b"), ("b", "a")}
    many = {("a", f"bit {number}") for number in range(5)}
    assert _cover({0: set(), 1: {("a", "b")}, 2: pairs}, pairs) == [2, 1, 0]
    assert _cover({0: many, 1: {("a", "b")}, 2: {("b", "a"), ("a", "zeroed 1")}, 3: set()}, pairs) == [1, 2, 0, 3]


def test_candidates_that_move_are_let_in_where_they_notice_more_that_is_wrong(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 0.0, 1e-3, 5e-3], differ={0, 1, 2, 3}, path=tmp_path / "m.onnx")
    broken = {index: {"p": np.full((1, 6), 0.1 * (index == 2), np.float32)} for index in range(4)}
    wrong = [Wrong("a", "bit 0", broken)]
    assert set(_telling(variants, runs, [0, 1, 2, 3], wrong)) == {0, 1, 2}
    assert _telling(variants, runs, [0, 1, 2, 3], wrong)[2] == {("a", "b"), ("b", "a"), ("a", "bit 0")}
    runs["a"].moved["p"][2] = 0.05  # ten times of it hides what is wrong
    assert set(_telling(variants, runs, [0, 1, 3, 2], wrong)) == {0, 1}


def test_a_file_that_does_not_run_is_noticed_by_every_candidate(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 0.0], differ={0}, path=tmp_path / "m.onnx")
    tells = _telling(variants, runs, [0, 1], [Wrong("b", "bit 0", {0: None, 1: None})])
    assert ("b", "bit 0") in tells[0]


def test_the_shortlist_holds_what_is_near_a_border_and_what_is_extreme_beside_what_is_steady(tmp_path: Path) -> None:
    variants, runs = told(moved=[0.0, 1e-6, 2e-6, 3e-6, 4e-6], differ=set(), path=tmp_path / "m.onnx")
    rows = np.array([[0.5, 0.4], [0.9, 0.1], [0.51, 0.5], [0.8, 0.2], [0.0, 3.0]], np.float32)
    runs["a"] = replace(runs["a"], outputs=[{"p": row[None]} for row in rows])
    runs["b"] = replace(runs["b"], outputs=[{"p": row[None] + (index == 3) * 0.1} for index, row in enumerate(rows)])
    found = shortlist(variants, runs, [0, 1, 2, 3, 4], 4)
    assert {index: traits[0] for index, traits in found.items()} == {2: "border", 3: "error", 4: "extreme", 0: "steady"}


def test_vectors_near_borders_notice_what_saturated_ones_do_not(tmp_path: Path) -> None:
    """The reason for all this: a network that is sure answers the same with a wrong weight."""
    path = classifier(tmp_path / "m.onnx")
    graph = onnx.load(path)
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "second")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(4), "second"))
    onnx.save(graph, path)
    item = runnable("a", path)
    inputs = candidates(50)
    inputs += [{"x": (one["x"] + two["x"]) / 2} for one, two in zip(inputs[:10], inputs[10:20], strict=True)]
    terms: dict[str, Any] = {"vectors": 4, "sampled_above": 99, "synthetic": False, "budgets": {"a": 10**6}}
    found = select([item], inputs, ORT, **terms)
    chosen = [one.candidate for one in found.picked]
    steadiest = _steadiest_first(found.runs, 60)[:4]
    assert chosen != steadiest

    def missed(indices: list[int]) -> int:
        own = found.runs["a"]
        kept = [{"p": own.outputs[index]["p"]} for index in indices]
        bounds = {"p": golden.Tolerance(max(1e-4, 10 * float(own.moved["p"][indices].max())), 0.0)}
        vectors = tuple(
            golden.Vector(inputs[index], {"p": golden.Expected(row["p"], row["p"].shape)})
            for index, row in zip(indices, kept, strict=True)
        )
        return sum(one.missed for one in count_broken(item, golden.Golden(vectors, bounds), 20, 9).values())

    assert missed(chosen) < missed(steadiest)


def test_places_in_a_batch_are_ways_to_run_a_variant(tmp_path: Path) -> None:
    found = run_all(runnable("a", classifier(tmp_path / "m.onnx")), candidates(6), ORT)
    (batch,) = [way for way in found.ways if "batch" in way]
    assert (found.moved["p"] >= found.ways[batch]["p"]).all()
    fixed = run_all(runnable("a", classifier(tmp_path / "f.onnx", batch=1)), candidates(6), ORT)
    assert not [way for way in fixed.ways if "batch" in way]


def test_a_variant_that_no_engine_here_runs_is_refused(tmp_path: Path) -> None:
    item = runnable("a", classifier(tmp_path / "m.onnx"))
    with pytest.raises(RefusedError) as caught:
        configurations(item, [EngineFacts(name="ai-edge-litert", version="2.3.0", formats=["tflite"])])
    assert caught.value.code == "engine_missing"
