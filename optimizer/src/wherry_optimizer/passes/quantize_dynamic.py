"""Dynamic int8 of an ONNX model: weights int8, ranges of activations taken anew at every call, so no calibration.

Only MatMul and Gemm by default. On convolutions it runs onnxruntime's ConvInteger, three to five times *slower* than float
on the CPUs that were measured, and it has ruined networks that quantize well otherwise; `operators` may still name them,
since a search should be able to see that for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx

from wherry_optimizer.activations import SENSITIVITY_NODES_MAX, SENSITIVITY_SAMPLES, distance, run_all
from wherry_optimizer.model import is_quantized, prepare_float, sort_nodes, subgraphs
from wherry_optimizer.ort_quantizer import quantizing
from wherry_optimizer.passes import Result, Work, excluded
from wherry_shared.errors import RefusedError


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to quantize and how."""

    operators: tuple[str, ...] = ("MatMul", "Gemm")
    """`*`: every operator that onnxruntime can."""
    exclude: list[str] = []
    """Patterns of node names that stay float."""
    per_channel: bool = True
    reduce_range: bool = False
    """7-bit weights, for x86 CPUs whose 8-bit products saturate (AVX2 without VNNI)."""
    rollback: int = 0
    """So many operators stay float, those whose quantization alone moves the outputs most (on calibration data)."""


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the model; see `passes.Pass`."""
    prepared = prepare_float(path)
    for index, node in enumerate(prepared.graph.node):
        node.name = node.name or f"wherry_node_{index}"
    own = [node.name for node in prepared.graph.node if excluded(node.name, parameters.exclude)]
    sensitivity = _sensitivity(path, prepared, parameters, own, work) if parameters.rollback else []
    given_back = [name for _, name in sensitivity[: parameters.rollback]]
    target = work.folder / "dynamic.onnx"
    made = _quantized(path, prepared, parameters, target, without=[*own, *given_back])
    onnx.save(made, target)
    count = sum(
        node.op_type.endswith("Integer") or node.op_type.startswith("DynamicQuantize")
        for graph in subgraphs(made.graph)
        for node in graph.node
    )
    if not is_quantized(made):
        raise RefusedError(
            "pass_noop",
            f"quantization changed nothing: no {', '.join(parameters.operators)} to quantize",
            consequence="the variant would be the source again",
            next_step="name operators that the model has, or take this pass out of the recipe",
        )
    notes: dict[str, Any] = {"quantized_nodes": count}
    if sensitivity:
        notes["given_back"] = [name[-80:] for name in given_back]
        notes["sensitivity"] = [{"layer": name[-80:], "output_error_alone": round(e, 5)} for e, name in sensitivity]
    return Result(target, notes)


def _quantized(
    path: Path,
    prepared: onnx.ModelProto,
    parameters: Parameters,
    target: Path,
    *,
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Quantize a copy: all nodes but some, or some only."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    copy = onnx.ModelProto()
    copy.CopyFrom(prepared)  # the quantizer changes what it is given
    with quantizing(path):
        quantize_dynamic(
            copy,
            target,
            op_types_to_quantize=None if "*" in parameters.operators else list(parameters.operators),
            per_channel=parameters.per_channel,
            reduce_range=parameters.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(without),
            nodes_to_quantize=None if only is None else list(only),
        )
    made = onnx.load(target)
    sort_nodes(made.graph)
    return made


def _sensitivity(
    path: Path, prepared: onnx.ModelProto, parameters: Parameters, without: Sequence[str], work: Work
) -> list[tuple[float, str]]:
    """Return (how far outputs move when this node alone is quantized, its name), the worst first."""
    weights = {tensor.name for tensor in prepared.graph.initializer}
    nodes = [
        node.name
        for node in prepared.graph.node
        if ("*" in parameters.operators or node.op_type in parameters.operators)
        and node.name not in without
        and any(name in weights for name in node.input[:2])
    ][:SENSITIVITY_NODES_MAX]
    calls = list(work.calibration[:SENSITIVITY_SAMPLES])
    names = [output.name for output in prepared.graph.output]
    wanted = run_all(prepared, names, calls)
    scratch = work.folder / "one.onnx"
    found = []
    for name in nodes:
        made = _quantized(path, prepared, parameters, scratch, only=[name])
        found.append((distance(run_all(made, names, calls), wanted), name))
    scratch.unlink(missing_ok=True)
    return sorted(found, reverse=True)
