"""Declared processing in a handle: before, model and after are always those of one version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import loadable, worker
from tests.agent.test_handle import Supervisor
from tests.shared.engines import models
from wherry_agent.children import Loadable, ServeModel
from wherry_shared.bundle import Operation, Processing
from wherry_shared.engines import BadInput
from wherry_shared.processing import Choice

LABELS = ["a", "b", "c", "d"]


def scaled_by(factor: float) -> Processing:
    return Processing(id=f"by-{factor}", operations=[Operation(op="normalise", parameters={"scale": factor})])


TOP = Processing(id="top", operations=[Operation(op="top_k", parameters={"k": 1})])


def processed(item: Loadable, before: Processing = Processing(), after: Processing = Processing()) -> Loadable:  # noqa: B008
    outputs = [msgspec.structs.replace(item.interface.outputs[0], labels=LABELS)]
    interface = msgspec.structs.replace(item.interface, outputs=outputs)
    return msgspec.structs.replace(item, interface=interface, preprocess=before, postprocess=after)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    yield made
    made.server.close()


RAW = np.array([[1, 2, 4, 3]], np.uint8)


def test_raw_input_becomes_labels_by_the_version_that_answers(tmp_path: Path, supervisor: Supervisor) -> None:
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    supervisor.publish(processed(good, scaled_by(10.0), TOP))
    with supervisor.model() as model:
        prediction = model.predict(RAW)
        assert prediction == {"y": [[Choice("c", 2, 80.0)]]}
        assert prediction.answer["y"].tolist() == [[20.0, 40.0, 80.0, 60.0]]
        assert (prediction.by.version, prediction.fallback) == ("1.0.0", False)
        assert model.predict({"x": RAW}) == prediction
        assert model.run({"x": RAW.astype(np.float32)})["y"].tolist() == [[2.0, 4.0, 8.0, 6.0]], "run stays raw"
        with pytest.raises(BadInput):
            model.predict(RAW[0])
        with pytest.raises(BadInput, match="normalise works on numbers"):
            model.predict(np.array([["x"]], object))


def test_without_declared_processing_predict_is_run(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.publish(loadable(models.scale(tmp_path / "a.onnx", 2.0)))
    with supervisor.model() as model:
        assert model.predict(RAW.astype(np.float32))["y"].tolist() == [[2.0, 4.0, 8.0, 6.0]]
        with pytest.raises(BadInput, match="dtype"):
            model.predict(RAW)


class SwapsUnderway(Mapping[str, Any]):
    """Raw input that has the model swapped while it is being read."""

    def __init__(self, swap: Any) -> None:
        self._swap = swap

    def __getitem__(self, key: str) -> Any:
        self._swap()
        return {"x": RAW}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def test_a_swap_in_the_middle_of_a_call_mixes_nothing(tmp_path: Path, supervisor: Supervisor) -> None:
    old = processed(loadable(models.scale(tmp_path / "a.onnx", 2.0)), scaled_by(10.0), TOP)
    new = processed(loadable(models.scale(tmp_path / "b.onnx", 3.0), "1.1.0"), scaled_by(100.0))
    supervisor.publish(old)
    with supervisor.model() as model:
        prediction = model.predict(SwapsUnderway(lambda: supervisor.publish_and_settle(new)))
        assert (prediction.by.version, prediction["y"]) == ("1.0.0", [[Choice("c", 2, 80.0)]])
        after = model.predict(RAW)
        assert (after.by.version, after["y"].tolist()) == ("1.1.0", [[300.0, 600.0, 1200.0, 900.0]])


def on_trial(tmp_path: Path) -> tuple[Loadable, Loadable]:
    """An incumbent that doubles ten times the input, and a candidate that fails on what its own processing makes."""
    incumbent = processed(loadable(models.scale(tmp_path / "a.onnx", 2.0)), scaled_by(10.0), TOP)
    candidate = processed(loadable(models.root(tmp_path / "b.onnx"), "1.1.0"), scaled_by(-1.0))
    return incumbent, candidate


def test_an_incumbent_that_stands_in_makes_its_own_input_inline(tmp_path: Path, supervisor: Supervisor) -> None:
    incumbent, candidate = on_trial(tmp_path)
    supervisor.publish(incumbent)
    with supervisor.model(isolation="inline") as model:
        supervisor.publish_and_settle(candidate, incumbent=incumbent, trial="t")
        prediction = model.predict(RAW)
        assert (prediction.by.version, prediction.fallback) == ("1.0.0", True)
        assert prediction["y"] == [[Choice("c", 2, 80.0)]]
        good = model.predict(-(RAW.astype(np.float32) ** 2))
        assert (good.by.version, good["y"].tolist()) == ("1.1.0", [[1.0, 2.0, 4.0, 3.0]])


def test_an_incumbent_that_stands_in_makes_its_own_input_beside_the_worker(tmp_path: Path) -> None:
    incumbent, candidate = on_trial(tmp_path)
    with worker(tmp_path) as process:
        supervisor = Supervisor(tmp_path, str(process.unix_path))
        supervisor.publish(incumbent)
        with supervisor.model() as model:
            process.serve(ServeModel(name="scale", active=candidate, incumbent=incumbent, trial="t"))
            supervisor.publish_and_settle(candidate, incumbent=incumbent, trial="t")
            prediction = model.predict(RAW)
            assert (prediction.by.version, prediction.fallback) == ("1.0.0", True)
            assert prediction["y"] == [[Choice("c", 2, 80.0)]]
            good = model.predict(-(RAW.astype(np.float32) ** 2))
            assert (good.by.version, good["y"].tolist()) == ("1.1.0", [[1.0, 2.0, 4.0, 3.0]])
        supervisor.server.close()


def test_a_version_with_an_operation_that_is_unknown_here_is_not_engaged(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    strange = processed(
        loadable(models.scale(tmp_path / "b.onnx", 3.0), "1.1.0"), Processing(id="x", operations=[Operation(op="blur")])
    )
    supervisor.publish(good)
    with supervisor.model() as model:
        supervisor.publish_and_settle(strange)
        assert model.served.version == "1.0.0"


def test_a_sequence_keeps_the_processing_of_the_version_that_began_it(tmp_path: Path, supervisor: Supervisor) -> None:
    def version(number: int, before: float) -> Loadable:
        path = models.tally(tmp_path / f"{number}.onnx")
        made = loadable(path, f"1.{number}.0", model="scale", interface=models.tally_interface())
        return msgspec.structs.replace(made, preprocess=scaled_by(before))

    supervisor.publish(version(0, 10.0))
    with supervisor.model() as model:

        def add(sequence: str) -> tuple[str, float]:
            prediction = model.predict(np.ones((1, 4), np.uint8), sequence=sequence)
            assert list(prediction) == ["y"]
            return prediction.by.version, float(prediction["y"][0, 0])

        assert [add("a"), add("a"), add("b")] == [("1.0.0", 10.0), ("1.0.0", 20.0), ("1.0.0", 10.0)]
        supervisor.publish_and_settle(version(1, 100.0))
        assert [add("a"), add("c")] == [("1.0.0", 30.0), ("1.1.0", 100.0)]
        model.predict(np.ones((1, 4), np.uint8), sequence="a", sequence_end=True)
        assert add("a") == ("1.1.0", 100.0)


def test_tensors_that_json_cannot_carry_reach_a_candidate_in_the_worker(tmp_path: Path) -> None:
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    interface = models.interface()
    loose = [msgspec.structs.replace(interface.outputs[0], finite=False)]
    candidate = loadable(
        models.scale(tmp_path / "b.onnx", 3.0), "1.1.0", interface=msgspec.structs.replace(interface, outputs=loose)
    )
    with worker(tmp_path) as process:
        supervisor = Supervisor(tmp_path, str(process.unix_path))
        supervisor.publish(good)
        with supervisor.model() as model:
            process.serve(ServeModel(name="scale", active=candidate, incumbent=good, trial="t"))
            supervisor.publish_and_settle(candidate, incumbent=good, trial="t")
            value = np.array([[np.nan, np.inf, -0.0, 1e-45]], np.float32)
            answer = model.run({"x": value}, ["y"])
            assert (answer.by.version, answer.fallback) == ("1.1.0", False)
            assert answer["y"].tobytes() == (value * np.float32(3.0)).tobytes()
            answer["y"][0, 0] = 1.0  # what came back is the caller's
            with pytest.raises(BadInput, match="no such input"):
                model.run({"z": value})
            with pytest.raises(BadInput, match="dtype float64"):
                model.run({"x": value.astype(np.float64)})
        supervisor.server.close()
