"""What a search found, from `auto` to an answer: one bundle, signed and pushed, whose variant a device proves and serves."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import numpy as np
import pytest

from tests.agent.daemon_kit import agent, site
from tests.optimizer.models import blobs, classifier
from wherry_optimizer import attempt
from wherry_optimizer.auto import auto
from wherry_optimizer.shipping import Release
from wherry_shared.image_layout import Layout

pytestmark = [pytest.mark.services, pytest.mark.slow]

MODEL = "blobs"


def test_what_a_search_chose_is_signed_pushed_proved_and_serves(tmp_path: Path) -> None:
    points, labels = blobs(200)
    np.savez(tmp_path / "data.npz", x=points, label=labels)
    result = auto(
        classifier(tmp_path / "model.onnx"),
        str(tmp_path / "data.npz"),
        drop_max=0.05,
        output=tmp_path / "out",
        release=Release(MODEL, "1.0.0", "Apache-2.0", "Example Ltd"),
        cache=tmp_path / "cache",
        prune=False,
        weigh=False,
        run=attempt.attempt,
    )
    path = result.bundled.packed.path
    held = Layout(path).bundle()[2]
    assert len(held.variants) == 2
    assert held.licence.attribution == "Example Ltd"
    assert {one.variant for one in result.bundled.proofs} == {variant.id for variant in held.variants}

    with site(tmp_path) as server, agent(server, "bench-1") as device:
        server.push(path)
        device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        server.deploy("1.0.0", "bench-1", trial_s=2, model=MODEL)
        device.until(
            "it is confirmed",
            lambda shown: (
                shown["models"].get(MODEL, {}).get("doing") == "idle"
                and shown["models"][MODEL].get("serves", {}).get("target") == f"{MODEL}/1.0.0"
            ),
        )
        connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
        tensor = {
            "name": "x",
            "datatype": "FP32",
            "shape": list(points[:20].shape),
            "data": points[:20].ravel().tolist(),
        }
        connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensor]}))
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        assert answer.status == 200, body
        (scores,) = body["outputs"]
        said = np.reshape(scores["data"], scores["shape"]).argmax(axis=1)
        assert (said == labels[:20]).mean() >= 0.9
        assert body["parameters"]["wherry_variant"] in {variant.id for variant in held.variants}
