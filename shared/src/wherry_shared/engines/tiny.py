"""Two tiny models, y = x + x on float32 (2,), so that an engine can be proved without a model at hand.

The ONNX one is encoded here by hand: a device has no `onnx` package. The TFLite one is a constant of 276 bytes, made
once by packing one ADD operator with the object interface of the TFLite flatbuffer schema (one subgraph, tensors x and
y, one empty buffer, schema version 3), so that no flatbuffer encoder is needed either.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import cast

import numpy as np

from wherry_shared.bundle import EngineName, Format
from wherry_shared.engines import load
from wherry_shared.engines.probing import ENGINES
from wherry_shared.facts import EngineFacts

_FLOAT = 1  # onnx.TensorProto.FLOAT
_IR_VERSION = 8
_OPSET = 13


def varint(value: int) -> bytes:
    """Encode a non-negative integer as a protobuf varint: seven bits a byte, lowest first, top bit means more."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """Encode an integer field (wire type 0)."""
    return varint(field << 3) + varint(value)


def data(field: int, value: bytes) -> bytes:
    """Encode a string or message field (wire type 2)."""
    return varint(field << 3 | 2) + varint(len(value)) + value


def _value_info(name: bytes) -> bytes:
    """A ValueInfoProto (1 name, 2 type) of a float tensor (TypeProto 1; Tensor 1 elem_type, 2 shape) with one axis."""
    shape = data(1, number(1, 2))
    return data(1, name) + data(2, data(1, number(1, _FLOAT) + data(2, shape)))


def _onnx() -> bytes:
    """A ModelProto (1 ir_version, 7 graph, 8 opset_import) with one Add node (NodeProto 1 input, 2 output, 4 op_type)."""
    node = data(1, b"x") + data(1, b"x") + data(2, b"y") + data(4, b"Add")
    graph = data(1, node) + data(2, b"tiny") + data(11, _value_info(b"x")) + data(12, _value_info(b"y"))
    return number(1, _IR_VERSION) + data(7, graph) + data(8, number(2, _OPSET))


_TFLITE = base64.b64decode(
    "GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAAYAAAA4AAAAAMAAAABAAAABAAAACj///8BAAAAEAAAAAwAFAAQAAwACAAEAAwAAAAQAAAA"
    "UAAAAFQAAABYAAAAAQAAABQAAAAAAA4AFAAAABAADAALAAQADgAAABAAAAAAAAALDAAAABAAAACA////AQAAAAEAAAACAAAAAAAAAAAAAAABAAAA"
    "AQAAAAEAAAAAAAAAAgAAADAAAAAEAAAA5P///wgAAAAMAAAAAQAAAHkAAAABAAAAAgAAAAwADAAIAAAAAAAEAAwAAAAIAAAADAAAAAEAAAB4AAAA"
    "AQAAAAIAAAABAAAACAAAAAQABAAEAAAA"
)

MODELS: dict[Format, bytes] = {"onnx": _onnx(), "tflite": _TFLITE}


def run_tiny(name: str) -> EngineFacts:
    """Compute x + x in engine `name`; return what it is.

    Raises:
        ArithmeticError: the engine runs, but its result is wrong.
        WherryError: the engine is missing or cannot load or run the model.
    """
    formats = ENGINES[name]
    version = ""
    for format_ in formats:
        with tempfile.TemporaryDirectory(prefix="wherry-probe-") as folder:
            path = Path(folder) / f"tiny.{format_}"
            path.write_bytes(MODELS[format_])
            session = load(path, format_, engine=name)
            result = session.run({"x": np.array([1.5, -2.0], np.float32)})["y"]
            version = session.engine_version
            session.close()
        if result.tolist() != [3.0, -4.0]:
            raise ArithmeticError(f"{name} computed 1.5 + 1.5 and -2 + -2 as {result.tolist()}")
    return EngineFacts(name=cast("EngineName", name), version=version, formats=list(formats))
