"""`python -m wherry_shared.engines NAME`: run a tiny model in one engine, print its facts as one line of JSON.

This is the child of `probing.probe`; exit code 1 and a line on standard error mean that the engine does not work here.
"""

from __future__ import annotations

import sys

import msgspec

from wherry_shared.engines.probing import ENGINES


def main(arguments: list[str]) -> int:
    """Probe the engine that `arguments` names."""
    if len(arguments) != 1 or arguments[0] not in ENGINES:
        print(f"usage: python -m wherry_shared.engines {'|'.join(ENGINES)}", file=sys.stderr)  # noqa: T201
        return 2
    from wherry_shared.engines.tiny import run_tiny

    name = arguments[0]
    try:
        facts = run_tiny(name)
    except Exception as error:  # a broken runtime may raise anything; the parent reads the reason
        print(f"{name}: {type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)  # noqa: T201
        return 1
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
