"""int8 of a TFLite model by ai-edge-quantizer: dynamic range (int8 arithmetic) or weights only (float arithmetic).

The tool leaves some models silently as they were (models without a signature, among others), so the pass compares what
it got with what it gave.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Literal

import msgspec

from wherry_optimizer.passes import Result, Work
from wherry_shared.errors import RefusedError

SHRINK_MIN = 0.02
"""A result that is not smaller by this share of the file counts as unchanged."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of the tool's recipes."""

    mode: Literal["dynamic", "weights"] = "dynamic"


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the model; see `passes.Pass`."""
    from ai_edge_quantizer import quantizer, recipe

    before = path.read_bytes()
    chosen = recipe.dynamic_wi8_afp32() if parameters.mode == "dynamic" else recipe.weight_only_wi8_afp32()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            tool = quantizer.Quantizer(bytearray(before))
            tool.load_quantization_recipe(chosen)
            after = bytes(tool.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)
    except Exception as error:  # the tool raises ValueError, RuntimeError and its own
        raise RefusedError(
            "pass_failed",
            f"ai-edge-quantizer could not quantize {path.name}: {str(error).splitlines()[0]}",
            consequence="the variant was not made",
            next_step="try another recipe of the pass, or take it out",
        ) from error
    if len(after) > len(before) * (1 - SHRINK_MIN):
        raise RefusedError(
            "pass_noop",
            f"quantization changed nothing: {len(before)} bytes before, {len(after)} after",
            consequence="the variant would be the float model under another name",
            next_step="a TFLite model needs a signature for ai-edge-quantizer to work on it",
        )
    target = work.folder / "quantized.tflite"
    target.write_bytes(after)
    return Result(target, {"mode": parameters.mode})
