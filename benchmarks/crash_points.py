"""How many durable steps there are at which a kill was tried, and at how many of them the agent did not go on.

Every step of an install, a confirm, a return, a tidying, a resumed download and a removal, each once with everything
killed (and the recovery killed again at a random step) and, where it is the courier's, once with the courier alone. Then
the same runs on a disk that keeps what it likes of what was not synced, at every step.

    python benchmarks/crash_points.py [--sample SEED]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "bench" / "crash_points.json"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.agent.cuts import run_points, summary

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", metavar="SEED", help="one step of each kind instead of all")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-points-") as folder:
        outcomes = list(run_points(Path(folder), options.sample or "whole"))
    with tempfile.TemporaryDirectory(prefix="power-loss-") as folder:
        lost = list(run_points(Path(folder), options.sample or "whole", losses=True))
    found, kept = summary(outcomes), summary(lost)
    for outcome in (*outcomes, *lost):
        if outcome.error:
            print(f"{outcome.scenario} ({outcome.mode}) before step {outcome.at}, {outcome.cut}:\n{outcome.error}")
    result = {
        "crash_points": found["points"],
        "crash_points_failed": found["failed"],
        "by_scenario": found["by_scenario"],
        "by_step": found["by_step"],
        "power_loss_points": kept["points"],
        "power_loss_points_failed": kept["failed"],
        "whole": not options.sample,
        "seconds": round(time.monotonic() - began, 1),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 1 if found["failed"] or kept["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
