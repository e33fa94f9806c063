"""Models that pass every golden vector and are wrong in the field: what a trial is there for.

Both edits leave the answer of a model untouched except where the first element of its first row has a given value (for
`file-type`: files that begin with that byte). There, one makes the runtime raise, the other makes it slow.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SLOW_STEPS = 320
"""Matrix products that the slow branch computes one after the other."""
SLOW_WIDTH = 320
"""Rows and columns of each of them."""


def fails_on_first_value(model: onnx.ModelProto, value: int) -> onnx.ModelProto:
    """Return a copy that raises when the first element of any row is `value`, and answers the same otherwise.

    A table with one zero is read at index 0, or at index 7 where the value matches: out of bounds, which the runtime
    refuses. What was read is added to the first output.
    """
    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    graph = edited.graph
    names = _prepare(graph, value)
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), names["table"]))
    graph.initializer.append(numpy_helper.from_array(np.array(7, np.int64), names["far"]))
    graph.node.extend(
        [
            helper.make_node("Cast", [names["hit"]], [names["hit_index"]], to=TensorProto.INT64),
            helper.make_node("Mul", [names["hit_index"], names["far"]], [names["index"]]),
            helper.make_node("Gather", [names["table"], names["index"]], [names["term"]], axis=0),
        ]
    )
    _add_to_output(graph, names)
    return edited


def slow_on_first_value(model: onnx.ModelProto, value: int) -> onnx.ModelProto:
    """Return a copy that computes `SLOW_STEPS` products in vain when the first element of any row is `value`."""
    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    graph = edited.graph
    names = _prepare(graph, value)
    quick = helper.make_graph(
        [],
        "quick",
        [],
        [helper.make_tensor_value_info("wherry_quick_zero", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.array(0, np.float32), "wherry_quick_zero")],
    )
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["wherry_going"], ["wherry_going_on"]),
            helper.make_node("MatMul", ["wherry_square", "wherry_mixer"], ["wherry_next_square"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("wherry_step", TensorProto.INT64, []),
            helper.make_tensor_value_info("wherry_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("wherry_square", TensorProto.FLOAT, [SLOW_WIDTH, SLOW_WIDTH]),
        ],
        [
            helper.make_tensor_value_info("wherry_going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("wherry_next_square", TensorProto.FLOAT, [SLOW_WIDTH, SLOW_WIDTH]),
        ],
    )
    slow = helper.make_graph(
        [
            helper.make_node("Loop", ["wherry_steps", "wherry_true", "wherry_start"], ["wherry_end"], body=body),
            helper.make_node("ReduceMax", ["wherry_end"], ["wherry_top"], keepdims=0),
            helper.make_node("Mul", ["wherry_top", "wherry_nothing"], ["wherry_slow_zero"]),
        ],
        "slow",
        [],
        [helper.make_tensor_value_info("wherry_slow_zero", TensorProto.FLOAT, [])],
        [
            numpy_helper.from_array(np.array(SLOW_STEPS, np.int64), "wherry_steps"),
            numpy_helper.from_array(np.array(True), "wherry_true"),
            numpy_helper.from_array(np.full((SLOW_WIDTH, SLOW_WIDTH), 1e-3, np.float32), "wherry_start"),
            numpy_helper.from_array(np.array(0, np.float32), "wherry_nothing"),
        ],
    )
    mixer = np.full((SLOW_WIDTH, SLOW_WIDTH), 1 / SLOW_WIDTH, np.float32)
    graph.initializer.append(numpy_helper.from_array(mixer, "wherry_mixer"))
    graph.node.extend(
        [
            helper.make_node("Cast", [names["hit"]], [names["hit_index"]], to=TensorProto.INT32),
            helper.make_node("ReduceMax", [names["hit_index"]], [names["any_index"]], keepdims=0),
            helper.make_node("Cast", [names["any_index"]], [names["any"]], to=TensorProto.BOOL),
            helper.make_node("If", [names["any"]], [names["scalar"]], then_branch=slow, else_branch=quick),
            helper.make_node("Cast", [names["hit"]], [names["hit_float"]], to=TensorProto.FLOAT),
            helper.make_node("Mul", [names["hit_float"], names["scalar"]], [names["term"]]),
        ]
    )
    _add_to_output(graph, names)
    return edited


def _prepare(graph: onnx.GraphProto, value: int) -> dict[str, str]:
    """Add the nodes that find rows whose first element is `value`; return the names of everything added."""
    keys = (
        *("first", "zero", "value", "hit", "hit_index", "any_index", "any", "hit_float", "far", "table", "index"),
        *("scalar", "term", "column", "axis", "plain_output"),
    )
    names = {key: f"wherry_{key}" for key in keys}
    known = {item.name for item in graph.initializer}
    source = next(item for item in graph.input if item.name not in known)
    dtype = helper.tensor_dtype_to_np_dtype(source.type.tensor_type.elem_type)
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), names["zero"]))
    graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), names["value"]))
    graph.node.extend(
        [
            helper.make_node("Gather", [source.name, names["zero"]], [names["first"]], axis=1),
            helper.make_node("Equal", [names["first"], names["value"]], [names["hit"]]),
        ]
    )
    return names


def _add_to_output(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Add the per-row `term` (batch) to the first output (batch, …), under the output's old name."""
    output = graph.output[0]
    rank = len(output.type.tensor_type.shape.dim)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == output.name:
                node.output[index] = names["plain_output"]
        for index, name in enumerate(node.input):
            if name == output.name:
                node.input[index] = names["plain_output"]
    graph.initializer.append(numpy_helper.from_array(np.arange(1, rank, dtype=np.int64), names["axis"]))
    graph.node.extend(
        [
            helper.make_node("Unsqueeze", [names["term"], names["axis"]], [names["column"]]),
            helper.make_node("Add", [names["plain_output"], names["column"]], [output.name]),
        ]
    )
