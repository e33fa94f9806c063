"""What sample a stated harm and stated errors ask for."""

from __future__ import annotations

from typing import Any

import pytest

from wherry_server.gates import Gate, check_gate, control, needs
from wherry_server.sequential import LANES_MAX, STEPS, Pairs

PERIOD_S = 900
RATED = Gate(metric="crash_rate", harm=0.5)
AGREED = Gate(metric="app:agreed", harm=0.1, better="higher")


@pytest.mark.parametrize("gate", [RATED, AGREED, Gate(metric="errors", harm=0.01), Gate(metric="latency", harm=0.2)])
def test_stricter_wishes_need_more(gate: Gate):
    def first(**changes: Any) -> int:
        return needs(type(gate)(**{**kind, **changes}), PERIOD_S)[0].devices

    kind = {name: getattr(gate, name) for name in Gate.__struct_fields__}
    now = first()
    assert first(alpha=0.001) >= now
    assert first(beta=0.001) >= now
    assert first(harm=gate.harm / 2, cap=gate.most) > now


def test_fewer_devices_tell_a_rate_of_crashes_that_are_watched_for_longer():
    found = needs(RATED, PERIOD_S)
    assert len(found) > 3
    assert [one.devices for one in found] == sorted((one.devices for one in found), reverse=True)
    assert found[0].after_s == 2 * PERIOD_S
    for one in found:
        served_s = one.after_s / 2
        assert one.device_hours == pytest.approx(one.devices * served_s / 3600)


@pytest.mark.parametrize("metric", ["failed", "returned", "crashed"])
def test_what_has_no_control_is_needed_once(metric: str):
    (one,) = needs(Gate(metric=metric, harm=0.08, tolerated=0.02), PERIOD_S)
    assert 30 < one.devices < 300
    assert (one.after_s, one.device_hours) == (0, 0)


@pytest.mark.parametrize("lane", range(LANES_MAX))
def test_what_is_needed_is_what_decides(lane: int):
    """Devices that never crash, and ones that crash as often as is named, by the number of devices that is named."""
    caps = RATED.caps(PERIOD_S)
    hours = (1 << lane) * PERIOD_S / 3600
    after_s = (1 << (lane + 1)) * PERIOD_S
    named = [one for one in needs(RATED, PERIOD_S) if one.after_s == after_s]
    if not named:
        return
    (one,) = named

    def judged(pairs: Pairs) -> str:
        lanes: list[Pairs] = [()] * LANES_MAX
        lanes[lane] = pairs
        return control(RATED, lanes, PERIOD_S).outcome

    assert judged(((0, one.devices),)) == "pass"
    expected = RATED.harm * hours * one.devices
    step = round(STEPS / (caps[lane] * hours))
    assert judged(((0, one.devices - round(expected / 2)), (2 * step, round(expected / 2)))) == "breach" or expected < 1
    assert judged(((0, max(one.devices // 4, 1)),)) == "unknown"


def test_every_metric_scales_its_values_as_its_gate_says():
    assert AGREED.part(0.25) == 0.75
    assert AGREED.part(7) == 0
    late = Gate(metric="app:late-ms", harm=5, better="lower", least=10, cap=60)
    check_gate(late, PERIOD_S)
    assert [late.part(value) for value in (0, 10, 35, 60, 99)] == [0, 0, 0.5, 1, 1]
    assert late.caps(PERIOD_S) == (50,) * LANES_MAX
