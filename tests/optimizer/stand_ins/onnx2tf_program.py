"""Stands in for onnx2tf: writes the TFLite file that `WHERRY_STAND_IN_FILE` names, and does what `WHERRY_STAND_IN` says.

Like the real one it rewrites the file that it was given.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

given, out = (Path(sys.argv[sys.argv.index(option) + 1]) for option in ("-i", "-o"))
assert "-kat" in sys.argv, "inputs would be turned over"
given.write_bytes(b"rewritten")
asked = os.environ.get("WHERRY_STAND_IN", "")
if asked == "crash":
    os.abort()
if asked == "fail":
    sys.exit("ERROR: no converter for GridSample")
if asked == "hang":
    time.sleep(600)
if asked == "memory":
    held = bytearray(2**40)
out.mkdir()
if asked != "nothing":
    shutil.copy(os.environ["WHERRY_STAND_IN_FILE"], out / "model_float32.tflite")
