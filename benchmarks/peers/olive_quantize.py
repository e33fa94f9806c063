"""One of Olive's ONNX passes, run where Olive is: `python olive_quantize.py MODEL CALLS OUT PASS`.

A workflow as its documentation writes them: the pass with its defaults; for static quantization a data configuration whose
data set gives the calls that the benchmark calibrates with, each a batch already.
"""

from __future__ import annotations

import pickle
import shutil
import sys
import tempfile
from pathlib import Path

from olive.data.component.dataset import BaseDataset
from olive.data.registry import Registry
from olive.workflows import run


def main() -> None:
    """Run the pass and put its file where the benchmark looks for it."""
    model, calls, target = (Path(text) for text in sys.argv[1:4])
    kind = sys.argv[4]

    @Registry.register_dataset("wherry_calls")
    def wherry_calls(**_: object) -> BaseDataset:
        import torch

        rows = pickle.loads(calls.read_bytes())
        return BaseDataset([({name: torch.from_numpy(value.copy()) for name, value in row.items()}, 0) for row in rows])

    with tempfile.TemporaryDirectory() as folder:
        own = {"type": kind}
        data = []
        if kind == "OnnxStaticQuantization":
            own["data_config"] = "calls"
            data = [
                {
                    "name": "calls",
                    "type": "DataContainer",
                    "load_dataset_config": {"type": "wherry_calls"},
                    "pre_process_data_config": {"type": "skip_pre_process"},
                    "post_process_data_config": {"type": "skip_post_process"},
                    "dataloader_config": {"type": "no_auto_batch_dataloader"},
                }
            ]
        run(
            {
                "input_model": {"type": "OnnxModel", "model_path": str(model)},
                "systems": {
                    "here": {
                        "type": "LocalSystem",
                        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                    }
                },
                "host": "here",
                "target": "here",
                "data_configs": data,
                "passes": {"quantize": own},
                "cache_dir": f"{folder}/cache",
                "output_dir": f"{folder}/out",
                "no_artifacts": True,
            }
        )
        found = sorted(Path(folder, "out").rglob("*.onnx"))
        if not found:
            sys.exit("the workflow ended without a model")
        shutil.copy(found[0], target)


if __name__ == "__main__":
    main()
