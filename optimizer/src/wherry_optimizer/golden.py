"""Choosing golden vectors: inputs that prove a variant is itself, with tolerances that honest engines meet.

For every candidate input each variant runs under every engine configuration at hand (optimization levels, threads, QDQ
on and off, both TFLite runtimes). What moves between configurations is the price of honesty: the tolerance is ten times
the largest such difference (`TOLERANCE_FACTOR`), at least 1e-4 of the output's range. Vectors are chosen so that every other
variant of the bundle fails at least one, among the steadier half if those tell all variants apart, else among as many
more as that takes: a saturated answer is steady because nothing moves it, a wrong variant included. Variants of the same
format that nothing separates are reported (`Selection.unseparated`), since a mix-up of those would pass.

An engine that cannot load a variant, or answers so differently that a tolerance for both would let anything pass (seen:
dynamic-range int8 in tflite-runtime 2.14 and LiteRT 2.3 are 0.16 of the range apart), is not one that it was shown on:
the variant does not name it (`Selection.left_out`). Text has no tolerance: a candidate whose text another configuration
answers otherwise is no golden vector.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_shared import golden, limits
from wherry_shared.bundle import EngineName, Format, Interface
from wherry_shared.engines import ENGINES, load
from wherry_shared.engines.canonical import Bound
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import RefusedError
from wherry_shared.facts import EngineFacts
from wherry_shared.golden import Expected, Golden, Tolerance, Vector

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
_Pair = tuple[str, str]
"""(variant, other)"""

TOLERANCE_FACTOR = 10.0
FLOOR_OF_RANGE = 1e-4
STEADY_SHARES = (0.5, 0.625, 0.75, 0.875, 1.0)
"""Vectors are taken from the first of these shares of the candidates (those that move least between configurations)
that tells as many variants apart as any of them does."""
ENGINE_MOVED_MAX = 0.02
"""Another engine that moves an output by more than this share of its range is left out."""
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
    order = _cover(_telling(variants, runs, ranked))
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
    return Selection(by_variant, unseparated, left_out)


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
    for configuration in configurations(variant, available):
        if configuration.engine in left_out:
            continue
        first = not outputs
        try:
            bound = variant.open(configuration.engine, **dict(configuration.options))
            results = [bound.run(candidate) for candidate in candidates]
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
        spans = {name: _span([row[name] for row in outputs]) for name in moved}
        share = max(float(value.max()) / spans[name] for name, value in differences.items())
        if configuration.engine not in shown:
            if not first and share > ENGINE_MOVED_MAX:
                left_out[configuration.engine] = f"moves an output by {share:.2f} of its range against {shown[0]}"
                continue
            shown.append(configuration.engine)
        moved = {name: np.maximum(value, differences[name]) for name, value in moved.items()}
    return Runs(outputs, moved, tuple(shown), left_out)


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
            span = _span([outputs[name] for outputs in own.outputs])
            worst = np.maximum(worst, moved / span)
            if any(golden.is_text(outputs[name]) for outputs in own.outputs):
                stable &= moved == 0
    return [int(index) for index in np.argsort(worst, kind="stable") if stable[index]]


def _telling(variants: Sequence[Runnable], runs: Mapping[str, Runs], ranked: Sequence[int]) -> dict[int, set[_Pair]]:
    """Return candidate → pairs (variant, other) that it tells apart, for the candidates to choose from, steadiest first.

    Every candidate that is let in may widen the tolerance for all of them: no more are let in than the pairs need.
    """
    best: dict[int, set[_Pair]] = {}
    most = -1
    for share in STEADY_SHARES:
        chosen = ranked[: max(1, round(len(ranked) * share))]
        tells = _tells(variants, runs, chosen)
        told = len(set().union(*tells.values()))
        if told > most:
            best, most = tells, told
        if most == len(variants) * (len(variants) - 1):
            break
    return best


def _tells(variants: Sequence[Runnable], runs: Mapping[str, Runs], indices: Sequence[int]) -> dict[int, set[_Pair]]:
    """Return candidate → pairs (variant, other) that it tells apart under the tolerances that all of `indices` need."""
    tells: dict[int, set[_Pair]] = {index: set() for index in indices}
    for item in variants:
        bounds = _tolerances(item, runs[item.id], indices)
        for other in variants:
            if item.id == other.id:
                continue
            for index in indices:
                if _differs(runs[item.id].outputs[index], runs[other.id].outputs[index], bounds):
                    tells[index].add((item.id, other.id))
    return tells


def _span(values: Sequence[Array]) -> float:
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
        span = _span([runs.outputs[index][spec.name] for index in indices])
        moved = float(runs.moved[spec.name][list(indices)].max())
        atol = max(TOLERANCE_FACTOR * moved, FLOOR_OF_RANGE * span)
        classes = spec.labels is not None or len(spec.shape) == 2
        found[spec.name] = Tolerance(atol=atol, rtol=0.0, argmax_margin=atol if classes else None)
    return found


def _cover(tells: Mapping[int, set[_Pair]]) -> list[int]:
    """Order candidates: first a greedy cover of all pairs (variant, other) by vectors that tell them apart."""
    open_pairs = set().union(*tells.values())
    order: list[int] = []
    rest = list(tells)
    while open_pairs:
        best = max(rest, key=lambda index: len(tells[index] & open_pairs))
        order.append(best)
        rest.remove(best)
        open_pairs -= tells[best]
    return order + rest


def _differs(want: Tensors, have: Tensors, tolerances: Mapping[str, Tolerance]) -> bool:
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
