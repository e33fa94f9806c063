"""What is exported is compared with itself; what the exporters do is played here, since they are extras."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.optimizer.models import blobs, classifier
from tests.services import lacks
from wherry_optimizer.cli import app
from wherry_optimizer.exporting import from_sklearn, from_torch
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


STAND_INS = Path(__file__).parent / "stand_ins"
"""A torch that the child process finds before any other, and functions that give its modules."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    return monkeypatch


def test_a_module_is_written_with_its_names_and_any_batch(
    tmp_path: Path, stand_in: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = from_torch("stand_in_networks:twice_named", tmp_path / "deep" / "m.onnx", folder=STAND_INS)
    assert (made.inputs, made.outputs, made.dynamic, made.exporter) == (("image",), ("scores",), True, "dynamo")
    session = load(made.path, "onnx")
    assert session.run({"image": np.ones((5, 6), np.float32)})["scores"].tolist() == [[2.0] * 6] * 5
    session.close()
    stand_in.setenv("WHERRY_STAND_IN", "only tracing")
    stand_in.chdir(STAND_INS)
    app(["export-torch", "stand_in_networks:one_at_a_time", "-o", str(tmp_path / "n.onnx")], standalone_mode=False)
    assert "image → output, shapes as in the examples, 0 from the module" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "asked", "code", "says"),
    [
        ("doubles", "control flow", "export_control_flow", "data-dependent expression"),
        ("doubles", "constant", "export_control_flow", "treated as a constant"),
        ("doubles", "operator", "export_operator", "aten::fancy"),
        ("doubles", "abort", "export_crashed", "SIGABRT"),
        ("trebles", "", "export_differs", "away from the module"),
        ("partly_training", "", "export_training", "inner is in training mode"),
        ("random", "", "export_random", "keeps a state"),
        ("raises", "", "export_raised", "no such luck"),
        ("missing", "", "export_raised", "no attribute"),
        ("no_module", "", "export_invalid", "gives int"),
        ("no_tensor", "", "export_invalid", "is int, no tensor"),
        ("unfit", "", "export_invalid", "do not fit"),
        ("no_output", "", "export_outputs", "gives str"),
    ],
)
def test_a_module_that_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, stand_in: pytest.MonkeyPatch, function: str, asked: str, code: str, says: str
) -> None:
    stand_in.setenv("WHERRY_STAND_IN", asked)
    with pytest.raises(RefusedError, match=says) as caught:
        from_torch(f"stand_in_networks:{function}", tmp_path / "m.onnx", folder=STAND_INS)
    assert caught.value.code == code
    assert not (tmp_path / "m.onnx").exists()


def test_an_export_that_hangs_is_ended_and_one_without_torch_says_what_to_install(
    tmp_path: Path, stand_in: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedError, match="more than 1 s") as caught:
        from_torch("stand_in_networks:sleeps", tmp_path / "m.onnx", folder=STAND_INS, seconds_max=1.0)
    assert caught.value.code == "export_timeout"
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    stand_in.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RefusedError, match=r"wherry-optimizer\[torch\]|no torch here") as caught:
        from_torch("stand_in_networks:doubles", tmp_path / "m.onnx", folder=STAND_INS)
    assert caught.value.code == "extra_missing"


REAL = """
import torch

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.drop, self.out = torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)

    def forward(self, image):
        return {"scores": self.out(self.drop(torch.relu(self.norm(self.conv(image))).mean((2, 3)))), "image_mean": image.mean()}

class Branches(Small):
    def forward(self, image):
        return image * 2 if image.sum() > 0 else image - 1

class Decomposes(Small):
    def forward(self, image):
        return torch.linalg.svd(image)[1]

def small():
    return Small().eval(), torch.randn(1, 3, 8, 8)

def branches():
    return Branches().eval(), torch.randn(2, 3, 8, 8)

def decomposes():
    return Decomposes().eval(), torch.randn(2, 3, 8, 8)
"""


@pytest.mark.soak
def test_a_real_torch_exports_and_refuses(tmp_path: Path) -> None:
    """With the Python that `WHERRY_TORCH_PYTHON` names, or this one."""
    python = os.environ.get("WHERRY_TORCH_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, onnxscript"], capture_output=True).returncode:
        lacks("not installed: torch and onnxscript")
    (tmp_path / "real_networks.py").write_text(REAL)
    made = from_torch("real_networks:small", tmp_path / "m.onnx", folder=tmp_path, python=Path(python))
    assert made.inputs == ("image",)
    assert made.outputs == ("scores", "image_mean")
    for function, code in (("branches", "export_control_flow"), ("decomposes", "export_operator")):
        with pytest.raises(RefusedError) as caught:
            from_torch(f"real_networks:{function}", tmp_path / "n.onnx", folder=tmp_path, python=Path(python))
        assert caught.value.code == code
