"""How much accuracy the int8 and pruned variants of file-type cost, over several splits of the data.

`python benchmarks/file_type_drops.py [SPLITS [SPARSITY …]]` prints a row per split and sparsity: drop ± standard error on
the selection files (choose by these) and on the test files (what the gate will say), and writes them to
`build/bench/file_type_drops.json`. Nothing here is a matter of time: a busy machine gives the same figures.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime

from wherry_optimizer import data, evaluate, interface
from wherry_optimizer.data import Array, Dataset
from wherry_optimizer.passes import Work, prune, quantize
from wherry_optimizer.recipe import convert_parameters, find_recipe, load_recipe
from wherry_optimizer.sources import locate

RECIPE = "file-type-1.1.0"
SPLITS = 4
ROOT = Path(__file__).resolve().parents[1]


def main(splits: int, sparsities: list[float]) -> None:
    """Print the table and write it."""
    rows: list[dict[str, Any]] = []
    loaded = load_recipe(find_recipe(RECIPE))
    source = loaded.recipe.sources["onnx"]
    path = locate(source.path, distribution=source.distribution, version="", folder=Path(), what="the model")
    fitted = interface.derive(path, "onnx", source.tensors, loaded.recipe.interface)
    row = next(step for item in loaded.recipe.variants for step in item.passes if step["use"] == "prune-obs")
    options: prune.Parameters = convert_parameters(row, prune.Parameters, "prune-obs")
    for seed in range(splits):
        spec = msgspec.structs.replace(loaded.recipe.data, seed=seed)
        dataset = data.load(spec, fitted.interface, Path())
        feeds = [sample.inputs for sample in dataset.calibration]
        reference = _scores(path, dataset)
        with tempfile.TemporaryDirectory() as name:
            for number, sparsity in enumerate([0.0, *(sparsities or [options.sparsity])]):
                work = Work(Path(name) / str(number), feeds, 0)
                work.folder.mkdir()
                start = path
                if sparsity:
                    start = prune.apply(path, msgspec.structs.replace(options, sparsity=sparsity), work).path
                own = _scores(quantize.apply(start, quantize.Parameters(), work).path, dataset)
                found: dict[str, Any] = {"split": seed, "sparsity": sparsity}
                for part, mine, theirs in zip(("selection", "test"), own, reference, strict=True):
                    drop = evaluate.judge(mine, theirs, dataset.measure).drop
                    found[part] = {
                        "drop": round(drop.drop, 5),
                        "standard_error": round(drop.error, 5),
                        "files": drop.samples,
                    }
                rows.append(found)
                told = "  ".join(
                    f"{part} {found[part]['drop']:+.4f} ± {found[part]['standard_error']:.4f} ({found[part]['files']})"
                    for part in ("selection", "test")
                )
                print(f"split {seed}  sparsity {sparsity:.2f}  {told}", flush=True)
    result = {
        "file_type_drop_max": max(row["test"]["drop"] for row in rows),
        "budget": loaded.recipe.gate.drop_max,
        "calibration_files": len(dataset.calibration),
        "onnxruntime": onnxruntime.__version__,
        "rows": rows,
    }
    out = ROOT / "build" / "bench" / "file_type_drops.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"largest drop {result['file_type_drop_max']:.4f} of {result['budget']} allowed; {out.relative_to(ROOT)}")


def _scores(path: Path, dataset: Dataset) -> tuple[evaluate.Shown, evaluate.Shown]:
    """Return what the network shows on selection and on test files."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        return {"target": session.run([output], {name: inputs["bytes"]})[0]}

    return (
        evaluate.show(run, dataset.selection, dataset.metric, dataset.measure),
        evaluate.show(run, dataset.evaluation, dataset.metric, dataset.measure),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SPLITS, [float(text) for text in sys.argv[2:]])
