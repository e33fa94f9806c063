"""Whole agents that choose: the next variant where the first is not good here, and the only one that an engine can run."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import flatbuffers
import pytest
from ai_edge_litert import schema_py_generated as schema

from tests.agent.daemon_kit import MODEL, Agent, Piece, agent, site, write_pieces
from tests.shared.engines import models
from wherry_agent import status
from wherry_shared import reasons
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.engines import tiny

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

PAIR = Interface(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[2])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[2])],
)


@pytest.mark.slow
def test_a_device_takes_the_variant_that_is_good_on_it(tmp_path: Path) -> None:
    """The first, smaller to download, misses its golden vectors; the second serves, and status says why."""
    first, second = models.scale(tmp_path / "small.onnx", 2.0), models.heavy(tmp_path / "large.onnx", 1)
    root = tmp_path / "two"
    write_pieces(root, "1.0.0", [Piece("large", second), Piece("small", first, spoil=True)])
    with site(tmp_path) as server, agent(server, "two", "--engines", "onnxruntime") as device:
        server.push(root)
        device.until("its engines are known", lambda shown: shown["engines"])
        server.deploy("1.0.0", "two", trial_s=1)
        model = device.until_serves("1.0.0")
        assert model["serves"]["variant"] == "large"
        assert "not measured" in model["serves"]["why"]
        (other,) = model["serves"]["others"]
        assert other.startswith(f"small: failed {reasons.GOLDEN_MISS}")
        shown = status.render(device.status())
        assert "variant large" in shown
        assert "not small: failed golden_miss" in shown
        assert [bad["reason"] for bad in device.status()["known_bad"]] == [reasons.GOLDEN_MISS]
        code, answer = device.infer(1.5)
        assert (code, answer["outputs"][0]["data"][0]) == (200, 3.0)
        assert answer["parameters"]["wherry_variant"] == "large"


def test_a_device_with_nothing_but_a_tflite_runtime_installs_swaps_and_returns(tmp_path: Path) -> None:
    with site(tmp_path) as server, agent(server, "lite", "--engines", "ai-edge-litert") as device:
        for version, data in (("3.0.0", tiny.MODELS["tflite"]), ("3.1.0", _squares())):
            weights = tmp_path / f"{version}.tflite"
            weights.write_bytes(data)
            lite = Piece("lite", weights, engine="ai-edge-litert", format="tflite")
            write_pieces(tmp_path / version, version, [lite], interface=PAIR)
            server.push(tmp_path / version)
        shown = device.until("its engines are known", lambda shown: shown["engines"])
        assert [engine.split()[0] for engine in shown["engines"]] == ["ai-edge-litert"]
        server.deploy("3.0.0", "lite", trial_s=1)
        assert device.until_serves("3.0.0")["serves"]["engine"].startswith("ai-edge-litert ")
        assert _ask(device) == ("3.0.0", [3.0, 8.0])
        server.deploy("3.1.0", "lite", trial_s=600)
        device.until_doing("on trial")
        assert _ask(device) == ("3.1.0", [2.25, 16.0])
        server.deploy("3.0.0", "lite", attempt=2)
        device.until_serves("3.0.0")
        assert _ask(device) == ("3.0.0", [3.0, 8.0])


def _squares() -> bytes:
    """The tiny model with MUL in the place of ADD: y = x * x."""
    model = schema.ModelT.InitFromPackedBuf(tiny.MODELS["tflite"], 0)
    code, operator = model.operatorCodes[0], model.subgraphs[0].operators[0]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.MUL
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.MulOptions, schema.MulOptionsT()
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _ask(device: Agent) -> tuple[str, list[float]]:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.5, 4.0]}]}
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps(body))
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer["model_version"], answer["outputs"][0]["data"]
