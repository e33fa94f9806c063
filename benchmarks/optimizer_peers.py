"""What NNCF and Olive make of the models of `benchmarks/optimizer.py`, beside what we chose, in one interleaved run.

Each peer works in an environment of its own (`peers/environments.py`), by the script that its documentation suggests, from
the same calibration calls. What it cannot do is recorded with what it said. Who dominates whom is worked out here.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from optimizer_models import FOLDER, Case
from peers.environments import python_of

from wherry_optimizer import attempt, gate, measure, metrics
from wherry_shared import golden
from wherry_shared.engines import load
from wherry_shared.errors import WherryError

PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nncf": ("nncf", "nncf_quantize.py", ()),
    "olive-static": ("olive", "olive_quantize.py", ("OnnxStaticQuantization",)),
    "olive-dynamic": ("olive", "olive_quantize.py", ("OnnxDynamicQuantization",)),
}
"""Peer → its environment, its script, and what the script is told beside model, calls and target."""
PEER_SECONDS_MAX = 900.0
REPEATS, REPEAT_PAUSE_S = 5, 4.0
"""Turns of a measurement, and seconds between two."""
AXES = ("compressed_ratio", "latency_ratio", "metric_drop")
NOISE = {"compressed_ratio": 0.01, "latency_ratio": 0.10, "metric_drop": 0.0}
"""Shares of the larger value within which two count as the same: below a tenth of a latency is noise on a shared machine.
Two metrics are also the same where the interval of their difference, paired on the test samples, holds zero."""
OURS = ("ours", "ours_by_accuracy")
"""What the search chose, which no peer may dominate, and what it would have chosen by `--prefer accuracy`: two points of the
Pareto set, both named before anything is run on the test split."""
Options = Mapping[str, str | int | float | bool]


def made_by(peer: str, name: str, case: Case, problem: attempt.Problem) -> Path:
    """Return the file that a peer makes of a model, made once.

    Raises:
        RuntimeError: it makes none, or one that does not load, with what it said.
    """
    environment, script, more = PEERS[peer]
    target = FOLDER / "peers" / f"{name}.{peer}.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        calls = target.with_suffix(".pickle")
        calls.write_bytes(pickle.dumps(problem.calibration))
        command = [python_of(environment), Path(__file__).parent / "peers" / script, case.path, calls, target, *more]
        began = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS_MAX, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took more than {PEER_SECONDS_MAX:.0f} s") from None
        print(f"{name}: {peer} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if done.returncode or not target.exists():
            target.unlink(missing_ok=True)
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"exit status {done.returncode}: {' '.join(lines[-1:])[:300]}")
    try:
        load(target, "onnx").close()
    except WherryError as error:
        raise RuntimeError(f"its file does not load: {error.message}") from error
    return target


def side_by_side(
    files: Mapping[str, tuple[Path, Options]], case: Case, problem: attempt.Problem
) -> dict[str, dict[str, Any]]:
    """Return size, accuracy on the test split, latency and memory of each file, all from one interleaved run."""
    every = {"source": (case.path, {}), **files}
    metric = metrics.make(problem.metric)
    sessions = {key: load(path, "onnx", options={"threads": 1, **own}) for key, (path, own) in every.items()}
    evidence = {
        key: [metric.evidence(attempt.answer_of(session, sample, case.state), sample.label) for sample in problem.test]
        for key, session in sessions.items()
    }
    call = problem.calibration[0]
    calls = {key: lambda session=session: session.run(call) for key, session in sessions.items()}
    latency = measure.least_disturbed(
        lambda: measure.interleaved(
            calls, dict.fromkeys(calls, "source"), rounds=25, seconds=1.5 * len(calls), clock=time.process_time
        ),
        "source",
        times=REPEATS,
        pause_s=REPEAT_PAUSE_S,
    )
    memory = peaks(every, call, sessions["source"].run(call))
    rows = {}
    for key, (path, _) in every.items():
        drop = gate.compare(metric.value, evidence[key], evidence["source"])
        rows[key] = {
            "compressed_ratio": measure.download_bytes(path) / case.path.stat().st_size,
            "latency_ratio": latency[key].ratio,
            "metric_drop": drop.drop,
            "interval": [drop.low, drop.high],
            "peak_memory_bytes": memory[key],
            "tells_apart": [own for own in OURS if own in every and _differ(metric, evidence[key], evidence[own])],
        }
    return rows


def peaks(
    files: Mapping[str, tuple[Path, Options]], call: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, int]:
    """Return what loading and running each file adds to the largest resident size of a process with the engine."""
    folder = FOLDER / "peaks"
    folder.mkdir(parents=True, exist_ok=True)
    nothing = folder / "nothing.onnx"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "nothing", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), nothing)

    def peak_of(path: Path, own: Options, vectors: Path) -> int:
        task = measure.PeakTask(
            path=str(path), format="onnx", engine="", options={"threads": 1, **own}, golden=str(vectors), tensors={}
        )
        return measure.peak(task).peak_bytes

    one = _vector(folder / "nothing.golden", {"x": np.ones(1, np.float32)}, {"y": -np.ones(1, np.float32)})
    vectors = _vector(folder / "call.golden", dict(call), dict(outputs))
    baseline = peak_of(nothing, {}, one)
    return {key: peak_of(path, own, vectors) - baseline for key, (path, own) in files.items()}


def _differ(metric: metrics.Metric, one: Sequence[Any], other: Sequence[Any]) -> bool:
    gap = gate.compare(metric.value, one, other)
    return not gap.low <= 0 <= gap.high


def dominates(one: Mapping[str, Any], other: Mapping[str, Any], *, same_metric: bool = False) -> bool:
    """Tell whether one is in no respect worse than another and in one respect better, by more than noise."""
    axes = [axis for axis in AXES if not (same_metric and axis == "metric_drop")]
    signs = [_sign(one[axis], other[axis], NOISE[axis]) for axis in axes]
    return max(signs) <= 0 and min(signs) < 0


def _sign(one: float, other: float, share: float) -> int:
    gap = one - other
    return 0 if abs(gap) <= share * max(abs(one), abs(other)) else (1 if gap > 0 else -1)


def verdict(
    peers: Mapping[str, Mapping[str, Mapping[str, Any]]], models: Sequence[str], drop_max: float
) -> dict[str, Any]:
    """Say who dominates whom, per model, and whether the aim is met.

    Args:
        peers: peer → model → its figures with ours of the same run under `ours`, or `failed`.
        models: that were searched.
        drop_max: a peer that loses more has no variant to compare with: what it made would not be shipped.
    """
    said = {
        exact: {
            model: {peer: _said(rows.get(model), drop_max, exact=exact) for peer, rows in peers.items()}
            for model in models
        }
        for exact in (False, True)
    }
    words = {model: {peer: cell.split(",")[0] for peer, cell in row.items()} for model, row in said[False].items()}
    rivals = {
        model: {peer: cell for peer, cell in row.items() if cell not in ("not run", "it made nothing")}
        for model, row in words.items()
    }
    compared = [model for model, row in rivals.items() if row]
    over_all = [model for model in compared if set(rivals[model].values()) == {"ours dominates"}]
    sound = {
        model: [cell for peer, cell in rivals[model].items() if peers[peer][model]["metric_drop"] <= drop_max]
        for model in compared
    }
    return {
        "table": said[False],
        "table_exact": said[True],
        "never_dominated": not any("it dominates" in row.values() for row in rivals.values()),
        "dominating_all_peers_on": over_all,
        "dominating_all_within_budget_on": [model for model, row in sound.items() if set(row) <= {"ours dominates"}],
        "compared_on": compared,
        "dominating_on_most": 2 * len(over_all) > len(compared),
        "noise": NOISE,
    }


def _said(row: Mapping[str, Any] | None, drop_max: float, *, exact: bool) -> str:
    """Say how a peer's file and ours stand; `exact`: metrics differ where their numbers do."""
    if row is None or "failed" in row:
        return "not run" if row is None else "it made nothing"
    same = {own: not exact and own not in row.get("tells_apart", OURS) for own in OURS}
    winners = [own for own in OURS if own in row and dominates(row[own], row, same_metric=same[own])]
    within = (
        row["metric_drop"] <= drop_max
    )  # what loses more would not be shipped: that samples are too few does not save it
    if dominates(row, row["ours"], same_metric=same["ours"] and within):
        said = "it dominates"
    elif winners:
        said = "ours dominates" if "ours" in winners else "ours dominates, the one chosen by accuracy"
    else:
        said = "neither"
    return said + (f", and it loses {row['metric_drop']:.3f}" if row["metric_drop"] > drop_max else "")


def _vector(path: Path, inputs: dict[str, Any], outputs: Mapping[str, Any]) -> Path:
    expected = {name: golden.Expected(value, value.shape) for name, value in outputs.items()}
    tolerances = {name: golden.Tolerance(0.0, 0.0) for name in outputs}
    path.write_bytes(golden.encode(golden.Golden((golden.Vector(inputs, expected),), tolerances, synthetic=True)))
    return path
