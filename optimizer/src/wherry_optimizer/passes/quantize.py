"""Static int8 of an ONNX model in QDQ form, ranges from calibration data.

Only Conv, MatMul and Gemm by default: quantizing every operator ruins networks with softmax, sigmoid or norms, while
these three hold nearly all weights and time. Weights are symmetric int8 per channel, activations uint8 (U8S8, which is
the fastest on x86; choose `symmetric_activations` for Arm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import onnx

from wherry_optimizer.activations import SENSITIVITY_NODES_MAX, SENSITIVITY_SAMPLES, distance, run_all
from wherry_optimizer.model import drop_unread, prepare_float, sort_nodes
from wherry_optimizer.ort_quantizer import quantizing
from wherry_optimizer.passes import Array, Result, Work, excluded
from wherry_shared.errors import RefusedError

RECURRENT = "DynamicQuantizeLSTM"
"""What `quantize-recurrent` makes, which may come before: no operator that is quantized here."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to quantize and how."""

    operators: tuple[str, ...] = ("Conv", "MatMul", "Gemm")
    """`*`: every operator that onnxruntime can, which ruins many networks."""
    exclude: list[str] = []
    """Patterns of node names that stay float."""
    per_channel: bool = True
    symmetric_activations: bool = False
    reduce_range: bool = False
    """7-bit weights, for x86 CPUs whose 8-bit products saturate (AVX2 without VNNI)."""
    samples: int = 64
    """Calibration samples used at most."""
    ranges: Literal["minmax", "averaged"] = "minmax"
    """How ranges of activations are found: over all samples, or as a moving average of those of single ones, which outliers
    move less. Both take samples of any length; onnxruntime's percentile and entropy methods do not, and gained nothing."""
    rollback: int = 0
    """So many operators go back to float, those whose quantization moves the outputs most."""


class _Reader:
    """Feeds calibration samples to onnxruntime's calibrator, which asks for one after another."""

    def __init__(self, samples: Sequence[Mapping[str, Array]]) -> None:
        self._samples: Iterator[Mapping[str, Array]] = iter(samples)

    def get_next(self) -> dict[str, Array] | None:
        """Return the next sample, None at the end."""
        sample = next(self._samples, None)
        return None if sample is None else dict(sample)


def apply(path: Path, parameters: Parameters, work: Work) -> Result:
    """Quantize the model; see `passes.Pass`."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    prepared = prepare_float(path, but=(RECURRENT,))
    names = [node.name or f"wherry_node_{index}" for index, node in enumerate(prepared.graph.node)]
    for node, name in zip(prepared.graph.node, names, strict=True):
        node.name = name
    kept_float = [name for name in names if excluded(name, parameters.exclude)]
    CalibrationDataReader.register(_Reader)
    original = onnx.ModelProto()
    original.CopyFrom(prepared)  # the quantizer changes what it is given
    target = work.folder / "quantized.onnx"
    with quantizing(path):
        quantize_static(
            prepared,
            target,
            _Reader(work.calibration[: parameters.samples]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if "*" in parameters.operators else list(parameters.operators),
            per_channel=parameters.per_channel,
            reduce_range=parameters.reduce_range,
            activation_type=QuantType.QInt8 if parameters.symmetric_activations else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept_float,
            extra_options={
                "ActivationSymmetric": parameters.symmetric_activations,
                "CalibMovingAverage": parameters.ranges == "averaged",
            },
        )
    made = onnx.load(target)
    sort_nodes(made.graph)
    notes: dict[str, Any] = {}
    if parameters.rollback:
        made, notes = _roll_back(made, original, parameters, work)
    onnx.save(made, target)
    return Result(target, {**_notes(target, parameters, len(kept_float)), **notes})


def _roll_back(
    made: onnx.ModelProto, original: onnx.ModelProto, parameters: Parameters, work: Work
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Give the operators back to float whose quantization moves the outputs most, and tell what each one costs.

    Ranked by what giving back each one alone gains, as NNCF's accuracy control does, but on the outputs, so that no labels
    are looked at here.
    """
    before = {node.name: node for node in original.graph.node}
    nodes = [
        node.name
        for node in made.graph.node
        if node.name in before
        and ("*" in parameters.operators or node.op_type in parameters.operators)
        and list(node.input) != list(before[node.name].input)
    ][:SENSITIVITY_NODES_MAX]
    calls = list(work.calibration[:SENSITIVITY_SAMPLES])
    outputs = [output.name for output in original.graph.output]
    wanted = run_all(original, outputs, calls)
    ranked = sorted(
        (distance(run_all(_given_back(made, before, original, [name]), outputs, calls), wanted), name) for name in nodes
    )
    chosen = [name for _, name in ranked[: parameters.rollback]]
    rows = [{"layer": name[-80:], "output_error_without": round(error, 5)} for error, name in ranked]
    quantized = round(distance(run_all(made, outputs, calls), wanted), 5)
    return _given_back(made, before, original, chosen), {
        "output_error": quantized,
        "given_back": [name[-80:] for name in chosen],
        "sensitivity": rows,
    }


def _given_back(
    made: onnx.ModelProto, before: Mapping[str, onnx.NodeProto], original: onnx.ModelProto, names: Sequence[str]
) -> onnx.ModelProto:
    """Return a copy in which the named nodes read what they read before quantization."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    present = {tensor.name for tensor in copy.graph.initializer}
    for node in copy.graph.node:
        if node.name not in names:
            continue
        for index, name in enumerate(before[node.name].input):
            node.input[index] = name
            if name in weights and name not in present:
                copy.graph.initializer.append(weights[name])
                present.add(name)
    drop_unread(copy.graph)
    return copy


def _notes(target: Path, parameters: Parameters, excluded_nodes: int) -> dict[str, Any]:
    graph = onnx.load(target).graph
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    count = sum(
        1
        for node in graph.node
        if ("*" in parameters.operators or node.op_type in parameters.operators)
        and any(name in dequantized for name in node.input[:2])
    )
    if count == 0:
        raise RefusedError(
            "pass_noop",
            f"quantization changed nothing: no {', '.join(parameters.operators)} to quantize",
            consequence="the variant would be the source again",
            next_step="name operators that the model has, or take this pass out of the recipe",
        )
    return {"quantized_nodes": count, "excluded_nodes": excluded_nodes}
