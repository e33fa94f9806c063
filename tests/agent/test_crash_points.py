"""Every durable step of an install, a confirm, a return, a tidying, a resumed download: killed there, the agent goes on.

The real supervisor, courier, journal, store and trust (see `cuts`). After each cut a new process starts, serves a verified
version that may serve there, says the truth, owes what it owed, and comes to the end that the offer asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agent.cuts import SCENARIOS, run_points, summary
from tests.conftest import NOTE

REPORT = Path(__file__).parents[2] / "build" / "crash_points.json"
SEED = "1"
POINTS_MIN = 50
"""The sample has one step of each kind in each scenario."""
WHOLE_POINTS_MIN = 900
KINDS = {"create", "write", "fsync", "rename", "link", "fsync_folder", "unlink", "mkdir", "rmdir", "truncate"}


def try_points(folder: Path, extent: str, note: Callable[[str, object], None]) -> None:
    outcomes = list(run_points(folder, extent))
    found = summary(outcomes)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps({"extent": extent, **found}, indent=2) + "\n", encoding="utf-8")
    note(NOTE, f"crash points: {found['points']} tried, {found['failed']} failed")
    failed = [
        f"{one.scenario} ({one.mode}) before step {one.at}, {one.cut}: {one.error}" for one in outcomes if one.error
    ]
    assert not failed, "\n".join(failed[:5])
    assert set(found["by_step"]) == KINDS
    assert found["points"] >= (WHOLE_POINTS_MIN if extent == "whole" else POINTS_MIN)
    assert set(found["by_scenario"]) == {scenario.name for scenario in SCENARIOS}


def test_an_agent_that_is_killed_at_a_step_of_any_kind_goes_on(tmp_path: Path, record_property) -> None:
    try_points(tmp_path, SEED, record_property)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_an_agent_that_is_killed_at_any_step_goes_on(tmp_path: Path, record_property) -> None:
    try_points(tmp_path, "whole", record_property)
