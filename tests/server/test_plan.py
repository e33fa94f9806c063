"""A plan that does not parse is never stored."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_server.plan import parse_plan
from wherry_shared.errors import RefusedError

DIGEST = "sha256:" + "a" * 64
GOOD: dict[str, Any] = {
    "models": [{"model": "file-type", "version": "1.1.0", "manifest": DIGEST}],
    "selector": "all",
    "stages": [{"share": 0.05}, {"share": 1.0, "soak_s": 60}],
}


def test_the_shortest_plan_has_defaults_that_hold():
    plan = parse_plan(GOOD)
    assert plan.strategy == "canary"
    assert plan.on_halt == "revert_all"
    assert [stage.confirmed_min for stage in plan.stages] == [1, 1]
    assert parse_plan(msgspec.json.encode(plan)) == plan


BAD: list[tuple[str, dict[str, Any]]] = [
    ("plan_invalid", {"colour": "red"}),
    ("plan_invalid", {"stages": "5,25"}),
    ("plan_invalid", {"stages": [{"share": "half"}]}),
    ("plan_invalid", {"stages": [{"share": 0.5, "speed": 3}]}),
    ("plan_invalid", {"failure": {"share": 0.1, "ratio": 2}}),
    ("plan_invalid", {"trial": {"min_request": 3}}),
    ("plan_invalid", {"trial": 7}),
    ("plan_invalid", {"on_halt": "explode"}),
    ("plan_invalid", {"supersede": "yes"}),
    ("plan_invalid", {"priority": 1.5}),
    ("plan_invalid", {"strategy": "yolo"}),
    ("plan_format", {"format": 2}),
    ("plan_strategy", {"strategy": "shadow"}),
    ("plan_strategy", {"on_success": "end"}),
    ("plan_strategy", {"gates": [{"metric": "disagreed", "tolerated": 0.1, "harm": 0.1}]}),
    ("plan_strategy", {"strategy": "blue_green", "on_halt": "hold"}),
    ("plan_strategy", {"strategy": "split"}),
    ("plan_strategy", {"strategy": "split", "split": {"for_s": 60}, "stages": [{"share": 1.0}]}),
    (
        "plan_range",
        {
            "strategy": "split",
            "split": {"for_s": 1829},
            "gates": [{"metric": "errors", "harm": 0.1}],
            "stages": [{"share": 1.0}],
        },
    ),
    ("plan_stages", {"strategy": "all_at_once", "stages": [{"share": 0.5}, {"share": 1.0}]}),
    ("plan_stages", {"strategy": "all_at_once", "stages": [{"share": 0.5}]}),
    ("plan_stages", {"strategy": "all_at_once", "stages": [{"count": 5}]}),
    ("plan_stages", {"strategy": "adaptive"}),
    ("plan_range", {"strategy": "adaptive", "stages": [{"share": 1.0}], "harmed_max": 0.5}),
    ("plan_range", {"harmed_max": 5}),
    ("plan_models", {"models": []}),
    ("plan_models", {"models": GOOD["models"] * 2}),
    ("bad_name", {"models": [{"model": "Bad Name", "version": "1.0.0", "manifest": DIGEST}]}),
    ("bad_version", {"models": [{"model": "m", "version": "one", "manifest": DIGEST}]}),
    ("bad_digest", {"models": [{"model": "m", "version": "1.0.0", "manifest": "md5:x"}]}),
    ("bad_selector", {"selector": "colour = red"}),
    ("plan_stages", {"stages": []}),
    ("plan_stages", {"stages": [{"share": 0.5}, {"share": 0.5}]}),
    ("plan_stages", {"stages": [{"share": 0.5}, {"share": 0.2}]}),
    ("plan_stages", {"stages": [{"share": 1.1}]}),
    ("plan_stages", {"stages": [{"share": 0}]}),
    ("plan_stages", {"stages": [{"share": (n + 1) / 30} for n in range(21)]}),
    ("plan_range", {"stages": [{"share": 1.0, "soak_s": -1}]}),
    ("plan_range", {"stages": [{"share": 1.0, "confirmed_min": -1}]}),
    ("plan_bound", {"failure": {}}),
    ("plan_bound", {"failure": {"count": -1}}),
    ("plan_bound", {"failure": {"share": 1.0}}),
    ("plan_bound", {"silent": {"share": 0.5, "sample_min": 0}}),
    ("plan_invalid", {"gates": [{"metric": "beauty", "tolerated": 0.02, "harm": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "harm": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0.02, "harm": 0.05, "cap": 0.5}]}),
    ("plan_gate", {"gates": [{"metric": "errors", "tolerated": 0.02, "harm": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "errors", "harm": 0.95}]}),
    ("plan_gate", {"gates": [{"metric": "errors", "harm": 0.05, "cap": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "errors", "harm": 0.05, "cap": 1.5}]}),
    ("plan_gate", {"gates": [{"metric": "errors", "harm": 0.05}], "hold_back": 0}),
    ("plan_gate", {"gates": [{"metric": "latency", "harm": 0.2, "cap": 1.2}]}),
    ("plan_gate", {"gates": [{"metric": "latency", "harm": 0.2, "tolerated": 0.1}]}),
    ("plan_gate", {"gates": [{"metric": "latency", "harm": 90}]}),
    ("plan_range", {"hold_back": 0.6}),
    ("plan_range", {"hold_back": -0.1}),
    ("plan_range", {"period_s": 1}),
    ("plan_invalid", {"gates": [{"metric": "failed", "tolerated": 0.02, "harm": 0.05, "power": 0.8}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0, "harm": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0.02, "harm": 0}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0.5, "harm": 0.5}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0.02, "harm": 0.05, "alpha": 0}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0.02, "harm": 0.05, "beta": 0.6}]}),
    ("plan_gate", {"gates": [{"metric": "failed", "tolerated": 0.02, "harm": 0.05}] * 2}),
    ("plan_invalid", {"gates": [{"metric": "app:", "better": "higher", "harm": 0.05}]}),
    ("plan_invalid", {"gates": [{"metric": "app:" + "a" * 41, "better": "higher", "harm": 0.05}]}),
    ("plan_invalid", {"gates": [{"metric": "app:agreed", "better": "lower ", "harm": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "app:agreed", "harm": 0.05}]}),
    ("plan_gate", {"gates": [{"metric": "app:agreed", "better": "higher", "harm": 0.005}]}),
    ("plan_gate", {"gates": [{"metric": "app:agreed", "better": "higher", "harm": 0.95}]}),
    ("plan_gate", {"gates": [{"metric": "app:agreed", "better": "higher", "harm": 0.1, "least": 1}]}),
    ("plan_gate", {"gates": [{"metric": "app:agreed", "better": "higher", "harm": 0.1, "tolerated": 0.1}]}),
    ("plan_gate", {"gates": [{"metric": "errors", "better": "higher", "harm": 0.1}]}),
    ("plan_gate", {"gates": [{"metric": "crash_rate", "harm": 0.001}], "period_s": 60}),
    ("plan_gate", {"gates": [{"metric": "crash_rate", "harm": 1.0, "cap": 1.0}]}),
    ("plan_gate", {"gates": [{"metric": "crash_rate", "harm": 1.0, "tolerated": 0.1}]}),
    ("plan_range", {"sample_min": 0}),
    ("plan_range", {"settled_share": 0}),
    ("plan_range", {"settled_share": 1.01}),
    ("plan_range", {"silent_s": 0}),
    ("plan_range", {"revert_s": 10**9}),
    ("plan_range", {"priority": 1001}),
    ("plan_range", {"attempt": 0}),
    ("plan_range", {"strata": ["colour"]}),
    ("plan_range", {"strata": ["arch"] * 5}),
    ("plan_range", {"late_s": 600}),
    ("plan_range", {"stage_max_s": 60}),
    ("plan_range", {"trial": {"max_s": 0}}),
    ("plan_range", {"trial": {"error_rate_max": 1.5}}),
    ("plan_range", {"trial": {"variant_tries": 0}}),
]


@pytest.mark.parametrize(("code", "change"), BAD)
def test_a_plan_with_a_fault_is_refused_by_its_code(code: str, change: dict[str, Any]):
    with pytest.raises(RefusedError) as caught:
        parse_plan({**GOOD, **change})
    assert caught.value.code == code
    assert caught.value.consequence
    assert caught.value.next_step


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 10_000])
def test_what_is_no_plan_at_all_is_refused(data: bytes):
    with pytest.raises(RefusedError) as caught:
        parse_plan(data)
    assert caught.value.code == "plan_invalid"


@pytest.mark.parametrize("field", ["models", "selector", "stages"])
def test_a_plan_without_a_required_field_is_refused(field: str):
    with pytest.raises(RefusedError):
        parse_plan({name: value for name, value in GOOD.items() if name != field})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([*GOOD, "failure", "trial", "silent_s", "strategy", "format", "priority", "strata", "gates"]),
    json_values,
)
def test_any_value_in_any_field_parses_or_is_refused(field: str, value: Any):
    try:
        plan = parse_plan({**GOOD, field: value})
    except RefusedError:
        return
    assert parse_plan(msgspec.json.encode(plan)) == plan


def test_a_comparison_holds_devices_back_and_nothing_else_does():
    assert [parse_plan(GOOD).share_of(stage) for stage in (0, 1)] == [0.05, 1.0]
    compared = parse_plan({**GOOD, "gates": [{"metric": "errors", "harm": 0.01}]})
    assert [compared.share_of(stage) for stage in (0, 1)] == [0.05, 0.95]
    assert compared.share_of(1, done=True) == 1.0
    assert parse_plan({**GOOD, "hold_back": 0.2}).share_of(1) == 0.8
