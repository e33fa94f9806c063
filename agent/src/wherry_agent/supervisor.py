"""The supervisor's own process: `wherry-agent run` becomes it by exec, and leaves the command line's memory behind.

`python -m wherry_agent.supervisor FD` reads its settings from a descriptor, where no other user and no child sees the
enrolment token. Same process id, same standard error, same signals.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from wherry_agent import lean

MODULE = "wherry_agent.supervisor"


def become(settings: bytes) -> NoReturn:
    """Replace this process by a supervisor with these settings (JSON)."""
    memory = os.memfd_create("wherry-settings", 0)  # inherited
    os.write(memory, settings)
    os.lseek(memory, 0, os.SEEK_SET)
    os.execv(sys.executable, [sys.executable, "-m", MODULE, str(memory)])  # noqa: S606 - no shell is wanted


def main(descriptor: int) -> int:
    """Run the agent with the settings that `become` left."""
    lean.keep_out()
    import logging

    import msgspec

    from wherry_agent import daemon
    from wherry_agent.settings import Settings

    with open(descriptor, "rb") as file:
        settings = msgspec.json.decode(file.read(), type=Settings)
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=settings.log_level.upper(), format=form, stream=sys.stderr)
    return daemon.main(settings)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
