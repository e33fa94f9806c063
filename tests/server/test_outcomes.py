"""What a report makes of an assignment, as a table."""

from __future__ import annotations

import pytest

from wherry_server.outcomes import Assigned, judge
from wherry_shared import wire

FROM, TO = "sha256:from", "sha256:to"
ROWS = [
    # outcome before, report (state, manifest, running, reason) → outcome after, settled
    ("exposed", ("fetching", TO, FROM, ""), ("exposed", False)),
    ("exposed", ("trial", TO, TO, ""), ("exposed", False)),
    ("exposed", ("waiting", TO, FROM, "network"), ("exposed", False)),
    ("exposed", ("confirmed", TO, TO, ""), ("confirmed", True)),
    ("exposed", ("confirmed_idle", TO, TO, ""), ("confirmed_idle", True)),
    ("exposed", ("confirmed", TO, FROM, ""), ("exposed", False)),  # says so, but does not run it
    ("exposed", ("returned", TO, FROM, "health_errors"), ("returned", True)),
    ("exposed", ("returned", TO, FROM, "restarts"), ("excused", True)),
    ("exposed", ("failed", TO, FROM, "restarts"), ("excused", True)),
    ("exposed", ("returned", TO, FROM, "child_failed"), ("excused", True)),
    ("exposed", ("refused", TO, FROM, "below_floor"), ("excused", True)),
    ("exposed", ("refused", TO, FROM, "revoked"), ("excused", True)),
    ("exposed", ("returned", TO, FROM, "group"), ("excused", True)),  # another model of the group failed
    ("exposed", ("failed", TO, FROM, "memory_short"), ("excused", True)),
    ("exposed", ("failed", TO, FROM, "engine_missing"), ("excused", True)),
    ("exposed", ("waiting", TO, FROM, "child_failed"), ("exposed", False)),
    ("exposed", ("waiting", TO, FROM, "conditions"), ("exposed", False)),
    ("exposed", ("waiting", TO, FROM, "key_missing"), ("exposed", False)),
    ("exposed", ("returned", TO, FROM, "key_missing"), ("exposed", False)),
    ("excused", ("confirmed", TO, TO, ""), ("confirmed", True)),
    ("excused", ("trial", FROM, FROM, ""), None),
    ("exposed", ("failed", TO, FROM, "golden_miss"), ("failed", True)),
    ("exposed", ("failed", TO, FROM, "a_code_of_a_later_agent"), ("failed", True)),
    ("exposed", ("refused", TO, FROM, "contract_broken"), ("refused", True)),
    ("exposed", ("refused", TO, FROM, "disk_full"), ("exposed", False)),
    ("exposed", ("refused", TO, FROM, "trust_unsigned"), ("exposed", False)),
    ("exposed", ("safe", TO, "", ""), ("failed", True)),
    ("exposed", ("confirmed", FROM, FROM, ""), None),  # speaks of another bundle
    ("confirmed", ("returned", TO, FROM, "crash"), ("returned", True)),
    ("revert_pending", ("fetching", FROM, TO, ""), None),
    ("revert_pending", ("confirmed", FROM, FROM, ""), ("reverted", True)),
    ("revert_pending", ("returned", FROM, TO, "crash"), None),  # the older bundle failed too: it stays counted
    ("withdrawn", ("confirmed", FROM, FROM, ""), None),
    ("withdrawn", ("trial", TO, TO, ""), ("revert_pending", False)),
    ("reverted", ("trial", TO, TO, ""), ("revert_pending", False)),
    ("superseded", ("confirmed", TO, TO, ""), None),
]


@pytest.mark.parametrize(("before", "said", "after"), ROWS)
def test_a_report_changes_an_assignment_as_the_table_says(before: str, said: tuple, after: tuple | None):
    state, manifest, running, reason = said
    report = wire.Report(
        format=1,
        device="d",
        epoch="e",
        seq=1,
        first=1,
        at=1,
        model="m",
        state=state,
        manifest=manifest,
        running=running,
        reason=reason,
        rollout="r",
        attempt=1,
    )
    change = judge(Assigned("r", 1, FROM, TO, before), report)
    assert (None if change is None else (change.outcome, change.settled)) == after


@pytest.mark.parametrize(("rollout", "attempt"), [("other", 1), ("r", 2), ("", 1)])
def test_a_report_of_another_rollout_or_attempt_says_nothing_here(rollout: str, attempt: int):
    report = wire.Report(
        format=1,
        device="d",
        epoch="e",
        seq=1,
        first=1,
        at=1,
        model="m",
        state="confirmed",
        manifest=TO,
        running=TO,
        rollout=rollout,
        attempt=attempt,
    )
    assert judge(Assigned("r", 1, FROM, TO, "exposed"), report) is None
