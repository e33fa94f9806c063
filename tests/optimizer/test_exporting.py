"""An estimator that is exported is compared with itself; what the exporter does is played here, since it is an extra."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.optimizer.models import blobs, classifier
from wherry_optimizer.exporting import from_sklearn
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError


class Estimator:
    """Answers what the network of `classifier` answers, or something else."""

    def __init__(self, path: Path, shift: float = 0.0) -> None:
        self.session = load(path, "onnx")
        self.shift = shift

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self.session.run({"x": rows})["p"].astype(np.float64).reshape(-1) + self.shift


def exporter(monkeypatch: pytest.MonkeyPatch, give: Any) -> None:
    module = types.ModuleType("skl2onnx")
    module.to_onnx = give
    monkeypatch.setitem(sys.modules, "skl2onnx", module)


def test_an_estimator_is_written_and_answers_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = classifier(tmp_path / "m.onnx")
    exporter(monkeypatch, lambda *_, **__: onnx.load(path))
    made = from_sklearn(Estimator(path), blobs(50)[0], tmp_path / "out.onnx")
    assert made.exists()
    with pytest.raises(RefusedError) as caught:
        from_sklearn(Estimator(path, 0.1), blobs(50)[0], tmp_path / "other.onnx")
    assert caught.value.code == "export_differs"
    assert not (tmp_path / "other.onnx").exists()


def test_without_the_extra_and_for_unknown_estimators_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skl2onnx", None)
    with pytest.raises(RefusedError) as caught:
        from_sklearn(object(), blobs(5)[0], tmp_path / "out.onnx")
    assert caught.value.code == "extra_missing"

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no converter for it")

    exporter(monkeypatch, refuse)
    with pytest.raises(RefusedError, match="no converter") as caught:
        from_sklearn(object(), blobs(5)[0], tmp_path / "out.onnx")
    assert caught.value.code == "export_failed"
