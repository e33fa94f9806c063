"""How much accuracy the int8 and pruned variants of file-type cost, over several splits of the data.

`python benchmarks/file_type_drops.py [SPLITS [SPARSITY …]]` prints a row per split and sparsity: drop ± standard error on
the selection files (choose by these) and on the test files (what the gate will say).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec
import onnxruntime

from wherry_optimizer import data, evaluate, interface
from wherry_optimizer.data import Array, Dataset
from wherry_optimizer.passes import Work, prune, quantize
from wherry_optimizer.recipe import convert_parameters, find_recipe, load_recipe
from wherry_optimizer.sources import locate

RECIPE = "file-type-1.1.0"


def main(splits: int, sparsities: list[float]) -> None:
    """Print the table."""
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
                told = [
                    f"{drop.value:+.4f} ± {drop.standard_error:.4f} ({len(mine)})"
                    for mine, drop in (
                        (mine, evaluate.estimate(theirs - mine)) for mine, theirs in zip(own, reference, strict=True)
                    )
                ]
                print(f"split {seed}  sparsity {sparsity:.2f}  selection {told[0]}  test {told[1]}", flush=True)


def _scores(path: Path, dataset: Dataset) -> tuple[evaluate.Scores, evaluate.Scores]:
    """Return the scores on selection and on test files."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        return {"target": session.run([output], {name: inputs["bytes"]})[0]}

    return (
        evaluate.scores(run, dataset.selection, dataset.score),
        evaluate.scores(run, dataset.evaluation, dataset.score),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, [float(text) for text in sys.argv[2:]])
