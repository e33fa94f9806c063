"""What the conformance tests of local serving share: models of every datatype, and a real worker that serves them.

The clients are tritonclient's, unchanged; they run in the test's process, never in the worker's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from onnx import TensorProto, helper
from tritonclient.utils import shared_memory as shm

from tests.agent.serving_kit import WorkerProcess, loadable, worker
from tests.shared.engines import models
from wherry_agent.children import Loadable, ServeModel
from wherry_shared.bundle import Bounds, Interface, TensorSpec
from wherry_shared.digest import of_file

KINDS = {
    "BOOL": (TensorProto.BOOL, np.array([True, False, True])),
    "UINT8": (TensorProto.UINT8, np.array([0, 7, 255], np.uint8)),
    "UINT16": (TensorProto.UINT16, np.array([0, 7, 65535], np.uint16)),
    "UINT32": (TensorProto.UINT32, np.array([0, 7, 2**32 - 1], np.uint32)),
    "UINT64": (TensorProto.UINT64, np.array([0, 7, 2**64 - 1], np.uint64)),
    "INT8": (TensorProto.INT8, np.array([-128, 0, 127], np.int8)),
    "INT16": (TensorProto.INT16, np.array([-32768, 0, 32767], np.int16)),
    "INT32": (TensorProto.INT32, np.array([-(2**31), 0, 2**31 - 1], np.int32)),
    "INT64": (TensorProto.INT64, np.array([-(2**63), 0, 2**63 - 1], np.int64)),
    "FP16": (TensorProto.FLOAT16, np.array([0.5, -2.0, 65504.0], np.float16)),
    "FP32": (TensorProto.FLOAT, np.array([0.1, -2.0, 3e38], np.float32)),
    "FP64": (TensorProto.DOUBLE, np.array([0.1, -2.0, 1e300], np.float64)),
    "BYTES": (TensorProto.STRING, np.array(["a", "", "grüße"], np.object_)),
}
"""Datatype → ONNX type, and values at its ends; served one input and one output each by the model `types`."""

HALF = np.array([0.5, -2.0, 3e38], ml_dtypes.bfloat16)
"""BF16, which the model `half` takes and gives."""

LABELS = ["cat", "dog", "bird", "fish"]


def types_model(folder: Path) -> Loadable:
    """Every datatype, input `in_X` to output `out_X`, unchanged."""
    nodes, inputs, outputs = [], [], []
    for name, (kind, _) in KINDS.items():
        nodes.append(helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]))
        inputs.append(helper.make_tensor_value_info(f"in_{name}", kind, ["n"]))
        outputs.append(helper.make_tensor_value_info(f"out_{name}", kind, ["n"]))
    path = models.save(folder / "types.onnx", nodes, inputs, outputs)
    interface = Interface(
        inputs=[TensorSpec(name=f"in_{name}", datatype=name, shape=["n"]) for name in KINDS],
        outputs=[TensorSpec(name=f"out_{name}", datatype=name, shape=["n"]) for name in KINDS],
        dims={"n": Bounds(minimum=1, maximum=64)},
    )
    return _plain(folder, "types", path, interface)


def picture_model(folder: Path) -> Loadable:
    """`picture`: the mean of each channel of images in NCHW, over three named classes."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    inputs, outputs = [models.floats("x", ["n", 3, 4, 4])], [models.floats("y", ["n", 3])]
    interface = Interface(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=["n", 3, 4, 4], layout="NCHW")],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=["n", 3], labels=LABELS[:3])],
        dims={"n": Bounds(minimum=1, maximum=8)},
    )
    return _plain(folder, "picture", models.save(folder / "picture.onnx", [node], inputs, outputs), interface)


def half_model(folder: Path) -> Loadable:
    """BF16 `x` to BF16 `same`, and to FP32 `wide`."""
    path = models.half(folder / "half.onnx")
    interface = Interface(
        inputs=[TensorSpec(name="x", datatype="BF16", shape=["n"])],
        outputs=[
            TensorSpec(name="same", datatype="BF16", shape=["n"]),
            TensorSpec(name="wide", datatype="FP32", shape=["n"]),
        ],
        dims={"n": Bounds(minimum=1, maximum=64)},
    )
    return _plain(folder, "half", path, interface)


def _plain(folder: Path, name: str, path: Path, interface: Interface) -> Loadable:
    """Return a loadable without golden vectors, which cannot hold every datatype."""
    return msgspec.structs.replace(
        loadable(models.scale(folder / "plain.onnx", 1.0)),
        model=name,
        target=f"{name}/1.0.0",
        path=str(path),
        digest=of_file(path),
        golden_path="",
        interface=interface,
    )


def labelled_model(folder: Path) -> Loadable:
    """`label`: y = 2 · x over four named classes."""
    interface = models.interface()
    named = msgspec.structs.replace(interface.outputs[0], labels=LABELS)
    return loadable(
        models.scale(folder / "label.onnx", 2.0),
        model="label",
        interface=msgspec.structs.replace(interface, outputs=[named]),
    )


def image_model(folder: Path) -> Loadable:
    """`image`: y = 2 · x over 150,000 floats (600 kB)."""
    return loadable(
        models.scale(folder / "image.onnx", 2.0, width=150_000),
        model="image",
        interface=models.interface(width=150_000),
    )


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[WorkerProcess]:
    """Serve `scale` (y = 2 · x), `types`, `half`, `picture`, `label` and `image`."""
    with worker(folder, **environment) as process:
        wanted = [
            loadable(models.scale(folder / "scale.onnx", 2.0)),
            types_model(folder),
            half_model(folder),
            picture_model(folder),
            labelled_model(folder),
            image_model(folder),
        ]
        served = process.serve(*[ServeModel(name=one.model, active=one) for one in wanted])
        assert all(one.ok for one in served), served
        yield process


@contextmanager
def region(name: str, byte_size: int) -> Iterator[Any]:
    """Make a shared memory object as a client does, and remove it."""
    made = shm.create_shared_memory_region(name, f"/{name}", byte_size)
    try:
        yield made
    finally:
        shm.destroy_shared_memory_region(made)
