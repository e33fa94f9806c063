"""Memory of a running supervisor: enrolled, connected over TLS, two versions confirmed, certificate renewed, a minute later.

Run: `python benchmarks/supervisor_rss.py [--after-s 60]`. Starts a development server, TLS in front of its broker (with
client certificates) and of its API, and an agent, all in processes and threads of their own on loopback. Python files are
compiled first, as installing a wheel does. Each confirmed version brings new trust metadata, so the courier ran between;
certificates live so short that the device renews its own after the last confirm and connects anew with it. Then the
supervisor is left alone for `--after-s` and its memory is read from /proc.

Writes `build/bench/supervisor_rss.json`: resident set (`supervisor_rss_mb`), its anonymous part, the proportional set
(`supervisor_pss_mb`: files shared with other processes counted by share), the highest that it ever was, all in MiB; and
the modules that it holds. Target: 26; never above 30.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
COMPILED = ROOT / "build" / "bench" / "compiled"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = str(COMPILED)

from tests.agent.daemon_kit import Agent, Site, agent, site  # noqa: E402 - the path has to be set first
from tests.shared.engines import models  # noqa: E402
from tests.tls_front import TlsFront, server_certificate, use_tls  # noqa: E402

from wherry_agent import identity, status  # noqa: E402
from wherry_shared.errors import WherryError  # noqa: E402


def memory_mb(pid: int) -> dict[str, float]:
    """Return fields of /proc/PID/status and /proc/PID/smaps_rollup in MiB."""
    found = {}
    for name in ("status", "smaps_rollup"):
        for line in Path(f"/proc/{pid}/{name}").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key in ("VmRSS", "RssAnon", "VmHWM", "Pss"):
                found[key] = round(int(value.split()[0]) / 1024, 1)
    return found


CERTIFICATE_S = 240
"""Life of certificates: two thirds of it are longer than `--after-s`, and the last third than what comes before it."""
DAY_S = 86_400


def enrol_and_secure(server: Site, device: Agent) -> None:
    """Let the agent enrol, then start it again behind TLS."""
    device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
    device.stop()
    keys = server.data / "keys"
    certificate, key = server_certificate(keys, server.folder)
    broker = TlsFront(server.broker_port, certificate, key, ca=keys / "devices-ca.pem")
    api = TlsFront(server.port, certificate, key)
    use_tls(device.home, broker.port, f"https://127.0.0.1:{api.port}")
    device.site.url = f"https://127.0.0.1:{api.port}"
    device.start()
    device.site.url = f"http://127.0.0.1:{server.port}"
    device.until("it is connected over TLS", lambda shown: shown["connected"] == "mqtt" and broker.clients)


def used_pair(home: Path) -> str:
    """Return which key and certificate a device uses."""
    known = identity.load(home)
    return known.pair if known is not None else ""


def measure(after_s: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="wherry-rss-") as name:
        folder = Path(name)
        with site(folder, certificate_days=CERTIFICATE_S / DAY_S) as server:
            server.release("1.0.0", models.scale(folder / "one.onnx", 2.0))
            server.release("1.1.0", models.scale(folder / "two.onnx", 3.0))
            with agent(server, "bench") as device:
                enrol_and_secure(server, device)
                for version in ("1.0.0", "1.1.0"):
                    server.deploy(version, "bench", trial_s=2)
                    device.until_serves(version)
                device.ask(200)
                pair = used_pair(device.home)
                device.until(
                    "it is connected with a renewed certificate",
                    lambda shown: shown["connected"] == "mqtt" and used_pair(device.home) != pair,
                    CERTIFICATE_S,
                )
                time.sleep(after_s)
                memory = memory_mb(device.child.pid)
                smaps = Path(f"/proc/{device.child.pid}/smaps").read_text(encoding="utf-8")
                (COMPILED.parent / "supervisor_smaps.txt").write_text(smaps, encoding="utf-8")
                device.until("it is still connected", lambda shown: shown["connected"] == "mqtt")
                modules = (status.question(device.home, "modules") or {})["modules"]
                names = "\n".join(modules)
                (COMPILED.parent / "supervisor_modules.txt").write_text(names, encoding="ascii")
                device.stop()
    return {
        "supervisor_rss_mb": memory["VmRSS"],
        "supervisor_anonymous_mb": memory["RssAnon"],
        "supervisor_pss_mb": memory["Pss"],
        "supervisor_peak_mb": memory["VmHWM"],
        "after_s": after_s,
        "tls": True,
        "certificate_renewed": True,
        "modules": len(modules),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after-s", type=float, default=60.0, help="seconds between the renewal and the look")
    after_s: float = parser.parse_args().after_s
    for member in ("agent", "shared"):
        compileall.compile_dir(ROOT / member / "src", quiet=2)
    try:
        result = measure(after_s)
    except WherryError as error:
        sys.exit(error.diagnostics())
    target = ROOT / "build" / "bench" / "supervisor_rss.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
