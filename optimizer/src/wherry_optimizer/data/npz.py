"""Data of one's own: a NumPy `.npz` with an array per input and one of labels, all with the samples along axis 0.

A sample keeps a leading axis of 1 where the model has a batch axis. Text is an array of dtype `U`, which needs no pickle.
Metrics: `accuracy` (class index against the largest entry of the output, or text against text) and `absolute_error` (score is minus the mean absolute difference).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wherry_optimizer.data import Array, Dataset, Sample, Specification, Tensors
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.errors import RefusedError

METRICS = ("accuracy", "absolute_error")


def load(spec: Specification, interface: Interface, folder: Path) -> Dataset:
    """Read arrays, shuffle them by the seed and split calibration from evaluation.

    Raises:
        RefusedError: `data_missing`, `data_invalid`, `data_shape`, `data_short`, `recipe_invalid`.
    """
    arrays = read_arrays(folder / spec.path)
    labels = arrays.pop(spec.label, None)
    if labels is None:
        raise RefusedError(
            "data_invalid", f"{spec.path} has no array {spec.label!r} of labels", next_step="add it, or set data.label"
        )
    samples = split_samples(arrays, interface)
    count = len(labels) if labels.ndim else 0
    if count != len(samples):
        raise RefusedError(
            "data_shape",
            f"{spec.path} has {len(samples)} samples and {count} labels",
            next_step="give one label per sample, along axis 0",
        )
    if len(samples) <= spec.calibration:
        raise RefusedError(
            "data_short",
            f"{len(samples)} samples, of which {spec.calibration} are for calibration: none is left to evaluate on",
            next_step="give more samples or lower data.calibration",
        )
    score = _score(spec, interface)
    _check_labels(labels, spec, interface)
    order = np.random.default_rng(spec.seed).permutation(len(samples))
    chosen = [Sample(samples[index], labels[index].tolist()) for index in order]
    held_back = chosen[spec.calibration : spec.calibration + spec.evaluation]
    return Dataset(
        metric=spec.metric,
        description=f"{Path(spec.path).name}: {len(samples)} labelled samples",
        calibration=tuple(chosen[: spec.calibration]),
        evaluation=tuple(held_back),
        score=score,
        notes={"samples": len(samples)},
    )


def read_arrays(path: Path) -> dict[str, Array]:
    """Read all arrays of an `.npz`; pickled objects are refused.

    Raises:
        RefusedError: `data_missing` or `data_invalid`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise RefusedError(
            "data_missing", f"there is no {path}", next_step="name an .npz; a recipe's stands beside it"
        ) from error
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise RefusedError(
            "data_invalid",
            f"{path.name} is not an .npz of plain arrays: {error}",
            consequence="nothing was built; what needs pickle is never loaded, since loading it runs code",
            next_step="write it by numpy.savez; text as numpy.array(texts, dtype=str), not as an array of objects",
        ) from error


def split_samples(arrays: dict[str, Array], interface: Interface) -> list[dict[str, Array]]:
    """Cut arrays along axis 0 into one dictionary per sample.

    Raises:
        RefusedError: `data_shape` if names or counts do not match, naming the array.
    """
    samples: list[dict[str, Array]] = []
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise RefusedError(
            "data_shape",
            f"arrays have different numbers of samples: {counts}",
            consequence="nothing was built",
            next_step="give every array its samples along axis 0, as many as the others have",
        )
    for spec in interface.inputs:
        if spec.name not in arrays and not spec.optional:
            raise RefusedError(
                "data_shape",
                f"there is no array for input {spec.name!r}",
                next_step=f"name the arrays {', '.join(item.name for item in interface.inputs)}",
            )
    for index in range(next(iter(counts.values()), 0)):
        samples.append({spec.name: _cut(as_text(arrays[spec.name], spec), index, spec) for spec in interface.inputs})
    return samples


def first_texts(arrays: dict[str, Array]) -> dict[str, str]:
    """Return the first text of each array of text."""
    return {name: str(array.flat[0]) for name, array in arrays.items() if array.dtype.kind == "U" and array.size}


def as_text(array: Array, spec: TensorSpec) -> Array:
    """Return an array of dtype `U` as engines take text, an array of `str` objects; any other as it is."""
    return array.astype(np.object_) if spec.datatype == "BYTES" and array.dtype.kind == "U" else array


def _cut(array: Array, index: int, spec: TensorSpec) -> Array:
    if array.ndim == len(spec.shape) + 1:
        return np.ascontiguousarray(array[index])
    batched = bool(spec.shape) and (isinstance(spec.shape[0], str) or spec.shape[0] == 1)
    if array.ndim == len(spec.shape) and batched:
        return np.ascontiguousarray(array[index : index + 1])
    raise RefusedError(
        "data_shape",
        f"array {spec.name!r} has shape {list(array.shape)}; with samples along axis 0 it needs rank "
        f"{len(spec.shape) if batched else len(spec.shape) + 1} for an input of shape {spec.shape}",
        consequence="nothing was built",
        next_step="stack the samples along axis 0, each as one call takes it",
    )


def _check_labels(labels: Array, spec: Specification, interface: Interface) -> None:
    """Refuse labels that no answer can equal: with them every variant scores the same, and the gate lets all pass."""
    output = next(item for item in interface.outputs if item.name == (spec.output or interface.outputs[0].name))
    batches = {item.shape[0] for item in interface.inputs if item.shape and isinstance(item.shape[0], str)}
    shape = output.shape[1:] if output.shape and output.shape[0] in batches else output.shape
    size = math.prod(axis if isinstance(axis, int) else 0 for axis in shape)  # 0: not fixed
    each = math.prod(labels.shape[1:])
    if output.datatype == "BYTES":
        if labels.dtype.kind == "U" and spec.metric == "accuracy" and each == 1:
            return
        wrong, wanted = f"are {labels.dtype} of shape {list(labels.shape)}", "one text per sample, and metric accuracy"
    elif labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        wrong, wanted = f"are {labels.dtype} or not finite", "numbers"
    elif spec.metric == "accuracy":
        if each == 1 and np.all(labels == np.floor(labels)) and labels.min() >= 0 and (not size or labels.max() < size):
            return
        wrong = f"have shape {list(labels.shape)} and lie between {labels.min()} and {labels.max()}"
        wanted = f"one class index per sample, from 0{f' to {size - 1}' if size else ' on'}"
    elif not size or each in (1, size):
        return
    else:
        wrong, wanted = f"have {each} entries per sample", f"{size}, as output {output.name!r} has"
    raise RefusedError(
        "data_invalid",
        f"labels of {spec.path} {wrong}; {spec.metric} needs {wanted}",
        consequence="no variant could be told from another by them, so nothing was built",
        next_step=f"write array {spec.label!r} so, or set data.output or data.metric",
    )


def _score(spec: Specification, interface: Interface) -> Callable[[Tensors, Any], float]:
    if spec.metric not in METRICS:
        raise RefusedError(
            "recipe_invalid", f"recipe: data.metric: there is no {spec.metric!r}", next_step=f"use {', '.join(METRICS)}"
        )
    names = [output.name for output in interface.outputs]
    output = spec.output or names[0]
    if output not in names or (not spec.output and len(names) > 1):
        raise RefusedError("recipe_invalid", f"recipe: data.output: name one of {', '.join(names)}")
    if next(item for item in interface.outputs if item.name == output).datatype == "BYTES":
        return lambda outputs, label: float(
            outputs[output].reshape(-1).tolist() == np.asarray(label).reshape(-1).tolist()
        )
    if spec.metric == "accuracy":
        return lambda outputs, label: float(int(outputs[output].reshape(-1).argmax()) == int(np.asarray(label).item()))
    return lambda outputs, label: -float(np.abs(outputs[output].reshape(-1) - np.asarray(label).reshape(-1)).mean())
