"""The signed interface on top of an engine: names, bounds, fixed batches, blame."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.shared.engines import models
from wherry_shared.bundle import Bounds, Interface, TensorSpec
from wherry_shared.engines import BadInput, EngineFault, bf16, load
from wherry_shared.engines.canonical import BUCKET_BITS, Bound, all_finite


def bound(path: Path, **options) -> Bound:
    return Bound(load(path, "onnx"), models.interface(), **options)


def test_canonical_names_are_mapped_to_native_ones(tmp_path: Path):
    path = models.scale(tmp_path / "m.onnx", 2.0, names=("serving_x:0", "out/1"))
    model = bound(path, tensors={"x": "serving_x:0", "y": "out/1"})
    assert model.run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [[2.0] * 4]
    assert list(model.run({"x": np.ones((1, 4), np.float32)}, ["y"])) == ["y"]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
def test_a_fixed_batch_is_looped_over_and_padded(tmp_path: Path, rows: int):
    model = bound(models.scale(tmp_path / "m.onnx", 2.0, batch=4), batch=4)
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    assert np.array_equal(model.run({"x": x})["y"], 2 * x)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({}, "missing"),
        ({"x": np.zeros((0, 4), np.float32)}, "1 to 64"),
        ({"x": np.zeros((65, 4), np.float32)}, "1 to 64"),
        ({"x": np.zeros((1, 3), np.float32)}, "shape"),
        ({"x": np.zeros((1, 4, 1), np.float32)}, "shape"),
        ({"x": np.zeros((1, 4), np.float16)}, "dtype"),
        ({"x": [[0.0] * 4]}, "numpy array"),
        ({"x": np.zeros((1, 4), np.float32), "w": np.zeros(1)}, "no such input"),
    ],
)
def test_the_interface_decides_what_the_caller_may_send(tmp_path: Path, inputs, word: str):
    model = bound(models.scale(tmp_path / "m.onnx", 2.0))
    for _ in range(2):  # a remembered shape must not let a bad one pass
        with pytest.raises(BadInput, match=word):
            model.run(inputs)
        model.run({"x": np.zeros((1, 4), np.float32)})


def test_a_named_axis_has_one_length_in_all_inputs(tmp_path: Path):
    path = models.save(
        tmp_path / "m.onnx",
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [models.floats("a", ["n"]), models.floats("b", ["n"])],
        [models.floats("y", ["n"])],
    )
    model = Bound(
        load(path, "onnx"),
        Interface(
            inputs=[TensorSpec(name=name, datatype="FP32", shape=["n"]) for name in "ab"],
            outputs=[TensorSpec(name="y", datatype="FP32", shape=["n"])],
            dims={"n": Bounds()},
        ),
    )
    one, two = np.ones(1, np.float32), np.ones(2, np.float32)
    with pytest.raises(BadInput, match="'n' is 2 here and 1 elsewhere"):
        model.run({"a": one, "b": two})
    assert model.run({"b": two, "a": two})["y"].tolist() == [2.0, 2.0]


def test_nan_and_inf_are_the_models_fault_where_forbidden(tmp_path: Path):
    path = models.root(tmp_path / "m.onnx")
    bad = {"x": np.full((1, 4), -1, np.float32)}
    with pytest.raises(EngineFault) as caught:
        bound(path).run(bad)
    assert caught.value.code == "not_finite"
    allowed = Bound(load(path, "onnx"), models.interface(finite=False))
    assert np.isnan(allowed.run(bad)["y"]).all()


def unpacked(packed: int) -> tuple[int, int]:
    return packed >> BUCKET_BITS, packed & (1 << BUCKET_BITS) - 1


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("finite", [True, False])
def test_the_short_way_gives_what_check_and_run_give(tmp_path: Path, rows: int, finite: bool):
    model = Bound(load(models.scale(tmp_path / "m.onnx", 2.0), "onnx"), models.interface(finite=finite))
    short = model.short_way()
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    for inputs, outputs in (({"x": x}, None), ({"x": x}, None), ({"x": x}, ["y"]), (MappingProxyType({"x": x}), None)):
        results: dict[str, np.ndarray] = {}
        engine_ns, bucket = unpacked(short(results, inputs, outputs))
        assert {name: value.tolist() for name, value in results.items()} == {"y": (2 * x).tolist()}
        assert bucket == model.check({"x": x})
        assert 0 < engine_ns < 10**10


def test_the_short_way_refuses_and_blames_as_the_long_one(tmp_path: Path):
    model = bound(models.root(tmp_path / "m.onnx"))
    short = model.short_way()
    good = np.ones((1, 4), np.float32)
    for _ in range(2):  # before and after the shapes are known
        for inputs in ({}, {"x": good.astype(np.float64)}, {"x": good, "w": good}, {"w": good}, {"x": np.ones((1, 5))}):
            with pytest.raises(BadInput):
                short({}, inputs, None)
        with pytest.raises(BadInput):
            short({}, {"x": good}, ["nope"])
        for rows in (1, 2, 9):
            for bad in (np.nan, -1.0):
                x = np.ones((rows, 4), np.float32)
                x[-1, 2] = bad
                with pytest.raises(EngineFault, match="not_finite"):
                    short({}, {"x": x}, None)
            results: dict[str, np.ndarray] = {}
            short(results, {"x": np.full((rows, 4), 4, np.float32)}, None)
            assert (results["y"] == 2).all()


def test_the_short_way_takes_large_numbers_for_finite(tmp_path: Path):
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", 4])
    path = models.save(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], [x], [y])
    spec = {"datatype": "FP64", "shape": ["n", 4]}
    interface = Interface(
        inputs=[TensorSpec(name="x", **spec)], outputs=[TensorSpec(name="y", **spec)], dims={"n": Bounds()}
    )
    short = Bound(load(path, "onnx"), interface).short_way()
    huge = np.full((1, 4), np.finfo(np.float64).max)
    for _ in range(3):
        results: dict[str, np.ndarray] = {}
        short(results, {"x": huge}, None)
        assert (results["y"] == huge).all()


def test_the_short_way_says_what_the_engine_said(tmp_path: Path):
    model = bound(models.choosy(tmp_path / "m.onnx"))
    short = model.short_way()
    short({}, {"x": np.ones((1, 4), np.float32)}, None)
    with pytest.raises(EngineFault, match="run_failed"):
        short({}, {"x": np.full((1, 4), 9, np.float32)}, None)
    model.close()
    with pytest.raises(RuntimeError, match="closed session"):
        short({}, {"x": np.ones((1, 4), np.float32)}, None)


def test_a_model_of_several_tensors_and_a_fixed_batch_has_a_short_way_too(tmp_path: Path):
    two = models.save(
        tmp_path / "two.onnx",
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["less"])],
        [models.floats("a", ["n"]), models.floats("b", ["n"])],
        [models.floats("sum", ["n"]), models.floats("less", ["n"])],
    )
    interface = Interface(
        inputs=[TensorSpec(name=name, datatype="FP32", shape=["n"]) for name in ("a", "b")],
        outputs=[TensorSpec(name=name, datatype="FP32", shape=["n"]) for name in ("sum", "less")],
        dims={"n": Bounds()},
    )
    short = Bound(load(two, "onnx"), interface).short_way()
    one, bad = np.ones(1, np.float32), np.full(1, np.inf, np.float32)
    for _ in range(3):
        results: dict[str, np.ndarray] = {}
        _, bucket = unpacked(short(results, {"a": one, "b": one}, None))
        assert ({name: value.tolist() for name, value in results.items()}, bucket) == ({"sum": [2.0], "less": [0.0]}, 1)
        with pytest.raises(EngineFault, match="'sum' holds NaN or Inf"):
            short({}, {"a": one, "b": bad}, None)
        for inputs in (
            {"a": one},
            {"a": one, "c": one},
            {"a": one, "b": np.ones(2, np.float32)},
            {"a": one, "b": [1.0]},
        ):
            with pytest.raises(BadInput):
                short({}, inputs, None)
    half = Interface(
        inputs=[TensorSpec(name="x", datatype="BF16", shape=["n"])],
        outputs=[TensorSpec(name="same", datatype="BF16", shape=["n"])],
        dims={"n": Bounds()},
    )
    short = Bound(load(models.half(tmp_path / "h.onnx"), "onnx"), half).short_way()
    for value, good in ((2.0, True), (np.inf, False)) * 2:
        bits = bf16.narrow(np.array([value], np.float32))
        with contextlib.nullcontext() if good else pytest.raises(EngineFault, match="not_finite"):
            results = {}
            short(results, {"x": bits}, None)
            assert results["same"].tolist() == bits.tolist()
    batched = bound(models.scale(tmp_path / "m.onnx", 2.0, batch=4), batch=4).short_way()
    results = {}
    batched(results, {"x": np.ones((6, 4), np.float32)}, None)
    assert results["y"].tolist() == [[2.0] * 4] * 6


def test_nan_and_inf_in_bf16_are_found_in_its_bits(tmp_path: Path):
    def interface(finite: bool) -> Interface:
        return Interface(
            inputs=[TensorSpec(name="x", datatype="BF16", shape=["n"])],
            outputs=[
                TensorSpec(name="same", datatype="BF16", shape=["n"], finite=finite),
                TensorSpec(name="wide", datatype="FP32", shape=["n"], finite=False),
            ],
            dims={"n": Bounds()},
        )

    session = load(models.half(tmp_path / "h.onnx"), "onnx")
    good, bad = bf16.narrow(np.array([3e38], np.float32)), bf16.narrow(np.array([np.inf], np.float32))
    assert Bound(session, interface(finite=True)).run({"x": good})["same"].tolist() == good.tolist()
    with pytest.raises(EngineFault) as caught:
        Bound(session, interface(finite=True)).run({"x": bad})
    assert caught.value.code == "not_finite"
    assert Bound(session, interface(finite=False)).run({"x": bad})["same"].tolist() == bad.tolist()


@pytest.mark.parametrize(
    ("interface", "options"),
    [
        (models.interface(width=5), {}),
        (models.interface(names=("nope", "y")), {}),
        (models.interface(names=("x", "nope")), {}),
        (models.interface(), {"tensors": {"x": "nope"}}),
    ],
)
def test_a_file_that_is_not_what_the_interface_says_is_refused_at_load(tmp_path: Path, interface, options):
    session = load(models.scale(tmp_path / "m.onnx", 2.0), "onnx")
    with pytest.raises(EngineFault) as caught:
        Bound(session, interface, **options)
    assert caught.value.code == "interface_mismatch"


def test_a_fixed_batch_that_the_bundle_does_not_declare_is_refused_at_load(tmp_path: Path):
    session = load(models.scale(tmp_path / "m.onnx", 2.0, batch=4), "onnx")
    with pytest.raises(EngineFault, match="interface_mismatch"):
        Bound(session, models.interface())


def test_warm_inputs_are_what_the_interface_allows(tmp_path: Path):
    model = bound(models.scale(tmp_path / "m.onnx", 2.0))
    assert model.check(model.warm_inputs()) == 2
    assert model.run(model.warm_inputs())["y"].shape == (1, 4)


@pytest.mark.parametrize("engine", ["ai-edge-litert", "tflite-runtime"])
def test_tflite_wears_the_same_interface(engine: str):
    model = Bound(load(models.PITCH_TFLITE, "tflite", engine=engine), models.PITCH, models.PITCH_TENSORS)
    results = model.run({"audio": np.zeros((2, 43844, 1), np.float32)})
    assert {name: value.shape for name, value in results.items()} == {
        "note": (2, 172, 88),
        "onset": (2, 172, 88),
        "contour": (2, 172, 264),
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=20),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_the_fast_test_for_finite_values_agrees_with_numpy(values, dtype):
    with np.errstate(over="ignore"):
        array = np.array(values, dtype)
    assert all_finite(array) == bool(np.isfinite(array).all())
