"""What all tests share: figures that a test counted are shown at the end of the run, wherever it ran."""

from __future__ import annotations

from typing import Any

NOTE = "note"
"""Name of the property (`record_property`) whose value is shown."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for kind in ("passed", "failed"):
        for report in terminalreporter.stats.get(kind, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == NOTE and report.when == "call":
                    terminalreporter.write_line(str(value))
