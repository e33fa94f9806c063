"""What all tests share: figures that a test counted are shown at the end of the run, wherever it ran.

No property has a deadline, and none is called too slow: how fast this machine is at the moment is no property of the code.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

settings.register_profile("wherry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("wherry")

NOTE = "note"
"""Name of the property (`record_property`) whose value is shown."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for kind in ("passed", "failed"):
        for report in terminalreporter.stats.get(kind, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == NOTE and report.when == "call":
                    terminalreporter.write_line(str(value))
