"""`wherry-sim demo`: tell the story, exit non-zero if anything of it did not come out."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from wherry_simulators.demo.story import tell

FOLDER = Path("build/demo")


def main(*, keep: bool = False, folder: Path = FOLDER) -> int:
    """Run the demo in `folder`; return the exit status."""
    logging.basicConfig(level=logging.WARNING)
    return 0 if tell(folder.absolute(), Console(highlight=False), keep=keep) else 1
