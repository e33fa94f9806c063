"""How good the golden vectors of a bundle are: measured false alarms and misses.

A false alarm is a way to run a variant, of those at hand, in which it misses its own vectors: an honest device would refuse
it. Tolerances come from those very ways, so each way is also held out: would it alarm if the tolerance came from the others
alone? That is the best guess at hand for a CPU that nobody has seen.

A miss is a file with one thing wrong (`breaking`, at other places than those that vectors were chosen by), or another
variant of the same format, that passes. Where samples are at hand, a miss that none of them shows either is *unseen*: the
weight that is broken decides nothing on such data. Misses count for the share; what is unseen is told beside it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wherry_optimizer import breaking
from wherry_optimizer.golden import (
    FLOOR_OF_RANGE,
    TOLERANCE_FACTOR,
    Runnable,
    Selection,
    configurations,
    differs,
    span_of,
)
from wherry_optimizer.recipe import BROKEN
from wherry_shared import golden
from wherry_shared.bundle import GOLDEN_TYPE, Descriptor
from wherry_shared.engines import probe
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import WherryError
from wherry_shared.facts import EngineFacts
from wherry_shared.golden import Golden
from wherry_shared.image_layout import Layout

Array = npt.NDArray[Any]

Fate = Literal["caught", "missed", "unseen"]
SEED = 2
MISSES_MAX = 0.25
"""Share of noticeable broken files and mix-ups that may pass before a build warns; `golden.misses_max` of a recipe refuses."""


@dataclass(frozen=True, slots=True)
class Count:
    """What became of broken files of one kind."""

    caught: int = 0
    missed: int = 0
    """Passed the vectors, though another sample shows that they are wrong, or none was at hand to ask."""
    unseen: int = 0
    """Passed, and no sample at hand shows that they are wrong."""

    @property
    def tried(self) -> int:
        """All of them."""
        return self.caught + self.missed + self.unseen


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples at hand, and what the variant itself gives for them."""

    inputs: Sequence[dict[str, Array]]
    outputs: Sequence[Mapping[str, Array]]
    vectors: Sequence[int]
    """Which of them the vectors are, in their order."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was measured of one variant."""

    variant: str
    ways: int
    """Engines, thread counts, optimization levels and places in a batch that it was run in."""
    false_alarms: list[str]
    """Ways in which it missed its own vectors."""
    held_out: list[str]
    """Ways that would have been false alarms if the tolerance had been made without them."""
    broken: dict[str, Count]
    """By kind of `breaking`."""
    mixed_up: dict[str, bool] = field(default_factory=dict)
    """Other variant of the format → whether a mix-up with it is noticed."""

    @property
    def misses(self) -> float:
        """Share of what could be noticed, broken files and mix-ups, that passed."""
        missed = sum(count.missed for count in self.broken.values()) + sum(not one for one in self.mixed_up.values())
        caught = sum(count.caught for count in self.broken.values()) + sum(self.mixed_up.values())
        return missed / (missed + caught) if missed + caught else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        broken = {
            kind: {"caught": one.caught, "missed": one.missed, "unseen": one.unseen, "tried": one.tried}
            for kind, one in self.broken.items()
        }
        return {
            "variant": self.variant,
            "ways": self.ways,
            "false_alarms": self.false_alarms,
            "held_out": self.held_out,
            "broken": broken,
            "mixed_up": self.mixed_up,
            "misses": round(self.misses, 4),
        }


def prove(
    bundle: Path, *, tries: int = BROKEN, seed: int = SEED, engines: Sequence[EngineFacts] | None = None
) -> list[Proof]:
    """Measure the golden vectors of every variant of a bundle.

    Args:
        bundle: folder with an OCI image layout.
        tries: broken files per variant.
        seed: of the places that are broken.
        engines: those that work here; found by running them if they are not given.

    Raises:
        RefusedError: as `Layout.bundle`.
    """
    layout = Layout(bundle)
    config = layout.bundle()[2]
    engines = probe() if engines is None else engines
    rows: list[tuple[Runnable, Golden]] = []
    for variant in config.variants:
        index = variant.golden
        descriptor = Descriptor(media_type=GOLDEN_TYPE, digest=index.digest, size=index.bytes)
        runnable = Runnable(
            id=variant.id,
            path=layout.path(variant.digest),
            format=variant.format,
            interface=config.interface,
            tensors=variant.tensors,
            batch=variant.batch,
            options=variant.options,
            engines=tuple(item.name for item in variant.engines),
            quantized=variant.precision.startswith("int"),
        )
        rows.append((runnable, golden.decode(layout.read(descriptor, index.bytes))))
    found = []
    for runnable, vectors in rows:
        moved, alarms = _ways(runnable, vectors, engines)
        mixed_up = {
            other.id: not _passes_as(other, vectors)
            for other, _ in rows
            if other.id != runnable.id and other.format == runnable.format
        }
        found.append(
            Proof(
                runnable.id,
                len(moved),
                alarms,
                held_out(moved, vectors),
                count_broken(runnable, vectors, tries, seed),
                mixed_up,
            )
        )
    return found


def of_selection(
    runnable: Runnable,
    selection: Selection,
    candidates: Sequence[dict[str, Array]],
    alike: Sequence[str],
    tries: int,
    seed: int = SEED,
) -> Proof:
    """Measure the golden vectors of a variant that were just chosen.

    Args:
        runnable: the variant.
        selection: what was chosen.
        candidates: what it was chosen from.
        alike: the other variants of its format.
        tries: broken files.
        seed: of the places that are broken.
    """
    own, chosen = selection.runs[runnable.id], selection.by_variant[runnable.id]
    vectors = golden.decode(chosen.encoded)
    indices = [one.candidate for one in selection.picked]
    moved = {
        way: {name: float(values[indices].max()) for name, values in outputs.items()}
        for way, outputs in own.ways.items()
    }
    alarms = [
        way
        for way, outputs in moved.items()
        if any(most > vectors.tolerances[name].atol for name, most in outputs.items())
    ]
    return Proof(
        runnable.id,
        len(moved) + 1,
        alarms,
        held_out(moved, vectors),
        count_broken(runnable, vectors, tries, seed, Samples(candidates, own.outputs, indices)),
        {other: other in chosen.separates for other in alike},
    )


def held_out(ways: Mapping[str, Mapping[str, float]], vectors: Golden) -> list[str]:
    """Return the ways that would miss if tolerances came from the other ways alone.

    Args:
        ways: way → output → its largest difference from what is expected, over the vectors.
        vectors: what is expected.
    """
    found = []
    for way, moved in ways.items():
        for name, most in moved.items():
            others = max((other[name] for key, other in ways.items() if key != way), default=0.0)
            span = span_of([vector.expected[name].values for vector in vectors.vectors])
            if most > max(TOLERANCE_FACTOR * others, FLOOR_OF_RANGE * span):
                found.append(way)
                break
    return found


def count_broken(
    runnable: Runnable,
    vectors: Golden,
    tries: int,
    seed: int,
    samples: Samples | None = None,
) -> dict[str, Count]:
    """Count how many broken files the vectors of a variant notice.

    Args:
        runnable: the variant.
        vectors: its golden vectors.
        tries: broken files.
        seed: of the places that are broken.
        samples: those that may show that a file which passed is wrong all the same; none: nothing is unseen.
    """
    fates: dict[bytes, Fate] = {}  # with few weights of one shape the same file is drawn again
    counts = dict.fromkeys(breaking.KINDS, Count())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"broken.{runnable.format}"
        for kind, data in breaking.broken(runnable.path.read_bytes(), runnable.format, tries, seed):
            digest = hashlib.sha256(data).digest()
            if digest not in fates:
                path.write_bytes(data)
                fates[digest] = _fate(replace(runnable, path=path), vectors, samples)
            count = counts[kind]
            match fates[digest]:
                case "caught":
                    counts[kind] = replace(count, caught=count.caught + 1)
                case "missed":
                    counts[kind] = replace(count, missed=count.missed + 1)
                case "unseen":
                    counts[kind] = replace(count, unseen=count.unseen + 1)
    return counts


def _fate(other: Runnable, vectors: Golden, samples: Samples | None) -> Fate:
    """Run a broken file until something shows that it is not the variant: its vectors first, then the other samples."""
    given: list[dict[str, Array]] = []
    try:
        bound = other.open()
    except WherryError:
        return "caught"

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        given.append(bound.run(inputs))
        return given[-1]

    with closing(bound):
        if not _passes(vectors, run):
            return "caught"
        if samples is None:
            return "missed"
        known = dict(zip(samples.vectors, given, strict=True))  # all of an output, of which a vector may hold a sample
        rest = [index for index in range(len(samples.inputs)) if index not in known]
        try:
            shown = any(
                differs(
                    samples.outputs[index], known.get(index) or bound.run(samples.inputs[index]), vectors.tolerances
                )
                for index in (*known, *rest)
            )
        except EngineFault:
            shown = True
    return "missed" if shown else "unseen"


def _ways(
    runnable: Runnable, vectors: Golden, engines: Sequence[EngineFacts]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Run a variant in every way; return way → output → largest difference, and the ways that miss."""
    moved: dict[str, dict[str, float]] = {}
    alarms = []
    for way in configurations(runnable, engines):
        try:
            bound = runnable.open(way.engine, **dict(way.options))
            outputs = [bound.run(dict(vector.inputs)) for vector in vectors.vectors]
            bound.close()
        except WherryError:
            alarms.append(str(way))
            continue
        misses = [
            golden.compare(index, name, expected, vectors.tolerances[name], outputs[index].get(name))
            for index, vector in enumerate(vectors.vectors)
            for name, expected in vector.expected.items()
        ]
        if any(miss is not None for miss in misses):
            alarms.append(str(way))
        moved[str(way)] = {
            name: max(
                _distance(vector.expected[name], outputs[index].get(name))
                for index, vector in enumerate(vectors.vectors)
            )
            for name in vectors.tolerances
        }
    return moved, alarms


def _distance(expected: golden.Expected, output: Array | None) -> float:
    if output is None or tuple(output.shape) != expected.shape:
        return np.inf
    values = output if expected.sample is None else output.reshape(-1)[expected.sample.indices(output.size)]
    if golden.is_text(values):
        return float(golden.text_differences(values, expected.values) > 0)
    gap = np.abs(values.astype(np.float64) - expected.values.astype(np.float64))
    return float(gap.max(initial=0.0))


def _passes(vectors: Golden, run: Callable[[dict[str, Array]], Mapping[str, Array]]) -> bool:
    """Tell whether a file runs and gives what is expected."""
    try:
        # one vector after another: most of what is wrong shows in the first
        return not any(golden.check(Golden((vector,), vectors.tolerances), run) for vector in vectors.vectors)
    except WherryError:
        return False


def _passes_as(runnable: Runnable, vectors: Golden) -> bool:
    """Tell whether another variant passes the vectors."""
    try:
        bound = runnable.open()
    except WherryError:
        return False
    with closing(bound):
        return _passes(vectors, bound.run)
