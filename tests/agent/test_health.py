"""Verdicts on candidates, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.agent.builders import arm, latencies
from wherry_agent import health
from wherry_agent.children import ArmStats
from wherry_shared import reasons
from wherry_shared.sketch import Sketch
from wherry_shared.wire import Trial

TERMS = Trial(
    min_requests=20,
    error_rate_max=0.02,
    errors_min=3,
    latency_ratio_max=2.0,
    latency_tail_ratio_max=5.0,
    latency_tail_min_ms=20,
)


def old(**counts: Any) -> ArmStats:
    counts = {"requests": 100, "latency_us": latencies(4, 1000, 100), **counts}
    return arm("1.0.0", arm="incumbent", **counts)


def mixed(bucket: int, *parts: tuple[float, int]) -> dict[str, dict[str, int]]:
    sketch = Sketch()
    for microseconds, count in parts:
        sketch.add(microseconds, count)
    return {str(bucket): sketch.to_wire()}


@dataclass(frozen=True)
class Row:
    sentence: str
    candidate: dict[str, Any]
    baseline: ArmStats | None = field(default_factory=old)
    outcome: str = "pass"
    reason: str = ""
    has_incumbent: bool = True


FAST = latencies(4, 1000, 40)
ROWS = [
    Row("as good as before", {"requests": 40, "latency_us": FAST}),
    Row("too few requests", {"requests": 19, "latency_us": FAST}, outcome="open"),
    Row("failed requests are not answered ones", {"requests": 20, "errors": 1}, outcome="open"),
    Row("two failures never condemn", {"requests": 2, "errors": 2}, outcome="open"),
    Row("three failures of three do", {"requests": 3, "errors": 3}, outcome="fail", reason=reasons.HEALTH_ERRORS),
    Row("three failures of a thousand are within the rate", {"requests": 1000, "errors": 3, "latency_us": FAST}),
    Row(
        "three of a hundred are not",
        {"requests": 100, "errors": 3, "latency_us": FAST},
        outcome="fail",
        reason=reasons.HEALTH_ERRORS,
    ),
    Row("two of fifty neither condemn nor pass", {"requests": 50, "errors": 2, "latency_us": FAST}, outcome="open"),
    Row(
        "answers that the application rejects condemn like failures",
        {"requests": 40, "rejected": 4, "latency_us": FAST},
        outcome="fail",
        reason=reasons.APPLICATION,
    ),
    Row(
        "a median more than twice the incumbent's condemns",
        {"requests": 40, "latency_us": latencies(4, 2100, 40)},
        outcome="fail",
        reason=reasons.HEALTH_LATENCY,
    ),
    Row(
        "a median that grew by some microseconds is another process",
        {"requests": 40, "latency_us": latencies(4, 44, 40)},
        baseline=old(latency_us=latencies(4, 19, 100)),
    ),
    Row(
        "a median that grew by as many times and a tenth of a millisecond is not",
        {"requests": 40, "latency_us": latencies(4, 220, 40)},
        baseline=old(latency_us=latencies(4, 95, 100)),
        outcome="fail",
        reason=reasons.HEALTH_LATENCY,
    ),
    Row("a median less than twice does not", {"requests": 40, "latency_us": latencies(4, 1900, 40)}),
    Row(
        "a slow median condemns before there are enough requests to confirm",
        {"requests": 40, "latency_us": latencies(4, 9000, 30)},
        outcome="fail",
        reason=reasons.HEALTH_LATENCY,
    ),
    Row(
        "twenty-nine requests in a bucket are no evidence",
        {"requests": 40, "latency_us": latencies(4, 9000, 29)},
        outcome="open",
    ),
    Row(
        "another bucket of shapes is not compared",
        {"requests": 40, "latency_us": latencies(9, 9000, 40)},
        outcome="open",
    ),
    Row(
        "a model that is slow on one kind of input is noticed by its tail",
        {"requests": 100, "latency_us": mixed(4, (1000, 80), (90_000, 20))},
        outcome="fail",
        reason=reasons.HEALTH_LATENCY,
    ),
    Row(
        "a tail that grew by little is a busy device",
        {"requests": 100, "latency_us": mixed(4, (1000, 80), (15_000, 20))},
    ),
    Row(
        "a long tail that was there before is no news",
        {"requests": 100, "latency_us": mixed(4, (1000, 80), (90_000, 20))},
        baseline=old(latency_us=mixed(4, (1000, 80), (80_000, 20))),
    ),
    Row(
        "an incumbent without evidence leaves latency unknown, never failed",
        {"requests": 40, "latency_us": latencies(4, 90_000, 40)},
        baseline=None,
        outcome="unknown",
    ),
    Row(
        "an incumbent with little evidence too",
        {"requests": 40, "latency_us": latencies(4, 90_000, 40)},
        baseline=old(latency_us=latencies(4, 1000, 29)),
        outcome="unknown",
    ),
    Row(
        "what ran in an application and what ran in the worker are not compared",
        {"requests": 40, "latency_us": latencies("h4", 90_000, 40)},
        outcome="unknown",
    ),
    Row(
        "what ran in applications before and after is",
        {"requests": 40, "latency_us": latencies("h4", 90_000, 40)},
        baseline=old(latency_us=latencies(4, 1000, 40) | latencies("h4", 1000, 40)),
        outcome="fail",
        reason=reasons.HEALTH_LATENCY,
    ),
    Row("unknown latency does not hide failures", {"requests": 40, "errors": 9}, None, "fail", reasons.HEALTH_ERRORS),
    Row("a first installation needs no comparison", {"requests": 40}, baseline=None, has_incumbent=False),
    Row("nothing happened yet", {"requests": 0}, outcome="open"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.sentence.replace(" ", "_"))
def test_verdict(row: Row) -> None:
    verdict = health.judge(TERMS, arm("1.1.0", **row.candidate), row.baseline, has_incumbent=row.has_incumbent)
    assert (verdict.outcome, verdict.reason) == (row.outcome, row.reason), verdict


def test_a_verdict_says_the_ratio_and_the_last_error() -> None:
    slow = arm("1.1.0", requests=40, latency_us=latencies(4, 1500, 40))
    assert health.judge(TERMS, slow, old(), has_incumbent=True).latency_ratio == pytest.approx(1.5, rel=0.05)
    bad = arm("1.1.0", requests=40, errors=9, last_error="Gather index out of range")
    assert "Gather index out of range" in health.judge(TERMS, bad, old(), has_incumbent=True).detail
