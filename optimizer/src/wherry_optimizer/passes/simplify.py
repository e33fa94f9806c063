"""Canonical form of an ONNX graph before other passes: constants folded, dead and doubled nodes gone.

Run-time gains nothing from it (runtimes fold at load), but passes find more to work on. The result is compared with
the original on a calibration sample, since graph rewriting tools have been seen to write invalid graphs.
"""

from __future__ import annotations

import msgspec
import numpy as np
import onnx

from pathlib import Path  # isort: skip

from wherry_optimizer.passes import Result, Work
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError, WherryError


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing to choose but how far results may move."""

    difference_max: float = 1e-3
    """Largest difference of any output, relative to its largest value."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Simplify the graph; see `passes.Pass`."""
    import onnxslim

    before = onnx.load(path)
    simplified = onnxslim.slim(onnx.load(path))
    target = work.folder / "simplified.onnx"
    onnx.save(simplified, target)
    if work.calibration:
        feed = dict(work.calibration[0])
        try:
            old, new = load(path, "onnx").run(feed), load(target, "onnx").run(feed)
        except WherryError as error:
            raise RefusedError(
                "pass_failed",
                f"the simplified model does not run: {error.message}",
                consequence="the variant was not made",
                next_step="take `simplify` out of the recipe: the model runs without it",
            ) from error
        for name, value in old.items():
            scale = float(np.abs(value).max()) or 1.0
            moved = float(np.abs(value.astype(np.float64) - new[name]).max()) / scale
            if not moved <= parameters.difference_max:
                raise RefusedError(
                    "pass_failed",
                    f"simplifying moved output {name!r} by {moved:.2g} of its range",
                    consequence="the variant was not made",
                    next_step="take `simplify` out of the recipe: the model runs without it",
                )
    return Result(target, {"nodes_before": len(before.graph.node), "nodes_after": len(simplified.graph.node)})
