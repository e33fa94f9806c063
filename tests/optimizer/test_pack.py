"""Packing one's own model: the interface is found, golden vectors are made, terms are asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.optimizer.models import INT8, blobs, classifier, conv, dictionary, judge_of_points, workshop
from tests.shared.engines.models import save
from wherry_agent.disk import Disk
from wherry_agent.store import Store
from wherry_optimizer import assets, interface, pack, pipeline
from wherry_optimizer.golden import Runnable, Selection, configurations
from wherry_optimizer.model import load
from wherry_optimizer.pack import UNSTATED, pack_model, repack
from wherry_optimizer.passes import Work, quantize_tflite
from wherry_optimizer.precision import Precision, precision_of
from wherry_optimizer.recipe import Hints, InputHint, OutputHint
from wherry_optimizer.sources import locate
from wherry_shared import golden, operations
from wherry_shared.bundle import GOLDEN_TYPE, Bounds, Descriptor
from wherry_shared.engines import load as open_session
from wherry_shared.engines.canonical import Bound
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import SIGNED, Layout


def vectors_of(path: Path) -> golden.Golden:
    layout = Layout(path)
    index = layout.bundle()[2].variants[0].golden
    return golden.decode(
        layout.read(Descriptor(media_type=GOLDEN_TYPE, digest=index.digest, size=index.bytes), 1 << 20)
    )


def test_a_model_without_samples_gets_synthetic_vectors_within_its_ranges(tmp_path: Path) -> None:
    packed = pack_model(
        classifier(tmp_path / "m.onnx"),
        name="mine",
        version="1.0.0",
        licence="MIT",
        attribution="the tests",
        output=tmp_path,
        hints=Hints(inputs={"x": InputHint(low=2.0, high=3.0)}, outputs={"p": OutputHint(labels=list("abcdef"))}),
    )
    assert packed.path == tmp_path / "mine-1.0.0"
    variant = packed.config.variants[0]
    assert variant.golden.synthetic
    assert packed.config.interface.outputs[0].labels == list("abcdef")
    expected = vectors_of(packed.path)
    assert expected.synthetic
    for vector in expected.vectors:
        assert vector.inputs["x"].min() >= 2
        assert vector.inputs["x"].max() <= 3


def test_samples_become_golden_vectors(tmp_path: Path) -> None:
    points, _ = blobs(20)
    np.savez(tmp_path / "samples.npz", x=points)
    packed = pack_model(
        classifier(tmp_path / "m.onnx"),
        name="mine",
        version="1.0.0",
        licence="MIT",
        attribution="the tests",
        output=tmp_path,
        inputs=tmp_path / "samples.npz",
    )
    expected = vectors_of(packed.path)
    assert not expected.synthetic
    known = {row.tobytes() for row in points}
    assert all(vector.inputs["x"][0].tobytes() in known for vector in expected.vectors)


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL, TensorProto.BFLOAT16])
def test_outputs_need_not_be_floats(tmp_path: Path, kind: int) -> None:
    given, made = (helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "xy")
    path = save(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], [given], [made])
    packed = pack_model(path, name="mine", version="1.0.0", licence="MIT", attribution="the tests", output=tmp_path)
    expected = vectors_of(packed.path)
    assert expected.vectors
    for vector in expected.vectors:
        np.testing.assert_array_equal(vector.expected["y"].values, vector.inputs["x"])


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"x": np.zeros((4, 47), np.float32)}, "data_shape"),
        ({"x": np.zeros((4, 48), np.int32)}, "data_type"),
        ({"z": np.zeros((4, 48), np.float32)}, "data_shape"),
        ({"x": np.zeros((0, 48), np.float32)}, "data_short"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], code: str) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(RefusedError) as caught:
        pack_model(
            classifier(tmp_path / "m.onnx"),
            name="mine",
            version="1.0.0",
            licence="MIT",
            attribution="the tests",
            output=tmp_path,
            inputs=tmp_path / "samples.npz",
        )
    assert caught.value.code == code
    assert not (tmp_path / "mine-1.0.0").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"licence": " "}, "licence_missing"),
        ({"licence": "Nonsense License"}, "licence_invalid"),
        ({"licence": "Nonsense-1.0"}, "licence_unknown"),
        ({"name": "My Model"}, "bad_name"),
        ({"version": "1.0"}, "bad_version"),
    ],
)
def test_a_bundle_needs_a_name_a_version_and_a_licence(tmp_path: Path, change: dict[str, str], code: str) -> None:
    given = {"name": "mine", "version": "1.0.0", "licence": "MIT", "attribution": "the tests", **change}
    with pytest.raises(RefusedError) as caught:
        pack_model(classifier(tmp_path / "m.onnx"), output=tmp_path, **given)
    assert caught.value.code == code


def test_dynamic_axes_get_the_least_length_that_runs_and_outputs_follow_the_batch(tmp_path: Path) -> None:
    found = interface.derive(conv(tmp_path / "m.onnx"), "onnx", {}, Hints()).interface
    assert found.inputs[0].shape == ["batch", 3, "H", "W"]
    assert found.outputs[0].shape == ["batch", 4]
    assert found.dims["batch"] == Bounds(minimum=1, maximum=0)
    assert 1 <= found.dims["H"].minimum <= 8
    assert found.dims["W"].maximum == 4096


def test_a_free_batch_takes_as_many_as_the_caller_has(tmp_path: Path) -> None:
    packed = pack_model(classifier(tmp_path / "m.onnx"), output=tmp_path, name="mine", version="1.0.0", licence="MIT")
    config, path = packed.config, Layout(packed.path).path(packed.config.variants[0].digest)
    bound = Bound(open_session(path, "onnx"), config.interface)
    assert bound.run({"x": np.zeros((1000, 48), np.float32)})["p"].shape == (1000, 6)


def test_a_batch_that_is_free_in_name_only_is_one(tmp_path: Path) -> None:
    graph = onnx.load(classifier(tmp_path / "m.onnx"))
    shape = onnx.numpy_helper.from_array(np.array([1, 48]), "shape")
    graph.graph.initializer.append(shape)
    graph.graph.node.insert(0, onnx.helper.make_node("Reshape", ["x", "shape"], ["row"]))
    graph.graph.node[1].input[0] = "row"
    onnx.save(graph, tmp_path / "one.onnx")
    assert interface.derive(tmp_path / "one.onnx", "onnx", {}, Hints()).interface.dims["batch"] == Bounds(
        minimum=1, maximum=1
    )


def test_the_file_is_asked_whose_work_it_is_and_nobody_is_made_up(tmp_path: Path) -> None:
    given = {"output": tmp_path, "name": "mine", "version": "1.0.0", "licence": "MIT"}
    silent = classifier(tmp_path / "m.onnx")
    assert pack_model(silent, **given).config.licence.attribution == UNSTATED
    graph = onnx.load(silent)
    graph.producer_name = "an exporter"
    onnx.helper.set_model_props(graph, {"model_author": "Ada Lovelace"})
    onnx.save(graph, tmp_path / "named.onnx")
    assert pack_model(tmp_path / "named.onnx", **given).config.licence.attribution == "Ada Lovelace"
    assert pack_model(tmp_path / "named.onnx", attribution="us", **given).config.licence.attribution == "us"


def test_a_quantized_model_is_packed_as_one_and_proved_with_qdq_on_and_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[dict[str, object]] = []
    chosen = pack.select

    def looked_at(variants: list[Runnable], *arguments: Any, **named: Any) -> Selection:
        ways.extend(dict(way.options) for item in variants for way in configurations(item, arguments[1]))
        return chosen(variants, *arguments, **named)

    built = pipeline.build(workshop(tmp_path / "in", INT8), tmp_path / "out")
    small = next(variant for variant in built.packed.config.variants if variant.id == "int8")
    monkeypatch.setattr(pack, "select", looked_at)
    packed = pack_model(
        Layout(built.path).path(small.digest), output=tmp_path, name="mine", version="1.0.0", licence="MIT"
    )
    variant = packed.config.variants[0]
    assert (variant.id, variant.precision, variant.digest) == ("int8", "int8", small.digest)
    assert {"disable_quant_qdq": True} in ways


@pytest.mark.parametrize(
    ("dtype", "name"), [(onnx.TensorProto.FLOAT16, "float16"), (onnx.TensorProto.DOUBLE, "float64")]
)
def test_the_precision_is_that_of_most_weights(tmp_path: Path, dtype: int, name: str) -> None:
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"]), onnx.helper.make_node("Cast", ["y"], ["z"], to=1)],
        "g",
        [onnx.helper.make_tensor_value_info("x", dtype, ["N", 4])],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 4])],
        [onnx.numpy_helper.from_array(np.eye(4, dtype=kind), "w")],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8),
        tmp_path / "m.onnx",
    )
    assert precision_of(load(tmp_path / "m.onnx")) == Precision(name, quantized=False)


def test_a_quantized_tflite_model_is_known_by_its_weights(tmp_path: Path) -> None:
    source = locate(
        "basic_pitch/saved_models/icassp_2022/nmp.tflite",
        distribution="basic-pitch",
        version="",
        folder=Path(),
        what="the model",
    )
    assert precision_of(load(source)) == Precision("float32", quantized=False)
    small = quantize_tflite.apply(source, quantize_tflite.Parameters(mode="weights"), Work(tmp_path, [], 0))
    assert precision_of(load(small.path)) == Precision("int8", quantized=True)


def test_bounds_of_a_recipe_win(tmp_path: Path) -> None:
    hints = Hints(dims={"H": Bounds(minimum=32, maximum=64), "batch": Bounds(minimum=1, maximum=1)})
    found = interface.derive(conv(tmp_path / "m.onnx"), "onnx", {}, hints).interface
    assert found.dims["H"] == Bounds(minimum=32, maximum=64)
    assert found.dims["batch"] == Bounds(minimum=1, maximum=1)


def test_canonical_names_replace_native_ones(tmp_path: Path) -> None:
    fitted = interface.derive(classifier(tmp_path / "m.onnx"), "onnx", {"point": "x"}, Hints())
    assert fitted.interface.inputs[0].name == "point"
    assert fitted.tensors == {"point": "x"}
    with pytest.raises(RefusedError) as caught:
        interface.derive(tmp_path / "m.onnx", "onnx", {"point": "y"}, Hints())
    assert caught.value.code == "interface_invalid"


def test_a_file_with_a_fixed_batch_meets_a_free_one(tmp_path: Path) -> None:
    free = interface.derive(classifier(tmp_path / "free.onnx"), "onnx", {}, Hints()).interface
    fixed = interface.fit(classifier(tmp_path / "fixed.onnx", batch=4), "onnx", {}, free)
    assert fixed.batch == 4
    with pytest.raises(RefusedError) as caught:
        interface.fit(conv(tmp_path / "other.onnx"), "onnx", {}, free)
    assert caught.value.code == "interface_differs"


def test_packing_again_replaces_the_bundle_but_never_another_folder(tmp_path: Path) -> None:
    given = {"name": "mine", "version": "1.0.0", "licence": "MIT", "attribution": "the tests"}
    model = classifier(tmp_path / "m.onnx")
    pack_model(model, output=tmp_path / "mine-1.0.0", **given)
    pack_model(model, output=tmp_path, **given)
    Layout(tmp_path / "mine-1.0.0").verify_all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "mine-1.0.0"]
    shutil.rmtree(tmp_path / "mine-1.0.0")
    (tmp_path / "mine-1.0.0").mkdir()
    (tmp_path / "mine-1.0.0" / "precious").write_text("mine")
    with pytest.raises(RefusedError) as caught:
        pack_model(model, output=tmp_path, **given)
    assert caught.value.code == "output_taken"
    assert (tmp_path / "mine-1.0.0" / "precious").exists()


def test_a_bundle_is_repacked_with_a_file_that_passes_its_golden_vectors(tmp_path: Path) -> None:
    base = pipeline.build(workshop(tmp_path / "in", INT8), tmp_path / "out")
    graph = onnx.load(tmp_path / "in" / "model.onnx")
    graph.doc_string = "another file, the same answers"
    edited = tmp_path / "edited.onnx"
    onnx.save(graph, edited)
    packed = repack(base.path, tmp_path / "out", version="1.2.0", files={"float": edited})
    old, new = base.packed.config.variants[0], packed.config.variants[0]
    assert packed.path.name == "blobs-1.2.0"
    assert [variant.id for variant in packed.config.variants] == ["float"]
    assert new.golden.digest == old.golden.digest
    assert new.digest != old.digest
    assert new.accuracy is None

    graph.graph.initializer[1].raw_data = (np.frombuffer(graph.graph.initializer[1].raw_data, "<f4") * 1.5).tobytes()
    onnx.save(graph, edited)
    with pytest.raises(RefusedError) as caught:
        repack(base.path, tmp_path / "out", version="1.3.0", files={"float": edited})
    assert caught.value.code == "golden_miss"
    with pytest.raises(RefusedError) as caught:
        repack(base.path, tmp_path / "out", version="1.3.0", files={"int4": edited})
    assert caught.value.code == "variant_missing"


TERMS = ("--licence", "MIT", "--attribution", "the tests")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wherry_optimizer.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_line_packs_and_inspects(tmp_path: Path) -> None:
    classifier(tmp_path / "m.onnx")
    command = ("pack", str(tmp_path / "m.onnx"), "--name", "mine", "--version", "1.0.0", "--output", str(tmp_path))
    without = run(*command)
    assert without.returncode == 2
    assert "--licence" in without.stderr
    unnamed = run(*command, "--licence", "MIT")
    assert unnamed.returncode == 0, unnamed.stderr
    assert "WARNING: the file does not say whose work the model is" in unnamed.stderr
    assert "MIT, not stated (m.onnx)" in unnamed.stdout
    done = run(*command, *TERMS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variants"][0]["golden"]["synthetic"] is True
    shown = run("inspect", str(tmp_path / "mine-1.0.0"))
    assert "FP32 [batch, 48]" in shown.stdout
    assert json.loads(run("inspect", "--json", str(tmp_path / "mine-1.0.0")).stdout)["config"]["model"] == "mine"


PROCESSING = """
[[preprocess.operations]]
op = "normalise"
mean = [1.0]
std = [2.0]

[postprocess]
id = "best-v1"
[[postprocess.operations]]
op = "softmax"
[[postprocess.operations]]
op = "top_k"
k = 2

[interface.outputs.p]
labels = ["a", "b", "c", "d", "e", "f"]
"""


def packed_with(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "use.toml").write_text(text)
    command = [
        sys.executable,
        "-m",
        "wherry_optimizer.cli",
        "pack",
        str(classifier(folder / "m.onnx")),
        "--name",
        "mine",
    ]
    more = ["--version", "1.0.0", "--licence", "MIT", "--attribution", "me", "--processing", str(folder / "use.toml")]
    return subprocess.run([*command, *more, "--output", str(folder)], capture_output=True, text=True, timeout=120)


def test_declared_processing_goes_into_the_signed_config_and_inspect_shows_it(tmp_path: Path) -> None:
    done = packed_with(tmp_path, PROCESSING)
    assert done.returncode == 0, done.stderr
    config = Layout(tmp_path / "mine-1.0.0").bundle()[2]
    assert [operation.op for operation in config.postprocess.operations] == ["softmax", "top_k"]
    assert config.postprocess.operations[1].parameters == {"k": 2}
    assert config.postprocess.id == "best-v1"
    assert (
        config.preprocess.id == operations.named(msgspec.structs.replace(config.preprocess, id=""), "preprocess").id
    ), "an id that is not given is made of what the chain does"
    assert config.interface.outputs[0].labels == list("abcdef")
    argv = [sys.executable, "-m", "wherry_optimizer.cli", "inspect", str(tmp_path / "mine-1.0.0")]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "before  normalise 1: mean [1.0], std [2.0]" in said
    assert "after   top_k 1: k 2" in said
    assert "after   id best-v1" in said
    again = repack(tmp_path / "mine-1.0.0", tmp_path, version="1.1.0", files={"float": tmp_path / "m.onnx"})
    assert again.config.preprocess == config.preprocess


def test_assets_go_with_the_version_and_unpack_on_a_device(tmp_path: Path) -> None:
    (tmp_path / "thresholds.json").write_text('{"scratch": 0.4}')
    (tmp_path / "notes").write_text("anchors")
    model = classifier(tmp_path / "m.onnx")
    terms = {"name": "mine", "licence": "MIT", "attribution": "me"}
    files = assets.named([str(tmp_path / "thresholds.json"), f"texts/anchors.txt={tmp_path / 'notes'}"])
    packed = pack_model(model, version="1.0.0", output=tmp_path / "a", files=files, **terms)
    found, data = assets.layer(dict(reversed(files.items())))
    assert packed.config.assets == found, "the order in which files are named changes nothing"
    kept = repack(packed.path, tmp_path, version="1.1.0", files={"float": model})
    assert kept.config.assets == found
    store = Store(tmp_path / "device", Disk())
    blob = store.path_of(found.digest)
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    folder = store.unpack(found.digest, found.files)
    assert (folder / "thresholds.json").read_text() == '{"scratch": 0.4}'
    assert (folder / "texts" / "anchors.txt").read_text() == "anchors"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["m.onnx", "other/m.onnx"], "two assets are called 'm.onnx'"),
        (["../x=m.onnx"], "cannot be called '../x'"),
        ([".complete=m.onnx"], "cannot be called"),
        (["gone.json"], "No such file"),
    ],
)
def test_assets_that_no_device_would_unpack_are_refused(tmp_path: Path, texts: list[str], said: str) -> None:
    classifier(tmp_path / "m.onnx")
    with pytest.raises(RefusedError) as caught:
        assets.layer({name: tmp_path / file for name, file in assets.named(texts).items()})
    assert caught.value.code == "assets_invalid"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('op = "softmax"', 'op = "blur"', "operation_unknown: postprocess.operations[0] (blur)"),
        ("k = 2", 'k = "two"', "operation_invalid: postprocess.operations[1] (top_k)"),
        ("k = 2", 'k = 2\ntensor = "q"', "tensor 'q' is not one of p"),
        ("[postprocess]", "[postproces]", "processing_invalid"),
        ('op = "softmax"', "opp = 1", "needs op"),
        ("[[preprocess.operations]]", "[[preprocess.operations", "is not TOML"),
    ],
)
def test_processing_that_cannot_be_is_refused_by_its_name(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "use.toml").write_text(PROCESSING.replace(old, new, 1))
    with pytest.raises(RefusedError) as caught:
        pack_model(
            classifier(tmp_path / "m.onnx"),
            name="mine",
            version="1.0.0",
            licence="MIT",
            attribution="me",
            output=tmp_path,
            processing=tmp_path / "use.toml",
        )
    assert said in f"{caught.value.code}: {caught.value.message}"


def test_the_command_line_tells_cause_consequence_and_next_step(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    done = run("pack", str(tmp_path / "m.onnx"), "--name", "mine", "--version", "1.0.0", *TERMS)
    assert done.returncode == 1
    assert "neither an ONNX nor a TFLite model [model_foreign]" in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr


WORDS: dict[str, Any] = {"name": "words", "version": "1.0.0", "licence": "MIT"}


def test_text_is_not_made_up_and_the_advice_that_comes_of_it_holds(tmp_path: Path) -> None:
    path = dictionary(tmp_path / "m.onnx")
    with pytest.raises(RefusedError) as caught:
        pack_model(path, output=tmp_path, **WORDS)
    assert caught.value.code == "interface_unknown"
    assert "--inputs" in caught.value.next_step
    assert "'word' as an array of dtype U" in caught.value.next_step
    np.savez(tmp_path / "objects.npz", word=np.array([["cat"], [None]], object))
    with pytest.raises(RefusedError) as caught:
        pack_model(path, output=tmp_path, inputs=tmp_path / "objects.npz", **WORDS)
    assert caught.value.code == "data_invalid"
    assert "dtype=str" in caught.value.next_step
    np.savez(tmp_path / "texts.npz", word=np.array([["cat"], ["Öl"], ["house"], [""]]))
    packed = pack_model(path, output=tmp_path, inputs=tmp_path / "texts.npz", **WORDS)
    assert vectors_of(packed.path).tolerances["kind"] == golden.Tolerance(0.0, 0.0)
    assert not packed.synthetic
    with pytest.raises(RefusedError) as caught:
        repack(packed.path, tmp_path, version="1.1.0", files={"float": dictionary(tmp_path / "n.onnx", oil="Oel")})
    assert caught.value.code == "golden_miss"
    assert "output kind: text, 1 of its elements differ" in caught.value.message


def test_a_classifier_that_names_its_classes_in_text_needs_no_samples(tmp_path: Path) -> None:
    hints = Hints(outputs={"label": OutputHint(labels=["near", "far"])})
    packed = pack_model(judge_of_points(tmp_path / "m.onnx"), output=tmp_path, hints=hints, **WORDS)
    assert packed.synthetic
    label = packed.config.interface.outputs[0]
    assert (label.datatype, label.shape, label.labels) == ("BYTES", ["batch"], ["near", "far"])
    other = judge_of_points(tmp_path / "n.onnx", ("far", "near"))
    with pytest.raises(RefusedError, match="output label: text"):
        repack(packed.path, tmp_path, version="1.1.0", files={"float": other})


def test_a_signed_bundle_is_not_replaced(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    packed = pack_model(path, output=tmp_path, **WORDS)
    kept = packed.path / SIGNED
    kept.mkdir(parents=True)
    with pytest.raises(RefusedError) as caught:
        pack_model(path, output=tmp_path, **WORDS)
    assert caught.value.code == "output_signed"
    assert "raise the version" in caught.value.next_step
    assert kept.is_dir()
    assert Layout(packed.path).bundle()[2].version == "1.0.0"
    pack_model(path, output=tmp_path, **{**WORDS, "version": "1.0.1"})
