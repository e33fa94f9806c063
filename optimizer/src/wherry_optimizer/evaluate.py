"""What a model shows on samples: evidence for a metric, and entries of its outputs to compare with another's.

Both ways to a bundle ask here: a search in a child process, sample by sample, and a recipe in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_optimizer import gate, metrics
from wherry_optimizer.data import Sample

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]

COMPARED_MAX = 4096
"""Entries of an output that are compared with the source's, drawn by the seed."""
AGREEMENT = "agreement"


def some(value: Array, seed: int) -> Array:
    """Return the entries of an output that are compared, flat: all, or `COMPARED_MAX` drawn by the seed."""
    flat = value.reshape(-1)
    if flat.size <= COMPARED_MAX:
        return flat
    return np.asarray(flat[np.random.default_rng(seed).choice(flat.size, COMPARED_MAX, replace=False)])


@dataclass(slots=True)
class Distance:
    """How far the outputs of one model are from another's: L2 over all samples, as a share of the other's."""

    _moved: dict[str, float] = field(default_factory=dict)
    _size: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: Array, reference: Array) -> None:
        """Take in the compared entries of one output of one sample."""
        gap = value.astype(np.float64) - reference.astype(np.float64)
        self._moved[name] = self._moved.get(name, 0.0) + float(gap @ gap)
        self._size[name] = self._size.get(name, 0.0) + float(np.square(reference.astype(np.float64)).sum())

    @property
    def largest(self) -> float:
        """Over the outputs; 0 where none is a number."""
        return max(
            (
                float(np.sqrt(moved / self._size[name])) if self._size[name] else float(moved > 0)
                for name, moved in self._moved.items()
            ),
            default=0.0,
        )


@dataclass(frozen=True, slots=True)
class Shown:
    """What a model gave for the samples of one part."""

    evidence: list[Any]
    entries: list[dict[str, Array]]
    """By sample: the compared entries of every output that is numbers."""
    answers: list[Array]
    """By sample: the output that others have to agree with; empty unless the metric is agreement."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A model against its source on the same samples."""

    drop: gate.Drop
    error: float
    """Distance of the outputs, see `Distance`."""


def show(
    run: Run,
    samples: Sequence[Sample],
    name: str,
    metric: metrics.Metric,
    *,
    output: str = "",
    source: Shown | None = None,
    seed: int = 0,
) -> Shown:
    """Run a model on samples.

    Args:
        run: inputs → outputs, under the names of the samples.
        samples: of one part.
        name: of the metric.
        metric: what judges an answer.
        output: what agreement looks at; by default the first.
        source: what the source gave; it is the label where the metric is agreement. None: this is the source.
        seed: of the entries that are compared.
    """
    evidence: list[Any] = []
    entries: list[dict[str, Array]] = []
    answers: list[Array] = []
    for index, sample in enumerate(samples):
        outputs = run(sample.inputs)
        label = sample.label
        if name == AGREEMENT:
            own = outputs[output or next(iter(outputs))]
            label = own if source is None else source.answers[index]
            answers.append(own)
        evidence.append(metrics.evidence_of(metric, name, outputs, label))
        entries.append({key: some(value, seed + index) for key, value in outputs.items() if value.dtype.kind in "fiub"})
    return Shown(evidence, entries, answers)


def judge(own: Shown, source: Shown, metric: metrics.Metric, *, confidence: float = gate.CONFIDENCE) -> Judged:
    """Compare what a model gave with what its source gave for the same samples."""
    distance = Distance()
    for mine, theirs in zip(own.entries, source.entries, strict=True):
        for key, reference in theirs.items():
            distance.add(key, mine[key], reference)
    drop = gate.compare(metric.value, own.evidence, source.evidence, confidence=confidence)
    return Judged(drop, distance.largest)
