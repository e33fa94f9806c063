"""Data of one's own: a NumPy `.npz` with an array per input and one of labels, all with the samples along axis 0.

A sample keeps a leading axis of 1 where the model has a batch axis. Text is an array of dtype `U`, which needs no pickle.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from wherry_optimizer.data import Array
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.errors import RefusedError


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
