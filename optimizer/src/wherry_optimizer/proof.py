"""How good the golden vectors of a bundle are: measured false alarms and misses.

A false alarm is a way to run a variant, of those at hand, in which it misses its own vectors: an honest device would refuse
it. A miss is a file with broken weights that passes them. Three ways of breaking are tried, each at places drawn by the seed: a
high bit of one weight turned, a slice of a weight zeroed, two slices exchanged. Digests catch all of that on the way to a
device; golden vectors stand for what digests cannot see, an engine or a CPU that computes something else, and this says how
fine a net they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from wherry_optimizer.golden import Runnable, configurations
from wherry_optimizer.model import subgraphs
from wherry_shared import golden
from wherry_shared.bundle import GOLDEN_TYPE, Descriptor, Format
from wherry_shared.engines import probe
from wherry_shared.errors import WherryError
from wherry_shared.facts import EngineFacts
from wherry_shared.image_layout import Layout

Array = npt.NDArray[Any]

KINDS = ("bit", "zeroed", "exchanged")
TRIES = 12
"""Broken files per variant, the kinds in turn."""
ELEMENTS_MIN = 64
"""Smaller weights are not broken: most of them are shapes and scales."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was measured of one variant."""

    variant: str
    ways: int
    """Engines, thread counts and optimization levels that it was run in."""
    false_alarms: list[str]
    """Ways in which it missed its own vectors."""
    broken: dict[str, tuple[int, int]]
    """Kind → (caught, tried)."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        broken = {kind: {"caught": caught, "tried": tried} for kind, (caught, tried) in self.broken.items()}
        return {"variant": self.variant, "ways": self.ways, "false_alarms": self.false_alarms, "broken": broken}


def prove(
    bundle: Path, *, tries: int = TRIES, seed: int = 0, engines: Sequence[EngineFacts] | None = None
) -> list[Proof]:
    """Measure the golden vectors of every variant of a bundle.

    Args:
        bundle: folder with an OCI image layout.
        tries: broken files per variant.
        seed: of the places that are broken.
        engines: those that work here; found by running them if they are not given.

    Raises:
        RefusedError: as `Layout.bundle`.
    """
    layout = Layout(bundle)
    config = layout.bundle()[2]
    engines = probe() if engines is None else engines
    found: list[Proof] = []
    for variant in config.variants:
        index = variant.golden
        descriptor = Descriptor(media_type=GOLDEN_TYPE, digest=index.digest, size=index.bytes)
        vectors = golden.decode(layout.read(descriptor, index.bytes))
        runnable = Runnable(
            id=variant.id,
            path=layout.path(variant.digest),
            format=variant.format,
            interface=config.interface,
            tensors=variant.tensors,
            batch=variant.batch,
            options=variant.options,
            engines=tuple(item.name for item in variant.engines),
            quantized=variant.precision.startswith("int"),
        )
        found.append(_prove_one(runnable, vectors, engines, tries, seed))
    return found


def _prove_one(
    runnable: Runnable, vectors: golden.Golden, engines: Sequence[EngineFacts], tries: int, seed: int
) -> Proof:
    ways = configurations(runnable, engines)
    alarms = []
    for way in ways:
        if not _passes(lambda way=way: runnable.open(way.engine, **dict(way.options)), vectors):  # type: ignore[misc]
            alarms.append(" ".join([way.engine, *(f"{key}={value}" for key, value in way.options)]))
    counts = {kind: [0, 0] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"broken.{runnable.format}"
        for kind, data in broken(runnable.path.read_bytes(), runnable.format, tries, seed):
            path.write_bytes(data)
            other = Runnable(
                **{name: getattr(runnable, name) for name in Runnable.__dataclass_fields__ if name != "path"}, path=path
            )
            counts[kind][1] += 1
            counts[kind][0] += not _passes(other.open, vectors)
    return Proof(runnable.id, len(ways), alarms, {kind: (caught, tried) for kind, (caught, tried) in counts.items()})


def _passes(open_: Callable[[], Any], vectors: golden.Golden) -> bool:
    """Tell whether a file loads, runs and gives what is expected."""
    try:
        bound = open_()
        misses = golden.check(vectors, bound.run)
        bound.close()
    except WherryError:
        return False
    return not misses


def broken(data: bytes, format_: Format, tries: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (kind, file) with one weight broken each; fewer where a model has hardly any weights."""
    rng = np.random.default_rng(seed)
    for number in range(tries):
        kind = KINDS[number % len(KINDS)]
        made = _broken_onnx(data, kind, rng) if format_ == "onnx" else _broken_tflite(data, kind, rng)
        if made is not None:
            yield kind, made


def break_weights(values: Array, kind: str, rng: np.random.Generator) -> Array:
    """Return a copy of a weight that is broken in one place, different from the original unless all its values are alike."""
    made = np.array(values)
    if kind == "bit":
        flat = made.reshape(-1).view(f"u{made.itemsize}")
        place = int(rng.integers(flat.size))
        flat[place] ^= flat.dtype.type(1 << (8 * made.itemsize - 2))
        return made
    rows = made.reshape(len(made), -1) if made.ndim > 1 and len(made) > 1 else made.reshape(-1, 1)
    one, two = rng.choice(len(rows), 2, replace=False)
    if kind == "zeroed":
        rows[one] = 0
    else:
        rows[[one, two]] = rows[[two, one]]
    return rows.reshape(made.shape)


def _draw(sizes: Sequence[int], rng: np.random.Generator) -> int:
    """Return an index, large weights more often."""
    weights = np.asarray(sizes, dtype=np.float64)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def _broken_onnx(data: bytes, kind: str, rng: np.random.Generator) -> bytes | None:
    model = onnx.load_from_string(data)
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
    tensors = [
        tensor
        for graph in subgraphs(model.graph)
        for tensor in (
            *graph.initializer,
            *(item.t for node in graph.node for item in node.attribute if item.type == onnx.AttributeProto.TENSOR),
        )
        if tensor.data_type in kinds and int(np.prod(tensor.dims)) >= ELEMENTS_MIN
    ]
    if not tensors:
        return None
    tensor = tensors[_draw([int(np.prod(one.dims)) for one in tensors], rng)]
    made = break_weights(numpy_helper.to_array(tensor), kind, rng)
    tensor.CopyFrom(numpy_helper.from_array(made, tensor.name))
    return bytes(model.SerializeToString())


def _broken_tflite(data: bytes, kind: str, rng: np.random.Generator) -> bytes | None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    types = {
        schema.TensorType.FLOAT32: np.float32,
        schema.TensorType.FLOAT16: np.float16,
        schema.TensorType.INT8: np.int8,
    }
    tensors = []
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            held = model.buffers[tensor.buffer].data
            size = int(np.prod(tensor.shape)) if tensor.shape is not None and len(tensor.shape) else 0
            if tensor.type in types and held is not None and size >= ELEMENTS_MIN:
                tensors.append((tensor, size))
    if not tensors:
        return None
    tensor, _ = tensors[_draw([size for _, size in tensors], rng)]
    buffer = model.buffers[tensor.buffer]
    values = np.asarray(buffer.data, dtype=np.uint8).view(types[tensor.type]).reshape(list(tensor.shape))
    buffer.data = np.ascontiguousarray(break_weights(values, kind, rng)).reshape(-1).view(np.uint8)
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
