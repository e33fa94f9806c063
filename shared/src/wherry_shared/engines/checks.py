"""What of a call is the caller's fault can be told before the engine sees it: names, datatypes, ranks, fixed axes.

Checked first, since an engine reports a wrong shape and a failing operator with the same exception, and only the latter
is evidence against a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from wherry_shared.engines.errors import BadInput
from wherry_shared.engines.session import DTYPES, Array, NativeTensor


def check_native(
    wanted: Mapping[str, NativeTensor],
    inputs: Mapping[str, Array],
    known_outputs: Collection[str],
    outputs: Sequence[str] | None,
) -> None:
    """Compare a call with the native description.

    Raises:
        BadInput: naming the tensor and the difference.
    """
    for name, tensor in wanted.items():
        value = inputs.get(name)
        if value is None:
            raise BadInput(f"input {name!r} is missing")
        if value.dtype != DTYPES[tensor.datatype]:
            raise BadInput(f"input {name!r} has dtype {value.dtype}, expected {DTYPES[tensor.datatype]}")
        if not fits(value.shape, tensor.shape):
            raise BadInput(f"input {name!r} has shape {list(value.shape)}, expected {list(tensor.shape)}")
    if len(inputs) != len(wanted):
        stray = sorted(set(inputs) - set(wanted))
        raise BadInput(f"no such input: {', '.join(stray)}")
    check_outputs(known_outputs, outputs)


def check_outputs(known: Collection[str], outputs: Sequence[str] | None) -> None:
    """Check that requested outputs exist and are asked for once.

    Raises:
        BadInput: otherwise.
    """
    if outputs is None:
        return
    stray = [name for name in outputs if name not in known]
    if stray or len(set(outputs)) != len(outputs) or not outputs:
        raise BadInput(
            f"no such output: {', '.join(stray)}" if stray else "the list of requested outputs is empty or repeats one"
        )


def fits(shape: Sequence[int], native: Sequence[int | str]) -> bool:
    """Tell whether a concrete shape fits a native one (names and -1 are free)."""
    if shape == native:
        return True
    return len(shape) == len(native) and all(
        isinstance(axis, str) or axis < 0 or axis == length for length, axis in zip(shape, native, strict=True)
    )
