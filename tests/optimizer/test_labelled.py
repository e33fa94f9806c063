"""Labelled data of one's own: every form is read alike, and what does not fit is refused by its name."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.optimizer.models import FEATURES, blobs, classifier
from wherry_optimizer import attempt, cli, labelled
from wherry_optimizer import auto as auto_module
from wherry_optimizer.data import Sample
from wherry_optimizer.model import load as load_model
from wherry_shared import digest
from wherry_shared.bundle import Bounds, Interface, TensorSpec
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout

POINTS = Interface(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=["batch", FEATURES])],
    outputs=[TensorSpec(name="p", datatype="FP32", shape=["batch", 6])],
    dims={"batch": Bounds(minimum=1, maximum=0)},
)


def rows_of(parts: labelled.Parts) -> dict[bytes, Any]:
    """Return input → label of all parts, in no order."""
    every = (*parts.calibration, *parts.selection, *parts.test)
    return {sample.inputs["x"].tobytes(): sample.label for sample in every}


def write_npz(folder: Path, points: np.ndarray, labels: np.ndarray) -> str:
    np.savez(folder / "data.npz", x=points, label=labels)
    return str(folder / "data.npz")


def write_csv(folder: Path, points: np.ndarray, labels: np.ndarray) -> str:
    head = ",".join([*(f"f{index}" for index in range(FEATURES)), "label"])
    lines = [",".join([*map(repr, row.tolist()), str(label)]) for row, label in zip(points, labels, strict=True)]
    (folder / "data.csv").write_text("\n".join([head, *lines]) + "\n")
    return str(folder / "data.csv")


def write_folder(folder: Path, points: np.ndarray, labels: np.ndarray) -> str:
    for index, (row, label) in enumerate(zip(points, labels, strict=True)):
        kind = folder / "classes" / f"class{label}"
        kind.mkdir(parents=True, exist_ok=True)
        np.save(kind / f"{index}.npy", row)
    return str(folder / "classes")


def write_function(folder: Path, points: np.ndarray, labels: np.ndarray) -> str:
    module = types.ModuleType("wherry_test_samples")
    module.give = lambda: [({"x": row[None]}, int(label)) for row, label in zip(points, labels, strict=True)]
    sys.modules["wherry_test_samples"] = module
    return "wherry_test_samples:give"


@pytest.mark.parametrize("write", [write_npz, write_csv, write_folder, write_function])
def test_every_form_gives_the_same_samples_in_parts_that_share_nothing(write: Any, tmp_path: Path) -> None:
    points, labels = blobs(60)
    labels[:6] = range(6)
    parts = labelled.load(write(tmp_path, points, labels), POINTS)
    assert parts.labelled
    assert (len(parts.calibration), len(parts.selection), len(parts.test)) == (12, 24, 24)
    found = rows_of(parts)
    assert {key: int(label) for key, label in found.items()} == {
        row[None].tobytes(): int(label) for row, label in zip(points, labels, strict=True)
    }


def test_the_parts_follow_from_the_seed(tmp_path: Path) -> None:
    where = write_npz(tmp_path, *blobs(60))
    one, two, other = (labelled.load(where, POINTS, seed=seed).test[0].inputs["x"] for seed in (1, 1, 2))
    assert (one == two).all()
    assert (one != other).any()


def test_without_labels_the_data_say_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=blobs(20)[0])
    assert not labelled.load(str(tmp_path / "data.npz"), POINTS).labelled


def test_an_image_is_read_as_the_model_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"no matter")
    image = Interface(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[1, 3, 8, 8])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[1, 2])],
    )
    with pytest.raises(RefusedError, match="Pillow") as caught:
        labelled.load(str(tmp_path), image)
    assert caught.value.code == "extra_missing"


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(RefusedError, match="pyarrow") as caught:
        labelled.load(str(tmp_path / "data.parquet"), POINTS)
    assert caught.value.code == "extra_missing"


def broken(folder: Path, kind: str) -> str:
    points, labels = blobs(40)
    path = folder / "data.npz"
    if kind == "nan":
        points[3, 3] = np.nan
    arrays: dict[str, Any] = {"x": points, "label": labels}
    if kind == "width":
        arrays["x"] = points[:, :-1]
    if kind == "name":
        arrays = {"z": points, "label": labels}
    if kind == "type":
        arrays["x"] = points.astype(np.int64)
    if kind == "few":
        arrays = {"x": points[:5], "label": labels[:5]}
    if kind == "empty":
        arrays = {"x": points[:0], "label": labels[:0]}
    if kind == "one class":
        arrays["label"] = np.zeros(40, int)
    if kind == "labels":
        arrays["label"] = labels[:-1]
    if kind == "bytes":
        path.write_bytes(b"PK no archive")
        return str(path)
    if kind == "missing":
        return str(folder / "nowhere.npz")
    if kind == "table":
        (folder / "data.csv").write_text("a,b,label\n1,2\n")
        return str(folder / "data.csv")
    if kind == "words":
        (folder / "data.csv").write_text("a,label\nred,1\nblue,0\n")
        return str(folder / "data.csv")
    if kind == "columns":
        (folder / "data.csv").write_text("a,label\n" + "1,1\n2,0\n" * 10)
        return str(folder / "data.csv")
    if kind == "labels of another name":
        arrays["labels"] = arrays.pop("label")
    tables = {
        "encoding": b"a,label\n\xe9,1\n",
        "long field": b"a,label\n" + b"1" * 200_000 + b",1\n",
        "column twice": b"a,a,label\n" + b"1,2,0\n1,2,1\n" * 8,
        "labels alone": b"label\n" + b"0\n1\n" * 8,
    }
    if kind in tables:
        (folder / "data.csv").write_bytes(tables[kind])
        return str(folder / "data.csv")
    if kind.startswith("file of"):
        (folder / "data" / "a").mkdir(parents=True)
        file = folder / "data" / "a" / "1.npy"
        if kind == "file of nothing":
            file.write_bytes(b"")
        else:
            np.save(file, np.array(["red"]))
        return str(folder / "data")
    if kind in ("raises", "exits", "ragged", "some without labels"):
        module = types.ModuleType("wherry_test_samples")
        module.give = {
            "raises": lambda: 1 / 0,
            "exits": lambda: sys.exit(0),
            "ragged": lambda: [({"x": [[1.0], [1.0, 2.0]]}, 0)] * 9,
            "some without labels": lambda: [
                ({"x": point[None]}, None if index == 5 else int(label))
                for index, (point, label) in enumerate(zip(points, labels, strict=True))
            ],
        }[kind]
        sys.modules["wherry_test_samples"] = module
        return "wherry_test_samples:give"
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("nan", "data_invalid"),
        ("width", "data_shape"),
        ("name", "data_shape"),
        ("type", "data_type"),
        ("few", "data_short"),
        ("empty", "data_short"),
        ("one class", "data_one_class"),
        ("labels", "data_shape"),
        ("bytes", "data_invalid"),
        ("missing", "data_missing"),
        ("table", "data_invalid"),
        ("words", "data_invalid"),
        ("columns", "data_shape"),
        ("raises", "data_invalid"),
        ("exits", "data_invalid"),
        ("ragged", "data_invalid"),
        ("some without labels", "data_invalid"),
        ("labels of another name", "data_invalid"),
        ("encoding", "data_invalid"),
        ("long field", "data_invalid"),
        ("column twice", "data_invalid"),
        ("labels alone", "data_invalid"),
        ("file of nothing", "data_invalid"),
        ("file of words", "data_invalid"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_tried(kind: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        labelled.load(broken(tmp_path, kind), POINTS)
    assert caught.value.code == code
    assert caught.value.next_step


def test_one_class_without_labels_is_no_matter() -> None:
    samples = [Sample({"x": row[None]}, None) for row in blobs(20)[0]]
    assert not labelled.cut(samples, labelled=False, description="").labelled


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches in this process, without measuring."""
    whole = auto_module.auto

    def auto(*given: Any, **more: Any) -> Any:
        return whole(*given, **{**more, "run": attempt.attempt, "weigh": False})

    monkeypatch.setattr(auto_module, "auto", auto)


@pytest.mark.usefixtures("here")
def test_the_command_line_searches_and_compares(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model.onnx")
    data = write_npz(tmp_path, *blobs(80))
    given = ["auto", str(model), "--data", data, "--max-drop", "0.1", "--target", "x86-vnni", "--no-prune"]
    given += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    assert "x86-vnni: int" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.json",
        "MODEL-CARD.md",
        "x86-vnni.onnx",
    }
    done = CliRunner().invoke(cli.app, [*given, "--name", "blobs", "--version", "1.0.0", "--licence", "MIT"])
    assert done.exit_code == 0, done.output
    assert "not stated" in done.output
    layout = Layout(tmp_path / "out" / "blobs-1.0.0")
    layout.verify_all()
    source, chosen = layout.bundle()[2].variants
    assert source.digest == load_model(model).digest
    assert chosen.digest == digest.of_file(tmp_path / "out" / "x86-vnni.onnx")
    assert chosen.accuracy.samples == 32, "the test split"
    assert chosen.golden.separates == [source.id]
    done = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "out"), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0
    assert '"int8-static"' in done.output
    assert CliRunner().invoke(cli.app, ["compare", str(tmp_path / "out"), str(tmp_path / "out")]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-drop", "nan"), "budget_invalid"),
        (("--floor", "nan"), "budget_invalid"),
        (("--max-error", "-1"), "budget_invalid"),
        (("--workers", "0"), "setting_invalid"),
        (("--seed", "-1"), "setting_invalid"),
        (("--seconds", "nan"), "setting_invalid"),
        (("--memory-gb", "0.001"), "setting_invalid"),
        (("--memory-gb", "nan"), "--memory-gb"),
        (("--state", "x"), "--state"),
        (("--state", "z=p"), "state_invalid"),
        (("--state", "x=z"), "state_invalid"),
        (("--state", "x=p"), "state_invalid"),
        (("--metric-output", "z"), "output_unknown"),
        (("--output", "FILE/out"), "folder_unwritable"),
        (("--cache", "FILE/cache"), "folder_unwritable"),
        (("--reported", "FILE"), "reported_invalid"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_tried(
    options: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    points, labels = blobs(40)
    np.savez(tmp_path / "data.npz", x=points, label=labels)
    file = tmp_path / "FILE"
    file.write_text("{", encoding="utf-8")
    name, value = options[0], options[1].replace("FILE", str(file))
    common = ("auto", str(classifier(tmp_path / "model.onnx")), "--data", str(tmp_path / "data.npz"))
    monkeypatch.setattr(sys, "argv", ["wherry-optimizer", *common, "--cache", str(tmp_path / "cache"), name, value])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capfd.readouterr().err
    assert ended.value.code in (1, 2)
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "cache" / "answers").exists()


def test_a_bundle_needs_its_name_version_and_licence_before_anything_is_tried(tmp_path: Path) -> None:
    given = ["auto", str(tmp_path / "m.onnx"), "--data", "d.npz", "--name", "blobs", "--licence", "MIT"]
    assert CliRunner().invoke(cli.app, given).exit_code == 2
    done = CliRunner().invoke(cli.app, [*given, "--version", "1.0.0", "--licence", "my own"])
    assert done.exit_code == 1
    assert done.exception.code == "licence_invalid"


def test_the_command_line_takes_no_unknown_preference(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["auto", str(tmp_path / "m.onnx"), "--data", "d.npz", "--prefer", "speed"])
    assert done.exit_code == 2


def test_steps_are_lines_and_on_a_terminal_stand_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        written = io.StringIO()
        monkeypatch.setattr(cli, "err", Console(file=written, force_terminal=terminal, width=100))
        with cli._told(30.0) as say:
            say("int8-static: passed")
            say("half: refused")
        assert "int8-static: passed" in written.getvalue()
        assert ("2 steps" in written.getvalue()) is terminal
        assert ("of 30 s" in written.getvalue()) is terminal
