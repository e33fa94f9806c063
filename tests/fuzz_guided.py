"""Fuzzing guided by coverage, by atheris, in a process of its own: `python -m tests.fuzz_guided OUT.json -runs=N`.

The first byte of an input chooses the parser, the second the good example that it is a change of; libFuzzer keeps what reaches new code.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["wherry_shared", "wherry_server.plan", "wherry_server.targeting", "tuf"]):
    from tests import fuzz_kit
    from tests.fuzz_kit import Tally


def main() -> None:
    """Run until libFuzzer ends the process."""
    out = Path(sys.argv[1])
    runs = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("-runs="))
    parsers = fuzz_kit.parsers(fuzz_kit.temporary())
    tally = Tally()

    def keep() -> None:
        out.write_text(json.dumps({"inputs": tally.inputs, "accepted": tally.accepted, "failures": tally.failures}))

    def one(data: bytes) -> None:
        head, rest = data[:6].ljust(6, b"\0"), data[6:]
        parser = parsers[head[0] % len(parsers)]
        seed = parser.seeds[head[1] % len(parser.seeds)]
        if head[2] % 2:
            rest = fuzz_kit.mutate(random.Random(head[3:] + rest[:8]), [rest or seed])
        elif head[2] % 4 == 0:
            rest = fuzz_kit.splice(seed, int.from_bytes(head[3:5], "big"), head[5] % 16, rest)
        before = len(tally.failures)
        tally.judge(parser, rest)
        if tally.inputs >= runs or len(tally.failures) > before or tally.inputs % 1000 == 0:
            keep()

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
