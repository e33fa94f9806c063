"""Labelled data: samples under canonical names, and what an answer is judged by.

A data module has `load(spec, interface, folder) -> Dataset`. Files of one's own are read by `labelled`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wherry_optimizer import metrics
from wherry_shared.bundle import Interface, axis_bounds
from wherry_shared.engines.session import DTYPES
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

MODULES = {"file-type": "file_type", "pitch": "pitch"}
"""Kinds of data that come with Wherry, and their modules here."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One call, and what the answer should be (the meaning is the dataset's)."""

    inputs: dict[str, Array]
    label: Any


@dataclass(frozen=True, slots=True)
class Dataset:
    """Calibration and held-back samples; the parts share nothing."""

    metric: str
    description: str
    """In a sentence: real or made, labelled by what."""
    calibration: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]
    """Held back; what variants are judged by (`parts`)."""
    measure: metrics.Metric
    labels: dict[str, list[str]] = field(default_factory=dict)
    """Class names of outputs, where the data know them."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Counts for the report."""
    selection: tuple[Sample, ...] = ()
    """For choosing parameters by hand or by program; a build never looks at them, and nothing is chosen by `evaluation`."""
    output: str = ""
    """Which output the metric looks at; by default the first."""

    @property
    def parts(self) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """What variants are kept by, and what confirms them: the halves of `evaluation`, which is in random order."""
        middle = len(self.evaluation) // 2
        return self.evaluation[:middle], self.evaluation[middle:]

    @property
    def digest(self) -> str:
        """The digest of every input and label, in order."""
        sha = hashlib.sha256()
        for part in (self.calibration, self.evaluation):
            sha.update(f"{len(part)};".encode())
            for sample in part:
                for name in sorted(sample.inputs):
                    array = sample.inputs[name]
                    sha.update(f"{name};{array.dtype};{array.shape};".encode())
                    text = array.dtype.kind == "O"  # the bytes of such an array are addresses
                    sha.update(repr(array.tolist()).encode() if text else np.ascontiguousarray(array).tobytes())
                sha.update(f"{sample.label!r};".encode())
        return "sha256:" + sha.hexdigest()


class Specification(Protocol):
    """What a recipe says about its data; `recipe.DataOf` is one."""

    @property
    def kind(self) -> str:
        """Name of the module."""
        ...

    @property
    def calibration(self) -> int:
        """Samples for calibration."""
        ...

    @property
    def evaluation(self) -> int:
        """Samples for evaluation at most."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...


def load(spec: Specification, interface: Interface, folder: Path) -> Dataset:
    """Load data that come with Wherry, and check every sample against the interface.

    Raises:
        RefusedError: `data_*`.
    """
    module = importlib.import_module(f"wherry_optimizer.data.{MODULES[spec.kind]}")
    dataset: Dataset = module.load(spec, interface, folder)
    for what, samples in (("calibration", dataset.calibration), ("evaluation", dataset.evaluation)):
        if not samples:
            raise RefusedError("data_short", f"no {what} samples", next_step="give more data")
        check_samples([sample.inputs for sample in samples], interface, what)
    return dataset


def check_samples(samples: Sequence[Tensors], interface: Interface, what: str) -> None:
    """Check names, datatypes and shapes of samples.

    Raises:
        RefusedError: `data_shape` or `data_type`, naming the sample, the input and the difference.
    """
    for index, inputs in enumerate(samples):
        for spec in interface.inputs:
            array = inputs.get(spec.name)
            if array is None:
                if spec.optional:
                    continue
                raise _bad("data_shape", what, index, f"input {spec.name!r} is missing")
            if array.dtype != DTYPES[spec.datatype]:
                raise _bad("data_type", what, index, f"input {spec.name!r} is {array.dtype}, expected {spec.datatype}")
            fits = len(array.shape) == len(spec.shape)
            for length, axis in zip(array.shape, spec.shape, strict=False):
                low, high = axis_bounds(axis, interface)
                fits = fits and low <= length and (length <= high or (high == 0 and isinstance(axis, str)))
            if not fits:
                shape = f"input {spec.name!r} has shape {list(array.shape)}, expected {spec.shape}"
                raise _bad("data_shape", what, index, shape)
        stray = sorted(set(inputs) - {spec.name for spec in interface.inputs})
        if stray:
            raise _bad("data_shape", what, index, f"there is no input {', '.join(stray)}")


def _bad(code: str, what: str, index: int, why: str) -> RefusedError:
    return RefusedError(
        code, f"{what} sample {index}: {why}", next_step="give samples as the model takes them, see inspect"
    )
