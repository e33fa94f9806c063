"""Real files as inference requests: what the client of the demo asks about."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from wherry_optimizer.data.file_type import LABELS, features

ORDINARY = 36
"""Ordinary files that the client asks about, in turn."""
SPECIAL = 12
"""Files of the class that the faulty releases get wrong; every fourth question is about one of them."""
FILE_BYTES_MIN = 64


def requests(first_byte: int) -> list[bytes]:
    """Return request bodies for `file-type`: three ordinary files, then one of the class, and so on.

    Raises:
        RuntimeError: the environment has too few files of the class.
    """
    ordinary: list[bytes] = []
    special: list[bytes] = []
    for path in _files(Path(sysconfig.get_paths()["purelib"])):
        values = features(path)
        body = json.dumps(
            {"inputs": [{"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": values[0].tolist()}]}
        ).encode()
        if values[0, 0] == first_byte:
            special.append(body)
        elif len(ordinary) < ORDINARY:
            ordinary.append(body)
        if len(special) >= SPECIAL and len(ordinary) >= ORDINARY:
            break
    if not special or len(ordinary) < ORDINARY:
        raise RuntimeError(f"{len(special)} files begin with {first_byte:#x}, and {len(ordinary)} others were found")
    mixed: list[bytes] = []
    turn = 0
    others = iter(ordinary)
    while chunk := list(islice(others, 3)):
        mixed += [*chunk, special[turn % len(special)]]
        turn += 1
    return mixed


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in LABELS and path.is_file() and path.stat().st_size >= FILE_BYTES_MIN:
            yield path
