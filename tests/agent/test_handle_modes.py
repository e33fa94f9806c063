"""Modes and sequences in an application's own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.agent.serving_kit import loadable
from tests.agent.test_handle import Supervisor
from tests.shared.engines import models
from wherry_agent.children import Loadable
from wherry_shared.errors import UnreachableError

ONES = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    yield made
    made.server.close()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Loadable, Loadable]:
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    return old, loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")


def test_a_candidate_that_answers_nobody_yet_answers_no_application(
    supervisor: Supervisor, pair: tuple[Loadable, Loadable]
):
    old, new = pair
    supervisor.publish(old)
    with supervisor.model(isolation="inline") as model:
        for mode, share, version in (
            ("shadow", 1.0, "1.0.0"),
            ("blue_green", 0.0, "1.0.0"),
            ("blue_green", 1.0, "1.1.0"),
            ("replace", 1.0, "1.1.0"),
        ):
            supervisor.publish_and_settle(new, incumbent=old, trial="t", mode=mode, share=share)
            assert (model.run(ONES).by.version, model.served.version) == (version, version), mode


@pytest.mark.parametrize("isolation", ["inline", "worker"])
def test_a_sequence_of_an_application_stays_with_its_version(tmp_path: Path, supervisor: Supervisor, isolation: str):
    def version(factor: int) -> Loadable:
        path = models.tally(tmp_path / f"{factor}.onnx", float(factor))
        return loadable(path, f"1.{factor}.0", model="scale", interface=models.tally_interface())

    old, new = version(1), version(10)
    supervisor.publish(old)
    with supervisor.model(isolation=isolation) as model:

        def add(sequence: str, **more: bool) -> tuple[str, float]:
            answer = model.run(ONES, sequence=sequence, **more)
            assert list(answer) == ["y"]
            return answer.by.version, float(answer["y"][0, 0])

        assert add("a") == ("1.1.0", 1)
        supervisor.publish_and_settle(new, incumbent=old, trial="t")
        assert add("a") == ("1.1.0", 2)
        assert add("b") == (("1.10.0", 10) if isolation == "inline" else ("1.1.0", 1))
        supervisor.publish_and_settle(new)
        assert add("a") == ("1.1.0", 3)
        assert add("a", sequence_start=True) == ("1.10.0", 10)
        assert add("a", sequence_end=True) == ("1.10.0", 20)
        assert add("a") == ("1.10.0", 10)


def test_a_sequence_waits_for_a_version_of_its_process(tmp_path: Path, supervisor: Supervisor):
    interface = models.tally_interface()
    first = loadable(models.tally(tmp_path / "a.onnx"), model="scale", interface=interface)
    supervisor.publish(first, trial="t")
    with supervisor.model() as model:
        with pytest.raises(UnreachableError, match="answers from the worker, where it is on trial"):
            model.run(ONES, sequence="a")
        supervisor.publish_and_settle(first)
        assert model.run(ONES, sequence="a")["y"][0, 0] == 1


def test_more_sequences_of_a_model_without_state_than_are_kept_lose_nothing(
    supervisor: Supervisor, pair: tuple[Loadable, Loadable]
):
    supervisor.publish(pair[0])
    with supervisor.model() as model:
        for _ in range(2):
            for number in range(300):
                assert model.run(ONES, sequence=str(number))["y"][0, 0] == 2.0
