"""Declared pre- and post-processing: which operations exist, and what their parameters must be. Pure, without NumPy.

`processing` runs them; `docs/formats/processing.md` says what each means exactly. An operation never changes its meaning:
another meaning is another version. A bundle that uses one which is unknown here is refused before its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from wherry_shared.bundle import Datatype, Interface, Operation, Processing
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError

OPERATIONS_MAX = 32
"""Operations in one chain."""
SIDE_MAX = 16_384
"""Pixels of one side of an image."""

Stage = Literal["preprocess", "postprocess"]
Side = Annotated[int, msgspec.Meta(ge=1, le=SIDE_MAX)]
Numbers = Annotated[list[float], msgspec.Meta(min_length=1, max_length=4096)]
Colours = Literal["rgb", "bgr", "rgba", "bgra", "grey"]


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every operation has."""

    tensor: str = ""
    """The input or output that it works on; may be left out where the interface has one."""


class Resize(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scale an image (…, H, W, C)."""

    height: Side
    width: Side
    method: Literal["nearest", "bilinear", "area"]
    antialias: bool | None = None
    """`bilinear` only, and to be said there: whether the filter widens when the image shrinks."""
    fit: Literal["stretch", "cover", "contain"] = "stretch"
    """`cover` and `contain` keep the ratio: the result is at least, or at most, height × width."""


class CenterCrop(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cut the middle out of an image."""

    height: Side
    width: Side


class Pad(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Put an image into a larger one."""

    height: Side
    width: Side
    value: float = 0.0
    position: Literal["center", "top_left"] = "center"


class Channels(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """Exchange colour channels, or make an image grey."""

    from_: Colours
    to: Literal["rgb", "bgr", "grey"]


class Normalise(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """(x · scale − mean) / std along the last axis, in FP32."""

    scale: float = 1.0
    mean: Numbers = msgspec.field(default_factory=lambda: [0.0])
    std: Numbers = msgspec.field(default_factory=lambda: [1.0])


class Layout(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """Order axes anew; N that is new has length 1."""

    from_: Literal["HW", "HWC", "CHW", "NHW", "NHWC", "NCHW"]
    to: Literal["HW", "HWC", "CHW", "NHW", "NHWC", "NCHW"]


class Cast(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Change the datatype; to integers by rounding half up, within the datatype's range."""

    to: Datatype


class Softmax(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Turn logits along the last axis into shares of 1."""


class Sigmoid(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """1 / (1 + exp(−x))."""


class TopK(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Choose the k largest entries of each row."""

    k: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Threshold(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Choose the entries of each row that are not below a bound: one for all classes, or one each."""

    at: float | Numbers


class Argmax(Parameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Choose the largest entry of each row."""


@dataclass(frozen=True, slots=True)
class Known:
    """An operation of one version."""

    stages: tuple[Stage, ...]
    parameters: type[Parameters]
    chooses: bool = False
    """It turns a tensor into choices, on which nothing else works."""


KNOWN: dict[tuple[str, int], Known] = {
    ("resize", 1): Known(("preprocess",), Resize),
    ("center_crop", 1): Known(("preprocess",), CenterCrop),
    ("pad", 1): Known(("preprocess",), Pad),
    ("channels", 1): Known(("preprocess",), Channels),
    ("normalise", 1): Known(("preprocess",), Normalise),
    ("layout", 1): Known(("preprocess", "postprocess"), Layout),
    ("cast", 1): Known(("preprocess", "postprocess"), Cast),
    ("softmax", 1): Known(("postprocess",), Softmax),
    ("sigmoid", 1): Known(("postprocess",), Sigmoid),
    ("top_k", 1): Known(("postprocess",), TopK, chooses=True),
    ("threshold", 1): Known(("postprocess",), Threshold, chooses=True),
    ("argmax", 1): Known(("postprocess",), Argmax, chooses=True),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, checked; `tensor` is the name of the input or output that it works on."""

    op: str
    version: int
    tensor: str
    parameters: Parameters


def steps_of(processing: Processing, interface: Interface, stage: Stage) -> list[Step]:
    """Check a chain against what is known here and against its interface.

    Raises:
        RefusedError: `operation_unknown` (an operation, or a version of it), or `operation_invalid`; both name it.
    """
    specs = interface.inputs if stage == "preprocess" else interface.outputs
    names = [spec.name for spec in specs]
    texts = {spec.name for spec in specs if spec.datatype == "BYTES"}
    plain = [name for name in names if name not in state_of(interface, stage)]
    steps: list[Step] = []
    chosen: set[str] = set()
    for index, (operation, known, parameters) in enumerate(_parsed(processing, stage)):
        tensor = parameters.tensor or (plain[0] if len(plain) == 1 else "")
        where = f"{stage}.operations[{index}] ({operation.op})"
        if tensor not in names:
            which = f"tensor {tensor!r} is not one of" if tensor else "tensor: has to be named, there are"
            raise _invalid(f"{where}: {which} {', '.join(names)}")
        if tensor in texts:
            raise _invalid(f"{where}: {tensor!r} is text, operations work on numbers")
        if tensor in chosen:
            raise _invalid(f"{where}: {tensor!r} was already turned into choices")
        if known.chooses:
            chosen.add(tensor)
        steps.append(Step(operation.op, operation.version, tensor, parameters))
    return steps


def state_of(interface: Interface, stage: Stage) -> set[str]:
    """Return the inputs or outputs that carry state, which is nobody's to give or to read."""
    return {pair.input if stage == "preprocess" else pair.output for pair in interface.state}


def check(processing: Processing, stage: Stage) -> None:
    """Check a chain as far as that goes without an interface.

    Raises:
        RefusedError: as `steps_of`.
    """
    _parsed(processing, stage)


def named(processing: Processing, stage: Stage) -> Processing:
    """Return the chain with an id: its own, or one made of what it does; an empty chain has none.

    Raises:
        RefusedError: as `steps_of`.
    """
    if processing.id or not processing.operations:
        return processing
    content = [
        {"op": operation.op, "version": operation.version, "parameters": msgspec.to_builtins(parameters)}
        for operation, _, parameters in _parsed(processing, stage)
    ]
    return msgspec.structs.replace(processing, id=of_bytes(msgspec.json.encode(content, order="deterministic")))


def _parsed(processing: Processing, stage: Stage) -> Sequence[tuple[Operation, Known, Parameters]]:
    if len(processing.operations) > OPERATIONS_MAX:
        raise _invalid(f"{stage} has {len(processing.operations)} operations, at most {OPERATIONS_MAX}")
    found = []
    for index, operation in enumerate(processing.operations):
        where = f"{stage}.operations[{index}] ({operation.op[:40]})"
        known = KNOWN.get((operation.op, operation.version))
        if known is None or stage not in known.stages:
            raise RefusedError(
                "operation_unknown",
                f"{where}: {_why_unknown(operation, stage)}",
                next_step="update this program, or use an operation that it knows",
            )
        try:
            parameters = msgspec.convert(operation.parameters, known.parameters)
        except msgspec.ValidationError as error:
            raise _invalid(f"{where}: {error}") from error
        trouble = _TROUBLES.get(known.parameters, _none)(parameters)
        if trouble:
            raise _invalid(f"{where}: {trouble}")
        found.append((operation, known, parameters))
    return found


def _why_unknown(operation: Operation, stage: Stage) -> str:
    versions = [version for op, version in KNOWN if op == operation.op]
    if not versions:
        known = sorted({op for (op, _), item in KNOWN.items() if stage in item.stages})
        return f"there is no such operation here; known: {', '.join(known)}"
    if operation.version not in versions:
        return f"version {operation.version} is not known here, only {', '.join(map(str, versions))}"
    return f"is not an operation of {stage}"


def _none(_parameters: Any) -> str:
    return ""


def _resize_trouble(parameters: Resize) -> str:
    if parameters.method == "bilinear" and parameters.antialias is None:
        return "antialias: has to be said with bilinear, true or false"
    if parameters.method != "bilinear" and parameters.antialias is not None:
        return f"antialias: {parameters.method} has no choice there"
    return ""


def _normalise_trouble(parameters: Normalise) -> str:
    if 0.0 in parameters.std:
        return "std: must not be 0"
    if len(parameters.mean) != len(parameters.std) and 1 not in (len(parameters.mean), len(parameters.std)):
        return f"mean has {len(parameters.mean)} entries, std {len(parameters.std)}"
    return ""


def _layout_trouble(parameters: Layout) -> str:
    if set(parameters.from_) - {"N"} != set(parameters.to) - {"N"}:
        return f"{parameters.from_} cannot become {parameters.to}: only N may come or go"
    return ""


def _channels_trouble(parameters: Channels) -> str:
    return "to: is what it was" if parameters.from_ == parameters.to else ""


def _cast_trouble(parameters: Cast) -> str:
    return f"to: {parameters.to} cannot be cast to" if parameters.to in ("BYTES", "BF16") else ""


_TROUBLES: dict[type[Parameters], Callable[[Any], str]] = {
    Resize: _resize_trouble,
    Normalise: _normalise_trouble,
    Layout: _layout_trouble,
    Channels: _channels_trouble,
    Cast: _cast_trouble,
}


def _invalid(why: str) -> RefusedError:
    return RefusedError("operation_invalid", why, next_step="see docs/formats/processing.md")
