"""Engines: run a model file, whatever runtime it takes, behind one small protocol.

`probe()` says which engines really work here (importing one proves nothing), `load()` opens a file in one of them, and
`canonical.bind()` puts the names, datatypes and bounds of the signed interface on top. Only `ort` and `litert` import a
runtime. Importing this package loads neither numpy nor a runtime; what needs them is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wherry_shared import engine_telemetry
from wherry_shared.bundle import Format
from wherry_shared.engines.errors import BadInput, EngineFault, OutOfMemory
from wherry_shared.engines.probing import ENGINES, probe
from wherry_shared.errors import DeviceError

if TYPE_CHECKING:
    from wherry_shared.engines.session import EngineLimits, Session

engine_telemetry.turn_off()

__all__ = ["ENGINES", "BadInput", "EngineFault", "OutOfMemory", "load", "probe"]


def load(
    path: str | Path,
    format: Format,  # noqa: A002 - the word of the bundle format
    *,
    engine: str = "",
    options: Mapping[str, str | int | float | bool] | None = None,
    limits: EngineLimits | None = None,
    data: bytes | None = None,
) -> Session:
    """Open a model file in `engine`, or in the first one of that format that can be imported.

    With `data` those are its bytes: `path` only names it, and nothing is read from a disk.

    Raises:
        EngineFault: `load_failed`, the engine cannot load this file.
        OutOfMemory: `out_of_memory`.
        RefusedError: `engine_option`, an option that the engine does not have.
        DeviceError: `engine_missing`.
    """
    from wherry_shared.engines.session import EngineLimits

    limits = limits or EngineLimits()
    options = options or {}
    path = Path(path)
    if format not in ("onnx", "tflite"):
        raise DeviceError(
            "engine_missing",
            f"no engine here runs {format!r} files",
            consequence="the model cannot run",
            next_step="give an ONNX or a TFLite file",
        )
    names = [engine] if engine else [name for name, formats in ENGINES.items() if format in formats]
    if format not in ENGINES.get(names[0], ()):
        raise DeviceError(
            "engine_missing",
            f"engine {names[0]!r} does not run {format} files",
            consequence="the model cannot run",
            next_step="use onnxruntime for ONNX, ai-edge-litert or tflite-runtime for TFLite",
        )
    if format == "onnx":
        from wherry_shared.engines.ort import OrtSession

        return OrtSession(path, options, limits, data)
    from wherry_shared.engines.litert import LiteRtSession

    return LiteRtSession(path, names, options, limits, data)
