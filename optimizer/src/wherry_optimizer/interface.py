"""The interface of a bundle, found by asking the file and by running it.

A file names its tensors and its fixed axes; which dynamic axes belong together, and from which length on the model
runs at all, is found by running it. A recipe may add ranges, labels and bounds (`recipe.Hints`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_optimizer.recipe import Hints, InputHint, OutputHint
from wherry_shared import operations
from wherry_shared.bundle import Bounds, Format, Interface, TensorSpec, axis_bounds
from wherry_shared.engines import bf16
from wherry_shared.engines import load as open_session
from wherry_shared.engines.canonical import Bound
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import DTYPES, NativeTensor, Session
from wherry_shared.errors import RefusedError

Array = npt.NDArray[Any]
_Try: TypeAlias = Callable[[Mapping[str, int]], dict[str, Array]]
"""Lengths of dynamic axes → the outputs that the model gives for made-up inputs of those."""

BATCH = "batch"
AXIS_MAX = 4096
"""Largest length that an interface promises for any other dynamic axis, unless samples or the recipe show more."""
AXIS_TRIED = (1, 2, 4, 8, 16, 32, 64, 128, 224, 256, 512, 1024)
"""Lengths with which dynamic axes are tried until the model runs."""
TEXT_TRIED = "0"
"""What text inputs are while axes are tried, if there is no sample: models that take numbers as text run on it as well."""
IMAGE_CHANNELS = (1, 3, 4)
"""Lengths of an axis that is taken for the channels of an image."""
IMAGE_DATATYPES = ("FP32", "FP16", "UINT8")
_GENERATED = re.compile(r"unk_|\?|dynamic|dyn|axis|dim_?\d|None|-1|\W*$", re.IGNORECASE)
_BATCH_WORDS = {"batch", "batch_size", "batchsize", "bs", "n", "b"}


@dataclass(frozen=True, slots=True)
class Fitted:
    """How one source file meets the interface."""

    interface: Interface
    tensors: dict[str, str]
    batch: int


def derive(
    path: Path,
    format_: Format,
    tensors: Mapping[str, str],
    hints: Hints,
    texts: Mapping[str, str] | None = None,
) -> Fitted:
    """Find the interface of a model file.

    Args:
        path: the model.
        format_: of the file.
        tensors: canonical → native names; what is left out keeps its native name.
        hints: what is known beyond the file.
        texts: input → a text that the model takes; `TEXT_TRIED` for the others.

    Raises:
        RefusedError: `interface_invalid` (a name that the file lacks), `interface_unknown` (no shape was found on
            which the model runs).
    """
    session = open_session(path, format_)
    try:
        return _derive(session, dict(tensors), hints, texts or {})
    finally:
        session.close()


def fit(path: Path, format_: Format, tensors: Mapping[str, str], interface: Interface) -> Fitted:
    """Check that another file meets an interface that was derived from the first.

    Raises:
        RefusedError: `interface_differs`.
    """
    session = open_session(path, format_)
    try:
        natives = {native.name: native for native in session.describe()[0]}
        batch = 0
        for spec in interface.inputs:
            native = natives.get(tensors.get(spec.name, spec.name))
            if native is not None and spec.shape and isinstance(spec.shape[0], str):
                own = native.shape[0] if native.shape else -1
                batch = max(batch, own if isinstance(own, int) and own > 0 else 0)
        Bound(session, interface, tensors, batch)
    except EngineFault as error:
        raise RefusedError(
            "interface_differs",
            f"{path.name} does not meet the interface of the first source: {error.message}",
            next_step="map its tensor names under [sources.<name>.tensors], or make two bundles",
        ) from error
    finally:
        session.close()
    return Fitted(interface, _only_renamed(tensors), batch)


def layout_of(spec: TensorSpec) -> str:
    """Return `NHWC` or `NCHW` of an image input: as declared, else by the end that has a number of channels.

    Empty where there are no four axes, or both ends could be it.
    """
    if spec.layout is not None:
        return spec.layout
    if len(spec.shape) != 4 or spec.datatype not in IMAGE_DATATYPES:
        return ""
    second, last = (spec.shape[axis] in IMAGE_CHANNELS for axis in (1, 3))
    return "" if second == last else "NHWC" if last else "NCHW"


def check_layouts(steps: Sequence[operations.Step], interface: Interface) -> None:
    """Check that a chain brings the channels of images to where the model has them.

    Raises:
        RefusedError: `processing_layout`.
    """
    last = {step.tensor: step.parameters.to for step in steps if isinstance(step.parameters, operations.Layout)}
    for spec in interface.inputs:
        given, wanted = last.get(spec.name, ""), layout_of(spec)
        if {given, wanted} == {"NHWC", "NCHW"}:
            raise RefusedError(
                "processing_layout",
                f"preprocess gives {spec.name!r} as {given}, the model takes {wanted} {list(spec.shape)}",
                consequence="nothing was packed: applications would feed it channels for rows",
                next_step=f"let the operation layout end in {wanted}, or declare layout under [interface.inputs.{spec.name}]",
            )


def synthetic(
    interface: Interface,
    rng: np.random.Generator,
    lengths: Mapping[str, int] | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Draw inputs from the interface's ranges; dynamic axes take `lengths`, else their minimum.

    Without a range: floats from [-1, 1], bytes from [0, 255], other integers from {0, 1}. No text can be drawn: an input
    of text is filled with that of `texts`.

    Raises:
        RefusedError: `interface_unknown` for an input of text that `texts` does not name.
    """
    drawn: dict[str, Any] = {}
    for spec in interface.inputs:
        shape = [
            (lengths or {}).get(axis, axis_bounds(axis, interface)[0]) if isinstance(axis, str) else axis
            for axis in spec.shape
        ]
        dtype = DTYPES[spec.datatype]
        if spec.datatype == "BF16":
            drawn[spec.name] = bf16.narrow(rng.uniform(*_range(spec, -1.0, 1.0), shape).astype(np.float32))
        elif dtype.kind == "f":
            low, high = _range(spec, -1.0, 1.0)
            drawn[spec.name] = rng.uniform(low, high, shape).astype(dtype)
        elif dtype.kind in "iu":
            low, high = _range(spec, 0.0, 255.0 if dtype.itemsize == 1 and dtype.kind == "u" else 1.0)
            drawn[spec.name] = rng.integers(int(low), int(high), shape, endpoint=True).astype(dtype)
        elif dtype.kind == "b":
            drawn[spec.name] = rng.integers(0, 1, shape, endpoint=True).astype(dtype)
        elif texts is not None and spec.name in texts:
            drawn[spec.name] = np.full(shape, texts[spec.name], np.object_)
        else:
            raise RefusedError(
                "interface_unknown",
                f"input {spec.name!r} is text: what the model is asked in earnest cannot be made up",
                consequence="nothing was packed, for golden vectors of random text would prove nothing",
                next_step=f"give samples with --inputs: an .npz with {spec.name!r} as an array of dtype U, see "
                "docs/formats/golden.md",
            )
    return drawn


def _range(spec: TensorSpec, low: float, high: float) -> tuple[float, float]:
    return (low if spec.low is None else spec.low, high if spec.high is None else spec.high)


def _only_renamed(tensors: Mapping[str, str]) -> dict[str, str]:
    return {canonical: native for canonical, native in tensors.items() if canonical != native}


def _derive(session: Session, tensors: dict[str, str], hints: Hints, texts: Mapping[str, str]) -> Fitted:
    natives_in, natives_out = session.describe()
    names = {native.name for native in (*natives_in, *natives_out)}
    canonical = {native: name for name, native in tensors.items()}
    stray = sorted(set(tensors.values()) - names)
    known = {canonical.get(name, name) for name in names}
    stray += sorted({*hints.inputs, *hints.outputs} - known)
    if stray:
        raise RefusedError(
            "interface_invalid",
            f"the model has no tensor {', '.join(stray)}",
            consequence="nothing was built",
            next_step=f"it has {', '.join(sorted(names))}: name those",
        )
    dims: dict[str, Bounds] = {}
    inputs = [_input(native, canonical, hints, dims) for native in natives_in]
    dims |= {name: bounds for name, bounds in hints.dims.items() if name in dims}
    outputs = [_output(native, canonical, hints) for native in natives_out]
    interface = Interface(inputs=inputs, outputs=outputs, dims=dims)
    tried = {spec.name: texts.get(spec.name, TEXT_TRIED) for spec in inputs if spec.datatype == "BYTES"}
    run = partial(_run, session, interface, tensors, tried)
    lengths = _runnable(run, interface)
    outputs, extra = _resolve_outputs(run, interface, lengths, natives_out, hints.dims)
    bounded = {
        name: bounds if name in hints.dims else msgspec.structs.replace(bounds, minimum=lengths[name])
        for name, bounds in dims.items()
    }
    return Fitted(Interface(inputs=inputs, outputs=outputs, dims={**bounded, **extra}), _only_renamed(tensors), 0)


def _input(native: NativeTensor, canonical: Mapping[str, str], hints: Hints, dims: dict[str, Bounds]) -> TensorSpec:
    name = canonical.get(native.name, native.name)
    shape: list[int | str] = []
    for index, axis in enumerate(native.shape):
        if isinstance(axis, int) and axis >= 0:
            shape.append(axis)
            continue
        dim = _dim_name(axis, name, index)
        # a batch that the file leaves free has no end of its own: what is too much, memory and the device decide
        dims.setdefault(dim, Bounds(minimum=1, maximum=0 if dim == BATCH else AXIS_MAX))
        shape.append(dim)
    hint = hints.inputs.get(name, InputHint())
    return TensorSpec(
        name=name, datatype=native.datatype, shape=shape, low=hint.low, high=hint.high, layout=hint.layout
    )


def _dim_name(axis: int | str, tensor: str, index: int) -> str:
    generated = not isinstance(axis, str) or _GENERATED.match(axis) is not None
    if index == 0 and (generated or str(axis).lower() in _BATCH_WORDS):
        return BATCH
    return f"{tensor}_{index}" if generated else str(axis)


def _output(native: NativeTensor, canonical: Mapping[str, str], hints: Hints) -> TensorSpec:
    name = canonical.get(native.name, native.name)
    hint = hints.outputs.get(name, OutputHint())
    by_index = native.datatype != "BYTES"  # labels of text are the texts that it may be
    if by_index and hint.labels is not None and native.shape and native.shape[-1] != len(hint.labels):
        raise RefusedError(
            "interface_invalid",
            f"output {name!r} has {native.shape[-1]} entries, the recipe names {len(hint.labels)}",
            consequence="nothing was built: applications would be told wrong names",
            next_step="name one label per entry, in the order of the model",
        )
    return TensorSpec(
        name=name, datatype=native.datatype, shape=list(native.shape), labels=hint.labels, finite=hint.finite
    )


def _attempts(interface: Interface) -> Iterator[dict[str, int]]:
    """Yield lengths of dynamic axes to try: all equal first, then every mixture of a few."""
    free = [name for name in interface.dims if name != BATCH]
    fixed = {BATCH: interface.dims[BATCH].minimum} if BATCH in interface.dims else {}
    least = {name: interface.dims[name].minimum for name in free}
    if not free:
        yield fixed
        return
    for length in AXIS_TRIED:
        yield fixed | {name: max(length, least[name]) for name in free}
    if len(free) <= 3:
        for mixture in itertools.product((1, 8, 64, 256), repeat=len(free)):
            yield fixed | {name: max(length, least[name]) for name, length in zip(free, mixture, strict=True)}


def _run(
    session: Session,
    interface: Interface,
    tensors: Mapping[str, str],
    texts: Mapping[str, str],
    lengths: Mapping[str, int],
) -> dict[str, Array]:
    values = synthetic(interface, np.random.default_rng(0), lengths, texts)
    back = {tensors.get(spec.name, spec.name): spec.name for spec in interface.outputs}
    results = session.run({tensors.get(name, name): value for name, value in values.items()})
    return {back[native]: value for native, value in results.items()}


def _runnable(run: _Try, interface: Interface) -> dict[str, int]:
    last: Exception | None = None
    for lengths in _attempts(interface):
        try:
            run(lengths)
        except (EngineFault, BadInput) as error:
            last = error
            continue
        return lengths
    raise RefusedError(
        "interface_unknown",
        f"the model did not run on made-up input: {last}",
        consequence="its interface is not known, so nothing was built",
        next_step="give bounds under [interface.dims] and ranges under [interface.inputs.<name>] of a recipe or a --processing "
        "file; for inputs of text also samples with --inputs",
    ) from last


def _resolve_outputs(
    run: _Try,
    interface: Interface,
    lengths: dict[str, int],
    natives: Sequence[NativeTensor],
    stated: Container[str],
) -> tuple[list[TensorSpec], dict[str, Bounds]]:
    """Find which dynamic axis of an output follows which dimension of the inputs, by changing one at a time.

    A batch of which the model takes only one length, whatever its file says, gets that as its bounds, unless it is in `stated`.
    """
    one_only: dict[str, Bounds] = {}
    base = run(lengths)
    follows: dict[tuple[str, int], str] = {}
    for dim in interface.dims:
        changed = {**lengths, dim: lengths[dim] * 2 if lengths[dim] > 1 else 2}
        try:
            other = run(changed)
        except (EngineFault, BadInput):
            if dim == BATCH and dim not in stated:
                one_only[dim] = Bounds(minimum=lengths[dim], maximum=lengths[dim])  # free in name only
            continue
        for name, value in base.items():
            for index, (before, after) in enumerate(zip(value.shape, other[name].shape, strict=False)):
                if before == lengths[dim] and after == changed[dim]:
                    follows.setdefault((name, index), dim)
    outputs: list[TensorSpec] = []
    extra: dict[str, Bounds] = one_only
    for spec, native in zip(interface.outputs, natives, strict=True):
        shape: list[int | str] = []
        for index, axis in enumerate(native.shape):
            followed = follows.get((spec.name, index))
            if followed is not None:
                shape.append(followed)
            elif isinstance(axis, int) and axis >= 0:
                shape.append(axis)
            else:
                dim = f"{spec.name}_{index}"
                extra[dim] = Bounds(minimum=0, maximum=0)
                shape.append(dim)
        outputs.append(msgspec.structs.replace(spec, shape=shape))
    return outputs, extra


def widened(fitted: Fitted, samples: Sequence[Mapping[str, Array]]) -> Fitted:
    """Return `fitted` with bounds that admit every sample."""
    dims = dict(fitted.interface.dims)
    for inputs in samples:
        for spec in fitted.interface.inputs:
            for length, axis in zip(inputs[spec.name].shape, spec.shape, strict=False):
                if isinstance(axis, str):
                    bounds = dims[axis]
                    dims[axis] = Bounds(
                        minimum=min(bounds.minimum, length),
                        maximum=max(bounds.maximum, length) if bounds.maximum else 0,
                    )
    return replace(fitted, interface=msgspec.structs.replace(fitted.interface, dims=dims))
