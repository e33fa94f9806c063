"""`wherry-sim demo`: tell the story, exit non-zero if anything of it did not come out."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from wherry_simulators.demo.story import tell

FOLDER = Path("build/demo")
WIDTH = 140
"""Columns of the story where no terminal says how many there are."""


def main(*, keep: bool = False, folder: Path = FOLDER) -> int:
    """Run the demo in `folder`; return the exit status."""
    logging.basicConfig(level=logging.WARNING)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return 0 if tell(folder.absolute(), console, keep=keep) else 1
