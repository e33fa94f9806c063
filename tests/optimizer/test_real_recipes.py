"""The recipes that come with Wherry build from the real models and keep what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from wherry_optimizer import pipeline
from wherry_shared.engines import probe


@pytest.mark.slow
def test_file_type_gets_an_int8_and_a_pruned_variant_within_budget(tmp_path: Path) -> None:
    result = pipeline.build("file-type-1.1.0", tmp_path)
    assert result.refused == ()
    variants = {variant.id: variant for variant in result.packed.config.variants}
    assert set(variants) == {"float", "int8", "pruned-int8"}
    for variant in variants.values():
        assert variant.accuracy.samples >= 150, "the half that confirms"
        assert variant.accuracy.drop <= 0.015
        # the files differ between environments: a pair that no vector tells apart is allowed, if the build says so
        blurred = {other for one, other in result.packed.unseparated if one == variant.id}
        assert set(variants) - {variant.id} == set(variant.golden.separates) | blurred
    assert len(result.packed.unseparated) <= 2
    assert variants["float"].accuracy.value > 0.85
    assert variants["int8"].bytes < 0.3 * variants["float"].bytes
    assert variants["pruned-int8"].download_bytes < 0.9 * variants["int8"].download_bytes
    (figures,) = variants["int8"].figures.values()
    assert figures.latency_ratio > 0
    assert len(result.packed.config.interface.outputs[0].labels) == 214


@pytest.mark.slow
def test_pitch_has_variants_for_both_engines_with_one_interface(tmp_path: Path) -> None:
    result = pipeline.build("pitch-1.0.0", tmp_path)
    assert result.refused == ()
    config = result.packed.config
    assert [spec.name for spec in config.interface.inputs] == ["audio"]
    assert {spec.name for spec in config.interface.outputs} == {"note", "onset", "contour"}
    variants = {variant.id: variant for variant in config.variants}
    assert {variant.format for variant in variants.values()} == {"onnx", "tflite"}
    for variant in variants.values():
        assert variant.accuracy.value > 0.95
        assert "by construction" in variant.accuracy.data
    here = {facts.name for facts in probe(["ai-edge-litert", "tflite-runtime"])}
    assert {engine.name for engine in variants["tflite-float"].engines} == here
    named = {engine.name for engine in variants["tflite-int8"].engines}
    assert here - named == {engine for one, engine, _ in result.left_out if one == "tflite-int8"}
    assert variants["tflite-int8"].bytes < 0.6 * variants["tflite-float"].bytes
    assert variants["tflite-float"].tensors == {"audio": "input_2"}
