"""Both engines behind one protocol, with real files."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.shared.engines import models
from wherry_shared import engine_telemetry
from wherry_shared.engines import BadInput, EngineFault, bf16, load, probe
from wherry_shared.engines.session import EngineLimits, Session
from wherry_shared.errors import DeviceError, RefusedError

TFLITE_ENGINES = ("ai-edge-litert", "tflite-runtime")


def test_every_engine_of_the_environment_runs_the_tiny_model():
    found = {facts.name: facts for facts in probe()}
    assert set(found) == {"onnxruntime", "ai-edge-litert", "tflite-runtime"}
    assert found["onnxruntime"].formats == ["onnx"]
    assert found["tflite-runtime"].version.startswith("2.")


def test_a_probe_can_be_restricted_to_one_engine():
    assert [facts.name for facts in probe(["tflite-runtime"])] == ["tflite-runtime"]
    assert probe(["no-such-engine"]) == []


@pytest.mark.parametrize(("said", "kept"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_a_runtime_keeps_and_sends_nothing_of_its_own_unless_the_owner_says_so(
    tmp_path: Path, said: dict[str, str], kept: bool
):
    code = "import sys; from wherry_shared.engines import load; load(sys.argv[1], 'onnx')"
    home = tmp_path / "home"
    home.mkdir()
    file = models.scale(tmp_path / "one.onnx", 2.0)
    subprocess.run([sys.executable, "-c", code, str(file)], env={"HOME": str(home), **said}, check=True, timeout=60)
    found = [path.name for path in home.rglob("*") if path.is_file()]
    assert ("deviceid" in found) == kept, found
    assert kept or not found


@pytest.mark.parametrize(("said", "calls"), [("1", 1), ("0", 0)])
def test_one_that_an_application_imported_first_sends_no_more_events(
    monkeypatch: pytest.MonkeyPatch, said: str, calls: int
):
    monkeypatch.setenv(engine_telemetry.VARIABLE, said)
    told: list[bool] = []
    engine_telemetry.hush(SimpleNamespace(disable_telemetry_events=lambda: told.append(True)))
    assert len(told) == calls


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("class Interpreter:\n    def __init__(self, **_): raise SystemError('built for another numpy')\n", "raises"),
        ("class Interpreter:\n    def __init__(self, **_): import os; os.kill(os.getpid(), 11)\n", "segfaults"),
    ],
)
def test_an_engine_that_imports_but_does_not_run_is_absent(tmp_path: Path, monkeypatch, body: str, why: str):
    package = tmp_path / "tflite_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "interpreter.py").write_text(body)
    import os

    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert probe(["tflite-runtime"]) == [], why


def test_asking_for_the_package_loads_neither_numpy_nor_a_runtime():
    code = (
        "import sys, wherry_shared.engines.probing, wherry_shared.engines;"
        "print([m for m in ('numpy', 'onnxruntime', 'ai_edge_litert', 'tflite_runtime') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_onnx_runs_and_describes_itself_natively(tmp_path: Path):
    session = load(models.scale(tmp_path / "m.onnx", 3.0), "onnx")
    assert isinstance(session, Session)
    inputs, outputs = session.describe()
    assert (inputs[0].name, inputs[0].datatype, inputs[0].shape) == ("x", "FP32", ("n", 4))
    assert outputs[0].name == "y"
    assert session.run({"x": np.ones((2, 4), np.float32)})["y"].tolist() == [[3.0] * 4] * 2
    session.close()
    with pytest.raises(RuntimeError):
        session.run({"x": np.ones((2, 4), np.float32)})


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": np.ones((1, 4), np.float64)},
        {"x": np.ones((1, 5), np.float32)},
        {"x": np.ones(4, np.float32)},
        {"x": np.ones((1, 4), np.float32), "z": np.ones(1)},
    ],
)
def test_what_the_caller_does_wrong_is_bad_input(tmp_path: Path, inputs):
    session = load(models.scale(tmp_path / "m.onnx", 3.0), "onnx")
    with pytest.raises(BadInput):
        session.run(inputs)
    with pytest.raises(BadInput):
        session.run({"x": np.ones((1, 4), np.float32)}, ["nope"])


def test_an_operator_that_fails_is_the_models_fault(tmp_path: Path):
    session = load(models.choosy(tmp_path / "m.onnx"), "onnx")
    assert session.run({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 4)
    with pytest.raises(EngineFault) as caught:
        session.run({"x": np.full((1, 4), 7, np.float32)})
    assert caught.value.code == "run_failed"


@pytest.mark.parametrize("format_", ["onnx", "tflite"])
@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x08\x08:\x05hello"])
def test_a_file_that_is_no_model_is_a_load_failure(tmp_path: Path, format_, data: bytes):
    path = tmp_path / "broken"
    path.write_bytes(data)
    with pytest.raises(EngineFault) as caught:
        load(path, format_)
    assert caught.value.code == "load_failed"


def test_an_unknown_option_or_value_is_refused(tmp_path: Path):
    path = models.scale(tmp_path / "m.onnx", 3.0)
    for options in (
        {"nope": 1},
        {"threads": 0},
        {"threads": True},
        {"graph_optimization": "9"},
        {"disable_quant_qdq": 1},
    ):
        with pytest.raises(RefusedError, match="engine_option"):
            load(path, "onnx", options=options)
    with pytest.raises(RefusedError, match="engine_option"):
        load(models.PITCH_TFLITE, "tflite", options={"disable_quant_qdq": True})
    assert load(path, "onnx", options={"threads": 2, "graph_optimization": "basic", "disable_quant_qdq": True})


def test_an_engine_of_another_format_is_missing(tmp_path: Path):
    with pytest.raises(DeviceError, match="engine_missing"):
        load(models.scale(tmp_path / "m.onnx", 3.0), "onnx", engine="tflite-runtime")


@pytest.mark.parametrize("engine", TFLITE_ENGINES)
def test_tflite_runs_with_signature_names_and_resizes(engine: str):
    session = load(models.PITCH_TFLITE, "tflite", engine=engine, limits=EngineLimits(slots=2))
    assert session.engine == engine
    inputs, outputs = session.describe()
    assert [(tensor.name, tensor.shape) for tensor in inputs] == [("input_2", (-1, 43844, 1))]
    assert {tensor.name for tensor in outputs} == {"contour", "note", "onset"}
    rng = np.random.default_rng(1)
    audio = rng.uniform(-1, 1, (2, 43844, 1)).astype(np.float32)
    both = session.run({"input_2": audio}, ["note"])["note"]
    one = session.run({"input_2": audio[:1]}, ["note"])["note"]
    assert both.shape == (2, 172, 88)
    assert np.allclose(both[:1], one, atol=1e-5)
    before = one.copy()
    session.run({"input_2": audio[1:]})
    assert np.array_equal(one, before), "a result must not be overwritten by the next call"
    with pytest.raises(BadInput):
        session.run({"input_2": audio[:, :100]})


@pytest.mark.parametrize("engine", TFLITE_ENGINES)
def test_tflite_is_safe_from_more_threads_than_slots(engine: str):
    session = load(models.PITCH_TFLITE, "tflite", engine=engine, limits=EngineLimits(slots=2))
    audio = np.zeros((1, 43844, 1), np.float32)
    want = session.run({"input_2": audio})["note"]
    wrong = []

    def ask() -> None:
        for _ in range(2):
            try:
                if not np.array_equal(session.run({"input_2": audio})["note"], want):
                    wrong.append("differs")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    session.close()
    with pytest.raises(RuntimeError):
        session.run({"input_2": audio})


def test_both_tflite_runtimes_agree_on_the_same_file():
    audio = np.random.default_rng(2).uniform(-1, 1, (1, 43844, 1)).astype(np.float32)
    notes = [
        load(models.PITCH_TFLITE, "tflite", engine=name).run({"input_2": audio})["note"] for name in TFLITE_ENGINES
    ]
    assert np.abs(notes[0] - notes[1]).max() <= 1e-3


def test_bf16_runs_as_its_bits(tmp_path: Path):
    session = load(models.half(tmp_path / "h.onnx"), "onnx")
    inputs, outputs = session.describe()
    assert [tensor.datatype for tensor in (*inputs, *outputs)] == ["BF16", "BF16", "FP32"]
    values = np.array([0.5, -2.0, 3.1415, 3e38, np.inf, -0.0], np.float32)
    bits = bf16.narrow(values)
    found = session.run({"x": bits})
    assert np.array_equal(found["same"], bits)
    assert np.array_equal(found["wide"], bf16.widen(bits))
    assert session.run({"x": bits[::2]}, ["wide"])["wide"].tolist() == bf16.widen(bits[::2]).tolist()
    assert session.run({"x": bits[:0]})["same"].shape == (0,)
    with pytest.raises(BadInput, match="dtype"):
        session.run({"x": values})
    session.close()
    with pytest.raises(RuntimeError):
        session.run({"x": bits})


def test_bf16_beside_text_is_refused_when_it_is_loaded(tmp_path: Path):
    text = onnx.helper.make_tensor_value_info("text", onnx.TensorProto.STRING, ["n"])
    with pytest.raises(EngineFault, match="BF16"):
        load(models.half(tmp_path / "h.onnx", more=[text]), "onnx")


def test_bf16_rounds_to_nearest_even_and_keeps_what_is_special():
    values = np.array([1.0, 1.00390625, 1.01171875, 1.004, 3.4e38, -np.inf, np.nan, 0.0], np.float32)
    bits = bf16.narrow(values)
    wide = bf16.widen(bits)
    assert wide[:4].tolist() == [1.0, 1.0, 1.015625, 1.0078125]
    assert wide[4] == np.inf
    assert wide[5] == -np.inf
    assert np.isnan(wide[6])
    assert not bf16.finite(bits)
    assert bf16.finite(bits[:4])
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = every[~np.isnan(bf16.widen(every))]
    assert np.array_equal(bf16.narrow(bf16.widen(numbers)), numbers), "what BF16 can hold comes back unchanged"


def one_node(path: Path, node: onnx.NodeProto, domain: str = "", opset: int = 15, ir: int = 8) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    graph = helper.make_graph([node], "one", values[:1], values[1:])
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir), path)
    return path


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: one_node(p, helper.make_node("Mine", ["x"], ["y"], domain="com.acme"), "com.acme"), "other domains"),
        (lambda p: one_node(p, helper.make_node("Relu", ["x"], ["y"]), ir=99), "older opset or IR version"),
        (lambda p: one_node(p, helper.make_node("Relu", ["x"], ["y"]), opset=99), "older opset or IR version"),
        (lambda p: p.write_bytes(b"junk"), "onnx.checker.check_model"),
    ],
)
def test_a_file_that_does_not_load_says_what_to_do_about_it(tmp_path: Path, make, word: str) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(EngineFault) as caught:
        load(path, "onnx")
    assert caught.value.code == "load_failed"
    assert word in caught.value.next_step
    assert caught.value.consequence


def test_a_map_of_scores_is_to_be_exported_as_tensors(tmp_path: Path) -> None:
    zipped = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_strings=["a", "b"])
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    graph = helper.make_graph(
        [zipped],
        "zipped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_value_info("y", kind)],
    )
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(EngineFault, match="seq\\(map") as caught:
        load(tmp_path / "m.onnx", "onnx")
    assert "zipmap" in caught.value.next_step
