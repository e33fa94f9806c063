"""Half precision of an ONNX model: float16 weights and arithmetic, float32 inputs and outputs as before.

Half the bytes at hardly any loss; on CPUs without float16 arithmetic it is not faster. By onnxruntime's converter:
that of onnxconverter-common wrote models that do not load for three of five that were tried.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import msgspec
import onnx

from wherry_optimizer.model import prepare_float
from wherry_optimizer.passes import Result, Work
from wherry_shared.errors import RefusedError


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stays float32."""

    keep: tuple[str, ...] = ()
    """Operator types that stay float32, beside those that the converter keeps by itself."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Convert the model; see `passes.Pass`."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    prepared = prepare_float(path)
    before = _floats(prepared.graph)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made = convert_float_to_float16(
                prepared, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *parameters.keep]
            )
    except Exception as error:  # shape inference and graph surgery of the converter raise what they meet
        raise RefusedError(
            "pass_failed",
            f"onnxruntime could not convert {path.name}: {(str(error) or repr(error)).splitlines()[0]}",
            consequence="the variant was not made",
            next_step="put `simplify` before it, or take this pass out of the recipe",
        ) from error
    after = _floats(made.graph)
    if not before or after >= before:
        raise RefusedError(
            "pass_noop",
            "half precision changed nothing: there are no float32 weights",
            consequence="the variant would be the source again",
            next_step="take this pass out of the recipe",
        )
    target = work.folder / "half.onnx"
    onnx.save(made, target)
    return Result(target, {"float32_elements_before": before, "float32_elements_after": after})


def _floats(graph: onnx.GraphProto) -> int:
    total = 0
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            size = 1
            for length in tensor.dims:
                size *= length
            total += size
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                total += _floats(attribute.g)
    return total
