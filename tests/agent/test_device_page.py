"""docs/device.md says of every setting, check and reason what the code says."""

from __future__ import annotations

from pathlib import Path

from tests.agent import device_page
from wherry_agent import doctor
from wherry_shared import reasons

RUNBOOK = Path(__file__).parents[2] / "docs/runbooks/a-device-that-does-not-update.md"


def test_the_settings_are_those_of_the_code() -> None:
    assert device_page.PAGE.read_text(encoding="utf-8") == device_page.page(), "run python -m tests.agent.device_page"


def test_every_setting_is_explained() -> None:
    bare = [line for line in device_page.rows(device_page.settings.Settings) if line.endswith("|  |")]
    assert not bare


def test_every_check_of_the_doctor_is_named() -> None:
    text = device_page.PAGE.read_text(encoding="utf-8")
    assert [name for name in doctor.QUESTIONS if f"`{name}`" not in text] == []


def test_every_reason_has_a_line_in_the_runbook() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    codes = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    assert sorted(code for code in codes if f"`{code}`" not in text) == []
