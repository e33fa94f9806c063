"""From a recipe to a bundle: make variants, evaluate, judge, choose golden vectors, measure, pack.

A variant that cannot be made, or that is over its accuracy budget, is refused with figures and left out; the build goes
on unless the recipe marks it `required`. The variant without passes is the source file, byte for byte, and all others
of that source are compared with it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from wherry_optimizer import assets, bundling, data, evaluate, gate, labelled, making, passes
from wherry_optimizer import interface as interfaces
from wherry_optimizer.bundling import Bundled, Made
from wherry_optimizer.data import Dataset, Sample
from wherry_optimizer.golden import WORKERS, Runnable
from wherry_optimizer.model import Model, load
from wherry_optimizer.pack import Packed, check_target, engines_of, provenance, single_file
from wherry_optimizer.precision import precision_of
from wherry_optimizer.recipe import Gate, LoadedRecipe, Recipe, VariantOf, convert_parameters, find_recipe, load_recipe
from wherry_optimizer.sources import locate
from wherry_shared import operations
from wherry_shared.bundle import Accuracy, EngineName, Interface, Licence
from wherry_shared.engines import probe
from wherry_shared.errors import RefusedError, WherryError
from wherry_shared.facts import EngineFacts

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Refused:
    """A variant that is not in the bundle, and why."""

    id: str
    code: str
    why: str
    accuracy: Accuracy | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what provenance keeps."""
        row: dict[str, Any] = {"id": self.id, "code": self.code, "why": self.why}
        if self.accuracy is not None:
            row |= {"value": self.accuracy.value, "drop": self.accuracy.drop}
        return row


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build made and what it kept out."""

    bundled: Bundled
    refused: tuple[Refused, ...]
    notes: dict[str, list[dict[str, Any]]]
    """What the passes of each variant said."""
    dataset: dict[str, Any]
    """Metric, description, digest and counts of the data."""
    recipe: Recipe

    @property
    def packed(self) -> Packed:
        """The bundle, read."""
        return self.bundled.packed

    @property
    def left_out(self) -> tuple[tuple[str, str, str], ...]:
        """(variant, engine, why): engines that a variant does not name, see `golden.Selection`."""
        return tuple(self.bundled.selection.left_out)

    @property
    def path(self) -> Path:
        """The bundle."""
        return self.packed.path


@dataclass(slots=True)
class Cache(bundling.Kept):
    """What builds of one process share, by digests of what it was made from, and which engines work here."""

    shown: dict[tuple[str, ...], evaluate.Shown] = field(default_factory=dict)
    datasets: dict[tuple[bytes, bytes, Path], Dataset] = field(default_factory=dict)
    engines: list[EngineFacts] = field(default_factory=list)


def build(
    recipe: str | Path | LoadedRecipe,
    output: Path,
    *,
    progress: Progress | None = None,
    cache: Cache | None = None,
    limits: making.Limits | None = None,
) -> BuildResult:
    """Build a bundle into `output`/NAME-VERSION.

    Args:
        recipe: a TOML file, the name of a packaged recipe, or a loaded one.
        output: folder.
        progress: told each step in a sentence.
        cache: share one between builds to evaluate the same model on the same data once.
        limits: of the process that runs the passes; one that goes beyond them is refused, and so is one that crashes it.

    Raises:
        RefusedError: `recipe_*`, `source_*`, `model_*`, `interface_*`, `data_*`, `metric_*`, `licence_missing`, `golden_*`;
            `over_budget`, `unconfirmed`, `pass_*` or `already_quantized` for a variant marked `required`.
    """
    loaded = recipe if isinstance(recipe, LoadedRecipe) else load_recipe(find_recipe(str(recipe)))
    say = progress or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="wherry-build-") as folder:
        return _Build(loaded, Path(folder), say, cache or Cache(), limits or making.Limits()).run(output)


def budget_of(terms: Gate, drop_max: float | None) -> gate.Budget:
    """Return what a variant may cost; `drop_max` is its own, where it has one."""
    return gate.Budget(
        terms.drop_max if drop_max is None else drop_max,
        terms.floor,
        terms.error_max,
        1.0 if terms.strict else gate.UPPER_FACTOR,
    )


class _Build:
    """One build; the steps are methods in the order in which they run."""

    def __init__(self, loaded: LoadedRecipe, folder: Path, say: Progress, cache: Cache, limits: making.Limits) -> None:
        self.recipe: Recipe = loaded.recipe
        self.loaded = loaded
        self.folder = folder
        self.say = say
        self.cache = cache
        self.refused: list[Refused] = []
        self.feeds: dict[str, Sequence[Mapping[str, Any]]] = {}
        self.workshop = making.Workshop(folder, limits)

    def run(self, output: Path) -> BuildResult:
        """Do every step."""
        recipe = self.recipe
        check_target(output, recipe.name, recipe.version)
        parameters = self.pass_parameters()
        own = {name: self.loaded.folder / path for name, path in recipe.assets.items()}
        files_of_assets = assets.layer(own) if own else None
        licence_text = self.licence_text()
        with contextlib.ExitStack() as stack:
            stack.callback(self.workshop.close)
            self.workshop.begin()
            sources = self.find_sources()
            files = {key: stack.enter_context(single_file(model)) for key, model in sources.items()}
            self.cache.engines = self.cache.engines or probe()
            engines = self.cache.engines
            interface, fits = self.fit(sources, files)
            steps = operations.steps_of(recipe.preprocess.chain("preprocess"), interface, "preprocess")
            interfaces.check_layouts(steps, interface)
            operations.steps_of(recipe.postprocess.chain("postprocess"), interface, "postprocess")
            dataset = self.data(interface)
            interface = self.label(interface, dataset)
            fits = {key: replace(fitted, interface=interface) for key, fitted in fits.items()}
            self.say(
                f"{recipe.name} {recipe.version}: {len(dataset.calibration)} calibration and "
                f"{len(dataset.evaluation)} evaluation samples ({dataset.description})"
            )
            made = list(self.make(sources, files, fits, dataset, parameters))
            made = self.judge(made, dataset)
            about = bundling.About(
                name=recipe.name,
                version=recipe.version,
                licence=Licence(
                    expression=recipe.licence.expression,
                    source=recipe.licence.source,
                    attribution=recipe.licence.attribution,
                ),
                licence_text=licence_text,
                description=recipe.description,
                preprocess=recipe.preprocess.chain("preprocess"),
                postprocess=recipe.postprocess.chain("postprocess"),
                files=files_of_assets,
            )
            bundled = bundling.bundle(
                output,
                about,
                made,
                interface,
                [sample.inputs for sample in dataset.calibration],
                dataset.digest,
                provenance(
                    sources,
                    recipe_digest=self.loaded.digest,
                    data={recipe.data.kind: dataset.digest},
                    refused=[item.as_dict() for item in self.refused],
                ),
                engines,
                folder=self.folder,
                terms=bundling.Terms(recipe.golden, recipe.measure),
                kept=self.cache,
                say=self.say,
            )
        told = {
            "metric": dataset.metric,
            "description": dataset.description,
            "digest": dataset.digest,
            "calibration": len(dataset.calibration),
            "selection": len(dataset.parts[0]),
            "test": len(dataset.parts[1]),
        }
        return BuildResult(
            bundled,
            tuple(self.refused),
            {item.id: item.notes for item in made},
            told | dataset.notes,
            recipe,
        )

    def pass_parameters(self) -> dict[tuple[str, int], tuple[passes.PassInfo, msgspec.Struct]]:
        """Check every pass of the recipe, before anything heavy starts."""
        found: dict[tuple[str, int], tuple[passes.PassInfo, msgspec.Struct]] = {}
        for index, variant in enumerate(self.recipe.variants):
            for number, row in enumerate(variant.passes):
                info = passes.find(row["use"])
                where = f"variants[{index}].passes[{number}]"
                type_ = passes.module(info).Parameters
                found[variant.id, number] = (info, convert_parameters(row, type_, where))
        return found

    def find_sources(self) -> dict[str, Model]:
        """Find and check the source files."""
        found: dict[str, Model] = {}
        for key, source in self.recipe.sources.items():
            path = locate(
                source.path,
                distribution=source.distribution,
                version=source.version,
                folder=self.loaded.folder,
                what=f"source {key!r}",
            )
            self.workshop.look(path, self.recipe.interface, source.tensors)
            found[key] = load(path)
        return found

    def fit(
        self, sources: Mapping[str, Model], files: Mapping[str, Path]
    ) -> tuple[Interface, dict[str, interfaces.Fitted]]:
        """Derive the interface from the first source and check that the others meet it."""
        fits: dict[str, interfaces.Fitted] = {}
        for key, model in sources.items():
            tensors = self.recipe.sources[key].tensors
            if not fits:
                fits[key] = interfaces.derive(files[key], model.format, tensors, self.recipe.interface)
            else:
                first = next(iter(fits.values())).interface
                fits[key] = interfaces.fit(files[key], model.format, tensors, first)
        return next(iter(fits.values())).interface, fits

    def data(self, interface: Interface) -> Dataset:
        """Load the data, once for all builds that ask for the same."""
        key = (msgspec.json.encode(self.recipe.data), msgspec.json.encode(interface), self.loaded.folder)
        if key not in self.cache.datasets:
            load = data.load if self.recipe.data.kind in data.MODULES else labelled.dataset
            self.cache.datasets[key] = load(self.recipe.data, interface, self.loaded.folder)
        return self.cache.datasets[key]

    def label(self, interface: Interface, dataset: Dataset) -> Interface:
        """Add the class names that only the data know."""
        outputs = []
        for spec in interface.outputs:
            hint = self.recipe.interface.outputs.get(spec.name)
            if hint is None or not hint.labels_from_data:
                outputs.append(spec)
                continue
            labels = dataset.labels.get(spec.name)
            if labels is None or (isinstance(spec.shape[-1], int) and spec.shape[-1] != len(labels)):
                raise RefusedError(
                    "interface_invalid",
                    f"recipe: interface.outputs.{spec.name}.labels_from_data: the data have "
                    f"{'none' if labels is None else len(labels)}, the output has {spec.shape}",
                    consequence="applications would be told wrong names, so nothing was built",
                    next_step="write the labels into the recipe, one per entry of the output",
                )
            outputs.append(msgspec.structs.replace(spec, labels=labels))
        return msgspec.structs.replace(interface, outputs=outputs)

    def make(
        self,
        sources: Mapping[str, Model],
        files: Mapping[str, Path],
        fits: Mapping[str, interfaces.Fitted],
        dataset: Dataset,
        parameters: Mapping[tuple[str, int], tuple[passes.PassInfo, msgspec.Struct]],
    ) -> Iterator[Made]:
        """Run the passes of every variant; one that fails is refused."""
        for spec in self.recipe.variants:
            steps = [parameters[spec.id, number] for number in range(len(spec.passes))]
            try:
                yield self._make_one(spec, sources[spec.source], files[spec.source], fits[spec.source], dataset, steps)
            except WherryError as error:
                self._refuse(spec, error.code, error.message)

    def _make_one(
        self,
        spec: VariantOf,
        model: Model,
        path: Path,
        fitted: interfaces.Fitted,
        dataset: Dataset,
        steps: Sequence[tuple[passes.PassInfo, msgspec.Struct]],
    ) -> Made:
        folder = self.folder / spec.id
        folder.mkdir()
        feeds = self._feeds(spec.source, fitted, dataset)
        made = path
        source = precision_of(model)
        precision, quantized = source.name, source.quantized
        notes: list[dict[str, Any]] = []
        for number, (info, parameter) in enumerate(steps):
            self.say(f"{spec.id}: {info.name}")
            own = folder / str(number)
            own.mkdir()
            work = passes.Work(own, feeds, self.recipe.data.seed)
            result = self.workshop.apply(info, made, path, model.format, parameter, work)
            made = result.path
            precision, quantized = info.precision or precision, quantized or bool(info.precision)
            notes.append({"pass": info.name, **result.notes})
        runnable = Runnable(
            id=spec.id,
            path=made,
            format=model.format,
            interface=fitted.interface,
            tensors=fitted.tensors,
            batch=fitted.batch,
            options=spec.options,
            engines=self._engines(spec, model),
            quantized=quantized,
        )
        self.workshop.run(runnable, dict(dataset.calibration[0].inputs))  # what does not load and run is no variant
        return Made(
            spec.id,
            spec.source,
            runnable,
            precision,
            load(made).digest,
            tuple(str(row["pass"]) for row in notes),
            notes,
        )

    def _feeds(self, source: str, fitted: interfaces.Fitted, dataset: Dataset) -> Sequence[Mapping[str, Any]]:
        """Return the calibration calls under a source's own names, the same object for all its variants."""
        if source not in self.feeds:
            self.feeds[source] = [
                {fitted.tensors.get(name, name): value for name, value in sample.inputs.items()}
                for sample in dataset.calibration
            ]
        return self.feeds[source]

    def _engines(self, spec: VariantOf, model: Model) -> tuple[EngineName, ...]:
        chosen = [name for name in engines_of(model) if not spec.engines or name in spec.engines]
        if not chosen:
            raise RefusedError(
                "engine_missing",
                f"{', '.join(spec.engines)} run no {model.format} model",
                consequence="the variant could run nowhere, so nothing was built",
                next_step="name an engine of that format: onnxruntime for ONNX, ai-edge-litert or tflite-runtime for TFLite",
            )
        return tuple(chosen)

    def judge(self, made: Sequence[Made], dataset: Dataset) -> list[Made]:
        """Let the gate speak on one half of what was held back, and once more, of what it keeps, on the other half."""
        selection, test = dataset.parts
        specs = {spec.id: spec for spec in self.recipe.variants}
        self.say(f"judging {len(made)} variants on {len(selection)} samples, then on {len(test)} others")
        kept: list[Made] = []
        asked = list(made)
        for part, samples in (("selection", selection), ("test", test)):
            shown = self._show(asked, dataset, part, samples)
            sources = {item.source: shown[item.id] for item in asked if not item.passes}
            kept = []
            for item in asked:
                own, source = shown[item.id], sources.get(item.source)
                spec = specs[item.id]
                if isinstance(own, WherryError):
                    self._refuse(spec, own.code, own.message)
                elif source is None or isinstance(source, WherryError):
                    self._refuse(spec, "source_failed", f"source {item.source!r} gave no answers to compare with")
                elif self._holds(item, spec, own, source, dataset, part):
                    kept.append(item)
            asked = kept
        if not kept:
            raise RefusedError(
                "build_empty",
                f"no variant is left: {'; '.join(item.why for item in self.refused)}",
                consequence="nothing was packed",
                next_step="choose milder passes, allow a larger drop, or leave a variant without passes in the recipe",
            )
        return kept

    def _holds(
        self, item: Made, spec: VariantOf, own: evaluate.Shown, source: evaluate.Shown, dataset: Dataset, part: str
    ) -> bool:
        """Judge one variant on one part; a refusal is kept with its figures."""
        budget = budget_of(self.recipe.gate, spec.drop_max)
        if part == "selection":
            judged = evaluate.judge(own, source, dataset.measure)
            verdict = gate.hold(judged.drop, judged.error, budget, dataset.metric)
            item.judged = judged
        else:
            judged = evaluate.judge(own, source, dataset.measure, confidence=gate.confidence_of(0))
            verdict = gate.confirm(judged.drop, judged.error, budget, dataset.metric)
            item.confirmed = judged
        item.accuracy = bundling.accuracy(judged.drop, dataset.metric, dataset.description)
        where = "" if part == "selection" else "on samples of its own: "
        self.say(f"{item.id}: {where}{verdict.why}")
        if not verdict.passed:
            code = "over_budget" if part == "selection" else "unconfirmed"
            self._refuse(spec, code, f"{where}{verdict.why}", item.accuracy)
        return verdict.passed

    def _show(
        self, made: Sequence[Made], dataset: Dataset, part: str, samples: Sequence[Sample]
    ) -> dict[str, evaluate.Shown | WherryError]:
        """Run variants on one part, the sources first: their answers are what others may have to agree with."""
        found: dict[str, evaluate.Shown | WherryError] = {}

        def answers(item: Made) -> evaluate.Shown | WherryError:
            source: evaluate.Shown | None = None
            if item.passes:
                first = next((other for other in made if other.source == item.source and not other.passes), None)
                other = found.get(first.id) if first is not None else None
                if not isinstance(other, evaluate.Shown):
                    return RefusedError("source_failed", f"source {item.source!r} gave no answers to compare with")
                source = other
            try:
                return self._shown(item, dataset, part, samples, source)
            except WherryError as error:
                return error

        with ThreadPoolExecutor(WORKERS) as pool:
            for group in ([item for item in made if not item.passes], [item for item in made if item.passes]):
                found |= dict(zip([item.id for item in group], pool.map(answers, group), strict=True))
        return found

    def _shown(
        self, item: Made, dataset: Dataset, part: str, samples: Sequence[Sample], source: evaluate.Shown | None
    ) -> evaluate.Shown:
        runnable = item.runnable
        options = str(sorted(runnable.options.items()))
        key = (item.digest, dataset.digest, part, dataset.metric, item.source, runnable.engines[0], options)
        if key not in self.cache.shown:
            bound = runnable.open()
            self.cache.shown[key] = evaluate.show(
                bound.run, samples, dataset.metric, dataset.measure, output=dataset.output, source=source
            )
            bound.close()
        return self.cache.shown[key]

    def licence_text(self) -> bytes | None:
        """Read the licence text that the recipe names."""
        text = self.recipe.licence.text
        if text is None:
            return None
        path = locate(
            text.path, distribution=text.distribution, version="", folder=self.loaded.folder, what="the licence text"
        )
        try:
            return path.read_bytes()
        except OSError as error:
            raise RefusedError(
                "licence_missing",
                f"the licence text {path}: {error.strerror}",
                consequence="nothing was built: nobody may be sent a model without its terms",
                next_step="correct licence.text of the recipe, or leave it out: then the bundle holds the expression only",
            ) from error

    def _refuse(self, spec: VariantOf, code: str, why: str, accuracy: Accuracy | None = None) -> None:
        if spec.required or not spec.passes:
            raise RefusedError(
                code,
                f"variant {spec.id!r}, which the recipe requires: {why}",
                consequence="nothing was packed",
                next_step="choose milder passes for it, raise its budget, or drop `required`"
                if spec.passes
                else "it is the source as it is: look at the model and at the data that it is evaluated on",
            )
        log.info("variant %s refused: %s", spec.id, why)
        self.say(f"{spec.id}: refused, {why}")
        self.refused.append(Refused(spec.id, code, why, accuracy))
