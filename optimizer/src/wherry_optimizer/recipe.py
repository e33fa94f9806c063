"""A recipe: which model, which data, which variants, and how much accuracy each may cost. Data, not code.

Recipes are TOML. Types are frozen and made by `load_recipe`, which names a wrong field by its path. What a recipe says
about a pass is checked against the parameters of that pass before anything heavy starts.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wherry_optimizer import passes
from wherry_optimizer.gate import Budget
from wherry_shared import digest, limits, operations
from wherry_shared.bundle import Bounds, EngineName, Operation, Processing
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name, parse_version
from wherry_shared.licence import check_known
from wherry_shared.operations import Stage

FORMAT = 1
RECIPE_BYTES_MAX = limits.MIB

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
DataKind = Literal["npz", "folder", "csv", "parquet", "function", "file-type", "pitch"]
"""`labelled.KINDS` and `data.MODULES`."""


class _Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of recipe types: immutable, keyword-only, a misspelt field is an error."""


class LicenceText(_Frozen, frozen=True, kw_only=True):
    """Where the text of the licence is: a file beside the recipe, or one that an installed distribution lists."""

    path: str
    distribution: str = ""


class LicenceOf(_Frozen, frozen=True, kw_only=True):
    """Under what terms, from where, by whom."""

    expression: str
    source: str
    attribution: str
    text: LicenceText | None = None


class Source(_Frozen, frozen=True, kw_only=True):
    """A float model file: beside the recipe, or inside an installed distribution (found without importing it).

    `tensors` maps canonical to native names.
    """

    path: str
    distribution: str = ""
    version: str = ""
    """If set, the only version of the distribution that this recipe was made for."""
    tensors: dict[str, str] = {}


class InputHint(_Frozen, frozen=True, kw_only=True):
    """What the file cannot say about an input."""

    low: float | None = None
    high: float | None = None
    layout: str | None = None


class OutputHint(_Frozen, frozen=True, kw_only=True):
    """What the file cannot say about an output."""

    labels: list[str] | None = None
    labels_from_data: bool = False
    """Take the class names from the data module."""
    finite: bool = True


class Hints(_Frozen, frozen=True, kw_only=True):
    """What is known about the interface beyond the files."""

    inputs: dict[str, InputHint] = {}
    outputs: dict[str, OutputHint] = {}
    dims: dict[str, Bounds] = {}


class DataOf(_Frozen, frozen=True, kw_only=True):
    """Labelled data: samples of one's own at `path`, in one of the forms of `labelled`, or data that come with Wherry."""

    kind: DataKind
    path: str = ""
    """File or folder beside the recipe; of a `function`, `module:function`, looked for beside the recipe first."""
    label: str = "label"
    """Array or column of labels."""
    output: str = ""
    """The output that the metric looks at; may be left out if there is one."""
    outputs: list[str] = []
    """In place of `output` for a metric that looks at several: boxes, scores and classes of `detection`."""
    metric: str = "accuracy"
    """Name of a metric (see `metrics`), or `module:function`, looked for beside the recipe first."""
    calibration: Count = 64
    """Samples for calibration, disjoint from those for evaluation."""
    evaluation: Count = 512
    """At most this many samples to judge by: half to keep variants by, half to confirm them."""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


class Gate(_Frozen, frozen=True, kw_only=True):
    """What a variant may cost, see `gate.Budget`."""

    drop_max: Positive = 0.01
    """What the metric may lose, in its own unit, unless a variant names its own."""
    floor: float | None = None
    """What the metric may not fall below."""
    error_max: Positive = 0.5
    """How far outputs may move (L2, as a share of the source's)."""
    strict: bool = False
    """The whole interval of the drop, and not up to twice the budget, has to be within it."""


BROKEN = 20
"""Broken files per variant by which golden vectors are measured."""


class GoldenOf(_Frozen, frozen=True, kw_only=True):
    """How many golden vectors a variant gets at most; the byte budget may allow fewer."""

    vectors: Annotated[int, msgspec.Meta(ge=1, le=limits.GOLDEN_VECTORS_MAX)] = 16
    candidates: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 96
    sampled_above: Count = 4096
    """Outputs with more elements than this are kept as samples of this many."""
    broken: Annotated[int, msgspec.Meta(ge=0, le=1000)] = BROKEN
    """Files with one thing wrong, per variant, by which the vectors are measured."""
    misses_max: Share | None = None
    """Refuse the bundle where more than this share of them passes; without, a build only warns."""


class MeasureOf(_Frozen, frozen=True, kw_only=True):
    """How long latency is measured: interleaved rounds over all variants, bounded by both."""

    rounds: Count = 21
    seconds: Annotated[float, msgspec.Meta(gt=0)] = 3.0


class VariantOf(_Frozen, frozen=True, kw_only=True):
    """One variant: a source and the passes that it goes through (none: the source file, byte for byte)."""

    id: str
    source: str
    passes: list[dict[str, Any]] = []
    """Each has `use`, the name of a pass, and the parameters of that pass."""
    drop_max: Positive | None = None
    required: bool = False
    """Fail the build, rather than leave the variant out, if it is over its budget or cannot be made."""
    engines: list[EngineName] = []
    """Empty: every engine that runs the format here and passes the golden vectors."""
    options: dict[str, str | int | float | bool] = {}


class ProcessingOf(_Frozen, frozen=True, kw_only=True):
    """A chain of operations; `id` may be left out: it is then made of what they do."""

    id: str = ""
    operations: list[dict[str, Any]] = []
    """Each has `op`, `version` (1 if it is left out), and the parameters of that operation."""

    def chain(self, stage: Stage) -> Processing:
        """Return the chain as the config holds it, checked as far as that goes without an interface.

        Raises:
            RefusedError: `operation_unknown` or `operation_invalid`.
        """
        rows = []
        for index, row in enumerate(self.operations):
            op, version = row.get("op"), row.get("version", 1)
            if not isinstance(op, str) or isinstance(version, bool) or not isinstance(version, int):
                raise RefusedError(
                    "operation_invalid",
                    f"{stage}.operations[{index}]: needs op, a name, and may have version, a number",
                )
            parameters = {key: value for key, value in row.items() if key not in ("op", "version")}
            rows.append(Operation(op=op, version=version, parameters=parameters))
        processing = Processing(id=self.id, operations=rows)
        operations.check(processing, stage)
        return processing


class Recipe(_Frozen, frozen=True, kw_only=True):
    """A whole recipe."""

    format: int
    name: str
    version: str
    description: str = ""
    licence: LicenceOf
    sources: dict[str, Source]
    interface: Hints = Hints()
    data: DataOf
    gate: Gate = Gate()
    golden: GoldenOf = GoldenOf()
    measure: MeasureOf = MeasureOf()
    assets: dict[str, str] = {}
    """Files of this version for applications: name → path beside the recipe."""
    preprocess: ProcessingOf = ProcessingOf()
    postprocess: ProcessingOf = ProcessingOf()
    """Declared operations, by which applications come from what they have to the inputs, and from outputs to choices."""
    variants: list[VariantOf]


class ProcessingFile(_Frozen, frozen=True, kw_only=True):
    """What `pack --processing` reads: the tables of a recipe that say how applications use a model."""

    interface: Hints = Hints()
    preprocess: ProcessingOf = ProcessingOf()
    postprocess: ProcessingOf = ProcessingOf()


class LoadedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe with where it stands (relative paths start there) and its digest."""

    recipe: Recipe
    folder: Path
    digest: str


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe, with the parameters of every pass that is installed.

    Raises:
        RefusedError: `pass_invalid` where another distribution's pass cannot be loaded.
    """
    rows = []
    for info in passes.catalogue():
        # a schema of its own each, since the classes are all called Parameters
        ((own,), parts) = msgspec.json.schema_components([passes.module(info).Parameters])
        fields = dict(parts[own["$ref"].rpartition("/")[2]])
        fields["properties"] = {"use": {"const": info.name}, **fields.get("properties", {})}
        fields["required"] = ["use", *fields.get("required", [])]
        rows.append({**fields, "title": info.name, "description": info.summary})
    whole = msgspec.json.schema(Recipe)
    whole["$defs"]["VariantOf"]["properties"]["passes"] = {"type": "array", "items": {"oneOf": rows}, "default": []}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def packaged() -> list[str]:
    """Return the names of the recipes that come with this package, such as `file-type-1.1.0`."""
    folder = resources.files("wherry_optimizer") / "recipes"
    return sorted(item.name[: -len(".toml")] for item in folder.iterdir() if item.name.endswith(".toml"))


def find_recipe(text: str) -> Path:
    """Return the path of a recipe: a file, or the name of one that comes with this package.

    Raises:
        RefusedError: `recipe_missing`.
    """
    path = Path(text)
    if path.is_file():
        return path
    if text in packaged():
        return Path(str(resources.files("wherry_optimizer") / "recipes" / f"{text}.toml"))
    raise RefusedError(
        "recipe_missing",
        f"there is no recipe {text}",
        next_step=f"name a TOML file, or one of: {', '.join(packaged())}",
    )


def load_recipe(path: Path) -> LoadedRecipe:
    """Read and check a recipe.

    Raises:
        RefusedError: `recipe_missing`, `recipe_invalid` (naming the field by its path), `licence_*`, `bad_name`,
            `bad_version`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefusedError(
            "recipe_missing",
            f"{path}: {error.strerror}",
            consequence="nothing was built",
            next_step="name a TOML file that can be read, or one of the packaged recipes",
        ) from error
    return LoadedRecipe(recipe=parse_recipe(data), folder=path.parent, digest=digest.of_bytes(data))


def parse_recipe(data: bytes) -> Recipe:
    """Parse the text of a recipe.

    Raises:
        RefusedError: as `load_recipe`.
    """
    if len(data) > RECIPE_BYTES_MAX:
        raise _invalid(f"has {len(data)} bytes, at most {RECIPE_BYTES_MAX}")
    try:
        recipe = msgspec.toml.decode(data, type=Recipe)
    except msgspec.ValidationError as error:
        raise _invalid(readable(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise _invalid(f"is not TOML: {error}") from error
    _check(recipe)
    return recipe


def read_processing(path: Path) -> ProcessingFile:
    """Read a file with the tables `[preprocess]`, `[postprocess]` and `[interface]` of a recipe.

    Raises:
        RefusedError: `processing_invalid` (naming the field), `operation_unknown` or `operation_invalid`.
    """
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=ProcessingFile)
    except OSError as error:
        raise RefusedError(
            "processing_invalid",
            f"{path}: {error.strerror}",
            consequence="nothing was packed",
            next_step="see docs/formats/processing.md",
        ) from error
    except msgspec.ValidationError as error:
        raise RefusedError(
            "processing_invalid",
            f"{path}: {readable(str(error))}",
            consequence="nothing was packed",
            next_step="see docs/formats/processing.md",
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise RefusedError(
            "processing_invalid",
            f"{path} is not TOML: {error}",
            consequence="nothing was packed",
            next_step="see docs/formats/processing.md",
        ) from error
    found.preprocess.chain("preprocess")
    found.postprocess.chain("postprocess")
    return found


def convert_parameters(raw: dict[str, Any], type_: type[msgspec.Struct], where: str) -> Any:
    """Make the typed parameters of a pass from a recipe's table.

    Raises:
        RefusedError: `recipe_invalid`, naming the field below `where`.
    """
    try:
        return msgspec.convert({key: value for key, value in raw.items() if key != "use"}, type=type_)
    except msgspec.ValidationError as error:
        raise _invalid(readable(str(error), where)) from error


def readable(message: str, where: str = "") -> str:
    """Turn msgspec's `Expected … - at $.a[0].b` into `a[0].b: expected …`."""
    what, _, path = message.partition(" - at `")
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    field = ".".join(part for part in (where, path) if part)
    named = re.match(r"Object (?:missing required|contains unknown) field `([^`]+)`", what)
    if named is not None:
        field = f"{field}.{named[1]}" if field else named[1]
        return f"{field}: {'missing' if 'missing' in what else 'there is no such field'}"
    return f"{field or 'recipe'}: {what[:1].lower()}{what[1:]}"


def _check(recipe: Recipe) -> None:
    if recipe.format != FORMAT:
        raise _invalid(f"format: is {recipe.format}, this release reads {FORMAT}")
    check_name(recipe.name, "name")
    parse_version(recipe.version)
    check_known(recipe.licence.expression)
    if not recipe.licence.attribution.strip():
        raise RefusedError(
            "licence_missing",
            "licence.attribution may not be empty",
            consequence="nobody may be sent a model without knowing its terms",
            next_step="fill in [licence] of the recipe",
        )
    if not recipe.sources:
        raise _invalid("sources: names no model file")
    if not 1 <= len(recipe.variants) <= limits.VARIANTS_MAX:
        raise _invalid(f"variants: has {len(recipe.variants)} entries, expected 1 to {limits.VARIANTS_MAX}")
    recipe.preprocess.chain("preprocess")
    recipe.postprocess.chain("postprocess")
    terms = recipe.gate
    for drop_max in (terms.drop_max, *(one.drop_max for one in recipe.variants if one.drop_max is not None)):
        try:
            Budget(drop_max, terms.floor, terms.error_max)
        except RefusedError as error:  # TOML has nan and inf, and the bounds of a schema let them through
            raise _invalid(f"gate: {error.message}; give finite numbers") from error
    seen: set[str] = set()
    for index, variant in enumerate(recipe.variants):
        where = f"variants[{index}]"
        check_name(variant.id, f"{where}.id")
        if variant.id in seen:
            raise _invalid(f"{where}.id: {variant.id!r} appears twice")
        seen.add(variant.id)
        if variant.source not in recipe.sources:
            raise _invalid(f"{where}.source: there is no source {variant.source!r}")
        for number, row in enumerate(variant.passes):
            if not isinstance(row.get("use"), str):
                raise _invalid(f"{where}.passes[{number}].use: missing")
    for key in recipe.sources:
        if not any(variant.source == key and not variant.passes for variant in recipe.variants):
            raise _invalid(
                f"variants: source {key!r} has no variant without passes; other variants are compared with it"
            )


def _invalid(why: str) -> RefusedError:
    return RefusedError(
        "recipe_invalid",
        f"recipe: {why}",
        consequence="nothing was built",
        next_step="see what a recipe may say: docs/formats/recipe.md",
    )
