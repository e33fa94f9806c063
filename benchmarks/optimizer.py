"""What the optimizer's search finds on real models, what it refuses, and how its peers do on the same data.

Models come from PyPI packages only (`optimizer_models.py`). For each one a search under a budget of half a point is run,
what it chose is confirmed on a test split, and the recipes that are known to ruin it have to be among the refused. NNCF and
Olive make their files in environments of their own from the same calibration calls (`optimizer_peers.py`); then all files run
interleaved in one process, on one thread, and CPU time is what counts, of several turns the one in which the source was quickest
(`measure.least_disturbed`). Writes `build/bench/optimizer.json`: `models`, `peers`,
`dominance`, `refused`, and under `acceptance` each aim with whether it was met.

Answers of an earlier run are thrown away, so that the time of a search is that of a search (`--keep` keeps them).
`--quick`: magika only, without pruning and peers, under a minute of CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from optimizer_models import CASES, FOLDER, ROOT, TFLITE, Case, tflite
from optimizer_peers import OURS, PEERS, REPEAT_PAUSE_S, REPEATS, made_by, side_by_side, verdict

from wherry_optimizer import attempt, gate, measure, metrics, search
from wherry_optimizer import auto as auto_module
from wherry_optimizer.attempt import Step, Task
from wherry_optimizer.candidates import PREFERENCES, SOURCE, TARGETS
from wherry_optimizer.model import load as load_model
from wherry_shared.errors import RefusedError

OUT = ROOT / "build" / "bench" / "optimizer.json"
TARGET = TARGETS["x86-vnni"]
MUST_REFUSE = {
    "vad": ("int8-dynamic-all", "int8-static-all"),
    "ocr": ("int8-dynamic-all",),
    "magika": ("int8-static-all",),
    "minilm": ("int8-static-all",),
}
"""Candidates that ruin these models (facts/optimizer.md)."""
DROP_MAX = 0.005
SEARCH_SECONDS = 150.0
"""Of candidates, for each model; measuring and confirming come after it."""
SPARSITY = 0.7
"""What the digits' network is pruned to by itself."""


def searched(name: str, case: Case, *, prune: bool, seconds: float, prefer: str) -> tuple[search.Result, float]:
    """Search, with the report under `build/bench/optimizer/NAME`."""
    began = time.monotonic()
    try:
        result = auto_module.auto(
            case.path,
            case.parts,
            metric=case.metric,
            outputs=case.outputs,
            drop_max=case.drop_max,
            state=case.state,
            targets=[TARGET.name],
            output=FOLDER / name,
            cache=FOLDER / "cache",
            seconds_max=seconds,
            prune=prune,
            prefer=prefer,
            say=lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True),
        )
    except RefusedError as error:
        if error.code not in ("budget_unmet", "unconfirmed"):
            raise
        print(f"{name}: {error.diagnostics()}", file=sys.stderr)
        raise
    return result, time.monotonic() - began


def run(names: list[str], *, prune: bool, peers: bool, seconds: float, prefer: str) -> dict[str, Any]:
    """Do every model; the shape is that of `build/bench/optimizer.json`."""
    models: dict[str, Any] = {}
    of_peers: dict[str, dict[str, Any]] = {peer: {} for peer in PEERS} if peers else {}
    refused: list[dict[str, str]] = []
    missing: list[str] = []
    for name in names:
        case = CASES[name]()
        try:
            result, search_s = searched(name, case, prune=prune, seconds=seconds, prefer=prefer)
        except RefusedError as error:
            models[name] = {"failed": error.code, "why": error.message}
            continue
        (found,) = result.found
        source, chosen = found.find(SOURCE), found.find(found.chosen)
        drop = found.confirmation.drop if found.confirmation else None
        models[name] = {
            "compressed_ratio": chosen.answer.download_bytes / source.answer.bytes,
            "latency_ratio": chosen.latency_ratio,
            "metric_drop": drop.drop if drop else 0.0,
            "search_s": search_s,
            "chosen": chosen.id,
            "selection_drop": chosen.drop.drop if chosen.drop else 0.0,
            "interval": [drop.low, drop.high] if drop else None,
            "peak_memory_bytes": [source.peak_bytes, chosen.peak_bytes],
            "candidates": len(found.tried) - 1,
            "pareto": [
                {
                    "id": item.id,
                    "compressed_ratio": item.answer.download_bytes / source.answer.bytes,
                    "latency_ratio": item.latency_ratio,
                    "selection_drop": item.drop.drop if item.drop else 0.0,
                }
                for item in found.tried
                if item.pareto
            ],
        }
        refused += [
            {"model": name, "candidate": item.id, "by": item.verdict.by, "why": item.verdict.why}
            for item in found.refused
        ]
        kept_out = {item.id for item in found.refused}
        missing += [f"{name}: {one}" for one in MUST_REFUSE.get(name, ()) if one not in kept_out]
        files: dict[str, tuple[Path, Mapping[str, Any]]] = {}
        for peer, rows in of_peers.items():
            try:
                files[peer] = made_by(peer, name, case, result.problem), {}
            except (RuntimeError, subprocess.CalledProcessError) as error:
                rows[name] = {"failed": str(error)}
        if of_peers:
            careful = found.find(found.best["accuracy"])
            models[name]["chosen_by_accuracy"] = careful.id
            own = {
                key: (Path(item.answer.path), item.candidate.options)
                for key, item in zip(OURS, (chosen, careful), strict=True)
            }
            figures = side_by_side({**own, **files}, case, result.problem)
            models[name]["latency_ratio_of_search"] = models[name]["latency_ratio"]
            models[name]["latency_ratio"] = figures["ours"]["latency_ratio"]
            models[name]["beside_peers"] = {key: figures[key] for key in ("source", *OURS)}
            for peer in files:
                of_peers[peer][name] = figures[peer] | {key: figures[key] for key in OURS}
        print(json.dumps({name: models[name]}, indent=2), flush=True)
    return {
        "models": models,
        "peers": of_peers,
        "dominance": verdict(of_peers, names, DROP_MAX) if of_peers else {},
        "refused": refused,
        "not_refused": missing,
    }


def interpreted(files: dict[str, Path], call: dict[str, Any]) -> dict[str, float]:
    """Return latencies of TFLite files over the first one's, inputs and outputs copied, without the engine's checks.

    The smaller wakeword model takes 12 microseconds, and the checks of a session as long again.
    """
    from ai_edge_litert.interpreter import Interpreter

    def prepared(path: Path) -> Callable[[], Any]:
        one = Interpreter(str(path), num_threads=1)
        one.allocate_tensors()
        (taken,) = one.get_input_details()
        given, value = one.get_output_details()[0]["index"], next(iter(call.values()))

        def once() -> Any:
            one.set_tensor(taken["index"], value)
            one.invoke()
            return one.get_tensor(given)

        return once

    calls = {key: prepared(path) for key, path in files.items()}
    first = next(iter(files))
    found = measure.least_disturbed(
        lambda: measure.interleaved(
            calls, dict.fromkeys(calls, first), rounds=200, seconds=2.0, clock=time.process_time
        ),
        first,
        times=REPEATS,
        pause_s=REPEAT_PAUSE_S,
    )
    return {key: row.ratio for key, row in found.items()}


def run_tflite() -> dict[str, Any]:
    """Search each TFLite model with outputs that may move by three in a hundred."""
    rows: dict[str, Any] = {}
    for name in TFLITE:
        case = tflite(name)
        model = load_model(case.path)
        problem = auto_module.make_problem(model, case.parts, metrics.MetricOf(name=case.metric), {}, 0)
        settings = search.Settings(budget=gate.Budget(case.drop_max, None, 0.03), prefer="latency")
        found = search.search(problem, TARGETS["tflite"], settings, FOLDER / "cache")
        source, chosen = found.find(SOURCE), found.find(found.chosen)
        bare = interpreted({"float": case.path, "chosen": Path(chosen.answer.path)}, problem.calibration[0])
        rows[name] = {
            "chosen": chosen.id,
            "file_ratio": chosen.answer.bytes / source.answer.bytes,
            "compressed_ratio": chosen.answer.download_bytes / source.answer.bytes,
            "latency_ratio": bare["chosen"],
            "session_latency_ratio": chosen.latency_ratio,
            "peak_memory_bytes": [source.peak_bytes, chosen.peak_bytes],
            "output_error": chosen.answer.error,
            "refused": [
                {"candidate": item.id, "by": item.verdict.by, "why": item.verdict.why} for item in found.refused
            ],
        }
    return rows


def pruned(case: Case) -> dict[str, Any]:
    """Take 70 % of the weights of a network by `prune-obs` alone, in a folder of its own so that the time is real.

    Nothing was chosen by any sample that was held back, so both halves of them say what is lost.
    """
    model = load_model(case.path)
    problem = auto_module.make_problem(model, case.parts, metrics.MetricOf(name=case.metric), case.state, 0)
    metric = metrics.make(problem.metric)
    with tempfile.TemporaryDirectory() as folder:
        path = attempt.write_problem(problem, Path(folder))
        steps = [[], [Step(use="prune-obs", parameters={"sparsity": SPARSITY})]]
        answers = [
            [attempt.run(Task(problem=str(path), cache=folder, steps=one, part=part)) for part in ("selection", "test")]
            for one in steps
        ]
        (source, *_), (own, *_) = answers
        if own.code:
            return {"failed": own.code, "why": own.why}
        before, after = ([row for answer in both for row in answer.evidence] for both in answers)
        drop = gate.compare(metric.value, after, before)
    return {
        "sparsity": SPARSITY,
        "seconds": own.seconds,
        "metric_drop": drop.drop,
        "interval": [drop.low, drop.high],
        "samples": len(after),
        "compressed_ratio": own.download_bytes / source.bytes,
        "zeros_of_all_weights": own.notes[-1]["zeros_of_all_weights"],
    }


def acceptance(result: dict[str, Any]) -> dict[str, Any]:
    """Return each aim: what was measured for it, and whether it was met. Models that were not run have no say."""
    rows = {name: row for name, row in result["models"].items() if "failed" not in row}
    near = {name: row for name, row in rows.items() if row["metric_drop"] <= DROP_MAX}
    sizes = {name: near[name]["compressed_ratio"] if name in near else None for name in result["models"]}
    fast = {name: row["latency_ratio"] for name, row in near.items() if row["latency_ratio"] <= 0.45}
    aims: dict[str, Any] = {
        "what ruins is refused": {"measured": result["not_refused"], "met": not result["not_refused"]},
        "compressed, at most 0.25 (vad 0.30)": {
            "measured": sizes,
            "met": all(size is not None and size <= (0.30 if name == "vad" else 0.25) for name, size in sizes.items()),
        },
        "latency at most 0.45 on three": {"measured": fast, "met": len(fast) >= 3},
    }
    if "digits" in result["models"]:
        row, own = near.get("digits"), result["pruned"]
        aims["digits: at most 0.08 compressed and 0.30 latency"] = {
            "measured": row and [row["compressed_ratio"], row["latency_ratio"]],
            "met": row is not None and row["compressed_ratio"] <= 0.08 and row["latency_ratio"] <= 0.30,
        }
        aims["digits: 70 % zeros at 0.2 point in 60 s"] = {
            "measured": own,
            "met": "failed" not in own and own["metric_drop"] <= 0.002 and own["seconds"] < 60,
        }
    if "ocr" in rows:
        row = rows["ocr"]
        aims["12 candidates for the 11 MB model in 5 minutes"] = {
            "measured": [row["candidates"], row["search_s"]],
            "met": row["candidates"] >= 12 and row["search_s"] < 300,
        }
    if result["tflite"]:
        wake = {name: result["tflite"][name] for name in ("wakeword-embedding", "alexa")}
        aims["wakeword: at most 0.28 of the file, 0.6 latency, outputs moved by 0.03"] = {
            "measured": {
                name: [row["file_ratio"], row["latency_ratio"], row["output_error"]] for name, row in wake.items()
            },
            "met": all(
                row["file_ratio"] <= 0.28 and row["latency_ratio"] <= 0.6 and row["output_error"] <= 0.03
                for row in wake.values()
            ),
        }
    said = result["dominance"]
    if said:
        aims["never dominated by a peer, dominating on most"] = {
            "measured": {
                key: said[key]
                for key in (
                    "table",
                    "table_exact",
                    "dominating_all_peers_on",
                    "dominating_all_within_budget_on",
                    "compared_on",
                )
            },
            "met": said["never_dominated"] and said["dominating_on_most"],
        }
    return aims


def main() -> int:
    """Run, print and write; 1 if a recipe that ruins a model was let through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=SEARCH_SECONDS, help="of candidates per model")
    parser.add_argument("--keep", action="store_true", help="go on from the answers of an earlier run")
    parser.add_argument("--prefer", choices=PREFERENCES, default="balanced")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-tflite", action="store_true")
    given = parser.parse_args()
    names = ["magika"] if given.quick else given.models or list(CASES)
    if not given.keep:
        shutil.rmtree(FOLDER / "cache", ignore_errors=True)
    result = run(
        names,
        prune=not given.quick,
        peers=not (given.quick or given.no_peers),
        seconds=given.seconds,
        prefer=given.prefer,
    )
    result["pruned"] = pruned(CASES["digits"]()) if "digits" in names else {}
    result["tflite"] = {} if given.quick or given.no_tflite or given.models else run_tflite()
    result["acceptance"] = acceptance(result)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if result["not_refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
