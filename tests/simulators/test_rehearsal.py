"""What is forecast of a plan is what the real machine makes of it, within what is stated here."""

from __future__ import annotations

from typing import Any

import pytest

from wherry_shared.errors import RefusedError
from wherry_simulators.rehearsal import plan_of, rehearse
from wherry_simulators.world import TURN_MS

STAGES = [{"share": 0.1, "soak_s": 600}, {"share": 1.0}]
ADAPTIVE = {"strategy": "adaptive", "stages": [{"share": 1.0}]}
LOOSE = {"failure": {"count": 100}}
TURNS = 4
"""Looks of the director that a stage may take longer here than in the forecast, which looks more often."""


@pytest.mark.parametrize(
    "wish",
    [
        {"gates": [{"metric": "errors", "harm": 0.01}]},
        {"hold_back": 0.1},
        {"window": {"from": "22:00", "until": "05:00"}},
        {"strata": ["arch"]},
        {"approval": {}},
    ],
)
def test_what_simulated_devices_cannot_carry_is_refused_before_they_run(wish: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        plan_of({"stages": STAGES, **wish})
    assert caught.value.code == "rehearsal_plan"


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
    found = rehearse(plan_of(wish), 40, failed, seed=1, runs=5)
    assert found.violations == 0
    assert found.real.state == state
    assert {one.state for one in found.forecast} == {state}
    assert {one.exposed for one in found.forecast} == {found.real.exposed}
    slack_s = TURNS * len(wish["stages"]) * TURN_MS / 1000 + found.settle_s
    if state == "halted":
        assert found.real.detected_s is not None
        assert all(abs((one.detected_s or 0) - found.real.detected_s) <= slack_s for one in found.forecast)
    else:
        assert all(abs(one.duration_s - found.real.duration_s) <= slack_s for one in found.forecast)
