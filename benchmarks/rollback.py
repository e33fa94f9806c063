"""How long until the version before answers again: while it is still in memory, and after the worker was killed.

Run: `python benchmarks/rollback.py`. Warm (`rollback_warm_ms`): from the order to go back to the first answer of the
incumbent, which a trial keeps loaded. Cold (`rollback_cold_ms`): from SIGKILL of the worker to the first answer of the
next one, which starts, imports its engine and loads; the caller connects at once and waits in the listening queue. With
a spare (`restart_with_spare_ms`): the same where `warm_start` keeps a worker ready.
Medians, with the slowest beside them. Writes `build/bench/rollback.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.agent.serving_kit import until  # noqa: E402 - the path has to be set first
from tests.agent.swap_kit import Rest, Supervised, supervised, versions  # noqa: E402

from wherry_agent import processes  # noqa: E402
from wherry_agent.children import ServeModel  # noqa: E402

WARM_ROUNDS = 50
COLD_ROUNDS = 20
SETTLE_S = 0.3


def warm_ms(rounds: int = WARM_ROUNDS) -> list[float]:
    """Go back from a candidate on trial to the incumbent beside it, again and again."""
    found = []
    with tempfile.TemporaryDirectory(prefix="wherry-back-") as name, supervised(Path(name)) as site:
        good, new = versions(Path(name), 2)
        caller = Rest(site)
        for number in range(rounds):
            site.serve(ServeModel(name="scale", active=new, incumbent=good, trial=f"t{number}"))
            until(lambda: caller.ask()[0] == "1.2.0", "the candidate answers")
            began = time.perf_counter()
            site.tell(ServeModel(name="scale", active=good))
            while caller.ask()[0] != "1.1.0":
                pass
            found.append((time.perf_counter() - began) * 1000)
            site.wait_served()
        caller.close()
    return found


def cold_ms(rounds: int = COLD_ROUNDS, **more: Any) -> list[float]:
    """Kill the worker and ask, again and again."""
    found = []
    processes.SPARE_AFTER_S = 0.1
    processes.YOUNG_S = 0.0  # each death stands for the only one in a long while: the next worker starts at once
    with tempfile.TemporaryDirectory(prefix="wherry-back-") as name, supervised(Path(name), **more) as site:
        (good,) = versions(Path(name), 1)
        site.serve(ServeModel(name="scale", active=good))
        for _ in range(rounds):
            _settled(site)
            if more.get("warm_start") == "on":
                until(lambda: site.worker.spare_pid, "a spare worker")
            began = time.perf_counter()
            os.kill(site.worker.pid, signal.SIGKILL)
            while True:
                caller = Rest(site, keep=False)
                with contextlib.suppress(OSError):  # it was accepted by the one that dies
                    caller.ask()
                    break
            found.append((time.perf_counter() - began) * 1000)
    return found


def _settled(site: Supervised) -> None:
    """Wait until a worker answers and has nothing left to do."""
    until(lambda: site.worker.pid, "a worker")
    Rest(site, keep=False).ask()
    time.sleep(SETTLE_S)


def measure(warm_rounds: int = WARM_ROUNDS, cold_rounds: int = COLD_ROUNDS) -> dict[str, Any]:
    """Return all figures."""
    warm, cold, spare = warm_ms(warm_rounds), cold_ms(cold_rounds), cold_ms(cold_rounds, warm_start="on")
    return {
        "rollback_warm_ms": round(statistics.median(warm), 2),
        "rollback_warm_max_ms": round(max(warm), 2),
        "rollback_cold_ms": round(statistics.median(cold), 1),
        "rollback_cold_max_ms": round(max(cold), 1),
        "restart_with_spare_ms": round(statistics.median(spare), 1),
        "restart_with_spare_max_ms": round(max(spare), 1),
    }


def main() -> None:
    """Measure and write the result."""
    result = measure()
    target = ROOT / "build" / "bench" / "rollback.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
