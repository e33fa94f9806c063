"""int8 of a TFLite model by ai-edge-quantizer: dynamic range, weights only, static, or dynamic range with 4-bit weights.

The tool reads operator codes from the field that newer converters write, and leaves a model whose converter wrote only the
older one silently as it was: to it, all operators are additions. It does not look behind DEQUANTIZE for weights that are
kept as float16 either, and calibrates by signature only. So the model is brought up to date first: codes in both fields,
float16 weights as float32, a signature of its own tensor names. What the tool gives is compared with what it got, since
there may be other reasons to change nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from wherry_optimizer.passes import Result, Work
from wherry_shared.errors import RefusedError

SHRINK_MIN = 0.02
"""A result that is not smaller by this share of the file counts as unchanged."""
SIGNATURE = b"serving_default"
FLOAT = {"algorithm_key": "no_quantize"}


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of the tool's recipes."""

    mode: Literal["dynamic", "weights", "static", "dynamic4"] = "dynamic"
    samples: int = 64
    """static: calibration samples used at most."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the model; see `passes.Pass`."""
    from ai_edge_quantizer import quantizer, recipe

    before = path.read_bytes()
    recipes = {
        "dynamic": recipe.dynamic_wi8_afp32,
        "weights": recipe.weight_only_wi8_afp32,
        "static": recipe.static_wi8_ai8,
        "dynamic4": recipe.dynamic_wi4_afp32,
    }
    current, notes = bring_up_to_date(before)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            tool = quantizer.Quantizer(bytearray(current))
            chosen = recipes[parameters.mode]()
            if parameters.mode == "static":  # inputs and outputs stay what applications know
                chosen = [*chosen, *(chosen[0] | {"operation": kind} | FLOAT for kind in ("INPUT", "OUTPUT"))]
            tool.load_quantization_recipe(chosen)
            ranges = _ranges(tool, current, work, parameters.samples) if parameters.mode == "static" else None
            quantized = tool.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
            after = bytes(quantized.quantized_model)
    except Exception as error:  # the tool raises ValueError, RuntimeError and its own
        raise RefusedError(
            "pass_failed",
            f"ai-edge-quantizer could not quantize {path.name}: {(str(error) or repr(error)).splitlines()[0]}",
            consequence="the variant was not made",
            next_step="try another recipe of the pass, or take it out",
        ) from error
    if len(after) > len(before) * (1 - SHRINK_MIN):
        raise RefusedError(
            "pass_noop",
            f"quantization changed nothing: {len(before)} bytes before, {len(after)} after",
            consequence="the variant would be the float model under another name",
            next_step="the model may be quantized already, or have no operator that ai-edge-quantizer knows",
        )
    target = work.folder / "quantized.tflite"
    target.write_bytes(after)
    return Result(target, {"mode": parameters.mode, **notes})


def bring_up_to_date(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a model as newer converters write it, and what had to be changed; unchanged bytes if nothing."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    notes: dict[str, Any] = {}
    old = [code for code in model.operatorCodes if code.builtinCode < code.deprecatedBuiltinCode]
    for code in old:
        code.builtinCode = code.deprecatedBuiltinCode
    if old:
        notes["operator_codes"] = len(old)
    folded = sum(_fold_halves(model, graph, schema) for graph in model.subgraphs)
    if folded:
        notes["float16_weights"] = folded
    if not model.signatureDefs:
        model.signatureDefs = [_signature(model.subgraphs[0], schema)]
        notes["signature"] = True
    if not notes:
        return data, notes
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output()), notes


def _fold_halves(model: Any, graph: Any, schema: Any) -> int:
    """Put float32 weights where a DEQUANTIZE of float16 ones stood; return how many."""
    kept = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        stored = graph.tensors[operator.inputs[0]] if code == schema.BuiltinOperator.DEQUANTIZE else None
        data = model.buffers[stored.buffer].data if stored is not None else None
        if stored is None or stored.type != schema.TensorType.FLOAT16 or data is None or not len(data):
            kept.append(operator)
            continue
        values = np.asarray(data, dtype=np.uint8).view(np.float16).astype(np.float32)
        if sum(tensor.buffer == stored.buffer for one in model.subgraphs for tensor in one.tensors) == 1:
            model.buffers[stored.buffer].data = None  # nobody reads the halves any more
        buffer = schema.BufferT()
        buffer.data = values.view(np.uint8)
        model.buffers.append(buffer)
        graph.tensors[operator.outputs[0]].buffer = len(model.buffers) - 1
    count = len(graph.operators) - len(kept)
    graph.operators = kept
    return count


def _signature(graph: Any, schema: Any) -> Any:
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
    signature.inputs = _maps(graph, graph.inputs, schema)
    signature.outputs = _maps(graph, graph.outputs, schema)
    return signature


def _maps(graph: Any, indices: Sequence[int], schema: Any) -> list[Any]:
    found = []
    for index in indices:
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = graph.tensors[index].name, int(index)
        found.append(entry)
    return found


def _ranges(tool: Any, data: bytes, work: Work, samples: int) -> Any:
    """Calibrate by the first signature, whose names may differ from those of the tensors."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    signature = model.signatureDefs[0]
    tensors = model.subgraphs[signature.subgraphIndex].tensors
    names = {}
    for entry in signature.inputs:
        names[tensors[entry.tensorIndex].name.decode()] = entry.name.decode()
    calls = [{names.get(name, name): value for name, value in call.items()} for call in work.calibration[:samples]]
    return tool.calibrate({signature.signatureKey.decode(): calls}, num_threads=1)
