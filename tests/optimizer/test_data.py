"""The real data: features as the model wants them, files split by package, notes of known pitch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.optimizer.models import dictionary
from wherry_optimizer import labelled
from wherry_optimizer.data import file_type, pitch
from wherry_optimizer.interface import derive
from wherry_optimizer.recipe import DataOf, Hints, find_recipe, load_recipe
from wherry_optimizer.sources import locate
from wherry_shared.errors import RefusedError


@given(st.binary(max_size=9000))
def test_features_of_bytes_and_of_a_file_agree_and_have_their_shape(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "content.bin"
    path.write_bytes(content)
    values = file_type.features(content)
    np.testing.assert_array_equal(values, file_type.features(path))
    assert values.shape == (1, 2048)
    assert values.dtype == np.int32
    assert values.min(initial=0) >= 0
    assert values.max() <= file_type.PADDING


def test_features_take_both_ends_without_outer_white_space() -> None:
    values = file_type.features(b"  \n" + b"ab" + b" c " * 2000 + b"yz\t\n")[0]
    assert bytes(values[:2].tolist()) == b"ab"
    assert bytes(values[-2:].tolist()) == b"yz"
    short = file_type.features(b" hi ")[0]
    assert bytes(short[:2].tolist()) == b"hi"
    assert (short[3:2045] == file_type.PADDING).all()


def test_the_first_feature_is_the_first_byte() -> None:
    assert file_type.features(b"\x7fELF" + b"\0" * 50)[0, 0] == 0x7F


@pytest.fixture(scope="module")
def files():
    loaded = load_recipe(find_recipe("file-type-1.1.0"))
    source = loaded.recipe.sources["onnx"]
    path = locate(source.path, distribution=source.distribution, version="", folder=Path(), what="the model")
    interface = derive(path, "onnx", source.tensors, loaded.recipe.interface).interface
    return file_type.load(loaded.recipe.data, interface, Path())


def test_there_are_enough_files_of_many_types_and_none_twice(files) -> None:
    assert len(files.evaluation) >= 300
    assert len({sample.label for sample in files.evaluation}) >= 10
    keys = [sample.inputs["bytes"].tobytes() for sample in (*files.calibration, *files.evaluation)]
    assert len(keys) == len(set(keys))
    counts = files.notes["files_per_label"].values()
    assert min(counts) >= file_type.FILES_PER_LABEL_MIN
    assert max(counts) <= file_type.FILES_PER_LABEL_MAX


def test_labels_are_those_of_the_model(files) -> None:
    names = files.labels["target"]
    assert len(names) == 214
    assert set(file_type.LABELS.values()) <= set(names)
    assert names[files.evaluation[0].label] in files.notes["files_per_label"]


def test_loading_twice_gives_the_same_data(files) -> None:
    loaded = load_recipe(find_recipe("file-type-1.1.0"))
    interface = derive(
        locate(loaded.recipe.sources["onnx"].path, distribution="magika", version="", folder=Path(), what=""),
        "onnx",
        loaded.recipe.sources["onnx"].tensors,
        loaded.recipe.interface,
    ).interface
    assert file_type.load(loaded.recipe.data, interface, Path()).digest == files.digest


def test_a_window_holds_the_notes_it_says() -> None:
    values, keys = pitch.window(np.random.default_rng(0), noise=False)
    assert values.shape == (1, pitch.WINDOW, 1)
    assert values.dtype == np.float32
    assert np.abs(values).max() <= 1
    length = pitch.WINDOW // pitch.NOTES
    for position, key in enumerate(keys):
        part = values[0, position * length : (position + 1) * length, 0]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(length), 1 << 17))
        base = 440 * 2 ** ((key - 69) / 12)
        # strength at all harmonics of each candidate key: the true one collects most
        peaks = []
        for candidate in range(pitch.LOW, pitch.HIGH + 1):
            comb = [440 * 2 ** ((candidate - 69) / 12) * h for h in range(1, pitch.HARMONICS + 1)]
            bins = [round(f / pitch.RATE_HZ * (1 << 17)) for f in comb if f < pitch.RATE_HZ / 2]
            peaks.append(sum(spectrum[b] for b in bins) / np.sqrt(len(bins)))
        found = pitch.LOW + int(np.argmax(peaks))
        assert abs(440 * 2 ** ((found - 69) / 12) - base) < 1e-6 or (found - key) % 12 == 0


def test_notes_are_named_by_the_highest_row_in_the_middle_of_their_time() -> None:
    frames = np.zeros((1, 172, 88), np.float32)
    keys = [60, 64, 67, 72]
    for position, key in enumerate(keys):
        frames[0, 43 * position : 43 * (position + 1), key - pitch.LOWEST_KEY] = 0.9
    assert pitch.named({"note": frames}, keys) == 1.0
    assert pitch.named({"note": frames}, [60, 64, 67, 71]) == 0.75


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abcdefghij")), min_size=1, max_size=60),
    st.text(max_size=5),
)
def test_a_split_keeps_packages_whole_and_most_files_of_each_label_for_the_test(
    files: list[tuple[str, str]], salt: str
) -> None:
    parts = file_type.split(files, salt)
    assert set(parts) == {package for _, package in files}
    sizes = {part: sum(parts[package] == part for _, package in files) for part in ("calibration", "selection")}
    assert sizes["calibration"] <= file_type.CALIBRATION_SHARE * len(files) + 0.5
    assert sizes["selection"] <= file_type.SELECTION_SHARE * len(files) + 0.5
    for label in {label for label, _ in files}:
        own = [parts[package] for name, package in files if name == label]
        taken = len(own) - own.count("test")
        assert taken <= (file_type.CALIBRATION_SHARE + file_type.SELECTION_SHARE) * len(own) + 0.5
    assert file_type.split(files[::-1], salt) == parts


def test_what_installing_writes_is_no_data(tmp_path: Path) -> None:
    for name in ("a/one.json", "a/two.py", "a/__pycache__/two.pyc", "a-1.0.dist-info/direct_url.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content that is long enough")
    found = file_type._by_label(tmp_path)
    assert {label: [path.name for _, path in rows] for label, rows in found.items()} == {
        "json": ["one.json"],
        "python": ["two.py"],
    }


def test_every_label_is_tested_and_no_part_shares_a_file(files) -> None:
    assert len(files.selection) == files.notes["selection_files"] > 0
    assert len({sample.label for sample in files.evaluation}) == len(files.notes["files_per_label"])
    keys = [
        {sample.inputs["bytes"].tobytes() for sample in part}
        for part in (files.calibration, files.selection, files.evaluation)
    ]
    assert sum(map(len, keys)) == len(set().union(*keys))


def test_text_is_scored_as_text_and_has_a_stable_digest(tmp_path: Path) -> None:
    interface = derive(dictionary(tmp_path / "m.onnx"), "onnx", {}, Hints()).interface
    words = np.array([["cat"], ["Öl"], ["house"], ["mouse"], ["door"], ["wall"]])
    np.savez(tmp_path / "data.npz", word=words, label=np.array(["animal", "Flüssigkeit", *["unknown"] * 4]))
    spec = DataOf(kind="npz", path="data.npz", output="kind", calibration=2, evaluation=4)
    found = labelled.dataset(spec, interface, tmp_path)
    assert found.digest == labelled.dataset(spec, interface, tmp_path).digest
    sample = found.evaluation[0]
    assert sample.inputs["word"].dtype == object
    assert found.measure.evidence({"kind": np.array([[sample.label]], object)}, sample.label) == 1.0
    assert found.measure.evidence({"kind": np.array([["another"]], object)}, sample.label) == 0.0
    np.savez(tmp_path / "data.npz", word=words, label=np.arange(6))
    with pytest.raises(RefusedError, match="one text per sample"):
        labelled.dataset(spec, interface, tmp_path)
