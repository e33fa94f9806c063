"""The child process that measures load time and peak memory of one variant: `python -m wherry_optimizer.peak`.

Reads a `PeakTask` as JSON, answers a `PeakAnswer` as JSON. It imports what a device's canary imports, and no more.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from wherry_optimizer.measure import PeakAnswer, PeakTask
from wherry_shared import golden
from wherry_shared.engines import load


def main() -> None:
    """Do the task on stdin."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=PeakTask)
    vectors = golden.decode(Path(task.golden).read_bytes()).vectors
    began = time.perf_counter()
    session = load(Path(task.path), task.format, engine=task.engine, options=task.options)
    load_ms = (time.perf_counter() - began) * 1e3
    for run in range(task.runs):
        inputs = vectors[run % len(vectors)].inputs
        session.run({task.tensors.get(name, name): value for name, value in inputs.items()})
    answer = PeakAnswer(peak_bytes=high_water_bytes(), load_ms=load_ms)
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")


def high_water_bytes() -> int:
    """Return the largest resident size that this process ever had (VmHWM; getrusage where there is no /proc)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
