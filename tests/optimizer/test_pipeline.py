"""From a recipe to a bundle that other programs can read, and what is kept out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.optimizer.models import INT8, PRUNED, RECIPE, RUINED, workshop
from wherry_optimizer import pipeline, report
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
    assert source.samples == 200
    expected = (source.value * (1 - source.value) / 199) ** 0.5
    assert source.standard_error == pytest.approx(expected)
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
    np.savez(tmp_path / "in" / "data.npz", x=np.full((80, 48), np.nan, np.float32), label=np.zeros(80, int))
    with pytest.raises(RefusedError) as caught:
        pipeline.build(recipe, tmp_path / "out")
    assert caught.value.code == "not_finite"
    assert "passes" not in caught.value.next_step
    assert "data" in caught.value.next_step


def test_builds_of_one_process_evaluate_a_model_once(tmp_path: Path) -> None:
    cache = pipeline.Cache()
    recipe = workshop(tmp_path / "in")
    pipeline.build(recipe, tmp_path / "out", cache=cache)
    (key,) = cache.scores
    cache.scores[key] = cache.scores[key] * 0
    again = pipeline.build(recipe, tmp_path / "out", cache=cache)
    assert again.packed.config.variants[0].accuracy.value == 0
    assert len(cache.runs) == len(cache.datasets) == len(cache.downloads) == 1
