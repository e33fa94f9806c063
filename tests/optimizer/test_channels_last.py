"""Image models whose channels come last: their data, their passes, and the processing that applications are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.optimizer.models import bright, channels_last
from wherry_optimizer import attempt, labelled, metrics
from wherry_optimizer.attempt import Step, Task
from wherry_optimizer.auto import make_problem
from wherry_optimizer.interface import derive, layout_of
from wherry_optimizer.model import load
from wherry_optimizer.pack import pack_model
from wherry_optimizer.recipe import Hints
from wherry_shared.bundle import TensorSpec
from wherry_shared.errors import RefusedError


@pytest.mark.parametrize(
    ("shape", "declared", "layout"),
    [
        (["batch", 8, 8, 3], None, "NHWC"),
        (["batch", 76, 32, 1], None, "NHWC"),
        (["batch", "h", "w", 4], None, "NHWC"),
        (["batch", 1, 28, 28], None, "NCHW"),
        (["batch", 3, "h", "w"], None, "NCHW"),
        (["batch", 3, 224, 3], None, ""),
        (["batch", 3, 224, 3], "NHWC", "NHWC"),
        (["batch", 16, 16, 8], None, ""),
        (["batch", 48, 3], None, ""),
    ],
)
def test_the_end_that_has_a_number_of_channels_has_the_channels(shape: list, declared: str | None, layout: str) -> None:
    assert layout_of(TensorSpec(name="image", datatype="FP32", shape=shape, layout=declared)) == layout


def test_channels_are_pruned_and_quantized_on_images_from_a_folder(tmp_path: Path) -> None:
    path = channels_last(tmp_path / "m.onnx")
    images, labels = bright(150, seed=7)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "data" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", image)
    parts = labelled.load(str(tmp_path / "data"), derive(path, "onnx", {}, Hints()).interface)
    problem = make_problem(load(path), parts, metrics.MetricOf(name="accuracy"), {}, 0)
    where = str(attempt.write_problem(problem, tmp_path))
    pruning = Step(use="prune-channels", parameters={"ratio": 0.25, "minimum_channels": 4})
    rows = [
        attempt.attempt(Task(problem=where, cache=str(tmp_path / "cache"), steps=steps))
        for steps in ([], [pruning, Step(use="quantize-static")])
    ]
    assert not rows[1].code, rows[1].why
    assert np.mean(rows[0].evidence) > 0.9
    assert np.mean(rows[1].evidence) > 0.85
    assert rows[1].bytes < 0.5 * rows[0].bytes
    kept = {tuple(item.dims)[:2] for item in onnx.load(rows[1].path).graph.initializer if len(item.dims) == 4}
    assert kept == {(18, 3), (18, 18)}


CHAIN = """
[[preprocess.operations]]
op = "resize"
height = 8
width = 8
method = "area"
[[preprocess.operations]]
op = "layout"
from = "HWC"
to = "NHWC"
[interface.inputs.image]
low = 0.0
high = 1.0
"""


@pytest.mark.parametrize("to", ["NHWC", "NCHW"])
def test_a_declared_chain_has_to_end_where_the_model_has_its_channels(tmp_path: Path, to: str) -> None:
    path = channels_last(tmp_path / "m.onnx")
    (tmp_path / "use.toml").write_text(CHAIN.replace('to = "NHWC"', f'to = "{to}"'))
    terms = {"name": "bright", "version": "1.0.0", "licence": "MIT", "attribution": "me", "output": tmp_path}
    if to == "NHWC":
        packed = pack_model(path, processing=tmp_path / "use.toml", **terms)
        assert packed.config.interface.inputs[0].shape == ["batch", 8, 8, 3]
        assert packed.config.preprocess.operations[-1].parameters["to"] == "NHWC"
        return
    with pytest.raises(RefusedError, match="gives 'image' as NCHW, the model takes NHWC") as caught:
        pack_model(path, processing=tmp_path / "use.toml", **terms)
    assert caught.value.code == "processing_layout"
    assert not (tmp_path / "bright-1.0.0").exists()
