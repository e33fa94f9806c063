"""The child process that exports a PyTorch module: `python -P torch_child.py`, with any Python that has torch.

Reads a task as JSON from stdin, writes `model.onnx`, `examples.npz` and `answer.json` to a folder of its own. Somebody's code
runs here and nowhere else. It imports nothing of Wherry's: torch may well live in an environment of its own.

A module is what it answers: it is run on its examples first, twice, and once more with the batch doubled. What an exporter
makes is compared with those answers by the parent, on the engine that devices have.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPSET_DYNAMO = 18
"""What torch.export's operators are written in; asked for less, it converts, and not always well."""
OPSET_TRACED = 17
CALLS_MAX = 64
SAID_CHARS_MAX = 300
CONTROL_FLOW = (
    "data-dependent",
    "DataDependent",
    "dynamic control flow",
    "Dynamic control flow",
    "TracerWarning",
    "torch.cond",
)
"""In what an exporter says where a module branches on the values that flow through it."""
UNSUPPORTED = ("No ONNX function found", "UnsupportedOperator", "DispatchError", "is not supported", "not implemented")


class Refusal(Exception):  # noqa: N818 - the parent turns it into one of Wherry's
    """Why there is no file: `code`, the reason, and what to do."""

    def __init__(self, code: str, why: str, next_step: str) -> None:
        super().__init__(why)
        self.answer = {"code": code, "why": why, "next_step": next_step}


def main() -> None:
    """Do the task on stdin."""
    task = json.load(sys.stdin)
    out = Path(task["out"])
    try:
        answer = export(task["where"], Path(task["folder"]), out)
    except Refusal as refusal:
        answer = refusal.answer
    (out / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def export(where: str, folder: Path, out: Path) -> dict[str, Any]:
    """Call `module:function`, check what it gives, export it."""
    try:
        import torch
    except ImportError as error:
        raise Refusal(
            "extra_missing",
            f"exporting a PyTorch module needs torch ({error})",
            "pip install wherry-optimizer[torch], or name a Python that has torch and onnxscript by --python",
        ) from error
    sys.path.insert(0, str(folder))
    module, calls, output_names = _called(torch, where)
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise Refusal(
            "export_training",
            f"{training[0]} is in training mode: dropout draws numbers and batch normalization learns from what it sees",
            "call .eval() on the module before returning it",
        )
    names, rows = _positional(torch, module, calls)
    flat = _flat(torch, module, names)
    first = _answers(torch, flat, rows[0])
    if output_names and len(output_names) != len(first):
        raise Refusal(
            "export_outputs",
            f"{len(output_names)} names for {len(first)} outputs",
            "return a name for each output, or none",
        )
    outputs = output_names or _output_names(torch, module, names, rows[0], len(first))
    for one, two in zip(first, _answers(torch, flat, rows[0]), strict=True):
        if one.shape != two.shape or not np.array_equal(one, two, equal_nan=one.dtype.kind == "f"):
            raise Refusal(
                "export_random",
                "the module answers otherwise when it is asked again: it draws random numbers or keeps a state",
                "fix what it draws, and make its state an input and an output",
            )
    doubled = _doubled(torch, flat, rows[0], first)
    dynamic = doubled is not None
    sample = doubled if doubled is not None else rows[0]
    how, said = _export(torch, flat, sample, names, outputs, out / "model.onnx", dynamic=dynamic)
    rows = [*rows, sample] if dynamic else rows
    arrays: dict[str, Any] = {}
    for number, row in enumerate(rows):
        arrays |= {f"{number}/in/{name}": value.numpy() for name, value in zip(names, row, strict=True)}
        arrays |= {
            f"{number}/out/{name}": value for name, value in zip(outputs, _answers(torch, flat, row), strict=True)
        }
    np.savez(out / "examples.npz", **arrays)
    return {
        "inputs": names,
        "outputs": outputs,
        "calls": len(rows),
        "dynamic": dynamic,
        "exporter": how,
        "passed_over": said,
        "torch": str(torch.__version__),
    }


def _called(torch: Any, where: str) -> tuple[Any, list[Any], list[str]]:
    """Return the module, its example calls and the names of its outputs, if it gives any."""
    name, _, attribute = where.partition(":")
    try:
        function = getattr(importlib.import_module(name), attribute)
        given = function()
    except Exception as error:  # importing and calling somebody's code raises anything
        raise Refusal(
            "export_raised",
            f"{where} raised {type(error).__name__}: {_line(error)}",
            "name it as module:function, run from the folder of the module, and try it in Python first",
        ) from error
    if not isinstance(given, tuple) or len(given) not in (2, 3) or not isinstance(given[0], torch.nn.Module):
        raise Refusal(
            "export_invalid",
            f"{where} gives {type(given).__name__}, not (module, example inputs)",
            "return the torch.nn.Module and its example inputs: a tensor, a tuple, a dict by parameter, or a list of those",
        )
    module, examples, *rest = given
    calls = list(examples) if isinstance(examples, list) else [examples]
    if not 0 < len(calls) <= CALLS_MAX:
        raise Refusal(
            "export_invalid",
            f"{where} gives {len(calls)} example calls, 1 to {CALLS_MAX} are taken",
            "return fewer, or one",
        )
    return module, calls, [str(name) for name in rest[0]] if rest else []


def _positional(torch: Any, module: Any, calls: Sequence[Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the names of the inputs, after the parameters of `forward`, and the calls in their order."""
    signature = inspect.signature(module.forward)
    bound: list[Mapping[str, Any]] = []
    for call in calls:
        named = dict(call) if isinstance(call, Mapping) else {}
        args = () if named else call if isinstance(call, tuple) else (call,)
        try:
            arguments = signature.bind(*args, **named).arguments
        except TypeError as error:
            raise Refusal(
                "export_invalid",
                f"the examples do not fit {type(module).__name__}.forward: {error}",
                "give a value for each parameter that has no default",
            ) from error
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                flat |= {f"{name}_{index}": one for index, one in enumerate(value)}
            elif kind is inspect.Parameter.VAR_KEYWORD:
                flat |= dict(value)
            else:
                flat[name] = value
        bound.append(flat)
    names = list(bound[0])
    for row in bound:
        stray = [name for name, value in row.items() if not isinstance(value, torch.Tensor)]
        if stray or list(row) != names:
            why = f"example {stray[0]!r} is {type(row[stray[0]]).__name__}, no tensor" if stray else "calls differ"
            raise Refusal(
                "export_invalid",
                f"{why}: a file takes the same tensors at every call",
                "put what is fixed into the module that you return, by a small wrapper",
            )
    return names, [tuple(row[name].detach().cpu() for name in names) for row in bound]


def _flat(torch: Any, module: Any, names: Sequence[str]) -> Any:
    """Return a module that takes tensors by position and gives a tuple of tensors, whatever the module gives."""
    parameters = inspect.signature(module.forward).parameters.values()
    by_place = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)

    class Flat(torch.nn.Module):  # type: ignore[misc]  # torch has no types where it is not installed
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *given: Any) -> tuple[Any, ...]:
            found = self.module(*given) if by_place else self.module(**dict(zip(names, given, strict=True)))
            return tuple(_leaves(torch, found))

    made = Flat()
    made.eval()
    return made


def _leaves(torch: Any, value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(parts, list | tuple):
        raise Refusal(
            "export_outputs",
            f"the module gives {type(value).__name__}, where only tensors can be outputs",
            "return tensors, or a tuple, list or dict of them",
        )
    return [leaf for part in parts if part is not None for leaf in _leaves(torch, part)]


def _output_names(torch: Any, module: Any, names: Sequence[str], row: Sequence[Any], count: int) -> list[str]:
    """Return the names under which the module itself gives its outputs, or ones by number."""
    if count == 1:
        return ["output"]
    if not any(
        one.kind is inspect.Parameter.VAR_POSITIONAL for one in inspect.signature(module.forward).parameters.values()
    ):
        with torch.no_grad():
            given = module(**{name: value.clone() for name, value in zip(names, row, strict=True)})
        if isinstance(given, Mapping):
            keys = [str(key) for key, value in given.items() if isinstance(value, torch.Tensor)]
            if len(keys) == count and not set(keys) & set(names):
                return keys
    return [f"output_{index}" for index in range(count)]


def _answers(torch: Any, flat: Any, row: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    try:
        with torch.no_grad():
            found = flat(*(value.clone() for value in row))
        return [value.detach().cpu().numpy() for value in found]
    except Refusal:
        raise
    except Exception as error:  # whatever somebody's module raises; NumPy has no bfloat16 and raises TypeError
        raise Refusal(
            "export_raised",
            f"the module raised {type(error).__name__} on its example: {_line(error)}",
            "correct the module or its example inputs",
        ) from error


def _doubled(
    torch: Any, flat: Any, row: Sequence[Any], answers: Sequence[np.ndarray[Any, Any]]
) -> tuple[Any, ...] | None:
    """Return the call with its batch twice as long, or nothing where the first axis is no batch."""
    if any(value.ndim == 0 for value in row) or len({len(value) for value in row}) != 1:
        return None
    twice = tuple(torch.cat([value, value]) for value in row)
    try:
        found = _answers(torch, flat, twice)
    except Refusal:
        return None
    length = len(row[0])
    same = all(
        one.ndim and len(one) == length and two.shape == (2 * length, *one.shape[1:])
        for one, two in zip(answers, found, strict=True)
    )
    return twice if same else None


def _export(
    torch: Any, flat: Any, row: tuple[Any, ...], names: list[str], outputs: list[str], path: Path, *, dynamic: bool
) -> tuple[str, str]:
    """Write the file; return by which exporter, and why the other one did not."""
    try:
        _by_dynamo(torch, flat, row, names, outputs, path, dynamic=dynamic)
        return "dynamo", ""
    except ImportError as error:
        first = f"it needs onnxscript ({error})"
    except Exception as error:  # an exporter wraps whatever it meets, in classes that change from release to release
        said = _chain(error)
        if any(word in said for word in CONTROL_FLOW):
            raise _refusal(said) from error
        first = _line(error)
    try:
        _by_tracing(torch, flat, row, names, outputs, path, dynamic=dynamic)
    except Exception as error:  # as above
        raise _refusal(f"{_chain(error)}\n(the other exporter: {first})") from error
    return "traced", first


def _by_dynamo(
    torch: Any, flat: Any, row: tuple[Any, ...], names: list[str], outputs: list[str], path: Path, *, dynamic: bool
) -> None:
    import onnxscript  # noqa: F401 - say here that it is missing, not deep in the exporter

    batch = torch.export.Dim("batch") if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            flat,
            row,
            dynamo=True,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=(tuple({0: batch} for _ in row),) if dynamic else None,
            opset_version=OPSET_DYNAMO,
            external_data=False,
            verbose=False,
        )
        program.save(str(path))


def _by_tracing(
    torch: Any, flat: Any, row: tuple[Any, ...], names: list[str], outputs: list[str], path: Path, *, dynamic: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # what would be written down as a constant, though the module computes it anew each time
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.onnx.export(
            flat,
            row,
            str(path),
            dynamo=False,
            input_names=names,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (*names, *outputs)} if dynamic else None,
            opset_version=OPSET_TRACED,
        )


def _chain(error: BaseException) -> str:
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < 8:
        parts.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    return "\n".join(parts)


def _refusal(said: str) -> Refusal:
    """Return what an exporter's words come to: a control flow, an operator, or something else."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    for words, code, why, next_step in (
        (
            CONTROL_FLOW,
            "export_control_flow",
            "the module decides by the values that flow through it, and a file holds only one way",
            "replace the branch or loop by torch.where or a fixed number of steps, or export the parts apart",
        ),
        (
            UNSUPPORTED,
            "export_operator",
            "an operator of the module has no equivalent in ONNX",
            "write it with other operators, or do that step outside the model",
        ),
    ):
        found = next((line for line in lines if any(word in line for word in words)), "")
        if found:
            return Refusal(code, f"{why}: {found[:SAID_CHARS_MAX]}", next_step)
    why = f"torch.onnx cannot export the module: {lines[0][:SAID_CHARS_MAX]}"
    return Refusal("export_failed", why, "look at what it says, and export a part of the module")


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))[:SAID_CHARS_MAX]


if __name__ == "__main__":
    main()
