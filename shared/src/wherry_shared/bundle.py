"""The signed config of a bundle: what it is, what may run it, and what the application may rely on.

The config is the OCI config blob of the bundle's image manifest (`docs/formats/bundle.md`). Types here are frozen and
made by `parse_config`, which also checks what types cannot say; afterwards the values are trusted. Unknown *required*
fields are refused (by name in `requires`), unknown optional ones ignored.

Compatibility (`incompatibilities`) and selection (`rank` in `facts`) are pure functions over these values.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from wherry_shared import limits
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name, parse_version
from wherry_shared.licence import check_grammar

FORMAT = 1
KNOWN_REQUIRES: frozenset[str] = frozenset()
"""Names of config features that this release understands; a config that requires another one is refused."""

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
ASSETS_TYPE = "application/vnd.cncf.model.weight.config.v1.tar"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
GOLDEN_TYPE = "application/vnd.wherry.golden.v1+zstd"
ANNOTATION_VARIANT = "dev.wherry.variant"
ANNOTATION_PLAIN_DIGEST = "dev.wherry.plain-digest"
ANNOTATION_ENCRYPTION = "dev.wherry.encryption"
ENCRYPTION = "tiles-1"
"""How encrypted layers are stored (docs/formats/encryption.md): the only way that is known here."""
ANNOTATION_PATH = "org.cncf.model.filepath"

Format = Literal["onnx", "tflite"]
EngineName = Literal["onnxruntime", "ai-edge-litert", "tflite-runtime"]
Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
]
PLATFORMS: dict[Format, str] = {"onnx": "onnxruntime_onnx", "tflite": "tensorflow_tflite"}
"""OIP `platform` of a model by the format of its variant."""


class _Frozen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of config types: immutable, keyword-only, defaults left out of JSON."""


class Bounds(_Frozen, frozen=True, kw_only=True):
    """Inclusive bounds of a symbolic dimension; `maximum` 0 means none is stated."""

    minimum: int = 1
    maximum: int = 0


class TensorSpec(_Frozen, frozen=True, kw_only=True):
    """One input or output under its canonical name.

    `shape` has one entry per axis: a fixed length, or the name of a dimension in `Interface.dims`.
    `low`/`high` are the range of sensible values (inputs; used for synthetic golden vectors), `labels` the class names
    along the last axis of an output, `finite` whether NaN and Inf are forbidden in an output.
    """

    name: str
    datatype: Datatype
    shape: list[int | str]
    optional: bool = False
    layout: str | None = None
    labels: list[str] | None = None
    low: float | None = None
    high: float | None = None
    finite: bool = True


class StatePair(_Frozen, frozen=True, kw_only=True):
    """An output that must be fed back as an input of the next call of the same sequence."""

    output: str
    input: str


class Interface(_Frozen, frozen=True, kw_only=True):
    """What an application may rely on."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    dims: dict[str, Bounds] = {}
    state: list[StatePair] = []
    state_id: str | None = None


class Contract(Interface, frozen=True, kw_only=True):
    """What somebody declares that applications rely on: layouts, labels and a preprocess id only where they are named."""

    preprocess: str | None = None
    """Id of the pre-processing; None: the application does not rely on it."""


class EngineRange(_Frozen, frozen=True, kw_only=True):
    """An engine that can run a variant, with the versions for which that was shown."""

    name: EngineName
    minimum: str
    maximum: str | None = None


class Needs(_Frozen, frozen=True, kw_only=True):
    """What a device must have: empty lists and zero mean anything will do."""

    arch: list[str] = []
    cpu_features: list[str] = []
    memory_bytes: int = 0


class Figures(_Frozen, frozen=True, kw_only=True):
    """Measurements of a variant on one hardware class (`facts.hardware_class`)."""

    latency_p50_us: float
    latency_p99_us: float | None = None
    latency_ratio: float | None = None
    """Median latency over that of the float variant, interleaved in one run; the figure to compare by."""
    peak_memory_bytes: int = 0
    load_ms: float | None = None


class Accuracy(_Frozen, frozen=True, kw_only=True):
    """The metric of a variant on held-back data, and its drop against the source model (positive = worse)."""

    metric: str
    value: float
    standard_error: float
    drop: float
    samples: int
    drop_standard_error: float | None = None
    data: str = ""
    """What the data are, in a sentence: real, synthesised, labelled by what."""


class GoldenIndex(_Frozen, frozen=True, kw_only=True):
    """Where the golden vectors of a variant are, and what they are worth."""

    digest: str
    bytes: int
    vectors: int
    synthetic: bool = False
    separates: list[str] = []
    """Ids of variants that fail at least one of these vectors (a mix-up would be noticed)."""


class Variant(_Frozen, frozen=True, kw_only=True):
    """One runnable file: format × precision × target needs."""

    id: str
    digest: str
    bytes: int
    format: Format
    precision: str
    engines: list[EngineRange]
    golden: GoldenIndex
    needs: Needs = Needs()
    tensors: dict[str, str] = {}
    """Canonical to native tensor names; a canonical name that is absent is the native name."""
    options: dict[str, str | int | float | bool] = {}
    """Engine options: `disable_quant_qdq`, `threads`, `graph_optimization`."""
    batch: int = 0
    """0: any first dimension; N: exactly N, the engine loops over a larger request."""
    passes: list[str] = []
    download_bytes: int = 0
    """Bytes on the wire in the best encoding served; 0 if it was not computed."""
    figures: dict[str, Figures] = {}
    accuracy: Accuracy | None = None


class Asset(_Frozen, frozen=True, kw_only=True):
    """A file in the assets layer."""

    path: str
    digest: str
    bytes: int


class Assets(_Frozen, frozen=True, kw_only=True):
    """The assets layer: one uncompressed tar, and the files in it."""

    digest: str
    bytes: int
    files: list[Asset]


class Operation(_Frozen, frozen=True, kw_only=True):
    """One declared pre- or post-processing step: a versioned operation name and its parameters."""

    op: str
    version: int = 1
    parameters: dict[str, Any] = {}


class Processing(_Frozen, frozen=True, kw_only=True):
    """A chain of operations; `id` names its meaning: bundles with equal ids treat raw input alike."""

    id: str = ""
    operations: list[Operation] = []


class Licence(_Frozen, frozen=True, kw_only=True):
    """Under what terms, from where, and by whom the model is."""

    expression: str
    """SPDX expression or `LicenseRef-…`."""
    source: str
    attribution: str


class Provenance(_Frozen, frozen=True, kw_only=True):
    """How the bundle came to be: digests of what went in, versions of what made it."""

    source_digests: dict[str, str]
    recipe_digest: str | None = None
    data_digests: dict[str, str] = {}
    tools: dict[str, str] = {}
    created_at: int = 0
    """Microseconds UTC; 0 when the build is reproducible."""
    refused: list[dict[str, Any]] = []
    """Variants that the gate kept out, with the figures that decided."""


class Config(_Frozen, frozen=True, kw_only=True):
    """The whole signed config of a bundle."""

    format: int
    model: str
    version: str
    interface: Interface
    variants: list[Variant]
    licence: Licence
    provenance: Provenance
    requires: list[str] = []
    description: str = ""
    assets: Assets | None = None
    preprocess: Processing = Processing()
    postprocess: Processing = Processing()


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """An OCI content descriptor."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """An OCI image manifest that carries a model (CNCF ModelPack)."""

    schema_version: int
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] = {}


_config_decoder = msgspec.json.Decoder(Config)
_manifest_decoder = msgspec.json.Decoder(Manifest)


def parse_manifest(data: bytes) -> Manifest:
    """Parse an image manifest and check that it is a model's.

    Raises:
        RefusedError: `manifest_too_large`, `manifest_invalid`, `manifest_foreign` or `layer_encrypted`.
    """
    if len(data) > limits.MANIFEST_BYTES_MAX:
        raise RefusedError("manifest_too_large", f"manifest has {len(data)} bytes, at most {limits.MANIFEST_BYTES_MAX}")
    try:
        manifest = _manifest_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(
            "manifest_invalid",
            f"not an OCI image manifest: {error}",
            consequence="the bundle is not taken",
            next_step="build it again by wherry-optimizer",
        ) from error
    if (
        manifest.schema_version != 2
        or manifest.artifact_type != ARTIFACT_TYPE
        or manifest.config.media_type != CONFIG_TYPE
    ):
        raise RefusedError(
            "manifest_foreign",
            f"artifact type {manifest.artifact_type!r} with config {manifest.config.media_type!r} is not a model bundle",
            next_step="build bundles with wherry-optimizer build or pack",
        )
    for descriptor in (manifest.config, *manifest.layers):
        check_digest(descriptor.digest)
        if not 0 <= descriptor.size <= limits.BLOB_BYTES_MAX:
            raise RefusedError("manifest_invalid", f"{descriptor.digest} claims {descriptor.size} bytes")
        _check_encryption(descriptor)
    if manifest.config.size > limits.CONFIG_BYTES_MAX:
        raise RefusedError(
            "config_too_large", f"config has {manifest.config.size} bytes, at most {limits.CONFIG_BYTES_MAX}"
        )
    return manifest


def _check_encryption(descriptor: Descriptor) -> None:
    """Refuse an encrypted blob that cannot be opened here: of another kind, or in another way."""
    notes = descriptor.annotations
    if ANNOTATION_PLAIN_DIGEST not in notes and ANNOTATION_ENCRYPTION not in notes:
        return
    way = notes.get(ANNOTATION_ENCRYPTION, "a way that it does not name")
    if way != ENCRYPTION or descriptor.media_type not in (WEIGHT_TYPE, GOLDEN_TYPE):
        raise RefusedError(
            "layer_encrypted",
            f"{descriptor.digest} is stored encrypted ({way[:40]}), which this release cannot read",
            next_step="update this program",
        )
    check_digest(notes.get(ANNOTATION_PLAIN_DIGEST, ""))


def encrypted_layers(manifest: Manifest) -> dict[str, Descriptor]:
    """Return the layers that are stored encrypted, by the digest of their plaintext, which is what the config names."""
    return {
        layer.annotations[ANNOTATION_PLAIN_DIGEST]: layer
        for layer in manifest.layers
        if ANNOTATION_PLAIN_DIGEST in layer.annotations
    }


def encode_config(config: Config) -> bytes:
    """Encode a config; the same value always gives the same bytes."""
    return msgspec.json.encode(config, order="deterministic")


def parse_config(data: bytes) -> Config:
    """Parse the config of a bundle and check what types cannot say.

    Raises:
        RefusedError: `config_too_large`, `config_invalid`, `config_format` (a newer format) or `config_requires` (a
            feature that this release does not know).
    """
    if len(data) > limits.CONFIG_BYTES_MAX:
        raise RefusedError("config_too_large", f"config has {len(data)} bytes, at most {limits.CONFIG_BYTES_MAX}")
    try:
        config = _config_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(
            "config_invalid",
            f"not a bundle config: {error}",
            consequence="the bundle is not taken",
            next_step="build it again by wherry-optimizer, or update this program",
        ) from error
    if config.format != FORMAT:
        raise RefusedError(
            "config_format",
            f"bundle format {config.format}, this release reads {FORMAT}",
            next_step="update this program",
        )
    unknown = sorted(set(config.requires) - KNOWN_REQUIRES)
    if unknown:
        raise RefusedError(
            "config_requires", f"bundle requires {', '.join(unknown)}, unknown here", next_step="update this program"
        )
    _check_config(config)
    return config


def _check_config(config: Config) -> None:
    check_name(config.model, "model")
    parse_version(config.version)
    check_interface(config.interface)
    if not 1 <= len(config.variants) <= limits.VARIANTS_MAX:
        raise RefusedError("config_invalid", f"{len(config.variants)} variants, expected 1 to {limits.VARIANTS_MAX}")
    seen: set[str] = set()
    names = {spec.name for spec in (*config.interface.inputs, *config.interface.outputs)}
    for variant in config.variants:
        check_name(variant.id, "variant")
        check_digest(variant.digest)
        check_digest(variant.golden.digest)
        if variant.id in seen:
            raise RefusedError("config_invalid", f"variant {variant.id!r} appears twice")
        seen.add(variant.id)
        if not variant.engines:
            raise RefusedError("config_invalid", f"variant {variant.id!r} names no engine")
        if variant.bytes <= 0 or variant.golden.bytes <= 0 or variant.batch < 0:
            raise RefusedError("config_invalid", f"variant {variant.id!r} has a size or batch that cannot be")
        if not 1 <= variant.golden.vectors <= limits.GOLDEN_VECTORS_MAX:
            raise RefusedError(
                "config_invalid",
                f"variant {variant.id!r} has {variant.golden.vectors} golden vectors, expected 1 to 64",
            )
        stray = sorted(set(variant.tensors) - names)
        if stray:
            raise RefusedError("config_invalid", f"variant {variant.id!r} maps unknown tensors {', '.join(stray)}")
    check_grammar(config.licence.expression)
    if not config.licence.attribution.strip():
        raise RefusedError(
            "licence_missing",
            "a bundle carries an attribution beside its licence",
            next_step="add it to the recipe",
        )
    if config.assets is not None:
        check_digest(config.assets.digest)
        for asset in config.assets.files:
            parts = asset.path.split("/")
            if asset.path.startswith("/") or any(part in ("", ".", "..") for part in parts):
                raise RefusedError("config_invalid", f"asset path {asset.path[:120]!r} leaves its folder")


def check_interface(interface: Interface) -> None:
    """Check of an interface what types cannot say.

    Raises:
        RefusedError: `config_invalid`.
    """
    for kind, specs in (("input", interface.inputs), ("output", interface.outputs)):
        if not 1 <= len(specs) <= limits.TENSORS_MAX:
            raise RefusedError("config_invalid", f"{len(specs)} {kind}s, expected 1 to {limits.TENSORS_MAX}")
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names) or "" in names:
            raise RefusedError("config_invalid", f"{kind} names are empty or repeated")
        for spec in specs:
            if len(spec.shape) > limits.TENSOR_RANK_MAX:
                raise RefusedError("config_invalid", f"{kind} {spec.name!r} has {len(spec.shape)} axes")
            for axis in spec.shape:
                if isinstance(axis, int) and axis < 0:
                    raise RefusedError("config_invalid", f"{kind} {spec.name!r} has a negative axis; name it in dims")
                if isinstance(axis, str) and axis not in interface.dims:
                    raise RefusedError(
                        "config_invalid", f"{kind} {spec.name!r} has an axis {axis!r} that dims does not name"
                    )
    inputs = {spec.name for spec in interface.inputs}
    outputs = {spec.name for spec in interface.outputs}
    for pair in interface.state:
        if pair.input not in inputs or pair.output not in outputs:
            raise RefusedError("config_invalid", f"state pair {pair.output!r} → {pair.input!r} names no tensor")


def incompatibilities(
    contract: Interface,
    offered: Interface,
    *,
    contract_preprocess: str | None = "",
    offered_preprocess: str = "",
    declared: bool = False,
) -> list[str]:
    """Say where `offered` breaks what an application that was written against `contract` relies on.

    Inputs may widen (a fixed axis may become dynamic, bounds may grow) and gain optional members; outputs may gain
    members. Datatype, rank, layout, label list, finiteness and preprocess id must stay. Names of dynamic axes are each
    side's own: what counts is which axes are of one length.

    Args:
        contract: what applications rely on.
        offered: what a bundle offers.
        contract_preprocess: None: nobody relies on the pre-processing.
        offered_preprocess: that of the bundle.
        declared: the contract is somebody's word and not another bundle's interface: layouts and labels that it does not
            name may be anything.

    Returns:
        One sentence per difference, naming the field; empty if compatible.
    """
    found: list[str] = []
    new_inputs = {spec.name: spec for spec in offered.inputs}
    for spec in contract.inputs:
        other = new_inputs.pop(spec.name, None)
        if other is None:
            found.append(f"inputs.{spec.name}: gone")
            continue
        found += _tensor_differences(f"inputs.{spec.name}", spec, contract, other, offered, True, declared)
        if spec.optional and not other.optional:
            found.append(f"inputs.{spec.name}.optional: became required")
    found += _tied(contract, offered)
    found += [f"inputs.{name}: new and required" for name, spec in new_inputs.items() if not spec.optional]
    new_outputs = {spec.name: spec for spec in offered.outputs}
    for spec in contract.outputs:
        other = new_outputs.get(spec.name)
        if other is None:
            found.append(f"outputs.{spec.name}: gone")
            continue
        found += _tensor_differences(f"outputs.{spec.name}", spec, contract, other, offered, False, declared)
        if spec.labels != other.labels and not (declared and spec.labels is None):
            found.append(f"outputs.{spec.name}.labels: changed")
        if spec.finite and not other.finite:
            found.append(f"outputs.{spec.name}.finite: NaN and Inf became possible")
    if contract.state != offered.state:
        found.append("state: pairs changed")
    if contract_preprocess is not None and contract_preprocess != offered_preprocess:
        found.append(f"preprocess.id: was {contract_preprocess!r}, now {offered_preprocess!r}")
    return found


def _tensor_differences(
    where: str,
    old: TensorSpec,
    old_home: Interface,
    new: TensorSpec,
    new_home: Interface,
    widening: bool,
    declared: bool,
) -> list[str]:
    found: list[str] = []
    if old.datatype != new.datatype:
        found.append(f"{where}.datatype: was {old.datatype}, now {new.datatype}")
    if old.layout != new.layout and not (declared and old.layout is None):
        found.append(f"{where}.layout: was {old.layout}, now {new.layout}")
    if len(old.shape) != len(new.shape):
        found.append(f"{where}.shape: had {len(old.shape)} axes, now {len(new.shape)}")
        return found
    for index, (before, after) in enumerate(zip(old.shape, new.shape, strict=True)):
        low, high = axis_bounds(before, old_home)
        new_low, new_high = axis_bounds(after, new_home)
        if not widening and _given(before, old_home) & _given(after, new_home):
            continue  # as long as what the application gives: the input's bounds are compared where it stands
        if widening:
            fits = new_low <= low and (new_high == 0 or (high != 0 and high <= new_high))
        else:
            fits = low <= new_low and (high == 0 or (new_high != 0 and new_high <= high))
        if not fits:
            found.append(f"{where}.shape[{index}]: was {before}, now {after}")
    return found


def _given(axis: int | str, home: Interface) -> set[tuple[str, int]]:
    """Return where an application gives a dynamic axis: inputs and positions that are as long as it."""
    if isinstance(axis, int):
        return set()
    return {(spec.name, index) for spec in home.inputs for index, other in enumerate(spec.shape) if other == axis}


def _tied(old: Interface, new: Interface) -> list[str]:
    """Name axes of inputs that have to be of one length now, and had not."""
    found: list[str] = []
    before = {(spec.name, index): axis for spec in old.inputs for index, axis in enumerate(spec.shape)}
    for name in new.dims:
        places = [place for place in sorted(_given(name, new)) if place in before]
        found += [
            f"inputs.{tensor}.shape[{index}]: has to be as long as inputs.{places[0][0]}.shape[{places[0][1]}] now"
            for tensor, index in places[1:]
            if before[tensor, index] != before[places[0]]
        ]
    return found


def axis_bounds(axis: int | str, home: Interface) -> tuple[int, int]:
    """Return inclusive (minimum, maximum) of an axis; maximum 0 means unbounded."""
    if isinstance(axis, int):
        return axis, axis
    bounds = home.dims[axis]
    return bounds.minimum, bounds.maximum
