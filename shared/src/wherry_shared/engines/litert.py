"""TFLite files on ai-edge-litert or tflite-runtime behind the engine protocol. The only module that imports either.

An interpreter is not safe from threads (two threads in one: every call raises) and keeps its inputs' shapes, so there
is one interpreter per slot, made when first needed, resized and allocated again when the shapes change. Results are
copies: the interpreter's own memory is overwritten by its next call.

Native names are those of the file's signature where it has exactly one over its main subgraph, else tensor names.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wherry_shared.bundle import Datatype
from wherry_shared.engines.checks import check_native
from wherry_shared.engines.errors import EngineFault, OutOfMemory
from wherry_shared.engines.session import DATATYPES, Array, EngineLimits, NativeTensor
from wherry_shared.errors import DeviceError, RefusedError

MODULES = {"ai-edge-litert": "ai_edge_litert.interpreter", "tflite-runtime": "tflite_runtime.interpreter"}
OPTIONS = frozenset({"threads"})
THREADS_MAX = 64
_NO_MEMORY = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate")


def _runtime(names: Sequence[str]) -> tuple[str, str, Any]:
    """Return (engine, version, Interpreter class) of the first of `names` that can be imported."""
    reasons = []
    for name in names:
        try:
            module = importlib.import_module(MODULES[name])
            return name, importlib.metadata.version(name), module.Interpreter
        except Exception as error:  # a broken wheel raises anything from ImportError to SystemError
            reasons.append(f"{name}: {error}")
    raise DeviceError(
        "engine_missing",
        f"no TFLite engine can be imported ({'; '.join(reasons)})",
        next_step="install wherry-agent[litert] or wherry-agent[tflite]",
    )


@dataclass(slots=True)
class _Slot:
    """One interpreter and the input shapes for which it is allocated."""

    interpreter: Any
    shapes: dict[str, tuple[int, ...]]


class LiteRtSession:
    """A TFLite file in up to `slots` interpreters."""

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        options: Mapping[str, str | int | float | bool],
        limits: EngineLimits,
        data: bytes | None = None,
    ) -> None:
        self._threads = _threads(options)
        self.engine, self.engine_version, self._interpreter = _runtime(names)
        self.max_concurrency = limits.slots
        self._path = path
        self._model = {"model_path": str(path)} if data is None else {"model_content": data}
        """Interpreters of all slots read the same bytes, which live as long as any of them."""
        self._closed = False
        self._condition = threading.Condition()
        self._free: list[_Slot] = []
        """Taken from and given back without the lock, which is for those who find it empty."""
        self._waiting = 0
        self._unmade = limits.slots - 1
        first = self._open()
        self._input_index: dict[str, int]
        self._inputs, self._outputs, self._input_index, self._output_index = _describe(first)
        self._by_name = {tensor.name: tensor for tensor in self._inputs}
        self._all_outputs = tuple(self._output_index)
        self._free.append(_Slot(first, _shapes(first, self._input_index)))

    def describe(self) -> tuple[list[NativeTensor], list[NativeTensor]]:
        """Return native inputs and outputs, in the order of the file."""
        return list(self._inputs), list(self._outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once in a free interpreter, waiting for one if all are busy."""
        check_native(self._by_name, inputs, self._output_index, outputs)
        try:
            slot = self._free.pop()
        except IndexError:
            slot = self._take()
        try:
            return self._invoke(slot, inputs, self._all_outputs if outputs is None else outputs)
        finally:
            self._free.append(slot)
            if self._closed:  # said after that, it empties the list itself
                self._free.clear()
            if self._waiting:  # who waits says so before it looks a last time
                with self._condition:
                    self._condition.notify()

    def close(self) -> None:
        """Drop the interpreters; those in use are freed when their calls return."""
        with self._condition:
            self._closed = True
            self._free.clear()
            self._condition.notify_all()

    def _open(self) -> Any:
        try:
            interpreter = self._interpreter(**self._model, num_threads=self._threads)
            interpreter.allocate_tensors()
        except Exception as error:  # the runtimes raise ValueError, RuntimeError and SystemError alike
            raise _converted(error, "load_failed", f"{self.engine} cannot load {self._path.name}") from error
        return interpreter

    def _take(self) -> _Slot:
        with self._condition:
            while True:
                if self._closed:
                    raise RuntimeError("run on a closed session")
                with contextlib.suppress(IndexError):  # somebody without the lock was faster
                    return self._free.pop()
                if self._unmade:
                    self._unmade -= 1
                    break
                self._waiting += 1
                try:
                    if not self._free and not self._closed:
                        self._condition.wait()
                finally:
                    self._waiting -= 1
        try:
            interpreter = self._open()
        except EngineFault:
            with self._condition:
                self._unmade += 1
                self._condition.notify()
            raise
        return _Slot(interpreter, _shapes(interpreter, self._input_index))

    def _invoke(self, slot: _Slot, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        interpreter = slot.interpreter
        try:
            known = slot.shapes
            for name, value in inputs.items():
                if known.get(name) != value.shape:
                    self._resize(slot, inputs)
                    break
            for name, value in inputs.items():
                interpreter.set_tensor(self._input_index[name], value)
            interpreter.invoke()
            return {name: interpreter.get_tensor(self._output_index[name]) for name in outputs}
        except Exception as error:  # see _open
            slot.shapes = {}
            raise _converted(error, "run_failed", f"{self.engine} failed to run the model") from error

    def _resize(self, slot: _Slot, inputs: Mapping[str, Array]) -> None:
        slot.shapes = {}  # until it worked: a failed resize leaves the interpreter unallocated
        shapes = {name: value.shape for name, value in inputs.items()}
        for name, shape in shapes.items():
            slot.interpreter.resize_tensor_input(self._input_index[name], list(shape))
        slot.interpreter.allocate_tensors()
        slot.shapes = shapes


def _threads(options: Mapping[str, str | int | float | bool]) -> int:
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise RefusedError(
            "engine_option", f"TFLite engines have no option {', '.join(unknown)}", next_step="use threads"
        )
    threads = options.get("threads", 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= THREADS_MAX:
        raise RefusedError(
            "engine_option",
            f"threads is {threads!r}, expected 1 to {THREADS_MAX}",
            consequence="the model was not loaded",
            next_step="set options.threads of the variant within that",
        )
    return threads


def _describe(interpreter: Any) -> tuple[list[NativeTensor], list[NativeTensor], dict[str, int], dict[str, int]]:
    inputs = {str(details["name"]): details for details in interpreter.get_input_details()}
    outputs = {str(details["name"]): details for details in interpreter.get_output_details()}
    signatures = interpreter.get_signature_list()
    if len(signatures) == 1:
        runner = interpreter.get_signature_runner(next(iter(signatures)))
        named_inputs, named_outputs = runner.get_input_details(), runner.get_output_details()
        if _indices(named_inputs) == _indices(inputs) and _indices(named_outputs) == _indices(outputs):
            inputs, outputs = named_inputs, named_outputs
    return (
        [_native(name, details) for name, details in inputs.items()],
        [_native(name, details) for name, details in outputs.items()],
        {name: int(details["index"]) for name, details in inputs.items()},
        {name: int(details["index"]) for name, details in outputs.items()},
    )


def _indices(details: Mapping[str, Any]) -> set[int]:
    return {int(entry["index"]) for entry in details.values()}


def _native(name: str, details: Any) -> NativeTensor:
    datatype: Datatype | None = DATATYPES.get(np.dtype(details["dtype"]))
    if datatype is None or datatype == "BYTES":  # these runtimes give strings as packed bytes without their shape
        raise EngineFault(
            "load_failed",
            f"tensor {name!r} is {details['dtype']}, which is not supported in TFLite",
            consequence="the model cannot be served",
            next_step="text and other such tensors are not for TFLite here: look words up before the model and give it their numbers, or deliver it as ONNX",
        )
    signature = details.get("shape_signature")
    shape = signature if signature is not None and len(signature) else details["shape"]
    return NativeTensor(name, datatype, tuple(int(axis) for axis in shape))


def _shapes(interpreter: Any, index: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    now = {int(details["index"]): details["shape"] for details in interpreter.get_input_details()}
    return {name: tuple(int(axis) for axis in now[position]) for name, position in index.items()}


def _converted(error: Exception, code: str, what: str) -> EngineFault:
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        return OutOfMemory(f"{what}: {text}")
    if code == "load_failed":
        return EngineFault(
            code,
            f"{what}: {text}",
            consequence="the model cannot be served",
            next_step="convert it again with built-in operators only (no Flex, no custom ones), or for an older runtime",
        )
    return EngineFault(code, f"{what}: {text}")
