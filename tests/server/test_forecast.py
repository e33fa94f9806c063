"""What a plan would do, and whether what was decided follows from what was known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.server.fleet_kit import PROJECT, fleet, run
from wherry_server import explaining, rollouts
from wherry_server.forecast import Member, Outcomes, forecast, synthetic
from wherry_server.plan import Plan, parse_plan
from wherry_shared.errors import RefusedError

WELL = Outcomes(failed=0, silent=0)


def plan_of(**changes: Any) -> Plan:
    return parse_plan(
        {
            "models": [{"model": "m", "version": "1.0.0", "manifest": "sha256:" + "a" * 64}],
            "selector": "all",
            "stages": [{"share": 0.1}, {"share": 1.0}],
            **changes,
        }
    )


def test_a_good_bundle_reaches_everybody_and_takes_as_long_as_its_devices_and_soaks():
    for one in forecast(plan_of(stages=[{"share": 0.1, "soak_s": 600}, {"share": 1.0}]), synthetic(200), WELL, 3):
        assert (one.state, one.exposed, one.failed, one.detected_s) == ("done", 200, 0, None)
        assert 600 + 2 * 60 <= one.duration_s <= 600 + 2 * 180 + 200
        assert len(one.stages) == 2


def test_a_bad_bundle_is_noticed_in_its_first_stage():
    ran = forecast(plan_of(), synthetic(500), Outcomes(failed=0.5, silent=0), 5)
    assert {one.state for one in ran} == {"halted"}
    assert all(one.exposed == 50 and one.detected_s is not None and one.detected_s < 200 for one in ran)


def test_a_rate_takes_the_time_that_it_takes():
    (one,) = forecast(plan_of(rate={"per_minute": 10}), synthetic(300), WELL, 1)
    assert one.state == "done"
    assert 1740 <= one.duration_s <= 1740 + 600


def test_devices_of_another_time_zone_wait_for_their_window():
    members = [Member(f"d{n}", "", "Asia/Tokyo" if n % 2 else "UTC") for n in range(40)]
    plan = plan_of(
        start_at="2026-01-05T01:00:00+00:00", window={"from": "01:00", "until": "03:00"}, stages=[{"share": 1.0}]
    )
    (one,) = forecast(plan, members, WELL, 1)
    assert one.state == "done"
    assert 15 * 3600 <= one.duration_s <= 15 * 3600 + 900


ERRORS = {"metric": "errors", "harm": 0.01}
CRASHES = {"metric": "crash_rate", "harm": 0.5}
AGREED = {"metric": "app:agreed", "better": "higher", "harm": 0.1}


@pytest.mark.parametrize("gate", [ERRORS, CRASHES, AGREED], ids=lambda gate: str(gate["metric"]))
@pytest.mark.parametrize("strategy", ["canary", "adaptive"])
def test_a_comparison_is_forecast_by_stated_values(gate: dict[str, Any], strategy: str):
    stages = [{"share": 1.0}] if strategy == "adaptive" else [{"share": 0.2}, {"share": 1.0}]
    plan = plan_of(strategy=strategy, gates=[gate], stages=stages)
    good = forecast(plan, synthetic(1_000), WELL, 2)
    assert {(one.state, one.exposed) for one in good} == {("done", 1_000)}
    assert all(one.duration_s > 2 * plan.period_s for one in good), "it takes a whole period to compare"
    bad = forecast(plan, synthetic(1_000), Outcomes(failed=0, silent=0, worse=4.0), 2)
    assert {(one.state, one.reason) for one in bad} == {("halted", f"{gate['metric']}_bound")}
    assert all(one.exposed <= 500 for one in bad)


@pytest.mark.parametrize(("metric", "share", "state"), [("crashed", 1.0, "halted"), ("crashed", 0.0, "done")])
def test_devices_fail_in_the_way_that_is_stated(metric: str, share: float, state: str):
    gate = {"metric": metric, "tolerated": 0.02, "harm": 0.1}
    plan = plan_of(gates=[gate], failure={"share": 0.5}, stages=[{"share": 1.0}])
    ran = forecast(plan, synthetic(300), Outcomes(failed=0.2, silent=0, crashed=share, returned=1 - share), 3)
    assert {one.state for one in ran} == {state}


def test_an_adaptive_plan_is_forecast_to_expose_more_where_the_director_looks_often():
    plan = plan_of(strategy="adaptive", stages=[{"share": 1.0}])
    apart = forecast(plan, synthetic(200), Outcomes(failed=0.5, silent=0), 8)
    together = forecast(plan, synthetic(200), Outcomes(failed=0.5, silent=0, look_s=200), 8)
    assert {one.state for one in (*apart, *together)} == {"halted"}
    assert {one.exposed for one in together} == {5}
    assert min(one.exposed for one in apart) > 5


def test_silent_devices_end_a_run_too():
    ran = forecast(plan_of(), synthetic(100), Outcomes(failed=0, silent=0.9), 3)
    assert {(one.state, one.reason) for one in ran} == {("halted", "silent_bound")}


@pytest.mark.parametrize(
    ("code", "change", "outcomes"),
    [
        ("forecast_range", {}, Outcomes(crashed=1.1)),
        ("forecast_range", {}, Outcomes(spread=0.5)),
        ("forecast_range", {}, Outcomes(fails_s=-1)),
        ("forecast_range", {}, Outcomes(failed=0.7, silent=0.7)),
        ("forecast_range", {}, Outcomes(settle_s=0)),
    ],
)
def test_what_cannot_be_forecast_is_refused(code: str, change: dict[str, Any], outcomes: Outcomes):
    with pytest.raises(RefusedError) as caught:
        forecast(plan_of(**change), synthetic(10), outcomes, 1)
    assert caught.value.code == code


@pytest.mark.backends
def test_every_decision_of_a_rollout_follows_from_its_evidence(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(20, version="1.0.0")
            for device in devices[::2]:
                device.behaviours["1.1.0"] = "bad"
            good = await found.roll_out("1.0.0", rate={"per_minute": 600}, stages=[{"count": 5}, {"share": 1.0}])
            await found.until(good, "done")
            gates = [{"metric": "failed", "tolerated": 0.05, "harm": 0.3}]
            bad = await found.roll_out("1.1.0", stages=[{"share": 0.5}, {"share": 1.0}], gates=gates)
            await found.until(bad, "halted")
            async with found.database.read() as connection:
                for number in (good, bad):
                    told = await explaining.explain(connection, PROJECT, number, devices[0].id)
                    assert told["replayed"] == len(told["decided"]) > 2
                    assert told["differing"] == []
                    assert [one["gate"] for one in told["needs"]] == (["failed"] if number == bad else [])
                    expected = {"confirmed"} if number == good else {"returned", "known_bad"}
                    assert told["device"]["code"] in expected
                row = await rollouts.find(connection, PROJECT, bad)
                (last, *_) = (await rollouts.decisions(connection, PROJECT, bad, 0, 1000))[::-1]
                first = (await rollouts.decisions(connection, PROJECT, bad, 0, 1000))[0]
            # what was not decided on that evidence is found out
            plan = parse_plan(row.plan)
            assert explaining.follows(plan, first["progress_before"], first["evidence"], first["decisions"]) is True
            assert explaining.follows(plan, first["progress_before"], first["evidence"], last["decisions"]) is False
            assert explaining.follows(plan, first["progress_before"], {}, first["decisions"]) is None
            # and so is a rollout that somebody put elsewhere than where its decisions led
            same = (first["progress_before"], first["evidence"], first["decisions"])
            assert explaining.follows(plan, *same, last["progress_before"]) is False
            async with found.database.write() as connection:
                where = {"p": json.dumps({**row.progress, "stage": 1}), "n": bad}
                cast = "CAST(:p AS JSON)" if connection.dialect.name == "postgresql" else ":p"
                await connection.execute(text(f"UPDATE rollout SET progress = {cast} WHERE number = :n"), where)
            async with found.database.read() as connection:
                told = await explaining.explain(connection, PROJECT, bad, "")
            assert told["differing"] == [last["revision"]]

    run(work())


def test_a_device_is_told_why_not_yet_and_a_plan_is_forecast_over_the_fleet(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            devices = await found.enrol(10, version="1.0.0")
            number = await found.roll_out("1.1.0", stages=[{"count": 1, "soak_s": 600}, {"share": 1.0}])
            await found.turn()
            codes = []
            async with found.database.read() as connection:
                for device in devices:
                    told = await explaining.explain(connection, PROJECT, number, device.id)
                    codes.append(told["device"]["code"])
                wish = {"plan": {"stages": [{"share": 1.0}]}, "outcomes": {"failed": 0, "silent": 0}, "runs": 2}
                shown = await explaining.simulate(connection, PROJECT, wish)
                with pytest.raises(RefusedError) as caught:
                    await explaining.simulate(connection, PROJECT, {**wish, "outcomes": {"luck": 1}})
                assert caught.value.code == "forecast_range"
            assert sorted(codes) == ["ahead"] * 9 + ["confirmed"]
            assert (shown["devices"], shown["ends"], shown["exposed"]["high"]) == (10, {"done": 2}, 10)

    run(work())
