"""A file that another tool converts is compared with what it was; the tool is played here, since it has its own environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.optimizer.models import scaling, scaling_tflite
from tests.services import lacks
from wherry_optimizer import converting, environments
from wherry_optimizer.cli import app
from wherry_shared.engines import load
from wherry_shared.errors import RefusedError

STAND_IN = [sys.executable, Path(__file__).parent / "stand_ins" / "onnx2tf_program.py"]
SHAPE = [1, 4, 3]
PLAIN = ("wherry_0", "wherry_1")
"""What the converter is given to see of the names."""
AWKWARD = ("serving_default_x:0", "StatefulPartitionedCall:0")


def test_a_converted_file_keeps_its_contract_and_the_source_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scaling(tmp_path / "m.onnx", 2.0, ["batch", "steps", 3], names=AWKWARD)
    before = source.read_bytes()
    monkeypatch.setenv("WHERRY_STAND_IN_FILE", str(scaling_tflite(tmp_path / "t.tflite", 2.0, SHAPE, names=PLAIN)))
    x, y = AWKWARD
    np.savez(tmp_path / "x.npz", **{x: np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)})
    made = converting.to_tflite(
        source, tmp_path / "o" / "m.tflite", lengths={"steps": 4}, inputs=tmp_path / "x.npz", command=STAND_IN
    )
    assert (made.shapes, made.samples, made.made_up, made.constant) == ({x: SHAPE}, 5, False, ())
    assert made.error < 1e-6
    assert source.read_bytes() == before
    session = load(made.path, "tflite")
    assert session.run({x: np.ones(SHAPE, np.float32)})[y].tolist() == [[[2.0] * 3] * 4]
    session.close()


@pytest.mark.parametrize(
    ("asked", "tflite", "code", "says"),
    [
        ("crash", {}, "convert_crashed", "SIGABRT"),
        ("fail", {}, "convert_crashed", "no converter for GridSample"),
        ("hang", {}, "convert_timeout", "more than 2 s"),
        ("memory", {}, "convert_memory", "1.1 GB"),
        ("nothing", {}, "convert_nothing", "no float32 file"),
        ("", {"factor": 2.1}, "convert_differs", "of its length away"),
        ("", {"shape": [1, 3, 4]}, "contract_changed", r"'x' had shape \[1, 4, 3\] and has \[1, 3, 4\]"),
        ("", {"names": ("x_0", "wherry_1")}, "contract_changed", "input 'x' is gone"),
    ],
)
def test_what_the_converter_does_wrong_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, tflite: dict, code: str, says: str
) -> None:
    source = scaling(tmp_path / "m.onnx", 2.0, ["batch", 4, 3])
    given = {"factor": 2.0, "shape": SHAPE, "names": PLAIN} | tflite
    monkeypatch.setenv("WHERRY_STAND_IN_FILE", str(scaling_tflite(tmp_path / "t.tflite", **given)))
    monkeypatch.setenv("WHERRY_STAND_IN", asked)
    limits = {"seconds_max": 2.0} if asked == "hang" else {}
    with pytest.raises(RefusedError, match=says) as caught:
        converting.to_tflite(source, tmp_path / "o.tflite", command=STAND_IN, memory_bytes_max=2**30 + 2**26, **limits)
    assert caught.value.code == code
    assert not (tmp_path / "o.tflite").exists()


def test_free_axes_need_a_length_and_the_tool_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = scaling(tmp_path / "m.onnx", 2.0, ["batch", "steps", 3])
    with pytest.raises(RefusedError, match="any length: steps") as caught:
        converting.to_tflite(source, tmp_path / "o.tflite", command=STAND_IN)
    assert (caught.value.code, "--length steps=N" in caught.value.next_step) == ("convert_shape", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RefusedError, match="not installed") as caught:
        app(["convert-tflite", str(source), "--length", "steps=4"], standalone_mode=False)
    assert caught.value.code == "environment_missing"
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    with pytest.raises(RefusedError, match=r"3\.12 or newer") as caught:
        environments.make("onnx2tf", old)
    assert caught.value.code == "environment_python"


def test_an_environment_is_made_once_and_again_for_another_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python that makes what looks like an environment, whose pip installs what is called `there`, once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python = tmp_path / "python"
    pip = "#!/bin/sh\\nfor last; do :; done; echo no release $last >&2; test $last = there==1\\n"
    python.write_text(
        f"#!/bin/sh\nif [ \"$2\" = venv ]; then mkdir -p $3/bin; printf '{pip}' > $3/bin/python; chmod 755 $3/bin/python; fi\n"
    )
    python.chmod(0o755)
    for release, fails in (("there==1", False), ("there==1", False), ("gone==2", True), ("there==1", False)):
        tool = environments.Tool("some", (release,), (3, 12), "")
        monkeypatch.setitem(environments.TOOLS, "some", tool)
        said: list[str] = []
        if fails:
            with pytest.raises(RefusedError, match="no release gone==2") as caught:
                environments.make("some", python, said.append)
            assert caught.value.code == "environment_failed"
            with pytest.raises(RefusedError, match="not installed"):
                environments.find("some")
            continue
        made = environments.make("some", python, said.append)
        assert environments.find("some") == made
        assert environments.make("some", python, said.append) == made
        assert len(said) <= 1


@pytest.mark.soak
def test_the_real_converter_keeps_an_image_model_as_it_is(tmp_path: Path) -> None:
    """With the environment that `wherry-optimizer env onnx2tf` makes."""
    from tests.optimizer.models import conv

    try:
        environments.find("onnx2tf")
    except RefusedError as error:
        lacks(error.message)
    made = converting.to_tflite(conv(tmp_path / "m.onnx", size=12), tmp_path / "m.tflite")
    assert made.shapes == {"image": [1, 3, 12, 12]}
    assert made.error < 1e-5
