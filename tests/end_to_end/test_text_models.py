"""A model that takes text and gives text, from `pack` to an answer: golden vectors of text prove it on the device."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from tests.agent.daemon_kit import agent, site
from tests.optimizer.models import dictionary
from wherry_optimizer.pack import pack_model
from wherry_shared.golden import decode
from wherry_shared.image_layout import Layout

pytestmark = [pytest.mark.services, pytest.mark.slow]

MODEL = "words"


def test_a_model_of_text_is_packed_signed_proved_and_answers_in_json_and_binary(tmp_path: Path) -> None:
    inputs = tmp_path / "words.npz"
    np.savez(inputs, word=np.array([["cat"], ["Öl"], ["nobody knows this"]]))
    made = pack_model(
        dictionary(tmp_path / "words.onnx"),
        name=MODEL,
        version="1.0.0",
        licence="Apache-2.0",
        output=tmp_path / "bundles",
        inputs=inputs,
    )
    variant = made.config.variants[0]
    layout = Layout(made.path)
    _, manifest, _ = layout.bundle()
    layer = next(item for item in manifest.layers if item.digest == variant.golden.digest)
    kept = decode(layout.read(layer, variant.golden.bytes))
    assert {vector.inputs["word"][0, 0] for vector in kept.vectors} == {"cat", "Öl", "nobody knows this"}
    assert {vector.expected["kind"].values[0, 0] for vector in kept.vectors} == {"animal", "Flüssigkeit", "unknown"}

    with site(tmp_path) as server, agent(server, "bench-1") as device:
        server.push(made.path)
        device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        server.deploy("1.0.0", "bench-1", trial_s=2, model=MODEL)
        device.until(
            "the model of text is confirmed",
            lambda shown: (
                shown["models"].get(MODEL, {}).get("doing") == "idle"
                and shown["models"][MODEL].get("serves", {}).get("target") == f"{MODEL}/1.0.0"
            ),
        )

        connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
        tensor = {"name": "word", "datatype": "BYTES", "shape": [2, 1], "data": ["cat", "Öl"]}
        connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensor]}))
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        assert answer.status == 200, body
        found = {item["name"]: (item["datatype"], item["data"]) for item in body["outputs"]}
        assert found == {"kind": ("BYTES", ["animal", "Flüssigkeit"]), "number": ("INT64", [3, 7])}

        given = triton.InferInput("word", [2, 1], "BYTES")
        given.set_data_from_numpy(np.array([["Öl"], ["house"]], object), binary_data=True)
        asked = [triton.InferRequestedOutput(name, binary_data=True) for name in ("kind", "number")]
        with triton.InferenceServerClient(f"127.0.0.1:{device.port}") as client:
            result = client.infer(MODEL, [given], outputs=asked)
        assert [item.decode() for item in result.as_numpy("kind").ravel()] == ["Flüssigkeit", "unknown"]
        assert result.as_numpy("number").tolist() == [[7], [-1]]
