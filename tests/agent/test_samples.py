"""Inputs that leave a device: only of models for which its offer asks and its owner consented, a few, and small ones.

That a whole device sends nothing with only one of the two is in `test_privacy`.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.agent.builders import MODEL, arm, confirmed, loadable, now, offer, offered, run
from tests.agent.serving_kit import loadable as real
from tests.agent.serving_kit import worker
from tests.shared.engines import models
from wherry_agent import sampling, status
from wherry_agent import settings as agent_settings
from wherry_agent.answering.arms import Counter
from wherry_agent.children import Sampled, Serve, ServeModel, Serving, Stats
from wherry_agent.serving.samples import Samples
from wherry_agent.settings import Settings
from wherry_agent.telemetry import MESSAGE_BYTES_MAX, Buffer, Context, Windows
from wherry_agent.turn import flags_of
from wherry_shared import wire
from wherry_shared.limits import SAMPLE_BYTES_MAX, SAMPLE_SHARE_MAX, SAMPLES_PER_WINDOW_MAX
from wherry_shared.wire import Sample, SampleTensor, Telemetry, Window

ASKED: dict[str, Any] = {sampling.FLAG: {MODEL: 0.05, "pitch": 0.02}}


# --- what is asked for, and what is given --------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "consent", "expected"),
    [
        pytest.param({}, [], {}, id="neither"),
        pytest.param(ASKED, [], {}, id="only asked for"),
        pytest.param({}, [MODEL], {}, id="only consent"),
        pytest.param(ASKED, [MODEL], {MODEL: 0.05}, id="both, for one of two"),
        pytest.param(ASKED, ["another"], {}, id="consent to another"),
        pytest.param({sampling.FLAG: {MODEL: 1}}, [MODEL], {MODEL: SAMPLE_SHARE_MAX}, id="more than there may be"),
        pytest.param({sampling.FLAG: {MODEL: 0, "pitch": -1.0}}, [MODEL, "pitch"], {}, id="a share of nothing"),
        pytest.param({sampling.FLAG: {MODEL: True, "pitch": "all"}}, [MODEL, "pitch"], {}, id="no share"),
        pytest.param({sampling.FLAG: 0.5}, [MODEL], {}, id="no object"),
        pytest.param({sampling.FLAG: True}, [MODEL], {}, id="a bool"),
    ],
)
def test_a_share_is_given_where_it_is_asked_for_and_consented_to(
    flags: dict[str, Any], consent: list[str], expected: dict[str, float]
) -> None:
    assert sampling.shares(flags, consent) == expected


def test_consent_is_the_devices_own_and_off_by_default(tmp_path: Path) -> None:
    assert Settings().samples_consent == []
    state, _ = run(confirmed(), offer(2, {MODEL: offered()}, flags={**ASKED, "samples_consent": {"all": True}}))
    assert sampling.shares(flags_of(state), Settings().samples_consent) == {}
    (tmp_path / "agent.toml").write_text(f'samples_consent = ["{MODEL}"]\n')
    settings = agent_settings.load(None, {"home": str(tmp_path)})
    assert sampling.shares(flags_of(state), settings.samples_consent) == {MODEL: 0.05}


def test_status_says_what_is_asked_and_whether_it_is_given() -> None:
    state, _ = run(confirmed(), offer(2, {MODEL: offered()}, flags=ASKED))
    words = sampling.words(flags_of(state), [MODEL])
    shown = status.render({"running": False, **status.describe(state, now()), "samples": words})
    assert f"samples  {MODEL}: inputs of 5.00% of the requests are sent" in shown
    assert "samples  pitch: inputs are asked for, and not sent" in shown


# --- in the worker -------------------------------------------------------------------------------


def answered(counter: Counter) -> tuple[Any, Any]:
    """Return what is published, and an answer by it."""
    one = SimpleNamespace(loadable=counter.loadable)
    return SimpleNamespace(active=one, counter=counter, incumbent_counter=None), SimpleNamespace(loaded=one)


@pytest.fixture
def counter() -> Counter:
    return Counter(loadable(), "candidate", "r1.1.1")


def inputs(size: int = 4) -> dict[str, np.ndarray]:
    return {"x": np.arange(size, dtype=np.float32)}


def test_what_is_taken_is_few_small_and_a_copy(counter: Counter) -> None:
    samples = Samples(chance=lambda: 0.0)
    samples.want({MODEL: 0.1})
    published, answer = answered(counter)
    given = inputs()
    samples.look(published, answer, inputs(SAMPLE_BYTES_MAX))  # four bytes each
    samples.look(published, answer, given)
    given["x"][:] = -1
    for _ in range(SAMPLES_PER_WINDOW_MAX + 3):
        samples.look(published, answer, inputs())
    (said,) = samples.drain()
    assert (said.model, said.digest, said.arm, said.trial) == (MODEL, loadable().digest, "candidate", "r1.1.1")
    assert len(said.samples) == SAMPLES_PER_WINDOW_MAX
    assert said.samples[0].inputs[0].data == struct.pack("<4f", 0, 1, 2, 3)
    assert said.left_out == 1 + (1 + SAMPLES_PER_WINDOW_MAX + 3) - SAMPLES_PER_WINDOW_MAX
    assert samples.drain() == []


def test_only_the_share_and_only_the_models_that_were_named(counter: Counter) -> None:
    draws = iter([0.05, 0.11, 0.09999])
    samples = Samples(chance=lambda: next(draws))
    published, answer = answered(counter)
    samples.look(published, answer, inputs())  # nothing was named, nothing is drawn
    samples.want({"pitch": 0.1})
    samples.look(published, answer, inputs())
    samples.want({MODEL: 0.1})
    for _ in range(3):
        samples.look(published, answer, inputs())
    (said,) = samples.drain()
    assert (len(said.samples), said.left_out) == (2, 0)


def test_what_is_not_wanted_any_more_is_forgotten(counter: Counter) -> None:
    samples = Samples(chance=lambda: 0.0)
    samples.want({MODEL: 0.1})
    published, answer = answered(counter)
    samples.look(published, answer, inputs())
    samples.want({})
    assert samples.drain() == []


def test_a_real_worker_takes_inputs_only_where_it_was_told(tmp_path: Path) -> None:
    item = real(models.scale(tmp_path / "one.onnx", 2.0))
    with worker(tmp_path) as process:
        process.serve(ServeModel(name="scale", active=item))
        for _ in range(3):
            assert process.infer([[7.5, 1.0, 2.0, 3.0]])[0] == 200
        process.event(Stats, lambda stats: stats.arms[0].requests == 3)
        process.send(Serve(revision=2, models=[ServeModel(name="scale", active=item)], samples={"scale": 1.0}))
        process.event(Serving, lambda event: event.revision == 2)
        assert not [event for event in process.events if isinstance(event, Sampled)]
        for _ in range(3):
            assert process.infer([[7.5, 1.0, 2.0, 3.0]])[0] == 200
        said = process.event(Sampled)
    (tensor,) = said.samples[0].inputs
    raw = struct.pack("<4f", 7.5, 1.0, 2.0, 3.0)
    assert tensor == SampleTensor(name="x", datatype="FP32", shape=[1, 4], data=raw)


# --- in the supervisor ---------------------------------------------------------------------------


def sample(size: int = 16) -> Sample:
    return Sample(inputs=[SampleTensor(name="x", datatype="UINT8", shape=[size], data=b"s" * size)])


def sampled(*samples: Sample, **more: Any) -> Sampled:
    return Sampled(model=MODEL, digest=loadable().digest, arm="candidate", trial="", samples=list(samples), **more)


def test_a_window_has_the_samples_of_its_own_arm_and_no_more_than_it_may() -> None:
    windows = Windows()
    windows.sample("worker", sampled(sample()))  # of nothing that is counted
    windows.look("worker", [arm(requests=9), arm(arm="shadow", requests=9)], 0)
    windows.sample("worker", sampled(sample(SAMPLE_BYTES_MAX + 1), sample(1), left_out=4))
    windows.sample("worker", sampled(sample(2), sample(3)))
    first, shadow = windows.cut(10, lambda _: Context("", 0))
    assert [one.bytes for one in first.samples] == [1, 2]
    assert first.samples_left_out == 4 + 1 + 1
    assert (shadow.samples, shadow.samples_left_out) == ([], 0)
    windows.look("worker", [arm(requests=10)], 20)
    (second,) = windows.cut(30, lambda _: Context("", 0))
    assert (second.samples, second.samples_left_out) == ([], 0), "they are sent once"


def message(*windows: Window) -> Telemetry:
    return Telemetry(format=1, device="d" * 22, epoch="", seq=0, first=0, at=0, windows=list(windows))


def window(model: str = MODEL, **more: Any) -> Window:
    samples = [sample(SAMPLE_BYTES_MAX)] * SAMPLES_PER_WINDOW_MAX
    kind: dict[str, Any] = {"manifest": "sha256:1", "variant": "v", "arm": "incumbent", "start": 1, "duration_us": 5}
    return Window(model=model, **kind, **{"requests": 3, "samples": samples, **more})


@pytest.fixture
def allowed() -> set[str]:
    return {MODEL}


@pytest.fixture
def buffer(tmp_path: Path, allowed: set[str]) -> Iterator[Buffer]:
    made = Buffer(tmp_path / "telemetry.db", 1 << 20, lambda model: model in allowed)
    yield made
    made.close()


def held(buffer: Buffer) -> Telemetry:
    found = buffer.message(buffer.held(1)[0])
    assert found is not None
    return found


def test_what_was_kept_is_not_sent_once_it_may_not_be(buffer: Buffer, allowed: set[str], tmp_path: Path) -> None:
    buffer.add(message(window(), window("pitch", samples=[sample()])))
    assert [len(one.samples) for one in held(buffer).windows] == [SAMPLES_PER_WINDOW_MAX, 0], "pitch may not"
    allowed.clear()
    found = held(buffer)
    assert [(one.samples, one.requests) for one in found.windows] == [([], 3), ([], 3)]
    assert base64.b64encode(b"s" * 30) not in wire.encode(found)
    assert (tmp_path / "telemetry.db").stat().st_mode & 0o077 == 0, "nobody else reads what waits"
    assert Buffer(tmp_path / "other.db", 1 << 20)._may_sample(MODEL) is False, "nothing leaves unless somebody says so"


def test_a_full_window_fits_a_message_and_one_that_does_not_loses_its_samples_first(buffer: Buffer) -> None:
    buffer.add(message(window()))
    assert len(held(buffer).windows[0].samples) == SAMPLES_PER_WINDOW_MAX
    assert len(wire.encode(held(buffer))) < MESSAGE_BYTES_MAX
    buffer.acknowledge(buffer.epoch, 1)
    classes = {f"class-{number}": number for number in range(1500)}
    buffer.add(message(window(classes=classes, samples_left_out=1)))
    (kept,) = held(buffer).windows
    assert (kept.samples, kept.samples_left_out, kept.classes) == ([], 1 + SAMPLES_PER_WINDOW_MAX, classes)
