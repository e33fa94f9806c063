"""From variants that passed a gate to a bundle: golden vectors, figures, packing. Recipes and searches both end here.

Whoever made the variants, what is promised about them is made in one way: golden vectors from samples that nothing was
judged by, memory in a process of its own, latency interleaved with the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wherry_optimizer import gate, measure, proof
from wherry_optimizer.evaluate import Judged
from wherry_optimizer.golden import WORKERS, Array, Runnable, Runs, Selection, budget, run_all, select
from wherry_optimizer.pack import NO_PROCESSING, Packed, Piece, write_bundle
from wherry_optimizer.proof import Proof
from wherry_optimizer.recipe import GoldenOf, MeasureOf
from wherry_shared import golden
from wherry_shared.bundle import Accuracy, Assets, Interface, Licence, Processing, Provenance
from wherry_shared.errors import RefusedError
from wherry_shared.facts import EngineFacts

Progress = Callable[[str], None]


@dataclass(slots=True)
class Made:
    """A variant on its way into a bundle."""

    id: str
    source: str
    """Which of the sources it was made of."""
    runnable: Runnable
    precision: str
    digest: str
    passes: tuple[str, ...] = ()
    """None: it is the source itself."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    accuracy: Accuracy | None = None
    """On the part that nothing was chosen by."""
    judged: Judged | None = None
    """What it was kept by."""
    confirmed: Judged | None = None


@dataclass(frozen=True, slots=True)
class About:
    """What a bundle says of itself beside its variants."""

    name: str
    version: str
    licence: Licence
    licence_text: bytes | None = None
    description: str = ""
    preprocess: Processing = NO_PROCESSING
    postprocess: Processing = NO_PROCESSING
    files: tuple[Assets, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """How golden vectors are chosen and how long is measured."""

    golden: GoldenOf = field(default_factory=GoldenOf)
    measure: MeasureOf = field(default_factory=MeasureOf)


@dataclass(slots=True)
class Kept:
    """What several bundles of one process share, by digests of what it was made from."""

    runs: dict[tuple[str, ...], Runs] = field(default_factory=dict)
    """What a variant gave for the candidates of golden vectors."""
    downloads: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundled:
    """A bundle and how its golden vectors were chosen."""

    packed: Packed
    selection: Selection
    proofs: tuple[Proof, ...]
    """How good the golden vectors of each variant are."""
    made: tuple[Made, ...]
    """What is in it."""

    @property
    def blind(self) -> list[str]:
        """Warnings: variants whose golden vectors miss more than `proof.MISSES_MAX`."""
        return [
            f"golden vectors of {one.variant} miss {one.misses:.0%} of what is wrong with a file"
            for one in self.proofs
            if one.misses > proof.MISSES_MAX
        ]


def bundle(
    output: Path,
    about: About,
    made: Sequence[Made],
    interface: Interface,
    candidates: Sequence[dict[str, Array]],
    data_digest: str,
    provenance: Provenance,
    engines: Sequence[EngineFacts],
    *,
    folder: Path,
    terms: Terms | None = None,
    kept: Kept | None = None,
    say: Progress,
) -> Bundled:
    """Choose golden vectors, measure, and write a bundle.

    Args:
        output: folder in which NAME-VERSION is made.
        about: what the bundle says of itself.
        made: its variants; every source among them as it is.
        interface: what applications may rely on.
        candidates: inputs under canonical names to choose golden vectors from.
        data_digest: of what the candidates were taken from.
        provenance: what went in.
        engines: those that work here.
        folder: for files on the way.
        terms: how golden vectors are chosen and how long is measured.
        kept: shared between bundles.
        say: told each step in a sentence.

    Raises:
        RefusedError: `golden_*` (`golden_misses`: they miss more than the terms allow), `measure_failed`, and as
            `pack.write_bundle`.
    """
    terms, kept = terms or Terms(), kept if kept is not None else Kept()
    candidates = candidates[: terms.golden.candidates]
    selection = _choose_golden(made, candidates, data_digest, engines, terms.golden, kept, say)
    proofs = _prove(made, selection, candidates, terms.golden, say)
    pieces = _weigh(made, selection, engines, terms.measure, folder, kept, say)
    packed = write_bundle(
        output,
        name=about.name,
        version=about.version,
        interface=interface,
        pieces=pieces,
        licence=about.licence,
        licence_text=about.licence_text,
        provenance=provenance,
        engines=engines,
        description=about.description,
        files=about.files,
        preprocess=about.preprocess,
        postprocess=about.postprocess,
        unseparated=selection.unseparated,
    )
    say(f"packed {packed.path}")
    found = Bundled(packed, selection, proofs, tuple(made))
    for warning in found.blind:
        say(f"WARNING: {warning}")
    return found


def accuracy(drop: gate.Drop, metric: str, data: str) -> Accuracy:
    """Return a drop as a bundle holds it."""
    return Accuracy(
        metric=metric,
        value=drop.value,
        standard_error=drop.value_error,
        drop=drop.drop,
        drop_standard_error=drop.error,
        samples=drop.samples,
        data=data,
    )


def _choose_golden(
    made: Sequence[Made],
    candidates: Sequence[dict[str, Array]],
    data_digest: str,
    engines: Sequence[EngineFacts],
    terms: GoldenOf,
    kept: Kept,
    say: Progress,
) -> Selection:
    """Choose golden vectors from samples that nothing is judged by."""
    say("choosing golden vectors")
    digests = {item.id: item.digest for item in made}

    def run(item: Runnable, inputs: Sequence[dict[str, Array]], available: Sequence[EngineFacts]) -> Runs:
        ways = f"{item.engines} {sorted(item.options.items())} {sorted(item.tensors.items())} {item.quantized}"
        key = (digests[item.id], data_digest, str(len(inputs)), ways)
        if key not in kept.runs:
            kept.runs[key] = run_all(item, inputs, available)
        return kept.runs[key]

    selection = select(
        [item.runnable for item in made],
        candidates,
        engines,
        vectors=terms.vectors,
        sampled_above=terms.sampled_above,
        synthetic=False,
        budgets={item.id: budget(item.runnable.path.stat().st_size) for item in made},
        run=run,
    )
    for one, engine, why in selection.left_out:
        say(f"{one}: {engine} left out, it {why}")
    for one, other in selection.unseparated:
        say(f"{one}: no golden vector tells it from {other}")
    return selection


def _prove(
    made: Sequence[Made],
    selection: Selection,
    candidates: Sequence[dict[str, Array]],
    terms: GoldenOf,
    say: Progress,
) -> tuple[Proof, ...]:
    """Measure false alarms and misses of the vectors that were chosen.

    Raises:
        RefusedError: `golden_misses`.
    """
    say("measuring what golden vectors notice")

    def one(item: Made) -> Proof:
        alike = [other.id for other in made if other is not item and other.runnable.format == item.runnable.format]
        return proof.of_selection(item.runnable, selection, candidates, alike, terms.broken)

    with ThreadPoolExecutor(WORKERS) as pool:
        proofs = tuple(pool.map(one, made))
    worst = max(proofs, key=lambda found: found.misses)
    if terms.misses_max is not None and worst.misses > terms.misses_max:
        raise RefusedError(
            "golden_misses",
            f"golden vectors of {worst.variant} miss {worst.misses:.3f} of what is wrong with a file, "
            f"{terms.misses_max:.3f} are allowed",
            consequence="a device could not tell the variant from a broken one, so nothing was packed",
            next_step="give calibration samples that are nearer to the borders between answers, raise golden.vectors or "
            "golden.candidates, or raise golden.misses_max",
        )
    return proofs


def _weigh(
    made: Sequence[Made],
    selection: Selection,
    engines: Sequence[EngineFacts],
    terms: MeasureOf,
    folder: Path,
    kept: Kept,
    say: Progress,
) -> list[Piece]:
    """Measure what the variants cost: memory in processes of their own, then latency interleaved."""
    say("measuring")
    facts = {engine.name: engine for engine in engines}
    with ThreadPoolExecutor(WORKERS) as pool:
        sizes = {item.id: pool.submit(_download_bytes, item, kept.downloads) for item in made}
        memory = {item.id: pool.submit(_peak, item, selection, folder) for item in made}
    calls: dict[str, Callable[[], Any]] = {}
    references: dict[str, str] = {}
    first = {item.source: item.id for item in made if not item.passes}
    bounds = []
    for item in made:
        bound = item.runnable.open()
        bounds.append(bound)
        inputs = golden.decode(selection.by_variant[item.id].encoded).vectors[0].inputs
        calls[item.id] = lambda bound=bound, inputs=inputs: bound.run(inputs)  # type: ignore[misc]
        references[item.id] = first[item.source]
    latency = measure.interleaved(calls, references, rounds=terms.rounds, seconds=terms.seconds)
    for bound in bounds:
        bound.close()
    pieces: list[Piece] = []
    for item in made:
        engine = facts[item.runnable.engines[0]]
        peak = memory[item.id].result()
        pieces.append(
            Piece(
                item.runnable,
                item.precision,
                selection.by_variant[item.id],
                synthetic=False,
                download_bytes=sizes[item.id].result(),
                passes=item.passes,
                figures=dict([measure.figures(engine, latency[item.id], peak)]),
                memory_bytes=peak.peak_bytes,
                accuracy=item.accuracy,
            )
        )
    return pieces


def _download_bytes(item: Made, known: dict[str, int]) -> int:
    if item.digest not in known:
        known[item.digest] = measure.download_bytes(item.runnable.path)
    return known[item.digest]


def _peak(item: Made, selection: Selection, folder: Path) -> measure.PeakAnswer:
    vectors = folder / f"{item.id}.golden"
    vectors.write_bytes(selection.by_variant[item.id].encoded)
    runnable = item.runnable
    return measure.peak(
        measure.PeakTask(
            path=str(runnable.path),
            format=runnable.format,
            engine=runnable.engines[0],
            options=runnable.options,
            golden=str(vectors),
            tensors=runnable.tensors,
        )
    )
