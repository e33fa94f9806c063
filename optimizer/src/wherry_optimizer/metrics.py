"""Metrics: what an answer is worth against its label. Higher is better for every one of them.

A metric first makes *evidence* of each sample, plain numbers that are small, and then a value of the evidence of many
samples. Keeping the two apart is what lets the gate compare a variant with its source pair by pair and resample the
pairs, also where the value is no mean of per-sample scores (an area under a curve, a rank correlation, mean average
precision).

Names: `accuracy`, `top5`, `absolute_error`, `squared_error`, `detection` (mean average precision), `segmentation`
(mean intersection over union), `spearman`, `cosine`, `characters` (one minus the character error rate), `auc`,
`agreement` (with the float model, where there are no labels), and `module:function` of the user's own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_shared.errors import RefusedError, WherryError

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Evidence: TypeAlias = Any
"""Of one sample: a float, or lists of numbers; JSON keeps it, so that a cache can."""
IOU_LEAST = tuple(np.arange(0.5, 1.0, 0.05).round(2).tolist())
"""A box is found from so much overlap on; mean average precision is the mean over these (COCO)."""


class MetricOf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which metric, of which outputs."""

    name: str
    outputs: tuple[str, ...] = ()
    """Native names of the outputs that it looks at; empty: the first, or for `detection` the first three."""
    folder: str = ""
    """Where the module of a metric of one's own is looked for first."""


class Metric(Protocol):
    """What the gate judges by."""

    def evidence(self, outputs: Outputs, label: Any) -> Evidence:
        """Return what one sample shows."""
        ...

    def value(self, evidence: Sequence[Evidence]) -> float:
        """Return what many samples show together."""
        ...


class Mean:
    """A metric that is the mean of a score per sample."""

    def __init__(self, score: Callable[[Outputs, Any], float]) -> None:
        self._score = score

    def evidence(self, outputs: Outputs, label: Any) -> float:
        """Return the score."""
        return float(self._score(outputs, label))

    def value(self, evidence: Sequence[float]) -> float:
        """Return the mean."""
        return float(np.mean(evidence))


class Auc:
    """Area under the receiver operating characteristic over all entries of all samples, labels being 0 and 1.

    The probability that a positive scores above a negative (Mann and Whitney), ties counted half.
    """

    def __init__(self, output: str) -> None:
        self._output = output

    def evidence(self, outputs: Outputs, label: Any) -> list[list[float]]:
        """Return scores and labels, (2, entries)."""
        scores = _first(outputs, self._output).reshape(-1)
        labels = np.asarray(label, dtype=np.float64).reshape(-1)
        if scores.size != labels.size:
            raise _labels(f"{labels.size} labels for {scores.size} scores")
        return [scores.astype(np.float64).tolist(), labels.tolist()]

    def value(self, evidence: Sequence[list[list[float]]]) -> float:
        """Return the area; NaN where only one class is present."""
        scores = np.concatenate([row[0] for row in evidence])
        positive = np.concatenate([row[1] for row in evidence]) > 0.5
        count = int(positive.sum())
        if not np.isfinite(scores).all() or count in (0, len(scores)):
            return float("nan")
        ranks = _ranks(scores)
        return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


class Spearman:
    """Rank correlation between one number per sample and the label.

    The number is the output itself where that has one entry, and the cosine of its two rows where it has two: the
    similarity of the two texts or images that a sample of a model of embeddings is made of.
    """

    def __init__(self, output: str) -> None:
        self._output = output

    def evidence(self, outputs: Outputs, label: Any) -> list[float]:
        """Return (number, label)."""
        found = _first(outputs, self._output)
        if found.size == 1:
            return [float(found.reshape(-1)[0]), float(label)]
        if found.ndim < 2 or len(found) != 2:
            raise _labels(f"spearman needs one number or two rows, the output has shape {list(found.shape)}")
        return [_cosine(found[0], found[1]), float(label)]

    def value(self, evidence: Sequence[list[float]]) -> float:
        """Return the correlation; NaN where one side does not vary."""
        table = np.asarray(evidence, dtype=np.float64)
        if not np.isfinite(table).all():
            return float("nan")
        one, two = _ranks(table[:, 0]), _ranks(table[:, 1])
        if one.std() == 0 or two.std() == 0:
            return float("nan")
        return float(np.corrcoef(one, two)[0, 1])


class Characters:
    """One minus the character error rate of greedily decoded CTC output, (1, steps, classes) with blank 0.

    The label is the sequence of class indices that was meant (Graves and others, "Connectionist temporal
    classification", 2006).
    """

    def __init__(self, output: str) -> None:
        self._output = output

    def evidence(self, outputs: Outputs, label: Any) -> list[int]:
        """Return (edits, length of the label)."""
        found = _first(outputs, self._output)
        best = found.reshape(-1, found.shape[-1]).argmax(axis=1)
        kept = [int(one) for index, one in enumerate(best) if one and (index == 0 or one != best[index - 1])]
        meant = [int(one) for one in np.asarray(label).reshape(-1) if one > 0]
        return [_edits(kept, meant), len(meant)]

    def value(self, evidence: Sequence[list[int]]) -> float:
        """Return 1 − edits / characters over all samples."""
        edits, lengths = np.asarray(evidence, dtype=np.float64).sum(axis=0)
        return float(1 - edits / lengths) if lengths else float("nan")


class Segmentation:
    """Mean over classes of intersection over union, both summed over all samples.

    The output is (1, classes, …) or, for two classes, (1, 1, …) with the foreground above a half; the label is the class
    of each place, and negative where nobody knows.
    """

    def __init__(self, output: str) -> None:
        self._output = output

    def evidence(self, outputs: Outputs, label: Any) -> list[list[int]]:
        """Return (class, intersection, union) of the classes that are there."""
        found = _first(outputs, self._output)
        truth = np.asarray(label).reshape(-1)
        classes = found.reshape(found.shape[1], -1) if found.ndim > 1 else found.reshape(1, -1)
        said = (classes[0] > 0.5).astype(np.int64) if len(classes) == 1 else classes.argmax(axis=0)
        if said.size != truth.size:
            raise _labels(f"{truth.size} labels for {said.size} places")
        known = truth >= 0
        said, truth = said[known], truth[known]
        rows = []
        for kind in np.union1d(said, truth):
            here, there = said == kind, truth == kind
            rows.append([int(kind), int((here & there).sum()), int((here | there).sum())])
        return rows

    def value(self, evidence: Sequence[list[list[int]]]) -> float:
        """Return the mean over the classes that any sample has."""
        together: dict[int, list[int]] = {}
        for rows in evidence:
            for kind, both, either in rows:
                held = together.setdefault(kind, [0, 0])
                held[0] += both
                held[1] += either
        return float(np.mean([both / either for both, either in together.values()])) if together else float("nan")


class Detection:
    """Mean average precision over classes and over thresholds of overlap, as COCO defines it (101 recall points).

    Outputs: boxes (…, n, 4) as x1, y1, x2, y2; scores (…, n); classes (…, n), left out where there is one class. The
    label is (m, 5): class, x1, y1, x2, y2.
    """

    def __init__(self, outputs: Sequence[str]) -> None:
        self._outputs = outputs

    def evidence(self, outputs: Outputs, label: Any) -> list[Any]:
        """Return detections (class, score, a flag per threshold) and (class, count) of the truth."""
        names = list(self._outputs or list(outputs)[:3])
        boxes = outputs[names[0]].reshape(-1, 4).astype(np.float64)
        scores = outputs[names[1]].reshape(-1).astype(np.float64)
        classes = outputs[names[2]].reshape(-1).astype(np.int64) if len(names) > 2 else np.zeros(len(boxes), np.int64)
        truth = np.asarray(label, dtype=np.float64).reshape(-1, 5)
        rows = []
        order = np.argsort(-scores, kind="stable")
        taken = np.zeros((len(IOU_LEAST), len(truth)), dtype=bool)
        for index in order:
            overlaps = _overlaps(boxes[index], truth[:, 1:]) * (truth[:, 0] == classes[index])
            flags = []
            for level, least in enumerate(IOU_LEAST):
                free = np.where(taken[level], 0.0, overlaps)
                best = int(free.argmax()) if len(free) else -1
                hit = best >= 0 and free[best] >= least
                if hit:
                    taken[level, best] = True
                flags.append(int(hit))
            rows.append([int(classes[index]), float(scores[index]), flags])
        kinds, counts = np.unique(truth[:, 0].astype(np.int64), return_counts=True)
        return [rows, [[int(kind), int(count)] for kind, count in zip(kinds, counts, strict=True)]]

    def value(self, evidence: Sequence[list[Any]]) -> float:
        """Return the mean average precision; NaN where no sample has an object."""
        counts: dict[int, int] = {}
        found: dict[int, list[tuple[float, list[int]]]] = {}
        for rows, truth in evidence:
            for kind, count in truth:
                counts[kind] = counts.get(kind, 0) + count
            for kind, score, flags in rows:
                found.setdefault(kind, []).append((score, flags))
        if not counts:
            return float("nan")
        means = []
        for kind, count in counts.items():
            rows_of = sorted(found.get(kind, []), key=lambda row: -row[0])
            flags_of = np.array([row[1] for row in rows_of], dtype=np.float64).reshape(-1, len(IOU_LEAST))
            means.append(np.mean([_average_precision(flags_of[:, level], count) for level in range(len(IOU_LEAST))]))
        return float(np.mean(means))


class Own:
    """`module:function` of the user's own: `function(outputs, labels) -> float` over lists of samples.

    It is called again for every resample of the gate, so it should be quick.
    """

    def __init__(self, function: Callable[[list[Any], list[Any]], float], name: str) -> None:
        self._function, self._name = function, name

    def evidence(self, outputs: Outputs, label: Any) -> list[Any]:
        """Return outputs and label as plain values."""
        return [{name: value.tolist() for name, value in outputs.items()}, _plain(label)]

    def value(self, evidence: Sequence[list[Any]]) -> float:
        """Call the function.

        Raises:
            RefusedError: `metric_failed` with what it raised.
        """
        try:
            outputs = [{name: np.asarray(value) for name, value in row[0].items()} for row in evidence]
            return float(self._function(outputs, [row[1] for row in evidence]))
        except (Exception, SystemExit) as error:  # whatever somebody's function raises
            raise RefusedError(
                "metric_failed",
                f"metric {self._name} raised {type(error).__name__}: {error}",
                consequence="nothing can be judged by it",
                next_step="call it by hand with lists of outputs (name → array) and labels",
            ) from error


def evidence_of(metric: Metric, name: str, outputs: Outputs, label: Any) -> Evidence:
    """Return what one sample shows.

    Raises:
        RefusedError: `data_invalid` where labels do not fit, `metric_failed` where the metric cannot read the outputs at all.
    """
    try:
        return metric.evidence(outputs, label)
    except WherryError:
        raise
    except Exception as error:  # NumPy's many words for shapes that do not fit
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in outputs.items())
        raise RefusedError(
            "metric_failed",
            f"metric {name} cannot read outputs {shapes} with a label of shape {list(np.shape(_array(label)))}: "
            f"{type(error).__name__}: {error}",
            consequence="nothing can be judged by it",
            next_step="name the outputs that it looks at, give labels as it reads them, or use another metric: see docs/optimizer.md",
        ) from error


def _array(label: Any) -> Array:
    try:
        return np.asarray(label)
    except ValueError:  # rows of several lengths
        return np.asarray(label, dtype=object)


METRICS = (
    "accuracy",
    "top5",
    "absolute_error",
    "squared_error",
    "detection",
    "segmentation",
    "spearman",
    "cosine",
    "characters",
    "auc",
    "agreement",
)


def make(spec: MetricOf) -> Metric:
    """Return the metric of that name.

    Raises:
        RefusedError: `metric_unknown`.
    """
    output = spec.outputs[0] if spec.outputs else ""
    means: dict[str, Callable[[Outputs, Any], float]] = {
        "accuracy": lambda outputs, label: float(_top(outputs, output, 1, label)),
        "top5": lambda outputs, label: float(_top(outputs, output, 5, label)),
        "absolute_error": lambda outputs, label: -float(np.abs(_gap(outputs, output, label)).mean()),
        "squared_error": lambda outputs, label: -float(np.square(_gap(outputs, output, label)).mean()),
        "cosine": lambda outputs, label: _cosine(_first(outputs, output), np.asarray(label)),
        "agreement": lambda outputs, label: _agreement(_first(outputs, output), np.asarray(label)),
    }
    if spec.name in means:
        return Mean(means[spec.name])
    others: dict[str, Callable[[], Metric]] = {
        "auc": lambda: Auc(output),
        "spearman": lambda: Spearman(output),
        "characters": lambda: Characters(output),
        "segmentation": lambda: Segmentation(output),
        "detection": lambda: Detection(spec.outputs),
    }
    if spec.name in others:
        return others[spec.name]()
    if ":" in spec.name:
        return Own(find_function(spec.name, Path(spec.folder), "metric_unknown"), spec.name)
    raise RefusedError(
        "metric_unknown",
        f"there is no metric {spec.name!r}",
        consequence="nothing was done",
        next_step=f"use {', '.join(METRICS)}, or module:function of your own",
    )


def find_function(name: str, folder: Path, code: str) -> Callable[..., Any]:
    """Import `module:function`, looking into `folder` first.

    Raises:
        RefusedError: `code`.
    """
    module, _, attribute = name.partition(":")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # importing somebody's module raises anything
        raise RefusedError(
            code,
            f"{name} cannot be imported: {type(error).__name__}: {error}",
            consequence="nothing was done",
            next_step="name it as module:function, and run from the folder of the module or install it",
        ) from error
    if not callable(found):
        raise RefusedError(code, f"{name} is no function", consequence="nothing was done", next_step="name a function")
    function: Callable[..., Any] = found
    return function


def _first(outputs: Outputs, name: str) -> Array:
    return outputs[name] if name else next(iter(outputs.values()))


def _top(outputs: Outputs, output: str, count: int, label: Any) -> bool:
    found = _first(outputs, output).reshape(-1)
    if found.dtype.kind == "O":
        return bool(found.tolist() == np.asarray(label).reshape(-1).tolist())
    wanted = int(np.asarray(label).reshape(-1)[0])
    if not np.isfinite(found).all():
        return False
    if count == 1:
        return int(found.argmax()) == wanted
    return wanted in np.argsort(-found, kind="stable")[:count]


def _gap(outputs: Outputs, output: str, label: Any) -> Array:
    found = _first(outputs, output).reshape(-1).astype(np.float64)
    wanted = np.asarray(label, dtype=np.float64).reshape(-1)
    if wanted.size not in (1, found.size):
        raise _labels(f"{wanted.size} label entries for {found.size} of the output")
    return np.asarray(found - wanted)


def _agreement(found: Array, float_: Array) -> float:
    """Tell how far an output is that of the float model: the same largest entry along the last axis, or 1 − error.

    An output whose last axis is one long has no largest entry to agree on.
    """
    if found.dtype.kind == "O":
        return float(np.mean(found.reshape(-1) == float_.reshape(-1)))
    if found.ndim and found.shape[-1] > 1:
        return float(np.mean(found.argmax(axis=-1) == float_.reshape(found.shape).argmax(axis=-1)))
    gap = found.astype(np.float64).reshape(-1) - float_.astype(np.float64).reshape(-1)
    size = float(np.linalg.norm(float_.astype(np.float64)))
    return 1.0 - float(np.linalg.norm(gap)) / (size or 1.0)


def _cosine(one: Array, two: Array) -> float:
    first, second = one.reshape(-1).astype(np.float64), two.reshape(-1).astype(np.float64)
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means = last - (counts - 1) / 2
    return np.asarray(means[inverse], dtype=np.float64)


def _edits(one: Sequence[int], two: Sequence[int]) -> int:
    """Return the edit distance (Levenshtein) of two sequences."""
    before = list(range(len(two) + 1))
    for index, left in enumerate(one, 1):
        now = [index]
        for other, right in enumerate(two, 1):
            now.append(min(before[other] + 1, now[-1] + 1, before[other - 1] + (left != right)))
        before = now
    return before[-1]


def _overlaps(box: Array, others: Array) -> Array:
    """Return intersection over union of one box with each of others (m, 4)."""
    if not len(others):
        return np.zeros(0)
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    both = np.clip(sides, 0, None).prod(axis=1)
    either = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - both
    return np.asarray(np.divide(both, either, out=np.zeros_like(both), where=either > 0))


def _average_precision(flags: Array, count: int) -> float:
    """Return the mean over 101 recall points of the best precision at that recall or more."""
    if not len(flags):
        return 0.0
    hits = np.cumsum(flags)
    recall = hits / count
    precision = hits / np.arange(1, len(flags) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    where = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.where(where < len(best), best[np.minimum(where, len(best) - 1)], 0.0).mean())


def _plain(label: Any) -> Any:
    return label.tolist() if isinstance(label, np.ndarray | np.generic) else label


def _labels(why: str) -> RefusedError:
    return RefusedError(
        "data_invalid",
        why,
        consequence="nothing can be judged by them",
        next_step="give labels as the metric reads them",
    )
