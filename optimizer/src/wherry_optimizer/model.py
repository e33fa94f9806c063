"""A model file: what it is, whether it is whole, and an ONNX graph in the one shape that passes expect.

`load` looks at the content, never at the name. `prepare` gives an ONNX model whose weights are all initializers (some
exporters keep them in Constant nodes, where passes that go by initializers would see nothing) and whose opset is at
least 13 (per-channel quantization needs it). The source file itself is never changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import numpy_helper, version_converter

from wherry_shared import digest
from wherry_shared.bundle import Format
from wherry_shared.errors import RefusedError

OPSET_MIN = 7
"""The oldest opset that the version converter and onnxruntime still take."""
OPSET_MAX = 23
"""The newest opset that was tried with the passes here."""
OPSET_PREPARED = 13
AUTHOR_PROPERTY = "model_author"
"""ONNX's own name for it (its document on metadata properties). `producer_name` is the exporter, nobody's author."""
MODEL_BYTES_MAX = 2**31 - 1
"""A protobuf message, and a flatbuffer, end here."""
_TFLITE_IDENTIFIER = b"TFL3"
_TFLITE_HEADER_BYTES = 8
_OWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@dataclass(frozen=True, slots=True)
class Model:
    """A checked model file. `opset` is 0 for TFLite."""

    path: Path
    format: Format
    digest: str
    bytes: int
    opset: int = 0
    external: tuple[Path, ...] = field(default=())
    """Files beside an ONNX model that hold its weights."""


def load(path: Path) -> Model:
    """Check a model file.

    Raises:
        RefusedError: `model_missing`, `model_too_large`, `model_foreign` (neither ONNX nor TFLite), `model_corrupted`,
            `model_opset`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_TFLITE_HEADER_BYTES)
    except OSError as error:
        raise RefusedError(
            "model_missing", f"{path}: {error.strerror}", next_step="name an .onnx or .tflite file"
        ) from error
    if size > MODEL_BYTES_MAX:
        raise RefusedError(
            "model_too_large",
            f"{path.name} has {size} bytes, at most {MODEL_BYTES_MAX}",
            consequence="nothing was built",
            next_step="keep large weights beside the ONNX file (external data), or make the model smaller",
        )
    if head[4:8] == _TFLITE_IDENTIFIER:
        return _load_tflite(path, size)
    graph = read_onnx(path)
    external = _external_files(path)
    return Model(path, "onnx", digest.of_file(path), size, opset_of(graph), external)


def gathered(model: Model, folder: Path) -> Model:
    """Return a model as one file: itself, or a copy below a folder with the weights that stood beside it.

    Of a model in several files neither the digest nor the size of the first says what it is.

    Raises:
        RefusedError: `model_too_large`; or as `read_onnx`.
    """
    if not model.external:
        return model
    size = model.bytes + sum(file.stat().st_size for file in model.external)
    if size > MODEL_BYTES_MAX:
        raise RefusedError(
            "model_too_large",
            f"{model.path.name} has {size} bytes with the weights beside it, at most {MODEL_BYTES_MAX}",
            consequence="variants are files of their own, so nothing was tried",
            next_step="make the model smaller, or `wherry-optimizer pack` it as it is",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        whole = Path(own) / model.path.name
        onnx.save(read_onnx(model.path), whole)
        found = digest.of_file(whole)
        kept = folder / found.partition(":")[2] / model.path.name
        kept.parent.mkdir(exist_ok=True)
        whole.replace(kept)
    return Model(kept, model.format, found, kept.stat().st_size, model.opset)


def read_onnx(path: Path) -> onnx.ModelProto:
    """Parse and check an ONNX file.

    Raises:
        RefusedError: `model_foreign`, `model_corrupted`, `model_opset`.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has its own classes without types, and ValueError and OSError come as well
        raise _foreign(path) from error
    if not model.graph.node and not model.opset_import:
        raise _foreign(path)
    opset = opset_of(model)
    if not OPSET_MIN <= opset <= OPSET_MAX:
        raise RefusedError(
            "model_opset",
            f"{path.name} has opset {opset}, supported are {OPSET_MIN} to {OPSET_MAX}",
            next_step=f"export the model again with opset {OPSET_PREPARED} to {OPSET_MAX}",
        )
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=False)
    except Exception as error:  # as above, and the checker's own class
        raise RefusedError(
            "model_corrupted",
            f"{path.name} is ONNX but not whole: {str(error).splitlines()[0]}",
            next_step="export the model again",
        ) from error
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set, 0 if the model imports none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with weights as initializers and an opset of at least 13, checked.

    Raises:
        RefusedError: `model_opset` if the opset cannot be raised, `model_corrupted` if the result does not check.
    """
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    for graph in subgraphs(prepared.graph):
        _constants_to_initializers(graph)
        _copies_to_initializers(graph)
    _initializers_out_of_inputs(prepared.graph)
    opset = opset_of(prepared)
    if opset < OPSET_PREPARED:
        try:
            prepared = version_converter.convert_version(prepared, OPSET_PREPARED)
        except Exception as error:  # the converter is C++ and raises RuntimeError and its own classes
            raise RefusedError(
                "model_opset",
                f"opset {opset} cannot be raised to {OPSET_PREPARED}: {str(error).splitlines()[0]}",
                next_step=f"export the model again with opset {OPSET_PREPARED} or higher",
            ) from error
    try:
        onnx.checker.check_model(prepared)
    except onnx.checker.ValidationError as error:
        raise RefusedError(
            "model_corrupted",
            f"the prepared model does not check: {error}",
            consequence="nothing was built",
            next_step="run onnx.checker.check_model on the source, and export it again",
        ) from error
    return prepared


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all graphs within its nodes (the branches of If, the bodies of Loop and Scan), outermost first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from subgraphs(attribute.g)
            for inner in attribute.graphs:
                yield from subgraphs(inner)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes behind what they read, also what their subgraphs read from outside; tools have been seen to leave them otherwise."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    needs = [
        sorted(
            {
                makers[name]
                for inner in (node, *(one for below in _below(node) for one in below.node))
                for name in inner.input
                if name in makers and makers[name] != index
            }
        )
        for index, node in enumerate(graph.node)
    ]
    placed: dict[int, None] = {}
    for first in range(len(needs)):
        stack = [first]
        while stack:
            index = stack[-1]
            missing = [need for need in needs[index] if need not in placed]
            if not missing or index in placed:
                stack.pop()
                placed.setdefault(index)
            elif len(stack) > len(needs):
                return  # a cycle: the checker says so better than this could
            else:
                stack += missing
    nodes = [graph.node[index] for index in placed]
    if list(placed) != sorted(placed):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Take out nodes that nobody reads any more, and their weights."""
    while True:
        read = {output.name for output in graph.output}
        read |= {name for inner in subgraphs(graph) for node in inner.node for name in node.input}
        read |= {output.name for inner in subgraphs(graph) for output in inner.output}
        kept = [node for node in graph.node if any(name in read for name in node.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _below(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from subgraphs(attribute.g)


def author_of(model: Model) -> str:
    """Return whose work an ONNX file says that it is (`model_author` of the ONNX metadata), empty if it says nothing."""
    if model.format != "onnx":
        return ""
    properties = onnx.load(model.path, load_external_data=False).metadata_props
    return next((entry.value.strip() for entry in properties if entry.key == AUTHOR_PROPERTY), "")


def prepare_float(path: Path, *, but: Collection[str] = ()) -> onnx.ModelProto:
    """Return what `prepare` makes of an ONNX file that a pass can only take as float.

    Args:
        path: the file.
        but: quantized operators that the pass leaves alone.

    Raises:
        RefusedError: `already_quantized`, or as `read_onnx` and `prepare`.
    """
    return _prepare_unquantized(
        path,
        "holds quantized operators already",
        "take this pass out of the recipe, or name the float file as its source",
        but,
    )


def prepare_prunable(path: Path) -> onnx.ModelProto:
    """Return what `prepare` makes of an ONNX file that is to be pruned.

    Raises:
        RefusedError: `already_quantized`, or as `read_onnx` and `prepare`.
    """
    return _prepare_unquantized(
        path,
        "is quantized; prune before quantizing",
        "put the pruning pass before the quantizing one, or prune the float source",
    )


def _prepare_unquantized(path: Path, why: str, next_step: str, but: Collection[str] = ()) -> onnx.ModelProto:
    source = read_onnx(path)
    if is_quantized(source, but):
        raise RefusedError(
            "already_quantized",
            f"{path.name} {why}",
            consequence="the variant was not made",
            next_step=next_step,
        )
    return prepare(source)


def is_quantized(model: onnx.ModelProto, but: Collection[str] = ()) -> bool:
    """Tell whether the graph already holds quantized operators, others than some."""
    return any(
        node.op_type not in but
        and ("quant" in node.op_type.lower() or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"))
        for graph in subgraphs(model.graph)
        for node in graph.node
    )


def _load_tflite(path: Path, size: int) -> Model:
    from wherry_shared.engines import load as open_session
    from wherry_shared.engines.errors import EngineFault

    try:
        open_session(path, "tflite").close()
    except EngineFault as error:
        raise RefusedError(
            "model_corrupted",
            f"{path.name} looks like TFLite but does not load: {error.message}",
            consequence="nothing was built",
            next_step="convert or download it again; operators that only a delegate has cannot be delivered",
        ) from error
    return Model(path, "tflite", digest.of_file(path), size)


def _external_files(path: Path) -> tuple[Path, ...]:
    names: set[str] = set()
    for graph in subgraphs(onnx.load(path, load_external_data=False).graph):
        constants = (
            item.t for node in graph.node for item in node.attribute if item.type == onnx.AttributeProto.TENSOR
        )
        for tensor in (*graph.initializer, *constants):
            names |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return tuple(path.parent / name for name in sorted(names))


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        value = next((item.t for item in node.attribute if item.name == "value"), None)
        if node.op_type != "Constant" or node.domain not in _OWN_DOMAINS or value is None:
            kept.append(node)
            continue
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(value), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _copies_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn an Identity of a weight into that weight: some exporters hide what layers share behind one."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {item.name for item in graph.output}
    copied: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        origin = copied.get(node.input[0], node.input[0]) if node.op_type == "Identity" and node.input else ""
        if origin in weights and node.output[0] not in outputs:
            copied[node.output[0]] = origin
        else:
            kept.append(node)
    if not copied:
        return
    del graph.node[:]
    graph.node.extend(kept)
    for inner in subgraphs(graph):
        for node in inner.node:
            for index, name in enumerate(node.input):
                node.input[index] = copied.get(name, name)


def _initializers_out_of_inputs(graph: onnx.GraphProto) -> None:
    """Old exporters list weights among the inputs, which makes them overridable and keeps runtimes from folding them."""
    weights = {tensor.name for tensor in graph.initializer}
    kept = [item for item in graph.input if item.name not in weights]
    if len(kept) != len(graph.input):
        del graph.input[:]
        graph.input.extend(kept)


def _foreign(path: Path) -> RefusedError:
    empty = path.exists() and path.stat().st_size == 0
    return RefusedError(
        "model_foreign",
        f"{path.name} is {'empty' if empty else 'neither an ONNX nor a TFLite model'}",
        consequence="nothing was done with it",
        next_step="if it was copied or downloaded, compare its size with the original's, a file that was cut short looks like "
        "this; else export the model as ONNX (opset 13 or higher) or TFLite",
    )
