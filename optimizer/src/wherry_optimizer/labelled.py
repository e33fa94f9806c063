"""Labelled data of one's own, for a search or a recipe: from an `.npz`, a folder per class, a CSV or Parquet table, or a function.

Samples come under the model's own tensor names. They are shuffled by the seed and cut into three parts that share
nothing: calibration, selection (what candidates are compared on) and test (looked at once, by what was chosen).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_optimizer import metrics
from wherry_optimizer.data import Dataset, Sample, check_samples
from wherry_optimizer.data.npz import read_arrays, split_samples
from wherry_optimizer.evaluate import AGREEMENT
from wherry_optimizer.interface import layout_of
from wherry_optimizer.metrics import find_function
from wherry_optimizer.recipe import DataOf
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.engines.session import DTYPES
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]

CALIBRATION_SHARE = 0.2
CALIBRATION_MAX = 100
SAMPLES_MIN = 8
"""Fewer cannot be cut into three parts of which two are compared by intervals."""
HELD_BACK_MIN = 4
"""Of a recipe, so many at least beside those for calibration: two halves of which each has a spread."""
KINDS = ("npz", "folder", "csv", "parquet", "function")
"""What a recipe may call its data, beside `data.MODULES`."""
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IMAGE_RANK = 4
"""Batch, height, width and channels."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Samples in three parts."""

    calibration: tuple[Sample, ...]
    selection: tuple[Sample, ...]
    test: tuple[Sample, ...]
    labelled: bool
    description: str


def load(where: str, interface: Interface, *, label: str = "label", seed: int = 0) -> Parts:
    """Read samples and cut them.

    Args:
        where: a file or folder, or `module:function`, which is called without arguments and gives (inputs, label) pairs.
        interface: of the model.
        label: array or column of labels.
        seed: of the shuffle.

    Raises:
        RefusedError: `data_*`.
    """
    samples, labelled, description = read(where, interface, label)
    check_samples([sample.inputs for sample in samples], interface, "data")
    _check_finite(samples)
    return cut(samples, labelled=labelled, description=description, seed=seed)


def cut(samples: Sequence[Sample], *, labelled: bool, description: str, seed: int = 0) -> Parts:
    """Shuffle samples and cut them into three parts.

    Raises:
        RefusedError: `data_short`; `data_one_class` where all labels are one and the same.
    """
    if len(samples) < SAMPLES_MIN:
        raise RefusedError(
            "data_short",
            f"{len(samples)} samples, at least {SAMPLES_MIN} are needed for calibration, selection and test",
            consequence="no candidate could be judged, so nothing was tried",
            next_step="give more samples, several hundred if you can: intervals shrink with their number",
        )
    if labelled:
        _check_varied(samples)
    order = np.random.default_rng(seed).permutation(len(samples))
    chosen = [samples[index] for index in order]
    first = max(2, min(CALIBRATION_MAX, round(len(samples) * CALIBRATION_SHARE)))
    middle = first + (len(samples) - first) // 2
    return Parts(tuple(chosen[:first]), tuple(chosen[first:middle]), tuple(chosen[middle:]), labelled, description)


def dataset(spec: DataOf, interface: Interface, folder: Path) -> Dataset:
    """Read what a recipe names, shuffle it by the seed and hold back what variants are judged by.

    Args:
        spec: the recipe's table; its kind is one of `KINDS`.
        interface: of the model, under canonical names.
        folder: of the recipe.

    Raises:
        RefusedError: `recipe_invalid`, `metric_unknown`, `data_*`.
    """
    where = spec.path if spec.kind == "function" else str(folder / spec.path)
    samples, labelled, description = read(where, interface, spec.label, spec.kind, folder)
    if not labelled and spec.metric != AGREEMENT:
        raise RefusedError(
            "data_invalid",
            f"{spec.path} has no {spec.label!r} with labels",
            consequence=f"{spec.metric} needs them, so nothing was built",
            next_step='add them, set data.label, or data.metric = "agreement", which needs none',
        )
    check_samples([sample.inputs for sample in samples], interface, "data")
    names = [output.name for output in interface.outputs]
    outputs = tuple(spec.outputs or ([spec.output] if spec.output else []))
    if any(name not in names for name in outputs) or (not outputs and len(names) > 1 and spec.metric != "detection"):
        raise RefusedError("recipe_invalid", f"recipe: data.output: name one of {', '.join(names)}")
    chosen = outputs[0] if outputs else names[0]
    metric = metrics.make(metrics.MetricOf(name=spec.metric, outputs=outputs, folder=str(folder)))
    if labelled:
        check_labels(samples, spec.metric, next(item for item in interface.outputs if item.name == chosen), interface)
    if len(samples) < spec.calibration + HELD_BACK_MIN:
        raise RefusedError(
            "data_short",
            f"{len(samples)} samples, of which {spec.calibration} are for calibration: at least {HELD_BACK_MIN} have to be left "
            "to judge by",
            next_step="give more samples or lower data.calibration",
        )
    if labelled and spec.metric != AGREEMENT:
        _check_varied(samples)
    order = np.random.default_rng(spec.seed).permutation(len(samples))
    shuffled = tuple(samples[index] for index in order)
    return Dataset(
        metric=spec.metric,
        description=description,
        calibration=shuffled[: spec.calibration],
        evaluation=shuffled[spec.calibration : spec.calibration + spec.evaluation],
        measure=metric,
        notes={"samples": len(samples)},
        output=chosen,
    )


def check_labels(samples: Sequence[Sample], metric: str, output: TensorSpec, interface: Interface) -> None:
    """Refuse labels that no answer can equal: with them every variant scores the same, and the gate lets all pass.

    Raises:
        RefusedError: `data_invalid`.
    """
    if metric not in ("accuracy", "top5", "absolute_error", "squared_error") or not samples:
        return
    batches = {item.shape[0] for item in interface.inputs if item.shape and isinstance(item.shape[0], str)}
    shape = output.shape[1:] if output.shape and output.shape[0] in batches else output.shape
    size = math.prod(axis if isinstance(axis, int) else 0 for axis in shape)  # 0: not fixed
    try:
        labels = np.array([np.asarray(sample.label) for sample in samples])
    except ValueError:  # of several shapes
        labels = np.empty((len(samples), 0), dtype=object)
    each = math.prod(labels.shape[1:])
    classes = metric in ("accuracy", "top5")
    if output.datatype == "BYTES":
        if labels.dtype.kind == "U" and classes and each == 1:
            return
        wrong, wanted = f"are {labels.dtype} of shape {list(labels.shape)}", "one text per sample, and metric accuracy"
    elif labels.dtype.kind not in "biuf" or not np.isfinite(labels).all():
        wrong, wanted = f"are {labels.dtype} or not finite", "numbers"
    elif classes:
        if each == 1 and np.all(labels == np.floor(labels)) and labels.min() >= 0 and (not size or labels.max() < size):
            return
        span = f" and lie between {labels.min()} and {labels.max()}" if labels.size else ""
        wrong = f"have shape {list(labels.shape)}{span}"
        wanted = f"one class index per sample, from 0{f' to {size - 1}' if size else ' on'}"
    elif not size or each in (1, size):
        return
    else:
        wrong, wanted = f"have {each} entries per sample", f"{size}, as output {output.name!r} has"
    raise RefusedError(
        "data_invalid",
        f"labels {wrong}; {metric} needs {wanted}",
        consequence="no variant could be told from another by them, so nothing was done",
        next_step="correct the labels, or name another output or metric",
    )


def _check_varied(samples: Sequence[Sample]) -> None:
    shown = {repr(np.asarray(sample.label).tolist()) for sample in samples}
    if len(shown) == 1:
        raise RefusedError(
            "data_one_class",
            f"all {len(samples)} labels are {next(iter(shown))[:80]}",
            consequence="a network that always says that would pass, so nothing was tried",
            next_step="give samples of every class that matters",
        )


def read(
    where: str, interface: Interface, label: str, kind: str = "", folder: Path = Path()
) -> tuple[list[Sample], bool, str]:
    """Read samples.

    Args:
        where: a file or folder, or `module:function`.
        interface: of the model.
        label: array or column of labels.
        kind: one of `KINDS`; by default what `where` looks like.
        folder: where the module of a function is looked for first.

    Returns:
        Samples, whether they have labels, and what they are in a few words.

    Raises:
        RefusedError: `data_*`.
    """
    path = Path(where)
    kind = kind or _kind_of(path, where)
    if kind == "function":
        return _called(find_function(where, folder, "data_missing"), where)
    if not path.exists():
        raise _bad("data_missing", f"there is no {where}")
    if kind == "folder":
        return _folder(path, interface), True, f"{path.name}: a folder per class"
    if kind == "csv":
        return _table(_csv(path), interface, label, path.name)
    if kind == "parquet":
        return _table(_parquet(path), interface, label, path.name)
    arrays = read_arrays(path)
    labels = arrays.pop(label, None)
    cut_up = split_samples(arrays, interface)
    stray = sorted(set(arrays) - {spec.name for spec in interface.inputs})
    if stray:  # labels under a name that was not told would be left out in silence
        raise _bad(
            "data_invalid",
            f"{path.name} has {', '.join(map(repr, stray))}, which the model has no input for; if it is the labels, name it (--label)",
        )
    count = len(labels) if labels is not None and labels.ndim else 0
    if labels is not None and count != len(cut_up):
        raise _bad("data_shape", f"{path.name} has {len(cut_up)} samples and {count} labels")
    samples = [
        Sample(inputs, None if labels is None else labels[index].tolist()) for index, inputs in enumerate(cut_up)
    ]
    described = "labelled samples" if labels is not None else "samples"
    return samples, labels is not None, f"{path.name}: {len(samples)} {described}"


def _kind_of(path: Path, where: str) -> str:
    if path.is_dir():
        return "folder"
    if path.suffix in (".csv", ".parquet"):
        return path.suffix[1:]
    return "function" if ":" in where and not path.exists() and path.suffix != ".npz" else "npz"


def _called(function: Callable[[], Iterable[tuple[dict[str, Any], Any]]], name: str) -> tuple[list[Sample], bool, str]:
    try:
        rows = [
            ({key: np.asarray(value) for key, value in dict(inputs).items()}, label) for inputs, label in function()
        ]
    except (Exception, SystemExit) as error:  # whatever somebody's function raises
        raise _bad("data_invalid", f"{name} raised {type(error).__name__}: {error}") from error
    bare = [index for index, (_, label) in enumerate(rows) if label is None]
    if 0 < len(bare) < len(rows):
        raise _bad("data_invalid", f"{name}: {len(bare)} of {len(rows)} samples have no label, the first is {bare[0]}")
    return [Sample(*row) for row in rows], bool(rows) and not bare, f"{name}: {len(rows)} samples"


def _folder(path: Path, interface: Interface) -> list[Sample]:
    """Read `CLASS/FILE.npy` (or images, with Pillow): classes are indices in the order of their names."""
    classes = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    spec = interface.inputs[0]
    if len(interface.inputs) > 1:
        raise _bad("data_invalid", f"the model has {len(interface.inputs)} inputs, a folder of files gives one")
    samples: list[Sample] = []
    for index, name in enumerate(classes):
        for file in sorted((path / name).iterdir()):
            if file.suffix == ".npy":
                try:
                    value = np.load(file, allow_pickle=False)
                except (OSError, ValueError, EOFError) as error:
                    raise _bad("data_invalid", f"{name}/{file.name} is no plain array: {error}") from error
            elif file.suffix.lower() in IMAGES:
                value = _image(file, spec.shape, last=layout_of(spec) == "NHWC")
            else:
                continue
            try:
                value = value.astype(DTYPES[spec.datatype], copy=False)
            except ValueError as error:
                raise _bad("data_invalid", f"{name}/{file.name} has what is no number: {error}") from error
            samples.append(Sample({spec.name: value if value.ndim == len(spec.shape) else value[None]}, index))
    return samples


def _image(file: Path, shape: Sequence[int | str], *, last: bool) -> Array:
    """Return an image as floats in [0, 1], channels where the model has them, resized where its size is fixed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _bad(
            "extra_missing", "images need Pillow: pip install wherry-optimizer[images], or give .npy files"
        ) from error
    if len(shape) != IMAGE_RANK:
        raise _bad("data_shape", f"{file.name} is an image, and the model's input has shape {list(shape)}")
    height, width = (shape[1], shape[2]) if last else (shape[2], shape[3])
    channels = shape[3] if last else shape[1]
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGBA" if channels == 4 else "RGB")
            if isinstance(height, int) and isinstance(width, int):
                image = image.resize((width, height))
            value = np.asarray(image, dtype=np.float32) / 255.0
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # all that Pillow raises for a bad file
        raise _bad("data_invalid", f"{file.parent.name}/{file.name} is no image: {error}") from error
    value = value.reshape(*value.shape[:2], -1)
    return value[None] if last else np.moveaxis(value, 2, 0)[None]


def _csv(path: Path) -> dict[str, Array]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _bad("data_invalid", f"{path.name} is no CSV in UTF-8: {error}") from error
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise _bad("data_invalid", f"{path.name} is no table with a line of column names and rows of one length")
    twice = sorted({name for name in rows[0] if rows[0].count(name) > 1})
    if twice:
        raise _bad("data_invalid", f"{path.name} has several columns {', '.join(map(repr, twice[:5]))}")
    return {name: np.array([row[index] for row in rows[1:]]) for index, name in enumerate(rows[0])}


def _parquet(path: Path) -> dict[str, Array]:
    try:
        import pyarrow.parquet as table
    except ImportError as error:
        raise _bad("extra_missing", "Parquet needs pyarrow: pip install wherry-optimizer[parquet]") from error
    try:
        found = table.read_table(path)
    except Exception as error:  # pyarrow has a family of its own
        raise _bad("data_invalid", f"{path.name} is no Parquet: {error}") from error
    try:
        return {name: np.asarray(found[name].to_pylist()) for name in found.column_names}
    except ValueError as error:  # lists of several lengths
        raise _bad("data_shape", f"{path.name} has rows of several shapes: {error}") from error


def _table(columns: dict[str, Array], interface: Interface, label: str, name: str) -> tuple[list[Sample], bool, str]:
    """Make samples of a table: the columns but the label are the entries of the model's one input, in order."""
    if len(interface.inputs) > 1:
        raise _bad("data_invalid", f"the model has {len(interface.inputs)} inputs, a table gives one")
    spec = interface.inputs[0]
    labels = columns.pop(label, None)
    if not columns:
        raise _bad("data_invalid", f"{name} has no column beside {label!r}")
    try:
        values = np.stack([column.astype(np.float64) for column in columns.values()], axis=1)
        if values.ndim == 3 and values.shape[1] == 1:  # a Parquet column of lists
            values = values[:, 0]
        plain = None if labels is None else labels.astype(np.float64)
    except (ValueError, TypeError) as error:  # a missing value of Parquet is None
        raise _bad("data_invalid", f"{name} has what is no number: {error}") from error
    shape = [axis if isinstance(axis, int) else -1 for axis in spec.shape[1:]]
    if shape.count(-1) > 1:
        raise _bad(
            "data_shape", f"input {spec.name!r} has shape {spec.shape}: a table cannot say how long its axes are"
        )
    try:
        rows = values.astype(DTYPES[spec.datatype]).reshape(len(values), 1, *shape)
    except ValueError as error:
        raise _bad("data_shape", f"{name} has {values.shape[1]} columns for an input of shape {spec.shape}") from error
    samples = [Sample({spec.name: row}, None if plain is None else plain[index]) for index, row in enumerate(rows)]
    return samples, plain is not None, f"{name}: {len(samples)} rows"


def _check_finite(samples: Sequence[Sample]) -> None:
    for index, sample in enumerate(samples):
        for name, value in sample.inputs.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise _bad("data_invalid", f"sample {index}: input {name!r} has NaN or Inf")


def _bad(code: str, why: str) -> RefusedError:
    return RefusedError(
        code,
        why,
        consequence="nothing was tried",
        next_step="see docs/optimizer.md for what data may look like",
    )
