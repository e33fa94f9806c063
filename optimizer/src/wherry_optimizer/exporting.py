"""Models that are no file yet: a scikit-learn estimator becomes ONNX, and is compared with itself before it is used.

    from wherry_optimizer.exporting import from_sklearn

    path = from_sklearn(pipeline, features, Path("model.onnx"))

It takes an object in memory, not a pickle: loading one runs whatever is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_shared.engines import load
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]

OPSETS = {"": 17, "ai.onnx.ml": 3}
COMPARED_MAX = 1000
AGREEMENT_MIN = 0.999
"""Share of classes that have to be the same: scikit-learn computes in float64, ONNX in float32."""
TOLERANCE = 1e-3
"""Of a regressor's values, as a share of their range."""


def from_sklearn(estimator: Any, features: Array, target: Path) -> Path:
    """Write a fitted estimator or pipeline as ONNX.

    Args:
        estimator: a classifier or regressor that skl2onnx knows.
        features: (samples, columns) as it takes them; up to `COMPARED_MAX` rows are compared.
        target: the file to write. Input `X`: float32, (n, columns); a classifier's outputs are `label` and `probabilities`.

    Raises:
        RefusedError: `extra_missing`; `export_failed` if skl2onnx cannot; `export_differs` if the file answers otherwise.
    """
    try:
        import skl2onnx
    except ImportError as error:
        raise RefusedError(
            "extra_missing",
            "exporting a scikit-learn estimator needs skl2onnx",
            consequence="nothing was written",
            next_step="pip install wherry-optimizer[sklearn]",
        ) from error
    rows = np.asarray(features, dtype=np.float32)[:COMPARED_MAX]
    options = {"zipmap": False} if hasattr(estimator, "classes_") else None
    try:
        made = skl2onnx.to_onnx(estimator, rows[:1], options=options, target_opset=OPSETS)
    except Exception as error:  # a family of its own, and whatever an estimator raises
        raise RefusedError(
            "export_failed",
            f"skl2onnx cannot convert {type(estimator).__name__}: {(str(error) or repr(error)).splitlines()[0]}",
            consequence="nothing was written",
            next_step="use estimators that skl2onnx supports, or register a converter with it",
        ) from error
    target.write_bytes(made.SerializeToString())
    session = load(target, "onnx")
    (native, *_), (first, *_) = session.describe()
    found = session.run({native.name: rows})[first.name].reshape(-1)
    session.close()
    wanted = np.asarray(estimator.predict(rows)).reshape(-1)
    if not _agree(found, wanted):
        target.unlink()
        raise RefusedError(
            "export_differs",
            f"the exported {type(estimator).__name__} answers otherwise than the original",
            consequence="the file was removed",
            next_step="look for steps that depend on float64, or on state that skl2onnx does not carry over",
        )
    return target


def _agree(found: Array, wanted: Array) -> bool:
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind == "f":
        span = float(np.ptp(wanted)) or 1.0
        return bool(np.abs(found.astype(np.float64) - wanted).max() <= TOLERANCE * span)
    return float((found.astype(str) == wanted.astype(str)).mean()) >= AGREEMENT_MIN
