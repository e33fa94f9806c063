"""The example of README and docs/handle.md, pasted and run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from wherry_agent.children import Loadable, ServeModel
from wherry_agent.handle_server import HandleServer
from wherry_optimizer.pack import Packed, pack_model
from wherry_shared.bundle import Contract, incompatibilities
from wherry_shared.image_layout import Layout

DOCS = Path(__file__).parents[2]
PAGE = (DOCS / "docs" / "handle.md").read_text(encoding="utf-8")


def block(page: str, language: str, holding: str) -> str:
    """Return the first code block of a language that holds some words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return next(text for text in blocks if holding in text)


def detector(path: Path) -> Path:
    """A model that scores the mean red, green and blue of an image."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["frames", 3, 224, 224])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["frames", 3])
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32), "weights")
    graph = helper.make_graph(nodes, "detector", [image], [scores], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def loadable_of(packed: Packed) -> Loadable:
    layout, config = Layout(packed.path), packed.config
    variant = config.variants[0]
    return Loadable(
        model=config.model,
        target=f"{config.model}/{config.version}",
        manifest=packed.digest,
        variant=variant.id,
        digest=variant.digest,
        engine=variant.engines[0].name,
        engine_version="1",
        format=variant.format,
        path=str(layout.path(variant.digest)),
        golden_path=str(layout.path(variant.golden.digest)),
        config_path="",
        interface=config.interface,
        preprocess=config.preprocess,
        postprocess=config.postprocess,
    )


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    example = block(PAGE, "python", "def frames")
    assert example == block((DOCS / "README.md").read_text(encoding="utf-8"), "python", "def frames")
    (tmp_path / "camera.toml").write_text(block(PAGE, "toml", "[[preprocess.operations]]"))
    flat = np.linspace(0, 1, 4, dtype=np.float32).reshape(4, 1, 1, 1) * np.ones((3, 224, 224), np.float32)
    np.savez(tmp_path / "frames.npz", image=flat)
    program, command, model, *options = shlex.split(block(PAGE, "console", "pack detector.onnx").removeprefix("$ "))
    assert (program, command, model) == ("wherry-optimizer", "pack", "detector.onnx")
    asked = dict(zip(options[::2], options[1::2], strict=True))
    files = {key: tmp_path / asked.pop(f"--{key}") for key in ("output", "processing", "inputs") if f"--{key}" in asked}
    words = {key.removeprefix("--"): value for key, value in asked.items()}
    packed = pack_model(detector(tmp_path / model), **words, **files)
    declared = documented_contract()
    assert incompatibilities(declared, packed.config.interface, contract_preprocess=None, declared=True) == []
    server = HandleServer(tmp_path / "handle.sock")
    server.publish("defect-detector", ServeModel(name="defect-detector", active=loadable_of(packed)))
    environment = {"WHERRY_HANDLE_SOCKET": str(tmp_path / "handle.sock"), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", example], env=environment, capture_output=True, text=True, timeout=120)
    server.close()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r"(good|scratch|dent) 0\.3[34] by version 1\.0\.0", line) for line in lines), lines


def documented_contract() -> Contract:
    scope: dict[str, Contract] = {}
    exec(block(PAGE, "python", "Contract(").partition("with Model")[0], scope)  # type: ignore[arg-type]
    return scope["contract"]


def test_a_contract_of_the_documentation_is_one(tmp_path: Path) -> None:
    from wherry_agent import settings

    (tmp_path / settings.FILE).write_text(block(PAGE, "toml", "[contracts."))
    (contract,) = settings.load(None, {"home": str(tmp_path)}).contracts.values()
    declared = msgspec.structs.replace(documented_contract(), preprocess=contract.preprocess)
    labels = declared.outputs[0].labels
    assert labels == ["good", "scratch", "dent"]
    plain = [msgspec.structs.replace(declared.outputs[0], labels=None)]
    assert msgspec.structs.replace(declared, outputs=plain) == contract
