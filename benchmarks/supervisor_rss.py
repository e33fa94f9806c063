"""Memory of a running supervisor: enrolled, connected, one model confirmed, another update behind it.

Run: `python benchmarks/supervisor_rss.py`. Starts a development server and an agent in processes of their own on
loopback. Writes `build/bench/supervisor_rss.json`: resident set (`supervisor_rss_mb`), the part of it that is not shared
files, and the highest that it ever was, in MiB. Targets: 24, hard ceiling 32 during an update.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.agent.daemon_kit import agent, site  # noqa: E402 - the path has to be set first
from tests.shared.engines import models  # noqa: E402

SETTLE_S = 5.0


def memory_mb(pid: int) -> dict[str, float]:
    """Return fields of /proc/PID/status in MiB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssAnon", "VmHWM"):
            found[key] = round(int(value.split()[0]) / 1024, 1)
    return found


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory(prefix="wherry-rss-") as name:
        folder = Path(name)
        with site(folder) as server:
            server.release("1.0.0", models.scale(folder / "one.onnx", 2.0))
            server.release("1.1.0", models.scale(folder / "two.onnx", 3.0))
            with agent(server, "bench") as device:
                device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
                for version in ("1.0.0", "1.1.0"):
                    server.deploy(version, "bench", trial_s=2)
                    device.until_serves(version)
                device.ask(200)
                time.sleep(SETTLE_S)
                memory = memory_mb(device.child.pid)
                device.stop()
    result = {
        "supervisor_rss_mb": memory["VmRSS"],
        "supervisor_anonymous_mb": memory["RssAnon"],
        "supervisor_peak_mb": memory["VmHWM"],
    }
    target = ROOT / "build" / "bench" / "supervisor_rss.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
