"""A recipe that is wrong is refused with the path of what is wrong, before anything is built."""

from __future__ import annotations

import tomllib
from pathlib import Path

import jsonschema_rs
import pytest

from tests.optimizer.models import INT8, RECIPE, workshop
from wherry_optimizer import pipeline, recipe
from wherry_shared.errors import RefusedError


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "blobs"', "", "name: missing"),
        ('name = "blobs"', 'name = "blobs"\nnmae = 1', "nmae: there is no such field"),
        ("evaluation = 200", "seed = -1", "data.seed: expected `int` >= 0"),
        ("drop_max = 0.05", "drop_max = inf", "gate: what the metric may lose is inf"),
        ("drop_max = 0.05", "floor = nan", "gate: what the metric may not fall below is nan"),
        ("drop_max = 0.05", "drop_max = -1.5", "gate.drop_max: expected `float` >= 0.0"),
        ("drop_max = 0.05", 'drop_max = "small"', "gate.drop_max: expected `float`, got `str`"),
        ("vectors = 8", "vectors = 65", "golden.vectors: expected `int` <= 64"),
        ("[licence]", "[license]", "license: there is no such field"),
        ('source = "onnx"', 'source = "tflite"', "variants[0].source: there is no source 'tflite'"),
        ('id = "float"', 'id = "float"\npasses = [{ sparsity = 1 }]', "variants[0].passes[0].use: missing"),
        ("[[variants]]", "[variant]", "variant: there is no such field"),
        ("format = 1", "format = 2", "format: is 2"),
        ("format = 1", "format = ", "is not TOML"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(old: str, new: str, said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        recipe.parse_recipe(RECIPE.replace(old, new, 1).encode())
    assert caught.value.code == "recipe_invalid"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("row", "code", "said"),
    [
        ('{ use = "prune-obs", sparsty = 0.5 }', "recipe_invalid", "variants[1].passes[0].sparsty: there is no"),
        ('{ use = "prune-obs", sparsity = "half" }', "recipe_invalid", "variants[1].passes[0].sparsity: expected"),
        ('{ use = "prune-obs", sparsity = 1.0 }', "recipe_invalid", "sparsity lies between"),
        ('{ use = "prune-osb" }', "pass_unknown", "prune-osb"),
    ],
)
def test_wrong_parameters_of_a_pass_are_refused_before_anything_is_built(
    tmp_path: Path, row: str, code: str, said: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        pipeline.build(workshop(tmp_path / "in", INT8.replace('{ use = "quantize-static" }', row)), tmp_path / "out")
    assert caught.value.code == code
    assert said in caught.value.message


def test_a_recipe_declares_processing_in_tables() -> None:
    text = RECIPE + '\n[[preprocess.operations]]\nop = "normalise"\nscale = 2.0\n'
    (operation,) = recipe.parse_recipe(text.encode()).preprocess.chain("preprocess").operations
    assert (operation.op, operation.version, operation.parameters) == ("normalise", 1, {"scale": 2.0})
    with pytest.raises(RefusedError) as caught:
        recipe.parse_recipe(text.replace("scale", "skale").encode())
    assert caught.value.code == "operation_invalid"
    assert "skale" in caught.value.message


@pytest.mark.parametrize("field", ["expression", "attribution"])
def test_an_empty_licence_is_refused(field: str) -> None:
    lines = [f'{field} = " "' if line.startswith(field) else line for line in RECIPE.splitlines()]
    with pytest.raises(RefusedError) as caught:
        recipe.parse_recipe("\n".join(lines).encode())
    assert caught.value.code == "licence_missing"


def test_a_source_without_a_plain_variant_is_refused() -> None:
    with pytest.raises(RefusedError, match="compared with"):
        recipe.parse_recipe(RECIPE.replace('id = "float"', 'id = "float"\npasses = [{ use = "simplify" }]').encode())


def test_packaged_recipes_parse_and_are_found_by_name() -> None:
    names = recipe.packaged()
    assert {"file-type-1.0.0", "file-type-1.1.0", "pitch-1.0.0"} <= set(names)
    for name in names:
        loaded = recipe.load_recipe(recipe.find_recipe(name))
        assert f"{loaded.recipe.name}-{loaded.recipe.version}" == name


def test_an_unknown_recipe_is_refused_with_what_there_is() -> None:
    with pytest.raises(RefusedError) as caught:
        recipe.find_recipe("nothing")
    assert "pitch-1.0.0" in caught.value.next_step


def test_the_documented_recipe_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats" / "recipe.md").read_text()
    example = text.partition("```toml\n")[2].partition("```")[0]
    assert recipe.parse_recipe(example.encode()).variants[1].required


def test_the_schema_takes_what_is_packaged_and_no_misspelt_field() -> None:
    judge = jsonschema_rs.validator_for(recipe.schema())
    for name in recipe.packaged():
        judge.validate(tomllib.loads(recipe.find_recipe(name).read_text(encoding="utf-8")))
    whole = tomllib.loads(recipe.find_recipe("file-type-1.1.0").read_text(encoding="utf-8"))
    whole["variants"][1]["passes"][0]["perchannel"] = True
    (error,) = judge.iter_errors(whole)
    assert list(error.instance_path)[:3] == ["variants", 1, "passes"]
