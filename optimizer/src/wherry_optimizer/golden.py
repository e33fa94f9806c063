"""Choosing golden vectors: inputs that prove a variant is itself, with tolerances that honest engines meet.

For every candidate input each variant runs under every engine configuration at hand (optimization levels, threads, QDQ
on and off, both TFLite runtimes, places in a batch). What moves between configurations is the price of honesty: the tolerance is ten times
the largest such difference (`TOLERANCE_FACTOR`), at least 1e-4 of the output's range, and labels are compared only where
the best leads by more than that.

Sensitive inputs and honest tolerances pull apart: an input near a decision border shows a wrong weight soonest, and moves most
between honest engines; a saturated answer is steady because nothing moves it, a wrong variant included. So nothing
is chosen by its looks alone. A shortlist holds what looks sensitive (near borders, where variants differ most from the source,
extremes of range) beside what is steady; then all of it is run on the other variants and on files that were broken on purpose
(`breaking`), and those are chosen, under the tolerance that they need, that notice most. First every other variant of the bundle has
to fail at least one vector, then as many broken files as possible. What nothing separates is reported
(`Selection.unseparated`), since a mix-up of those would pass; how many other broken files pass is measured by `proof`.

An engine that cannot load a variant, or answers so differently that a tolerance for both would let anything pass (seen:
dynamic-range int8 in tflite-runtime 2.14 and LiteRT 2.3 are 0.16 of the range apart), is not one that it was shown on:
the variant does not name it (`Selection.left_out`). Text has no tolerance: a candidate whose text another configuration
answers otherwise is no golden vector.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_optimizer import breaking
from wherry_shared import golden, limits
from wherry_shared.bundle import EngineName, Format, Interface, axis_bounds
from wherry_shared.engines import ENGINES, load
from wherry_shared.engines.canonical import Bound
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import RefusedError, WherryError
from wherry_shared.facts import EngineFacts
from wherry_shared.golden import Expected, Golden, Tolerance, Vector

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
_Target = tuple[str, str]
"""(variant, other), or (variant, what was broken in it)."""

TOLERANCE_FACTOR = 10.0
FLOOR_OF_RANGE = 1e-4
STEADY_SHARES = (0.5, 0.625, 0.75, 0.875, 1.0)
"""Vectors are taken from the first of these shares of the candidates (those that move least between configurations)
that tells as many variants apart as any of them does."""
WIDENED_MAX = 2.0
"""So many times as wide may a tolerance be for the sake of vectors that tell the same things more often."""
ENGINE_MOVED_MAX = 0.02
"""Another engine that moves an output by more than this share of its range is left out."""
TRIES = 5
"""Broken files per variant that vectors are chosen by, the kinds in turn."""
SEED = 1
"""Of what is broken while choosing; `proof` measures by others."""
SHORTLIST = 32
"""So many candidates are run on broken files."""
BATCH = 4
BATCH_MOVED_MAX = 1e-3
"""A variant that answers otherwise in a batch, by more than this share of the range, mixes its rows: that is no spread."""
WORKERS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Runnable:
    """A variant file with all that is needed to run it."""

    id: str
    path: Path
    format: Format
    interface: Interface
    tensors: dict[str, str]
    batch: int
    options: dict[str, str | int | float | bool]
    engines: tuple[EngineName, ...]
    """Those that may run it; the first one gives the expected outputs."""
    quantized: bool = False

    def open(self, engine: str = "", **options: str | int | bool) -> Bound:
        """Load the variant under its interface.

        Raises:
            WherryError: see `wherry_shared.engines.load`.
        """
        session = load(self.path, self.format, engine=engine or self.engines[0], options={**self.options, **options})
        return Bound(session, self.interface, self.tensors, self.batch)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to run a variant."""

    engine: EngineName
    options: tuple[tuple[str, str | int | bool], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.engine, *(f"{key}={value}" for key, value in self.options)])


@dataclass(slots=True)
class Runs:
    """What one variant gave for every candidate."""

    outputs: list[dict[str, Array]]
    """Of the first configuration."""
    moved: dict[str, npt.NDArray[np.float64]]
    """Output → (candidates,): largest difference between any configuration and the first."""
    shown: tuple[EngineName, ...]
    """Engines that loaded it and agree with the first."""
    left_out: dict[EngineName, str]
    """Engines that did not, and why."""
    ways: dict[str, dict[str, npt.NDArray[np.float64]]] = field(default_factory=dict)
    """Configuration → output → (candidates,): its differences from the first."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A file with one thing wrong, and what it answers."""

    variant: str
    what: str
    outputs: Mapping[int, Tensors | None]
    """By candidate; None where it does not run."""


@dataclass(frozen=True, slots=True)
class Picked:
    """One golden vector and what it is good for."""

    candidate: int
    traits: tuple[str, ...]
    """`border`, `error`, `extreme`, `steady`: why it was on the shortlist."""
    tells: int
    """Pairs of variants that it tells apart."""
    notices: int
    """Broken files that it notices, of those that were chosen by."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The golden vectors of one variant."""

    encoded: bytes
    vectors: int
    separates: list[str]
    engines: tuple[EngineName, ...]
    tolerances: dict[str, Tolerance]


@dataclass(frozen=True, slots=True)
class Selection:
    """The golden vectors of all variants of a bundle."""

    by_variant: dict[str, Chosen]
    unseparated: list[tuple[str, str]]
    """(variant, other) of one format: the other passes all golden vectors of the variant."""
    left_out: Sequence[tuple[str, EngineName, str]]
    """(variant, engine, why): engines that the variant does not name."""
    picked: Sequence[Picked] = ()
    runs: Mapping[str, Runs] = field(default_factory=dict)
    """Variant → what it gave for the candidates."""


RunAll = Callable[[Runnable, Sequence[dict[str, Array]], Sequence[EngineFacts]], Runs]


def select(
    variants: Sequence[Runnable],
    candidates: Sequence[dict[str, Array]],
    available: Sequence[EngineFacts],
    *,
    vectors: int,
    sampled_above: int,
    synthetic: bool,
    budgets: Mapping[str, int],
    tries: int = TRIES,
    run: RunAll | None = None,
) -> Selection:
    """Run every variant on every candidate and choose.

    Args:
        variants: all variants of the bundle.
        candidates: inputs under canonical names.
        available: engines that work here.
        vectors: at most so many.
        sampled_above: outputs with more elements are kept as samples of this many.
        synthetic: the candidates were made up.
        budgets: bytes that the golden vectors of a variant may take, by id.
        tries: broken files per variant to choose by.
        run: in place of `run_all`, for a caller that remembers what it gave.

    Raises:
        RefusedError: `golden_none` if no candidate gets the same text every time, `golden_too_large` if not even one vector
            fits into the budget.
        EngineFault: a variant fails on a candidate.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = {item.id: pool.submit(run or run_all, item, candidates, available) for item in variants}
        runs = {key: job.result() for key, job in jobs.items()}
    ranked = _steadiest_first(runs, len(candidates))
    if not ranked:
        raise RefusedError(
            "golden_none",
            "on every sample another number of threads or another optimization level changes the text that is answered",
            consequence="no device could be held to it, so nothing was packed",
            next_step="give samples that the model decides clearly, by --inputs or as calibration data",
        )
    traits = shortlist(variants, runs, ranked)
    with ThreadPoolExecutor(WORKERS) as pool:
        wrong = [
            row
            for rows in pool.map(lambda item: answers_of_broken(item, candidates, list(traits), tries, SEED), variants)
            for row in rows
        ]
    tells = _telling(variants, runs, [index for index in ranked if index in traits], wrong)
    order = _cover(tells, {(one.id, other.id) for one in variants for other in variants if one is not other})
    order = _within_budget(
        order[:vectors], variants, candidates=candidates, runs=runs, sampled_above=sampled_above, budgets=budgets
    )
    by_variant: dict[str, Chosen] = {}
    unseparated: list[tuple[str, str]] = []
    for item in variants:
        own = runs[item.id]
        tolerances = _tolerances(item, own, order)
        made = _make(own, candidates, order, tolerances, sampled_above, synthetic=synthetic)
        separates = [other.id for other in variants if other.id != item.id and _fails(made, runs[other.id], order)]
        unseparated += [
            (item.id, other.id)
            for other in variants
            if other.format == item.format and other.id not in (item.id, *separates)
        ]
        by_variant[item.id] = Chosen(golden.encode(made), len(order), separates, own.shown, tolerances)
    left_out = [(key, engine, why) for key, own in runs.items() for engine, why in own.left_out.items()]
    names = {item.id for item in variants}
    picked = []
    for index in order:
        pairs = sum(what in names for _, what in tells[index])
        picked.append(Picked(index, tuple(traits[index]), pairs, len(tells[index]) - pairs))
    return Selection(by_variant, unseparated, left_out, picked, runs)


def budget(variant_bytes: int) -> int:
    """Return how many bytes the golden vectors of a variant may take (contracts.md §7)."""
    return max(limits.GOLDEN_BYTES_MIN_BUDGET, int(variant_bytes * limits.GOLDEN_SHARE_OF_VARIANT))


def configurations(variant: Runnable, available: Sequence[EngineFacts]) -> list[Configuration]:
    """Return the engine configurations at hand for a variant; the first one is how devices run it.

    Raises:
        RefusedError: `engine_missing` if no engine here runs it.
    """
    here = {facts.name for facts in available}
    names = [name for name in variant.engines if name in here and variant.format in ENGINES[name]]
    if not names:
        raise RefusedError(
            "engine_missing",
            f"no engine here runs {variant.format} variant {variant.id!r}",
            consequence="it cannot be proved, so nothing was built",
            next_step="install wherry-optimizer with its engines again, or correct `engines` of the variant",
        )
    found = [Configuration(name) for name in names]
    if variant.format == "onnx":
        found.append(Configuration(names[0], (("threads", 2),)))
        for level in ("extended", "basic", "disable"):
            found.append(Configuration(names[0], (("graph_optimization", level),)))
        if variant.quantized:
            flipped = not bool(variant.options.get("disable_quant_qdq", False))
            found.append(Configuration(names[0], (("disable_quant_qdq", flipped),)))
    else:
        found += [Configuration(name, (("threads", 2),)) for name in names]
    return found


def run_all(variant: Runnable, candidates: Sequence[dict[str, Array]], available: Sequence[EngineFacts]) -> Runs:
    """Run every candidate under every configuration.

    Raises:
        EngineFault: the variant fails in its first engine.
    """
    outputs: list[dict[str, Array]] = []
    moved: dict[str, npt.NDArray[np.float64]] = {}
    shown: list[EngineName] = []
    left_out: dict[EngineName, str] = {}
    ways: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for configuration in configurations(variant, available):
        if configuration.engine in left_out:
            continue
        first = not outputs
        together: list[dict[str, Array]] | None = None
        try:
            bound = variant.open(configuration.engine, **dict(configuration.options))
            results = [bound.run(candidate) for candidate in candidates]
            if first:
                together = _in_batches(bound, variant.interface, candidates)
        except EngineFault as error:
            if first or configuration.engine == shown[0]:
                raise
            left_out[configuration.engine] = error.message
            continue
        bound.close()
        if first:
            outputs = results
            moved = {name: np.zeros(len(candidates)) for name in results[0]}
        differences = {name: _moved(name, outputs, results) for name in moved}
        spans = {name: span_of([row[name] for row in outputs]) for name in moved}
        share = max(float(value.max()) / spans[name] for name, value in differences.items())
        if configuration.engine not in shown:
            if not first and share > ENGINE_MOVED_MAX:
                left_out[configuration.engine] = f"moves an output by {share:.2f} of its range against {shown[0]}"
                continue
            shown.append(configuration.engine)
        if not first:
            ways[str(configuration)] = differences
        if together is not None:
            differences = {name: _moved(name, outputs, together) for name in moved}
            if all(float(value.max()) <= BATCH_MOVED_MAX * spans[name] for name, value in differences.items()):
                ways[f"{configuration} batch={BATCH}"] = differences
    for differences in ways.values():
        moved = {name: np.maximum(value, differences[name]) for name, value in moved.items()}
    return Runs(outputs, moved, tuple(shown), left_out, ways)


def _in_batches(
    bound: Bound, interface: Interface, candidates: Sequence[dict[str, Array]]
) -> list[dict[str, Array]] | None:
    """Run candidates a few at a time; None where the interface has no batch, or not every row runs beside others."""
    first = {spec.shape[0] if spec.shape else 1 for spec in (*interface.inputs, *interface.outputs)}
    (axis,) = first if len(first) == 1 else (1,)
    if not isinstance(axis, str) or bound.batch or any(spec.optional for spec in interface.inputs):
        return None
    low, high = axis_bounds(axis, interface)
    if low > 1 or 0 < high < BATCH or any(len(value) != 1 for inputs in candidates for value in inputs.values()):
        return None
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, inputs in enumerate(candidates):
        groups.setdefault(tuple(inputs[spec.name].shape for spec in interface.inputs), []).append(index)
    found: dict[int, dict[str, Array]] = {}
    for group in groups.values():
        for start in range(0, len(group), BATCH):
            # the last ones are filled up with the first ones, so that all batches are as large
            own = [group[(start + place) % len(group)] for place in range(BATCH)]
            stacked = {
                spec.name: np.concatenate([candidates[index][spec.name] for index in own]) for spec in interface.inputs
            }
            try:
                outputs = bound.run(stacked)
            except EngineFault:  # a file whose batch is free in name only: applications are told when they try
                return None
            if any(len(value) != BATCH for value in outputs.values()):
                return None
            for place, index in enumerate(own):
                found.setdefault(index, {name: value[place : place + 1] for name, value in outputs.items()})
    return [found[index] for index in range(len(candidates))]


def shortlist(
    variants: Sequence[Runnable], runs: Mapping[str, Runs], ranked: Sequence[int], count: int = SHORTLIST
) -> dict[int, list[str]]:
    """Return the candidates to try, with what each looks good for; every trait names its best in turn.

    Args:
        variants: of the bundle, the source first.
        runs: what they gave.
        ranked: candidates whose text does not move, the steadiest first.
        count: at most so many.
    """
    border, error, extreme = _borders(variants[0], runs), _errors(variants, runs), _extremes(runs[variants[0].id])
    orders = {
        "border": sorted((index for index in ranked if np.isfinite(border[index])), key=lambda index: border[index]),
        "error": sorted((index for index in ranked if error[index] > 0), key=lambda index: -error[index]),
        "extreme": sorted(ranked, key=lambda index: -extreme[index]),
        "steady": list(ranked),
    }
    found: dict[int, list[str]] = {}
    for place in range(len(ranked)):
        for trait, order in orders.items():
            if place < len(order) and (order[place] in found or len(found) < count):
                found.setdefault(order[place], []).append(trait)
        if len(found) == count:
            break
    return found


def _borders(source: Runnable, runs: Mapping[str, Runs]) -> npt.NDArray[np.float64]:
    """Return how near each candidate is to a decision border: the lead of the best class, as a share of the range."""
    outputs = runs[source.id].outputs
    near = np.full(len(outputs), np.inf)
    for spec in source.interface.outputs:
        if not _decides(spec.labels, spec.shape) or any(golden.is_text(row[spec.name]) for row in outputs):
            continue
        span = span_of([row[spec.name] for row in outputs])
        for index, row in enumerate(outputs):
            value = row[spec.name].astype(np.float64)
            if value.size and value.shape[-1] > 1:
                top = np.sort(value, axis=-1)
                near[index] = min(near[index], float((top[..., -1] - top[..., -2]).min()) / span)
            elif value.size:  # one number that is yes or no: the border is half way
                near[index] = min(near[index], float(np.abs(value - (value.max() + value.min()) / 2).min()) / span)
    return near


def _errors(variants: Sequence[Runnable], runs: Mapping[str, Runs]) -> npt.NDArray[np.float64]:
    """Return how far the other variants are from the first one, as a share of the range."""
    first = runs[variants[0].id].outputs
    worst = np.zeros(len(first))
    for item in variants[1:]:
        for name in first[0]:
            span = span_of([row[name] for row in first])
            if all(one[name].shape == two[name].shape for one, two in zip(first, runs[item.id].outputs, strict=True)):
                worst = np.maximum(worst, _moved(name, first, runs[item.id].outputs) / span)
    return worst


def _extremes(runs: Runs) -> npt.NDArray[np.float64]:
    """Return how far the outputs of a candidate are from the middle of their range."""
    far = np.zeros(len(runs.outputs))
    for name in runs.outputs[0]:
        if any(golden.is_text(row[name]) for row in runs.outputs):
            continue
        span = span_of([row[name] for row in runs.outputs])
        highs = np.array([float(row[name].astype(np.float64).max(initial=-np.inf)) for row in runs.outputs])
        lows = np.array([float(row[name].astype(np.float64).min(initial=np.inf)) for row in runs.outputs])
        far = np.maximum(far, np.nan_to_num(np.maximum(highs - np.median(highs), np.median(lows) - lows)) / span)
    return far


def answers_of_broken(
    item: Runnable, candidates: Sequence[dict[str, Array]], indices: Sequence[int], tries: int, seed: int
) -> list[Wrong]:
    """Break a variant in several ways and run what comes of it."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"broken.{item.format}"
        for number, (kind, data) in enumerate(breaking.broken(item.path.read_bytes(), item.format, tries, seed)):
            path.write_bytes(data)
            found.append(Wrong(item.id, f"{kind} {number}", answers(replace(item, path=path), candidates, indices)))
    return found


def answers(
    item: Runnable, candidates: Sequence[dict[str, Array]], indices: Sequence[int]
) -> dict[int, Tensors | None]:
    """Run candidates; what does not load or run gives None, which a device refuses as well."""
    try:
        bound = item.open()
    except WherryError:
        return dict.fromkeys(indices)
    found: dict[int, Tensors | None] = {}
    for index in indices:
        try:
            found[index] = bound.run(candidates[index])
        except EngineFault:
            found[index] = None
    bound.close()
    return found


def _moved(name: str, first: Sequence[Tensors], other: Sequence[Tensors]) -> npt.NDArray[np.float64]:
    """Return the largest difference of an output per candidate, (candidates,)."""
    if any(golden.is_text(one[name]) for one in first):
        return np.array([_text_moved(one[name], two[name]) for one, two in zip(first, other, strict=True)])
    return np.array(
        [
            float(np.abs(one[name].astype(np.float64) - two[name].astype(np.float64)).max(initial=0.0))
            for one, two in zip(first, other, strict=True)
        ]
    )


def _text_moved(one: Array, two: Array) -> float:
    """Return 1 if any text differs: there is no nearly."""
    return float(one.shape != two.shape or golden.text_differences(one, two) > 0)


def _steadiest_first(runs: Mapping[str, Runs], count: int) -> list[int]:
    """Return the candidates, those first that move least over all variants and outputs, without those whose text moves."""
    worst = np.zeros(count)
    stable = np.ones(count, np.bool_)
    for own in runs.values():
        for name, moved in own.moved.items():
            span = span_of([outputs[name] for outputs in own.outputs])
            worst = np.maximum(worst, moved / span)
            if any(golden.is_text(outputs[name]) for outputs in own.outputs):
                stable &= moved == 0
    return [int(index) for index in np.argsort(worst, kind="stable") if stable[index]]


def _telling(
    variants: Sequence[Runnable], runs: Mapping[str, Runs], ranked: Sequence[int], wrong: Sequence[Wrong] = ()
) -> dict[int, set[_Target]]:
    """Return candidate → what it tells apart, for the candidates to choose from, steadiest first.

    Every candidate that is let in may widen the tolerance for all of them. Variants that are told apart count first, then broken
    files; where both are the same, how often they are told, if it widens tolerances little.
    """
    best: dict[int, set[_Target]] = {}
    most, often, widest, narrowest = (-1, -1), 0, np.inf, np.inf
    names = {item.id for item in variants}
    for share in STEADY_SHARES:
        chosen = ranked[: max(1, round(len(ranked) * share))]
        tells = _tells(variants, runs, chosen, wrong)
        told = set().union(*tells.values())
        pairs = sum(what in names for _, what in told)
        found, times = (pairs, len(told) - pairs), sum(map(len, tells.values()))
        wide = max(
            bound.atol / span_of([runs[item.id].outputs[index][name] for index in chosen])
            for item in variants
            for name, bound in _tolerances(item, runs[item.id], chosen).items()
        )
        if found > most:
            narrowest = wide
        elif found < most or times < often or wide > max(widest, (times > often) * WIDENED_MAX * narrowest):
            continue
        best, most, often, widest = tells, found, times, wide
    return best


def _tells(
    variants: Sequence[Runnable], runs: Mapping[str, Runs], indices: Sequence[int], wrong: Sequence[Wrong]
) -> dict[int, set[_Target]]:
    """Return candidate → what it tells apart under the tolerances that all of `indices` need."""
    tells: dict[int, set[_Target]] = {index: set() for index in indices}
    for item in variants:
        bounds = _tolerances(item, runs[item.id], indices)
        for other in variants:
            if item.id == other.id:
                continue
            for index in indices:
                if differs(runs[item.id].outputs[index], runs[other.id].outputs[index], bounds):
                    tells[index].add((item.id, other.id))
        for row in wrong:
            if row.variant != item.id:
                continue
            for index in indices:
                outputs = row.outputs[index]
                if outputs is None or differs(runs[item.id].outputs[index], outputs, bounds):
                    tells[index].add((item.id, row.what))
    return tells


def span_of(values: Sequence[Array]) -> float:
    """Return the range of an output over vectors; of a constant its size, so that a tolerance is never zero; of text 1."""
    if any(golden.is_text(value) for value in values):
        return 1.0
    filled = [value for value in values if value.size]
    low = min((float(value.min()) for value in filled), default=np.inf)
    high = max((float(value.max()) for value in filled), default=-np.inf)
    if not low < high:
        return max(abs(low), 1.0) if np.isfinite(low) else 1.0
    return high - low


def _tolerances(variant: Runnable, runs: Runs, indices: Sequence[int]) -> dict[str, Tolerance]:
    found: dict[str, Tolerance] = {}
    for spec in variant.interface.outputs:
        if spec.datatype == golden.TEXT:
            found[spec.name] = Tolerance(golden.EXACT, golden.EXACT)
            continue
        span = span_of([runs.outputs[index][spec.name] for index in indices])
        moved = float(runs.moved[spec.name][list(indices)].max())
        atol = max(TOLERANCE_FACTOR * moved, FLOOR_OF_RANGE * span)
        classes = _decides(spec.labels, spec.shape)
        found[spec.name] = Tolerance(atol=atol, rtol=0.0, argmax_margin=atol if classes else None)
    return found


def _decides(labels: Sequence[str] | None, shape: Sequence[int | str]) -> bool:
    """Tell whether the largest entry of an output is a decision."""
    return labels is not None or len(shape) == 2


def _cover(tells: Mapping[int, set[_Target]], first: AbstractSet[_Target] = frozenset()) -> list[int]:
    """Order candidates: a greedy cover of `first` (the pairs of variants), then of all else, then what tells most."""
    order: list[int] = []
    rest = list(tells)
    told = set().union(*tells.values())
    for wanted in (told & first, told - first):
        left = wanted - set().union(*(tells[index] for index in order))
        while left:
            best = max(rest, key=lambda index: len(tells[index] & left))
            order.append(best)
            rest.remove(best)
            left -= tells[best]
    return order + sorted(rest, key=lambda index: -len(tells[index]))


def differs(want: Tensors, have: Tensors, tolerances: Mapping[str, Tolerance]) -> bool:
    """Tell whether any output is beyond its tolerance."""
    return any(
        golden.compare(0, name, Expected(value, value.shape), tolerances[name], have.get(name)) is not None
        for name, value in want.items()
    )


def _expected(value: Array, sampled_above: int, seed: int) -> Expected:
    if value.size <= sampled_above:
        return Expected(value, value.shape)
    sample = golden.sample_of(value.size, sampled_above, seed)
    return Expected(value.reshape(-1)[sample.indices(value.size)], value.shape, sample)


def _make(
    runs: Runs,
    candidates: Sequence[dict[str, Array]],
    order: Sequence[int],
    tolerances: dict[str, Tolerance],
    sampled_above: int,
    *,
    synthetic: bool,
) -> Golden:
    vectors = tuple(
        Vector(
            dict(candidates[index]),
            {name: _expected(value, sampled_above, index) for name, value in runs.outputs[index].items()},
        )
        for index in order
    )
    return Golden(vectors, tolerances, synthetic)


def _fails(made: Golden, other: Runs, order: Sequence[int]) -> bool:
    """Tell whether another variant misses at least one vector."""
    return any(
        golden.compare(position, name, expected, made.tolerances[name], other.outputs[index].get(name)) is not None
        for position, index in enumerate(order)
        for name, expected in made.vectors[position].expected.items()
    )


def _within_budget(
    order: Sequence[int],
    variants: Sequence[Runnable],
    *,
    candidates: Sequence[dict[str, Array]],
    runs: Mapping[str, Runs],
    sampled_above: int,
    budgets: Mapping[str, int],
) -> list[int]:
    """Keep vectors, in order, as long as those of every variant fit; each is weighed alone, which errs to the safe side."""
    left = dict(budgets)
    kept: list[int] = []
    for index in order:
        sizes: dict[str, int] = {}
        for item in variants:
            tolerances = {spec.name: Tolerance(1.0, 1.0, 1.0) for spec in item.interface.outputs}
            alone = _make(runs[item.id], candidates, [index], tolerances, sampled_above, synthetic=True)
            sizes[item.id] = len(golden.encode(alone))
        if all(sizes[key] <= left[key] for key in sizes):
            kept.append(index)
            left = {key: left[key] - sizes[key] for key in sizes}
    if not kept:
        raise RefusedError(
            "golden_too_large",
            f"not one golden vector fits into {min(budgets.values())} bytes",
            consequence="the variants cannot be proved on a device",
            next_step="give samples that compress better (`pack --inputs`, or a recipe's calibration data; what is made up "
            "hardly does); where it is outputs that are large, lower a recipe's golden.sampled_above",
        )
    return kept
