"""From a recipe to a bundle that other programs can read, and what is kept out of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.optimizer.models import INT8, PRUNED, RECIPE, RUINED, blobs, plug_in, workshop
from wherry_optimizer import card, evaluate, gate, making, pipeline, proof, report
from wherry_optimizer.recipe import Gate
from wherry_shared import golden
from wherry_shared.bundle import GOLDEN_TYPE, Descriptor
from wherry_shared.engines import load
from wherry_shared.engines.canonical import Bound
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pipeline.BuildResult:
    """One build that several tests look at."""
    folder = tmp_path_factory.mktemp("built")
    return pipeline.build(workshop(folder / "in", INT8, PRUNED, RUINED), folder / "out")


def vectors(layout: Layout, digest: str, size: int) -> golden.Golden:
    return golden.decode(layout.read(Descriptor(media_type=GOLDEN_TYPE, digest=digest, size=size), size))


def test_the_bundle_reads_back_with_every_variant(built: pipeline.BuildResult) -> None:
    layout = Layout(built.path)
    layout.verify_all("1.0.0")
    config = layout.bundle()[2]
    assert [variant.id for variant in config.variants] == ["float", "int8", "pruned-int8"]
    assert config.licence.attribution == "the tests"
    assert config.provenance.recipe_digest
    assert set(config.provenance.data_digests) == {"npz"}
    assert config.provenance.tools["onnxruntime"]
    assert layout.descriptor().digest == built.packed.digest


def test_the_float_variant_is_the_source_byte_for_byte(built: pipeline.BuildResult) -> None:
    config = built.packed.config
    assert config.provenance.source_digests["onnx"] == config.variants[0].digest


def test_every_variant_passes_its_golden_vectors_and_no_other(built: pipeline.BuildResult) -> None:
    layout = Layout(built.path)
    config = layout.bundle()[2]
    for variant in config.variants:
        expected = vectors(layout, variant.golden.digest, variant.golden.bytes)
        assert len(expected.vectors) == variant.golden.vectors <= 8
        for other in config.variants:
            session = load(layout.path(other.digest), "onnx", options=other.options)
            misses = golden.check(expected, Bound(session, config.interface, other.tensors, other.batch).run)
            assert bool(misses) == (other.id in variant.golden.separates)
            assert not (misses and other.id == variant.id)
    assert config.variants[0].golden.separates == ["int8", "pruned-int8"]


def test_accuracy_is_paired_with_the_source_and_has_a_standard_error(built: pipeline.BuildResult) -> None:
    source, int8, pruned = (variant.accuracy for variant in built.packed.config.variants)
    assert source.drop == 0
    assert source.value > 0.9
    assert source.samples == 100, "half of what was held back confirms"
    expected = (source.value * (1 - source.value) / 99) ** 0.5
    assert source.standard_error == pytest.approx(expected, rel=0.15)
    for other in (int8, pruned):
        assert source.value - other.value == pytest.approx(other.drop)
        assert other.drop <= 0.05


def test_pruning_shrinks_the_download_and_not_the_file(built: pipeline.BuildResult) -> None:
    _, int8, pruned = built.packed.config.variants
    assert int8.bytes < built.packed.config.variants[0].bytes / 2
    assert pruned.bytes == pytest.approx(int8.bytes, rel=0.05)
    assert pruned.download_bytes < 0.9 * int8.download_bytes
    assert pruned.passes == ["prune-obs", "quantize-static"]


def test_figures_are_measured_for_this_hardware_class(built: pipeline.BuildResult) -> None:
    for variant in built.packed.config.variants:
        ((where, figures),) = variant.figures.items()
        assert "/onnxruntime-" in where
        assert figures.latency_p50_us > 0
        assert figures.peak_memory_bytes > 20_000_000
    assert next(iter(built.packed.config.variants[0].figures.values())).latency_ratio == 1.0


def test_the_report_says_what_golden_vectors_notice_in_every_form(built: pipeline.BuildResult) -> None:
    found = card.write_build(built)
    assert [row["variant"] for row in found["golden"]["proofs"]] == ["float", "int8", "pruned-int8"]
    for proof_of in found["golden"]["proofs"]:
        assert proof_of["false_alarms"] == []
        assert proof_of["misses"] <= 0.25
        assert sum(row["tried"] for row in proof_of["broken"].values()) >= 12
        assert set(proof_of["mixed_up"].values()) == {True}
    assert len(found["golden"]["vectors"]) == built.packed.config.variants[0].golden.vectors
    html_, words = (built.path.with_name(f"blobs-1.0.0.report.{ending}").read_text() for ending in ("html", "md"))
    for shown in (html_, words):
        assert "Golden vectors" in shown
        assert "exchanged" in shown
        assert "ruined" in shown
    assert "Provenance" in html_
    assert html_.count("<svg viewBox") == 2, "the Pareto plot and the intervals"
    assert "://" not in html_
    (row,) = [row for row in found["targets"]["recipe"]["candidates"] if row["id"] == "int8"]
    assert row["interval"][0] <= row["drop"] <= row["interval"][1]
    assert {one["id"] for one in found["targets"]["recipe"]["confirmations"]} == {"int8", "pruned-int8"}


def test_two_bundles_and_two_builds_are_compared_and_what_is_of_other_samples_is_left_out(
    built: pipeline.BuildResult, tmp_path: Path
) -> None:
    card.write_build(built)
    written = built.path.with_name("blobs-1.0.0.report.json")
    assert {row["target"] for row in card.compare(written, written)} == {"recipe"}
    rows = {row["id"]: row for row in card.compare(built.path, built.path)}
    assert rows["int8"]["value"][0] == rows["int8"]["value"][1] is not None
    assert rows["int8"]["download_bytes"][0] == built.packed.config.variants[1].download_bytes
    other = pipeline.build(
        workshop(tmp_path, recipe=RECIPE.replace("evaluation = 200", "evaluation = 100")), tmp_path / "out"
    )
    rows = {row["id"]: row for row in card.compare(built.path, other.path)}
    assert rows["float"]["value"] == [None, None]
    assert rows["float"]["download_bytes"][0] == rows["float"]["download_bytes"][1]
    assert rows["int8"]["download_bytes"][1] is None
    with pytest.raises(RefusedError, match="one is a bundle") as caught:
        card.compare(built.path, written)
    assert caught.value.code == "report_differs"


def test_a_variant_over_its_budget_is_left_out_with_the_figures(built: pipeline.BuildResult) -> None:
    (refused,) = built.refused
    assert (refused.id, refused.code) == ("ruined", "over_budget")
    assert f"over its budget of 0.0500 by {refused.accuracy.drop - 0.05:.4f}" in refused.why
    assert built.packed.config.provenance.refused[0]["id"] == "ruined"
    assert report.as_dict(built)["refused"][0]["drop"] == refused.accuracy.drop


def test_a_required_variant_over_its_budget_fails_the_build_and_packs_nothing(tmp_path: Path) -> None:
    recipe = workshop(tmp_path / "in", RUINED + "required = true\n")
    with pytest.raises(RefusedError, match="over its budget") as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert caught.value.code == "over_budget"
    assert not list(tmp_path.glob("out/*"))


def test_a_pass_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    noop = INT8.replace('{ use = "quantize-static" }', '{ use = "quantize-static", operators = ["Conv"] }')
    result = pipeline.build(workshop(tmp_path / "in", noop), tmp_path / "out")
    assert [(item.id, item.code) for item in result.refused] == [("int8", "pass_noop")]


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    twice = INT8.replace("[{", '[{ use = "quantize-static" }, {')
    result = pipeline.build(workshop(tmp_path / "in", twice), tmp_path / "out")
    assert [item.code for item in result.refused] == ["already_quantized"]


def test_a_pass_for_the_other_format_is_refused(tmp_path: Path) -> None:
    result = pipeline.build(
        workshop(tmp_path / "in", INT8.replace("quantize-static", "quantize-tflite")), tmp_path / "out"
    )
    assert [item.code for item in result.refused] == ["pass_unfit"]


@pytest.mark.parametrize(
    ("how", "limits", "code", "said"),
    [
        ("crash", {}, "pass_crashed", "test-native: its process ended with SIGABRT"),
        ("memory", {"memory_bytes_max": 1 << 30}, "pass_memory", "test-native: it took more than 1.1 GB of memory"),
        ("hang", {"seconds_max": 10.0}, "pass_timeout", "test-native: it took more than 10 s"),
        ("raise", {}, "pass_crashed", "KeyError: 'a tensor'"),
        ("exit", {}, "pass_crashed", "test-native: its process ended with exit status 0"),
        ("chatter", {}, "pass_noop", "the file is the same byte for byte"),
        ("rename", {}, "contract_changed", "test-native: output 'p' is gone"),
        ("wreck", {}, "load_failed", "onnxruntime"),
    ],
)
def test_a_pass_that_ends_its_process_is_left_out_and_the_next_variant_is_made(
    how: str, limits: dict, code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(tmp_path, monkeypatch)
    bad = INT8.replace('"int8"', '"bad"', 1).replace('"quantize-static"', f'"test-native", how = "{how}"')
    result = pipeline.build(workshop(tmp_path / "in", bad, INT8), tmp_path / "out", limits=making.Limits(**limits))
    ((left_out, why),) = [((item.id, item.code), item.why) for item in result.refused]
    assert left_out == ("bad", code)
    assert said in why
    assert [item.id for item in result.packed.config.variants] == ["float", "int8"]


@pytest.mark.parametrize(
    ("arrays", "code", "said"),
    [
        ({"x": np.zeros((80, 47), np.float32), "label": np.zeros(80, int)}, "data_shape", "[1, 47]"),
        ({"x": np.zeros((80, 48, 2, 2), np.float32), "label": np.zeros(80, int)}, "data_shape", "[80, 48, 2, 2]"),
        ({"x": np.zeros((80, 48), np.float64), "label": np.zeros(80, int)}, "data_type", "float64"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.zeros(79, int)}, "data_shape", "79"),
        ({"y": np.zeros((80, 48), np.float32), "label": np.zeros(80, int)}, "data_shape", "'x'"),
        ({"x": np.zeros((64, 48), np.float32), "label": np.zeros(64, int)}, "data_short", "64"),
        ({"x": np.zeros((80, 48), np.float32)}, "data_invalid", "label"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.int64(3)}, "data_shape", "0 labels"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.full(80, 6)}, "data_invalid", "from 0 to 5"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.full(80, -1)}, "data_invalid", "from 0 to 5"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.full(80, 0.5)}, "data_invalid", "class index"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.zeros((80, 6))}, "data_invalid", "[80, 6]"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.full(80, "cat")}, "data_invalid", "<U3"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.full(80, np.nan)}, "data_invalid", "not finite"),
        ({"x": np.zeros((80, 48), np.float32), "label": np.zeros(80, int)}, "data_one_class", "all 80 labels are 0"),
    ],
)
def test_data_of_the_wrong_shape_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], code: str, said: str
) -> None:
    recipe = workshop(tmp_path / "in", INT8)
    np.savez(tmp_path / "in" / "data.npz", **arrays)
    with pytest.raises(RefusedError) as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert caught.value.code == code
    assert said in caught.value.message


def test_data_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    recipe = workshop(tmp_path / "in")
    (tmp_path / "in" / "data.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(RefusedError) as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert caught.value.code == "data_invalid"


def test_a_regression_is_scored_by_its_error(tmp_path: Path) -> None:
    recipe = workshop(
        tmp_path / "in", INT8, recipe=RECIPE.replace('kind = "npz"', 'kind = "npz"\nmetric = "absolute_error"')
    )
    with np.load(tmp_path / "in" / "data.npz") as data:
        arrays = {"x": data["x"], "label": np.eye(6)[data["label"]]}
    np.savez(tmp_path / "in" / "data.npz", **arrays)
    float_, int8 = pipeline.build(recipe, tmp_path / "out").packed.config.variants
    assert float_.accuracy.metric == "absolute_error"
    assert -1 < float_.accuracy.value < 0
    assert abs(int8.accuracy.drop) < 0.05


def test_a_regression_whose_labels_have_another_size_is_refused(tmp_path: Path) -> None:
    recipe = workshop(
        tmp_path / "in", INT8, recipe=RECIPE.replace('kind = "npz"', 'kind = "npz"\nmetric = "absolute_error"')
    )
    np.savez(tmp_path / "in" / "data.npz", x=np.zeros((80, 48), np.float32), label=np.zeros((80, 5)))
    with pytest.raises(RefusedError) as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert (caught.value.code, "6, as output 'p'" in caught.value.message) == ("data_invalid", True)


def with_data(table: str) -> str:
    """Return the recipe of these tests with another table of data."""
    before, _, rest = RECIPE.partition("[data]\n")
    return f"{before}[data]\n{table}\n[gate]{rest.partition('[gate]')[2]}"


FORMS = """
import numpy as np

def give():
    points, labels = np.load("data.npz")["x"], np.load("data.npz")["label"]
    return [({"x": row[None]}, int(label)) for row, label in zip(points, labels)]

def right(outputs, labels):
    return float(np.mean([row["p"].argmax() == label for row, label in zip(outputs, labels)]))
"""


@pytest.mark.parametrize(
    "table",
    [
        'kind = "csv"\npath = "data.csv"',
        'kind = "folder"\npath = "classes"',
        'kind = "function"\npath = "wherry_test_forms:give"',
        'kind = "npz"\npath = "data.npz"\nmetric = "wherry_test_forms:right"',
        'kind = "npz"\npath = "data.npz"\nmetric = "top5"',
        'kind = "npz"\npath = "plain.npz"\nmetric = "agreement"',
    ],
)
def test_every_form_of_data_and_metric_judges_a_recipe(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workshop(tmp_path, INT8, recipe=with_data(f"{table}\ncalibration = 30\nevaluation = 60"))
    recipe.write_text(recipe.read_text().replace("candidates = 24", "candidates = 6\nbroken = 0"))
    points, labels = blobs(120, seed=1)
    np.savez(tmp_path / "data.npz", x=points, label=labels)
    np.savez(tmp_path / "plain.npz", x=points)
    head = ",".join([*(f"f{index}" for index in range(48)), "label"])
    rows = [",".join([*map(repr, row.tolist()), str(label)]) for row, label in zip(points, labels, strict=True)]
    (tmp_path / "data.csv").write_text("\n".join([head, *rows]) + "\n")
    for index, (row, label) in enumerate(zip(points, labels, strict=True)):
        (tmp_path / "classes" / str(label)).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "classes" / str(label) / f"{index}.npy", row)
    (tmp_path / "wherry_test_forms.py").write_text(FORMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wherry_test_forms", raising=False)
    float_, int8 = pipeline.build(recipe, tmp_path / "out").packed.config.variants
    assert float_.accuracy.value > 0.9
    assert float_.accuracy.samples == 30
    assert int8.accuracy.drop == pytest.approx(float_.accuracy.value - int8.accuracy.value)


def test_a_recipe_is_held_to_the_whole_gate(tmp_path: Path) -> None:
    floor = RECIPE.replace("[gate]", "[gate]\nfloor = 1.1")
    with pytest.raises(RefusedError, match="below its floor"):
        pipeline.build(workshop(tmp_path / "in", recipe=floor), tmp_path / "out")
    moved = RECIPE.replace("[gate]", "[gate]\nerror_max = 1e-9")
    (refused,) = pipeline.build(workshop(tmp_path / "in", INT8, recipe=moved), tmp_path / "out").refused
    assert refused.code == "over_budget"
    assert "outputs moved beyond" in refused.why
    assert pipeline.budget_of(Gate(drop_max=0.1, strict=True), None) == gate.Budget(0.1, None, 0.5, 1.0)
    assert pipeline.budget_of(Gate(floor=0.9), 0.2) == gate.Budget(0.2, 0.9, 0.5, gate.UPPER_FACTOR)


def test_what_the_other_half_contradicts_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate.show

    def show(run: Any, samples: Any, *given: Any, **more: Any) -> evaluate.Shown:
        found = whole(run, samples, *given, **more)
        if more["source"] is not None and show.calls:
            found = dataclasses.replace(found, evidence=[0.0] * len(found.evidence))
        show.calls += more["source"] is not None
        return found

    show.calls = 0
    monkeypatch.setattr(evaluate, "show", show)
    result = pipeline.build(workshop(tmp_path / "in", INT8), tmp_path / "out")
    assert [(item.id, item.code) for item in result.refused] == [("int8", "unconfirmed")]
    assert [variant.id for variant in result.packed.config.variants] == ["float"]


def test_vectors_that_miss_too_much_are_refused_or_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "count_broken", lambda *_: {"bit": proof.Count(caught=2, missed=2)})
    strict = RECIPE.replace("[golden]", "[golden]\nmisses_max = 0.4")
    with pytest.raises(RefusedError, match=r"miss 0\.500") as caught:
        pipeline.build(workshop(tmp_path / "in", recipe=strict), tmp_path / "out")
    assert caught.value.code == "golden_misses"
    said: list[str] = []
    result = pipeline.build(workshop(tmp_path / "in"), tmp_path / "out", progress=said.append)
    assert result.bundled.blind == ["golden vectors of float miss 50% of what is wrong with a file"]
    assert any(text.startswith("WARNING: golden vectors of float") for text in said)
    assert "WARNING" in report.refused(result).plain


def test_a_licence_text_that_is_not_there_is_missed_before_any_work(tmp_path: Path) -> None:
    recipe = workshop(
        tmp_path / "in", INT8, recipe=RECIPE.replace("[licence]", '[licence]\ntext = { path = "LICENCE" }')
    )
    (tmp_path / "in" / "data.npz").unlink()
    with pytest.raises(RefusedError) as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert (caught.value.code, "LICENCE" in caught.value.message) == ("licence_missing", True)


def test_a_source_that_gives_no_numbers_is_not_told_to_choose_milder_passes(tmp_path: Path) -> None:
    recipe = workshop(tmp_path / "in")
    np.savez(tmp_path / "in" / "data.npz", x=np.full((80, 48), np.nan, np.float32), label=np.arange(80) % 6)
    with pytest.raises(RefusedError) as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert caught.value.code == "not_finite"
    assert "passes" not in caught.value.next_step
    assert "data" in caught.value.next_step


def test_builds_of_one_process_evaluate_a_model_once(tmp_path: Path) -> None:
    cache = pipeline.Cache()
    recipe = workshop(tmp_path / "in")
    pipeline.build(recipe, tmp_path / "out", cache=cache)
    assert len(cache.shown) == 2, "the two halves"
    for key, shown in cache.shown.items():
        cache.shown[key] = dataclasses.replace(shown, evidence=[0.0] * len(shown.evidence))
    again = pipeline.build(recipe, tmp_path / "out", cache=cache)
    assert again.packed.config.variants[0].accuracy.value == 0
    assert len(cache.runs) == len(cache.datasets) == len(cache.downloads) == 1
