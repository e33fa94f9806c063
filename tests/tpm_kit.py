"""A TPM in software, for a test's own use."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

STARTS_S = 20.0


@contextlib.contextmanager
def software_tpm(folder: Path) -> Iterator[str]:
    """Run swtpm with its state in `folder`; yield what `TPM2TOOLS_TCTI` has to be."""
    folder.mkdir()
    port = _pair_of_ports()
    argv = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--flags", "not-need-init,startup-clear"]
    argv += ["--server", f"type=tcp,port={port},bindaddr=127.0.0.1"]
    argv += ["--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"]
    with subprocess.Popen(argv) as child:
        try:
            _wait(port + 1, child)
            yield f"swtpm:host=127.0.0.1,port={port}"
        finally:
            child.terminate()


def _wait(port: int, child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + STARTS_S
    while child.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.02)
    raise AssertionError(f"swtpm does not answer, its exit is {child.poll()}")


def _pair_of_ports() -> int:
    """Return a free port whose successor, which the tools expect for control, is free as well."""
    for _ in range(50):
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            with contextlib.suppress(OSError):
                two.bind(("127.0.0.1", port + 1))
                return port
    raise AssertionError("no two free ports in a row")
