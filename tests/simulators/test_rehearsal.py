"""What is forecast of a plan is what the real machine makes of it, within what is stated here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from wherry_shared.errors import RefusedError
from wherry_simulators.rehearsal import Rehearsal, members_of, plan_of, rehearse, weights
from wherry_simulators.world import TURN_MS

STAGES = [{"share": 0.1, "soak_s": 600}, {"share": 1.0}]
HALVES = [{"share": 0.5}, {"share": 1.0}]
ADAPTIVE = {"strategy": "adaptive", "stages": [{"share": 1.0}]}
LOOSE = {"failure": {"count": 100}}
TURNS = 4
"""Looks of the director that a stage may take longer here than in the forecast, which looks more often."""


def test_what_simulated_devices_cannot_carry_is_refused_before_they_run() -> None:
    with pytest.raises(RefusedError) as caught:
        plan_of({"stages": STAGES, "gates": [{"metric": "app:agreed", "better": "higher", "harm": 0.1}]})
    assert caught.value.code == "rehearsal_plan"


@pytest.mark.parametrize("said", ["armv7l", "=1", "a=0", "a=x", "a=inf"])
def test_a_weight_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        weights([said])
    assert caught.value.code == "rehearsal_weight"


def test_strata_have_about_the_weights_that_are_stated() -> None:
    found = Counter(one.stratum for one in members_of(400, weights(["x86_64=3", "armv7l=1"]), {}))
    assert 80 < found["armv7l"] < 120
    assert found.total() == 400


@pytest.mark.parametrize(
    ("wish", "failed", "state"),
    [
        ({"stages": STAGES}, 0.0, "done"),
        ({"stages": [{"count": 4}, {"share": 1.0}], "rate": {"per_minute": 4}}, 0.0, "done"),
        ({"stages": STAGES}, 1.0, "halted"),
        (ADAPTIVE, 0.0, "done"),
        (ADAPTIVE, 0.6, "halted"),
        ({**ADAPTIVE, "gates": [{"metric": "returned", "tolerated": 0.05, "harm": 0.3}]}, 0.0, "done"),
        ({**ADAPTIVE, **LOOSE, "gates": [{"metric": "returned", "tolerated": 0.05, "harm": 0.3}]}, 0.9, "halted"),
        (
            {"stages": [{"share": 1.0}], **LOOSE, "gates": [{"metric": "crashed", "tolerated": 0.05, "harm": 0.3}]},
            0.5,
            "done",
        ),
        ({"strategy": "blue_green", "stages": STAGES}, 0.0, "done"),
        ({"strategy": "shadow", "stages": STAGES, "trial": {"max_s": 600, "agreement_min": 0.5}}, 0.0, "done"),
    ],
)
def test_a_forecast_is_close_to_the_real_machine(wish: dict[str, Any], failed: float, state: str) -> None:
    _close(rehearse(plan_of(wish), 40, failed, seed=1, runs=5), state, len(wish["stages"]))


def _close(found: Rehearsal, state: str, stages: int) -> None:
    assert found.violations == 0
    assert found.real.state == state
    assert {one.state for one in found.forecast} == {state}
    assert {one.exposed for one in found.forecast} == {found.real.exposed}
    slack_s = TURNS * stages * TURN_MS / 1000 + found.settle_s
    if state == "halted":
        assert found.real.detected_s is not None
        assert all(abs((one.detected_s or 0) - found.real.detected_s) <= slack_s for one in found.forecast)
    else:
        assert all(abs(one.duration_s - found.real.duration_s) <= slack_s for one in found.forecast)


@pytest.mark.parametrize(
    ("wish", "state", "reason"),
    [
        ({"stages": HALVES, "silent_s": 1800}, "done", ""),
        ({"stages": HALVES, "silent_s": 1800, "silent": {"share": 0.02}}, "halted", "silent_bound"),
        ({"stages": HALVES, "silent_s": 600, "settled_share": 1.0}, "done", ""),
        ({**ADAPTIVE, "silent_s": 600}, "done", ""),
    ],
)
def test_devices_that_are_away_are_waited_for_as_long_as_forecast(
    wish: dict[str, Any], state: str, reason: str
) -> None:
    """They are exposed all the same, count as silent, and take what they missed when they are back."""
    found = rehearse(plan_of(wish), 60, 0.0, seed=1, runs=2, silent=0.2)
    _close(found, state, len(wish["stages"]))
    assert found.real.reason == reason
    assert found.real.duration_s >= wish["silent_s"]


ERRORS = {"metric": "errors", "harm": 0.1}
APART = {"strata": ["arch"], "hold_back": 0.2}
COMPARED = {**APART, "stages": [{"share": 0.5}, {"share": 1.0}], "gates": [ERRORS]}
BLIND = {"trial": {"error_rate_max": 0.9}}
"""Devices themselves see nothing wrong: what is worse is left to the comparison."""
MORNING = {"window": {"from": "11:00", "until": "12:30"}, "approval": {"stages": [1]}}
BY_REQUESTS = {
    "strategy": "split",
    "split": {"for_s": 200, "by": "requests"},
    "period_s": 60,
    "stages": [{"share": 1.0}],
    "gates": [ERRORS],
    "late_s": 3600,
}
SPLIT = {"strategy": "split", "split": {"for_s": 2000}, "stages": [{"share": 1.0}], "gates": [ERRORS]}


@pytest.mark.parametrize(
    ("wish", "worse", "state"),
    [
        ({**APART, "stages": STAGES}, 0.0, "done"),
        (COMPARED, 0.0, "done"),
        ({**COMPARED, **BLIND}, 2.0, "halted"),
        ({**ADAPTIVE, "gates": [ERRORS]}, 0.0, "done"),
        ({**MORNING, "stages": [{"share": 1.0}]}, 0.0, "done"),
        (SPLIT, 0.0, "reverted"),
    ],
)
def test_a_forecast_is_close_to_the_real_machine_with_strata_controls_and_windows(
    wish: dict[str, Any], worse: float, state: str
) -> None:
    kinds, zones = {"x86_64": 0.8, "armv7l": 0.2}, {"UTC": 0.5, "Europe/Athens": 0.5}
    found = rehearse(plan_of(wish), 120, 0.0, seed=1, runs=3, worse=worse, strata=kinds, zones=zones)
    _close(found, state, len(wish["stages"]))
    if "window" in wish:
        assert found.real.duration_s > 3600, "half of the fleet opens two hours later"
    if state == "halted":
        assert found.real.reason == "errors_bound"
        assert found.real.failed == 0


@pytest.mark.parametrize(
    ("worse", "state", "reason"), [(0.0, "reverted", "split_same"), (3.0, "halted", "errors_bound")]
)
def test_a_split_of_requests_ends_as_forecast(worse: float, state: str, reason: str) -> None:
    """Each device answers half of its requests with the candidate, and is its own control."""
    found = rehearse(plan_of({**BY_REQUESTS, **BLIND}), 40, 0.0, seed=1, runs=3, worse=worse)
    _close(found, state, 1)
    assert {found.real.reason, *(one.reason for one in found.forecast)} == {reason}
