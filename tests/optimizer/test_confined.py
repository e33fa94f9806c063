"""Programs under limits: none outlives what watches over it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCHES = """
import sys
from wherry_optimizer import confined
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
if sys.argv[3] == "run":
    confined.run(command, seconds_max=600.0, memory_bytes_max=2**30)
else:
    worker = [sys.executable, "-P", "-m", "wherry_optimizer.confined", str(2**30), *command]
    confined.Worker(worker, 2**30).ask(b"", 600.0)
"""
HANGS = """
import sys, time
held = open(sys.argv[1], "w")
held.write("here")
held.flush()
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux")
@pytest.mark.parametrize("how", ["run", "worker"])
def test_a_program_that_hangs_ends_with_what_watched_over_it(how: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    watcher = subprocess.Popen([sys.executable, "-c", WATCHES, HANGS, str(pipe), how])
    try:
        with pipe.open() as held:
            assert held.read(4) == "here"
            watcher.kill()
            assert held.read() == ""  # its writer is gone; else this waits for ever
    finally:
        watcher.kill()
        watcher.wait()
