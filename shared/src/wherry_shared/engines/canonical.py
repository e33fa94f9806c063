"""The signed interface on top of an engine: canonical names, bounds, fixed batches, finite results.

Whoever runs a model for somebody (worker, canary, handle, optimizer) does it through `Bound`. It splits blame: what the
interface does not allow is `BadInput` and never reaches the engine; everything after that is an `EngineFault`, evidence
against the variant.

`Bound.short_way` is on the path of every call of an application's process, whose target is 1 µs above the bare engine:
what is the same in every call is looked up once, shapes that were found good are remembered, and tensors are handed through
without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from wherry_shared.bundle import Format, Interface, TensorSpec, axis_bounds
from wherry_shared.engines import bf16, load
from wherry_shared.engines.checks import check_outputs, fits
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import DTYPES, Array, EngineLimits, Interrupt, NativeTensor, Session

SHAPES_REMEMBERED_MAX = 1024
"""Input shapes that one `Bound` remembers as good; more are checked in full at each call."""
_SUM_ELEMENTS_MAX = 12
"""Up to this a sum in Python is the cheapest test for NaN and Inf, in half the time of a call of BLAS."""
_DOT_ELEMENTS_MAX = 8192
"""Up to this it is a dot product with itself; above, BLAS may start threads."""

ShortWay: TypeAlias = Callable[[dict[str, Array], Mapping[str, Array], Sequence[str] | None], int]
"""`(results, inputs, outputs)` → engine time in ns << BUCKET_BITS | shape bucket: `check` and `run_into` in one call.

One number, since a pair of them for each call would be garbage that Python's collector looks through.
"""
BUCKET_BITS = 6
BUCKET_MASK = (1 << BUCKET_BITS) - 1
"""Bits of a shape bucket: no array has 2 ** 64 elements."""


class _Output(NamedTuple):
    """What is checked of one output."""

    name: str
    finite: bool
    """NaN and Inf are forbidden, in a datatype of numpy's."""
    finite_bits: bool
    """NaN and Inf are forbidden, in BF16."""
    good: set[tuple[int, ...]]
    """Shapes that were found good."""
    spec: TensorSpec


class Source(Protocol):
    """What it takes to open a variant; `wherry_agent.children.Loadable` is one."""

    @property
    def path(self) -> str:
        """The model file."""
        ...

    @property
    def format(self) -> str:
        """`onnx` or `tflite`."""
        ...

    @property
    def engine(self) -> str:
        """Engine name; empty for the first one that can be imported."""
        ...

    @property
    def options(self) -> Mapping[str, str | int | float | bool]:
        """Engine options of the variant."""
        ...

    @property
    def interface(self) -> Interface:
        """The signed interface."""
        ...

    @property
    def tensors(self) -> Mapping[str, str]:
        """Canonical to native names."""
        ...

    @property
    def batch(self) -> int:
        """0, or the only batch that the file takes."""
        ...


def open_bound(source: Source, limits: EngineLimits | None = None, *, data: bytes | None = None) -> Bound:
    """Load a variant, from `data` where its file is not to be read, and put its interface on top.

    Raises:
        EngineFault: `load_failed`, or `interface_mismatch` if the file is not what the interface says.
        WherryError: see `engines.load`.
    """
    format_: Format = "tflite" if source.format == "tflite" else "onnx"
    session = load(Path(source.path), format_, engine=source.engine, options=source.options, limits=limits, data=data)
    return Bound(session, source.interface, source.tensors, source.batch)


class Bound:
    """A session under its interface. Thread-safe as far as the session is (`max_concurrency`)."""

    def __init__(
        self, session: Session, interface: Interface, tensors: Mapping[str, str] | None = None, batch: int = 0
    ) -> None:
        self.session = session
        self.interface = interface
        self.batch = batch
        tensors = tensors or {}
        inputs, outputs = session.describe()
        self._specs = {spec.name: spec for spec in interface.inputs}
        self._native_in = _matched(interface, inputs, tensors, batch, kind="input")
        self._native_out = _matched(interface, outputs, tensors, batch, kind="output")
        self._same_in = all(name == native for name, native in self._native_in.items())
        unfed = {tensor.name for tensor in inputs} - set(self._native_in.values())
        if unfed:
            raise EngineFault(
                "interface_mismatch",
                f"the interface names no input for {', '.join(sorted(unfed))}",
                consequence="the file is not the one that the bundle describes, so it is not run",
                next_step="build the bundle again from this very file by wherry-optimizer",
            )
        self._required = tuple(
            (spec.name, DTYPES[spec.datatype])
            for spec in interface.inputs
            if not spec.optional or spec.name in self._native_in
        )
        self._only = self._required[0] if len(self._required) == 1 else None
        self._all_native_out = [
            self._native_out[spec.name] for spec in interface.outputs if spec.name in self._native_out
        ]
        self._plan = [
            _Output(
                spec.name,
                spec.finite and spec.datatype in ("FP16", "FP32", "FP64"),
                spec.finite and spec.datatype == "BF16",
                set(),
                spec,
            )
            for spec in interface.outputs
            if spec.name in self._native_out
        ]
        self._plan_of = {output.name: output for output in self._plan}
        self._batch_axis = _batch_axis(interface)
        self._good: dict[Any, int] = {}
        # an engine that can run what was checked here, without checking it again
        self._run_checked: Callable[..., list[Array]] | None = getattr(session, "run_checked", None)
        self._plain = self._same_in and not batch and all(spec.name in self._native_in for spec in interface.inputs)
        """Canonical names are native names, and one call of the engine is the whole answer."""
        self._direct = self._run_checked if self._plain else None

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run under canonical names; a batch larger than a fixed one is looped over, a smaller one padded.

        Raises:
            BadInput: the caller's fault.
            EngineFault: `run_failed`, `not_finite`, `bad_output` or `out_of_memory`.
        """
        self.check(inputs)
        return self.run_checked(inputs, outputs)

    def check(self, inputs: Mapping[str, Array]) -> int:
        """Check names, datatypes and shapes against the interface; return the shape bucket (log2 of all elements).

        Raises:
            BadInput: naming the tensor and the difference.
        """
        if self._only is not None:
            name, dtype = self._only
            value = inputs.get(name)
            if value.__class__ is np.ndarray and value.dtype is dtype and len(inputs) == 1:
                bucket = self._good.get(value.shape)
                if bucket is not None:
                    return bucket
        elif len(inputs) == len(self._required):
            shapes = []
            for name, dtype in self._required:
                value = inputs.get(name)
                if value.__class__ is not np.ndarray or value.dtype is not dtype:
                    break
                shapes.append(value.shape)
            else:
                bucket = self._good.get(tuple(shapes))
                if bucket is not None:
                    return bucket
        return self._check(inputs)

    def run_checked(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run on inputs that `check` passed.

        Raises:
            BadInput: a requested output does not exist.
            EngineFault: as `run`.
        """
        results: dict[str, Array] = {}
        self.run_into(results, inputs, outputs)
        return results

    def run_into(
        self,
        results: dict[str, Array],
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        """Run on inputs that `check` passed, and put the outputs into `results`, which a failure may leave half full.

        `interrupt` lets another thread end the call, where the engine can.

        Raises:
            BadInput: a requested output does not exist.
            EngineFault: as `run`.
        """
        if outputs is None:
            plan, native = self._plan, self._all_native_out
        else:
            check_outputs(self._native_out, outputs)
            plan = [self._plan_of[name] for name in outputs]
            native = [self._native_out[name] for name in outputs]
        if self._direct is not None and interrupt is None and inputs.__class__ is dict:
            values = self._direct(native, inputs)
        elif self.batch and self._batch_axis is not None:
            values = self._in_batches(inputs, [output.name for output in plan], native, interrupt)
        else:
            values = self._once(inputs, native, interrupt)
        for (name, finite, finite_bits, good, spec), value in zip(plan, values, strict=True):
            if finite:
                if not all_finite(value):
                    raise _not_finite(name)
            elif finite_bits and not bf16.finite(value):
                raise _not_finite(name)
            if value.shape not in good:
                _check_result(spec, value, good)
            results[name] = value

    def short_way(self) -> ShortWay:
        """Return `check` and `run_into` as one function that also takes the time, for who is on the path of every call.

        Models that an engine takes as they are get one that was made for them, those of one input and one output a shorter
        one still; it takes the general way for whatever is not a request that was seen to be good before. It holds this
        `Bound`, and must not be held by it.

        The function raises what `check` and `run_into` raise; `results` may be half full then.
        """
        check, run_into = self.check, self.run_into

        def general(results: dict[str, Array], inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> int:
            bucket = check(inputs)
            started = perf_counter_ns()
            run_into(results, inputs, outputs)
            return perf_counter_ns() - started << BUCKET_BITS | bucket

        session: Any = self.session
        if not self._plain or not hasattr(session, "direct"):
            return general
        required, good, native, array = self._required, self._good, self._all_native_out, np.ndarray
        # per output the shapes that are good: whether they are one row of few numbers, whose sum tells that they are finite
        looks: list[tuple[_Output, dict[tuple[int, ...], bool]]] = [(output, {}) for output in self._plan]

        def several(results: dict[str, Array], inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> int:
            if outputs is None and inputs.__class__ is dict and len(inputs) == len(required):
                shapes = []
                for name, dtype in required:
                    value = inputs.get(name)
                    if value.__class__ is not array or value.dtype is not dtype:
                        break
                    shapes.append(value.shape)
                else:
                    bucket = good.get(tuple(shapes) if len(shapes) != 1 else shapes[0])
                    if bucket is not None:
                        started = perf_counter_ns()
                        try:
                            values = session.direct(native, inputs, None)
                        except Exception as error:  # an engine's own classes derive from Exception only
                            raise session.fault(error) from error
                        for (output, few), value in zip(looks, values, strict=True):
                            # a sum is not finite if anything in it is not; it may be too large as well
                            if not few.get(value.shape) or not isfinite(sum(value.tolist()[0])):
                                _look_in_full(output, value, few)
                            results[output.name] = value
                        return perf_counter_ns() - started << BUCKET_BITS | bucket
            return general(results, inputs, outputs)

        if self._only is None or len(looks) != 1:
            return several
        (input_name, only_dtype), (only_output, only_few) = self._only, looks[0]
        output_name = only_output.name

        def one_to_one(results: dict[str, Array], inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> int:
            # as `several`, whose loops would take a third of what a call may
            if outputs is None and inputs.__class__ is dict and len(inputs) == 1:
                value = inputs.get(input_name)
                if value.__class__ is array and value.dtype is only_dtype:
                    bucket = good.get(value.shape)
                    if bucket is not None:
                        started = perf_counter_ns()
                        try:
                            (value,) = session.direct(native, inputs, None)
                        except Exception as error:  # as above
                            raise session.fault(error) from error
                        if not only_few.get(value.shape) or not isfinite(sum(value.tolist()[0])):
                            _look_in_full(only_output, value, only_few)
                        results[output_name] = value
                        return perf_counter_ns() - started << BUCKET_BITS | bucket
            return general(results, inputs, outputs)

        return one_to_one

    def warm_inputs(self) -> dict[str, Array]:
        """Return inputs of the smallest shape that the interface allows, all at the low end of their range."""
        made: dict[str, Array] = {}
        for spec in self.interface.inputs:
            if spec.optional and spec.name not in self._native_in:
                continue
            shape = [axis_bounds(axis, self.interface)[0] for axis in spec.shape]
            dtype = DTYPES[spec.datatype]
            fill: Any = "" if spec.datatype == "BYTES" else (spec.low or 0)
            made[spec.name] = np.full(shape, fill, dtype)
        return made

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    # -- inside ----------------------------------------------------------------------------------

    def _check(self, inputs: Mapping[str, Array]) -> int:
        stray = sorted(set(inputs) - set(self._specs))
        if stray:
            raise BadInput(f"no such input: {', '.join(map(repr, stray))}")
        lengths: dict[str, int] = {}
        elements = 0
        shapes = []
        for name, spec in self._specs.items():
            value = inputs.get(name)
            if value is None:
                if spec.optional:
                    continue
                raise BadInput(f"input {name!r} is missing")
            if not isinstance(value, np.ndarray):
                raise BadInput(f"input {name!r} is {type(value).__name__}, expected a numpy array")
            if value.dtype != DTYPES[spec.datatype]:
                raise BadInput(f"input {name!r} has dtype {value.dtype}, expected {DTYPES[spec.datatype]}")
            self._check_shape(spec, value.shape, lengths)
            elements += value.size
            shapes.append(value.shape)
        bucket = max(elements, 1).bit_length() - 1
        if len(inputs) == len(self._required) and len(self._good) < SHAPES_REMEMBERED_MAX:
            self._good[shapes[0] if self._only is not None else tuple(shapes)] = bucket
        return bucket

    def _check_shape(self, spec: TensorSpec, shape: tuple[int, ...], lengths: dict[str, int]) -> None:
        if len(shape) != len(spec.shape):
            raise BadInput(f"input {spec.name!r} has shape {list(shape)}, expected {spec.shape}")
        for length, axis in zip(shape, spec.shape, strict=True):
            low, high = axis_bounds(axis, self.interface)
            if length < low or (high and length > high) or (isinstance(axis, int) and length != axis):
                allowed = f"{low}" if low == high else f"{low} to {high}" if high else f"at least {low}"
                where = f" where {axis} is {allowed}" if isinstance(axis, str) else ""
                raise BadInput(f"input {spec.name!r} has shape {list(shape)}, expected {spec.shape}{where}")
            if isinstance(axis, str) and lengths.setdefault(axis, length) != length:
                raise BadInput(f"input {spec.name!r}: axis {axis!r} is {length} here and {lengths[axis]} elsewhere")

    def _once(self, inputs: Mapping[str, Array], native: list[str], interrupt: Interrupt | None) -> list[Array]:
        feed: dict[str, Array]
        if self._same_in and inputs.__class__ is dict and len(inputs) == len(self._native_in):
            feed = inputs
        else:
            feed = {self._native_in[name]: value for name, value in inputs.items() if name in self._native_in}
        if self._run_checked is not None:
            return self._run_checked(native, feed, interrupt)
        try:
            results = self.session.run(feed, native)
        except BadInput as error:  # the interface allowed it, so the file is not what the interface says
            raise EngineFault(
                "run_failed",
                f"the model refuses input that its interface allows: {error}",
                consequence="the answer is withheld",
                next_step="build the bundle again from this very file by wherry-optimizer",
            ) from error
        return [results[name] for name in native]

    def _in_batches(
        self, inputs: Mapping[str, Array], names: list[str], native: list[str], interrupt: Interrupt | None
    ) -> list[Array]:
        batched_in = {spec.name for spec in self.interface.inputs if spec.shape[:1] == [self._batch_axis]}
        batched_out = {spec.name for spec in self.interface.outputs if spec.shape[:1] == [self._batch_axis]}
        total = next(len(value) for name, value in inputs.items() if name in batched_in)
        parts: list[list[Array]] = []
        for start in range(0, total, self.batch):
            part = {
                name: value[start : start + self.batch] if name in batched_in else value
                for name, value in inputs.items()
            }
            count = min(self.batch, total - start)
            if count < self.batch:  # pad with the last row: a row that the caller sent can't be out of range
                part = {
                    name: np.concatenate([value, np.repeat(value[-1:], self.batch - count, axis=0)])
                    if name in batched_in
                    else value
                    for name, value in part.items()
                }
            results = self._once(part, native, interrupt)
            parts.append(
                [value[:count] if name in batched_out else value for name, value in zip(names, results, strict=True)]
            )
        if len(parts) == 1:
            return parts[0]
        return [
            np.concatenate([part[index] for part in parts]) if name in batched_out else parts[-1][index]
            for index, name in enumerate(names)
        ]


def _look_in_full(output: _Output, value: Array, few: dict[tuple[int, ...], bool]) -> None:
    """Check an output, and remember of a shape that is good whether it is one row of few numbers."""
    if (output.finite and not all_finite(value)) or (output.finite_bits and not bf16.finite(value)):
        raise _not_finite(output.name)
    shape = value.shape
    if shape not in output.good:
        _check_result(output.spec, value, output.good)
    if shape not in few and len(few) < SHAPES_REMEMBERED_MAX:
        few[shape] = output.finite and shape[:-1] == (1,) and 0 < value.size <= _SUM_ELEMENTS_MAX


def _check_result(spec: TensorSpec, value: Array, good: set[tuple[int, ...]]) -> None:
    """Compare datatype and shape of an output with the interface; a good shape is remembered."""
    wanted = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
    if value.dtype != DTYPES[spec.datatype] or not fits(value.shape, wanted):
        raise EngineFault(
            "bad_output",
            f"output {spec.name!r} is {value.dtype} {list(value.shape)}, expected {spec.datatype} {spec.shape}",
            consequence="the answer is withheld: applications rely on the signed interface",
            next_step="build the bundle again from this very file by wherry-optimizer",
        )
    if len(good) < SHAPES_REMEMBERED_MAX:
        good.add(value.shape)


def _not_finite(name: str) -> EngineFault:
    return EngineFault(
        "not_finite",
        f"output {name!r} holds NaN or Inf",
        consequence="the answer is withheld, and held against the model",
        next_step=f"look for what overflows or divides by 0 in the model; where NaN or Inf is meant, pack it with finite = false "
        f"under [interface.outputs.{name}]",
    )


def all_finite(value: Array) -> bool:
    """Tell whether a float array holds neither NaN nor Inf."""
    # the cheapest test first: a sum is finite only if all that it adds is; what overflowed is looked at again
    size = value.size
    if size <= _SUM_ELEMENTS_MAX:
        if isfinite(sum(value.ravel().tolist())):
            return True
    elif size <= _DOT_ELEMENTS_MAX:
        flat = value.ravel()
        if isfinite(flat.dot(flat)):
            return True
    return bool(np.isfinite(value).all())


def _batch_axis(interface: Interface) -> str | None:
    """Return the dimension over which a fixed batch is looped: the first axis of the first input that names one."""
    for spec in interface.inputs:
        if spec.shape and isinstance(spec.shape[0], str):
            return spec.shape[0]
    return None


def _matched(
    interface: Interface, natives: Sequence[NativeTensor], tensors: Mapping[str, str], batch: int, *, kind: str
) -> dict[str, str]:
    """Return canonical → native names after comparing datatypes, ranks and fixed axes."""
    specs = interface.inputs if kind == "input" else interface.outputs
    by_name = {native.name: native for native in natives}
    found: dict[str, str] = {}
    for spec in specs:
        native = by_name.get(tensors.get(spec.name, spec.name))
        if native is None:
            if spec.optional:
                continue
            raise EngineFault(
                "interface_mismatch",
                f"{kind} {spec.name!r} is not in the file: {', '.join(by_name)}",
                consequence="the file is not the one that the bundle describes, so it is not run",
                next_step="build the bundle again from this very file by wherry-optimizer",
            )
        if spec.datatype != native.datatype or spec.datatype not in DTYPES:
            raise EngineFault(
                "interface_mismatch",
                f"{kind} {spec.name!r} is {native.datatype} in the file, not {spec.datatype}",
                consequence="the file is not the one that the bundle describes, so it is not run",
                next_step="build the bundle again from this very file by wherry-optimizer",
            )
        if len(spec.shape) != len(native.shape):
            raise EngineFault(
                "interface_mismatch",
                f"{kind} {spec.name!r} has shape {list(native.shape)} in the file, not {spec.shape}",
                consequence="the file is not the one that the bundle describes, so it is not run",
                next_step="build the bundle again from this very file by wherry-optimizer",
            )
        for position, (axis, own) in enumerate(zip(spec.shape, native.shape, strict=True)):
            if isinstance(own, str) or own < 0 or axis_bounds(axis, interface) == (own, own):
                continue
            looped = position == 0 and isinstance(axis, str) and (own == batch or kind == "output")
            if not looped and kind == "input":
                raise EngineFault(
                    "interface_mismatch",
                    f"{kind} {spec.name!r} has shape {list(native.shape)} in the file, not {spec.shape}",
                    consequence="the file is not the one that the bundle describes, so it is not run",
                    next_step="build the bundle again from this very file by wherry-optimizer",
                )
        found[spec.name] = native.name
    return found
