"""Models that are no file yet become ONNX, and are compared with themselves before they are used.

    from wherry_optimizer.exporting import from_sklearn, from_torch

    path = from_sklearn(pipeline, features, Path("model.onnx"))
    path = from_torch("my_package.network:make", Path("model.onnx")).path

An estimator is taken as an object in memory, not as a pickle: loading one runs whatever is in it. A PyTorch module is made by
a function of the user's, in a child process (`torch_child`): neither torch nor that code ever comes into this one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_optimizer import confined
from wherry_optimizer.model import load as load_model
from wherry_shared.engines import load
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]

OPSETS = {"": 17, "ai.onnx.ml": 3}
COMPARED_MAX = 1000
AGREEMENT_MIN = 0.999
"""Share of classes that have to be the same: scikit-learn computes in float64, ONNX in float32."""
TOLERANCE = 1e-3
"""Of a regressor's values, as a share of their range."""
MOVED_MAX = 1e-3
"""Of a module's outputs: L2, as a share. Kernels that add in another order stay two orders of magnitude below."""
EXPORT_SECONDS_MAX = 600.0
EXPORT_MEMORY_BYTES_MAX = 8 * 2**30


@dataclass(frozen=True, slots=True)
class Exported:
    """A module that became a file."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: bool
    """The batch may have any length; false where the module itself takes no other, or its first axis is no batch."""
    exporter: str
    """`dynamo` or `traced`."""
    passed_over: str
    """Why it was not `dynamo`."""
    error: float
    """How far the file's outputs are from the module's on its examples: L2, as a share, the largest."""
    torch: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `torch_child` found: a refusal, or a file."""

    code: str = ""
    why: str = ""
    next_step: str = ""
    inputs: list[str] = []
    outputs: list[str] = []
    calls: int = 0
    dynamic: bool = False
    exporter: str = ""
    passed_over: str = ""
    torch: str = ""


def from_torch(
    where: str,
    target: Path,
    *,
    folder: Path | None = None,
    python: Path | None = None,
    seconds_max: float = EXPORT_SECONDS_MAX,
    memory_bytes_max: int = EXPORT_MEMORY_BYTES_MAX,
) -> Exported:
    """Write a PyTorch module as ONNX.

    Args:
        where: `module:function`; the function is called without arguments and returns (module, examples), or (module,
            examples, names of outputs). The module is in evaluation mode. Examples are the tensors of one call, as a
            tensor, a tuple or a dict by parameter of `forward`, or a list of such calls. Inputs are named after those
            parameters; outputs after the keys of a dict, else `output` or `output_0`, `output_1`…
        target: the file to write.
        folder: where the module is looked for first; the working folder by default.
        python: an interpreter that has torch and onnxscript; this one by default.
        seconds_max: of the child process.
        memory_bytes_max: of the child process.

    Raises:
        RefusedError: `extra_missing`; `export_raised`, `export_invalid`, `export_outputs`, `export_training`,
            `export_random` for what the function gives; `export_control_flow`, `export_operator`, `export_failed` where
            torch cannot export it; `export_crashed`, `export_timeout`, `export_memory` for the end of its process;
            `export_differs` where the file answers otherwise than the module.
    """
    script = Path(__file__).with_name("torch_child.py")
    with tempfile.TemporaryDirectory(prefix="wherry-export-") as own:
        out = Path(own)
        task = {"where": where, "folder": str((folder or Path.cwd()).resolve()), "out": own}
        ended = confined.run(
            [python or sys.executable, "-P", script],
            seconds_max=seconds_max,
            memory_bytes_max=memory_bytes_max,
            given=msgspec.json.encode(task),
            environment={"OMP_NUM_THREADS": "1", "TMPDIR": own},
        )
        if ended.how != "well":
            raise _not_written(
                f"export_{ended.how}", ended.why, "run the function in Python, and look at what it needs"
            )
        answer = msgspec.json.decode((out / "answer.json").read_bytes(), type=_Answer)
        if answer.code:
            raise _not_written(answer.code, answer.why, answer.next_step)
        error = _compared(out, answer, where)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(out / "model.onnx", target)
    return Exported(
        path=target,
        inputs=tuple(answer.inputs),
        outputs=tuple(answer.outputs),
        dynamic=answer.dynamic,
        exporter=answer.exporter,
        passed_over=answer.passed_over,
        error=error,
        torch=answer.torch,
    )


def _compared(folder: Path, answer: _Answer, where: str) -> float:
    """Run the file on the module's examples, and return how far its outputs are from the module's.

    Raises:
        RefusedError: `export_differs`; `model_*` or `export_failed` where the file does not load or run.
    """
    path = folder / "model.onnx"
    load_model(path)
    examples = np.load(folder / "examples.npz")
    worst = 0.0
    try:
        session = load(path, "onnx", options={"threads": 1})
        for number in range(answer.calls):
            found = session.run({name: examples[f"{number}/in/{name}"] for name in answer.inputs})
            for name in answer.outputs:
                worst = max(worst, moved(found[name], examples[f"{number}/out/{name}"]))
                if not worst <= MOVED_MAX:
                    raise _not_written(
                        "export_differs",
                        f"output {name!r} of the exported {where} is {worst:.2g} of its length away from the module's",
                        "look for what an exporter writes down as a constant: shapes, lengths, values read from tensors",
                    )
        session.close()
    except EngineFault as error:
        raise _not_written(
            "export_failed", f"the exported {where} does not run: {error.message}", "export it with other operators"
        ) from error
    return worst


def moved(found: Array, wanted: Array) -> float:
    """Return the distance of two arrays as a share of the second; infinite where they cannot be compared."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    one, two = found.astype(np.float64), wanted.astype(np.float64)
    differs = (one != two) & ~(np.isnan(one) & np.isnan(two))
    gap = float(np.linalg.norm(one[differs] - two[differs]))
    size = float(np.linalg.norm(two[np.isfinite(two)]))
    return (gap / size if size else gap) if np.isfinite(gap) else float("inf")


def _not_written(code: str, why: str, next_step: str) -> RefusedError:
    return RefusedError(code, why, consequence="nothing was written", next_step=next_step)


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
