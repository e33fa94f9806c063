"""The protocol that every engine meets, and the native view of a loaded model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from wherry_shared.bundle import Datatype

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """An input or output as the engine itself describes it.

    `shape` has a length per axis, a name where the file names a symbolic axis, -1 where it is dynamic without a name.
    """

    name: str
    datatype: Datatype
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine may take: `slots` calls at once (an engine that can't share one instance opens so many)."""

    slots: int = field(default_factory=lambda: max(1, len(os.sched_getaffinity(0))))


class Interrupt:
    """Lets another thread end a call that nobody waits for any more, where the engine can do that (onnxruntime)."""

    def __init__(self) -> None:
        self._end: Callable[[], None] | None = None
        self._wanted = False

    def attach(self, end: Callable[[], None]) -> None:
        """Say how the call that begins now is ended; called by an engine."""
        self._end = end
        if self._wanted:
            end()

    def interrupt(self) -> None:
        """End the call, now or when it begins; it then raises `EngineFault`, which nobody may be there to see."""
        self._wanted = True
        if self._end is not None:
            self._end()


@runtime_checkable
class Session(Protocol):
    """A loaded model, under its NATIVE tensor names.

    Inputs are read only and never kept; outputs belong to the caller. `run` may be called from up to `max_concurrency`
    threads at once (more wait or are slower; none fails).
    """

    engine: str
    """Name of the engine, as in `facts.EngineFacts`."""
    engine_version: str
    max_concurrency: int

    def describe(self) -> tuple[list[NativeTensor], list[NativeTensor]]:
        """Return native inputs and outputs, in the order of the file."""
        ...

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; `outputs` None means all.

        Raises:
            BadInput: a name, datatype, rank or fixed axis is not the model's.
            EngineFault: the model failed on it.
            OutOfMemory: an allocation failed.
        """
        ...

    def close(self) -> None:
        """Free the model as soon as calls in flight are over; calls that begin later raise RuntimeError."""
        ...


DTYPES: dict[Datatype, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
    "BF16": np.dtype(np.uint16),
}
"""OIP datatype → numpy dtype; BF16, which numpy lacks, is carried as its bits (`engines.bf16`)."""

DATATYPES: dict[np.dtype[Any], Datatype] = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
"""numpy dtype → OIP datatype, as far as the dtype tells."""
