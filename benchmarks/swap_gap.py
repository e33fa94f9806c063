"""What callers notice of swaps: eight of them ask without a pause while versions are swapped under them.

Run: `python benchmarks/swap_gap.py`. Quiet stretches and stretches with swaps take turns in one run, so that both see
the same machine. For each way to ask it counts requests that failed or got numbers of another version than they say
(`swap_failed`), and the 99th percentile during swaps over the quiet one (`p99_swap_ratio`; the worst of the ways).
Writes `build/bench/swap_gap.json`. Loading happens on the same cores as the callers and the worker.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.agent.daemon_kit import free_ports  # noqa: E402 - the path has to be set first
from tests.agent.swap_kit import CALLERS, CLIENTS, HANDED_OVER, crowd, supervised, versions  # noqa: E402

from wherry_agent.children import ServeModel  # noqa: E402

SWAPS = 200
HAND_OVERS = 20
BLOCK = 20
"""Swaps between two quiet stretches."""
QUIET_S = 1.0
PAUSE_S = 0.05
"""Between two swaps: a fleet swaps once a week, a stress test without a pause would only measure loading."""


def percentile(values: list[float], share: float) -> float:
    """Return a percentile by rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def swaps_of(kind: str, swaps: int = SWAPS) -> dict[str, Any]:
    """Swap under callers of one kind; return counts and latencies in ms."""
    with tempfile.TemporaryDirectory(prefix="wherry-swaps-") as name:
        every = versions(Path(name), swaps + 1)
        quiet: list[float] = []
        busy: list[float] = []
        with supervised(Path(name), grpc_port=free_ports(1)[0] if "gRPC" in kind else 0) as site:
            site.serve(ServeModel(name="scale", active=every[0]))
            with crowd(site, kind, pause_s=0.0) as people:
                people.wait_for_more(CLIENTS * 20)
                for first in range(1, swaps + 1, BLOCK):
                    mark = len(people.seconds)
                    time.sleep(QUIET_S)
                    quiet += people.seconds[mark:]
                    mark = len(people.seconds)
                    for version in every[first : first + BLOCK]:
                        site.serve(ServeModel(name="scale", active=version))
                        time.sleep(PAUSE_S)
                    busy += people.seconds[mark:]
        return _result(people.answers, len(people.failures) + len(people.wrong), swaps, quiet, busy)


def hand_overs_of(kind: str, count: int = HAND_OVERS) -> dict[str, Any]:
    """Let workers take over from each other under callers of one kind."""
    with tempfile.TemporaryDirectory(prefix="wherry-swaps-") as name:
        (version,) = versions(Path(name), 1)
        quiet: list[float] = []
        busy: list[float] = []
        with supervised(Path(name)) as site:
            site.serve(ServeModel(name="scale", active=version))
            with crowd(site, kind, pause_s=0.0) as people:
                people.wait_for_more(CLIENTS * 20)
                for _ in range(count):
                    mark = len(people.seconds)
                    time.sleep(QUIET_S)
                    quiet += people.seconds[mark:]
                    mark = len(people.seconds)
                    trouble = site.hand_over()
                    if trouble:
                        people.failures.append(trouble)
                    busy += people.seconds[mark:]
        return _result(people.answers, len(people.failures) + len(people.wrong), count, quiet, busy)


def _result(requests: int, failed: int, count: int, quiet: list[float], busy: list[float]) -> dict[str, Any]:
    return {
        "requests": requests,
        "failed": failed,
        "swaps": count,
        "p50_quiet_ms": round(percentile(quiet, 0.5) * 1000, 3),
        "p50_swap_ms": round(percentile(busy, 0.5) * 1000, 3),
        "p99_quiet_ms": round(percentile(quiet, 0.99) * 1000, 3),
        "p99_swap_ms": round(percentile(busy, 0.99) * 1000, 3),
        "p99_swap_ratio": round(percentile(busy, 0.99) / percentile(quiet, 0.99), 2),
        "max_ms": round(max(busy) * 1000, 1),
    }


def measure(swaps: int = SWAPS, hand_overs: int = HAND_OVERS) -> dict[str, Any]:
    """Return all figures."""
    kinds = {kind: swaps_of(kind, swaps) for kind in CALLERS}
    moved = {kind: hand_overs_of(kind, hand_overs) for kind in HANDED_OVER}
    return {
        "swap_failed": sum(one["failed"] for one in kinds.values()),
        "swap_count": sum(one["swaps"] for one in kinds.values()),
        "p99_swap_ratio": max(one["p99_swap_ratio"] for one in kinds.values()),
        "hand_over_failed": sum(one["failed"] for one in moved.values()),
        "hand_over_count": sum(one["swaps"] for one in moved.values()),
        "p99_hand_over_ratio": max(one["p99_swap_ratio"] for one in moved.values()),
        "swaps": kinds,
        "hand_overs": moved,
    }


def main() -> None:
    """Measure and write the result."""
    result = measure()
    target = ROOT / "build" / "bench" / "swap_gap.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
