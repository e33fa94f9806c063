"""`python -m wherry_agent.leash MODULE`: run a module of this package as a child that dies with its supervisor.

A courier or worker that outlived a killed supervisor would write beside its successor. The kernel sends SIGKILL when
the *thread* that started the child ends, so each child is started and awaited by a thread of its own.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from wherry_shared import unwanted

PARENT = "WHERRY_SUPERVISOR_PID"
UNAVAILABLE = os.EX_UNAVAILABLE
"""How a child ends whose packages cannot be imported: nothing that it was to look at is to blame."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent and become the module named on the command line."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.environ.get(PARENT) != str(os.getppid()):
        sys.exit("the supervisor is gone already")  # it died before the leash was on
    unwanted.keep_out()
    module = sys.argv[1]
    sys.argv = [module, *sys.argv[2:]]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as error:
        print(f"error: {module} cannot begin: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(UNAVAILABLE)


if __name__ == "__main__":
    main()
