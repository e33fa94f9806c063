"""onnxruntime behind the engine protocol. The only module that imports it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from wherry_shared import engine_telemetry
from wherry_shared.bundle import Datatype
from wherry_shared.engines.checks import check_native
from wherry_shared.engines.errors import EngineFault, OutOfMemory
from wherry_shared.engines.session import Array, EngineLimits, Interrupt, NativeTensor
from wherry_shared.errors import DeviceError, RefusedError

NAME = "onnxruntime"
OPTIONS = frozenset({"threads", "disable_quant_qdq", "graph_optimization"})
THREADS_MAX = 64

_DATATYPES: dict[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
    "tensor(bfloat16)": "BF16",
}
_ONNX_BF16 = 16
"""TensorProto.BFLOAT16: numpy arrays do not say that they hold it."""
_NO_MEMORY = ("failed to allocate", "bad_alloc", "out of memory", "bad allocation")
"""How onnxruntime says that memory ran out; it has no exception of its own for it."""

_FOREIGN = ("is not a registered function/op", "no opset import for domain")
_NEWER = ("unsupported model ir version", "current official support for domain")
"""How it says that an operator is of a domain that it does not have, or the file newer than itself."""


def _runtime() -> Any:
    try:
        import onnxruntime
    except Exception as error:  # a broken wheel raises anything from ImportError to SystemError
        raise DeviceError(
            "engine_missing",
            f"onnxruntime cannot be imported: {error}",
            next_step="install wherry-agent[onnx]",
        ) from error
    engine_telemetry.hush(onnxruntime)
    return onnxruntime


class OrtSession:
    """One `InferenceSession` on the CPU; its `run` is safe from threads, the caller's gate bounds how many."""

    def __init__(
        self,
        path: Path,
        options: Mapping[str, str | int | float | bool],
        limits: EngineLimits,
        data: bytes | None = None,
    ) -> None:
        runtime = _runtime()
        self.engine = NAME
        self.engine_version = str(runtime.__version__)
        self.max_concurrency = limits.slots
        settings = _settings(runtime, options)
        try:
            session = runtime.InferenceSession(data or str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception only
            raise _converted(error, "load_failed", f"onnxruntime cannot load {path.name}") from error
        self._inputs = [_native(argument) for argument in session.get_inputs()]
        self._outputs = [_native(argument) for argument in session.get_outputs()]
        self._output_names = [tensor.name for tensor in self._outputs]
        self._by_name = {tensor.name: tensor for tensor in self._inputs}
        self._known_outputs = frozenset(self._output_names)
        self._run_options = runtime.RunOptions
        # `InferenceSession.run` checks names again and looks for providers to fall back to, 0.6 µs a call; what it wraps
        # is used where it is there, since names are checked here and there is one provider
        inner = getattr(session, "_sess", None)
        self.direct: Callable[[list[str], dict[str, Array], Any], list[Array]] = (
            inner.run if inner is not None else session.run
        )
        """`run_checked` in one call of the engine, under the engine's own exceptions; `fault` makes ours of them."""
        if any(tensor.datatype == "BF16" for tensor in (*self._inputs, *self._outputs)):
            if any(tensor.datatype == "BYTES" for tensor in self._inputs):
                raise EngineFault(
                    "load_failed",
                    "onnxruntime takes no text from Python in a model that has BF16 too",
                    consequence="the model cannot be served",
                    next_step="cast its BF16 inputs and outputs to FP32 within the model",
                )
            halves = frozenset(tensor.name for tensor in self._inputs if tensor.datatype == "BF16")
            self.direct = _by_values(runtime.OrtValue, session, halves)

    def describe(self) -> tuple[list[NativeTensor], list[NativeTensor]]:
        """Return native inputs and outputs, in the order of the file."""
        return list(self._inputs), list(self._outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once, after checking names, datatypes and fixed axes."""
        check_native(self._by_name, inputs, self._known_outputs, outputs)
        names = self._output_names if outputs is None else list(outputs)
        return dict(zip(names, self.run_checked(names, dict(inputs)), strict=True))

    def run_checked(self, names: list[str], feed: dict[str, Array], interrupt: Interrupt | None = None) -> list[Array]:
        """Run once on a feed whose names, datatypes and shapes the caller has checked: the short way of `canonical`."""
        options = None
        if interrupt is not None:
            options = self._run_options()
            interrupt.attach(lambda: setattr(options, "terminate", True))  # obeyed between two operators
        try:
            return self.direct(names, feed, options)
        except Exception as error:  # see __init__
            raise self.fault(error) from error

    def fault(self, error: Exception) -> Exception:
        """Return what `run_checked` raises where `direct` raised `error`."""
        if self.direct is _closed:
            return RuntimeError("run on a closed session")
        return _converted(error, "run_failed", "onnxruntime failed to run the model")

    def close(self) -> None:
        """Drop the session; it is freed when calls in flight return."""
        self.direct = _closed


def _by_values(
    kind: Any, session: Any, halves: frozenset[str]
) -> Callable[[list[str], dict[str, Array], Any], list[Array]]:
    """Return a way to run a model that numpy has not all datatypes for: each tensor is wrapped with its own."""

    def wrapped(name: str, value: Array) -> Any:
        value = np.ascontiguousarray(value)
        if name in halves:
            return kind.ortvalue_from_numpy_with_onnx_type(value, _ONNX_BF16)
        return kind.ortvalue_from_numpy(value)

    def plain(value: Any) -> Array:
        if value.data_type() != "tensor(bfloat16)":
            return cast("Array", value.numpy())
        shape = tuple(value.shape())
        count = math.prod(shape)
        if not count:
            return np.empty(shape, np.uint16)
        bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
        return np.frombuffer(bits, np.uint16).reshape(shape).copy()

    def run(names: list[str], feed: dict[str, Array], options: Any) -> list[Array]:
        given = {name: wrapped(name, value) for name, value in feed.items()}
        return [plain(value) for value in session.run_with_ort_values(names, given, options)]

    return run


def _closed(*_: object) -> list[Array]:
    """What a closed session runs; holds no model."""
    raise RuntimeError("run on a closed session")


def _settings(runtime: Any, options: Mapping[str, str | int | float | bool]) -> Any:
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise RefusedError(
            "engine_option",
            f"onnxruntime has no option {', '.join(unknown)}",
            next_step=f"use {', '.join(sorted(OPTIONS))}",
        )
    threads = options.get("threads", 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= THREADS_MAX:
        raise RefusedError(
            "engine_option",
            f"threads is {threads!r}, expected 1 to {THREADS_MAX}",
            consequence="the model was not loaded",
            next_step="set options.threads of the variant within that",
        )
    level = options.get("graph_optimization", "all")
    levels = runtime.GraphOptimizationLevel
    known = {
        "disable": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }
    if level not in known:
        raise RefusedError(
            "engine_option",
            f"graph_optimization is {level!r}, expected one of {', '.join(known)}",
            consequence="the model was not loaded",
            next_step="correct the options of the variant",
        )
    disable_qdq = options.get("disable_quant_qdq", False)
    if not isinstance(disable_qdq, bool):
        raise RefusedError(
            "engine_option",
            f"disable_quant_qdq is {disable_qdq!r}, expected true or false",
            consequence="the model was not loaded",
            next_step="correct the options of the variant",
        )
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = known[level]
    settings.log_severity_level = 4  # a failing run is raised and reported; the runtime need not print it as well
    # cores are shared with the application: threads that spin for work cost more than they save (1.4 to 2 times)
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if disable_qdq:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


def _native(argument: Any) -> NativeTensor:
    datatype = _DATATYPES.get(argument.type)
    if datatype is None:
        raise EngineFault(
            "load_failed",
            f"tensor {argument.name!r} is {argument.type}, which is not supported",
            consequence="the model cannot be served",
            next_step=_unsupported(str(argument.type)),
        )
    shape = tuple(axis if isinstance(axis, int | str) else -1 for axis in argument.shape or ())
    return NativeTensor(argument.name, datatype, shape)


def _converted(error: Exception, code: str, what: str) -> EngineFault:
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        return OutOfMemory(f"{what}: {text}")
    if code == "load_failed":
        return EngineFault(code, f"{what}: {text}", consequence="the model cannot be served", next_step=_way_out(text))
    return EngineFault(code, f"{what}: {text}")


def _unsupported(kind: str) -> str:
    if kind.startswith(("seq(", "map(")):
        return "export it with plain tensors: converters of classifiers have an option for it (skl2onnx: zipmap=False)"
    return "cast that tensor within the model to a datatype of docs/formats/inference.md"


def _way_out(text: str) -> str:
    """Say what to do about a file that does not load, by what onnxruntime says of it."""
    low = text.lower()
    if any(sign in low for sign in _FOREIGN):
        return (
            "export the model without operators of other domains: none but those of ONNX, ai.onnx.ml and onnxruntime itself "
            "can be delivered, since libraries of custom operators are code that nobody here has proved"
        )
    if any(sign in low for sign in _NEWER):
        return "export it for an older opset or IR version, or update onnxruntime"
    return "check the file by onnx.checker.check_model, and export it again"
