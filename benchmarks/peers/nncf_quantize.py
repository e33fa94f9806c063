"""NNCF's post-training quantization of an ONNX model, run where NNCF is: `python nncf_quantize.py MODEL CALLS OUT`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import nncf
import onnx


def main() -> None:
    """Quantize with its defaults, from the calls that the benchmark calibrates with."""
    model, calls, target = (Path(text) for text in sys.argv[1:4])
    dataset = nncf.Dataset(pickle.loads(calls.read_bytes()))
    source = onnx.load(model)
    if next(entry.version for entry in source.opset_import if entry.domain in ("", "ai.onnx")) < 13:
        source = onnx.version_converter.convert_version(source, 13)
    onnx.save(nncf.quantize(source, dataset, subset_size=len(pickle.loads(calls.read_bytes()))), target)


if __name__ == "__main__":
    main()
