"""The search: what it tries, keeps out, chooses and confirms, and that nothing a candidate does stops the others."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.optimizer.models import blobs, classifier, endless, hog, plug_in
from wherry_optimizer import attempt, candidates, card, gate, labelled, making, measure, passes, search
from wherry_optimizer import auto as auto_module
from wherry_optimizer.attempt import Answer, Step, Task
from wherry_optimizer.candidates import SOURCE, TARGETS, Candidate, Fared, Row
from wherry_optimizer.data import Sample, file_type
from wherry_optimizer.labelled import cut
from wherry_optimizer.metrics import MetricOf
from wherry_optimizer.model import gathered
from wherry_optimizer.model import load as load_model
from wherry_optimizer.recipe import DataOf
from wherry_optimizer.sources import locate
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.errors import DeviceError, RefusedError

X86 = TARGETS["x86-vnni"]


def samples(count: int = 400) -> list[Sample]:
    points, labels = blobs(count)
    return [Sample({"x": point[None]}, int(label)) for point, label in zip(points, labels, strict=True)]


def problem(folder: Path) -> attempt.Problem:
    parts = cut(samples(), labelled=True, description="blobs")
    model = load_model(classifier(folder / "model.onnx"))
    return auto_module.make_problem(model, parts, MetricOf(name="accuracy"), {}, 0)


@pytest.fixture(scope="module", autouse=True)
def quick_sizes() -> Iterator[None]:
    """Compress less hard: half of the time of these tests went into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "ZSTD_LEVEL", 3)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was made for one test serves the others: it goes by digest."""
    return tmp_path_factory.mktemp("cache")


def task(found: attempt.Problem, folder: Path, *steps: Step, **more: Any) -> Task:
    return Task(
        problem=str(attempt.write_problem(found, folder)), cache=str(folder / "cache"), steps=list(steps), **more
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> search.Result:
    """One search that several tests look at, in this process and with its report."""
    folder = tmp_path_factory.mktemp("searched")
    parts = cut(samples(), labelled=True, description="blobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "ROUND_SECONDS", 0.2)
        patch.setattr(search, "MEASURED_MAX", 2)
        return auto_module.auto(
            classifier(folder / "model.onnx"),
            parts,
            drop_max=0.02,
            targets=["x86-vnni"],
            output=folder / "out",
            cache=cache,
            prune=False,
            run=attempt.attempt,
        )


def test_what_is_chosen_is_smaller_and_confirmed_on_samples_of_its_own(searched: search.Result) -> None:
    (found,) = searched.found
    assert found.chosen != SOURCE
    assert found.confirmation.verdict.passed
    chosen = searched.chosen("x86-vnni")
    assert chosen.answer.download_bytes < 0.5 * found.find(SOURCE).answer.download_bytes
    assert chosen.pareto
    assert searched.files["x86-vnni"].read_bytes() == Path(chosen.answer.path).read_bytes()
    chosen_by = {id(sample) for sample in searched.parts.selection}
    assert not chosen_by & {id(sample) for sample in (*searched.parts.test, *searched.parts.calibration)}


def test_every_family_was_tried_and_each_refusal_has_its_reason(searched: search.Result) -> None:
    (found,) = searched.found
    assert {"int8-weights", "int8-static", "int8-dynamic", "half", "int8-static-all", "int4-weights"} <= {
        item.id for item in found.tried
    }
    assert all(item.verdict.by and item.verdict.why for item in found.refused)


def test_the_report_is_whole_and_stands_alone(searched: search.Result) -> None:
    folder = next(iter(searched.files.values())).parent
    report = json.loads((folder / "report.json").read_text())
    rows = report["targets"]["x86-vnni"]["candidates"]
    assert [row["id"] for row in rows] == [item.id for item in searched.found[0].tried]
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "://" not in page
    words = (folder / "MODEL-CARD.md").read_text()
    assert all(row["id"] in words and row["id"] in page for row in rows)


def test_two_reports_are_compared_and_those_of_other_data_are_not(searched: search.Result, tmp_path: Path) -> None:
    folder = next(iter(searched.files.values())).parent
    rows = card.compare(folder, folder / "report.json")
    assert all(row["value"][0] == row["value"][1] for row in rows)
    other = json.loads((folder / "report.json").read_text())
    other["data"]["selection_digest"] = "sha256:00"
    (tmp_path / "report.json").write_text(json.dumps(other))
    with pytest.raises(RefusedError) as caught:
        card.compare(folder, tmp_path)
    assert caught.value.code == "report_differs"
    with pytest.raises(RefusedError) as caught:
        card.compare(folder, tmp_path / "nowhere")
    assert caught.value.code == "report_invalid"


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"metric": "accuracy", "data": {}, "targets": {}},
        {"metric": "accuracy", "data": {"selection_digest": "a"}, "targets": [1]},
        {"metric": "accuracy", "data": {"selection_digest": "a"}, "targets": {"x86": {"candidates": 3}}},
        {
            "metric": "accuracy",
            "data": {"selection_digest": "a"},
            "targets": {"x86": {"chosen": None, "candidates": [{"id": "float"}]}},
        },
    ],
)
def test_what_only_looks_like_a_report_is_not_compared(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"format": card.FORMAT, **report}))
    with pytest.raises(RefusedError) as caught:
        card.compare(tmp_path, tmp_path)
    assert caught.value.code == "report_invalid"


def test_a_search_that_is_begun_again_makes_nothing_again(searched: search.Result) -> None:
    asked: list[bool] = []

    def remembered(task: Task) -> Answer:
        answer = attempt.attempt(task)
        asked.append(answer.cached)
        return answer

    settings = search.Settings(budget=searched.settings.budget, prune=False, weigh=False)
    again = search.search(searched.problem, X86, settings, searched.folder, run=remembered)
    assert asked
    assert all(asked)
    assert [item.id for item in again.tried] == [item.id for item in searched.found[0].tried]


def test_a_changed_sample_or_pass_parameter_is_another_answer(tmp_path: Path) -> None:
    one = problem(tmp_path)
    step = Step(use="quantize-static")
    keys = {attempt.key_of(one, task(one, tmp_path, step))}
    keys.add(attempt.key_of(one, task(one, tmp_path, Step(use="quantize-static", parameters={"samples": 3}))))
    keys.add(attempt.key_of(one, task(one, tmp_path, step, part="test")))
    one.selection[0].inputs["x"][0, 0] += 1
    keys.add(attempt.key_of(one, task(one, tmp_path, step)))
    one.calibration[0]["x"][0, 0] += 1
    keys.add(attempt.key_of(one, task(one, tmp_path, step)))
    assert len(keys) == 5


def answers(bad: dict[str, Answer]) -> Any:
    """Return a runner that gives what is named for a pass, and runs the rest."""

    def run(task: Task) -> Answer:
        return next((bad[step.use] for step in task.steps if step.use in bad), None) or attempt.attempt(task)

    return run


def test_a_pass_that_crashes_is_recorded_and_the_others_go_on(tmp_path: Path, cache: Path) -> None:
    crashed = Answer(code="pass_crashed", why="its process ended with SIGSEGV")
    settings = search.Settings(budget=gate.Budget(0.02), prune=False, weigh=False)
    found = search.search(
        problem(tmp_path), X86, settings, cache, run=answers({"quantize-static": crashed, "half": crashed})
    )
    refused = {item.id: item.verdict.by for item in found.refused}
    assert refused["int8-static"] == refused["half"] == "pass_crashed"
    assert found.find("int8-weights").verdict.passed


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    settings = search.Settings(budget=gate.Budget(0.02), seconds_max=0.0, weigh=False)
    found = search.search(problem(tmp_path), X86, settings, tmp_path / "cache", run=attempt.attempt)
    assert found.cut_short
    assert [item.id for item in found.tried] == [SOURCE]


@pytest.mark.parametrize(
    ("how", "more", "code"),
    [
        ("crash", {}, "pass_crashed"),
        ("memory", {"memory_bytes_max": 1 << 30}, "pass_memory"),
        ("hang", {"seconds_max": 1.0}, "pass_timeout"),
        ("raise", {}, "pass_crashed"),
        ("exit", {}, "pass_crashed"),
        ("last words", {}, "pass_crashed"),
        ("nothing", {}, "pass_noop"),
        ("rename", {}, "contract_changed"),
    ],
)
def test_what_a_pass_does_to_its_process_becomes_a_refusal(
    how: str, more: dict, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(tmp_path, monkeypatch)
    answer = attempt.run(task(problem(tmp_path), tmp_path, Step(use="test-native", parameters={"how": how}), **more))
    assert answer.code == code
    assert answer.why


def test_a_candidate_whose_answers_overflow_is_refused_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(tmp_path, monkeypatch)
    found = problem(tmp_path)
    overflows = Candidate("overflows", (Step(use="test-native", parameters={"how": "overflow"}),))
    monkeypatch.setattr(candidates, "propose", lambda fared, *_, **__: [] if fared else [overflows])
    settings = search.Settings(budget=gate.Budget(0.02), weigh=False)
    item = search.search(found, X86, settings, tmp_path / "cache").find("overflows")
    assert (item.verdict.passed, item.verdict.by) == (False, "no_number")
    again = attempt.run(task(found, tmp_path, *overflows.steps))
    assert again.cached
    assert np.isnan(again.error)


def test_what_the_machine_could_not_do_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = task(problem(tmp_path), tmp_path)

    def missing(*_: object, **__: object) -> None:
        raise DeviceError("engine_missing", "onnxruntime cannot be imported")

    with monkeypatch.context() as patch:
        patch.setattr(attempt, "load", missing)
        assert attempt.attempt(found).code == "engine_missing"
    answer = attempt.attempt(found)
    assert (answer.code, answer.cached) == ("", False)


def test_an_answer_that_a_power_cut_left_empty_is_made_again(tmp_path: Path) -> None:
    found = task(problem(tmp_path), tmp_path, Step(use="quantize-weights"))
    first = attempt.attempt(found)
    for path in (*(tmp_path / "cache" / "answers").iterdir(), *(tmp_path / "cache" / "files").glob("*.json")):
        path.write_bytes(b"")
    again = attempt.attempt(found)
    assert (again.code, again.digest, again.cached) == ("", first.digest, False)


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk_is_told_as_such_and_not_held_against_the_candidate(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = task(problem(tmp_path), tmp_path, Step(use="quantize-weights"))

    def full(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            if late:  # as NumPy's archives do while they close
                raise ValueError("seek of closed file")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        assert attempt.attempt(found).code == "disk_full"
    answer = attempt.attempt(found)
    assert (answer.code, answer.cached) == ("", False)


def test_what_a_child_left_that_was_killed_is_swept_away_after_a_day(tmp_path: Path) -> None:
    kept = tmp_path / "files" / "0123.onnx"
    old, fresh = (tmp_path / "files" / f"{attempt.UNFINISHED}{name}" for name in ("old", "fresh"))
    for path in (kept, old / "half.onnx", fresh / "half.onnx", tmp_path / "answers" / f"{attempt.UNFINISHED}x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for path in (kept, old, tmp_path / "answers" / f"{attempt.UNFINISHED}x"):
        os.utime(path, (0, 0))
    attempt.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "0123.onnx",
        "answers",
        "files",
        "half.onnx",
        fresh.name,
    ]


def test_a_model_that_answers_no_numbers_is_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx", constants=True)
    model = onnx.load(path)
    weight = next(node for node in model.graph.node if node.op_type == "Constant").attribute[0].t
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), weight.name))
    onnx.save(model, path)
    with pytest.raises(RefusedError) as caught:
        auto_module.auto(path, cut(samples(60), labelled=True, description=""), cache=tmp_path, run=attempt.attempt)
    assert caught.value.code == "model_not_finite"


def test_a_pass_of_another_distribution_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, monkeypatch)
    info = passes.find("test-native")
    assert passes.module(info).Parameters().how == "crash"
    assert "test-native" in [item.name for item in passes.catalogue()]


def test_a_search_tries_a_pass_of_another_distribution_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, monkeypatch)
    settings = search.Settings(budget=gate.Budget(0.02), prune=False, weigh=False)
    asked: list[list[str]] = []

    def run(task: Task) -> Answer:
        asked.append([step.use for step in task.steps])
        if "test-native" in asked[-1]:
            return Answer(code="pass_crashed", why="its process ended with SIGABRT")
        return attempt.attempt(task)

    found = search.search(problem(tmp_path), X86, settings, tmp_path / "cache", run=run)
    assert ["rewrite", "test-native", "quantize-weights"] in asked
    assert {item.id: item.verdict.by for item in found.refused}["test-native"] == "pass_crashed"
    assert found.chosen != SOURCE


def test_a_pass_that_changes_the_contract_is_refused(tmp_path: Path) -> None:
    one = classifier(tmp_path / "one.onnx")
    other = classifier(tmp_path / "other.onnx", name="points")
    fixed = classifier(tmp_path / "fixed.onnx", batch=1)
    for made in (other, fixed):
        with pytest.raises(RefusedError) as caught:
            making.check_contract(*(attempt.load(path, "onnx") for path in (one, made)))
        assert caught.value.code == "contract_changed"


def broken_weight(folder: Path, value: float) -> Path:
    path = classifier(folder / "model.onnx")
    model = onnx.load(path)
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0] = value
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, path)
    return path


def auto(folder: Path, model: Path, data: Any = None, cache: Path | None = None, **more: Any) -> search.Result:
    parts = cut(samples(), labelled=True, description="blobs") if data is None else data
    return auto_module.auto(
        model,
        parts,
        cache=cache or folder / "cache",
        weigh=False,
        targets=["x86-vnni"],
        run=attempt.attempt,
        prune=False,
        **more,
    )


def test_nan_weights_are_refused_before_anything_is_tried(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(RefusedError) as caught:
            auto(tmp_path, broken_weight(tmp_path, value))
        assert caught.value.code == "model_not_finite"


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    found = problem(tmp_path)
    made = attempt.attempt(task(found, tmp_path, Step(use="quantize-static")))
    with pytest.raises(RefusedError) as caught:
        auto(tmp_path, Path(made.path))
    assert caught.value.code == "already_quantized"


def test_a_model_is_what_the_files_beside_it_make_it(tmp_path: Path) -> None:
    plain = onnx.load(classifier(tmp_path / "plain.onnx"))
    found = []
    for scale in (1.0, 1.0, 2.0):
        path = tmp_path / f"{len(found)}" / "model.onnx"
        path.parent.mkdir()
        model = onnx.ModelProto.FromString(plain.SerializeToString())
        value = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(scale)
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(value, model.graph.initializer[0].name))
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        found.append(gathered(load_model(path), tmp_path / "sources"))
    one, same, other = found
    assert one.path.stat().st_size > (tmp_path / "0" / "weights.bin").stat().st_size
    assert one.path.name == "model.onnx"
    assert one.digest == same.digest != other.digest
    assert not load_model(other.path).external


def test_a_budget_that_nobody_meets_is_told_by_what_was_in_the_way(tmp_path: Path, cache: Path) -> None:
    for terms, said, way in (
        ({"floor": 2.0}, "below the floor", "lower --floor"),
        ({"error_max": 0.0}, "nearest was", "--max-error"),
    ):
        with pytest.raises(RefusedError) as caught:
            auto(tmp_path, classifier(tmp_path / "model.onnx"), cache=cache, **terms)
        assert caught.value.code == "budget_unmet"
        assert said in caught.value.message
        assert way in caught.value.next_step


@pytest.mark.parametrize("write", [hog, endless])
def test_a_model_that_takes_all_memory_or_never_ends_does_so_in_a_process_of_its_own(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "LOOK_SECONDS_MAX", 5.0)
    with pytest.raises(RefusedError) as caught:
        auto_module.auto(
            write(tmp_path / "model.onnx"),
            cut(samples(60), labelled=True, description=""),
            cache=tmp_path / "cache",
            memory_bytes_max=2**30,
        )
    assert caught.value.code == "model_unrunnable"


def test_an_operator_that_no_engine_has_is_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Frobnicate", "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, path)
    with pytest.raises(RefusedError, match="Frobnicate") as caught:
        auto(tmp_path, path)
    assert caught.value.code == "model_operator"


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    path = classifier(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(RefusedError) as caught:
        auto(tmp_path, path)
    assert caught.value.code in ("model_foreign", "model_corrupted")


def test_a_metric_that_raises_ends_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wherry_test_raises.py").write_text(
        "def broken(outputs, labels):\n    raise ValueError('no such label')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RefusedError, match="no such label") as caught:
        auto(tmp_path, classifier(tmp_path / "model.onnx"), metric="wherry_test_raises:broken")
    assert caught.value.code == "metric_failed"


def test_a_metric_that_is_no_number_on_the_source_is_refused(tmp_path: Path) -> None:
    parts = cut(
        [Sample(one.inputs, float(index % 2)) for index, one in enumerate(samples(60))], labelled=True, description=""
    )
    with pytest.raises(RefusedError) as caught:
        auto(tmp_path, classifier(tmp_path / "model.onnx"), parts, metric="auc")
    assert caught.value.code == "source_failed"


def test_a_budget_that_nobody_meets_is_an_error_and_the_report_is_there(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(RefusedError, match="none of") as caught:
        auto(tmp_path, classifier(tmp_path / "model.onnx"), error_max=1e-9, cache=cache, output=tmp_path / "out")
    assert caught.value.code == "budget_unmet"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["targets"]["x86-vnni"]["candidates"]
    assert all(row["by"] for row in rows if row["id"] != SOURCE)


def test_a_choice_that_the_test_split_contradicts_is_not_shipped(tmp_path: Path, cache: Path) -> None:
    parts = cut(samples(), labelled=True, description="blobs")
    wrong = tuple(Sample(one.inputs, one.label) for one in parts.test)
    found = problem(tmp_path)

    def run(task: Task) -> Answer:
        answer = attempt.attempt(task)
        if task.part == "test" and task.steps:
            return msgspec.structs.replace(answer, evidence=[0.0] * len(answer.evidence))
        return answer

    with pytest.raises(RefusedError) as caught:
        auto_module.auto(
            found.source,
            labelled.Parts(parts.calibration, parts.selection, wrong, True, "blobs"),
            targets=["x86-vnni"],
            cache=cache,
            output=tmp_path / "out",
            prune=False,
            weigh=False,
            run=run,
        )
    assert caught.value.code == "unconfirmed"
    assert not list((tmp_path / "out").glob("*.onnx"))


def test_without_labels_it_is_agreement_with_the_float_model(tmp_path: Path) -> None:
    parts = cut([Sample(one.inputs, None) for one in samples(100)], labelled=False, description="")
    result = auto(tmp_path, classifier(tmp_path / "model.onnx"), parts, drop_max=0.05)
    assert result.problem.metric.name == "agreement"
    assert result.found[0].find(SOURCE).drop.value == 1.0
    assert result.found[0].find("int8-static").drop.value > 0.9


def test_unknown_targets_and_those_of_another_format_are_refused(tmp_path: Path) -> None:
    model = load_model(classifier(tmp_path / "model.onnx"))
    for name, code in (("toaster", "target_unknown"), ("tflite", "target_unfit")):
        with pytest.raises(RefusedError) as caught:
            auto_module.find_target(name, model)
        assert caught.value.code == code


GOOD, DROPPED, CRASHED = Fared(True), Fared(False, "", "drop"), Fared(False, "pass_crashed", "pass_crashed")
FIRST = [
    "int8-weights",
    "int8-static",
    "int8-dynamic",
    "smooth+int8-dynamic",
    "int8-recurrent",
    "half",
    "int8-static-all",
    "int8-dynamic-all",
    "int8-static-other",
    "int4-weights",
    "rewritten",
]


NOTHING = Fared(False, "pass_noop", "pass_noop")
SINGLES = dict.fromkeys(FIRST, GOOD) | {"int8-recurrent": NOTHING, "rewritten": NOTHING}
"""All pass, of a network without recurrent layers, of which nothing is spelled out."""


def proposed(tried: dict[str, Fared], **more: Any) -> list[str]:
    return [one.id for one in candidates.propose(tried, "onnx", X86, **more)]


def passes_of(tried: dict[str, Fared]) -> dict[str, list[str]]:
    """Return the passes of each proposal, less the one that all begin with."""
    found = {one.id: [step.use for step in one.steps] for one in candidates.propose(tried, "onnx", X86)}
    assert all(steps[0] == "rewrite" for steps in found.values())
    return {key: steps[1:] for key, steps in found.items()}


def test_all_but_what_quantizes_every_operator_is_made_of_the_rewritten_graph() -> None:
    for one in candidates.propose({}, "onnx", X86):
        places = [(index, step.optional) for index, step in enumerate(one.steps) if step.use == "rewrite"]
        assert places == ([] if one.id.endswith("-all") else [(0, one.id != "rewritten")])


def test_operators_are_given_back_one_after_another_until_the_gate_lets_one_pass() -> None:
    tried = dict(SINGLES) | {"int8-static": DROPPED}
    assert proposed({}) == FIRST
    for count in (1, 2, 4):
        assert proposed(tried, prune=False) == [f"int8-static-less-{count}"]
        tried[f"int8-static-less-{count}"] = DROPPED
    tried["int8-static-less-4"] = GOOD
    assert proposed(tried, prune=False) == []
    both = dict(SINGLES) | dict.fromkeys(("int8-static", "int8-dynamic", "smooth+int8-dynamic"), DROPPED)
    assert proposed(both) == ["int8-static-less-1", "int8-dynamic-less-1"]
    both |= {"int8-static-less-1": CRASHED, "int8-dynamic-less-1": GOOD}
    assert "levels-15+int8-dynamic-less-1" in proposed(both)
    assert "channels-0.5+int8-static-less-4" in proposed(tried)


def test_where_smoothing_helps_weights_are_rounded_after_it() -> None:
    tried = dict(SINGLES) | {"int8-static": CRASHED, "int8-dynamic": DROPPED}
    found = passes_of(tried)
    tail = ["quantize-dynamic", "quantize-weights"]
    assert found["levels-15+smooth+int8-dynamic"] == ["smooth", "round-obs", *tail]
    assert found["channels-0.5+smooth+int8-dynamic"] == ["prune-channels", "smooth", *tail]
    waiting = dict(SINGLES) | {"int8-static": DROPPED, "int8-dynamic": DROPPED}
    assert proposed(waiting)[:2] == ["int8-static-less-1", "channels-0.5+smooth+int8-dynamic"]
    tried |= {"int8-dynamic": Fared(True, error=0.1), "smooth+int8-dynamic": Fared(True, error=0.2)}
    assert "levels-15+int8-dynamic" in proposed(tried)


def test_a_network_with_recurrent_layers_is_pruned_before_they_are_quantized_too() -> None:
    tried = SINGLES | {"int8-recurrent": GOOD}
    found = passes_of(tried)
    tail = ["simplify", "quantize-recurrent", "quantize-static", "quantize-weights"]
    assert found["channels-0.5+int8-recurrent"] == ["prune-channels", *tail]
    assert found["levels-15+int8-recurrent"] == ["round-obs", *tail]


def test_an_optional_pass_that_has_nothing_to_do_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = making.apply

    def apply(info: passes.PassInfo, *rest: Any) -> passes.Result:
        asked.append(info.name)
        return real(info, *rest)

    monkeypatch.setattr(making, "apply", apply)
    first = Step(use="rewrite", optional=True)
    for then in ("quantize-weights", "half"):
        answer = attempt.attempt(task(problem(tmp_path), tmp_path, first, Step(use=then)))
        assert [next(iter(row)) for row in answer.notes] == ["pass", "pass"]
        assert "rewriting changed nothing" in answer.notes[0]["skipped"]
    assert asked == ["rewrite", "quantize-weights", "half"]


def test_two_searches_may_share_a_cache(tmp_path: Path) -> None:
    one = problem(tmp_path)
    other = dataclasses.replace(one, seed=7)
    paths = [attempt.write_problem(each, tmp_path) for each in (one, other, one)]
    assert paths[0] == paths[2] != paths[1]


def test_ladders_climb_while_they_pass_and_step_down_where_they_do_not() -> None:
    tried = dict(SINGLES)
    assert proposed(tried) == ["channels-0.5+int8-static", "levels-15+int8-static"]
    tried |= {"channels-0.5+int8-static": GOOD, "levels-15+int8-static": DROPPED}
    assert proposed(tried) == ["channels-0.625+int8-static", "levels-31+int8-static"]
    tried |= {"channels-0.625+int8-static": DROPPED, "levels-31+int8-static": GOOD}
    both = [f"channels-{share}+levels-31+int8-static" for share in (0.375, 0.5)]
    assert proposed(tried) == both
    tried |= {both[0]: GOOD, both[1]: DROPPED}
    assert proposed(tried) == ["zeros-0.5+int8-static"], "no milder levels passed by themselves"
    more = tried | {"levels-15+int8-static": GOOD, "levels-11+int8-static": DROPPED}
    more = {key: fared for key, fared in more.items() if "+levels-" not in key}
    fewest = [f"channels-{share}+levels-15+int8-static" for share in (0.375, 0.5)]
    assert proposed(more) == fewest
    more |= {fewest[0]: GOOD, fewest[1]: DROPPED}
    assert proposed(more)[0] == "channels-0.5+levels-31+int8-static"
    for rung in ("zeros-0.5+int8-static", "zeros-0.3+int8-static", "zeros-2of4+int8-static"):
        assert proposed(tried) == [rung]
        tried[rung] = DROPPED
    assert proposed(tried) == []
    tried = dict(SINGLES) | {"channels-0.5+int8-static": CRASHED}
    assert proposed(tried) == ["levels-15+int8-static", "zeros-0.5+int8-static"]


def test_arm_gets_signed_activations_first_and_x86_unsigned_ones() -> None:
    for name, signed in (("x86-vnni", False), ("arm-dotprod", True)):
        found = {one.id: one for one in candidates.propose({}, "onnx", TARGETS[name])}
        for key, wanted in (("int8-static", signed), ("int8-static-other", not signed)):
            (step,) = (step for step in found[key].steps if step.use == "quantize-static")
            assert step.parameters.get("symmetric_activations", False) is wanted


def row(key: str, size: int, latency: float, value: float = 0.9, peak: float = 1.0) -> Row:
    return Row(key, size, latency, peak, value)


def test_the_pareto_set_holds_what_nobody_beats() -> None:
    rows = [row(SOURCE, 100, 1.0), row("a", 30, 0.5), row("b", 30, 0.6), row("c", 20, 0.9), row("d", 40, 0.4, 0.95)]
    assert candidates.pareto(rows) == ["a", "c", "d"]
    unmeasured = [row(SOURCE, 100, float("nan")), row("a", 30, float("nan")), row("b", 40, float("nan"))]
    assert candidates.pareto(unmeasured) == ["a"]


@pytest.mark.parametrize(
    ("prefer", "first"), [("balanced", "a"), ("size", "c"), ("latency", "d"), ("memory", "e"), ("accuracy", "f")]
)
def test_what_is_preferred_decides_among_them(prefer: candidates.Prefer, first: str) -> None:
    rows = [dataclasses.replace(one, lost=0.5) for one in (row("a", 30, 0.5), row("c", 20, 0.9), row("d", 60, 0.3))]
    rows += [
        dataclasses.replace(row("e", 90, 0.9, peak=0.5), lost=0.1),
        dataclasses.replace(row("f", 40, 0.6), lost=0.2),
    ]
    assert candidates.rank(rows, row(SOURCE, 100, 1.0), prefer)[0].id == first


def test_what_fresh_samples_may_contradict_has_to_be_better_by_so_much() -> None:
    source, sure = row(SOURCE, 100, 1.0), row("sure", 30, 0.5)
    for latency, first in ((0.45, "sure"), (0.3, "lucky")):
        lucky = Row("lucky", 30, latency, 1.0, 0.9, odds=0.8)
        assert candidates.rank([source, lucky, sure], source, "balanced")[0].id == first
    near, far = (Row(key, 30, 0.5, 1.0, 0.9, error=error) for key, error in (("near", 0.01), ("far", 0.1)))
    assert candidates.rank([far, near], source, "balanced")[0].id == "near"


def test_the_short_list_gets_safer_and_ends_before_the_source() -> None:
    rows = [
        Row(key, 30 + number, 0.5, 1.0, 0.9, error=error)
        for number, (key, error) in enumerate(
            [("a", 0.2), ("b", 0.19), ("c", 0.1), ("d", 0.09), ("e", 0.01), ("f", 0.001)]
        )
    ]
    source = row(SOURCE, 100, 1.0)
    assert [one.id for one in candidates.shortlist(rows[:1], [*rows, source], 3)] == ["a", "c", "e"]
    assert [one.id for one in candidates.shortlist(rows[:1], [*rows[:2], source], 3)] == ["a"]
    assert [one.id for one in candidates.shortlist([source], [source, *rows], 3)] == [SOURCE]


@pytest.mark.parametrize(("contradicted", "code"), [(1, ""), (3, "unconfirmed")])
def test_where_the_choice_is_contradicted_a_safer_one_gets_its_chance(
    contradicted: int, code: str, tmp_path: Path, cache: Path
) -> None:
    parts = cut(samples(), labelled=True, description="blobs")
    spoken: list[str] = []

    def run(task: Task) -> Answer:
        answer = attempt.attempt(task)
        if task.part == "test" and task.steps:
            spoken.append(answer.digest)
            if len(spoken) <= contradicted:
                return msgspec.structs.replace(answer, evidence=[0.0] * len(answer.evidence))
        return answer

    def begin() -> search.Result:
        return auto_module.auto(
            classifier(tmp_path / "model.onnx"),
            parts,
            drop_max=0.02,
            targets=["x86-vnni"],
            cache=cache,
            output=tmp_path / "out",
            prune=False,
            weigh=False,
            run=run,
        )

    if code:
        with pytest.raises(RefusedError) as caught:
            begin()
        assert caught.value.code == code
        assert not list((tmp_path / "out").glob("*.onnx"))
    else:
        (found,) = begin().found
        assert [one.verdict.passed for one in found.confirmations] == [False, True]
        assert found.chosen == found.confirmations[-1].id
        errors = [found.find(one.id).answer.error for one in found.confirmations]
        assert errors[1] <= candidates.SAFER * errors[0]
        assert "contradicted" in found.reason
        assert "NOT confirmed" in (tmp_path / "out" / "MODEL-CARD.md").read_text()
    assert len(spoken) == len(set(spoken)) <= len(gate.CONFIRMATION_RISKS)


def test_figures_that_devices_reported_take_the_place_of_this_machines(tmp_path: Path, cache: Path) -> None:
    found = problem(tmp_path)
    made = attempt.attempt(msgspec.structs.replace(task(found, tmp_path, candidates.FOLD), cache=str(cache)))
    reported = tmp_path / "reported.json"
    figures = {"peak_memory_bytes": 9, "load_ms": 1.0}
    reported.write_text(
        json.dumps(
            {found.digest: {"latency_p50_us": 400.0, **figures}, made.digest: {"latency_p50_us": 100.0, **figures}}
        )
    )
    parts = cut(samples(), labelled=True, description="blobs")
    result = auto_module.auto(
        found.source,
        parts,
        drop_max=0.05,
        targets=["arm-dotprod"],
        cache=cache,
        weigh=False,
        reported=reported,
        prune=False,
        run=attempt.attempt,
    )
    assert result.found[0].find("int8-weights").latency_ratio == 0.25
    assert Candidate is type(result.found[0].find("int8-weights").candidate)


@pytest.mark.parametrize(
    ("key", "figures"),
    [
        ("sha256:" + "0" * 64, {"latency_p50_us": 0.0}),
        ("sha256:" + "0" * 64, {"latency_p50_us": -5.0}),
        ("sha256:" + "0" * 64, {"latency_p50_us": 5.0, "peak_memory_bytes": -1}),
        ("model.onnx", {"latency_p50_us": 5.0}),
        ("sha256:" + "0" * 64, {"latency": 5.0}),
    ],
)
def test_what_no_device_can_have_measured_is_refused(key: str, figures: dict[str, float], tmp_path: Path) -> None:
    reported = tmp_path / "reported.json"
    reported.write_text(json.dumps({key: figures}))
    with pytest.raises(RefusedError) as caught:
        auto(tmp_path, classifier(tmp_path / "model.onnx"), reported=reported)
    assert caught.value.code == "reported_invalid"


def test_steps_of_a_sample_carry_their_state(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "state"], ["next"]), helper.make_node("Identity", ["next"], ["y"])],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "state")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("y", "next")],
    )
    path = tmp_path / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    session = attempt.load(path, "onnx")
    sample = Sample({"x": np.array([[1], [2], [3]], np.float32), "state": np.zeros(1, np.float32)}, None)
    found = attempt.answer_of(session, sample, {"state": "next"})
    assert found["y"].reshape(-1).tolist() == [1, 3, 6]
    assert set(found) == {"y"}
    calls = list(attempt.calls_of(session, sample, {"state": "next"}))
    assert [float(call["state"][0]) for call in calls] == [0, 1, 3]


@pytest.fixture(scope="module")
def files() -> attempt.Problem:
    """The network of magika with some files of this environment."""
    path = locate(
        "magika/models/standard_v3_3/model.onnx", distribution="magika", version="", folder=Path(), what="the model"
    )
    names = ["bytes", "target_label"]
    interface = Interface(
        inputs=[TensorSpec(name=names[0], datatype="INT32", shape=["batch", 2048])],
        outputs=[TensorSpec(name=names[1], datatype="FP32", shape=["batch", 214])],
    )
    found = file_type.load(DataOf(kind="file-type", calibration=5, evaluation=48), interface, Path())
    parts = labelled.Parts(found.calibration, found.evaluation, found.evaluation[:2], True, found.description)
    return auto_module.make_problem(load_model(path), parts, MetricOf(name="accuracy"), {}, 0)


def test_a_real_network_that_static_int8_of_everything_ruins_is_refused_and_of_some_is_not(
    files: attempt.Problem, cache: Path
) -> None:
    planned = {one.id: one for one in candidates.propose({}, "onnx", X86)}

    def run(task: Task) -> Answer:
        wanted = [list(planned[key].steps) for key in ("int8-static", "int8-static-all")]
        if task.steps and list(task.steps) not in wanted:
            return Answer(code="left_out", why="of no matter here")
        return attempt.attempt(task)

    settings = search.Settings(budget=gate.Budget(0.04), prune=False, weigh=False)
    found = search.search(files, X86, settings, cache, run=run)
    verdicts = {item.id: item.verdict for item in found.tried}
    assert verdicts["int8-static-all"].by == "drop"
    assert found.find("int8-static-all").drop.drop > 0.08
    assert verdicts["int8-static"].passed, verdicts["int8-static"].why
    assert found.find("int8-static").answer.download_bytes < 0.27 * files.source.stat().st_size
