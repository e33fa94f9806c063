"""Who dominates whom is worked out by code, so the code is held to a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import optimizer_peers


def row(size: float, latency: float, drop: float) -> dict:
    return {"compressed_ratio": size, "latency_ratio": latency, "metric_drop": drop}


@pytest.mark.parametrize(
    ("one", "other", "wins"),
    [
        (row(0.20, 0.50, 0.0), row(0.25, 0.60, 0.0), True),
        (row(0.20, 0.50, 0.0), row(0.25, 0.48, 0.0), True),  # its latency is ahead by less than noise
        (row(0.20, 0.50, 0.0), row(0.25, 0.40, 0.0), False),
        (row(0.20, 0.50, 0.001), row(0.25, 0.60, 0.0), False),
        (row(0.20, 0.50, 0.0), row(0.2005, 0.52, 0.0), False),  # the same
        (row(0.20, 0.50, -0.002), row(0.20, 0.50, 0.0), True),
    ],
)
def test_noise_neither_wins_nor_loses(one: dict, other: dict, wins: bool) -> None:
    assert optimizer_peers.dominates(one, other) is wins
    assert not (wins and optimizer_peers.dominates(other, one))


def test_the_aim_is_met_only_where_no_peer_wins_and_most_models_are_ours() -> None:
    better, worse, ours = row(0.1, 0.2, 0.0), row(0.5, 0.9, 0.0), row(0.2, 0.4, 0.0)
    ruined = row(0.1, 0.2, 0.3)
    peers = {
        "a": {"m": worse | {"ours": ours}, "n": worse | {"ours": ours}, "o": {"failed": "it crashed"}},
        "b": {"m": worse | {"ours": ours}, "n": ruined | {"ours": ours}},
    }
    said = optimizer_peers.verdict(peers, ["m", "n", "o"], 0.005)
    assert said["table"]["n"] == {"a": "ours dominates", "b": "neither, and it loses 0.300"}
    assert said["table"]["o"] == {"a": "it made nothing", "b": "not run"}
    assert (said["never_dominated"], said["dominating_all_peers_on"], said["compared_on"]) == (True, ["m"], ["m", "n"])
    assert not said["dominating_on_most"], "one of two is not most"
    peers["b"]["n"] = better | {"ours": ours}
    assert not optimizer_peers.verdict(peers, ["m", "n", "o"], 0.005)["never_dominated"]


def test_metrics_that_samples_do_not_tell_apart_are_the_same_and_the_exact_table_says_otherwise() -> None:
    ours, careful, peer = row(0.2, 0.4, 0.004), row(0.3, 0.5, 0.001), row(0.5, 0.9, 0.0)
    for apart, said in (
        ([], "ours dominates"),
        (["ours"], "ours dominates, the one chosen by accuracy"),
        (["ours", "ours_by_accuracy"], "neither"),
    ):
        rows = {"a": {"m": peer | {"ours": ours, "ours_by_accuracy": careful, "tells_apart": apart}}}
        found = optimizer_peers.verdict(rows, ["m"], 0.005)
        assert found["table"]["m"] == {"a": said}
        assert found["table_exact"]["m"] == {"a": "neither"}
    rows = {"a": {"m": row(0.1, 0.3, 0.01) | {"ours": ours, "ours_by_accuracy": careful}}}
    found = optimizer_peers.verdict(rows, ["m"], 0.005)
    assert found["table"]["m"] == {"a": "neither, and it loses 0.010"}
    assert (found["dominating_all_peers_on"], found["dominating_all_within_budget_on"]) == ([], ["m"])
    rows["a"]["m"] = row(0.1, 0.3, 0.002) | {"ours": ours, "ours_by_accuracy": careful}
    assert not optimizer_peers.verdict(rows, ["m"], 0.005)["never_dominated"]
