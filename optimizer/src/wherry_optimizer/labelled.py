"""Labelled data of one's own for a search: from an `.npz`, a folder per class, a CSV or Parquet table, or a function.

Samples come under the model's own tensor names. They are shuffled by the seed and cut into three parts that share
nothing: calibration, selection (what candidates are compared on) and test (looked at once, by what was chosen).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_optimizer.data import Sample, check_samples
from wherry_optimizer.data.npz import read_arrays, split_samples
from wherry_optimizer.metrics import find_function
from wherry_shared.bundle import Interface
from wherry_shared.engines.session import DTYPES
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]

CALIBRATION_SHARE = 0.2
CALIBRATION_MAX = 100
SAMPLES_MIN = 8
"""Fewer cannot be cut into three parts of which two are compared by intervals."""
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


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
    samples, labelled, description = _read(where, interface, label)
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
        shown = {repr(np.asarray(sample.label).tolist()) for sample in samples}
        if len(shown) == 1:
            raise RefusedError(
                "data_one_class",
                f"all {len(samples)} labels are {next(iter(shown))[:80]}",
                consequence="a network that always says that would pass, so nothing was tried",
                next_step="give samples of every class that matters",
            )
    order = np.random.default_rng(seed).permutation(len(samples))
    chosen = [samples[index] for index in order]
    first = max(2, min(CALIBRATION_MAX, round(len(samples) * CALIBRATION_SHARE)))
    middle = first + (len(samples) - first) // 2
    return Parts(tuple(chosen[:first]), tuple(chosen[first:middle]), tuple(chosen[middle:]), labelled, description)


def _read(where: str, interface: Interface, label: str) -> tuple[list[Sample], bool, str]:
    path = Path(where)
    if path.is_dir():
        return _folder(path, interface), True, f"{path.name}: a folder per class"
    if path.suffix == ".npz" or path.exists():
        if path.suffix == ".csv":
            return _table(_csv(path), interface, label, path.name)
        if path.suffix == ".parquet":
            return _table(_parquet(path), interface, label, path.name)
        arrays = read_arrays(path)
        labels = arrays.pop(label, None)
        cut_up = split_samples(arrays, interface)
        if labels is not None and len(labels) != len(cut_up):
            raise _bad("data_shape", f"{path.name} has {len(cut_up)} samples and {len(labels)} labels")
        samples = [
            Sample(inputs, None if labels is None else labels[index].tolist()) for index, inputs in enumerate(cut_up)
        ]
        return samples, labels is not None, f"{path.name}: {len(samples)} samples"
    if ":" in where:
        return _called(find_function(where, Path(), "data_missing"), where)
    raise _bad("data_missing", f"there is no {where}")


def _called(function: Callable[[], Iterable[tuple[dict[str, Any], Any]]], name: str) -> tuple[list[Sample], bool, str]:
    try:
        rows = [(dict(inputs), label) for inputs, label in function()]
    except Exception as error:  # whatever somebody's function raises
        raise _bad("data_invalid", f"{name} raised {type(error).__name__}: {error}") from error
    samples = [Sample({key: np.asarray(value) for key, value in inputs.items()}, label) for inputs, label in rows]
    return samples, bool(rows) and rows[0][1] is not None, f"{name}: {len(samples)} samples"


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
                except (OSError, ValueError) as error:
                    raise _bad("data_invalid", f"{name}/{file.name} is no plain array: {error}") from error
            elif file.suffix.lower() in IMAGES:
                value = _image(file, spec.shape)
            else:
                continue
            value = value.astype(DTYPES[spec.datatype], copy=False)
            samples.append(Sample({spec.name: value if value.ndim == len(spec.shape) else value[None]}, index))
    return samples


def _image(file: Path, shape: Sequence[int | str]) -> Array:
    """Return an image as floats in [0, 1], channels where the model has them, resized where its size is fixed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _bad(
            "extra_missing", "images need Pillow: pip install wherry-optimizer[images], or give .npy files"
        ) from error
    last = shape[-1] in (1, 3)
    height, width = (shape[1], shape[2]) if last else (shape[2], shape[3])
    channels = shape[3] if last else shape[1]
    with Image.open(file) as opened:
        image = opened.convert("L" if channels == 1 else "RGB")
        if isinstance(height, int) and isinstance(width, int):
            image = image.resize((width, height))
        value = np.asarray(image, dtype=np.float32) / 255.0
    value = value.reshape(*value.shape[:2], -1)
    return value[None] if last else np.moveaxis(value, 2, 0)[None]


def _csv(path: Path) -> dict[str, Array]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise _bad("data_invalid", f"{path.name} is no table with a line of column names and rows of one length")
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
    return {name: np.asarray(found[name].to_pylist()) for name in found.column_names}


def _table(columns: dict[str, Array], interface: Interface, label: str, name: str) -> tuple[list[Sample], bool, str]:
    """Make samples of a table: the columns but the label are the entries of the model's one input, in order."""
    if len(interface.inputs) > 1:
        raise _bad("data_invalid", f"the model has {len(interface.inputs)} inputs, a table gives one")
    spec = interface.inputs[0]
    labels = columns.pop(label, None)
    try:
        values = np.stack([column.astype(np.float64) for column in columns.values()], axis=1)
        if values.ndim == 3 and values.shape[1] == 1:  # a Parquet column of lists
            values = values[:, 0]
        plain = None if labels is None else labels.astype(np.float64)
    except ValueError as error:
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
