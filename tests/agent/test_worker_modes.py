"""A real worker process: shadows, standing by and taking over, groups, sequences."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from tests.agent.serving_kit import DEADLINE_S, infer_body, loadable, worker
from tests.shared.engines import models
from wherry_agent.answering.budget import BURST_SECONDS
from wherry_agent.children import ServeModel, Stats
from wherry_shared import reasons
from wherry_shared.ids import in_share

ONES = [[1.0, 1.0, 1.0, 1.0]]


def value(answer) -> float:
    return answer["outputs"][0]["data"][0]


def test_a_shadow_is_compared_and_answers_nobody(tmp_path: Path):
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "new.onnx", 2.001), "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=old))
        wanted = ServeModel(name="scale", active=new, incumbent=old, trial="t", mode="shadow", shadow_cpu_share_max=1.0)
        (serving,) = process.serve(wanted)
        assert (serving.ok, serving.incumbent_loaded) == (True, True)
        for _ in range(12):
            status, answer = process.infer(ONES)
            assert (status, value(answer), answer["model_version"]) == (200, 2.0, "1.0.0")
            assert "wherry_fallback" not in answer["parameters"]
        arm = process.arm("shadow", lambda one: one.requests + one.skipped == 12)
        assert (arm.trial, arm.digest, arm.errors) == ("t", new.digest, 0)
        assert arm.agreed == arm.compared == arm.requests >= 1
        # the time of the shadow is over: it takes over, is confirmed, and nothing is loaded again
        for last in (
            ServeModel(name="scale", active=new, incumbent=old, trial="u"),
            ServeModel(name="scale", active=new),
        ):
            (serving,) = process.serve(last)
            assert (serving.ok, serving.load_ms) == (True, 0.0)
            assert process.infer(ONES)[1]["model_version"] == "1.1.0"


def test_a_shadow_that_crashes_nothing_but_itself_is_told(tmp_path: Path):
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.choosy(tmp_path / "new.onnx", 2.0), "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=new, incumbent=old, trial="t", mode="shadow"))
        status, answer = process.infer([[7.0, 1.0, 1.0, 1.0]])
        assert (status, value(answer)) == (200, 14.0)
        arm = process.arm("shadow", lambda one: one.errors == 1)
        assert "run_failed" in arm.last_error


def test_groups_are_swapped_and_taken_back_as_one(tmp_path: Path):
    def version(model: str, number: int):
        return loadable(models.scale(tmp_path / f"{model}{number}.onnx", float(number)), f"1.{number}.0", model=model)

    old = {name: version(name, 1) for name in ("left", "right")}
    new = {name: version(name, 2) for name in ("left", "right")}
    with worker(tmp_path) as process:

        def versions() -> list[str]:
            return [process.infer(ONES, name)[1]["model_version"] for name in old]

        def asked(name: str, generation: int = 0) -> tuple[int, dict]:
            body = {**infer_body(ONES), "parameters": {"wherry_generation": generation} if generation else {}}
            return process.call("POST", f"/v2/models/{name}/infer", body)

        process.serve(*(ServeModel(name=name, active=old[name], group="pair") for name in old))
        generation = asked("left")[1]["parameters"]["wherry_generation"]
        assert asked("right", generation)[0] == 200
        trial = [ServeModel(name=name, active=new[name], incumbent=old[name], trial="t", group="pair") for name in old]
        assert all(one.ok for one in process.serve(*trial))
        assert versions() == ["1.2.0", "1.2.0"]
        status, answer = asked("right", generation)
        assert status == 400
        assert "was replaced by" in answer["error"], "half of the answers by one generation, half by another"
        assert asked("right", asked("left")[1]["parameters"]["wherry_generation"])[0] == 200
        answers = process.serve(*(ServeModel(name=name, active=old[name], group="pair") for name in old))
        assert [(one.ok, one.load_ms) for one in answers] == [(True, 0.0)] * 2
        assert versions() == ["1.1.0", "1.1.0"]
        (tmp_path / "junk").write_bytes(b"junk")
        bad = msgspec.structs.replace(
            trial[1], active=msgspec.structs.replace(new["right"], path=str(tmp_path / "junk"))
        )
        answers = process.serve(trial[0], bad)
        assert [(one.ok, one.reason) for one in answers] == [
            (False, reasons.GROUP),
            (False, reasons.DIGEST_MISMATCH),
        ]
        assert versions() == ["1.1.0", "1.1.0"]


def test_a_sequence_over_http_stays_with_its_version_while_others_are_swapped(tmp_path: Path):
    def version(factor: int):
        path = models.tally(tmp_path / f"{factor}.onnx", float(factor))
        return loadable(path, f"1.{factor}.0", model="tally", interface=models.tally_interface())

    old, new = version(1), version(10)
    with worker(tmp_path) as process:

        def add(sequence: int, **parameters: bool) -> tuple[str, float]:
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}
            body = {"inputs": [tensor], "parameters": {"sequence_id": sequence, **parameters}}
            status, answer = process.call("POST", "/v2/models/tally/infer", body)
            assert status == 200, answer
            assert [output["name"] for output in answer["outputs"]] == ["y"]
            return answer["model_version"], value(answer)

        process.serve(ServeModel(name="tally", active=old))
        assert add(1, sequence_start=True) == ("1.1.0", 1.0)
        process.serve(ServeModel(name="tally", active=new, incumbent=old, trial="t"))
        assert add(1) == ("1.1.0", 2.0)
        assert add(2, sequence_start=True) == ("1.10.0", 10.0)
        process.serve(ServeModel(name="tally", active=new))
        assert add(1) == ("1.1.0", 3.0)
        assert add(1, sequence_end=True) == ("1.1.0", 4.0)
        assert add(1, sequence_start=True) == ("1.10.0", 10.0)
        assert add(2) == ("1.10.0", 20.0)


def test_a_split_over_http_is_stable_by_request_id(tmp_path: Path):
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=old))
        split = ServeModel(name="scale", active=new, incumbent=old, trial="t", mode="split", share=0.3, salt="salt")
        process.serve(split)

        def who(number: int) -> str:
            status, answer = process.call("POST", "/v2/models/scale/infer", {**infer_body(ONES), "id": str(number)})
            assert status == 200
            return answer["model_version"]

        expected = ["1.1.0" if in_share("salt", str(number), 0.3) else "1.0.0" for number in range(40)]
        assert [who(number) for number in range(40)] == expected
        assert [who(number) for number in range(40)] == expected
        assert len(set(expected)) == 2


def test_a_real_shadow_keeps_to_its_budget_of_cpu_time(tmp_path: Path):
    """Whatever this machine is worth: what threads of low priority used, by the kernel's own count."""
    share, seconds, ticks_per_s = 0.2, 3.0, os.sysconf("SC_CLK_TCK")
    old = loadable(models.scale(tmp_path / "old.onnx", 2.0))
    new = loadable(models.slow(tmp_path / "new.onnx", 2.0, turns=600), "1.1.0")
    with worker(tmp_path) as process:

        def used_s() -> float:
            found = 0
            for task in Path(f"/proc/{process.process.pid}/task").iterdir():
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                if int(fields[16]) > os.getpriority(os.PRIO_PROCESS, 0):
                    found += int(fields[11]) + int(fields[12])
            return found / ticks_per_s

        process.serve(ServeModel(name="scale", active=old))
        wanted = ServeModel(
            name="scale", active=new, incumbent=old, trial="t", mode="shadow", shadow_cpu_share_max=share
        )
        began = time.monotonic()
        process.serve(wanted)
        seen = False
        while not seen or time.monotonic() - began < seconds:
            assert process.infer(ONES)[0] == 200
            assert time.monotonic() - began < DEADLINE_S
            process.pump()
            arms = [arm for event in process.events if isinstance(event, Stats) for arm in event.arms]
            seen = any(arm.arm == "shadow" and arm.compared and arm.skipped for arm in arms)
        used, wall = used_s(), time.monotonic() - began
        one_run = 0.4  # at the very most
        assert 0 < used <= share * (wall + BURST_SECONDS) + one_run, (used, wall)
    assert process.process.returncode == 0, "a run that is under way does not make an end look like a crash"
