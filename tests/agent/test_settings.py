"""Settings: file, flags, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from wherry_agent import cli, settings
from wherry_shared.errors import RefusedError


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / settings.FILE).write_text('http_port = 9000\nwindow_s = 5\n[labels]\nsite = "berlin"\n')
    loaded = settings.load(None, {"home": str(tmp_path), "http_port": 9001})
    assert (loaded.http_port, loaded.window_s, loaded.labels) == (9001, 5, {"site": "berlin"})
    assert loaded.telemetry_mb == 8


CONTRACT = """
[[contracts.m.inputs]]
name = "x"
datatype = "FP32"
shape = [1, 4]
[[contracts.m.outputs]]
name = "y"
datatype = "FP32"
shape = [1, 4]"""


def test_what_applications_rely_on_can_be_declared(tmp_path: Path) -> None:
    (tmp_path / settings.FILE).write_text('[contracts.m]\npreprocess = "rgb"\n' + CONTRACT)
    (contract,) = settings.load(None, {"home": str(tmp_path)}).contracts.values()
    assert (contract.preprocess, contract.inputs[0].name, contract.outputs[0].shape) == ("rgb", "x", [1, 4])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("http_port = 70000", "http_port"),
        ('http_port = "x"', "http_port"),
        ("window_s = 0", "window_s"),
        ("colour = 1", "colour"),
        ("this is = = no toml", ""),
        ("[labels]\nsite = 4", "labels"),
        ('engines = ["onnx"]', "engines[0]"),
        ("download_bytes_per_s_max = 10", "download_bytes_per_s_max"),
        ('[conditions]\nwindows = ["sometimes"]', "conditions.windows[0]"),
        ("[conditions]\nbattery = 10", "battery"),
        ("[contracts.m]\noutputs = []", "contracts"),
        (CONTRACT.replace("FP32", "FLOAT"), "datatype"),
        (CONTRACT.replace("shape", "shap"), "contracts"),
        (CONTRACT + "\nlables = []", "contracts.m: there is no field outputs.lables"),
        (CONTRACT.replace("[1, 4]", "['n', 4]"), "contracts.m: input 'x' has an axis 'n'"),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / settings.FILE).write_text(text)
    with pytest.raises(RefusedError) as caught:
        settings.load(None, {"home": str(tmp_path)})
    assert caught.value.code == "settings_invalid"
    assert named in caught.value.message


def test_a_file_that_was_named_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        settings.load(tmp_path / "none.toml", {})
    assert caught.value.code == "settings_missing"


def test_a_home_is_made_absolute() -> None:
    assert settings.load(None, {"home": "here"}).home == str(Path("here").absolute())


def test_the_command_line_says_what_is_wrong_with_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--home", str(tmp_path), "--label", "berlin"]) == 1
    said = capsys.readouterr().err
    assert "bad_label" in said
    assert "next:" in said


def test_an_empty_token_is_told_from_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "--home", str(tmp_path), "--server", "http://127.0.0.1:1", "--token", ""]
    assert cli.main(given) == 1
    said = capsys.readouterr().err
    assert "[token_empty]" in said
    assert "wherry token create --quiet" in said


def test_status_of_an_empty_home_says_that_no_agent_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--home", str(tmp_path)]) == 1
    assert "no_agent" in capsys.readouterr().err
