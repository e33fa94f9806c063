"""Engines tell nobody what they run: official builds of ONNX Runtime send events to their maker unless they are told not to.

With that goes a device id and a database below the home of the user, and a thread. The owner of a machine who wants it all the
same sets the variable to 0.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "ORT_DISABLE_TELEMETRY"
"""ONNX Runtime reads it when it is imported, child processes inherit it."""


def turn_off() -> None:
    """Have an ONNX Runtime that is imported from now on send nothing."""
    os.environ.setdefault(VARIABLE, "1")


def hush(runtime: Any) -> None:
    """Have an ONNX Runtime that an application imported before Wherry send no more events."""
    if os.environ.get(VARIABLE) != "0":
        runtime.disable_telemetry_events()
