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


def try_points(
    folder: Path, extent: str, note: Callable[[str, object], None], *, sealed: bool = False, losses: bool = False
) -> None:
    outcomes = list(run_points(folder, extent, sealed=sealed, losses=losses))
    found = summary(outcomes)
    if not sealed:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps({"extent": extent, **found}, indent=2) + "\n", encoding="utf-8")
    what = f"{'power loss' if losses else 'crash points'}{', encrypted at rest' if sealed else ''}"
    note(NOTE, f"{what}: {found['points']} tried, {found['failed']} failed")
    failed = [
        f"{one.scenario} ({one.mode}) before step {one.at}, {one.cut}: {one.error}" for one in outcomes if one.error
    ]
    assert not failed, "\n".join(failed[:5])
    assert set(found["by_scenario"]) == {scenario.name for scenario in SCENARIOS}
    if losses:
        return
    assert set(found["by_step"]) == KINDS
    assert found["points"] >= (WHOLE_POINTS_MIN if extent == "whole" else POINTS_MIN)


def test_an_agent_that_is_killed_at_a_step_of_any_kind_goes_on(tmp_path: Path, record_property) -> None:
    try_points(tmp_path, SEED, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("losses", [False, True], ids=["killed", "power"])
def test_so_does_one_that_is_encrypted_at_rest(tmp_path: Path, record_property, losses: bool) -> None:
    try_points(tmp_path, SEED, record_property, sealed=True, losses=losses)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("losses", [False, True], ids=["killed", "power"])
def test_an_agent_that_is_encrypted_at_rest_goes_on_after_any_cut(
    tmp_path: Path, record_property, losses: bool
) -> None:
    try_points(tmp_path, "whole", record_property, sealed=True, losses=losses)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_an_agent_that_is_killed_at_any_step_goes_on(tmp_path: Path, record_property) -> None:
    try_points(tmp_path, "whole", record_property)
