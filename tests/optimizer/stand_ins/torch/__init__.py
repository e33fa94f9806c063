"""A small torch for the export's child process: modules over NumPy, and an exporter that does what `WHERRY_STAND_IN` says.

Put on the path of that process only. What it exports is y = 2 x, whatever the module computes, so a module that computes
something else is one whose file differs.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

__version__ = "0.stand-in"


class Tensor:
    def __init__(self, value) -> None:
        self.value = np.asarray(value)

    ndim = property(lambda self: self.value.ndim)
    shape = property(lambda self: self.value.shape)

    def __len__(self) -> int:
        return len(self.value)

    def __mul__(self, other) -> Tensor:
        return Tensor(self.value * np.float32(other))

    def clone(self) -> Tensor:
        return Tensor(self.value.copy())

    def detach(self) -> Tensor:
        return self

    cpu = detach

    def numpy(self) -> np.ndarray:
        return self.value


class Module:
    def __init__(self) -> None:
        self.training = True

    def named_modules(self):
        yield "", self
        for name, part in vars(self).items():
            if isinstance(part, Module):
                yield name, part

    def eval(self):
        for _, part in self.named_modules():
            part.training = False
        return self

    def __call__(self, *args, **named):
        return self.forward(*args, **named)


nn = types.SimpleNamespace(Module=Module)


def cat(parts) -> Tensor:
    return Tensor(np.concatenate([part.value for part in parts]))


@contextmanager
def no_grad():
    yield


class TracerWarning(Warning):
    pass


jit = types.SimpleNamespace(TracerWarning=TracerWarning)
export = types.SimpleNamespace(Dim=lambda name: name)


def _export(module, args, path=None, *, dynamo, input_names, output_names, **how):
    asked = os.environ.get("WHERRY_STAND_IN", "")
    if asked == "control flow":
        raise RuntimeError("cannot export") from ValueError("Could not guard on data-dependent expression u0 > 0")
    if asked == "operator":
        raise RuntimeError("Exporting the operator 'aten::fancy' to ONNX opset version 17 is not supported")
    if asked == "only tracing" and dynamo:
        raise RuntimeError("torch.export stumbled")
    if asked == "constant":
        if dynamo:
            raise RuntimeError("torch.export stumbled")
        warnings.warn("this value will be treated as a constant", TracerWarning, stacklevel=2)
    if asked == "abort":
        os.abort()
    from onnx import TensorProto, helper, numpy_helper

    dynamic = how.get("dynamic_shapes") or how.get("dynamic_axes")
    shape = ["batch" if dynamic else args[0].shape[0], *args[0].shape[1:]]
    graph = helper.make_graph(
        [helper.make_node("Mul", [input_names[0], "two"], [output_names[0]])],
        "doubles",
        [helper.make_tensor_value_info(input_names[0], TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output_names[0], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(2, np.float32), "two")],
    )
    data = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", how["opset_version"])], ir_version=8
    ).SerializeToString()
    if path is not None:
        Path(path).write_bytes(data)
    return types.SimpleNamespace(save=lambda where: Path(where).write_bytes(data))


onnx = types.SimpleNamespace(export=_export)
sys.modules["torch.onnx"] = onnx
