"""ONNX becomes TFLite, by onnx2tf in an environment of its own, and is compared with what it was before anybody uses it.

    from wherry_optimizer.converting import to_tflite

    made = to_tflite(Path("model.onnx"), Path("model.tflite"))

The converter rewrites the file that it is given, turns image inputs over (channels last) and has its own idea of names, so it
gets a private copy with plain names and is told to keep every input as it is. Names are put back; they, datatypes and shapes
are checked afterwards, and the outputs on the same samples.
TFLite runs fastest with fixed shapes: the batch becomes one number, and so does every other axis that is free.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from wherry_optimizer import confined, environments
from wherry_optimizer import interface as interfaces
from wherry_optimizer.data.npz import read_arrays, split_samples
from wherry_optimizer.exporting import moved
from wherry_optimizer.making import Contract, check_tensors
from wherry_optimizer.model import load as load_model
from wherry_optimizer.model import prepare_float, subgraphs
from wherry_optimizer.recipe import Hints
from wherry_shared.engines import load
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]

TOOL = "onnx2tf"
SECONDS_MAX = 600.0
MEMORY_BYTES_MAX = 8 * 2**30
SAMPLES_MAX = 16
"""So many samples are compared at most, and so many are made up where there are none."""
ERROR_MAX = 1e-3
"""How far outputs may be from the ONNX file's: L2, as a share. What was measured is 1e-7 to 1e-6."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A TFLite file that answers as the ONNX one did."""

    path: Path
    shapes: dict[str, list[int]]
    """Of inputs, all fixed."""
    error: float
    """L2, as a share, the largest over outputs."""
    samples: int
    made_up: bool
    """They were drawn at random."""
    constant: tuple[str, ...]
    """Outputs that were the same for all samples, so that comparing them says little."""


def to_tflite(
    source: Path,
    target: Path,
    *,
    batch: int = 1,
    lengths: Mapping[str, int] | None = None,
    inputs: Path | None = None,
    command: Sequence[str | Path] | None = None,
    seconds_max: float = SECONDS_MAX,
    memory_bytes_max: int = MEMORY_BYTES_MAX,
    seed: int = 0,
) -> Converted:
    """Convert a float ONNX file.

    Args:
        source: is left as it is.
        target: the file to write.
        batch: the one length of the batch that the file will take.
        lengths: of other axes that are free, by the names that the interface gives them (`wherry-optimizer inspect`).
        inputs: samples to compare on, an `.npz` with an array per input; made up by default.
        command: what is run in place of the converter of `environments`.
        seconds_max: of the converter.
        memory_bytes_max: of the converter.
        seed: of samples that are made up.

    Raises:
        RefusedError: `environment_missing`, `convert_source`, `convert_shape`, `convert_crashed`, `convert_timeout`,
            `convert_memory`, `convert_nothing`, `contract_changed`, `convert_differs`, and what reading the files raises.
    """
    if load_model(source).format != "onnx":
        raise _refuse("convert_source", f"{source.name} is TFLite already", "use it as it is")
    program: list[str | Path] = list(command) if command is not None else [environments.find(TOOL), "-m", TOOL]
    with tempfile.TemporaryDirectory(prefix="wherry-convert-") as own:
        folder = Path(own)
        shapes, wanted = _fix(source, folder / "model.onnx", batch, dict(lengths or {}))
        samples, made_up = _samples(folder / "model.onnx", inputs, batch, seed)
        before = _run(folder / "model.onnx", "onnx", samples)
        out = folder / "out"
        # -kat: keep inputs as they are, which for images is not what it does by itself
        plain = _plain_names(folder / "model.onnx", folder / "plain.onnx")
        options: list[str | Path] = ["-i", folder / "plain.onnx", "-o", out, "-n", "-kat", *plain]
        ended = confined.run(
            [*program, *options],
            seconds_max=seconds_max,
            memory_bytes_max=memory_bytes_max,
            folder=folder,
            environment={"HOME": own, "TMPDIR": own, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        if ended.how != "well":
            raise _refuse(
                f"convert_{ended.how}",
                f"{TOOL} on {source.name}: {ended.why}",
                "it does not know every operator; try wherry-optimizer build with the pass simplify first, or ship ONNX",
            )
        found = next(iter(sorted(out.glob("*_float32.tflite"))), None)
        if found is None:
            raise _refuse("convert_nothing", f"{TOOL} ended well and wrote no float32 file", "ship the ONNX file")
        load_model(found)
        _put_names_back(found, plain)
        after = _checked(found, wanted, samples)
        error = _compare(before, after, source.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.read_bytes())
    constant = tuple(
        name
        for name in before[0]
        if len(before) > 1 and all(np.array_equal(before[0][name], row[name]) for row in before)
    )
    return Converted(target, shapes, error, len(samples), made_up, constant)


def _fix(source: Path, copy: Path, batch: int, lengths: dict[str, int]) -> tuple[dict[str, list[int]], Contract]:
    """Write a copy whose inputs have fixed shapes; return those, and the contract that the TFLite file has to keep."""
    model = prepare_float(source)
    interface = interfaces.derive(source, "onnx", {}, Hints()).interface
    shapes: dict[str, list[int]] = {}
    for spec in interface.inputs:
        known = {interfaces.BATCH: batch, **lengths}
        free = [axis for axis in spec.shape if isinstance(axis, str) and axis not in known]
        if free:
            raise _refuse(
                "convert_shape",
                f"input {spec.name!r} has axes of any length: {', '.join(free)}",
                f"say which length the TFLite file shall take: --length {free[0]}=N",
            )
        shapes[spec.name] = [known[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    for item in model.graph.input:
        for axis, length in zip(item.type.tensor_type.shape.dim, shapes[item.name], strict=True):
            axis.dim_value = length
    for item in model.graph.output:
        item.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    onnx.save(onnx.shape_inference.infer_shapes(model, data_prop=True), copy)
    session = load(copy, "onnx", options={"threads": 1})
    try:
        return shapes, session.describe()
    finally:
        session.close()


def _plain_names(source: Path, copy: Path) -> dict[str, str]:
    """Write a copy whose inputs and outputs are called by number; return what each was called."""
    model = onnx.load(source)
    tensors = [*model.graph.input, *model.graph.output]
    names = {item.name: f"wherry_{number}" for number, item in enumerate(tensors)}
    for item in tensors:
        item.name = names[item.name]
    for graph in subgraphs(model.graph):
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, copy)
    return {plain: name for name, plain in names.items()}


def _put_names_back(path: Path, names: Mapping[str, str]) -> None:
    """Call a TFLite file's inputs and outputs what they were called; what has another name keeps it, and is noticed."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    graph = model.subgraphs[0]
    told = [graph.tensors[index] for index in {*graph.inputs.tolist(), *graph.outputs.tolist()}]
    for signature in model.signatureDefs or []:
        told += [*signature.inputs, *signature.outputs]
    for item in told:
        item.name = names.get(item.name.decode(), item.name.decode())
    builder = flatbuffers.Builder(path.stat().st_size)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def _samples(path: Path, given: Path | None, batch: int, seed: int) -> tuple[list[dict[str, Array]], bool]:
    """Return calls of the fixed shapes: the first of the file's samples, or drawn from the interface's ranges."""
    interface = interfaces.derive(path, "onnx", {}, Hints()).interface
    if given is None:
        rng = np.random.default_rng(seed)
        return [interfaces.synthetic(interface, rng) for _ in range(SAMPLES_MAX)], True
    cut = split_samples(read_arrays(given), interface)
    calls = []
    for sample in cut[:SAMPLES_MAX]:
        call = {}
        for spec in interface.inputs:
            value = sample[spec.name]
            call[spec.name] = np.repeat(value, batch, 0) if value.ndim and len(value) == 1 < batch else value
        calls.append(call)
    return calls, False


def _run(path: Path, format_: Any, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    session = load(path, format_, options={"threads": 1})
    try:
        return [session.run(sample) for sample in samples]
    finally:
        session.close()


def _checked(path: Path, wanted: Contract, samples: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Return the answers of the TFLite file, if it has the contract of the other.

    Raises:
        RefusedError: `contract_changed`, or `convert_differs` where it does not run.
    """
    try:
        session = load(path, "tflite", options={"threads": 1})
        try:
            check_tensors(wanted, session.describe())
            return [session.run(sample) for sample in samples]
        finally:
            session.close()
    except EngineFault as error:
        raise _refuse(
            "convert_differs", f"the converted file does not run: {error.message}", "ship the ONNX file"
        ) from error


def _compare(before: Sequence[Mapping[str, Array]], after: Sequence[Mapping[str, Array]], name: str) -> float:
    """Return the largest distance of an output over all samples.

    Raises:
        RefusedError: `convert_differs`.
    """
    worst = 0.0
    for output in before[0]:
        one, two = (np.stack([np.asarray(row[output]) for row in rows]) for rows in (after, before))
        worst = max(worst, moved(one, two))
        if worst > ERROR_MAX:
            raise _refuse(
                "convert_differs",
                f"output {output!r} of the converted {name} is {worst:.2g} of its length away, at most {ERROR_MAX}",
                "ship the ONNX file, and tell the converter's authors",
            )
    return worst


def _refuse(code: str, why: str, next_step: str) -> RefusedError:
    return RefusedError(code, why, consequence="nothing was written", next_step=next_step)
