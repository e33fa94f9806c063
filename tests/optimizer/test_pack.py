"""Packing one's own model: the interface is found, golden vectors are made, terms are asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.optimizer.models import INT8, blobs, classifier, conv, workshop
from wherry_optimizer import interface, pipeline
from wherry_optimizer.pack import pack_model, repack
from wherry_optimizer.recipe import Hints, InputHint, OutputHint
from wherry_shared import golden
from wherry_shared.bundle import GOLDEN_TYPE, Bounds, Descriptor
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout


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
        ({"attribution": " "}, "licence_missing"),
        ({"name": "My Model"}, "bad_name"),
        ({"version": "1.0"}, "bad_version"),
    ],
)
def test_a_bundle_needs_a_name_a_version_a_licence_and_an_attribution(
    tmp_path: Path, change: dict[str, str], code: str
) -> None:
    given = {"name": "mine", "version": "1.0.0", "licence": "MIT", "attribution": "the tests", **change}
    with pytest.raises(RefusedError) as caught:
        pack_model(classifier(tmp_path / "m.onnx"), output=tmp_path, **given)
    assert caught.value.code == code


def test_dynamic_axes_get_the_least_length_that_runs_and_outputs_follow_the_batch(tmp_path: Path) -> None:
    found = interface.derive(conv(tmp_path / "m.onnx"), "onnx", {}, Hints()).interface
    assert found.inputs[0].shape == ["batch", 3, "H", "W"]
    assert found.outputs[0].shape == ["batch", 4]
    assert found.dims["batch"] == Bounds(minimum=1, maximum=64)
    assert 1 <= found.dims["H"].minimum <= 8
    assert found.dims["W"].maximum == 4096


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
    assert unnamed.returncode == 1
    assert "give --attribution, e.g." in unnamed.stderr
    done = run(*command, *TERMS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variants"][0]["golden"]["synthetic"] is True
    shown = run("inspect", str(tmp_path / "mine-1.0.0"))
    assert "FP32 [batch, 48]" in shown.stdout
    assert json.loads(run("inspect", "--json", str(tmp_path / "mine-1.0.0")).stdout)["config"]["model"] == "mine"


def test_the_command_line_tells_cause_consequence_and_next_step(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    done = run("pack", str(tmp_path / "m.onnx"), "--name", "mine", "--version", "1.0.0", *TERMS)
    assert done.returncode == 1
    assert "neither an ONNX nor a TFLite model [model_foreign]" in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr
