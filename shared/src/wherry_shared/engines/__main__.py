"""`python -m wherry_shared.engines NAME`: run a tiny model in one engine, print its facts as one line of JSON.

This is the child of `probing.probe`; exit code 1 and a line on standard error mean that the engine does not work here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import cast

import msgspec

from wherry_shared.bundle import EngineName
from wherry_shared.engines.probing import ENGINES
from wherry_shared.facts import EngineFacts


def main(arguments: list[str]) -> int:
    """Probe the engine that `arguments` names."""
    if len(arguments) != 1 or arguments[0] not in ENGINES:
        print(f"usage: python -m wherry_shared.engines {'|'.join(ENGINES)}", file=sys.stderr)  # noqa: T201
        return 2
    name = arguments[0]
    try:
        facts = run_tiny(name)
    except Exception as error:  # a broken runtime may raise anything; the parent reads the reason
        print(f"{name}: {type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)  # noqa: T201
        return 1
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
    return 0


def run_tiny(name: str) -> EngineFacts:
    """Compute x + x in engine `name`.

    Raises:
        ArithmeticError: the engine runs, but its result is wrong.
        WherryError: the engine is missing or cannot load or run the model.
    """
    import numpy as np

    from wherry_shared.engines import load, tiny

    formats = ENGINES[name]
    for format_ in formats:
        with tempfile.TemporaryDirectory(prefix="wherry-probe-") as folder:
            path = Path(folder) / f"tiny.{format_}"
            path.write_bytes(tiny.MODELS[format_])
            session = load(path, format_, engine=name)
            result = session.run({"x": np.array([1.5, -2.0], np.float32)})["y"]
            version = session.engine_version
            session.close()
        if result.tolist() != [3.0, -4.0]:
            raise ArithmeticError(f"{name} computed 1.5 + 1.5 and -2 + -2 as {result.tolist()}")
    return EngineFacts(name=cast("EngineName", name), version=version, formats=list(formats))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
