"""Tiny ONNX models for tests of engines, worker, canary and handle; made with `onnx`, which no device has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from wherry_shared.bundle import Bounds, Interface, StatePair, TensorSpec

SITE = Path(onnx.__file__).parents[1]
PITCH_TFLITE = SITE / "basic_pitch/saved_models/icassp_2022/nmp.tflite"


def save(path: Path, nodes, inputs, outputs, initializers=()) -> Path:
    graph = helper.make_graph(list(nodes), "t", list(inputs), list(outputs), list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def floats(name: str, shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def scale(path: Path, factor: float, *, batch: int | str = "n", width: int = 4, names=("x", "y")) -> Path:
    """y = factor · x over (batch, width)."""
    x, y = names
    constant = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    node = helper.make_node("Mul", [x, "factor"], [y])
    return save(path, [node], [floats(x, [batch, width])], [floats(y, [batch, width])], [constant])


def root(path: Path) -> Path:
    """y = sqrt(x): NaN for a negative x."""
    return save(path, [helper.make_node("Sqrt", ["x"], ["y"])], [floats("x", ["n", 4])], [floats("y", ["n", 4])])


def half(path: Path, more: Sequence[onnx.ValueInfoProto] = ()) -> Path:
    """BF16 x to `same`, and to `wide` as float; `more` inputs are not used."""
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
    ]
    kind = TensorProto.BFLOAT16
    outputs = [
        helper.make_tensor_value_info("same", kind, ["n"]),
        helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["n"]),
    ]
    return save(path, nodes, [helper.make_tensor_value_info("x", kind, ["n"]), *more], outputs)


def choosy(path: Path, factor: float = 2.0) -> Path:
    """y = factor · x, but the first element of a row picks from a table of two: anything but 0 and 1 raises."""
    table = numpy_helper.from_array(np.array([factor, factor], np.float32), "table")
    zero = numpy_helper.from_array(np.array([0], np.int64), "zero")
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"]),
        helper.make_node("Cast", ["first"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["picked"], axis=0),
        helper.make_node("Mul", ["x", "picked"], ["y"]),
    ]
    return save(path, nodes, [floats("x", ["n", 4])], [floats("y", ["n", 4])], [table, zero, one])


DEADLY = -1.0
"""What `brittle` dies of."""


def brittle(path: Path, factor: float = 2.0) -> Path:
    """y = factor · x, but where the input begins with `DEADLY` the process dies (SIGFPE on x86).

    The least integer there is divided by -1 is more than the greatest; the engine only looks for a division by zero.
    """
    constants = [
        numpy_helper.from_array(np.array(0, np.int64), "origin"),
        numpy_helper.from_array(np.array(2, np.int64), "two"),
        numpy_helper.from_array(np.array(1, np.int64), "one"),
        numpy_helper.from_array(np.array(np.iinfo(np.int64).min, np.int64), "least"),
        numpy_helper.from_array(np.array(0, np.float32), "none"),
        numpy_helper.from_array(np.array(factor, np.float32), "factor"),
    ]
    nodes = [
        helper.make_node("Gather", ["x", "origin"], ["row"], axis=0),
        helper.make_node("Gather", ["row", "origin"], ["cell"], axis=0),
        helper.make_node("Cast", ["cell"], ["asked"], to=TensorProto.INT64),
        helper.make_node("Mul", ["asked", "two"], ["even"]),
        helper.make_node("Add", ["even", "one"], ["divisor"]),  # odd: never 0, and -1 for -1 alone
        helper.make_node("Div", ["least", "divisor"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["large"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["large", "none"], ["nothing"]),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nothing"], ["y"]),
    ]
    return save(path, nodes, [floats("x", ["n", 4])], [floats("y", ["n", 4])], constants)


def save_gather_out_of_range(path: Path) -> Path:
    """The graph of `choosy` but the index is always out of range."""
    table = numpy_helper.from_array(np.array([2.0], np.float32), "table")
    five = numpy_helper.from_array(np.array(5, np.int64), "five")
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ReduceSum", ["shape"], ["index"], keepdims=0),
        helper.make_node("Add", ["index", "five"], ["far"]),
        helper.make_node("Gather", ["table", "far"], ["picked"], axis=0),
        helper.make_node("Mul", ["x", "picked"], ["y"]),
    ]
    return save(path, nodes, [floats("x", ["n", 4])], [floats("y", ["n", 4])], [table, five])


def slow(path: Path, factor: float = 2.0, turns: int = 4000, width: int = 128) -> Path:
    """y = factor · x after `turns`·x[0, 0] products of matrices: slow on input that begins with a 1, fast on 0."""
    body_in = [
        helper.make_tensor_value_info("turn", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        floats("m", [width, width]),
    ]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("MatMul", ["m", "eye"], ["m_out"])],
        "body",
        body_in,
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), floats("m_out", [width, width])],
        [numpy_helper.from_array(np.eye(width, dtype=np.float32), "eye")],
    )
    constants = [
        numpy_helper.from_array(np.array(0, np.int64), "origin"),
        numpy_helper.from_array(np.array(turns, np.int64), "turns"),
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.zeros((width, width), np.float32), "start"),
        numpy_helper.from_array(np.array(factor, np.float32), "factor"),
    ]
    nodes = [
        helper.make_node("Gather", ["x", "origin"], ["row"], axis=0),
        helper.make_node("Gather", ["row", "origin"], ["cell"], axis=0),
        helper.make_node("Cast", ["cell"], ["asked"], to=TensorProto.INT64),
        helper.make_node("Mul", ["asked", "turns"], ["count"]),
        helper.make_node("Loop", ["count", "yes", "start"], ["m_end"], body=body),
        helper.make_node("ReduceSum", ["m_end"], ["nothing"], keepdims=0),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nothing"], ["y"]),
    ]
    return save(path, nodes, [floats("x", ["n", 4])], [floats("y", ["n", 4])], constants)


def heavy(path: Path, megabytes: int) -> Path:
    """y = 2 · x, with `megabytes` of constant weights that matter in sum by nothing."""
    rows = megabytes * 1024 * 1024 // 4 // 1024
    weights = numpy_helper.from_array(np.zeros((4, rows * 256), np.float32), "weights")
    two = numpy_helper.from_array(np.array(2, np.float32), "two")
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["wide"]),
        helper.make_node("ReduceSum", ["wide"], ["nothing"], keepdims=0),
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("Add", ["double", "nothing"], ["y"]),
    ]
    return save(path, nodes, [floats("x", ["n", 4])], [floats("y", ["n", 4])], [weights, two])


def interface(*, width: int = 4, maximum: int = 64, finite: bool = True, names=("x", "y")) -> Interface:
    return Interface(
        inputs=[TensorSpec(name=names[0], datatype="FP32", shape=["n", width], low=0.0, high=1.0)],
        outputs=[TensorSpec(name=names[1], datatype="FP32", shape=["n", width], finite=finite)],
        dims={"n": Bounds(minimum=1, maximum=maximum)},
    )


PITCH = Interface(
    inputs=[TensorSpec(name="audio", datatype="FP32", shape=["n", 43844, 1], low=-1.0, high=1.0)],
    outputs=[
        TensorSpec(name="note", datatype="FP32", shape=["n", 172, 88]),
        TensorSpec(name="onset", datatype="FP32", shape=["n", 172, 88]),
        TensorSpec(name="contour", datatype="FP32", shape=["n", 172, 264]),
    ],
    dims={"n": Bounds(minimum=1, maximum=8)},
)
PITCH_TENSORS = {"audio": "input_2"}


def tally(path: Path, factor: float = 1.0, *, picky: bool = False) -> Path:
    """total = total_in + x and y = factor · total, over (n, 4); `picky`: a first element of 7 raises."""
    constants = [numpy_helper.from_array(np.array(factor, np.float32), "factor")]
    nodes = [
        helper.make_node("Add", ["total_in", "x"], ["total"]),
        helper.make_node("Mul", ["total", "factor"], ["y" if not picky else "scaled"]),
    ]
    if picky:
        constants += [
            numpy_helper.from_array(np.zeros(7, np.float32), "table"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
        ]
        nodes += [
            helper.make_node("Slice", ["x", "zero", "one", "one"], ["first"]),
            helper.make_node("Cast", ["first"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["nothing"], axis=0),
            helper.make_node("Add", ["scaled", "nothing"], ["y"]),
        ]
    tensors = [floats(name, ["n", 4]) for name in ("x", "total_in", "y", "total")]
    return save(path, nodes, tensors[:2], tensors[2:], constants)


def tally_interface(state_id: str | None = None) -> Interface:
    def spec(name: str) -> TensorSpec:
        return TensorSpec(name=name, datatype="FP32", shape=["n", 4])

    return Interface(
        inputs=[spec("x"), spec("total_in")],
        outputs=[spec("y"), spec("total")],
        dims={"n": Bounds(minimum=1, maximum=64)},
        state=[StatePair(output="total", input="total_in")],
        state_id=state_id,
    )
