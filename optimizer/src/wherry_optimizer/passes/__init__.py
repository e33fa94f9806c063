"""Passes: each one turns a model file into another, and knows no other pass.

`CATALOGUE` says what a pass needs without importing it; a pass's module has `Parameters` (a frozen msgspec Struct) and
`apply(path, parameters, work) -> Result`, and imports what is heavy inside `apply`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import numpy.typing as npt

from wherry_shared.bundle import Format
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PassInfo:
    """What a pass is and needs."""

    name: str
    module: str
    """Below `wherry_optimizer.passes`; of a pass of another distribution, the whole name."""
    formats: tuple[Format, ...]
    precision: str
    """What it makes of the weights; empty if it leaves their precision alone."""
    calibration: bool
    summary: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass may use: a folder of its own and calibration inputs under native names."""

    folder: Path
    calibration: Sequence[Mapping[str, Array]]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a pass made."""

    path: Path
    notes: dict[str, Any] = field(default_factory=dict)
    """Figures for the report."""


class Pass(Protocol):
    """The module of a pass."""

    Parameters: type[msgspec.Struct]

    def apply(self, path: Path, parameters: Any, work: Work) -> Result:
        """Make a new file below `work.folder`; the file at `path` stays as it is.

        Raises:
            RefusedError: `pass_noop` if nothing changed, `pass_failed`, `already_quantized`.
        """
        ...


CATALOGUE: tuple[PassInfo, ...] = (
    PassInfo("simplify", "simplify", ("onnx",), "", False, "canonical graph by onnxslim, checked against the original"),
    PassInfo(
        "rewrite",
        "rewrite",
        ("onnx",),
        "",
        True,
        "the same function with less arithmetic: one-hot products as look-ups, tables computed ahead, GELU and LayerNormalization",
    ),
    PassInfo(
        "prune-obs",
        "prune",
        ("onnx",),
        "",
        True,
        "second-order pruning of Conv, Gemm and MatMul weights with reconstruction from calibration activations",
    ),
    PassInfo(
        "round-obs",
        "round_weights",
        ("onnx",),
        "",
        True,
        "fewer values of Conv, Gemm, MatMul and Gather weights, with reconstruction, so that int8 compresses better",
    ),
    PassInfo(
        "smooth", "smooth", ("onnx",), "", True, "large channels of activations shared with the weights, before int8"
    ),
    PassInfo(
        "prune-channels",
        "prune_channels",
        ("onnx",),
        "",
        True,
        "removal of whole channels, neurons and attention heads with least-squares repair of what reads them",
    ),
    PassInfo(
        "quantize-static",
        "quantize",
        ("onnx",),
        "int8",
        True,
        "static QDQ of Conv, MatMul and Gemm: int8 weights per channel, uint8 activations",
    ),
    PassInfo(
        "quantize-weights",
        "quantize_weights",
        ("onnx",),
        "int8-weights",
        False,
        "int8 or 4-bit weights that the graph decodes, float arithmetic",
    ),
    PassInfo(
        "quantize-dynamic",
        "quantize_dynamic",
        ("onnx",),
        "int8",
        False,
        "dynamic int8 of MatMul and Gemm: ranges of activations at every call",
    ),
    PassInfo(
        "quantize-recurrent",
        "quantize_recurrent",
        ("onnx",),
        "int8",
        False,
        "dynamic int8 of LSTM layers, beside static int8 of what feeds them",
    ),
    PassInfo("half", "half", ("onnx",), "float16", False, "float16 weights and arithmetic, float32 at the borders"),
    PassInfo(
        "quantize-tflite",
        "quantize_tflite",
        ("tflite",),
        "int8",
        False,
        "ai-edge-quantizer: dynamic-range, weight-only or static int8, or 4-bit weights",
    ),
)


ENTRY_POINTS = "wherry_optimizer.passes"
"""Group of entry points by which other distributions add passes: each names a `PassInfo`."""


def catalogue() -> tuple[PassInfo, ...]:
    """Return the passes here and those that installed distributions add."""
    own = {info.name for info in CATALOGUE}
    added = [_plug_in(point) for point in importlib.metadata.entry_points(group=ENTRY_POINTS) if point.name not in own]
    return (*CATALOGUE, *added)


def _plug_in(point: importlib.metadata.EntryPoint) -> PassInfo:
    try:
        info = point.load()
    except Exception as error:  # somebody else's module raises anything
        raise RefusedError(
            "pass_invalid",
            f"the pass {point.name!r} of {point.value} cannot be loaded: {type(error).__name__}: {error}",
            consequence="no pass was run",
            next_step="mend or uninstall the distribution that it comes with",
        ) from error
    if not isinstance(info, PassInfo) or info.name != point.name:
        raise RefusedError(
            "pass_invalid",
            f"the pass {point.name!r} of {point.value} is no PassInfo of that name",
            consequence="no pass was run",
            next_step="see wherry_optimizer.passes.PassInfo",
        )
    return info


def find(name: str) -> PassInfo:
    """Return a pass by name.

    Raises:
        RefusedError: `pass_unknown`, or `pass_invalid` where another distribution's cannot be loaded.
    """
    for info in CATALOGUE:
        if info.name == name:
            return info
    known = catalogue()
    for info in known:
        if info.name == name:
            return info
    raise RefusedError(
        "pass_unknown", f"there is no pass {name!r}", next_step=f"use {', '.join(info.name for info in known)}"
    )


def module(info: PassInfo) -> Pass:
    """Import the module of a pass."""
    own = info in CATALOGUE
    return cast("Pass", importlib.import_module(f"wherry_optimizer.passes.{info.module}" if own else info.module))


def excluded(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a node's name matches one of the patterns that a recipe excludes (searched, not anchored)."""
    return any(re.search(pattern, name) is not None for pattern in patterns)
