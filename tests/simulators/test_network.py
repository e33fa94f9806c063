from __future__ import annotations

import random

from wherry_simulators.network import CALM, STORM, Network, Weather


def test_a_calm_network_delivers_everything_once_and_soon():
    network = Network(random.Random(1), CALM)
    for _ in range(200):
        (delay,) = network.arrivals()
        assert 1 <= delay <= CALM.delay_ms
    assert (network.sent, network.lost, network.repeated) == (200, 0, 0)


def test_a_storm_loses_repeats_and_delays_about_as_often_as_it_says():
    network = Network(random.Random(2), STORM)
    fates = [network.arrivals() for _ in range(4000)]
    arrived = [fate for fate in fates if fate]
    assert abs(sum(not fate for fate in fates) / 4000 - STORM.lost) < 0.03
    assert abs(sum(len(fate) == 2 for fate in arrived) / len(arrived) - STORM.repeated) < 0.04
    assert any(delay > STORM.delay_ms for fate in arrived for delay in fate)


def test_later_messages_overtake_earlier_ones():
    network = Network(random.Random(3), Weather(delay_ms=500))
    arrivals = [(index * 10 + network.arrivals()[0]) for index in range(50)]
    assert arrivals != sorted(arrivals)


def test_the_same_seed_gives_the_same_fates():
    first, second = (Network(random.Random(4), STORM) for _ in range(2))
    assert [first.arrivals() for _ in range(300)] == [second.arrivals() for _ in range(300)]
