"""What a search chose becomes a bundle: the source as it is and every target's variant, each once.

The bundle is made as a recipe's is (`bundling`). Golden vectors come from calibration calls, accuracy from the test split,
which nothing was chosen by.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from wherry_optimizer import assets, bundling
from wherry_optimizer import interface as interfaces
from wherry_optimizer.bundling import Bundled, Made
from wherry_optimizer.candidates import SOURCE
from wherry_optimizer.golden import Runnable
from wherry_optimizer.interface import Fitted
from wherry_optimizer.model import Model, author_of
from wherry_optimizer.model import load as load_model
from wherry_optimizer.pack import UNSTATED, check_target, engines_of, provenance, single_file
from wherry_optimizer.precision import precision_of
from wherry_optimizer.recipe import ProcessingFile, read_processing
from wherry_optimizer.search import Result
from wherry_shared import licence as licences
from wherry_shared.bundle import Accuracy, Licence, StatePair
from wherry_shared.engines import ENGINES, probe
from wherry_shared.ids import check_name, parse_version

SELECTION, TEST = "selection", "test"


@dataclass(frozen=True, slots=True)
class Release:
    """What a bundle is to be called, and under what terms it goes out."""

    name: str
    version: str
    licence: str
    """SPDX expression or `LicenseRef-…`."""
    attribution: str = ""
    """Whose work it is; by default what the file itself says, else `pack.UNSTATED`."""
    source: str = ""
    """Where it comes from; by default the file's name."""
    description: str = ""
    processing: Path | None = None
    """TOML with `[preprocess]`, `[postprocess]` and `[interface]`, as in a recipe."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Assets: name → file."""

    def check(self, output: Path) -> None:
        """Refuse what no bundle can be called, before anything takes long.

        Raises:
            RefusedError: `bad_name`, `bad_version`, `licence_*`, `output_taken`, `output_signed`, `asset_*`.
        """
        check_name(self.name, "name")
        parse_version(self.version)
        licences.check_known(self.licence)
        check_target(output, self.name, self.version)
        if self.files:
            assets.layer(self.files)

    def said(self) -> ProcessingFile:
        """Return what the processing file says.

        Raises:
            RefusedError: as `recipe.read_processing`.
        """
        return read_processing(self.processing) if self.processing is not None else ProcessingFile()


def ship(
    result: Result,
    source: Model,
    fitted: Fitted,
    release: Release,
    output: Path,
    say: Callable[[str], None] | None = None,
) -> Bundled:
    """Write the bundle of a search into `output`/NAME-VERSION.

    Args:
        result: a search whose choices were confirmed.
        source: the model that it began with.
        fitted: how the source meets its interface.
        release: what the bundle is called.
        output: folder.
        say: told each step in a sentence.

    Raises:
        RefusedError: as `bundling.bundle`.
    """
    problem = result.problem
    said = release.said()
    fitted = interfaces.widened(fitted, problem.calibration)
    pairs = [StatePair(output=of, input=name) for name, of in sorted(problem.state.items())]
    interface = msgspec.structs.replace(fitted.interface, state=pairs)
    engines = probe([engine for engine, formats in ENGINES.items() if problem.format in formats])
    with tempfile.TemporaryDirectory(prefix="wherry-ship-") as folder, single_file(source) as whole:
        made: dict[str, Made] = {}
        for key, path, options, notes, accuracy in _chosen(result, whole):
            if key in made:
                continue
            model = load_model(path)
            precision = precision_of(model)
            runnable = Runnable(
                id=key,
                path=path,
                format=model.format,
                interface=interface,
                tensors=fitted.tensors,
                batch=fitted.batch,
                options=options,
                engines=engines_of(model),
                quantized=precision.quantized,
            )
            passes = tuple(str(row["pass"]) for row in notes if "skipped" not in row)
            made[key] = Made(key, SOURCE, runnable, precision.name, model.digest, passes, notes, accuracy)
        digests = {part: problem.data_digest(part) for part in ("calibration", SELECTION, TEST)}
        return bundling.bundle(
            output,
            bundling.About(
                name=release.name,
                version=release.version,
                licence=Licence(
                    expression=release.licence,
                    source=release.source or source.path.name,
                    attribution=release.attribution.strip() or author_of(source) or UNSTATED,
                ),
                description=release.description,
                preprocess=said.preprocess.chain("preprocess"),
                postprocess=said.postprocess.chain("postprocess"),
                files=assets.layer(release.files) if release.files else None,
            ),
            list(made.values()),
            interface,
            problem.calibration,
            digests["calibration"],
            provenance({"source": source}, data=digests, refused=_refused(result)),
            engines,
            folder=Path(folder),
            say=say or (lambda _: None),
        )


def variant_id(candidate: str) -> str:
    """Return what a candidate is called as a variant: `channels-0.5+int8-static` becomes `channels-0-5-int8-static`."""
    return candidate.replace(".", "-").replace("+", "-")


_Chosen = tuple[str, Path, dict[str, Any], list[dict[str, Any]], Accuracy | None]
"""(id, file, options, notes, accuracy)"""


def _chosen(result: Result, source: Path) -> list[_Chosen]:
    """Return the source and what was chosen for each target; what two targets share comes twice."""
    metric, data = result.problem.metric.name, result.parts.description
    rows: list[_Chosen] = []
    for found in result.found:
        confirmed = found.confirmation
        chosen = found.find(found.chosen)
        own = found.find(SOURCE).drop
        if confirmed is not None:
            own = confirmed.source
            rows.append(
                (
                    variant_id(chosen.id),
                    Path(chosen.answer.path),
                    dict(chosen.candidate.options),
                    chosen.answer.notes,
                    bundling.accuracy(confirmed.drop, metric, data),
                )
            )
        rows.append((SOURCE, source, {}, [], bundling.accuracy(own, metric, data) if own is not None else None))
    return sorted(rows, key=lambda row: row[0] != SOURCE)


def _refused(result: Result) -> list[dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for found in result.found:
        for item in found.refused:
            row: dict[str, object] = {"id": item.id, "code": item.verdict.by, "why": item.verdict.why}
            if item.drop is not None:
                row |= {"value": item.drop.value, "drop": item.drop.drop}
            rows.setdefault(item.id, row)
    return list(rows.values())
