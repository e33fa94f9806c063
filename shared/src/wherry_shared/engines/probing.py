"""Which engines work here: each runs a tiny model in a child process of its own.

A runtime whose import passes may still raise, or take the process with it, at its first model (a wheel built for
another numpy, a missing CPU feature), so an engine counts as present only after it computed x + x in a child. This
module itself stays light enough for the supervisor: no numpy, no runtime.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import get_args

import msgspec

from wherry_shared.bundle import EngineName, Format
from wherry_shared.facts import EngineFacts

log = logging.getLogger(__name__)

ENGINES: dict[str, tuple[Format, ...]] = {
    "onnxruntime": ("onnx",),
    "ai-edge-litert": ("tflite",),
    "tflite-runtime": ("tflite",),
}
"""Engine name (that of its distribution) → formats, in the order of preference."""

PROBE_SECONDS_MAX = 60.0


def probe(only: Sequence[str] | None = None) -> list[EngineFacts]:
    """Return the engines that ran a tiny model just now; a broken or missing one is logged and left out.

    The children run side by side. `only` restricts the question to some engines; an unknown name is nobody's engine.
    """
    names: list[EngineName] = [name for name in get_args(EngineName) if only is None or name in only]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "wherry_shared.engines", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in names
    ]
    found = []
    for name, child in zip(names, children, strict=True):
        facts = _answer(name, child)
        if facts is not None:
            found.append(facts)
    return found


def _answer(name: EngineName, child: subprocess.Popen[bytes]) -> EngineFacts | None:
    with child:
        try:
            out, err = child.communicate(timeout=PROBE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            child.kill()
            log.warning("engine %s did not run a tiny model within %.0f s: not used", name, PROBE_SECONDS_MAX)
            return None
    if child.returncode == 0:
        try:
            return msgspec.json.decode(out.splitlines()[-1] if out else b"", type=EngineFacts)
        except msgspec.DecodeError as error:
            log.warning("engine %s is not used: its probe gave no answer (%s)", name, error)
            return None
    lines = err.decode(errors="replace").strip().splitlines()
    log.info("engine %s is not used: exit %d, %s", name, child.returncode, lines[-1] if lines else "no message")
    return None
