"""Packing: variants, golden vectors, licence and provenance become a bundle in an OCI image layout.

`write_bundle` is the one writer. `pack_model` makes a bundle of one model as it is, without labels; `repack` makes a new
version of a bundle with other model files but the same golden vectors, which those files must pass.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wherry_optimizer import assets, measure
from wherry_optimizer import interface as interfaces
from wherry_optimizer.data import check_samples
from wherry_optimizer.data.npz import first_texts, read_arrays, split_samples
from wherry_optimizer.golden import Chosen, Runnable, budget, select
from wherry_optimizer.model import Model, author_of, load, read_onnx
from wherry_optimizer.precision import FLOAT, precision_of
from wherry_optimizer.recipe import Hints, ProcessingFile, read_processing
from wherry_shared import bundle, golden, limits, operations, statements
from wherry_shared import licence as licences
from wherry_shared.bundle import (
    Accuracy,
    Assets,
    Config,
    Descriptor,
    EngineName,
    EngineRange,
    Figures,
    GoldenIndex,
    Interface,
    Licence,
    Manifest,
    Processing,
    Provenance,
    Variant,
)
from wherry_shared.digest import of_file
from wherry_shared.engines import ENGINES, probe
from wherry_shared.errors import RefusedError
from wherry_shared.facts import EngineFacts
from wherry_shared.ids import check_name, parse_version
from wherry_shared.image_layout import SIGNED, Layout, LayoutWriter

ENGINE_FLOORS: dict[EngineName, str] = {"onnxruntime": "1.20", "ai-edge-litert": "2.1", "tflite-runtime": "2.14"}
"""The oldest versions that the agent's extras allow."""
OPSET_OF_ORT_FLOOR = 21
IR_OF_ORT_FLOOR = 10
"""onnxruntime 1.20 runs every model up to these; a newer one asks for the version it was built with."""
TOOLS = ("wherry-optimizer", "onnx", "onnxruntime", "onnxslim", "ai-edge-quantizer", "ai-edge-litert", "numpy")
NO_PROCESSING = Processing()
UNSTATED = "not stated"
"""Attribution of a model whose file names nobody, packed by somebody who named nobody either."""
SYNTHETIC_CANDIDATES = 12
SYNTHETIC_VECTORS = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """One variant, ready to be packed."""

    runnable: Runnable
    precision: str
    golden: Chosen
    synthetic: bool
    download_bytes: int
    passes: tuple[str, ...] = ()
    figures: Mapping[str, Figures] | None = None
    memory_bytes: int = 0
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """A bundle on disk."""

    path: Path
    model: str
    version: str
    digest: str
    """Of the manifest: what is signed and what offers name."""
    config: Config
    unseparated: tuple[tuple[str, str], ...] = ()
    synthetic: bool = False


def write_bundle(
    output: Path,
    *,
    name: str,
    version: str,
    interface: Interface,
    pieces: Sequence[Piece],
    licence: Licence,
    licence_text: bytes | None,
    provenance: Provenance,
    engines: Sequence[EngineFacts],
    description: str = "",
    preprocess: Processing = NO_PROCESSING,
    postprocess: Processing = NO_PROCESSING,
    files: tuple[Assets, bytes] | None = None,
    unseparated: Sequence[tuple[str, str]] = (),
) -> Packed:
    """Write a bundle to `output`/NAME-VERSION (or to `output`, if that is its name already).

    An older one of that name is replaced when the new one is whole; one that is signed, or a folder that is no bundle, is not
    touched.

    Raises:
        RefusedError: `bad_name`, `bad_version`, `licence_missing`, `output_taken`, `output_signed`, `operation_*`, or `config_invalid` for
            values that no reader would take.
    """
    check_name(name, "name")
    parse_version(version)
    interfaces.check_layouts(operations.steps_of(preprocess, interface, "preprocess"), interface)
    operations.steps_of(postprocess, interface, "postprocess")
    target = check_target(output, name, version)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes it private; a bundle is to be copied
        writer = LayoutWriter(folder)
        layers: list[Descriptor] = []
        variants: list[Variant] = []
        for piece in pieces:
            mark = {bundle.ANNOTATION_VARIANT: piece.runnable.id}
            weights = writer.add_file(
                piece.runnable.path,
                bundle.WEIGHT_TYPE,
                {**mark, bundle.ANNOTATION_PATH: f"{piece.runnable.id}.{piece.runnable.format}"},
            )
            vectors = writer.add_bytes(piece.golden.encoded, bundle.GOLDEN_TYPE, mark)
            layers += [weights, vectors]
            variants.append(_variant(piece, weights, vectors, engines))
        if files is not None:
            layers.append(writer.add_bytes(files[1], bundle.ASSETS_TYPE))
        text = licence_text or _licence_note(licence)
        layers.append(writer.add_bytes(text, bundle.DOC_TYPE, {bundle.ANNOTATION_PATH: "LICENSE"}))
        config = Config(
            format=bundle.FORMAT,
            model=name,
            version=version,
            interface=interface,
            variants=variants,
            licence=licence,
            provenance=provenance,
            description=description,
            assets=files[0] if files is not None else None,
            preprocess=operations.named(preprocess, "preprocess"),
            postprocess=operations.named(postprocess, "postprocess"),
        )
        return _finish(writer, config, layers, target, unseparated)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(output: Path, name: str, version: str) -> Path:
    """Return the folder of a bundle that is to be written.

    Raises:
        RefusedError: `output_taken`, or `output_signed`: what a signature names never changes, so a new bundle in its place
            could neither be signed nor pushed.
    """
    target = output if output.name == f"{name}-{version}" else output / f"{name}-{version}"
    if target.exists() and not (target / "oci-layout").is_file():
        raise RefusedError(
            "output_taken",
            f"{target} exists and is no bundle",
            consequence="nothing was written",
            next_step="choose another folder by --output",
        )
    if (target / SIGNED).is_dir():
        raise RefusedError(
            "output_signed",
            f"{target} holds {name} {version} as it was signed",
            consequence="nothing was written: a signed version stays what it is, and servers refuse another one of its name",
            next_step="raise the version; or choose another folder by --output to look at the result without releasing it",
        )
    return target


def pack_model(
    path: Path,
    *,
    name: str,
    version: str,
    licence: str,
    output: Path,
    attribution: str = "",
    source: str = "",
    inputs: Path | None = None,
    tensors: Mapping[str, str] | None = None,
    hints: Hints | None = None,
    description: str = "",
    processing: Path | None = None,
    files: Mapping[str, Path] | None = None,
    seed: int = 0,
) -> Packed:
    """Make a bundle of one model as it is, without labels.

    Args:
        path: an ONNX or TFLite file.
        name: of the model.
        version: SemVer.
        licence: SPDX expression or `LicenseRef-…`.
        output: folder in which `NAME-VERSION` is made.
        attribution: whose work it is, as their licence wants them named; by default what the file itself says, else
            `UNSTATED`: nobody's name is made up.
        source: where it comes from; by default the file's name.
        inputs: `.npz` with an array per input, samples along axis 0; without it golden vectors are drawn from the
            interface's ranges and marked synthetic.
        tensors: canonical → native names.
        hints: ranges, labels and bounds that the file cannot say.
        description: free text.
        processing: TOML with `[preprocess]`, `[postprocess]` and `[interface]`, as in a recipe; `hints` win over the last.
        files: assets of this version: name → file.
        seed: of synthetic vectors.

    Raises:
        RefusedError: `model_*`, `interface_*`, `data_*`, `licence_*`, `bad_name`, `bad_version`, `golden_*`.
    """
    check_name(name, "name")
    parse_version(version)
    licences.check_known(licence)
    check_target(output, name, version)
    said = read_processing(processing) if processing is not None else ProcessingFile()
    packed_files = assets.layer(files) if files else None
    model = load(path)
    attribution = attribution.strip() or author_of(model) or UNSTATED
    precision = precision_of(model)
    key = "float" if precision.name == FLOAT else precision.name
    arrays = read_arrays(inputs) if inputs is not None else None
    fitted = interfaces.derive(
        path, model.format, tensors or {}, hints or said.interface, first_texts(arrays) if arrays is not None else None
    )
    candidates: list[dict[str, interfaces.Array]]
    if arrays is not None:
        candidates = split_samples(arrays, fitted.interface)
        if not candidates:
            raise RefusedError(
                "data_short",
                f"{inputs} holds no sample",
                consequence="nothing could be proved by them, so nothing was packed",
                next_step="put samples along axis 0 of its arrays, or leave --inputs out: then they are made up",
            )
        fitted = interfaces.widened(fitted, candidates)
        check_samples(candidates, fitted.interface, "golden")
        candidates = candidates[: limits.GOLDEN_VECTORS_MAX * 2]
    else:
        rng = np.random.default_rng(seed)
        candidates = [interfaces.synthetic(fitted.interface, rng) for _ in range(SYNTHETIC_CANDIDATES)]
    with single_file(model) as whole:
        runnable = Runnable(
            id=key,
            path=whole,
            format=model.format,
            interface=fitted.interface,
            tensors=fitted.tensors,
            batch=fitted.batch,
            options={},
            engines=engines_of(model),
            quantized=precision.quantized,
        )
        engines = probe([engine for engine, formats in ENGINES.items() if model.format in formats])
        chosen = select(
            [runnable],
            candidates,
            engines,
            vectors=min(len(candidates), SYNTHETIC_VECTORS if inputs is None else limits.GOLDEN_VECTORS_MAX),
            sampled_above=4096,
            synthetic=inputs is None,
            budgets={key: budget(whole.stat().st_size)},
        )
        piece = Piece(
            runnable,
            precision.name,
            chosen.by_variant[key],
            synthetic=inputs is None,
            download_bytes=measure.download_bytes(whole),
        )
        return write_bundle(
            output,
            name=name,
            version=version,
            interface=fitted.interface,
            pieces=[piece],
            licence=Licence(expression=licence, source=source or path.name, attribution=attribution),
            licence_text=None,
            provenance=provenance({"source": model}, data={} if inputs is None else {"inputs": of_file(inputs)}),
            engines=engines,
            description=description,
            preprocess=said.preprocess.chain("preprocess"),
            postprocess=said.postprocess.chain("postprocess"),
            files=packed_files,
        )


def repack(
    base: Path,
    output: Path,
    *,
    version: str,
    files: Mapping[str, Path],
    description: str = "",
    prove: bool = True,
    weigh: bool = True,
    engines: Sequence[EngineFacts] | None = None,
) -> Packed:
    """Make another version of a bundle: the named variants get new files, their golden vectors stay, the rest goes.

    Figures, accuracy and passes are dropped, since they were measured on other files.

    Args:
        base: a bundle.
        output: folder in which `NAME-VERSION` is made.
        version: of the new bundle.
        files: variant id → new model file of the same format.
        description: free text.
        prove: run the golden vectors on the new files.
        weigh: compress the new files, which takes long, to tell their download bytes.
        engines: those that work here; found by running them if they are not given.

    Raises:
        RefusedError: `variant_missing`, `golden_miss` if a new file misses a golden vector, and as `Layout.bundle`.
    """
    layout = Layout(base)
    _, manifest, old = layout.bundle()
    texts = [
        layout.read(layer, limits.CONFIG_BYTES_MAX) for layer in manifest.layers if layer.media_type == bundle.DOC_TYPE
    ]
    known = {variant.id: variant for variant in old.variants}
    stray = sorted(set(files) - set(known))
    if stray or not files:
        raise RefusedError(
            "variant_missing",
            f"the bundle has no variant {', '.join(stray) or '(none named)'}",
            next_step="see inspect",
        )
    engines = probe() if engines is None else engines
    pieces: list[Piece] = []
    for key, path in files.items():
        variant = known[key]
        descriptor = Descriptor(media_type=bundle.GOLDEN_TYPE, digest=variant.golden.digest, size=variant.golden.bytes)
        encoded = layout.read(descriptor, variant.golden.bytes)
        runnable = Runnable(
            id=key,
            path=path,
            format=variant.format,
            interface=old.interface,
            tensors=variant.tensors,
            batch=variant.batch,
            options=variant.options,
            engines=tuple(item.name for item in variant.engines),
        )
        if prove:
            misses = golden.check(golden.decode(encoded), runnable.open().run)
            if misses:
                raise RefusedError(
                    "golden_miss",
                    f"variant {key!r}: {misses[0]}",
                    consequence="nothing was packed",
                    next_step="give the file that the golden vectors are of, or pack the new one by `pack` with vectors of its own",
                )
        chosen = Chosen(encoded, variant.golden.vectors, [], runnable.engines, {})
        pieces.append(
            Piece(
                runnable,
                variant.precision,
                chosen,
                variant.golden.synthetic,
                measure.download_bytes(path) if weigh else 0,
            )
        )
    return write_bundle(
        output,
        name=old.model,
        version=version,
        interface=old.interface,
        pieces=pieces,
        licence=old.licence,
        licence_text=texts[0] if texts else None,
        provenance=Provenance(
            source_digests={key: of_file(path) for key, path in files.items()},
            tools=measure.tools(TOOLS),
            created_at=time.time_ns() // 1000,
        ),
        engines=engines,
        description=description or f"repacked from {old.version}",
        preprocess=old.preprocess,
        postprocess=old.postprocess,
        files=_assets_of(layout, old),
    )


@contextlib.contextmanager
def single_file(model: Model) -> Iterator[Path]:
    """Give a model as one file: itself, or a temporary copy with the weights that stood beside it."""
    if not model.external:
        yield model.path
        return
    import onnx

    with tempfile.TemporaryDirectory(prefix="wherry-model-") as folder:
        target = Path(folder) / "model.onnx"
        onnx.save(read_onnx(model.path), target)
        yield target


def engines_of(model: Model) -> tuple[EngineName, ...]:
    """Return the engines that run the format of a model, in order of preference."""
    names: tuple[EngineName, ...] = ("onnxruntime",) if model.format == "onnx" else ("ai-edge-litert", "tflite-runtime")
    return names


def provenance(
    sources: Mapping[str, Model],
    *,
    recipe_digest: str | None = None,
    data: Mapping[str, str] | None = None,
    refused: Sequence[dict[str, object]] = (),
) -> Provenance:
    """Return what went in and what made it; files beside an ONNX model count as sources of their own."""
    digests = {key: model.digest for key, model in sources.items()}
    for key, model in sources.items():
        digests |= {f"{key}/{file.name}": of_file(file) for file in model.external}
    return Provenance(
        source_digests=digests,
        recipe_digest=recipe_digest,
        data_digests=dict(data or {}),
        tools=measure.tools(TOOLS),
        created_at=time.time_ns() // 1000,
        refused=list(refused),
    )


def _variant(piece: Piece, weights: Descriptor, vectors: Descriptor, engines: Sequence[EngineFacts]) -> Variant:
    runnable = piece.runnable
    return Variant(
        id=runnable.id,
        digest=weights.digest,
        bytes=weights.size,
        format=runnable.format,
        precision=piece.precision,
        engines=[EngineRange(name=name, minimum=_minimum(name, runnable, engines)) for name in piece.golden.engines],
        golden=GoldenIndex(
            digest=vectors.digest,
            bytes=vectors.size,
            vectors=piece.golden.vectors,
            synthetic=piece.synthetic,
            separates=piece.golden.separates,
        ),
        needs=bundle.Needs(memory_bytes=piece.memory_bytes),
        tensors=runnable.tensors,
        options=runnable.options,
        batch=runnable.batch,
        passes=list(piece.passes),
        download_bytes=piece.download_bytes,
        figures=dict(piece.figures or {}),
        accuracy=piece.accuracy,
    )


def _minimum(name: EngineName, runnable: Runnable, engines: Sequence[EngineFacts]) -> str:
    if name != "onnxruntime":
        return ENGINE_FLOORS[name]
    graph = read_onnx(runnable.path)
    newest = max((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if newest <= OPSET_OF_ORT_FLOOR and graph.ir_version <= IR_OF_ORT_FLOOR:
        return ENGINE_FLOORS[name]
    here = next((facts.version for facts in engines if facts.name == name), ENGINE_FLOORS[name])
    return ".".join(here.split(".")[:2])


def _assets_of(layout: Layout, config: Config) -> tuple[Assets, bytes] | None:
    found = config.assets
    if found is None:
        return None
    descriptor = Descriptor(media_type=bundle.ASSETS_TYPE, digest=found.digest, size=found.bytes)
    return found, layout.read(descriptor, found.bytes)


def _licence_note(licence: Licence) -> bytes:
    return (
        f"Licence: {licence.expression}\nSource: {licence.source}\nAttribution: {licence.attribution}\n\n"
        "The text of the licence is published under its SPDX name at spdx.org/licenses.\n"
    ).encode()


def _finish(
    writer: LayoutWriter,
    config: Config,
    layers: Sequence[Descriptor],
    target: Path,
    unseparated: Sequence[tuple[str, str]],
) -> Packed:
    encoded = bundle.encode_config(config)
    bundle.parse_config(encoded)  # what readers would refuse is refused here
    said = {bundle.ANNOTATION_PATH: "provenance.intoto.json"}, {bundle.ANNOTATION_PATH: "bom.cdx.json"}
    layers = [
        *layers,
        writer.add_bytes(statements.provenance_statement(config), statements.IN_TOTO_TYPE, said[0]),
        writer.add_bytes(statements.bill_of_materials(config), statements.CYCLONEDX_TYPE, said[1]),
    ]
    unique = list({(layer.digest, layer.media_type): layer for layer in layers}.values())
    manifest = Manifest(
        schema_version=2,
        media_type=bundle.MANIFEST_TYPE,
        artifact_type=bundle.ARTIFACT_TYPE,
        config=writer.add_bytes(encoded, bundle.CONFIG_TYPE),
        layers=unique,
        annotations={
            "org.opencontainers.image.title": config.model,
            "org.opencontainers.image.version": config.version,
            "org.opencontainers.image.licenses": config.licence.expression,
        },
    )
    descriptor = writer.finish(manifest, config.version)
    Layout(writer.root).verify_all(config.version)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=".replaced.", dir=target.parent))
        target.rename(old / "bundle")
        shutil.rmtree(old, ignore_errors=True)
    writer.root.rename(target)
    return Packed(
        path=target,
        model=config.model,
        version=config.version,
        digest=descriptor.digest,
        config=config,
        unseparated=tuple(unseparated),
        synthetic=any(variant.golden.synthetic for variant in config.variants),
    )
