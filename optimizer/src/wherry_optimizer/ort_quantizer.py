"""onnxruntime's quantizer at work: its advice unheard, what it raises told as a refusal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from wherry_shared.errors import RefusedError


@contextlib.contextmanager
def quantizing(path: Path) -> Iterator[None]:
    """Run the quantizer on (a copy of) the model in `path`.

    Raises:
        RefusedError: `pass_failed`, with the first line of whatever it raised.
    """
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer advises on the root logger to run a pre-processing that is ours here
    try:
        yield
    except Exception as error:  # the quantizer raises whatever its graph surgery meets
        raise RefusedError(
            "pass_failed",
            f"onnxruntime could not quantize {path.name}: {(str(error) or repr(error)).splitlines()[0]}",
            consequence="the variant was not made",
            next_step="put `simplify` before it, or leave the operators out that it fails on",
        ) from error
    finally:
        root.setLevel(level)
