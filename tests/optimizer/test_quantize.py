"""Quantizing: what becomes int8, what stays float, and what is told when nothing happens."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from tests.optimizer.models import blobs, classifier, conv
from wherry_optimizer import layers
from wherry_optimizer.model import read_onnx, sort_nodes
from wherry_optimizer.passes import (
    CATALOGUE,
    Work,
    half,
    module,
    quantize,
    quantize_dynamic,
    quantize_recurrent,
    quantize_tflite,
    quantize_weights,
    simplify,
)
from wherry_optimizer.sources import locate
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError


@pytest.fixture
def work(tmp_path: Path) -> Work:
    points, _ = blobs(64)
    return Work(tmp_path, [{"x": point[None]} for point in points])


def agreement(one: Path, two: Path) -> float:
    points, _ = blobs(400, seed=11)
    first, second = (load(path, "onnx").run({"x": points})["p"].argmax(1) for path in (one, two))
    return float((first == second).mean())


def test_static_int8_keeps_the_answers_and_quarters_the_weights(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize.apply(path, quantize.Parameters(), work)
    assert result.notes["quantized_nodes"] == 2
    assert agreement(path, result.path) > 0.97
    types = {t.name: t.data_type for t in onnx.load(result.path).graph.initializer}
    assert types["first_quantized"] == onnx.TensorProto.INT8


def test_excluded_nodes_stay_float(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize.apply(path, quantize.Parameters(exclude=["two$"]), work)
    assert result.notes == {"quantized_nodes": 1, "excluded_nodes": 1}


def test_weight_only_int8_keeps_the_answers_nearly_exactly(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize_weights.apply(path, quantize_weights.Parameters(minimum_elements=500), work)
    assert result.notes["quantized_weights"] == 2
    assert agreement(path, result.path) > 0.99
    with pytest.raises(RefusedError) as caught:
        quantize_weights.apply(path, quantize_weights.Parameters(minimum_elements=10**6), work)
    assert caught.value.code == "pass_noop"


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(-8, 8, width=32)))
def test_a_quantized_weight_is_off_by_half_a_step_at_most_and_zero_stays_zero(weights: np.ndarray) -> None:
    for axis in (0, 1):
        quantized, scale = layers.quantize_channels(weights, axis)
        step = scale.reshape((-1, 1) if axis == 0 else (1, -1))
        assert (np.abs(quantized * step - weights) <= step * 0.5001).all()
        assert (quantized[weights == 0] == 0).all()


def test_simplifying_keeps_the_answers(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx", constants=True)
    result = simplify.apply(path, simplify.Parameters(), work)
    assert result.notes["nodes_after"] <= result.notes["nodes_before"]
    assert agreement(path, result.path) == 1.0


def pitch_tflite() -> Path:
    return locate(
        "basic_pitch/saved_models/icassp_2022/nmp.tflite",
        distribution="basic-pitch",
        version="",
        folder=Path(),
        what="the model",
    )


def test_a_tflite_model_becomes_int8_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    first = quantize_tflite.apply(pitch_tflite(), quantize_tflite.Parameters(), Work(tmp_path, []))
    assert first.path.stat().st_size < 0.6 * pitch_tflite().stat().st_size
    load(first.path, "tflite").close()
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(RefusedError) as caught:
        quantize_tflite.apply(first.path, quantize_tflite.Parameters(), Work(again, []))
    assert caught.value.code in ("pass_noop", "pass_failed")


def test_every_pass_of_the_catalogue_has_its_module_and_parameters() -> None:
    for info in CATALOGUE:
        made = module(info)
        assert made.Parameters() is not None
        assert callable(made.apply)


def test_an_onnx_model_that_is_quantized_is_known_as_such(tmp_path: Path, work: Work) -> None:
    result = quantize.apply(classifier(tmp_path / "m.onnx"), quantize.Parameters(), work)
    with pytest.raises(RefusedError) as caught:
        quantize_weights.apply(result.path, quantize_weights.Parameters(), work)
    assert caught.value.code == "already_quantized"
    assert read_onnx(result.path).graph.node


def lstm(path: Path, *, within_if: bool = False) -> Path:
    """Write a recurrent network, on request hidden in both branches of an If, as some exporters do."""
    rng = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.4, shape).astype(np.float32), name)
        for name, shape in (("w", (1, 64, 16)), ("r", (1, 64, 16)))
    ]
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=16, name="cell")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["steps", 1, 16])
    y = helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 1, 16])
    if within_if:
        branch = helper.make_graph([node], "branch", [], [y], weights)
        whole = helper.make_node("If", ["flag"], ["h"], then_branch=branch, else_branch=branch)
        flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
        graph = helper.make_graph([whole], "outer", [x, flag], [y])
    else:
        graph = helper.make_graph([node], "lstm", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    return path


@pytest.mark.parametrize("within_if", [False, True])
def test_recurrent_weights_become_integers_also_in_subgraphs(within_if: bool, tmp_path: Path) -> None:
    path = lstm(tmp_path / "m.onnx", within_if=within_if)
    result = quantize_weights.apply(path, quantize_weights.Parameters(form="fold"), Work(tmp_path, []))
    assert result.notes["quantized_weights"] == (4 if within_if else 2)
    assert result.path.stat().st_size < 0.45 * path.stat().st_size
    feed = {"x": np.random.default_rng(0).normal(size=(5, 1, 16)).astype(np.float32)}
    feed |= {"flag": np.array(True)} if within_if else {}
    before, after = (load(file, "onnx").run(feed)["h"] for file in (path, result.path))
    np.testing.assert_allclose(before, after, atol=0.02)
    assert (before != after).any()


@pytest.mark.parametrize("within_if", [False, True])
def test_recurrent_layers_compute_in_int8_and_their_scales_stay_float(within_if: bool, tmp_path: Path) -> None:
    path = lstm(tmp_path / "m.onnx", within_if=within_if)
    result = quantize_recurrent.apply(path, quantize_recurrent.Parameters(), Work(tmp_path, []))
    assert result.notes["quantized_nodes"] == (2 if within_if else 1)
    feed = {"x": np.random.default_rng(0).normal(size=(5, 1, 16)).astype(np.float32)}
    feed |= {"flag": np.array(True)} if within_if else {}
    before, after = (load(file, "onnx").run(feed)["h"] for file in (path, result.path))
    np.testing.assert_allclose(before, after, atol=0.05)
    assert (before != after).any()
    for pass_, parameters in (
        (quantize_weights, quantize_weights.Parameters(form="fold", minimum_elements=1)),
        (quantize_recurrent, quantize_recurrent.Parameters()),
    ):
        with pytest.raises(RefusedError) as caught:
            pass_.apply(result.path, parameters, Work(tmp_path, []))
        assert caught.value.code == "pass_noop"


def test_folded_weights_follow_static_int8_and_take_what_it_left(tmp_path: Path, work: Work) -> None:
    static = quantize.apply(classifier(tmp_path / "m.onnx"), quantize.Parameters(exclude=["two$"]), work)
    own = tmp_path / "own"
    own.mkdir()
    parameters = quantize_weights.Parameters(form="fold", minimum_elements=500)
    result = quantize_weights.apply(static.path, parameters, Work(own, []))
    assert result.notes["quantized_weights"] == 1
    assert agreement(static.path, result.path) > 0.99


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([2, 8, 32]), st.integers(0, 99))
def test_packed_nibbles_are_off_by_half_a_step_at_most(rows: int, columns: int, block: int, seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    packed, scale, count = quantize_weights.pack_nibbles(weights, block)
    low, high = packed & 15, packed >> 4
    values = np.concatenate([low, high], axis=2).astype(np.float32) - quantize_weights.NIBBLE_ZERO
    found = (values * scale).reshape(rows, -1)[:, :count]
    steps = np.repeat(scale, block, axis=2).reshape(rows, -1)[:, :count]
    assert (np.abs(found - weights) <= 0.5001 * steps).all()


def test_four_bit_weights_keep_most_answers_and_shrink_the_file(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    parameters = quantize_weights.Parameters(form="fold", bits=4, minimum_elements=500)
    result = quantize_weights.apply(path, parameters, Work(tmp_path, []))
    assert result.notes == {"quantized_weights": 2, "of_4_bits": 2}
    assert result.path.stat().st_size < 0.3 * path.stat().st_size
    assert agreement(path, result.path) > 0.9


def test_dynamic_int8_takes_matrices_and_says_where_there_are_none(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize_dynamic.apply(path, quantize_dynamic.Parameters(), Work(tmp_path, []))
    assert agreement(path, result.path) > 0.97
    with pytest.raises(RefusedError) as caught:
        quantize_dynamic.apply(conv(tmp_path / "c.onnx"), quantize_dynamic.Parameters(), Work(tmp_path, []))
    assert caught.value.code == "pass_noop"


def test_half_precision_halves_the_file_and_keeps_the_answers(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = half.apply(path, half.Parameters(), Work(tmp_path, []))
    assert result.path.stat().st_size < 0.6 * path.stat().st_size
    assert agreement(path, result.path) == 1.0


def test_a_weight_behind_an_identity_is_found(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].input[1] = "alias"
    model.graph.node.insert(0, helper.make_node("Identity", ["first"], ["alias"]))
    onnx.save(model, path)
    parameters = quantize_weights.Parameters(form="fold", minimum_elements=500)
    assert quantize_weights.apply(path, parameters, Work(tmp_path, [])).notes["quantized_weights"] == 2


def test_quantizers_leave_nodes_in_order_where_a_subgraph_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(0, 0.3, (8, 8)).astype(np.float32), "w")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])
    branch = helper.make_graph([helper.make_node("Relu", ["h"], ["y"])], "branch", [], [y])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch, name="choose"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "g", [x, flag], [y], [weight])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    calls = [{"x": rng.normal(size=(1, 8)).astype(np.float32), "flag": np.array(True)} for _ in range(8)]
    made = quantize.apply(path, quantize.Parameters(), Work(tmp_path, calls))
    onnx.checker.check_model(read_onnx(made.path))
    mixed = onnx.load(path)
    turned = list(mixed.graph.node)[::-1]
    del mixed.graph.node[:]
    mixed.graph.node.extend(turned)
    sort_nodes(mixed.graph)
    assert [node.name for node in mixed.graph.node] == ["first", "choose"]


def test_the_operators_that_hurt_most_go_back_to_float(tmp_path: Path, work: Work) -> None:
    path = classifier(tmp_path / "m.onnx")
    result = quantize.apply(path, quantize.Parameters(rollback=1), work)
    assert result.notes["quantized_nodes"] == 1
    rows = result.notes["sensitivity"]
    assert {row["layer"] for row in rows} == {"layer/one", "layer/two"}
    assert rows == sorted(rows, key=lambda row: row["output_error_without"])
    assert result.notes["given_back"] == [rows[0]["layer"]]
    points, _ = blobs(64)
    feed = {"x": points}
    errors = []
    own = tmp_path / "own"
    own.mkdir()
    for made in (result.path, quantize.apply(path, quantize.Parameters(), Work(own, work.calibration)).path):
        gap = load(made, "onnx").run(feed)["p"] - load(path, "onnx").run(feed)["p"]
        errors.append(float(np.linalg.norm(gap)))
    assert errors[0] < errors[1]
    assert "first_quantized" in {t.name for t in onnx.load(result.path).graph.initializer} or "second_quantized" in {
        t.name for t in onnx.load(result.path).graph.initializer
    }


@pytest.mark.parametrize("ranges", ["minmax", "averaged"])
def test_ranges_are_found_on_samples_of_any_length(ranges: str, tmp_path: Path) -> None:
    path = conv(tmp_path / "c.onnx")
    rng = np.random.default_rng(0)
    calls = [{"image": rng.normal(size=(1, 3, 9 + index, 11 + index)).astype(np.float32)} for index in range(6)]
    made = quantize.apply(path, quantize.Parameters(ranges=ranges), Work(tmp_path, calls))
    one, two = (load(file, "onnx").run(calls[0])["y"] for file in (path, made.path))
    np.testing.assert_allclose(one, two, atol=0.1)


def as_old_converters_wrote(data: bytes) -> bytes:
    """Return a TFLite model with its operator codes in the older field only, and without signatures."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    model.signatureDefs = []
    for code in model.operatorCodes:
        code.deprecatedBuiltinCode, code.builtinCode = code.builtinCode, 0
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_a_tflite_model_of_an_old_converter_is_quantized_too(tmp_path: Path) -> None:
    path = tmp_path / "old.tflite"
    path.write_bytes(as_old_converters_wrote(pitch_tflite().read_bytes()))
    result = quantize_tflite.apply(path, quantize_tflite.Parameters(), Work(tmp_path, []))
    assert result.notes["signature"]
    assert result.notes["operator_codes"] > 1
    assert result.path.stat().st_size < 0.6 * path.stat().st_size
    one, two = (load(file, "tflite") for file in (path, result.path))
    assert [tensor.name for tensor in one.describe()[0]] == [tensor.name for tensor in two.describe()[0]]


def test_a_tflite_model_is_quantized_statically_from_calibration_calls(tmp_path: Path) -> None:
    path = pitch_tflite()
    session = load(path, "tflite")
    (native,) = session.describe()[0]
    rng = np.random.default_rng(0)
    calls = [{native.name: rng.uniform(-1, 1, (1, *native.shape[1:])).astype(np.float32)} for _ in range(2)]
    result = quantize_tflite.apply(path, quantize_tflite.Parameters(mode="static"), Work(tmp_path, calls))
    assert result.path.stat().st_size < 0.8 * path.stat().st_size
    assert set(load(result.path, "tflite").run(calls[0])) == set(session.run(calls[0]))


@pytest.mark.parametrize("shared", [False, True])
def test_a_large_table_stays_small_in_memory_where_only_rows_of_it_are_read(shared: bool, tmp_path: Path) -> None:
    rows, width = 5000, 64
    table = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["t", "x"], ["a"]), helper.make_node("Gather", ["t", "z"], ["b"])]
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, width])]
    if shared:
        nodes += [helper.make_node("ReduceMax", ["t"], ["m"], axes=[0])]
        outputs.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, width]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", 3]) for name in "xz"]
    graph = helper.make_graph(nodes, "rows", inputs, outputs, [numpy_helper.from_array(table, "t")])
    path = tmp_path / "rows.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    made = quantize_weights.apply(path, quantize_weights.Parameters(form="fold"), Work(tmp_path, []))
    call = {"x": np.array([[0, 4999, 7]]), "z": np.array([[3, 3, -1]])}
    one, two = (load(each, "onnx").run(call)["y"] for each in (path, made.path))
    assert np.abs(one - two).max() < 0.05
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(made.path, settings)
    largest = max(onnx.load(tmp_path / "loaded.onnx").graph.initializer, key=lambda tensor: len(tensor.raw_data))
    assert largest.data_type == (TensorProto.FLOAT if shared else TensorProto.INT8)
